"""RD-Pruning: efficient joint optimization of layer-adaptive weight pruning. ICCV 2023, arXiv 2308.10438.

Prune one layer alone by magnitude and the output of the network moves a little; prune many, and the squared movements
*add up*, nearly. So measure for each layer one curve (weights removed -> movement of the output), then choose how much
to remove from each by solving a knapsack exactly. No gradients and no labels; random inputs will do.

Symbols: W_l the weight of layer l = 1..L with N_l entries, N their sum; f(x) in R^C the logits; S the sparsity wanted.

Curve (``distortion_curves``), on n calibration inputs, evaluation mode, option j removes the k_lj smallest |w|::

    Y      = f(X)                                                                   (n, C)
    d_l(j) = reduce_x mean_c (Y[x, c] - f_{W_l <- prune(W_l, k_lj)}(X)[x, c])^2      reduce: mean, or max (worst case)

Problem (``allocate``)::

    min  sum_l d_l(j_l)    subject to    sum_l kap_l(j_l) >= B

    G[0][0] = 0, G[0][s > 0] = inf
    G[l][s] = min_j d_l(j) + G[l-1][max(0, s - kap_l(j))]      s = 0..B      float64, O(L B P) time, O(L B) memory
    j_L = argmin at s = B, then s <- max(0, s - kap_L(j_L)), and so on down to layer 1

with kap = floor(cost / q) and B = ceil(target / q), so that rounding to the quantum q is on the safe side. The answer
of a rounded table is then an upper bound, and what could be better is searched without rounding (``_refined``).

A curve is measured where it matters: first a coarse grid, then, around the optimum of the curves as known so far, ever
finer, until the optimum and its neighbours have all been measured. What runs before the layer that changes is not
run again (``_Meter``).

One shot: curves, allocation, masks, fine-tuning with the masks fixed. Iterative: the same again and again, each time on
the network as pruned and fine-tuned so far, with masks that only grow.

Where this file differs from the paper:

- The target is ceil(S N), not round(S N): rounding can fall short of S by half a weight.
- "Feasible and tight" (overshoot within one grid step) holds for curves that never fall. Where a curve falls, the best
  answer of the at-least problem may remove more than asked, because more is cheaper.
- k_lj = floor(j N_l / P) in whole numbers. int(phi_j N_l) in floating point loses one (int(0.29 * 100) is 28).
- With the largest share of a layer capped, the cap itself is on the menu too; without it a grid of hundredths could
  never go beyond 99 %, whatever the cap. In later rounds so is the number that is masked already.
- With a quantum of one's own a target near the most that the menu offers can be lost by rounding; everything at its
  most is the answer then.
- A zero stays zero because of the mask. Optimiser state of a masked entry fed by earlier gradients dies out by itself
  (its gradient is zero from then on) and moves a number that no one uses.
- Each sparsity keeps the values of its kept entries themselves (and its masks at one bit a weight), not differences
  from the dense ones: in floating point dense + (value - dense) is not always the value.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pliant.core import check, masks
from pliant.core.activations import answer_mask
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
    inputs_of,
    logits,
    map_tensors,
    packed,
    predictions,
    rows_of,
    split_batch,
    take,
    tensors_in,
    to_device,
)
from pliant.core.matrices import Matrix, matrices
from pliant.core.objective import Criterion, loss
from pliant.core.sparse import compile_sparse

Mode = Literal["iterative", "oneshot"]
Reduce = Literal["mean", "max"]
Reference = Literal["current", "dense"]
Cost = Literal["parameters", "macs"]
Allocation = Literal["rd", "lamp", "erk", "uniform", "global"]
DENSE = Point(sparsity=0.0)
_NOISE_ROWS = 128
_EXACT = 200_000  # of a table's columns
_PARTIAL = 2_000_000  # partial answers that are followed
_ANSWERS_HELD = 1 << 30  # bytes of modules' answers that are kept at a time
_COARSE = 10  # parts of a curve between whose ends it is measured first


# -- the curves -----------------------------------------------------------------------------------------------------


def menu(numel: int, points: int | str = 100, most: float = 0.999, least: int = 0) -> list[int]:
    """The numbers of zeros that a layer of ``numel`` weights may have: ascending, from ``least`` to the cap.

    Args:
        numel: N_l.
        points: P for the shares j / P, j = 0..P; or ``"geometric"``: 18 steps of 5 % up to 90 %, then 16 steps in which
            the share that is *kept* shrinks by a constant factor, down to the cap (fine near 1, where P = 100 is not).
        most: the largest share that may go. Below 1 at least one weight stays.
        least: what is masked already.
    """
    cap = max(least, min(numel, int(most * numel)))
    if isinstance(points, str):
        last = max(1.0 - cap / numel, 1.0 / numel)
        kept = [0.1 * (last / 0.1) ** (j / 16) for j in range(1, 17)] if last < 0.1 else []
        grid = [j * numel // 20 for j in range(19)] + [int(numel * (1.0 - k)) for k in kept]
    else:
        grid = [j * numel // points for j in range(points + 1)]
    return sorted({k for k in grid if least <= k <= cap} | {least, cap})


@torch.no_grad()
def distortion_curves(
    model: nn.Module,
    weights: Sequence[masks.Weight],
    zeros: Sequence[Sequence[int]],
    data: Sequence[Input],
    *,
    reduce: Reduce = "mean",
    reference: Sequence[Tensor] | None = None,
) -> list[list[float]]:
    """d_l(j) for every layer l and every ascending number of zeros ``zeros[l][j]``; the model is left as it was.

    Args:
        model: the network; evaluated in evaluation mode.
        weights: the prunable weights, masked or not.
        zeros: for each weight the numbers of smallest entries to remove, masked ones counted first.
        data: calibration inputs.
        reduce: the mean over the samples, which is what adds up over layers, or their maximum.
        reference: Y for each input; the network's own present output by default, so that d_l(0) is exactly 0.

    Raises:
        ValueError: the output contains NaN or infinity.
    """
    meter = _Meter(model, weights, data, reduce, reference)
    return [meter.measure(layer, counts) for layer, counts in enumerate(zeros)]


class _Meter:
    """Measures d_l(k) for one layer and number of zeros after another.

    What the layer's change cannot reach is computed once: a module that had returned before the layer was first called
    is replaced by its answer. The answers are those of the most pruned layer; they are used only where with them the
    layer as it was moves the output as it did, to the bit, so that a weight which is read before its layer is called
    does no harm.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[masks.Weight],
        data: Sequence[Input],
        reduce: Reduce,
        reference: Sequence[Tensor] | None,
    ) -> None:
        self.model, self.weights, self.data, self.reduce = model, weights, data, reduce
        with torch.no_grad(), evaluating(model):
            self.target = outputs(model, data) if reference is None else list(reference)
            self.start = _distortion(model, data, self.target, reduce)
        self.known: dict[int, dict[int, float]] = {}  # by layer: non-zero weights that went -> movement
        self.before: dict[int, list[_Answers]] = {}  # by layer, for each input
        self.held = 0

    @torch.no_grad()
    def measure(self, layer: int, counts: Sequence[int]) -> list[float]:
        """d_l at each number of zeros; the weight is put back whatever happens."""
        weight = self.weights[layer]
        value = weight.value().clone()
        order = masks.magnitude_order(value, weight.kept)
        real = [0, *(value.flatten()[order] != 0).cumsum(0).tolist()]  # non-zero weights among the first k
        saved = weight.parameter.detach().clone()
        known = self.known.setdefault(layer, {0: self.start})
        try:
            with evaluating(self.model):
                for k in sorted(counts, reverse=True):
                    gone = real[k]
                    if gone not in known:
                        flat = value.flatten().index_fill(0, order[:k], 0.0)
                        weight.parameter.copy_(flat.view(saved.shape))
                        if layer in self.before:
                            known[gone] = self._moved(self.before[layer])
                        else:
                            known[gone] = self._note(layer, saved)
        finally:
            weight.parameter.copy_(saved)
        return [known[real[k]] for k in counts]

    def _moved(self, answers: Sequence[_Answers] = ()) -> float:
        return _distortion(self.model, self.data, self.target, self.reduce, answers)

    def _note(self, layer: int, saved: Tensor) -> float:
        """The movement as the layer is now; and the answers before it, if they hold for the layer as it was."""
        weight = self.weights[layer]
        answers = [_Answers(self.model, {id(m) for m, _ in weight.owners}) for _ in self.data]
        found = self._moved(answers)
        size = sum(a.freeze() for a in answers)
        self.before[layer] = []
        if size and self.held + size <= _ANSWERS_HELD:
            weight.parameter.copy_(saved)
            if self._moved(answers) == self.start:
                self.before[layer] = answers
                self.held += size
        return found


