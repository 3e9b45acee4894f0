"""What growth costs: one expansion check against one training epoch, and scores from the cache against deep copies.

Ratios of time, one thread, the two timed in turn. Written to ``benchmarks/results/self_expanding.json``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.cost import time_ratio
from pliant.elastic.self_expanding import SelfExpanding, natural_expansion_score, secnn
from pliant.tasks import images
from tables import write

REPEATS = 3


def _epoch(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> Callable[[], None]:
    """One epoch of Adam over all rows."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def run() -> None:
        model.train()
        for rows in torch.split(torch.randperm(len(x)), batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return run


def _by_copies(net: SelfExpanding, batch: tuple[Tensor, Tensor]) -> Callable[[], list[float]]:
    """The same question by a deep copy and a full score for each candidate, as SECNN's code asks it."""
    eta, seen, candidates = net.candidates(batch)

    def run() -> list[float]:
        scores = []
        for candidate in candidates:
            trial = copy.deepcopy(net)
            trial._make(candidate, seen, None)
            scores.append(natural_expansion_score(trial.model, batch, fisher="diag", damping=net.eps) - eta)
        return scores

    return run


def _setting(name: str) -> tuple[Callable[[], nn.Module], Tensor, Tensor, dict[str, Any], int]:
    if name == "MLP 64-14-12-10 on digits":
        x, y = images.load("digits").train.tensors

        def mlp() -> nn.Module:
            return nn.Sequential(
                nn.Flatten(), nn.Linear(64, 14), nn.SiLU(), nn.Linear(14, 12), nn.SiLU(), nn.Linear(12, 10)
            )

        return mlp, x, y, {}, 128
    x, y = (t[:3000] for t in images.load("fashion-mnist").train.tensors)
    options = {"sites": ("blocks.*",), "layers_behind": ("blocks.?.act",), "activation": "leaky"}
    return lambda: secnn(8, in_channels=1, size=28), x, y, options, 100


def main() -> None:
    """Measure both settings and write the table."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in ("MLP 64-14-12-10 on digits", "SECNN model, 8 channels, 3000 images of 28x28"):
        make, x, y, options, batch_size = _setting(name)
        torch.manual_seed(0)
        batch = (x[:256], y[:256])
        epoch = _epoch(make(), x, y, batch_size)
        for label, more in (
            ("K-FAC, 64 proposals x 30 steps", {}),
            ("K-FAC, drawn units", {"init": "random"}),
            ("diagonal, drawn units", {"score": "diag", "init": "random"}),
        ):
            net = SelfExpanding(make(), x[:2], **(options | more))
            check = time_ratio(lambda: net.candidates(batch), epoch, repeats=REPEATS, warmup=1)  # noqa: B023
            rows.append({"setting": name, "what": f"one check ({label}) / one epoch", **_figures(check)})
            print(rows[-1])
        net = SelfExpanding(make(), x[:2], score="diag", init="random", **options)
        copies = _by_copies(net, batch)
        apart = max(
            abs(c.delta - s) / max(abs(s), 1e-9) for c, s in zip(net.candidates(batch)[2], copies(), strict=True)
        )
        ratio = time_ratio(copies, lambda: net.candidates(batch), repeats=REPEATS, warmup=1)  # noqa: B023
        rows.append(
            {
                "setting": name, "what": "a deep copy for each candidate / scores from the cache", **_figures(ratio),
                "candidates": len(net.candidates(batch)[2]), "largest relative difference": round(apart, 5),
            }
        )  # fmt: skip
        print(rows[-1])
    write(
        "self_expanding",
        "time ratios, 256 samples to score, one thread, the two timed in turn",
        rows=rows,
    )


def _figures(ratio: Any) -> dict[str, Any]:
    return {"ratio": round(ratio.median, 3), "quartiles": [round(ratio.low, 3), round(ratio.high, 3)]}


if __name__ == "__main__":
    main()
