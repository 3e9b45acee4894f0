"""What each operator of PyTorch multiplies: the table behind ``count_flops``.

The convention: **2 per multiply-add**, of matrix products, convolutions and what is made of them (attention, recurrent
layers, bilinear forms, distances), as they are executed; attention counts its whole square, causal or not, and a
backward kernel that computes its scores a second time counts them a second time. A multiply-add of complex numbers is
four of real ones. Fourier transforms count 5 n log2 n, factorisations and solves of linear algebra their usual cubic
terms. Everything done element by element is free: activations, norms, pools, softmax, losses, interpolation, copies,
indexing, random numbers, outer products (which sum nothing), weighted bags of embeddings, optimisers.

An operator is described by the list of its products, each the FLOPs and the weight that takes part in it, or None where
two activations are multiplied; the weight is what the second sum of ``Flops`` looks at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from math import log2, prod
from typing import Any

import torch
from torch import Tensor

Product = tuple[float, Tensor | None]
Formula = Callable[..., list[Product]]  # called with the operator's arguments, and with its output as ``result``

_COMPRESSED = (torch.sparse_csr, torch.sparse_bsr, torch.sparse_csc, torch.sparse_bsc)


def _flops(multiplications: float, *factors: Tensor) -> float:
    return 2.0 * multiplications * (4 if factors and all(f.is_complex() for f in factors) else 1)


def _stored(t: Tensor) -> int:
    """Numbers that a tensor holds: for a sparse layout those that are stored."""
    if t.layout in _COMPRESSED:
        return t.values().numel()
    return int(t._values().numel()) if t.layout is torch.sparse_coo else t.numel()


def _padded(t: Tensor) -> Sequence[int]:
    """The shape of a tensor; of a nested one that of its padded form, in which products of two nested ones are run."""
    if not t.is_nested:
        return t.shape
    sizes = t._nested_tensor_size()
    return [len(sizes), *sizes.amax(0).tolist()]


def _lengths(offsets: Tensor | None, batch: int, longest: int) -> list[int]:
    """Tokens of every sequence of a batch: from the offsets of a packed one, where it is packed."""
    if offsets is None or offsets.device.type == "meta":
        return [longest] * (batch if offsets is None else len(offsets) - 1)
    return [int(n) for n in offsets.diff().tolist()]


# -- matrix products --------------------------------------------------------------------------------------------------


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    """(M, K) @ (K, N), the second factor taken for the weight, as nn.Linear calls it; sparse ones by what they hold."""
    (m, k), n = a.shape, b.shape[1]
    dense = [t.layout is torch.strided for t in (a, b)]
    if all(dense):
        return [(_flops(m * k * n, a, b), b)]
    if any(dense):
        sparse = b if dense[0] else a
        return [(_flops(m * k * n * _stored(sparse) / max(sparse.numel(), 1), a, b), None)]
    columns, rows = (t.to_sparse(layout=torch.sparse_coo).coalesce().indices()[axis] for t, axis in ((a, 1), (b, 0)))
    return [(_flops((columns.bincount(minlength=k) * rows.bincount(minlength=k)).sum().item(), a, b), None)]


def _addmm(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> list[Product]:
    return _mm(a, b)


def _bmm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    """(..., M, K) @ (..., K, N), two activations; nested ones matrix by matrix."""
    if a.is_nested or b.is_nested:
        return [product for pair in zip(a.unbind(), b.unbind(), strict=True) for product in _bmm(*pair)]
    return [(_flops(a.numel() * b.shape[-1], a, b), None)]


def _baddbmm(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> list[Product]:
    return _bmm(a, b)


def _matmul(a: Tensor, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    """Of nested tensors, which are padded for it; with others matmul is made of the products above."""
    return [(_flops(prod(_padded(a)) * _padded(b)[-1], a, b), None)]


def _mv(a: Tensor, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [(_flops(_stored(a), a, b), a if a.layout is torch.strided else None)]


def _addmv(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> list[Product]:
    return _mv(a, b)


def _dot(a: Tensor, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [(_flops(a.numel(), a, b), None)]


def _foreach_mm(a: Sequence[Tensor], b: Sequence[Tensor], *_: Any, **__: Any) -> list[Product]:
    return [product for pair in zip(a, b, strict=True) for product in _mm(*pair)]


def _linear(x: Tensor, weight: Any = None, *_: Any, **__: Any) -> list[Product]:
    """(..., K) @ (N, K)^T."""
    return [(_flops(x.numel() * weight.shape[0], x, weight), weight)]


def _packed_linear(x: Tensor, *_: Any, result: Tensor, **__: Any) -> list[Product]:
    """A linear layer whose weight is packed in a form of its own: all of it counts."""
    return [(_flops(x.numel() * result.shape[-1], x), None)]


def _linear_backward(x: Tensor, grad: Tensor, weight: Tensor, mask: Sequence[bool], **_: Any) -> list[Product]:
    flops = _flops(x.numel() * weight.shape[0], x, weight)
    return [(flops, weight)] * mask[0] + [(flops, None)] * mask[1]


def _linear_backward_input(_: Any, grad: Tensor, weight: Tensor, **__: Any) -> list[Product]:
    return [(_flops(grad.numel() * weight.shape[1], grad, weight), weight)]


def _linear_backward_weight(grad: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [(_flops(x.numel() * weight.shape[0], x, grad), None)]


def _grouped_mm(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> list[Product]:
    """Rows in groups, each group with a matrix of its own: 2-D operands are cut by ``offs``, 3-D ones are stacked."""
    tensors = [t for t in (*rest, options.get("offs")) if isinstance(t, Tensor) and t.dtype is torch.int32]
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if a.dim() == 2 and b.dim() == 3 and tensors and tensors[0].device.type != "meta":
        rows = tensors[0].diff(prepend=tensors[0].new_zeros(1)).tolist()
        return [(_flops(r * k * n, a, b), w) for r, w in zip(rows, b, strict=True)]
    return [(_flops(m * k * n * (len(a) if a.dim() == b.dim() == 3 else 1), a, b), None)]


def _sampled_addmm(pattern: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [(_flops(_stored(pattern) * a.shape[-1], a, b), None)]


def _semi_structured_mm(a: Tensor, meta: Any, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    """Half of the numbers of ``a`` are stored, and multiplied."""
    return [(_flops(a.numel() * b.shape[-1]), None)]


def _semi_structured_addmm(_: Any, a: Tensor, meta: Any, b: Tensor, *__: Any, **___: Any) -> list[Product]:
    return _semi_structured_mm(a, meta, b)


def _semi_structured_linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [(_flops(_tokens(x) * weight.numel()), None)]


def _two_mm(a: Tensor, b: Tensor, c: Tensor, d: Tensor, *_: Any, **__: Any) -> list[Product]:
    return _mm(a, b) + _mm(c, d)


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, expand1: Any, expand2: Any, expand3: Any, sumdim: Any, unroll: int = 1, **_: Any
) -> list[Product]:
    """nn.Bilinear and its gradients: a @ b over what c has not, the result @ c; a product that sums nothing is free."""
    dims = a.dim() + len(expand1)
    sizes = [1] * dims
    for tensor, expanded in ((a, expand1), (b, expand2), (c, expand3)):
        for d, size in zip((d for d in range(dims) if d not in expanded), tensor.shape, strict=True):
            sizes[d] = size
    first = {d for d in range(dims) if d not in expand1 or d not in expand2 or d == unroll}
    early = {d for d in sumdim if d != unroll and d in expand3}
    late = {d for d in sumdim if d != unroll} - early
    second = ({d for d in range(dims) if d not in expand3} | first) - early | {unroll}
    weight = b if 0 in expand2 and not expand2[1:] else None  # the forward call of nn.Bilinear
    pairs = ((early, first, weight), (late, second, None))
    return [(_flops(prod(sizes[d] for d in over), a, b, c), w) for summed, over, w in pairs if summed]


def _batch(a: Tensor, b: Tensor) -> int:
    """Matrices in a batch of pairs of them."""
    return prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))  # type: ignore[no-untyped-call]


def _cdist(a: Tensor, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    """One multiply-add for each coordinate of each pair."""
    batch = _batch(a, b)
    return [(_flops(batch * a.shape[-2] * b.shape[-2] * a.shape[-1], a), None)]


def _cdist_backward(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> list[Product]:
    return _cdist(a, b)


def _euclidean_dist(a: Tensor, b: Tensor, **_: Any) -> list[Product]:
    """|a|^2 - 2ab + |b|^2 as one matrix product with two more columns, one for each square."""
    batch = _batch(a, b)
    return [(_flops(batch * a.shape[-2] * b.shape[-2] * (a.shape[-1] + 2), a), None)]


def _pdist(x: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [(_flops(len(x) * (len(x) - 1) / 2 * x.shape[1], x), None)]


def _pdist_backward(_: Tensor, x: Tensor, *__: Any, **___: Any) -> list[Product]:
    return [(2 * flops, weight) for flops, weight in _pdist(x)]


# -- convolutions: every number of the weight is used once at every position ------------------------------------------


def _places(t: Tensor) -> int:
    """Positions of a (B, C, ...) tensor, over the whole batch."""
    return len(t) * prod(t.shape[2:])


def _any_convolution(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *_: Any,
    result: Tensor, **__: Any,
) -> list[Product]:  # fmt: skip
    return [(_flops(weight.numel() * _places(x if transposed else result), x, weight), weight)]


def _convolution(x: Tensor, weight: Tensor, *_: Any, result: Tensor, **__: Any) -> list[Product]:
    return [(_flops(weight.numel() * _places(result), x, weight), weight)]


def _transposed_convolution(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [(_flops(weight.numel() * _places(x), x, weight), weight)]


def _binary_convolution(x: Tensor, other: Tensor, weight: Any, *_: Any, result: Tensor, **__: Any) -> list[Product]:
    """``mkldnn::_convolution_pointwise``: with a second operand the weight stands third, the bias is flat."""
    weight = weight if isinstance(weight, Tensor) and weight.dim() > 1 else other
    return [(_flops(weight.numel() * _places(result), x, weight), weight)]


def _added_convolution(_: Tensor, x: Tensor, weight: Tensor, *__: Any, result: Tensor, **___: Any) -> list[Product]:
    return [(_flops(weight.numel() * _places(result), x, weight), weight)]


def _tbc_convolution(x: Tensor, weight: Tensor, *_: Any, result: Tensor, **__: Any) -> list[Product]:
    return [(_flops(weight.numel() * result.shape[0] * result.shape[1], x, weight), weight)]


def _packed_convolution(transposed: bool) -> Formula:
    def formula(x: Tensor, packed: Any, *_: Any, result: Tensor, **__: Any) -> list[Product]:
        weight = packed.unpack()[0]
        return [(_flops(weight.numel() * _places(x if transposed else result)), weight)]

    return formula


def _quantized_convolution(x: Tensor, scale: Any, zero: Any, weight: Tensor, *_: Any, result: Tensor, **__: Any) -> Any:
    return [(_flops(weight.numel() * _places(result)), weight)]


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, **_: Any) -> list[Product]:
    """Gradients of the input and of the weight, those that the mask (the last argument) asks for."""
    transposed, mask = next(a for a in rest if isinstance(a, bool)), rest[-1]
    flops = _flops(weight.numel() * _places(x if transposed else grad), grad, weight)
    return [(flops, weight)] * mask[0] + [(flops, None)] * mask[1]


# -- attention --------------------------------------------------------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> list[Product]:
    """(B, H, L, D) with (B, h, S, D) and (B, h, S, V), h heads of keys shared by H of queries: scores, then values."""
    return [(_flops(prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1]), q), None)]


def _attention_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> list[Product]:
    """The scores again, and one product for each factor of the two products."""
    return [(_flops(prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1]), q), None)]


def _packed_pairs(q: Tensor, k: Tensor, q_offsets: Tensor | None, k_offsets: Tensor | None, longest: Any) -> int:
    """Heads times pairs of a query and a key, in (B, L, H, D) or with the sequences packed in one row."""
    k_offsets = k_offsets if k_offsets is not None else q_offsets
    q_longest, k_longest = (q.shape[1], k.shape[1]) if q_offsets is None else longest
    lengths = (_lengths(o, len(q), int(n)) for o, n in ((q_offsets, q_longest), (k_offsets, k_longest)))
    return int(q.shape[-2] * sum(m * n for m, n in zip(*lengths, strict=True)))


def _flash(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> list[Product]:
    pairs = _packed_pairs(q, k, rest[0], rest[1], rest[2:4])
    return [(_flops(pairs * (q.shape[-1] + v.shape[-1]), q), None)]


def _efficient(q: Tensor, k: Tensor, v: Tensor, _: Any, *rest: Any, **__: Any) -> list[Product]:
    return _flash(q, k, v, *rest)


def _flash_backward(_: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, sums: Any, *rest: Any, **__: Any) -> Any:
    pairs = _packed_pairs(q, k, rest[0], rest[1], rest[2:4])
    return [(_flops(pairs * (3 * q.shape[-1] + 2 * v.shape[-1]), q), None)]


def _efficient_backward(_: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Any, *rest: Any, **__: Any) -> Any:
    return _flash_backward(_, q, k, v, out, None, *rest)


def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Any,
    out_weight: Tensor, *_: Any, **__: Any,
) -> list[Product]:  # fmt: skip
    """The fast path of nn.MultiheadAttention. Nested sequences are projected by their own tokens, scored as padded."""
    parts = zip((query, key, value), qkv_weight.chunk(3), strict=True)
    projections = [(_flops(x.numel() * embed_dim, x), weight) for x, weight in parts]
    batch, length, _width = _padded(query)
    scores = batch * length * _padded(key)[1] * embed_dim
    return [*projections, (_flops(2 * scores, query), None), (_flops(query.numel() * embed_dim, query), out_weight)]


def _encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Any, out_weight: Tensor, out_bias: Any,
    use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Any, norm_bias_1: Any, norm_weight_2: Any,
    norm_bias_2: Any, weight_1: Tensor, bias_1: Any, weight_2: Tensor, *_: Any, **__: Any,
) -> list[Product]:  # fmt: skip
    """The fast path of nn.TransformerEncoderLayer: attention, and the two layers behind it."""
    attention = _multi_head_attention(src, src, src, embed_dim, num_heads, qkv_weight, qkv_bias, out_weight)
    hidden = _flops(src.numel() * weight_1.shape[0], src)
    return [*attention, (hidden, weight_1), (hidden, weight_2)]


# -- recurrent layers: every matrix is used once for every token ------------------------------------------------------


def _tokens(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _recurrent(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> list[Product]:
    """Layers of which all parameters are given in one list; the matrices among them multiply."""
    return [(_flops(_tokens(x) * w.numel(), x), w) for w in weights if w.dim() == 2]


def _recurrent_backward(x: Tensor, weights: Sequence[Tensor], *rest: Any, **_: Any) -> list[Product]:
    forward = _recurrent(x, weights)
    return forward + [(flops, None) for flops, _w in forward] * int(rest[-1][3])


def _one_recurrent(x: Tensor, of_input: Tensor, of_state: Tensor, *_: Any, **__: Any) -> list[Product]:
    return _recurrent(x, (of_input, of_state))


def _one_recurrent_backward(x: Tensor, of_input: Tensor, of_state: Tensor, *_: Any, **__: Any) -> list[Product]:
    forward = _recurrent(x, (of_input, of_state))
    return forward + [(flops, None) for flops, _w in forward]


def _metal_lstm(x: Tensor, hx: Any, weights: Sequence[Tensor], *_: Any, **__: Any) -> list[Product]:
    return _recurrent(x, weights)


def _quantized_recurrent(gates: int) -> Formula:
    def formula(x: Tensor, *rest: Any, result: Sequence[Tensor], **_: Any) -> list[Product]:
        """The weights are packed, but their sizes follow from those of the input and of the final state."""
        layers, bidirectional = next(a for a in rest if type(a) is int), [a for a in rest if type(a) is bool][2]
        hidden, directions = result[1].shape[-1], 1 + bidirectional
        inputs = x.shape[-1] + (layers - 1) * directions * hidden + layers * hidden
        return [(_flops(_tokens(x) * gates * hidden * directions * inputs, x), None)]

    return formula


def _quantized_cell(gates: int) -> Formula:
    def formula(x: Tensor, state: Any, *_: Any, **__: Any) -> list[Product]:
        hidden = (state if isinstance(state, Tensor) else state[0]).shape[-1]
        return [(_flops(_tokens(x) * gates * hidden * (x.shape[-1] + hidden), x), None)]

    return formula


# -- transforms and linear algebra ------------------------------------------------------------------------------------


def _fourier(x: Tensor, dim: Sequence[int], *_: Any, result: Tensor, **__: Any) -> list[Product]:
    """5 n log2 n for n complex numbers, half of it where one side is real."""
    real = next((t for t in (x, result) if not t.is_complex()), None)
    whole = x if real is None else real
    points = prod(whole.shape[d] for d in dim)
    return [((5 if real is None else 2.5) * whole.numel() * log2(max(points, 1)), None)]


def _algebra(flops: Callable[[int, int, int], float], *, right: int | None = None, of: int = 0) -> Formula:
    """A cubic term of an (m, n) matrix, and of r right-hand sides, for each matrix of the batch."""

    def formula(*args: Any, result: Any = None, left: bool = True, **_: Any) -> list[Product]:
        matrix = args[of]
        m, n = matrix.shape[-2:]
        each, batch = 0, prod(matrix.shape[:-2])
        if right is not None:
            sides = args[right] if args[right].dim() > 1 else args[right][:, None]
            vectors = args[right].shape == matrix.shape[:-1] and matrix.dim() > 1
            each = 1 if vectors else sides.shape[-1 if left else -2]
            if not vectors:
                batch = _batch(matrix, sides)
        return [(_flops(batch * flops(m, n, each) / 2, matrix), None)]

    return formula


def _lu(m: int, n: int, _: int = 0) -> float:
    short = min(m, n)
    return 2 * (m * n * short - (m + n) * short**2 / 2 + short**3 / 3)


def _reflections(m: int, n: int, _: int = 0) -> float:
    return 2 * m * n * n - 2 * n**3 / 3 if m >= n else 2 * n * m * m - 2 * m**3 / 3


def _qr(x: Tensor, mode: str = "reduced", **_: Any) -> list[Product]:
    flops = _reflections(x.shape[-2], x.shape[-1]) * (1 if mode == "r" else 2)
    return [(_flops(prod(x.shape[:-2]) * flops / 2, x), None)]


# -- the table --------------------------------------------------------------------------------------------------------

# Names of aten without the underscore of the in-place form; those of other namespaces with theirs.
_TABLE: tuple[tuple[Formula, str], ...] = (
    (_mm, "mm _int_mm _scaled_mm _scaled_mm_v2 _sparse_sparse_matmul _sparse_mm_reduce_impl hspmm"),
    (_addmm, "addmm _addmm_activation _sparse_addmm"),
    (_bmm, "bmm quantized::matmul"),
    (_baddbmm, "baddbmm addbmm"),
    (_matmul, "matmul"),
    (_dot, "dot vdot"),
    (_mv, "mv"),
    (_addmv, "addmv"),
    (_foreach_mm, "_foreach_mm"),
    (_grouped_mm, "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2"),
    (_sampled_addmm, "sparse_sampled_addmm"),
    (_semi_structured_mm, "_sparse_semi_structured_mm"),
    (_semi_structured_addmm, "_sparse_semi_structured_addmm"),
    (_semi_structured_linear, "_sparse_semi_structured_linear"),
    (_two_mm, "inductor::_mm_plus_mm"),
    (_linear, "linear mkldnn_linear _weight_int8pack_mm"),
    (_packed_linear, "_weight_int4pack_mm _weight_int4pack_mm_for_cpu _weight_int4pack_mm_with_scales_and_zeros"),
    (_packed_linear, "_dyn_quant_matmul_4bit _mixed_dtypes_linear onednn::qlinear_pointwise mkl::_mkl_linear"),
    (_packed_linear, "quantized::linear quantized::linear_relu quantized::linear_leaky_relu quantized::linear_tanh"),
    (_packed_linear, "quantized::linear_dynamic quantized::linear_relu_dynamic quantized::linear_dynamic_fp16"),
    (_packed_linear, "quantized::linear_relu_dynamic_fp16 mkldnn::_linear_pointwise"),
    (_linear_backward, "mkldnn_linear_backward linear_backward"),
    (_linear_backward_input, "mkldnn_linear_backward_input"),
    (_linear_backward_weight, "mkldnn_linear_backward_weights"),
    (_trilinear, "_trilinear"),
    (_cdist, "_cdist_forward"),
    (_cdist_backward, "_cdist_backward"),
    (_euclidean_dist, "_euclidean_dist"),
    (_pdist, "_pdist_forward"),
    (_pdist_backward, "_pdist_backward"),
    (_any_convolution, "convolution _convolution convolution_overrideable"),
    (_convolution, "_slow_conv2d_forward slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d"),
    (_convolution, "_conv_depthwise2d conv_depthwise3d _nnpack_spatial_convolution mkldnn_convolution"),
    (_convolution, "cudnn_convolution cudnn_convolution_relu cudnn_convolution_add_relu miopen_convolution"),
    (_convolution, "miopen_convolution_relu miopen_convolution_add_relu miopen_depthwise_convolution _mps_convolution"),
    (_convolution, "torchvision::deform_conv2d"),
    (_transposed_convolution, "slow_conv_transpose2d slow_conv_transpose3d cudnn_convolution_transpose"),
    (_transposed_convolution, "miopen_convolution_transpose _mps_convolution_transpose"),
    (_transposed_convolution, "mkldnn::_convolution_transpose_pointwise"),
    (_binary_convolution, "mkldnn::_convolution_pointwise"),
    (_added_convolution, "mkldnn::_convolution_pointwise_"),
    (_quantized_convolution, "onednn::qconv_pointwise onednn::qconv1d_pointwise"),
    (_quantized_convolution, "onednn::qconv2d_pointwise onednn::qconv3d_pointwise"),
    (_packed_convolution(False), "quantized::conv1d quantized::conv1d_relu quantized::conv1d_dynamic"),
    (_packed_convolution(False), "quantized::conv2d quantized::conv2d_relu quantized::conv2d_dynamic"),
    (_packed_convolution(False), "quantized::conv3d quantized::conv3d_relu quantized::conv3d_dynamic"),
    (_packed_convolution(True), "quantized::conv_transpose1d quantized::conv_transpose2d quantized::conv_transpose3d"),
    (_tbc_convolution, "conv_tbc"),
    (_convolution_backward, "convolution_backward convolution_backward_overrideable"),
    (_attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
    (_attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    (_attention, "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps"),
    (_attention, "_triton_scaled_dot_attention"),
    (_attention_backward, "_scaled_dot_product_flash_attention_for_cpu_backward"),
    (_attention_backward, "_scaled_dot_product_flash_attention_backward"),
    (_attention_backward, "_scaled_dot_product_efficient_attention_backward"),
    (_attention_backward, "_scaled_dot_product_cudnn_attention_backward"),
    (_attention_backward, "_scaled_dot_product_fused_attention_overrideable_backward"),
    (_flash, "_flash_attention_forward"),
    (_efficient, "_efficient_attention_forward"),
    (_flash_backward, "_flash_attention_backward"),
    (_efficient_backward, "_efficient_attention_backward"),
    (_multi_head_attention, "_native_multi_head_attention _triton_multi_head_attention"),
    (_encoder_layer, "_transformer_encoder_layer_fwd"),
    (_one_recurrent, "mkldnn_rnn_layer"),
    (_one_recurrent_backward, "mkldnn_rnn_layer_backward"),
    (_recurrent, "_cudnn_rnn miopen_rnn"),
    (_recurrent_backward, "_cudnn_rnn_backward miopen_rnn_backward"),
    (_metal_lstm, "_lstm_mps"),
    (_quantized_recurrent(4), "quantized_lstm"),
    (_quantized_recurrent(3), "quantized_gru"),
    (_quantized_cell(4), "quantized::quantized_lstm_cell_dynamic"),
    (_quantized_cell(3), "quantized::quantized_gru_cell_dynamic"),
    (_quantized_cell(1), "quantized::quantized_rnn_tanh_cell_dynamic quantized::quantized_rnn_relu_cell_dynamic"),
    (_fourier, "_fft_c2c _fft_r2c _fft_c2r"),
    (_algebra(lambda m, n, r: n**3 / 3), "linalg_cholesky_ex cholesky"),
    (_algebra(lambda m, n, r: 2 * n**3 / 3), "cholesky_inverse"),
    (_algebra(_lu), "linalg_lu_factor_ex linalg_lu _linalg_det _linalg_slogdet"),
    (_algebra(lambda m, n, r: 2 * n**3), "linalg_inv_ex"),
    (_algebra(lambda m, n, r: 2 * n**3 / 3 + 2 * n * n * r, right=1), "_linalg_solve_ex"),
    (_algebra(lambda m, n, r: 2 * n * n * r, right=2), "linalg_lu_solve"),
    (_algebra(lambda m, n, r: n * n * r, right=1), "linalg_solve_triangular"),
    (_algebra(lambda m, n, r: n * n * r, right=0, of=1), "triangular_solve"),
    (_algebra(lambda m, n, r: 2 * n * n * r, right=0, of=1), "cholesky_solve"),
    (_algebra(_reflections), "linalg_householder_product geqrf"),
    (_qr, "linalg_qr"),
)
_FORMULAS = {n if "::" in n else f"aten::{n}": formula for formula, names in _TABLE for n in names.split()}

# Parts of names of aten's operators that multiply: none of these is free unless it has a formula above.
_MULTIPLIES = re.compile(
    r"(^|_)(\w*mm|\w*mv|\w*mm_\w+|\w*matmul|linear|conv|conv2d|conv3d|\w*convolution|attention|rnn|lstm|gru|linalg|"
    r"cholesky|lu|svd|qr|eigh?|solve|spsolve|ormqr|geqrf|fft|cdist|pdist|trilinear|combination|scaled_dot\w*)(_|$)"
)
# Such names that are free all the same: norms, what is left of a recurrent cell after its products, reordered weights.
_EXEMPT = re.compile(r"norm|powsum|cross|^_thnn_fused|flatten_weight|reorder|prepack|unpack|check_errors")
# Parts of names of operators that do their work element by element, move numbers or look at them.
_FREE = re.compile(
    r"(^|_)(foreach|fused_(adam|adamw|adagrad|sgd|moving_avg\w*|dropout|rms_norm\w*|lstm|gru|sdp_choice)|"
    r"\w*norm|\w*norm_\w+|powsum|cross|dist|\w*pool[123]?d?|unpool[123]d|pad[123]?d?|padded|nd|upsample\w*|grid|sampler|"
    r"\w*softmax|\w*loss\w*|\w*entropy\w*|activation|dropout\w*|"
    r"embedding|bag|index|indices|\w*scatter|gather|take|put|where|mask|masked|fill|select|slice|narrow|diagonal|diag|"
    r"cat|stack|split\w*|chunk|unbind|roll|flip|rot90|repeat|interleave|tril|triu|expand|permute|transpose|reshape|"
    r"view|squeeze|unsqueeze|t|swap\w*|copy|clone|contiguous|alias|detach|resize|set|lift|fresh|shuffle|unshuffle|"
    r"unfold|col2im|im2col|strided|nested|jagged|"
    r"sum|mean|median|nanmedian|nansum|prod|std|var|amax|amin|aminmax|max|min|argmax|argmin|mode|kthvalue|topk|sort|"
    r"all|any|cum\w*|cummax|cummin|logcumsumexp|logsumexp|count|nonzero|unique\w*|bincount|histc|\w*histogram\w*|trace|"
    r"bucketize|searchsorted|isin|equal|allclose|close|is|segment|reduce|"
    r"rand\w*|normal|bernoulli|binomial|multinomial|poisson|uniform|exponential|geometric|cauchy|gamma|dirichlet|philox|"
    r"empty|zeros?|ones|full|new|like|linspace|logspace|arange|complex|polar|scalar|"
    r"sparse|coalesced?|nnz|dim|compressed|dense|values|convert|to|quantize\w*|dequantize|quantized|int|q|fake|amp|"
    r"assert|functional|sym|pin|memory|record|stream|same|has|hash|make|fw|validate|lazy|cudnn_rnn_flatten_weight|"
    r"relu6?|leaky|gelu|elu|celu|glu|silu|mish|selu|prelu|rrelu|sigmoid|tanh|hardswish|hardsigmoid|hardtanh|\w*shrink|"
    r"softplus|threshold|add|addr|sub|rsub|mul|div|divide|floor|abs|eq|ne|lt|le|gt|ge|gcd|lcm|xlogy|heaviside|copysign|"
    r"irshift|ilshift|renorm|reflection|replication|affine|channel|rescale|ctc|unpack|pack|packed|prepack|weight|"
    r"clamp|elementwise|use|test|foobar|pointwise|roi|nms|broadcast\w*|bitwise|\w+shift|remainder|isnan|isinf|isfinite|conj|eye|range|\w*window|qscheme)(_|$)"
)
# Namespaces whose operators communicate, or are there for the machinery of PyTorch.
_MACHINERY = (
    "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d", "debug_mode_ops", "debugprims", "export",
    "inductor_prims", "prim", "profiler", "rngprims",
)  # fmt: skip
_KNOWN = ("aten", "prims", "quantized", "_quantized", "onednn", "mkldnn", "mkl", "torchvision")
_FREE_TAGS = (torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy)


@cache
def formula_of(operator: Any) -> Formula | None:
    """The products of an operator (an overload under ``torch.ops``), or None where this table has none."""
    name: str = operator._schema.name
    return _FORMULAS.get(name) or _FORMULAS.get(name.removesuffix("_"))


@cache
def is_free(operator: Any) -> bool:
    """Whether an operator is known to multiply no matrices: by its tags, as a view, or by its name."""
    space, name = operator._schema.name.split("::")
    if space in _MACHINERY:
        return True
    if space not in _KNOWN:
        return torch.Tag.pointwise in operator.tags
    if _EXEMPT.search(name):
        return True
    if _MULTIPLIES.search(name):
        return False
    return (
        space == "prims"
        or operator.is_view
        or any(tag in operator.tags for tag in _FREE_TAGS)
        or bool(_FREE.search(name))
    )
