"""Which position of which weight carries which channel: read by sending numbers through the network.

Every output channel of a layer gets a number, its *label*. While the network runs once on an example, each tensor is
accompanied by a tensor of the same shape that holds the labels of its elements. What moves elements (``permute``,
``flatten``, ``cat``, ``split``, ``index``, a shuffle of channels) moves their labels by the very same operation, so
nothing about an operation's meaning is guessed:

    layer              reads position p of its input: the labels that stand there belong to column p of its weight;
                       its outputs get labels of their own (a depthwise convolution ties output c to input c)
    elementwise        x + y ties the labels that meet; a tensor that is spread over channels (a gate (B, 1, H, W)) ties
                       nothing and stays whole
    sum, mean, pool    keeps the label where all elements that it reduces share it; else these channels stay whole
    normalisation      per channel: passes labels on; over channels: likewise, it works on the channels that are left
    product of two     q k^T and a v: what belongs to one matrix of the batch (a head) is tied to one *unit*
      activations
    anything else      its channels stay whole, and the reason is kept

Labels that are tied are one channel (``E``); channels that can only go together (a head, a group of a GroupNorm or of a
grouped convolution) are one unit (``U``). Labels up to 0 stand for constants made in the forward, which are cut as
whatever they meet (below 0 they have names, so that what meets the same constant is cut alike); 1 stands for what must
keep its size: the network's inputs and outputs, and what was mixed over channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pliant.core.inputs import Input, call, evaluating, map_tensors, predictions, removing, tensors_in
from pliant.core.label_rules import follow, norm_over, not_plain, rule_of, weight_dims
from pliant.core.labels import (
    CONSTANT,
    LARGEST_BARE,
    WHOLE,
    Ids,
    as_ids,
    distinct,
    extremes,
    is_linear_1d,
    is_spread,
    like,
    varies,
)

_OUTPUT = "it holds the network's outputs"


@dataclass(frozen=True)
class Carrier:
    """One dimension of one module's or tensor's weights that carries channels.

    ``side`` is "out" or "in" of a module; "parameter" for a parameter or buffer of that name, cut along ``dim``.
    """

    name: str
    side: str
    dim: int = 0


@dataclass
class Channels:
    """What was read: for each carrier the channel and the unit at each position, 0 where the position stays.

    ``why`` tells for the units that must stay whole what keeps them so; ``parted`` are the units in each place where
    a view parts one dimension of channels into two.
    """

    channels: dict[Carrier, Ids] = field(default_factory=dict)
    units: dict[Carrier, Ids] = field(default_factory=dict)
    why: dict[int, str] = field(default_factory=dict)
    parted: list[set[int]] = field(default_factory=list)


def read_channels(model: nn.Module, example: Input) -> Reading:
    """Send labels through ``model`` in evaluation mode and return what was read."""
    tracer = Tracer(model)
    with evaluating(model), torch.no_grad(), tracer.following(), tracer:
        output = call(model, map_tensors(example, tracer.source))
    for tensor in predictions(output).values():
        tracer.freeze(tracer.of(tensor), _OUTPUT)
    return Reading(tracer)


class Reading:
    """What was read of a network. ``norms`` names modules that are root-mean-square norms without torch's class."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.norms = tuple(tracer.norms)

    def channels(self, pieces: Mapping[int, int] | None = None, ties: Sequence[tuple[int, int]] = ()) -> Channels:
        """Which positions carry which channels.

        Where a view parts channels into h pieces of d it cannot be read which of the two numbers follows the width.
        ``pieces`` tells for such places, by their number in ``Channels.parted``: 1, whole pieces go; 2, every piece
        loses the same. Others are left open. ``ties`` are pairs of units that go together.
        """
        return self._tracer.result(pieces or {}, ties)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the network and keeps the labels of every tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.labels: Any = WeakTensorKeyDictionary()
        self.count = 2
        self.names = {id(m): n for n, m in reversed(list(model.named_modules(remove_duplicate=False)))}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.tensors = {id(t): n for n, t in tensors}
        self.owners = {id(t): m for m in model.modules() for t in [*m._parameters.values(), *m._buffers.values()]
                       if t is not None}  # fmt: skip
        self.bare: dict[str, tuple[int, tuple[int, ...]]] = {}  # parameter -> (first label, shape)
        self.bare_ranges: list[tuple[int, int]] = []
        self.made: dict[str, Ids] = {}  # layer -> labels of its outputs
        self.sides: dict[Carrier, Ids] = {}
        self.same: list[tuple[Ids, Ids]] = []  # ties between channels
        self.together: list[tuple[Ids, Ids]] = []  # ties between units
        self.frozen: list[tuple[Ids, str]] = []
        self.norms: list[str] = []
        self.parted: list[Ids] = []  # (pieces, size): labels that a view parts
        self.stack: list[nn.Module] = []
        self.settled = False
        self.inside = 0  # within a layer whose rule is known, or within a rule

    # -- running ----------------------------------------------------------------------------------------------------

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hooks on all modules: where the run stands, and which layers it enters."""
        handles = []
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        with removing(handles):
            yield

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.append(module)
        if self.inside or self._is_layer(module, args, kwargs):
            self.inside += 1

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.stack.pop()
        if not self.inside:
            return
        if self.inside == 1 and output is not None:
            try:
                self._layer(module, args, kwargs, output)
            except Exception as error:  # whatever a layer of another kind does with its shapes
                self.give_up(f"what {self.place(module)} computes could not be followed ({error})", args, output)
        self.inside -= 1

    def _is_layer(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether the module computes what its class's rule says (subclasses may override ``forward``)."""
        if is_linear_1d(module):
            return True
        if rule_of(module) is None:
            return self._is_rms_norm(module, args, kwargs)
        base: Any = next(k for k in type(module).__mro__ if "forward" in k.__dict__)
        if base.__module__.startswith("torch.nn.modules") and type(module).forward is base.forward:
            return True
        standard: Any = next(k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules"))
        with self.paused():
            try:
                ours, theirs = standard.forward(module, *args, **kwargs), module.forward(*args, **kwargs)
                return isinstance(ours, Tensor) and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
            except Exception:  # another signature, another layout: it is followed step by step
                return False

    def _is_rms_norm(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether a module without a class of torch's computes x / rms(x) times its weight, or 1 + its weight."""
        tensors = [*module._parameters.items()]
        x = args[0] if args else None
        if len(tensors) != 1 or module._modules or not isinstance(x, Tensor) or not x.is_floating_point():
            return False
        weight = tensors[0][1]
        if weight is None or weight.ndim != 1 or weight.numel() < 2 or x.shape[-1:] != weight.shape:
            return False
        found = [getattr(module, name, None) for name in ("eps", "variance_epsilon", "epsilon")]
        epsilon = next((e for e in found if isinstance(e, float)), 1e-6)
        with self.paused():
            y = module.forward(*args, **kwargs)
            if not isinstance(y, Tensor) or y.shape != x.shape:
                return False
            unit = x.double() * (x.double().square().mean(-1, keepdim=True) + epsilon).rsqrt()
            return any(
                torch.allclose(unit * w, y.double(), rtol=1e-2, atol=1e-3 * float(y.abs().max()))
                for w in (weight.double(), 1 + weight.double())
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in the block has no labels."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def place(self, module: nn.Module | None = None) -> str:
        """Where the run stands, for a reason."""
        module = module or (self.stack[-1] if self.stack else self.model)
        name = self.names.get(id(module), "")
        return f"{name!r} ({type(module).__name__})" if name else f"the forward of {type(module).__name__}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.inside:
            self.inside += 1
            name = func._schema.name.removeprefix("aten::")
            try:
                follow(self, func, name, args, kwargs, out)
            except Exception:  # shapes that a rule did not foresee
                self.give_up(f"{name} in {self.place()} could not be followed", (args, kwargs), out)
            finally:
                self.inside -= 1
        return out

    # -- labels -----------------------------------------------------------------------------------------------------

    def new(self, number: int) -> Tensor:
        """Fresh labels."""
        first, self.count = self.count, self.count + number
        return torch.arange(first, self.count, dtype=torch.float64)

    def source(self, x: Tensor) -> Tensor:
        """An input of the network: its size is given."""
        self.labels[x] = torch.full_like(
            x, float(WHOLE if x.numel() > 1 else CONSTANT), dtype=torch.float64, device="cpu"
        )
        return x

    def of(self, x: Any) -> Tensor:
        """The labels of a tensor."""
        found = self.labels.get(x)
        if found is not None:
            return found  # type: ignore[no-any-return]
        name = self.tensors.get(id(x))
        if x.numel() <= 1:
            made = torch.full(x.shape, float(CONSTANT), dtype=torch.float64)
        elif name is None or x.numel() > LARGEST_BARE:
            made = torch.full(x.shape, float(WHOLE), dtype=torch.float64)
        else:
            first = self.count
            made = self.new(x.numel()).view(x.shape)
            self.bare[name] = (first, tuple(x.shape))
            self.bare_ranges.append((first, self.count))
        self.labels[x] = made = like(x).copy_(made)
        return made

    def put(self, x: Any, labels: Tensor | float) -> None:
        """Give the labels of ``x``; one number for all, or a tensor that broadcasts to its shape."""
        if not isinstance(x, Tensor):
            return
        held = self.labels.get(x)
        target = held if held is not None and held.shape == x.shape else like(x)
        if isinstance(labels, Tensor):
            target.copy_(labels.expand(x.shape))
        else:
            target.fill_(labels)
        self.labels[x] = target

    def freeze(self, labels: Tensor | Ids, why: str) -> None:
        """The channels with these labels keep their number."""
        found = distinct(labels)
        if len(found):
            self.frozen.append((found, why))

    def tie(self, a: Tensor | Ids, b: Tensor | Ids, *, units: bool = False) -> None:
        """Labels that meet, element by element, are one channel (or of one unit).

        A constant that meets several channels at once is none of theirs (a table of places, the same for all).
        """
        signed = [np.asarray(v).astype(np.int64).reshape(-1) for v in (a, b)]
        x, y = (np.abs(v) for v in signed)
        met = (x > 0) & (y > 0) & (x != y)
        if not met.any():
            return
        pairs, first = np.unique(x[met] * np.int64(self.count) + y[met], return_index=True)
        x, y = pairs // self.count, pairs % self.count
        constant = [v[met][first] < 0 for v in signed]
        for side in (0, 1):
            names, others = (x, y) if side == 0 else (y, x)
            mine = constant[side] & ~constant[1 - side] & (others > WHOLE)
            found, number = np.unique(names[mine], return_counts=True)
            stay = ~(mine & np.isin(names, found[number > 1]))
            x, y, constant = x[stay], y[stay], [c[stay] for c in constant]
        fixed = (x == WHOLE) | (y == WHOLE)
        if fixed.any():
            self.freeze(np.maximum(x, y)[fixed], f"they meet something whose size is fixed in {self.place()}")
        if not fixed.all():
            (self.together if units else self.same).append((x[~fixed], y[~fixed]))

    def bundle(self, labels: Tensor) -> None:
        """(n, ...): the labels of each row are one unit."""
        rows = labels.reshape(len(labels), -1)
        top = rows.amax(1, keepdim=True).expand_as(rows)
        self.tie(rows, top, units=True)

    def has_bare(self, labels: Tensor) -> bool:
        """Whether elements of a bare parameter stand in it."""
        found = distinct(labels)
        return any(bool(((found >= a) & (found < b)).any()) for a, b in self.bare_ranges)

    def is_bare(self, labels: Tensor) -> bool:
        """Whether it is a bare parameter, whose elements have met nothing by themselves."""
        found = distinct(labels)
        return bool(len(found)) and any(a <= found[0] and found[-1] < b for a, b in self.bare_ranges)

    def part(self, labels: Tensor | Ids) -> None:
        """(pieces, size): here the forward parts channels."""
        found = labels if isinstance(labels, np.ndarray) else as_ids(labels)
        if min(found.shape) > 1 and len(distinct(found)) > 1:
            self.parted.append(found)

    def in_pieces(self, labels: Tensor) -> bool:
        """Whether the last dimension runs over one of several pieces that channels were parted into."""
        rows = as_ids(labels.reshape(-1, labels.shape[-1]))
        return any(rows.shape[1] == p.shape[1] and bool((rows[0] == p[0]).all()) for p in self.parted)

    def give_up(self, why: str, operands: Any, outputs: Any) -> None:
        """An operation without a rule: what goes in keeps its size, and so does what comes out."""
        for x in tensors_in(operands):
            self.freeze(self.of(x), why)
        for x in tensors_in(outputs):
            self.put(x, float(WHOLE))

    def join(self, a: Tensor, b: Tensor, why: str) -> Tensor:
        """The labels of an elementwise operation of two tensors, with broadcasting."""
        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        x, y = a.expand(shape), b.expand(shape)
        spread_x = any(is_spread(x, d) and varies(y, d) for d in range(len(shape))) and not self.is_bare(b)
        spread_y = any(is_spread(y, d) and varies(x, d) for d in range(len(shape))) and not self.is_bare(a)
        if not spread_x and not spread_y and self.is_bare(a) and self.is_bare(b):
            spread_x = spread_y = x.shape != a.shape or y.shape != b.shape
        if _names_only(a) and _names_only(b):
            crossed = (
                any(is_spread(v, d) and varies(w.abs(), d) for d in range(len(shape))) for v, w in ((x, y), (y, x))
            )
            if all(crossed):  # a table over two indices
                return torch.full(shape, float(CONSTANT), dtype=torch.float64)
        if spread_x:
            self.freeze(a, why)
        if spread_y:
            self.freeze(b, why)
        if spread_x or spread_y:
            return y if not spread_y else x if not spread_x else torch.full(shape, float(WHOLE), dtype=torch.float64)
        self.tie(x, y)
        fixed = torch.where((x == WHOLE) | (y == WHOLE), float(WHOLE), torch.minimum(x, y))
        return torch.where(x > WHOLE, x, torch.where(y > WHOLE, y, fixed))

    def reduced(self, labels: Tensor, dims: Sequence[int], why: str) -> Tensor:
        """Labels with ``dims`` reduced to length 1: what all share; channels that are mixed stay whole."""
        if not dims or not labels.numel():
            return labels
        top, low = extremes(labels, dims)
        mixed = top > low
        if mixed.any():
            self.freeze(torch.where(mixed.expand_as(labels), labels, 0.0), why)
            top = torch.where(mixed, float(WHOLE), top)
        return top

    def side(self, labels: Tensor, dim: int) -> tuple[bool, Tensor]:
        """What a layer reads at each position of ``dim``: (whether channels lie along it, labels by position)."""
        rows = labels.movedim(dim, -1).reshape(-1, labels.shape[dim])
        top, low = extremes(rows, [0])
        if not bool((top > low).any()):
            return True, top[0]
        across, least = extremes(rows, [1])
        if not bool((across > least).any()):
            return False, top[0]
        self.tie(rows, top.expand_as(rows))  # the same column reads several streams: they go together
        return True, top[0]

    # -- layers -----------------------------------------------------------------------------------------------------

    def outputs_of(self, module: nn.Module, size: int) -> Tensor:
        """The labels of a layer's outputs, the same at each call."""
        name = self.names[id(module)]
        if name not in self.made:
            self.made[name] = as_ids(self.new(size))
            self.note(module, "out", self.made[name])
        return torch.from_numpy(self.made[name]).double()

    def note(self, module: nn.Module, side: str, labels: Tensor | Ids) -> None:
        """Position p of a side of a layer carries ``labels[p]``."""
        found = np.abs(labels if isinstance(labels, np.ndarray) else as_ids(labels))  # constants too
        carrier = Carrier(self.names[id(module)], side)
        if carrier in self.sides:
            self.tie(self.sides[carrier], found)
            found = np.where(self.sides[carrier] > WHOLE, self.sides[carrier], found)
        self.sides[carrier] = found
        if why := not_plain(module):
            self.freeze(found, f"{carrier.name!r} {why}")

    def _layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        rule = rule_of(module) or norm_over  # one that ``_is_rms_norm`` found
        rule(self, module, [*args, *kwargs.values()], output)

    # -- what was found ---------------------------------------------------------------------------------------------

    def _parameter_sides(self, component: Ids) -> None:
        """Along which dimension each bare parameter carries channels."""
        for name, (first, shape) in self.bare.items():
            own = component[first : first + math.prod(shape)].reshape(shape)
            alone = np.bincount(component, minlength=len(component))[own] == 1  # elements that met nothing
            for dim in range(len(shape)):
                rows = np.moveaxis(np.where(alone, 0, own), dim, 0).reshape(shape[dim], -1)
                top, low = rows.max(1), np.where(rows > 0, rows, np.iinfo(np.int64).max).min(1)
                if (top > 0).any() and not ((top > low) & (top > 0)).any() and len(set(top[top > 0].tolist())) > 1:
                    self.sides[Carrier(name, "parameter", dim)] = top
                    break
            else:
                if (~alone).any():
                    self.freeze(own[~alone], f"the parameter {name!r} carries them along several dimensions")

    def _tied_weights(self) -> None:
        """A weight under two names is cut alike under both, also where one of them does not run."""
        seen: dict[int, tuple[str, nn.Module, str]] = {}
        for name, module in self.model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in seen:
                    seen[id(parameter)] = (name, module, leaf)
                    continue
                first = seen[id(parameter)]
                for d in range(parameter.ndim):
                    self._tie_dimension((first, (name, module, leaf)), d)

    def _tie_dimension(self, places: Sequence[tuple[str, nn.Module, str]], d: int) -> None:
        sides = []
        for name, module, leaf in places:
            side = next((s for s, at in weight_dims(module, leaf).items() if at == d), None)
            found = self.sides.get(Carrier(f"{name}.{leaf}", "parameter", d))
            if side is not None and found is None:
                found = self.sides.get(Carrier(name, side))
            sides.append((None if side is None else Carrier(name, side), found))
        names = " and ".join(repr(f"{name}.{leaf}") for name, _, leaf in places)
        for (mine, own), (_, other) in (sides, sides[::-1]):
            if own is None and other is not None and mine is not None:
                self.sides[mine] = other  # a layer that does not run
            elif own is None and other is not None:
                self.freeze(other, f"{names} are one tied parameter")
        if sides[0][1] is not None and sides[1][1] is not None:
            a, b = (np.maximum(found, WHOLE) for _, found in sides if found is not None)
            fixed = (a == WHOLE) | (b == WHOLE)
            self.freeze(np.maximum(a, b)[fixed], f"{names} are one tied parameter")
            self.tie(a[~fixed], b[~fixed])

    def result(self, pieces: Mapping[int, int], ties: Sequence[tuple[int, int]]) -> Channels:
        """Tie what belongs together and tell what stays whole."""
        if not self.settled:
            self.settled = True
            self._parameter_sides(_components(self.count, self.same))
            self._tied_weights()
        together = list(self.together)
        for number, how in pieces.items():
            labels = self.parted[number] if how == 1 else self.parted[number].T
            top = np.broadcast_to(labels.max(1, keepdims=True), labels.shape)
            met = labels > 0
            together.append((labels[met], top[met]))
        if ties:
            together.append((np.array([a for a, _ in ties]), np.array([b for _, b in ties])))
        channel = _components(self.count, self.same)
        unit = _components(self.count, [*self.same, *together])
        why: dict[int, str] = {}
        for labels, reason in self.frozen:
            for u in np.unique(unit[labels]):
                why.setdefault(int(u), reason)
        for labels, reason in self.frozen:  # outputs are no surprise: they are named before other reasons
            if reason == _OUTPUT:
                why.update((int(u), reason) for u in np.unique(unit[labels]))
        found = Channels(why=why, parted=[set(unit[labels].reshape(-1).tolist()) for labels in self.parted])
        for carrier, ids in self.sides.items():
            found.channels[carrier] = np.where(ids > 0, channel[ids], 0)
            found.units[carrier] = np.where(ids > 0, unit[ids], 0)
        return found


def _names_only(labels: Tensor) -> bool:
    """Whether a tensor holds constants alone, named ones among them."""
    return bool((labels <= CONSTANT).all()) and bool((labels < CONSTANT).any())


def is_output(why: str) -> bool:
    """Whether channels stay whole because they are the network's outputs."""
    return why == _OUTPUT


def _components(number: int, ties: Sequence[tuple[Ids, Ids]]) -> Ids:
    """For each of ``number`` labels the smallest one that ties connect it with."""
    least = np.arange(number, dtype=np.int64)
    if not ties:
        return least
    a, b = (np.concatenate([pair[i] for pair in ties]) for i in (0, 1))
    while True:
        x, y = least[a], least[b]
        if (x == y).all():
            return least
        np.minimum.at(least, np.maximum(x, y), np.minimum(x, y))
        while not (least[least] == least).all():
            least = least[least]
