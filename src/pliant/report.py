"""Tables and charts. Colour follows the method and never its rank; labels stand beside the curves they name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pliant.core.frontier import Frontier

Kind = Literal["method", "opponent", "baseline"]

# Three hues that stay apart under the common colour-vision deficiencies and against white; opponents share the hue of
# the method they are set against and differ by line and marker.
COLOURS = ("#2a78d6", "#eb6834", "#008300", "#4a3aa7", "#e34948", "#1baf7a")
INK, MUTED, GRID = "#0b0b0b", "#52514e", "#e1e0d9"

AXES = {
    "flops": "FLOPs per sample (2 per multiply-add, executed)",
    "nonzero_flops": "FLOPs per sample on non-zero weights",
    "parameters": "parameters",
    "bytes": "bytes",
    "latency": "time per batch of 64, as a ratio to the full network",
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart: cost ``x``, quality ``y`` in percent, and half-widths of the error bars (0: none)."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: tuple[float, ...]
    colour: str = COLOURS[0]
    kind: Kind = "method"

    @classmethod
    def of(cls, frontier: Frontier, cost: str = "flops", **style: Any) -> Curve:
        """The points of a measured frontier, in the order of their cost."""
        rows = sorted(frontier.rows, key=lambda r: (getattr(r, cost), r.quality))
        x = tuple(float(getattr(r, cost)) for r in rows)
        y = tuple(100 * r.quality for r in rows)
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
    _panel(figure.axes[0], curves, AXES[cost], quality, log=cost != "latency")
    return _finish(figure, [path] if path else [], title, subtitle)


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
        _panel(axes, curves, AXES[cost], quality if i == 0 else "", log=cost != "latency")
    return _finish(figure, paths, title, subtitle)


def _figure(panels: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, _ = pyplot.subplots(1, panels, figsize=(7.6 * panels, 5.6), sharey=True, squeeze=False, dpi=130)
    return figure


def _panel(axes: Any, curves: Sequence[Curve], xlabel: str, ylabel: str, *, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    for curve in curves:
        method = curve.kind == "method"
        bars = curve.spread if any(curve.spread) else None
        axes.errorbar(
            curve.x,
            curve.y,
            yerr=bars,
            color=curve.colour,
            linewidth=2 if method else 1.2,
            linestyle="-" if method else "--",
            marker="*" if curve.kind == "baseline" else "o" if method else "s",
            markersize=14 if curve.kind == "baseline" else 7,
            markerfacecolor=curve.colour if method or curve.kind == "baseline" else "white",
            capsize=2,
            zorder=3 if method else 2,
        )
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    values = sorted(y for c in curves for y in c.y)
    if len(values) > 4 and values[0] < values[len(values) // 4] - 15:
        # One collapsed point must not flatten all others: it is cut off and said so.
        floor = values[len(values) // 4] - 10
        axes.set_ylim(floor, values[-1] + 1)
        low = [(c, x, y) for c in curves for x, y in zip(c.x, c.y, strict=True) if y < floor]
        for curve, x, y in low:
            axes.annotate(f"{y:.0f} ↓", (x, floor), ha="center", va="bottom", fontsize=8, color=curve.colour)
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.set_xlabel(xlabel, color=INK, fontsize=10)
    axes.set_ylabel(ylabel, color=INK, fontsize=10)
    _label(axes, curves)


def _label(axes: Any, curves: Sequence[Curve]) -> None:
    """Write every curve's name to the right of the panel, level with its last point, moved apart where they collide."""
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    step = (high - low) * 0.052
    wanted = sorted(((min(max(c.y[-1], low), high), i) for i, c in enumerate(curves)), reverse=True)
    placed: list[tuple[float, int]] = []
    for y, i in wanted:
        placed.append((min(y, placed[-1][0] - step) if placed else y, i))
    under = low + step / 2 - min(y for y, _ in placed)
    if under > 0:
        placed = [(y + under, i) for y, i in placed]
    for y, i in placed:
        curve = curves[i]
        axes.annotate(
            curve.label,
            xy=(curve.x[-1], max(curve.y[-1], low)),
            xytext=(1.03, y),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=INK,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": curve.colour, "linewidth": 0.8, "shrinkB": 5},
        )


def _finish(figure: Any, paths: Sequence[str | os.PathLike[str]], title: str, subtitle: str) -> Any:
    from matplotlib import pyplot

    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, fontweight="bold")
    if subtitle:
        figure.text(0.01, 0.925, subtitle, ha="left", va="top", fontsize=9.5, color=MUTED)
    figure.tight_layout(rect=(0, 0, 1, 0.91 if subtitle else 0.96))
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
