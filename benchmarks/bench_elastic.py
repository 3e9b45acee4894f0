"""The elastic super-network against separate networks: a training step, switching, a search, memory.

Ratios measured in one run, one thread. Written to ``benchmarks/results/elastic.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.calibration import batches_of
from pliant.core.cost import count_bytes, time_ratio
from pliant.core.frontier import evaluate
from pliant.elastic.bignas import BigNAS
from pliant.tasks.images import SmallResNet
from tables import write

BATCH = 64


def _step(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _row(what: str, ratio: Any) -> dict[str, Any]:
    row = {"what": what, "ratio": round(ratio.median, 3), "quartiles": [round(ratio.low, 3), round(ratio.high, 3)]}
    print(row)
    return row


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SmallResNet()
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    net = BigNAS(model, x[:2], width=(0.25, 0.5, 0.75, 1.0), resolution=(20, 24, 28), zero_gamma=True)
    net.finish([(x, y)])
    rows = []

    # A step of the sandwich against one step each of as many plain networks of the same sizes.
    generator = torch.Generator().manual_seed(0)
    drawn = [net.space.canonical(net.space.sample(generator)) for _ in range(64)]
    net.calibrate([(x, y)], points=drawn)
    turn = iter(range(10**9))

    def sandwich() -> Tensor:
        torch.manual_seed(0)
        net.draw = lambda: [*_pair(next(turn)), net.space.smallest]  # type: ignore[method-assign]
        return net.loss((x, y))

    def _pair(i: int) -> list[Any]:
        return [drawn[2 * i % 64], drawn[(2 * i + 1) % 64]]

    plain = {p: net.extract(p) for p in [net.space.largest, net.space.smallest, *drawn]}
    steps = {p: _step(n.train(), lambda n=n: F.cross_entropy(n(x), y)) for p, n in plain.items()}
    other = iter(range(10**9))

    def separate() -> None:
        for p in (net.space.largest, *_pair(next(other)), net.space.smallest):
            steps[p]()

    rows.append(
        _row("sandwich step (4 children) / one step of each of 4 such plain networks",
             time_ratio(_step(net.train(), sandwich), separate, repeats=31))
    )  # fmt: skip
    rows.append(
        _row("sandwich step / one step of the largest network alone",
             time_ratio(_step(net.train(), sandwich), steps[net.space.largest], repeats=31))
    )  # fmt: skip

    # Turning the dial and running, against running the extracted network.
    net.eval()
    net.finish([(x, y)])
    points = net.points()
    for batch in (1, 64):
        for name, p in (("smallest", points[0]), ("middle", points[len(points) // 2])):
            child, inputs = net.extract(p), torch.randn(batch, 1, 28, 28)
            with torch.no_grad():
                ratio = time_ratio(lambda: net.use(p)(inputs), lambda: child(inputs), repeats=31)  # noqa: B023
            rows.append(_row(f"use + forward / extracted forward, {name} child, batch {batch}", ratio))

    # One candidate of a search: its costs, its statistics, its validation accuracy; against one training step.
    taken = batches_of([(x, y)] * 8, 8, torch.device("cpu"))
    validation = [(torch.randn(500, 1, 28, 28), torch.randint(0, 10, (500,)))]
    fresh = iter(net.space.sample(generator) for _ in range(10**9))

    def candidate() -> None:
        p = net.space.canonical(next(fresh))
        net.axes.flops(p)
        net._calibrate([p], taken)
        evaluate(net.use(p), validation)
        net.use(points[-1])
        net.norms.keep(points)

    rows.append(
        _row("search: one candidate (FLOPs, statistics on 8 batches of 64, 500 validation images) / one sandwich step",
             time_ratio(candidate, _step(net.train(), sandwich), repeats=15))
    )  # fmt: skip
    net.eval()
    rows.append(
        _row("search: the same candidate's FLOPs alone / one sandwich step",
             time_ratio(lambda: net.axes.flops(next(fresh)), _step(net.train(), sandwich), repeats=15))
    )  # fmt: skip

    # Memory.
    net.finish([(x, y)])
    whole = count_bytes(model)
    children = [count_bytes(net.extract(p)) for p in points]
    some = [count_bytes(plain[p]) for p in drawn]
    memory = {
        "super-network, bytes": whole,
        f"its {len(points)} offered children stored separately / super-network": round(sum(children) / whole, 2),
        "64 random children stored separately / super-network": round(sum(some) / whole, 2),
        "a row of normalisation statistics / super-network": round(8 * net.norms.mean.shape[1] / whole, 4),
        "children in the space": net.space.size,
    }
    print(memory)
    write(
        "elastic",
        "SmallResNet as a super-network: resolution x width x depth x expansion; batch of 64, one thread; "
        "the two sides of a ratio timed in turn",
        rows=rows,
        memory=memory,
    )


if __name__ == "__main__":
    main()
