"""A sub-network as a set of *views* on the parameters of the full one.

Three cuts make a network smaller: fewer channels (*width*, *expansion*), fewer blocks (*depth*), and smaller filters
(*kernel*, the centre of the full ones).

Channels that are added, concatenated or multiplied must be cut together. Which position of which weight carries which
channel is read by sending numbers through the user's own forward (``core/channels.py``), and what was read is verified
(``core/agreement.py``): the sub-network must compute what the full network computes when the removed channels are zero
where they are read. Channels that cannot be cut stay whole, and ``Slicing.whole`` tells why. A group of C coupled
channels is cut to its first ``kept(C, width, units)`` ones; ``units`` keeps what must not be parted together: attention
heads, the channels of one group of a GroupNorm or of a grouped convolution. Smaller widths are prefixes of larger ones
(nesting), everywhere by one rounding function.

A sub-network is (1) a *skeleton*: a copy of the user's modules without any weights, whose static sizes (number of
groups, heads, normalised shape, length of a block list) are those of the smaller network, and (2) the *cuts*: for each
parameter the kept range of each dimension. Running it puts views on the full parameters into the skeleton; extracting
it gives the same skeleton copies of them. That is why both give the same numbers, bit for bit.
"""

from __future__ import annotations

import fnmatch
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.core.agreement import Agreement
from pliant.core.channels import Carrier, Channels, Reading, is_output, read_channels
from pliant.core.cuts import Cuts, crop, length_of, module_cuts, runs_of
from pliant.core.inputs import Input, check_example, first_line, take
from pliant.core.labels import HEADS, PER_HEAD, Ids, is_linear_1d
from pliant.core.stacks import find_stacks
from pliant.core.subnetwork import SubNetwork, hollow, tensor_named


