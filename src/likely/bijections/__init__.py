"""Invertible maps with the log-determinants of their Jacobians; usable alone.

Every map leads from data to base: ``forward(x, context=None)`` gives z and log |det ∂z/∂x|, ``inverse`` leads back.
A flow is a :class:`Chain`.  An elementwise transform (:class:`Affine`, :class:`Spline`, …) and what gives it its
numbers (:class:`Autoregressive`, :class:`Coupling`, :class:`Conditioned`, :class:`Unconditional`) are chosen
independently.
"""

from __future__ import annotations

from likely.bijections.bijection import Bijection, Chain, Inverse, NoInverse
from likely.bijections.conditioners import Autoregressive, Conditioned, Coupling, Unconditional, VectorNetwork
from likely.bijections.continuous import Continuous
from likely.bijections.elementwise import Additive, Affine, Arcsinh, Elementwise, Logit, Sigmoid, Softplus
from likely.bijections.linear import LU, ActNorm, Householder, InvertibleConvolution, Mixing
from likely.bijections.logistics import Logistics
from likely.bijections.permutations import Permutation, Reverse
from likely.bijections.residual import Planar, Radial, Sylvester
from likely.bijections.spline import Spline

__all__ = [
    "LU",
    "ActNorm",
    "Additive",
    "Affine",
    "Arcsinh",
    "Autoregressive",
    "Bijection",
    "Chain",
    "Conditioned",
    "Continuous",
    "Coupling",
    "Elementwise",
    "Householder",
    "Inverse",
    "InvertibleConvolution",
    "Logistics",
    "Logit",
    "Mixing",
    "NoInverse",
    "Permutation",
    "Planar",
    "Radial",
    "Reverse",
    "Sigmoid",
    "Softplus",
    "Spline",
    "Sylvester",
    "Unconditional",
    "VectorNetwork",
]
