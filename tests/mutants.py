"""Classical bugs, injected one at a time into the source; every one must be caught by a named check.

    python tests/mutants.py            # all of them, as a table; exit status 1 if any survives
    python tests/mutants.py KL         # those whose name contains KL

A check that never failed proves nothing.  Each mutant is one edit of the text of one function: the edited function
takes the place of the real one while the check runs.  The same check must pass without the edit.  The list of bugs is
that of the field's own history; those of diffusion and autoregressive models are made of ``toy_models.py``.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

import likely.evaluation.heldout as heldout
import likely.models.vae as vae
import test_bijections as of_bijections
import test_denoisers as of_denoisers
import test_diffusion as of_diffusion
import test_distillation as of_distillation
import test_glow as of_glow
import test_made as of_made
import test_many_levels as of_many_levels
import test_masked_diffusion as of_masked_diffusion
import test_optim_matrices as of_optim_matrices
import test_transformer as of_transformer
from likely import processor, units
from likely.bijections import LU, ActNorm, Affine, Logistics, Permutation, Planar, Spline
from likely.bijections.multiscale import GaussianPrior, MultiScale
from likely.checks import check_model
from likely.coding import staircase
from likely.coding.components import ComponentsCodec
from likely.coding.intervals import NormalCells
from likely.coding.normals import FactorInnovations
from likely.contract import Binary, Column, Counts, Integers, Model, Reals, Space, Table, Tokens
from likely.data.dataset import Dataset
from likely.data.preprocessing import Dequantise, Logit, Preprocessed, Standardise
from likely.diffusion import bound, distillation, levels, likelihood, parameterisation, samplers
from likely.diffusion.data import TableData
from likely.distributions import logistic
from likely.distributions.clustered import Clustered
from likely.distributions.counts import NegativeBinomial
from likely.distributions.logistic import GridLogisticMixture, Recalled
from likely.distributions.normal import Normal
from likely.evaluation import sequences
from likely.inference.memory import Memory
from likely.inference.neighbours import Neighbours
from likely.inference.normal import JointNormal
from likely.models._flow import Flow as FlowOverCells
from likely.models._member import Member
from likely.models.dequantised import Dequantised
from likely.models.gaussian import Gaussian, _Full
from likely.models.glow import Glow, GlowStep
from likely.models.independent import Independent
from likely.models.made import Made
from likely.models.masked_diffusion import MaskedDiffusion
from likely.models.mixture import Mixture
from likely.models.nsf import NSF
from likely.models.transformer import Transformer
from likely.models.vae import VAE
from likely.models.vdm import VDM
from likely.networks import coupling, normconv, winograd
from likely.networks.attention import Attention, Walk
from likely.networks.cells import MaskedCells
from likely.networks.features import Features
from likely.networks.masked import MaskedLinear, MaskedMLP
from likely.networks.transformer import TransformerLayers
from likely.networks.unet import Double, ResidualBlock
from likely.optim import soap
from toy_models import Autoregressive, Diffusion, Flow

BITS, IMAGE, PLANE = Binary((2, 3)), Integers((2,), 3), Reals((2,))
GRID = Table(columns=(Column("size", "real", resolution=0.5), Column("weight", "real", resolution=0.25)))
MIXED = Table(columns=(Column("colour", "categorical", levels=3), Column("size", "real", resolution=0.25)))


# Judges: each raises an AssertionError when it sees the bug --------------------------------------------------------


def contract(check: str, model: Any, space: Space | None = None, condition: Space | None = None) -> Judge:
    """The named contract check on a model class, or on a function that makes an instance."""
    return Judge(check, partial(_contract, check, model, space, condition))


def _contract(check: str, model: Any, space: Space | None, condition: Space | None) -> None:
    instance = model if isinstance(model, type) else model()
    check_model(instance, space, condition, only=[check])


@dataclass(frozen=True)
class Judge:
    """A named check that raises ``AssertionError`` when it finds something wrong."""

    check: str
    run: Callable[[], None]


def batches_weigh_by_size() -> None:
    """A held-out mean does not depend on how the examples are put into batches."""
    x = torch.arange(250.0).reshape(-1, 1) / 50
    dataset = Dataset(Reals((1,)), x)
    model = Gaussian(Reals((1,)))
    model.estimate([(x, None)])
    whole, split = (heldout.held_out(model, dataset, batch_size=size) for size in (250, 100))
    assert abs(whole.nats - split.nats) < 1e-9, f"{whole.nats} in one batch, {split.nats} in batches of 100"


def uniform_costs_log2_levels() -> None:
    """A uniform model over 2^b levels costs b bits a dimension."""
    for depth in (1, 5, 8):
        nats = -12 * depth * torch.tensor(2.0).double().log()
        cost = float(units.bits_per_dim(nats, dims=12))
        assert abs(cost - depth) < 1e-9, f"{2**depth} levels cost {cost} bits/dim"


def quantised() -> Model:
    return Preprocessed(Gaussian(Reals((2,))), Dequantise(GRID))


def standardised() -> Model:
    return Preprocessed(Gaussian(PLANE), Standardise())


def squeezed() -> Model:
    return Preprocessed(Gaussian(PLANE), Dequantise(IMAGE), Logit(0.0, 3.0, alpha=0.3))


def weighted() -> Model:
    return VAE(BITS, latent_dim=2, hidden=(4,), activation="tanh", samples=5)


def flowing() -> Model:
    posterior = {"posterior": "iaf", "posterior_options": {"transforms": 1, "hidden": (8,), "tails": "normal"}}
    return VAE(BITS, latent_dim=2, hidden=(4,), activation="tanh", samples=2, **posterior)


def warmed() -> Model:
    return VAE(BITS, latent_dim=2, hidden=(4,), activation="tanh", kl_warmup=5)


def told(test: Callable[..., None], *arguments: Any) -> Judge:
    """A test of the suite as a judge, with the random state that a test starts from."""
    return Judge(test.__name__.removeprefix("test_"), partial(_told, test, arguments))


def _told(test: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    test(*arguments)


# Mutants -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A bug: in the source of ``owner.function`` the text ``old``, which occurs once, is replaced by ``new``."""

    name: str
    judge: Judge
    owner: Any
    function: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "mean instead of sum over dimensions",
        contract("total_mass", VAE, BITS),
        VAE,
        "_log_likelihood",
        ".sum(-1)",
        ".mean(-1)",
    ),
    Mutant(
        "KL averaged over latents",
        contract("importance_weights", VAE, BITS),
        VAE,
        "bound",
        "-q.kl_to_standard().sum(-1)",
        "-q.kl_to_standard().mean(-1)",
    ),
    Mutant(
        "KL flipped",
        contract("importance_weights", VAE, BITS),
        Normal,
        "kl_to_standard",
        "0.5 * (self.mean.square() + torch.exp(2.0 * self.log_scale) - 1.0) - self.log_scale",
        "0.5 * ((1.0 + self.mean.square()) * torch.exp(-2.0 * self.log_scale) - 1.0) + self.log_scale",
    ),
    Mutant(
        "KL halved",
        contract("importance_weights", VAE, BITS),
        VAE,
        "bound",
        '"kl": -q.kl',
        '"kl": -0.5 * q.kl',
    ),
    Mutant(
        "KL with the wrong sign",
        contract("total_mass", VAE, BITS),
        VAE,
        "bound",
        '"kl": -q.kl',
        '"kl": q.kl',
    ),
    Mutant(
        "free bits in the bound",
        contract("importance_weights", VAE, BITS),
        VAE,
        "bound",
        "q.kl_to_standard().sum(-1)",
        "q.kl_to_standard().clamp(min=0.5).sum(-1)",
    ),
    Mutant(
        "bits reported as nats",
        contract("total_mass", Mixture, BITS),
        Mixture,
        "bound",
        "torch.logsumexp(self._log_joint(x), 1)",
        "torch.logsumexp(self._log_joint(x), 1) / 0.6931",
    ),
    Mutant(
        "bits multiplied for divided",
        Judge("uniform_costs_log2_levels", uniform_costs_log2_levels),
        units,
        "bits",
        "nats / LN2",
        "nats * LN2",
    ),
    Mutant(
        "sign of the log-likelihood",
        contract("total_mass", Mixture, BITS),
        Mixture,
        "bound",
        "torch.logsumexp",
        "-torch.logsumexp",
    ),
    Mutant(
        "leaking autoregressive mask",
        contract("total_mass", Autoregressive, BITS),
        Autoregressive,
        "logits",
        "diagonal=-1",
        "diagonal=0",
    ),
    Mutant(
        "leaking mask, seen by the entropy",
        contract("cross_entropy", Autoregressive, BITS),
        Autoregressive,
        "logits",
        "diagonal=-1",
        "diagonal=0",
    ),
    Mutant(
        "dropped log 2π",
        contract("importance_weights", VAE, PLANE),
        Normal,
        "log_prob",
        "(standard.square() + _LOG_2PI)",
        "standard.square()",
    ),
    Mutant(
        "dropped log-det of a flow",
        contract("total_mass", Flow, PLANE),
        Flow,
        "bound",
        '"log-det": log_det',
        '"log-det": 0 * log_det',
    ),
    Mutant(
        "dropped log-det of a scaling",
        contract("total_mass", standardised),
        Standardise,
        "forward",
        "-self.scale.log()",
        "0.0 * self.scale",
    ),
    Mutant(
        "dropped Jacobian of the units",
        contract("total_mass", Gaussian, PLANE),
        Gaussian,
        "_log_jacobian",
        " - self.scale.log()",
        " - 0.0 * self.scale",
    ),
    Mutant(
        "dropped dequantisation constant",
        contract("total_mass", quantised),
        Dequantise,
        "forward",
        "_cellwise(log_width, y)",
        "_cellwise(0.0 * log_width, y)",
    ),
    Mutant(
        "density evaluated on the lattice",
        contract("total_mass", VAE, MIXED),
        GridLogisticMixture,
        "log_prob",
        "torch.where(self.on_grid, mass, density)",
        "density",
    ),
    Mutant(
        "1−α for 1−2α in the logit",
        contract("total_mass", squeezed),
        Logit,
        "forward",
        "math.log(slope)",
        "math.log((1.0 - self.alpha) / (self.high - self.low))",
    ),
    Mutant(
        "wrong inverse",
        contract("sample_frequencies", Flow, PLANE),
        Flow,
        "sample",
        "y[:, j] * torch.exp(log_scale) + shift",
        "(y[:, j] + shift) * torch.exp(log_scale)",
    ),
    Mutant(
        "half of the diffusion loss",
        contract("total_mass", Diffusion, PLANE),
        Diffusion,
        "bound",
        "0.5 * self.steps",
        "0.25 * self.steps",
    ),
    Mutant(
        "unweighted loss shown as a bound",
        contract("total_mass", Diffusion, PLANE),
        Diffusion,
        "bound",
        "(weight * error)",
        "(error / self.steps)",
    ),
    Mutant(
        "biased time sampling",
        contract("total_mass", Diffusion, PLANE),
        Diffusion,
        "bound",
        "(u % 1.0)",
        "(u % 1.0).sqrt()",
    ),
    Mutant(
        "dropped prior term",
        contract("total_mass", VAE, BITS),
        VAE,
        "bound",
        "-q.kl_to_standard().sum(-1)",
        "q.entropy().sum(-1)",
    ),
    Mutant(
        "dropped reconstruction term",
        contract("total_mass", VAE, BITS),
        VAE,
        "bound",
        '"reconstruction": reconstruction, "kl"',
        '"reconstruction": 0 * reconstruction, "kl"',
    ),
    Mutant(
        "variance for standard deviation in the sampler",
        contract("sample_frequencies", Gaussian, PLANE),
        _Full,
        "draw",
        "@ self.cholesky.T",
        "@ (self.cholesky @ self.cholesky.T)",
    ),
    Mutant(
        "wrong decoder variance",
        contract("total_mass", VAE, PLANE),
        Normal,
        "log_prob",
        "torch.exp(-self.log_scale)",
        "torch.exp(-0.5 * self.log_scale)",
    ),
    Mutant(
        "scaled prior in the sampler",
        contract("sample_frequencies", VAE, IMAGE),
        VAE,
        "sample",
        "noise.normal((n, self.latent_dim))",
        "1.5 * noise.normal((n, self.latent_dim))",
    ),
    Mutant(
        "sampled cells in another order",
        contract("sample_frequencies", Mixture, BITS),
        Mixture,
        "sample",
        "return x.reshape",
        "return x.flip(1).reshape",
    ),
    Mutant(
        "posterior mean instead of a sample",
        contract("importance_weights", VAE, BITS),
        VAE,
        "bound",
        "q.sample(noise)",
        "q.mean",
    ),
    Mutant(
        "importance weights averaged in log space",
        contract("importance_weights", weighted),
        VAE,
        "_importance_bound",
        "torch.logsumexp(log_w, 1) - math.log(samples) - mean_log_w",
        "log_w.mean(1) - mean_log_w",
    ),
    Mutant(
        "importance weights not divided by k",
        contract("importance_weights", weighted),
        VAE,
        "_importance_bound",
        " - math.log(samples)",
        "",
    ),
    Mutant(
        "importance weights without the posterior",
        contract("importance_weights", VAE, BITS),
        VAE,
        "log_weights",
        " - log_q",
        "",
    ),
    Mutant(
        "last mini-batch weighted as a full one",
        Judge("batches_weigh_by_size", batches_weigh_by_size),
        heldout,
        "held_out",
        "float(example_nats.mean())",
        "sum(float(batch.sum(1).mean()) for batch in columns) / len(columns)",
    ),
    Mutant(
        "condition ignored",
        contract("conditioning", VAE, IMAGE, Integers((1,), 3)),
        VAE,
        "_context",
        "self.condition_features(condition, self._dtype)",
        "0 * self.condition_features(condition, self._dtype)",
    ),
    Mutant(
        "condition ignored by the sampler",
        contract("conditioning", Autoregressive, BITS, Reals((2,))),
        Autoregressive,
        "sample",
        "self.logits(codes, condition)",
        "self.logits(codes, torch.zeros_like(condition))",
    ),
    Mutant(
        "missing cell counted as zero",
        contract("missing_cells", VAE, Integers((2,), 3, missing=True)),
        VAE,
        "_cells",
        "torch.where(seen, p.log_prob(torch.where(seen, x, 0.0)), 0.0)",
        "p.log_prob(torch.where(seen, x, 0.0))",
    ),
    Mutant(
        "missing cell counted as zero, exact",
        contract("missing_cells", Mixture, Integers((2,), 3, missing=True)),
        Mixture,
        "_cells",
        "torch.where(present, cells, 0.0), present",
        "torch.where(present, cells, 0.0), torch.ones_like(present)",
    ),
    Mutant(
        "dropped factorial of a count",
        contract("total_mass", VAE, Counts((2,))),
        NegativeBinomial,
        "log_prob",
        " - torch.lgamma(x + 1.0)",
        "",
    ),
    Mutant(
        "last level without its tail",
        contract("importance_weights", partial(VAE, IMAGE, latent_dim=2, hidden=(4,), likelihood="logistic")),
        logistic,
        "log_level",
        "torch.where(last, 0.0, F.logsigmoid(upper))",
        "F.logsigmoid(upper)",
    ),
    Mutant(
        "observed cells overwritten",
        contract("imputation", VAE, Integers((2,), 3, missing=True)),
        VAE,
        "impute",
        "torch.where(torch.isnan(x), drawn.to(x.dtype), x)",
        "drawn.to(x.dtype)",
    ),
    Mutant(
        "dropout in evaluation",
        contract("determinism", VAE, BITS),
        VAE,
        "posterior",
        "full_precision(self.posterior_head(h))",
        "full_precision(torch.dropout(self.posterior_head(h), 0.2, True))",
    ),
    Mutant(
        "noise from the global generator",
        contract("samples", VAE, BITS),
        VAE,
        "sample",
        "noise_or_global(noise, self)",
        "noise_or_global(None, self)",
    ),
    Mutant(
        "random embedding",
        contract("encoding", VAE, BITS),
        VAE,
        "encode",
        ".mean",
        ".sample(noise_or_global(None, x))",
    ),
    Mutant(
        "statistics of the batch",
        contract("batch_invariance", VAE, BITS),
        VAE,
        "posterior",
        "full_precision(self.posterior_head(h))",
        "full_precision(self.posterior_head(h - h.mean(0)))",
    ),
    Mutant(
        "detached scale of the posterior",
        contract("gradients", VAE, BITS),
        VAE,
        "posterior",
        "normal = Normal(mean,",
        "log_scale = log_scale.detach(); normal = Normal(mean,",
    ),
    Mutant(
        "scale of the data not saved",
        contract("save_load", VAE, PLANE),
        Features,
        "__init__",
        '"scale", torch.ones(scaled_shape, dtype=torch.float64)',
        '"scale", torch.ones(scaled_shape, dtype=torch.float64), persistent=False',
    ),
    Mutant(
        "KL warm-up counts calls, not steps",
        contract("resume", warmed),
        VAE,
        "loss",
        "(step + 1)",
        "(self.__dict__.setdefault('calls', []).append(0) or len(self.__dict__['calls']))",
    ),
    Mutant(
        "bits-back with the variance as the standard deviation",
        contract("codec_length", VAE, BITS),
        NormalCells,
        "_law",
        "inverse_scale(self._log_scale[some])",
        "inverse_scale(2.0 * self._log_scale[some])",
    ),
    Mutant(
        "a symbol with zero frequency",
        contract("codec_round_trip", Independent, Counts((2,))),
        staircase,
        "_edges",
        "np.floor(share * float(_TOTAL - runs)).astype(np.int64) + np.arange(runs + 1)",
        "np.floor(share * float(_TOTAL)).astype(np.int64)",
    ),
    Mutant(
        "codec run in training mode",
        contract("codec_round_trip", VAE, BITS),
        VAE,
        "posterior",
        "full_precision(self.posterior_head(h))",
        "full_precision(torch.dropout(self.posterior_head(h), 0.2, True))",
    ),
    Mutant(
        "component drawn for another row",
        contract("codec_length", Mixture, BITS),
        ComponentsCodec,
        "_codec",
        "laws.log_joint(symbols, present)",
        "laws.log_joint(symbols[::-1].copy(), present)",
    ),
    Mutant(
        "absent cells weigh on the component",
        contract("codec_absent_cells", Mixture, Integers((2,), 3, missing=True)),
        staircase.Staircases,
        "log_joint",
        "per_sample_weights=weight",
        "per_sample_weights=None",
    ),
    Mutant(
        "cells coded as if alone",
        contract("codec_length", Gaussian, PLANE),
        FactorInnovations,
        "tell",
        "+= innovation * (",
        "+= 0.0 * innovation * (",
    ),
    # Diffusion
    Mutant(
        "steps counted from zero",
        told(of_diffusion.test_every_step_of_a_chain_adds_up_to_the_estimate_from_some),
        levels,
        "draw",
        "clamp(max=steps - 1) + 1.0",
        "clamp(min=1.0, max=steps - 1)",
    ),
    Mutant(
        "slope of the schedule left out",
        told(of_diffusion.test_every_schedule_has_the_bound_of_the_closed_form, "cosine", None),
        levels,
        "draw",
        "(ends.high - ends.low) / levels.density(v).detach()",
        "(ends.high - ends.low) * torch.ones_like(v)",
    ),
    Mutant(
        "one level for the whole batch",
        told(of_diffusion.test_levels_within_an_example_are_a_grid_of_its_own),
        levels,
        "spread_within",
        "noise.uniform((n, 1))",
        "noise.uniform((n, 1))[:1].expand(n, 1)",
    ),
    Mutant(
        "levels told in units of the present range",
        told(of_diffusion.test_a_network_is_told_levels_in_units_of_the_first_range),
        levels.Ends,
        "level",
        "low, high = self.first.to(gamma).unbind()",
        "low, high = self.low, self.high",
    ),
    Mutant(
        "reconstruction from the clean example",
        told(of_diffusion.test_exponentials_of_the_bound_sum_to_at_most_one_whatever_the_ends, -1.0, 8.0),
        VDM,
        "_reconstruction",
        "noise.normal(seen.f.shape)",
        "0.0 * noise.normal(seen.f.shape)",
    ),
    Mutant(
        "prior of the chain left out",
        told(of_diffusion.test_exponentials_of_the_bound_sum_to_at_most_one_whatever_the_ends, -5.0, 0.5),
        VDM,
        "_prior",
        "nats = prior_nats(seen.f, self.ends.high)",
        "nats = 0.0 * prior_nats(seen.f, self.ends.high)",
    ),
    Mutant(
        "variance without its term in the prior",
        told(of_diffusion.test_prior_is_a_divergence_of_normals, 0.0),
        bound,
        "prior_nats",
        "(f.square() - 1.0)",
        "f.square()",
    ),
    Mutant(
        "weighted sum shown as the bound of a diffusion",
        told(of_diffusion.test_with_the_best_denoiser_the_bound_is_the_log_probability),
        bound,
        "diffusion_nats",
        "-0.5 * (_over(drawn, errors) * errors)",
        "-0.5 * (_over(drawn, errors) * errors / torch.cosh(0.5 * drawn.gamma).reshape(*drawn.gamma.shape, 1))",
    ),
    Mutant(
        "half of one half",
        told(of_diffusion.test_with_the_best_denoiser_the_bound_is_the_log_probability),
        bound,
        "diffusion_nats",
        "-0.5 * (",
        "-0.25 * (",
    ),
    Mutant(
        "noise clipped in the bound",
        told(of_diffusion.test_with_the_best_denoiser_the_bound_is_the_log_probability),
        bound,
        "squared_errors",
        "return (noisy - predicted_noise(denoise, z, flat_gamma, context))",
        "return (noisy - denoise(z, flat_gamma, context).eps.clamp(-1.0, 1.0))",
    ),
    Mutant(
        "missing cells count as errors",
        told(of_diffusion.test_a_missing_cell_is_no_part_of_the_error_and_not_seen),
        bound,
        "squared_errors",
        "errors = there * (noisy",
        "errors = (noisy",
    ),
    Mutant(
        "mean over cells in the loss",
        told(of_diffusion.test_the_loss_is_the_bound_in_expectation),
        bound,
        "weighted_error",
        ".sum(2)",
        ".mean(2)",
    ),
    Mutant(
        "log SNR taken for its half",
        told(of_diffusion.test_order_of_a_sampler_of_the_flow, "dpm", 2),
        samplers,
        "_multistep",
        "(0.5 * (gamma_t - gamma_s))",
        "(gamma_t - gamma_s)",
    ),
    Mutant(
        "variance of the forward step in sampling",
        told(of_diffusion.test_the_ancestral_step_is_the_posterior_of_the_chain),
        samplers,
        "ancestral",
        "sigma_s ** (1.0 - large) * sigma_t**large",
        "sigma_t",
    ),
    Mutant(
        "sign of the divergence",
        told(of_diffusion.test_density_of_the_flow_on_gaussian_data_and_its_order),
        likelihood,
        "log_density",
        "return base + gained",
        "return base - gained",
    ),
    Mutant(
        "velocity with the signs of the score",
        told(of_diffusion.test_a_pair_agrees_with_z_and_with_the_definition, "v"),
        parameterisation.V,
        "to_pair",
        "alpha * z - sigma * out, sigma * z + alpha * out",
        "alpha * z + sigma * out, sigma * z - alpha * out",
    ),
    Mutant(
        "map of a column without its slope",
        told(of_diffusion.test_density_of_a_column_is_that_of_its_map),
        TableData,
        "log_likelihood",
        "- 0.5 * torch.log1p(standard.square())",
        "",
    ),
    Mutant(
        "one step of the teacher for two",
        told(of_distillation.test_a_students_step_ends_where_two_of_its_teacher_do),
        distillation,
        "target",
        "step(teacher, step(teacher, z, gamma_t, gamma_m, context), gamma_m, gamma_s, context)",
        "step(teacher, z, gamma_t, gamma_s, context)",
    ),
    Mutant(
        "student told the level between its own",
        told(of_distillation.test_the_exact_student_of_a_gaussian_has_no_error),
        distillation,
        "distillation_error",
        "student(z, gamma_t, context).x",
        "student(z, levels.to(f)[(first // 4) * 2], context).x",
    ),
    Mutant(
        "missing cells in the teacher's steps",
        told(of_distillation.test_missing_cells_take_no_part),
        distillation,
        "distillation_error",
        "z, teacher, student = z * observed, _only(teacher, observed), _only(student, observed)",
        "student = _only(student, observed)",
    ),
    Mutant(
        "latent diffusion whose prior trains the encoder",
        told(of_distillation.test_two_stages_have_the_value_of_one_and_separate_gradients),
        VAE,
        "_two_stage_loss",
        "self.log_prior(z.detach(), noise)",
        "self.log_prior(z, noise)",
    ),
    Mutant(
        "norm forgets the shift",
        told(of_denoisers.test_unet_against_a_slow_one, (1, 8, 8)),
        ResidualBlock,
        "forward",
        "self.second(h, shift=shift, residual",
        "self.second(h, shift=None, residual",
    ),
    Mutant(
        "convolution of the padding's neighbours",
        told(of_denoisers.test_convolution_with_fewer_multiplications),
        winograd,
        "combine_adjoint",
        "rows[:, :-1, 3].add_(v[0][:, 1:], alpha=4)",
        "rows[:, :, 3].add_(v[0], alpha=4)",
    ),
    Mutant(
        "phases of the doubled map exchanged",
        told(of_denoisers.test_doubling_is_repetition_and_convolution),
        Double,
        "forward",
        "pak,qbl,oikl->pqoiab",
        "pak,qbl,oikl->qpoiab",
    ),
    Mutant(
        "variance with the sample's correction",
        told(of_denoisers.test_unet_against_a_slow_one, (1, 8, 8)),
        normconv,
        "group_norm",
        "correction=0",
        "correction=1",
    ),
    # Autoregressive models of sequences, and masked diffusion
    Mutant(
        "attention that sees what comes after",
        told(of_transformer.test_a_cell_depends_on_all_earlier_cells_and_on_no_later_one, Tokens(5, 4)),
        Attention,
        "forward",
        "is_causal=causal",
        "is_causal=False",
    ),
    Mutant(
        "sequence read one place too late",
        contract("total_mass", Transformer, Tokens(3, 3)),
        Transformer,
        "_hidden",
        "x[:, :-1], 0",
        "x[:, 1:], 0",
    ),
    Mutant(
        "cache that forgets where it is",
        told(of_transformer.test_the_walk_with_its_cache_gives_the_laws_of_the_whole_pass, Tokens(5, 4)),
        Walk,
        "advance",
        "self._turns[self._size]",
        "self._turns[0]",
    ),
    Mutant(
        "decoder that forgets where it is",
        told(of_transformer.test_the_step_of_the_decoder_equals_the_parallel_pass_to_the_bit),
        TransformerLayers,
        "step",
        "caches[0].size",
        "0",
    ),
    Mutant(
        "overlapping windows counted twice",
        told(of_transformer.test_a_running_text_is_predicted_once_from_what_came_before, 2),
        sequences,
        "running_nats",
        "nats[done : start + length] = row[done - start :]",
        "nats[start : start + length] = row",
    ),
    Mutant(
        "masked diffusion without its weight 1 / t",
        told(of_masked_diffusion.test_the_bound_is_the_mean_over_all_orders),
        MaskedDiffusion,
        "_chosen",
        "present / k",
        "present / present",
    ),
    Mutant(
        "weight of a step of the masked chain",
        told(of_masked_diffusion.test_the_bound_of_a_chain_of_steps, "cosine"),
        MaskedDiffusion,
        "_chosen",
        "(u - before) / u",
        "(u - before)",
    ),
    Mutant(
        "masked cell that is seen",
        told(of_masked_diffusion.test_the_bound_is_the_mean_over_all_orders),
        MaskedDiffusion,
        "_hidden",
        "torch.where(masked, self.cells.levels, x).long()",
        "x.long()",
    ),
    Mutant(
        "convolution counted at one pixel",
        told(of_glow.test_volume_is_that_of_autograd_and_the_inverse_is_one, "step"),
        GlowStep,
        "forward",
        "log_det * (x.shape[2] * x.shape[3])",
        "log_det",
    ),
    Mutant(
        "shift of ActNorm that is not mixed",
        told(of_glow.test_a_step_is_actnorm_then_convolution_then_coupling),
        GlowStep,
        "_mixed",
        "matrix @ self.norm.shift",
        "self.norm.shift",
    ),
    Mutant(
        "prior of the split left out",
        contract("total_mass", Glow, Reals((3, 1, 1))),
        MultiScale,
        "forward",
        "total + log_det + log_slope",
        "total + log_det",
    ),
    Mutant(
        "split's prior that does not see what stays",
        told(of_glow.test_the_splits_prior_is_the_normal_law_it_says),
        GaussianPrior,
        "_numbers",
        "self.given(given)",
        "self.given(0.0 * given)",
    ),
    Mutant(
        "kernel that is not turned around for the derivative",
        told(of_glow.test_a_coupling_network_a_few_examples_at_a_time, "none"),
        coupling,
        "_turned",
        "weight.flip(2, 3)",
        "weight",
    ),
    Mutant(
        "density of the dequantising noise left out",
        told(of_glow.test_the_law_of_the_noise_has_the_density_it_says, BITS),
        Dequantised,
        "dequantise",
        "width.log().sum() - log_q",
        "width.log().sum() + 0.0 * log_q",
    ),
    Mutant(
        "width of the bins left out of the dequantisation",
        told(of_glow.test_the_law_of_the_noise_has_the_density_it_says, GRID),
        Dequantised,
        "dequantise",
        "width.log().sum() - log_q",
        "-log_q",
    ),
    Mutant(
        "posterior's flow without its volume",
        contract("importance_weights", flowing),
        vae,
        "_draws",
        "log_q - log_det",
        "log_q",
    ),
    Mutant(
        "posterior's flow with the sign of the other direction",
        contract("importance_weights", flowing),
        vae,
        "_draws",
        "log_q - log_det",
        "log_q + log_det",
    ),
    Mutant(
        "log-det left out",
        told(of_bijections.test_volume_is_that_of_autograd, "actnorm"),
        ActNorm,
        "forward",
        "_everywhere(self.log_scale.sum(), x)",
        "_everywhere(0.0 * self.log_scale.sum(), x)",
    ),
    Mutant(
        "log-det with the sign of the other direction",
        told(of_bijections.test_volume_is_that_of_autograd, "affine"),
        Affine,
        "lean",
        "return z, log_slope,",
        "return z, -log_slope,",
    ),
    Mutant(
        "log-det of the way back as of the way there",
        told(of_bijections.test_inverse_comes_back_with_the_opposite_volume, "actnorm"),
        ActNorm,
        "inverse",
        "_everywhere(-self.log_scale.sum(), z)",
        "_everywhere(self.log_scale.sum(), z)",
    ),
    Mutant(
        "mean of the diagonal for its sum",
        told(of_bijections.test_volume_is_that_of_autograd, "LU"),
        LU,
        "log_det",
        ".sum()",
        ".mean()",
    ),
    Mutant(
        "mask that leaks",
        told(of_bijections.test_masked_network_is_triangular_and_walks_to_the_same_numbers, (9, 6), 2, False),
        MaskedLinear,
        "set_degrees",
        "columns <= rows",
        "columns <= rows + 1",
    ),
    Mutant(
        "walk that forgets the order",
        told(of_bijections.test_masked_network_is_triangular_and_walks_to_the_same_numbers, (9, 6), 2, False),
        MaskedMLP,
        "_lean_walk",
        "zip(self.order, ",
        "zip(sorted(self.order), ",
    ),
    Mutant(
        "walk that writes on its biases",
        told(of_bijections.test_the_way_back_of_one_example_leaves_the_parameters_and_can_be_gone_on_from),
        MaskedMLP,
        "_lean_walk",
        ".clone(memory_format=torch.contiguous_format)",
        ".contiguous()",
    ),
    Mutant(
        "walk that forgets the residual",
        told(of_bijections.test_masked_network_is_triangular_and_walks_to_the_same_numbers, (7, 7, 7), 2, True),
        MaskedMLP,
        "_lean_walk",
        "new += h",
        "new += 0 * h",
    ),
    Mutant(
        "context masked out",
        told(of_bijections.test_the_context_matters_and_is_asked_for, "autoregressive of one cell, given"),
        MaskedMLP,
        "shift",
        "self.context(context)",
        "0.0 * self.context(context)",
    ),
    Mutant(
        "written derivative without the masks",
        told(of_bijections.test_autoregressive_steps_written_derivative, "relu", False),
        MaskedMLP,
        "lean_backward",
        "torch._foreach_mul_(of_weights",
        "torch._foreach_mul(of_weights",
    ),
    Mutant(
        "tail with another slope than the box",
        told(of_bijections.test_a_transform_increases_with_a_continuous_slope, "spline"),
        Spline,
        "plain",
        "torch.where(outside, x, y0 + rise)",
        "torch.where(outside, inside + 1.3 * (x - inside), y0 + rise)",
    ),
    Mutant(
        "planar map that is not kept invertible",
        told(of_bijections.test_volume_is_that_of_autograd, "planar"),
        Planar,
        "_pieces",
        "(kept - along)",
        "0.0 * (kept - along)",
    ),
    Mutant(
        "bracket that does not hold the root",
        told(of_bijections.test_inverse_comes_back_with_the_opposite_volume, "logistics"),
        Logistics,
        "inverse",
        "ends.amin(0), ends.amax(0)",
        "ends.amin(0), ends.mean(0)",
    ),
    Mutant(
        "permutation undone by itself",
        told(of_bijections.test_inverse_comes_back_with_the_opposite_volume, "permutation"),
        Permutation,
        "inverse",
        "self.back",
        "self.order",
    ),
    Mutant(
        "standard units without their volume",
        contract("total_mass", NSF, PLANE),
        FlowOverCells,
        "_log_units",
        "- self.unit.log()",
        "- 0.0 * self.unit.log()",
    ),
    Mutant(
        "grid without its spacing",
        contract("total_mass", NSF, Table(columns=(Column("size", "real", resolution=0.5),))),
        FlowOverCells,
        "_log_units",
        "self._log_spacing",
        "0.0 * self._log_spacing",
    ),
    # MADE
    Mutant(
        "MADE: a cell sees itself",
        told(of_made.test_a_cell_sees_the_cells_before_it_and_no_other, "given"),
        MaskedCells,
        "mask",
        "leaving = [place[j] for j in self.outputs]",
        "leaving = [place[j] + 1 for j in self.outputs]",
    ),
    Mutant(
        "MADE: a cell does not see the one before it",
        told(of_made.test_a_cell_sees_the_cells_before_it_and_no_other, "given"),
        MaskedCells,
        "mask",
        "entering = [place[j] + 1 for j in self.inputs]",
        "entering = [place[j] + 2 for j in self.inputs]",
    ),
    Mutant(
        "MADE: members averaged as logarithms",
        told(of_made.test_members_are_mixed_as_probabilities),
        Made,
        "bound",
        "torch.logsumexp(cells.sum(2), 0) - math.log(self.orders)",
        "cells.sum(2).mean(0)",
    ),
    Mutant(
        "MADE: the ensemble's log K dropped",
        contract("total_mass", Made, IMAGE),
        Made,
        "bound",
        "- math.log(self.orders)",
        "",
    ),
    Mutant(
        "MADE: a value recalled from its own count",
        told(of_made.test_recalled_values_are_left_out_of_their_own_law),
        Recalled,
        "log_prob",
        "times, total = (times - 1.0).clamp(min=0.0), total - 1.0",
        "total = total - 1.0",
    ),
    Mutant(
        "MADE: a row among its own neighbours in training",
        told(of_made.test_training_hides_a_row_from_itself),
        Made,
        "_any_order_nats",
        "context, own=x)",
        "context)",
    ),
    Mutant(
        "MADE: neighbours without the normalising factor of their kernel",
        told(of_made.test_neighbours_are_a_kernel_mean_and_a_step_of_the_normal_law),
        Neighbours,
        "_given",
        "precision * rows.square() - precision.log()",
        "precision * rows.square()",
    ),
    Mutant(
        "MADE: no step from the neighbours to the row",
        told(of_made.test_neighbours_are_a_kernel_mean_and_a_step_of_the_normal_law),
        JointNormal,
        "given",
        "y - centre",
        "y - self.mean.double()",
    ),
    Mutant(
        "MADE: a row among the rows that it is held against",
        told(of_made.test_a_memory_is_the_rows_of_the_same_value_but_the_row_itself),
        Memory,
        "codes",
        "if self.training:",
        "if not self.training:",
    ),
    Mutant(
        "many categories: a member without its cluster",
        told(of_many_levels.test_the_law_sums_to_one_and_is_what_is_drawn),
        Clustered,
        "log_prob",
        "Categorical(self.logits).log_prob(clusters) + ",
        "",
    ),
    Mutant(
        "many categories: members of another cluster",
        told(of_many_levels.test_the_law_sums_to_one_and_is_what_is_drawn),
        Clustered,
        "members",
        "self.table[clusters]",
        "self.table[torch.zeros_like(clusters)]",
    ),
    Mutant(
        "MADE: members of a cluster that are not there",
        told(of_made.test_a_column_of_many_codes_is_two_and_its_masses_sum_to_one),
        Member,
        "_possible",
        "never = last &",
        "never = ~last & last &",
    ),
    Mutant(
        "SOAP: steps not turned back",
        told(of_optim_matrices.test_soaps_products_in_bfloat16_err_as_much_as_rounding_may, (5, 7)),
        soap,
        "soap_update",
        "basis, transposed=True)",
        "basis)",
    ),
    Mutant(
        "rounded factors: an exception leaves the process so",
        told(of_optim_matrices.test_rounding_of_factors_ends_with_its_context, "ieee"),
        processor,
        "rounded_factors",
        "try:\n        yield\n    finally:",
        "if True:\n        yield\n    if True:",
    ),
]


