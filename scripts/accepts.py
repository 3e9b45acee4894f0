"""Try every layer of torch.nn and many families of transformers, and write what pliant does with them: docs/accepts.md.

    python scripts/accepts.py                 # tries all of them and writes the page
    python scripts/accepts.py --only Conv2d   # tries one (or those whose names match a pattern) and prints its row
    python scripts/accepts.py --check         # exits 1 if the committed page is not what would be written

A sub-network counts as right where three things hold: it computes bit for bit what the extracted network computes;
``Slicing.check`` finds nothing, which compares it with the full network in which the removed channels are followed as
NaN; and it costs less. Whatever else comes out is printed as wrong, is written nowhere, and makes this script exit 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from families import FAMILIES
from layers import OTHERS, Between, classes, is_loss, layers, network
from torch import Tensor, nn
from torch.nn import functional as F

import pliant
from pliant.core import cost
from pliant.core.cost import count_parameters, flops_per_sample
from pliant.core.inputs import call, logits, predictions, take
from pliant.core.slicing import Slicing

PAGE = Path(__file__).parents[1] / "docs" / "accepts.md"
_WIDTHS = (0.25, 0.5, 0.75)
_POINTS = ((0.5, 1.0), (1.0, 0.5), (0.5, 0.5))


@dataclass
class LayerRow:
    """What happened to one layer."""

    name: str
    status: str = "refused"  # through, both, enters, leaves, whole; refused: nothing could be read of the network
    inside: int = 0  # groups within the layer
    flops: str = ""
    reason: str = ""
    wrong: list[str] = field(default_factory=list)


@dataclass
class ModelRow:
    """What happened to one model."""

    name: str
    model: str = ""
    groups: int = 0
    stacks: dict[str, int] = field(default_factory=dict)
    parameters: tuple[float, ...] = ()  # shares left at width, depth, both
    flops: tuple[int, int] = (0, 0)  # per sample: full, and with both
    unknown: tuple[str, ...] = ()
    whole: dict[str, list[str]] = field(default_factory=dict)  # reason -> layers
    rebuilt: list[bool] = field(default_factory=list)  # whether from_pretrained can, at width, depth, both
    trained: str = ""
    refused: str = ""
    wrong: list[str] = field(default_factory=list)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _same(a: Any, b: Any) -> bool:
    first, second = predictions(a), predictions(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# -- layers -----------------------------------------------------------------------------------------------------------


def try_layer(name: str) -> LayerRow:
    """Put a layer into a small network, cut it, and look whether all is right."""
    model, x = network(name)
    row = LayerRow(name, flops=_flops_of_layer(model, x))
    try:
        with _quiet():
            slicing = Slicing(model, x)
    except ValueError as error:  # whatever else comes is a crash, and is not caught
        row.reason = _line(error)
        return row
    reader = "last" if isinstance(model, Between) else "lead"
    enters = {g.name for g in slicing.groups for m in g.members if (m.module, m.side) == ("first", "out")}
    leaves = {g.name for g in slicing.groups for m in g.members if (m.module, m.side) == (reader, "in")}
    if enters and leaves:
        row.status = "through" if enters & leaves else "both"
    else:
        row.status = "enters" if enters else "leaves" if leaves else "whole"
    row.inside = len({g.name for g in slicing.groups if g.name != "lead"} - enters - leaves)
    row.reason = next(iter(slicing.whole.values()), "")
    row.wrong = _wrong_of_layer(slicing, model, x, row.status)
    return row


def _flops_of_layer(model: nn.Module, x: Tensor) -> str:
    """Counted, free, or the operators of which no formula is known; the layers around it are not looked at."""
    layer: Any = model.get_submodule("layer")
    if isinstance(model, Between):
        apply = model.case.apply
        with torch.no_grad():
            x = model.first(torch.tanh(model.lead(x)))
    else:
        apply = nn.Module.__call__
    with mock.patch.object(cost, "SMALL", 0), _quiet():
        counted = cost.count_flops(lambda: apply(layer, x))
    if counted.unknown:
        return f"unknown: {', '.join(counted.unknown)}"
    return "counted" if counted.total else "free"


def _wrong_of_layer(slicing: Slicing, model: nn.Module, x: Tensor, status: str) -> list[str]:
    wrong = []
    generator = torch.Generator().manual_seed(0)
    full = flops_per_sample(model, x).total
    for width in _WIDTHS:
        sizes = slicing.sizes(width)
        part = slicing.build(sizes)
        part.skeleton.eval()
        plain = part.extract(model)
        with torch.no_grad():
            torch.manual_seed(1)
            ours = part.run(model, x)
            torch.manual_seed(1)
            if not torch.equal(ours, plain(x)):
                wrong.append(f"width {width}: the extracted network computes something else")
        if problem := slicing.check(sizes):
            wrong.append(f"width {width}: {problem}")
        if not flops_per_sample(plain, x).total < full:
            wrong.append(f"width {width}: it costs no less")
        part.skeleton.train()
        model.zero_grad()
        try:
            part.run(model, x).square().sum().backward()
        except ValueError as error:
            if "GPU" not in str(error):  # SyncBatchNorm trains on GPUs only
                raise
        if any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in model.parameters()):
            wrong.append(f"width {width}: gradients that are not finite")
    for _ in range(3):  # any units, not only the first
        drawn = {g.name: _drawn(g, generator) for g in slicing.groups}
        if problem := slicing.check(drawn):
            wrong.append(f"channels drawn: {problem}")
    return wrong


def _drawn(group: Any, generator: torch.Generator) -> set[int]:
    """Half of the units of a group."""
    units = torch.randperm(group.units, generator=generator)[: max(1, group.units // 2)].tolist()
    return {u * group.bundle + i for u in units for i in range(group.bundle)}


# -- models -----------------------------------------------------------------------------------------------------------


def try_model(name: str, *, train: bool = True) -> ModelRow:
    """Cut one small model of a family; with ``train`` it is also saved, loaded and trained for a step."""
    model, x = FAMILIES[name]()
    row = ModelRow(name, type(model).__name__)
    try:
        with _quiet():
            slicing = Slicing(model, x)
    except ValueError as error:
        row.refused = _line(error)
        return row
    row.groups, row.stacks, row.whole = len(slicing.groups), slicing.stacks, _condensed(slicing.whole)
    _cut_model(row, slicing, model, x)
    if train:
        _train_model(row, name, slicing)
    return row


def _condensed(whole: Mapping[str, str]) -> dict[str, list[str]]:
    """Layers by the reason that keeps them whole, numbers of blocks as ``*``."""
    found: dict[str, list[str]] = {}
    for name, why in whole.items():
        pattern, reason = (re.sub(r"\.\d+(?=\.|$|')", ".*", text) for text in (name, why))
        reason = re.sub(r" \((mat1|The size|The expanded|shape).*", "", reason)
        if pattern not in found.setdefault(reason, []):
            found[reason].append(pattern)
    return found


def _cut_model(row: ModelRow, slicing: Slicing, model: nn.Module, x: Any) -> None:
    full, one = count_parameters(model), take(x, slice(0, 1))
    with _quiet():
        before = flops_per_sample(model, one)
    unknown = list(before.unknown)
    shares: list[float] = []
    for width, depth in _POINTS:
        try:
            part = slicing.subnetwork(width, depth)
        except ValueError:  # no stack, or nothing to cut in width
            shares.append(1.0 if 1.0 in (width, depth) else min(shares))
            row.rebuilt.append(True)
            continue
        part.skeleton.eval()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            plain = part.extract(model)
        row.rebuilt.append(not any("no configuration describes" in str(w.message) for w in told))
        with torch.no_grad():
            for inputs in (x, one):
                if not _same(part.run(model, inputs), call(plain, inputs)):
                    row.wrong.append(f"width {width}, depth {depth}: the extracted network computes something else")
        if problem := slicing.check(slicing.sizes(width), slicing.depths(depth)):
            row.wrong.append(f"width {width}, depth {depth}: {problem}")
        shares.append(count_parameters(plain) / full)
        with _quiet():
            after = flops_per_sample(plain, one)
        unknown += [u for u in after.unknown if u not in unknown]
        row.flops = (before.total, after.total)
        if not after.total < before.total or not shares[-1] < 1:
            row.wrong.append(f"width {width}, depth {depth}: it costs no less")
    row.parameters, row.unknown = tuple(shares), tuple(unknown)
    if slicing.groups:
        generator = torch.Generator().manual_seed(0)
        if problem := slicing.check({g.name: _drawn(g, generator) for g in slicing.groups}):
            row.wrong.append(f"channels drawn: {problem}")


def _criterion(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy against class 0, for a class per row, token, query or pixel."""
    classes_first = output.ndim == 4
    scores = output if output.ndim == 2 or classes_first else output.flatten(0, -2)
    zeros = torch.zeros(scores.shape[:1] + scores.shape[2:], dtype=torch.long)
    return F.cross_entropy(scores, zeros)


