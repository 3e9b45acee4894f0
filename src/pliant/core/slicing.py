"""A sub-network as a set of *views* on the parameters of the full one.

Three cuts make a network smaller: fewer channels (*width*, *expansion*), fewer blocks (*depth*), and smaller filters
(*kernel*, the centre of the full ones).

Channels that are added, concatenated or multiplied must be cut together. Which ones those are is read off the
dependency graph of torch-pruning, which traces the user's own forward. A group of C coupled channels is cut to its
first ``kept(C, width, units)`` ones; ``units`` keeps what must not be parted together: attention heads, the channels
of one group of a GroupNorm or of a grouped convolution. Smaller widths are prefixes of larger ones (nesting),
everywhere by one rounding function.

A sub-network is (1) a *skeleton*: a copy of the user's modules without any weights, whose static sizes (number of
groups, heads, normalised shape, length of a block list) are those of the smaller network, and (2) the *cuts*: for each
parameter the kept range of each dimension. Running it gives the skeleton views on the full parameters
(``torch.func.functional_call``); extracting it gives the same skeleton copies of them. That is why both give the same
numbers, bit for bit.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.core.inputs import Input, call, check_example, evaluating, first_tensor, logits, removing, take

Runs = tuple[tuple[int, int], ...]  # kept positions along one dimension, as (start, length) pieces
Cuts = dict[int, Runs]  # by dimension


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
    side: str  # "out" or "in" of a module; "parameter": a bare parameter of that name
    positions: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass
class Group:
    """Coupled channels, cut together. ``units`` of them can be kept."""

    name: str
    channels: int
    units: int
    members: list[Member] = field(default_factory=list)
    linked: frozenset[str] = frozenset()  # groups that a grouped convolution binds to keep the same share

    @property
    def bundle(self) -> int:
        """The channels of one unit: what is kept is a multiple of it."""
        return self.channels // self.units

    def __repr__(self) -> str:
        return f"Group({self.name}, {self.channels} channels in {self.units} units, {len(self.members)} members)"


@dataclass(frozen=True)
class SubNetwork:
    """A skeleton and the cuts that give it its weights."""

    skeleton: nn.Module
    cuts: Mapping[str, Cuts]

    @cached_property
    def _places(self) -> list[tuple[list[str], list[tuple[str, str]]]]:
        """Where the skeleton's tensors live: (path of the module, [(full name, name in the module)])."""
        places: dict[str, list[tuple[str, str]]] = {}
        for name in _tensors(self.skeleton):
            path, _, leaf = name.rpartition(".")
            places.setdefault(path, []).append((name, leaf))
        return [(path.split(".") if path else [], leaves) for path, leaves in places.items()]

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of the skeleton by name."""
        return dict(self.skeleton.named_modules())

    def views(self, model: nn.Module) -> dict[str, Tensor]:
        """Every parameter and buffer that the skeleton needs, as views on those of the full ``model``.

        A leading range is a view. Two exceptions copy one tensor at a time: where the kept positions are several
        pieces (behind a concatenation, in the joined projection of ``nn.MultiheadAttention``) they are joined; and in
        evaluation mode a matrix that lost columns is made contiguous, because the product of a strided matrix with a
        single row takes another kernel on CPU and differs in the last bit (convolutions and training do not need it).
        """
        full = _lookup(model, self._places)
        # Views require a gradient where their parameter does, also under no_grad: ``torch.matmul`` looks at that flag
        # when it chooses a kernel, and would otherwise differ from the extracted network in the last bit.
        with torch.enable_grad():
            views = {name: _cut(t, self.cuts[name]) if name in self.cuts else t for name, t in full.items()}
            if not self.skeleton.training:
                views.update({name: v.contiguous() for name, v in views.items() if v.ndim == 2})
        return views

    def run(self, model: nn.Module, x: Input, replace: Mapping[str, Tensor] | None = None) -> Any:
        """The skeleton's output on ``x`` with views on ``model``'s weights; ``replace`` overrides some tensors."""
        tensors = self.views(model)
        tensors.update(replace or {})
        args = (x,) if isinstance(x, Tensor) else () if isinstance(x, Mapping) else tuple(x)
        kwargs = dict(x) if isinstance(x, Mapping) else {}
        return functional_call(self.skeleton, tensors, args, kwargs, tie_weights=False)

    def infer(
        self, model: nn.Module, x: Input, replace: Callable[[], Mapping[str, Tensor]] = dict, key: object = None
    ) -> Any:
        """``run`` in evaluation mode, for many calls without gradients: views stay in place from one to the next.

        A view shows its parameter as it is now, whoever changed it and how; what has to be copied (see ``views``) is
        copied anew for each call. Everything is put in place again when a parameter was moved or replaced.

        Args:
            model: the full network.
            x: an input.
            replace: tensors that override some, asked for when they are put in place; views, so that they stay right.
            key: whatever tells that ``replace`` would give other tensors than last time.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.skeleton.training:
            return self.run(model, x, replace())
        full = _lookup(model, self._places)
        # A tensor's place in memory tells that it was moved; inference mode makes tensors of another kind.
        now = (key, torch.is_inference_mode_enabled(), *((id(t), t.data_ptr()) for t in full.values()))
        mount = self._mount
        if mount.network is None or mount.key != now:
            mount.put(self, now, self.views(model), replace(), full)
        if mount.copied:
            with torch.enable_grad():
                for owner, leaf, name in mount.copied:
                    owner[leaf] = _cut(full[name], self.cuts[name]).contiguous()
        return call(mount.network, x)  # type: ignore[arg-type]

    @cached_property
    def _mount(self) -> _Mount:
        return _Mount()

    def extract(self, model: nn.Module, replace: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A plain network with contiguous copies of the weights, in evaluation mode. Tied weights stay tied."""
        network = copy.deepcopy(self.skeleton)
        full, views = _tensors(model), self.views(model)
        views.update(replace or {})
        made: dict[int, Tensor] = {}
        for name, view in views.items():
            path, _, leaf = name.rpartition(".")
            owner = network.get_submodule(path)
            if id(full[name]) not in made:
                copied = view.detach().clone(memory_format=torch.contiguous_format)
                source = full[name]
                made[id(source)] = (
                    nn.Parameter(copied, source.requires_grad) if isinstance(source, nn.Parameter) else copied
                )
            store: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            store[leaf] = made[id(full[name])]
        return network.eval()


class _Mount:
    """A copy of a skeleton with the views in place of its parameters. Copies of it are empty."""

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self.key: object = None
        self.copied: list[tuple[dict[str, Any], str, str]] = []  # (tensors of a module, name there, full name)

    def put(
        self,
        of: SubNetwork,
        key: object,
        views: Mapping[str, Tensor],
        replaced: Mapping[str, Tensor],
        full: Mapping[str, Tensor],
    ) -> None:
        """Build the network anew."""
        held = {id(t): t for t in [*of.skeleton.parameters(), *of.skeleton.buffers()]}
        self.network, self.key, self.copied = _copy_of(of.skeleton, held).eval(), key, []
        for name, tensor in {**views, **replaced}.items():
            path, _, leaf = name.rpartition(".")
            owner = self.network.get_submodule(path)
            tensors: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            tensors[leaf] = tensor
            own_memory = (
                name in of.cuts and tensor.untyped_storage().data_ptr() != full[name].untyped_storage().data_ptr()
            )
            if own_memory and name not in replaced:
                self.copied.append((tensors, leaf, name))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mount:
        return _Mount()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Mount, ())


class Slicing:
    """The channel groups and block stacks of a network.

    Args:
        model: any network whose forward torch-pruning can trace.
        example: an input for it.
        width: whether channels are to be cut; False skips the tracing.
        exclude: names of modules (patterns as in ``fnmatch``) whose groups keep their full width.
        divisor: kept channels are a multiple of this where the group's size allows.
        stacks: names of the block lists that depth cuts; None finds them: every ``ModuleList`` or ``Sequential`` of
            two or more modules of one class, run once each in order, of which all but the first keep the shape (of
            nested ones the outermost).

    Raises:
        ValueError: the model cannot be traced, or a module cannot be sliced; the message names it.
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
    ) -> None:
        if divisor < 1:
            raise ValueError(f"divisor: {divisor} is not a positive number of channels")
        self.model = model
        check_example(model, example)
        example = take(example, slice(0, 2))  # many small networks are tried: two rows tell as much
        self.shape = tuple(check_example(model, example).shape)
        names = [n for n, _ in model.named_modules()]
        for pattern in exclude:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"exclude: no module of the model is named {pattern!r}")
        self.exclude = tuple(exclude)
        self.heads: dict[str, str] = {}  # attention module -> name of the group of its inner width
        self.stacks = find_stacks(model, example) if stacks is None else self._check_stacks(stacks)
        self.groups: list[Group] = []
        if width:
            self._find_groups(example, divisor)
            self._link_grouped_convolutions()
            self._try(example)
            if not self.groups:
                raise ValueError("model: no channel group of it can be cut; give width=(1.0,) and use depth only")

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

    def _find_groups(self, example: Input, divisor: int) -> None:
        names = {module: name for name, module in self.model.named_modules()}
        parameter_names = {id(p): name for name, p in self.model.named_parameters()}
        for root, items in list(_trace(self.model, example, self._excluded)):
            members = []
            for module, side, positions, channels in items:
                if isinstance(module, nn.Parameter):
                    members.append(Member(parameter_names[id(module)], "parameter", positions, channels))
                elif module in names:
                    members.append(Member(names[module], side, positions, channels))
            if any(self._excluded(m.module) for m in members):
                continue
            for member in members:
                self._check_member(member)
            for group in _part(names[root], self._join_projections(members)):
                group.units = math.gcd(
                    group.channels // math.gcd(divisor, group.channels),
                    *(self._units(group, m) for m in group.members),
                )
                self._find_heads(group)
                self.groups.append(group)

    def _excluded(self, name: str) -> bool:
        parts = name.split(".")
        ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatch.fnmatch(a, pattern) for a in ancestors for pattern in self.exclude)

    def _check_member(self, member: Member) -> None:
        if member.side == "parameter":
            return
        module = self.model.get_submodule(member.module)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1:
            why = f"its normalized_shape {tuple(module.normalized_shape)} has several dimensions"
        elif isinstance(module, _ConvTransposeNd) and module.groups > 1:
            why = "a transposed convolution with groups"
        elif not isinstance(module, _SLICEABLE):
            why = f"slicing a {type(module).__name__} is not supported"
        elif isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
            why = "its keys or values have a width of their own"
        else:
            return
        name = member.module
        raise ValueError(f"model: cannot slice {name!r}: {why}; exclude it by name: exclude=[{name!r}]")

    def _units(self, group: Group, member: Member) -> int:
        """Into how many units this member allows the group to be parted."""
        if member.side == "parameter":
            return group.channels
        module = self.model.get_submodule(member.module)
        if isinstance(module, nn.GroupNorm):
            bundle = module.num_channels // module.num_groups
        elif isinstance(module, nn.MultiheadAttention):
            bundle = module.head_dim
        elif isinstance(module, _ConvNd) and module.groups > 1:
            bundle = (module.out_channels if member.side == "out" else module.in_channels) // module.groups
        else:
            return group.channels
        whole = min(member.positions) % bundle == 0 and len(member.positions) % bundle == 0
        return len(member.positions) // bundle if whole else 1

    def _join_projections(self, members: list[Member]) -> list[Member]:
        """Queries, keys and values out of one Linear (three thirds of its rows): channel c of each goes together.

        The dependency graph only ties the values to the output projection, since no channel of a query reaches it.
        """
        linear = {side: [m for m in members if m.side == side and self._is_linear(m.module)] for side in ("out", "in")}
        if len(linear["out"]) != 1 or len(linear["in"]) != 1:
            return members
        fused, projection = linear["out"][0], linear["in"][0]
        owner, size = fused.module.rpartition(".")[0], len(projection.positions)
        values = tuple(range(2 * size, 3 * size))
        if (
            len(fused.positions) != 3 * size
            or projection.module.rpartition(".")[0] != owner
            or tuple(sorted(projection.channels)) != values
        ):
            return members
        return [
            Member(fused.module, "out", fused.positions, tuple(c % size for c in fused.channels)),
            Member(projection.module, "in", projection.positions, tuple(c - 2 * size for c in projection.channels)),
        ]

    def _is_linear(self, name: str) -> bool:
        return isinstance(_submodule(self.model, name), nn.Linear)

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
            counts = [v for a in _HEADS if isinstance(v := getattr(module, a, None), int) and v > 0]
            if balance > 0 and counts:
                units = math.gcd(*counts)
                if group.channels % units:
                    continue
                group.units = math.gcd(group.units, units)
                self.heads[owner] = group.name

    def _link_grouped_convolutions(self) -> None:
        """The input and output groups of a grouped convolution must keep the same share of its groups."""
        clusters: list[set[str]] = [{g.name} for g in self.groups]
        for name, module in self.model.named_modules():
            if isinstance(module, _ConvNd) and 1 < module.groups < module.in_channels:
                touched = {g.name for g in self.groups if any(m.module == name for m in g.members)}
                joined = [c for c in clusters if c & touched]
                clusters = [c for c in clusters if not c & touched] + ([set().union(*joined)] if joined else [])
        for group in self.groups:
            group.linked = frozenset(next(c for c in clusters if group.name in c))
        common = {c: math.gcd(*(g.units for g in self.groups if g.name in c)) for c in map(frozenset, clusters)}
        for group in self.groups:
            group.units = common[group.linked]

    def _try(self, example: Input) -> None:
        """Run every group alone at its smallest, then all together: outputs must keep their shape.

        A group whose cut changes the shape of the output holds the network's outputs, and is left whole.
        """
        least = {g.name: kept(g.channels, 0.0, g.units) for g in self.groups}
        inner = []
        for group in self.groups:
            result = self._attempt({name: least[name] for name in group.linked}, example)
            if isinstance(result, Exception):
                members = [m.module for m in group.members if m.side == "out"] or [group.name]
                raise ValueError(
                    f"model: cannot slice the channels of {', '.join(map(repr, members[:4]))}: {_first_line(result)}. "
                    f"Its forward seems to fix their number; exclude them by name: exclude=[{group.name!r}]"
                ) from result
            if result == self.shape:
                inner.append(group)
        self.groups = inner
        sizes = {g.name: least[g.name] for g in inner}
        self._check_ties(self.build(sizes).cuts)
        result = self._attempt(sizes, example)
        if result != self.shape:
            why = _first_line(result) if isinstance(result, Exception) else f"the output has shape {result}"
            raise ValueError(f"model: its channel groups can be cut one by one but not together: {why}")

    def _attempt(self, sizes: Mapping[str, int], example: Input) -> tuple[int, ...] | Exception:
        try:
            network = self.build(sizes)
            with evaluating(network.skeleton), torch.no_grad():
                return tuple(logits(network.run(self.model, example)).shape)
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
            return error

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
        if depth < 1 and not self.stacks:
            raise ValueError("depth: no stack of blocks was found in the model; name them: stacks=['blocks']")
        return self.build(self.sizes(width), self.depths(depth))

    def build(
        self,
        sizes: Mapping[str, int | Collection[int]],
        depths: Mapping[str, int] | None = None,
        kernels: Mapping[str, int] | None = None,
    ) -> SubNetwork:
        """The sub-network of given sizes; what is not named stays whole.

        Args:
            sizes: kept channels, by the name of a group: how many of the first ones, or which ones. Whole units; groups
                that a grouped convolution links must keep the same units.
            depths: kept blocks, by the name of a stack.
            kernels: filter sizes, by the name of a convolution, see ``can_crop``.

        A module of the model that has a method ``after_slicing()`` is called then, in the skeleton, so that it can
        leave out what its new sizes have no use for.
        """
        skeleton = _skeleton(self.model)
        for name, blocks in (depths or {}).items():
            if blocks < self.stacks[name]:
                path, _, leaf = name.rpartition(".")
                setattr(skeleton.get_submodule(path), leaf, skeleton.get_submodule(name)[:blocks])  # type: ignore[index]
        sides: dict[tuple[str, str], set[int]] = {}  # positions that fall away
        counts: dict[str, int] = {}
        for group in self.groups:
            stay = self._stay(group, sizes.get(group.name, group.channels))
            counts[group.name] = len(stay)
            if len(stay) == group.channels:
                continue
            for m in group.members:
                gone = {p for p, c in zip(m.positions, m.channels, strict=True) if c not in stay}
                sides.setdefault((m.module, m.side), set()).update(gone)
        cuts: dict[str, Cuts] = {}
        by_module: dict[str, dict[str, set[int]]] = {}
        for (module_name, side), gone in sides.items():
            if side == "parameter":
                parameter = self.model.get_parameter(module_name)
                dim = _last_wide(parameter)
                cuts[module_name] = {dim: _runs(parameter.shape[dim], gone)}
            else:
                by_module.setdefault(module_name, {})[side] = gone
        for module_name, gone_by_side in by_module.items():
            module = self.model.get_submodule(module_name)
            found, attributes = _module_cuts(module, gone_by_side)
            for parameter_name, cut in found.items():
                cuts[f"{module_name}.{parameter_name}" if module_name else parameter_name] = cut
            target = _submodule(skeleton, module_name)
            for attribute, value in attributes.items() if target is not None else ():
                setattr(target, attribute, value)
        for name, size in (kernels or {}).items():
            cut = cuts.setdefault(f"{name}.weight", {})
            _crop(self.model.get_submodule(name), _submodule(skeleton, name), size, cut)
        self._resize_attention(skeleton, counts)
        for module in skeleton.modules():
            if callable(told := getattr(module, "after_slicing", None)):
                told()
        return SubNetwork(skeleton, cuts)

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
                parameter = self.model.get_parameter(m.module)
                dim = _last_wide(parameter)
                moves[id(parameter), dim, _reindex(m, order, parameter.shape[dim])] = parameter
                continue
            module = self.model.get_submodule(m.module)
            grouped = isinstance(module, _ConvNd) and 1 < module.groups < module.in_channels
            bound = isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels
            if grouped or bound or isinstance(module, nn.MultiheadAttention) or group.name in self.heads.values():
                raise ValueError(f"group: {group.name!r} cannot be reordered: places in {m.module!r} have a meaning")
            depthwise = isinstance(module, _ConvNd) and module.groups > 1
            if depthwise and m.side == "in":
                continue  # the same dimension as its output side
            for name, cut in _module_cuts(module, {m.side: set()})[0].items():
                tensor: Tensor = getattr(module, name)
                for dim in cut:
                    moves[id(tensor), dim, _reindex(m, order, tensor.shape[dim])] = tensor
        for (_, dim, index), tensor in moves.items():
            tensor.copy_(tensor.index_select(dim, torch.tensor(index, device=tensor.device)))

    def _resize_attention(self, skeleton: nn.Module, sizes: Mapping[str, int]) -> None:
        """Give attention modules written by others the number of heads that they have left."""
        groups = {g.name: g for g in self.groups}
        for owner, group_name in self.heads.items():
            size, module = sizes.get(group_name), _submodule(skeleton, owner)
            if size is None or group_name not in groups or module is None:
                continue
            full = groups[group_name].channels
            for attribute in _HEADS:
                if isinstance(heads := getattr(module, attribute, None), int):
                    setattr(module, attribute, heads * size // full)
            for attribute in _INNER_WIDTHS:
                if getattr(module, attribute, None) == full:
                    setattr(module, attribute, size)

    def _check_ties(self, cuts: Mapping[str, Cuts]) -> None:
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            other = first.setdefault(id(parameter), name)
            if cuts.get(name, {}) != cuts.get(other, {}):
                raise ValueError(
                    f"model: {other!r} and {name!r} are one tied parameter, but would be cut differently; "
                    f"exclude one of them: exclude=[{name.rpartition('.')[0]!r}]"
                )


_HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads", "n_heads", "n_head", "nhead", "heads")
_INNER_WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "embed_dim")
_SLICEABLE = (
    _ConvNd,
    nn.Linear,
    _NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.Embedding,
    nn.PReLU,
    nn.MultiheadAttention,
)


