"""Which channels feed which: of every channel group, the layers that make its channels and the channels they read.

A group has as many *makers* as layers give channels to it. Behind a squeeze-and-excitation the expanded channels have
two: the layer that expands the block's input, and the layer that makes their factors; the factors are made of the
bottleneck, which is made of the expanded channels in turn. Such a bottleneck is a *gate*: a group that sees the mean
over all places (pixels, tokens) of the channels that it leads back to. Convolutions, linear layers and embeddings make
channels; all other layers, depthwise convolutions among them, hand on the ones that they get.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pliant.core.inputs import Input, call, evaluating, removing, rows_of
from pliant.core.slicing import Group, Slicing

Block = Hashable


@dataclass(frozen=True)
class Feed:
    """A layer that makes channels of a group, and the channels that enter it."""

    layer: str
    groups: tuple[tuple[Group, int], ...]  # what enters, each with the number of its entries in the layer's input
    channels: int  # all entries of the layer's input, those of channels that are never cut among them
    places: int  # how many places of a sample (pixels, tokens) the layer reads; 0 where that is unknown

    def active(self, sizes: Mapping[str, int]) -> int:
        """How many channels enter where groups have ``sizes``."""
        return self.channels - sum(n - n * sizes.get(g.name, g.channels) // g.channels for g, n in self.groups)

    def only(self, names: Collection[str]) -> Feed:
        """The same without the channels of groups that are not among ``names``."""
        kept = tuple((g, n) for g, n in self.groups if g.name in names)
        lost = sum(n for g, n in self.groups if g.name not in names)
        return Feed(self.layer, kept, self.channels - lost, self.places)


class Feeds:
    """Makers and gates of the channel groups of a network.

    Args:
        slicing: the groups.
        example: an input of the network, which is run once.
        block_of: the block that a module belongs to, by its name; None outside of blocks.
    """

    def __init__(self, slicing: Slicing, example: Input, block_of: Callable[[str], Block | None]) -> None:
        self._modules = dict(slicing.model.named_modules())
        self.order = {name: i for i, name in enumerate(self._modules)}
        self.groups = slicing.groups
        self._inputs: dict[str, list[tuple[Group, int]]] = {}
        for group in self.groups:
            for m in group.members:
                if m.side == "in":
                    self._inputs.setdefault(m.module, []).append((group, len(m.positions)))
        self._places = _count_places(slicing.model, example) if slicing.groups else {}
        self.feeds = {g.name: self._makers(g) for g in self.groups}
        self.gates = self._find_gates(block_of)

    def _makers(self, group: Group) -> list[Feed]:
        """The layers that make ``group``, in the order of the model's modules."""
        found = []
        for m in group.members:
            module = self._modules.get(m.module)
            if m.side != "out" or not isinstance(module, _ConvNd | nn.Linear | nn.Embedding):
                continue
            entering = self._inputs.get(m.module, [])
            if any(g is group for g, _ in entering):
                continue
            size = getattr(module, "in_channels", getattr(module, "in_features", 0))
            places = self._places.get((m.module, "in"), 0)
            found.append(Feed(m.module, tuple(entering), max(size, sum(n for _, n in entering)), places))
        return sorted(found, key=lambda f: self.order[f.layer])

    def _find_gates(self, block_of: Callable[[str], Block | None]) -> set[str]:
        """Groups that see one place, on a way from channels that have more places in their block, and back to them."""
        reads: dict[str, set[str]] = {g.name: set() for g in self.groups}
        read_by: dict[str, set[str]] = {g.name: set() for g in self.groups}
        for name, makers in self.feeds.items():
            for feed in makers:
                for group, _ in feed.groups:
                    reads[name].add(group.name)
                    read_by[group.name].add(name)
        seen = {g.name: self._layers(g) for g in self.groups}
        pooled = {name for name, layers in seen.items() if layers and all(n == 1 for _, n in layers)}
        home: dict[str, Block | None] = {}
        for name in pooled:
            blocks = {block_of(layer) for layer, _ in seen[name]}
            home[name] = blocks.pop() if len(blocks) == 1 else None
        gates = set()
        for name in set(seen) - pooled:
            wide = {block_of(layer) for layer, n in seen[name] if n > 1}
            there_and_back = _reach(name, read_by, pooled) & _reach(name, reads, pooled)
            gates |= {g for g in there_and_back if wide and (home[g] is None or home[g] in wide)}
        return gates

    def _layers(self, group: Group) -> list[tuple[str, int]]:
        """The convolutions and linear layers that carry ``group``, with their places on that side."""
        sides = [(m.module, m.side) for m in group.members]
        return [
            (name, self._places.get((name, side), 0))
            for name, side in sides
            if isinstance(self._modules.get(name), _ConvNd | nn.Linear)
        ]


def _reach(start: str, edges: Mapping[str, set[str]], through: set[str]) -> set[str]:
    """What can be reached from ``start`` through members of ``through`` alone."""
    found: set[str] = set()
    fresh = edges[start] & through
    while fresh:
        found |= fresh
        fresh = (set().union(*(edges[name] for name in fresh)) & through) - found
    return found


def _count_places(model: nn.Module, example: Input) -> dict[tuple[str, str], int]:
    """For the input ("in") and the output ("out") of each convolution and linear layer: places in one sample."""
    found: dict[tuple[str, str], int] = {}
    rows = rows_of(example)

    def noting(name: str, convolution: bool) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            for side, tensor in (("in", args[0] if args else None), ("out", output)):
                # tokens and windows may be among the rows; of a choice of rows nothing is known
                if isinstance(tensor, Tensor) and len(tensor) % rows == 0:
                    places = len(tensor) // rows * (tensor.shape[2:] if convolution else tensor.shape[1:-1]).numel()
                    found[name, side] = max(found.get((name, side), 0), places)

        return note

    handles = [
        module.register_forward_hook(noting(name, isinstance(module, _ConvNd)))
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd | nn.Linear)
    ]
    with removing(handles), evaluating(model), torch.no_grad():
        call(model, example)
    return found