class _Answers:
    """What the modules answered that ended before one of ``owners`` began: noted in a first run, given in later ones.

    Of a finished module its own modules are forgotten, and of the children of an ``nn.Sequential`` all but the last:
    nothing else looks at what they gave.
    """

    def __init__(self, model: nn.Module, owners: set[int]) -> None:
        self.model, self.owners = model, owners
        self.answers: dict[int, Any] = {}  # by call: the n-th of the run
        self.frozen = False

    def freeze(self) -> int:
        """From now on the answers are given; returns their bytes."""
        self.frozen = True
        return sum(t.nbytes for answer in self.answers.values() for t in tensors_in(answer))

    @contextmanager
    def running(self) -> Iterator[None]:
        """For one run of the model."""
        calls, begun = 0, False
        parents: list[tuple[nn.Module | None, list[int]]] = [(None, [])]  # the open calls, and the calls they made

        def wrap(module: nn.Module, forward: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls, begun
                number, calls = calls, calls + 1
                if self.frozen and number in self.answers:
                    calls = self.ends[number]
                    answer = self.answers[number]
                    return args[0] if answer is None else map_tensors(answer, torch.clone)
                begun = begun or id(module) in self.owners
                parents.append((module, []))
                try:
                    answer = forward(*args, **kwargs)
                finally:
                    _, inner = parents.pop()
                if not self.frozen and not begun and _is_plain(answer):
                    for child in inner:
                        self.answers.pop(child, None)
                    parent, siblings = parents[-1]
                    if type(parent) is nn.Sequential:  # which hands each answer to the next and to no one else
                        for sibling in siblings:
                            self.answers[sibling] = None
                    self.answers[number] = map_tensors(answer, torch.clone)
                    self.ends[number] = calls
                    siblings.append(number)
                return answer

            return run

        if not self.frozen:
            self.ends: dict[int, int] = {}
        plain = [m for m in self.model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        modules = [m for m in plain if "forward" not in vars(m)]
        for module in modules:
            module.forward = wrap(module, module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def _is_plain(answer: Any) -> bool:
    """A tensor, or a tuple of tensors: what can be copied and given again."""
    return isinstance(answer, Tensor) or (type(answer) is tuple and all(isinstance(t, Tensor) for t in answer))


@torch.no_grad()
def outputs(model: nn.Module, data: Sequence[Input]) -> list[Tensor]:
    """The logits for each calibration input, in evaluation mode; zero where an input's mask says that none count."""
    with evaluating(model):
        found = [_answer(model, x)[0].detach().clone() for x in data]
    if not all(bool(torch.isfinite(y).all()) for y in found):
        raise ValueError("calibration: the model's output on it contains NaN or infinity")
    return found


def _distortion(
    model: nn.Module,
    data: Sequence[Input],
    target: Sequence[Tensor],
    reduce: Reduce,
    answers: Sequence[_Answers] = (),
) -> float:
    """reduce_x mean_c (target - output)^2; single samples in the output's precision, their sum in float64.

    Of answers (B, T, C) that have a mask, the mean is over each sample's own positions: padding moves nothing.
    """
    moved = []
    for i, (x, y) in enumerate(zip(data, target, strict=True)):
        with answers[i].running() if answers else nullcontext():
            answer, counted = _answer(model, x)
        each = (y - answer).square().flatten(1).mean(1)
        moved.append(each if counted is None else each * (counted.shape[1] / counted.sum(1).clamp_min(1)))
    each = torch.cat(moved).double()
    value = float(each.mean() if reduce == "mean" else each.max())
    if not math.isfinite(value):
        raise ValueError("model: pruned, its output contains NaN or infinity")
    return value


def _answer(model: nn.Module, x: Input) -> tuple[Tensor, Tensor | None]:
    """The logits, zero at positions that do not count, and the mask (B, T) of those that do."""
    output = call(model, x)
    try:
        y = logits(output)
    except TypeError:  # several predictions: what moves is all of their numbers together
        return torch.cat([t.flatten(1) for t in predictions(output).values()], 1), None
    counted = answer_mask(model, x, y)
    return (
        (y, None)
        if counted is None
        else (y.masked_fill(~counted.view(*counted.shape, *[1] * (y.dim() - 2)), 0.0), counted)
    )


# -- the dynamic programme ------------------------------------------------------------------------------------------


def allocate(
    curves: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    target: int,
    *,
    quantum: int | None = None,
) -> list[int]:
    """The option of each layer that minimises the sum of the curves with costs of ``target`` at least.

    Exact without a ``quantum``: up to 200,000 in all by one table, above that by a table in larger units and a search
    of everything that could be better than its answer. Should the search meet more than two million partial answers,
    which curves of a few hundred layers can do, the best of those are followed.

    The costs may be anything that adds up: weights removed, multiply-adds saved, bytes, microseconds.

    Args:
        curves: ``curves[l][j]`` >= 0, the loss of option j of layer l; they need not be monotone.
        costs: ``costs[l][j]`` >= 0, what that option saves, whole numbers.
        target: what must be saved.
        quantum: the unit q of a table that is not refined: faster, and as coarse as the unit. Costs are rounded down
            to it and the target up, so the answer saves ``target`` all the same.

    Returns:
        The index j_l of each layer; among equals the one that saves least.

    Raises:
        ValueError: shapes differ, a number is negative or not finite, or no choice saves ``target``.
    """
    if not curves or len(curves) != len(costs):
        raise ValueError(f"costs: {len(costs)} layers against {len(curves)} curves; both need the same, one at least")
    for layer, (curve, cost) in enumerate(zip(curves, costs, strict=True)):
        if not curve or len(curve) != len(cost):
            raise ValueError(f"costs: layer {layer} has {len(cost)} options and a curve of {len(curve)}")
        if not all(math.isfinite(d) and d >= 0.0 for d in curve):
            raise ValueError(f"curves: layer {layer} has a value that is negative or not finite")
        if min(cost) < 0:
            raise ValueError(f"costs: layer {layer} has a negative cost {min(cost)}")
    total = sum(max(cost) for cost in costs)
    if target > total:
        raise ValueError(f"target: {target} cannot be reached; the largest options of all layers together save {total}")
    if quantum is not None:
        return _by_table(curves, costs, target, check.whole("quantum", quantum, at_least=1, at_most=2**62))
    if total <= _EXACT:
        return _by_table(curves, costs, target, 1)
    return _refined(curves, costs, target, _by_table(curves, costs, target, math.ceil(total / 20_000)))


def _by_table(curves: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], target: int, q: int) -> list[int]:
    """The dynamic programme in units of q."""
    budget = max(0, -(-target // q))
    if sum(max(cost) // q for cost in costs) < budget:
        return [max(range(len(cost)), key=lambda j, c=cost: (c[j], -j)) for cost in costs]  # type: ignore[misc]

    best: NDArray[np.float64] = np.full(budget + 1, np.inf)  # G[0]
    best[0] = 0.0
    choices: list[NDArray[np.int32]] = []  # J[l][s]
    for curve, cost in zip(curves, costs, strict=True):
        now = np.full(budget + 1, np.inf)
        choice = np.zeros(budget + 1, np.int32)
        candidate = np.empty(budget + 1)
        for j in sorted(range(len(cost)), key=lambda i, c=cost: c[i]):  # type: ignore[misc]  # ties: the least comes first
            kap = min(cost[j] // q, budget)
            candidate[:kap] = best[0]
            candidate[kap:] = best[: budget + 1 - kap]
            candidate += curve[j]
            better = candidate < now
            np.copyto(now, candidate, where=better)
            choice[better] = j
        best = now
        choices.append(choice)

    found: list[int] = []
    left = budget
    for choice, cost in zip(reversed(choices), reversed(costs), strict=True):
        j = int(choice[left])
        found.append(j)
        left = max(0, left - cost[j] // q)
    return found[::-1]


def _refined(
    curves: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], target: int, found: list[int]
) -> list[int]:
    """The best answer, found from a good one without rounding.

    For a price lam of a unit saved, every answer that saves enough loses g = lam target + sum_l min_j (d_lj - lam k_lj)
    at least, and by the reduced losses r_lj = d_lj - lam k_lj - min_j(...) >= 0 exactly
    g + sum_l r_l + lam (saved - target). What exceeds the loss of ``found`` there is left out layer by layer, and of
    two partial answers the one that loses more and saves no more. With the lam that makes g largest little is left.
    """
    d = [np.asarray(curve, np.float64) for curve in curves]
    k = [np.asarray(cost, np.float64) for cost in costs]

    def least(lam: float) -> tuple[float, float]:
        at = [int(np.argmin(a - lam * b)) for a, b in zip(d, k, strict=True)]
        saved = sum(float(b[j]) for b, j in zip(k, at, strict=True))
        return sum(float(a[j]) for a, j in zip(d, at, strict=True)) + lam * (target - saved), saved

    low, high = 0.0, 1e-12
    while least(high)[1] < target and high < 1e300:
        low, high = high, high * 4.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if least(middle)[1] < target else (low, middle)
    lam = max((low, high), key=lambda v: least(v)[0])
    bound = least(lam)[0]
    loss = math.fsum(float(a[j]) for a, j in zip(d, found, strict=True))
    gap = (loss - bound) + 1e-12 * abs(loss)

    reduced = [a - lam * b - (a - lam * b).min() for a, b in zip(d, k, strict=True)]
    options = [np.flatnonzero(r <= gap) for r in reduced]
    order = sorted(range(len(d)), key=lambda i: len(options[i]))
    rest = [0.0]  # the most that the layers after a place can save
    for i in order[::-1]:
        rest.append(rest[-1] + float(k[i][options[i]].max()))
    rest = rest[-2::-1]
    saved, lost = np.zeros(1), np.zeros(1)  # partial answers: what they save, and the sum of their reduced losses
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for place, i in enumerate(order):
        js = options[i]
        parts = []
        for j in js:  # one option at a time: memory for what passes alone
            s, r = saved + k[i][j], lost + reduced[i][j]
            passes = np.flatnonzero((s + rest[place] >= target) & (r + lam * np.maximum(s - target, 0.0) <= gap))
            parts.append((s[passes], r[passes], passes, np.full(len(passes), j)))
        s, r, parent, chosen = (np.concatenate(each) for each in zip(*parts, strict=True))
        if not len(s):  # by rounding alone: nothing is better
            return found
        # Losses are r + lam s. Sorted by what is saved, the most first, only new minima of the loss stay.
        value = r + lam * s
        by = np.lexsort((value, -s))
        best = np.minimum.accumulate(value[by])
        stay = by[np.concatenate(([True], value[by][1:] < best[:-1]))]
        if len(stay) > _PARTIAL:
            stay = stay[np.argsort(r[stay] + lam * np.maximum(s[stay] - target, 0.0), kind="stable")[:_PARTIAL]]
        saved, lost = s[stay], r[stay]
        trail.append((parent[stay], chosen[stay]))
    enough = np.flatnonzero(saved >= target)
    if not len(enough):
        return found
    at = int(enough[np.argmin(lost[enough] + lam * saved[enough])])
    answer = list(found)
    for i, (parent, chosen) in zip(order[::-1], trail[::-1], strict=True):
        answer[i], at = int(chosen[at]), int(parent[at])
    better = math.fsum(float(a[j]) for a, j in zip(d, answer, strict=True)) < loss
    return answer if better else found


def rounds(step: float, to: float) -> tuple[float, ...]:
    """The paper's schedule S_t = 1 - (1 - a)^t for a = ``step``, t = 1, 2, ... up to the first S_t >= ``to``.

    Raises:
        ValueError: ``step`` or ``to`` is outside (0, 1).
    """
    for name, value in (("step", step), ("to", to)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}: {value} is not in (0, 1)")
    found: list[float] = []
    while not found or found[-1] < to - 1e-9:
        found.append(round(1.0 - (1.0 - step) ** (len(found) + 1), 12))
    return tuple(found)


# -- what was planned -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """Curves, by layer name: ``distortion[name][j]`` of removing ``zeros[name][j]`` weights at ``source``.

    ``measured[name]`` are the points j that were measured; between them the curve is a straight line.
    """

    zeros: dict[str, tuple[int, ...]]
    distortion: dict[str, tuple[float, ...]]
    source: Point
    measured: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How many weights each layer loses.

    ``predicted`` is the sum of the curves there, NaN for an allocation that measures none. ``achieved`` is the share of
    the cost (of weights, or of multiply-adds) that really goes, ``source`` the setting that the plan was made at.
    """

    sparsity: float
    zeros: dict[str, int]
    per_layer: dict[str, float]
    achieved: float
    predicted: float
    source: Point
    curves: Curves | None = None


@dataclass(frozen=True)
class Additivity:
    """How far the additive prediction holds: the joint distortion ``measured``, and its ``ratio`` to ``predicted``."""

    predicted: float
    measured: float
    ratio: float


class _Stored(nn.Module):
    """What one setting owns, as buffers: packed masks, values at kept entries, and every other saved tensor."""

    def __init__(self, weights: Sequence[Tensor], zeros: Sequence[int], rest: Sequence[Tensor]) -> None:
        super().__init__()
        self.zeros = list(zeros)
        for i, (w, k) in enumerate(zip(weights, zeros, strict=True)):
            bits = -(-w.numel() // 8) if k else 0  # nothing is masked: no mask is stored
            self.register_buffer(f"bits{i}", torch.zeros(bits, dtype=torch.uint8, device=w.device))
            self.register_buffer(f"values{i}", w.new_zeros(w.numel() - k))
        for i, tensor in enumerate(rest):
            self.register_buffer(f"rest{i}", torch.zeros_like(tensor))

    def write(self, weights: Sequence[masks.Weight], rest: Sequence[Tensor]) -> None:
        for i, w in enumerate(weights):
            kept = cast(Tensor, w.kept)
            if self.zeros[i]:
                self.get_buffer(f"bits{i}").copy_(masks.pack_bits(kept))
            self.get_buffer(f"values{i}").copy_(w.parameter.detach()[kept])
        for i, tensor in enumerate(rest):
            self.get_buffer(f"rest{i}").copy_(tensor.detach())

    def read(self, weights: Sequence[masks.Weight], rest: Sequence[Tensor]) -> None:
        for i, w in enumerate(weights):
            kept = cast(Tensor, w.kept)
            if self.zeros[i]:
                kept.copy_(masks.unpack_bits(self.get_buffer(f"bits{i}"), kept.shape))
            else:
                kept.fill_(True)
            w.parameter.masked_fill_(~kept, 0.0)
            w.parameter[kept] = self.get_buffer(f"values{i}")
        for i, tensor in enumerate(rest):
            tensor.copy_(self.get_buffer(f"rest{i}"))


# -- the method -----------------------------------------------------------------------------------------------------


class RDPruning(Dynamic):
    """A trained network whose dial is its sparsity; each setting has its own masks and its own fine-tuned values.

    The dial is ``Point(sparsity=s)`` for every s, and ``Point(sparsity=0.0)``, the dense network. Sparsity is the share
    of zeros among the weights chosen by ``include`` and ``exclude`` (with ``cost="macs"``, the share of their
    multiply-adds that is gone). They are those of Conv and Linear layers and every other matrix that the example
    multiplies: stacked experts, recurrent weights, projections of an attention, parameters of one's own; each is one
    layer. ``coverage`` says what share of the network that is, ``sparsity_of(point)`` the share of zeros in the whole
    of it, biases, norms and embeddings included. ``use`` exchanges the values and masks in the parameters, which stay
    the same objects; the setting that is left is stored first, so nothing that was trained is lost.

    ``fit`` has one phase for each sparsity, in ascending order: plan and mask, then fine-tune with the masks fixed.
    Without training, ``prune()`` masks every setting from measured curves alone, and a setting that was never made is
    made so when it is first used.

    Args:
        model: the trained network; it is wrapped, not copied, and its weights get masks.
        example: an input it accepts.
        sparsity: the sparsities on the dial, each in (0, 1).
        mode: "iterative": every phase starts from the one before, masks only grow. "oneshot": each from the dense one.
        points: P of the grid of shares j / P, or "geometric", which is fine near 1.
        every_point: measure every point of every curve, not those alone that can matter to the plan.
        reduce: "mean" of the output's movement over the calibration samples, or "max", which does not add up.
        reference: movement away from the "current" network's output, or from the "dense" one's.
        calibration: a tensor or batches; the example where it is None; "noise" for N(0, 1) in the example's shape.
        max_layer_sparsity: the largest share that ``allocation="rd"`` may remove from one layer.
        cost: what the sparsity is a share of: "parameters" or "macs".
        allocation: "rd", or one of the opponents: "lamp", "erk", "uniform", "global".
        include: patterns of the names of layers that may be pruned (``lstm.weight_hh_l0`` for a parameter).
        exclude: patterns of the names of those that may not.
        warmup: share of ``fit`` that trains the dense network first, for a network that is not trained yet.
        quantum: a unit in which the allocation rounds costs, see ``allocate``; None: exact.
        progress: show how far ``plan`` and ``prune`` are, where they take longer than a second.
        criterion: ``criterion(logits, target)``; cross entropy where it is None.

    Raises:
        ValueError: an argument is outside what is allowed, the calibration data is empty or gives NaN, the model has no
            prunable layer, or a sparsity cannot be reached under ``max_layer_sparsity``.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        sparsity: float | Sequence[float] = (0.5, 0.8, 0.9, 0.95),
        mode: Mode = "iterative",
        points: int | Literal["geometric"] = 100,
        every_point: bool = False,
        reduce: Reduce = "mean",
        reference: Reference = "current",
        calibration: Any = None,
        max_layer_sparsity: float = 0.999,
        cost: Cost = "parameters",
        allocation: Allocation = "rd",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        warmup: float = 0.0,
        quantum: int | None = None,
        progress: bool = True,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        self.point = DENSE
        self.phase = 0  # of a training under way: 0 none or the dense one, t the t-th sparsity
        check_example(model, example)
        self.sparsity = _sparsities(sparsity)
        self.mode = check.choice("mode", mode, Mode)
        self.points_grid = _points(points)
        self.every_point = check.boolean("every_point", every_point)
        self.reduce = check.choice("reduce", reduce, Reduce)
        self.reference = check.choice("reference", reference, Reference)
        self.max_layer_sparsity = check.number("max_layer_sparsity", max_layer_sparsity, above=0, at_most=1)
        self.cost, self.allocation = (
            check.choice("cost", cost, Cost),
            check.choice("allocation", allocation, Allocation),
        )
        if cost == "macs" and allocation != "rd":
            raise ValueError(f"cost: 'macs' needs allocation='rd'; {allocation!r} counts parameters")
        self.include, self.exclude = check.names("include", include), check.names("exclude", exclude)
        self.warmup = check.number("warmup", warmup, at_least=0, below=1)
        self.quantum = check.optional(check.whole, "quantum", quantum, at_least=1)
        self.progress = check.boolean("progress", progress)
        self.criterion = check.optional(check.function, "criterion", criterion)
        self.example, self.calibration = example, calibration
        self._data = _calibration(calibration, example)
        _check_answers(model, self._data[0])

        weights = masks.prunable(model, include, exclude, example)
        uses = masks.multiply_adds(model, weights, example)
        if unreached := [w.name for w, n in zip(weights, uses, strict=True) if not n]:
            warnings.warn(
                f"model: its forward never calls {', '.join(map(repr, unreached))}; left out of pruning", stacklevel=2
            )
        self._weights = [w for w, n in zip(weights, uses, strict=True) if n]
        if not self._weights:
            raise ValueError("model: its forward calls none of the prunable layers as a module")
        self._units = [n if cost == "macs" else 1 for n in uses if n]
        self._check_reachable()
        never = {w.name for w, n in zip(weights, uses, strict=True) if not n}

        def why(name: str, m: Matrix | None) -> tuple[str, bool]:
            if m is None and masks.chosen(name, self.include, self.exclude):
                return "its weight is under a parametrisation", True
            return ("the forward never uses it" if name in never else "excluded"), False

        taken = [w.parameter for w in self._weights]
        self.coverage = masks.coverage(model, matrices(model, example), taken, why)
        masks.warn_refused(self.coverage, stacklevel=2)

        self.model = model
        for weight in self._weights:
            masks.attach(weight)
        seen = {id(w.parameter) for w in self._weights} | {id(w.kept) for w in self._weights}
        self._rest: list[str] = []  # names of what a setting owns besides its masked weights, tied tensors once
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen and not name.endswith("_extra_state"):
                seen.add(id(tensor))
                self._rest.append(name)
        self.stored = nn.ModuleDict()  # by position on the dial, "0" the dense network
        self.plans: dict[Point, Plan] = {}

    # -- the contract ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The example and the calibration data follow where the network changes its precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._data = follow_dtype(self._data, fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network at the present sparsity."""
        return call(self.model, packed(args, kwargs))

    def loss(self, batch: Batch) -> Tensor:
        """The criterion at the present sparsity; the gradient of a masked weight is exactly zero."""
        x, target = split_batch(batch)
        return loss(call(self.model, x), target, self.criterion)

    def points(self) -> list[Point]:
        """The sparsities from the highest to the dense network."""
        return [Point(sparsity=s) for s in reversed(self.sparsity)] + [DENSE]

    def sparsity_of(self, point: Mapping[str, Value]) -> float:
        """The share of zeros in the whole network at ``point``, among all its parameters; see ``coverage``."""
        with self._at(point):
            return masks.zeros_share(self.model)

    def use(self, point: Mapping[str, Value]) -> Self:
        """Turn the dial: store the values in use, put those of ``point`` into the same parameters.

        A sparsity that was neither trained nor pruned yet is pruned here, one shot from the dense network.
        """
        wanted = self._known(point)
        if wanted != self.point:
            with self._undone_on_error(), torch.inference_mode(False), torch.no_grad():
                if self._index(wanted) and str(self._index(wanted)) not in self.stored:
                    self._prune_missing()
                self._go(wanted)
        return self

    def extract(self, point: Mapping[str, Value], sparse: bool = False, min_sparsity: float = 0.85) -> nn.Module:
        """The plain network of ``point``, its zeros permanent.

        Args:
            point: one of ``points()``.
            sparse: store layers sparsely where that is faster on this machine; the network then has an attribute
                ``layouts``, which says for each layer what was chosen and why.
            min_sparsity: see ``core.sparse.compile_sparse``.
        """
        with self._at(point):
            plain = masks.bake(copy.deepcopy(self.model)).eval()
        if sparse:
            example = to_device(self.example, device_of(plain))
            plain.layouts = compile_sparse(plain, min_sparsity, example)  # type: ignore[assignment]
        return plain

    def schedule(self, progress: float) -> None:
        """One phase for each sparsity, ascending; every phase begins with a plan and ends stored.

        A progress that falls back behind the present phase begins a new training from the dense network.
        """
        last = len(self.sparsity)
        if progress >= 1.0:
            wanted = last
        elif progress < self.warmup:
            wanted = 0
        else:
            done = (progress - self.warmup) / (1.0 - self.warmup)
            wanted = min(last, 1 + int(done * last + 1e-9))
        if wanted < self.phase:
            self.phase = 0
        if wanted == 0:
            self.use(DENSE)
        while self.phase < wanted:  # one at a time: a training of few steps still makes every setting
            with self._undone_on_error():
                self._begin(self.phase + 1)
            self.phase += 1
        if self.phase:
            self.use(self._points[self.phase])
        if progress >= 1.0:
            with torch.no_grad():
                self._store()
            self.phase = 0

    # -- planning -------------------------------------------------------------------------------------------------

    def plan(self, sparsity: float, curves: Curves | None = None) -> Plan:
        """How many weights each layer loses for a total share of ``sparsity`` in [0, 1); nothing is changed.

        It starts from the setting in use where ``mode`` is "iterative" and that setting is less sparse than wanted,
        otherwise from the dense network. ``curves`` of an earlier plan from there spare the
        measurement, but for points that matter to this plan alone.

        Raises:
            ValueError: ``sparsity`` is outside [0, 1), or out of reach under ``max_layer_sparsity``.
        """
        masks.target_count(check.number("sparsity", sparsity), 1)  # the check of its range
        here = self.mode == "iterative" and float(self.point["sparsity"]) < sparsity
        with self._at(self.point if here else DENSE):
            return self._plan(sparsity, curves, self.progress)

    def verify(self, plan: Plan) -> Additivity:
        """Prune all layers together as ``plan`` says, measure, and compare with the sum of the curves."""
        with self._at(plan.source), evaluating(self.model), torch.no_grad():
            data = self._inputs()
            target = self._target(data)
            saved = [w.parameter.detach().clone() for w in self._weights]
            try:
                for w in self._weights:
                    kept = masks.magnitude_mask(w.value(), plan.zeros[w.name], w.kept)
                    w.parameter.copy_(w.value().masked_fill(~kept, 0.0))
                measured = _distortion(self.model, data, target, self.reduce)
            finally:
                for w, values in zip(self._weights, saved, strict=True):
                    w.parameter.copy_(values)
        if plan.predicted:
            ratio = measured / plan.predicted
        else:
            ratio = 1.0 if measured == 0.0 else math.inf
        return Additivity(plan.predicted, measured, ratio)

    def prune(self, to: float | Plan | None = None) -> Self:
        """Mask without training: one setting, and turn the dial to it; or all, and leave the dial where it is.

        Args:
            to: a sparsity on the dial, or a plan for one; every sparsity by default.

        Raises:
            ValueError: the sparsity is not on the dial, or the plan is for another network.
        """
        if to is None:
            before, curves = self.point, None
            with self._undone_on_error():
                for index in range(1, len(self.sparsity) + 1):
                    curves = self._begin(index, curves, self.progress)
            return self.use(before)
        if isinstance(to, Plan):
            return self._carry_out(to)
        return self._carry_out(self.plan(float(self._known(Point(sparsity=float(to)))["sparsity"])))

    # -- what ``save`` writes -------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values; ``points`` is a method, so its argument is kept elsewhere."""
        return super().arguments() | {"points": self.points_grid}

    def structure(self) -> dict[str, Any]:
        """The setting in use, the phase of a training that is under way, and the zeros of every setting made so far."""
        return {
            "sparsity": float(self.point["sparsity"]),
            "phase": self.phase,
            "stored": {key: list(cast(_Stored, slot).zeros) for key, slot in self.stored.items()},
            "plans": [
                {
                    "sparsity": p.sparsity,
                    "zeros": p.zeros,
                    "achieved": p.achieved,
                    "predicted": None if math.isnan(p.predicted) else p.predicted,
                    "source": float(p.source["sparsity"]),
                }
                for p in self.plans.values()
            ],
        }

    def restructure(self, structure: dict[str, Any]) -> None:
        """Make room for the tensors of a network with this ``structure``. Curves are not kept; plans are."""
        stored = structure["stored"]
        for key, zeros in stored.items():
            if len(zeros) != len(self._weights) or not 0 <= int(key) <= len(self.sparsity):
                raise ValueError(f"structure: setting {key} has {len(zeros)} layers, the network {len(self._weights)}")
        self.stored = nn.ModuleDict({key: self._empty(zeros) for key, zeros in stored.items()})
        self.plans = {}
        for p in structure["plans"]:
            self.plans[Point(sparsity=p["sparsity"])] = Plan(
                p["sparsity"],
                dict(p["zeros"]),
                {w.name: p["zeros"][w.name] / w.parameter.numel() for w in self._weights},
                p["achieved"],
                math.nan if p["predicted"] is None else p["predicted"],
                Point(sparsity=p["source"]),
            )
        self.phase = structure["phase"]
        self.point = self._known(Point(sparsity=structure["sparsity"]))

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _points(self) -> list[Point]:
        return self.points()[::-1]

    def _index(self, point: Point) -> int:
        return self._points.index(point)

    def _check_reachable(self) -> None:
        if self.allocation != "rd":
            return
        sizes = [w.parameter.numel() for w in self._weights]
        total = sum(n * u for n, u in zip(sizes, self._units, strict=True))
        most = sum(int(self.max_layer_sparsity * n) * u for n, u in zip(sizes, self._units, strict=True))
        if masks.target_count(self.sparsity[-1], total) > most:
            raise ValueError(
                f"sparsity: {self.sparsity[-1]} is out of reach with max_layer_sparsity={self.max_layer_sparsity}; "
                f"at most {most / total:.6g} can go"
            )

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """After an error inside the block the dial, the settings and their values are as before."""
        before, stored, plans = self.point, dict(self.stored.items()), dict(self.plans)
        try:
            yield
        except BaseException:
            with torch.inference_mode(False), torch.no_grad():
                self._go(before)
            self.stored, self.plans = nn.ModuleDict(stored), plans
            raise

    @contextmanager
    def _at(self, point: Mapping[str, Value]) -> Iterator[None]:
        before = self.point
        self.use(point)
        try:
            yield
        finally:
            self.use(before)

    def _other(self) -> list[Tensor]:
        """Every saved tensor that is no masked weight: biases, norms and their statistics."""
        return [_tensor(self.model, name) for name in self._rest]

    def _empty(self, zeros: Sequence[int]) -> _Stored:
        return _Stored([w.parameter for w in self._weights], zeros, self._other())

    def _store(self) -> None:
        """Write the values in use to their setting."""
        key = str(self._index(self.point))
        if key not in self.stored:  # only the dense network is first stored here; the others get a slot with their mask
            self.stored[key] = self._empty([0] * len(self._weights))
        cast(_Stored, self.stored[key]).write(self._weights, self._other())

    def _go(self, point: Point) -> None:
        if point != self.point:
            self._store()
            cast(_Stored, self.stored[str(self._index(point))]).read(self._weights, self._other())
            self.point = point

    def _carry_out(self, plan: Plan) -> Self:
        """Make the setting of ``plan`` out of the plan's source, and turn the dial to it."""
        point = self._known(Point(sparsity=plan.sparsity))
        if set(plan.zeros) != {w.name for w in self._weights}:
            raise ValueError(f"plan: it is for the layers {list(plan.zeros)}, this network prunes others")
        self.use(plan.source)
        if point == DENSE:
            return self
        with torch.inference_mode(False), torch.no_grad():
            self._store()
            for w in self._weights:
                masks.set_mask(w, masks.magnitude_mask(w.value(), plan.zeros[w.name], w.kept))
            self.point = point
            self.plans[point] = plan
            self.stored[str(self._index(point))] = self._empty([plan.zeros[w.name] for w in self._weights])
            self._store()
        return self

    def _begin(self, index: int, curves: Curves | None = None, progress: bool = False) -> Curves | None:
        """Make setting ``index`` as a phase does; returns the curves where the next one can use them again."""
        self.use(self._points[index - 1] if self.mode == "iterative" else DENSE)
        with torch.inference_mode(False):
            plan = self._plan(self.sparsity[index - 1], curves, progress)
            self._carry_out(plan)
        return plan.curves if self.mode == "oneshot" else None

    def _prune_missing(self) -> None:
        before, curves = self.point, None
        for index, s in enumerate(self.sparsity, 1):
            if str(index) not in self.stored:
                self._go(DENSE)
                plan = self._plan(s, curves, self.progress)
                self._carry_out(plan)
                curves = plan.curves
        self._go(before)

    def _inputs(self) -> list[Input]:
        return [to_device(x, device_of(self.model)) for x in self._data]

    def _target(self, data: Sequence[Input]) -> list[Tensor]:
        with self._at(self.point if self.reference == "current" else DENSE):
            return outputs(self.model, data)

    def _plan(self, sparsity: float, curves: Curves | None, progress: bool = False) -> Plan:
        """A plan from the setting in use."""
        sizes = [w.parameter.numel() for w in self._weights]
        total = sum(n * u for n, u in zip(sizes, self._units, strict=True))
        target = masks.target_count(sparsity, total)
        names = [w.name for w in self._weights]
        if self.allocation == "rd":
            if curves is not None and (curves.source != self.point or list(curves.zeros) != names):
                raise ValueError(f"curves: measured at {curves.source} on other ground than the plan's, {self.point}")
            curves, chosen = self._measure(target, curves, progress)
            zeros = [curves.zeros[n][j] for n, j in zip(names, chosen, strict=True)]
            predicted = math.fsum(curves.distortion[n][j] for n, j in zip(names, chosen, strict=True))
        else:
            kept = [w.kept for w in self._weights]
            zeros = masks.ALLOCATORS[self.allocation]([w.value() for w in self._weights], target, kept)
            curves, predicted = None, math.nan
        return Plan(
            sparsity=sparsity,
            zeros=dict(zip(names, zeros, strict=True)),
            per_layer={n: k / size for n, k, size in zip(names, zeros, sizes, strict=True)},
            achieved=sum(k * u for k, u in zip(zeros, self._units, strict=True)) / total,
            predicted=predicted,
            source=self.point,
            curves=curves,
        )

    def _measure(self, target: int, curves: Curves | None, progress: bool) -> tuple[Curves, list[int]]:
        """Curves, and the best option of each layer: all that could take its place in the plan has been measured.

        From a coarse grid on, the option that is best by the curves so far is measured, and the two gaps beside it are
        halved, until in every layer it and its neighbours are known.
        """
        names = [w.name for w in self._weights]
        if curves is None:
            masked = [int((~cast(Tensor, w.kept)).sum()) for w in self._weights]
            options: list[Sequence[int]] = [
                menu(w.parameter.numel(), self.points_grid, self.max_layer_sparsity, k)
                for w, k in zip(self._weights, masked, strict=True)
            ]
            known: list[dict[int, float]] = [{} for _ in names]
            steps = [1 if self.every_point else max(1, (len(ks) - 1) // _COARSE) for ks in options]
            wanted = [{*range(0, len(ks), step), len(ks) - 1} for ks, step in zip(options, steps, strict=True)]
        else:
            options = [curves.zeros[n] for n in names]
            measured = [curves.measured.get(n, range(len(ks))) for n, ks in zip(names, options, strict=True)]
            known = [{j: curves.distortion[n][j] for j in js} for n, js in zip(names, measured, strict=True)]
            wanted = [set() for _ in names]
        costs = [[k * u for k in ks] for ks, u in zip(options, self._units, strict=True)]
        meter: _Meter | None = None
        with _Bar("plan", progress) as bar:
            while True:
                bar.total += sum(map(len, wanted))
                for layer, js in enumerate(wanted):
                    if not js:
                        continue
                    if meter is None:
                        data = self._inputs()
                        meter = _Meter(self.model, self._weights, data, self.reduce, self._target(data))
                    found = meter.measure(layer, [options[layer][j] for j in sorted(js)])
                    known[layer].update(zip(sorted(js), found, strict=True))
                    bar.step(len(js))
                values = [_line(points, len(ks)) for points, ks in zip(known, options, strict=True)]
                chosen = allocate(values, costs, target, quantum=self.quantum)
                wanted = [_near(j, points) for j, points in zip(chosen, known, strict=True)]
                if not any(wanted):
                    break
        if meter is None and curves is not None:
            return curves, chosen
        found_curves = Curves(
            {n: tuple(ks) for n, ks in zip(names, options, strict=True)},
            {n: tuple(d) for n, d in zip(names, values, strict=True)},
            self.point,
            {n: tuple(sorted(points)) for n, points in zip(names, known, strict=True)},
        )
        return found_curves, chosen

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"sparsity={self.sparsity}, mode={self.mode!r}, allocation={self.allocation!r}, "
            f"{self.coverage.share:.1%} of the matrices, at {self.point}"
        )


def _line(points: Mapping[int, float], length: int) -> list[float]:
    """A curve of which some points are known, both ends among them: straight between them, exact at them."""
    at = sorted(points)
    found: list[float] = np.interp(np.arange(length), at, [points[j] for j in at]).tolist()
    for j in at:
        found[j] = points[j]
    return found


def _near(j: int, points: Mapping[int, float]) -> set[int]:
    """What to measure next around option ``j``: itself, and the middles of the gaps beside it."""
    below = max((p for p in points if p < j), default=j)
    above = min((p for p in points if p > j), default=j)
    return {j, (below + j) // 2 if j - below > 1 else j, (j + above + 1) // 2 if above - j > 1 else j} - points.keys()


class _Bar:
    """Points measured and time left, from one second on and four times a second at most."""

    def __init__(self, what: str, shown: bool) -> None:
        self.what, self.shown, self.total, self.done = what, shown, 0, 0
        self.drawn = time.perf_counter() + 0.75
        self.bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def step(self, count: int) -> None:
        """Tell the bar that ``count`` more points are measured."""
        self.done += count
        now = time.perf_counter()
        if not self.shown or now - self.drawn < 0.25:
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn(self.what), BarColumn(), MofNCompleteColumn(), TextColumn("points"))
            console = Console(stderr=True)
            self.shown = console.is_terminal
            if not self.shown:
                return
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False, transient=True)
            self.task = self.bar.add_task(self.what)
            self.bar.start()
        self.drawn = now
        self.bar.update(self.task, completed=self.done, total=self.total, refresh=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


# -- arguments ------------------------------------------------------------------------------------------------------


def _points(points: Any) -> int | str:
    if isinstance(points, str):
        return cast(str, check.choice("points", points, ("geometric",)))
    try:
        return check.whole("points", points, at_least=1, at_most=10_000)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; or 'geometric'") from None


def _sparsities(sparsity: Any) -> tuple[float, ...]:
    def share(name: str, value: Any) -> float:
        return check.number(name, value, above=0, below=1)

    several = isinstance(sparsity, Sequence) and not isinstance(sparsity, str | bytes)
    found = check.sequence("sparsity", sparsity, share) if several else (share("sparsity", sparsity),)
    check.distinct("sparsity", found)
    return tuple(sorted(found))


def _calibration(calibration: Any, example: Input) -> list[Input]:
    """Fixed calibration inputs: read once, so that every point of every curve sees the same ones."""
    if calibration is None:
        return [example]
    if isinstance(calibration, str):
        check.choice("calibration", calibration, ("noise",))
        if not first_tensor(example).is_floating_point():
            raise ValueError("calibration: 'noise' needs an example of real numbers, this one holds whole numbers")
        rng = torch.Generator().manual_seed(0)
        rows = max(_NOISE_ROWS, rows_of(example))
        return [map_tensors(example, lambda t: torch.randn(rows, *t.shape[1:], generator=rng).to(t))]
    try:
        found = [x for x in inputs_of(calibration) if rows_of(x)]
    except (TypeError, ValueError, RuntimeError) as error:
        allowed = "a tensor, batches, None, or 'noise'"
        raise TypeError(f"{check.wrong('calibration', calibration, allowed)} ({first_line(error)})") from error
    if not found:
        raise ValueError("calibration: it holds no inputs; give one sample at least")
    return found


def _check_answers(model: nn.Module, x: Input) -> None:
    """The model takes the calibration data."""
    with evaluating(model), torch.no_grad():
        try:
            call(model, to_device(take(x, slice(0, 1)), device_of(model)))
        except Exception as error:  # a model of the caller's own may raise anything
            raise ValueError(f"calibration: the model does not accept it: {first_line(error)}") from error


def _tensor(model: nn.Module, name: str) -> Tensor:
    parent, _, last = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(parent), last)
    return found
