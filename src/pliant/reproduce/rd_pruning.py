"""RD-Pruning against uniform, ERK, global magnitude and LAMP: the same networks, masks of each, equal fine-tuning.

(a) one shot at 90 % and 95 %, before and after fine-tuning; (b) one shot at 98 %, where the additive model is under
stress; (c) iterative, 40 % of what is left in each of 9 rounds, to 98.99 %: the paper's setting. The opponents run
through the very same class (``allocation=``), so phases, optimiser and data order are theirs too.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.frontier import accuracy
from pliant.sparsity.rd_pruning import DENSE, RDPruning, rounds
from pliant.tasks import images

TRAIN, TEST, BATCH, RATE = 4_000, 1_000, 64, 1e-3
DENSE_EPOCHS, TUNE_EPOCHS, ROUND_EPOCHS = 6, 3, 1
ONE_SHOT = (0.9, 0.95, 0.98)
CALIBRATION = 128
OPPONENTS = ("lamp", "global", "erk", "uniform")

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def _cnn() -> nn.Module:
    """Three convolutions, two linear layers, 215,952 prunable weights: (B, 1, 28, 28) -> (B, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 1, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _batches(data: Data, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = data[:2]
    rng = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=rng)
        for start in range(0, len(x), BATCH):
            rows = order[start : start + BATCH]
            yield x[rows], y[rows]


def _dense(data: Data, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _cnn()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for x, y in _batches(data, DENSE_EPOCHS, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def _tune(net: RDPruning, data: Data, epochs: int, seed: int) -> None:
    """``epochs`` of masked Adam in every phase, as ``fit`` would run them."""
    epochs *= len(net.sparsity)
    steps = epochs * -(-len(data[0]) // BATCH)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    net.train()
    for step, batch in enumerate(_batches(data, epochs, 1_000 + seed)):
        net.schedule(step / steps)
        optimizer.zero_grad()
        net.loss(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    net.schedule(1.0)
    net.eval()


@torch.no_grad()
def _accuracy(net: RDPruning, sparsity: float, data: Data) -> float:
    return accuracy(net.use({"sparsity": sparsity})(data[2]), data[3])


@torch.no_grad()
def _distortion(net: RDPruning, sparsity: float, data: Data) -> float:
    y = net.use(DENSE)(data[2])
    return float((net.use({"sparsity": sparsity})(data[2]) - y).square().mean())


def _one_shot(model: nn.Module, data: Data, seed: int, method: str, **options: Any) -> list[dict[str, Any]]:
    arguments: dict[str, Any] = {"sparsity": ONE_SHOT, "points": "geometric", "calibration": data[0][:CALIBRATION]}
    net = RDPruning(copy.deepcopy(model), data[0][:2], mode="oneshot", **(arguments | options)).eval()
    net.prune()
    rows: list[dict[str, Any]] = []
    for s in net.sparsity:
        plan = net.plans[net._known({"sparsity": s})]
        row: dict[str, Any] = {"setting": "one shot", "method": method, "sparsity": s}
        row |= {"before": _accuracy(net, s, data)}
        row |= {"distortion": _distortion(net, s, data), "most_pruned_layer": max(plan.per_layer.values())}
        rows.append(row | {"measured_over_predicted": net.verify(plan).ratio})
    _tune(net, data, TUNE_EPOCHS, seed)
    for row in rows:
        row["after"] = _accuracy(net, row["sparsity"], data)
    return rows


def _iterative(model: nn.Module, data: Data, seed: int, method: str) -> list[dict[str, Any]]:
    net = RDPruning(
        copy.deepcopy(model),
        data[0][:2],
        sparsity=rounds(0.4, 0.985),
        points="geometric",
        calibration=data[0][:CALIBRATION],
        allocation=method,  # type: ignore[arg-type]
    )
    _tune(net, data, ROUND_EPOCHS, seed)
    return [
        {"setting": "iterative", "method": method, "sparsity": s, "after": _accuracy(net, s, data)}
        for s in net.sparsity
    ]


def run(seeds: int = 3, progress: Callable[[str], None] = print, task_name: str = "fashion-mnist") -> dict[str, Any]:
    """The experiment, on one core in three minutes or so: claim, table, checks and verdict.

    ``task_name="mnist"`` repeats it on the digits that the specification used, where they are at hand.
    """
    task = images.load(task_name)
    (x, y), (test_x, test_y) = task.train.tensors, task.test.tensors
    data = (x[:TRAIN], y[:TRAIN], test_x[:TEST], test_y[:TEST])
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        model = _dense(data, seed)
        with torch.no_grad():
            dense = accuracy(model(data[2]), data[3])
        found.append({"setting": "dense", "method": "none", "sparsity": 0.0, "after": dense})
        progress(f"seed {seed}: dense {dense:.3f}")
        for method in ("rd", *OPPONENTS):
            found += _one_shot(model, data, seed, method, allocation=method)
            progress(f"seed {seed}: one shot {method}: {_shown(found[-len(ONE_SHOT) :])}")
        found += _one_shot(model, data, seed, "rd, noise inputs", calibration="noise")
        found += _one_shot(
            model, data, seed, "rd, reference grid", points=100, max_layer_sparsity=1.0, sparsity=ONE_SHOT[-1:]
        )
        progress(f"seed {seed}: one shot rd on noise, and on the reference grid: {_shown(found[-4:])}")
        for method in ("rd", "lamp", "global", "erk", "uniform"):
            found += _iterative(model, data, seed, method)
            progress(f"seed {seed}: iterative {method}: {_shown(found[-3:])}")
    table = _table(found)
    checks = _checks(table)
    main = [c["holds"] for c in checks if c["statement"].startswith("iterative")]
    verdict = "holds" if all(c["holds"] for c in checks) else "partly" if any(main) else "does not hold"
    return {
        "claim": "Choosing how much each layer loses by measured output distortion and dynamic programming keeps more "
        "accuracy than LAMP, global magnitude, ERK and uniform pruning at the same sparsity and fine-tuning, most of "
        "all at high sparsity in the iterative setting.",
        "source_figure": "the paper's iterative results: ResNet-32 on CIFAR-10 at 95.5 %, up to +1.0 point over the "
        "best of LAMP, global, uniform and ERK",
        "baselines": [
            f"{name}: the same trained networks, phases, batches and optimiser"
            for name in ("LAMP", "global magnitude", "ERK", "uniform")
        ],
        "table": table,
        "checks": checks,
        "verdict": verdict,
        "notes": [
            f"Data: {task.title}, of it the first {TRAIN} training and {TEST} test images. The embedded Fashion-MNIST "
            "is the default because it runs anywhere, offline; the specification's thresholds are from MNIST digits "
            "and are kept as they are.",
            "Verdict by a rule written before the run: 'holds' if every check does, else 'partly' if at least one of "
            "the two iterative checks (the paper's setting) does, else 'does not hold'.",
            f"Network: 5 layers, 215,952 prunable weights. Sparsity counts Conv and Linear weights only. Adam {RATE}, "
            f"batch {BATCH}; epochs: {DENSE_EPOCHS} dense, {TUNE_EPOCHS} for each one-shot sparsity, "
            f"{ROUND_EPOCHS} for each round.",
            f"Curves: {CALIBRATION} training images, 35 points (18 linear steps, 16 geometric ones), at most 99.9 % of "
            "a layer; smaller than the specification's 101 points on 256 images in (a).",
            "'rd, reference grid' is 101 linear points with 100 % of a layer allowed, as the reference code has it.",
            "One optimiser serves all phases of a training, as in fit; the same for every method.",
        ],
    }


def _shown(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{r['sparsity']:.2%} {r['after']:.3f}" for r in rows)


def _table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each setting, method and sparsity: mean and standard deviation over the seeds."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["setting"], row["method"], row["sparsity"]), []).append(row)
    table = []
    for (setting, method, sparsity), rows in groups.items():
        out: dict[str, Any] = {"setting": setting, "method": method, "sparsity": sparsity, "seeds": len(rows)}
        for name in ("before", "after", "distortion", "measured_over_predicted", "most_pruned_layer"):
            values = [r[name] for r in rows if name in r and r[name] == r[name]]  # NaN: no prediction was made
            if values:
                out[name] = statistics.fmean(values)
                out[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
        table.append(out)
    return table


def _checks(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def value(setting: str, method: str, sparsity: float, name: str = "after") -> float:
        (row,) = [r for r in table if (r["setting"], r["method"], r["sparsity"]) == (setting, method, sparsity)]
        return float(row[name])

    checks: list[dict[str, Any]] = []

    def check(statement: str, holds: bool, measured: str) -> None:
        checks.append({"statement": statement, "holds": holds, "measured": measured})

    for opponent, margin in (("uniform", 0.3), ("erk", 0.1)):
        gain = value("one shot", "rd", 0.95, "before") - value("one shot", opponent, 0.95, "before")
        check(f"one shot 95 %, before fine-tuning: rd >= {opponent} + {margin}", gain >= margin, f"{gain:+.3f}")
    for s in (0.9, 0.95):
        for opponent in ("lamp", "global"):
            gain = value("one shot", "rd", s) - value("one shot", opponent, s)
            check(f"one shot {s:.0%}, fine-tuned: rd >= {opponent} - 0.01", gain >= -0.01, f"{gain:+.3f}")
        gap = value("one shot", "rd, noise inputs", s) - value("one shot", "rd", s)
        check(f"one shot {s:.0%}, fine-tuned: noise curves within 0.01 of data curves", abs(gap) <= 0.01, f"{gap:+.3f}")
    ratio = value("one shot", "rd", 0.9, "measured_over_predicted")
    check("one shot 90 %: joint distortion within a factor 2 of the sum", 0.5 <= ratio <= 2.0, f"ratio {ratio:.2f}")
    last = rounds(0.4, 0.985)[-1]
    for opponent, margin in (("lamp", 0.02), ("global", 0.1)):
        gain = value("iterative", "rd", last) - value("iterative", opponent, last)
        check(f"iterative {last:.2%}: rd >= {opponent} + {margin}", gain >= margin, f"{gain:+.3f}")
    return checks
