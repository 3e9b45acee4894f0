"""Which weights exist: masks with an exact count, how many weights each layer gives up, and networks without them.

*Sparsity is over the weights of the Conv and Linear layers that were selected*, never over biases, norms or embeddings.

A masked weight is a parametrisation, ``weight = where(mask, original, 0)``: the gradient of a masked entry is exactly
zero, and whatever weight decay or momentum do to ``original`` there, the weight that the network uses stays zero.
``original`` is the very ``nn.Parameter`` that was there before, so an optimiser built earlier or later sees the same
object.

The four allocators answer "how many of its smallest weights does each layer lose", T in all:

====================  ==============================================================================================
``uniform``           the same share everywhere
``erdos_renyi``       density of a layer in proportion to sum(shape) / prod(shape), at most 1 (ERK)
``global_magnitude``  the T smallest |w| of all layers together
``lamp``              the T smallest w_u^2 / sum over v >= u of w_v^2, where a layer's weights are sorted by magnitude
====================  ==============================================================================================
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from pliant.core.cost import time_ratio
from pliant.core.inputs import Input, call, evaluating, removing, rows_of

# -- which weights can go -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weight:
    """One prunable tensor: the layer's name, its parameter, and every (module, attribute) that holds it (tied ones)."""

    name: str
    parameter: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def mask(self) -> Mask | None:
        """The parametrisation that masks this weight; None before ``attach``."""
        module, attribute = self.owners[0]
        if not parametrize.is_parametrized(module, attribute):
            return None
        last = cast(Any, module.parametrizations)[attribute][-1]
        return last if isinstance(last, Mask) else None

    @property
    def kept(self) -> Tensor | None:
        """The boolean mask, true where the weight exists; None before ``attach``."""
        return None if (mask := self.mask) is None else mask.mask

    def value(self) -> Tensor:
        """The weight that the network uses, detached: zero where it is masked."""
        module, attribute = self.owners[0]
        value: Tensor = getattr(module, attribute)
        return value.detach()


def prunable(model: nn.Module, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()) -> list[Weight]:
    """The weights of all convolutions and linear layers whose layer name matches, in the model's order, tied ones once.

    A weight that several layers share is taken if one of their names matches ``include`` and none ``exclude``; it is
    then masked wherever it is used, in an embedding too.

    Raises:
        ValueError: a pattern matches no layer, or no layer is left.
    """
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    named: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for layer, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            holders.setdefault(id(parameter), []).append((module, attribute))
            if attribute == "weight" and isinstance(module, _ConvNd | nn.Linear):
                if isinstance(parameter, nn.parameter.UninitializedParameter):
                    raise ValueError(f"model: the lazy layer {layer!r} has no weight yet; run the model once first")
                named.setdefault(id(parameter), []).append(layer)
                parameters[id(parameter)] = parameter
    every = [name for names in named.values() for name in names]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if every and not any(fnmatchcase(name, pattern) for name in every):
                raise ValueError(f"{argument}: {pattern!r} matches no Conv or Linear layer; there are: {_some(every)}")
    found = [
        Weight(names[0], parameters[key], tuple(holders[key]))
        for key, names in named.items()
        if any(fnmatchcase(n, p) for n in names for p in include)
        and not any(fnmatchcase(n, p) for n in names for p in exclude)
    ]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no prunable layer (Conv or Linear with a plain weight)"
            + (f" that include={list(include)} and exclude={list(exclude)} leave" if every else "")
        )
    return found


def _patterns(argument: str, patterns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise TypeError(f"{argument}: expected a sequence of name patterns, got the string {patterns!r}")
    return tuple(patterns)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:12])) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")


def multiply_adds(model: nn.Module, weights: Sequence[Weight], example: Input) -> list[int]:
    """How often each entry of each weight is used for one sample of ``example``: H_out * W_out for a convolution.

    Times the number of non-zero entries these are the multiply-adds of a layer. 0: the forward never calls the layer.
    """
    counts = [0] * len(weights)
    where = {id(module): i for i, w in enumerate(weights) for module, _ in w.owners}

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, _ConvTransposeNd):
            used = args[0].numel() // module.in_channels
        elif isinstance(module, _ConvNd):
            used = output.numel() // module.out_channels
        else:
            used = output.numel() // output.shape[-1]
        counts[where[id(module)]] += used

    layers = [m for w in weights for m, _ in w.owners if isinstance(m, _ConvNd | nn.Linear)]
    with removing(m.register_forward_hook(count) for m in layers), evaluating(model), torch.no_grad():
        call(model, example)
    rows = rows_of(example)
    return [max(1, round(c / rows)) if c else 0 for c in counts]


