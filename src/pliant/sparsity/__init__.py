"""Which weights exist: pruning and sparse training."""

from pliant.sparsity.consensus import Consensus
from pliant.sparsity.ftwt import FTWT
from pliant.sparsity.pruning_adapters import PruningAdapters
from pliant.sparsity.rd_pruning import RDPruning

__all__ = ["FTWT", "Consensus", "PruningAdapters", "RDPruning"]
