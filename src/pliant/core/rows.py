"""Row compaction: the rows of a batch that are done leave it, so that what follows runs on fewer rows.

Any ``nn.Module`` can be run this way. A forward hook on an exit module hands its output (the first item, where it is a
tuple) to ``visit``, which says which rows leave and with what answer; the module's output is replaced by the rows that
stay, and later modules see the smaller batch. When no rows stay the forward pass is cut off there. The answers come
back in the order of the input. All state belongs to the one call: nothing is left on the model, exception or not.

    plan = ExitPlan(model, example)               # or names=("blocks.0", "blocks.2")
    answer = plan.run(model, x, visit)            # answer.output (B, ...), answer.exit (B,), len(plan) at the end

A place in a network is fit to be an exit when taking rows away there leaves the answers of the others as they were;
``ExitPlan`` tries that on the example rather than believing it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core import check
from pliant.core.inputs import Input, call, evaluating, first_tensor, logits, rows_of, step_by_step, take

Compact = str | float
# (exit number, hidden state of the rows present, their places in the input) -> (rows that leave (n,) bool, answers)
Visit = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class Answer(NamedTuple):
    """Answers (B, ...) in the order of the input, and the exit (B,) that each row took."""

    output: Tensor
    exit: Tensor


class _AllLeft(BaseException):
    """Ends a forward pass in which no row is left; not an Exception, so that no model swallows it."""


class ExitPlan:
    """Where rows can leave a network, and what else has to shrink with them.

    Args:
        model: the network; it is only looked at, and passed again to ``run``.
        example: an input that the model accepts.
        names: exit modules in the order of execution; the repeated blocks but the last one by default.

    Raises:
        ValueError: a name is unknown, out of order, not executed once, or rows cannot be taken away there.
    """

    def __init__(self, model: nn.Module, example: Input, names: Sequence[str] | None = None) -> None:
        modules = dict(model.named_modules())
        if names is not None:
            for name in names:
                if name not in modules or not name:
                    known = ", ".join(n for n in modules if n and n.count(".") < 3)
                    raise ValueError(f"exits: the model has no module {name!r}; it has: {known[:600]}")
        with evaluating(model), torch.no_grad():
            order = _execution(model, example)
            if names is None:
                self.names = self._default(model, example, order)
                return
            self.names = tuple(names)
            if not self.names:
                raise ValueError("exits: the list is empty; name at least one module")
            for name in self.names:
                if order.count(name) != 1:
                    raise ValueError(
                        f"exits: {name!r} runs {order.count(name)} times in a forward pass; an exit runs exactly once"
                    )
            by_time = sorted(self.names, key=order.index)
            if list(self.names) != by_time or len(set(by_time)) < len(by_time):
                raise ValueError(f"exits: {list(self.names)} is not the order of execution, which is {by_time}")
            self._prepare(model, example, order)
            self._try(model, example)

    def __len__(self) -> int:
        return len(self.names)

    def run(
        self,
        model: nn.Module,
        x: Input,
        visit: Visit,
        compact: Compact = "always",
        only: Sequence[int] | None = None,
    ) -> Answer:
        """Run ``model`` on ``x``, asking ``visit`` at every exit (at those in ``only``, where given) who leaves.

        Args:
            compact: "always" takes every row that leaves out at once; "never" computes on and keeps the answer that
                each row left with; a share in (0, 1) takes them out when at least that share of the batch is done.
                The answers are the same.
        """
        check_compact(compact)
        state = _Pass(x, len(self), visit, compact)

        def after(k: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                # Another thread may run the same model; its rows are not ours.
                return state.visited(k, output, self._batched_out[k]) if get_ident() == state.owner else None

            return hook

        def before(keys: frozenset[int | str]) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return state.shrunk(keys, args, kwargs) if get_ident() == state.owner else None

            return hook

        with ExitStack() as stack:
            if only != ():
                stack.enter_context(step_by_step())
            for k in range(len(self)) if only is None else only:
                handle = model.get_submodule(self.names[k]).register_forward_hook(after(k))
                stack.callback(handle.remove)
            for name, keys in self._batched_in.items():
                pre = model.get_submodule(name).register_forward_pre_hook(before(keys), with_kwargs=True)
                stack.callback(pre.remove)
            try:
                state.finish(logits(call(model, x)))
            except _AllLeft as end:
                if end.args[0] is not state:
                    raise
        return state.answer()

    def collect(self, model: nn.Module, x: Input, function: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
        """``function`` of the hidden state at every exit, and the prediction at the end, of one whole forward pass."""
        found: dict[int, Tensor] = {}
        owner = get_ident()

        def after(k: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if get_ident() == owner:
                    found[k] = function(hidden_of(output))

            return hook

        with ExitStack() as stack:
            stack.enter_context(step_by_step())
            for k, name in enumerate(self.names):
                stack.callback(model.get_submodule(name).register_forward_hook(after(k)).remove)
            prediction = logits(call(model, x))
        return [found[k] for k in range(len(self))], prediction

    def _default(self, model: nn.Module, example: Input, order: list[str]) -> tuple[str, ...]:
        """The largest chain of like blocks at which rows can leave, without its last block."""
        modules = dict(model.named_modules())
        groups: dict[type[nn.Module], list[str]] = {}
        for name in order:
            parent = modules[name.rpartition(".")[0]]
            if isinstance(parent, _CONTAINERS) and not isinstance(modules[name], _CONTAINERS):
                groups.setdefault(type(modules[name]), []).append(name)
        chains = [names for names in groups.values() if len(names) > 1 and len(set(names)) == len(names)]
        # Blocks before single layers, then the finer division: more exits.
        chains.sort(key=lambda names: (not any(modules[names[0]].children()), -len(names)))
        for names in chains:
            self.names = tuple(names[:-1])
            try:
                self._prepare(model, example, order)
                self._try(model, example)
            except ValueError:
                continue
            return self.names
        raise ValueError(
            "exits: the model has no repeated blocks (children of one class in nn.ModuleList or nn.Sequential, run "
            'one after the other) at which rows can leave; name the modules, for example exits=["layer1", "layer2"]'
        )

    def _prepare(self, model: nn.Module, example: Input, order: list[str]) -> None:
        """Find the tensors beside the hidden state (masks, ...) that carry rows: those that grow with the batch."""
        parents = {name.rpartition(".")[0] for name in self.names}
        first = order.index(self.names[0])
        later = {n for n in order[first + 1 :] if n.rpartition(".")[0] in parents or n in self.names}
        two, three = (_lengths(model, _resized(example, n), later | set(self.names)) for n in (2, 3))
        self._batched_in: dict[str, frozenset[int | str]] = {}
        for name in sorted(later):
            grown = frozenset(k for k, n in two[name][0].items() if n == 2 and three[name][0].get(k) == 3)
            if grown - {0}:  # argument 0 is the hidden state, already small
                self._batched_in[name] = grown
        self._batched_out: list[frozenset[int]] = [
            frozenset(k for k, n in two[name][1].items() if n == 2 and three[name][1].get(k) == 3)
            for name in self.names
        ]
        for name, batched in zip(self.names, self._batched_out, strict=True):
            if 0 not in batched:
                raise ValueError(
                    f"exits: the output of {name!r} has no hidden state with one row per sample (a tensor, or a tuple "
                    "whose first item is one)"
                )

    def _try(self, model: nn.Module, example: Input) -> None:
        """Let row k leave at exit k, and see that the others do not notice."""
        rows = len(self) + 2
        x = _varied(_resized(example, rows))
        plain = logits(call(model, x))

        def visit(k: int, hidden: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
            return present == k, plain.new_zeros(len(present), *plain.shape[1:])

        where = f"exits: rows cannot leave at {', '.join(self.names[:4])}{', ...' if len(self) > 4 else ''}: "
        try:
            answer = self.run(model, x, visit)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise ValueError(
                where + f"with fewer rows the rest of the model fails ({str(error).strip().splitlines()[0]}); "
                "perhaps it joins that output with something of the whole batch"
            ) from error
        stay = slice(len(self), None)
        if answer.output.shape != plain.shape or not torch.allclose(
            answer.output[stay], plain[stay], rtol=1e-3, atol=1e-4 * max(1.0, plain.abs().max().item())
        ):
            raise ValueError(where + "the predictions of the rows that stay change, so the model mixes its rows")


class _Pass:
    """One forward pass: the rows present, which of them still want an answer, and the answers so far."""

    def __init__(self, x: Input, depth: int, visit: Visit, compact: Compact) -> None:
        device = first_tensor(x).device
        self.total = rows_of(x)
        self.rows = torch.arange(self.total, device=device)
        self.wanting = torch.ones(self.total, dtype=torch.bool, device=device)
        self.exit = torch.full((self.total,), depth, device=device)
        self.output: Tensor | None = None
        self.visit, self.compact, self.owner = visit, compact, get_ident()

    def visited(self, k: int, output: Any, batched: frozenset[int]) -> Any:
        """The output that goes on, None for the same."""
        leave, answers = self.visit(k, hidden_of(output), self.rows)
        leave = leave & self.wanting
        if self.output is None:
            self.output = answers.new_zeros(self.total, *answers.shape[1:])
        if self.compact == "never":  # nothing is moved and nothing waited for
            self.output = torch.where(leave.view(-1, *[1] * (answers.ndim - 1)), answers, self.output)
            self.exit = torch.where(leave, k, self.exit)
            self.wanting = self.wanting & ~leave
            return None
        gone = leave.nonzero().squeeze(1)
        if not len(gone):
            return None
        self.output = self.output.index_copy(0, self.rows[gone], answers[gone])
        self.exit[self.rows[gone]] = k
        self.wanting = self.wanting & ~leave
        keep = self.wanting.nonzero().squeeze(1)
        if not len(keep):
            raise _AllLeft(self)
        if isinstance(self.compact, float) and 1 - len(keep) / len(self.rows) < self.compact:
            return None
        self.rows, self.wanting = self.rows[keep], self.wanting[keep]
        if isinstance(output, Tensor):
            return output[keep]
        items = [item[keep] if i in batched else item for i, item in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)

    def shrunk(self, keys: frozenset[int | str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of a later block, with the rows that are gone taken out of those that still have them all."""
        if len(self.rows) == self.total:
            return None

        def small(key: int | str, value: Any) -> Any:
            stale = key in keys and isinstance(value, Tensor) and len(value) == self.total
            return value[self.rows] if stale else value

        return tuple(small(i, a) for i, a in enumerate(args)), {k: small(k, v) for k, v in kwargs.items()}

    def finish(self, prediction: Tensor) -> None:
        """Take the answers of the rows that ran to the end."""
        if len(prediction) != len(self.rows):
            raise ValueError(f"model: {len(self.rows)} rows went in at the end and {len(prediction)} came out")
        if self.output is None:
            self.output = prediction
        elif self.compact == "never":
            wanting = self.wanting.view(-1, *[1] * (prediction.ndim - 1))
            self.output = torch.where(wanting, prediction.to(self.output.dtype), self.output)
        else:
            keep = self.wanting.nonzero().squeeze(1)
            self.output = self.output.index_copy(0, self.rows[keep], prediction[keep].to(self.output.dtype))

    def answer(self) -> Answer:
        """What was gathered."""
        assert self.output is not None
        return Answer(self.output, self.exit)


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output: the tensor itself, or the first item of a tuple or list.

    Raises:
        TypeError: there is none.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(f"exits: a block returned {type(output).__name__}; a tensor or a tuple that begins with one")
    return first


