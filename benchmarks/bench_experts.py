"""Do experts cost what their active width costs, and what does balancing them cost?

*Back-ends*: 16 experts of 1024, 2 for each token, d = 256, against one feed-forward network of width 2048, which does
the same multiplications for each token; forward passes, the router left out and choices random. *Balancer*: seconds
spent in its hooks and in ``step`` as a share of whole training steps, measured inside those steps, of a small and a
larger decoder. Ratios are of neighbours timed in turn in one run. Written to ``benchmarks/results/experts.json``.

    python benchmarks/bench_experts.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.cost import Ratio, time_ratio
from pliant.core.experts import Backend, Experts
from pliant.routing.loss_free_balancing import LossFreeBalancer, MoE
from pliant.tasks import language
from tables import write

FEATURES, HIDDEN, EXPERTS, TOP_K = 256, 1024, 16, 2
TOKENS = (16, 900, 3600)
WAYS: tuple[Backend, ...] = ("loop", "grouped", "dense")
DENSE_MOST = 900  # all experts on 3600 tokens take seconds


def _rounded(ratio: Ratio) -> list[float]:
    return [round(v, 2) for v in (ratio.median, ratio.low, ratio.high)]


def _backends(tokens: int) -> dict[str, Any]:
    """Time of each way relative to the dense network of the same active width: median and quartiles."""
    torch.manual_seed(0)
    experts = Experts(FEATURES, HIDDEN, EXPERTS, bias=False).eval()
    dense = nn.Sequential(
        nn.Linear(FEATURES, TOP_K * HIDDEN, bias=False), nn.ReLU(), nn.Linear(TOP_K * HIDDEN, FEATURES, bias=False)
    ).eval()
    x = torch.randn(tokens, FEATURES)
    chosen = torch.rand(tokens, EXPERTS).argsort(-1)[:, :TOP_K]
    weights = torch.full((tokens, TOP_K), 1.0 / TOP_K)

    def run(way: Backend) -> Tensor:
        experts.backend = way
        y: Tensor = experts(x, chosen, weights)
        return y

    row: dict[str, Any] = {"tokens": tokens, "rows of an expert": round(tokens * TOP_K / EXPERTS, 1)}
    with torch.inference_mode():
        for way in WAYS:
            if way == "dense" and tokens > DENSE_MOST:
                continue
            row[way] = _rounded(time_ratio(partial(run, way), lambda: dense(x), repeats=15))
    print(row, flush=True)
    return row


def _decoder(width: int, layers: int, hidden: int, length: int) -> nn.Module:
    model = language.small_decoder("llama", width=width, layers=layers, length=length)
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp = MoE(width, hidden, EXPERTS, TOP_K, activation=F.silu, gated=True, bias=False)  # type: ignore[union-attr]
    return model


def _overhead(name: str, width: int, layers: int, hidden: int, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Seconds of counting and of ``step`` in seconds of training, AdamW included."""
    net = LossFreeBalancer(_decoder(width, layers, hidden, length)).train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    spent = {"counting": 0.0, "step": 0.0}

    def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            found = function(*args)
            spent[kind] += time.perf_counter() - start
            return found

        return call

    net._count = timed("counting", net._count)  # type: ignore[method-assign]
    ids = torch.randint(256, (rows, length + 1))
    shares = []
    for i in range(steps + 2):
        spent.update(counting=0.0, step=0.0)
        start = time.perf_counter()
        optimizer.zero_grad()
        net.loss((ids[:, :-1], ids[:, 1:])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        timed("step", net.step)()
        if i > 1:  # the first are warm-up
            shares.append((time.perf_counter() - start, spent["counting"], spent["step"]))
    whole, counting, step = (sorted(column)[len(column) // 2] for column in zip(*shares, strict=True))
    row = {
        "network": name,
        "tokens": rows * length,
        "ms of a training step": round(1e3 * whole, 2),
        "ms of counting": round(1e3 * counting, 3),
        "ms of step": round(1e3 * step, 3),
        "share": round((counting + step) / whole, 5),
        "below 1 %": (counting + step) / whole < 0.01,
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Measure, print, and write the result beside the script."""
    torch.set_num_threads(1)
    backends = [_backends(tokens) for tokens in TOKENS]
    overhead = [
        _overhead("2 layers of width 64", 64, 2, 64, 12, 64, steps=60),
        _overhead("4 layers of width 128, the specification's", 128, 4, 64, 32, 128, steps=8),
    ]
    slower = all(row[way][0] > 1 for row in backends for way in WAYS if way in row)
    write(
        "experts",
        "16 experts of 1024, 2 for each token, d = 256, forward, relative to a dense network of width 2048 (median, "
        "quartiles), one thread; and the balancer's share of a training step",
        backends=backends,
        experts_are_slower_than_dense_of_equal_active_width=slower,
        balancer=overhead,
    )


if __name__ == "__main__":
    main()
