"""One network, many sizes."""
