"""Zeros that are not computed: sparse forms of Linear and Conv layers, chosen by measurement on this machine.

A layer with zeros in it costs what a dense one costs, until its weight is stored in a form that leaves them out:

======================  ============================================================================================
``SparseLinear``        compressed rows (CSR); wins from 80 to 90 % zeros anywhere in the matrix, by batches
``SparseConv2d``        the same on the patches of an image; wins where channels are many and maps small
``BlockSparseLinear``   the blocks that are not zero, as BSR or as one batched product; wins from half of the blocks
``Compact``             the rows and columns that are not zero, as a smaller dense layer
2:4                     half-precision weights with two zeros in every four, on CUDA only
======================  ============================================================================================

Which of them pays depends on sizes, batch and machine, so ``compile_sparse`` times each that fits against the dense
layer and keeps the fastest, the dense one included; its report says which and why.

The parts of every form are ordinary dense buffers, because a module that holds a sparse tensor can be neither copied
nor loaded.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from pliant.core import check
from pliant.core.cost import time_ratio
from pliant.core.inputs import Input, call, evaluating, removing
from pliant.core.masks import follows_pattern

BLOCKS = (32, 16, 8)
_ZERO_BLOCKS = 0.25  # below this share of zero blocks, rows or columns no form of them is tried


@functools.cache
def _hear_once() -> None:
    """Torch says once in a process, of the first sparse tensor, that these are in beta: said here, to no one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta", UserWarning)
        torch.sparse_csr_tensor(
            torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1), check_invariants=False
        )


