"""Small models of the families that a check must be able to judge: autoregressive, flow, diffusion.

Each is complete and right; the mutants of ``mutants.py`` are made of their source.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from likely.contract import Binary, Bound, Integers, Model, Reals, Space, Tokens, Unsupported, noise_or_global
from likely.noise import Noise


def refuse_holes(space: Space) -> None:
    if space.missing:
        raise Unsupported("this model needs every cell")


def levels_of(space: Space) -> int:
    if isinstance(space, Tokens):
        return space.vocab
    return space.levels if isinstance(space, Integers) else 2


class Autoregressive(Model):
    """p(x) = Πⱼ p(xⱼ | x₁ … xⱼ₋₁) with a masked network of one hidden layer (Germain et al. 2015, MADE).

    Args:
        hidden: hidden units of each cell.
    """

    spaces = (Binary, Integers, Tokens)
    conditional = True

    def __init__(self, space: Space, condition: Space | None = None, *, hidden: int = 6) -> None:
        super().__init__(space, condition)
        refuse_holes(space)
        self.levels, width = levels_of(space), condition.dims if condition is not None else 0
        self.first = nn.Parameter(torch.randn(space.dims, hidden, space.dims, self.levels) / 2)
        self.given = nn.Parameter(torch.randn(space.dims, hidden, width)) if width else None
        self.second = nn.Parameter(torch.randn(space.dims, self.levels, hidden) / 2)
        self.bias = nn.Parameter(torch.zeros(space.dims, self.levels))

    def logits(self, codes: Tensor, condition: Tensor | None) -> Tensor:
        """Shape ``(batch, dims, levels)``; those of cell j depend on the cells before it."""
        dims = self.space.dims
        mask = torch.ones(dims, dims).tril(diagonal=-1).to(self.first)
        one_hot = nn.functional.one_hot(codes, self.levels).to(self.first)
        hidden = torch.einsum("bdl,jhdl,jd->bjh", one_hot, self.first, mask)
        if self.given is not None and condition is not None:
            hidden = hidden + torch.einsum("bc,jhc->bjh", condition.flatten(1).to(self.first), self.given)
        return torch.einsum("bjh,jlh->bjl", torch.tanh(hidden), self.second) + self.bias

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        codes = x.flatten(1).long()
        log_p = self.logits(codes, condition).log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        first = log_p[:, 0]
        return Bound("exact", {"first cell": first, "other cells": log_p[:, 1:].sum(1)})

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        noise = noise_or_global(noise, self)
        codes = torch.zeros(n, self.space.dims, dtype=torch.long)
        for j in range(self.space.dims):
            p = self.logits(codes, condition)[:, j].softmax(-1)
            codes[:, j] = (noise.uniform((n, 1)).to(p) > p.cumsum(-1)[:, :-1]).sum(-1)
        return codes.reshape(n, *self.space.shape).to(self.first.dtype)


class Flow(Model):
    """y₁ = (x₁ − t) exp(−s), y₂ = (x₂ − t(x₁)) exp(−s(x₁)), y ~ N(0, I): an affine autoregressive flow, exact.

    Args:
        hidden: hidden units of s(x₁) and t(x₁).
    """

    spaces = (Reals,)
    conditional = True

    def __init__(self, space: Space, condition: Space | None = None, *, hidden: int = 16) -> None:
        super().__init__(space, condition)
        refuse_holes(space)
        width = condition.dims if condition is not None else 0
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(j + width, hidden), nn.Tanh(), nn.Linear(hidden, 2)) if j + width else Constant()
            for j in range(space.dims)
        )

    def affine(self, j: int, before: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        context = before if condition is None else torch.cat([before, condition.flatten(1).to(before)], 1)
        shift, log_scale = self.networks[j](context).unbind(-1)
        return shift, torch.tanh(log_scale / 3) * 3

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        x = x.flatten(1).to(next(self.parameters()))
        base, log_det = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
        for j in range(self.space.dims):
            shift, log_scale = self.affine(j, x[:, :j], condition)
            y = (x[:, j] - shift) * torch.exp(-log_scale)
            base = base - 0.5 * y.square() - 0.5 * math.log(2 * math.pi)
            log_det = log_det - log_scale
        return Bound("exact", {"base": base, "log-det": log_det})

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        noise = noise_or_global(noise, self)
        y = noise.normal((n, self.space.dims)).to(next(self.parameters()))
        x = torch.zeros_like(y)
        for j in range(self.space.dims):
            shift, log_scale = self.affine(j, x[:, :j], condition)
            x[:, j] = y[:, j] * torch.exp(log_scale) + shift
        return x.reshape(n, *self.space.shape)


class Constant(nn.Module):
    """Shift and log-scale that depend on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(2))

    def forward(self, context: Tensor) -> Tensor:
        return self.value.expand(len(context), 2)


