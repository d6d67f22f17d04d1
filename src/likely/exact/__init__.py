"""Reproducible arithmetic: the same bits from a trained network on every machine, thread count, batch size and library."""

from likely.exact.network import Network, network
from likely.exact.profiles import Irreproducible, Uncovered

__all__ = ["Irreproducible", "Network", "Uncovered", "network"]
