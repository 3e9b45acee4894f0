"""What goes into a matrix, summed up while it streams past: mean, variance, norm and second moments by input channel.

    with observe({"fc1": model.fc1}) as seen:
        for x in calibration:
            seen.masks = token_masks(model, x)             # positions of padding do not count
            model(x)
    seen["fc1"].norm                                       # (I,)

A layer is looked at as the matrix W (O, I) that multiplies vectors: ``nn.Linear``, the ``Conv1D`` of GPT-2 (which
stores the transpose) and ``nn.Conv2d`` of one group (whose vectors are the patches of the image). Stacked experts
(E, O, I) have statistics for each expert, (E, I), of the tokens that are routed to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pliant.core.inputs import Input, step_by_step
from pliant.core.matrices import Bank, Matrix, Product, Products, matrix, plain_kernels

Variance = Literal["total", "within"]


class InputStatistics:
    """Statistics of vectors (..., I) by channel, the same for any split of the stream into updates, in float64.

    Batches are merged by their means and squared deviations (Chan, Golub and LeVeque), so that a mean a million times
    the spread costs no precision.

    Args:
        features: I.
        hessian: sum up A^T A (I, I) as well.
        variance: "total", over all vectors; "within": the mean of the variances inside each first index of an update
            (inside each sequence of (B, T, I)), weighted by the number of vectors; what differs between them is lost.
    """

    def __init__(
        self,
        features: int,
        *,
        hessian: bool = False,
        variance: Variance = "total",
        device: torch.device | str | None = None,
    ) -> None:
        if variance not in get_args(Variance):
            raise ValueError(f"variance: {variance!r}; allowed: 'total', 'within'")
        self.features, self.kind, self.count = features, variance, 0
        zero = torch.zeros(features, dtype=torch.float64, device=device)
        self.mean, self._deviation, self._within = zero, zero, zero
        self._products = zero.new_zeros(features, features) if hessian else None

    @torch.no_grad()
    def update(self, x: Tensor, counted: Tensor | None = None) -> None:
        """Take in vectors (..., I).

        Args:
            x: the vectors.
            counted: true where they count, in the shape of their first dimensions, such as (B, T); None: everywhere.
                What does not count may be anything, NaN too.

        Raises:
            ValueError: the last size is not I, or a value is NaN or infinite.
        """
        if x.shape[-1] != self.features:
            raise ValueError(f"x: vectors of {x.shape[-1]} features; allowed: {self.features}")
        if counted is not None:
            if counted.shape != x.shape[: counted.dim()] or counted.dim() >= x.dim():
                raise ValueError(
                    f"counted: its shape is {tuple(counted.shape)}; allowed: the first of {tuple(x.shape)}"
                )
            if self.kind == "total" or x.dim() == 2:
                return self.update(x[counted])
            for sequence, mask in zip(x, counted, strict=True):
                self.update(sequence[mask][None])
            return None
        if not x.numel():
            return None
        if not bool(torch.isfinite(x).all()):
            raise ValueError("x: the activations contain NaN or infinity")
        rows = x.detach().reshape(-1, self.features).double()
        new = InputStatistics(self.features, variance=self.kind, device=rows.device)
        new.count = len(rows)
        new.mean = rows.mean(0)
        new._deviation = (rows - new.mean).square().sum(0)
        if self.kind == "within":
            each = rows.view(len(x) if x.dim() > 2 else 1, -1, self.features)
            new._within = (each - each.mean(1, keepdim=True)).square().sum((0, 1))
        if self._products is not None:
            new._products = rows.t() @ rows
        self.merge(new)
        return None

    def merge(self, other: InputStatistics) -> None:
        """Take in what another one has seen."""
        total = self.count + other.count
        if not total:
            return
        gap = other.mean - self.mean
        self._deviation = self._deviation + other._deviation + gap.square() * (self.count * other.count / total)
        self.mean = self.mean + gap * (other.count / total)
        self._within = self._within + other._within
        if self._products is not None:
            if other._products is None:
                raise ValueError("other: it has summed up no second moments; build it with hessian=True")
            self._products = self._products + other._products
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Population variance (I,)."""
        self._check()
        return (self._deviation if self.kind == "total" else self._within) / self.count

    @property
    def norm(self) -> Tensor:
        """The L2 norm of each channel over all vectors (I,)."""
        self._check()
        return (self._deviation + self.count * self.mean.square()).sqrt()

    @property
    def hessian(self) -> Tensor:
        """(2 / n) sum of a a^T over all vectors a: (I, I)."""
        self._check()
        if self._products is None:
            raise ValueError("hessian: it was not summed up; build the statistics with hessian=True")
        return self._products * (2 / self.count)

    def _check(self) -> None:
        if not self.count:
            raise ValueError(
                "statistics: no vector has been seen; was the layer called, and is there calibration data?"
            )