# -- the mask -------------------------------------------------------------------------------------------------------


class Mask(nn.Module):
    """``where(mask, weight, 0)`` as a parametrisation. The mask is a buffer, so it is saved with the network."""

    mask: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like, dtype=torch.bool, requires_grad=False))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its masked entries zero. ``where``, not a product: -3 * 0 is -0, and infinity * 0 is NaN."""
        return torch.where(self.mask, weight, weight.new_zeros(()))


def attach(weight: Weight) -> Mask:
    """Mask ``weight`` wherever it is used, all entries kept so far; the same mask again where there is one."""
    if (mask := weight.mask) is not None:
        return mask
    mask = Mask(weight.parameter)
    for module, attribute in weight.owners:
        parametrize.register_parametrization(module, attribute, mask)
    return mask


@torch.no_grad()
def set_mask(weight: Weight, kept: Tensor) -> None:
    """Keep the entries where ``kept`` is true. The others become zero in the parameter as well, not only in its use."""
    attach(weight).mask.copy_(kept)
    weight.parameter.masked_fill_(~kept, 0.0)


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Make the zeros permanent: every mask is removed, its weight becomes a plain parameter. In place.

    ``parametrize.remove_parametrizations`` would take the attribute from the module's class, which a module shares with
    its deep copies: the network that the copy was made from would lose its weight. Here the class is left alone.
    """
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        chains = cast(nn.ModuleDict, module.parametrizations)
        for attribute, chain in list(chains.items()):
            if not all(isinstance(m, Mask) for m in cast(nn.ModuleList, chain)):
                continue
            original = cast(nn.Parameter, chain.original)
            original.copy_(getattr(module, attribute))
            del chains[attribute]
            masked = type(module)
            if len(chains):  # a parametrisation of the user's own stays
                rest = {k: v for k, v in vars(masked).items() if k not in (attribute, "__dict__", "__weakref__")}
                module.__class__ = type(masked.__name__, masked.__bases__, rest)
            else:
                del module.parametrizations
                module.__class__ = masked.__bases__[0]
            module.register_parameter(attribute, original)
    return model


def magnitude_order(weight: Tensor, kept: Tensor | None = None) -> Tensor:
    """Flat indices (N,) in the order in which the entries go: masked ones first, then by |w|, ties by flat index."""
    size = weight.detach().abs().flatten()
    if kept is not None:
        size = size.masked_fill(~kept.flatten(), -1.0)
    return torch.argsort(size, stable=True)


def magnitude_mask(weight: Tensor, zeros: int, kept: Tensor | None = None) -> Tensor:
    """The boolean mask of ``weight``'s shape without its ``zeros`` smallest entries: exactly that many are false.

    Masks of one tensor nest: more zeros contain fewer. With ``kept``, what is masked already stays masked.

    Raises:
        ValueError: ``zeros`` is negative, or more than the tensor has.
    """
    if not 0 <= zeros <= weight.numel():
        raise ValueError(f"zeros: {zeros} of a tensor with {weight.numel()} entries; allowed: 0..{weight.numel()}")
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[magnitude_order(weight, kept)[:zeros]] = False
    return mask.view(weight.shape)


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor of N entries as ceil(N / 8) bytes."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat * flat.new_tensor(_BITS)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The boolean tensor that ``pack_bits`` packed."""
    flat = (bits[:, None] & bits.new_tensor(_BITS)) != 0
    return flat.flatten()[: math.prod(shape)].view(shape)


# -- counting -------------------------------------------------------------------------------------------------------