def _has_logits(output: Any) -> bool:
    try:
        logits(output)
    except TypeError:
        return False
    return True


def _train_model(row: ModelRow, name: str, slicing: Slicing) -> None:
    """SortedNet: saved and loaded alike; a step of training, with activation checkpointing where it is offered."""
    (model, x), (again, _) = FAMILIES[name](), FAMILIES[name]()
    batch = ({k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in x.items()}, torch.zeros(4, dtype=torch.long))
    axes: dict[str, Any] = {
        "width": (0.5, 1.0) if slicing.groups else (1.0,),
        "depth": (0.5, 1.0) if slicing.stacks else (1.0,),
    }
    torch.manual_seed(0)
    with _quiet():
        net = pliant.elastic.SortedNet(model, x, **axes, accumulate=2, criterion=_criterion)
        net.finish([batch])
    net.eval()
    checkpointed = bool(getattr(again, "supports_gradient_checkpointing", False))
    if checkpointed:
        again.activation_checkpointing_enable()  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        pliant.save(net, Path(folder) / "net")
        loaded: Any = pliant.load(Path(folder) / "net", model=again, example=x, criterion=_criterion)
    loaded.eval()
    for point in net.points():
        with torch.no_grad():
            out = net.use(point)(**x)
            if not _same(out, loaded.use(point)(**x)):
                row.wrong.append(f"{point}: loaded, it computes something else")
            with _quiet():
                plain = net.extract(point)
            if not _same(out, call(plain, x)):
                row.wrong.append(f"{point}: the extracted network computes something else")
    losses, gradients = [], []
    single = _has_logits(out)
    for each in (net, loaded):
        each.train()
        torch.manual_seed(1)
        with _quiet():
            if single:
                loss = each.loss(batch)
            else:  # of several tensors nobody can know which is meant: a loop of one's own
                loss = next(iter(predictions(each.use({"width": 0.5, "depth": 0.5})(**x)).values())).square().mean()
            loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in each.model.named_parameters() if p.grad is not None})
    row.trained = "yes" if single else "in a loop of your own: its output holds several tensors"
    row.trained += ", checkpointed too" if checkpointed else ""
    if not torch.isfinite(torch.tensor(losses)).all() or not gradients[0]:
        row.wrong.append(f"loss: {losses[0]} in a step of training")
    first, second = gradients
    alike = first.keys() == second.keys() and all(
        torch.allclose(first[n], second[n], rtol=1e-3, atol=1e-5) for n in first
    )
    if abs(losses[0] - losses[1]) > 1e-5 or not alike:
        row.wrong.append("with activation checkpointing loss or gradients are others")


