"""Checks of arguments, in one wording: the argument, its value, what is allowed.

Each function looks at one argument and returns it in plain form (an ``int``, a ``float``, a tuple), or raises
``TypeError`` where it is of another kind and ``ValueError`` where it is of that kind and out of bounds:

>>> share("warmup", 1.5)
Traceback (most recent call last):
    ...
ValueError: warmup: 1.5; allowed: a number from 0 to 1

Whole numbers and lengths have an upper bound, even where no caller names one: arguments are also read from files, and
a number such as 10**9 must end in an error and not in a loop of days or in all of the memory.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, get_args, get_origin

from torch import Tensor, nn

LARGEST = 1_000_000  # of a whole number for which the caller names no bound
LONGEST = 10_000  # of a sequence or mapping


def show(value: object) -> str:
    """``value`` for an error's one line: at most some eighty characters, tensors by shape, modules by class."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return f"a whole number of {value.bit_length()} bits"  # its digits may be too many to be written
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    try:
        return " ".join(short.repr(value).split())
    except Exception:  # a repr of the caller's own may raise anything
        return f"a {type(value).__name__}"


def wrong(name: str, value: object, allowed: str, kind: type[Exception] = ValueError) -> Exception:
    """The error for an argument, to be raised: ``name: value; allowed: ...``."""
    return kind(f"{name}: {show(value)}; allowed: {allowed}")


# -- numbers ----------------------------------------------------------------------------------------------------------


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """A finite number within the bounds, as ``float``. A ``bool`` is none."""
    allowed = _range("a finite number", above, at_least, below, at_most)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong(name, value, allowed, TypeError)
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or not _inside(found, above, at_least, below, at_most):
        raise wrong(name, value, allowed)
    return found


def share(name: str, value: object) -> float:
    """A number from 0 to 1, both included."""
    return number(name, value, at_least=0, at_most=1)


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    return number(name, value, above=0)


def whole(name: str, value: object, *, at_least: int | None = None, at_most: int = LARGEST) -> int:
    """A whole number within the bounds, as ``int``. Neither a ``bool`` nor ``64.0`` is one."""
    allowed = _range("a whole number", None, at_least, None, at_most)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong(name, value, allowed, TypeError)
    found = int(value)
    if not _inside(found, None, at_least, None, at_most):
        raise wrong(name, value, allowed)
    return found


def seed(name: str, value: object) -> int:
    """A whole number from 0 to 2**63 - 1."""
    return whole(name, value, at_least=0, at_most=2**63 - 1)


