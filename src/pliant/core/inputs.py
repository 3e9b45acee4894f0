"""What goes into a network and what comes out: one place that knows how batches, inputs and outputs look.

An *input* is a tensor, a tuple of tensors (positional arguments) or a mapping of tensors (keyword arguments, as
``transformers`` models take them). A *batch* is ``(input, target)``, or a mapping with a ``"labels"`` entry.
An *output* is a tensor, or an object or mapping that carries ``logits``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

Input = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Batch = tuple[Any, Any] | Sequence[Any] | Mapping[str, Any]
Criterion = Callable[[Tensor, Any], Tensor]
IGNORED = -100  # a target that does not count, as in transformers


def call(model: nn.Module, x: Input) -> Any:
    """``model(x)`` for a tensor, ``model(*x)`` for a tuple, ``model(**x)`` for a mapping."""
    if isinstance(x, Mapping):
        return model(**x)
    if isinstance(x, tuple | list):
        return model(*x)
    return model(x)


def packed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input that ``call`` took apart: what a network's ``forward(*args, **kwargs)`` was given, as one value."""
    return dict(kwargs) if kwargs else args[0] if len(args) == 1 else args


def logits(output: Any) -> Tensor:
    """The prediction tensor of a model's output.

    Raises:
        TypeError: the output is neither a tensor nor carries a tensor named ``logits``.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise TypeError(
        f"model: its forward returned {type(output).__name__}{keys}; pliant needs a tensor, or an object or "
        "mapping that has a tensor named 'logits'. Wrap the model in a small nn.Module that returns that tensor."
    )


def split_batch(batch: Batch) -> tuple[Any, Any]:
    """``(input, target)`` of a batch.

    Raises:
        TypeError: the batch has another form.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(
        f"batch: expected (input, target) or a mapping with 'labels', got {type(batch).__name__}"
        + (f" of {len(batch)} items" if isinstance(batch, tuple | list) else "")
    )


def rows_of(x: Input) -> int:
    """Number of samples in an input: the length of its first tensor."""
    return len(first_tensor(x))


def first_tensor(x: Input) -> Tensor:
    """The first tensor of an input.

    Raises:
        TypeError: there is none.
    """
    for item in x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple | list) else (x,):
        if isinstance(item, Tensor):
            return item
    raise TypeError(f"input: expected a tensor, a tuple or a mapping of tensors, got {type(x).__name__}")


def map_tensors(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` applied to every tensor of a nested structure of tuples, lists and mappings."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {k: map_tensors(v, function) for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):  # a named tuple is built from positional arguments
        return type(x)(*(map_tensors(v, function) for v in x))
    if isinstance(x, tuple | list):
        return type(x)(map_tensors(v, function) for v in x)
    return x


def take(x: Input, rows: Any) -> Any:
    """Rows (an index, a slice or a boolean mask) of an input."""
    return map_tensors(x, lambda t: t[rows])


def to_device(x: Any, device: torch.device) -> Any:
    """A nested structure with its tensors on ``device``."""
    return map_tensors(x, lambda t: t.to(device, non_blocking=True))


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer; CPU where it has none."""
    for tensor in [*module.parameters(), *module.buffers()]:
        return tensor.device
    return torch.device("cpu")


def inputs_of(data: Iterable[Any] | Input) -> Iterator[Input]:
    """The inputs in calibration data: a tensor or tuple or mapping of tensors, or an iterable of batches."""
    if isinstance(data, Tensor) or (isinstance(data, Mapping) and "labels" not in data):
        yield data
        return
    if isinstance(data, Mapping):
        yield split_batch(data)[0]
        return
    for batch in data:
        yield batch if isinstance(batch, Tensor) else split_batch(batch)[0]


def cross_entropy(output: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of ``output`` (B, C, ...) against class indices ``target`` (B, ...), or class probabilities.

    Raises:
        ValueError: a label is outside ``0..C-1`` (checked where the check costs no synchronisation, on CPU).
    """
    try:
        return F.cross_entropy(output, target, label_smoothing=label_smoothing)
    except IndexError:
        low, high = int(target.min()), int(target.max())
        classes = output.shape[1] if output.ndim > 1 else output.shape[0]
        raise ValueError(
            f"target: labels run from {low} to {high}, but the model has {classes} outputs; "
            f"labels must be in 0..{classes - 1}"
        ) from None


def next_token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, T, V) against tokens (B, T), -100 ignored; in float32 at least."""
    y = output if output.dtype is torch.float64 else output.float()
    return F.cross_entropy(y.flatten(0, -2), target.flatten(), ignore_index=IGNORED)


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks for the length of the block: they are taken off at its end, exception or not."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule has its own former training flag again."""
    flags = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for m, training in flags:
            m.training = training


def check_example(model: nn.Module, example: Input) -> Tensor:
    """Run ``model`` on ``example`` twice and return its prediction; the constructors' common door.

    Raises:
        TypeError: the model is no module, or its output carries no prediction tensor.
        ValueError: the model does not accept the example, gives NaN, or is not deterministic in evaluation mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    shape = tuple(first_tensor(example).shape)
    if 0 in shape:
        raise ValueError(f"example: shape {shape} has no elements; give a batch of one or more real inputs")
    with evaluating(model), torch.no_grad():
        try:
            first = logits(call(model, example))
        except (RuntimeError, ValueError, IndexError) as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"example: the model does not accept an input of shape {shape}: {line}") from error
        second = logits(call(model, example))
    if not (first < float("inf")).all():  # NaN is not; minus infinity is how networks mask logits
        raise ValueError("model: its output on the example contains NaN or infinity")
    if not torch.equal(first, second):
        raise ValueError(
            f"model: its forward is not deterministic in evaluation mode (two runs on the example differ by up to "
            f"{(first - second).abs().max().item():.3g}); remove the randomness or make it depend on self.training"
        )
    return first
