"""What the experiments share: batches that are the same for every arm, and checks with their measured values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Batches:
    """``steps`` random batches of ``batch`` rows out of x and y, a function of the seed: the same for every arm.

    ``flip`` mirrors half of the images (B, C, H, W), drawn one by one.
    """

    def __init__(self, x: Tensor, y: Tensor, seed: int, steps: int, batch: int = 64, *, flip: bool = False) -> None:
        self.x, self.y, self.seed, self.steps, self.batch, self.flip = x, y, seed, steps, batch, flip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            rows = torch.randint(len(self.x), (self.batch,), generator=generator)
            x = self.x[rows]
            if self.flip:
                turned = torch.rand(self.batch, generator=generator) < 0.5
                x = torch.where(turned[:, None, None, None], x.flip(-1), x)
            yield x, self.y[rows]

    def __len__(self) -> int:
        return self.steps


def check(statement: str, value: float, *, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    """A statement, whether the value is within its limits, and the value."""
    holds = (least is None or value >= least) and (most is None or value <= most)
    return {"statement": statement, "holds": holds, "measured": float(f"{value:.4g}")}


def verdict(checks: Sequence[dict[str, Any]]) -> str:
    """Say "holds" if all checks do, "partly" if half of them do, else "does not hold"."""
    held = sum(c["holds"] for c in checks)
    return "holds" if held == len(checks) else "partly" if held >= len(checks) / 2 else "does not hold"
