"""Which weights exist: pruning and sparse training."""

from pliant.sparsity.rd_pruning import RDPruning

__all__ = ["RDPruning"]
