"""pliant: dynamic neural networks for PyTorch, many published systems under one small contract.

A dynamic network is a plain ``nn.Module`` with a dial:

    net   = pliant.elastic.SortedNet(model, example)
    pliant.fit(net, train, epochs=5)
    front = pliant.measure(net, test)
    point = front.best(flops=30e6)
    small = net.extract(point)

Families (``pliant.elastic``, ``pliant.sparsity``, ``pliant.routing``, ``pliant.weights``) are imported when they are
first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pliant._version import __version__

if TYPE_CHECKING:
    from pliant import elastic, routing, sparsity, weights
    from pliant.core.dynamic import Dynamic, NotStaticError, Point
    from pliant.core.frontier import Frontier, measure
    from pliant.core.persistence import load, save
    from pliant.core.training import DivergedError, History, fit

_HOMES = {
    "Dynamic": "pliant.core.dynamic",
    "NotStaticError": "pliant.core.dynamic",
    "Point": "pliant.core.dynamic",
    "Frontier": "pliant.core.frontier",
    "measure": "pliant.core.frontier",
    "load": "pliant.core.persistence",
    "save": "pliant.core.persistence",
    "fit": "pliant.core.training",
    "DivergedError": "pliant.core.training",
    "History": "pliant.core.training",
}
_FAMILIES = ("elastic", "routing", "sparsity", "weights")

__all__ = [
    "DivergedError",
    "Dynamic",
    "Frontier",
    "History",
    "NotStaticError",
    "Point",
    "__version__",
    "elastic",
    "fit",
    "load",
    "measure",
    "routing",
    "save",
    "sparsity",
    "weights",
]


def __getattr__(name: str) -> Any:
    """Names are found when first used, so that ``import pliant`` and ``pliant --version`` need not load torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _FAMILIES:
        return importlib.import_module(f"pliant.{name}")
    raise AttributeError(f"module 'pliant' has no attribute {name!r}")
