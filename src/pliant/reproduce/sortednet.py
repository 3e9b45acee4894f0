"""SortedNet on scikit-learn's digits: one training for seven widths against seven trainings.

Every arm sees the same number of samples (500 steps of 64), with the same optimiser and schedule.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pliant.core.cost import flops_per_sample
from pliant.core.frontier import measure
from pliant.core.slicing import Slicing
from pliant.core.training import fit
from pliant.elastic.sortednet import SortedNet
from pliant.reproduce.common import Batches, check, verdict
from pliant.tasks import images

WIDTHS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
STEPS, BATCH = 500, 64
ARMS = {
    "(a) trained at full width, then truncated": {"width": (1.0,), "accumulate": 1},
    "(b) SortedNet, one draw a step": {"width": WIDTHS, "accumulate": 1},
    "(c) SortedNet, four draws a step": {"width": WIDTHS, "accumulate": 4},
    "(d) slimmable: the sum over all widths": {"width": WIDTHS, "mode": "sum"},
}
SEPARATE = "(e) one network trained for each width"


def _mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def _train(net: SortedNet, data: Batches) -> SortedNet:
    fit(
        net, data, steps=STEPS, lr_schedule="cosine", clip=5.0, weight_decay=0.0, progress=False, seed=data.seed,
        optimizer=lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9),
    )  # fmt: skip
    return net


def run(seeds: int = 3, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """All arms for ``seeds`` seeds: test accuracy in percent at every width."""
    data = images.load("digits")
    x, y = data.train.tensors
    test = [data.test.tensors]
    found: dict[str, list[list[float]]] = {name: [] for name in [*ARMS, SEPARATE]}
    for seed in range(seeds):
        progress(f"seed {seed}")
        batches = Batches(x, y, seed, STEPS)
        for name, options in ARMS.items():
            net = _train(SortedNet(_mlp(seed), data.example, seed=seed, **options), batches)  # type: ignore[arg-type]
            if net.width == (1.0,):
                net = SortedNet(net.model, data.example, width=WIDTHS)  # the trained network, truncated
            front = measure(net, test, repeats=0)
            found[name].append([100 * r.quality for r in sorted(front.rows, key=lambda r: r.parameters)])
        separate = []
        for width in WIDTHS:
            small = Slicing(_mlp(seed), data.example).subnetwork(width).extract(_mlp(seed))
            for module in small.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()  # an initialisation of its own size
            net = _train(SortedNet(small, data.example, width=(1.0,), accumulate=1), batches)
            separate.append(100 * measure(net, test, repeats=0).rows[0].quality)
        found[SEPARATE].append(separate)

    def mean(name: str, width: float) -> float:
        return statistics.fmean(row[WIDTHS.index(width)] for row in found[name])

    def spread(name: str, width: float) -> float:
        values = [row[WIDTHS.index(width)] for row in found[name]]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    a, _, c, d = ARMS
    slicing = Slicing(_mlp(0), data.example)
    costs = [flops_per_sample(slicing.subnetwork(w).extract(slicing.model), data.example).total for w in WIDTHS]
    share = statistics.fmean(costs) / sum(costs)  # a draw costs the mean, the sum costs all
    worst = min(mean(c, w) / mean(c, 1.0) for w in WIDTHS if w >= 1 / 8)
    behind = max(mean(SEPARATE, w) - mean(c, w) for w in WIDTHS if w >= 1 / 8)
    apart = max(abs(mean(d, w) - mean(c, w)) for w in WIDTHS)
    loss = mean(a, 1.0) - mean(c, 1.0)
    checks = [
        check("(c) beats truncation (a) by 20 points at width 1/4", mean(c, 1 / 4) - mean(a, 1 / 4), least=20),
        check("(c) beats truncation (a) by 8 points at width 1/2", mean(c, 1 / 2) - mean(a, 1 / 2), least=8),
        check("(c) stays within 3 points of separate training (e) at every width from 1/8", behind, most=3),
        check("(c) is within 1.5 points of the sum (d) at every width", apart, most=1.5),
        check("a step of (c) costs less than 40 % of a step of (d), in percent of FLOPs", 100 * share, most=40),
        check("the full width loses at most 2 points to ordinary training (a)", loss, most=2),
    ]
    return {
        "claim": "One training with random sub-networks gives all sizes nearly the quality of networks trained alone; "
        "the paper: 160 sub-models with at least 96 % of the full model's performance.",
        "source_figure": "arXiv:2309.00255, abstract; experiment of the specification on digits",
        "baselines": [n for n in found if n != c],
        "table": [
            {"arm": name}
            | {f"width {w:.3g}": f"{mean(name, w):.1f} ± {spread(name, w):.1f}" for w in WIDTHS}
            | {"values": {f"{w:.5g}": [row[i] for row in rows] for i, w in enumerate(WIDTHS)}}
            for name, rows in found.items()
        ],
        "checks": checks,
        "verdict": verdict(checks),
        "notes": [
            f"Worst share of the full width's accuracy from width 1/8 on: {100 * worst:.1f} %; at 1/32 it is "
            f"{100 * mean(c, 1 / 32) / mean(c, 1.0):.1f} %.",
            f"Minimum over all widths: {min(mean(c, w) for w in WIDTHS):.1f} % for (c), "
            f"{min(mean(SEPARATE, w) for w in WIDTHS):.1f} % for separate training.",
            f"The full width loses {loss:.1f} points to ordinary training.",
        ],
    }
