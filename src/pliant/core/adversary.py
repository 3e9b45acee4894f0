"""Projected gradient attacks: the worst input within a small distance, and how much accuracy is left on it.

With x (B, ...) the clean inputs, J(x') a scalar to be maximised, eps the radius and a the step:

    start       x' = x + 0.001 N(0, 1)  ("gaussian"),   x + U(-eps, eps) clamped to the bounds  ("uniform"),   x  (None)
    L-inf       x' <- clamp(min(max(x' + a sign(dJ/dx'), x - eps), x + eps), low, high)
    L2          x' <- clamp(x + P(x' + a g/|g| - x), low, high),   g = dJ/dx' of each sample,  P(d) = d min(1, eps/|d|)

(Madry et al., arXiv:1706.06083, section 2; the small Gaussian start is that of TRADES, arXiv:1901.08573.) The whole
batch moves at once.

Without a random start an objective whose gradient vanishes at x, as the divergence of a network from itself does, is
climbed in the direction of rounding noise: ``sign`` makes full steps of it.

``undisturbed`` is the guard of the network under attack. An attack asks for the gradient of the input alone, so the
parameters' ``.grad`` is never touched; normalisation buffers and training flags are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.inputs import Batch, call, device_of, evaluating, logits, rows_of, split_batch, to_device
from pliant.core.objective import row_classes

Objective = Callable[[Tensor], Tensor]
Reduction = Literal["batchmean", "elementwise", "sum"]


@dataclass(frozen=True)
class PGD:
    """A projected gradient attack; see the module's docstring for the equations.

    Args:
        eps: the radius, above 0, in the units of the inputs.
        step: a, the length of one step, above 0.
        steps: how many, at least 1.
        start: "gaussian", "uniform" or None.
        norm: "linf" or "l2".
        bounds: the least and the largest value that an input may have.

    Raises:
        ValueError: an argument is not what is described here.
    """

    eps: float = 0.031
    step: float = 0.0078
    steps: int = 10
    start: Literal["gaussian", "uniform"] | None = "gaussian"
    norm: Literal["linf", "l2"] = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name, value in (("eps", self.eps), ("step", self.step)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: {value} is not allowed; a finite number above 0")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: {self.steps!r} is not allowed; a whole number of 1 or more")
        if self.start not in ("gaussian", "uniform", None):
            raise ValueError(f"start: {self.start!r} is not one of gaussian, uniform, None")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm: {self.norm!r} is not one of linf, l2")
        object.__setattr__(self, "bounds", tuple(self.bounds))
        if len(self.bounds) != 2 or not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds: {self.bounds} is not (least, largest) with least < largest")

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless ``x`` holds real numbers inside the bounds."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"inputs: an attack moves one tensor of floating point numbers, got {kind}")
        low, high = self.bounds
        least, most = (v.item() for v in torch.aminmax(x)) if x.numel() else (low, low)
        if not (least >= low and most <= high):  # NaN fails as well
            raise ValueError(
                f"inputs: they run from {least:g} to {most:g}, outside of bounds={self.bounds}; put the normalisation "
                "inside of the model, or give the bounds (and eps and step) of the inputs as they are"
            )

    def begin(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Where the attack on ``x`` starts, same shape."""
        if self.start is None:
            return x.clone()
        # The noise is drawn where the generator lives; one of the CPU gives the same on every device.
        device = x.device if generator is None else generator.device
        if self.start == "gaussian":
            # Not projected, as in TRADES: a clamp would take half of the noise away from black and white pixels.
            noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
            return x + 0.001 * noise.to(x.device)
        if self.norm == "linf":
            noise = self.eps * (2 * torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype) - 1)
        else:  # uniform in the ball: a direction, and a radius whose density grows with the surface
            noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
            radius = torch.rand(len(x), generator=generator, device=device, dtype=x.dtype) ** (1 / x[0].numel())
            noise = noise * _by_sample(self.eps * radius / _norms(noise), noise)
        return (x + noise.to(x.device)).clamp(*self.bounds)

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """The feasible point for ``moved``: within eps of ``x`` and inside the bounds."""
        if self.norm == "linf":
            return torch.min(torch.max(moved, x - self.eps), x + self.eps).clamp(*self.bounds)
        away = moved - x
        return (x + away * _by_sample((self.eps / _norms(away)).clamp(max=1), away)).clamp(*self.bounds)

    def advance(self, current: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        """One step uphill from ``current`` and back into the ball around ``x``."""
        if self.norm == "linf":
            return self.project(current + self.step * gradient.sign(), x)
        return self.project(current + self.step * gradient * _by_sample(1 / _norms(gradient), gradient), x)

    def attack(
        self,
        objective: Objective,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        modules: Iterable[nn.Module] = (),
    ) -> Tensor:
        """The inputs (B, ...) that the attack ends at, detached.

        Args:
            objective: ``objective(x')``: the scalar to be maximised, a *sum* over the samples, so that no sample's
                step depends on the size of the batch.
            x: clean inputs (B, ...) inside the bounds.
            generator: of the random start; torch's own where None.
            modules: networks whose buffers and training flags are put back afterwards.

        Raises:
            TypeError: ``x`` is no floating point tensor.
            ValueError: ``x`` leaves the bounds, or the objective is no scalar that depends on its input.
        """
        self.check(x)
        x = x.detach()
        with undisturbed(*modules), torch.enable_grad():
            current = self.begin(x, generator)
            for _ in range(self.steps):
                current = self.advance(current, gradient_of(objective, current), x)
        return current


def gradient_of(objective: Objective, x: Tensor) -> Tensor:
    """The gradient of ``objective`` with respect to its input at ``x``, same shape; nothing else gets one.

    Raises:
        ValueError: the objective is no scalar, or does not depend on its input.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = objective(x)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"objective: it must return a scalar tensor, got {got}")
        if not value.requires_grad:
            raise ValueError("objective: its value does not depend on the input (was it computed without gradients?)")
        (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    if gradient is None:
        raise ValueError("objective: its value does not depend on the input")
    return gradient


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Whatever the block runs, the buffers and training flags of ``modules`` are afterwards what they were."""
    flags = [(m, m.training) for module in modules for m in module.modules()]
    buffers = [(b, b.detach().clone()) for module in modules for b in module.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


# -- what is maximised ------------------------------------------------------------------------------------------------


def kl_divergence(p: Tensor, q: Tensor, *, temperature: float = 1.0, reduction: Reduction = "batchmean") -> Tensor:
    """KL(softmax(p/t) || softmax(q/t)) = sum_c p_c (log p_c - log q_c) for logits p and q (B, C).

    ``"batchmean"`` divides the sum by B, ``"elementwise"`` by B times C, ``"sum"`` by nothing.

    Raises:
        ValueError: the shapes differ, or ``reduction`` is unknown.
    """
    if p.shape != q.shape:
        raise ValueError(f"logits: shapes {tuple(p.shape)} and {tuple(q.shape)} differ")
    log_p, log_q = F.log_softmax(p / temperature, 1), F.log_softmax(q / temperature, 1)
    total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / len(p)
    if reduction == "elementwise":
        return total / p.numel()
    raise ValueError(f"reduction: {reduction!r} is not one of batchmean, elementwise, sum")


def cross_entropy_objective(model: Callable[[Tensor], Any], target: Tensor) -> Objective:
    """The sum of cross entropies of ``model(x')`` (B, C) against ``target`` (B,), as a function of x'."""
    return lambda x: F.cross_entropy(logits(model(x)), target, reduction="sum")


def kl_objective(model: Callable[[Tensor], Any], reference: Tensor) -> Objective:
    """The sum of KL(reference || model(x')) for fixed logits ``reference`` (B, C), as a function of x'."""
    return lambda x: kl_divergence(reference.detach(), logits(model(x)), reduction="sum")


# -- what is left -----------------------------------------------------------------------------------------------------


def robust_accuracy(
    model: nn.Module,
    data: Iterable[Batch],
    attack: PGD | None = None,
    *,
    seed: int = 0,
) -> float:
    """Share of samples that ``model``, in evaluation mode, still classifies rightly after ``attack``.

    Args:
        model: the network to attack, (B, ...) -> (B, C): an extracted one, or a dynamic one at a calibrated setting.
        data: batches of (inputs, labels).
        attack: maximises the cross entropy; by default 20 steps of 0.0078 within 0.031 from a uniform start.
        seed: of the random starts.

    Raises:
        ValueError: ``data`` is empty, or its inputs leave the bounds.
    """
    attack = attack if attack is not None else PGD(steps=20, start="uniform")
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    right, seen = torch.zeros((), dtype=torch.int64, device=device), 0
    with undisturbed(model), evaluating(model):
        for batch in data:
            x, y = to_device(split_batch(batch), device)
            y = row_classes(y, rows_of(x), "robust_accuracy")
            moved = attack.attack(cross_entropy_objective(lambda v: call(model, v), y), x, generator=generator)
            with torch.no_grad():
                right += (logits(call(model, moved)).argmax(1) == y).sum()
            seen += len(y)
    if not seen:
        raise ValueError("data: it has no batches, so there is nothing to attack")
    return int(right) / seen


def _norms(x: Tensor) -> Tensor:
    """(B,): the L2 norm of each sample, never zero."""
    found: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return found.clamp(min=1e-12)


def _by_sample(factor: Tensor, like: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (like.ndim - 1))
