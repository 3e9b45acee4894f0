"""One network, many sizes."""

from pliant.elastic.sortednet import SortedNet

__all__ = ["SortedNet"]
