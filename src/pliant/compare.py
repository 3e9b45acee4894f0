"""The main job: several methods and their honest opponents on one task, one chart, and the network for a budget.

What is fair here, and what is not claimed:

* Every method and its opponent get the same: see ``pliant.recipes``.
* Choices (which point wins a budget, thresholds) are made on validation; what is reported is measured on test.
* Pruned weights are zeros in dense tensors: they save no executed FLOPs and no time. They are drawn at their non-zero
  FLOPs in the left panel, labelled so, and where they really stand in the right one.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant import catalog, report
from pliant._version import __version__
from pliant.core.cost import count_bytes, count_parameters, flops_per_sample, latency_ratio
from pliant.core.dynamic import Dynamic, NotStaticError, Point
from pliant.core.frontier import COSTS, Frontier, Row, evaluate, measure, undominated
from pliant.core.inputs import Input, evaluating, first_line, split_batch, take
from pliant.core.objective import Criterion, Metric
from pliant.core.persistence import save
from pliant.core.training import fit
from pliant.elastic import SortedNet
from pliant.recipes import DEFAULT, METHODS, RECIPES, UNSTRUCTURED, Joined, Only, Plain, Setting
from pliant.tasks import Task


@dataclass
class Result:
    """One line of the chart over all seeds: what was measured on validation and on test, seed by seed."""

    name: str
    kind: report.Kind
    method: str
    validation: list[Frontier] = field(default_factory=list)
    test: list[Frontier] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def cost(self) -> str:
        """The cost that its place in the left panel means."""
        return "nonzero_flops" if self.method in UNSTRUCTURED else "flops"

    @property
    def metric(self) -> str:
        """The name of what quality is."""
        return self.test[0].metric if self.test else "accuracy"

    def mean(self) -> list[tuple[Point, dict[str, float], float]]:
        """Point by point: the mean of every figure on test over the seeds, and the spread of quality (std)."""
        out = []
        for point in [r.point for r in self.test[0]]:
            rows = [r for f in self.test for r in f if r.point == point]
            means = {c: statistics.fmean(float(getattr(r, c)) for r in rows) for c in ("quality", *COSTS)}
            quality = [r.quality for r in rows]
            out.append((point, means, statistics.stdev(quality) if len(quality) > 1 else 0.0))
        return out

    def chosen(self) -> Frontier:
        """What is chosen from: quality on validation, and the times, which were taken once, with the test samples."""
        times = {r.point: r for r in self.test[-1]}
        rows = []
        for row in self.validation[-1]:
            timed = times.get(row.point, row)
            taken = {c: getattr(timed, c) for c in ("latency", "latency_low", "latency_high")}
            rows.append(replace(row, **taken))
        return replace(self.validation[-1], rows=tuple(rows))

    def curve(self, cost: str, colour: str) -> report.Curve:
        """The line in the panel of ``cost``."""
        suffix = " †" if cost == "flops" and self.cost != "flops" else ""
        x = self.cost if cost == "flops" else cost
        rows, scale = sorted(self.mean(), key=lambda r: (r[1][x], r[1]["quality"])), report.quality_scale(self.metric)
        return report.Curve(
            self.name + suffix,
            tuple(m[x] for _, m, _ in rows),
            tuple(scale * m["quality"] for _, m, _ in rows),
            tuple(scale * s for _, _, s in rows),
            colour,
            self.kind,
            self.test[0].lower_is_better if self.test else False,
        )


@dataclass(frozen=True)
class Winner:
    """The point that does best on validation inside a budget, and what it does on test."""

    result: Result
    row: Row
    network: Dynamic


@dataclass
class Comparison:
    """Everything that ``compare`` measured. ``networks`` holds the last seed's, by result name.

    ``skipped`` tells of the methods that do not fit the network, by slug, why.
    """

    task: Task
    results: list[Result] = field(default_factory=list)
    networks: dict[str, Dynamic] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def best(self, **budget: float) -> Winner:
        """Among all results: the best validation quality within ``budget``.

        Raises:
            ValueError: nothing fits, or a cost is unknown.
        """
        fits: list[tuple[float, Result, Point]] = []
        for result in self.results:
            front = result.chosen()
            with suppress(ValueError):
                row = front.best_row(**budget)
                fits.append((front.gain(row.quality), result, row.point))
        if not fits:
            if not self.results:
                raise ValueError("budget: nothing was measured yet")
            every = replace(self.results[0].chosen(), rows=tuple(r for x in self.results for r in x.chosen()))
            every.best_row(**budget)  # says what the smallest of all is, or which cost is unknown
        _, result, point = max(fits, key=lambda f: f[0])
        row = next(r for r in result.test[-1] if r.point == point)
        return Winner(result, row, self.networks[result.name])

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "pliant": __version__,
            "torch": torch.__version__,
            "task": self.task.title,
            "flops": "2 per multiply-add, counted on what ran, mean over the test samples",
            "latency": "ratio to the full network, batch of 64, the two timed in turn",
            "results": [
                {
                    "name": r.name,
                    "kind": r.kind,
                    "method": r.method,
                    "seconds": r.seconds,
                    "test": [f.to_dicts() for f in r.test],
                    "validation": [f.to_dicts() for f in r.validation],
                }
                for r in self.results
            ],
            "skipped": self.skipped,
        }


Progress = Callable[[str], None]


def compare(
    task: Task,
    *,
    methods: Sequence[str] = DEFAULT,
    out: str | Path | None = None,
    seeds: int = 1,
    epochs: int = 10,
    finetune: int = 1,
    lr: float = 0.2,
    progress: Progress = print,
) -> Comparison:
    """Train and measure ``methods`` and their opponents on ``task``.

    Args:
        task: data, model and example; ``pliant.tasks.load`` makes one, and so does ``Task`` for your own.
        methods: slugs, some of ``METHODS``.
        out: folder for ``frontier.png``, ``frontier.svg``, ``results.json`` and the saved networks of the last seed;
            all of them are written anew after every method, so that an interruption leaves what is finished.
        seeds: repetitions; the chart shows means and standard deviations.
        epochs: passes over the training data for the baseline, SortedNet and each smaller network.
        finetune: passes for each of the pruning levels, and for the exits' heads as many as all levels together.
        lr: peak learning rate of the one-cycle schedule.
        progress: takes one line for each thing done.

    Raises:
        ValueError: an argument is out of range.
        OSError: ``out`` cannot be written.
    """
    for slug in methods:
        catalog.find(slug)
        if slug not in METHODS:
            raise ValueError(f"methods: {slug!r} is not part of the comparison; allowed: {', '.join(METHODS)}")
    for name, value in (("seeds", seeds), ("epochs", epochs), ("finetune", finetune)):
        if value < 1:
            raise ValueError(f"{name}: {value} is not a positive number")
    folder = Path(out) if out is not None else None
    if folder is not None:
        _check_writable(folder)
    done = Comparison(task)
    by_name: dict[str, Result] = {}

    def note(name: str, kind: report.Kind, method: str, net: Dynamic, start: float, full: nn.Module) -> None:
        seconds = time.perf_counter() - start
        result = by_name.setdefault(name, Result(name, kind, method))
        if result not in done.results:
            done.results.append(result)
        how: dict[str, Any] = {"metric": task.metric, "lower_is_better": task.lower_is_better, "name": name}
        validation = measure(net, task.validation, repeats=0, **how)
        test = measure(net, task.test, reference=full, **how)
        result.validation.append(validation)
        result.test.append(test)
        result.seconds.append(seconds)
        done.networks[name] = net
        best = shown_quality(test.best_row().quality, test.metric)
        progress(f"  {name}: trained in {seconds:.0f} s, {len(test)} points, at best {best}")

    for seed in range(seeds):
        progress(f"seed {seed}: training the baseline on {task.title}")
        start = time.perf_counter()
        base = Plain(task.model(seed), task.example, task.criterion)
        if not seed:
            _check_task(task, base)
        fit(base, task.train, epochs=epochs, lr=lr, seed=seed, progress=False)
        full = base.extract(base.point)
        note("baseline", "baseline", "baseline", base, start, full)
        taken = done.results[0].seconds[-1]
        setting = Setting(task, base.model, full, seed, epochs, finetune, lr, note, base_seconds=taken)
        for slug in methods:
            progress(f"seed {seed}: {catalog.find(slug).name}")
            try:
                RECIPES[slug](setting)
            except ValueError as error:  # a method that needs convolutions, on a network without any
                if len(methods) == 1:
                    raise
                done.skipped[slug] = str(error)
                progress(f"  {slug} does not fit this network: {error}")
            if folder is not None:
                write(done, folder)
    return done


# -- writing ----------------------------------------------------------------------------------------------------------


def write(done: Comparison, folder: Path) -> None:
    """The chart, the figures and the networks of what is finished so far. Each file is replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = {m: report.COLOURS[i] for i, m in enumerate(METHODS)} | {"baseline": report.INK}
    panels = {
        "flops": [r.curve("flops", colours[r.method]) for r in done.results],
        "latency": [r.curve("latency", colours[r.method]) for r in done.results],
    }
    seeds, front = max(len(r.test) for r in done.results), done.results[0].test[0]
    pruned = any(r.cost != "flops" for r in done.results)
    report.comparison(
        panels,
        [folder / "frontier.png", folder / "frontier.svg"],
        title=f"{'Accuracy' if front.metric == 'accuracy' else front.metric} against compute: {done.task.title}",
        quality=report.quality_label(front.metric, front.lower_is_better),
        subtitle=" · ".join(
            [
                "solid: dynamic network",
                "dashed: its honest opponent",
                *(["† at its FLOPs on non-zero weights, which saves no time (right)"] if pruned else []),
                f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed",
            ]
        ),
    )
    text = json.dumps(done.to_dict(), indent=1)
    temporary = folder / ".results.json.part"
    temporary.write_text(text)
    temporary.replace(folder / "results.json")
    for name, net in done.networks.items():
        if all(r.kind != "method" for r in done.results if r.name == name) and not hasattr(net, "allocation"):
            continue
        parts = list(net.nets) if isinstance(net, Joined) else [net]
        for part in parts:
            inner = part.net if isinstance(part, Only) else part
            entry = next((e for e in catalog.METHODS if e.name == type(inner).__name__), None)
            if entry is not None and isinstance(inner, Dynamic):
                suffix = "" if getattr(inner, "allocation", "rd") == "rd" else f"-{inner.allocation}"
                if len(parts) > 1:  # one training each: by what was asked for, which tells them apart
                    asked = f"keep={inner.keep:g}" if hasattr(inner, "keep") else short_point(inner.points()[0])
                    suffix += f"-{asked}"
                save(inner, folder / "networks" / (entry.slug + suffix))


