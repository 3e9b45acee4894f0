"""The configuration of a cut ``transformers`` model: it must describe the sizes that the model has now.

``save_pretrained`` writes weights and configuration, ``from_pretrained`` builds the model anew from the configuration:
with the old one a model that lost layers comes back with random ones in their place. What the new values are is read
off the difference between the full network and the cut one, and checked: a model built from the new configuration (on
the meta device, without memory) must have the parameters of the cut one, name by name and shape by shape, and with its
weights it must give the same outputs.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from pliant.core.inputs import Input, call, device_of, predictions
from pliant.core.labels import HEADS, PER_HEAD

Sizes = dict[str, Any]
_ROUNDS = 3


def fitted_config(network: nn.Module, full: nn.Module, example: Input) -> Any:
    """A configuration that describes ``network``, a cut ``full``; None where there is none.

    None too where ``full`` is no model of transformers or nothing was cut. Where the sizes of ``network`` are not those
    of any configuration (layers of different widths) a warning says so.
    """
    config = getattr(full, "config", None)
    if not hasattr(full, "save_pretrained") or not hasattr(config, "to_dict"):
        return None
    wanted = _sizes(network)
    if wanted == _sizes(full):
        return None
    changes = _changes(network, full)
    config = copy.deepcopy(config)
    places = [(owner, name, options) for owner in _configs(config) for name, options in _options(owner, changes)]
    for owner, name, options in places:
        _set(owner, name, options[0])
    best = _mismatches(full, config, wanted)
    for _ in range(_ROUNDS):
        if not best:
            break
        at_start = best
        for owner, name, options in places:
            held = getattr(owner, name)
            for option in [*options, _original(full, config, owner, name)]:
                _set(owner, name, option)
                found = _mismatches(full, config, wanted)
                if found < best:
                    best, held = found, option
            _set(owner, name, held)
        if best == at_start:
            break
    if not best and _same_function(full, config, network, example):
        return config
    warnings.warn(
        f"{type(full).__name__}: no configuration describes the sizes of the extracted network, so that "
        "from_pretrained cannot build it again; keep it with torch.export or torch.save, or its state_dict beside "
        "pliant.save's files",
        stacklevel=3,
    )
    return None


def _sizes(network: nn.Module) -> Sizes:
    """The shapes of parameters, and what attention modules know of their heads."""
    found: Sizes = {name: tuple(p.shape) for name, p in network.named_parameters(remove_duplicate=False)}
    for name, module in network.named_modules(remove_duplicate=False):
        held = vars(module)
        found |= {f"{name}.{a}": held[a] for a in (*HEADS, *PER_HEAD) if isinstance(held.get(a), int | float)}
    return found


def _mismatches(full: nn.Module, config: Any, wanted: Sizes) -> int:
    """How many sizes of a model built from ``config`` are not those of the cut network."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = _sizes(type(full)(copy.deepcopy(config)))
    except Exception:  # sizes that do not go together are refused by each model in its own way
        return len(wanted) + 1
    return sum(made.get(name) != wanted.get(name) for name in made.keys() | wanted.keys())


def _same_function(full: nn.Module, config: Any, network: nn.Module, example: Input) -> bool:
    """Whether a model of ``config`` with the cut network's weights gives its outputs: forwards use sizes as numbers."""
    made = type(full)(copy.deepcopy(config)).to(device_of(network), next(network.parameters()).dtype).eval()
    made.load_state_dict(network.state_dict(), strict=False)
    with torch.no_grad():
        theirs, ours = predictions(call(made, example)), predictions(call(network, example))
    return all(a.shape == theirs[n].shape and torch.allclose(a, theirs[n], 1e-3, 1e-5) for n, a in ours.items())


def _changes(network: nn.Module, full: nn.Module) -> dict[int, list[int]]:
    """Which numbers became which: sizes of parameters, lengths of lists, whole numbers that modules keep."""
    pairs: dict[int, dict[int, int]] = {}

    def note(before: int, after: int) -> None:
        counts = pairs.setdefault(before, {})
        counts[after] = counts.get(after, 0) + 1

    ours = dict(network.named_parameters(remove_duplicate=False))
    for name, p in full.named_parameters(remove_duplicate=False):
        if name in ours and p.ndim == ours[name].ndim:
            for before, after in zip(p.shape, ours[name].shape, strict=True):
                note(before, after)
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, module in full.named_modules(remove_duplicate=False):
        cut = modules.get(name)
        if cut is None:
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential) and isinstance(cut, nn.ModuleList | nn.Sequential):
            note(len(module), len(cut))
        for attribute, value in vars(module).items():
            if type(value) is int and type(found := getattr(cut, attribute, None)) is int:
                note(value, found)
    changed = {before: counts for before, counts in pairs.items() if set(counts) != {before}}
    return {before: sorted(counts, key=lambda a: (a == before, -counts[a])) for before, counts in changed.items()}


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and value is not config:
            yield from _configs(value)


def _options(config: Any, changes: Mapping[int, list[int]]) -> Iterator[tuple[str, list[Any]]]:
    """Attributes of a configuration that may have changed, and what each may be now."""
    for name, value in vars(config).items():
        if name.startswith("_") or name.endswith("_id") or name in ("vocab_size", "max_position_embeddings"):
            continue
        if type(value) is int and (value in changes or "head" in name):
            numbers = list(changes.get(value, []))
            if "head" in name and "dim" not in name:  # shapes tell the product of heads and their size alone
                shares = Counter(Fraction(found[0], before) for before, found in changes.items())
                numbers += [int(value * s) for s, _ in shares.most_common() if value * s >= 1 and value * s % 1 == 0]
                numbers = [n for n in numbers if n != value] + [value]
            elif "head" in name:
                numbers = [value, *numbers]
            if numbers:
                yield name, list(dict.fromkeys(numbers))
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            per_item = [changes.get(v, [v])[0] for v in value]
            lengths = [n for n in changes.get(len(value), []) if n < len(value)]
            lists = [o for o in (per_item, *(value[:n] for n in lengths)) if o != value]
            lists += [o[:n] for o in lists for n in lengths]
            if lists:
                yield name, lists
        elif isinstance(value, list) and all(isinstance(v, str) for v in value) and len(value) in changes:
            yield name, [value[: changes[len(value)][0]]]  # one word for each layer


def _original(full: nn.Module, config: Any, owner: Any, name: str) -> Any:
    """The value that an attribute has in the full network's configuration."""
    mine, theirs = list(_configs(config)), list(_configs(full.config))
    return getattr(theirs[next(i for i, c in enumerate(mine) if c is owner)], name)


def _set(config: Any, name: str, value: Any) -> None:
    setattr(config, name, copy.copy(value))
