"""FTWT: Fire Together Wire Together (Elkerdawy, Elhoushi, Zhang, Ray). CVPR 2022, arXiv 2110.08232.

A filter matters for one image and not for the next. Beside each convolution sits a tiny linear head that looks at the
layer's *input* and predicts which filters will fire; the others are not computed. The heads learn from labels that the
network makes itself: the filters that carry a share r of the layer's own activation.

Layer l = 1..L, input I (B, C_in, h, w), filters C, example sizes for two dimensions::

    O    = act(norm(conv(I)))                     (B, C, H, W)
    e    = softmax(pool(I))                       (B, C_in)    pool: maximum (paper) or mean (published code) over space
    P    = W_p e + b_p                            (B, C)       the head
    M    = 1[P > 0], and the largest P always     (B, C)       the mask
    next = O * M                                  (B, C, H, W)

Label g of the same shape as M, without gradient, from O before it is masked::

    a_c = max_hw |O_c|,   z = a / sum_c a
    g_c = 1 where z, sorted from the largest, has a cumulative sum <= r + 1e-5 (own value included) and z_c > delta;
          the largest always. r = 1: every z_c > delta.        ``label="mass"``
    g_c = 0 for the floor((1 - r) C) smallest a                ``label="uniform"``

    loss = criterion + w 1/L sum_l sum_c mean_b BCE(P_l[b, c], g_l[b, c]);   from ``cooldown`` on w = 0

Masks act from the first step. "decoupled" detaches e: the heads alone learn from the labels. "joint" lets the labels
shape the features too. The criterion never reaches a head, for M has no gradient.

How a layer is skipped (evaluation mode): the convolution and its norm run on active filters and active input channels
only. "grouped" computes samples of identical masks together; "union" parts the batch into a few groups of like masks,
computes what anyone in the group needs, and masks the rest; the outputs are those of the masked dense network.

MACs of one sample: H W k^2 sum over groups of (active inputs * active filters). An input channel counts as off only
where the tensor comes from a gated layer through channel-wise operations, not through a sum or a concatenation.

Where the specification is silent or wrong:

- z_c > delta holds for every r, not for r = 1 alone; otherwise g(0.99999) could contain channels that g(1) lacks.
- The published code prunes int(r C) filters in uniform mode, so that a larger r means less. Here r is the kept share.
- The published head initialisation trains the heads to all ones for up to 500 batches. ``head_init="open"`` sets
  W_p = 0 and b_p = 2, which opens everything at once.
- A softmax over one input channel is 1 whatever the image: the first layer for grey images has one mask.
- A norm without activation behind it is gated where its convolution alone reads its input (the second of a residual
  block), and not on a shortcut.
- The rate of the heads is constant in the paper. Here it is a multiple of the optimiser's (``head_lr``), so ``fit``
  with ``lr_schedule="constant"`` or steps is the paper's; a warm-up bends both rates.
- GroupNorm and LayerNorm see all channels at once, so a filter before them cannot be left out; such layers stay dense.
- Grouped convolutions with several filters a group are executed by whole groups and counted by active pairs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from pliant.core import check
from pliant.core.cost import count_flops, time_ratio
from pliant.core.dynamic import Dynamic, NotStaticError, Point, Value
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    check_example,
    device_of,
    evaluating,
    inputs_of,
    packed,
    predictions,
    removing,
    rows_of,
    split_batch,
    take,
    to_device,
)
from pliant.core.objective import Criterion, loss

Label = Literal["mass", "uniform"]
Mode = Literal["decoupled", "joint"]
Pool = Literal["max", "avg"]
Norm = Literal["softmax", "l2", "layernorm", "none"]
Init = Literal["random", "open"]
Execution = Literal["masked", "grouped", "union", "auto"]
Where = Sequence[str | Sequence[str | None]]
Masks = Sequence[Tensor] | Literal["labels"] | None
DENSE = Point(gates="off")
_SLACK = 1e-5  # of the cumulative sum, as published

_POOLS: dict[tuple[str, int], Callable[[Tensor, int], Tensor]] = {
    ("max", 1): F.adaptive_max_pool1d,
    ("max", 2): F.adaptive_max_pool2d,
    ("max", 3): F.adaptive_max_pool3d,
    ("avg", 1): F.adaptive_avg_pool1d,
    ("avg", 2): F.adaptive_avg_pool2d,
    ("avg", 3): F.adaptive_avg_pool3d,
}
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
# Functions by name, small letters without underscores: ``F.leaky_relu``, ``torch.relu_`` and ``Tensor.relu`` alike.
_ACTIVATIONS = {n.lower() for n in activation.__all__} - {"glu", "multiheadattention", "softmin", "logsoftmax"}
_ACTIVATIONS -= {"softmax", "softmax2d"}
# What keeps a zero channel zero and every channel in its place.
_CHANNELWISE = {f"{kind}pool{d}d" for kind in ("max", "avg", "adaptiveavg", "adaptivemax") for d in (1, 2, 3)}
_CHANNELWISE |= {"relu", "relu6", "dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "clone", "detach"}


# -- labels and loss ------------------------------------------------------------------------------------------------


def peaks(o: Tensor) -> Tensor:
    """a_c = max |O_c| over space: (B, C, ...) -> (B, C), detached."""
    return o.detach().abs().flatten(2).amax(2)


def mass_labels(a: Tensor, r: float, delta: float = 1e-5) -> Tensor:
    """The channels that carry a share ``r`` of the peaks ``a`` (B, C), the largest always: boolean (B, C)."""
    a = a if a.dtype is torch.float64 else a.float()
    ordered, order = a.sort(dim=1, descending=True, stable=True)
    cumulative = ordered.cumsum(1)
    total = cumulative[:, -1:].clamp_min(torch.finfo(a.dtype).tiny)  # added up in sorted order: the same for any order
    found = a / total > delta
    if r < 1:
        within = cumulative / total <= r + _SLACK
        found &= torch.zeros_like(within).scatter(1, order, within)
    return _guarded(found, a)


def uniform_labels(a: Tensor, r: float, delta: float = 1e-5) -> Tensor:
    """All but the floor((1 - r) C) smallest peaks, and none <= ``delta`` but the largest: boolean (B, C)."""
    gone = math.floor((1 - r) * a.shape[1] + 1e-9)  # 1 - 0.9 is a little below 0.1
    order = a.argsort(dim=1, stable=True)
    return _guarded((a > delta).scatter(1, order[:, :gone], False), a)


def _guarded(mask: Tensor, score: Tensor) -> Tensor:
    """The mask with the channel of the largest score always on."""
    return mask.scatter(1, score.argmax(1, keepdim=True), True)


def mask_loss(scores: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """1/L sum_l sum_c mean_b BCE(sigmoid(P_l), g_l), for P_l and g_l of shape (B, C_l): a scalar."""
    each = [
        F.binary_cross_entropy_with_logits(p, g.to(p.dtype), reduction="none").mean(0).sum()
        for p, g in zip(scores, labels, strict=True)
    ]
    return torch.stack(each).mean()


def masked_macs(m_in: Tensor, m_out: Tensor, groups: int = 1, kernel: int = 1, positions: int = 1) -> Tensor:
    """Multiply-adds that one convolution needs for each sample: (B, C_in) and (B, C) masks -> (B,).

    Args:
        m_in: which input channels are not zero.
        m_out: which filters are wanted.
        groups: of the convolution; for a depthwise one a filter counts where it and its input are both on.
        kernel: k^2, taps of a filter in one channel.
        positions: H W of the output.
    """
    active_in = m_in.view(len(m_in), groups, -1).sum(2)
    active_out = m_out.view(len(m_out), groups, -1).sum(2)
    pairs: Tensor = (active_in * active_out).sum(1)
    return pairs * (kernel * positions)


# -- executing the active filters only ------------------------------------------------------------------------------


def _parts(masks: Tensor, union: int | None) -> list[Tensor]:
    """The rows of ``masks`` (B, K) parted into groups: identical masks, or at most ``union`` groups of like ones."""
    if len(masks) == 1 or union == 1:
        return [torch.arange(len(masks), device=masks.device)]
    if union is None:
        which = torch.unique(masks, dim=0, return_inverse=True)[1]
    else:
        # Leaders far from one another, each the row that differs most from the leaders so far; then the nearest one.
        bits = masks.float()
        nearest = bits.new_full((len(bits),), math.inf)
        which = torch.zeros(len(bits), dtype=torch.long, device=bits.device)
        leader = bits.sum(1).argmax()
        for i in range(min(union, len(bits))):
            distance = (bits - bits[leader]).abs().sum(1)
            closer = distance < nearest
            which[closer], nearest = i, torch.where(closer, distance, nearest)
            leader = nearest.argmax()
    counts = which.bincount()
    order = which.argsort(stable=True)
    return [part for part in order.split(counts.tolist()) if len(part)]


def active_convolution(
    convolve: Callable[..., Tensor],
    args: Sequence[Any],
    norm: _BatchNorm | None,
    m_in: Tensor | None,
    m_out: Tensor,
    union: int | None = None,
) -> Tensor:
    """norm(conv(I)) * M without computing what M switches off; evaluation mode.

    Args:
        convolve: ``F.conv1d``, ``F.conv2d`` or ``F.conv3d``.
        args: its arguments: input (B, C_in, ...), weight, bias, stride, padding, dilation, groups.
        norm: the batch norm behind it, which runs on the active filters too.
        m_in: (B, C_in), false where an input channel is known to be zero; None: all of them count.
        m_out: (B, C), the filters wanted, one at least in each row.
        union: number of groups of like masks; None groups identical ones.
    """
    x, weight, bias, stride, padding, dilation, groups = args
    rows, channels, inputs = len(x), len(weight), x.shape[1]
    shift = _shift(bias, norm, weight) if groups > 1 else None
    out: Tensor | None = None
    for part in _parts(m_out if m_in is None else torch.cat((m_in, m_out), 1), union):
        whole = len(part) == rows  # one group: channels are taken along their dimension, which is quicker
        mine = m_out if whole else m_out[part]
        wanted = mine.any(0)
        present = wanted.new_ones(inputs) if m_in is None else (m_in if whole else m_in[part]).any(0)
        if groups > 1:  # whole groups run; a depthwise convolution has one channel in each
            alive = wanted.view(groups, -1).any(1) & present.view(groups, -1).any(1)
            wanted = alive.repeat_interleave(channels // groups)
            present = alive.repeat_interleave(inputs // groups)
        outs, ins = wanted.nonzero().squeeze(1), present.nonzero().squeeze(1)
        if not len(ins):
            continue
        if whole:
            chosen = x.index_select(1, ins) if len(ins) < inputs else x
        else:
            chosen = x.flatten(0, 1).index_select(0, (part[:, None] * inputs + ins).flatten())
            chosen = chosen.view(len(part), len(ins), *x.shape[2:])
        w = weight.index_select(0, outs) if len(outs) < channels else weight
        if groups == 1 and len(ins) < inputs:
            w = w.index_select(1, ins)
        y = convolve(
            chosen,
            w,
            None if bias is None else bias[outs],
            stride,
            padding,
            dilation,
            1 if groups == 1 else len(ins) * groups // inputs,
        )
        y = y if norm is None else _normalised(y, norm, outs)
        if union is not None or channels > groups > 1:
            y = torch.where(_spatial(mine[:, outs], y), y, 0)
        if out is None:
            out = y.new_zeros(rows, channels, *y.shape[2:])
            if shift is not None:  # a filter that is on, of an input that is off, gives its bias alone
                out += torch.where(_spatial(m_out, y), _spatial(shift[None], y), 0)
        if whole:
            out.index_copy_(1, outs, y)
        else:
            places = (part[:, None] * channels + outs).flatten()
            out.view(rows * channels, -1).index_copy_(0, places, y.flatten(0, 1).flatten(1))
    if out is None:  # every filter's input is off; only its bias is left
        dense = convolve(*args)
        dense = dense if norm is None else norm(dense)
        out = torch.where(_spatial(m_out, dense), dense, 0)
    return out


def _normalised(y: Tensor, norm: _BatchNorm, channels: Tensor) -> Tensor:
    """Batch norm in evaluation mode of some of its channels."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight[channels] if norm.affine else None
    bias = norm.bias[channels] if norm.affine else None
    return F.batch_norm(y, mean[channels], variance[channels], scale, bias, False, 0.0, norm.eps)


