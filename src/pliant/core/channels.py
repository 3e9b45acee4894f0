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
grouped convolution) are one unit (``U``). Two labels are special: 0 stands for constants, which can be cut as whatever
they meet, and 1 for what must keep its size: the network's inputs and outputs, and what was mixed over channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pliant.core.inputs import Input, call, evaluating, map_tensors, predictions, removing, step_by_step, tensors_in

Ids = NDArray[np.int64]
_CONSTANT, _WHOLE = 0, 1
_LARGEST_BARE = 1 << 22  # elements of a bare parameter that are followed one by one
_LARGEST_CONSTANT = 1 << 18
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
    the forward parts channels into equal pieces.
    """

    channels: dict[Carrier, Ids] = field(default_factory=dict)
    units: dict[Carrier, Ids] = field(default_factory=dict)
    why: dict[int, str] = field(default_factory=dict)
    parted: list[set[int]] = field(default_factory=list)


def is_linear_1d(module: nn.Module) -> bool:
    """Whether this is the ``Conv1D`` of transformers: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def read_channels(model: nn.Module, example: Input) -> Reading:
    """Send labels through ``model`` in evaluation mode and return what was read."""
    tracer = _Tracer(model)
    with step_by_step(), evaluating(model), torch.no_grad(), tracer.following(), tracer:
        output = call(model, map_tensors(example, tracer.source))
    for tensor in predictions(output).values():
        tracer.freeze(tracer.of(tensor), _OUTPUT)
    return Reading(tracer)


