"""pliant: dynamic neural networks for PyTorch, many published systems under one small contract."""

from pliant._version import __version__

__all__ = ["__version__"]
