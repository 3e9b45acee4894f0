"""BigNAS: one super-network whose children are deployed as they are, without retraining.

Yu, Jin, Liu, Bender, Kindermans, Tan, Huang, Song, Pang, Le: "BigNAS: scaling up neural architecture search with big
single-stage models", ECCV 2020, arXiv:2003.11142.

The idea: (1) every step trains the largest child, the smallest, and N drawn at random (the *sandwich*); (2) only the
largest sees the labels, the others imitate its output of the same step (*in-place distillation*); (3) a child of any
size is then cut out, its normalisation statistics are estimated anew, and it is done.

With f(x; a) the output (B, C) of child a, whose weights are slices of one set w:

    largest      L_max = CE(f(x; a_max), y) with label smoothing 0.1, dropout and drop-connect on
                 z = softmax(f(x; a_max)), no gradient
    others       L_a   = -sum_k z_k log softmax(f(x; a))_k, mean over the batch, dropout off;
                 a = a_min and N draws, every coordinate uniform
    step         gradient of  L_max + L_min + sum_{n=1..N} L_{a_n}
    decay        lambda w on the weights of convolutions and linear layers, that is, through the largest child alone
    rate         linear warm-up, then lr(t) = max(0.05 lr_0, lr_0 0.97^(epoch/2.4)): exponential, constant at the end
    start        the scale of the last normalisation of every residual branch is zero: each block is its shortcut
    choice       a coarse grid of children, the best one within the budget; then mutations of it, kept when better

Axes: the input's resolution, and for each stage width, depth, kernel size and expansion (``pliant.core.spaces``).
Slicing rules: the first channels, the first blocks, the centre of the filters; no transformation matrices.

Where codes differ from the paper (the specification lists them): gradients of the children are summed
(``reduce="mean"`` divides); a child's normalisation uses batch statistics while training and its own estimated ones
afterwards, never the super-network's; the whole search runs on validation data and its budget is in the units that are
counted (2 FLOPs per multiply-add). The paper's number of epochs is unknown. ``smallest=False``, ``largest=False`` and
``distill=False`` give the arms that the sandwich is compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from pliant.core import check
from pliant.core.calibration import Estimator, NormTable, batches_of
from pliant.core.cost import latency_ratio
from pliant.core.dynamic import Dynamic, Point, Value
from pliant.core.frontier import evaluate
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    device_of,
    evaluating,
    packed,
    removing,
    split_batch,
    take,
)
from pliant.core.objective import Criterion, Distillation, Metric, Quality, distillation, loss
from pliant.core.slicing import Slicing, make_divisible
from pliant.core.spaces import Axes, Space, check_axes
from pliant.core.subnetwork import SubNetwork

COARSE = {"resolution": 5, "depth": 4, "width": 2, "kernel": 4, "expansion": 2}


class BigNAS(Dynamic):
    """Resolution, width, depth, kernel size and expansion of one set of weights.

    Args:
        model: your network at its largest; it is wrapped, not copied. ``MobileNet`` is a ready-made one.
        example: an input batch for it, at the largest resolution.
        width: shares of the channels of every stage, or {stage: numbers of channels}; None: (0.5, 0.75, 1) where there
            are channels to cut.
        depth: shares of the blocks of every stage, or {stage: numbers of blocks}; None: (0.5, 1) where there are any.
        kernel: odd filter sizes, such as (3, 5).
        expansion: shares of the inner channels; None: (0.5, 0.75, 1) where blocks have inner channels.
        resolution: heights of the input, the largest being the example's; empty: inputs are taken as they are.
        per_block: axes ("kernel", "expansion") chosen block by block instead of stage by stage.
        n_random: N, children drawn at random in a step.
        largest, smallest: whether the largest and the smallest child are part of every step.
        distill: children other than the largest imitate its output, by KL over classes or, of real numbers, by their
            mean squared difference; a function of (child's output, largest's output) says how, False gives them the
            labels.
        label_smoothing: of the default criterion, for children that see the labels.
        reduce: "sum" or "mean" over the children of a step.
        regularize: "largest": dropout and drop-connect act in the largest child alone; "all": in every one.
        zero_gamma: start every residual branch at zero. For training from scratch only: it overwrites weights.
        offer: how many points ``points()`` has before a search.
        calibration_batches: batches of training data for a child's normalisation statistics.
        estimator: "cumulative", "ofa" or "pooled", see ``pliant.core.calibration``.
        exclude: names of modules (fnmatch patterns) that keep their full width.
        divisor: kept channels are multiples of this where the sizes allow.
        stacks: names of the block lists that depth cuts; found by themselves where None.
        seed: of the draws. Draw number n depends on (seed, n) alone, so all ranks of a parallel run draw alike.
        criterion: ``criterion(output, target)``; cross entropy by default.

    ``use`` and ``extract`` take any point of ``space``, not only the offered ``points()``.

    Shapes: whatever the model takes and returns.

    Raises:
        ValueError: an argument is out of range, or the model cannot be cut; the message names what is wrong.
    """

    draws: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        width: Sequence[float] | Mapping[str, Sequence[int]] | None = None,
        depth: Sequence[float] | Mapping[str, Sequence[int]] | None = None,
        kernel: Sequence[int] = (),
        expansion: Sequence[float] | None = None,
        resolution: Sequence[int] = (),
        per_block: Sequence[str] = (),
        n_random: int = 2,
        largest: bool = True,
        smallest: bool = True,
        distill: bool | Distillation = True,
        label_smoothing: float = 0.1,
        reduce: Literal["sum", "mean"] = "sum",
        regularize: Literal["largest", "all"] = "largest",
        zero_gamma: bool = False,
        offer: int = 5,
        calibration_batches: int = 64,
        estimator: Estimator = "cumulative",
        exclude: Sequence[str] = (),
        divisor: int = 1,
        stacks: Sequence[str] | None = None,
        seed: int = 0,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        check.module("model", model)
        check_axes(width, depth, kernel, expansion, resolution, per_block)
        check.whole("n_random", n_random, at_least=0, at_most=10_000)
        check.boolean("largest", largest)
        check.boolean("smallest", smallest)
        if not isinstance(distill, bool):
            check.function("distill", distill)
        check.number("label_smoothing", label_smoothing, at_least=0, below=1)
        check.choice("reduce", reduce, ("sum", "mean"))
        check.choice("regularize", regularize, ("largest", "all"))
        check.boolean("zero_gamma", zero_gamma)
        check.whole("offer", offer, at_least=1, at_most=10_000)
        check.whole("calibration_batches", calibration_batches, at_least=1)
        check.choice("estimator", estimator, Estimator)
        check.names("exclude", exclude)
        check.whole("divisor", divisor, at_least=1)
        check.optional(check.names, "stacks", stacks)
        check.seed("seed", seed)
        check.optional(check.function, "criterion", criterion)
        if n_random + largest + smallest < 1:
            raise check.wrong("n_random", n_random, "1 or more where neither the largest nor the smallest is trained")
        if distill and not largest:
            raise ValueError("distill: the largest child is the teacher; give largest=True, or distill=False")
        self.width, self.depth, self.kernel, self.expansion = width, depth, tuple(kernel), expansion
        self.resolution, self.per_block = tuple(resolution), tuple(per_block)
        self.n_random, self.largest, self.smallest, self.distill = n_random, largest, smallest, distill
        self.label_smoothing, self.reduce, self.regularize = label_smoothing, reduce, regularize
        self.zero_gamma, self.offer = zero_gamma, offer
        self.calibration_batches, self.estimator = calibration_batches, estimator
        self.exclude, self.divisor, self.stacks, self.seed = tuple(exclude), divisor, stacks, seed
        self.criterion, self.example = criterion, example
        cuts = width not in ((1.0,), [1.0]) or expansion not in ((1.0,), [1.0])
        slicing = Slicing(model, example, width=cuts, exclude=exclude, divisor=divisor, stacks=stacks)
        self.axes = Axes(
            slicing, example, width=width, depth=depth, kernel=kernel, expansion=expansion, resolution=resolution,
            per_block=per_block,
        )  # fmt: skip
        self.model = model
        self._points = sorted(self.space.ladder(offer), key=self.axes.flops)
        self.norms = NormTable(model, self._points)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        if zero_gamma:
            for norm in last_norms(model, example, list(slicing.stacks)):
                nn.init.zeros_(norm.weight)  # type: ignore[arg-type]
        else:
            self.norms.trust(self._points[-1])  # the largest child is the network that was given
        self.point = self._points[-1]

    # -- the contract -----------------------------------------------------------------------------------------------

    @property
    def space(self) -> Space:
        """All children."""
        return self.axes.space

    def points(self) -> list[Point]:
        """The offered children, by FLOPs: a ladder from the smallest to the largest, or what ``search`` found."""
        return list(self._points)

    def _known(self, point: Mapping[str, Value]) -> Point:
        return self.space.check(point)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output, computed by the child in use; images are brought to its resolution.

        Raises:
            RuntimeError: in evaluation mode, the normalisation statistics of this child are stale.
        """
        if not self.training:
            self.norms.check(self.point)
        return self._run(self.point, packed(args, kwargs))

    def loss(self, batch: Batch) -> Tensor:
        """The sandwich of the module's docstring on one batch (a scalar); in evaluation mode the child in use alone."""
        x, y = split_batch(batch)
        if not self.training:
            self.norms.check(self.point)
            return self._criterion(self._run(self.point, x), y)
        self.norms.follow(self.model)
        draws = self.draws.clone()
        try:
            value = self._sandwich(x, y)
        except BaseException:  # the next call draws the same children again
            self.draws.copy_(draws)
            raise
        self.norms.stale()
        return value

    def _sandwich(self, x: Input, y: Any) -> Tensor:
        losses: list[Tensor] = []
        teacher: Any = None
        if self.largest:
            teacher = self._run(self.space.largest, x, regularized=True)
            losses.append(self._criterion(teacher, y))
        how = self.distill if callable(self.distill) else None
        for a in self.draw():
            out = self._run(a, x, regularized=self.regularize == "all")
            imitates = distillation(out, teacher, y, how, self.criterion) if self.distill else self._criterion(out, y)
            losses.append(imitates)
        total = torch.stack(losses).sum()
        return total / len(losses) if self.reduce == "mean" else total

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The plain network of a child with its own weights and statistics, in evaluation mode.

        With a resolution it begins with an ``nn.Upsample`` to it, so that it takes the images that this network takes.

        Raises:
            RuntimeError: its normalisation statistics are stale; ``calibrate`` first.
        """
        known = self._known(point)
        self.norms.check(known)
        return self._child(known)

    def _child(self, point: Point) -> nn.Module:
        network = self.axes.network(point)
        network.skeleton.eval()
        child = network.extract(self.model, self._statistics(point, network))
        for name, module in child.named_modules():  # training of children holds these still
            if isinstance(module, _NormBase):
                module.momentum = self.model.get_submodule(name).momentum  # type: ignore[assignment]
        if isinstance(self.model, MobileNet):
            child = _plain(child)
        if "resolution" not in point:
            return child
        size = self.axes.image_size(self.axes.example, point)  # type: ignore[arg-type]
        return nn.Sequential(nn.Upsample(size=size, mode="bicubic"), child).eval()

    def finish(self, train: Iterable[Batch]) -> None:
        """Estimate the normalisation statistics of every offered child on the training data."""
        self.calibrate(train)

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Weights of convolutions and linear layers decay; scales, shifts and biases do not."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def structure(self) -> dict[str, Any]:
        """The children that have statistics, and the offered ones."""
        return {"rows": [dict(p) for p in self.norms.points()], "points": [dict(p) for p in self._points]}

    def restructure(self, structure: dict[str, Any]) -> None:
        """Make room for the statistics of the children of ``structure``."""
        self._points = [self._known(Point(**p)) for p in structure["points"]]
        self.norms.keep(self._known(Point(**p)) for p in structure["rows"])

    # -- training ---------------------------------------------------------------------------------------------------

    def draw(self) -> list[Point]:
        """The children of the next step besides the largest: N random ones and the smallest."""
        drawn = []
        for _ in range(self.n_random):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.draws))
            drawn.append(self.space.canonical(self.space.sample(generator)))
            self.draws += 1
        return [*drawn, self.space.smallest] if self.smallest else drawn

    def _criterion(self, output: Any, target: Any) -> Tensor:
        return loss(output, target, self.criterion, label_smoothing=self.label_smoothing)

    # -- running ----------------------------------------------------------------------------------------------------

    def _run(self, point: Point, x: Input, regularized: bool = True) -> Any:
        network, x = self.axes.network(point), self.axes.resized(x, point)
        if not self.training:
            if network.skeleton.training:
                network.skeleton.eval()
            return network.infer(self.model, x, lambda: self._statistics(point, network), self.norms.place(point))
        if not regularized:
            network = network.twin  # activation checkpointing runs each again during backward, in its own mode
        network.set_mode(self.model)
        live = [m for m in network.modules.values() if isinstance(m, _NormBase) and m.training]
        if not regularized:  # all that is random in training: dropout, in attention too, drop-connect
            network.skeleton.eval()
        for module in live:
            module.train()
            module.momentum = 0.0  # batch statistics, and the buffers that all children share stay as they are
        return network.run(self.model, x)

    def _statistics(self, point: Point, network: SubNetwork) -> dict[str, Tensor]:
        return self.norms.tensors(point, network.modules) if point in self.norms else {}

    def calibrate(
        self,
        data: Iterable[Any] | Input,
        *,
        batches: int | None = None,
        points: Sequence[Mapping[str, Value]] | None = None,
    ) -> None:
        """Estimate the normalisation statistics of ``points`` (the offered ones by default) on batches of ``data``.

        Give it batches as in training, augmented: each child sees them at its own resolution. Dropout is off, and
        nothing but the statistics of these children changes.

        Raises:
            ValueError: ``data`` has no batches, or a point is outside the space.
        """
        chosen = [self._known(p) for p in points] if points is not None else self._points
        if self.norms:
            self._calibrate(chosen, batches_of(data, batches or self.calibration_batches, device_of(self.model)))

    def _calibrate(self, points: Sequence[Point], taken: Sequence[Any]) -> None:
        for point in points:
            network = self.axes.network(point)

            def run(x: Input, tensors: Mapping[str, Tensor], p: Point = point, network: SubNetwork = network) -> Any:
                return network.run(self.model, self.axes.resized(x, p), tensors)

            self.norms.estimate(point, network.skeleton, run, taken, self.estimator)

    # -- choosing ---------------------------------------------------------------------------------------------------

    def search(
        self,
        validation: Iterable[Batch],
        train: Iterable[Batch],
        *,
        trials: int = 200,
        mutate: float = 0.1,
        coarse: Mapping[str, int] | None = None,
        metric: Metric | None = None,
        lower_is_better: bool | None = None,
        batches: int | None = None,
        repeats: int = 7,
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
        **budget: float,
    ) -> Search:
        """Coarse-to-fine: the best child of a grid within ``budget``, then ``trials`` mutations, kept when better.

        Afterwards ``points()`` are the children that no other evaluated one beats at its FLOPs, and the largest.

        Args:
            validation: what children are judged by; not the test data.
            train: for normalisation statistics.
            trials: mutations that are evaluated.
            mutate: the probability with which each coordinate moves.
            coarse: patterns per axis in the grid; the paper's 5 resolutions x 4 depths x 2 widths x 4 kernels, and 2
                expansions, by default.
            metric, lower_is_better: as in ``pliant.measure``.
            batches: for the statistics of one child; ``calibration_batches`` by default.
            repeats: timed runs for each latency.
            seed: of the mutations.
            progress: takes a line now and then.
            budget: ``flops`` per sample (2 per multiply-add), ``parameters``, or ``latency`` as a measured ratio to the
                largest child on a batch of up to 64.

        Raises:
            ValueError: an argument is out of range, or no child of the grid fits the budget.
        """
        if not budget or set(budget) - {"flops", "parameters", "latency"}:
            raise ValueError(f"budget: give one or more of flops, parameters, latency; got {sorted(budget) or 'none'}")
        if not 0 < mutate <= 1:
            raise ValueError(f"mutate: {mutate} is not in (0, 1]")
        if trials < 0:
            raise ValueError(f"trials: {trials} is below 0")
        lower = bool(Quality(metric).lower_is_better) if lower_is_better is None else lower_is_better
        state = _Searching(self, validation, train, metric, lower, batches or self.calibration_batches, repeats, budget)
        for point in grid(self.space, {**COARSE, **(coarse or {})}):
            if state.fits(point):
                state.judge(point, "coarse")
        if state.best is None:
            least = {name: state.costs(self.space.smallest)[name] for name in budget}
            raise ValueError(f"budget: nothing fits {budget}; the smallest child has {least}")
        if progress is not None:
            progress(f"coarse: {len(state.trials)} children, best {state.best.quality:.4f} at {state.best.point}")
        generator = torch.Generator().manual_seed(seed)
        for _ in range(trials):
            candidate = state.mutation(mutate, generator)
            if candidate is None:  # whatever it tries is too dear or known
                break
            state.judge(candidate, "fine")
        if progress is not None:
            progress(f"fine: {len(state.trials)} children, best {state.best.quality:.4f} at {state.best.point}")
        if self.space.largest not in state.seen:
            self._calibrate([self.space.largest], state.batches)
        self._points = state.front()
        self.norms.keep(self._points)
        if self.point not in self._points:
            self.use(self._points[-1])
        return Search(state.best.point, tuple(state.trials))

    def costs(self) -> dict[Point, dict[str, int]]:
        """FLOPs per sample (2 per multiply-add) and parameters of every offered child."""
        return {p: {"flops": self.axes.flops(p), "parameters": self.axes.parameters(p)} for p in self._points}

    def extra_repr(self) -> str:
        """The size of the space and the setting in use."""
        return f"{self.space!r}, offered={len(self._points)}, at={self.point}"


# -- the rate ---------------------------------------------------------------------------------------------------------


def exponential_constant(
    epochs: float, warmup: float = 5.0, rate: float = 0.97, every: float = 2.4, floor: float = 0.05
) -> Callable[[float], float]:
    """The paper's learning rate as a factor of lr_0, for ``pliant.fit(lr_schedule=...)``.

    Linear over ``warmup`` epochs, then max(floor, rate^(epoch / every)), epochs counted from the end of the warm-up.

    Raises:
        ValueError: an argument is out of range.
    """
    if epochs <= 0 or warmup < 0 or warmup >= epochs:
        raise ValueError(f"warmup: {warmup} epochs of warm-up do not fit into epochs={epochs}")
    if not 0 < rate < 1 or not 0 <= floor <= 1 or every <= 0:
        raise ValueError(f"rate: rate={rate} and floor={floor} must be in (0, 1) and [0, 1], every={every} positive")

    def factor(progress: float) -> float:
        epoch = progress * epochs
        if epoch < warmup:
            return epoch / warmup
        return float(max(floor, rate ** ((epoch - warmup) / every)))

    return factor


# -- the search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One evaluated child: where it came from ("coarse" or "fine"), and whether it became the best so far."""

    point: Point
    quality: float
    flops: int
    stage: str
    accepted: bool