class _Sparse(nn.Module):
    """A module that makes sparse tensors, whether it was built, copied or unpickled."""

    def __init__(self) -> None:
        super().__init__()
        _hear_once()

    def __setstate__(self, state: dict[str, Any]) -> None:
        _hear_once()
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class SparseLinear(_Sparse):
    """A linear layer whose weight (O, I) is stored by its non-zero entries only, in compressed rows (CSR).

    The product is W x^T: the CSR operand on the left is several times faster than on the right.
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        _store_rows(self, linear.weight)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y = _times(self, (self.out_features, self.in_features), x.reshape(-1, self.in_features).t())
        return y.t().reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nonzero={self.values.numel()}"


class SparseConv2d(_Sparse):
    """A convolution whose filters (O, I, h, w) are stored in compressed rows and multiply the patches of the image.

    For one group and padding with zeros; ``SparseConv2d.fits`` says whether a convolution is of this kind.
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not self.fits(conv):
            raise ValueError(f"conv: {conv} is not of one group with padding by zeros, given as numbers")
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding = cast(tuple[int, int], conv.padding)
        _store_rows(self, conv.weight.flatten(1))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether the convolution has one group, and padding by a number of zeros."""
        return (
            type(conv) is nn.Conv2d
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W'), or without B."""
        if x.dim() == 3:
            return cast(Tensor, self(x[None])[0])
        (ph, pw), (kh, kw), (sh, sw), (dh, dw) = self.padding, self.kernel_size, self.stride, self.dilation
        padded = torch.nn.functional.pad(x.transpose(0, 1), (pw, pw, ph, ph)).contiguous()  # (I, B, H, W)
        channels, rows, height, width = padded.shape
        out_h, out_w = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
        c, b, h, w = padded.stride()
        patches = padded.as_strided(  # (I, h, w, B, H', W'), laid out in memory by the reshape
            (channels, kh, kw, rows, out_h, out_w), (c, dh * h, dw * w, b, sh * h, sw * w)
        ).reshape(channels * kh * kw, -1)
        y = _times(self, (self.out_channels, channels * kh * kw), patches)
        return y.view(self.out_channels, rows, out_h, out_w).transpose(0, 1)

    def extra_repr(self) -> str:
        """The sizes."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, nonzero={self.values.numel()}"
        )


class BlockSparseLinear(_Sparse):
    """A linear layer whose weight (O, I) is stored by those ``block`` x ``block`` blocks that are not zero.

    Args:
        linear: the layer; both sizes must be multiples of ``block``.
        block: side of a block.
        product: "bsr" calls PyTorch's block-sparse product (8 x 8 blocks run well), "batched" multiplies all blocks in
            one batched product and adds them up by block row (32 x 32 blocks do).
    """

    blocks: Tensor
    row: Tensor
    crow: Tensor
    col: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, block: int, product: str = "bsr") -> None:
        super().__init__()
        if product not in ("bsr", "batched"):
            raise ValueError(f"product: {product!r}; allowed: 'bsr', 'batched'")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if block < 1 or self.in_features % block or self.out_features % block:
            raise ValueError(f"block: {block} does not divide the weight of {tuple(linear.weight.shape)}")
        self.block, self.product = block, product
        grid = _grid(linear.weight.detach(), block)  # (O / p, I / p, p, p)
        row, col = (grid != 0).flatten(2).any(2).nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(grid))
        self.register_buffer("blocks", grid[row, col].contiguous())
        self.register_buffer("row", row)
        self.register_buffer("crow", torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
        self.register_buffer("col", col)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        p, columns = self.block, x.reshape(-1, self.in_features).t()
        if self.product == "bsr":
            size = (self.out_features, self.in_features)
            weight = torch.sparse_bsr_tensor(self.crow, self.col, self.blocks, size, check_invariants=False)
            y = weight @ columns
        else:
            parts = torch.bmm(self.blocks, columns.reshape(self.in_features // p, p, -1)[self.col])
            y = parts.new_zeros(self.out_features // p, *parts.shape[1:]).index_add_(0, self.row, parts).flatten(0, 1)
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.t().reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}, "
            f"blocks={len(self.blocks)}, product={self.product!r}"
        )


class Compact(nn.Module):
    """A Linear or Conv2d layer without its zero rows and columns: a smaller dense layer between two selections.

    The outputs that have no weight are their bias. For convolutions of one group.
    """

    rows: Tensor
    columns: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"layer: {layer} has {layer.groups} groups; allowed: 1")
        used = layer.weight.detach() != 0
        rows = used.flatten(1).any(1).nonzero().flatten()
        columns = used.transpose(0, 1).flatten(1).any(1).nonzero().flatten()
        self.dim, self.size = (-1 if isinstance(layer, nn.Linear) else 1), len(layer.weight)
        weight = layer.weight.detach()[rows][:, columns].contiguous()
        self.layer = copy.deepcopy(layer)
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        self.layer.bias = None
        if isinstance(self.layer, nn.Linear):
            self.layer.out_features, self.layer.in_features = weight.shape
        else:
            self.layer.out_channels, self.layer.in_channels = weight.shape[:2]
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """What the layer took -> what it gave."""
        dim = self.dim if x.dim() != 3 or self.dim == -1 else 0  # an image without a batch
        whole = len(self.columns) == x.shape[dim]
        y = self.layer(x if whole else x.index_select(dim, self.columns))
        if len(self.rows) < self.size:
            shape = list(y.shape)
            shape[dim] = self.size
            y = y.new_zeros(shape).index_copy_(dim, self.rows, y)
        if self.bias is None:
            return cast(Tensor, y)
        return cast(Tensor, y + (self.bias if self.dim == -1 else self.bias[:, None, None]))


def _store_rows(module: nn.Module, weight: Tensor) -> None:
    kept = weight.detach()
    row, col = kept.nonzero(as_tuple=True)  # in the order of rows, then columns
    counts = torch.bincount(row, minlength=len(kept))
    module.register_buffer("values", kept[row, col])
    module.register_buffer("crow", torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32))
    module.register_buffer("col", col.to(torch.int32))


def _times(module: SparseLinear | SparseConv2d, size: tuple[int, int], columns: Tensor) -> Tensor:
    """W @ columns + b for the stored rows W."""
    weight = torch.sparse_csr_tensor(module.crow, module.col, module.values, size, check_invariants=False)
    return weight @ columns if module.bias is None else torch.addmm(module.bias[:, None], weight, columns)


def _grid(weight: Tensor, block: int) -> Tensor:
    """(O, I) -> (O / p, I / p, p, p)."""
    out, inp = weight.shape
    return weight.view(out // block, block, inp // block, block).transpose(1, 2)


# -- choosing -------------------------------------------------------------------------------------------------------


def compile_sparse(
    model: nn.Module, min_sparsity: float = 0.85, example: Input | None = None, repeats: int = 9
) -> dict[str, str]:
    """Store the layers that gain from it sparsely, in place; for each Conv and Linear layer, what and why.

    A layer is timed in every form that fits its zeros against its dense form on this machine, on inputs of the shape
    that ``example`` brings to it (64 rows for a linear layer without one), and the fastest stays. Compressed rows are
    tried from a share of zeros of ``min_sparsity`` on; blocks, rows and columns where a quarter of them is zero.

    Raises:
        ValueError: ``min_sparsity`` is outside [0, 1].
    """
    check.share("min_sparsity", min_sparsity)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)}
    shapes = {} if example is None else _input_shapes(model, layers, example)
    report = {}
    with evaluating(model), torch.no_grad():
        for name, layer in layers.items():
            zeros = layer.weight.numel() - int(torch.count_nonzero(layer.weight))
            share = zeros / max(1, layer.weight.numel())
            plain = type(layer) in (nn.Linear, nn.Conv2d) and not parametrize.is_parametrized(layer)
            shape = shapes.get(name)
            if shape is None and isinstance(layer, nn.Linear):
                shape = torch.Size((64, layer.in_features))
            if not plain or not name:
                report[name] = "dense: only a plain nn.Linear or nn.Conv2d inside a larger model can be exchanged"
            elif shape is None:
                report[name] = f"dense: {share:.1%} zeros, and no example told the shape of its input"
            else:
                forms = _forms(cast("nn.Linear | nn.Conv2d", layer), share, min_sparsity)
                report[name] = _exchange(model, name, layer, shape, share, min_sparsity, forms, repeats)
    return report


def _forms(layer: nn.Linear | nn.Conv2d, share: float, min_sparsity: float) -> dict[str, Callable[[], nn.Module]]:
    """The forms that fit the layer's zeros, by name."""
    found: dict[str, Callable[[], nn.Module]] = {}
    weight = layer.weight.detach()
    used = weight != 0
    if share == 0.0 or share == 1.0:
        return found
    rows = float(used.flatten(1).any(1).float().mean())
    columns = float(used.transpose(0, 1).flatten(1).any(1).float().mean())
    if rows * columns <= 1 - _ZERO_BLOCKS and not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
        found["rows and columns"] = lambda: Compact(layer)
    if isinstance(layer, nn.Conv2d):
        if share >= min_sparsity and SparseConv2d.fits(layer):
            found["csr"] = lambda: SparseConv2d(layer)
        return found
    if weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16) and follows_pattern(weight, 2, 4):
        found["2:4"] = lambda: _semi_structured(layer)
    for block in BLOCKS:
        if any(size % block for size in weight.shape):
            continue
        if float((~_grid(used, block).flatten(2).any(2)).float().mean()) >= _ZERO_BLOCKS:
            for product in ("bsr", "batched"):
                found[f"{product} {block}x{block}"] = lambda b=block, p=product: BlockSparseLinear(layer, b, p)  # type: ignore[misc]
    if share >= min_sparsity:
        found["csr"] = lambda: SparseLinear(layer)
    return found


