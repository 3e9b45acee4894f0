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
import functools
import itertools
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence, Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.inputs import IGNORED, Input, predictions, rows_of, tensors_in

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
    last = last and output.ndim == 3  # maps (B, C, H, W) of transformers have their classes first
    if first and behind and output.ndim > 2 and not last:
        raise ValueError(
            f"target: with an output of shape {tuple(output.shape)} and targets of shape {tuple(target.shape)} the "
            "classes may lie along dimension 1 or along the last one; say which by functions of (output, target) for "
            "criterion= and metric= (and of the two outputs for distill=), for instance "
            "criterion=lambda y, t: torch.nn.functional.cross_entropy(y.flatten(0, 1), t.flatten())"
        )
    return output.ndim - 1 if behind and (last or not first) else 1 if first else None


def _classes(output: Any, target: Any, last: bool = False) -> tuple[int, Tensor] | None:
    """The dimension of the classes and the targets in the form of ``_by_class``; None where that is not certain.

    Targets become int64 class indices, or stay the class probabilities that they are.
    """
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or not output.is_floating_point():
        return None
    if target.is_floating_point():
        whole = output.shape == target.shape and output.ndim > 1 and output.shape[1] > 1
        if not whole or not bool((target >= 0).all()) or not bool(((target.float().sum(1) - 1).abs() < 1e-3).all()):
            return None
        return 1, target.to(output.dtype)
    if target.dtype is torch.bool or target.is_complex():
        return None
    if target.ndim == output.ndim and target.ndim > 1 and target.shape[1] == 1 and output.shape[1] > 1:
        target = target.squeeze(1)  # (B, 1) labels
    axis = class_axis(output, target, last=last)
    if axis is None or output.shape[axis] < 2:
        return None
    return axis, target.flatten().long() if _behind(output, axis) else target.long()


def _behind(output: Tensor, axis: int) -> bool:
    return output.ndim > 2 and axis == output.ndim - 1


