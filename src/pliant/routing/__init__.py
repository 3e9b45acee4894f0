"""Which computation runs: methods that choose, input by input, what is executed."""
