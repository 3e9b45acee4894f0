"""Each method's claim, measured here against baselines that were trained with equal care.

A module ``pliant.reproduce.<slug with underscores>`` has one function, ``run(seeds, progress) -> dict``; what surrounds
it (machine, versions, commit, time) is added here, and the evidence file is written by the code that ran.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VERDICTS = ("holds", "partly", "does not hold")


def reproduce(
    slug: str, *, seeds: int = 3, folder: str | Path | None = None, progress: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run the experiment of ``slug``; with ``folder`` write ``folder/<slug>.json`` as well.

    Raises:
        ValueError: the method is unknown or has no experiment, or ``seeds`` is below 1.
    """
    from pliant import __version__, catalog

    catalog.find(slug)
    if seeds < 1:
        raise ValueError(f"seeds: {seeds} is not a positive number")
    try:
        experiment = importlib.import_module(f"pliant.reproduce.{slug.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise ValueError(f"method: {slug!r} has no experiment yet") from error
    import torch

    start = time.perf_counter()
    found: dict[str, Any] = experiment.run(seeds=seeds, progress=progress)
    if found["verdict"] not in VERDICTS:
        raise ValueError(f"verdict: {found['verdict']!r} is not one of {', '.join(VERDICTS)}")
    evidence = {
        "method": slug,
        **found,
        "seeds": seeds,
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": _device()},
        "versions": {"pliant": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": _commit(),
    }
    if folder is not None:
        target = Path(folder) / f"{slug}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".part")
        temporary.write_text(json.dumps(evidence, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(target)
        if hasattr(experiment, "plot"):  # a figure of what the table cannot show
            experiment.plot(evidence, target.with_suffix(".png"))
    return evidence


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _commit() -> str:
    """The commit of the checkout that this package runs from; "unknown" outside of one."""
    try:
        here = Path(__file__).parent
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", here.parent], cwd=here, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    if commit.returncode:
        return "unknown"
    return commit.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")
