"""Stacks of blocks: lists of modules that run one behind the other, so that the last ones can be left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pliant.core.inputs import Input, call, evaluating, first_tensor, removing, tensors_in


def find_stacks(model: nn.Module, example: Input) -> dict[str, int]:
    """Names and lengths of the block lists that may be shortened.

    These are the ``ModuleList``s and ``Sequential``s of two or more modules of one class that run once each in order,
    every one on what became of the output of the one before (branches side by side are no stack), and of which all but
    the first keep the shape of what they are given. Of nested ones the outermost.
    """
    candidates = {
        name: list(module)
        for name, module in model.named_modules()
        if name  # the whole model is no part of itself
        and isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
        and any(True for _ in module[0].parameters())
    }
    blocks = {id(child): child for children in candidates.values() for child in children}
    ancestry = _Ancestry()
    runs: list[tuple[int, frozenset[int], tuple[int, ...] | None, tuple[int, ...] | None]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [*args, *kwargs.values()]
        before = frozenset().union(*(ancestry.of(t) for t in tensors_in(given)))
        for tensor in tensors_in(output):
            ancestry.add(tensor, before | ancestry.of(tensor) | {id(module)})
        runs.append((id(module), before, _shape_of(given), _shape_of(output)))

    handles = [child.register_forward_hook(note, with_kwargs=True) for child in blocks.values()]
    with removing(handles), evaluating(model), torch.no_grad(), ancestry:
        call(model, example)
    stacks = {}
    for name, children in candidates.items():
        ids = [id(child) for child in children]
        mine = [r for r in runs if r[0] in set(ids)]
        in_order = [r[0] for r in mine] == ids
        behind = in_order and all(ids[i] in mine[i + 1][1] for i in range(len(ids) - 1))
        if behind and all(before is not None and before == after for _, _, before, after in mine[1:]):
            stacks[name] = len(children)
    return {name: n for name, n in stacks.items() if not any(name.startswith(f"{other}.") for other in stacks)}


class _Ancestry(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """For each tensor, the blocks whose outputs it was made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: Any = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> frozenset[int]:
        found: frozenset[int] = self.known.get(tensor, frozenset())
        return found

    def add(self, tensor: Tensor, blocks: frozenset[int]) -> None:
        if blocks:
            self.known[tensor] = blocks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = frozenset().union(*(self.of(t) for t in tensors_in((args, kwargs))))
        for tensor in tensors_in(out):
            self.add(tensor, made)
        return out


def _shape_of(value: Any) -> tuple[int, ...] | None:
    try:
        return tuple(first_tensor(value).shape)
    except TypeError:
        return None
