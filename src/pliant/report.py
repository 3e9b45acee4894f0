"""Tables and charts. Colour follows the method and never its rank; names stand beside the curves they name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pliant.core.frontier import Frontier

Kind = Literal["method", "opponent", "baseline"]

# Hues that stay apart under the common colour-vision deficiencies and against white, in the order of the methods of the
# main job; opponents share the hue of the method they are set against and differ by line and marker.
COLOURS = (
    "#2a78d6", "#eb6834", "#008300", "#e34948", "#1baf7a", "#eda100", "#4a3aa7",
    "#00809d", "#b0125b", "#7a5c00", "#8a3ffc", "#5b6f7d",
)  # fmt: skip
INK, MUTED, GRID = "#0b0b0b", "#52514e", "#e1e0d9"

AXES = {
    "flops": "FLOPs per sample (2 per multiply-add, executed)",
    "nonzero_flops": "FLOPs per sample on non-zero weights",
    "parameters": "parameters",
    "bytes": "bytes",
    "latency": "time per batch of 64, as a ratio to the full network",
}


def quality_scale(metric: str) -> int:
    """What a quality is multiplied by where it is shown: accuracy is shown in percent, all else as it is."""
    return 100 if metric == "accuracy" else 1


def quality_label(metric: str, lower_is_better: bool = False) -> str:
    """The name of a quality on an axis.

    >>> quality_label("accuracy"), quality_label("mean_squared_error", lower_is_better=True)
    ('test accuracy (%)', 'test mean_squared_error (lower is better)')
    """
    return f"test {metric}{' (%)' if metric == 'accuracy' else ''}{' (lower is better)' if lower_is_better else ''}"


@dataclass(frozen=True)
class Curve:
    """One line of a chart: cost ``x``, quality ``y`` (accuracy in percent) and half-widths of error bars (0: none)."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: tuple[float, ...]
    colour: str = COLOURS[0]
    kind: Kind = "method"
    lower_is_better: bool = False

    def front(self) -> list[int]:
        """Indices of the points that no cheaper one of the curve equals, from the cheapest: those a line may join."""
        from pliant.core.frontier import undominated

        sign = -1 if self.lower_is_better else 1
        return undominated([(x, sign * y) for x, y in zip(self.x, self.y, strict=True)])

    @classmethod
    def of(cls, frontier: Frontier, cost: str = "flops", **style: Any) -> Curve:
        """The points of a measured frontier, in the order of their cost."""
        rows = sorted(frontier.rows, key=lambda r: (getattr(r, cost), r.quality))
        x = tuple(float(getattr(r, cost)) for r in rows)
        y = tuple(quality_scale(frontier.metric) * r.quality for r in rows)
        style = {"lower_is_better": frontier.lower_is_better} | style
        return cls(frontier.name, x, y, (0.0,) * len(y), **style)


def chart(
    curves: Sequence[Curve],
    path: str | os.PathLike[str] | None = None,
    *,
    cost: str = "flops",
    title: str = "",
    subtitle: str = "",
    quality: str = "test accuracy (%)",
) -> Any:
    """One panel of quality against one cost; returns the matplotlib figure."""
    figure = _figure(1)
    _panel(figure.axes[0], curves, AXES[cost], quality, log=cost != "latency", percent="%" in quality)
    return _finish(figure, [curves], [path] if path else [], title, subtitle)


def comparison(
    panels: Mapping[str, Sequence[Curve]],
    paths: Sequence[str | os.PathLike[str]],
    *,
    title: str,
    subtitle: str,
    quality: str = "test accuracy (%)",
) -> Any:
    """Panels side by side on one quality axis, keyed by their cost; written to every one of ``paths``."""
    figure = _figure(len(panels))
    for i, (axes, (cost, curves)) in enumerate(zip(figure.axes, panels.items(), strict=True)):
        label = quality if i == 0 else ""
        _panel(axes, curves, AXES[cost], label, log=cost != "latency", percent="%" in quality)
    return _finish(figure, list(panels.values()), paths, title, subtitle)