# Machinery ---------------------------------------------------------------------------------------------------------


@contextmanager
def injected(mutant: Mutant) -> Iterator[None]:
    """The bug in place of the real function, for the duration of the block."""
    original = inspect.getattr_static(mutant.owner, mutant.function)
    source = textwrap.dedent(inspect.getsource(original))
    found = source.count(mutant.old)
    if found != 1:
        raise LookupError(f"{mutant.name}: expected {mutant.old!r} once in {mutant.function}, found it {found} times")
    # A function within a function that is given ``__class__``, so that super() works as it does in the class.
    body = textwrap.indent(source.replace(mutant.old, mutant.new), "    ")
    code = f"from __future__ import annotations\ndef make(__class__):\n{body}\n    return {mutant.function}\n"
    made: dict[str, Any] = {}
    namespace = inspect.getmodule(mutant.owner).__dict__ if isinstance(mutant.owner, type) else mutant.owner.__dict__
    exec(compile(code, f"<mutant: {mutant.name}>", "exec"), namespace, made)
    places = [mutant.owner, *_importers(mutant)]
    for place in places:
        setattr(place, mutant.function, made["make"](mutant.owner))
    try:
        yield
    finally:
        for place in places:
            setattr(place, mutant.function, original)


def _importers(mutant: Mutant) -> list[Any]:
    """Modules that hold a module's function under its own name, because they imported it."""
    if isinstance(mutant.owner, type):
        return []
    original = getattr(mutant.owner, mutant.function)
    modules = [module for module in list(sys.modules.values()) if module is not mutant.owner]
    return [module for module in modules if getattr(module, "__dict__", {}).get(mutant.function) is original]


