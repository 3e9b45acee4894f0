"""Architecture spaces: what the sizes of a network may be, and the network of one choice.

``Space`` is data: named coordinates with their choices, and what can be done with them (enumerate, sample, mutate,
cross over, encode, restrict). It knows nothing of networks.

``Axes`` lays a space over a network that ``Slicing`` has read:

    width       channels of the residual stream of a stage: channel groups that reach beyond one block
    expansion   inner channels of a block, as a share of the full ratio to the stream; groups inside one block that are
                made of channels from outside of it
    depth       blocks of a stage: its first ones
    kernel      filter size of the convolutions of a stage: the centre of the full filters
    resolution  height of the input image; the width follows in proportion

A *stage* is a stack of blocks (``find_stacks``). Channels outside of all stages (a stem, a wide head) are stages of
their own, with a width and nothing else. All blocks of a stage share their choices unless ``per_block`` says otherwise.

All other inner channels follow: a second inner layer the first, and the bottleneck of a squeeze-and-excitation the
channels that it weighs, wherever these are, at the ratio of the full network. Where a network has a rule instead of a
ratio, its modules tell it. The nearest module around a layer that has a method

    inner_width(layer, channels, share) -> int | None

is asked how many channels ``layer`` (its name in that module) makes when ``channels`` enter it, ``share`` being the
chosen expansion as a share of the full one, and 1 for channels that follow. None stands for the ratio.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from pliant.core import check
from pliant.core.cost import count_flops
from pliant.core.cuts import can_crop
from pliant.core.dynamic import Point, Value
from pliant.core.feeds import Feed, Feeds
from pliant.core.inputs import (
    Input,
    device_of,
    evaluating,
    first_tensor,
    map_tensors,
    rows_of,
    take,
    to_device,
)
from pliant.core.slicing import Group, Slicing, kept, make_divisible
from pliant.core.subnetwork import SubNetwork

AXES = ("resolution", "width", "depth", "kernel", "expansion")


@dataclass(frozen=True)
class Coordinate:
    """One choice to make. ``needs`` names a coordinate and the value it must reach for this one to mean anything."""

    name: str
    axis: str
    choices: tuple[Value, ...]
    needs: tuple[str, Value] | None = None


class Space:
    """A product of coordinates, some of which are idle where another one is small.

    Args:
        coordinates: in the order in which points list them; choices from the smallest to the largest.

    Raises:
        ValueError: a coordinate has no choices, or twice the same name, or needs one that is not there.
    """

    def __init__(self, coordinates: Sequence[Coordinate]) -> None:
        self.coordinates = {c.name: c for c in coordinates}
        if len(self.coordinates) != len(coordinates):
            raise ValueError(f"coordinates: names must differ, got {[c.name for c in coordinates]}")
        for c in coordinates:
            if not c.choices or len(set(c.choices)) != len(c.choices):
                raise ValueError(f"coordinates: {c.name} needs different choices, got {c.choices}")
            if c.needs is not None and (c.needs[0] not in self.coordinates or self.coordinates[c.needs[0]].needs):
                raise ValueError(f"coordinates: {c.name} needs {c.needs[0]!r}, which is not an unconditional one")

    def __repr__(self) -> str:
        return f"Space({len(self.coordinates)} coordinates, {self.size:.3g} architectures)"

    @property
    def smallest(self) -> Point:
        """The first choice everywhere, idle coordinates at their last."""
        return self.canonical(Point(**{c.name: c.choices[0] for c in self.coordinates.values()}))

    @property
    def largest(self) -> Point:
        """The last choice everywhere."""
        return Point(**{c.name: c.choices[-1] for c in self.coordinates.values()})

    @property
    def size(self) -> int:
        """How many different architectures there are; choices of idle coordinates do not count."""
        total = 1
        for root in self.coordinates.values():
            if root.needs is None:
                total *= sum(self._followers(root.name, value) for value in root.choices)
        return total

    def _followers(self, root: str, value: Value) -> int:
        """How many different choices hang on coordinate ``root`` being at ``value``."""
        awake = [c for c in self.coordinates.values() if c.needs and c.needs[0] == root and value >= c.needs[1]]  # type: ignore[operator]
        return math.prod(len(c.choices) for c in awake)

    def __contains__(self, point: object) -> bool:
        return (
            isinstance(point, Mapping)
            and set(point) == set(self.coordinates)
            and all(point[c.name] in c.choices for c in self.coordinates.values())
        )

    def check(self, point: Mapping[str, Value]) -> Point:
        """``point`` as a canonical point of the space.

        Raises:
            ValueError: it lies outside; the message names the coordinate and what is allowed.
        """
        unknown = sorted(set(point) - set(self.coordinates))
        missing = [name for name in self.coordinates if name not in point]
        if unknown or missing:
            raise ValueError(
                f"point: it must give exactly {', '.join(self.coordinates)}"
                + (f"; unknown: {', '.join(unknown)}" if unknown else "")
                + (f"; missing: {', '.join(missing)}" if missing else "")
            )
        for c in self.coordinates.values():
            if point[c.name] not in c.choices:
                raise ValueError(f"point: {c.name}={point[c.name]} is not one of {', '.join(map(str, c.choices))}")
        return self.canonical(point)

    def is_active(self, name: str, point: Mapping[str, Value]) -> bool:
        """Whether coordinate ``name`` means anything at ``point``."""
        needs = self.coordinates[name].needs
        return needs is None or bool(point[needs[0]] >= needs[1])  # type: ignore[operator]

    def canonical(self, point: Mapping[str, Value]) -> Point:
        """The same architecture with idle coordinates at their largest, so that equal networks are equal points."""
        return Point(
            **{n: point[n] if self.is_active(n, point) else c.choices[-1] for n, c in self.coordinates.items()}
        )

    def enumerate(self) -> Iterator[Point]:
        """Every architecture once."""
        seen = set()
        for values in product(*(c.choices for c in self.coordinates.values())):
            point = self.canonical(Point(**dict(zip(self.coordinates, values, strict=True))))
            if point not in seen:
                seen.add(point)
                yield point

    def sample(self, generator: torch.Generator) -> Point:
        """Every coordinate drawn uniformly and independently."""
        return Point(**{c.name: _draw(c.choices, generator) for c in self.coordinates.values()})

    def mutate(self, point: Mapping[str, Value], probability: float, generator: torch.Generator) -> Point:
        """Each coordinate moves to *another* of its choices with ``probability``, where it has one."""
        values = {}
        for name, c in self.coordinates.items():
            others = [v for v in c.choices if v != point[name]]
            moves = bool(torch.rand((), generator=generator, dtype=torch.float64) < probability) and bool(others)
            values[name] = _draw(others, generator) if moves else point[name]
        return Point(**values)

    def cross(self, a: Mapping[str, Value], b: Mapping[str, Value], generator: torch.Generator) -> Point:
        """Each coordinate from one of two parents, with equal chances."""
        return Point(**{name: _draw((a[name], b[name]), generator) for name in self.coordinates})

    @property
    def features(self) -> int:
        """The length of ``encode``."""
        return sum(len(c.choices) for c in self.coordinates.values())

    def encode(self, point: Mapping[str, Value]) -> Tensor:
        """(features,): one-hot for each coordinate, all zero where it is idle."""
        parts = []
        for name, c in self.coordinates.items():
            hot = torch.zeros(len(c.choices))
            if self.is_active(name, point):
                hot[c.choices.index(point[name])] = 1.0
            parts.append(hot)
        return torch.cat(parts) if parts else torch.zeros(0)

    def restrict(self, choices: Mapping[str, Sequence[Value]]) -> Space:
        """The part of the space where coordinates, named one by one or by their axis, have only ``choices``.

        Of an axis each coordinate keeps the choices it has among those given.

        Raises:
            ValueError: a name is unknown, or nothing is left of a coordinate.
        """
        known = set(self.coordinates) | {c.axis for c in self.coordinates.values()}
        if unknown := sorted(set(choices) - known):
            raise ValueError(f"choices: {unknown[0]!r} is neither a coordinate nor an axis: {', '.join(sorted(known))}")
        left = []
        for c in self.coordinates.values():
            allowed = choices.get(c.name, choices.get(c.axis, c.choices))
            chosen = tuple(v for v in c.choices if v in allowed)
            if not chosen:
                raise ValueError(f"choices: {c.name} has none of {tuple(allowed)}; it has {c.choices}")
            left.append(replace(c, choices=chosen))
        return Space(left)

    def __le__(self, other: Space) -> bool:
        """Whether every point of this space is one of ``other``."""
        return set(self.coordinates) == set(other.coordinates) and all(
            set(c.choices) <= set(other.coordinates[c.name].choices) for c in self.coordinates.values()
        )

    def ladder(self, count: int) -> list[Point]:
        """At most ``count`` points, smallest to largest, every coordinate at the same share of its range."""
        found = []
        for step in range(check.whole("count", count, at_least=1)):
            share = step / (count - 1) if count > 1 else 1.0
            values = {n: c.choices[math.floor(share * (len(c.choices) - 1) + 0.5)] for n, c in self.coordinates.items()}
            found.append(self.canonical(Point(**values)))
        return list(dict.fromkeys(found))


def _draw(choices: Sequence[Value], generator: torch.Generator) -> Value:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


# -- the space of a network -------------------------------------------------------------------------------------------

Shares = Sequence[float]
Inner = Callable[[int, float], int]
_LARGE = 2e8  # FLOPs
_WIDTH, _DEPTH, _EXPANSION = (0.5, 0.75, 1.0), (0.5, 1.0), (0.5, 0.75, 1.0)


@dataclass
class Stage:
    """A stack of blocks, or channels outside of all stacks: what can be chosen there."""

    name: str
    blocks: int = 0
    width: list[Group] = field(default_factory=list)  # the first one names the number of channels
    inner: dict[int, list[Group]] = field(default_factory=dict)  # by block, in the order in which they run
    kernels: dict[int, dict[str, int]] = field(default_factory=dict)  # by block: convolution -> full filter size


@dataclass(frozen=True)
class _Inner:
    """How the channels of one inner group come about; ``Axes`` keeps these in the order in which they are known."""

    group: Group
    place: tuple[str, int] | None  # stage and block; None: a squeeze-and-excitation outside of all blocks
    feed: Feed | None  # what its channels are made of
    source: Feed | None  # what they are a share of
    scaled: bool  # by the expansion of its block


class Axes:
    """The axes of a network and the space that they span.

    Args:
        slicing: the channel groups and stacks of the network.
        example: an input for it; with ``resolution`` an image batch (B, C, H, W).
        width: shares of the channels of every stage, 1 among them; or {stage: numbers of channels} for some.
        depth: shares of the blocks of every stage, 1 among them; or {stage: numbers of blocks} for some.
        kernel: odd filter sizes. A convolution whose full size is among them, and not the least, can shrink.
        expansion: shares of the full ratio of inner channels to the stream's, 1 among them; with ``inner`` the ratios.
            Inner channels that are made of other inner ones keep their full ratio to them.
        resolution: heights of the input.
        per_block: axes ("kernel", "expansion") whose choice is made block by block.
        relative: what the expansion multiplies: the channels that enter the block ("in") or its stage's ("out").
        inner: ``inner(channels, expansion)``: the inner channels, where a published network has a rule of its own; it
            goes before the rules of the network's modules (``inner_width``, see above).

    None for width, depth or expansion stands for a default where the network can change along it, and for nothing where
    it cannot.

    Sizes are rounded by ``make_divisible`` to whole units of each group (heads, the divisor). Choices that round to
    the same size are one choice.

    Raises:
        ValueError: a choice is impossible, or the smallest network does not run; the message names the argument.
    """

    def __init__(
        self,
        slicing: Slicing,
        example: Input,
        *,
        width: Shares | Mapping[str, Sequence[int]] | None = (1.0,),
        depth: Shares | Mapping[str, Sequence[int]] | None = (1.0,),
        kernel: Sequence[int] = (),
        expansion: Sequence[float] | None = (1.0,),
        resolution: Sequence[int] = (),
        per_block: Sequence[str] = (),
        relative: Literal["in", "out"] = "in",
        inner: Inner | None = None,
    ) -> None:
        check_axes(width, depth, kernel, expansion, resolution, per_block, relative, shares=inner is None)
        check.optional(check.function, "inner", inner)
        self.slicing, self.relative, self.inner = slicing, relative, inner
        asked = {"kernel": kernel, "expansion": expansion, "width": width, "depth": depth}
        width = _WIDTH if width is None else width
        depth = _DEPTH if depth is None else depth
        expansion = _EXPANSION if expansion is None else expansion
        self.full_expansion = max(expansion, default=1.0)
        self.example = take(example, slice(0, 1))
        example = take(example, slice(0, 2))
        self._feeds = Feeds(slicing, example, self._place)
        self.stages = self._find_stages(kernel)
        self._inner = self._order_inner()
        self._networks: OrderedDict[Point, SubNetwork] = OrderedDict()
        self._flops: dict[Point, int] = {}
        coordinates = self._resolutions(resolution, example)
        widths, depths = self._widths(width), self._depths(depth)
        ratios = sorted(set(expansion))
        for name, stage in self.stages.items():
            coordinates += [Coordinate(f"{name}.width", "width", widths[name])] if len(widths[name]) > 1 else []
            coordinates += [Coordinate(f"{name}.depth", "depth", depths[name])] if len(depths[name]) > 1 else []
            filters = {i: tuple(k for k in sorted(set(kernel)) if k <= max(found.values()))
                       for i, found in stage.kernels.items()}  # fmt: skip
            scaled = [i.place[1] for i in self._inner if i.scaled and i.place is not None and i.place[0] == name]
            swelling: dict[int, tuple[Value, ...]] = dict.fromkeys(scaled, tuple(ratios))
            for axis, by_block in (("kernel", filters), ("expansion", swelling)):
                coordinates += self._inside(stage, axis, by_block, axis in per_block, depths[name])
        self.space = Space(coordinates)
        for axis, given in asked.items():
            lists: list[Any] = list(given.values()) if isinstance(given, Mapping) else [given or ()]
            if any(len(set(c)) > 1 for c in lists) and not any(c.axis == axis for c in coordinates):
                hint = ", or name the lists of blocks: stacks=['blocks']" if axis == "depth" else ""
                raise ValueError(f"{axis}: nothing in the model can change along it ({given}); leave it out{hint}")
        self._try(example)

    def _inside(
        self,
        stage: Stage,
        axis: str,
        by_block: Mapping[int, tuple[Value, ...]],
        each: bool,
        depths: tuple[Value, ...],
    ) -> list[Coordinate]:
        """Coordinates of an axis inside the blocks of a stage: one for all of them, or one for each that varies."""
        if not each:
            choices = max(by_block.values(), key=len, default=())
            return [Coordinate(f"{stage.name}.{axis}", axis, choices)] if len(choices) > 1 else []
        found = []
        for i, choices in sorted(by_block.items()):
            comes_and_goes = len(depths) > 1 and i >= int(depths[0])
            needs = (f"{stage.name}.depth", i + 1) if comes_and_goes else None
            found += [Coordinate(f"{stage.name}.{i}.{axis}", axis, choices, needs)] if len(choices) > 1 else []
        return found

    # -- reading the network ----------------------------------------------------------------------------------------

    def _place(self, name: str) -> tuple[str, int] | None:
        """The stack and the block that a module belongs to."""
        for stack in self.slicing.stacks:
            if name.startswith(f"{stack}."):
                child = name[len(stack) + 1 :].split(".", 1)[0]
                return stack, [n for n, _ in self.slicing.model.get_submodule(stack).named_children()].index(child)
        return None

    def _find_stages(self, kernel: Sequence[int]) -> dict[str, Stage]:
        stages = {name: Stage(name, blocks) for name, blocks in self.slicing.stacks.items()}
        order = {name: i for i, (name, _) in enumerate(self.slicing.model.named_modules())}
        for group in self.slicing.groups:
            places = {self._place(m.module) for m in group.members}
            if len(places) == 1 and (place := next(iter(places))) is not None:
                stages[place[0]].inner.setdefault(place[1], []).append(group)
            elif group.name not in self._feeds.gates:  # a gate follows the channels that it weighs
                name = self._home(group, order)
                stages.setdefault(name, Stage(name)).width.append(group)
        for stage in stages.values():
            stage.width.sort(key=lambda g: -g.channels)
            for groups in stage.inner.values():
                groups.sort(key=lambda g: min(order.get(m.module, 0) for m in g.members if m.side != "in"))
        least = min(kernel, default=0)
        for name, module in self.slicing.model.named_modules():
            place = self._place(name)
            if place is not None and isinstance(module, _ConvNd) and module.kernel_size[0] in kernel:
                full = module.kernel_size[0]
                if full > least and all(can_crop(module, k) for k in kernel if k <= full):
                    stages[place[0]].kernels.setdefault(place[1], {})[name] = full
        return dict(sorted(stages.items(), key=lambda s: order.get(s[0], -1)))

    def _home(self, group: Group, order: Mapping[str, int]) -> str:
        """The stage of channels that reach beyond one block: where most blocks make them.

        Channels that are made outside of the stages and go through one block only, as a stem's do into a block without
        an expansion, are a stage of their own, named after the layer that makes them.
        """
        made = [m.module for m in group.members if m.side == "out"] or [group.name]
        places = {self._place(name) for name in made}
        votes = Counter(place[0] for place in places if place is not None)
        stack, blocks = votes.most_common(1)[0] if votes else ("", 0)
        if blocks > 1 or None not in places:
            return stack
        return min((n for n in made if self._place(n) is None), key=lambda n: order.get(n, 0))

    def _order_inner(self) -> list[_Inner]:
        """What sizes each inner group, every group after those that it follows."""
        outside = {g.name: g for g in self.slicing.groups if g.name in self._feeds.gates}
        blocks: list[tuple[tuple[str, int] | None, list[Group]]] = []
        for name, stage in self.stages.items():
            for block, inside in sorted(stage.inner.items()):
                blocks.append(((name, block), inside))
                outside = {n: g for n, g in outside.items() if n not in {i.name for i in inside}}
        found: list[_Inner] = []
        for place, groups in [*blocks, (None, list(outside.values()))]:
            waiting = {g.name: g for g in groups}
            inside_names = set(waiting)
            while waiting:
                ready = {name: f for name, g in waiting.items() if (f := self._choose(g, place, waiting, inside_names))}
                name = next(iter(ready), next(iter(waiting)))
                found.append(self._size_by(waiting.pop(name), place, ready.get(name), inside_names))
        for entry in found:
            self._check_rule(entry)
        return found

    def _choose(
        self, group: Group, place: tuple[str, int] | None, waiting: Mapping[str, Group], inside: set[str]
    ) -> Feed | None:
        """The maker that tells the size of ``group``: none that reads channels whose own size is not known yet.

        One that reads channels from outside the block goes before all others, then one that reads the stage's own,
        then the one that is applied at the most places (a convolution before what is added to each of its channels).
        """
        own = {g.name for g in self.stages[place[0]].width} if place is not None else set()

        def rank(feed: Feed) -> tuple[bool, bool, int]:
            names = {g.name for g, _ in feed.groups}
            return not names & inside, bool(names & own), feed.places

        known = [f for f in self._feeds.feeds[group.name] if not any(g.name in waiting for g, _ in f.groups)]
        return max(known, key=rank, default=None)

    def _size_by(self, group: Group, place: tuple[str, int] | None, feed: Feed | None, inside: set[str]) -> _Inner:
        """The entry of ``group``: whether it is scaled by the expansion, and what it is a share of."""
        entering = {g.name for g, _ in feed.groups} if feed is not None else set()
        scaled = group.name not in self._feeds.gates and (not entering or bool(entering - inside))
        source = feed.only(entering - inside) if feed is not None and scaled else feed
        if scaled and self.relative == "out" and place is not None and self.stages[place[0]].width:
            main = self.stages[place[0]].width[0]
            source = Feed("", ((main, main.channels),), main.channels, 0)
        return _Inner(group, place, feed, source, scaled)

    def _check_rule(self, entry: _Inner) -> None:
        """The rule that sizes a group must give its full size in the full network."""
        group, size = entry.group, self._inner_size(entry, {}, self.full_expansion)
        if size == group.channels:
            return
        gives = f"it gives {size} channels for the full network's {group.name!r}, which has {group.channels}"
        if self.inner is not None and entry.scaled:
            raise ValueError(f"inner: {gives}")
        layer = entry.feed.layer if entry.feed is not None else group.name
        raise ValueError(f"model: inner_width of a module around {layer!r} is wrong: {gives}")

    def _resolutions(self, resolution: Sequence[int], example: Input) -> list[Coordinate]:
        if not resolution:
            return []
        shape = tuple(first_tensor(example).shape)
        if not isinstance(example, Tensor) or len(shape) != 4:
            raise ValueError(f"resolution: needs one tensor of images (B, C, H, W), the example has shape {shape}")
        if shape[2] < max(resolution):
            raise ValueError(
                f"resolution: the example is {shape[2]} pixels high, less than {max(resolution)}; give images at the "
                "largest resolution or above it, so that none is scaled up"
            )
        # One choice is a coordinate too: it tells the size that inputs are brought to.
        return [Coordinate("resolution", "resolution", tuple(sorted(set(resolution))))]

    def _widths(self, width: Shares | Mapping[str, Sequence[int]]) -> dict[str, tuple[Value, ...]]:
        if isinstance(width, Mapping):
            named = {n for n, s in self.stages.items() if s.width}
            if unknown := sorted(set(width) - named):
                raise ValueError(
                    f"width: {unknown[0]!r} is not a stage with channels to cut; allowed: {', '.join(named)}"
                )
        found: dict[str, tuple[Value, ...]] = {}
        for name, stage in self.stages.items():
            main = stage.width[0] if stage.width else None
            if main is None:
                found[name] = ()
            elif isinstance(width, Mapping):
                choices = sorted(set(width.get(name, (main.channels,))))
                if choices[-1] != main.channels or choices[0] < 1 or any(c % main.bundle for c in choices):
                    raise ValueError(
                        f"width: {name} has {main.channels} channels; choices must be multiples of {main.bundle} "
                        f"up to and with {main.channels}, got {choices}"
                    )
                found[name] = tuple(choices)
            else:
                found[name] = tuple(sorted({_size(main, w) for w in width}))
        return found

    def _depths(self, depth: Shares | Mapping[str, Sequence[int]]) -> dict[str, tuple[Value, ...]]:
        if isinstance(depth, Mapping) and (unknown := sorted(set(depth) - set(self.slicing.stacks))):
            allowed = ", ".join(self.slicing.stacks) or "none was found; name them: stacks=['blocks']"
            raise ValueError(f"depth: {unknown[0]!r} is not a stack of blocks; allowed: {allowed}")
        found: dict[str, tuple[Value, ...]] = {}
        for name, stage in self.stages.items():
            if isinstance(depth, Mapping):
                choices = sorted(set(depth.get(name, (stage.blocks,))))
                if choices[-1] != stage.blocks or choices[0] < 0:
                    raise ValueError(
                        f"depth: {name} has {stage.blocks} blocks; choices must reach from 0 to it and contain it, "
                        f"got {choices}"
                    )
                found[name] = tuple(choices)
            else:
                found[name] = tuple(sorted({kept(stage.blocks, d) for d in depth})) if stage.blocks else ()
        return found

    def _try(self, example: Input) -> None:
        """Networks along each axis, the smallest and some drawn ones must compute what they should.

        Raises:
            ValueError: one does not; the message names its axis, the point, and what is wrong.
        """
        for axis, point in self._trials():
            sizes, depths, kernels = self.sizes(point), self.depths(point), self.kernels(point)
            try:
                problem = self.slicing.check(sizes, depths, kernels, self.resized(example, point))
            except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
                problem = str(error)
            if problem is not None:
                raise ValueError(f"{axis}: the model does not run at {point}: {problem}")
        self.slicing.rest()

    def _trials(self) -> list[tuple[str, Point]]:
        """(axis, point): each level of each axis alone, others at their largest; the smallest; three drawn ones."""
        largest, found = self.space.largest, []
        for axis in sorted({c.axis for c in self.space.coordinates.values()}):
            mine = {n: c.choices for n, c in self.space.coordinates.items() if c.axis == axis}
            for level in range(max(len(choices) for choices in mine.values()) - 1):
                values = {n: choices[min(level, len(choices) - 1)] for n, choices in mine.items()}
                found.append((axis, self.space.canonical(Point(**{**largest, **values}))))
        generator = torch.Generator().manual_seed(0)
        found.append(("every axis at once", self.space.smallest))
        found += [("axes together", self.space.canonical(self.space.sample(generator))) for _ in range(3)]
        return list({point: (axis, point) for axis, point in reversed(found)}.values())[::-1]

    # -- the network of a point ---------------------------------------------------------------------------------------

    def sizes(self, point: Mapping[str, Value]) -> dict[str, int]:
        """Kept channels of every group at ``point``."""
        found: dict[str, int] = {}
        for name, stage in self.stages.items():
            for group in stage.width:
                main = stage.width[0]
                channels = int(point.get(f"{name}.width", main.channels))
                found[group.name] = channels if group is main else _size(group, channels / main.channels)
        for entry in self._inner:
            name, block = entry.place if entry.place is not None else ("", 0)
            e = point.get(f"{name}.{block}.expansion", point.get(f"{name}.expansion", self.full_expansion))
            size = self._inner_size(entry, found, float(e))
            found[entry.group.name] = min(entry.group.channels, size)
        return found

    def _inner_size(self, entry: _Inner, found: Mapping[str, int], e: float) -> int:
        """Channels of an inner group where the ones that enter it are ``found``, at expansion ``e``."""
        group, feed, source = entry.group, entry.feed, entry.source
        share = e / self.full_expansion if entry.scaled else 1.0
        if self.inner is not None and source is not None and entry.scaled:
            return self.inner(source.active(found), e)
        if feed is not None and (size := self._told(feed, feed.active(found), share)) is not None:
            return size
        wanted = group.channels * share
        if source is not None and source.channels:
            wanted = wanted * source.active(found) / source.channels
        return make_divisible(wanted, group.bundle)

    def _told(self, feed: Feed, channels: int, share: float) -> int | None:
        """What the nearest module around a layer says about the channels that the layer makes."""
        path = feed.layer.split(".")
        for i in range(len(path) - 1, -1, -1):
            rule = getattr(self.slicing.model.get_submodule(".".join(path[:i])), "inner_width", None)
            if callable(rule):
                told: int | None = rule(".".join(path[i:]), channels, share)
                return told
        return None

    def depths(self, point: Mapping[str, Value]) -> dict[str, int]:
        """Kept blocks of every stack at ``point``."""
        return {n: int(point.get(f"{n}.depth", s.blocks)) for n, s in self.stages.items() if s.blocks}

    def kernels(self, point: Mapping[str, Value]) -> dict[str, int]:
        """Filter sizes at ``point`` of the convolutions that can shrink."""
        found = {}
        for name, stage in self.stages.items():
            for block, convolutions in stage.kernels.items():
                for convolution, full in convolutions.items():
                    size = point.get(f"{name}.{block}.kernel", point.get(f"{name}.kernel", full))
                    found[convolution] = min(int(size), full)
        return found

    def network(self, point: Mapping[str, Value]) -> SubNetwork:
        """The sub-network of a point of the space; the last 256 are kept.

        Raises:
            ValueError: ``point`` is outside the space.
        """
        known = self.space.check(point)
        if known in self._networks:
            self._networks.move_to_end(known)
            return self._networks[known]
        network = self.slicing.build(self.sizes(known), self.depths(known), self.kernels(known))
        self._networks[known] = network
        if len(self._networks) > 256:
            self._networks.popitem(last=False)
        return network

    def resized(self, x: Input, point: Mapping[str, Value]) -> Any:
        """``x`` with its images (B, C, H, W) at the resolution of ``point``: bicubic, unless they have it."""
        if "resolution" not in point:
            return x
        height = int(point["resolution"])

        def resize(t: Tensor) -> Tensor:
            if t.ndim != 4 or t.shape[2] == height:
                return t
            return F.interpolate(t, size=self.image_size(t, point), mode="bicubic", align_corners=False)

        return map_tensors(x, resize)

    def image_size(self, x: Tensor, point: Mapping[str, Value]) -> tuple[int, int]:
        """Height and width of images (B, C, H, W) at the resolution of ``point``."""
        height = int(point["resolution"])
        return height, max(1, round(x.shape[3] * height / x.shape[2]))

    # -- costs --------------------------------------------------------------------------------------------------------

    def flops(self, point: Mapping[str, Value]) -> int:
        """FLOPs for one sample at ``point`` (2 per multiply-add), counted on one row of the example."""
        known = self.space.check(point)
        if known not in self._flops:
            # On tensors without numbers counting costs the same for every size; on real ones a small network is faster.
            large = max(self._flops.values(), default=0) > _LARGE
            try:
                self._flops[known] = self._count(known, self._hollow if large else self.slicing.model)
            except (RuntimeError, NotImplementedError):  # its forward looks at numbers
                self._flops[known] = self._count(known, self.slicing.model)
        return self._flops[known]

    def _count(self, point: Point, model: nn.Module) -> int:
        network = self.network(point)
        x = to_device(self.resized(self.example, point), device_of(model))
        with evaluating(network.skeleton):
            return count_flops(lambda: network.run(model, x), nonzero=False).total // rows_of(x)

    @cached_property
    def _hollow(self) -> nn.Module:
        """The full network on the meta device."""
        return self.slicing.build({}).skeleton

    def parameters(self, point: Mapping[str, Value]) -> int:
        """Parameters at ``point``, tied ones once."""
        network = self.network(point)
        names = [name for name, _ in network.skeleton.named_parameters()]
        views = network.views(self.slicing.model)
        return sum(views[name].numel() for name in names)


def _size(group: Group, share: float) -> int:
    return min(group.channels, make_divisible(group.channels * share, group.bundle))


def check_axes(
    width: Any, depth: Any, kernel: Any, expansion: Any, resolution: Any, per_block: Any, relative: Any = "in",
    *, shares: bool = True,
) -> None:  # fmt: skip
    """Raise where an argument of ``Axes`` is of another kind or out of bounds; the model is not looked at.

    ``shares``: expansions are shares of the full one, and not ratios.
    """
    for name, sizes, least in (("width", width, 1), ("depth", depth, 0)):
        if isinstance(sizes, Mapping):
            check.mapping(name, sizes, _whole_numbers_from(least))
        elif sizes is not None:
            _check_shares(name, sizes)
    if shares and expansion is not None:
        _check_shares("expansion", expansion)
    check.optional(check.sequence, "expansion", expansion, check.positive)
    for size in check.sequence("kernel", kernel, _whole_from(1), empty=True):
        if size % 2 == 0:
            raise check.wrong("kernel", kernel, "odd filter sizes")
    check.sequence("resolution", resolution, _whole_from(1), empty=True)
    check.choices("per_block", per_block, ("kernel", "expansion"), empty=True)
    check.choice("relative", relative, ("in", "out"))


def _whole_from(least: int) -> Callable[[str, Any], int]:
    return lambda name, value: check.whole(name, value, at_least=least)


def _whole_numbers_from(least: int) -> Callable[[str, Any], tuple[int, ...]]:
    return lambda name, value: check.sequence(name, value, _whole_from(least))


def _check_shares(name: str, values: Any) -> None:
    found = check.sequence(name, values, lambda n, v: check.number(n, v, above=0, at_most=1))
    if 1 not in found:
        raise check.wrong(name, values, "shares in (0, 1] with 1 among them")