def target_count(sparsity: float, total: int) -> int:
    """The smallest number of zeros among ``total`` that is a share of ``sparsity`` at least.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity: {sparsity} is not in [0, 1)")
    return math.ceil(round(sparsity * total, 6))  # 0.07 * 100 is 7.000000000000001: not one more weight for that


def count_zeros(tensors: Iterable[Tensor]) -> int:
    """Zeros of all tensors together."""
    return sum(t.numel() - int(torch.count_nonzero(t)) for t in tensors)


def sparsity_of(model: nn.Module, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()) -> float:
    """Share of zeros among the Conv and Linear weights of a plain network."""
    weights = [w.parameter for w in prunable(model, include, exclude)]
    return count_zeros(weights) / sum(w.numel() for w in weights)


# -- how many weights each layer loses ------------------------------------------------------------------------------

Masks = Sequence[Tensor | None]
Allocator = Callable[[Sequence[Tensor], int, "Masks | None"], list[int]]


def uniform(weights: Sequence[Tensor], target: int, kept: Masks | None = None) -> list[int]:
    """The same share of every layer, ``target`` zeros in all (the rest of the division to the largest remainders)."""
    _check_target(weights, target)
    total = sum(w.numel() for w in weights)
    return _apportion([target * w.numel() / total for w in weights], weights, target, kept)


def erdos_renyi(weights: Sequence[Tensor], target: int, kept: Masks | None = None) -> list[int]:
    """Erdős–Rényi-kernel: density_l = eps * sum(shape_l) / prod(shape_l), at most 1, with eps to meet ``target``."""
    _check_target(weights, target)
    sizes = [w.numel() for w in weights]
    raw = [sum(w.shape) / w.numel() for w in weights]
    free = set(range(len(weights)))
    eps = 0.0
    while free:
        room = sum(sizes) - target - sum(n for i, n in enumerate(sizes) if i not in free)
        eps = room / sum(raw[i] * sizes[i] for i in free)
        full = {i for i in free if eps * raw[i] > 1.0}
        if not full:
            break
        free -= full
    ideal = [n * (1.0 - eps * r) if i in free else 0.0 for i, (n, r) in enumerate(zip(sizes, raw, strict=True))]
    return _apportion(ideal, weights, target, kept)


def global_magnitude(weights: Sequence[Tensor], target: int, kept: Masks | None = None) -> list[int]:
    """What each layer has among the ``target`` smallest |w| of all layers."""
    _check_target(weights, target)
    return _smallest([w.detach().abs().flatten().double() for w in weights], target, kept)


def lamp(weights: Sequence[Tensor], target: int, kept: Masks | None = None) -> list[int]:
    """What each layer has among the ``target`` smallest scores w_u^2 / sum_{v >= u} w_v^2, u in order of magnitude."""
    _check_target(weights, target)
    scores = []
    for w in weights:
        square = w.detach().flatten().double().square()
        order = torch.argsort(square, stable=True)
        ascending = square[order]
        tail = ascending.flip(0).cumsum(0).flip(0)
        score = torch.empty_like(square)
        score[order] = torch.where(tail > 0, ascending / tail, 0.0)
        scores.append(score)
    return _smallest(scores, target, kept)


ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform,
    "erk": erdos_renyi,
    "global": global_magnitude,
    "lamp": lamp,
}


def _check_target(weights: Sequence[Tensor], target: int) -> None:
    total = sum(w.numel() for w in weights)
    if not 0 <= target <= total:
        raise ValueError(f"target: {target} zeros of {total} weights; allowed: 0..{total}")


def _smallest(scores: Sequence[Tensor], target: int, kept: Masks | None) -> list[int]:
    """How many of the ``target`` smallest scores stand in each tensor; masked entries come first, ties by position."""
    if kept is not None:
        scores = [s if k is None else s.masked_fill(~k.flatten(), -1.0) for s, k in zip(scores, kept, strict=True)]
    layer = torch.cat([torch.full_like(s, i, dtype=torch.long) for i, s in enumerate(scores)])
    chosen = layer[torch.argsort(torch.cat(list(scores)), stable=True)[:target]]
    return torch.bincount(chosen, minlength=len(scores)).tolist()


def _apportion(ideal: Sequence[float], weights: Sequence[Tensor], target: int, kept: Masks | None) -> list[int]:
    """Whole numbers near ``ideal`` whose sum is ``target``, never below what is masked already."""
    most = [w.numel() for w in weights]
    least = [0] * len(weights) if kept is None else [0 if k is None else int((~k).sum()) for k in kept]
    if sum(least) > target:
        raise ValueError(f"target: {target} zeros, but {sum(least)} weights are masked already; masks only grow")
    found = [min(max(int(x), low), high) for x, low, high in zip(ideal, least, most, strict=True)]
    while (left := target - sum(found)) != 0:
        step = 1 if left > 0 else -1
        able = [i for i in range(len(found)) if (found[i] < most[i] if left > 0 else found[i] > least[i])]
        best = max(able, key=lambda i: (step * (ideal[i] - found[i]), -i))
        found[best] += step
    return found


# -- real sparse storage --------------------------------------------------------------------------------------------


class SparseLinear(nn.Module):
    """A linear layer whose weight (O, I) is stored by its non-zero entries only, in compressed rows (CSR).

    The three parts are ordinary dense buffers, because a module that holds a CSR tensor can be neither copied nor
    loaded. The product is W x^T: the CSR operand on the left is several times faster than on the right.
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to_sparse_csr()
        self.register_buffer("values", weight.values().clone())
        self.register_buffer("crow", weight.crow_indices().to(torch.int32))
        self.register_buffer("col", weight.col_indices().to(torch.int32))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        size = (self.out_features, self.in_features)
        weight = torch.sparse_csr_tensor(self.crow, self.col, self.values, size, check_invariants=False)
        columns = x.reshape(-1, self.in_features).t()
        if self.bias is None:
            y = weight @ columns
        else:
            y = torch.addmm(self.bias[:, None], weight, columns)
        return y.t().reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nonzero={self.values.numel()}"


