"""One network, many sizes."""

from pliant.elastic.bignas import BigNAS, MobileNet
from pliant.elastic.sortednet import SortedNet

__all__ = ["BigNAS", "MobileNet", "SortedNet"]
