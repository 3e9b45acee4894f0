"""The command line: compare, list, show, reproduce. Errors are one clear line; ``--debug`` shows the traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pliant import __version__, catalog

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None
)
out_console = Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width of its own
log_console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pliant {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Dynamic neural networks: many published systems under one small contract."""


@app.command("list")
def list_methods(as_json: Json = False) -> None:
    """The methods that there are."""
    if as_json:
        typer.echo(json.dumps([_entry(e) for e in catalog.METHODS], indent=1))
        return
    _print_table(
        [{"slug": e.slug, "family": e.family, "what changes": e.what, "when": e.when} for e in catalog.METHODS]
    )


@app.command()
def show(slug: str, as_json: Json = False) -> None:
    """One method: its paper, its class, its verdict where it was measured."""
    entry = catalog.find(slug)
    evidence = _evidence(slug)
    if as_json:
        typer.echo(json.dumps(_entry(entry) | {"evidence": evidence}, indent=1))
        return
    module, _, name = entry.path.partition(":")
    typer.echo(f"{entry.title}\n{entry.year}, arXiv:{entry.arxiv}\n")
    typer.echo(f"what changes   {entry.what}\nchosen by      {entry.by}\nwhen           {entry.when}")
    typer.echo(f"use            from {module} import {name}")
    if entry.extra:
        typer.echo(f'needs          pip install "pliant[{entry.extra}]"')
    if evidence:
        typer.echo(f"verdict        {evidence['verdict']} ({evidence['seeds']} seeds)")


@app.command()
def compare(
    task: Annotated[
        str, typer.Option(help="fashion-mnist, fashion-mnist-full, mnist, cifar10 or digits.")
    ] = "fashion-mnist",
    methods: Annotated[str, typer.Option(help="Slugs, parted by commas; three of them by default.")] = "",
    family: Annotated[str, typer.Option(help="Only the methods of one family: elastic, sparsity or routing.")] = "",
    budget: Annotated[list[str] | None, typer.Option(help="A limit such as flops=3e6; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Repetitions; the chart shows mean and spread.")] = 1,
    epochs: Annotated[
        int, typer.Option(help="Passes for the baseline, each elastic network and each smaller one.")
    ] = 10,
    model: Annotated[str, typer.Option(help="module:function that returns your own network.")] = "",
    data: Annotated[str, typer.Option(help="module:function that returns (train, validation, test).")] = "",
    criterion: Annotated[str, typer.Option(help="module:name of a loss for your own data; cross entropy else.")] = "",
    metric: Annotated[str, typer.Option(help="module:name of a metric for your own data; accuracy else.")] = "",
    lower_is_better: Annotated[
        bool | None, typer.Option("--lower-is-better/--higher-is-better", help="The metric's direction.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the chart, the figures and the networks.")] = Path("out"),
    as_json: Json = False,
) -> None:
    """Put several methods and their honest opponents on one task, and draw one chart."""
    from pliant import compare as job
    from pliant import recipes, tasks

    limits = _budget(budget or [])
    named = tuple(methods.replace(",", " ").split())
    chosen = named or recipes.DEFAULT
    if family:
        chosen = tuple(s for s in named or recipes.METHODS if catalog.find(s).family == family)
        if not chosen:
            families = sorted({catalog.find(s).family for s in recipes.METHODS})
            raise ValueError(f"--family: no method of {family!r} here; allowed: {', '.join(families)}")
    if bool(model) != bool(data):
        raise ValueError("--model and --data go together: give both, or neither")
    if not model and (criterion or metric or lower_is_better is not None):
        raise ValueError("--criterion, --metric and their direction are for your own data: give --model and --data")
    subject = job.own_task(model, data, criterion, metric, lower_is_better) if model else tasks.load(task)
    if limits:
        for line in job.reach(subject):
            log_console.print(line, highlight=False)
    with log_console.status("") as status:

        def progress(line: str) -> None:
            log_console.print(line, highlight=False)
            status.update(line.strip())

        try:
            done = job.compare(subject, methods=chosen, out=out, seeds=seeds, epochs=epochs, progress=progress)
        except KeyboardInterrupt:
            status.stop()
            log_console.print(f"interrupted; what was finished is in {out}")
            raise typer.Exit(130) from None
    try:
        winner = done.best(**limits) if limits else None
    except ValueError:  # nothing fits: what was measured is shown all the same
        if not as_json:
            _print_table(job.table(done))
        raise
    if as_json:
        typer.echo(json.dumps(done.to_dict() | ({"winner": _winner(winner)} if winner else {}), indent=1))
    else:
        _print_table(job.table(done))
        typer.echo("front: no other row is better at its executed FLOPs (F), at its time (T)")
        for line in job.recommendation(done):
            typer.echo(line)
        typer.echo(f"chart: {out / 'frontier.png'}   figures: {out / 'results.json'}   networks: {out / 'networks'}")
    if winner is not None:
        path = job.write_winner(winner, out, subject.example)
        if not as_json:
            shown = ", ".join(f"{k} <= {v:g}" for k, v in limits.items())
            typer.echo(
                f"best within {shown}: {winner.result.name} at {job.short_point(winner.row.point)}, "
                f"{job.shown_quality(winner.row.quality, winner.result.metric)} on test (chosen on validation)"
            )
            typer.echo(
                f"plain network: {path}" if path else "its computation depends on the input, so it has no plain form; "
                f"the dynamic network is in {out / 'networks'}"
            )  # fmt: skip


@app.command()
def reproduce(
    slug: str,
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the evidence file.")] = Path("evidence"),
    as_json: Json = False,
) -> None:
    """Measure a paper's claim here, against baselines trained with equal care."""
    from pliant.reproduce import reproduce as run

    evidence = run(slug, seeds=seeds, folder=out, progress=lambda line: log_console.print(line, highlight=False))
    if as_json:
        typer.echo(json.dumps(evidence, indent=1))
        return
    typer.echo(f"claim: {evidence['claim']}\n")
    _print_table(
        [{k: _shown(v) for k, v in row.items() if not isinstance(v, dict | list)} for row in evidence["table"]]
    )
    for check in evidence.get("checks", []):
        typer.echo(f"{'holds' if check['holds'] else 'does not hold':14} {check['statement']}  [{check['measured']}]")
    typer.echo(f"\nverdict: {evidence['verdict']}   ({out / f'{slug}.json'})")


def _entry(entry: catalog.Entry) -> dict[str, Any]:
    return {
        k: getattr(entry, k)
        for k in ("slug", "name", "path", "family", "title", "year", "arxiv", "what", "by", "when", "task", "extra")
    }


def _evidence(slug: str) -> dict[str, Any] | None:
    """The evidence in a checkout of the project; None elsewhere."""
    path = Path(__file__).parents[2] / "evidence" / f"{slug}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _winner(winner: Any) -> dict[str, Any]:
    return {"name": winner.result.name, "point": dict(winner.row.point), "quality": winner.row.quality}


def _budget(texts: list[str]) -> dict[str, float]:
    from pliant.core.frontier import COSTS

    limits = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ValueError(f"--budget: expected a limit such as flops=3e6, got {text!r}") from None
        if not 0 < limits[name] < float("inf"):
            raise ValueError(f"--budget: {text!r}; allowed: a number above 0")
        if name not in COSTS:
            raise ValueError(f"--budget: unknown cost {name!r}; allowed: {', '.join(COSTS)}")
    return limits


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _print_table(rows: list[dict[str, str]]) -> None:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(row.get(c, "") for c in columns))
    out_console.print(table)


def main() -> None:
    """The entry point: expected errors become one line, unexpected ones too unless ``--debug`` is given."""
    debug = "--debug" in sys.argv
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        log_console.print("interrupted")
        sys.exit(130)
    except Exception as error:  # the last line of defence: no traceback for a user
        if debug:
            raise
        kind = "" if isinstance(error, ValueError | OSError | ImportError | TypeError) else f"{type(error).__name__}: "
        log_console.print(f"error: {kind}{' '.join(str(error).split())}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