def _by_class(output: Tensor, axis: int) -> Tensor:
    """Logits (B, C, ...) as they are, and (B, ..., C) as (N, C)."""
    return output.flatten(0, -2) if _behind(output, axis) else output


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

    Args:
        output: logits.
        target: classes or class probabilities.
        label_smoothing: as in ``torch.nn.CrossEntropyLoss``.
        last: classes are along the last dimension wherever the shapes allow that.

    Raises:
        ValueError: the pair does not certainly mean classification, or a label is outside ``0..C-1`` (which is
            checked where the check costs no synchronisation, on CPU).
    """
    found = _classes(output, target, last)
    if found is None:
        raise ValueError(f"{_question(output, target)} give criterion=")
    axis, labels = found
    logits = _by_class(output, axis)
    try:
        value = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, ignore_index=IGNORED)
    except IndexError:
        kept = labels[labels != IGNORED]
        raise ValueError(
            f"target: labels run from {int(kept.min())} to {int(kept.max())}, but the model has {logits.shape[1]} "
            f"outputs; labels must be in 0..{logits.shape[1] - 1}"
        ) from None
    if labels.is_floating_point():
        return value
    return torch.where((labels != IGNORED).any(), value, value.new_zeros(()))  # no look at the values: it would wait


def _shape_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, Sized) else type(value).__name__


def _question(output: Any, target: Any) -> str:
    """Why a default is not certain."""
    hint = ""
    if isinstance(output, Tensor) and isinstance(target, Tensor):
        if target.is_floating_point() or target.dtype is torch.bool or target.shape == output.shape:
            hint = " (torch.nn.MSELoss() for regression, torch.nn.BCEWithLogitsLoss() for several labels)"
        elif output.ndim > 1 and output.shape[1] == 1:
            hint = " (torch.nn.BCEWithLogitsLoss() for one logit of two classes)"
    return f"target: what {_shape_of(target)} means beside an output {_shape_of(output)} cannot be known{hint};"


def distillation(
    student: Any, teacher: Any, target: Any, how: Distillation | None = None, criterion: Criterion | None = None
) -> Tensor:
    """How far a student's output is from a teacher's, which gets no gradient.

    Args:
        student: what the student returned.
        teacher: what the teacher returned.
        target: the targets of the batch: they tell whether outputs are classes (KL divergence without its constant,
            that is, cross entropy against the teacher's probabilities, where the target is not -100) or real numbers
            (mean squared difference). For outputs of several tensors it is looked up under the same names.
        how: the user's own ``how(student, teacher)``.
        criterion: what the targets are compared with the output by: probabilities of classes can be told from other
            numbers that sum to 1 only where it is known.

    Raises:
        ValueError: what the outputs mean is not certain.
    """
    if how is not None:
        return how(prediction(student, how), _detached(prediction(teacher, how)))
    ours, theirs = prediction(student), prediction(teacher)
    if not isinstance(ours, Tensor):
        parts, wanted = predictions(ours), predictions(theirs)
        named: Mapping[str, Any] = {}
        if isinstance(target, Mapping):
            named = target
        elif isinstance(target, tuple | list) and isinstance(ours, tuple | list) and len(target) == len(parts):
            named = dict(zip(parts, target, strict=True))
        if not set(parts) <= set(named):
            raise ValueError(
                f"distill: the model returns {', '.join(parts)}, and how these are compared cannot be known from the "
                "targets; give distill= a function of (student's output, teacher's output)"
            )
        return torch.stack([distillation(parts[k], wanted[k], named[k], None, criterion) for k in parts]).sum()
    theirs = theirs.detach()
    found = None if isinstance(criterion, _REAL) else _classes(ours, target, _classes_last(student))
    question = _question(ours, target).removeprefix("target: ")
    if found is not None and found[1].is_floating_point() and not _knows_classes(criterion):
        found, question = None, f"whether targets that sum to 1 are classes cannot be known from {criterion!r};"
    elif found is None and isinstance(target, Tensor) and target.is_floating_point() and target.numel() == ours.numel():
        return F.mse_loss(ours, theirs)
    if found is None:
        raise ValueError(f"distill: {question} give distill= a function of (student's output, teacher's output)")
    axis, labels = found
    logits, wish = _by_class(ours, axis), _by_class(theirs, axis).softmax(1)
    if labels.is_floating_point():
        return F.cross_entropy(logits, wish)
    counted = labels != IGNORED
    share = counted.numel() / counted.sum().clamp(min=1)
    return F.cross_entropy(logits, wish * counted.unsqueeze(1)) * share


def hard_distillation(student: Any, teacher: Any, target: Any, criterion: Criterion | None = None) -> Tensor:
    """How wrong a student's output is where the teacher's answers are the truth.

    Classes (which ``target`` tells, and which of them count): cross entropy against the teacher's own ones. Real
    numbers: ``criterion`` against the teacher's.

    Raises:
        ValueError: what the outputs mean is not certain.
    """
    ours, theirs = prediction(student), prediction(teacher)
    found = None if isinstance(criterion, _REAL) else _classes(ours, target, _classes_last(student))
    if found is not None:
        axis, labels = found
        answers = _by_class(theirs.detach(), axis).argmax(1)
        if not labels.is_floating_point():
            answers = answers.masked_fill(labels == IGNORED, IGNORED)
        return cross_entropy(_by_class(ours, axis), answers)
    if criterion is None:
        raise ValueError(f"{_question(ours, target)} give criterion=")
    if isinstance(target, Tensor) and isinstance(theirs, Tensor) and target.numel() == theirs.numel():
        theirs = theirs.reshape(target.shape)
    return loss(student, _detached(theirs), criterion)


# Criteria of real numbers, or of a yes or no for each output, whatever the targets sum to.
_REAL = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)


def _knows_classes(criterion: Criterion | None) -> bool:
    return criterion is None or criterion is F.cross_entropy or isinstance(criterion, nn.CrossEntropyLoss)


def _detached(value: Any) -> Any:
    """The same output without gradients."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = _detached(item)
        return made
    if isinstance(value, Mapping):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_detached(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if hasattr(value, "__dict__"):
        made = copy.copy(value)
        for name, item in vars(value).items():
            object.__setattr__(made, name, _detached(item))
        return made
    return value


def target_outputs(output: Any, target: Any) -> Tensor:
    """The outputs at the target classes, added up; -100 does not count.

    Raises:
        ValueError: the pair does not certainly mean classification by indices.
    """
    found = prediction(output)
    pair = _classes(found, target, _classes_last(output))
    if pair is None or pair[1].is_floating_point():
        raise ValueError(f"{_question(found, target)} one class for each answer is needed here")
    axis, labels = pair
    counted = labels != IGNORED
    chosen = _by_class(found, axis).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return (chosen * counted).sum()


def row_classes(target: Any, rows: int, method: str) -> Tensor:
    """``target`` as (B,) int64 classes, for methods that can serve nothing else.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(target, Tensor) and target.shape in ((rows,), (rows, 1)):
        whole = not target.is_floating_point() and not target.is_complex() and target.dtype is not torch.bool
        if whole and (target.device.type != "cpu" or not bool((target == IGNORED).any())):
            return target.reshape(rows).long()
    ignored = isinstance(target, Tensor) and bool((target == IGNORED).any())
    raise ValueError(
        f"target: {method} needs one class for each of the {rows} rows, whole numbers ({rows},) or ({rows}, 1); got "
        f"{_shape_of(target)}{' with -100 (not counted) in it' if ignored else ''}"
    )


# -- quality ----------------------------------------------------------------------------------------------------------


class Accuracy:
    """The share of right classes, batch by batch; -100 does not count.

    Args:
        last: classes are along the last dimension wherever the shapes allow that, as in language models.
    """

    higher_is_better = True
    whole_output = True

    def __init__(self, last: bool = False) -> None:
        self.last = last
        self.right = self.counted = 0

    def update(self, output: Any, target: Any) -> None:
        """Take logits (B, C, ...) or (B, T, C), or what carries them, and classes (or class probabilities)."""
        found = prediction(output)
        pair = _classes(found, target, self.last or _classes_last(output))
        if pair is None:
            raise ValueError(f"{_question(found, target)} give metric=")
        axis, labels = pair
        labels = labels.argmax(1) if labels.is_floating_point() else labels
        counted = labels != IGNORED
        self.right += int(((_by_class(found, axis).argmax(1) == labels) & counted).sum())
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
        name: of the metric.
        lower_is_better: what the metric says of itself by ``higher_is_better``, None where it says nothing.
    """

    def __init__(self, metric: Metric | None = None) -> None:
        if metric is None or metric is accuracy or metric is next_token_accuracy:
            metric = Accuracy(last=metric is next_token_accuracy)
        self.name = "accuracy" if isinstance(metric, Accuracy) else _name_of(metric)
        self._kept: Any
        if isinstance(metric, type):
            raise TypeError(f"metric: got the class {metric.__name__}; give one that is made, {metric.__name__}(...)")
        if isinstance(metric, Accumulating):
            self._kept = copy.deepcopy(metric)
            self._kept.reset()
        elif callable(metric):
            self._kept = _Mean(metric)
        else:
            raise TypeError(f"metric: expected a function or a metric that accumulates, got {type(metric).__name__}")
        self._taker = metric
        better = getattr(metric, "higher_is_better", None)
        if better is None and (isinstance(metric, nn.modules.loss._Loss) or self.name.endswith(("_loss", "entropy"))):
            better = False
        self.lower_is_better: bool | None = None if better is None else not better

    def update(self, output: Any, target: Any, rows: int) -> None:
        """Take the output of a batch of ``rows``."""
        found = prediction(output, self._taker)
        if isinstance(found, Tensor) and found.dtype in (torch.float16, torch.bfloat16):
            found = found.float()
        if isinstance(self._kept, _Mean):
            self._kept.update(found, target, rows)
            return
        if isinstance(self._kept, nn.Module) and isinstance(found, Tensor):
            self._kept = self._kept.to(found.device)
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
            raise ValueError(f"metric: {self.name} gives several numbers, one is needed")
        return float(value)


def _name_of(metric: Any) -> str:
    while isinstance(metric, functools.partial):
        metric = metric.func
    return str(getattr(metric, "__name__", type(metric).__name__))


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
    if isinstance(target, Tensor) and target.ndim and len(target) % rows:  # a multiple: places of all rows in one list
        raise ValueError(f"batch: {rows} inputs and {len(target)} targets")
    if isinstance(target, list) and len(target) != rows and not any(True for _ in tensors_in(target)):
        raise ValueError(f"batch: {rows} inputs and a list of {len(target)} targets")
    return rows


def part(x: Any, target: Any, parts: int, least: int = 1) -> list[tuple[Any, Any]]:
    """A batch in at most ``parts`` parts of neighbouring samples, as equal as can be, of ``least`` rows or more.

    Lists (and tuples) with one entry for each sample, such as the boxes of an image, are parted between samples,
    never inside one.

    Raises:
        ValueError: the batch has no rows, or how its targets belong to them is not certain.
    """
    rows = count_rows(x, target)
    parts = max(1, min(parts, rows // least))
    if parts == 1:
        return [(x, target)]
    if isinstance(target, Tensor) and target.ndim and len(target) != rows:
        raise ValueError(f"batch: {rows} inputs and {len(target)} targets cannot be parted together")
    x = tuple(x) if isinstance(x, list) else x  # positional arguments, never one entry for each sample
    bounds = [rows * i // parts for i in range(parts + 1)]
    return [(_slice(x, a, b, rows, True), _slice(target, a, b, rows)) for a, b in itertools.pairwise(bounds)]


def _slice(value: Any, first: int, end: int, rows: int, arguments: bool = False) -> Any:
    """Rows of a value; the entries of a tuple of ``arguments`` are over all samples."""
    if isinstance(value, Tensor):
        return value[first:end] if value.ndim and len(value) == rows else value
    if isinstance(value, Mapping):
        return {k: _slice(v, first, end, rows) for k, v in value.items()}
    if not isinstance(value, tuple | list):
        return value
    if not arguments and _one_for_each(value, rows):
        return value[first:end]
    items = [_slice(v, first, end, rows) for v in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _one_for_each(value: Sequence[Any], rows: int) -> bool:
    """Whether a list or tuple holds one entry for each sample, and not several tensors over all samples."""
    if len(value) != rows or hasattr(value, "_fields"):
        return False
    if not all(_over_all(v, rows) for v in value):
        return not all(isinstance(v, Tensor) and v.ndim == 0 for v in value if not _over_all(v, rows))
    if all(isinstance(v, Mapping) for v in value):
        return True  # what belongs to each sample, also where each has as many entries as there are samples
    alike = all(isinstance(v, Tensor) and v.ndim > 1 and v.shape == value[0].shape for v in value)
    if alike and isinstance(value, list):  # loaders make lists of tuples, but tensors of one shape are rarely that
        raise ValueError(
            f"target: a list of {rows} tensors of {rows} rows may hold one for each sample or {rows} targets over all; "
            "give a list of mappings for the former, or a tuple for the latter"
        )
    return False


def _over_all(value: Any, rows: int) -> bool:
    tensors = list(tensors_in(value))
    return bool(tensors) and all(t.ndim and len(t) == rows for t in tensors)
