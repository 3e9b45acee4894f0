"""Quality against cost at every setting of the dial: ``measure(net, test) -> Frontier``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import check
from pliant.core.cost import Flops, count_bytes, count_flops, count_parameters, latency_ratio
from pliant.core.dynamic import Dynamic, NotStaticError, Point
from pliant.core.inputs import Batch, call, device_of, evaluating, split_batch, take, to_device
from pliant.core.objective import Metric, Quality, accuracy, count_rows, next_token_accuracy

__all__ = ["COSTS", "Frontier", "Metric", "Row", "accuracy", "evaluate", "measure", "next_token_accuracy"]

COSTS = ("flops", "nonzero_flops", "parameters", "bytes", "latency")


@dataclass(frozen=True)
class Row:
    """One setting, measured. FLOPs per sample (2 per multiply-add); latency as a ratio to the reference network.

    ``unknown`` names operators that ran and that no formula counts, see ``pliant.core.cost.Flops``.
    """

    point: Point
    quality: float
    flops: int
    nonzero_flops: int
    parameters: int
    bytes: int
    latency: float
    latency_low: float
    latency_high: float
    static: bool
    unknown: tuple[str, ...] = ()


def undominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, gain) that no other equals in gain at the same or a lower cost, from the cheapest on."""
    best, kept = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept


@dataclass(frozen=True)
class Frontier:
    """The measured settings of one network, from the cheapest to the dearest in FLOPs.

    Attributes:
        rows: one for each setting; qualities in the metric's own sign.
        name: of the network.
        lower_is_better: whether a low quality is a good one, as of an error.
        metric: the name of what quality is.
    """

    rows: tuple[Row, ...]
    name: str = ""
    lower_is_better: bool = False
    metric: str = "accuracy"

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def best(self, **budget: float) -> Point:
        """The point of the best quality whose costs stay within ``budget``, the cheaper one among equals.

        Args:
            budget: upper limits by name, any of ``flops``, ``nonzero_flops``, ``parameters``, ``bytes``, ``latency``.

        Raises:
            ValueError: a name is unknown, or no point fits (the message names the smallest that there is).
        """
        return self.best_row(**budget).point

    def best_row(self, **budget: float) -> Row:
        """The row of ``best``."""
        if unknown := sorted(set(budget) - set(COSTS)):
            raise ValueError(f"budget: unknown cost {unknown[0]!r}; allowed: {', '.join(COSTS)}")
        fit = [r for r in self.rows if all(getattr(r, k) <= limit for k, limit in budget.items())]
        if not fit:
            least = ", ".join(f"{k} {min(getattr(r, k) for r in self.rows):g}" for k in budget)
            asked = ", ".join(f"{k}={v:g}" for k, v in budget.items())
            raise ValueError(f"budget: no point fits {asked}; the smallest measured here: {least}")
        return max(fit, key=lambda r: (self.gain(r.quality), -r.flops, -r.nonzero_flops, -r.parameters))

    def gain(self, quality: float) -> float:
        """``quality`` as a number of which more is better: its negative where ``lower_is_better``; NaN is worst."""
        if math.isnan(quality):
            return -math.inf
        return -quality if self.lower_is_better else quality

    def pareto(self, cost: str = "flops") -> Frontier:
        """The rows that no other row beats in quality at the same or a lower ``cost``."""
        kept = undominated([(getattr(r, cost), self.gain(r.quality)) for r in self.rows])
        return replace(self, rows=tuple(self.rows[i] for i in kept))

    def quality_at(self, budget: float, cost: str = "flops") -> float:
        """The best quality at ``cost`` <= ``budget``; where nothing fits, the infinity that is worst."""
        found = [self.gain(r.quality) for r in self.rows if getattr(r, cost) <= budget]
        return self.gain(max(found, default=float("-inf")))

    def dominates(self, other: Frontier, cost: str = "flops") -> bool:
        """Whether at every budget that ``other`` can meet this frontier is as good, and better at one at least.

        Raises:
            ValueError: low is good in one of the two and bad in the other.
        """
        if self.lower_is_better != other.lower_is_better:
            raise ValueError(f"other: of {self.metric} and {other.metric} one is better when low, the other when high")
        budgets = [(getattr(r, cost), self.gain(r.quality)) for r in other.pareto(cost)]
        pairs = [(self.gain(self.quality_at(budget, cost)), gain) for budget, gain in budgets]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as JSON values; each tells metric and direction where they are not the default."""
        told: dict[str, Any] = {} if self.metric == "accuracy" else {"metric": self.metric}
        told |= {"lower_is_better": True} if self.lower_is_better else {}
        return [asdict(r) | {"point": dict(r.point), "unknown": list(r.unknown)} | told for r in self.rows]

    @classmethod
    def from_dicts(cls, rows: Sequence[Mapping[str, Any]], name: str = "") -> Frontier:
        """The frontier that ``to_dicts`` wrote."""
        lower, metric = False, "accuracy"
        found = []
        for row in rows:
            values = dict(row)
            lower, metric = values.pop("lower_is_better", False), values.pop("metric", "accuracy")
            point, unknown = Point(**values.pop("point")), tuple(values.pop("unknown", ()))
            found.append(Row(point=point, unknown=unknown, **values))
        return cls(tuple(found), name, lower, metric)

    def to_pandas(self) -> Any:
        """The rows as a ``pandas.DataFrame``, one column for each name of the dial."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(
            [dict(r.point) | {k: v for k, v in asdict(r).items() if k != "point"} for r in self.rows]
        )

    def plot(self, path: str | None = None, cost: str = "flops") -> Any:
        """A chart of quality against ``cost``; returns the matplotlib figure, and writes it where ``path`` is given."""
        from pliant.report import Curve, chart, quality_label

        label = quality_label(self.metric, self.lower_is_better)
        return chart([Curve.of(self, cost)], path, cost=cost, quality=label)


