"""Damage saved networks and checkpoints in many ways, and count how reading them ends.

    python scripts/damage.py [--networks 5000] [--checkpoints 2000] [--list KIND]

Half of the mutations damage bytes (flips, cuts, insertions, missing files); the others change the values of the
manifest or of the tensors' header and write the checksums that belong to it, as an author with bad intent would.
Reading must end in the same answers (*same*), in another network that is whole (*other*: numbers that were changed are
read as they are), or in FileNotFoundError or a SavedFileError (*told*). What must not be: an error of another kind
(*wrong*), or more than ten seconds (*hanging*). Exit status 1 if one is.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cases
import pliant
from pliant.core.inputs import logits
from pliant.core.persistence import SavedFileError, _digest

SECONDS = 10
MEMORY = 12 << 30
KINDS = ("same", "other", "told", "wrong", "hanging")
CONFIG, TENSORS = "config.json", "model.safetensors"
STRANGE: list[Any] = [
    None, True, -1, 0, 1.5, 10**9, 10**999, -(10**30), 1e300, "", "nonsense", "__import__('os')", [], {}, [[[]]],
    {"$tensor": "0"}, {"$tensor": "nonsense"}, {"$tuple": 3}, {"$dict": [1]}, {"nonsense": 1}, [10**9], [None],
    "a" * 10**5,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a nest."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def altered(manifest: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """The manifest with one value changed, removed or doubled; and which."""
    found = copy.deepcopy(manifest)
    own = {"format", "config_sha256", "tensors_sha256", "pliant", "kind"}
    path = rng.choice([p for p in places(found) if p[0] not in own or rng.random() < 0.05])
    parent = found
    for key in path[:-1]:
        parent = parent[key]
    what = rng.choice(("strange", "strange", "strange", "remove", "scale", "swap"))
    old = parent[path[-1]]
    if what == "remove":
        del parent[path[-1]]
    elif what == "scale" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[path[-1]] = old * rng.choice((-1, 2, 1000, 10**9))
    elif what == "swap" and isinstance(old, list):
        parent[path[-1]] = old[::-1] + old
    else:
        parent[path[-1]] = rng.choice(STRANGE)
    return found, f"{what} {'/'.join(map(str, path))}: {str(old)[:40]!r} -> {str(parent)[:60]!r}"


def damage(folder: Path, rng: random.Random) -> str:
    """Change one of the two files of ``folder``; says how."""
    if rng.random() < 0.5:
        target = folder / rng.choice((CONFIG, TENSORS))
        data = bytearray(target.read_bytes())
        at = rng.randrange(len(data))
        what = rng.choice(("flip", "cut", "insert", "missing", "empty", "holes"))
        if what == "missing":
            target.unlink()
            return f"{target.name} missing"
        if what == "holes":
            with open(target, "r+b") as file:
                file.truncate(1 << 40)
            return f"{target.name} of a terabyte of holes"
        if what == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = rng.randbytes(rng.randrange(1, 50))
        else:
            data.clear()
        target.write_bytes(bytes(data))
        return f"{what} in {target.name} at {at}"
    manifest = json.loads((folder / CONFIG).read_text())
    if rng.random() < 0.2:  # the header of the tensors
        data = (folder / TENSORS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, how = altered(json.loads(data[8 : 8 + length]), rng)
        text = json.dumps(header).encode()
        (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        manifest["tensors_sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    else:
        manifest, how = altered(manifest, rng)
    manifest["config_sha256"] = _digest(manifest)
    (folder / CONFIG).write_text(json.dumps(manifest))
    return f"hostile: {how}"


def answers(net: Any, case: cases.Case) -> torch.Tensor:
    with torch.no_grad():
        return logits(net(case.inputs()))


def trial(case: cases.Case, folder: Path, wanted: torch.Tensor, checkpoint: bool) -> tuple[str, str]:
    """How reading the folder ends."""
    try:
        if checkpoint:
            net = case.build()
            pliant.fit(net, case.batches(3), epochs=2, lr=0.01, progress=False, checkpoint=folder.parent)
        else:
            net = pliant.load(folder, **case.first())
    except (FileNotFoundError, SavedFileError) as error:
        return "told", str(error)
    except ValueError as error:
        told = checkpoint and str(error).startswith("checkpoint: ")  # of another run, or of another tool
        return ("told" if told else "wrong"), f"{type(error).__name__}: {error}"
    except Exception as error:  # any other kind is what is looked for
        return "wrong", f"{type(error).__name__}: {error}"
    return ("same" if torch.equal(answers(net, case), wanted) else "other"), ""


def work(number: int, count: int, start: int, checkpoint: bool, pipe: Connection) -> None:
    """The trials of one case from ``start``, each told before it begins and when it ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.set_int_max_str_digits(0)
    case = cases.CASES[number]
    net = case.build()
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        options: dict[str, Any] = {"checkpoint": whole} if checkpoint else {}
        pliant.fit(net, case.batches(3), epochs=2, lr=0.01, progress=False, **options)
        original = sorted(whole.iterdir())[0] if checkpoint else pliant.save(net, whole)
        wanted = answers(net, case)
        for i in range(start, count):
            target = Path(place) / "try" / (original.name if checkpoint else "net")
            shutil.rmtree(target.parent, ignore_errors=True)
            shutil.copytree(original, target)
            pipe.send(damage(target, random.Random(f"{case} {i} {checkpoint}")))
            pipe.send(trial(case, target, wanted, checkpoint))


def run(number: int, count: int, checkpoint: bool) -> Iterator[tuple[str, str, str]]:
    """What was done, kind and message of every trial; one that hangs is ended and the next one begun anew."""
    context = multiprocessing.get_context("spawn")
    done = 0
    while done < count:
        here, there = context.Pipe()
        worker = context.Process(target=work, args=(number, count, done, checkpoint, there), daemon=True)
        worker.start()
        there.close()
        how = "before the first"
        try:
            while done < count:
                if not here.poll(180):
                    raise TimeoutError("nothing was damaged in three minutes")
                how = here.recv()
                if not here.poll(SECONDS):
                    yield how, "hanging", f"more than {SECONDS} s"
                    done += 1
                    break
                yield (how, *here.recv())
                done += 1
        except EOFError:
            yield how, "wrong", "the process died"
            done += 1
        worker.kill()
        worker.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=5000)
    parser.add_argument("--checkpoints", type=int, default=2000)
    parser.add_argument("--only", default="", help="a case's name")
    parser.add_argument("--list", default="wrong,hanging", help="kinds to print, joined by commas")
    options = parser.parse_args()
    bad = 0
    chosen = [i for i, c in enumerate(cases.CASES) if options.only in ("", str(c))]
    for name, total in (("networks", options.networks), ("checkpoints", options.checkpoints)):
        totals: Counter[str] = Counter()
        print(f"{name:34}" + "".join(f"{kind:>10}" for kind in KINDS))
        for place, number in enumerate(chosen):
            count = total * (place + 1) // len(chosen) - total * place // len(chosen)
            counts: Counter[str] = Counter()
            lines = []
            for how, kind, message in run(number, count, name == "checkpoints"):
                counts[kind] += 1
                if kind in options.list.split(","):
                    lines.append(f"  {kind}: {how}: {' '.join(message.split())[:200]}")
            totals += counts
            print(
                f"{cases.CASES[number]!s:34}" + "".join(f"{counts[k]:>10}" for k in KINDS), *lines, sep="\n", flush=True
            )
        print(f"{'all':34}" + "".join(f"{totals[kind]:>10}" for kind in KINDS), flush=True)
        bad += totals["wrong"] + totals["hanging"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
