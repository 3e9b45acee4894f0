"""What a network costs, measured on what really ran.

*FLOPs* are counted by dispatch while the network runs (``torch.utils.flop_counter``): the matrix products and
convolutions that were executed, compaction included, **2 per multiply-add**; elementwise work is not counted, as is
the custom. *Latency* is a ratio against a reference, the two timed in turn in one run, because seconds measured at
different moments of a busy machine cannot be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from pliant.core.inputs import Input, call, evaluating, rows_of

_aten = torch.ops.aten
# Where the weight stands among the arguments of each operation that takes one. In ``mm`` and ``addmm`` it is the second
# factor, as nn.Linear calls them; products of two activations (bmm, attention) have no weight and count in full.
_WEIGHT = {
    _aten.convolution: 1,
    _aten._convolution: 1,
    _aten.mm: 1,
    _aten.addmm: 2,
    _aten.linear: 1,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one run: ``total`` executed, and ``nonzero`` those that multiply a weight that is not zero."""

    total: int
    nonzero: int


_SPARSE = (torch.sparse_csr, torch.sparse_bsr, torch.sparse_csc, torch.sparse_bsc)


def _stored_share(func_packet: Any, args: Any) -> float | None:
    """What a product with a sparsely stored factor computes, as a share of the dense product; None for a dense one."""
    if func_packet not in (_aten.mm, _aten.addmm):
        return None
    for factor in args[-2:]:
        if factor.layout in _SPARSE:
            return float(factor.values().numel() / max(factor.numel(), 1))
    return None


class _Counter(FlopCounterMode):
    """The dispatch counter of PyTorch, with a second sum weighted by the density of each operation's weight."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.nonzero = 0.0
        self.saved = 0.0  # by products with a sparsely stored factor, which PyTorch counts as dense ones

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        before = self.get_total_flops()
        result = super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]
        flops: float = self.get_total_flops() - before
        where = _WEIGHT.get(func_packet)
        share = _stored_share(func_packet, args)
        if share is not None:
            self.saved += flops * (1 - share)
            flops *= share
        elif flops and where is not None:
            weight = args[where]
            flops *= torch.count_nonzero(weight).item() / max(weight.numel(), 1)
        self.nonzero += flops
        return result


class _Quick(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The same sum without a look into operations that have no formula, which is what takes the time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            share = _stored_share(func._overloadpacket, args)
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self.total += flops if share is None else round(flops * share)
        return out


def count_flops(function: Callable[[], Any], *, nonzero: bool = True) -> Flops:
    """FLOPs that ``function()`` executes.

    ``nonzero=False`` takes all weights for non-zero, and is many times faster.
    """
    counter = _Counter() if nonzero else _Quick()
    with counter, torch.no_grad():
        function()
    if isinstance(counter, _Quick):
        return Flops(counter.total, counter.total)
    return Flops(counter.get_total_flops() - round(counter.saved), round(counter.nonzero))


def flops_per_sample(model: nn.Module, x: Input) -> Flops:
    """FLOPs of ``model`` in evaluation mode on ``x``, divided by its number of rows.

    For an input-dependent network this is the mean over the samples of ``x``.
    """
    with evaluating(model):
        counted = count_flops(lambda: call(model, x))
    rows = rows_of(x)
    return Flops(round(counted.total / rows), round(counted.nonzero / rows))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as they are stored (sparse layouts by what they hold), tied ones once."""
    seen: dict[int, Tensor] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(_stored(t) for t in seen.values())


def _stored(t: Tensor) -> int:
    if t.layout is torch.sparse_csr:
        return sum(part.numel() * part.element_size() for part in (t.values(), t.crow_indices(), t.col_indices()))
    return t.numel() * t.element_size()


@dataclass(frozen=True)
class Ratio:
    """Time of a candidate divided by the time of a reference: the median, the quartiles, and the seconds."""

    median: float
    low: float
    high: float
    seconds: float


def time_ratio(
    candidate: Callable[[], Any],
    reference: Callable[[], Any],
    *,
    repeats: int = 15,
    warmup: int = 2,
) -> Ratio:
    """Time ``candidate`` and ``reference`` in turn, ``repeats`` times each, and return the ratio of neighbours.

    The order within a pair alternates, so that neither always runs on the caches that the other left.

    Raises:
        ValueError: ``repeats`` is below 3.
    """
    if repeats < 3:
        raise ValueError(f"repeats: {repeats} runs give no spread; at least 3")
    for _ in range(warmup):
        candidate()
        reference()
    ratios, seconds = [], []
    for i in range(repeats):
        pair = (candidate, reference) if i % 2 == 0 else (reference, candidate)
        first, second = _seconds(pair[0]), _seconds(pair[1])
        c, r = (first, second) if i % 2 == 0 else (second, first)
        ratios.append(c / r)
        seconds.append(c)
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, statistics.median(seconds))


def _seconds(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def latency_ratio(candidate: nn.Module, reference: nn.Module, x: Input, *, repeats: int = 15) -> Ratio:
    """``time_ratio`` of two networks in evaluation mode on the same input."""
    with evaluating(candidate, reference), torch.inference_mode():
        return time_ratio(lambda: call(candidate, x), lambda: call(reference, x), repeats=repeats)