def write_winner(winner: Winner, folder: Path, example: Input) -> Path | None:
    """The winner as files that need no pliant: ``best.pt2`` (``torch.export``) and ``best.safetensors``.

    None where its computation depends on the input, so that no plain network exists.
    """
    from safetensors.torch import save_file

    try:
        plain = winner.network.extract(winner.row.point)
    except NotStaticError:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    args = (example,) if isinstance(example, Tensor) else () if isinstance(example, Mapping) else tuple(example)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = [{0: batch} for _ in args] if not kwargs else {k: {0: batch} for k in kwargs}
    program = torch.export.export(plain, args, kwargs, dynamic_shapes=shapes, strict=False)
    temporary = folder / ".best.part.pt2"
    torch.export.save(program, temporary)
    temporary.replace(folder / "best.pt2")
    weights = {k: v.detach().clone().contiguous() for k, v in plain.state_dict().items()}
    save_file(weights, folder / ".best.part")
    (folder / ".best.part").replace(folder / "best.safetensors")
    return folder / "best.pt2"


def _check_task(task: Task, base: Plain) -> None:
    """Ask for what the data leave open before minutes of training, not after.

    Raises:
        ValueError: no criterion or no metric was given, and what the targets mean is not certain.
    """
    batch = next(iter(task.train), None)
    if batch is None:
        raise ValueError("train: it has no batches; with drop_last=True the batch may exceed the data")
    with evaluating(base), torch.no_grad():
        base.loss(batch)
    evaluate(base, [batch], task.metric)


