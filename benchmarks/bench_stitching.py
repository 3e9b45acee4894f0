"""What a stitched network costs beside its extracted children: time of a switch, memory, least-squares start.

Ratios of times that are measured in turn. Written to ``benchmarks/results/stitching.json``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.cost import count_bytes, time_ratio
from pliant.elastic.stitching import StitchNet
from pliant.tasks.images import SmallResNet
from tables import write

IMAGES, BATCH = 512, 64


class Block(nn.Module):
    """A transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Vit(nn.Module):
    """A small vision transformer of 12 blocks: (B, 1, 28, 28) -> (B, 10)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(0.02 * torch.randn(1, 50, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> (B, 10)."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        y: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return y


def families() -> dict[str, list[nn.Module]]:
    """Anchors without BatchNorm and with it."""
    torch.manual_seed(0)
    return {
        "three transformers of 12 blocks, widths 24, 48, 96": [Vit(24, 1), Vit(48, 2), Vit(96, 4)],
        "two ResNets, 2 and 4 blocks a stage, BatchNorm": [
            SmallResNet(blocks=2),
            SmallResNet(widths=(24, 48, 96), blocks=4),
        ],
    }


def measure(name: str, anchors: list[nn.Module]) -> dict[str, Any]:
    """All figures of one family."""
    x, y = torch.randn(IMAGES, 1, 28, 28), torch.randint(0, 10, (IMAGES,))
    net = StitchNet(anchors, x[:2])
    stitches = sum(len(c.stitches) == 1 for c in net.configurations)

    def epoch() -> None:
        net.train()
        for i in range(0, IMAGES, BATCH):
            net.zero_grad(set_to_none=True)
            net.loss((x[i : i + BATCH], y[i : i + BATCH])).backward()

    def start() -> None:
        net.initialize(x, images=IMAGES, recalibrate=False)

    start()
    init = time_ratio(start, epoch, repeats=3, warmup=1)
    net.initialize(x)
    if net.norms:
        net.calibrate(x)
    net.eval()
    middle = net.points()[len(net.points()) // 2]
    other = net.points()[0]
    child = net.extract(middle)
    rows = []
    with torch.no_grad():
        for batch in (1, BATCH):
            inputs = x[:batch]
            assert torch.equal(net.use(middle)(inputs), child(inputs))

            def switched(inputs: Tensor = inputs) -> Tensor:
                net.use(other)
                return net.use(middle)(inputs)  # type: ignore[no-any-return]

            ratio = time_ratio(switched, lambda inputs=inputs: child(inputs), repeats=61)  # type: ignore[misc]
            rows.append(
                {
                    "batch": batch,
                    "two switches and a run / extracted": round(ratio.median, 3),
                    "quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
                    "extracted, ms": round(1e3 * ratio.seconds / ratio.median, 3),
                }
            )
    children = sum(count_bytes(net.extract(p)) for p in net.points())
    return {
        "anchors": name,
        "paths": len(net.points()),
        "layers": len(net.layers),
        "switching": rows,
        "bytes": count_bytes(net),
        "bytes / anchors": round(count_bytes(net) / sum(count_bytes(a) for a in net.anchors), 3),
        "bytes / all children": round(count_bytes(net) / children, 4),
        "least squares of all stitches / one epoch, same images": round(init.median, 3),
        "one stitch / one epoch": round(init.median / stitches, 5),
        "least squares, seconds a stitch": round(init.seconds / stitches, 5),
    }


def main() -> None:
    """Measure both families and write the table."""
    torch.set_num_threads(1)
    rows = [measure(name, anchors) for name, anchors in families().items()]
    write(
        "stitching",
        f"ratios of times measured in turn, one thread; least squares and epochs on {IMAGES} images of 28x28",
        rows=rows,
    )


if __name__ == "__main__":
    main()
