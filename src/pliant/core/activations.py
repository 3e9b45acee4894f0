"""What goes into a layer, summed up while it streams past: mean, variance, norm and second moments by input channel.

    with observe({"fc1": model.fc1}) as seen:
        for x in calibration:
            model(x)
    seen["fc1"].norm                                       # (I,)

A layer is looked at as the matrix W (O, I) that multiplies vectors: ``nn.Linear``, the ``Conv1D`` of GPT-2 (which
stores the transpose) and ``nn.Conv2d`` of one group (whose vectors are the patches of the image).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

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
    def update(self, x: Tensor) -> None:
        """Take in vectors (..., I).

        Raises:
            ValueError: the last size is not I, or a value is NaN or infinite.
        """
        if x.shape[-1] != self.features:
            raise ValueError(f"x: vectors of {x.shape[-1]} features; allowed: {self.features}")
        if not x.numel():
            return
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


def is_matrix(module: nn.Module) -> bool:
    """Whether ``matrix`` and ``observe`` know this layer."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers: known by its shape, since transformers need not be there."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def matrix(module: nn.Module) -> Tensor:
    """The layer's weight as (O, I), detached.

    Raises:
        TypeError: the layer is none of those that are known.
    """
    if not is_matrix(module):
        raise TypeError(f"layer: {module} is not a Linear, a Conv1D, or a Conv2d of one group padded with zeros")
    weight = cast(Tensor, module.weight).detach()
    return weight.t() if _is_conv1d(module) else weight.flatten(1)


@torch.no_grad()
def write_matrix(module: nn.Module, value: Tensor) -> None:
    """Put ``value`` (O, I) into the layer's weight, in place; what ``matrix`` reads."""
    weight = cast(Tensor, module.weight)
    weight.copy_(value.t() if _is_conv1d(module) else value.reshape(weight.shape))


@contextmanager
def observe(
    layers: Mapping[str, nn.Module], *, hessian: bool = False, variance: Variance = "total"
) -> Iterator[dict[str, InputStatistics]]:
    """Statistics of the inputs of ``layers`` for as long as the context is open, by name.

    Raises:
        TypeError: a layer is none of those that are known.
        ValueError: an input contains NaN or infinity; the message names the layer.
    """
    seen: dict[str, InputStatistics] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            weight = matrix(layer)
            seen[name] = InputStatistics(weight.shape[1], hessian=hessian, variance=variance, device=weight.device)

            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                try:
                    seen[name].update(_vectors(module, x))
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error

            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield seen


def _vectors(module: nn.Module, x: Tensor) -> Tensor:
    """What the matrix multiplies: (..., I)."""
    if not isinstance(module, nn.Conv2d):
        return x
    x = x if x.dim() == 4 else x[None]
    padding = cast(tuple[int, int], module.padding)
    patches = torch.nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return patches.transpose(1, 2)  # (B, H' W', I h w)