def check_compact(compact: Compact) -> Compact:
    """``compact``, if it is "always", "never" or a share in (0, 1); an error that names it otherwise."""
    if compact in ("always", "never"):
        return compact
    if isinstance(compact, float) and 0 < compact < 1:
        return compact
    kind = ValueError if isinstance(compact, str | int | float) else TypeError
    raise check.wrong("compact", compact, "'always', 'never' or a share between 0.0 and 1.0", kind)


def _execution(model: nn.Module, x: Input) -> list[str]:
    """Names of the modules in the order in which they finish, once for each call."""
    order: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(step_by_step())
        for name, module in model.named_modules():
            if name:
                hook = module.register_forward_hook(lambda m, a, o, name=name: order.append(name))
                stack.callback(hook.remove)
        call(model, x)
    return order


def _lengths(model: nn.Module, x: Input, names: set[str]) -> dict[str, tuple[dict[int | str, int], dict[int, int]]]:
    """First dimensions of the tensors that go into and come out of the named modules."""
    found: dict[str, tuple[dict[int | str, int], dict[int, int]]] = {}

    def size(value: Any) -> int:
        return value.shape[0] if isinstance(value, Tensor) and value.ndim else -1

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given: dict[int | str, int] = {i: size(a) for i, a in enumerate(args)}
            items = output if isinstance(output, tuple | list) else (output,)
            found[name] = (given | {k: size(v) for k, v in kwargs.items()}, {i: size(o) for i, o in enumerate(items)})

        return hook

    with ExitStack() as stack:
        stack.enter_context(step_by_step())
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        call(model, x)
    return found


def _resized(x: Input, rows: int) -> Any:
    """The example with ``rows`` rows, repeated where it has fewer."""
    return take(x, torch.arange(rows, device=first_tensor(x).device) % rows_of(x))


def _varied(x: Any) -> Any:
    """The same with rows that differ, so that a model which confuses them is caught."""
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            return x
        scale = torch.linspace(1, 0.5, len(x), dtype=x.dtype, device=x.device)
        return x * scale.view(-1, *[1] * (x.ndim - 1))
    if isinstance(x, dict):
        return {k: _varied(v) for k, v in x.items()}
    return tuple(_varied(v) for v in x) if isinstance(x, tuple) else x


def block_rows(model: nn.Module, names: Sequence[str], function: Callable[[], Any]) -> Counter[str]:
    """Rows that each named module runs on during ``function()``: what compaction really saves."""
    rows: Counter[str] = Counter()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows[name] += len(first_tensor(args or kwargs))

        return hook

    with ExitStack() as stack:
        stack.enter_context(step_by_step())
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        function()
    return rows
