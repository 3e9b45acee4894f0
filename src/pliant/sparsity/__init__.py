"""Which weights exist: pruning and sparse training."""

from pliant.sparsity.consensus import Consensus
from pliant.sparsity.dsnot import DSnoT
from pliant.sparsity.ftwt import FTWT
from pliant.sparsity.pruning_adapters import PruningAdapters
from pliant.sparsity.rd_pruning import RDPruning
from pliant.sparsity.sparse_learning import SparseLearning

__all__ = ["FTWT", "Consensus", "DSnoT", "PruningAdapters", "RDPruning", "SparseLearning"]