@cache
def complaint_without(judge: Judge) -> str | None:
    """What the check says of the real code: None if it passes."""
    return complaint(judge)


def complaint(judge: Judge) -> str | None:
    """What the check says, None if it passes."""
    try:
        judge.run()
    except AssertionError as failure:
        return str(failure)
    return None


def verdict(mutant: Mutant) -> tuple[bool, str]:
    """Whether the mutant is caught by a check that passes without it, and what the check says."""
    innocent = complaint_without(mutant.judge)
    if innocent is not None:
        return False, f"fails without the bug: {innocent}"
    try:
        with injected(mutant):
            found = complaint(mutant.judge)
    except LookupError as gone:
        return False, f"the source has changed; write the mutant anew: {gone}"
    return found is not None, found or "not noticed"


def main(wanted: str = "") -> int:
    """Print the table; the number of survivors."""
    chosen = [mutant for mutant in MUTANTS if wanted.lower() in mutant.name.lower()]
    survivors = 0
    print(f"{'mutant':48} {'caught by':24} what the check says")
    for mutant in chosen:
        caught, said = verdict(mutant)
        survivors += not caught
        print(f"{mutant.name:48} {mutant.judge.check if caught else 'SURVIVES':24} {said[:150]}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return survivors


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(1 if main(*sys.argv[1:2]) else 0)
