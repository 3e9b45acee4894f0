"""Which weights exist: masks with an exact count, how many weights each layer gives up, and networks without them.

*Sparsity is over the weights that were selected*: those of the Conv and Linear layers, and, where an example tells
which there are, every other matrix of the network (``matrices.matrices``: stacked experts, recurrent weights, the
projections of an attention, parameters of one's own). Never over biases, norms or embeddings. ``Coverage`` says what
share of the network that is.

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

The scores say which weight goes first, for a matrix W (O, I) with the inputs A (n, I) that it multiplies:

====================  ==============================================================================================
``magnitude``         |W[r, k]|
``wanda``             |W[r, k]| * ||A[:, k]||                               (Wanda, arXiv 2306.11695, equation 1)
``sparsegpt``         W[r, k]^2 / U[k, k]^2, U the upper Cholesky factor of the inverse of H + damp * mean(diag H) * I,
                      H = (2 / n) A^T A, the mean over the inputs that are ever used (SparseGPT, arXiv 2301.00774)
====================  ==============================================================================================

``sparsegpt`` is the whole of SparseGPT, which prunes from the first input to the last and lets the later weights of a
row make up for what each one takes away. ``layer_mask``, ``row_mask``, ``group_mask`` (N:M) and ``global_masks`` turn
scores into masks with an exact count.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from pliant.core import check
from pliant.core.inputs import Input, call, evaluating, first_tensor, removing, rows_of
from pliant.core.matrices import Bank, Matrix, matrices

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


def prunable(
    model: nn.Module, include: Iterable[str] = ("*",), exclude: Iterable[str] = (), example: Input | None = None
) -> list[Weight]:
    """The weights of all convolutions and linear layers whose layer name matches, in the model's order, tied ones once.

    With an ``example``, which is run once, every other matrix of the network is among them. Its name is the layer's,
    followed by the parameter's where that is not ``weight``: ``lstm.weight_hh_l0``.

    A weight that several layers share is taken if one of their names matches ``include`` and none ``exclude``; it is
    then masked wherever it is used, in an embedding too.

    Raises:
        ValueError: a pattern matches no layer, or no layer is left.
    """
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    found_matrices = {} if example is None else {id(m.parameter): m for m in matrices(model, example)}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    named: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for layer, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            holders.setdefault(id(parameter), []).append((module, attribute))
            m = found_matrices.get(id(parameter))
            if attribute == "weight" and isinstance(module, _ConvNd | nn.Linear):
                if isinstance(parameter, nn.parameter.UninitializedParameter):
                    raise ValueError(f"model: the lazy layer {layer!r} has no weight yet; run the model once first")
                named.setdefault(id(parameter), []).append(layer)
                parameters[id(parameter)] = parameter
            elif m is not None and m.module is module and m.attribute == attribute:
                named.setdefault(id(parameter), []).append(m.name)
                parameters[id(parameter)] = parameter
    every = [name for names in named.values() for name in names]
    check_patterns(
        every, include, exclude, "matches no Conv or Linear layer" if example is None else "matches no layer"
    )
    found = [
        Weight(names[0], parameters[key], tuple(holders[key]))
        for key, names in named.items()
        if any(chosen(n, include) for n in names) and not any(chosen(n, exclude) for n in names)
    ]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no prunable layer (Conv or Linear with a plain weight)"
            + (f" that include={list(include)} and exclude={list(exclude)} leave" if every else "")
        )
    return found


def chosen(name: str, include: Iterable[str], exclude: Iterable[str] = ()) -> bool:
    """Whether a layer's name matches one of the patterns ``include`` and none of ``exclude``."""
    return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)


def check_patterns(names: Sequence[str], include: Iterable[str], exclude: Iterable[str], none: str) -> None:
    """Every pattern matches one of ``names`` at least, if there are any.

    Raises:
        ValueError: one does not; the message is the argument, the pattern and ``none``.
    """
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if names and not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{argument}: {pattern!r} {none}; there are: {_some(names)}")


def _patterns(argument: str, patterns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise TypeError(f"{argument}: expected a sequence of name patterns, got the string {patterns!r}")
    return tuple(patterns)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:12])) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")