def _shift(bias: Tensor | None, norm: _BatchNorm | None, weight: Tensor) -> Tensor:
    """(C,): what each filter gives for an input of zeros."""
    value = bias if bias is not None else weight.new_zeros(len(weight))
    if norm is None:
        return value
    return _normalised(value[None], norm, torch.arange(len(weight), device=weight.device))[0]


def _spatial(mask: Tensor, like: Tensor) -> Tensor:
    """(B, C) with as many trailing dimensions of length 1 as ``like`` (B, C, ...) has."""
    return mask.view(*mask.shape, *[1] * (like.ndim - 2))


# -- which layers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One gated convolution: its name, its norm's, what follows, and the gated layer that its input comes from.

    ``act`` is "function", "none", or the name of a module; ``zero`` tells whether the activation keeps 0 at 0.
    """

    name: str
    norm: str | None
    act: str
    zero: bool
    source: int | None = None


@dataclass
class _Call:
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def name(self) -> str:
        return _name(self.function)

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, one level deep."""
        items = [*self.args, *self.kwargs.values()]
        return [t for i in items for t in (i if isinstance(i, list | tuple) else (i,)) if isinstance(t, Tensor)]


class _Recorder(TorchFunctionMode):
    """Every call of a forward pass that gives tensors. The tensors are kept, so that an id stands for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.readers: dict[int, list[int]] = {}  # calls that a tensor goes into, by its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _Call(func, args, kwargs or {}, func(*args, **(kwargs or {})))
        items = made.out if isinstance(made.out, tuple | list) else (made.out,)
        if any(isinstance(item, Tensor) for item in items):
            for tensor in made.tensors():
                self.readers.setdefault(id(tensor), []).append(len(self.calls))
            self.calls.append(made)
        return made.out

    def reader(self, i: int) -> int | None:
        """The one call that reads the output of call ``i`` next; None where there are several, or none."""
        later = sorted({j for j in self.readers.get(id(self.calls[i].out), []) if j > i})
        # What reads a tensor after a call that works in place reads the result of that call.
        in_place = bool(later) and self.calls[later[0]].out is self.calls[i].out
        return later[0] if len(later) == 1 or in_place else None

    def alone(self, i: int) -> bool:
        """Whether call ``i`` alone reads its first argument."""
        x = self.calls[i].args[0]
        made = max((j for j in range(i) if self.calls[j].out is x), default=-1)
        return [j for j in self.readers[id(x)] if j > made] == [i]

    def follow(self, i: int, norms: Mapping[int, str]) -> tuple[str | None, int, str, bool, int] | str:
        """What follows the convolution at call ``i``: norm, its call, activation, whether f(0) = 0, and the last call.

        A string where it cannot be gated: the reason.
        """
        norm, end, after = None, i, self.reader(i)
        if after is not None and self.calls[after].function is F.batch_norm:
            found = self.calls[after]
            norm = norms.get(id(found.kwargs.get("running_mean", found.args[1] if len(found.args) > 1 else None)))
            if norm is None:
                return "its batch norm keeps no running statistics, so samples are not independent"
            end, after = after, self.reader(after)
        elif after is not None and "norm" in self.calls[after].name:
            return f"{self.calls[after].name} looks at all channels at once, so none can be left out before it"
        normed = end
        act = None if after is None else self.calls[after]
        if after is None or act is None or act.name not in _ACTIVATIONS or act.args[0] is not self.calls[end].out:
            return norm, normed, "none", True, end
        zero = not bool(act.function(torch.zeros_like(act.out), *act.args[1:], **act.kwargs).any())
        return norm, normed, "function", zero, after


def _is_convolution(function: Any, args: Sequence[Any]) -> bool:
    return function in _CONVOLUTIONS and len(args) == 7  # as nn.Conv1d, 2d and 3d call it


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", "")).replace("_", "")


def find_layers(model: nn.Module, example: Input, where: Where | None = None) -> list[Layer]:
    """The convolutions that can be gated, in the order of execution.

    A candidate runs once in a forward pass and is followed by a batch norm, an activation, or both. The calls are
    watched, not the modules, so that ``torch.relu(self.norm(self.conv(x)))`` is seen as well.

    Args:
        model: the network.
        example: an input.
        where: names of convolutions, or triples (convolution, norm or None, activation module or None); None takes all
            candidates but shortcuts.

    Raises:
        ValueError: there is none, or one that ``where`` names cannot be gated; the message says why.
    """
    names = {id(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    norms = {
        id(m.running_mean): n
        for n, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    }
    wanted = _wanted(model, where)
    recorder = _Recorder()
    given = {t[2] for t in wanted.values() if len(t) == 3 and t[2] is not None}
    ended: dict[str, list[int]] = {n: [] for n in given}  # the last calls inside of the activations in ``where``

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: ended[name].append(len(recorder.calls) - 1)

    hooks = [model.get_submodule(n).register_forward_hook(note(n)) for n in given]
    with removing(hooks), evaluating(model), torch.no_grad(), recorder:
        call(model, example)
    calls = recorder.calls
    runs = {
        i: names[id(c.args[1])]
        for i, c in enumerate(calls)
        if _is_convolution(c.function, c.args) and id(c.args[1]) in names
    }
    found: list[tuple[Layer, int, int]] = []  # layer, the call of its convolution, the call that ends it
    refused = dict.fromkeys(names.values(), "the forward pass does not call it")
    for i, name in runs.items():
        answer = recorder.follow(i, norms)
        if list(runs.values()).count(name) > 1:
            answer = "it runs several times in one forward pass"
        if isinstance(answer, str):
            refused[name] = answer
            continue
        norm, normed, act, zero, end = answer
        if len(triple := wanted.get(name, ())) == 3:
            if triple[1] != norm:
                raise ValueError(f"where: {name!r} is followed by the norm {norm!r}, not by {triple[1]!r}")
            act, zero, end = "none", True, normed
            if triple[2] is not None:
                # One module may be the activation of several layers: this layer's is the first call after it.
                act, zero, end = triple[2], False, next((e for e in ended[triple[2]] if e > normed), -1)
                if end < 0:
                    raise ValueError(f"where: the activation {act!r} does not run after {name!r}")
        elif norm is None and act == "none":
            refused[name] = "neither a batch norm nor an activation follows it"
            continue
        if name in wanted or (where is None and (act != "none" or recorder.alone(i))):
            found.append((Layer(name, norm, act, zero), i, end))
    if missing := [n for n in wanted if n not in {layer.name for layer, _, _ in found}]:
        why = refused.get(missing[0], "it is no convolution")
        raise ValueError(f"where: {missing[0]!r} cannot be gated: {why}")
    if not found:
        reasons = "; ".join(f"{n}: {why}" for n, why in list(refused.items())[:4])
        raise ValueError(
            "model: it has no convolution with a batch norm or an activation behind it that could be gated"
            + (f" ({reasons})" if reasons else "")
        )
    return _with_sources(calls, found)


def _wanted(model: nn.Module, where: Where | None) -> dict[str, tuple[str | None, ...]]:
    """The entries of ``where`` by the name of their convolution."""
    check.optional(check.sequence, "where", where, lambda name, entry: entry)
    wanted: dict[str, tuple[str | None, ...]] = {}
    for entry in where or ():
        parts: tuple[Any, ...] = tuple(entry) if isinstance(entry, tuple | list) else (entry,)
        known = len(parts) in (1, 3) and isinstance(parts[0], str)
        if not known or not all(n is None or isinstance(n, str) for n in parts):
            raise check.wrong("where", entry, "a convolution's name, or (convolution, norm, activation)")
        for name in parts:
            if name is not None and name not in dict(model.named_modules()):
                raise ValueError(f"where: the model has no module named {name!r}")
        wanted[parts[0]] = parts
    return wanted


def _with_sources(calls: Sequence[_Call], found: Sequence[tuple[Layer, int, int]]) -> list[Layer]:
    """The layers, with the gated layer whose masked output is their input, where there is one."""
    starts = {i: k for k, (_, i, _) in enumerate(found)}
    ends = {end: k for k, (_, _, end) in enumerate(found)}
    source: dict[int, int] = {}  # by the id of a tensor
    sources: dict[int, int | None] = {}
    for i, c in enumerate(calls):
        if i in starts:
            sources[starts[i]] = source.get(id(c.args[0]))
        before = source.get(id(c.args[0])) if c.args else None
        if isinstance(c.out, Tensor):
            source.pop(id(c.out), None)
            if i in ends:
                source[id(c.out)] = ends[i]
            elif c.name in _CHANNELWISE and before is not None:
                source[id(c.out)] = before
    return [replace(layer, source=sources[k]) for k, (layer, _, _) in enumerate(found)]


# -- one forward pass -----------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """One forward pass: the model's output and, for each gated layer, P (B, C), M (B, C), g (B, C) and H W.

    ``scores`` is empty where the masks were given, ``labels`` where none were asked for.
    """

    output: Any
    scores: list[Tensor]
    masks: list[Tensor]
    labels: list[Tensor]
    positions: list[int]


class _Pass(TorchFunctionMode):
    """Gates a forward pass of ``net.model``: it watches for the layers' convolutions, norms and activations.

    The model itself is not touched: no hooks stay, no module is replaced, and other threads do not see it.
    """

    def __init__(self, net: FTWT, masks: Masks = None, *, labels: bool = False, execution: str = "masked") -> None:
        super().__init__()
        self.net, self.given, self.want_labels, self.execution = net, masks, labels or masks == "labels", execution
        self.convolutions = [cast(nn.Conv2d, net.model.get_submodule(layer.name)) for layer in net.layers]
        self.next = 0  # the layer whose convolution comes next
        self.waiting: dict[int, tuple[int, str, Tensor]] = {}  # by id of a tensor: layer, what comes next, the tensor
        self.pending: dict[str, list[int]] = {}  # by name of an activation module: layers that its next calls end
        self.masks: dict[int, Tensor] = {}  # by layer: branches may begin in one order and end in another
        self.labels: dict[int, Tensor] = {}
        self.scores: list[Tensor] = []
        self.positions: list[int] = []
        self.inputs: list[tuple[Any, Any, Tensor | None]] = []  # of each convolution: function, arguments, input mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_convolution(func, args):
            k = self.next
            if k < len(self.convolutions) and self.convolutions[k].weight is args[1]:
                self.next += 1
                return self._convolve(k, func, args)
        elif self.waiting and args and id(args[0]) in self.waiting:
            k, stage, _ = self.waiting[id(args[0])]
            if stage == "norm" and func is F.batch_norm:
                del self.waiting[id(args[0])]
                return self._then(k, args[0] if self._way(k) != "masked" else func(*args, **kwargs))
            if stage == "act" and _name(func) in _ACTIVATIONS:
                o = self.waiting.pop(id(args[0]))[2]
                # A copy for an activation in place: the tensor that the model holds must not change behind the mask.
                o = o.clone() if func.__name__.endswith("_") or kwargs.get("inplace") or True in args[1:2] else o
                return self._end(k, func(o, *args[1:], **kwargs))
        return func(*args, **kwargs)

    def _way(self, k: int) -> str:
        """How layer k runs."""
        if self.execution != "auto":
            return self.execution
        choice = self.net.tuned.get(self.net.layers[k].name)
        return "masked" if choice is None else choice.execution

    def _convolve(self, k: int, func: Any, args: Any) -> Tensor:
        net, layer = self.net, self.net.layers[k]
        if self.given is None:
            p = net._score(k, args[0], learning=self.want_labels)
            self.scores.append(p)
            self.masks[k] = _guarded(p.detach() > 0, p.detach())
        elif not isinstance(self.given, str):
            self.masks[k] = self.given[k]
        m_in = None if layer.source is None else self.masks[layer.source]
        self.inputs.append((func, args, m_in))
        way = self._way(k)
        if way == "masked":
            y: Tensor = func(*args)
        else:
            norm = None if layer.norm is None else cast(_BatchNorm, net.model.get_submodule(layer.norm))
            y = active_convolution(func, args, norm, m_in, self.masks[k], net.groups if way == "union" else None)
        self.positions.append(math.prod(y.shape[2:]))
        if layer.norm is None:
            return self._then(k, y)
        self.waiting[id(y)] = (k, "norm", y)
        return y

    def _then(self, k: int, o: Tensor) -> Tensor:
        """What comes after the norm: the activation, if there is one."""
        act = self.net.layers[k].act
        if act == "none":
            return self._end(k, o)
        if act == "function":
            self.waiting[id(o)] = (k, "act", o)
        else:
            self.pending.setdefault(act, []).append(k)
        return o

    def _end(self, k: int, o: Tensor) -> Tensor:
        """O is complete: label it, and mask it."""
        if self.want_labels:
            self.labels[k] = self.net._labels(o)
            if self.given == "labels":
                self.masks[k] = self.labels[k]
        if self._way(k) != "masked" and self.net.layers[k].zero:
            return o  # the filters that are off are zero already
        return torch.where(_spatial(self.masks[k], o), o, 0)

    def run(self, x: Input) -> Trace:
        """The model's output on ``x``, gated."""
        net, owner = self.net, get_ident()

        def masked(act: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                mine = get_ident() == owner and self.pending.get(act)
                return self._end(mine.pop(0), output) if mine else output

            return hook

        acts = {layer.act for layer in net.layers} - {"none", "function"}
        with removing(net.model.get_submodule(a).register_forward_hook(masked(a)) for a in acts), self:
            output = call(net.model, x)
        count = len(net.layers)
        if self.next < count or self.waiting or any(self.pending.values()):
            name = net.layers[min(self.next, count - 1)].name
            raise RuntimeError(f"model: at {name!r} this forward pass leaves the course that the example's took")
        labels = [self.labels[k] for k in range(count)] if self.want_labels else []
        return Trace(output, self.scores, [self.masks[k] for k in range(count)], labels, self.positions)


# -- what is reported -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerStats:
    """One gated layer over a data set.

    ``keep`` is the mean share of active filters, ``macs`` the mean multiply-adds of a sample and ``dense_macs`` those
    of all filters; ``variance`` the mean over channels of the mask's variance over samples (0: one mask for all);
    ``head_accuracy`` the share of mask entries that agree with the label.
    """

    name: str
    keep: float
    macs: float
    dense_macs: int
    variance: float
    head_accuracy: float

    @property
    def share(self) -> float:
        """``macs / dense_macs``."""
        return self.macs / self.dense_macs


@dataclass(frozen=True)
class Stats:
    """Mean multiply-adds of a sample, and where they come from.

    ``macs`` is everything: gated convolutions by their active pairs of channels, the heads with their pooling, and the
    rest of the network in full; ``dense_macs`` is the network without gates. ``macs_reference`` counts as the published
    code does: gated convolutions only, without heads, a depthwise one as free as soon as an input is off, the next
    layer's inputs by the layer before even across a sum.
    """

    macs: float
    dense_macs: int
    head_macs: int
    macs_reference: float
    layers: tuple[LayerStats, ...]
    samples: int

    @property
    def saving(self) -> float:
        """1 - macs / dense_macs."""
        return 1 - self.macs / self.dense_macs

    @property
    def saving_reference(self) -> float:
        """The same by the published count."""
        return 1 - self.macs_reference / self.dense_macs

    @property
    def head_accuracy(self) -> float:
        """The mean over layers."""
        return sum(layer.head_accuracy for layer in self.layers) / len(self.layers)


@dataclass(frozen=True)
class Choice:
    """What ``tune`` keeps for a layer, and the time of each way divided by that of the masked dense layer."""

    execution: str
    ratios: dict[str, float] = field(default_factory=dict)


# -- the method -----------------------------------------------------------------------------------------------------


class FTWT(Dynamic):
    """A trained convolutional network that computes, for each sample and layer, the filters its heads ask for.

    The dial has two settings: ``Point(mass=r)``, gated, which it stands at from the start and which ``loss`` trains;
    and ``Point(gates="off")``, the same weights without gates, which can be extracted.

    Args:
        model: a trained network; it is wrapped, not copied, and its ``state_dict`` keeps its names.
        example: an input it accepts.
        mass: r in (0, 1], the share of activation that the labels keep (of filters, with ``label="uniform"``).
        label: "mass", or "uniform": the same number of filters in every layer and sample.
        mode: "decoupled" or "joint": whether the mask loss reaches the network through the heads' inputs.
        pool: what a head sees of its layer's input: the "max" over space, or the "avg".
        norm: how that is scaled: "softmax", "l2", "layernorm" or "none".
        embedding: about how many features a head reads: the input is pooled to a grid of as many places as come nearest
            to that, one at least. None, as in the paper: one place, so C_in features.
        where: names of the convolutions to gate, or triples (convolution, norm, activation module); None finds them.
        mask_weight: w of the mask loss.
        cooldown: share of the training after which w = 0: the heads stand still and the network adapts to them.
        head_lr: multiple of the optimiser's rate for the heads (``lr_scale`` of their parameter group).
        backbone_lr: the same for the network. With ``fit(lr=0.1)`` the defaults are the paper's 0.1 and 0.01.
        head_init: "random", or "open": all masks are ones at first.
        delta: shares of activation up to this are nothing.
        execution: in evaluation mode: "grouped" (identical masks together), "union" (``groups`` of like masks),
            "masked" (dense, saves nothing), or "auto": what ``tune`` found fastest, masked until then.
        groups: number of groups of "union".
        criterion: ``criterion(output, target)``; cross entropy where it is None.
        seed: of the heads' first weights.

    Raises:
        ValueError: an argument is outside what is allowed, no convolution can be gated, or the gates do not reach the
            model's output (its activation works in place and its result is thrown away).
    """

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        mass: float = 0.9,
        label: Label = "mass",
        mode: Mode = "decoupled",
        pool: Pool = "max",
        norm: Norm = "softmax",
        embedding: int | None = None,
        where: Where | None = None,
        mask_weight: float = 1.0,
        cooldown: float = 0.5,
        head_lr: float = 1.0,
        backbone_lr: float = 0.1,
        head_init: Init = "random",
        delta: float = 1e-5,
        execution: Execution = "grouped",
        groups: int = 4,
        criterion: Criterion | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check.module("model", model)
        self.mass = check.number("mass", mass, above=0, at_most=1)
        self.label: Label = check.choice("label", label, Label)
        self.mode: Mode = check.choice("mode", mode, Mode)
        self.pool: Pool = check.choice("pool", pool, Pool)
        self.norm: Norm = check.choice("norm", norm, Norm)
        self.embedding = check.optional(check.whole, "embedding", embedding, at_least=1)
        self.where = where
        self.mask_weight = check.number("mask_weight", mask_weight, at_least=0)
        self.cooldown = check.share("cooldown", cooldown)
        self.head_lr, self.backbone_lr = check.positive("head_lr", head_lr), check.positive("backbone_lr", backbone_lr)
        self.head_init: Init = check.choice("head_init", head_init, Init)
        self.delta = check.number("delta", delta, at_least=0)
        self._execution: Execution = check.choice("execution", execution, Execution)
        self.groups = check.whole("groups", groups, at_least=1)
        self.criterion = check.optional(check.function, "criterion", criterion)
        self.seed = check.seed("seed", seed)
        plain = check_example(model, example)
        self.example = example
        self.layers = find_layers(model, example, where)
        self.model = model
        self.heads = nn.ModuleList()
        for layer in self.layers:
            conv = cast(nn.Conv2d, model.get_submodule(layer.name))
            width = conv.in_channels * self._grid(conv) ** (conv.weight.ndim - 2)
            self.heads.append(nn.Linear(width, conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype))
        self.reset_parameters()
        self.cooling = False
        self.tuned: dict[str, Choice] = {}
        self.point = self.points()[0]
        with evaluating(model), torch.no_grad():
            ones = [
                torch.ones(rows_of(example), head.out_features, dtype=torch.bool, device=plain.device)
                for head in self._heads
            ]
            gated = predictions(self.trace(example, ones, execution="masked").output)
            if not all(torch.equal(gated[name], y) for name, y in predictions(call(model, example)).items()):
                raise ValueError(
                    "model: with all gates open its output changes; an activation works in place and its result is not "
                    "used. Write x = self.act(x)"
                )

    def reset_parameters(self) -> None:
        """Fresh heads, drawn as ``nn.Linear`` draws them, from ``seed``."""
        rng = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for head in self._heads:
                bound = head.in_features**-0.5
                for p in (head.weight, head.bias):
                    p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=rng))
                if self.head_init == "open":
                    head.weight.zero_()
                    head.bias.fill_(2.0)

    # -- the contract ---------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """``Point(mass=r)`` and ``Point(gates="off")``."""
        return [Point(mass=self.mass), DENSE]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output at the setting in use; it takes what the model takes."""
        x = packed(args, kwargs)
        return call(self.model, x) if self.point == DENSE else self.trace(x).output

    def loss(self, batch: Batch) -> Tensor:
        """The objective of the module's docstring (a scalar); without gates the criterion alone."""
        x, target = split_batch(batch)
        if self.point == DENSE:
            return loss(call(self.model, x), target, self.criterion)
        learning = not self.cooling and self.mask_weight > 0
        trace = self.trace(x, labels=learning, execution="masked")
        task = loss(trace.output, target, self.criterion)
        if not learning:
            self._still()
            return task
        return task + self.mask_weight * mask_loss(trace.scores, trace.labels)

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The network without gates, for ``Point(gates="off")``.

        Raises:
            NotStaticError: at ``Point(mass=r)``, where each input computes filters of its own.
        """
        known = self._known(point)
        if known != DENSE:
            raise NotStaticError(
                known, "each input computes the filters that its heads ask for (tune() finds the fastest way to)"
            )
        return copy.deepcopy(self.model).eval()

    def schedule(self, progress: float) -> None:
        """From ``cooldown`` on the heads stand still."""
        self.cooling = progress >= self.cooldown
        if self.cooling:
            self._still()

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The network at ``backbone_lr``, decayed; the heads at ``head_lr``, not."""
        groups: list[dict[str, Any]] = [
            {"params": self.model.parameters(), "weight_decay": weight_decay, "lr_scale": self.backbone_lr},
            {"params": self.heads.parameters(), "weight_decay": 0.0, "lr_scale": self.head_lr},
        ]
        groups = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in groups]
        return [g for g in groups if g["params"]]

    # -- running --------------------------------------------------------------------------------------------------

    @property
    def execution(self) -> Execution:
        """How layers run in evaluation mode; may be set."""
        return self._execution

    @execution.setter
    def execution(self, value: Execution) -> None:
        self._execution = check.choice("execution", value, Execution)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # every image computes filters of its own
    def trace(
        self,
        x: Input,
        masks: Masks = None,
        *,
        labels: bool = False,
        execution: Execution | None = None,
    ) -> Trace:
        """One gated forward pass, whatever the dial says, with all that was decided on the way.

        Args:
            x: an input.
            masks: None: the heads decide. "labels": the labels are the masks (the oracle). Or a boolean mask (B, C)
                for each layer, one active filter at least in each row.
            labels: give the labels too. The layers are then computed in full.
            execution: another one than the network's.

        Raises:
            ValueError: a mask has the wrong shape, or a row without an active filter.
        """
        if masks is not None and not isinstance(masks, str):
            self._check_masks(masks, rows_of(x))
        wanted: Execution = self.execution if execution is None else check.choice("execution", execution, Execution)
        if self.training or labels or masks == "labels" or not rows_of(x):
            wanted = "masked"  # labels are made from what was not masked
        return _Pass(self, masks, labels=labels, execution=wanted).run(x)

    def _check_masks(self, masks: Sequence[Tensor], rows: int) -> None:
        if len(masks) != len(self.layers):
            raise ValueError(f"masks: {len(masks)} of them for {len(self.layers)} layers")
        for layer, head, mask in zip(self.layers, self._heads, masks, strict=True):
            if mask.dtype is not torch.bool or tuple(mask.shape) != (rows, head.out_features):
                raise ValueError(
                    f"masks: that of {layer.name!r} is {mask.dtype} of shape {tuple(mask.shape)}; "
                    f"a boolean one of shape {(rows, head.out_features)}"
                )
            if not mask.any(1).all():
                raise ValueError(f"masks: that of {layer.name!r} has a row without an active filter")

    @property
    def _heads(self) -> list[nn.Linear]:
        return cast(list[nn.Linear], list(self.heads))

    def _grid(self, conv: nn.Conv2d) -> int:
        """Places along each dimension of space that the head of a convolution reads."""
        if self.embedding is None:
            return 1
        return max(1, round(float((self.embedding / conv.in_channels) ** (1 / (conv.weight.ndim - 2)))))

    def _score(self, k: int, x: Tensor, learning: bool) -> Tensor:
        """P (B, C) of layer k from its input I (B, C_in, ...); with a gradient only where the labels are learnt."""
        with torch.set_grad_enabled(learning and torch.is_grad_enabled()):
            x = x.detach() if self.mode == "decoupled" else x
            if self._heads[k].in_features > x.shape[1]:
                places = round((self._heads[k].in_features / x.shape[1]) ** (1 / (x.ndim - 2)))
                e = _POOLS[self.pool, x.ndim - 2](x, places).flatten(1)
            else:
                e = x.flatten(2).amax(2) if self.pool == "max" else x.flatten(2).mean(2)
            if self.norm == "softmax":
                e = e.softmax(1)
            elif self.norm == "l2":
                e = F.normalize(e, dim=1)
            elif self.norm == "layernorm":
                e = F.layer_norm(e, e.shape[1:])
            p: Tensor = self.heads[k](e)
        return p

    def _labels(self, o: Tensor) -> Tensor:
        """Labels (B, C) of an unmasked output O (B, C, ...)."""
        choose = mass_labels if self.label == "mass" else uniform_labels
        with torch.no_grad():
            return choose(peaks(o), self.mass, self.delta)

    def _still(self) -> None:
        """No gradient on the heads at all: with zeros, momentum and weight decay would still move them."""
        for p in self.heads.parameters():
            p.grad = None

    def tune(self, x: Input, repeats: int = 9) -> dict[str, Choice]:
        """Time every layer on ``x`` masked, grouped and by union, keep the fastest, and set ``execution="auto"``.

        The choice holds for this machine and for batches like ``x``; it is not saved.

        Raises:
            ValueError: ``repeats`` is below 3.
        """
        with evaluating(self), torch.inference_mode():
            run = _Pass(self)
            masks = run.run(x).masks
            tuned = {
                layer.name: self._timed(layer, *given, mask, repeats)
                for layer, given, mask in zip(self.layers, run.inputs, masks, strict=True)
            }
        self.tuned = tuned
        self.execution = "auto"
        return dict(tuned)

    def _timed(self, layer: Layer, convolve: Any, args: Any, m_in: Any, mask: Tensor, repeats: int) -> Choice:
        norm = None if layer.norm is None else cast(_BatchNorm, self.model.get_submodule(layer.norm))

        def masked() -> Tensor:
            y = convolve(*args)
            y = y if norm is None else norm(y)
            return torch.where(_spatial(mask, y), y, 0)

        ways = {"grouped": None, "union": self.groups} if len(mask) > 1 else {"grouped": None}
        ratios = {
            name: time_ratio(
                lambda union=union: active_convolution(convolve, args, norm, m_in, mask, union),  # type: ignore[misc]
                masked,
                repeats=repeats,
            ).median
            for name, union in ways.items()
        }
        best = min(ratios, key=lambda name: ratios[name])
        return Choice(best if ratios[best] < 1 else "masked", ratios)

    # -- counting -------------------------------------------------------------------------------------------------

    def stats(self, data: Iterable[Any] | Input, *, oracle: bool = False) -> Stats:
        """Keep rates, head accuracy and mean multiply-adds over ``data`` (a tensor, or batches), evaluation mode.

        ``oracle=True`` takes the labels as masks: what perfect heads would do.

        Raises:
            ValueError: ``data`` holds no samples.
        """
        device = device_of(self.model)
        count, dense = 0, 0
        size = len(self.layers)
        macs, agree = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        reference = 0.0
        full, pooled = [0] * size, 0
        on: list[Tensor] = [torch.zeros(h.out_features, dtype=torch.float64) for h in self._heads]
        with evaluating(self), torch.no_grad():
            for batch in inputs_of(data):
                x = to_device(batch, device)
                if not rows_of(x):
                    continue
                if not count:
                    one = take(x, slice(0, 1))
                    dense = count_flops(lambda: call(self.model, one), nonzero=False).total // 2  # noqa: B023
                    run = _Pass(self)
                    run.run(one)
                    pooled = sum(args[0].numel() for _, args, _ in run.inputs)
                    full = [conv.weight.numel() * n for conv, n in zip(run.convolutions, run.positions, strict=True)]
                trace = self.trace(x, "labels" if oracle else None, labels=True)
                count += rows_of(x)
                for k, (mask, label) in enumerate(zip(trace.masks, trace.labels, strict=True)):
                    macs[k] += float(self.layer_macs(k, trace).sum())
                    agree[k] += float((mask == label).float().mean(1).sum())
                    on[k] += mask.sum(0).cpu()
                reference += self._reference_macs(trace)
        if not count:
            raise ValueError("data: it holds no samples, so there is nothing to count")
        heads = sum(h.weight.numel() for h in self._heads) + pooled
        rate = [o / count for o in on]
        layers = tuple(
            LayerStats(
                name=layer.name,
                keep=float(rate[k].mean()),
                macs=float(macs[k]) / count,
                dense_macs=full[k],
                variance=float((rate[k] * (1 - rate[k])).mean()),
                head_accuracy=float(agree[k]) / count,
            )
            for k, layer in enumerate(self.layers)
        )
        rest = dense - sum(full)
        total = rest + heads + float(macs.sum()) / count
        return Stats(total, dense, heads, reference / count, layers, count)

    def layer_macs(self, k: int, trace: Trace) -> Tensor:
        """Multiply-adds (B,) that the convolution of layer k needs for each sample of ``trace``."""
        conv = cast(nn.Conv2d, self.model.get_submodule(self.layers[k].name))
        source = self.layers[k].source
        mask = trace.masks[k]
        m_in = mask.new_ones(len(mask), conv.in_channels) if source is None else trace.masks[source]
        return masked_macs(m_in, mask, conv.groups, math.prod(conv.kernel_size), trace.positions[k])

    def _reference_macs(self, trace: Trace) -> float:
        """Sum over layers and samples of n_l H W (n_{l-1} // groups) k^2, as the published code counts."""
        total = 0.0
        for k, mask in enumerate(trace.masks):
            conv = cast(nn.Conv2d, self.model.get_submodule(self.layers[k].name))
            before = trace.masks[k - 1] if k else None
            if before is None or before.shape[1] != conv.in_channels:
                n_in = mask.new_full((len(mask),), conv.in_channels, dtype=torch.long)
            else:
                n_in = before.sum(1)
            each = mask.sum(1) * trace.positions[k] * (n_in // conv.groups) * math.prod(conv.kernel_size)
            total += float(each.sum())
        return total

    @classmethod
    def estimate(
        cls,
        model: nn.Module,
        example: Input,
        data: Iterable[Any] | Input,
        *,
        mass: Sequence[float] = (0.85, 0.9, 0.95, 1.0),
        **options: Any,
    ) -> dict[float, Stats]:
        """The budget before training: labels as masks on the trained ``model``, for each r of ``mass``.

        It is a budget of labels. Trained heads keep more where they are unsure; ``stats`` afterwards tells how much.

        Args:
            model: the trained network; it is left as it is.
            example: an input.
            data: calibration inputs: a tensor, or batches; read once for each r.
            mass: values of r.
            options: other arguments of the constructor.

        Raises:
            ValueError: ``mass`` or ``data`` is empty, or an argument is not allowed.
        """
        if not mass:
            raise ValueError("mass: it is empty; give one value in (0, 1] at least")
        kept = data if isinstance(data, Tensor | Mapping) else list(data)
        return {r: cls(model, example, mass=r, **options).stats(kept, oracle=True) for r in mass}

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"mass={self.mass}, label={self.label!r}, mode={self.mode!r}, layers={len(self.layers)}, "
            f"execution={self.execution!r}, at {self.point}"
        )
