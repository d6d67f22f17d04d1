"""Reproducible arithmetic: a trained network's outputs with the same bits on every machine.

    exact.network(module)   the network, computed in whole numbers held in floats: same call, same bits everywhere
    exact.functions         exp, log, Φ … in float64 from IEEE operations alone, for tensors and NumPy arrays
    exact.guard()           a context for tests, in which no other kernel may run

A product of whole numbers is exact while its sums stay below 2²⁴, whatever the library, the order, the number of
threads or the batch; everything between products is one IEEE operation at a time, or a look-up in a table.
"""

from likely.exact import functions
from likely.exact.guard import Guard, guard
from likely.exact.network import Network, network
from likely.exact.profiles import Irreproducible, Uncovered

__all__ = ["Guard", "Irreproducible", "Network", "Uncovered", "functions", "guard", "network"]
