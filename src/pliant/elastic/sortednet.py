"""SortedNet: one set of weights, many sizes, without a search.

Valipour, Rezagholizadeh, Rajabzadeh, Kavehzadeh, Tahaei, Chen, Ghodsi: "SortedNet, a place for every network and
every network in its place", 2023, arXiv:2309.00255. The summation form is that of its follow-up Sorted LLaMA,
arXiv:2309.08968.

The idea: sub-networks are *prefixes* of each other along every axis (the first channels, the first blocks). Each
micro-batch trains **one** of them, drawn at random; gradients of a few micro-batches are added before a step. No
teacher, no search, no head of its own for a size.

Notation: an index b = (width, depth) out of a finite list B; theta_b the parameters that b keeps, so that
b <= b' implies theta_b is a part of theta_b'.

    objective     min over theta of  E_(x,y) E_{b ~ P_B} [ loss(f(x; theta_b), y) ]
    "sample"      L = (1/g) sum_{j=1..g} loss(f(x_j; theta_{b_j}), y_j),   b_j ~ P_B independently
    "sum"         L = (1/|B|) sum_{b in B} loss(f(x; theta_b), y)

``x_j`` are the g parts of the batch; with ``replay=True`` each is the whole batch. In the sum form over depth alone,
with one stack of blocks, the blocks run once and every exit goes through the shared rest of the network.

Where the paper is silent (the specification's ambiguities): g = 4; P_B uniform unless ``weights`` are given;
``always_full`` (sandwich-like) is off. In the sum form over depth the parts before the blocks run again for every exit,
because an arbitrary network cannot be entered in the middle; blocks, which are what costs, run once. Where a block is
more than its module (``x + block(x)`` written outside of it), every exit is a forward of its own.

BatchNorm. The statistics of every size differ. ``norm_stats="recalibrate"`` resets and re-estimates them for each index
after training (``calibrate``, called by ``fit`` at the end); ``"switchable"`` keeps running statistics for each index
while it trains; ``"batch_free"`` asserts that the network has none. A size whose statistics are stale refuses to
evaluate instead of returning garbage.

Momentum and weight decay go on moving channels that were not active in a step (they belong to the method); with
``zero_grad(set_to_none=True)`` blocks that no sub-network of a step used are skipped by optimisers, weight decay
included. ``freeze_inactive`` ties an optimiser to the active parameters strictly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from pliant.core import check
from pliant.core.calibration import Estimator, NormTable, batches_of, check_estimator
from pliant.core.cost import count_parameters, flops_per_sample
from pliant.core.dynamic import Dynamic, Point, Value
from pliant.core.inputs import (
    Batch,
    Input,
    device_of,
    packed,
    removing,
    split_batch,
    take,
    to_device,
)
from pliant.core.objective import Criterion, loss, part
from pliant.core.slicing import Slicing
from pliant.core.subnetwork import SubNetwork


class SortedNet(Dynamic):
    """Width and depth of one set of weights.

    Args:
        model: your network; it is wrapped, not copied.
        example: an input batch for it, of any size.
        width: shares of the channels, each in (0, 1]; 1 must be among them.
        depth: shares of the blocks of every stack, each in (0, 1]; 1 must be among them.
        indices: the list B to train and offer, as points; the product of ``width`` and ``depth`` by default.
        accumulate: g, micro-batches (parts of a batch) with a draw of their own in one ``loss``; a small batch has
            fewer.
        mode: ``"sample"`` draws sub-networks, ``"sum"`` averages over all.
        weights: P_B, a weight for each of ``points()`` in that order; uniform by default.
        replay: run the whole batch through every draw instead of a part of it.
        always_full: the first draw of every ``loss`` is the full network.
        norm_stats: ``"recalibrate"``, ``"switchable"`` or ``"batch_free"``.
        calibration_batches: batches of the training data that ``finish`` re-estimates statistics on.
        dropout: below full width, ``"keep"`` dropout as it is, ``"scale"`` its rate by the width, or ``"off"``.
        exclude: names of modules (fnmatch patterns) that keep their full width.
        divisor: kept channels are multiples of this where the sizes allow.
        stacks: names of the block lists that depth cuts; found by themselves where None.
        seed: of the sampler. Draw number n depends on (seed, n) alone, so all ranks of a parallel run draw alike.
        criterion: ``criterion(output, target)``; cross entropy by default.

    Shapes: whatever the model takes and returns.

    Raises:
        ValueError: an argument is out of range, or the model cannot be sliced; the message names what is wrong.
    """

    draws: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        width: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        depth: Sequence[float] = (1.0,),
        indices: Sequence[Mapping[str, float]] | None = None,
        accumulate: int = 4,
        mode: Literal["sample", "sum"] = "sample",
        weights: Sequence[float] | None = None,
        replay: bool = False,
        always_full: bool = False,
        norm_stats: Literal["recalibrate", "switchable", "batch_free"] = "recalibrate",
        calibration_batches: int = 64,
        dropout: Literal["keep", "scale", "off"] = "keep",
        exclude: Sequence[str] = (),
        divisor: int = 1,
        stacks: Sequence[str] | None = None,
        seed: int = 0,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        check.module("model", model)
        width, depth = _shares("width", width), _shares("depth", depth)
        check.optional(check.sequence, "indices", indices, lambda n, v: check.mapping(n, v, check.number))
        check.whole("accumulate", accumulate, at_least=1)
        check.choice("mode", mode, ("sample", "sum"))
        check.optional(check.sequence, "weights", weights, lambda n, v: check.number(n, v, at_least=0))
        check.boolean("replay", replay)
        check.boolean("always_full", always_full)
        check.choice("norm_stats", norm_stats, ("recalibrate", "switchable", "batch_free"))
        check.whole("calibration_batches", calibration_batches, at_least=1)
        check.choice("dropout", dropout, ("keep", "scale", "off"))
        check.names("exclude", exclude)
        check.whole("divisor", divisor, at_least=1)
        check.optional(check.names, "stacks", stacks)
        check.seed("seed", seed)
        check.optional(check.function, "criterion", criterion)
        self.width, self.depth = tuple(sorted(set(width))), tuple(sorted(set(depth)))
        self.accumulate, self.mode, self.replay, self.always_full = accumulate, mode, replay, always_full
        self.norm_stats, self.calibration_batches, self.dropout = norm_stats, calibration_batches, dropout
        self.exclude, self.divisor, self.stacks, self.seed = tuple(exclude), divisor, stacks, seed
        self.criterion = criterion
        self.indices = None if indices is None else [dict(p) for p in indices]
        self.example = example
        self.slicing = Slicing(
            model, example, width=self.width != (1.0,), exclude=exclude, divisor=divisor, stacks=stacks
        )
        self.model = model
        self._points = self._list_points(indices)
        self.weights = self._check_weights(weights)
        self._networks: dict[Point, SubNetwork] = {}
        for point in self._points:
            sizes = self.slicing.sizes(float(point["width"])), self.slicing.depths(float(point["depth"]))
            if problem := self.slicing.check(*sizes):
                raise ValueError(f"model: it cannot be run at {point}: {problem}")
            self._networks[point] = self._network(point)
        self.slicing.rest()
        # Of one row a norm over the batch could make nothing.
        self._least_rows = 2 if any(isinstance(m, _BatchNorm) for m in model.modules()) else 1
        self._costs: dict[Point, dict[str, int]] = {}
        self._make_statistics()
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.active: list[Point] = []  # drawn since the last optimiser step, for ``freeze_inactive``
        self.point = self._points[-1]

    # -- construction -------------------------------------------------------------------------------------------

    def _list_points(self, indices: Sequence[Mapping[str, float]] | None) -> list[Point]:
        if indices is None:
            found = [Point(width=float(w), depth=float(d)) for w, d in product(self.width, self.depth)]
        else:
            found = [p if isinstance(p, Point) else Point(**p) for p in indices]
            for p in found:
                if set(p) != {"width", "depth"} or p["width"] not in self.width or p["depth"] not in self.depth:
                    raise ValueError(f"indices: {p} must give a width of {self.width} and a depth of {self.depth}")
            if Point(width=1.0, depth=1.0) not in found:
                raise ValueError("indices: the full network, width=1.0 depth=1.0, must be among them")
        # From the smallest to the largest: cost grows with the square of the width and linearly with depth.
        return sorted(set(found), key=lambda p: (float(p["width"]) ** 2 * float(p["depth"]), float(p["width"])))

    def _check_weights(self, weights: Sequence[float] | None) -> tuple[float, ...] | None:
        if weights is None:
            return None
        if len(weights) != len(self._points) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"weights: expected {len(self._points)} numbers >= 0 that are not all zero, got {list(weights)}"
            )
        return tuple(weights)

    def _network(self, point: Point) -> SubNetwork:
        width, depth = float(point["width"]), float(point["depth"])
        network = self.slicing.subnetwork(width, depth)
        if self.dropout != "keep" and (width < 1 or depth < 1):
            for module in network.skeleton.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = module.p * width if self.dropout == "scale" else 0.0
        return network

    def _make_statistics(self) -> None:
        """Running statistics of every point; only the full network can take over those that the model came with."""
        self.norms = NormTable(self.model, self._points)
        if self.norms and self.norm_stats == "batch_free":
            raise ValueError(
                f"norm_stats: 'batch_free', but {next(iter(self.norms.columns))!r} keeps running statistics; "
                "use 'recalibrate' or 'switchable'"
            )
        self.norms.trust(self._points[-1])

    # -- the contract -------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """All listed indices b, from the smallest to the full network."""
        return list(self._points)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output, computed by the sub-network in use; it takes what the model takes.

        Raises:
            RuntimeError: in evaluation mode, the normalisation statistics of this size are stale.
        """
        if not self.training:
            self.norms.check(self.point)
        return self._run(self.point, packed(args, kwargs))

    def loss(self, batch: Batch) -> Tensor:
        """The objective of the module's docstring on one batch (a scalar); in evaluation mode of the point in use."""
        x, y = split_batch(batch)
        if not self.training:
            self.norms.check(self.point)
            return loss(self._run(self.point, x), y, self.criterion)
        self.norms.follow(self.model)
        if self.norm_stats == "recalibrate":
            self.norms.stale()
        if self.mode == "sum":
            value = torch.stack([loss(out, y, self.criterion) for out in self.all_outputs(x)]).mean()
            self.active = list(self._points)
            return value
        parts, draws = self._parts(x, y), self.draws.clone()
        try:
            drawn = self.draw(len(parts))
            losses = [loss(self._run(b, xj), yj, self.criterion) for b, (xj, yj) in zip(drawn, parts, strict=True)]
        except BaseException:  # the next call draws the same ones again
            self.draws.copy_(draws)
            raise
        self.active += drawn
        return torch.stack(losses).mean()

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The plain, smaller network of ``point`` with its own weights and statistics, in evaluation mode."""
        known = self._known(point)
        self.norms.check(known)
        return self._networks[known].extract(self.model, self._statistics(known))

    def finish(self, train: Iterable[Batch]) -> None:
        """Re-estimate the normalisation statistics of every point on the training data."""
        if self.norm_stats == "recalibrate":
            self.calibrate(train, batches=self.calibration_batches)

    # -- training -----------------------------------------------------------------------------------------------

    def draw(self, count: int) -> list[Point]:
        """The next ``count`` indices b ~ P_B. Draw number n is a function of (seed, n)."""
        weights = torch.tensor(self.weights or [1.0] * len(self._points), dtype=torch.float64)
        drawn = []
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.draws))
            drawn.append(self._points[int(torch.multinomial(weights, 1, generator=generator))])
            self.draws += 1
        if self.always_full:
            drawn[0] = self._points[-1]
        return drawn

    def _parts(self, x: Input, y: Any) -> list[tuple[Input, Any]]:
        g = self.accumulate
        if self.replay or g == 1:
            return [(x, y)] * g
        return part(x, y, g, least=self._least_rows)

    def all_outputs(self, x: Input) -> list[Any]:
        """The outputs of all points on ``x``, in the order of ``points()``; over depth alone the blocks run once."""
        if self.width != (1.0,) or len(self.slicing.stacks) != 1 or len(self._points) == 1:
            return [self._run(point, x) for point in self._points]
        (name,) = self.slicing.stacks
        hidden: list[Any] = []
        chained = True

        def note(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal chained
            if hidden:  # does each block take exactly what the one before it gave?
                last = hidden[-1][0] if isinstance(hidden[-1], tuple) else hidden[-1]
                chained = chained and bool(args) and args[0] is last
            hidden.append(output)

        full = self._networks[self._points[-1]].skeleton.get_submodule(name)
        handles = [block.register_forward_hook(note) for block in full.children()]
        with removing(handles):
            largest = self._run(self._points[-1], x)
        if not chained:
            return [*(self._run(point, x) for point in self._points[:-1]), largest]
        return [*(self._run_behind(point, name, hidden, x) for point in self._points[:-1]), largest]

    def _run_behind(self, point: Point, name: str, hidden: Sequence[Any], x: Input) -> Any:
        """The output at ``point``, whose blocks (the stack ``name``) are replaced by what they returned before."""
        network = self._ready(point)
        statistics = {n: t for n, t in self._statistics(point).items() if not n.startswith(f"{name}.")}
        skeleton = network.skeleton
        path, _, leaf = name.rpartition(".")
        owner, blocks = skeleton.get_submodule(path), skeleton.get_submodule(name)
        replayed = _Replay(hidden[len(list(blocks.children())) - 1])
        setattr(
            owner, leaf, nn.Sequential(replayed) if isinstance(blocks, nn.Sequential) else nn.ModuleList([replayed])
        )
        try:
            return SubNetwork(skeleton, network.cuts).run(self.model, x, statistics)
        finally:
            setattr(owner, leaf, blocks)

    def freeze_inactive(self, optimizer: Optimizer) -> None:
        """From now on steps of ``optimizer`` leave every weight as it is that no sub-network of the step used.

        Momentum, running averages and weight decay move such weights otherwise. Costs a copy of the weights a step.
        """
        before: list[tuple[nn.Parameter, Tensor]] = []

        def remember(*_: Any) -> None:
            before[:] = [(p, p.detach().clone()) for p in self.model.parameters()]

        def restore(*_: Any) -> None:
            used = self._used()
            with torch.no_grad():
                for parameter, old in before:
                    mask = used[id(parameter)]
                    parameter.copy_(torch.where(mask, parameter, old))
            self.active = []

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(restore)

    def _used(self) -> dict[int, Tensor]:
        """For each parameter, which elements belong to one of the active sub-networks."""
        masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in self.model.named_parameters()}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for point in set(self.active):
            network = self._networks[point]
            for name, _ in network.skeleton.named_parameters(remove_duplicate=False):
                mask = masks[names[id(self.model.get_parameter(name))]]
                index: list[Any] = [slice(None)] * mask.ndim
                region = mask
                for dim, runs in network.cuts.get(name, {}).items():
                    index[dim] = torch.cat([torch.arange(a, a + n) for a, n in runs])
                grids = [torch.arange(s) if isinstance(i, slice) else i for i, s in zip(index, mask.shape, strict=True)]
                region[torch.meshgrid(*grids, indexing="ij") if grids else ...] = True
        return {id(p): masks[name] for name, p in self.model.named_parameters()}

    # -- running ------------------------------------------------------------------------------------------------

    def _run(self, point: Point, x: Input) -> Any:
        network = self._ready(point)
        if self.training:
            return network.run(self.model, x, self._statistics(point))
        return network.infer(self.model, x, lambda: self._statistics(point), self.norms.place(point))

    def _ready(self, point: Point) -> SubNetwork:
        """The sub-network of ``point`` in this network's mode."""
        network = self._networks[point]
        if self.training or network.skeleton.training:
            network.set_mode(self.model, self.training)
        if self.training and self.norm_stats == "switchable":
            self.norms.trust(point)
        return network

    def _statistics(self, point: Point) -> dict[str, Tensor]:
        """The normalisation buffers of ``point``: views on its row, which training updates in place."""
        return self.norms.tensors(point, self._networks[point].modules)

    def calibrate(
        self,
        data: Iterable[Any] | Input,
        *,
        batches: int = 64,
        points: Sequence[Mapping[str, Value]] | None = None,
        estimator: Estimator = "cumulative",
    ) -> None:
        """Reset and re-estimate normalisation statistics on ``batches`` batches, as ``estimator`` says.

        Only the normalisation layers are in training mode meanwhile; dropout stays off.

        Raises:
            ValueError: ``data`` has no batches, or ``estimator`` is unknown.
        """
        check_estimator(estimator)
        if not self.norms:
            return
        taken = batches_of(data, batches, device_of(self.model))
        for point in [self._known(p) for p in points] if points is not None else self._points:
            network = self._networks[point]

            def run(x: Input, tensors: Mapping[str, Tensor], network: SubNetwork = network) -> Any:
                return network.run(self.model, x, tensors)

            self.norms.estimate(point, network.skeleton, run, taken, estimator)

    # -- choosing -----------------------------------------------------------------------------------------------

    def costs(self) -> dict[Point, dict[str, int]]:
        """FLOPs per sample (2 per multiply-add) and parameters of every point, counted on one row of the example."""
        if not self._costs:
            device = device_of(self.model)
            x = to_device(take(self.example, slice(0, 1)), device)
            for point, network in self._networks.items():
                plain = network.extract(self.model, self._statistics(point))
                flops = flops_per_sample(plain, x).total
                self._costs[point] = {"flops": flops, "parameters": count_parameters(plain)}
        return dict(self._costs)

    def select(self, **budget: float) -> Point:
        """The largest listed point whose costs stay within ``budget`` (``flops``, ``parameters``); no search.

        Raises:
            ValueError: an unknown cost, or a budget below the smallest point.
        """
        if not budget or set(budget) - {"flops", "parameters"}:
            raise ValueError(f"budget: give flops= or parameters= or both, got {sorted(budget)}")
        costs = self.costs()
        fit = [p for p in self._points if all(costs[p][name] <= limit for name, limit in budget.items())]
        if not fit:
            least = {name: min(c[name] for c in costs.values()) for name in budget}
            raise ValueError(f"budget: nothing fits {budget}; the smallest costs here are {least}")
        return max(fit, key=lambda p: (costs[p]["flops"], costs[p]["parameters"], self._points.index(p)))

    def extra_repr(self) -> str:
        """The sizes that the dial offers."""
        return f"width={self.width}, depth={self.depth}, points={len(self._points)}, at={self.point}"


class _Replay(nn.Module):
    """Returns what the blocks before it returned when they ran once."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _shares(name: str, shares: Any) -> tuple[float, ...]:
    found = check.sequence(name, shares, lambda n, v: check.number(n, v, above=0, at_most=1))
    if 1 not in found:
        raise check.wrong(name, shares, "shares in (0, 1], with 1, the full network, among them")
    return found
