"""Small models for the tests of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from likely.contract import Binary, Bound, Column, Model, Reals, Table
from likely.data.dataset import Dataset


class LinearVAE(Model):
    """p(z) = N(0, I), p(x | z) = N(W z + b, s² I), q(z | x) = N(A x + c, diag exp(2 r)).

    ``trap`` is a step whose loss is finite but whose gradient is not.
    """

    spaces = (Reals, Table)

    def __init__(self, space, condition=None, *, latent=2, dtype="float32", dropout=0.0, trap=-1):
        super().__init__(space)
        self.trap, self.latent = trap, latent
        self.encoder = nn.Linear(space.dims, latent)
        self.decoder = nn.Linear(latent, space.dims)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_width = nn.Parameter(torch.full((latent,), -0.5))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("centre", torch.zeros(space.dims))
        self.to(getattr(torch, dtype))

    def bound(self, x, condition=None, noise=None):
        x = x.to(self.centre.dtype) - self.centre
        mean = self.encoder(self.dropout(x))
        z = mean + self.log_width.exp() * noise.normal(mean.shape).to(mean.dtype)
        error = (x - self.decoder(z)) / self.log_scale.exp()
        reconstruction = -0.5 * error.square().sum(1) - self.space.dims * (self.log_scale + 0.5 * math.log(2 * math.pi))
        kl = 0.5 * (mean.square() + (2 * self.log_width).exp() - 1) - self.log_width
        return Bound("lower bound", {"reconstruction": reconstruction, "KL": -kl.sum(1)})

    def loss(self, x, condition=None, noise=None, step=0):
        loss = super().loss(x, condition, noise, step)
        if step == self.trap:
            loss.value = loss.value + torch.sqrt(0.0 * self.decoder.bias.square().sum())
        return loss

    def initialise(self, batches):
        total, n = torch.zeros_like(self.centre), 0
        for x, _ in batches:
            total, n = total + x.to(total.dtype).sum(0), n + len(x)
        self.centre.copy_(total / n)


class Bernoulli(Model):
    """One logit a cell; ``closed`` makes it a model in closed form."""

    spaces = (Binary,)

    def __init__(self, space):
        super().__init__(space)
        self.logits = nn.Parameter(torch.zeros(space.shape))

    def bound(self, x, condition=None, noise=None):
        return Bound(
            "exact", {"cells": torch.distributions.Bernoulli(logits=self.logits).log_prob(x).flatten(1).sum(1)}
        )


class ClosedBernoulli(Bernoulli):
    closed_form = True

    def estimate(self, batches, report=None):
        total, n = torch.zeros(self.space.shape), 0
        for x, _ in batches:
            total, n = total + x.sum(0), n + len(x)
        with torch.no_grad():
            self.logits.copy_(torch.logit((total + 0.5) / (n + 1)))
        if report is not None:
            report(1, float("nan"))
            report(2, -1.5)


def gaussian_data(n: int, dims: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> Dataset:
    """Correlated Gaussian examples."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2, dims, generator=torch.Generator().manual_seed(99))
    x = torch.randn(n, 2, generator=generator) @ mixing + 0.3 * torch.randn(n, dims, generator=generator) + 1.0
    return Dataset(Reals((dims,)), x.to(dtype))


def table_data(n: int, seed: int = 0) -> Dataset:
    """A table of two real columns."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double()
    return Dataset(Table(columns=(Column("height", "real"), Column("weight", "real"))), x)


def linear_vae(data: Dataset, seed: int = 0, kind: type[LinearVAE] = LinearVAE, **options) -> LinearVAE:
    """A model with the same weights every time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return kind(data.space, **options)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
