"""Gates that are exactly open or shut, and the numbers that early exits decide on.

``binary_gate(s)`` is 1 where ``s >= 0`` and 0 elsewhere, exactly, in every precision; its gradient is that of
``sigmoid(s / temperature)`` (straight-through). With ``noise=True`` a standard logistic variable is added first, the
difference of two Gumbel variables, so that the gate is open with probability ``sigmoid(s)``.

``uncertainty``, ``exit_distribution`` and ``first_exit`` turn predictions into exit decisions; ``calibration_error``
tells how far the confidence of a prediction can be trusted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.core import check


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, noisy: Tensor, temperature: float) -> Tensor:
        soft = torch.sigmoid(noisy / temperature)
        ctx.save_for_backward(soft * (1 - soft) / temperature)
        return (noisy >= 0).to(s.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grads[0] * slope).to(grads[0].dtype), None, None


def binary_gate(
    s: Tensor, *, temperature: float = 1.0, noise: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Exact 0 or 1 for each logit in ``s`` (any shape), with the gradient of ``sigmoid(s / temperature)``.

    Args:
        s: logits; 0 and above is open.
        temperature: slope of the gradient, above 0.
        noise: add logistic noise first, so that the gate opens with probability ``sigmoid(s)`` (Gumbel gate).
        generator: where the noise is drawn from.
    """
    check.positive("temperature", temperature)
    noisy = s.detach().float() if s.dtype in (torch.float16, torch.bfloat16) else s.detach()
    if noise:
        # Kept off 0 and 1, whose logits are infinite.
        u = torch.rand(s.shape, dtype=noisy.dtype, device=s.device, generator=generator).clamp(1e-7, 1 - 1e-7)
        noisy = noisy + torch.logit(u)
    gate: Tensor = _Gate.apply(s, noisy, temperature)  # type: ignore[no-untyped-call]
    return gate


def uncertainty(logits: Tensor) -> Tensor:
    """The four statistics of a prediction that JEI-DNN's gates read: (..., C) -> (..., 4).

    Largest probability, entropy (natural logarithm), margin between the two largest, entropy of ``p^2 / sum p^2``.
    Computed in float32 or better and detached.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"logits: {logits.shape[-1]} class has no margin; at least 2 classes")
    a = logits.detach()
    a = a if a.dtype is torch.float64 else a.float()
    p = a.softmax(-1)
    squared = (2 * (a - a.amax(-1, keepdim=True))).softmax(-1)  # p^2 / sum p^2, without underflow of p^2
    top = p.topk(2, dim=-1).values
    return torch.stack((top[..., 0], entropy(p), top[..., 0] - top[..., 1], entropy(squared)), -1)


def entropy(p: Tensor) -> Tensor:
    """``-sum p ln p`` over the last dimension, with 0 ln 0 = 0."""
    h: Tensor = -torch.special.xlogy(p, p).sum(-1)
    return h


def exit_distribution(g: Tensor) -> Tensor:
    """Exit probabilities from gates: (..., G) -> (..., G + 1).

    ``P_l = max(0, min(g_l, 1 - sum_{j<l} P_j))``, and the rest for the end of the network. ``g`` is the unconditional
    probability of leaving at an exit, not a hazard; the minimum keeps the total at 1.
    """
    # A loop over exits, and not a cumsum: the live network adds in this order, and both must decide alike.
    total = torch.zeros_like(g[..., 0])
    parts = []
    for gate in g.unbind(-1):
        p = torch.minimum(gate, 1 - total).clamp_min(0)
        parts.append(p)
        total = total + p
    return torch.stack([*parts, 1 - total], -1)


def leaves(p: Tensor, total: Tensor) -> Tensor:
    """Whether the hazard ``p / (1 - total)`` is one half or more, without the division (0 / 0 counts as 1)."""
    return p >= 0.5 * (1 - total)


def first_exit(p: Tensor) -> Tensor:
    """Where a sample leaves, the first exit whose hazard is one half or more: (..., G + 1) -> (...) in 0..G."""
    total = torch.zeros_like(p[..., 0])
    out = []
    for part in p[..., :-1].unbind(-1):
        out.append(leaves(part, total))
        total = total + part
    out.append(torch.ones_like(total, dtype=torch.bool))
    return torch.stack(out, -1).int().argmax(-1)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass: mean |accuracy - confidence| of (N,) predictions."""
    if not 1 <= bins <= len(confidence):
        raise ValueError(f"bins: {bins} is not allowed; 1 to {len(confidence)}, the number of predictions")
    order = confidence.argsort(stable=True)
    gap = (correct.double() - confidence.double())[order]
    return sum(part.sum().abs().item() for part in gap.tensor_split(bins)) / len(gap)