def _inside(
    value: float, above: float | None, at_least: float | None, below: float | None, at_most: float | None
) -> bool:
    return (
        (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )


def _range(what: str, above: float | None, at_least: float | None, below: float | None, at_most: float | None) -> str:
    """The bounds in words; an upper bound that nobody meets by accident is not worth a word."""
    if at_most is not None and at_most >= 10**12:
        at_most = None
    if at_least is not None and at_most is not None:
        return f"{what.replace('finite ', '')} from {at_least} to {at_most}"
    words = [
        f"above {above}" if above is not None else "",
        f"of {at_least} or more" if at_least is not None else "",
        f"below {below}" if below is not None else "",
        f"up to {at_most}" if at_most is not None else "",
    ]
    return " ".join([what, " and ".join(w for w in words if w)]).strip()


# -- words and yes or no ----------------------------------------------------------------------------------------------


def boolean(name: str, value: object) -> bool:
    """``True`` or ``False``, nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False", TypeError)
    return value


def choice(name: str, value: Any, allowed: Any) -> Any:
    """One of ``allowed``: a ``Literal``, or an iterable of words and numbers."""
    options = _options(allowed)
    try:
        known = any(value is o or (type(value) is type(o) and value == o) for o in options)
    except Exception:  # a comparison of the caller's own may raise anything
        known = False
    if not known:
        kind = ValueError if isinstance(value, tuple({type(o) for o in options})) else TypeError
        raise wrong(name, value, ", ".join(repr(o) for o in options), kind)
    return value


def choices(name: str, value: Any, allowed: Any, *, empty: bool = False) -> tuple[Any, ...]:
    """Several of ``allowed``, each once, as a tuple; one word is not a sequence of its letters."""
    options = _options(allowed)
    words = f"{'' if empty else 'at least one of '}{', '.join(repr(o) for o in options)}, each once, as a sequence"
    items = _items(name, value, words)
    for item in items:
        if item not in options:
            raise wrong(name, value, words)
    if len(set(items)) < len(items) or (not items and not empty):
        raise wrong(name, value, words)
    return items


def text(name: str, value: object) -> str:
    """A string that is not empty."""
    if not isinstance(value, str):
        raise wrong(name, value, "a text", TypeError)
    if not value:
        raise wrong(name, value, "a text that is not empty")
    return value


def names(name: str, value: Any, *, empty: bool = True) -> tuple[str, ...]:
    """A sequence of strings, as a tuple: names of modules, patterns. One string is not a sequence of its letters."""
    words = "a sequence of names or patterns" if empty else "a sequence of at least one name or pattern"
    items = _items(name, value, words)
    if not all(isinstance(item, str) for item in items):
        raise wrong(name, value, words, TypeError)
    if not all(items) or (not items and not empty):
        raise wrong(name, value, words)
    return items


def _options(allowed: Any) -> tuple[Any, ...]:
    """The values of a ``Literal`` (nested and united ones too), or of an iterable."""
    if get_origin(allowed) is Literal:
        return get_args(allowed)
    if hasattr(allowed, "__value__"):  # a ``type`` statement
        return _options(allowed.__value__)
    return tuple(allowed)


# -- sequences and mappings -------------------------------------------------------------------------------------------


def sequence(
    name: str, value: Any, item: Callable[[str, Any], Any], *, empty: bool = False, length: int | None = None
) -> tuple[Any, ...]:
    """Every item by its own check, called as ``item("name[i]", value)``; a tuple of what these return.

    >>> sequence("density", (0.5, 2), share)
    Traceback (most recent call last):
        ...
    ValueError: density[1]: 2; allowed: a number from 0 to 1
    """
    count = f"exactly {length}" if length is not None else f"at least one and at most {LONGEST}"
    items = _items(name, value, f"a sequence of {count} items")
    if (length is not None and len(items) != length) or (not items and not empty and length is None):
        raise wrong(name, value, f"a sequence of {count} items")
    return tuple(item(f"{name}[{i}]", v) for i, v in enumerate(items))


def mapping(name: str, value: Any, item: Callable[[str, Any], Any], *, empty: bool = True) -> dict[str, Any]:
    """A mapping from names to items, every item by its own check, called as ``item("name['key']", value)``."""
    words = "a mapping from names to values" + ("" if empty else " with at least one entry")
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise wrong(name, value, words, TypeError)
    if len(value) > LONGEST or (not value and not empty):
        raise wrong(name, value, words)
    return {k: item(f"{name}[{k!r}]", v) for k, v in value.items()}


def _items(name: str, value: Any, allowed: str) -> tuple[Any, ...]:
    """What a sequence or set holds, as a tuple. Texts, bytes, mappings, tensors and endless iterables are none."""
    if not isinstance(value, Sequence | AbstractSet) or isinstance(value, str | bytes | bytearray):
        raise wrong(name, value, allowed, TypeError)
    if len(value) > LONGEST:
        raise wrong(name, value, f"{allowed}; it has {len(value)} of them, at most {LONGEST} are allowed")
    return tuple(sorted(value)) if isinstance(value, AbstractSet) else tuple(value)


# -- code -------------------------------------------------------------------------------------------------------------


def instance(name: str, value: Any, *kinds: type, allowed: str = "") -> Any:
    """An object of one of ``kinds``; ``allowed`` says it in better words than the names of the classes."""
    if not isinstance(value, kinds):
        raise wrong(name, value, allowed or " or ".join(f"a {k.__name__}" for k in kinds), TypeError)
    return value


def module(name: str, value: Any) -> nn.Module:
    """An ``nn.Module``."""
    if isinstance(value, type):
        raise wrong(name, value, "an nn.Module that was built, not its class", TypeError)
    if not isinstance(value, nn.Module):
        raise wrong(name, value, "an nn.Module", TypeError)
    return value


def function(name: str, value: Any) -> Callable[..., Any]:
    """Anything that can be called."""
    if not callable(value):
        raise wrong(name, value, "a function, or another object that can be called", TypeError)
    return value  # type: ignore[no-any-return]


def optional(check: Callable[..., Any], name: str, value: Any, *args: Any, **options: Any) -> Any:
    """``None``, or what ``check`` allows.

    >>> optional(whole, "freeze_after", None, at_least=1) is None
    True
    """
    if value is None:
        return None
    try:
        return check(name, value, *args, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; or None") from None


def distinct(name: str, values: Iterable[Any]) -> None:
    """No value stands twice."""
    items = list(values)
    if len(set(items)) < len(items):
        raise wrong(name, items, "values that differ from each other")
