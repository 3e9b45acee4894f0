"""The ground floor: the contract, and what every family needs. It imports no family."""
