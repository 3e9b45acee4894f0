"""DSnoT: dynamic sparse no training, training-free fine-tuning for sparse LLMs. ICLR 2024, arXiv 2310.08915.

Prune a network by any one-shot score, then go on without training: as long as a row's *expected* output is off, let one
pruned weight grow back and let one kept weight go, so that the expectation moves towards the dense one. No weight
changes its value, no gradient is taken, and every row keeps its number of weights.

For a layer W (O, I) with the inputs A (n, I) of all calibration tokens::

    mu_k = mean_t A[t, k]    v_k = var_t A[t, k]    nrm_k = (sum_t A[t, k]^2)^1/2         (I,)
    C[r, k] = W[r, k] mu_k          what weight k adds to output r in the mean             (O, I)
    S[r, k] = |W[r, k]| nrm_k       the score of Wanda                                     (O, I)
    e_r = sum_k (1 - M[r, k]) C[r, k]                                                      (O,)

M is the mask, 1 where a weight is kept; e_r = E[W_r A - (M_r * W_r) A], the expected error of row r. Each row by
itself, for t = 1..T (``refine``)::

    stop for ever if |e_r| <= eps
    grow   g = argmax C[r, k] sign(e_r) / v_k^p    pruned at the start, not touched yet, C[r, k] e_r > 0
    prune  d = argmin S[r, k]                      kept at the start, not touched yet,   C[r, k] e_r < 0
    e' = e_r - C[r, g] + C[r, d]                   both moves bring e_r nearer to zero
    stop for ever if sign(e') is not the sign at the start (``same_sign``); else accept

In N:M patterns g is the same, and d = argmin of the *start's* score among the kept, untouched weights of g's group,
whatever its sign.

From SparseGPT, which changes the weights that it keeps, the start is a mask and other values V: C and S are those of
V, what grows back has the value that it had when it went, and e_r = sum_k W[r, k] mu_k - sum_k M[r, k] V[r, k] mu_k.

Stacked experts (E, O, I) are so many matrices, each with the statistics of the tokens that are routed to it. An expert
that no token of the calibration reaches has none, and is pruned by magnitude.

A language model is pruned block by block: statistics of a block are those of the network whose earlier blocks are
sparse already (``DSnoT.prune``).

Why there is no loop over weights: candidates of the two signs never mix, so the t-th swap of a sign is the t-th of one
list and the t-th of another, and both lists are sorted before the loop.

Where this file differs from the paper and its code:

- A row with nothing left to grow or to prune stops. In N:M, a group none of whose kept weights is untouched is passed
  over, since nothing can grow there; it matters only where fewer weights are kept than pruned (1:4).
- In N:M the sign rule is always on, as in the reference; ``same_sign=False`` concerns the unstructured masks only.
- In N:M the reference takes any d, so a swap may move e_r *away* from zero for as long as its sign lasts. In networks
  of width 100 the squared error grew several times over by that, and the loss with it; at width 576 it made little
  difference. Here such a g is passed over for good (``shrinking=False``: the reference).
- e' = 0 exactly has no sign, so under the sign rule it is refused, to the letter.
- v_k is clamped from below at 1e-12 of the largest mu_k^2, so that a channel that never varies grows first and does not
  divide by zero. The clamp scales with the inputs.
- The number of zeros in a row is int(I s) without the error of the product: 29 of 100 at 0.29, not 28.
- In ``stats="reference"`` eps is meant on (tokens in a sequence) * e_r. The token count is that of the calibration
  inputs, for each layer by itself (a layer may see fewer).
- ``variance="within"`` averages the variances inside sequences. A layer that is given its tokens without the batch axis
  (the MLP of OPT) cannot tell sequences apart: use ``batch_size=1`` there, as the reference does.
- Which layer belongs where is not decided by names such as "mlp": the longest list of blocks of one class is taken to
  be the decoder, and everything outside of it (embeddings, norms, head) stays.
- The whole objective is met by one bias vector as well, b_r += e_r (``correction="bias"``): the honest baseline.
- Training with fixed masks is no part of the paper, and pruned values must survive to grow back: the loss is that of
  the dense network. To fine-tune a sparse network, ``extract`` it and train that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from pliant.core import check, masks
from pliant.core.activations import Observed, StackedStatistics, Statistics, Variance, observe, tell_apart, token_masks
from pliant.core.dynamic import Dynamic, Point, Value
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    check_example,
    device_of,
    evaluating,
    first_line,
    first_tensor,
    follow_dtype,
    logits,
    packed,
    removing,
    rows_of,
    split_batch,
    take,
    to_device,
)
from pliant.core.matrices import Bank, Matrix, is_matrix, matrices
from pliant.core.objective import Criterion, loss
from pliant.core.sparse import compile_sparse

Start = Literal["wanda", "magnitude", "sparsegpt", "sparsegpt-score"]
Stats = Literal["pliant", "reference"]
Correction = Literal["none", "bias"]
DENSE = Point(sparsity=0.0)
_CAP = 0.0122  # swaps as a share of a row without the sign rule: the reference's 50 of 4,096 columns
_AT_ONCE = 1 << 24  # weights that are refined together; rows are independent, so a large layer is cut into parts
_FEW_ZEROS = 0.05
_FIT_ROWS = 128


# -- the refinement of one layer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refined:
    """A refined mask (O, I), e_r before and after (O,) in float64, and the accepted swaps of each row (O,).

    Of a stack: (E, O, I) and (E, O).
    """

    kept: Tensor
    before: Tensor
    after: Tensor
    swaps: Tensor


def expected_error(weight: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """e_r (O,) of a weight (O, I) under a mask (O, I), for inputs of mean (I,): the sum of C over what is pruned."""
    return (weight.detach().double() * mean.double()[..., None, :]).masked_fill(kept, 0.0).sum(-1)


@torch.no_grad()
def refine(
    weight: Tensor,
    kept: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    *,
    cycles: int = 50,
    variance_power: float = 1.0,
    same_sign: bool = True,
    eps: float = 0.0,
    pattern: tuple[int, int] | None = None,
    score: Tensor | None = None,
    shrinking: bool = True,
    error: Tensor | None = None,
) -> Refined:
    """Swap pruned weights for kept ones, row by row, until the expected error is small: the paper's algorithm.

    Args:
        weight: W (O, I), dense; any floating type. The arithmetic is float64. Or a stack (E, O, I), with ``kept`` and
            ``score`` of the same shape and the statistics (E, I).
        kept: the start (O, I), true where a weight is kept.
        mean: mu (I,), the mean of each input channel.
        variance: v (I,), the population variance.
        norm: nrm (I,), the L2 norm, on any common scale.
        cycles: T, the most swaps in a row.
        variance_power: p; 0 grows by contribution alone.
        same_sign: refuse a swap that turns the sign of e_r, and stop the row. Without it rows swap to and fro across
            zero with ever larger weights, so T is then capped at 1.2 % of the columns.
        eps: a row stops once |e_r| <= eps.
        pattern: (N, M) of an N:M mask; it stays one.
        score: the start's score (O, I), which chooses what to prune inside the groups of a pattern.
        shrinking: in a pattern, pass over pairs that would move e_r away from zero; False is the reference's rule.
        error: e_r (O,) at the start, where it is more than the sum over what is pruned: W is then what the start made.

    Raises:
        ValueError: shapes differ, ``pattern`` comes without ``score``, or ``kept`` does not follow it.
    """
    columns, each = weight.shape[-1], (*weight.shape[:-2], weight.shape[-1])
    for name, tensor, shape in (
        ("kept", kept, weight.shape),
        ("mean", mean, each),
        ("variance", variance, each),
        ("norm", norm, each),
        ("score", kept if score is None else score, weight.shape),
        ("error", weight[..., 0] if error is None else error, weight.shape[:-1]),
    ):
        if tensor.shape != torch.Size(shape):
            raise ValueError(f"{name}: its shape is {tuple(tensor.shape)}; allowed: {tuple(shape)}")
    if pattern is not None:
        if score is None:
            raise ValueError("score: a pattern needs the score that its mask was made from")
        if not masks.follows_pattern(kept, *pattern):
            raise ValueError(f"kept: the mask does not follow the pattern {pattern[0]}:{pattern[1]}")
    if not same_sign and pattern is None:
        cycles = min(cycles, max(1, round(_CAP * columns)))
    mu, v, nrm = (t.double().view(-1, columns) for t in (mean, variance, norm))
    v = torch.maximum(v, 1e-12 * mu.square().amax(1, keepdim=True)) ** variance_power
    flat, start = weight.detach().reshape(-1, columns), kept.reshape(-1, columns)
    scores = None if score is None else score.reshape(-1, columns)
    errors = None if error is None else error.double().reshape(-1)
    owner = torch.arange(len(mu), device=weight.device).repeat_interleave(weight.shape[-2])  # each row's matrix
    parts = []
    step = max(1, _AT_ONCE // max(1, columns))
    for part in (slice(first, first + step) for first in range(0, len(flat), step)):
        m, u, n = (t if len(t) == 1 else t[owner[part]] for t in (mu, v, nrm))
        w = flat[part].double()
        chosen = None if scores is None else scores[part]
        c = w * m
        first_error = c.masked_fill(start[part], 0.0).sum(1) if errors is None else errors[part]
        parts.append(
            _refine_rows(
                c, w.abs() * n, u, start[part], first_error, cycles, same_sign, eps, pattern, chosen, shrinking
            )
        )
    mask, *others = (torch.cat(each) for each in zip(*parts, strict=True))
    return Refined(mask.view(weight.shape), *(t.view(weight.shape[:-1]) for t in others))


def _refine_rows(
    c: Tensor,
    s: Tensor,
    v: Tensor,
    start: Tensor,
    before: Tensor,
    cycles: int,
    same_sign: bool,
    eps: float,
    pattern: tuple[int, int] | None,
    score: Tensor | None,
    shrinking: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All rows of C, S (R, I) together; the loop is over t alone, on vectors (R,)."""
    sign = before.sign()
    length = min(cycles, c.shape[1])
    if not length:
        return start.clone(), before, before.clone(), torch.zeros(len(c), dtype=torch.long, device=c.device)

    def swaps_for(direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        along = c * direction[:, None]
        if pattern is not None:
            return _pairs_in_groups(along, v, start, cast(Tensor, score), pattern, length, shrinking)
        g, can_grow = _ranked(-(along / v), ~start & (along > 0), length)
        d, can_go = _ranked(s, start & (along < 0), length)
        return g, d, can_grow & can_go

    fixed = same_sign or pattern is not None  # then a row's error keeps its sign, and one list serves it
    lists = [swaps_for(sign)] if fixed else [swaps_for(torch.ones_like(sign)), swaps_for(-torch.ones_like(sign))]
    grow, drop, valid = (torch.stack(each) for each in zip(*lists, strict=True))  # (1 or 2, R, T)

    row = torch.arange(len(c), device=c.device)
    place = torch.zeros(len(lists), len(c), dtype=torch.long, device=c.device)
    kept, e = start.clone(), before.clone()
    swaps = torch.zeros_like(row)
    active = torch.ones_like(row, dtype=torch.bool)
    for _ in range(length):
        side = torch.zeros_like(row) if fixed else (e < 0).long()
        at = place[side, row]
        g, d = grow[side, row, at], drop[side, row, at]
        new = e - c[row, g] + c[row, d]
        active = active & (e.abs() > eps) & valid[side, row, at]
        if fixed:
            active = active & (new.sign() == sign)
        if not bool(active.any()):
            break
        swapped = row[active]
        kept[swapped, g[active]] = True
        kept[swapped, d[active]] = False
        e = torch.where(active, new, e)
        swaps += active
        place[side[active], swapped] += 1
    return kept, before, e, swaps


def _ranked(score: Tensor, allowed: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The columns of the ``length`` smallest scores of each row among the allowed ones, and which of them are such.

    Equal scores stand in the order of their columns. ``topk`` keeps no such order, so what it finds is ordered again,
    and where the last place is contested by equals the whole row has to be sorted.
    """
    limit = torch.finfo(score.dtype).max
    score = score.clamp(-limit, limit).masked_fill(~allowed, torch.inf)
    if 4 * length > score.shape[1]:
        order = torch.argsort(score, dim=1, stable=True)[:, :length]
        return order, allowed.gather(1, order)
    values, found = score.topk(length, dim=1, largest=False)
    last = values.amax(1, keepdim=True)
    contested = ((score == last).sum(1) > (values == last).sum(1)) & last.isfinite().squeeze(1)
    found = found.sort(1).values
    order = found.gather(1, torch.argsort(score.gather(1, found), dim=1, stable=True))
    if bool(contested.any()):
        order[contested] = torch.argsort(score[contested], dim=1, stable=True)[:, :length]
    return order, allowed.gather(1, order)


def _pairs_in_groups(
    along: Tensor,
    v: Tensor,
    start: Tensor,
    score: Tensor,
    pattern: tuple[int, int],
    length: int,
    shrinking: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What grows, what goes, and which pairs are real, (R, T) each.

    Inside a group the order of growing is fixed, and so is the order of going; what grows takes the next that is to go.
    A group has N of those, so no more than N can grow there.
    """
    n, m = pattern
    value = -(along / v)
    allowed = ~start & (along > 0)
    in_groups = (len(value), -1, m)
    limit = torch.finfo(value.dtype).max
    growing = torch.argsort(
        value.clamp(-limit, limit).masked_fill(~allowed, torch.inf).view(in_groups), dim=2, stable=True
    )
    going = torch.argsort(score.double().masked_fill(~start, torch.inf).view(in_groups), dim=2, stable=True)
    gain, can = along.view(in_groups), allowed.view(in_groups)
    partner, taken = torch.zeros_like(going), torch.zeros_like(going[..., :1])
    for rank in range(m):
        g = growing[..., rank : rank + 1]
        d = going.gather(2, taken.clamp(max=m - 1))
        real = can.gather(2, g) & (taken < n)
        if shrinking:
            real &= gain.gather(2, d) < gain.gather(2, g)
        partner.scatter_(2, g, d)
        can.scatter_(2, g, real)  # a view of ``allowed``
        taken += real
    grow, valid = _ranked(value, allowed, length)
    return grow, grow // m * m + partner.view_as(start).gather(1, grow), valid


# -- what was done --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerReport:
    """One layer at one setting.

    ``swaps`` is the mean over the rows; ``error_before`` and ``error_after`` are the mean |e_r|, ``squared_before`` and
    ``squared_after`` the sum of e_r^2 over the rows: the squared bias of the layer's output. The error is what the mask
    leaves; ``correction="bias"`` then takes it away. Stacked experts are one layer with the rows of all; ``unreached``
    is how many of them no token reached, which were pruned by magnitude.
    """

    name: str
    rows: int
    columns: int
    sparsity: float
    refined: bool
    swaps: float
    error_before: float
    error_after: float
    squared_before: float
    squared_after: float
    unreached: int = 0


class Report(tuple[LayerReport, ...]):
    """The layers at one setting; prints as a table."""

    def __str__(self) -> str:
        """A table of one line for each layer."""
        width = max((len(r.name) for r in self), default=5)
        lines = [f"{'layer':{width}}  {'shape':>13}  zeros  swaps/row  mean |e| before -> after"]
        for r in self:
            shape, swaps = f"{r.rows}x{r.columns}", f"{r.swaps:.1f}" if r.refined else "-"
            errors = f"{r.error_before:.3g} -> {r.error_after:.3g}"
            note = f"  ({r.unreached} experts without tokens: by magnitude)" if r.unreached else ""
            lines.append(f"{r.name:{width}}  {shape:>13}  {r.sparsity:5.1%}  {swaps:>9}  {errors}{note}")
        return "\n".join(lines)


class _Stored(nn.Module):
    """The masks of one setting, packed, its biases where they are corrected, and its values where they are its own."""

    def __init__(self, layers: Sequence[Matrix], biases: bool, kept: Sequence[int]) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            w = layer.parameter
            self.register_buffer(f"bits{i}", torch.zeros(-(-w.numel() // 8), dtype=torch.uint8, device=w.device))
            if kept:
                self.register_buffer(f"values{i}", w.detach().new_zeros(kept[i]))
            if biases and (bias := layer.bias) is not None:
                self.register_buffer(f"bias{i}", torch.zeros_like(bias))


class _Removed(nn.Module):
    """What the setting in use has taken out of the parameters: pruned (or all dense) values, and dense biases."""

    def __init__(self, layers: Sequence[Matrix], zeros: Sequence[int], biases: bool) -> None:
        super().__init__()
        for i, (layer, k) in enumerate(zip(layers, zeros, strict=True)):
            self.register_buffer(f"values{i}", layer.parameter.detach().new_zeros(k))
            if biases and (bias := layer.bias) is not None:
                self.register_buffer(f"bias{i}", torch.zeros_like(bias))


# -- block by block -------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """How a block was called: its arguments, and where among them its hidden states stand."""

    args: list[Any]
    kwargs: dict[str, Any]
    slot: int | str

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.slot, int):
            args[self.slot] = hidden
        else:
            kwargs[self.slot] = hidden
        return first_tensor(block(*args, **kwargs))


class _Runner:
    """Runs calibration inputs through one block at a time.

    Where the hidden states of each block are the very tensor that the one before it returned (decoders), each block is
    replayed by itself with the other arguments that it was called with: masks, rotary embeddings, positions. Where
    something happens in between, and where there are no blocks, the whole network runs each time.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], data: Sequence[Input]) -> None:
        self.model, self.blocks = model, blocks
        self.data = [tell_apart(to_device(x, device_of(model))) for x in data]
        self.masks = [token_masks(model, x) for x in self.data]
        self.first: list[Tensor] = []
        self.calls: list[list[_Call]] = []  # for each batch, for each block
        self.chained = len(blocks) > 1 and all(self._capture(x) for x in self.data)
        self.hidden = list(self.first)

    def _capture(self, x: Input) -> bool:
        calls: list[_Call | None] = []
        last: list[Tensor] = []
        where = {id(b): i for i, b in enumerate(self.blocks)}

        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = not last
            slots: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            slot = next((k for k, v in slots if (isinstance(v, Tensor) if first else v is last[-1])), None)
            if slot is None or where[id(block)] != len(calls):
                calls.append(None)
                return
            if first:
                self.first.append(args[slot] if isinstance(slot, int) else kwargs[slot])
            rest = [None if k == slot else v for k, v in enumerate(args)]
            calls.append(_Call(rest, {k: None if k == slot else v for k, v in kwargs.items()}, slot))

        def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last[:] = [first_tensor(output)]

        handles = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in self.blocks]
        handles += [b.register_forward_hook(leave) for b in self.blocks]
        with removing(handles):
            call(self.model, x)
        if len(calls) != len(self.blocks) or None in calls:
            return False
        self.calls.append(cast(list[_Call], calls))
        return True

    def restart(self) -> None:
        """Back to the inputs of the first block."""
        self.hidden = list(self.first)

    def run(self, index: int, seen: Observed) -> None:
        """Run every batch through block ``index``, seen with the batch's masks."""
        for i, x in enumerate(self.data):
            seen.masks = self.masks[i]
            if self.chained:
                self.calls[i][index](self.blocks[index], self.hidden[i])
            else:
                call(self.model, x)

    def advance(self, index: int) -> None:
        """Replace the hidden states by the outputs of block ``index``."""
        if self.chained:
            self.hidden = [c[index](self.blocks[index], h) for c, h in zip(self.calls, self.hidden, strict=True)]


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Language models of transformers keep no keys and values inside: a replayed block would add to them."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    try:
        config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        config.use_cache = before  # type: ignore[union-attr]


def attention_only(name: str) -> bool:
    """Whether a layer belongs to an attention, by its name: what the reference refines by default."""
    return "attn" in name or "attention" in name


# -- the method -----------------------------------------------------------------------------------------------------


class DSnoT(Dynamic):
    """A trained network whose dial is the sparsity of its layers; each setting is a mask refined without training.

    The dial is ``Point(sparsity=s)`` for every s, ``Point(pattern="2:4")`` for every pattern, and the dense network,
    ``Point(sparsity=0.0)``. Sparsity is the share of zeros in every output row of the pruned matrices: the ``Linear``,
    ``Conv2d`` (of one group) and transformers' ``Conv1D`` layers inside the blocks, stacked experts (each expert by the
    tokens that reach it), recurrent weights, and other parameters that multiply activations as a whole. Embeddings,
    norms and head stay. ``coverage`` says what share of the network that is and why each other matrix is left out
    (a warning names those that cannot be served), ``sparsity_of(point)`` the share of zeros in the whole network.

    ``use`` puts zeros into the parameters themselves and keeps the pruned values aside, so the dense network is there
    again, bit by bit, when the dial is turned back; forward costs what the plain network costs. A setting is made when
    it is first used, or with ``prune()``, from ``calibration``: a few dozen sequences.

    ``fit`` trains the dense network by its own loss and prunes it at the end. There is no training with fixed masks:
    ``extract`` a setting and fine-tune that.

    Args:
        model: a trained network: of transformers, or any with Linear or Conv2d layers. Wrapped, not copied.
        example: an input it accepts: token ids (B, T), images, a tuple or mapping of tensors; or an iterable of
            batches. All of it serves as calibration where ``calibration`` is None.
        calibration: inputs to take the statistics from, a tensor or mapping, or batches. Where sequences are padded, in
            mappings with their ``attention_mask``: what it leaves out does not count. Do not take the text that you
            evaluate on.
        start: what the first mask comes from: "wanda", "magnitude" or "sparsegpt-score", scores by rows; or
            "sparsegpt", which also changes the values that it keeps, and chooses among all rows of 128 inputs at a
            time, so that rows have more zeros or fewer.
        sparsity: the sparsities on the dial, each in (0, 1); may be empty where there are patterns.
        pattern: N:M patterns on the dial, such as ("2:4", "4:8"): N kept of every M consecutive inputs.
        cycles: T, the most swaps in a row; 0 leaves the start as it is.
        variance_power: p of the variance in what grows first.
        same_sign: see ``refine``.
        shrinking: see ``refine``.
        eps: a row stops once |e_r| <= eps.
        stats: "pliant": eps is on e_r; "reference": on (tokens in a sequence) * e_r, where the reference has 0.1.
        variance: "total", or "within" sequences as the reference has it.
        refine: which layers are refined, by name (``attention_only`` is the reference's default); None: all. The
            others keep their start.
        correction: "bias": what is left of e_r goes into the layer's bias, which is made where there is none (stacked
            experts and bare parameters that have none keep their error).
        include: patterns of the names of layers that are pruned.
        exclude: patterns of those that are not.
        blocks: the path of the list of blocks, such as "model.layers"; None finds the longest list of blocks of one
            class; "" takes the whole network at once, head and all.
        batch_size: rows of calibration data that run together.
        dense_weights: the state dict of the dense network, for a model whose weights are sparse already.
        criterion: ``criterion(logits, target)`` of the loss. None: next-token cross entropy for language models,
            cross entropy otherwise.

    Raises:
        ValueError: an argument is outside what is allowed; there is no layer or no calibration data; a pattern does not
            fit a layer; a layer's weight is sparse already and there are no ``dense_weights``.
        TypeError: an argument is of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        calibration: Any = None,
        start: Start = "wanda",
        sparsity: float | Sequence[float] = (0.5, 0.6, 0.7),
        pattern: str | Sequence[str] = (),
        cycles: int = 50,
        variance_power: float = 1.0,
        same_sign: bool = True,
        shrinking: bool = True,
        eps: float = 0.0,
        stats: Stats = "pliant",
        variance: Variance = "total",
        refine: Callable[[str], bool] | None = None,
        correction: Correction = "none",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        blocks: str | None = None,
        batch_size: int = 8,
        dense_weights: Mapping[str, Tensor] | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        self.point = DENSE
        check.module("model", model)
        self.sparsity = _sparsities(sparsity)
        self.pattern = (pattern,) if isinstance(pattern, str) else check.names("pattern", pattern)
        check.distinct("pattern", self.pattern)
        self._patterns = {p: masks.parse_pattern(p) for p in self.pattern}
        if not self.sparsity and not self.pattern:
            raise ValueError("sparsity: () and pattern: () leave the dial empty; give one of them")
        self.start = check.choice("start", start, Start)
        self.cycles = check.whole("cycles", cycles, at_least=0)
        self.variance_power = check.number("variance_power", variance_power, at_least=0, at_most=16)
        self.same_sign = check.boolean("same_sign", same_sign)
        self.shrinking = check.boolean("shrinking", shrinking)
        self.eps = check.number("eps", eps, at_least=0)
        self.stats, self.variance = check.choice("stats", stats, Stats), check.choice("variance", variance, Variance)
        self.refine = check.optional(check.function, "refine", refine)
        self.correction = check.choice("correction", correction, Correction)
        self.include, self.exclude = check.names("include", include), check.names("exclude", exclude)
        self.blocks = check.optional(
            check.instance, "blocks", blocks, str, allowed="the path of a list of blocks, or ''"
        )
        self.batch_size = check.whole("batch_size", batch_size, at_least=1)
        check.optional(check.mapping, "dense_weights", dense_weights, lambda n, v: check.instance(n, v, Tensor))
        self.criterion = check.optional(check.function, "criterion", criterion)

        whole = calibration if calibration is not None else example
        self._data = _batches(whole, batch_size, "example" if calibration is None else "calibration")
        given = isinstance(example, Tensor | tuple) or (isinstance(example, Mapping) and "labels" not in example)
        self.example: Input = take(example if given else self._data[0], slice(0, 2))
        self.calibration = calibration if given else whole
        check_example(model, self.example)
        _check_calibration(model, self._data[0], "example" if calibration is None else "calibration")

        self.model = model
        self._block_names = _find_blocks(model, blocks)
        self._layers = self._select()
        self._names = [layer.name for layer in self._layers]
        self._chosen = [refine is None or _asked(refine, name) for name in self._names]
        masks.warn_refused(self.coverage, stacklevel=2)
        if dense_weights is not None:
            self._load_dense(dense_weights)
        self._check_layers(dense_weights is None)
        if correction == "bias":
            for layer in self._layers:
                if layer.kind == "layer" and layer.module.bias is None:
                    zeros = layer.parameter.detach().new_zeros(len(layer.read()))
                    layer.module.bias = nn.Parameter(zeros, requires_grad=False)
        self.stored = nn.ModuleDict()  # by position on the dial, from the dense network on
        self.removed = self._empty([0] * len(self._names))
        self.reports: dict[Point, Report] = {}

    # -- the contract ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The example and the calibration data follow where the network changes its precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._data = follow_dtype(self._data, fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network at the present setting."""
        return call(self.model, packed(args, kwargs))

    def loss(self, batch: Batch | Tensor) -> Tensor:
        """The dense network's own loss.

        A tensor of token ids (B, T), or a mapping with "labels" for a language model, is next-token cross entropy
        (labels in step with the inputs, -100 ignored, as in transformers). In a pair (input, target) the target stands
        where it is predicted: ids (B, T) and the ids one place on, or inputs and classes.

        Raises:
            RuntimeError: the dial is at a sparse setting, and gradients are on.
        """
        if self.training and torch.is_grad_enabled() and self.point != DENSE:
            raise RuntimeError(
                f"loss: the dial is at {self.point}, and DSnoT does not train with fixed masks (pruned values must "
                "survive). Use the dense setting, Point(sparsity=0.0), or extract the sparse network and train that"
            )
        return _loss(self.model, batch, self.criterion)

    def points(self) -> list[Point]:
        """The settings from the sparsest to the dense network."""
        found = [(1.0 - s, Point(sparsity=s)) for s in self.sparsity]
        found += [(n / m, Point(pattern=p)) for p, (n, m) in self._patterns.items()]
        return [point for _, point in sorted(found, key=lambda item: item[0])] + [DENSE]

    def sparsity_of(self, point: Mapping[str, Value]) -> float:
        """The share of zeros in the whole network at ``point``, among all its parameters; made first if need be."""
        before = self.point
        self.use(point)
        try:
            return masks.zeros_share(self.model)
        finally:
            self.use(before)

    def use(self, point: Mapping[str, Value]) -> Self:
        """Turn the dial; a setting that was never made is made from the calibration data.

        Raises:
            ValueError: ``point`` is not on the dial; or, where it is made now, a layer is never called or the
                activations are not finite.
        """
        wanted = self._known(point)
        if wanted != self.point:
            before = self.point
            with torch.inference_mode(False), torch.no_grad():
                try:
                    if wanted != DENSE and self._key(wanted) not in self.stored:
                        self._make([wanted])
                    self._go(wanted)
                except BaseException:
                    self._go(before)
                    raise
        return self

    def extract(self, point: Mapping[str, Value], sparse: bool = False, min_sparsity: float = 0.85) -> nn.Module:
        """The plain network of ``point``, its zeros permanent.

        Args:
            point: one of ``points()``.
            sparse: store layers sparsely where that is faster on this machine, which at the paper's 50-70 % it hardly
                ever is on a CPU; the network then has an attribute ``layouts``: for each layer what, and why.
            min_sparsity: see ``core.sparse.compile_sparse``.
        """
        before = self.point
        self.use(point)
        try:
            plain = copy.deepcopy(self.model).eval()
        finally:
            self.use(before)
        if sparse:
            example = to_device(self.example, device_of(plain))
            plain.layouts = compile_sparse(plain, min_sparsity, example)  # type: ignore[assignment]
        return plain

    def schedule(self, progress: float) -> None:
        """Training is that of the dense network; masks made before are of other weights, and are dropped."""
        self.use(DENSE)
        self.stored, self.reports = nn.ModuleDict(), {}

    def finish(self, train: Iterable[Batch]) -> None:
        """Prune the trained network; where no calibration data was given, on 128 rows of the training data."""
        if self.calibration is None:
            found: list[Input] = []
            for batch in train:
                found += _batches(batch if isinstance(batch, Tensor) else [batch], self.batch_size, "train")
                if sum(map(rows_of, found)) >= _FIT_ROWS:
                    break
            self._data = [to_device(x, torch.device("cpu")) for x in found] or self._data
        self.prune()

    # -- making the masks -------------------------------------------------------------------------------------------

    def prune(self, calibration: Any = None) -> Self:
        """Make every setting's masks anew from the dense weights, and leave the dial where it is.

        Args:
            calibration: other calibration data than the constructor's, in the same forms.

        Raises:
            ValueError: a layer is never called, or its activations contain NaN or infinity.
        """
        before, held = self.point, (self._data, self.calibration)
        if calibration is not None:
            found = _batches(calibration, self.batch_size, "calibration")
            _check_calibration(self.model, found[0], "calibration")
            self._data, self.calibration = found, calibration
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._make([p for p in self.points() if p != DENSE])
        except BaseException:
            self._data, self.calibration = held
            raise
        finally:
            self.use(before)
        return self

    def report(self, point: Mapping[str, Value] | None = None) -> Report:
        """What was done to every layer at ``point`` (the setting in use where it is None); made first if need be.

        Raises:
            ValueError: ``point`` is not on the dial, or it is the dense network.
        """
        wanted = self.point if point is None else self._known(point)
        if wanted == DENSE:
            raise ValueError("point: nothing was done at the dense setting; ask for a sparse one")
        if wanted not in self.reports:
            before = self.point
            self.use(wanted).use(before)
        return self.reports[wanted]

    def mask(self, name: str, point: Mapping[str, Value]) -> Tensor:
        """The mask of the layer ``name`` at ``point``, (O, I) or (E, O, I), true where a weight is kept.

        Raises:
            ValueError: there is no such layer or point.
        """
        if name not in self._names:
            raise ValueError(f"name: {name!r} is not pruned; there are: {', '.join(self._names)}")
        wanted = self._known(point)
        shape = self._layers[self._names.index(name)].read().shape
        if wanted == DENSE:
            return torch.ones(shape, dtype=torch.bool, device=device_of(self.model))
        self.report(wanted)
        bits = cast(_Stored, self.stored[self._key(wanted)]).get_buffer(f"bits{self._names.index(name)}")
        return masks.unpack_bits(bits, shape)

    def _make(self, points: Sequence[Point]) -> None:
        """Make the masks of ``points``; the dial is at the dense network afterwards, also after an error."""
        self._go(DENSE)
        stored, reports = dict(self.stored.items()), dict(self.reports)
        try:
            with evaluating(self.model), _without_cache(self.model):
                runner = _Runner(self.model, [self.model.get_submodule(b) for b in self._block_names], self._data)
                for point in points:
                    self.stored[self._key(point)] = _Stored(self._layers, self.correction == "bias", self._none)
                    self.point = point
                    self.reports[point] = self._prune_blocks(point, runner)
                    self._go(DENSE)
        except BaseException:
            self._go(DENSE)  # by the masks that were begun; then those from before
            self.stored, self.reports = nn.ModuleDict(stored), reports
            raise

    @property
    def _none(self) -> list[int]:
        """How many values of its own a setting begins with in each layer; empty where all values are the dense ones."""
        return [0] * len(self._names) if self.start == "sparsegpt" else []

    def _prune_blocks(self, point: Point, runner: _Runner) -> Report:
        """Statistics of one block, its masks, and on with its outputs; the dial stands at ``point`` at the end."""
        stored = cast(_Stored, self.stored[self._key(point)])
        rows: list[LayerReport] = []
        runner.restart()
        for index, block in enumerate(self._block_names):
            inside = [i for i, name in enumerate(self._names) if not block or f"{name}.".startswith(f"{block}.")]
            layers = {self._names[i]: self._layers[i] for i in inside}
            with observe(layers, hessian=self.start.startswith("sparsegpt"), variance=self.variance) as seen:
                runner.run(index, seen)
            for i in inside:
                statistics = seen[self._names[i]]
                if not statistics.count:
                    raise ValueError(
                        f"model: its forward never calls the layer {self._names[i]!r} on the calibration data; "
                        "exclude it, or give data that reaches it"
                    )
                kept, values, error, report = self._mask_layer(i, statistics, point)
                rows.append(report)
                stored.get_buffer(f"bits{i}").copy_(masks.pack_bits(kept))
                if values is not None:
                    stored.register_buffer(f"values{i}", values[kept].to(self._layers[i].parameter.dtype))
                if self.correction == "bias" and (bias := self._layers[i].bias) is not None:
                    stored.get_buffer(f"bias{i}").copy_(bias + error)
                self._take_out(i)
            if index + 1 < len(self._block_names):
                runner.advance(index)
        return Report(rows)

    def _mask_layer(self, i: int, seen: Statistics, point: Point) -> tuple[Tensor, Tensor | None, Tensor, LayerReport]:
        """The mask of layer ``i``, values of its own, the error that it leaves (O,), and the report."""
        name, weight = self._names[i], self._layers[i].read()
        unreached = [e for e, n in enumerate(seen.counts) if not n] if isinstance(seen, StackedStatistics) else []
        pattern = self._patterns[str(point["pattern"])] if "pattern" in point else None
        budget = pattern or float(point["sparsity"])
        values, error, kept = None, None, None
        if self.start == "magnitude":
            score = masks.magnitude_score(weight)
        elif self.start == "wanda":
            score = masks.wanda_score(weight, seen.norm)
        elif self.start == "sparsegpt-score":
            score = masks.sparsegpt_score(weight, seen.hessian)
        else:
            flat, hessian = weight.view(-1, *weight.shape[-2:]), seen.hessian.view(-1, *[weight.shape[-1]] * 2)
            each = [masks.sparsegpt(w, h, budget) for w, h in zip(flat, hessian, strict=True)]
            kept, values, score = (torch.stack(found).view(weight.shape) for found in zip(*each, strict=True))
        if unreached:
            score[unreached] = masks.magnitude_score(weight[unreached]).to(score)
        if kept is None or unreached:
            if pattern is None:
                by_score = masks.row_mask(score, zeros_in_row(weight.shape[-1], float(point["sparsity"])))
            else:
                by_score = masks.group_mask(score, *pattern)
            if kept is None:
                kept = by_score
            else:
                kept[unreached] = by_score[unreached]
        if values is not None:
            values[unreached] = weight[unreached].double()
            mean = seen.mean.double()[..., None, :]
            error = ((weight.double() - values.masked_fill(~kept, 0.0)) * mean).sum(-1)
        chosen = self._chosen[i]
        tokens = seen.count / sum(map(rows_of, self._data))
        found = refine(
            weight if values is None else values,
            kept,
            seen.mean,
            seen.variance,
            seen.norm,
            cycles=self.cycles if chosen else 0,
            variance_power=self.variance_power,
            same_sign=self.same_sign,
            eps=self.eps / tokens if self.stats == "reference" else self.eps,
            pattern=pattern,
            score=score,
            shrinking=self.shrinking,
            error=error,
        )
        before, after = found.before, found.after
        report = LayerReport(
            name=name,
            rows=weight.shape[:-1].numel(),
            columns=weight.shape[-1],
            sparsity=1.0 - float(found.kept.double().mean()),
            refined=chosen and self.cycles > 0,
            swaps=float(found.swaps.double().mean()),
            error_before=float(before.abs().mean()),
            error_after=float(after.abs().mean()),
            squared_before=float(before.square().sum()),
            squared_after=float(after.square().sum()),
            unreached=len(unreached),
        )
        return found.kept, values, after, report

    # -- turning the dial -------------------------------------------------------------------------------------------

    def _key(self, point: Point) -> str:
        return str(self.points()[::-1].index(point))

    def _kept(self, i: int) -> Tensor:
        """The mask of layer ``i`` at the setting in use."""
        bits = cast(_Stored, self.stored[self._key(self.point)]).get_buffer(f"bits{i}")
        return masks.unpack_bits(bits, self._layers[i].read().shape)

    def _go(self, point: Point) -> None:
        """Put every value back in its place, then take out what ``point`` prunes."""
        if point == self.point:
            return
        for i, layer in enumerate(self._layers):
            values = self.removed.get_buffer(f"values{i}")
            if not values.numel():  # nothing is missing: the dense network, or one whose masks are being made
                continue
            weight = layer.read().clone()
            if values.numel() == weight.numel():
                weight = values.view(weight.shape)
            else:
                weight[~self._kept(i)] = values
            layer.write(weight)
            if self.correction == "bias" and (bias := layer.bias) is not None:
                bias.copy_(self.removed.get_buffer(f"bias{i}"))
        self.removed = self._empty([0] * len(self._names))
        self.point = point
        if point != DENSE:
            for i in range(len(self._names)):
                self._take_out(i)

    def _take_out(self, i: int) -> None:
        """Move what is pruned of layer ``i`` out of its weight, and its dense bias out of its bias."""
        layer, kept = self._layers[i], self._kept(i)
        weight, stored = layer.read(), cast(_Stored, self.stored[self._key(self.point)])
        sparse = weight.masked_fill(~kept, 0.0)
        if self.start == "sparsegpt":  # the kept values are others too
            sparse[kept] = stored.get_buffer(f"values{i}")
        gone = weight.flatten() if self.start == "sparsegpt" else weight[~kept]
        self.removed.register_buffer(f"values{i}", gone.clone())
        layer.write(sparse)
        if self.correction == "bias" and (bias := layer.bias) is not None:
            self.removed.register_buffer(f"bias{i}", bias.detach().clone())
            bias.copy_(stored.get_buffer(f"bias{i}"))

    def _empty(self, zeros: Sequence[int]) -> _Removed:
        return _Removed(self._layers, zeros, self.correction == "bias")

    # -- what ``save`` writes -----------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        """The setting in use, what it has taken out, the settings made so far and their reports."""
        return {
            "point": dict(self.point),
            "zeros": [self.removed.get_buffer(f"values{i}").numel() for i in range(len(self._names))],
            "stored": {key: self._own(cast(_Stored, slot)) for key, slot in self.stored.items()},
            "reports": {self._key(p): [asdict(row) for row in report] for p, report in self.reports.items()},
        }

    def _own(self, stored: _Stored) -> list[int]:
        """How many values of its own a setting has in each layer."""
        return [stored.get_buffer(f"values{i}").numel() for i in range(len(self._none))]

    def restructure(self, structure: dict[str, Any]) -> None:
        """Make room for the tensors of a network with this ``structure``."""
        if len(structure["zeros"]) != len(self._names):
            raise ValueError(f"structure: {len(structure['zeros'])} layers, the network has {len(self._names)}")
        points = self.points()[::-1]
        layers = self._layers
        biases = self.correction == "bias"
        self.stored = nn.ModuleDict({k: _Stored(layers, biases, own) for k, own in structure["stored"].items()})
        self.removed = self._empty(structure["zeros"])
        self.reports = {
            points[int(k)]: Report(LayerReport(**row) for row in rows) for k, rows in structure["reports"].items()
        }
        self.point = self._known(Point(**structure["point"]))

    # -- which layers -------------------------------------------------------------------------------------------------

    def _select(self) -> list[Matrix]:
        """The layers to prune, in the model's order, tied weights once; and ``coverage``, which says what they are."""
        blocks = self._block_names
        every = matrices(self.model, self.example)

        def inside(name: str) -> bool:
            return any(not b or f"{name}.".startswith(f"{b}.") for b in blocks)

        names = [m.name for m in every if inside(m.name)]
        masks.check_patterns(names, self.include, self.exclude, "matches no layer inside the blocks")
        wanted = {name for name in names if masks.chosen(name, self.include, self.exclude)}
        for name, module in self.model.named_modules():
            if is_matrix(module) and inside(name) and masks.chosen(name, self.include, self.exclude):
                weight = module._parameters.get("weight")
                if weight is None or not weight.is_floating_point():
                    raise ValueError(
                        f"model: the weight of {name!r} is no plain floating-point parameter (parametrised or "
                        "quantised); exclude the layer, or make it plain first"
                    )

        lists = [] if self.blocks is not None else _lists_of_blocks(self.model)

        def why(name: str, m: Matrix | None) -> tuple[str, bool]:
            if not inside(name):
                more = any(f"{name}.".startswith(f"{child}.") for children in lists for child in children)
                return f"outside the blocks {blocks[0].rpartition('.')[0]!r}", more
            return ("excluded", False) if m is None or name not in wanted else (m.unobserved, True)

        found = [m for m in every if m.name in wanted and not m.unobserved]
        if not found:
            raise ValueError(
                f"model: {type(self.model).__name__} has no Linear, Conv1D or Conv2d layer (of one group), nor another "
                "matrix whose inputs can be observed"
                + (f", that include={self.include} and exclude={self.exclude} leave" if every else " inside the blocks")
                + f"; blocks={self.blocks!r} means {blocks}"
            )
        self.coverage = masks.coverage(self.model, every, [m.parameter for m in found], why)
        return found

    def _check_layers(self, zeros: bool) -> None:
        """Every layer can be pruned as the dial says, and holds dense values."""
        for layer in self._layers:
            name, weight = layer.name, layer.parameter
            if layer.read().data_ptr() != weight.data_ptr():
                raise ValueError(
                    f"model: the weight of {name!r} is not contiguous (channels_last?), so it has no matrix to write "
                    "to; call model.to(memory_format=torch.contiguous_format) first"
                )
            columns = layer.read().shape[-1]
            for pattern, (_, m) in self._patterns.items():
                if columns % m:
                    raise ValueError(f"pattern: {pattern!r} does not fit {name!r}, whose rows have {columns} inputs")
            share = masks.count_zeros([weight]) / weight.numel()
            if zeros and _FEW_ZEROS < share < 1.0:  # a layer that starts as zero altogether is not a pruned one
                raise ValueError(
                    f"model: the weight of {name!r} is sparse already ({share:.0%} zeros), so there is nothing to grow "
                    "back; give dense_weights, the state dict of the dense network, or exclude the layer"
                )

    @torch.no_grad()
    def _load_dense(self, dense: Mapping[str, Tensor]) -> None:
        for layer in self._layers:
            weight, key = layer.parameter, layer.key
            if key not in dense or dense[key].shape != weight.shape:
                found = f"has shape {tuple(dense[key].shape)}" if key in dense else "is missing"
                raise ValueError(f"dense_weights: {key!r} {found}; the model has {tuple(weight.shape)}")
            weight.copy_(dense[key])

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"start={self.start!r}, sparsity={self.sparsity}, pattern={self.pattern}, cycles={self.cycles}, "
            f"layers={len(self._names)}, blocks={len(self._block_names)}, {self.coverage.share:.1%} of the matrices, "
            f"at {self.point}"
        )


# -- arguments and data ---------------------------------------------------------------------------------------------


def zeros_in_row(columns: int, sparsity: float) -> int:
    """int(I s), without the error of the product: 29 of 100 at 0.29."""
    return int(round(columns * sparsity, 6))


def _sparsities(sparsity: Any) -> tuple[float, ...]:
    def share(name: str, value: Any) -> float:
        return check.number(name, value, above=0, below=1)

    several = isinstance(sparsity, Sequence) and not isinstance(sparsity, str | bytes)
    found = check.sequence("sparsity", sparsity, share, empty=True) if several else (share("sparsity", sparsity),)
    check.distinct("sparsity", found)
    return tuple(sorted(found))


def _asked(refine: Callable[[str], bool], name: str) -> bool:
    try:
        return bool(refine(name))
    except Exception as error:  # a function of the caller's own may raise anything
        raise ValueError(f"refine: it fails for the layer {name!r}: {first_line(error)}") from error


def _check_calibration(model: nn.Module, x: Input, name: str) -> None:
    with evaluating(model), torch.no_grad():
        try:
            call(model, to_device(take(x, slice(0, 1)), device_of(model)))
        except Exception as error:  # a model of the caller's own may raise anything
            raise ValueError(f"{name}: the model does not accept it: {first_line(error)}") from error


def _batches(data: Any, size: int, name: str) -> list[Input]:
    """Calibration data as inputs of ``size`` rows at most: an input by itself, or an iterable of batches."""
    if isinstance(data, Tensor | tuple | Mapping):
        data = [data] if not isinstance(data, tuple) else [(data, None)]
    found: list[Input] = []
    allowed = "inputs (a tensor, a tuple or a mapping of tensors), or an iterable of batches"
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise check.wrong(name, data, allowed, TypeError)
    try:
        for batch in data:
            alone = isinstance(batch, Tensor) or (isinstance(batch, Mapping) and "labels" not in batch)
            x = batch if alone else split_batch(batch)[0]
            found += [take(x, slice(start, start + size)) for start in range(0, rows_of(x), size)]
    except (TypeError, ValueError, IndexError) as error:
        raise TypeError(f"{check.wrong(name, data, allowed)} ({first_line(error)})") from error
    if not found or not first_tensor(found[0]).numel():
        raise ValueError(f"{name}: there is no calibration data in it; a few dozen sequences are enough")
    return found


def _find_blocks(model: nn.Module, blocks: str | None) -> list[str]:
    """Names of the blocks that run one after the other; ``[""]``, the whole network, where there are none."""
    if blocks == "":
        return [""]
    if blocks is not None:
        try:
            container = model.get_submodule(blocks)
        except AttributeError:
            raise ValueError(f"blocks: {blocks!r} is no part of {type(model).__name__}") from None
        if not isinstance(container, nn.ModuleList | nn.Sequential) or not len(container):
            raise ValueError(f"blocks: {blocks!r} is a {type(container).__name__}; allowed: a list of blocks")
        return [f"{blocks}.{child}" for child, _ in container.named_children()]
    return max(_lists_of_blocks(model), key=len, default=[""])


def _lists_of_blocks(model: nn.Module) -> list[list[str]]:
    """The names of the children of every list of two or more blocks of one class that have matrices."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in module}) == 1:
            layered = all(any(is_matrix(m) or Bank.of(m) for m in child.modules()) for child in module)
            if layered and len(module) > 1:
                found.append([f"{name}.{child}" if name else child for child, _ in module.named_children()])
    return found


def _loss(model: nn.Module, batch: Any, criterion: Criterion | None) -> Tensor:
    """See ``DSnoT.loss``."""
    alone = isinstance(batch, Tensor)
    x, target = (batch, batch) if alone else split_batch(batch)
    whole = call(model, x)
    if criterion is not None:
        return loss(whole, target, criterion)
    output = logits(whole)
    tokens = output.dim() == 3 and isinstance(target, Tensor) and output.shape[:2] == target.shape
    if alone and not tokens:
        raise TypeError(
            f"batch: a tensor alone is taken for token ids (B, T), but the model answers with shape "
            f"{tuple(output.shape)}; give (input, target)"
        )
    if tokens:
        if alone or isinstance(batch, Mapping):
            output, target = output[:, :-1], target[:, 1:]
        whole, target = output.flatten(0, 1), target.flatten()
    return loss(whole, target)
