"""Which weights exist: pruning and sparse training."""