def _check_writable(folder: Path) -> None:
    """Fail before minutes of training, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(f"out: cannot write to {str(folder)!r}: {error.strerror or error}") from error


def reach(task: Task) -> list[str]:
    """What a budget is up against, told before anything is trained: the full network, and its smallest slice.

    The slice is SortedNet's; methods that route or make zeros may cost less or more.
    """
    network = task.model(0)
    flops, parameters = flops_per_sample(network, task.example).total, count_parameters(network)
    lines = [f"the full network: flops={flops:g} parameters={parameters} bytes={count_bytes(network)} latency=1"]
    try:
        net = SortedNet(task.model(0), task.example, calibration_batches=1, criterion=task.criterion)
        net.finish(list(islice(iter(task.train), 1)))
        small = net.extract(net.points()[0])
    except (ValueError, RuntimeError) as error:
        return [*lines, f"its smallest slice: not known before training ({first_line(error)})"]
    x = take(split_batch(next(iter(task.test)))[0], slice(0, 64))
    ratio = latency_ratio(small, network.eval(), x, repeats=9).median
    flops, parameters = flops_per_sample(small, task.example).total, count_parameters(small)
    told = f"flops={flops:g} parameters={parameters} bytes={count_bytes(small)} latency={ratio:.2g}"
    return [*lines, f"its smallest slice ({net.points()[0]}): {told}"]


def recommendation(done: Comparison) -> list[str]:
    """Which point to take, in words: chosen by quality on validation, with the figures on test beside it.

    The fastest that loses nothing against the baseline, and the fastest that loses at most a hundredth of its quality.
    """
    base = next((r for r in done.results if r.kind == "baseline"), None)
    if base is None:
        return []
    fronts = [(result, result.chosen()) for result in done.results]
    start = base.chosen().best_row().quality
    lines: dict[tuple[str, Point], str] = {}
    for allowed, words in ((0.0, "without loss on validation"), (0.01, "within one hundredth on validation")):
        fits = [
            (row.latency, result, row)
            for result, front in fronts
            for row in front
            if front.gain(row.quality) >= front.gain(start) - allowed * abs(start)
            and row.latency < 1.0
            and result is not base
        ]
        if fits:
            _, result, row = min(fits, key=lambda f: f[0])
            test = next(r for r in result.test[-1] if r.point == row.point)
            lines.setdefault(
                (result.name, row.point),
                f"fastest {words}: {result.name} at {short_point(row.point)}, "
                f"{shown_quality(test.quality, result.metric)} on test at {test.latency:.2f}x the time",
            )
        else:
            lines[words, base.validation[-1].rows[0].point] = f"fastest {words}: the baseline; no point here is faster"
    return list(lines.values())


def _fronts(done: Comparison) -> dict[str, set[tuple[str, Point]]]:
    """The points (of which result, which) that no other one beats, by executed FLOPs and by time."""
    found: dict[str, set[tuple[str, Point]]] = {}
    sign = -1 if done.results[0].test[0].lower_is_better else 1
    for cost in ("flops", "latency"):
        points = [(m[cost], sign * m["quality"], r.name, p) for r in done.results for p, m, _ in r.mean()]
        timed = [p for p in points if not math.isnan(p[0])]
        found[cost] = {timed[i][2:] for i in undominated([p[:2] for p in timed])}
    return found


def table(done: Comparison) -> list[dict[str, str]]:
    """The printed table: one row for each point, as strings; training time as a ratio to the baseline's.

    The column "front" marks what no other row beats: F at its executed FLOPs, T at its time.
    """
    rows = []
    fronts = _fronts(done)
    unit, metric = statistics.fmean(done.results[0].seconds), done.results[0].metric
    title = "accuracy %" if metric == "accuracy" else metric
    for result in done.results:
        training = f"{statistics.fmean(result.seconds) / unit:.1f}x"
        for point, m, spread in result.mean():
            rows.append(
                {
                    "network": result.name,
                    "trained in": training,
                    "front": "".join(
                        w for w, c in (("F", "flops"), ("T", "latency")) if (result.name, point) in fronts[c]
                    ),
                    "point": short_point(point),
                    title: shown_quality(m["quality"], metric, sign="")
                    + (f" ± {shown_quality(spread, metric, sign='')}" if spread else ""),
                    "FLOPs": report.short(m["flops"]),
                    "non-zero": report.short(m["nonzero_flops"]),
                    "parameters": report.short(m["parameters"]),
                    "time": "-" if math.isnan(m["latency"]) else f"{m['latency']:.2f}x",
                }
            )
            training = ""
    return rows


def shown_quality(value: float, metric: str, sign: str = " %") -> str:
    """A quality as text: accuracy in percent, anything else as it is.

    >>> shown_quality(0.912, "accuracy"), shown_quality(0.0123456, "mean_squared_error")
    ('91.2 %', '0.01235')
    """
    return f"{100 * value:.1f}{sign}" if metric == "accuracy" else f"{value:.4g}"


def short_point(point: Point) -> str:
    """A point for a table: coordinates of many stages are put together by their axis.

    >>> short_point(Point(**{"a.width": 8, "b.width": 16, "a.depth": 1, "b.depth": 2}))
    'width=8/16 depth=1/2'
    """
    if len(point) < 4:
        return str(point)
    axes: dict[str, list[str]] = {}
    for name, value in point.items():
        axes.setdefault(name.rpartition(".")[2], []).append(str(Point(v=value)).partition("=")[2])
    return " ".join(f"{axis}={'/'.join(values)}" for axis, values in axes.items())


def own_task(model: str, data: str, criterion: str = "", metric: str = "", lower_is_better: bool | None = None) -> Task:
    """The user's own: ``module:function`` for a model (no arguments) and for its data (train, validation, test).

    ``criterion`` and ``metric``, where they are given, are ``module:name`` of functions of (output, target), or of
    what such a thing is made by without arguments, such as ``torch.nn:MSELoss``.

    Raises:
        ValueError: a name cannot be found, or does not return what is needed.
    """
    build, fetch = _resolve("--model", model), _resolve("--data", data)
    parts: Iterable[Any] = fetch()
    if not isinstance(parts, tuple | list) or len(parts) != 3:
        raise ValueError(f"--data: {data} must return three loaders or data sets (train, validation, test)")
    from torch.utils.data import DataLoader, Dataset

    loaders = [
        DataLoader(p, 64, shuffle=i == 0, drop_last=i == 0 and _has(p, 64)) if isinstance(p, Dataset) else p
        for i, p in enumerate(parts)
    ]
    if any(next(iter(loader), None) is None for loader in loaders):
        raise ValueError(f"--data: {data} returned an empty part; train, validation and test need batches")
    if not isinstance(build(), nn.Module):
        raise ValueError(f"--model: {model} must return an nn.Module")

    def fresh(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: nn.Module = build()
            return network

    example = take(split_batch(next(iter(loaders[0])))[0], slice(0, 2))
    train, validation, test = loaders
    loss: Criterion | None = _made("--criterion", criterion)
    judge: Metric | None = _made("--metric", metric)
    return Task("own", f"{model} on {data}", train, validation, test, example, fresh, loss, judge, lower_is_better)


def _has(data: Any, rows: int) -> bool:
    """Whether a data set has as many samples; True where it does not tell."""
    return not isinstance(data, Sized) or len(data) >= rows


def _made(option: str, path: str) -> Any:
    """What ``module:name`` names, made first where it is a class; None for an empty path."""
    if not path:
        return None
    found = _resolve(option, path)
    return found() if isinstance(found, type) else found


def _resolve(option: str, path: str) -> Callable[[], Any]:
    import importlib
    import sys

    module, sep, name = path.partition(":")
    if not sep or not module or not name:
        raise ValueError(f"{option}: expected module:function, got {path!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{option}: cannot import {module!r}: {error}") from error
    except AttributeError:
        raise ValueError(f"{option}: module {module!r} has no {name!r}") from None
    if not callable(found):
        raise ValueError(f"{option}: {path} is not a function")
    return found  # type: ignore[no-any-return]