def _exchange(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    shape: torch.Size,
    share: float,
    min_sparsity: float,
    forms: Mapping[str, Callable[[], nn.Module]],
    repeats: int,
) -> str:
    weight = cast(Tensor, layer.weight)
    if not forms:
        return f"dense: {share:.1%} zeros, below min_sparsity={min_sparsity:g} and in no blocks, rows or columns"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    best, tried = ("dense", 1.0, layer), []
    for kind, make in forms.items():
        try:
            sparse = make().train(layer.training)
            ratio = time_ratio(lambda s=sparse: s(x), lambda: layer(x), repeats=repeats).median  # type: ignore[misc]
        except RuntimeError as error:
            tried.append(f"{kind} failed ({str(error).splitlines()[0]})")
            continue
        tried.append(f"{kind} {ratio:.2f}")
        if ratio < best[1]:
            best = (kind, ratio, sparse)
    kind, ratio, chosen = best
    if kind == "dense":
        return f"dense: {share:.1%} zeros; of the dense time on {tuple(shape)}: {', '.join(tried)}"
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, chosen)
    others = f" ({', '.join(t for t in tried if not t.startswith(kind))})" if len(tried) > 1 else ""
    return f"{kind}: {share:.1%} zeros, {ratio:.2f} of the dense time on {tuple(shape)}{others}"


def _semi_structured(layer: nn.Linear) -> nn.Module:
    sparse = copy.deepcopy(layer)
    weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
    sparse.weight = nn.Parameter(weight, requires_grad=False)
    return sparse


def _input_shapes(model: nn.Module, layers: Mapping[str, nn.Module], example: Input) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    hooks = []
    for name, layer in layers.items():

        def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if args:
                shapes[name] = args[0].shape

        hooks.append(layer.register_forward_pre_hook(note))
    with removing(hooks), evaluating(model), torch.no_grad():
        call(model, example)
    return shapes