@dataclass(frozen=True)
class Search:
    """What a search found, and every child that it evaluated on the way."""

    best: Point
    trials: tuple[Trial, ...]


class _Searching:
    """The state of one search: what was evaluated, what it cost, what is best."""

    def __init__(
        self, net: BigNAS, validation: Iterable[Batch], train: Iterable[Batch], metric: Metric | None,
        lower: bool, batches: int, repeats: int, budget: Mapping[str, float],
    ) -> None:  # fmt: skip
        self.net, self.validation, self.metric, self.repeats, self.budget = net, validation, metric, repeats, budget
        self.sign = -1 if lower else 1
        self.batches = batches_of(train, batches, device_of(net.model))
        self.sample = take(self.batches[0], slice(0, 64))
        self.trials: list[Trial] = []
        self.seen: dict[Point, Trial] = {}
        self.best: Trial | None = None
        self._costs: dict[Point, dict[str, float]] = {}
        self._full: nn.Module | None = None

    def costs(self, point: Point) -> dict[str, float]:
        """Those costs of ``point`` that the budget names, measured once."""
        if point not in self._costs:
            found: dict[str, float] = {}
            if "flops" in self.budget:
                found["flops"] = self.net.axes.flops(point)
            if "parameters" in self.budget:
                found["parameters"] = self.net.axes.parameters(point)
            if "latency" in self.budget:
                found["latency"] = self._latency(point)
            self._costs[point] = found
        return self._costs[point]

    def _latency(self, point: Point) -> float:
        if self._full is None:
            self._full = self.net._child(self.net.space.largest)
        return latency_ratio(self.net._child(point), self._full, self.sample, repeats=self.repeats).median

    def fits(self, point: Point) -> bool:
        costs = self.costs(point)
        return all(costs[name] <= limit for name, limit in self.budget.items())

    def judge(self, point: Point, stage: str) -> None:
        net, before = self.net, self.net.point
        net._calibrate([point], self.batches)
        try:
            quality = evaluate(net.use(point), self.validation, self.metric)
        finally:
            net.use(before)
        better = self.best is None or self.sign * quality > self.sign * self.best.quality
        trial = Trial(point, quality, net.axes.flops(point), stage, better)
        self.trials.append(trial)
        self.seen[point] = trial
        if better:
            self.best = trial

    def mutation(self, probability: float, generator: torch.Generator) -> Point | None:
        """A new child within the budget, near the best one; None where a thousand tries find none."""
        assert self.best is not None
        space = self.net.space
        for _ in range(1000):
            point = space.canonical(space.mutate(self.best.point, probability, generator))
            if point not in self.seen and self.fits(point):
                return point
        return None

    def front(self) -> list[Point]:
        """The evaluated children that none beats at the same or lower FLOPs, the best one, and the largest."""
        assert self.best is not None
        kept: list[Trial] = []
        for trial in sorted(self.trials, key=lambda t: (t.flops, -self.sign * t.quality)):
            if not kept or self.sign * trial.quality > self.sign * kept[-1].quality:
                kept.append(trial)
        points = dict.fromkeys([*(t.point for t in kept), self.best.point, self.net.space.largest])
        return sorted(points, key=self.net.axes.flops)