def multiply_adds(model: nn.Module, weights: Sequence[Weight], example: Input) -> list[int]:
    """How often each entry of each weight is used for one sample of ``example``: H_out * W_out for a convolution.

    Times the number of non-zero entries these are the multiply-adds of a layer. For stacked experts it is the mean over
    the experts. 0: the forward never uses the weight. To be asked before masks are attached.
    """
    counts = [0.0] * len(weights)
    where = {id(module): i for i, w in enumerate(weights) for module, _ in w.owners}

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, _ConvTransposeNd):
            used = args[0].numel() // module.in_channels
        elif isinstance(module, _ConvNd):
            used = output.numel() // module.out_channels
        else:
            y = first_tensor(output)  # a subclass of nn.Linear may answer with more
            used = y.numel() // y.shape[-1]
        counts[where[id(module)]] += used

    def count_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bank = cast(Bank, Bank.of(module))
        for attribute in (*bank.reads, bank.down):
            stacked[id(module), attribute] += bank.tokens(args, kwargs)[1].numel() / bank.count

    layers = [m for w in weights for m, _ in w.owners if isinstance(m, _ConvNd | nn.Linear)]
    others = [(i, m, a) for i, w in enumerate(weights) for m, a in w.owners if not isinstance(m, _ConvNd | nn.Linear)]
    banks = {id(m): m for _, m, _ in others if Bank.of(m) is not None}
    stacked: dict[tuple[int, str], float] = defaultdict(float)
    hooks = [m.register_forward_hook(count) for m in layers]
    hooks += [m.register_forward_pre_hook(count_experts, with_kwargs=True) for m in banks.values()]
    with removing(hooks), evaluating(model), torch.no_grad():
        call(model, example)
    for i, module, attribute in others:
        counts[i] += stacked[id(module), attribute]
    if not all(counts):  # layers that are read and never called, and parameters that are no layer's
        factors = {id(m.parameter): m.multiply_adds for m in matrices(model, example)}
        counts = [c or factors.get(id(w.parameter), 0.0) for c, w in zip(counts, weights, strict=True)]
    rows = rows_of(example)
    return [max(1, round(c / rows)) if c else 0 for c in counts]


# -- what share of the network that is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """How much of a network a method prunes, in numbers of weights.

    ``pruned`` is over what the method can prune, ``matrices`` over all that multiply activations, ``parameters`` over
    the whole network. ``left_out`` says of every matrix that is not pruned, by name, why not; ``refused`` are those
    among them that the method cannot serve, though no argument excludes them.
    """

    pruned: int
    matrices: int
    parameters: int
    left_out: dict[str, str]
    refused: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The pruned weights as a share of all matrices."""
        return self.pruned / self.matrices

    @property
    def of_all(self) -> float:
        """The pruned weights as a share of all parameters: a sparsity s there is s times this share of the whole."""
        return self.pruned / self.parameters

    def __str__(self) -> str:
        """One line, and one for each matrix that is left out."""
        lines = [
            f"{self.pruned:,} weights are pruned: {self.share:.1%} of the network's matrices, {self.of_all:.1%} of its "
            f"{self.parameters:,} parameters"
        ]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.left_out.items()])


def coverage(
    model: nn.Module,
    every: Sequence[Matrix],
    pruned: Iterable[nn.Parameter],
    why: Callable[[str, Matrix | None], tuple[str, bool]],
) -> Coverage:
    """The coverage of ``model`` with the matrices ``every`` by a method that prunes ``pruned``.

    ``why`` tells of a matrix that is not pruned, by its name, the reason, and whether the method refuses it. A layer
    whose weight is under a parametrisation has no matrix (None); it counts with the weights that come out of it.
    """
    inside = {id(p) for p in pruned}
    reasons = {m.name: why(m.name, m) for m in every if id(m.parameter) not in inside}
    total = sum(m.parameter.numel() for m in every)
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and parametrize.is_parametrized(module, "weight"):
            total += module.weight.numel()
            reasons[name] = why(name, None)
    refused = tuple(name for name, (_, cannot) in reasons.items() if cannot)
    size = sum(m.parameter.numel() for m in every if id(m.parameter) in inside)
    whole = sum(p.numel() for p in model.parameters())
    return Coverage(size, total, whole, {name: reason for name, (reason, _) in reasons.items()}, refused)


def warn_refused(found: Coverage, stacklevel: int) -> None:
    """Say which matrices the method cannot prune, if there are any, and what share that leaves."""
    if found.refused:
        shown = "; ".join(f"{name!r} ({found.left_out[name]})" for name in found.refused[:6])
        more = f"; and {len(found.refused) - 6} more" if len(found.refused) > 6 else ""
        warnings.warn(
            f"model: {found.share:.1%} of its matrix weights are pruned, which are {found.of_all:.1%} of all its "
            f"parameters. Left out: {shown}{more}. See .coverage; exclude them by name to leave them out on purpose",
            stacklevel=stacklevel + 1,
        )


