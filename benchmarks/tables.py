"""Where the benchmarks write: one JSON file each, replaced in one step, with what they ran on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def write(name: str, what: str, **figures: Any) -> Path:
    """Write ``results/<name>.json``: what was measured, the figures, and the machine."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count(), "device": device}
    temporary = folder / f"{name}.part"
    temporary.write_text(json.dumps({"what": what, **figures, **machine}, indent=1) + "\n")
    target = folder / f"{name}.json"
    temporary.replace(target)
    return target
