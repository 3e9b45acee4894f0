"""Networks drawn at random: each is cut right, or refused; judged without looking at the map of channels.

The activations keep zero at zero, so a channel that is zero where it is made is zero where it is read. The cut network
must therefore compute what the full one computes with these channels set to zero in the outputs of the layers that make
them. Only the makers' own outputs are named by the groups here; where channels go is left to the full network.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.slicing import Slicing


class Drawn(nn.Module):
    """A program over a few feature maps: (operation, which maps, layer, numbers)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.program: list[tuple[str, tuple[int, ...], int, Any]] = []
        self.widths = [3]  # channels of each map so far; map 0 is the input
        self._convolution(draw, 0)
        for _ in range(draw.randint(3, 9)):
            getattr(self, f"_{draw.choice(OPERATIONS)}")(draw, draw.randrange(1, len(self.widths)))
        self._finish(draw)

    # -- drawing ----------------------------------------------------------------------------------------------------

    def _add(
        self, name: str, maps: tuple[int, ...], width: int, layer: nn.Module | None = None, more: Any = None
    ) -> int:
        if layer is not None:
            self.layers.append(layer)
        self.program.append((name, maps, len(self.layers) - 1, more))
        self.widths.append(width)
        return len(self.widths) - 1

    def _convolution(self, draw: random.Random, i: int) -> None:
        width = draw.choice([4, 6, 8, 12])
        self._add("layer", (i,), width, nn.Conv2d(self.widths[i], width, draw.choice([1, 3]), padding="same"))

    def _shared(self, draw: random.Random, i: int) -> None:
        """A layer that ran before runs again on another map of its width."""
        fits = [k for k, m in enumerate(self.layers) if isinstance(m, nn.Conv2d) and m.in_channels == self.widths[i]]
        if fits:
            k = draw.choice(fits)
            self.program.append(("layer", (i,), k, None))
            self.widths.append(self.layers[k].out_channels)  # type: ignore[arg-type]

    def _depthwise(self, draw: random.Random, i: int) -> None:
        c = self.widths[i]
        self._add("layer", (i,), c, nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False))

    def _grouped(self, draw: random.Random, i: int) -> None:
        c, m = self.widths[i], draw.choice([1, 2])
        if c % 2 == 0:
            self._add("layer", (i,), c * m, nn.Conv2d(c, c * m, 1, groups=2, bias=False))

    def _transposed(self, draw: random.Random, i: int) -> None:
        self._add("layer", (i,), 6, nn.ConvTranspose2d(self.widths[i], 6, 3, padding=1))

    def _pixelwise(self, draw: random.Random, i: int) -> None:
        """A linear layer on channels that were moved to the end."""
        self._add("pixelwise", (i,), 8, nn.Linear(self.widths[i], 8))

    def _relu(self, draw: random.Random, i: int) -> None:
        self._add(draw.choice(["relu", "tanh"]), (i,), self.widths[i])

    def _sum(self, draw: random.Random, i: int) -> None:
        j = draw.randrange(1, len(self.widths))
        if self.widths[i] == self.widths[j]:
            self._add("sum", (i, j), self.widths[i])
        else:
            k = self._add("layer", (i,), self.widths[j], nn.Conv2d(self.widths[i], self.widths[j], 1))
            self._add("sum", (k, j), self.widths[j])

    def _product(self, draw: random.Random, i: int) -> None:
        self._add("gate", (i,), self.widths[i], nn.Linear(self.widths[i], self.widths[i]))

    def _cat(self, draw: random.Random, i: int) -> None:
        j = draw.randrange(1, len(self.widths))
        if self.widths[i] + self.widths[j] <= 32:
            self._add("cat", (i, j), self.widths[i] + self.widths[j])

    def _interleave(self, draw: random.Random, i: int) -> None:
        fits = [j for j in range(1, len(self.widths)) if self.widths[j] == self.widths[i]]
        if self.widths[i] <= 12:
            self._add("interleave", (i, draw.choice(fits)), 2 * self.widths[i])

    def _shuffle(self, draw: random.Random, i: int) -> None:
        if self.widths[i] % 2 == 0:
            self._add(draw.choice(["shuffle", "shuffle by view"]), (i,), self.widths[i], more=2)

    def _swap(self, draw: random.Random, i: int) -> None:
        if self.widths[i] % 2 == 0:
            self._add(draw.choice(["swap by chunk", "swap by roll", "flip"]), (i,), self.widths[i])

    def _reorder(self, draw: random.Random, i: int) -> None:
        order = list(range(self.widths[i]))
        draw.shuffle(order)
        self._add("index", (i,), len(order), more=order)

    def _slice(self, draw: random.Random, i: int) -> None:
        c = self.widths[i]
        self._add("slice", (i,), c // 2, more=draw.choice([(0, c // 2), (c - c // 2, c)]))

    def _pad(self, draw: random.Random, i: int) -> None:
        if self.widths[i] <= 12:
            self._add("pad", (i,), self.widths[i] + 4, more=draw.choice([(2, 2), (4, 0), (0, 4)]))

    def _pool(self, draw: random.Random, i: int) -> None:
        self._add(draw.choice(["average", "highest"]), (i,), self.widths[i])

    def _finish(self, draw: random.Random) -> None:
        used = {i for _, maps, _, _ in self.program for i in maps}
        ends = [i for i in range(1, len(self.widths)) if i not in used] or [len(self.widths) - 1]
        self.how = draw.choice(["mean", "flatten", "channels last", "several sizes"])
        places = {"mean": 1, "flatten": 16, "channels last": 16, "several sizes": 5}[self.how]
        self.ends = ends
        self.head = nn.Linear(sum(self.widths[i] for i in ends) * places, 3)

    # -- running ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for name, indices, k, more in self.program:
            maps.append(self._run(name, [maps[i] for i in indices], k, more))
        read = []
        for y in (maps[i] for i in self.ends):
            if self.how == "mean":
                read.append(y.mean((2, 3)))
            elif self.how == "flatten":
                read.append(y.flatten(1))
            elif self.how == "channels last":
                read.append(y.permute(0, 2, 3, 1).flatten(1))
            else:
                read += [F.adaptive_avg_pool2d(y, s).flatten(1) for s in (1, 2)]
        return self.head(torch.cat(read, 1))

    def _run(self, name: str, given: list[Tensor], k: int, more: Any) -> Tensor:
        y = given[0]
        if name == "layer":
            return self.layers[k](y)
        if name == "pixelwise":
            return self.layers[k](y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if name == "gate":
            return y * torch.sigmoid(self.layers[k](y.mean((2, 3))))[:, :, None, None]
        if name == "shuffle":
            return F.channel_shuffle(y, more)
        return {
            "relu": lambda: y.relu(),
            "tanh": lambda: y.tanh(),
            "sum": lambda: y + given[1],
            "cat": lambda: torch.cat(given, 1),
            "interleave": lambda: torch.stack(given, 2).flatten(1, 2),
            "shuffle by view": lambda: y.view(len(y), more, -1, 4, 4).transpose(1, 2).reshape(len(y), -1, 4, 4),
            "swap by chunk": lambda: torch.cat(y.chunk(2, 1)[::-1], 1),
            "swap by roll": lambda: y.roll(y.shape[1] // 2, 1),
            "flip": lambda: y.flip(1),
            "index": lambda: y[:, more],
            "slice": lambda: y[:, more[0] : more[1]] if more else y,
            "pad": lambda: F.pad(y, (0, 0, 0, 0, *more)),
            "average": lambda: F.avg_pool2d(y, 3, 1, 1),
            "highest": lambda: F.max_pool2d(y.relu(), 3, 1, 1),
        }[name]()


OPERATIONS = ["convolution", "convolution", "shared", "depthwise", "grouped", "transposed", "pixelwise", "relu", "sum",
              "product", "cat", "interleave", "shuffle", "swap", "reorder", "slice", "pad", "pool"]  # fmt: skip


def judge(seed: int) -> str:
    """Cut the drawn network in several ways; "refused", "cut", or an AssertionError."""
    model = Drawn(seed).eval()
    x = torch.randn(3, 3, 4, 4)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            slicing = Slicing(model, x)
    except ValueError:
        return "refused"
    generator = torch.Generator().manual_seed(seed)
    choices: list[dict[str, Any]] = [slicing.sizes(width) for width in (0.05, 0.3, 0.5, 0.8)]
    for _ in range(2):
        chosen = {}
        for g in slicing.groups:
            units = torch.randperm(g.units, generator=generator)[: int(torch.randint(1, g.units + 1, ()))].tolist()
            chosen[g.name] = {u * g.bundle + i for u in units for i in range(g.bundle)}
        choices.append(chosen)
    for sizes in choices:
        network = slicing.build(sizes)
        network.skeleton.eval()
        with torch.no_grad():
            ours = network.run(model, x)
            assert torch.equal(ours, network.extract(model)(x))
            expected = _zeroed(slicing, model, sizes, x)
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-5 * float(1 + expected.abs().max())), (seed, sizes)
    return "cut"


def _zeroed(slicing: Slicing, model: Drawn, sizes: dict[str, Any], x: Tensor) -> Tensor:
    """The full network where the layers that make them give zero in the channels that fell away."""
    handles = []
    for group in slicing.groups:
        kept = sizes[group.name]
        stay = set(range(kept)) if isinstance(kept, int) else kept
        for m in group.members:
            layer = model.get_submodule(m.module)
            if m.side == "out" and isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                gone = torch.tensor([p for p, c in zip(m.positions, m.channels, strict=True) if c not in stay]).long()
                dim = -1 if isinstance(layer, nn.Linear) else 1

                def zero(_: nn.Module, args: Any, out: Tensor, gone: Tensor = gone, dim: int = dim) -> Tensor:
                    return out.index_fill(dim, gone, 0.0)

                handles.append(layer.register_forward_hook(zero))
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


@given(st.integers(0, 1_000_000))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_drawn_network_is_cut_right_or_refused(seed: int) -> None:
    judge(seed)


@pytest.mark.slow
def test_two_thousand_drawn_networks() -> None:
    found = [judge(seed) for seed in range(2000)]
    assert found.count("cut") > 1600
    print(f"{found.count('cut')} cut, {found.count('refused')} refused")