class StackedStatistics:
    """Statistics of each of E experts' vectors: (E, I), and for ``hessian`` (E, I, I); zero where one has seen none."""

    def __init__(
        self,
        experts: int,
        features: int,
        *,
        hessian: bool = False,
        variance: Variance = "total",
        device: torch.device | str | None = None,
    ) -> None:
        options: dict[str, Any] = {"hessian": hessian, "variance": variance, "device": device}
        self.each = [InputStatistics(features, **options) for _ in range(experts)]

    def update(self, rows: Tensor, counts: Sequence[int]) -> None:
        """Take in vectors (S, I) that stand sorted by expert, ``counts`` (E,) of each."""
        for statistics, part in zip(self.each, torch.split(rows, list(counts)), strict=True):
            statistics.update(part)

    @property
    def counts(self) -> list[int]:
        """How many vectors each expert has seen."""
        return [s.count for s in self.each]

    @property
    def count(self) -> int:
        """How many vectors all of them have seen."""
        return sum(self.counts)

    @property
    def mean(self) -> Tensor:
        """(E, I)."""
        return torch.stack([s.mean for s in self.each])

    @property
    def variance(self) -> Tensor:
        """Population variance (E, I)."""
        return self._stacked(lambda s: s.variance)

    @property
    def norm(self) -> Tensor:
        """The L2 norms (E, I)."""
        return self._stacked(lambda s: s.norm)

    @property
    def hessian(self) -> Tensor:
        """(2 / n) sum of a a^T (E, I, I)."""
        return self._stacked(lambda s: s.hessian)

    def _stacked(self, read: Callable[[InputStatistics], Tensor]) -> Tensor:
        """What ``read`` finds for each expert, zeros for those that have seen nothing; all zero if none has."""
        found = [read(s) if s.count else None for s in self.each]
        like = next((f for f in found if f is not None), self.each[0].mean)
        return torch.stack([torch.zeros_like(like) if f is None else f for f in found])


Statistics = InputStatistics | StackedStatistics


# -- which positions count --------------------------------------------------------------------------------------------


def named_input(model: nn.Module, x: Input) -> dict[str, Any]:
    """An input by the names of the arguments of ``model.forward``; empty where it has no such names."""
    if isinstance(x, Mapping):
        return dict(x)
    try:
        bound = inspect.signature(model.forward).bind(*(x if isinstance(x, tuple | list) else (x,)))
    except (TypeError, ValueError):
        return {}
    return dict(bound.arguments)


