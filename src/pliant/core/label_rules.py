"""What happens to labels in each layer and operation (see ``channels``)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.core.inputs import tensors_in
from pliant.core.labels import (
    CONSTANT,
    LARGEST_CONSTANT,
    WHOLE,
    argument,
    extremes,
    is_linear_1d,
    like,
    varies,
)

if TYPE_CHECKING:
    from pliant.core.channels import Tracer

# -- rules for layers --------------------------------------------------------------------------------------------------


def _linear(t: Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    size = module.nf if is_linear_1d(module) else module.out_features
    along, read = t.side(t.of(values[0]), -1)
    made = t.outputs_of(module, size)
    if along:
        t.note(module, "in", read)
        t.put(output, made)
    else:  # it works along another dimension than channels, as the token mixing of MLP-Mixer does
        t.freeze(made, f"{t.place(module)} works along another dimension than channels")
        t.put(output, t.reduced(t.of(values[0]), [-1], ""))


def _convolution(t: Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    n = len(module.kernel_size)
    labels = t.of(values[0])
    along, read = t.side(labels, -n - 1)
    made = t.outputs_of(module, module.out_channels)
    if not along:
        t.freeze(labels, f"{t.place(module)} works along another dimension than channels")
        t.freeze(made, f"{t.place(module)} works along another dimension than channels")
        t.put(output, float(WHOLE))
        return
    t.put(output, made.reshape(-1, *[1] * n))
    groups = module.groups
    if groups == 1:
        t.note(module, "in", read)
        return
    read = read.clamp(min=WHOLE)  # what goes into a grouped convolution goes out again: constants keep their size
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


def _embedding(t: Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    t.freeze(t.of(values[0]), f"they are indices of {t.place(module)}")
    t.put(output, t.outputs_of(module, module.embedding_dim))


def _norm_per_channel(t: Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    labels = t.of(values[0])
    along, read = t.side(labels, 1)
    if along:
        t.note(module, "out", read)
    t.put(output, labels)


def norm_over(t: Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    """A norm over the last dimensions: torch's, or a root-mean-square norm of another class."""
    weight = next(iter(module._parameters.values()), None)
    _over_channels(t, module, weight, t.of(values[0]), len(getattr(module, "normalized_shape", (0,))), output)


def _over_channels(t: Tracer, module: Any, weight: Any, labels: Tensor, dims: int, output: Any) -> None:
    """One over channels normalises those that are left. ``module`` is None where it is written into a forward."""
    if dims > 1:
        t.put(output, t.reduced(labels, list(range(-dims, 0)), f"{t.place(module)} normalises several dimensions"))
        return
    if varies(labels, labels.ndim - 1):
        if t.in_pieces(labels):  # within each head: its weight is no head's own
            t.bundle(labels.reshape(-1, labels.shape[-1]))
            t.put(output, labels)
            return
        _, read = t.side(labels, -1)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            t.note(module, "out", read)
        else:
            t.tie(t.of(weight), read)
            if module is not None and t.names[id(module)] not in t.norms:
                t.norms.append(t.names[id(module)])
    t.put(output, labels)


