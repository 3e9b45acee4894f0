"""Consensus sub-networks: is the cut network faster by what it saves, and what do gates cost while training?

Time ratios, one thread, the two timed in turn. Written to ``benchmarks/results/consensus.json``.
"""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F

from pliant.core.cost import flops_per_sample, time_ratio
from pliant.sparsity.consensus import Consensus
from pliant.tasks.images import SmallResNet
from tables import write


def main() -> None:
    """Cut half of the branches, or half of the inner channels, and time the rest."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, training = [], []
    model = SmallResNet(widths=(32, 64, 128), blocks=3)
    for granularity in ("layer", "channel"):
        for share in (0.75, 0.5, 0.25):
            net = Consensus(copy.deepcopy(model), torch.randn(2, 1, 28, 28), granularity=granularity).eval()
            for a, b in zip(net._bounds, net._bounds[1:], strict=False):
                wide = b - a
                if granularity == "channel":
                    net.means[a : a + round((1 - share) * wide)] = 0.0
            if granularity == "layer":
                gates = len(net.means)
                net.means[torch.linspace(0, gates - 1, round((1 - share) * gates)).round().long()] = 0.0
            small = net.extract(net.points()[0])
            for batch in (1, 64):
                x = torch.randn(batch, 1, 28, 28)
                with torch.no_grad():
                    ratio = time_ratio(lambda: small(x), lambda: net.model(x), repeats=31)  # noqa: B023
                flops = flops_per_sample(small, x).total / flops_per_sample(net.model, x).total
                rows.append(
                    {
                        "cut": granularity,
                        "kept": share,
                        "batch": batch,
                        "FLOPs ratio": round(flops, 3),
                        "time ratio": round(ratio.median, 3),
                        "quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
                    }
                )
                print(rows[-1])
    x, y = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    for granularity in ("layer", "channel"):
        for frozen in (False, True):
            net = Consensus(copy.deepcopy(model), x[:2], granularity=granularity).train()
            if frozen:
                net.frozen.copy_(torch.arange(len(net.frozen)) % 2)
            plain = copy.deepcopy(model).train()
            ratio = time_ratio(
                lambda: net.loss((x, y)).backward(),  # noqa: B023
                lambda: F.cross_entropy(plain(x), y).backward(),  # noqa: B023
                repeats=15,
            )
            training.append(
                {
                    "gates": granularity,
                    "half of them fixed shut, half open": frozen,
                    "training step / plain step": round(ratio.median, 3),
                    "quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
                }
            )
            print(training[-1])
    write("consensus", "time ratios, SmallResNet (32, 64, 128) with 3 blocks a stage, one thread", rows=rows,
          training=training)  # fmt: skip


if __name__ == "__main__":
    main()