class _Alone(Dynamic):
    """A plain network as a dynamic one of one point, to be measured."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.point = model, Point(network=type(model).__name__)
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)

    def loss(self, batch: Batch) -> Tensor:
        """None: it is measured and not trained."""
        raise NotImplementedError

    def points(self) -> list[Point]:
        """The only one."""
        return [self.point]

    def extract(self, point: Mapping[str, Any]) -> nn.Module:
        """The model itself."""
        return self.model


def measure(
    net: nn.Module,
    data: Iterable[Batch],
    *,
    points: Sequence[Mapping[str, Any]] | None = None,
    metric: Metric | None = None,
    lower_is_better: bool | None = None,
    reference: nn.Module | None = None,
    repeats: int = 15,
    name: str = "",
) -> Frontier:
    """Quality, FLOPs, parameters, bytes and latency of ``net`` at every point, on every sample of ``data``.

    Args:
        net: the network; the setting it stands at and its training flags are restored afterwards. A plain module is
            one point, ``network=`` its class.
        data: batches of (input, target); it is read once for each point.
        points: some of ``net.points()``; all of them by default.
        metric: ``metric(output, targets)``, averaged over batches by their rows, or one that accumulates (``update``,
            ``compute``, ``reset``, as those of torchmetrics); the share of correct classes by default, where the
            targets certainly are classes. It is given the prediction, or the whole output where there are several.
        lower_is_better: whether the metric is an error; by default what its ``higher_is_better`` says, else False.
        reference: what latency is a ratio to; the network at its last (largest) point by default.
        repeats: timed runs for each latency; 0 leaves latency out (NaN).

    Raises:
        ValueError: ``data`` is empty, or no metric was given and what the targets mean is not certain.
    """
    if not isinstance(net, Dynamic):
        net = _Alone(check.module("net", net))
    check.whole("repeats", repeats, at_least=0)
    kind = Quality(metric)
    lower = lower_is_better if lower_is_better is not None else bool(kind.lower_is_better)
    chosen = [net._known(p) for p in points] if points is not None else net.points()
    before = net.point
    device = device_of(net)
    rows = []
    try:
        full = reference if reference is not None else _deployed(net, net.points()[-1])[0]
        for point in chosen:
            net.use(point)
            quality, flops, nonzero, unknown = _run(net, data, metric, device)
            deployed, static = _deployed(net, point)
            low = median = high = float("nan")
            if repeats:
                x = to_device(take(split_batch(next(iter(data)))[0], slice(0, 64)), device)
                ratio = latency_ratio(deployed, full, x, repeats=repeats)
                low, median, high = ratio.low, ratio.median, ratio.high
            rows.append(
                Row(
                    point=point,
                    quality=quality,
                    flops=flops,
                    nonzero_flops=nonzero,
                    parameters=count_parameters(deployed),
                    bytes=count_bytes(deployed),
                    latency=median,
                    latency_low=low,
                    latency_high=high,
                    static=static,
                    unknown=unknown,
                )
            )
    finally:
        net.use(before)
    ordered = tuple(sorted(rows, key=lambda r: (r.flops, r.nonzero_flops)))
    return Frontier(ordered, name or type(net).__name__, lower, kind.name)


def _deployed(net: Dynamic, point: Point) -> tuple[nn.Module, bool]:
    """What a user would run at ``point``: the extracted network, or the dynamic one where none is static."""
    try:
        return net.extract(point), True
    except NotStaticError:
        return net.use(point), False


def evaluate(net: nn.Module, data: Iterable[Batch], metric: Metric | None = None) -> float:
    """``metric`` of a network in evaluation mode over all of ``data``; see ``measure``.

    Raises:
        ValueError: ``data`` is empty, or no metric was given and what the targets mean is not certain.
    """
    with evaluating(net):
        return _predict(net, data, metric, device_of(net), lambda run: run())[0]


def _run(
    net: nn.Module, data: Iterable[Batch], metric: Metric | None, device: torch.device
) -> tuple[float, int, int, tuple[str, ...]]:
    """Quality, mean FLOPs per sample over ``data``, and operators not counted, in one pass: what counts answered."""
    counted: list[Flops] = []
    with evaluating(net):
        quality, samples = _predict(net, data, metric, device, lambda run: counted.append(count_flops(run)))
    total, nonzero = (sum(getattr(c, name) for c in counted) for name in ("total", "nonzero"))
    unknown = tuple(dict.fromkeys(name for c in counted for name in c.unknown))
    return quality, round(total / samples), round(nonzero / samples), unknown


def _predict(
    net: nn.Module,
    data: Iterable[Batch],
    metric: Metric | None,
    device: torch.device,
    around: Callable[[Callable[[], None]], None],
) -> tuple[float, int]:
    """The metric over all of ``data``, and its number of samples; ``around`` runs the network, no output is kept."""
    quality, samples = Quality(metric), 0
    output: Any = None

    def run() -> None:
        nonlocal output
        output = call(net, x)

    with torch.no_grad():
        for batch in data:
            x, y = to_device(split_batch(batch), device)
            rows = count_rows(x, y)
            around(run)
            quality.update(output, y, rows)
            output = None
            samples += rows
    if not samples:
        raise ValueError("data: it has no batches, so there is nothing to measure")
    return quality.compute(), samples
