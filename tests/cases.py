"""One small network and its data for every method of the catalogue, in the variants that keep a state of their own.

``test_catalogue`` and the scripts run over them; an entry of the catalogue without a case here fails a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant import catalog
from pliant.core.dynamic import Dynamic

CLASSES, WORDS = 3, 24


class Block(nn.Module):
    """A residual block whose inner width may change."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(x + self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x))))))


class Images(nn.Module):
    """(B, 1, 6, 6) -> (B, 3): a stem, residual blocks, dropout and a head."""

    def __init__(self, channels: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.blocks(self.stem(x)).mean((2, 3))))


class Plain(nn.Module):
    """(B, 1, 6, 6) -> (B, 3): convolutions in a row, without residual sums."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Perceptron(nn.Module):
    """(B, 6) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tokens(nn.Module):
    """(B, 5, 8) -> (B, 3): two feed-forward networks with residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for ffn in self.ffns:
            x = x + ffn(F.layer_norm(x, (8,)))
        return self.head(x.mean(1))


class Mixture(nn.Module):
    """(B, 5, 8) -> (B, 3): two mixtures of four experts."""

    def __init__(self) -> None:
        super().__init__()
        from pliant.routing.loss_free_balancing import MoE

        self.moes = nn.ModuleList(MoE(8, 8, 4, 2) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for moe in self.moes:
            x = x + moe(x)
        return self.head(x.mean(1))


class Ids(nn.Module):
    """(B, 3) ids -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 8), nn.Linear(24, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)).flatten(1))


def decoder() -> nn.Module:
    """A Llama of three blocks."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def _images(rows: int = 8) -> Tensor:
    return torch.rand(rows, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _integers(high: int, *shape: int) -> Tensor:
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """How to build one method's network, and what it eats."""

    slug: str
    model: Callable[[], Any]  # the first argument, built anew
    inputs: Callable[[], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    argument: str = "model"
    takes_example: bool = True
    targets_are_inputs: bool = False
    loss_by_row: bool = False  # whether its criterion gives a loss for each row

    def __str__(self) -> str:
        return self.slug + (f"-{self.variant}" if self.variant else "")

    def first(self) -> dict[str, Any]:
        """The argument that is code: what ``load`` takes again."""
        torch.manual_seed(7)
        return {self.argument: self.model()}

    def arguments(self) -> dict[str, Any]:
        """All arguments of the constructor."""
        example = {"example": self.inputs()[:4]} if self.takes_example else {}
        return {**self.first(), **example, **self.options}

    def build(self, **more: Any) -> Dynamic:
        """The network, always the same."""
        arguments = self.arguments() | more
        torch.manual_seed(8)
        net: Dynamic = catalog.find(self.slug).load()(**arguments)
        return net

    def batches(self, count: int = 4) -> list[Any]:
        """Batches of four rows."""
        x = self.inputs()
        y = x if self.targets_are_inputs else torch.arange(len(x)) % CLASSES
        rows = len(x) // 2
        halves = [(x[:rows], y[:rows]), (x[rows:], y[rows:])]
        return [halves[i % 2] for i in range(count)]


def _ids() -> Tensor:
    return _integers(WORDS, 8, 10)


def _anchors() -> list[nn.Module]:
    return [Images(4), Images(8)]


CASES = [
    Case("sortednet", Images, _images, {"calibration_batches": 2}),
    Case("sortednet", Images, _images, {"norm_stats": "switchable", "accumulate": 2}, "switchable"),
    Case("sortednet", Images, _images, {"mode": "sum", "calibration_batches": 2}, "sum"),
    Case("sortednet", Images, _images, {"replay": True, "calibration_batches": 2}, "replay"),
    Case("bignas", Images, _images, {"width": (0.5, 1.0), "depth": (0.5, 1.0), "calibration_batches": 2}),
    Case("proard", Images, _images, {"width": (0.5, 1.0), "divisor": 2, "attack_steps": 1, "offer": 2}),
    Case("sn-net", _anchors, _images, {"calibration_batches": 2}, argument="anchors"),
    Case("self-expanding", Images, _images, {"tau": 1.0, "proposals": 4, "proposal_steps": 2, "score_samples": 6}),
    Case("self-expanding", Perceptron, lambda: _draw(8, 6), {"tau": 1.0, "proposals": 4, "every": 2}, "perceptron"),
    Case("rd-pruning", Images, _images, {"points": 8, "sparsity": (0.5, 0.8)}),
    Case("rd-pruning", Images, _images, {"points": 8, "sparsity": (0.5,), "mode": "oneshot"}, "oneshot"),
    Case("dsnot", Perceptron, lambda: _draw(8, 6), {"cycles": 4, "sparsity": (0.5,)}),
    Case("dsl", Ids, lambda: _integers(30, 8, 3), {"update_every": 2, "total_steps": 8}),
    Case("dsl", Ids, lambda: _integers(30, 8, 3), {"update_every": 3, "total_steps": 8, "grad_window": 2}, "window"),
    Case("ftwt", Plain, _images, {"groups": 2}),
    Case("ftwt", Plain, _images, {"mode": "joint"}, "joint"),
    Case("consensus-subnetwork", Images, _images, {"warmup": 0.2, "freeze_after": 2}),
    Case("consensus-subnetwork", Plain, _images, {"granularity": "channel", "gate": "free"}, "channel"),
    Case("structured-pruning-adapters", Plain, _images, {"rank": 2}),
    Case("structured-pruning-adapters", Plain, _images, {"rank": 2, "score": "weight"}, "weight"),
    Case("structured-pruning-adapters", Perceptron, lambda: _draw(8, 6), {"kind": "splopa", "block": (4, 2)}, "splopa"),
    Case("jei-dnn", Images, _images, {"warmup": 0.2, "phase_batches": 2}, loss_by_row=True),
    Case("code-completion-exit", decoder, _ids, takes_example=False, targets_are_inputs=True),
    Case("duo-llm", decoder, _ids, {"small_ratio": 0.25}, targets_are_inputs=True),
    Case("dynamic-dino", Tokens, lambda: _draw(8, 5, 8), {"copies": 2}),
    Case("alf-lb", Mixture, lambda: _draw(8, 5, 8), takes_example=False),
    Case("weight-compander", Plain, _images, {"learnable": True}),
]
