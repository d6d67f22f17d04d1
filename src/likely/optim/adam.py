"""Adam and its family: AMSGrad, AdamW, AdaMax, NAdam.

* Kingma & Ba 2014, arXiv 1412.6980: Adam (Algorithm 1), AdaMax (Algorithm 2).
* Reddi, Kale & Kumar 2018, arXiv 1904.09237: AMSGrad (Algorithm 2).
* Loshchilov & Hutter 2017, arXiv 1711.05101: AdamW (Algorithm 2).
* Dozat 2016, "Incorporating Nesterov momentum into Adam": NAdam (Algorithm 2, with its schedule of μ).

Symbols: g gradient, m and v first and second moment, u infinity norm, t number of the step, α learning rate, β₁ and
β₂ ``betas``, ε ``eps``, λ ``weight_decay``.

**Where ε stands** (``epsilon``).  With m̂ = m / (1 − β₁^t) and v̂ = v / (1 − β₂^t) the step is α times

=============  =====================================================  =============================================
``outside``    m̂ / (√v̂ + ε)                                           Algorithm 1; torch.optim
``inside``     m̂ / √(v̂ + ε)
``folded``     √(1 − β₂^t) / (1 − β₁^t) · m / (√v + ε̂), ε̂ = ε         the end of section 2, with ε̂ held constant;
                                                                      TensorFlow, the code of Burda et al. 2015
=============  =====================================================  =============================================

The folded form is Algorithm 1 only if ε̂ = ε √(1 − β₂^t); with a constant ε̂ it takes smaller first steps, which
matters when ε is large.

**What v begins with** (``v_init``): 0 in the paper.  The code of Burda et al. 2015 begins with 1, and corrects the
bias as if it were 0: that is ``Adam(v_init=1.0, epsilon="folded", betas=(0.99, 0.999), eps=1e-4)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from likely.optim.frame import Bucket, Decay, Rounding, UpdateRule, expect, one_minus_power

Epsilon = Literal["outside", "inside", "folded"]

#: Devices for which PyTorch has Adam in one kernel.
FUSED_ON = ("cpu", "cuda", "mps", "xpu")


def adam_update(
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    t: Any,
    beta1: float,
    beta2: float,
    eps: float,
    epsilon: Epsilon = "outside",
    bias_correction: bool = True,
    v_max: list[Tensor] | None = None,
) -> list[Tensor]:
    """Update of Adam, Algorithm 1 of arXiv 1412.6980, in units of the learning rate.

    Args:
        g: gradients.
        m, v: moments, which become the new ones.
        t: number of the step, 1 for the first.
        v_max: with it, AMSGrad: the largest v so far takes the place of v.  Its bias is corrected as that of v is,
            as in PyTorch; the paper has no correction, which is ``bias_correction=False``.

    >>> g, m, v = [torch.tensor([3.0])], [torch.zeros(1)], [torch.zeros(1)]
    >>> round(adam_update(g, m, v, 1, 0.9, 0.999, 0.0)[0].item(), 6)  # the first step is the sign of the gradient
    1.0
    """
    torch._foreach_lerp_(m, g, 1 - beta1)  # m_t = β₁ m_{t−1} + (1 − β₁) g_t
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)  # v_t = β₂ v_{t−1} + (1 − β₂) g_t²
    if v_max is not None:
        torch._foreach_maximum_(v_max, v)
        v = v_max
    c1 = one_minus_power(beta1, t) if bias_correction else 1.0  # m̂ = m / c₁
    c2 = one_minus_power(beta2, t) if bias_correction else 1.0  # v̂ = v / c₂
    if epsilon == "inside":
        below = torch._foreach_div(v, c2)
        torch._foreach_add_(below, eps)
        torch._foreach_sqrt_(below)  # √(v̂ + ε)
    else:
        below = torch._foreach_sqrt(v)
        if epsilon == "outside":
            torch._foreach_div_(below, c2**0.5)
        torch._foreach_add_(below, eps)  # √v̂ + ε, or √v + ε̂
        if epsilon == "folded":
            torch._foreach_div_(below, c2**0.5)
    torch._foreach_mul_(below, c1)
    return list(torch._foreach_div(m, below))


def quick_adam_update(
    g: Tensor, m: Tensor, v: Tensor, t: float, beta1: float, beta2: float, eps: float, epsilon: Epsilon = "outside"
) -> Tensor:
    """:func:`adam_update` of one tensor, by PyTorch's kernel where that serves.

    >>> g, m, v = torch.tensor([3.0]), torch.zeros(1), torch.zeros(1)
    >>> round(quick_adam_update(g, m, v, 1, 0.9, 0.999, 0.0).item(), 6), round(m.item(), 6), round(v.item(), 6)
    (1.0, 0.3, 0.009)
    """
    whole = g.device.type == "cpu" and all(x.is_contiguous() and x.dtype == g.dtype for x in (g, m, v))
    if epsilon != "outside" or not whole or torch.compiler.is_compiling():
        return adam_update([g], [m], [v], t, beta1, beta2, eps, epsilon)[0]
    update = torch.zeros_like(g)  # the kernel moves parameters: these go from 0 by a learning rate of −1
    torch._fused_adam_(
        [update],
        [g],
        [m],
        [v],
        [],
        [torch.tensor(float(t))],
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return update


def adamax_update(
    g: list[Tensor], m: list[Tensor], u: list[Tensor], t: Any, beta1: float, beta2: float, eps: float
) -> list[Tensor]:
    """Update of AdaMax, Algorithm 2 of arXiv 1412.6980, in units of the learning rate; m and u become the new ones.

    The paper has no ε: ``eps=0`` is its algorithm, in which an element that never had a gradient does not move.

    >>> g, m, u = [torch.tensor([3.0, 0.0])], [torch.zeros(2)], [torch.zeros(2)]
    >>> adamax_update(g, m, u, 1, 0.9, 0.999, 0.0)[0].tolist()
    [1.0, 0.0]
    """
    torch._foreach_lerp_(m, g, 1 - beta1)  # m_t = β₁ m_{t−1} + (1 − β₁) g_t
    size = torch._foreach_abs(g)
    if eps:
        torch._foreach_add_(size, eps)
    torch._foreach_mul_(u, beta2)
    torch._foreach_maximum_(u, size)  # u_t = max(β₂ u_{t−1}, |g_t| + ε)
    update = torch._foreach_div(
        m, u if eps else torch._foreach_clamp_min(u, torch.finfo(u[0].dtype).tiny)
    )  # 0 / 0 is 0
    torch._foreach_div_(update, one_minus_power(beta1, t))  # m / ((1 − β₁^t) u)
    return list(update)


def nadam_mu(t: Any, beta1: float, psi: float) -> Any:
    """μ_t = β₁ (1 − ½ 0.96^{tψ}) of NAdam."""
    return beta1 * (1 - 0.5 * 0.96 ** (t * psi))


def nadam_update(
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    product: Any,
    t: Any,
    beta1: float,
    beta2: float,
    eps: float,
    psi: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Update of NAdam (Dozat 2016, Algorithm 2), in units of the learning rate; m and v become the new ones.

    Args:
        product: μ₁ … μ_t.

    Returns:
        The terms of the gradient and of the momentum, whose sum is the update.
    """
    mu, mu_next = nadam_mu(t, beta1, psi), nadam_mu(t + 1, beta1, psi)
    torch._foreach_lerp_(m, g, 1 - beta1)  # m_t = β₁ m_{t−1} + (1 − β₁) g_t
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)  # v_t = β₂ v_{t−1} + (1 − β₂) g_t²
    below = torch._foreach_sqrt(v)
    torch._foreach_div_(below, one_minus_power(beta2, t) ** 0.5)
    torch._foreach_add_(below, eps)
    now, ahead = torch._foreach_div(g, below), torch._foreach_div(m, below)
    torch._foreach_mul_(now, (1 - mu) / (1 - product))  # (1 − μ_t) g / (1 − Π_t μ) / (√v̂ + ε)
    torch._foreach_mul_(ahead, mu_next / (1 - product * mu_next))  # μ_{t+1} m / (1 − Π_{t+1} μ) / (√v̂ + ε)
    return list(now), list(ahead)