@torch.no_grad()
def zeros_share(model: nn.Module) -> float:
    """Share of zeros among all parameters of a network as it stands, masked ones as they are used, tied ones once."""
    values: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for attribute, chain in cast(nn.ModuleDict, module.parametrizations).items():
                if all(isinstance(m, Mask) for m in cast(nn.ModuleList, chain)):
                    values[id(chain.original)] = getattr(module, attribute)
    return count_zeros(values.values()) / sum(v.numel() for v in values.values())


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
        if isinstance(module, nn.RNNBase) and _let_go not in module._forward_hooks.values():
            module.register_forward_hook(_let_go, always_call=True)
    return mask


@torch.no_grad()
def _let_go(module: nn.Module, args: Any, output: Any) -> None:
    """Recurrent layers keep a list of the weights of their last run; a masked one in it could not be copied."""
    module._flat_weights = [w.detach() for w in cast(Any, module)._flat_weights]  # type: ignore[assignment]


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
            if isinstance(module, nn.RNNBase):
                for key, hook in list(module._forward_hooks.items()):
                    if hook is _let_go:
                        del module._forward_hooks[key], module._forward_hooks_always_called[key]
                module._init_flat_weights()
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


# -- scores and the budgets that they are spent in ------------------------------------------------------------------


def magnitude_score(weight: Tensor) -> Tensor:
    """|W|, in float32 or better."""
    return _exact(weight).abs()


def wanda_score(weight: Tensor, norm: Tensor) -> Tensor:
    """|W[r, k]| * norm[k] for a weight (O, I) and the L2 norms (I,) of its input channels; or (E, O, I) and (E, I)."""
    wanted = (*weight.shape[:-2], weight.shape[-1])
    if norm.shape != wanted:
        raise ValueError(f"norm: its shape is {tuple(norm.shape)}; allowed: {wanted}, one for each input")
    return _exact(weight).abs() * norm.to(weight.device)[..., None, :]


