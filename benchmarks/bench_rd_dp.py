"""The dynamic programme of RD-Pruning at the size of ResNet-50: time against layers, budget and plain loops.

Curves are drawn at random (rising, with noise), since only their number matters for the time. The plain form is the
recursion as it is written on paper, three nested loops in Python over the very same table, run in full; both must give
the same choice. Single runs of a busy machine differ, so each time is the least of several.

    python benchmarks/bench_rd_dp.py
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pliant.sparsity.rd_pruning import allocate, menu

RESULT = Path(__file__).parent / "results" / "rd_dp.json"
SPARSITY, POINTS = 0.8, 100

Problem = tuple[list[list[float]], list[list[int]], int]


def resnet50() -> list[int]:
    """Sizes of its 53 convolutions and its linear layer: 25.5 million weights."""
    sizes = [3 * 64 * 49]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [channels * width, width * width * 9, width * 4 * width]
            if not block:
                sizes.append(channels * 4 * width)
            channels = 4 * width
    return [*sizes, 2048 * 1000]


def problem(sizes: list[int], seed: int = 0) -> Problem:
    """Curves, costs and a target of 80 % zeros."""
    rng = np.random.default_rng(seed)
    curves, costs = [], []
    for size in sizes:
        zeros = menu(size, POINTS)
        share = np.array(zeros) / size
        curve = rng.uniform(0.1, 10.0) * share ** rng.uniform(1.5, 6.0) * rng.uniform(0.8, 1.2, len(zeros))
        curves.append(curve.tolist())
        costs.append(zeros)
    return curves, costs, math.ceil(SPARSITY * sum(sizes))


def loops(curves: list[list[float]], costs: list[list[int]], target: int, quantum: int) -> list[int]:
    """The recursion as written: for every layer, for every state, for every option."""
    budget = math.ceil(target / quantum)
    best = [0.0] + [math.inf] * budget
    table = []
    for curve, cost in zip(curves, costs, strict=True):
        kap = [c // quantum for c in cost]
        now, choice = [], []
        for s in range(budget + 1):
            least, chosen = math.inf, 0
            for j, k in enumerate(kap):
                found = best[s - k if s > k else 0] + curve[j]
                if found < least:
                    least, chosen = found, j
            now.append(least)
            choice.append(chosen)
        best = now
        table.append(choice)
    s, answer = budget, []
    for choice, cost in zip(reversed(table), reversed(costs), strict=True):
        answer.append(choice[s])
        s = max(0, s - cost[choice[s]] // quantum)
    return answer[::-1]


def least_seconds(function: Callable[[], Any], repeats: int = 7) -> float:
    """The least of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def measured(tasks: list[tuple[Problem, int]], repeats: int = 9) -> list[dict[str, float]]:
    """The least time of each, taken in turn so that a busy moment does not fall on one of them alone."""
    times = [math.inf] * len(tasks)
    for _ in range(repeats):
        for i, (task, q) in enumerate(tasks):
            times[i] = min(times[i], least_seconds(partial(allocate, *task, quantum=q), 1))
    return [
        {"layers": len(task[0]), "columns": math.ceil(task[2] / q) + 1, "seconds": t}
        for (task, q), t in zip(tasks, times, strict=True)
    ]


def slope(rows: list[dict[str, float]], name: str) -> float:
    """Exponent of the time as a power of ``name``: 1 is linear, 2 quadratic."""
    x, y = np.log([r[name] for r in rows]), np.log([r["seconds"] for r in rows])
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    """Measure, print, and write the result beside the script."""
    sizes = resnet50()
    curves, costs, target = problem(sizes)
    quantum = math.ceil(sum(sizes) / 20_000)
    fast = least_seconds(lambda: allocate(curves, costs, target, quantum=quantum))
    start = time.perf_counter()
    plain = loops(curves, costs, target, quantum)
    slow = time.perf_counter() - start
    same = plain == allocate(curves, costs, target, quantum=quantum)
    assert same, "the vectorised programme and the plain loops disagree"

    tasks: list[tuple[Problem, int]] = []
    for times in (1, 2, 4, 8):
        tasks.append((problem(sizes * times), quantum * times))  # the same number of columns
    layers = measured(tasks)
    wholes = [5_000, 10_000, 20_000, 40_000, 80_000]
    budgets = measured([((curves, costs, target), math.ceil(sum(sizes) / columns)) for columns in wholes])
    result = {
        "what": "dynamic programme of RD-Pruning, ResNet-50 sizes, 80 % sparsity, 101 options a layer or so",
        "layers": len(sizes),
        "weights": sum(sizes),
        "quantum": quantum,
        "seconds": fast,
        "plain_loops_seconds": slow,
        "plain_loops": "all three loops in full, in Python, over the same table; one run",
        "speedup": slow / fast,
        "same_choice": same,
        "at_least_10_times_faster": slow / fast >= 10.0,
        "by_layers": layers,
        "exponent_in_layers": slope(layers, "layers"),  # below 1 where fixed costs still count
        "by_budget": budgets,
        "exponent_in_budget": slope(budgets, "columns"),
        "no_more_than_linear": max(slope(layers, "layers"), slope(budgets, "columns")) <= 1.15,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    RESULT.parent.mkdir(exist_ok=True)
    fresh = RESULT.with_suffix(".tmp")
    fresh.write_text(text)
    os.replace(fresh, RESULT)


if __name__ == "__main__":
    main()