class _Moments(UpdateRule):
    """The options that the family has in common."""

    def check(self, group: dict[str, Any]) -> None:
        expect(group, "betas", lambda b: len(b) == 2 and all(0 <= x < 1 for x in b), "two numbers from 0 to below 1")
        expect(group, "eps", lambda value: value >= 0, "a number, zero or more")


class Adam(_Moments):
    """Adam (Kingma & Ba 2014, arXiv 1412.6980, Algorithm 1): θ ← θ − α m̂ / (√v̂ + ε), and AMSGrad.

    Where PyTorch has the step in one kernel and no option asks for more, that kernel is called: the step is then that
    of ``torch.optim.Adam(fused=True)`` to the bit, and as fast (measured on a CPU: 1.00 of its time on 9 and 11 million
    parameters in large tensors, where memory is the limit, and 0.7 on 200 small ones).  ``fused=False`` computes by
    the formulas of this file, which differs by rounding and takes 3.4 times as long.

    Args:
        params: parameters or groups of them.
        lr: α.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        decay: ``l2`` (a penalty in the loss), ``lr`` or ``schedule`` (decoupled), see
            :data:`likely.optim.frame.Decay`.
        epsilon: ``outside`` the root (Algorithm 1), ``inside`` it, or ``folded``: see the module.
        bias_correction: whether the moments' bias towards their first values is corrected.
        amsgrad: whether the largest v so far takes the place of v (Reddi et al. 2018).
        v_init: what v begins with.
        fused: whether to call PyTorch's kernel: None where it can be, False never, True or else ``ValueError``.
        maximize, rounding, seed, capturable: see :class:`likely.optim.frame.UpdateRule`.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = Adam([w], lr=0.1)
    >>> w.grad = torch.tensor([5.0, -0.01])
    >>> optimizer.step()
    >>> [round(x, 4) for x in w.tolist()]                         # the scale of the gradient does not matter
    [0.9, 1.1]
    """

    names_in_torch = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "v_max"}  # noqa: RUF012

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decay: Decay = "l2",
        epsilon: Epsilon = "outside",
        bias_correction: bool = True,
        amsgrad: bool = False,
        v_init: float = 0.0,
        fused: bool | None = None,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "epsilon": epsilon,
            "bias_correction": bias_correction,
            "amsgrad": amsgrad,
            "v_init": v_init,
            "fused": fused,
        }
        super().__init__(
            params,
            own,
            weight_decay=weight_decay,
            decay=decay,
            maximize=maximize,
            rounding=rounding,
            seed=seed,
            capturable=capturable,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        expect(group, "epsilon", lambda value: value in get_args(Epsilon), f"one of {', '.join(get_args(Epsilon))}")
        expect(group, "v_init", lambda value: value >= 0, "a number, zero or more")

    def moments(self, group: dict[str, Any]) -> dict[str, float]:
        return {"m": 0.0, "v": group["v_init"]} | ({"v_max": 0.0} if group["amsgrad"] else {})

    def update(self, bucket: Bucket, group: dict[str, Any]) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        return adam_update(
            bucket.gradients,
            bucket.state["m"],
            bucket.state["v"],
            bucket.t,
            beta1,
            beta2,
            eps=group["eps"],
            epsilon=group["epsilon"],
            bias_correction=group["bias_correction"],
            v_max=bucket.state["v_max"] if group["amsgrad"] else None,
        )

    def advance(self, bucket: Bucket, group: dict[str, Any]) -> None:
        if group["fused"] is not False:
            if _fusible(bucket, group):
                return _fused_step(bucket, group)
            if group["fused"]:
                raise ValueError(
                    "fused: expected contiguous float32 or float64 parameters and gradients, epsilon='outside' and "
                    "bias_correction=True, got something else; use fused=None"
                )
        super().advance(bucket, group)
        return None


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101, Algorithm 2).

    :class:`Adam` with other defaults.  ``decay="lr"`` is PyTorch's scaling, θ ← θ − α_t λ θ; ``decay="schedule"`` the
    paper's, θ ← θ − η_t λ θ, in which η_t = α_t / α is the schedule alone.  λ = 0.01 of the first is λ = 0.01 α of
    the second.

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> w.grad = torch.zeros(1)
    >>> AdamW([w], lr=0.1, weight_decay=0.5).step()
    >>> w.item()
    0.949999988079071
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        decay: Decay = "lr",
        epsilon: Epsilon = "outside",
        bias_correction: bool = True,
        amsgrad: bool = False,
        v_init: float = 0.0,
        fused: bool | None = None,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decay=decay,
            epsilon=epsilon,
            bias_correction=bias_correction,
            amsgrad=amsgrad,
            v_init=v_init,
            fused=fused,
            maximize=maximize,
            rounding=rounding,
            seed=seed,
            capturable=capturable,
        )