def sparsegpt_score(weight: Tensor, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """W[r, k]^2 / U[k, k]^2 for a weight (O, I) and H (I, I), in float64; or (E, O, I) and (E, I, I).

    An input that was always zero has H[k, k] = 0; its weights do nothing and go first.
    """
    upper, dead = _factor(weight, hessian, damp)
    score = weight.detach().double().square() / upper.diagonal(dim1=-2, dim2=-1).square()[..., None, :]
    found: Tensor = score.masked_fill(dead[..., None, :], 0.0)
    return found


def _factor(weight: Tensor, hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """U, and which inputs are never used. These count nowhere: not in the mean, whose scale is that of the data."""
    size = weight.shape[-1]
    wanted = (*weight.shape[:-2], size, size)
    if hessian.shape != wanted:
        raise ValueError(f"hessian: its shape is {tuple(hessian.shape)}; allowed: {wanted}")
    check.positive("damp", damp)
    h = hessian.double().to(weight.device).clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(mean > 0, mean, 1.0)
    diagonal.copy_(torch.where(dead, mean, diagonal) + damp * mean)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True), dead


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    budget: float | tuple[int, int],
    *,
    damp: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """SparseGPT: which weights stay, and what becomes of them. For (O, I) and H (I, I), in float64.

    From input to input, with U and the scores as in ``sparsegpt_score``::

        err_r = w_rk / U[k, k]  where w_rk goes, else 0         w_r,j -= err_r U[k, j]  for j > k

    Who goes is decided at the start of each ``block`` of inputs, by the weights as they are then: for a sparsity s the
    int(O B s) + 1 lowest scores of the block's B inputs (as in the reference: all that are not above the score in that
    place), so rows may differ in their numbers. For N:M the M - N lowest of each row and M inputs, once these are
    reached.

    Args:
        weight: W (O, I).
        hessian: H (I, I).
        budget: the share of zeros, or (N, M).
        damp: see above.
        block: the reference's 128; of a pattern the multiple of M that is next below.

    Returns:
        The mask (O, I), the value of every weight when its turn came (of a kept weight that is the final one, of a
        pruned one the last before it went), and the scores by these values.
    """
    upper, dead = _factor(weight, hessian, damp)
    pattern = budget if isinstance(budget, tuple) else None
    if pattern is not None:
        _check_pattern(*pattern)
        block = max(1, block // pattern[1]) * pattern[1]
        if weight.shape[1] % pattern[1]:
            raise ValueError(f"budget: {pattern[0]}:{pattern[1]} does not fit {weight.shape[1]} inputs")
    elif not 0.0 <= cast(float, budget) < 1.0:
        raise ValueError(f"budget: {budget}; allowed: a share in [0, 1), or (N, M)")
    w = weight.detach().double().masked_fill(dead, 0.0)
    kept = torch.ones_like(w, dtype=torch.bool)
    unit = upper.diagonal()
    for first in range(0, w.shape[1], block):
        part = slice(first, first + block)
        columns, u, errors = w[:, part].clone(), upper[part, part], torch.zeros_like(w[:, part])
        if pattern is None:
            score = (columns / unit[part]).square()
            ordered = score.flatten().sort().values
            kept[:, part] = score > ordered[int(round(score.numel() * cast(float, budget), 6))]
        for i in range(columns.shape[1]):
            if pattern is not None and i % pattern[1] == 0:
                group = slice(first + i, first + i + pattern[1])
                score = (columns[:, i : i + pattern[1]] / unit[group]).square()
                kept[:, group] = _without(score, pattern[1] - pattern[0], "budget")
            errors[:, i] = torch.where(kept[:, first + i], 0.0, columns[:, i] / u[i, i])
            columns[:, i + 1 :] -= errors[:, i : i + 1] * u[i, i + 1 :]
        w[:, part] = columns
        w[:, first + block :] -= errors @ upper[part, first + block :]
    return kept, w, (w / unit).square()


def _exact(weight: Tensor) -> Tensor:
    return weight.detach() if weight.dtype is torch.float64 else weight.detach().float()


def _without(score: Tensor, zeros: int, name: str) -> Tensor:
    """The kept mask of (R, N) scores without the ``zeros`` smallest of every row; among equals the first go."""
    if not 0 <= zeros <= score.shape[1]:
        raise ValueError(f"{name}: {zeros} of {score.shape[1]} entries; allowed: 0..{score.shape[1]}")
    if bool(torch.isnan(score).any()):
        raise ValueError("score: it contains NaN")
    gone = torch.argsort(score, dim=1, stable=True)[:, :zeros]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, gone, False)


def layer_mask(score: Tensor, zeros: int) -> Tensor:
    """The kept mask without the ``zeros`` smallest scores of the whole tensor; among equals the first go."""
    return _without(score.reshape(1, -1), zeros, "zeros").view(score.shape)


def row_mask(score: Tensor, zeros: int) -> Tensor:
    """The kept mask without the ``zeros`` smallest scores of every row of (O, I) or (E, O, I)."""
    return _without(score.reshape(-1, score.shape[-1]), zeros, "zeros").view(score.shape)


def group_mask(score: Tensor, n: int, m: int) -> Tensor:
    """The N:M mask: the ``n`` largest scores of every ``m`` consecutive inputs of (O, I) or (E, O, I) are kept.

    Raises:
        ValueError: I is not a multiple of m, or n is not below m.
    """
    _check_pattern(n, m)
    if score.shape[-1] % m:
        raise ValueError(f"pattern: {n}:{m} needs a number of inputs that {m} divides; the layer has {score.shape[-1]}")
    return _without(score.reshape(-1, m), m - n, "pattern").view(score.shape)


def global_masks(scores: Sequence[Tensor], zeros: int) -> list[Tensor]:
    """The kept masks without the ``zeros`` smallest scores of all tensors together; among equals the first go."""
    flat = torch.cat([s.flatten() for s in scores])
    parts = torch.split(layer_mask(flat, zeros), [s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def parse_pattern(pattern: str) -> tuple[int, int]:
    """``"2:4"`` -> (2, 4): keep 2 of every 4.

    Raises:
        ValueError: it is not two whole numbers N:M with 0 < N < M.
    """
    n, colon, m = pattern.partition(":")
    if not colon or not n.isdecimal() or not m.isdecimal():
        raise ValueError(f"pattern: {pattern!r}; allowed: 'N:M' with whole numbers 0 < N < M, such as '2:4'")
    _check_pattern(int(n), int(m))
    return int(n), int(m)


def _check_pattern(n: int, m: int) -> None:
    if not 0 < n < m:
        raise ValueError(f"pattern: {n}:{m}; allowed: N:M with 0 < N < M, such as '2:4'")


def follows_pattern(kept: Tensor, n: int, m: int) -> bool:
    """Whether every ``m`` consecutive inputs of masks (..., O, I), or weights, have at most ``n`` that are not zero."""
    _check_pattern(n, m)
    if kept.dim() < 2 or kept.shape[-1] % m:
        return False
    return bool(((kept != 0).reshape(-1, m).sum(-1) <= n).all())


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


def sparsity_of(
    model: nn.Module, include: Iterable[str] = ("*",), exclude: Iterable[str] = (), example: Input | None = None
) -> float:
    """Share of zeros among the Conv and Linear weights of a plain network; with an ``example``, among all matrices."""
    weights = [w.parameter for w in prunable(model, include, exclude, example)]
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
