"""Structured pruning adapters: bytes of a task against a network of its own, time of the cut network, cost of training.

Ratios, one thread, the two timed in turn. Written to ``benchmarks/results/pruning_adapters.json``.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from pliant.core.cost import flops_per_sample, time_ratio
from pliant.core.objective import cross_entropy
from pliant.sparsity.pruning_adapters import PruningAdapters
from pliant.tasks.images import SmallResNet
from tables import write


def main() -> None:
    """Channels down to 30 % for SPLoRA, blocks down to 10 % for SPLoPA."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    base = SmallResNet(widths=(32, 64, 128))
    example = torch.randn(2, 1, 28, 28)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("splora", "sppara"):
            net = PruningAdapters(copy.deepcopy(base), example, kind=kind, score="weight")
            for density in (1.0, 0.7, 0.5, 0.3):
                now = float(net.point["density"])
                if density < now:
                    net.prune(now - density)
                net.eval()
                small = net.fuse()
                task = net.save_task(Path(folder) / "task").stat().st_size
                own = len(safetensors.torch.save(small.state_dict()))
                for batch in (1, 64):
                    x = torch.randn(batch, 1, 28, 28)
                    with torch.no_grad():
                        ratio = time_ratio(lambda: small(x), lambda: base.eval()(x), repeats=21)  # noqa: B023
                    flops = flops_per_sample(small, x).total / flops_per_sample(base, x).total
                    rows.append(
                        {
                            "kind": kind,
                            "density": density,
                            "batch": batch,
                            "FLOPs ratio": round(flops, 3),
                            "time ratio": round(ratio.median, 3),
                            "quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
                            "task file / file of the network alone": round(task / own, 3),
                        }
                    )
                    print(rows[-1])
    x, y = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    plain = copy.deepcopy(base).train()
    training = []
    for density in (1.0, 0.3):
        net = PruningAdapters(copy.deepcopy(base), example, score="weight")
        if density < 1:
            net.prune(1 - density)
        net.train()
        ratio = time_ratio(
            lambda: net.loss((x, y)).backward(),  # noqa: B023
            lambda: cross_entropy(plain(x), y).backward(),
            repeats=15,
        )
        training.append({"density": density, "SPLoRA step / full fine-tuning step": round(ratio.median, 3)})
        print(training[-1])
    blocks = []
    model = nn.Sequential(
        nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    ).eval()
    for batch in (1, 64):
        x = torch.randn(batch, 1024)
        for density in (0.5, 0.3, 0.1):
            net = PruningAdapters(model, x, kind="splopa", prototypes=8, score="weight")
            net.prune(1 - density)
            small = net.eval().extract(net.point, sparse=True)
            with torch.no_grad():
                ratio = time_ratio(lambda: small(x), lambda: model(x), repeats=21)  # noqa: B023
            blocks.append(
                {"density": density, "batch": batch, "time ratio": round(ratio.median, 3), "layouts": small.layouts}
            )
            print(blocks[-1])
    write("pruning_adapters", "SmallResNet (32, 64, 128); 1024-1024-1024 for blocks; one thread", channels=rows,
          training=training, blocks=blocks)  # fmt: skip


if __name__ == "__main__":
    main()