class AdaMax(_Moments):
    """AdaMax (Kingma & Ba 2014, arXiv 1412.6980, Algorithm 2): θ ← θ − α / (1 − β₁^t) · m / u.

    Args:
        eps: ε, added to |g| as PyTorch does; 0 is the paper's algorithm.
        lr, betas, weight_decay, decay: as in :class:`Adam`.
        maximize, rounding, seed, capturable: see :class:`likely.optim.frame.UpdateRule`.
    """

    names_in_torch = {"exp_avg": "m", "exp_inf": "u"}  # noqa: RUF012

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decay: Decay = "l2",
        maximize: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps},
            weight_decay=weight_decay,
            decay=decay,
            maximize=maximize,
            rounding=rounding,
            seed=seed,
            capturable=capturable,
        )

    def moments(self, group: dict[str, Any]) -> dict[str, float]:
        return {"m": 0.0, "u": 0.0}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> list[Tensor]:
        m, u = bucket.state["m"], bucket.state["u"]
        beta1, beta2 = group["betas"]
        return adamax_update(bucket.gradients, m, u, bucket.t, beta1, beta2, eps=group["eps"])


class NAdam(_Moments):
    """Adam with Nesterov's momentum (Dozat 2016, Algorithm 2), whose μ_t = β₁ (1 − ½ 0.96^{tψ}) rises to β₁.

    Args:
        momentum_decay: ψ.
        lr, betas, eps, weight_decay, decay: as in :class:`Adam`.
        maximize, rounding, seed, capturable: see :class:`likely.optim.frame.UpdateRule`.
    """

    names_in_torch = {"exp_avg": "m", "exp_avg_sq": "v"}  # noqa: RUF012
    clock = {"step": 0.0, "mu_product": 1.0}  # noqa: RUF012

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        *,
        decay: Decay = "l2",
        maximize: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "momentum_decay": momentum_decay},
            weight_decay=weight_decay,
            decay=decay,
            maximize=maximize,
            rounding=rounding,
            seed=seed,
            capturable=capturable,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        expect(group, "momentum_decay", lambda value: value >= 0, "a number, zero or more")

    def tick(self, clock: dict[str, Tensor], group: dict[str, Any]) -> None:
        super().tick(clock, group)
        counted_there = group["capturable"] or torch.compiler.is_compiling()
        t = clock["step"] if counted_there else clock["step"].item()
        mu = nadam_mu(t, group["betas"][0], group["momentum_decay"])
        clock["mu_product"].mul_(mu)

    def moments(self, group: dict[str, Any]) -> dict[str, float]:
        return {"m": 0.0, "v": 0.0}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> tuple[list[Tensor], ...]:
        beta1, beta2 = group["betas"]
        product = bucket.clock["mu_product"]
        return nadam_update(
            bucket.gradients,
            bucket.state["m"],
            bucket.state["v"],
            product.view(()) if isinstance(bucket.t, Tensor) else product.item(),
            bucket.t,
            beta1,
            beta2,
            eps=group["eps"],
            psi=group["momentum_decay"],
        )


