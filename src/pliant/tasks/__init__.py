"""Real data, a baseline model and a metric, one file per task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Task:
    """What ``pliant compare`` needs to know: data in three parts, a model for a seed, and an example input."""

    name: str
    title: str
    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any]
    example: Any
    model: Callable[[int], nn.Module]


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
