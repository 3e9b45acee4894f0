"""Which computation runs: methods that choose, input by input, what is executed."""

from pliant.routing.jei_dnn import JEIDNN, ThresholdExit

__all__ = ["JEIDNN", "ThresholdExit"]
