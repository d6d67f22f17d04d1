"""What every model must satisfy, as checks that anyone can run on their own class.

``check_model(MyModel)`` builds the smallest instance of the model on a tiny space of every kind it declares, trains
it for a moment on strongly *dependent* data of known density, and holds it against the contract: exponentials of the
bound sum to one over the whole space (at most one for a lower bound), samples have the model's own frequencies,
nothing beats the entropy of the source, an example's value is its own, a saved model is the same model,
a codec gives every bit back at the length that the bound promises.

Every statistical test has a fixed seed, and a threshold that a correct model crosses with probability below 10⁻⁵.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Literal

import torch

from likely.checks import behaviour, codec, probability
from likely.checks.cases import Case, cases_of
from likely.checks.outcome import CheckFailed, CheckResult, Skipped, Status
from likely.checks.source import Source
from likely.contract import Model, Space

__all__ = ["CheckFailed", "CheckResult", "Source", "check_model", "check_names"]

_CHECKS: dict[str, Callable[[Case], str]] = {
    check.__name__: check
    for check in (
        behaviour.construction,
        behaviour.validation,
        behaviour.parts,
        behaviour.determinism,
        behaviour.batch_invariance,
        probability.total_mass,
        probability.missing_cells,
        probability.importance_weights,
        probability.cross_entropy,
        behaviour.learning,
        probability.samples,
        probability.sample_frequencies,
        probability.conditioning,
        probability.imputation,
        behaviour.gradients,
        behaviour.save_load,
        behaviour.resume,
        behaviour.encoding,
        behaviour.column_nats,
        codec.codec_round_trip,
        codec.codec_length,
        codec.codec_absent_cells,
        codec.codec_frequencies,
    )
}


def check_model(
    model: type[Model] | Model,
    space: Space | None = None,
    condition: Space | None = None,
    *,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    on_fail: Literal["raise", "record"] = "raise",
    seed: int = 0,
    verbose: bool = False,
) -> list[CheckResult]:
    """Hold a model against the contract.

    >>> import math
    >>> from likely.contract import Binary, Bound
    >>> class Coins(Model):
    ...     "Every cell is a fair coin."
    ...     spaces = (Binary,)
    ...     def bound(self, x, condition=None, noise=None):
    ...         return Bound("exact", {"coins": torch.full((len(x),), self.space.dims * math.log(0.5))})
    ...     def sample(self, n, condition=None, noise=None):
    ...         return (noise.uniform((n, *self.space.shape)) < 0.5).float()
    >>> results = check_model(Coins, Binary((2, 3)), only=["samples", "parts"])
    >>> [(result.check, result.status, result.detail) for result in results]
    [('parts', 'passed', 'exact: coins -4.159'), ('samples', 'passed', '512 samples lie in the space')]

    Args:
        model: a class, checked on ``model.tiny(space, condition)``; or an instance, which stands for its class, spaces
            and options and is not changed.
        space: the space to check it on; by default tiny ones of every kind that the class declares, with and without
            missing cells, and with and without a condition where it takes one.
        condition: the space of the condition, together with ``space``.
        only: names of the checks to run; by default all (:func:`check_names`).
        skip: names of checks to leave out.
        on_fail: ``raise`` stops at the first failure; ``record`` gives it back among the results.
        seed: of the data, the training and the noise; the global random state is left as it was.
        verbose: print every result as it comes.

    Raises:
        CheckFailed: an ``AssertionError`` whose message names the check.
        ValueError: a name in ``only`` or ``skip`` is not one of a check.
    """
    only, skip = None if only is None else list(only), list(skip)
    for name in [*(only or ()), *skip]:
        if name not in _CHECKS:
            raise ValueError(f"only, skip: expected names of checks ({', '.join(_CHECKS)}), got {name!r}")
    if on_fail not in ("raise", "record"):
        raise ValueError(f"on_fail: expected 'raise' or 'record', got {on_fail!r}")
    results: list[CheckResult] = []
    wanted = [name for name in _CHECKS if name not in skip and (only is None or name in only)]
    for case in cases_of(model, space, condition, seed):
        for name in wanted if isinstance(case, Case) else ["construction"]:
            result = _run(name, case) if isinstance(case, Case) else case
            results.append(result)
            if verbose:
                print(f"{result.status:8}{result.model} on {result.case}: {name}: {result.detail}", flush=True)
            if result.status == "failed" and on_fail == "raise":
                raise CheckFailed(f"{result.model} on {result.case}: {name}: {result.detail}")
    return results


def check_names() -> list[str]:
    """Names of the checks, in the order in which they run.

    >>> check_names()[:3]
    ['construction', 'validation', 'parts']
    """
    return list(_CHECKS)


def _run(name: str, case: Case) -> CheckResult:
    started = time.perf_counter()
    status: Status = "passed"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        try:
            detail = _CHECKS[name](case)
        except Skipped as reason:
            status, detail = "skipped", str(reason)
        except CheckFailed as failure:
            status, detail = "failed", str(failure)
        except Exception as error:
            status, detail = "failed", f"{type(error).__name__}: {error}"
    return CheckResult(name, case.model_name, case.title, status, detail, time.perf_counter() - started)