class Diffusion(Model):
    """A variational diffusion model in T steps (Kingma et al. 2021, arXiv 2107.00630, eqs. 11-15).

    q(z_t | x) = N(α_t x, σ_t²), α_t² = sigmoid(−γ_t), σ_t² = sigmoid(γ_t), γ linear in t/T; p(z_T) = N(0, I), and
    p(z_s | z_t) = q(z_s | z_t, x = x̂(z_t)) with x̂ = (z_t − σ_t ε̂) / α_t.

    Args:
        steps: T.
        hidden: hidden units of ε̂.
    """

    spaces = (Reals,)
    draws = 4

    def __init__(self, space: Space, condition: Space | None = None, *, steps: int = 8, hidden: int = 32) -> None:
        super().__init__(space, condition)
        refuse_holes(space)
        self.steps = steps
        self.network = nn.Sequential(
            nn.Linear(space.dims + 3, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, space.dims),
        )
        self.register_buffer("mean", torch.zeros(space.dims))
        self.register_buffer("scale", torch.ones(space.dims))

    def gamma(self, t: Tensor) -> Tensor:
        return -4.0 + 6.5 * t / self.steps

    def eps_hat(self, z_t: Tensor, t: Tensor) -> Tensor:
        share = (t / self.steps).to(z_t)
        times = torch.stack([share, torch.cos(3 * share), torch.sin(6 * share)], -1)
        sigma = torch.sigmoid(self.gamma(t)).sqrt().to(z_t).unsqueeze(-1)
        return sigma * z_t + self.network(torch.cat([z_t, times], -1))

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        noise = noise_or_global(noise, self)
        x = (x.to(self.mean) - self.mean) / self.scale
        n, dims = x.shape

        # 1. reconstruction: log p(x | z_0)
        gamma_0, gamma_1 = self.gamma(torch.zeros(())), self.gamma(torch.tensor(float(self.steps)))
        eps_0 = noise.normal((n, dims)).to(x)
        log_scale = 0.5 * gamma_0.to(x)  # of z_0 / α_0 about x
        reconstruction = -(0.5 * eps_0.square() + log_scale + 0.5 * math.log(2 * math.pi)).sum(-1)
        reconstruction = reconstruction - self.scale.log().sum()

        # 2. KL(q(z_T | x) || p(z_T))
        var_1 = torch.sigmoid(gamma_1).to(x)
        prior = 0.5 * (var_1 + (1 - var_1) * x.square() - 1 - var_1.log()).sum(-1)

        # 3. diffusion: T / 2 E_t (exp(γ_t − γ_s) − 1) |ε − ε̂|², times stratified within the example
        u = noise.uniform((n, 1)).to(x) + torch.arange(self.draws).to(x) / self.draws
        t = (self.steps * (u % 1.0)).floor() + 1.0
        weight = torch.expm1(self.gamma(t) - self.gamma(t - 1.0))
        eps = noise.normal((n, self.draws, dims)).to(x)
        var = torch.sigmoid(self.gamma(t)).unsqueeze(-1)
        z_t = (1 - var).sqrt() * x.unsqueeze(1) + var.sqrt() * eps
        error = (eps - self.eps_hat(z_t, t)).square().sum(-1)
        diffusion = 0.5 * self.steps * (weight * error).mean(1)
        return Bound("lower bound", {"reconstruction": reconstruction, "prior": -prior, "diffusion": -diffusion})

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        noise = noise_or_global(noise, self)
        z = noise.normal((n, self.space.dims)).to(self.mean)
        for step in range(self.steps, 0, -1):
            t = torch.full((n,), float(step)).to(z)
            gamma_t, gamma_s = self.gamma(t[0]), self.gamma(t[0] - 1)
            var_t, var_s = torch.sigmoid(gamma_t), torch.sigmoid(gamma_s)
            c = -torch.expm1(gamma_s - gamma_t)
            mean = ((1 - var_s) / (1 - var_t)).sqrt() * (z - c * var_t.sqrt() * self.eps_hat(z, t))
            z = mean + (var_s * c).sqrt() * noise.normal(z.shape).to(z)
        gamma_0 = self.gamma(torch.zeros(())).to(z)
        x = z / torch.sigmoid(-gamma_0).sqrt() + torch.exp(0.5 * gamma_0) * noise.normal(z.shape).to(z)
        return x * self.scale + self.mean

    def initialise(self, batches) -> None:
        x = torch.cat([x for x, _ in batches]).to(self.mean)
        self.mean.copy_(x.mean(0))
        self.scale.copy_(x.std(0))
