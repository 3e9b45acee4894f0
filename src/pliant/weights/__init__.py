"""Networks whose weights are made by another rule than plain gradient descent on each of them."""

from pliant.weights.weight_compander import WeightCompander

__all__ = ["WeightCompander"]