class Reading:
    """What was read of a network. ``norms`` names modules that are root-mean-square norms without torch's class."""

    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer
        self.norms = tuple(tracer.norms)

    def channels(self, pieces: Mapping[int, int] | None = None, ties: Sequence[tuple[int, int]] = ()) -> Channels:
        """Which positions carry which channels.

        Where the forward parts channels into h pieces of d (a view, ``chunk``) it cannot be read which of the two
        numbers follows the width. ``pieces`` tells for such places, by their number in ``Channels.parted``: 1, whole
        pieces go; 2, every piece loses the same. Others are left open. ``ties`` are pairs of units that go together.
        """
        return self._tracer.result(pieces or {}, ties)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        self.parted: list[Ids] = []  # (pieces, size): labels that a view or chunk parts
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
        kind = next((k for k in _RULES if isinstance(module, k)), None)
        if kind is None:
            return is_linear_1d(module) or self._is_rms_norm(module, args, kwargs)
        base = next(k for k in type(module).__mro__ if "forward" in k.__dict__)
        if base.__module__.startswith("torch.nn.modules") and type(module).forward is base.forward:
            return True
        standard = next(k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules"))
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
                _follow(self, func, name, args, kwargs, out)
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
            x, float(_WHOLE if x.numel() > 1 else _CONSTANT), dtype=torch.float64, device="cpu"
        )
        return x

    def of(self, x: Any) -> Tensor:
        """The labels of a tensor."""
        found = self.labels.get(x)
        if found is not None:
            return found  # type: ignore[no-any-return]
        name = self.tensors.get(id(x))
        if x.numel() <= 1:
            made = torch.full(x.shape, float(_CONSTANT), dtype=torch.float64)
        elif name is None or x.numel() > _LARGEST_BARE:
            made = torch.full(x.shape, float(_WHOLE), dtype=torch.float64)
        else:
            first = self.count
            made = self.new(x.numel()).view(x.shape)
            self.bare[name] = (first, tuple(x.shape))
            self.bare_ranges.append((first, self.count))
        self.labels[x] = made = _like(x).copy_(made)
        return made

    def put(self, x: Any, labels: Tensor | float) -> None:
        """Give the labels of ``x``; one number for all, or a tensor that broadcasts to its shape."""
        if not isinstance(x, Tensor):
            return
        held = self.labels.get(x)
        target = held if held is not None and held.shape == x.shape else _like(x)
        if isinstance(labels, Tensor):
            target.copy_(labels.expand(x.shape))
        else:
            target.fill_(labels)
        self.labels[x] = target

    def freeze(self, labels: Tensor | Ids, why: str) -> None:
        """The channels with these labels keep their number."""
        found = _distinct(labels)
        if len(found):
            self.frozen.append((found, why))

    def tie(self, a: Tensor | Ids, b: Tensor | Ids, *, units: bool = False) -> None:
        """Labels that meet, element by element, are one channel (or of one unit)."""
        x, y = (np.abs(np.asarray(v)).astype(np.int64).reshape(-1) for v in (a, b))
        met = (x > 0) & (y > 0) & (x != y)
        if not met.any():
            return
        pairs = np.unique(x[met] * np.int64(self.count) + y[met])
        x, y = pairs // self.count, pairs % self.count
        fixed = (x == _WHOLE) | (y == _WHOLE)
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
        found = _distinct(labels)
        return any(bool(((found >= a) & (found < b)).any()) for a, b in self.bare_ranges)

    def is_bare(self, labels: Tensor) -> bool:
        """Whether it is a bare parameter, whose elements have met nothing by themselves."""
        found = _distinct(labels)
        return bool(len(found)) and any(a <= found[0] and found[-1] < b for a, b in self.bare_ranges)

    def part(self, labels: Tensor | Ids) -> None:
        """(pieces, size): here the forward parts channels."""
        found = labels if isinstance(labels, np.ndarray) else _ids(labels)
        if min(found.shape) > 1 and len(_distinct(found)) > 1:
            self.parted.append(found)

    def in_pieces(self, labels: Tensor) -> bool:
        """Whether the last dimension runs over one of several pieces that channels were parted into."""
        rows = _ids(labels.reshape(-1, labels.shape[-1]))
        return any(rows.shape[1] == p.shape[1] and bool((rows[0] == p[0]).all()) for p in self.parted)

    def give_up(self, why: str, operands: Any, outputs: Any) -> None:
        """An operation without a rule: what goes in keeps its size, and so does what comes out."""
        for x in tensors_in(operands):
            self.freeze(self.of(x), why)
        for x in tensors_in(outputs):
            self.put(x, float(_WHOLE))

    def join(self, a: Tensor, b: Tensor, why: str) -> Tensor:
        """The labels of an elementwise operation of two tensors, with broadcasting."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        x, y = a.expand(shape), b.expand(shape)
        spread_x = any(_spread(x, d) and _varies(y, d) for d in range(len(shape))) and not self.is_bare(b)
        spread_y = any(_spread(y, d) and _varies(x, d) for d in range(len(shape))) and not self.is_bare(a)
        if not spread_x and not spread_y and self.is_bare(a) and self.is_bare(b):
            spread_x = spread_y = x.shape != a.shape or y.shape != b.shape
        if spread_x:
            self.freeze(a, why)
        if spread_y:
            self.freeze(b, why)
        if spread_x or spread_y:
            return y if not spread_y else x if not spread_x else torch.full(shape, float(_WHOLE), dtype=torch.float64)
        self.tie(x, y)
        fixed = torch.where((x == _WHOLE) | (y == _WHOLE), float(_WHOLE), torch.minimum(x, y))
        return torch.where(x > _WHOLE, x, torch.where(y > _WHOLE, y, fixed))

    def reduced(self, labels: Tensor, dims: Sequence[int], why: str) -> Tensor:
        """Labels with ``dims`` reduced to length 1: what all share; channels that are mixed stay whole."""
        if not dims or not labels.numel():
            return labels
        top, low = _extremes(labels, dims)
        mixed = top > low
        if mixed.any():
            self.freeze(torch.where(mixed.expand_as(labels), labels, 0.0), why)
            top = torch.where(mixed, float(_WHOLE), top)
        return top

    def side(self, labels: Tensor, dim: int) -> tuple[bool, Tensor]:
        """What a layer reads at each position of ``dim``: (whether channels lie along it, labels by position)."""
        rows = labels.movedim(dim, -1).reshape(-1, labels.shape[dim])
        top, low = _extremes(rows, [0])
        if not bool((top > low).any()):
            return True, top[0]
        across, least = _extremes(rows, [1])
        if not bool((across > least).any()):
            return False, top[0]
        self.tie(rows, top.expand_as(rows))  # the same column reads several streams: they go together
        return True, top[0]

    # -- layers -----------------------------------------------------------------------------------------------------

    def outputs_of(self, module: nn.Module, size: int) -> Tensor:
        """The labels of a layer's outputs, the same at each call."""
        name = self.names[id(module)]
        if name not in self.made:
            self.made[name] = _ids(self.new(size))
            self.note(module, "out", self.made[name])
            if why := _not_plain(module):
                self.freeze(self.made[name], f"{name!r} {why}")
        return torch.from_numpy(self.made[name]).double()

    def note(self, module: nn.Module, side: str, labels: Tensor | Ids) -> None:
        """Position p of a side of a layer carries ``labels[p]``."""
        found = labels if isinstance(labels, np.ndarray) else _ids(labels)
        carrier = Carrier(self.names[id(module)], side)
        if carrier in self.sides:
            self.tie(self.sides[carrier], found)
            found = np.where(self.sides[carrier] > _WHOLE, self.sides[carrier], found)
        self.sides[carrier] = found
        if why := _not_plain(module):
            self.freeze(found, f"{carrier.name!r} {why}")

    def _layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        rule = next((r for k, r in _RULES.items() if isinstance(module, k)), None)
        values = [*args, *kwargs.values()]
        if rule is None:
            rule = _linear if is_linear_1d(module) else _norm_over
        rule(self, module, values, output)

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
                    where = np.where(np.moveaxis(np.where(alone, 0, own), dim, 0).reshape(shape[dim], -1) > 0,
                                     rows, 0).max(1)  # fmt: skip
                    self.sides[Carrier(name, "parameter", dim)] = where
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
            side = next((s for s, at in _weight_dims(module, leaf).items() if at == d), None)
            found = self.sides.get(Carrier(f"{name}.{leaf}", "parameter", d))
            if side is not None and found is None:
                found = self.sides.get(Carrier(name, side))
            sides.append((None if side is None else Carrier(name, side), found))
        for (mine, own), (_, other) in (sides, sides[::-1]):
            if own is None and other is not None and mine is not None:
                self.sides[mine] = other  # a layer that does not run
            elif own is None and other is not None:
                names = " and ".join(repr(f"{name}.{leaf}") for name, _, leaf in places)
                self.freeze(other, f"{names} are one tied parameter")
        if sides[0][1] is not None and sides[1][1] is not None:
            self.tie(np.maximum(sides[0][1], _WHOLE), np.maximum(sides[1][1], _WHOLE))

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