# -- the page ---------------------------------------------------------------------------------------------------------

# Why channels stay whole of which the library names no layer, because none makes them.
_UNNAMED = "states and outputs of recurrent layers keep their width"
_STATUS = {
    "through": ("cut", "cut, the same"),
    "both": ("cut", "cut"),
    "enters": ("cut", "whole"),
    "leaves": ("whole", "cut"),
    "whole": ("whole", "whole"),
    "refused": ("refused", "refused"),
}


def _cells(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def layer_line(row: LayerRow) -> str:
    """A row of the first table."""
    enters, leaves = _STATUS[row.status]
    if row.name.partition(",")[0] in ("Embedding", "EmbeddingBag"):
        enters = "indices"
    reason = row.reason
    if not reason and issubclass(getattr(nn, row.name.partition(",")[0]), nn.RNNBase | nn.RNNCellBase):
        reason = _UNNAMED
    if row.inside:
        leaves += f"; {row.inside} more inside"
    kind, comma, variant = row.name.partition(",")
    return _cells(f"`{kind}`{comma}{variant}", enters, leaves, row.flops, reason)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def model_line(row: ModelRow) -> str:
    """A row of the second table."""
    if row.refused:
        return _cells(row.name, f"`{row.model}`", "refused", *[""] * 7, row.refused)
    stacks = ", ".join(f"`{n}` {k}" for n, k in _merged(row.stacks).items()) or "none"
    whole = "; ".join(f"{_some(names)}: {why}" for why, names in row.whole.items())
    full, half = row.flops
    flops = f"{_percent(half / full)} of {full / 1e6:.2f} M"
    flops += f" (unknown: {', '.join(row.unknown)})" if row.unknown else ""
    points = ("width", "depth", "both")
    lost = [p for p, fine in zip(points, row.rebuilt, strict=False) if not fine]
    rebuilt = "yes" if not lost else "no" if len(lost) == 3 else f"not at {', '.join(lost)}"
    return _cells(row.name, f"`{row.model}`", str(row.groups), stacks, *map(_percent, row.parameters), flops,
                  row.trained, rebuilt, whole)  # fmt: skip


def _merged(stacks: Mapping[str, int]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for name, count in stacks.items():
        found.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(str(count))
    return {name: " + ".join(counts) for name, counts in found.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"`{n}`" for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def page(layer_rows: Sequence[LayerRow], model_rows: Sequence[ModelRow]) -> str:
    """The page around the two tables."""
    import transformers

    text = (Path(__file__).parent / "accepts.template.md").read_text()
    lost = [f"`{n}`" for n in classes() if is_loss(n)]
    others = [_cells(f"`{n}`", what) for n, what in OTHERS.items()]
    parts = {
        "versions": f"PyTorch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}",
        "layers": "\n".join(layer_line(r) for r in layer_rows),
        "models": "\n".join(model_line(r) for r in model_rows),
        "losses": ", ".join(lost),
        "others": "\n".join(others),
    }
    for name, part in parts.items():
        text = text.replace(f"{{{{{name}}}}}", part)
    return text


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="a layer, a family, or a pattern of names; writes nothing")
    parser.add_argument("--check", action="store_true", help="exit 1 if the committed page differs; writes nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    jobs: list[tuple[str, bool]] = [(n, True) for n in layers()] + [(n, False) for n in FAMILIES]
    if options.only:
        pattern = options.only.lower()
        jobs = [j for j in jobs if fnmatch.fnmatch(j[0].lower(), pattern) or j[0].lower().startswith(f"{pattern},")]
        if not jobs:
            parser.error(f"--only: no layer or family is named {options.only!r}")
    layer_rows: list[LayerRow] = []
    model_rows: list[ModelRow] = []
    wrong = []
    start, spent, weight = time.monotonic(), 0, sum(1 if is_layer else 10 for _, is_layer in jobs)
    for name, is_layer in jobs:
        row: LayerRow | ModelRow
        if is_layer:
            row = try_layer(name)
            layer_rows.append(row)
        else:
            row = try_model(name)
            model_rows.append(row)
        wrong += [f"{name}: {w}" for w in row.wrong]
        spent += 1 if is_layer else 10
        left = (time.monotonic() - start) * (weight - spent) / spent
        print(
            f"[{spent * 100 // weight:3} %, {left:4.0f} s left] {name}{': WRONG' if row.wrong else ''}", file=sys.stderr
        )
    if options.only:
        print("\n".join([*map(layer_line, layer_rows), *map(model_line, model_rows)]))
    if wrong:
        print("wrong:", *wrong, sep="\n  ")
        return 1
    if options.only:
        return 0
    text = page(layer_rows, model_rows)
    if options.check:
        same = PAGE.exists() and PAGE.read_text() == text
        print(f"{PAGE.name} is {'up to date' if same else 'not what would be written: run scripts/accepts.py'}")
        return 0 if same else 1
    _write(PAGE, text)
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
