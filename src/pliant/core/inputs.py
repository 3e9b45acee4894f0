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

from pliant.core import check

Input = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Batch = tuple[Any, Any] | Sequence[Any] | Mapping[str, Any]
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


# What networks return beside their predictions.
_BESIDE = frozenset(
    {"loss", "past_key_values", "hidden_states", "attentions", "cross_attentions", "router_logits", "mems"}
    | {"encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions", "auxiliary_outputs"}
    | {"decoder_hidden_states", "decoder_attentions", "vision_model_output", "text_model_output"}
    | {"intermediate_hidden_states", "extract_features", "aux_loss", "z_loss"}
)


def predictions(output: Any) -> dict[str, Tensor]:
    """The prediction tensors of a model's output, by their place in it: every tensor, whatever holds them.

    Of mappings that carry ``logits`` the states and caches beside them do not count; of others neither do those with
    the names that transformers gives to states, caches and losses.

    Raises:
        TypeError: there is none.
    """
    found = dict(_predictions(output, ""))
    if not found:
        raise TypeError(f"model: its forward returned {type(output).__name__} without any tensor in it")
    return found


def _predictions(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    # No function inside a function: one that calls itself is a cycle, which would keep the graph of every step alive.
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            state = key in _BESIDE or (key == "last_hidden_state" and "logits" in value)
            if not state and (isinstance(item, Tensor) or "logits" not in value):
                yield from _predictions(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _predictions(item, f"{place}[{i}]")
    elif isinstance(getattr(value, "logits", None), Tensor):
        yield f"{place}.logits" if place else "logits", value.logits


def logits(output: Any) -> Tensor:
    """The prediction tensor of a model's output.

    Raises:
        TypeError: the output is no tensor, carries none named ``logits``, and holds several tensors or none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    tensors = predictions(output)
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise TypeError(
        f"model: its forward returned {type(output).__name__} with the tensors {', '.join(tensors)}; which of them is "
        "the prediction cannot be known. Give criterion= and metric= that take the whole output, or return one tensor"
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


def tensors_in(value: Any) -> Iterator[Any]:
    """Every tensor of a nested structure of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


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


def next_token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, T, V) against tokens (B, T), -100 ignored; in float32 at least."""
    y = output if output.dtype is torch.float64 else output.float()
    return F.cross_entropy(y.flatten(0, -2), target.flatten(), ignore_index=IGNORED)


@contextmanager
def step_by_step() -> Iterator[None]:
    """Within the block torch's transformer layers run operation by operation, without fused paths, nested tensors."""
    before = torch.backends.mha.get_fastpath_enabled()  # type: ignore[no-untyped-call]
    torch.backends.mha.set_fastpath_enabled(False)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)  # type: ignore[no-untyped-call]


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks for the length of the block: they are taken off at its end, exception or not.

    Torch's transformer layers run ``step_by_step`` meanwhile, for their fused paths pass by hooks or hand them nested
    tensors, which have no shape.
    """
    handles = list(handles)
    try:
        with step_by_step():
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


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


_EXAMPLES = "a tensor, or a tuple or a mapping of tensors: what the model's forward takes"


def _values(example: Any) -> Iterable[Any]:
    return example.values() if isinstance(example, Mapping) else example


def _is_input(value: Any) -> bool:
    """Whether a part of an example is a tensor, or a plain value beside the tensors."""
    return value is None or isinstance(value, Tensor | bool | int | float | str) or any(True for _ in tensors_in(value))


def check_example(model: nn.Module, example: Input) -> Tensor:
    """Run ``model`` on ``example`` twice and return its prediction; the constructors' common door.

    Raises:
        TypeError: the model is no module, or its output carries no prediction tensor.
        ValueError: the model does not accept the example, gives NaN, or is not deterministic in evaluation mode.
    """
    check.module("model", model)
    check.instance("example", example, Tensor, tuple, list, Mapping, allowed=_EXAMPLES)
    tensors = list(tensors_in(example))
    if not tensors or (not isinstance(example, Tensor) and not all(map(_is_input, _values(example)))):
        raise check.wrong("example", example, _EXAMPLES, TypeError)
    shape = tuple(tensors[0].shape)
    if not shape or 0 in shape:
        raise ValueError(f"example: shape {shape} has no rows; give a batch of one or more real inputs")
    with evaluating(model), torch.no_grad():
        try:
            output = call(model, example)
        except Exception as error:  # a model of the caller's own may raise anything
            line = first_line(error)
            raise ValueError(f"example: the model does not accept an input of shape {shape}: {line}") from error
        first = predictions(output)
        second = predictions(call(model, example))
    for name, a in first.items():
        b = second.get(name)
        if a.is_floating_point() and not (a < float("inf")).all():  # NaN is not; minus infinity masks logits
            raise ValueError("model: its output on the example contains NaN or infinity")
        if b is None or not torch.equal(a, b):
            by = f" by up to {(a - b).abs().max().item():.3g}" if b is not None and a.shape == b.shape else ""
            raise ValueError(
                f"model: its forward is not deterministic in evaluation mode (two runs on the example differ{by}); "
                "remove the randomness or make it depend on self.training"
            )
    return first["logits"] if "logits" in first else next(iter(first.values()))
