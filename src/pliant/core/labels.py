"""Labels: numbers that stand for channels, in tensors of the shape of those that they accompany (see ``channels``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Ids = NDArray[np.int64]
CONSTANT, WHOLE = 0, 1
LARGEST_BARE = 1 << 22  # elements of a bare parameter that are followed one by one
LARGEST_CONSTANT = 1 << 18
# What modules of attention call their number of heads.
HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads", "n_heads", "n_head", "nhead", "heads")
PER_HEAD = (
    "head_dim",
    "head_size",
    "attention_head_size",
    "key_value_proj_dim",
    "d_kv",
    "scaling",
)  # and the width of one


def is_linear_1d(module: nn.Module | None) -> bool:
    """Whether this is the ``Conv1D`` of transformers: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def like(x: Tensor) -> Tensor:
    """Room for labels that lies in memory as ``x`` does, so that the same views can be taken of both."""
    return torch.empty_like(x, dtype=torch.float64, device="cpu")


def as_ids(labels: Tensor) -> Ids:
    return labels.numpy().astype(np.int64)


def distinct(labels: Tensor | Ids) -> Ids:
    """The labels of channels in it, each once."""
    found = np.unique(labels if isinstance(labels, np.ndarray) else as_ids(labels))
    return found[found > WHOLE]


def extremes(labels: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Largest and smallest label along ``dims``, constants left out; both 0 where there are only constants."""
    top = labels.amax(list(dims), keepdim=True)
    low = torch.where(labels > 0, labels, math.inf).amin(list(dims), keepdim=True)
    return top, torch.minimum(low, top)


def varies(labels: Tensor, dim: int) -> bool:
    """Whether different channels lie along ``dim``."""
    if not labels.ndim or labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    top, low = extremes(labels, [dim])
    return bool((top > low).any())


def is_spread(labels: Tensor, dim: int) -> bool:
    """Whether a tensor is repeated along ``dim``."""
    return labels.shape[dim] > 1 and labels.stride(dim) == 0


def argument(func: Any, args: Any, kwargs: Any, name: str, default: Any) -> Any:
    """An argument of an operation by name."""
    if name in kwargs:
        return kwargs[name]
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name and place < len(args):
            return args[place]
        if argument.name == name and argument.has_default_value():
            return argument.default_value
    return default