def _fusible(bucket: Bucket, group: dict[str, Any]) -> bool:
    """Whether PyTorch's kernel makes the step that the options ask for."""
    if group["epsilon"] != "outside" or not group["bias_correction"] or torch.compiler.is_compiling():
        return False
    device, dtype = bucket.parameters[0].device, bucket.parameters[0].dtype
    if device.type not in FUSED_ON or dtype not in (torch.float32, torch.float64):
        return False
    return all(
        p.is_contiguous() and g.is_contiguous() and g.dtype == dtype
        for p, g in zip(bucket.parameters, bucket.gradients)
    )


def _fused_step(bucket: Bucket, group: dict[str, Any]) -> None:
    rate, weight_decay = group["lr"], group["weight_decay"]
    if isinstance(rate, Tensor) and not group["capturable"]:
        rate = float(rate)
    if group["decay"] == "schedule":  # the kernel multiplies by the learning rate
        weight_decay = weight_decay / group["initial_lr"]
    kernel = torch._fused_adam_ if group["decay"] == "l2" else torch._fused_adamw_
    beta1, beta2 = group["betas"]
    step = bucket.clock["step"]
    device = bucket.parameters[0].device
    if device.type != "cpu" and step.device != device:
        step = step.to(device, non_blocking=True)
    kernel(
        bucket.parameters,
        bucket.gradients,
        bucket.state["m"],
        bucket.state["v"],
        bucket.state.get("v_max", []),
        [step] * len(bucket.parameters),
        lr=rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )
