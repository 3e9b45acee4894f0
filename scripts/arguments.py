"""Give every keyword of every constructor in the catalogue wrong values, and count how it ends.

    python scripts/arguments.py [slug ...] [--list KIND]

A wrong value should end in a TypeError or ValueError that names its argument (*named*), or be a value that is allowed
after all (*accepted*; ``--list accepted`` prints them for a look). What should not be: an error that does not name the
argument (*unnamed*), an error of another kind (*other*), more than ten seconds (*hanging*). Exit status 1 if one is.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import multiprocessing
import re
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cases

SECONDS = 10
MEMORY = 12 << 30
KINDS = ("named", "accepted", "unnamed", "other", "hanging")

# Values by name, made anew each time: of the wrong kind, out of bounds, too large, empty, endless.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1": lambda: 1,
    "3": lambda: 3,
    "0.5": lambda: 0.5,
    "2.5": lambda: 2.5,
    "-0.5": lambda: -0.5,
    "1e-300": lambda: 1e-300,
    "1e30": lambda: 1e30,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "10**9": lambda: 10**9,
    "10**30": lambda: 10**30,
    "10**999": lambda: 10**999,
    "1j": lambda: 1j,
    "''": lambda: "",
    "'nonsense'": lambda: "nonsense",
    "'*'": lambda: "*",
    "b''": lambda: b"",
    "[]": list,
    "()": tuple,
    "{}": dict,
    "[None]": lambda: [None],
    "[nan]": lambda: [float("nan")],
    "[-1]": lambda: [-1],
    "[0, 0]": lambda: [0, 0],
    "[10**9]": lambda: [10**9],
    "['nonsense']": lambda: ["nonsense"],
    "[[[]]]": lambda: [[[]]],
    "{'nonsense': -1}": lambda: {"nonsense": -1},
    "{1: 1}": lambda: {1: 1},
    "range(10**9)": lambda: range(10**9),
    "count()": itertools.count,
    "object()": object,
    "a class": lambda: nn.Linear,
    "a function of nothing": lambda: lambda: None,
    "a tensor": lambda: torch.zeros(2, 3),
    "an empty tensor": lambda: torch.zeros(0),
    "NaN in a tensor": lambda: torch.full((4, 1, 6, 6), float("nan")),
    "a module": lambda: nn.Linear(2, 2),
}


def keywords(case: cases.Case) -> list[str]:
    """The constructor's arguments."""
    from pliant import catalog

    return list(inspect.signature(catalog.find(case.slug).load()).parameters)


def trial(case: cases.Case, name: str, value: Any) -> tuple[str, str]:
    """How the constructor ends where the argument ``name`` has ``value``: one of ``KINDS``, and what it says."""
    arguments = case.arguments() | {name: value}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.build(**arguments)
    except (TypeError, ValueError) as error:
        named = re.search(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", str(error))
        return ("named" if named else "unnamed"), f"{type(error).__name__}: {error}"
    except Exception as error:  # any other kind is what is looked for
        return "other", f"{type(error).__name__}: {error}"
    return "accepted", ""


def _work(slug: str, start: int, pipe: Connection) -> None:
    """The trials of one method from number ``start``, each told when it ends."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    case = first_case(slug)
    for name, key in list(trials(case))[start:]:
        pipe.send(trial(case, name, VALUES[key]()))


def first_case(slug: str) -> cases.Case:
    """The first case of a method."""
    return next(c for c in cases.CASES if c.slug == slug)


def trials(case: cases.Case) -> Iterator[tuple[str, str]]:
    """Pairs of an argument and the name of a value."""
    return itertools.product(keywords(case), VALUES)


def run(slug: str) -> Iterator[tuple[str, str, str, str]]:
    """Argument, value, kind and message of every trial; one that hangs is ended and the next one begun anew."""
    todo = list(trials(first_case(slug)))
    done = 0
    context = multiprocessing.get_context("spawn")
    while done < len(todo):
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(slug, done, there), daemon=True)
        worker.start()
        there.close()
        patience = 120  # the first answer waits for imports
        while done < len(todo):
            try:
                if not here.poll(patience):
                    yield (*todo[done], "hanging", f"more than {SECONDS} s")
                    done += 1
                    break
                yield (*todo[done], *here.recv())
            except EOFError:
                yield (*todo[done], "other", "the process died")
                done += 1
                break
            done += 1
            patience = SECONDS
        worker.kill()
        worker.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slugs", nargs="*", metavar="slug")
    parser.add_argument("--list", default="unnamed,other,hanging", help="kinds to print, joined by commas")
    options = parser.parse_args()
    totals: Counter[str] = Counter()
    print(f"{'method':30}" + "".join(f"{kind:>10}" for kind in KINDS))
    for slug in options.slugs or dict.fromkeys(c.slug for c in cases.CASES):
        counts: Counter[str] = Counter()
        lines = []
        for name, key, kind, message in run(slug):
            counts[kind] += 1
            if kind in options.list.split(","):
                lines.append(f"  {kind}: {name} = {key}: {' '.join(message.split())[:160]}")
        totals += counts
        print(f"{slug:30}" + "".join(f"{counts[kind]:>10}" for kind in KINDS), *lines, sep="\n", flush=True)
    print(f"{'all':30}" + "".join(f"{totals[kind]:>10}" for kind in KINDS))
    return 1 if totals["unnamed"] + totals["other"] + totals["hanging"] else 0


if __name__ == "__main__":
    sys.exit(main())