def _group_norm(t: Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    labels = t.of(values[0])
    along, read = t.side(labels, 1)
    if not along:
        t.reduced(labels, list(range(1, labels.ndim)), f"{t.place(module)} normalises over them")
    else:
        t.note(module, "out", read)
        if 1 < module.num_groups < module.num_channels:
            t.bundle(read.reshape(module.num_groups, -1))
    t.put(output, labels)


def _slope(t: Tracer, module: Any, values: Sequence[Any], output: Tensor) -> None:
    if module.num_parameters > 1:
        _norm_per_channel(t, module, values, output)
    else:
        t.put(output, t.of(values[0]))


def _attention(t: Tracer, module: Any, values: Sequence[Any], output: Any) -> None:
    """Streams and inner width of ``nn.MultiheadAttention`` are one number, cut by heads."""
    given = [v for v in values[:3] if isinstance(v, Tensor)]
    made = t.outputs_of(module, module.embed_dim)
    read = [t.side(t.of(x), -1)[1] for x in given]
    if not module._qkv_same_embed_dim:
        for labels in (*read, made):
            t.freeze(labels, f"{t.place(module)} has keys or values of a width of their own")
    else:
        for labels in read:
            t.tie(made, labels.clamp(min=WHOLE))
        t.bundle(made.reshape(module.num_heads, -1))
    for x in tensors_in(output):
        t.put(x, made if x.shape[-1] == module.embed_dim and x.ndim == given[0].ndim else float(WHOLE))
    first = next(iter(tensors_in(output)))
    t.put(first, made)


def _recurrent(t: Tracer, module: Any, values: Sequence[Any], output: Any) -> None:
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
        t.put(y, float(WHOLE))


_LAYERS: dict[Any, Callable[[Tracer, Any, Sequence[Any], Any], None]] = {
    nn.Linear: _linear,
    _ConvNd: _convolution,
    nn.Embedding: _embedding,
    _NormBase: _norm_per_channel,
    nn.LayerNorm: norm_over,
    nn.RMSNorm: norm_over,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _slope,
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
}


def rule_of(module: nn.Module) -> Callable[[Tracer, Any, Sequence[Any], Any], None] | None:
    """The rule of a layer's class; None where it has none."""
    if is_linear_1d(module):
        return _linear
    return next((rule for kind, rule in _LAYERS.items() if isinstance(module, kind)), None)


def not_plain(module: nn.Module) -> str:
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


def weight_dims(module: nn.Module, leaf: str) -> dict[str, int]:
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
    """_to_copy hardswish bernoulli native_dropout dropout relu6 hardtanh masked_fill nan_to_num to clamp uniform normal
    rrelu_with_noise log_sigmoid_forward fake_quantize_per_tensor_affine"""
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
    r"_?(?:adaptive_avg_pool|adaptive_max_pool|avg_pool|max_pool|fractional_max_pool|max_unpool|upsample_\D+)(\d)d.*"
)
_BATCH_NORM = _words(
    """native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _batch_norm_no_update"""
)
_ATTENTION = re.compile(r"_scaled_dot_product_\w*attention\w*|scaled_dot_product_attention")


