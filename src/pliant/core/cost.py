"""What a network costs, measured on what really ran.

*FLOPs* are counted by dispatch while the network runs: the matrix products, the convolutions and what is made of them
(attention, recurrent layers, fused kernels) that were executed, compaction included, **2 per multiply-add**;
elementwise work is not counted, as is the custom. ``core/flops.py`` holds the formulas; those that a user registered by
``torch.utils.flop_counter.register_flop_formula`` count as well. An operator that neither knows is named, in a warning
and in the result. *Latency* is a ratio against a reference, the two timed in turn in one run, because seconds measured
at different moments of a busy machine cannot be compared.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pliant.core.flops import Product, formula_of, is_free
from pliant.core.inputs import Input, call, evaluating, rows_of, tensors_in

# An unknown operator on tensors of at most this many numbers in all is not worth a warning.
SMALL = 1024


@dataclass(frozen=True)
class Flops:
    """FLOPs of one run: ``total`` executed, and ``nonzero`` those that multiply a weight that is not zero.

    ``unknown`` names the operators on more than 1024 numbers for which no formula is known: they count 0 in both sums.
    """

    total: int
    nonzero: int
    unknown: tuple[str, ...] = ()


def _density(weight: Tensor) -> float:
    """Share of the numbers of a weight that are not zero; 1 where that cannot be seen."""
    if weight.device.type == "meta" or weight.layout is not torch.strided or isinstance(weight, FakeTensor):
        return 1.0
    if weight.is_quantized:
        weight = weight.dequantize()
    elif weight.is_floating_point() and weight.element_size() == 1:
        weight = weight.float()
    return torch.count_nonzero(weight).item() / max(weight.numel(), 1)


@cache
def _composite(operator: Any) -> tuple[bool, bool]:
    """Whether an operator is made of others, and whether it has a kernel of its own for nested tensors."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = operator.name()
    return has(name, "CompositeImplicitAutograd"), has(name, "NestedTensorCPU")


@cache
def _dispatches(kind: type[Tensor]) -> bool:
    """Whether a subclass of Tensor runs operators in its own way."""
    own: bool = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not issubclass(kind, FakeTensor)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator as it is, and adds up the products that it stands for."""

    supports_higher_order_operators = True

    def __init__(self, nonzero: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weighs = nonzero
        self.total = self.nonzero = 0.0
        self.unknown: dict[str, None] = {}  # in the order in which they ran

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        if any(_dispatches(t) for t in types):
            return NotImplemented  # a tensor subclass does it in its own way, by operators that come here again
        formula = formula_of(func)
        if formula is None and is_free(func):
            return func(*args, **kwargs)
        composite, nested = _composite(func)
        if composite and not (nested and any(t.is_nested for t in tensors_in(args))):
            with self:  # in inference mode such operators come whole; their own kernel, so that the numbers stay
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self._add(formula(*args, **kwargs, result=out))
        elif func._overloadpacket in flop_registry:
            self._add([(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out), None)])
        elif sum(t.numel() for t in tensors_in((*args, *kwargs.values()))) > SMALL:
            self.unknown[func._schema.name] = None
        return out

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Operators that take functions: by their formula (flex_attention), or by what the functions run (cond)."""
        if func in flop_registry:
            out = func(*args, **kwargs)
            self._add([(flop_registry[func](*args, **kwargs, out_val=out), None)])
            return out
        if not any(callable(a) for a in args):
            self.unknown[func.name()] = None
        return func(*[self._watched(a) if callable(a) else a for a in args], **kwargs)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its operators counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run

    def _add(self, products: list[Product]) -> None:
        for flops, weight in products:
            self.total += flops
            if self.weighs and flops:
                self.nonzero += flops if weight is None else flops * _density(weight)


def count_flops(function: Callable[[], Any], *, nonzero: bool = True, backward: bool = False) -> Flops:
    """FLOPs that ``function()`` executes.

    Compiled modules run uncompiled meanwhile. A kernel that is launched past PyTorch's dispatcher cannot be seen.

    Args:
        function: what to run.
        nonzero: False takes all weights for non-zero, and is faster.
        backward: whether ``function`` computes gradients, a step of training for example; otherwise it cannot.

    Warns:
        UserWarning: operators of which no formula is known ran on more than 1024 numbers; they count 0.
    """
    counter = _Counter(nonzero)
    with _uncompiled(), counter, torch.set_grad_enabled(backward):
        function()
    unknown = tuple(counter.unknown)
    if unknown:
        warnings.warn(
            f"count_flops: no formula is known for {', '.join(unknown)}, so they count 0; give one by "
            "torch.utils.flop_counter.register_flop_formula",
            UserWarning,
            stacklevel=2,
        )
    total = round(counter.total)
    return Flops(total, round(counter.nonzero) if nonzero else total, unknown)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """torch.compile stands aside inside the block; without its machinery loaded nothing is compiled."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def flops_per_sample(model: nn.Module, x: Input) -> Flops:
    """FLOPs of ``model`` in evaluation mode on ``x``, divided by its number of rows.

    For an input-dependent network this is the mean over the samples of ``x``.
    """
    with evaluating(model):
        counted = count_flops(lambda: call(model, x))
    rows = rows_of(x)
    return Flops(round(counted.total / rows), round(counted.nonzero / rows), counted.unknown)


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