def grid(space: Space, counts: Mapping[str, int]) -> list[Point]:
    """The coarse grid: every combination of network-wide patterns, ``counts`` of them for each axis.

    The patterns of an axis are evenly spaced levels, all coordinates alike; where an axis has fewer levels than wanted,
    also large in the first half of the network and small in the second, and the reverse.
    """
    by_axis: dict[str, list[str]] = {}
    for name, c in space.coordinates.items():
        by_axis.setdefault(c.axis, []).append(name)
    if unknown := sorted(set(counts) - set(COARSE)):
        raise ValueError(f"coarse: {unknown[0]!r} is not an axis; allowed: {', '.join(COARSE)}")
    options = [_patterns(space, names, counts[axis]) for axis, names in by_axis.items()]
    points = []
    for choice in product(*options):
        values = {name: value for pattern in choice for name, value in pattern.items()}
        points.append(space.canonical(Point(**{name: values[name] for name in space.coordinates})))
    return list(dict.fromkeys(points))


def _patterns(space: Space, names: Sequence[str], count: int) -> list[dict[str, Value]]:
    if count < 1:
        raise ValueError(f"coarse: {count} patterns; at least one is needed")
    half = len(names) / 2
    shares = [[i / (count - 1) if count > 1 else 1.0] * len(names) for i in range(count)]
    shares += [[float(i < half) for i in range(len(names))], [float(i >= half) for i in range(len(names))]]
    found: list[dict[str, Value]] = []
    for pattern in shares:
        choices = [space.coordinates[name].choices for name in names]
        values = {n: c[int(s * (len(c) - 1) + 0.5)] for n, c, s in zip(names, choices, pattern, strict=True)}
        if values not in found:
            found.append(values)
    return found[:count]


