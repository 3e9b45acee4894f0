"""Real data, a baseline model and a metric, one file per task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pliant.core.objective import Criterion, Metric


@dataclass(frozen=True)
class Task:
    """What ``pliant compare`` needs to know: data in three parts, a model for a seed, and an example input.

    ``criterion``, ``metric`` and ``lower_is_better`` are those of ``fit``'s networks and of ``measure``; None: cross
    entropy and accuracy, for targets that are classes.
    """

    name: str
    title: str
    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any]
    example: Any
    model: Callable[[int], nn.Module]
    criterion: Criterion | None = None
    metric: Metric | None = None
    lower_is_better: bool | None = None


def load(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    from pliant.tasks import images

    data = images.load(name)
    train, validation, test = data.loaders()
    return Task(
        name=name,
        title=data.title,
        train=train,
        validation=validation,
        test=test,
        example=data.example,
        model=lambda seed: images.baseline(data, seed),
    )