def is_output(why: str) -> bool:
    """Whether channels stay whole because they are the network's outputs."""
    return why == _OUTPUT


# -- rules for layers --------------------------------------------------------------------------------------------------


def _linear(t: _Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    size = module.nf if is_linear_1d(module) else module.out_features
    along, read = t.side(t.of(values[0]), -1)
    made = t.outputs_of(module, size)
    if along:
        t.note(module, "in", read)
        t.put(output, made)
    else:  # it works along another dimension than channels, as the token mixing of MLP-Mixer does
        t.freeze(made, f"{t.place(module)} works along another dimension than channels")
        t.put(output, t.reduced(t.of(values[0]), [-1], ""))


def _convolution(t: _Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    n = len(module.kernel_size)
    labels = t.of(values[0])
    along, read = t.side(labels, -n - 1)
    made = t.outputs_of(module, module.out_channels)
    if not along:
        t.freeze(labels, f"{t.place(module)} works along another dimension than channels")
        t.freeze(made, f"{t.place(module)} works along another dimension than channels")
        t.put(output, float(_WHOLE))
        return
    t.put(output, made.reshape(-1, *[1] * n))
    groups = module.groups
    if groups == 1:
        t.note(module, "in", read)
        return
    read = read.clamp(min=_WHOLE)  # what goes into a grouped convolution goes out again: constants keep their size
    t.note(module, "in", read)
    ins, outs = module.in_channels // groups, module.out_channels // groups
    rank = math.gcd(ins, outs)  # channels of a group: the finest that both sides have
    of_in, of_out = (
        torch.arange(k * groups) // k * rank + torch.arange(k * groups) % k * rank // k for k in (ins, outs)
    )
    first_in, first_out = (torch.searchsorted(ranks, torch.arange(rank * groups)) for ranks in (of_in, of_out))
    t.tie(read, read[first_in[of_in]])
    t.tie(made, made[first_out[of_out]])
    t.tie(read[first_in], made[first_out])
    if rank > 1:
        t.bundle(made.reshape(groups, -1))


def _embedding(t: _Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    t.freeze(t.of(values[0]), f"they are indices of {t.place(module)}")
    t.put(output, t.outputs_of(module, module.embedding_dim))


def _norm_per_channel(t: _Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    labels = t.of(values[0])
    along, read = t.side(labels, 1)
    if along:
        t.note(module, "out", read)
    t.put(output, labels)


def _norm_over(t: _Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    _over_channels(t, module, t.of(values[0]), len(getattr(module, "normalized_shape", (0,))), output)


def _over_channels(t: _Tracer, module: Any, labels: Tensor, dims: int, output: Any) -> None:
    """A norm over the last dimensions. One over channels normalises those that are left."""
    if dims > 1:
        t.put(output, t.reduced(labels, list(range(-dims, 0)), f"{t.place(module)} normalises several dimensions"))
        return
    if _varies(labels, labels.ndim - 1):
        if t.in_pieces(labels):  # within each head: its weight is no head's own
            t.bundle(labels.reshape(-1, labels.shape[-1]))
            t.put(output, labels)
            return
        _, read = t.side(labels, -1)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            t.note(module, "out", read)
        else:
            weight = next(iter(module._parameters.values()))
            t.tie(t.of(weight), read)
            if isinstance(module, nn.Module) and t.names[id(module)] not in t.norms:
                t.norms.append(t.names[id(module)])
    t.put(output, labels)


def _group_norm(t: _Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    labels = t.of(values[0])
    along, read = t.side(labels, 1)
    if not along:
        t.reduced(labels, list(range(1, labels.ndim)), f"{t.place(module)} normalises over them")
    else:
        t.note(module, "out", read)
        if 1 < module.num_groups < module.num_channels:
            t.bundle(read.reshape(module.num_groups, -1))
    t.put(output, labels)


def _slope(t: _Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    if module.num_parameters > 1:
        _norm_per_channel(t, module, values, output)
    else:
        t.put(output, t.of(values[0]))


def _attention(t: _Tracer, module: Any, values: Sequence[Any], output: Any) -> None:
    """Streams and inner width of ``nn.MultiheadAttention`` are one number, cut by heads."""
    given = [v for v in values[:3] if isinstance(v, Tensor)]
    made = t.outputs_of(module, module.embed_dim)
    read = [t.side(t.of(x), -1)[1] for x in given]
    if not module._qkv_same_embed_dim:
        for labels in (*read, made):
            t.freeze(labels, f"{t.place(module)} has keys or values of a width of their own")
    else:
        for labels in read:
            t.tie(made, labels.clamp(min=_WHOLE))
        t.bundle(made.reshape(module.num_heads, -1))
    for x in tensors_in(output):
        t.put(x, made if x.shape[-1] == module.embed_dim and x.ndim == given[0].ndim else float(_WHOLE))
    first = next(iter(tensors_in(output)))
    t.put(first, made)


def _recurrent(t: _Tracer, module: Any, values: Sequence[Any], output: Any) -> None:
    """The inputs can be cut; states and outputs keep their width."""
    x, *others = values
    for state in tensors_in(others):
        t.freeze(t.of(state), f"they are a state of {t.place(module)}")
    if isinstance(x, Tensor):
        along, read = t.side(t.of(x), -1)
        t.note(module, "in", read)
        if not along:
            t.freeze(t.of(x), f"{t.place(module)} works along another dimension than channels")
    else:
        for part in tensors_in(x):
            t.freeze(t.of(part), f"they are packed for {t.place(module)}")
    for y in tensors_in(output):
        t.put(y, float(_WHOLE))


_RULES: dict[Any, Callable[[_Tracer, Any, Sequence[Any], Any], None]] = {
    nn.Linear: _linear,
    _ConvNd: _convolution,
    nn.Embedding: _embedding,
    _NormBase: _norm_per_channel,
    nn.LayerNorm: _norm_over,
    nn.RMSNorm: _norm_over,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _slope,
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
}


def _not_plain(module: nn.Module) -> str:
    """Why the weights of a layer cannot be cut where they are; empty where they can."""
    if hasattr(module, "parametrizations"):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return (
            f"computes its {names} by a parametrisation; take it off before: "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {names.split(',')[0]!r})"
        )
    if "weight" not in module._parameters and isinstance(getattr(module, "weight", None), Tensor):
        return "computes its weight in a hook (weight_norm, spectral_norm); take that off before"
    return ""


def _weight_dims(module: nn.Module, leaf: str) -> dict[str, int]:
    """Which dimension of a parameter is which side of the layer."""
    if isinstance(module, nn.Embedding):
        return {"out": 1}
    if leaf != "weight" or (isinstance(module, _ConvNd) and module.groups > 1):
        return {"out": 0}
    if isinstance(module, _ConvTransposeNd) or is_linear_1d(module):
        return {"in": 0, "out": 1}
    return {"out": 0, "in": 1} if isinstance(module, _ConvNd | nn.Linear) else {"out": 0}


# -- rules for operations ----------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Elements are moved: the same operation on the labels. The first argument (a tensor or a list) holds what is moved.
_MOVES = _words(
    """view _unsafe_view reshape permute transpose t expand slice select narrow split split_with_sizes chunk unbind
    squeeze unsqueeze cat stack clone alias detach repeat flip roll rot90 index index_select gather take
    constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold im2col lift_fresh
    upsample_nearest1d upsample_nearest2d upsample_nearest3d diagonal contiguous movedim swapaxes embedding
    _reshape_alias masked_select repeat_interleave _unsafe_index expand_copy view_copy permute_copy unsafe_split
    unsafe_chunk unsafe_split_with_sizes lift lift_fresh_copy _reshape_copy unsqueeze_copy squeeze_copy tril triu"""
)
# The value of an element is replaced, the channel that it belongs to is not.
_SAME = _words(
    """_to_copy hardswish bernoulli bernoulli_ native_dropout dropout relu6 hardtanh hardtanh_ zero_ fill_ masked_fill
    masked_fill_ nan_to_num to clamp_ uniform_ normal_ rrelu_with_noise log_sigmoid_forward contiguous
    fake_quantize_per_tensor_affine"""
)
# New tensors that hold numbers of nobody.
_NEW = _words(
    """zeros ones full empty arange rand randn randint linspace eye scalar_tensor tril_indices triu_indices zeros_like
    ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty
    new_empty_strided empty_strided hann_window _local_scalar_dense randperm is_same_size equal"""
)
_REDUCE = _words(
    """sum mean amax amin max min var std prod norm linalg_vector_norm logsumexp argmax argmin median nanmedian mode any
    all nansum nanmean count_nonzero var_mean std_mean aminmax"""
)
_MIX = _words(
    """_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod cummax cummin logcumsumexp sort topk
    kthvalue"""
)
_SPATIAL = re.compile(
    r"_?(?:adaptive_avg_pool|adaptive_max_pool|avg_pool|max_pool|fractional_max_pool|upsample_\D+)(\d)d.*"
)
_BATCH_NORM = _words(
    """native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _batch_norm_no_update"""
)
_ATTENTION = re.compile(r"_scaled_dot_product_\w*attention\w*|scaled_dot_product_attention")


def _follow(t: _Tracer, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """The labels of what an operation returned."""
    tensors = list(tensors_in((args, kwargs)))
    outputs = list(tensors_in(out))
    if not outputs and not tensors:
        return
    base = name.rstrip("_") if name.endswith("_") and not name.startswith("__") else name
    spatial = _SPATIAL.fullmatch(base)
    if name in _NEW or not tensors:
        for y in outputs:
            named = y.is_floating_point() and 1 < y.numel() <= _LARGEST_CONSTANT
            t.labels[y] = _like(y).copy_(-t.new(y.numel()).view(y.shape) if named else torch.zeros(()))
    elif base in _MOVES:
        _move(t, func, name, args, kwargs, out)
    elif name == "copy_":
        t.put(args[0], t.join(t.of(args[0]) * 0, t.of(args[1]), ""))
    elif base in ("slice_scatter", "select_scatter", "index_put", "scatter", "index_copy", "index_add", "scatter_add",
                  "scatter_reduce", "index_reduce", "_index_put_impl"):  # fmt: skip
        _scatter(t, base, args, kwargs, out)
    elif name in ("zero_", "fill_") or base in _SAME:
        for y in outputs:
            t.put(y, float(_CONSTANT) if name in ("zero_", "fill_") else t.of(tensors[0]))
    elif base in _REDUCE:
        _reduce(t, func, args, kwargs, outputs, f"{base} over them in {t.place()}")
    elif base in _MIX:
        labels = t.of(tensors[0])
        dim = _argument(func, args, kwargs, "dim", -1)
        top = t.reduced(labels, [dim], f"{base.strip('_')} over them in {t.place()}") if labels.ndim else labels
        for y in outputs:
            t.put(y, top if _varies(labels, dim) or y.shape != labels.shape else labels)
    elif spatial is not None:
        n = int(spatial.group(1))
        top = t.reduced(t.of(tensors[0]), list(range(-n, 0)), f"{base.strip('_')} over them in {t.place()}")
        for y in outputs:
            t.put(y, top)
    elif base in ("bmm", "mm", "addmm", "baddbmm", "matmul"):
        _product(t, base, tensors, out)
    elif base in ("linear", "addmv", "mv", "dot", "convolution"):
        _product(t, base, tensors, out, known=False)
    elif _ATTENTION.fullmatch(base):
        _fused_attention(t, base, tensors, outputs)
    elif base in ("native_layer_norm", "_fused_rms_norm"):
        weight = args[2] if len(args) > 2 else None
        module = t.owners.get(id(weight)) if weight is not None else None
        if (weight is not None and module is None) or (
            isinstance(module, nn.LayerNorm) is False and weight is not None and weight.ndim > 1
        ):
            t.give_up(f"{base} in {t.place()} has a weight that is no parameter", args, out)
        elif module is None:
            labels = t.of(args[0])
            t.put(outputs[0], labels)
            if len(args[1]) > 1:
                t.put(outputs[0], t.reduced(labels, list(range(-len(args[1]), 0)), f"{base} in {t.place()}"))
        else:
            _over_channels(
                t,
                module if isinstance(module, nn.LayerNorm | nn.RMSNorm) else _Holder(weight),
                t.of(args[0]),
                len(args[1]),
                outputs[0],
            )
            if not isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(args) > 3 and args[3] is not None:
                t.tie(t.of(args[3]), t.of(weight))
    elif base in _BATCH_NORM:
        labels = t.of(args[0])
        along, read = t.side(labels, 1)
        for x in tensors[1:]:
            if along:
                t.tie(t.of(x), read)
        t.put(outputs[0], labels)
    elif base == "as_strided" and out.shape == t.of(args[0]).shape:
        t.put(out, t.of(args[0]))
    elif base == "view_as_complex":
        labels = t.of(args[0])
        t.tie(labels[..., 0], labels[..., 1])
        t.put(out, labels[..., 0])
    elif base in ("view_as_real", "_conj", "resolve_conj"):
        labels = t.of(args[0])
        t.put(out, labels[..., None] if base == "view_as_real" else labels)
    elif base == "glu":
        first, second = t.of(args[0]).chunk(2, _argument(func, args, kwargs, "dim", -1))
        t.put(out, t.join(first, second, ""))
    elif torch.Tag.pointwise in func.tags or base in ("_prelu_kernel", "lerp", "where"):
        labels = t.of(tensors[0])
        for x in tensors[1:]:
            labels = t.join(labels, t.of(x), f"they are spread over other channels in {t.place()}")
        for y in outputs:
            t.put(y, labels)
    else:
        t.give_up(
            f"{name} in {t.place()} is an operation that channels cannot be followed through", (args, kwargs), out
        )


class _Holder:
    """A weight without a module of torch's."""

    def __init__(self, weight: Any) -> None:
        self._parameters = {"weight": weight}


def _move(t: _Tracer, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
    base = name.rstrip("_")
    for other in tensors_in((args[1:], kwargs)):  # indices, masks
        t.freeze(t.of(other), f"they are indices of {base} in {t.place()}")
    first = [t.of(x) for x in args[0]] if isinstance(args[0], list | tuple) else t.of(args[0])
    if base == "constant_pad_nd":
        moved = func(first, args[1], 0.0)
    else:
        rest = {k: v for k, v in kwargs.items() if k not in ("memory_format", "dtype", "device")}
        try:
            moved = func(first, *args[1:], **rest)
        except RuntimeError:  # the labels lie otherwise in memory: a copy of them is moved
            moved = func(first.contiguous() if isinstance(first, Tensor) else first, *args[1:], **rest)
    if isinstance(first, list):
        _align(t, base, first, _argument(func, args, kwargs, "dim", 0))
    elif base in ("view", "_unsafe_view", "reshape", "_reshape_copy", "_reshape_alias"):
        _note_parts(t, first, moved)
    elif base in ("channel_shuffle", "native_channel_shuffle"):
        t.bundle(t.side(first, 1)[1].reshape(args[1], -1).T)  # every group loses the same
    elif isinstance(moved, tuple | list) and len(moved) > 1:
        dim = _argument(func, args, kwargs, "dim", 0)
        others = [d for d in range(first.ndim) if d != dim % first.ndim]
        if _varies(first, dim) and not any(_varies(first, d) for d in others) and len({m.shape for m in moved}) == 1:
            t.part(_extremes(first, others)[0].reshape(len(moved), -1))
    pairs = zip(tensors_in(out), tensors_in(moved), strict=True)
    for y, labels in pairs:
        if name.endswith("_") and not name.startswith("_"):
            t.labels[y] = labels
        elif y.shape != labels.shape:
            t.put(y, labels)
        else:
            t.labels[y] = labels


def _align(t: _Tracer, base: str, parts: Sequence[Tensor], dim: int) -> None:
    """What is stacked, or joined along another dimension than channels, loses the same places."""
    if base == "stack":
        rows = list(parts)
    else:
        dim %= max(parts[0].ndim, 1)
        if any(p.ndim != parts[0].ndim or _varies(p, dim) for p in parts):
            return
        rows = [_extremes(p, [dim])[0] if p.shape[dim] else p for p in parts]
    for other in rows[1:]:
        if other.shape == rows[0].shape:
            t.tie(rows[0], other, units=True)


def _note_parts(t: _Tracer, before: Tensor, after: Tensor) -> None:
    """A view that parts one dimension of channels into two."""
    if sum(_varies(before, d) for d in range(before.ndim)) != 1:
        return
    dims = [d for d in range(after.ndim) if _varies(after, d)]
    if len(dims) == 2:
        others = [d for d in range(after.ndim) if d not in dims]
        t.part(_extremes(after, others)[0].squeeze(others) if others else after)


def _scatter(t: _Tracer, base: str, args: Any, kwargs: Any, out: Any) -> None:
    """Elements are written into others: where two channels meet, they are tied."""
    why = f"{base} in {t.place()}"
    target, values = t.of(args[0]), [a for a in args[1:] if isinstance(a, Tensor) and a.is_floating_point()]
    if not values or base in ("index_reduce",):
        if values:
            t.give_up(why, (args, kwargs), out)
        else:
            t.put(out, target)
        return
    source = t.of(values[-1])
    if base in ("slice_scatter", "select_scatter", "index_put", "_index_put_impl") or base in ("index_copy", "scatter"):
        function = getattr(torch.ops.aten, base if base != "_index_put_impl" else "index_put")
        rest = [source if a is values[-1] else a for a in args[1:]]
        if base in ("index_put", "_index_put_impl"):
            rest = rest[:2]
        written = function(target.clone(), *rest, **kwargs)
        t.tie(torch.where(written != target, target, 0.0), written)
        t.put(out, written)
    else:  # added to what is there
        dim, index = args[1], args[2]
        ends = []
        for how, blank in (("amax", 0.0), ("amin", math.inf)):
            start = torch.where(target > 0, target, blank)
            given = torch.where(source > 0, source, blank)
            if base == "index_add":
                ends.append(start.clone().index_reduce_(dim, index, given, how))
            else:
                ends.append(start.clone().scatter_reduce_(dim, index, given, how))
        t.tie(ends[0], torch.where(ends[1].isfinite(), ends[1], 0.0))
        t.put(out, ends[0])


def _reduce(t: _Tracer, func: Any, args: Any, kwargs: Any, outputs: Sequence[Tensor], why: str) -> None:
    tensors = list(tensors_in(args))
    if len(tensors) > 1:  # max(x, y) is elementwise
        labels = t.join(t.of(tensors[0]), t.of(tensors[1]), why)
        for y in outputs:
            t.put(y, labels)
        return
    labels = t.of(args[0])
    dims = _argument(func, args, kwargs, "dim", None)
    dims = list(range(labels.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    top = t.reduced(labels, dims, why)
    for y in outputs:
        t.put(y, top.reshape(y.shape) if top.numel() == y.numel() else top)


def _product(t: _Tracer, base: str, tensors: Sequence[Any], out: Any, known: bool = True) -> None:
    """Matrix products of two activations (n, i, k) and (n, k, j); what is tied in a batch n is one unit."""
    *added, x, y = tensors
    a, b = t.of(x), t.of(y)
    if not known or t.has_bare(a) or t.has_bare(b):
        why = f"they are multiplied with a parameter that is no layer's in {t.place()}"
        t.give_up(why if base != "convolution" else f"a convolution in {t.place()} is no layer", tensors, out)
        return
    if a.ndim == 2:
        a, b = a[None], b[None]
    named = [bool((v > _WHOLE).any()) for v in (a, b)]
    if not any(named):
        labels = torch.full((1, 1, 1), float(_WHOLE), dtype=torch.float64)
    elif not all(named) and not _varies(a, 2) and not _varies(b, 1):
        # One carries channels, and not along what is summed: they stay where they are.
        labels = _extremes(a, [2])[0] if named[0] else _extremes(b, [1])[0]
        labels = labels.expand(len(a), a.shape[1], b.shape[2])
    elif not all(named):
        why = f"they are summed against something of fixed size in {t.place()}"
        t.freeze(a, why)
        t.freeze(b, why)
        labels = torch.full((1, 1, 1), float(_WHOLE), dtype=torch.float64)
    else:
        if _varies(a, 2) and _varies(b, 1):
            t.tie(a.amax(1), b.amax(2))  # what is multiplied with each other is one channel
        t.bundle(torch.cat([a.flatten(1), b.flatten(1)], 1))
        inner = _varies(b, 2) and not _varies(b, 1)
        labels = b.amax(1, keepdim=True) if inner else torch.maximum(a.amax((1, 2)), b.amax((1, 2)))[:, None, None]
        labels = labels.expand(len(a), a.shape[1], b.shape[2])
    labels = labels if out.ndim == 3 else labels.reshape(labels.shape[1:])
    for z in added:
        labels = t.join(labels.expand(out.shape), t.of(z), f"they are spread over others in {t.place()}")
    t.put(out, labels)


def _fused_attention(t: _Tracer, base: str, tensors: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """softmax(q k^T) v with (B, heads, T, d): a head is one unit; fewer heads of keys serve several of queries."""
    q, k, v = (t.of(x) for x in tensors[:3])
    labels = [q, *(x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))]
    named = [bool((x > _WHOLE).any()) for x in labels]
    if any(named) and not all(named):
        for x in labels:
            t.freeze(x, f"an attention in {t.place()} reads them against something of fixed size")
    read = [x.flatten(0, -3).amax(1) for x in labels]  # (B heads, d)
    for x, every in zip(read, labels, strict=True):
        t.tie(every.flatten(0, -3), x[:, None].expand(-1, every.shape[-2], -1))
    t.tie(read[0], read[1])
    if read[0].shape == read[2].shape:
        t.tie(read[0], read[2])
    t.bundle(torch.cat(read, 1))
    made = read[2].reshape(*labels[2].shape[:-2], 1, -1)
    for mask in tensors[3:]:
        if t.of(mask).ndim >= 3:
            t.join(made[..., :1], t.of(mask), f"they mask an attention in {t.place()}")
    for y in outputs:
        t.put(y, made if y.ndim == q.ndim and y.shape[-1] == made.shape[-1] else float(_WHOLE))


# -- small helpers -----------------------------------------------------------------------------------------------------


def _like(x: Tensor) -> Tensor:
    """Room for labels that lies in memory as ``x`` does, so that the same views can be taken of both."""
    return torch.empty_like(x, dtype=torch.float64, device="cpu")


def _ids(labels: Tensor) -> Ids:
    return labels.numpy().astype(np.int64)


def _distinct(labels: Tensor | Ids) -> Ids:
    """The labels of channels in it, each once."""
    found = np.unique(labels if isinstance(labels, np.ndarray) else _ids(labels))
    return found[found > _WHOLE]


def _extremes(labels: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Largest and smallest label along ``dims``, constants left out; both 0 where there are only constants."""
    top = labels.amax(list(dims), keepdim=True)
    low = torch.where(labels > 0, labels, math.inf).amin(list(dims), keepdim=True)
    return top, torch.minimum(low, top)


def _varies(labels: Tensor, dim: int) -> bool:
    """Whether different channels lie along ``dim``."""
    if not labels.ndim or labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    top, low = _extremes(labels, [dim])
    return bool((top > low).any())


def _spread(labels: Tensor, dim: int) -> bool:
    """Whether a tensor is repeated along ``dim``."""
    return labels.shape[dim] > 1 and labels.stride(dim) == 0


def _argument(func: Any, args: Any, kwargs: Any, name: str, default: Any) -> Any:
    """An argument of an operation by name."""
    if name in kwargs:
        return kwargs[name]
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name and place < len(args):
            return args[place]
        if argument.name == name and argument.has_default_value():
            return argument.default_value
    return default


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
