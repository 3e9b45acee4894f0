"""One thread for each test process: pytest-xdist already uses every core."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("ci", derandomize=True)  # a commit passes or fails, whatever the day
if os.environ.get("CI"):
    settings.load_profile("ci")

_BESIDE = Path(__file__).parents[2] / "shared" / "data"
if "PLIANT_DATA" not in os.environ and _BESIDE.exists():
    os.environ["PLIANT_DATA"] = str(_BESIDE)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
