"""What a task is: how wrong an output is, how good, how alike two outputs are, and how a batch is parted.

Methods, ``fit`` and ``measure`` ask here and nowhere else. What a user gives (``criterion=``, ``metric=``, a function
for distillation) goes before everything; defaults are inferred only where they are certain, and a question is raised
as an error elsewhere:

    target                                   loss              quality    distillation between outputs
    whole numbers, one for each place where  cross entropy     accuracy   KL over the classes
      classes are predicted; -100 is ignored
    class probabilities (rows that sum to 1) cross entropy     accuracy   KL over the classes
    real numbers of the output's shape       criterion=        metric=    mean squared difference
    anything else                            criterion=        metric=    a function of (student, teacher)

Classes lie along dimension 1 (B, C, ...) or, as in language models, along the last one (B, T, C): the shapes tell
which, and where both fit, outputs of transformers models have theirs last and others have to be asked.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.inputs import IGNORED, Input, predictions, rows_of

Criterion = Callable[[Any, Any], Tensor]
Distillation = Callable[[Any, Any], Tensor]


@runtime_checkable
class Accumulating(Protocol):
    """A metric that takes batch by batch, as those of torchmetrics do."""

    def update(self, output: Any, target: Any) -> None:
        """Take a batch."""

    def compute(self) -> Any:
        """The value over all batches since the last ``reset``."""

    def reset(self) -> None:
        """Forget all batches."""


Metric = Accumulating | Callable[[Any, Any], Any]


# -- outputs ----------------------------------------------------------------------------------------------------------


def prediction(output: Any, taker: object = None) -> Any:
    """What a criterion or a metric is given: the one prediction tensor where there is one, else the whole output.

    A ``taker`` that has a true attribute ``whole_output`` is always given the output as the model returned it.
    """
    if isinstance(output, Tensor) or getattr(taker, "whole_output", False):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    tensors = predictions(output)
    return next(iter(tensors.values())) if len(tensors) == 1 else output


def _classes_last(output: Any) -> bool:
    """Whether an output says by its kind where its classes are: those of transformers carry ``logits`` (B, ..., C)."""
    return not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor)


def class_axis(output: Tensor, target: Tensor, *, last: bool = False) -> int | None:
    """The dimension of ``output`` that runs over classes when ``target`` holds one class for each other place.

    None where no dimension does.

    Raises:
        ValueError: two dimensions do.
    """
    if output.ndim != target.ndim + 1 or output.ndim < 2:
        return None
    first = output.shape[:1] + output.shape[2:] == target.shape
    behind = output.shape[:-1] == target.shape
    if first and behind and output.ndim > 2 and not last:
        raise ValueError(
            f"target: with an output of shape {tuple(output.shape)} and targets of shape {tuple(target.shape)} the "
            "classes may lie along dimension 1 or along the last one; say which by criterion= and metric=, for "
            "instance criterion=lambda y, t: torch.nn.functional.cross_entropy(y.flatten(0, 1), t.flatten())"
        )
    return output.ndim - 1 if behind and (last or not first) else 1 if first else None


def _as_classes(output: Tensor, target: Any, last: bool) -> tuple[Tensor, Tensor] | None:
    """(B, C, ...) logits and class indices (B, ...) or class probabilities; None where that is not certain."""
    if not isinstance(target, Tensor) or not output.is_floating_point():
        return None
    if target.is_floating_point():
        whole = output.shape == target.shape and output.ndim > 1 and output.shape[1] > 1
        if not whole or not bool((target >= 0).all()) or not bool(((target.sum(1) - 1).abs() < 1e-3).all()):
            return None
        return output, target.to(output.dtype)
    if target.dtype is torch.bool:
        return None
    if target.ndim == output.ndim and target.ndim > 1 and target.shape[1] == 1 and output.shape[1] > 1:
        target = target.squeeze(1)  # (B, 1) labels
    axis = class_axis(output, target, last=last)
    if axis is None or output.shape[axis] < 2:
        return None
    return output.movedim(axis, 1), target.long()


# -- losses -----------------------------------------------------------------------------------------------------------


def loss(output: Any, target: Any, criterion: Criterion | None = None, *, label_smoothing: float = 0.0) -> Tensor:
    """How wrong ``output`` is: ``criterion(prediction, target)``, or cross entropy where that is certain.

    Args:
        output: what the model returned.
        target: whatever belongs to it.
        criterion: takes the prediction tensor, or the whole output where there are several (see ``prediction``).
        label_smoothing: of the default.

    Raises:
        ValueError: no criterion was given and none is certain, or a label is outside the classes.
    """
    if criterion is not None:
        return criterion(prediction(output, criterion), target)
    return cross_entropy(prediction(output), target, label_smoothing, last=_classes_last(output))


def cross_entropy(output: Any, target: Any, label_smoothing: float = 0.0, *, last: bool = False) -> Tensor:
    """Mean cross entropy of logits (B, C, ...) or (B, T, C) against classes or class probabilities.

    Labels may be any whole numbers, (B,) or (B, 1); -100 does not count, and a batch of nothing else gives 0.

    Raises:
        ValueError: the pair does not certainly mean classification, or a label is outside ``0..C-1``.
    """
    found = _as_classes(output, target, last) if isinstance(output, Tensor) else None
    if found is None:
        raise ValueError(f"{_question(output, target)} give criterion=")
    logits, labels = found
    if not labels.is_floating_point() and bool((labels == IGNORED).all()):
        return logits.sum() * 0.0
    try:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, ignore_index=IGNORED)
    except IndexError:
        kept = labels[labels != IGNORED]
        raise ValueError(
            f"target: labels run from {int(kept.min())} to {int(kept.max())}, but the model has {logits.shape[1]} "
            f"outputs; labels must be in 0..{logits.shape[1] - 1}"
        ) from None


def _question(output: Any, target: Any) -> str:
    """Why a default is not certain."""

    def shape(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return (
            f"{type(value).__name__} of {len(value)}" if isinstance(value, Mapping | Sequence) else type(value).__name__
        )

    hint = ""
    if isinstance(output, Tensor) and isinstance(target, Tensor):
        if target.is_floating_point() or target.dtype is torch.bool or target.shape == output.shape:
            hint = " (torch.nn.MSELoss() for regression, torch.nn.BCEWithLogitsLoss() for several labels)"
        elif output.ndim > 1 and output.shape[1] == 1:
            hint = " (torch.nn.BCEWithLogitsLoss() for one logit of two classes)"
    return f"target: what {shape(target)} means beside an output {shape(output)} cannot be known{hint};"


def distillation(student: Any, teacher: Any, target: Any, how: Distillation | None = None) -> Tensor:
    """How far a student's output is from a teacher's, which gets no gradient.

    Args:
        student: what the student returned.
        teacher: what the teacher returned.
        target: the targets of the batch: they tell whether outputs are classes (KL divergence without its constant,
            that is, cross entropy against the teacher's probabilities, where the target is not -100) or real numbers
            (mean squared difference). For outputs of several tensors it is looked up under the same names.
        how: the user's own ``how(student, teacher)``.

    Raises:
        ValueError: what the outputs mean is not certain.
    """
    if how is not None:
        with torch.no_grad():
            frozen = _detached(teacher)
        return how(prediction(student, how), prediction(frozen, how))
    ours, theirs = prediction(student), prediction(teacher)
    if not isinstance(ours, Tensor):
        parts, wanted = predictions(ours), predictions(theirs)
        named = (
            target
            if isinstance(target, Mapping)
            else dict(zip(parts, target, strict=False))
            if isinstance(target, tuple | list) and len(target) == len(parts)
            else {}
        )
        if set(named) < set(parts):
            raise ValueError(
                f"distill: the model returns {', '.join(parts)}, and how these are compared cannot be known from the "
                "targets; give distill= a function of (student's output, teacher's output)"
            )
        return torch.stack([distillation(parts[k], wanted[k], named[k]) for k in parts]).sum()
    theirs = theirs.detach()
    found = _as_classes(ours, target, _classes_last(student))
    if found is not None:
        logits, labels = found
        axis = 1 if labels.is_floating_point() else class_axis_of(ours, logits)
        loss_of = F.cross_entropy(logits, theirs.movedim(axis, 1).softmax(1), reduction="none")
        counted = torch.ones_like(loss_of) if labels.is_floating_point() else (labels != IGNORED).to(loss_of)
        return (loss_of * counted).sum() / counted.sum().clamp(min=1)
    if isinstance(target, Tensor) and target.is_floating_point() and target.numel() == ours.numel():
        return F.mse_loss(ours, theirs)
    raise ValueError(
        f"distill: {_question(ours, target)[8:]} give distill= a function of (student's, teacher's output)"
    )


def class_axis_of(output: Tensor, moved: Tensor) -> int:
    """Which dimension of ``output`` was moved to place 1."""
    return 1 if moved.shape == output.shape and moved.stride() == output.stride() else output.ndim - 1


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = _detached(item)  # type: ignore[index]
        return made
    if isinstance(value, tuple | list):
        return type(value)(_detached(v) for v in value)
    return value


# -- quality ----------------------------------------------------------------------------------------------------------


class Accuracy:
    """The share of right classes, batch by batch; -100 does not count."""

    higher_is_better = True
    whole_output = True

    def __init__(self) -> None:
        self.right = self.counted = 0

    def update(self, output: Any, target: Any) -> None:
        """Take logits (B, C, ...) or (B, T, C), or what carries them, and classes (or class probabilities)."""
        found = prediction(output)
        pair = _as_classes(found, target, _classes_last(output)) if isinstance(found, Tensor) else None
        if pair is None:
            raise ValueError(f"{_question(found, target)} give metric=")
        logits, labels = pair
        labels = labels.argmax(1) if labels.is_floating_point() else labels
        counted = labels != IGNORED
        self.right += int(((logits.argmax(1) == labels) & counted).sum())
        self.counted += int(counted.sum())

    def compute(self) -> float:
        """Right ones of all that count."""
        return self.right / self.counted if self.counted else math.nan

    def reset(self) -> None:
        """Begin anew."""
        self.right = self.counted = 0


class _Mean:
    """A function of (output, target), averaged over batches by their rows."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function
        self.total, self.rows = 0.0, 0

    def update(self, output: Any, target: Any, rows: int) -> None:
        self.total += float(self.function(output, target)) * rows
        self.rows += rows


class Quality:
    """A metric at work: batches in, one number out, nothing kept in between.

    Args:
        metric: what accumulates (``update``, ``compute``, ``reset``, as in torchmetrics), or a function of
            (output, target), which is averaged over batches by their rows; accuracy by default. For what is no mean
            over rows (F1, AUC) give one that accumulates.

    Attributes:
        lower_is_better: what the metric says of itself by ``higher_is_better``, None where it says nothing.
    """

    def __init__(self, metric: Metric | None = None) -> None:
        metric = Accuracy() if metric is None or metric in (accuracy, next_token_accuracy) else metric
        self._kept: Any
        if isinstance(metric, Accumulating):
            self._kept = copy.deepcopy(metric)
            self._kept.reset()
        elif callable(metric):
            self._kept = _Mean(metric)
        else:
            raise TypeError(f"metric: expected a function or a metric that accumulates, got {type(metric).__name__}")
        self._taker = metric
        better = getattr(metric, "higher_is_better", None)
        self.lower_is_better: bool | None = None if better is None else not better

    def update(self, output: Any, target: Any, rows: int) -> None:
        """Take the output of a batch of ``rows``."""
        found = prediction(output, self._taker)
        if isinstance(found, Tensor) and found.is_floating_point():
            found = found.float()
        if isinstance(self._kept, _Mean):
            self._kept.update(found, target, rows)
            return
        if isinstance(self._kept, nn.Module) and isinstance(found, Tensor):
            self._kept.to(found.device)
        self._kept.update(found, target)

    def compute(self) -> float:
        """The value over all batches.

        Raises:
            ValueError: the metric gives several numbers.
        """
        if isinstance(self._kept, _Mean):
            return self._kept.total / max(self._kept.rows, 1)
        value = self._kept.compute()
        if (isinstance(value, Tensor) and value.numel() != 1) or isinstance(value, Mapping):
            raise ValueError(f"metric: {type(self._taker).__name__} gives several numbers, one is needed")
        return float(value)


def accuracy(output: Any, target: Any) -> float:
    """Share of right classes: logits (B, C, ...) or (B, T, C) against classes; -100 does not count."""
    counting = Accuracy()
    counting.update(output, target)
    return counting.compute()


def next_token_accuracy(output: Tensor, target: Tensor) -> float:
    """Share of tokens (B, T) whose logits (B, T, V) are largest at them; -100 does not count."""
    counted = target != IGNORED
    return (output.argmax(-1) == target)[counted].float().mean().item()


# -- batches ----------------------------------------------------------------------------------------------------------


def count_rows(x: Input, target: Any) -> int:
    """The number of samples in a batch.

    Raises:
        ValueError: there are none, or inputs and targets have different numbers of them.
    """
    rows = rows_of(x)
    if rows == 0:
        raise ValueError("batch: it has no rows")
    if isinstance(target, Tensor) and target.ndim and len(target) != rows:
        raise ValueError(f"batch: {rows} inputs and {len(target)} targets")
    if _is_per_sample(target, rows) is False and not any(isinstance(t, Tensor) for t in target):
        raise ValueError(f"batch: {rows} inputs and a list of {len(target)} targets")
    return rows


def _is_per_sample(value: Any, rows: int) -> bool | None:
    """Whether a list holds one entry for each sample, and not several tensors over all; None where it is no list."""
    if not isinstance(value, list):
        return None
    over_all = all(isinstance(v, Tensor) and v.ndim and len(v) == rows for v in value)
    if len(value) == rows and over_all and rows > 1 and any(v.ndim > 1 for v in value):
        raise ValueError(
            f"target: a list of {rows} tensors of {rows} rows may hold one for each sample or {rows} targets over all; "
            "give a tuple for the latter"
        )
    return len(value) == rows and not over_all


def part(x: Any, target: Any, parts: int, least: int = 1) -> list[tuple[Any, Any]]:
    """A batch in at most ``parts`` parts of neighbouring samples, as equal as can be, of ``least`` rows or more.

    Lists with one entry for each sample (boxes of an image) are parted between samples, never inside one.
    """
    rows = count_rows(x, target)
    parts = max(1, min(parts, rows // least))
    bounds = [rows * i // parts for i in range(parts + 1)]
    return [(_slice(x, a, b, rows), _slice(target, a, b, rows)) for a, b in itertools.pairwise(bounds)]


def _slice(value: Any, first: int, end: int, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[first:end] if value.ndim and len(value) == rows else value
    if isinstance(value, Mapping):
        return {k: _slice(v, first, end, rows) for k, v in value.items()}
    if _is_per_sample(value, rows):
        return value[first:end]
    if isinstance(value, tuple | list):
        return type(value)(_slice(v, first, end, rows) for v in value)
    return value
