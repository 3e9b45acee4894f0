"""The contract. A dynamic network is a plain ``nn.Module`` with a dial.

============================  ==============================================================================
``forward(x)``                run at the current setting of the dial
``loss(batch)``               the method's own training objective for one batch
``points()``                  the settings that the dial has
``use(point)``                turn the dial: cheap, reversible, no weight is copied
``extract(point)``            the plain PyTorch network of one setting
``schedule(progress)``        called before every training step with progress in [0, 1], and once with 1 at the end
============================  ==============================================================================

Five more members have defaults that suit most methods: ``attach_optimizer(optimizer)``, ``epoch_end(validation)`` and
``finish(train)`` are called by ``fit`` (before the first step, after every epoch, and once after the last step),
``parameter_groups`` tells an optimiser what decays, and ``arguments`` / ``structure`` tell ``save`` how to build the
same network again.

The setting is a state of the network. Several threads may call ``forward`` at one fixed point in evaluation mode; a
``use`` in one thread while another is inside ``forward`` gives answers of neither setting. Two settings at once take
two networks (``copy.deepcopy``, or ``extract``).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pliant.core.inputs import Batch, map_tensors

Value = int | float | str


class Point(Mapping[str, Value]):
    """One setting of the dial: a frozen, hashable, ordered mapping of names to values.

    >>> Point(width=0.5, depth=0.75)
    Point(width=0.5 depth=0.75)
    >>> Point.parse("width=0.5 depth=0.75")["depth"]
    0.75
    """

    __slots__ = ("_items",)
    _items: dict[str, Value]

    def __init__(self, **values: Value) -> None:
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise TypeError(f"{name}: a point holds numbers or words, got {value!r}")
        object.__setattr__(self, "_items", dict(values))

    @classmethod
    def parse(cls, text: str) -> Point:
        """The point that prints as ``text``: names and values joined by '=', parted by spaces or commas."""
        values: dict[str, Value] = {}
        for part in text.replace(",", " ").split():
            name, sep, value = part.partition("=")
            if not sep or not name or not value:
                raise ValueError(f"point: expected name=value, got {part!r}")
            values[name] = _number(value)
        return cls(**values)

    def __getitem__(self, name: str) -> Value:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Point is frozen; make another one")

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and self._items == other._items

    def __reduce__(self) -> tuple[Any, ...]:
        return (_point_of, (tuple(self._items.items()),))

    def __str__(self) -> str:
        return " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self._items.items())

    def __repr__(self) -> str:
        return f"Point({self})"


def _number(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _point_of(items: tuple[tuple[str, Value], ...]) -> Point:
    return Point(**dict(items))


class NotStaticError(RuntimeError):
    """The computation at this point depends on the input, so no single plain network does the same."""

    def __init__(self, point: Point, why: str) -> None:
        super().__init__(
            f"no static network exists at {point}: {why}. Deploy the dynamic network itself "
            "(pliant.deploy.compile), or extract a point that fixes the computation."
        )
        self.point = point


class Dynamic(nn.Module, ABC):
    """A plain ``nn.Module`` with a dial; see the module's docstring for the contract.

    Subclasses keep their constructor arguments in attributes of the same names, so that ``arguments`` can tell them.
    The setting in use is ``self.point``, one of ``points()``; a new network stands at its largest.
    """

    point: Point

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The method's own training objective for one batch: a scalar to call ``backward`` on."""

    @abstractmethod
    def points(self) -> list[Point]:
        """The settings of the dial, at least one, from the smallest cost to the largest."""

    def use(self, point: Mapping[str, Value]) -> Self:
        """Turn the dial to ``point`` and return self. No weight is copied.

        Raises:
            ValueError: ``point`` is not one of ``points()``.
        """
        self.point = self._known(point)
        return self

    @abstractmethod
    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The plain network of ``point`` with weights of its own, in evaluation mode.

        Raises:
            NotStaticError: the computation at ``point`` depends on the input.
            ValueError: ``point`` is not one of ``points()``.
        """

    def schedule(self, progress: float) -> None:
        """Called before every training step with the share of training done, and once with 1.0 after the last."""

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Called with the optimiser before its first step, for methods that change the shapes of what it moves."""

    def epoch_end(self, validation: Iterable[Batch] | None) -> None:
        """Called after every epoch, with the validation batches where ``fit`` was given some."""

    def finish(self, train: Iterable[Batch]) -> None:
        """Called once after training, with the training batches: norm statistics, last snapshots."""

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimiser groups of the trainable parameters. One group, all decayed, unless a method knows better."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    # -- what ``save`` writes ---------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values, read from attributes of the same names.

        Arguments that hold code or data (modules, tensors, functions, iterables of batches) are left out;
        ``load`` takes them again from the caller.
        """
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        found = {name: getattr(self, name) for name in names if name in vars(self) or hasattr(type(self), name)}
        return {name: _plain(value) for name, value in found.items() if _is_plain(value)}

    def structure(self) -> dict[str, Any]:
        """What training changed in the structure (grown sizes, fitted points), as JSON values; usually empty."""
        return {}

    def restructure(self, structure: dict[str, Any]) -> None:
        """Make a fresh network ready for the tensors of one whose ``structure()`` is given."""

    # -- a module among others ----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``to``, ``double``, ``cuda``: the example, on which networks are traced, goes where the weights go."""
        before = _first_float(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = _first_float(self)
        example = vars(self).get("example")
        if example is not None and before is not None and after is not None and after.device.type != "meta":

            def move(t: Tensor) -> Tensor:
                kind = after.dtype if t.dtype == before.dtype else t.dtype
                return t.to(after.device if t.device == before.device else t.device, kind)

            self.example = map_tensors(example, move)
        return self

    def __getattr__(self, name: str) -> Any:
        """What a wrapped model of transformers tells about itself (``config``, ``main_input_name``), as its tools ask.

        Its verbs that would run or save the whole model beside the setting are not passed on.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if not hasattr(type(model), "config_class") or name.startswith("__"):
                raise
            if name in _ITS_OWN:
                raise AttributeError(
                    f"{type(self).__name__} has no {name!r}: its model's own would leave the setting out; "
                    f"extract(point).{name} is that of a plain network"
                ) from None
            return getattr(model, name)

    def _known(self, point: Mapping[str, Value]) -> Point:
        """``point`` as one of ``points()``, or a clear error."""
        wanted = point if isinstance(point, Point) else Point(**point)
        known = self.points()
        if wanted in known:
            return known[known.index(wanted)]
        shown = ", ".join(str(p) for p in known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
        raise ValueError(f"point: {wanted} is not a setting of {type(self).__name__}; it has: {shown}")


_ITS_OWN = frozenset({"generate", "save_pretrained", "push_to_hub", "from_pretrained"})


def _first_float(module: nn.Module) -> Tensor | None:
    """The first parameter or buffer of floating point, None where there is none."""
    tensors = (t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())
    return next((torch.empty(0, dtype=t.dtype, device=t.device) for t in tensors), None)


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The optimiser itself, out of wrappers such as accelerate's (which is an Optimizer too).

    Raises:
        TypeError: it is no optimiser.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, bool | int | float | str):
        return True
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return isinstance(value, tuple | list) and all(_is_plain(v) for v in value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