def kept(channels: int, width: float, units: int | None = None) -> int:
    """How many of ``channels`` stay at ``width``: whole units, rounded half up, at least one.

    >>> kept(10, 0.05), kept(10, 0.25), kept(10, 0.5), kept(10, 1.0)
    (1, 3, 5, 10)
    >>> kept(12, 0.5, units=3)  # three heads of four channels: 1.5 heads round up to 2
    8
    """
    units = channels if units is None else units
    return max(1, math.floor(units * width + 0.5)) * (channels // units)


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``value``, at least one, and never below 90 % of ``value``.

    >>> tuple(make_divisible(v) for v in (41.6, 51.2, 64, 166.4, 20.8))
    (40, 48, 64, 168, 24)
    """
    n = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return n + divisor if n < 0.9 * value else n


@dataclass(frozen=True)
class Member:
    """One tensor side that a group cuts: ``positions[i]`` of the module's side carries channel ``channels[i]``."""

    module: str
    side: str  # "out" or "in" of a module; "parameter": a bare parameter or buffer of that name
    positions: tuple[int, ...]
    channels: tuple[int, ...]
    dim: int = 0  # of a bare parameter


@dataclass
class Group:
    """Coupled channels, cut together. ``units`` of them can be kept."""

    name: str
    channels: int
    units: int
    members: list[Member] = field(default_factory=list)
    # Numbers that modules keep beside their weights and that follow the width: (module, attribute) -> full value.
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()  # of its units, as they were read

    @property
    def bundle(self) -> int:
        """The channels of one unit: what is kept is a multiple of it."""
        return self.channels // self.units

    def __repr__(self) -> str:
        return f"Group({self.name}, {self.channels} channels in {self.units} units, {len(self.members)} members)"


class NothingToCutError(ValueError):
    """No channels of a network can be cut."""


class Slicing:
    """The channel groups and block stacks of a network.

    Args:
        model: any network.
        example: an input for it; its first two rows are looked at.
        width: whether channels are to be cut; False skips their reading.
        exclude: names of modules (patterns as in ``fnmatch``) or of groups whose own channels keep their full number.
        divisor: kept channels are a multiple of this where the group's size allows.
        stacks: names of the block lists that depth cuts; None finds them (see ``core/stacks.py``).
        growing: keep groups of a single unit too, which cannot shrink.

    Attributes:
        groups: what width cuts.
        stacks: names and lengths of the block lists that depth cuts.
        whole: why layers keep their full width, by name: the excluded ones and the network's outputs are not listed.

    Raises:
        ValueError: nothing of the model can be cut, or a name is unknown; the message says what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        width: bool = True,
        exclude: Sequence[str] = (),
        divisor: int = 1,
        stacks: Sequence[str] | None = None,
        growing: bool = False,
    ) -> None:
        if divisor < 1:
            raise ValueError(f"divisor: {divisor} is not a positive number of channels")
        self.model = model
        check_example(model, example)
        self.example = take(example, slice(0, 2))  # many small networks are tried: two rows tell as much
        check_example(model, self.example)
        self.exclude = tuple([exclude] if isinstance(exclude, str) else exclude)
        self.heads: dict[str, str] = {}  # attention module -> name of the group of its inner width
        self.groups: list[Group] = []
        self.whole: dict[str, str] = {}
        self._least_units = 1 if growing else 2
        self._refusal = ""
        self.stacks = find_stacks(model, self.example) if stacks is None else self._check_stacks(stacks)
        reading = read_channels(model, self.example) if width else None
        self._agreement = Agreement(model, self.example, reading.norms if reading is not None else ())
        if stacks is None:
            self._settle_depth()
        if reading is not None:
            self._settle_width(reading, divisor)
            for name in list(self.stacks) if stacks is None and self.groups else ():
                if self.check(self.sizes(0.5), {name: 1}) is not None:  # its blocks fit at full width alone
                    del self.stacks[name]
            self._report()
        self.rest()

    # -- construction -------------------------------------------------------------------------------------------

    def _check_stacks(self, stacks: Sequence[str]) -> dict[str, int]:
        found = {}
        for name in stacks:
            try:
                container = self.model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"stacks: the model has no module named {name!r}") from None
            if not isinstance(container, nn.ModuleList | nn.Sequential):
                raise ValueError(f"stacks: {name!r} is a {type(container).__name__}, not a ModuleList or Sequential")
            found[name] = len(container)
        return found

    def _excluded(self, name: str) -> bool:
        parts = name.split(".")
        ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatch.fnmatch(a, pattern) for a in ancestors for pattern in self.exclude)

    def _find_groups(self, found: Channels, divisor: int) -> None:
        """Units that the same weights carry, at as many positions each, form a group."""
        why = dict(found.why)
        for carrier, units in found.units.items():
            if carrier.side != "in" and self._excluded(carrier.name):
                why.update(dict.fromkeys((int(u) for u in np.unique(units)), _EXCLUDED))
        carriers = list(found.units)
        carried: dict[int, list[tuple[int, int]]] = {}  # unit -> (carrier, positions)
        for i, carrier in enumerate(carriers):
            for unit, count in zip(*np.unique(found.units[carrier], return_counts=True), strict=True):
                if unit > 1:
                    carried.setdefault(int(unit), []).append((i, int(count)))
        together: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for unit, places in carried.items():
            if unit not in why:
                together.setdefault(tuple(places), []).append(unit)
            elif why[unit] != _EXCLUDED and not is_output(why[unit]):
                for i, _ in places:
                    if carriers[i].side != "in" and self._makes(carriers[i]):
                        self.whole.setdefault(carriers[i].name, why[unit])
        named: dict[str, list[Group]] = {}
        for key, members in together.items():
            mine = [carriers[i] for i, _ in key]
            if not any(c.side == "parameter" or (c.side == "out" and self._makes(c)) for c in mine):
                continue  # nobody of the network makes them
            makers = [c for c in mine if c.side == "out" and self._makes(c)]
            root = (makers or [c for c in mine if c.side != "in"] or mine)[0]
            group = self._group(root, mine, members, found, divisor)
            named.setdefault(group.name, []).append(group)
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        for name, groups in sorted(named.items(), key=lambda item: order.get(item[0], -1)):
            for number, group in enumerate(groups):
                group.name = name if len(groups) == 1 else f"{name}[{number}]"
                self._find_heads(group)
        self.groups = [g for groups in named.values() for g in groups if g.name not in self.exclude]
        modules = [name for name, _ in self.model.named_modules()]
        known = {g.name for groups in named.values() for g in groups}
        for pattern in self.exclude:
            if not fnmatch.filter(modules, pattern) and pattern not in known:
                raise ValueError(f"exclude: no module of the model is named {pattern!r}")

    def _makes(self, carrier: Carrier) -> bool:
        """Whether a carrier makes channels; norms and depthwise convolutions pass them on."""
        module = _submodule(self.model, carrier.name)
        if isinstance(module, _ConvNd):
            return not module.groups == module.in_channels == module.out_channels or module.groups == 1
        return isinstance(module, nn.Embedding | nn.MultiheadAttention) or self._is_linear(carrier.name)

    def _group(
        self, root: Carrier, carriers: Sequence[Carrier], units: Sequence[int], found: Channels, divisor: int
    ) -> Group:
        """Number the channels: unit by unit as they stand at the root, within a unit as each carrier lists them."""
        places = {u: [np.flatnonzero(found.units[c] == u) for c in carriers] for u in units}
        at_root = carriers.index(root)
        ordered = sorted(units, key=lambda u: int(places[u][at_root][0]))
        distinct = [len(np.unique(found.channels[c][at])) for c, at in zip(carriers, places[ordered[0]], strict=True)]
        bundle = min((n for n in distinct if n > 1), default=1)
        members = []
        for i, carrier in enumerate(carriers):
            positions: list[int] = []
            channels: list[int] = []
            for number, unit in enumerate(ordered):
                at = places[unit][i]
                ranks = _ranks(found.channels[carrier][at])
                whole = (int(ranks.max()) + 1) % bundle == 0
                ranks = ranks % bundle if whole else np.minimum(ranks, bundle - 1)
                positions += at.tolist()
                channels += (number * bundle + ranks).tolist()
            members.append(Member(carrier.name, carrier.side, tuple(positions), tuple(channels), carrier.dim))
        group = Group(root.name, len(ordered) * bundle, len(ordered), members, ids=tuple(ordered))
        group.units = math.gcd(group.units, group.channels // math.gcd(divisor, group.channels))
        return group

    def _is_linear(self, name: str) -> bool:
        module = _submodule(self.model, name)
        return isinstance(module, nn.Linear) or is_linear_1d(module)

    def _find_heads(self, group: Group) -> None:
        """Is this the inner width of an attention module (queries, keys, values -> output projection)?

        The module that owns the projections tells its number of heads. Inside, more channels enter the group than
        leave it (three projections against one), which tells it from the residual width, where it is the reverse.
        """
        owners: dict[str, int] = {}
        for member in group.members:
            if member.side != "parameter" and self._is_linear(member.module):
                owner = member.module.rpartition(".")[0]
                owners[owner] = owners.get(owner, 0) + (1 if member.side == "out" else -1) * len(member.positions)
        for owner, balance in owners.items():
            module = self.model.get_submodule(owner)
            counts = {a: v for a in HEADS if isinstance(v := getattr(module, a, None), int) and v > 0}
            if balance <= 0 or not counts or any(v % group.units for v in counts.values()):
                continue
            self.heads[owner] = group.name
            widths = {len(m.positions) for m in group.members if m.module.startswith(f"{owner}.")}
            inner = {a: v for a in _INNER_WIDTHS if (v := getattr(module, a, None)) in widths and v is not None}
            group.attributes.update({(owner, a): v for a, v in {**counts, **inner}.items()})

    # -- what was read is verified --------------------------------------------------------------------------------

    def check(
        self,
        sizes: Mapping[str, int | Collection[int]],
        depths: Mapping[str, int] | None = None,
        kernels: Mapping[str, int] | None = None,
        x: Input | None = None,
    ) -> str | None:
        """What is wrong with the sub-network of these sizes (see ``build``); None where it computes what it should.

        It should compute what the full network computes when the removed channels are zero where they are read, norms
        over channels see those that are left, blocks that fell away pass on what they get (or add nothing), and filters
        are zero outside their centre. Weights are shaken for the comparison, so that none is zero by its start.
        """
        try:
            network = self.build(sizes, depths, kernels, adapt=False)
            self._check_ties(network.cuts)
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError) as error:
            return first_line(error)
        network.skeleton.eval()
        blocks = {
            f"{name}.{child}"
            for name, count in (depths or {}).items()
            for child in [n for n, _ in self.model.get_submodule(name).named_children()][count:]
        }
        return self._agreement.problem(network.run, self._gone(sizes), blocks, dict(kernels or {}), x)

    def rest(self) -> None:
        """Let go of the copy of the network that ``check`` compares with; the next check makes it anew."""
        self._agreement.rest()

    def _settle_depth(self) -> None:
        """Stacks that were found and do not shorten to what they should are none."""
        for name, blocks in list(self.stacks.items()):
            for count in sorted({1, (blocks + 1) // 2, blocks - 1} - {0, blocks}):
                if self.check({}, {name: count}) is not None:
                    del self.stacks[name]
                    break

    def _settle_width(self, reading: Reading, divisor: int) -> None:
        """Groups that do not shrink to what they should stay whole.

        Where the forward parts channels into pieces, first whole pieces are tried (heads), then a part of each.
        """
        pieces: dict[int, int] = {}
        ties: list[tuple[int, int]] = []
        reasons: dict[str, str] = {}  # by layer, the first that was found
        while True:
            found = reading.channels(pieces, ties)
            self.whole = {}
            self._find_groups(found, divisor)
            candidates = self.groups
            single = {g.name: self._why_single(g, divisor) for g in candidates if g.units < self._least_units}
            self.groups = [g for g in candidates if g.name not in single]
            wrong = self._wrong() | single
            self.groups = candidates
            for group in candidates:
                for layer in self._makers(group) if group.name in wrong else ():
                    reasons.setdefault(layer, wrong[group.name])
            touched = {u for g in candidates if g.name in wrong for u in g.ids}
            open_ = [i for i, units in enumerate(found.parted) if units & touched and pieces.get(i, 0) < 2]
            if open_:
                pieces |= {i: pieces.get(i, 0) + 1 for i in open_}
            elif alike := self._alike([g for g in candidates if g.name in wrong and g.units > 1]):
                ties += alike
            else:
                break
        for group in [g for g in self.groups if g.name in wrong]:
            self.groups.remove(group)
            self.whole.update({layer: reasons[layer] for layer in self._makers(group) if reasons[layer]})

    def _why_single(self, group: Group, divisor: int) -> str:
        if len(group.ids) > 1:
            return ""  # the divisor leaves nothing of their number to choose
        made = max((len(m.positions) for m in group.members if m.side == "out"), default=group.channels)
        return _ONE_UNIT if made > 1 else ""

    def _alike(self, groups: Sequence[Group]) -> list[tuple[int, int]]:
        """Groups of one size that shrink only together, as where one is brought to the shape of another by its size."""
        ties = []
        for number in {(g.channels, g.units) for g in groups}:
            same = [g for g in groups if (g.channels, g.units) == number]
            first = same[0]
            trials = (range(first.bundle), range(max(1, first.units // 2) * first.bundle))
            if len(same) > 1 and all(self.check({g.name: set(kept) for g in same}) is None for kept in trials):
                ties += [(a, b) for g in same[1:] for a, b in zip(first.ids, g.ids, strict=True)]
        return ties

    def _makers(self, group: Group) -> list[str]:
        """The layers that make the channels of a group."""
        made = [m.module for m in group.members if m.side != "in" and self._makes(Carrier(m.module, m.side))]
        return list(dict.fromkeys(made))

    def _wrong(self) -> dict[str, str]:
        """The groups that do not shrink to what they should, and why; ``self.groups`` are the others.

        The same trials are run on all groups, on halves, and so on down to single ones, until those are found that
        fail by themselves; those that fail only beside others go in the order of the groups. Then new trials are drawn.
        """
        generator = torch.Generator().manual_seed(0)
        wrong: dict[str, str] = {}
        while self.groups:
            trials: list[dict[str, Any]] = [{g.name: k(g.units) * g.bundle for g in self.groups} for k in _PREFIXES]
            trials += [{g.name: _drawn(g, generator) for g in self.groups} for _ in range(3)]

            def problem(groups: Sequence[Group], trials: list[dict[str, Any]] = trials) -> str | None:
                found = (self.check({g.name: sizes[g.name] for g in groups}) for sizes in trials)
                return next((p for p in found if p is not None), None)

            def search(groups: Sequence[Group], problem: Callable[..., str | None] = problem) -> dict[str, str]:
                if problem(groups) is None:
                    return {}
                if len(groups) == 1:
                    why = self._unless_adapted(groups[0], lambda: problem(groups))
                    return {} if why is None else {groups[0].name: why}
                half = len(groups) // 2
                return search(groups[:half]) | search(groups[half:])

            found = search(self.groups)
            if not found:
                good: list[Group] = []
                for g in self.groups if problem(self.groups) is not None else ():
                    why = problem([*good, g])
                    if why is None:
                        good.append(g)
                    else:
                        found[g.name] = why
                if not found:
                    break
            wrong |= found
            self.groups = [g for g in self.groups if g.name not in wrong]
        return wrong

    def _unless_adapted(self, group: Group, problem: Callable[[], str | None]) -> str | None:
        """What is wrong with a group, unless it is right with the numbers that modules keep beside their weights."""
        before, first = dict(group.attributes), problem()
        for nearest in (True, False):
            group.attributes = before | self._numbers(group, nearest)
            if group.attributes != before and problem() is None:
                return None
        group.attributes = before
        return first

    def _numbers(self, group: Group, nearest: bool) -> dict[tuple[str, str], Any]:
        """Whole numbers in the modules around the group's layers that equal its width or its number of units."""
        found: dict[tuple[str, str], Any] = {}
        for member in group.members:
            parts = member.module.split(".")[: -2 if member.side == "parameter" else -1]
            above = [".".join(parts[:i]) for i in range(len(parts) + 1)]
            for owner in above[-1:] if nearest else above:
                module = self.model.get_submodule(owner)
                for attribute, value in vars(module).items():
                    if attribute in PER_HEAD:
                        continue
                    values = value if isinstance(value, tuple | list) and value else [value]
                    width = len(member.positions)
                    pieces = {width // n for n in (2, 3) if width % n == 0}
                    sizes = {width, group.channels, group.units, *pieces} - {1}
                    if all(type(v) is int and v in sizes for v in values):
                        found[owner, attribute] = value
        return found

    def _report(self) -> None:
        """Say what keeps its width; refuse a network of which nothing can be cut."""
        reasons: dict[str, list[str]] = {}
        cut = {m.module for g in self.groups for m in g.members if m.side != "in"}
        for name, text in self.whole.items():
            pattern, reason = (re.sub(r"\.\d+(?=\.)", ".*", n) for n in (name, text))
            pattern = name if fnmatch.filter(cut, pattern) else pattern  # it must not name what is cut
            if pattern not in reasons.setdefault(reason, []):
                reasons[reason].append(pattern)
        lines = [f"{', '.join(map(repr, names[:6]))}{', ...' if len(names) > 6 else ''}: {why}"
                 for why, names in reasons.items()]  # fmt: skip
        if not self.groups:
            why = f" ({'; '.join(lines[:6])})" if lines else " (its layers hold its inputs and outputs only)"
            self._refusal = f"model: none of its layers can be cut in width{why}"
            if not self.stacks:
                raise NothingToCutError(self._refusal)
        elif lines:
            patterns = list(dict.fromkeys(p for names in reasons.values() for p in names))
            warnings.warn(
                f"these layers keep their full width, for they cannot be cut: {'; '.join(lines)}. "
                f"exclude={patterns} says that this is known",
                stacklevel=4,
            )

    # -- sub-networks -------------------------------------------------------------------------------------------

    def sizes(self, width: float) -> dict[str, int]:
        """Kept channels of every group at ``width``."""
        return {g.name: kept(g.channels, width, g.units) for g in self.groups}

    def depths(self, depth: float) -> dict[str, int]:
        """Kept blocks of every stack at ``depth``."""
        return {name: kept(blocks, depth) for name, blocks in self.stacks.items()}

    def subnetwork(self, width: float = 1.0, depth: float = 1.0) -> SubNetwork:
        """The sub-network of the first channels and blocks.

        Raises:
            ValueError: ``width`` or ``depth`` is not in (0, 1], or there is nothing to cut.
        """
        for name, value in (("width", width), ("depth", depth)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}: {value} is not in (0, 1]")
        if width < 1 and not self.groups and self._refusal:
            raise NothingToCutError(f"{self._refusal}; use depth alone: width=(1.0,)")
        if depth < 1 and not self.stacks:
            raise ValueError("depth: no stack of blocks was found in the model; name them: stacks=['blocks']")
        return self.build(self.sizes(width), self.depths(depth))

    def build(
        self,
        sizes: Mapping[str, int | Collection[int]],
        depths: Mapping[str, int] | None = None,
        kernels: Mapping[str, int] | None = None,
        *,
        adapt: bool = True,
    ) -> SubNetwork:
        """The sub-network of given sizes; what is not named stays whole.

        Args:
            sizes: kept channels, by the name of a group: how many of the first ones, or which ones. Whole units.
            depths: kept blocks, by the name of a stack.
            kernels: filter sizes, by the name of a convolution, see ``can_crop``.

        A module of the model that has a method ``after_slicing()`` is called then, in the skeleton, so that it can
        leave out what its new sizes have no use for; ``adapt=False`` leaves it as it is.
        """
        skeleton = hollow(self.model)
        for name, blocks in (depths or {}).items():
            if blocks < self.stacks[name]:
                path, _, leaf = name.rpartition(".")
                setattr(skeleton.get_submodule(path), leaf, skeleton.get_submodule(name)[:blocks])  # type: ignore[index]
        cuts: dict[str, Cuts] = {}
        by_module: dict[str, dict[str, set[int]]] = {}
        for carrier, gone in self._gone(sizes).items():
            if carrier.side == "parameter":
                size = tensor_named(self.model, carrier.name).shape[carrier.dim]
                cuts.setdefault(carrier.name, {})[carrier.dim] = runs = runs_of(size, gone)
                holder = _submodule(skeleton, carrier.name.rpartition(".")[0])
                kind = next((k for k in _WIDTHS if isinstance(holder, k)), None)
                if kind is not None and getattr(holder, _WIDTHS[kind]) == size:
                    setattr(holder, _WIDTHS[kind], length_of(runs))
            else:
                by_module.setdefault(carrier.name, {})[carrier.side] = gone
        for module_name, gone_by_side in by_module.items():
            module = self.model.get_submodule(module_name)
            found, attributes = module_cuts(module, gone_by_side)
            for parameter_name, cut in found.items():
                cuts[f"{module_name}.{parameter_name}" if module_name else parameter_name] = cut
            target = _submodule(skeleton, module_name)
            for attribute, value in attributes.items() if target is not None else ():
                setattr(target, attribute, value)
        for name, size in (kernels or {}).items():
            cut = cuts.setdefault(f"{name}.weight", {})
            crop(self.model.get_submodule(name), _submodule(skeleton, name), size, cut)
        for group in self.groups:
            units = len(self._stay(group, sizes.get(group.name, group.channels))) // group.bundle
            if units < group.units:
                for (owner, attribute), value in group.attributes.items():
                    target = _submodule(skeleton, owner)
                    if target is not None:
                        setattr(target, attribute, _scaled(value, units, group.units))
        for module in skeleton.modules():
            if isinstance(module, nn.TransformerEncoder) and isinstance(module.layers[0], nn.TransformerEncoderLayer):
                even = module.layers[0].self_attn.num_heads % 2 == 0  # its fused path knows no odd number of heads
                module.use_nested_tensor = module.use_nested_tensor and even
            if adapt and callable(leave_out := getattr(module, "after_slicing", None)):
                leave_out()
        return SubNetwork(skeleton, cuts, self.example)

    def _gone(self, sizes: Mapping[str, int | Collection[int]]) -> dict[Carrier, set[int]]:
        """The positions that fall away."""
        found: dict[Carrier, set[int]] = {}
        for group in self.groups:
            stay = self._stay(group, sizes.get(group.name, group.channels))
            if len(stay) == group.channels:
                continue
            for m in group.members:
                gone = {p for p, c in zip(m.positions, m.channels, strict=True) if c not in stay}
                found.setdefault(Carrier(m.module, m.side, m.dim), set()).update(gone)
        return found

    def _stay(self, group: Group, kept: int | Collection[int]) -> Collection[int]:
        """The channels of ``group`` that stay."""
        if isinstance(kept, int):
            return range(kept)
        found = set(kept)
        if not found or not found <= set(range(group.channels)):
            raise ValueError(f"sizes: {group.name!r} must keep some of its channels 0..{group.channels - 1}")
        if len(found) != len({c // group.bundle for c in found}) * group.bundle:
            raise ValueError(f"sizes: {group.name!r} must keep whole units of {group.bundle} neighbouring channels")
        return found

    # -- order of channels --------------------------------------------------------------------------------------

    def importance(self, group: Group) -> Tensor:
        """(channels,): the sum of |w| over all weights that read each channel of ``group``."""
        total = torch.zeros(group.channels)
        for m in group.members:
            module = _submodule(self.model, m.module)
            depthwise = isinstance(module, _ConvNd) and module.groups > 1
            if m.side != "in" or depthwise or not isinstance(module, _ConvNd | nn.Linear):
                continue
            dim = 0 if isinstance(module, _ConvTransposeNd) else 1
            weight = module.weight.detach().float().cpu().abs()
            read = weight.sum([d for d in range(weight.ndim) if d != dim])
            total.index_add_(0, torch.tensor(m.channels), read[list(m.positions)])
        return total

    @torch.no_grad()
    def permute(self, group: Group, order: Sequence[int]) -> None:
        """Put channel ``order[c]`` of ``group`` in place c, everywhere; the full network computes the same function.

        Raises:
            ValueError: ``order`` is no permutation, or a module ties the channels to their places (heads, groups).
        """
        if sorted(order) != list(range(group.channels)):
            raise ValueError(f"order: expected a permutation of 0..{group.channels - 1}")
        moves: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}  # a layer may carry the channels on both its sides
        for m in group.members:
            if m.side == "parameter":
                parameter = tensor_named(self.model, m.module)
                moves[id(parameter), m.dim, _reindex(m, order, parameter.shape[m.dim])] = parameter
                continue
            module = self.model.get_submodule(m.module)
            grouped = isinstance(module, _ConvNd) and 1 < module.groups < module.in_channels
            bound = isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels
            if grouped or bound or isinstance(module, nn.MultiheadAttention) or group.name in self.heads.values():
                raise ValueError(f"group: {group.name!r} cannot be reordered: places in {m.module!r} have a meaning")
            depthwise = isinstance(module, _ConvNd) and module.groups > 1
            if depthwise and m.side == "in":
                continue  # the same dimension as its output side
            for name, cut in module_cuts(module, {m.side: set()})[0].items():
                tensor: Tensor = getattr(module, name)
                for dim in cut:
                    moves[id(tensor), dim, _reindex(m, order, tensor.shape[dim])] = tensor
        for (_, dim, index), tensor in moves.items():
            tensor.copy_(tensor.index_select(dim, torch.tensor(index, device=tensor.device)))

    def _check_ties(self, cuts: Mapping[str, Cuts]) -> None:
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            other = first.setdefault(id(parameter), name)
            if cuts.get(name, {}) != cuts.get(other, {}):
                raise ValueError(
                    f"model: {other!r} and {name!r} are one tied parameter, but would be cut differently; "
                    f"exclude one of them: exclude=[{name.rpartition('.')[0]!r}]"
                )


_INNER_WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "embed_dim")
_EXCLUDED = "excluded"
_WIDTHS: dict[type[nn.Module], str] = {nn.EmbeddingBag: "embedding_dim", nn.Bilinear: "out_features"}
_ONE_UNIT = "all its channels form one unit, which has to stay"
# Kept units of the trials in which a group keeps its first ones.
_PREFIXES: tuple[Callable[[int], int], ...] = (
    lambda units: 1,
    lambda units: (units + 1) // 2,
    lambda units: max(1, units - 1),
)


def _reindex(member: Member, order: Sequence[int], size: int) -> tuple[int, ...]:
    """Where each position of one dimension takes its values from when channels are put in ``order``."""
    places: dict[int, list[int]] = {}
    for position, channel in zip(member.positions, member.channels, strict=True):
        places.setdefault(channel, []).append(position)
    index = list(range(size))
    for channel, positions in places.items():
        for to, source in zip(positions, places[order[channel]], strict=True):
            index[to] = source
    return tuple(index)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule of that name, None where there is none (a block that depth left out, a bare parameter)."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _ranks(channels: Ids) -> Ids:
    """The number of each channel in the order in which they first appear."""
    seen: dict[int, int] = {}
    return np.array([seen.setdefault(int(c), len(seen)) for c in channels])


def _drawn(group: Group, generator: torch.Generator) -> set[int]:
    """Whole units of a group, each with an even chance; one at least, and one at least less than all."""
    chosen = torch.rand(group.units, generator=generator) < 0.5
    first, last = torch.randperm(group.units, generator=generator)[[0, -1]].tolist()
    chosen[last] = False
    chosen[first] = True
    units = chosen.nonzero().flatten().tolist()
    return {u * group.bundle + i for u in units for i in range(group.bundle)}


def _scaled(value: Any, units: int, full: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_scaled(v, units, full) for v in value)
    if value * units % full:
        raise ValueError(f"{value} cannot be brought to {units} of {full} units")
    return value * units // full
