"""Does leaving filters out become time? FTWT's ways to execute a layer against the dense network, beside the MACs.

Two networks of four convolutions, three keep rates, batches of 1, 32 and 64. The heads are set so that each filter is
on for the given share of images: each image its own ("different"), or the batch is made of a few images ("8 kinds") or
of one ("alike"). Heads, masks and grouping are in the time. Ratios of time, timed in turn in one run. Written to
``benchmarks/results/ftwt.json``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.cost import Ratio, flops_per_sample, latency_ratio
from pliant.sparsity.ftwt import FTWT
from tables import write

NETWORKS = {"small (16, 32, 32, 64)": (16, 32, 32, 64), "wide (64, 128, 128, 256)": (64, 128, 128, 256)}
KEEP = (0.25, 0.5, 0.75)
BATCHES = (1, 32, 64)
REPEATS = 15


def _network(widths: tuple[int, ...]) -> nn.Module:
    """Convolutions with norms and ReLU on 28x28 images, strides 2, 1, 2, 1."""
    layers: list[nn.Module] = []
    inputs = 1
    for width, stride in zip(widths, (2, 1, 2, 1), strict=True):
        layers += [nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    with torch.no_grad():
        model(torch.randn(64, 1, 28, 28))
    return model.eval()


def _gate(net: FTWT, x: Tensor, keep: float) -> Tensor:
    """Set biases with which every filter is on for a share ``keep`` of ``x``; return ``x``, typical images first."""
    with torch.no_grad():
        for k, head in enumerate(net.heads):
            assert isinstance(head, nn.Linear)
            head.bias.zero_()
            scores = net.trace(x, execution="masked").scores[k]
            head.bias.copy_(-scores.quantile(1 - keep, dim=0))
        trace = net.trace(x, execution="masked")
        macs = torch.stack([net.layer_macs(k, trace) for k in range(len(net.layers))]).sum(0).float()
        return x[(macs - macs.mean()).abs().argsort()]


def _rounded(ratio: Ratio) -> list[float]:
    return [round(v, 2) for v in (ratio.median, ratio.low, ratio.high)]


def _row(net: FTWT, dense: nn.Module, x: Tensor) -> dict[str, Any]:
    """The share of MACs that is left, by our count and as dispatched, and the time of each way to execute."""
    row: dict[str, Any] = {"macs": round(1 - net.stats(x).saving, 3)}
    full = flops_per_sample(dense, x).total
    for execution in ("masked", "grouped", "union"):
        net.execution = execution  # type: ignore[assignment]
        row[f"flops {execution}"] = round(flops_per_sample(net, x).total / full, 3)
        row[f"time {execution}"] = _rounded(latency_ratio(net, dense, x, repeats=REPEATS))
    chosen = [c.execution for c in net.tune(x, repeats=5).values()]
    row["time tuned"] = _rounded(latency_ratio(net, dense, x, repeats=REPEATS))
    row["chosen"] = " ".join(chosen)
    return row


def main() -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, widths in NETWORKS.items():
        dense = _network(widths)
        scenes = F.interpolate(torch.randn(64, 1, 4, 4), size=28, mode="bilinear") + 0.3 * torch.randn(64, 1, 28, 28)
        for keep in KEEP:
            net = FTWT(dense, scenes[:2], norm="none").eval()
            x = _gate(net, scenes, keep)
            for batch in BATCHES:
                kinds = {"different": x[:batch]}
                if batch > 1:
                    kinds |= {"8 kinds": x[torch.arange(batch) % 8], "alike": x[:1].expand(batch, -1, -1, -1)}
                for kind, images in kinds.items():
                    rows.append({"network": name, "keep": keep, "batch": batch, "masks": kind})
                    rows[-1] |= _row(net, dense, images.contiguous())
                    print(rows[-1], flush=True)
    write(
        "ftwt",
        "share of the dense network that is left: multiply-adds counted (macs), FLOPs dispatched, and time (median and "
        "quartiles of ratios), whole network, one thread; 'union' has 4 groups; 'tuned' takes for each layer what was "
        "faster on that batch",
        rows=rows,
        in_words=_summary(rows),
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Where leaving filters out saves time on this machine, and where not, in words."""
    found = {}
    for network in NETWORKS:
        for batch in BATCHES:
            for kind in ("different", "8 kinds", "alike"):
                mine = [r for r in rows if (r["network"], r["batch"], r["masks"]) == (network, batch, kind)]
                if mine:
                    parts = [f"keep {r['keep']}: MACs {r['macs']}, time {r['time tuned'][0]}" for r in mine]
                    saved = [r for r in mine if r["time tuned"][2] < 0.95]
                    word = "saves time" if len(saved) == len(mine) else "saves time at some" if saved else "saves none"
                    found[f"{network}, batch {batch}, {kind}"] = f"{word}; " + "; ".join(parts)
    return found


if __name__ == "__main__":
    main()