def follow(t: Tracer, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """The labels of what an operation returned."""
    tensors = list(tensors_in((args, kwargs)))
    outputs = list(tensors_in(out))
    if not outputs and not tensors:
        return
    base = name.rstrip("_") if name.endswith("_") and not name.startswith("__") else name
    spatial = _SPATIAL.fullmatch(base)
    if name in _NEW or not tensors:
        for y in outputs:
            named = y.is_floating_point() and 1 < y.numel() <= LARGEST_CONSTANT
            t.labels[y] = like(y).copy_(-t.new(y.numel()).view(y.shape) if named else torch.zeros(()))
    elif base in _MOVES:
        _move(t, func, name, args, kwargs, out)
    elif name == "copy_":
        t.put(args[0], t.join(t.of(args[0]) * 0, t.of(args[1]), ""))
    elif base in ("slice_scatter", "select_scatter", "index_put", "scatter", "index_copy", "index_add", "scatter_add",
                  "scatter_reduce", "index_reduce", "_index_put_impl"):  # fmt: skip
        _scatter(t, base, args, kwargs, out)
    elif name in ("zero_", "fill_"):
        t.put(args[0], float(CONSTANT))
    elif base in _SAME:
        for y in outputs:
            t.put(y, t.of(tensors[0]))
    elif base in _REDUCE:
        _reduce(t, func, args, kwargs, outputs, f"{base} over them in {t.place()}")
    elif base in _MIX:
        labels = t.of(tensors[0])
        dim = argument(func, args, kwargs, "dim", -1)
        top = t.reduced(labels, [dim], f"{base.strip('_')} over them in {t.place()}") if labels.ndim else labels
        for y in outputs:
            t.put(y, top if varies(labels, dim) or y.shape != labels.shape else labels)
    elif spatial is not None:
        n = int(spatial.group(1))
        top = t.reduced(t.of(tensors[0]), list(range(-n, 0)), f"{base.strip('_')} over them in {t.place()}")
        if base.startswith("fractional"):  # each channel is pooled at places of its own
            samples = t.of(tensors[-1])
            t.tie(samples, top.reshape(-1, top.shape[-n - 1], 1)[:1].expand(samples.shape))
        for y in outputs:
            t.put(y, top)
    elif base in ("bmm", "mm", "addmm", "baddbmm", "matmul"):
        _product(t, base, tensors, out)
    elif base in ("linear", "addmv", "mv", "dot", "convolution"):
        _product(t, base, tensors, out, known=False)
    elif _ATTENTION.fullmatch(base):
        _fused_attention(t, base, tensors, outputs)
    elif base in ("native_layer_norm", "_fused_rms_norm"):
        _functional_norm(t, base, args, outputs[0], out)
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
        first, second = t.of(args[0]).chunk(2, argument(func, args, kwargs, "dim", -1))
        t.put(out, t.join(first, second, ""))
    elif base == "col2im":
        _fold(t, args, out)
    elif base in ("_embedding_bag", "_embedding_bag_forward_only"):
        for x in tensors[1:]:
            t.freeze(t.of(x), f"they are indices or weights of an embedding bag in {t.place()}")
        made = t.new(args[0].shape[-1])
        t.tie(t.side(t.of(args[0]), -1)[1], made)
        t.put(outputs[0], made)
        for y in outputs[1:]:
            t.put(y, float(WHOLE))
    elif base == "_trilinear" and t.is_bare(t.of(args[1])):
        _bilinear(t, args, out)
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


def _functional_norm(t: Tracer, base: str, args: Any, output: Any, out: Any) -> None:
    """A norm over the last dimensions that no layer's own forward computes: (input, shape, weight, bias, ...)."""
    given: list[Any] = [*args[:4], None, None]
    x, shape, weight, bias = given[:4]
    if weight is None:
        labels, dims = t.of(x), list(range(-len(shape), 0))
        t.put(output, t.reduced(labels, dims, f"{base} in {t.place()}") if len(dims) > 1 else labels)
        return
    owner = t.owners.get(id(weight))
    if owner is None or (weight.ndim > 1 and not isinstance(owner, nn.LayerNorm)):
        t.give_up(f"{base} in {t.place()} has a weight that is no parameter", args, out)
        return
    module = owner if isinstance(owner, nn.LayerNorm | nn.RMSNorm) else None
    _over_channels(t, module, weight, t.of(x), len(shape), output)
    if module is None and bias is not None:
        t.tie(t.of(bias), t.of(weight))


def _move(t: Tracer, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
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
        _align(t, base, first, argument(func, args, kwargs, "dim", 0))
    elif base in ("view", "_unsafe_view", "reshape", "_reshape_copy", "_reshape_alias"):
        _note_parts(t, first, moved)
    elif base in ("channel_shuffle", "native_channel_shuffle"):
        t.bundle(t.side(first, 1)[1].reshape(args[1], -1).T)  # every group loses the same
    elif _are_pieces(moved) and varies(first, argument(func, args, kwargs, "dim", 0)):
        _equal_pieces(t, moved, f"{base} in {t.place()} parts them from others")
    in_place = name.endswith("_") and not name.startswith("_")
    for y, labels in zip(tensors_in(out), tensors_in(moved), strict=True):
        if y.shape == labels.shape or in_place:
            t.labels[y] = labels
        else:
            t.put(y, labels)


def _align(t: Tracer, base: str, parts: Sequence[Tensor], dim: int) -> None:
    """What is stacked, or joined along another dimension than channels, loses the same places."""
    if base == "stack":
        rows = list(parts)
    else:
        dim %= max(parts[0].ndim, 1)
        if any(p.ndim != parts[0].ndim or varies(p, dim) for p in parts):
            return
        rows = [extremes(p, [dim])[0] if p.shape[dim] else p for p in parts]
    for other in rows[1:]:
        if other.shape == rows[0].shape:
            t.tie(rows[0], other, units=True)


def _are_pieces(moved: Any) -> bool:
    return isinstance(moved, tuple | list) and len(moved) > 1 and len({m.shape for m in moved}) == 1


def _equal_pieces(t: Tracer, pieces: Sequence[Tensor], why: str) -> None:
    """Equal pieces of a tensor stay equal: what stands at one place of all of them goes together, or not at all."""
    stacked = torch.stack(list(pieces))
    top, low = stacked.amax(0), stacked.amin(0)
    fixed = (low <= WHOLE) & (top > WHOLE)
    t.freeze(torch.where(fixed, stacked, 0.0), why)
    for piece in pieces:
        t.tie(torch.where(fixed, 0.0, piece), top, units=True)


def _note_parts(t: Tracer, before: Tensor, after: Tensor) -> None:
    """A view that parts one dimension of channels into two."""
    if sum(varies(before, d) for d in range(before.ndim)) != 1:
        return
    dims = [d for d in range(after.ndim) if varies(after, d)]
    if len(dims) == 2:
        others = [d for d in range(after.ndim) if d not in dims]
        t.part(extremes(after, others)[0].squeeze(others) if others else after)


def _fold(t: Tracer, args: Any, out: Tensor) -> None:
    """Sliding blocks are added up: k consecutive positions hold the places of one channel's kernel."""
    _, read = t.side(t.of(args[0]), -2)
    blocks = read.reshape(-1, math.prod(args[2]))
    top = blocks.amax(1, keepdim=True)
    t.tie(blocks, top.expand_as(blocks))
    t.put(out, top.reshape(-1, 1, 1))


def _bilinear(t: Tracer, args: Any, out: Tensor) -> None:
    """x^T W_j y for each output j: the outputs can be cut; what goes in keeps its number."""
    first, weight, second = (t.of(x) for x in args[:3])
    for labels in (first, second):
        t.freeze(labels, f"they enter a bilinear product in {t.place()}")
    made = t.new(len(weight))
    t.tie(weight, made[:, None, None].expand_as(weight))
    t.put(out, made)


def _scatter(t: Tracer, base: str, args: Any, kwargs: Any, out: Any) -> None:
    """Elements are written into others: where two channels meet, they are tied."""
    target, values = t.of(args[0]), [a for a in args[1:] if isinstance(a, Tensor) and a.is_floating_point()]
    if not values:
        t.put(out, target)
        return
    if base == "index_reduce":
        t.give_up(f"{base} in {t.place()}", (args, kwargs), out)
        return
    source = t.of(values[-1])
    base = "index_put" if base == "_index_put_impl" else base
    if base in ("slice_scatter", "select_scatter", "index_put", "index_copy", "scatter"):
        function = getattr(torch.ops.aten, base)
        rest = [source if a is values[-1] else a for a in args[1:]]
        if base == "index_put":
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


def _reduce(t: Tracer, func: Any, args: Any, kwargs: Any, outputs: Sequence[Tensor], why: str) -> None:
    tensors = list(tensors_in(args))
    if len(tensors) > 1:  # max(x, y) is elementwise
        labels = t.join(t.of(tensors[0]), t.of(tensors[1]), why)
        for y in outputs:
            t.put(y, labels)
        return
    labels = t.of(args[0])
    dims = argument(func, args, kwargs, "dim", None)
    dims = list(range(labels.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    top = t.reduced(labels, dims, why)
    for y in outputs:
        t.put(y, top.reshape(y.shape) if top.numel() == y.numel() else top)


def _product(t: Tracer, base: str, tensors: Sequence[Any], out: Any, known: bool = True) -> None:
    """Matrix products of two activations (n, i, k) and (n, k, j); what is tied in a batch n is one unit."""
    *added, x, y = tensors
    a, b = t.of(x), t.of(y)
    if not known or t.has_bare(a) or t.has_bare(b):
        why = f"they are multiplied with a parameter that is no layer's in {t.place()}"
        t.give_up(why if base != "convolution" else f"a convolution in {t.place()} is no layer", tensors, out)
        return
    if a.ndim == 2:
        a, b = a[None], b[None]
    named = [bool((v > WHOLE).any()) for v in (a, b)]
    if not any(named):
        labels = torch.full((1, 1, 1), float(WHOLE), dtype=torch.float64)
    elif not all(named) and not varies(a, 2) and not varies(b, 1):
        # One carries channels, and not along what is summed: they stay where they are.
        labels = extremes(a, [2])[0] if named[0] else extremes(b, [1])[0]
        labels = labels.expand(len(a), a.shape[1], b.shape[2])
    elif not all(named):
        why = f"they are summed against something of fixed size in {t.place()}"
        t.freeze(a, why)
        t.freeze(b, why)
        labels = torch.full((1, 1, 1), float(WHOLE), dtype=torch.float64)
    else:
        if varies(a, 2) and varies(b, 1):
            t.tie(a.amax(1), b.amax(2))  # what is multiplied with each other is one channel
        t.bundle(torch.cat([a.flatten(1), b.flatten(1)], 1))
        inner = varies(b, 2) and not varies(b, 1)
        labels = b.amax(1, keepdim=True) if inner else torch.maximum(a.amax((1, 2)), b.amax((1, 2)))[:, None, None]
        labels = labels.expand(len(a), a.shape[1], b.shape[2])
    labels = labels if out.ndim == 3 else labels.reshape(labels.shape[1:])
    for z in added:
        labels = t.join(labels.expand(out.shape), t.of(z), f"they are spread over others in {t.place()}")
    t.put(out, labels)


def _fused_attention(t: Tracer, base: str, tensors: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """softmax(q k^T) v with (B, heads, T, d): a head is one unit; fewer heads of keys serve several of queries."""
    q, k, v = (t.of(x) for x in tensors[:3])
    labels = [q, *(x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))]
    named = [bool((x > WHOLE).any()) for x in labels]
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
        t.put(y, made if y.ndim == q.ndim and y.shape[-1] == made.shape[-1] else float(WHOLE))
