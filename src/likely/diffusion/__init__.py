"""Diffusion read as a variational model, in parts that know nothing of each other's choices.

* :mod:`~likely.diffusion.levels`: where noise levels come from, each with its own density.
* :mod:`~likely.diffusion.parameterisation`: what a network's output means.
* :mod:`~likely.diffusion.weighting`: weights of a training objective, and whether it is still a likelihood.
* :mod:`~likely.diffusion.data`: kinds of data as real numbers, and their reconstruction.
* :mod:`~likely.diffusion.bound`: the bound, cell by cell, in nats.
* :mod:`~likely.diffusion.samplers`: ancestral, DDIM, Heun, DPM-Solver++(2M) and its stochastic form; guidance,
clipping. * :mod:`~likely.diffusion.likelihood`: the probability flow, its density, an embedding. *
:mod:`~likely.diffusion.score`: losses for a score alone.

A denoiser is any function ``(z, γ, context) -> (x̂, ε̂)``.  Everything else is written in terms of γ = −log SNR.
"""

from likely.diffusion.bound import Denoiser, chain_nats, diffusion_nats, prior_nats
from likely.diffusion.data import make_data
from likely.diffusion.levels import Ends, make_levels
from likely.diffusion.likelihood import flow, log_density
from likely.diffusion.parameterisation import Pair, make_parameterisation
from likely.diffusion.samplers import clipped, guided, make_sampler
from likely.diffusion.weighting import is_monotone, make_weighting

__all__ = [
    "Denoiser",
    "Ends",
    "Pair",
    "chain_nats",
    "clipped",
    "diffusion_nats",
    "flow",
    "guided",
    "is_monotone",
    "log_density",
    "make_data",
    "make_levels",
    "make_parameterisation",
    "make_sampler",
    "make_weighting",
    "prior_nats",
]