def _figure(panels: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, _ = pyplot.subplots(1, panels, figsize=(7.6 * panels, 5.6), sharey=True, squeeze=False, dpi=130)
    return figure


def _panel(axes: Any, curves: Sequence[Curve], xlabel: str, ylabel: str, *, log: bool, percent: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    for curve in curves:
        method = curve.kind == "method"
        bars = curve.spread if any(curve.spread) else None
        axes.errorbar(
            curve.x,
            curve.y,
            yerr=bars,
            color=curve.colour,
            linestyle="none",  # measured times scatter: a line through all points would go to and fro
            elinewidth=1.2,
            marker="*" if curve.kind == "baseline" else "o" if method else "s",
            markersize=14 if curve.kind == "baseline" else 7,
            markerfacecolor=curve.colour if method or curve.kind == "baseline" else "white",
            capsize=2,
            zorder=3 if method else 2,
        )
        front = curve.front()
        axes.plot(
            [curve.x[i] for i in front],
            [curve.y[i] for i in front],
            color=curve.colour,
            linewidth=2 if method else 1.2,
            linestyle="-" if method else "--",
            zorder=3 if method else 2,
        )
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    values = sorted(y for c in curves for y in c.y)
    axes.margins(x=0.12, y=0.1)
    floor = values[len(values) // 4] - 5
    if percent and len(values) > 4 and values[0] < floor - 2:
        # A few collapsed points must not flatten all others: they are cut off, and that is said.
        axes.set_ylim(floor, values[-1] + 0.12 * (values[-1] - floor))
        below = sum(v < floor for v in values)
        axes.text(
            0.0, 1.01, f"{below} points lie below {floor:.0f} %", transform=axes.transAxes, fontsize=8, color=MUTED
        )
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.set_xlabel(xlabel, color=INK, fontsize=10)
    axes.set_ylabel(ylabel, color=INK, fontsize=10)


def _label(axes: Any, curves: Sequence[Curve]) -> None:
    """Write every curve's name beside one of its points, where it covers no other name and the fewest marks."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    marks = [p for c in curves for p in _trail(axes.transData.transform(list(zip(c.x, c.y, strict=True))))]
    taken: list[Any] = []
    for curve in curves:
        best: tuple[float, Any, Any] | None = None
        weight = "bold" if curve.kind != "opponent" else "normal"
        text = axes.text(0, 0, curve.label, fontsize=9.5, color=curve.colour, fontweight=weight, zorder=5)
        size = text.get_window_extent(renderer)
        for point in axes.transData.transform(list(zip(curve.x, curve.y, strict=True))):
            if not frame.contains(*point):
                continue
            for far in (9, 20, 34):
                for dx, dy in ((far, far / 2), (far, -far / 2), (-far, far / 2), (-far, -far / 2), (0, far), (0, -far)):
                    left = point[0] + dx - (size.width if dx < 0 else size.width / 2 if dx == 0 else 0)
                    low = point[1] + dy - (size.height if dy < 0 else 0)
                    box = Bbox.from_bounds(left - 2, low - 1, size.width + 4, size.height + 2)
                    outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
                    cost = 1000.0 * sum(box.overlaps(t) for t in taken) + 300.0 * outside
                    cost += 10.0 * sum(box.contains(*m) for m in marks) + far / 10
                    if best is None or cost < best[0]:
                        best = (cost, box, (left, low))
        if best is None:  # all of its points are cut off
            text.remove()
            continue
        taken.append(best[1])
        text.set_position(axes.transData.inverted().transform(best[2]))


def _trail(points: Any) -> list[tuple[float, float]]:
    """The points of a line in pixels, and more along it, so that a name can keep off the line as well."""
    trail = [tuple(points[0])]
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) // 8))
        trail += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(1, steps + 1)]
    return trail


def _finish(
    figure: Any, panels: Sequence[Sequence[Curve]], paths: Sequence[str | os.PathLike[str]], title: str, subtitle: str
) -> Any:
    from matplotlib import pyplot

    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, fontweight="bold")
    if subtitle:
        figure.text(0.01, 0.925, subtitle, ha="left", va="top", fontsize=9.5, color=MUTED)
    figure.tight_layout(rect=(0, 0, 1, 0.91 if subtitle else 0.96))
    for axes, curves in zip(figure.axes, panels, strict=True):  # names are placed last, when the sizes are settled
        _label(axes, curves)
    for path in paths:
        target = Path(path)
        temporary = target.with_name(f".{target.name}.part{target.suffix}")
        figure.savefig(temporary, bbox_inches="tight")
        temporary.replace(target)
    pyplot.close(figure)
    return figure


def short(value: float) -> str:
    """A number as a person writes it: 11.1M, 175k, 0.52.

    >>> [short(v) for v in (11075968, 174970, 512, 0.5249)]
    ['11.1M', '175k', '512', '0.525']
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
