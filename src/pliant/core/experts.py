"""Routed experts: many small feed-forward networks of which each token visits a few.

    chosen = top_k(scores, 2)                       # (T, K), equal scores by index
    y = experts(x, chosen, weights)                 # (T, d)

*Dispatch*: the T K choices are sorted by expert (stably, so that the order is the same on every machine), the tokens
gathered once, every expert runs on its own slice, the results are put back in the order of the choices, weighted and
summed over K. Nothing is added up by ``index_add_``, whose order of summation is not fixed on a GPU.

The slices run in one of three ways. Which one is fastest depends on tokens, sizes and machine, so ``Experts.tune``
measures it:

=============  =====================================================================================================
``"loop"``     one product after another over the experts that have tokens
``"grouped"``  ``torch.nn.functional.grouped_mm``, one call for all experts
``"dense"``    all experts on all tokens, then masked: what the others must agree with; fast for a handful of tokens
=============  =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import check
from pliant.core.cost import time_ratio

Backend = Literal["loop", "grouped", "dense", "auto"]
Activation = Callable[[Tensor], Tensor]
_LARGEST = 1 << 34


def top_k(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best of the last dimension in descending order, equal ones by index: (..., E) -> (..., k).

    ``torch.topk`` leaves the order of equals open, which makes routing depend on the machine.

    Raises:
        ValueError: ``k`` is not in 1..E.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k: {k} of {scores.shape[-1]} experts; allowed: 1..{scores.shape[-1]}")
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]


class Dispatch(NamedTuple):
    """Choices sorted by expert: ``order`` (T K,) of the flat choices, ``token`` (T K,) of each, ``counts`` (E,)."""

    order: Tensor
    token: Tensor
    counts: Tensor


def dispatch(chosen: Tensor, experts: int) -> Dispatch:
    """Sort the choices (T, K) of ``experts`` experts; within an expert tokens keep their order."""
    flat = chosen.reshape(-1)
    order = flat.argsort(dim=-1, stable=True)
    return Dispatch(order, order // chosen.shape[-1], torch.bincount(flat, minlength=experts))


def combine(parts: Tensor, sent: Dispatch, weights: Tensor) -> Tensor:
    """Results (T K, d) in the order of ``sent`` back to their tokens: (T, d), weighted by (T, K)."""
    back = torch.empty_like(sent.order)
    back[sent.order] = torch.arange(len(back), device=back.device)
    each = parts[back].view(*weights.shape, parts.shape[-1])
    return (each * weights.to(parts.dtype)[..., None]).sum(-2)


class Experts(nn.Module):
    """A bank of E two-layer (or gated) networks with stacked weights; (T, d) -> (T, d).

    Plain: ``down_e(act(up_e(x)))``. Gated: ``down_e(act(gate_e(x)) * up_e(x))``.

    Args:
        features: d.
        hidden: h, the width of one expert.
        count: E.
        activation: between the two layers, elementwise.
        gated: a third matrix, as in the networks of Llama.
        bias: whether the layers have biases.
        dropout: on the hidden units, in training.
        backend: how the slices run; "auto" is what ``tune`` chose, the loop before.

    ``up`` (E, h, d), ``gate`` (E, h, d) or None, ``down`` (E, d, h), and ``up_bias``, ``gate_bias`` (E, h),
    ``down_bias`` (E, d) or None: each expert's slice is laid out as ``nn.Linear.weight`` is.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        count: int,
        *,
        activation: Activation = F.relu,
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.features = check.whole("features", features, at_least=1)
        self.hidden = check.whole("hidden", hidden, at_least=1)
        self.count = check.whole("count", count, at_least=1)
        if features * hidden * count > _LARGEST:
            raise check.wrong("hidden", hidden, f"at most {_LARGEST:,} weights in one matrix of all experts")
        self.activation = check.function("activation", activation)
        check.boolean("gated", gated)
        check.boolean("bias", bias)
        self.dropout = check.number("dropout", dropout, at_least=0, below=1)
        self.backend: Backend = check.choice("backend", backend, Backend)
        self.tuned: str = "loop"
        self.up = nn.Parameter(torch.empty(count, hidden, features))
        self.gate = nn.Parameter(torch.empty(count, hidden, features)) if gated else None
        self.down = nn.Parameter(torch.empty(count, features, hidden))
        self.up_bias = nn.Parameter(torch.empty(count, hidden)) if bias else None
        self.gate_bias = nn.Parameter(torch.empty(count, hidden)) if bias and gated else None
        self.down_bias = nn.Parameter(torch.empty(count, features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` starts: uniform in +-1 / sqrt(fan in), expert by expert."""
        for matrix, bias in ((self.up, self.up_bias), (self.gate, self.gate_bias), (self.down, self.down_bias)):
            if matrix is None:
                continue
            bound = matrix.shape[-1] ** -0.5
            nn.init.uniform_(matrix, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum over K of ``weights`` times the chosen experts' outputs.

        Args:
            x: tokens (T, d).
            chosen: experts (T, K), whole numbers in 0..E-1.
            weights: (T, K); gradients flow through them.
        """
        if x.dim() != 2 or x.shape[-1] != self.features or chosen.shape != weights.shape or len(chosen) != len(x):
            raise ValueError(
                f"x, chosen, weights: shapes {tuple(x.shape)}, {tuple(chosen.shape)}, {tuple(weights.shape)}; allowed: "
                f"(T, {self.features}), (T, K), (T, K)"
            )
        backend = self.tuned if self.backend == "auto" else self.backend
        if backend == "dense":
            return self._dense(x, chosen, weights)
        sent = dispatch(chosen, self.count)
        parts = (self._grouped if backend == "grouped" else self._loop)(x[sent.token], sent.counts)
        return combine(parts, sent, weights)

    def _inner(self, up: Tensor, gate: Tensor | None) -> Tensor:
        hidden = self.activation(up) if gate is None else self.activation(gate) * up
        return F.dropout(hidden, self.dropout, self.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as many products as experts have tokens, of any sizes
    def _loop(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Expert after expert on its slice of the sorted rows; one without tokens is skipped."""
        parts = []
        up_weight, gate_weight, down_weight = self.up, self.gate, self.down  # read once: a mask makes them anew
        for e, slice_ in enumerate(torch.split(rows, counts.tolist())):
            if not len(slice_):
                continue
            up = F.linear(slice_, up_weight[e], None if self.up_bias is None else self.up_bias[e])
            gate = None
            if gate_weight is not None:
                gate = F.linear(slice_, gate_weight[e], None if self.gate_bias is None else self.gate_bias[e])
            bias = None if self.down_bias is None else self.down_bias[e]
            parts.append(F.linear(self._inner(up, gate), down_weight[e], bias))
        return torch.cat(parts) if parts else rows

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """One call for all experts; biases are added by expert afterwards, since the call takes none."""
        ends = counts.cumsum(0).to(torch.int32)
        owner = torch.arange(self.count, device=rows.device).repeat_interleave(counts)

        def layer(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
            y = F.grouped_mm(x, matrix.transpose(1, 2), offs=ends)
            return y if bias is None else y + bias[owner]

        up = layer(rows, self.up, self.up_bias)
        gate = None if self.gate is None else layer(rows, self.gate, self.gate_bias)
        return layer(self._inner(up, gate), self.down, self.down_bias)

    def _dense(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        def layer(pattern: str, value: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
            y = torch.einsum(pattern, value, matrix)
            return y if bias is None else y + bias

        up = layer("td,ehd->teh", x, self.up, self.up_bias)
        gate = None if self.gate is None else layer("td,ehd->teh", x, self.gate, self.gate_bias)
        each = layer("teh,edh->ted", self._inner(up, gate), self.down, self.down_bias)  # (T, E, d)
        picked = each.gather(1, chosen[..., None].expand(-1, -1, self.features))
        return (picked * weights.to(picked.dtype)[..., None]).sum(1)

    @torch.no_grad()
    def tune(self, tokens: int, k: int, repeats: int = 7) -> dict[str, float]:
        """Time the three ways on ``tokens`` random tokens with ``k`` experts each, and keep the fastest for "auto".

        Returns:
            Time of each way as a ratio to the loop's. A way that this machine has no kernel for is missing.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, self.features, generator=generator).to(self.up)
        chosen = torch.rand(tokens, self.count, generator=generator).argsort(1)[:, :k].to(x.device)
        weights = torch.full(chosen.shape, 1.0 / k, device=x.device)
        before, found = self.backend, {"loop": 1.0}
        try:
            for way in ("grouped", "dense"):

                def run(name: Backend) -> Tensor:
                    self.backend = name
                    return self(x, chosen, weights)  # type: ignore[no-any-return]

                try:
                    found[way] = time_ratio(
                        lambda way=way: run(way),  # type: ignore[misc]
                        lambda: run("loop"),
                        repeats=repeats,
                    ).median
                except RuntimeError:  # no kernel for this device or type
                    continue
        finally:
            self.backend = before
        self.tuned = min(found, key=lambda way: found[way])
        return found

    def extra_repr(self) -> str:
        """The sizes."""
        kind = "gated, " if self.gate is not None else ""
        return f"{self.features}, {self.hidden}, experts={self.count}, {kind}backend={self.backend!r}"


def balance_loss(probability: Tensor, chosen: Tensor) -> Tensor:
    """E sum_e f_e P_e: f_e the share of the choices (T, K) that fell on e, P_e the mean probability (T, E).

    1 where both are uniform, E where all tokens choose one expert with certainty (K = 1). Gradients flow through P
    only. Source: Switch Transformer, arXiv 2101.03961, equations 4 to 6.
    """
    experts = probability.shape[-1]
    share = torch.bincount(chosen.reshape(-1), minlength=experts).to(probability.dtype) / chosen.numel()
    return experts * (share * probability.reshape(-1, experts).mean(0)).sum()