def can_crop(module: nn.Module, size: int) -> bool:
    """Whether the filters of ``module`` can shrink to their central ``size`` with the output keeping its shape."""
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd) or module.padding_mode != "zeros":
        return False
    full = module.kernel_size[0]
    if set(module.kernel_size) != {full} or size < 1 or size > full or (full - size) % 2:
        return False
    lost = [(full - size) // 2 * d for d in module.dilation]
    return isinstance(module.padding, str) or all(p >= n for p, n in zip(module.padding, lost, strict=True))


def _crop(module: nn.Module, target: nn.Module | None, size: int, cuts: Cuts) -> None:
    """Cut the filters of ``module`` to their centre (in ``cuts``), and tell ``target``, its place in the skeleton."""
    if not can_crop(module, size):
        raise ValueError(f"kernels: {module} cannot be cropped to {size}")
    assert isinstance(module, _ConvNd)
    start = (module.kernel_size[0] - size) // 2
    for dim in range(2, 2 + len(module.kernel_size)):
        cuts[dim] = ((start, size),)
    if target is not None:
        target.kernel_size = (size,) * len(module.kernel_size)  # type: ignore[assignment]
        if not isinstance(module.padding, str):
            lost = [start * d for d in module.dilation]
            target.padding = tuple(p - n for p, n in zip(module.padding, lost, strict=True))  # type: ignore[assignment]


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


def _module_cuts(module: nn.Module, gone: Mapping[str, set[int]]) -> tuple[dict[str, Cuts], dict[str, Any]]:
    """Which parameters of ``module`` lose which positions, and the static sizes that it has then."""
    if isinstance(module, _ConvNd | nn.Linear):
        transposed = isinstance(module, _ConvTransposeNd)
        linear = isinstance(module, nn.Linear)
        outs, ins = ("out_features", "in_features") if linear else ("out_channels", "in_channels")
        groups: int = 1 if linear else module.groups  # type: ignore[assignment]
        out_full, in_full = int(getattr(module, outs)), int(getattr(module, ins))
        if groups > 1:
            # The input and the output lose the same groups. In a depthwise convolution the two are the same channels.
            out_gone, in_gone = gone.get("out", set()), gone.get("in", set())
            if groups == in_full == out_full:
                runs = _runs(groups, out_gone | in_gone)
                size = _length(runs)
                cuts = {"weight": {0: runs}, "bias": {0: runs}}
                return _present(module, cuts), {outs: size, ins: size, "groups": size}
            lost_groups = {p * groups // out_full for p in out_gone} | {p * groups // in_full for p in in_gone}
            left = groups - len(lost_groups)
            out_size, in_size = out_full * left // groups, in_full * left // groups
            out_runs = _runs(out_full, {p for p in range(out_full) if p * groups // out_full in lost_groups})
            cuts = {"weight": {0: out_runs}, "bias": {0: out_runs}}
            return _present(module, cuts), {outs: out_size, ins: in_size, "groups": left}
        weight: Cuts = {}
        attributes: dict[str, Any] = {}
        cuts = {"weight": weight}
        if "out" in gone:
            runs = _runs(out_full, gone["out"])
            weight[1 if transposed else 0] = runs
            cuts["bias"] = {0: runs}
            attributes[outs] = _length(runs)
        if "in" in gone:
            runs = _runs(in_full, gone["in"])
            weight[0 if transposed else 1] = runs
            attributes[ins] = _length(runs)
        return _present(module, cuts), attributes
    lost = set().union(*gone.values())
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        runs = _runs(width, lost)
        size = _length(runs)
        thrice = _runs(3 * width, {p + i * width for p in lost for i in range(3)})
        cuts = {
            "in_proj_weight": {0: thrice, 1: runs},
            "in_proj_bias": {0: thrice},
            "out_proj.weight": {0: runs, 1: runs},
            "out_proj.bias": {0: runs},
        }
        heads = size // module.head_dim
        return cuts, {"embed_dim": size, "kdim": size, "vdim": size, "num_heads": heads}
    if isinstance(module, nn.Embedding):
        runs = _runs(module.embedding_dim, lost)
        return {"weight": {1: runs}}, {"embedding_dim": _length(runs)}
    if isinstance(module, nn.PReLU):
        if module.num_parameters == 1:  # one slope for all channels
            return {}, {}
        runs = _runs(module.num_parameters, lost)
        return {"weight": {0: runs}}, {"num_parameters": _length(runs)}
    names = ("weight", "bias", "running_mean", "running_var")
    if isinstance(module, nn.GroupNorm):
        runs = _runs(module.num_channels, lost)
        size, full = _length(runs), module.num_channels
        attributes = {"num_channels": size, "num_groups": size * module.num_groups // full}
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        runs = _runs(module.normalized_shape[0], lost)
        attributes = {"normalized_shape": (_length(runs),)}
    else:
        runs = _runs(int(module.num_features), lost)  # type: ignore[arg-type]
        attributes = {"num_features": _length(runs)}
    return _present(module, {name: {0: runs} for name in names}), attributes


def _present(module: nn.Module, cuts: dict[str, Cuts]) -> dict[str, Cuts]:
    return {name: cut for name, cut in cuts.items() if isinstance(getattr(module, name, None), Tensor) and cut}


class _RMSNormPruner(torch_pruning.BasePruningFunc):  # type: ignore[misc]
    """Tells the dependency graph that an RMSNorm's channels go straight through; nothing is ever pruned by it."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.RMSNorm) -> int:
        return int(layer.normalized_shape[-1])

    get_in_channels = get_out_channels


class _BoundedGroup(torch_pruning.dependency.group.Group):  # type: ignore[misc]
    """A group that stops growing: where channels are tied to themselves in another order, tracing never ends."""

    limit = 0

    def add_dep(self, dep: Any, idxs: Any) -> None:
        if len(self) > self.limit:
            raise _EndlessError
        super().add_dep(dep, idxs)


class _EndlessError(Exception):
    pass


Items = list[tuple[nn.Module, str, tuple[int, ...], tuple[int, ...]]]


def _trace(model: nn.Module, example: Input, excluded: Callable[[str], bool]) -> Iterator[tuple[nn.Module, Items]]:
    """The coupled channels by torch-pruning: (root module, [(module, side, positions, channels)])."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    names = {module: name for name, module in model.named_modules()}
    graph = torch_pruning.DependencyGraph()
    traced = torch_pruning.dependency.graph
    original = traced.Group
    try:
        for p in frozen:  # the graph follows autograd
            p.requires_grad_(True)
        with evaluating(model), warnings.catch_warnings(), torch.enable_grad(), _slopes_set_aside(model):
            warnings.simplefilter("ignore")
            graph.build_dependency(
                model,
                example_inputs=example,
                forward_fn=call,
                output_transform=logits,
                customized_pruners={nn.RMSNorm: _RMSNormPruner()},
                verbose=False,
            )
        _BoundedGroup.limit = 20 * len(graph.module2node) + 1000  # nested concatenations need ten a node
        traced.Group = _BoundedGroup
        visited: set[nn.Module] = set()
        for root in list(graph.module2node):
            if not isinstance(root, _ConvNd | nn.Linear | nn.Embedding) or root in visited or excluded(names[root]):
                continue
            pruner = graph.get_pruner_of_module(root)
            try:
                group = graph.get_pruning_group(root, pruner.prune_out_channels, range(pruner.get_out_channels(root)))
            except _EndlessError:
                raise ValueError(
                    f"model: cannot slice {names[root]!r}: its channels are tied to themselves in another order, as "
                    f"rotary embeddings do; exclude it by name: exclude=[{names[root]!r}]"
                ) from None
            items: Items = []
            for item in group:
                module, handler = item.dep.target.module, item.dep.handler
                side = "in" if graph.is_in_channel_pruning_fn(handler) else "out"
                if side == "out":
                    visited.add(module)
                if isinstance(module, nn.Parameter | nn.Module):
                    items.append((module, side, tuple(item.idxs), tuple(item.root_idxs)))  # type: ignore[arg-type]
            yield root, items
    except ValueError:
        raise
    except Exception as error:  # torch-pruning raises whatever its tracing runs into
        raise ValueError(
            f"model: its forward cannot be traced ({_first_line(error)}); give width=(1.0,) and use depth only"
        ) from error
    finally:
        traced.Group = original
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _slopes_set_aside(model: nn.Module) -> Iterator[None]:
    """A PReLU with one slope for all channels is any elementwise function to the graph, which cannot read its width."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.PReLU) and child.num_parameters == 1
    ]
    for parent, name, _ in places:
        parent._modules[name] = nn.LeakyReLU()
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _part(root: str, members: Sequence[Member]) -> list[Group]:
    """Part coupled channels where they come from different layers: behind a concatenation each part is cut alone.

    Channels belong together when the same members carry them.
    """
    carriers: dict[int, list[int]] = {}
    for i, member in enumerate(members):
        for channel in set(member.channels):
            carriers.setdefault(channel, []).append(i)
    parts: dict[tuple[int, ...], list[int]] = {}
    for channel in sorted(carriers):
        parts.setdefault(tuple(carriers[channel]), []).append(channel)
    groups = []
    for number, (carried_by, channels) in enumerate(parts.items()):
        rank = {channel: i for i, channel in enumerate(channels)}
        group = Group(root if len(parts) == 1 else f"{root}[{number}]", len(channels), 1)
        for i in carried_by:
            m = members[i]
            pairs = [(p, rank[c]) for p, c in zip(m.positions, m.channels, strict=True) if c in rank]
            group.members.append(Member(m.module, m.side, tuple(p for p, _ in pairs), tuple(c for _, c in pairs)))
        groups.append(group)
    return groups


def find_stacks(model: nn.Module, example: Input) -> dict[str, int]:
    """Names and lengths of the block lists that may be shortened; see ``Slicing``."""
    candidates = {
        name: list(module)
        for name, module in model.named_modules()
        if name  # the whole model is no part of itself
        and isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
        and any(True for _ in module[0].parameters())
    }
    runs: list[tuple[int, tuple[int, ...] | None, tuple[int, ...] | None]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        runs.append((id(module), _shape_of((*args, *kwargs.values())), _shape_of(output)))

    blocks = {id(child): child for children in candidates.values() for child in children}
    handles = [child.register_forward_hook(note, with_kwargs=True) for child in blocks.values()]
    with removing(handles), evaluating(model), torch.no_grad():
        call(model, example)
    stacks = {}
    for name, children in candidates.items():
        mine = [r for r in runs if r[0] in {id(c) for c in children}]
        in_order = [r[0] for r in mine] == [id(c) for c in children]
        if in_order and all(before is not None and before == after for _, before, after in mine[1:]):
            stacks[name] = len(children)
    return {name: n for name, n in stacks.items() if not any(name.startswith(f"{other}.") for other in stacks)}


def _shape_of(value: Any) -> tuple[int, ...] | None:
    try:
        return tuple(first_tensor(value).shape)
    except TypeError:
        return None


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the modules of ``model`` whose parameters and buffers hold no memory."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return _copy_of(model, memo)


_BASE = frozenset(nn.Module().__dict__)  # the dictionaries that every module keeps
_SHARED = (int, float, str, bool, type(None), torch.dtype, torch.device)


def _copy_of(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(module, memo)``, ten times faster where a module holds little besides tensors and submodules."""
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    if hasattr(module, "__deepcopy__"):
        return copy.deepcopy(module, memo)
    new = module.__class__.__new__(module.__class__)
    memo[id(module)] = new
    held = new.__dict__
    for name, value in module.__dict__.items():
        if name in _BASE:
            held[name] = value.copy() if isinstance(value, dict | set) else value
        elif isinstance(value, _SHARED) or (isinstance(value, tuple) and all(isinstance(v, _SHARED) for v in value)):
            held[name] = value
    for name, tensors in (("_parameters", module._parameters), ("_buffers", module._buffers)):
        held[name] = {k: None if t is None else memo[id(t)] for k, t in tensors.items()}
    held["_modules"] = {k: None if m is None else _copy_of(m, memo) for k, m in module._modules.items()}
    for name, value in module.__dict__.items():  # at last, when the submodules that it may name are in the memo
        if name not in held:
            held[name] = copy.deepcopy(value, memo)
    return new


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _lookup(model: nn.Module, places: Sequence[tuple[list[str], list[tuple[str, str]]]]) -> dict[str, Tensor]:
    """The tensors at ``places``, several times faster than walking the whole model for each forward pass."""
    found: dict[str, Tensor] = {}
    for path, leaves in places:
        module: Any = model
        for part in path:
            module = module._modules[part]
        for name, leaf in leaves:
            tensor = module._parameters.get(leaf)
            found[name] = module._buffers[leaf] if tensor is None else tensor
    return found


def _cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    for dim, runs in cuts.items():
        pieces = [tensor.narrow(dim, start, length) for start, length in runs]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return tensor


def _runs(size: int, gone: set[int]) -> Runs:
    runs: list[tuple[int, int]] = []
    for p in range(size):
        if p in gone:
            continue
        if runs and sum(runs[-1]) == p:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((p, 1))
    return tuple(runs)


def _length(runs: Runs) -> int:
    return sum(length for _, length in runs)


def _last_wide(parameter: Tensor) -> int:
    """The dimension that the dependency graph cuts in a bare parameter: the last one longer than 1."""
    return max((d for d in range(parameter.ndim) if parameter.shape[d] > 1), default=parameter.ndim - 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule of that name, None where there is none (a block that depth left out, a bare parameter)."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