# -- the start --------------------------------------------------------------------------------------------------------


def last_norms(model: nn.Module, example: Input, stacks: Sequence[str]) -> list[nn.Module]:
    """The last normalisation of the residual branch of every block: zero its scale, and the block is its shortcut.

    Of the layers with weights in a block, those whose output no other one reads end a path through it: the branch, and
    maybe a shortcut with layers of its own. The branch is the path with the most layers.

    Raises:
        ValueError: there are no stacks of blocks, or a block has no branch that ends in a normalisation with a scale.
    """
    if not stacks:
        raise ValueError("zero_gamma: no stack of blocks was found in the model; name them: stacks=['blocks']")
    blocks = {f"{stack}.{i}": b for stack in stacks for i, b in enumerate(model.get_submodule(stack).children())}
    outputs: dict[str, dict[str, Tensor]] = {name: {} for name in blocks}

    def noting(block: str, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def note(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None
            outputs[block][name] = output * 1.0  # a node of the graph that is this layer's alone
            return outputs[block][name]

        return note

    handles = []
    for block, module in blocks.items():
        for name, layer in module.named_modules():
            if next(layer.children(), None) is None and next(layer.parameters(recurse=False), None) is not None:
                handles.append(layer.register_forward_hook(noting(block, name)))
    with removing(handles), evaluating(model), torch.enable_grad():
        call(model, example)
    found: list[nn.Module] = []
    for block, module in blocks.items():
        reads = _reads(outputs[block])
        ends = [name for name in reads if not any(name in sources for sources in reads.values())]
        last = module.get_submodule(max(ends, key=lambda name: len(reads[name]))) if ends else None
        scale = getattr(last, "weight", None)
        if not isinstance(last, _NormBase | nn.GroupNorm | nn.LayerNorm) or not isinstance(scale, nn.Parameter):
            raise ValueError(
                f"zero_gamma: the residual branch of {block!r} does not end in a normalisation with a scale; "
                "set zero_gamma=False and initialise the model yourself"
            )
        found.append(last)
    return found


def _reads(outputs: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """For each layer of a block, the other layers that its output depends on."""
    reads: dict[str, set[str]] = {}
    names = list(outputs)
    for i, name in enumerate(names):
        before = names[:i]
        inputs = [outputs[n] for n in before]
        if not inputs or not outputs[name].requires_grad:
            reads[name] = set()
            continue
        gradients = torch.autograd.grad(outputs[name].sum(), inputs, retain_graph=True, allow_unused=True)
        reads[name] = {n for n, g in zip(before, gradients, strict=True) if g is not None}
    return reads


# -- a ready-made super-network ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One stage of ``MobileNet``: what each choice may be, the largest last."""

    channels: tuple[int, ...]
    depth: tuple[int, ...]
    kernel: tuple[int, ...]
    expand: int
    stride: int


PAPER_ROWS = (
    Row((16, 24), (1, 2), (3,), 1, 1),
    Row((24, 32), (2, 3), (3,), 6, 2),
    Row((40, 48), (2, 3), (3, 5), 6, 2),
    Row((80, 88), (2, 3, 4), (3, 5), 6, 2),
    Row((112, 120, 128), (2, 3, 4, 5, 6), (3, 5), 6, 1),
    Row((192, 200, 208, 216), (2, 3, 4, 5, 6), (3, 5), 6, 2),
    Row((320, 352), (1, 2), (3, 5), 6, 1),
)


class MobileNet(nn.Module):
    """The paper's super-network at its largest: a plain network of ``MBConv`` blocks.

    ``BigNAS`` cuts children out of it whose layers have the sizes that they have in a ``MobileNet`` of the child's own
    widths, depths and kernels.

    Args:
        classes: outputs.
        in_channels: of the images.
        rows: the stages.
        stem: choices of channels of the first convolution (3x3, stride ``stem_stride``).
        head: choices of channels of the last 1x1 convolution.
        stem_stride: 2 in the paper; 1 for small images.
        dropout: before the classifier.
        drop_connect: block i of all n, counted from 0, drops with ``drop_connect * i / n`` if it belongs to the last
            two stages and its shortcut is the identity.
        divisor: of the channels.

    Shapes: (B, in_channels, H, W) -> (B, classes).
    """

    def __init__(
        self,
        classes: int = 1000,
        in_channels: int = 3,
        *,
        rows: Sequence[Row] = PAPER_ROWS,
        stem: tuple[int, ...] = (32, 40),
        head: tuple[int, ...] = (1280, 1408),
        stem_stride: int = 2,
        dropout: float = 0.2,
        drop_connect: float = 0.2,
        divisor: int = 8,
    ) -> None:
        super().__init__()
        if not rows:
            raise ValueError("rows: a MobileNet needs one stage at least")
        for i, (before, after) in enumerate(pairwise([stem, *(r.channels for r in rows)])):
            if before[-1] == after[-1] and len({*before, *after}) > 1:  # an identity would tie the channels of the two
                raise ValueError(
                    f"rows: stage {i} and what is before it both have {after[-1]} channels; let them differ"
                )
        self.rows, self.stem_choices, self.head_choices, self.divisor = tuple(rows), tuple(stem), tuple(head), divisor
        channels = stem[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()
        )
        total, index = sum(r.depth[-1] for r in rows), 0
        late = total - sum(r.depth[-1] for r in rows[-2:])
        stages = []
        for row in rows:
            stage = []
            for i in range(row.depth[-1]):
                drop = drop_connect * index / total if index >= late else 0.0
                block = MBConv(
                    channels, row.channels[-1], row.kernel[-1], row.expand, row.stride if i == 0 else 1, drop, divisor
                )
                index += 1
                stage.append(block)
                channels = row.channels[-1]
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Sequential(
            nn.Conv2d(channels, head[-1], 1, bias=False), nn.BatchNorm2d(head[-1]), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(head[-1], classes)
        for module in self.modules():  # He, fan-out
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(self.dropout(self.head(x).flatten(1)))  # type: ignore[no-any-return]

    def choices(self) -> dict[str, Any]:
        """``BigNAS``'s arguments for the choices of the rows: width, depth, kernel, divisor, stacks."""
        stages = {f"stages.{i}": row for i, row in enumerate(self.rows)}
        width: dict[str, Sequence[int]] = {"stem.0": self.stem_choices, "head.0": self.head_choices}
        width |= {name: row.channels for name, row in stages.items()}
        return {
            "width": {name: channels for name, channels in width.items() if len(channels) > 1},
            "depth": {name: row.depth for name, row in stages.items()},
            "kernel": tuple(sorted({k for row in self.rows for k in row.kernel})),
            "expansion": (1.0,),
            "divisor": self.divisor,
            "stacks": list(stages),
        }


class MBConv(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection, and a shortcut around every block.

    The shortcut is the identity where stride and width allow; else a 2x2 average pool for stride 2 (one row and column
    of zeros before an odd size), then a 1x1 convolution without normalisation where the *active* widths differ.
    Drop-connect acts around an identity alone. All inner channels are multiples of ``divisor``, see ``inner_width``.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        expand: int = 6,
        stride: int = 1,
        drop_connect: float = 0.0,
        divisor: int = 8,
    ) -> None:
        super().__init__()
        self.stride, self.ratio, self.divisor = stride, expand, divisor
        mid = self.inner_width("expand.0", in_channels) if expand > 1 else in_channels
        self.expand = (
            nn.Sequential(nn.Conv2d(in_channels, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.SiLU())
            if expand > 1
            else nn.Identity()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(mid, mid, kernel_size, stride, kernel_size // 2, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
            nn.SiLU(),
        )
        reduced = self.inner_width("excite.1", mid)
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(mid, reduced, 1), nn.SiLU(), nn.Conv2d(reduced, mid, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(mid, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.drop = DropConnect(drop_connect) if drop_connect else nn.Identity()
        self.shortcut: nn.Module = (
            nn.Conv2d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.excite(y))
        if self.stride == 1 and isinstance(self.shortcut, nn.Identity):
            y = self.drop(y)
        if self.stride > 1:
            x = F.avg_pool2d(F.pad(x, (x.shape[3] % 2, 0, x.shape[2] % 2, 0)), 2)
        return self.shortcut(x) + y  # type: ignore[no-any-return]

    def inner_width(self, layer: str, channels: int, share: float = 1.0) -> int:
        """The channels that ``layer`` makes of ``channels``: the expansion's ("expand.0") or the squeeze's.

        ``share`` is the part of the full expansion that is in use.
        """
        if layer == "expand.0":
            return make_divisible(round(channels * self.ratio * share), self.divisor)
        return make_divisible(channels // 4, self.divisor)

    def after_slicing(self) -> None:
        """Where the active widths agree the shortcut is the identity."""
        if isinstance(self.shortcut, nn.Conv2d) and self.shortcut.in_channels == self.shortcut.out_channels:
            self.shortcut = nn.Identity()


class DropConnect(nn.Module):
    """In training, drop the whole branch of a sample with probability p and scale the others by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"drop_connect: {p} is not in [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or not self.p:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"


def _plain(network: nn.Module) -> nn.Module:
    """The same computation without this file's classes: what ``torch.fx`` traces, in evaluation mode."""
    traced = torch.fx.symbolic_trace(network.eval())
    traced.delete_all_unused_submodules()
    return copy.deepcopy(traced).eval()
