"""Networks whose weights are made by another rule than plain gradient descent on each of them."""
