"""Time of ``fit`` against a bare PyTorch loop that does the same steps: the baseline network on embedded Fashion-MNIST.

Run: python benchmarks/bench_fit.py [steps [repeats]]. Writes benchmarks/results/fit.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant._version import __version__
from pliant.core.dynamic import Dynamic, Point, Value
from pliant.core.inputs import Batch
from pliant.core.objective import cross_entropy
from pliant.core.training import fit
from pliant.tasks import images

BATCH = 64


class Plain(Dynamic):
    """A network with a dial of one setting."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.point = self.points()[0]

    def points(self) -> list[Point]:
        return [Point(plain=1)]

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return cross_entropy(self.model(x), y)

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        return self.model


def bare(net: Plain, data: list[tuple[Tensor, Tensor]], steps: int) -> None:
    """What a user would write by hand; as ``fit`` it stops at a loss that is not finite."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in range(steps):
        loss = net.loss(data[step % len(data)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not loss.isfinite():
            raise RuntimeError("diverged")
    net.eval()


def main(steps: int = 40, repeats: int = 15) -> None:
    """Time the two in turn; the order within a pair alternates."""
    torch.set_num_threads(1)
    task = images.load("fashion-mnist")
    x, y = task.train.tensors
    data = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, steps * BATCH, BATCH)]

    def one(which: str) -> tuple[float, Plain]:
        net = Plain(images.baseline(task))
        start = time.perf_counter()
        if which == "bare":
            bare(net, data, steps)
        else:
            fit(net, data, steps=steps, lr=0.01, lr_schedule="constant", progress=False)
        return time.perf_counter() - start, net

    a, b = one("bare")[1], one("fit")[1]
    equal = all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    ratios, bare_seconds = [], []
    for i in range(repeats):
        order = ("bare", "fit") if i % 2 else ("fit", "bare")
        seconds = {which: one(which)[0] for which in order}
        ratios.append(seconds["fit"] / seconds["bare"])
        bare_seconds.append(seconds["bare"])
    low, median, high = statistics.quantiles(ratios, n=4)
    result = {
        "what": "seconds of fit / seconds of a bare loop, same steps, one process, one thread",
        "ratio": median,
        "quartiles": [low, high],
        "repeats": repeats,
        "steps": steps,
        "batch": BATCH,
        "bare_seconds_per_step": statistics.median(bare_seconds) / steps,
        "equal_weights": equal,
        "torch": torch.__version__,
        "pliant": __version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
    path = Path(__file__).parent / "results" / "fit.json"
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(fresh, path)
    print(f"fit / bare loop: {median:.3f} (quartiles {low:.3f} to {high:.3f}), equal weights: {equal}")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