def compile_sparse(
    model: nn.Module, min_sparsity: float = 0.85, example: Input | None = None, repeats: int = 9
) -> dict[str, str]:
    """Store the linear layers that gain from it sparsely, in place; for each Conv and Linear layer, what and why.

    A linear layer with a share of zeros of ``min_sparsity`` at least is timed against its sparse form on this machine,
    on inputs of the shape that ``example`` brings to it (64 rows without one), and the faster one stays. On a GPU a
    half-precision weight that happens to have two zeros in every four entries becomes semi-structured. Convolutions
    stay dense: PyTorch has no sparse kernel for them.

    Raises:
        ValueError: ``min_sparsity`` is outside [0, 1].
    """
    if not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity: {min_sparsity} is not in [0, 1]")
    shapes: dict[str, torch.Size] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)}
    if example is not None:
        shapes = _input_shapes(model, layers, example)
    report = {}
    with evaluating(model), torch.no_grad():
        for name, layer in layers.items():
            share = count_zeros([layer.weight]) / layer.weight.numel()
            if not isinstance(layer, nn.Linear):
                report[name] = f"dense: {share:.1%} zeros, but there is no sparse convolution"
            elif share < min_sparsity:
                report[name] = f"dense: {share:.1%} zeros, below min_sparsity={min_sparsity:g}"
            elif type(layer) is not nn.Linear or parametrize.is_parametrized(layer) or not name:
                report[name] = "dense: only a plain nn.Linear inside a larger model can be exchanged"
            else:
                shape = shapes.get(name, torch.Size((64, layer.in_features)))
                report[name] = _exchange(model, name, layer, shape, share, repeats)
    return report


def _exchange(model: nn.Module, name: str, layer: nn.Linear, shape: torch.Size, share: float, repeats: int) -> str:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight.device, layer.weight.dtype)
    half = layer.weight.dtype in (torch.float16, torch.bfloat16)
    if layer.weight.is_cuda and half and _two_of_four(layer.weight):
        sparse: nn.Module = copy.deepcopy(layer)
        weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        cast(nn.Linear, sparse).weight = nn.Parameter(weight, requires_grad=False)
        kind = "2:4"
    else:
        sparse, kind = SparseLinear(layer), "csr"
    sparse.train(layer.training)
    try:
        ratio = time_ratio(lambda: sparse(x), lambda: layer(x), repeats=repeats).median
    except RuntimeError as error:
        return f"dense: {share:.1%} zeros, but the {kind} product failed ({str(error).splitlines()[0]})"
    if ratio >= 1.0:
        return f"dense: {share:.1%} zeros, but {kind} takes {ratio:.2f} of the dense time on {tuple(shape)}"
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, sparse)
    return f"{kind}: {share:.1%} zeros, {ratio:.2f} of the dense time on {tuple(shape)}"


def _two_of_four(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool(((weight != 0).view(len(weight), -1, 4).sum(-1) <= 2).all())


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
