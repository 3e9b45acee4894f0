"""SECNN's start model, and the options of ``SelfExpanding`` that are its recipe; arXiv:2401.05686."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Block(nn.Module):
    """3x3 convolution, dropout, BatchNorm, LeakyReLU, 2x2 max-pooling: (B, I, H, W) -> (B, O, H / 2, W / 2)."""

    def __init__(self, inputs: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.LeakyReLU(0.2)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.norm(self.dropout(self.conv(x)))))  # type: ignore[no-any-return]


class SECNN(nn.Module):
    """The start model of SECNN: three blocks, a pooled skip from the first to the third one's output, a 1x1 head.

    (B, in_channels, size, size) -> (B, classes). 9024 parameters with the default arguments.
    """

    def __init__(
        self,
        channels: int = 16,
        in_channels: int = 3,
        classes: int = 10,
        size: int = 32,
        dropout: tuple[float, float] = (0.1, 0.05),
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("channels", channels, 1),
            ("in_channels", in_channels, 1),
            ("classes", classes, 1),
            ("size", size, 8),
        ):
            if value < least:
                raise ValueError(f"{name}: {value} is not allowed; a whole number of {least} or more")
        widths = [in_channels, channels, channels]
        self.blocks = nn.ModuleList([_Block(w, channels, dropout[0]) for w in widths])
        self.skip = nn.MaxPool2d(4)
        self.head = nn.Sequential(nn.Conv2d(2 * channels, 10, 1), nn.LeakyReLU(0.2), nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Linear(10 * (size // 8) ** 2, 20), nn.BatchNorm1d(20), nn.LeakyReLU(0.2), nn.Dropout(dropout[1]),
            nn.BatchNorm1d(20), nn.Linear(20, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, size, size) -> (B, classes)."""
        first = self.blocks[0](x)
        last = self.blocks[2](self.blocks[1](first))
        return self.classifier(self.head(torch.cat([last, self.skip(first)], 1)))  # type: ignore[no-any-return]


def secnn(channels: int = 16, *, in_channels: int = 3, classes: int = 10, size: int = 32) -> SECNN:
    """SECNN's start model; wrap it with ``SelfExpanding(model, example, **SECNN_OPTIONS)`` for the paper's recipe.

    ``size`` is the side of the square images; ``SECNN`` tells the shapes and errors.
    """
    return SECNN(channels, in_channels, classes, size)


SECNN_OPTIONS: dict[str, Any] = {
    "rule": "secnn",
    "score": "diag",
    "layers_behind": ("blocks.?.act",),
    "sites": ("blocks.*",),
    "activation": "leaky",
    "slope": 0.2,
    "capacity": {"layers": 10},
}