def token_masks(model: nn.Module, x: Input) -> list[Tensor]:
    """The masks (B, T) of an input that mark padding: true where a token counts, of encoder and decoder.

    They are the arguments ``attention_mask`` and ``decoder_attention_mask``, as transformers name them. A mask that
    leaves nothing out is not among them.
    """
    named = named_input(model, x)
    masks = [named.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    found = [m != 0 for m in masks if isinstance(m, Tensor) and m.dim() == 2]
    return [m for m in found if not bool(m.all())]


def answer_mask(model: nn.Module, x: Input, answer: Tensor) -> Tensor | None:
    """Where the answers (B, T, ...) to an input count, (B, T); None where all do, or there is none for each token."""
    named = named_input(model, x)
    decodes = named.get("decoder_input_ids") is not None
    mask = named.get("decoder_attention_mask" if decodes else "attention_mask")
    if not isinstance(mask, Tensor) or answer.dim() < 3 or mask.shape != answer.shape[:2] or bool((mask != 0).all()):
        return None
    return mask != 0


def tell_apart(x: Input) -> Input:
    """An input whose encoder's and decoder's masks differ in shape, so that a layer's input shows whose tokens it has.

    Where they are equal in shape and one leaves something out, the decoder gets one more token, which does not count:
    it is the last, and no other token attends to it.
    """
    if not isinstance(x, Mapping) or not isinstance(ids := x.get("decoder_input_ids"), Tensor):
        return x
    mask = x.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return x
    own = x.get("decoder_attention_mask")
    own = torch.ones_like(mask) if own is None else own
    if bool((mask != 0).all()) and bool((own != 0).all()):
        return x
    wide = {"decoder_input_ids": ids, "decoder_attention_mask": own}
    return {**x, **{k: torch.cat([v, v.new_zeros(len(v), 1)], 1) for k, v in wide.items()}}


class Observed(dict[str, Any]):
    """Statistics by name, and the masks (B, T) of the batch that is running: what ``observe`` yields."""

    def __init__(self) -> None:
        super().__init__()
        self._masks: list[Tensor] = []
        self._steps: dict[str, int] = {}

    @property
    def masks(self) -> list[Tensor]:
        """The masks of the batch that runs next, see ``token_masks``."""
        return self._masks

    @masks.setter
    def masks(self, value: Sequence[Tensor]) -> None:
        self._masks, self._steps = list(value), {}

    def counted(self, shape: Sequence[int]) -> Tensor | None:
        """Where the vectors (B, T, ..., I) or (B T, I) of an input of this shape count; None: everywhere."""
        for mask in self._masks:
            if len(shape) > 2 and tuple(shape[:2]) == tuple(mask.shape):
                return mask
            if len(shape) == 2 and shape[0] == mask.numel():
                return mask.flatten()
        return None

    def counted_in_time(self, name: str, rows: int, backward: bool) -> Tensor | None:
        """The same for what runs time first: rows (T B,), or (B,) of one step, the first of which comes first."""
        for mask in self._masks:
            if rows == mask.numel():
                return mask.t().flatten()
            if rows == len(mask):
                step = self._steps.get(name, 0)
                self._steps[name] = step + 1
                return mask[:, mask.shape[1] - 1 - step if backward else step] if step < mask.shape[1] else None
        return None


# -- watching -------------------------------------------------------------------------------------------------------


@contextmanager
def observe(
    layers: Mapping[str, nn.Module | Matrix], *, hessian: bool = False, variance: Variance = "total"
) -> Iterator[Observed]:
    """Statistics of what ``layers`` multiply for as long as the context is open, by name.

    Args:
        layers: layers, or matrices of ``matrices.matrices`` whose inputs can be told.
        hessian: see ``InputStatistics``.
        variance: see ``InputStatistics``.

    Raises:
        TypeError: a layer is none of those that are known.
        ValueError: an input contains NaN or infinity; the message names the layer.
    """
    seen = Observed()
    banks: dict[int, dict[str, str]] = {}
    modules: dict[int, nn.Module] = {}
    factors: dict[str, Matrix] = {}
    with ExitStack() as stack:
        stack.enter_context(step_by_step())
        for name, layer in layers.items():
            m = layer if isinstance(layer, Matrix) else Matrix(name, layer)
            if m.unobserved:
                raise TypeError(f"layer {name!r}: {m.unobserved}")
            value = matrix(m.module) if m.kind == "layer" else m.read()
            options: dict[str, Any] = {"hessian": hessian, "variance": variance, "device": value.device}
            if value.dim() == 3:
                seen[name] = StackedStatistics(len(value), value.shape[-1], **options)
            else:
                seen[name] = InputStatistics(value.shape[-1], **options)
            if m.kind == "layer":
                hook = _of_a_layer(seen, name)
                stack.callback(m.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            elif m.kind == "experts":
                banks.setdefault(id(m.module), {})[m.attribute] = name
                modules[id(m.module)] = m.module
            else:
                factors[name] = m
        for key, names in banks.items():
            bank = Bank.of(modules[key])
            assert bank is not None
            hook = _of_experts(seen, bank, names)
            stack.callback(modules[key].register_forward_pre_hook(hook, with_kwargs=True).remove)
        if factors:
            stack.enter_context(plain_kernels([m.module for m in factors.values()]))
            stack.enter_context(_of_factors(seen, factors))
        yield seen


def _of_a_layer(seen: Observed, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        with _naming(name):
            counted = None if isinstance(module, nn.Conv2d) else seen.counted(x.shape)
            seen[name].update(_vectors(module, x), counted)

    return note


def _of_experts(
    seen: Observed, bank: Bank, names: Mapping[str, str]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """What a bank's matrices multiply, ``names`` by attribute: its tokens sorted by expert, and their hidden units."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, chosen, _ = bank.tokens(args, kwargs)
        rows, counts, _ = bank.sorted_rows(x, chosen, seen.counted(x.shape))
        each = counts.tolist()
        for attribute in bank.reads:
            if attribute in names:
                with _naming(names[attribute]):
                    seen[names[attribute]].update(rows, each)
        if bank.down in names:
            with _naming(names[bank.down]), torch.no_grad():
                seen[names[bank.down]].update(bank.hidden(rows, counts), each)

    return note


def _of_factors(seen: Observed, factors: Mapping[str, Matrix]) -> Products:
    """What parameters multiply that are no layer's own, seen in the products themselves."""
    names, found = list(factors), list(factors.values())

    def note(product: Product) -> None:
        name, m = names[product.parameter], found[product.parameter]
        x = product.vectors
        if x is None or product.transposed is not m.transposed:
            raise ValueError(f"layer {name!r}: it is multiplied in another way than on the example")
        with _naming(name):
            if x.dim() == 3:  # a stack, each matrix with vectors of its own
                counted = seen.counted(x.shape[1:])
                x = x if counted is None else x[:, counted]
                seen[name].update(x.flatten(0, 1), [x.shape[1]] * len(x))
            elif isinstance(m.module, nn.RNNBase | nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
                seen[name].update(x, seen.counted_in_time(name, len(x), m.attribute.endswith("_reverse")))
            else:
                seen[name].update(x, seen.counted(x.shape))

    return Products([m.parameter for m in found], [m.parameter for m in found], note)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _vectors(module: nn.Module, x: Tensor) -> Tensor:
    """What the matrix multiplies: (..., I)."""
    if not isinstance(module, nn.Conv2d):
        return x
    x = x if x.dim() == 4 else x[None]
    padding = cast(tuple[int, int], module.padding)
    patches = torch.nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return patches.transpose(1, 2)  # (B, H' W', I h w)
