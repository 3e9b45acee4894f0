"""One network, many sizes."""

from pliant.elastic.bignas import BigNAS, MobileNet
from pliant.elastic.proard import ElasticResNet, ProARD
from pliant.elastic.self_expanding import SelfExpanding
from pliant.elastic.sortednet import SortedNet
from pliant.elastic.stitching import StitchNet

__all__ = ["BigNAS", "ElasticResNet", "MobileNet", "ProARD", "SelfExpanding", "SortedNet", "StitchNet"]
