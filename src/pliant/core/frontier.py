"""Quality against cost at every setting of the dial: ``measure(net, test) -> Frontier``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.cost import count_bytes, count_flops, count_parameters, latency_ratio
from pliant.core.dynamic import Dynamic, NotStaticError, Point
from pliant.core.inputs import (
    IGNORED,
    Batch,
    call,
    device_of,
    evaluating,
    logits,
    split_batch,
    take,
    to_device,
)

Metric = Callable[[Tensor, Any], float]
COSTS = ("flops", "nonzero_flops", "parameters", "bytes", "latency")


def accuracy(output: Tensor, target: Tensor) -> float:
    """Share of rows whose largest logit (B, C, ...) stands at the target class (B, ...)."""
    return (output.argmax(1) == target).float().mean().item()


def next_token_accuracy(output: Tensor, target: Tensor) -> float:
    """Share of tokens (B, T) whose logits (B, T, V) are largest at them; -100 does not count."""
    counted = target != IGNORED
    return (output.argmax(-1) == target)[counted].float().mean().item()


@dataclass(frozen=True)
class Row:
    """One setting, measured. FLOPs per sample (2 per multiply-add); latency as a ratio to the reference network."""

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


@dataclass(frozen=True)
class Frontier:
    """The measured settings of one network, from the cheapest to the dearest in FLOPs."""

    rows: tuple[Row, ...]
    name: str = ""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def best(self, **budget: float) -> Point:
        """The point of the highest quality whose costs stay within ``budget``, the cheaper one among equals.

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
        return max(fit, key=lambda r: (r.quality, -r.flops, -r.nonzero_flops, -r.parameters))

    def pareto(self, cost: str = "flops") -> Frontier:
        """The rows that no other row beats in quality at the same or a lower ``cost``."""
        kept: list[Row] = []
        for row in sorted(self.rows, key=lambda r: (getattr(r, cost), -r.quality)):
            if not kept or row.quality > kept[-1].quality:
                kept.append(row)
        return Frontier(tuple(kept), self.name)

    def quality_at(self, budget: float, cost: str = "flops") -> float:
        """The highest quality at ``cost`` <= ``budget``; minus infinity where nothing fits."""
        return max((r.quality for r in self.rows if getattr(r, cost) <= budget), default=float("-inf"))

    def dominates(self, other: Frontier, cost: str = "flops") -> bool:
        """Whether at every budget that ``other`` can meet this frontier is as good, and better at one at least."""
        pairs = [(self.quality_at(getattr(r, cost), cost), r.quality) for r in other.pareto(cost)]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as JSON values."""
        return [asdict(r) | {"point": dict(r.point)} for r in self.rows]

    @classmethod
    def from_dicts(cls, rows: Sequence[Mapping[str, Any]], name: str = "") -> Frontier:
        """The frontier that ``to_dicts`` wrote."""
        return cls(tuple(Row(**{**r, "point": Point(**r["point"])}) for r in rows), name)

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
        from pliant.report import Curve, chart

        return chart([Curve.of(self, cost)], path, cost=cost)


def measure(
    net: Dynamic,
    data: Iterable[Batch],
    *,
    points: Sequence[Mapping[str, Any]] | None = None,
    metric: Metric = accuracy,
    reference: nn.Module | None = None,
    repeats: int = 15,
    name: str = "",
) -> Frontier:
    """Quality, FLOPs, parameters, bytes and latency of ``net`` at every point, on every sample of ``data``.

    Args:
        net: the network; the setting it stands at and its training flags are restored afterwards.
        data: batches of (input, target); it is read once for each point.
        points: some of ``net.points()``; all of them by default.
        metric: ``metric(logits, targets)`` over the whole data; the share of correct classes by default.
        reference: what latency is a ratio to; the network at its last (largest) point by default.
        repeats: timed runs for each latency; 0 leaves latency out (NaN).

    Raises:
        ValueError: ``data`` is empty.
    """
    chosen = [net._known(p) for p in points] if points is not None else net.points()
    before = net.point
    device = device_of(net)
    rows = []
    try:
        full = reference if reference is not None else _deployed(net, net.points()[-1])[0]
        for point in chosen:
            net.use(point)
            quality, flops, nonzero = _run(net, data, metric, device)
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
                )
            )
    finally:
        net.use(before)
    return Frontier(tuple(sorted(rows, key=lambda r: (r.flops, r.nonzero_flops))), name or type(net).__name__)


def _deployed(net: Dynamic, point: Point) -> tuple[nn.Module, bool]:
    """What a user would run at ``point``: the extracted network, or the dynamic one where none is static."""
    try:
        return net.extract(point), True
    except NotStaticError:
        return net.use(point), False


def evaluate(net: nn.Module, data: Iterable[Batch], metric: Metric = accuracy) -> float:
    """``metric`` of a network in evaluation mode over all of ``data``.

    Raises:
        ValueError: ``data`` is empty.
    """
    with evaluating(net), torch.no_grad():
        return _predict(net, data, metric, device_of(net))[0]


def _run(net: nn.Module, data: Iterable[Batch], metric: Metric, device: torch.device) -> tuple[float, int, int]:
    """Quality and mean FLOPs per sample over ``data``, in one pass: what is counted is what answered."""
    found = (0.0, 0)

    def predict() -> None:
        nonlocal found
        found = _predict(net, data, metric, device)

    with evaluating(net):
        counted = count_flops(predict)
    quality, samples = found
    return quality, round(counted.total / samples), round(counted.nonzero / samples)


def _predict(net: nn.Module, data: Iterable[Batch], metric: Metric, device: torch.device) -> tuple[float, int]:
    """The metric over all of ``data``, and its number of samples."""
    outputs: list[Tensor] = []
    targets: list[Any] = []
    for batch in data:
        x, y = split_batch(batch)
        outputs.append(logits(call(net, to_device(x, device))).float().cpu())
        targets.append(y)
    if not outputs:
        raise ValueError("data: it has no batches, so there is nothing to measure")
    quality = metric(torch.cat(outputs), torch.cat([t.cpu() for t in targets]))
    return quality, sum(len(o) for o in outputs)
