"""Where Adam fails and AMSGrad does not: the one-dimensional example of Reddi, Kale & Kumar 2018 (arXiv 1904.09237).

Paper, section 3 (Theorem 1) and section 5 (synthetic experiment, Figure 1): on x ∈ [−1, 1], whose best point is x = −1,

* online: f_t(x) = 1010 x if t mod 101 = 1, else −10 x;
* stochastic: f_t(x) = 1010 x with probability 0.01, else −10 x;

with β₁ = 0.9, β₂ = 0.99 and a learning rate that falls as 1 / √t, Adam goes to x = 1, the worst point, and AMSGrad to
x = −1.  The rare large gradient is divided by a √v that it has itself enlarged and that is forgotten before the next.

Here: both settings, the same β, α_t = 2 / √t and 150,000 steps; the stochastic setting in 32 runs at once (elements of
one parameter).  The regret is Σ (f_t(x_t) − f_t(−1)) / t.

    python papers/amsgrad_counterexample.py
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor

from likely.optim import Adam
from records import RESULTS, provenance, write

#: Steps of the two settings, and runs of the stochastic one.
ONLINE, STOCHASTIC, RUNS, ALPHA, SEED = 150_000, 150_000, 32, 2.0, 0


def gradients(setting: str, steps: int, runs: int) -> Any:
    """The slope of f_t, t = 1, 2, …, in every run."""
    generator = torch.Generator().manual_seed(SEED)
    for t in range(1, steps + 1):
        if setting == "online":
            yield torch.full((runs,), 1010.0 if t % 101 == 1 else -10.0)
        else:
            rare = torch.rand(runs, generator=generator) < 0.01
            yield torch.where(rare, 1010.0, -10.0)


def run(setting: str, steps: int, runs: int, amsgrad: bool) -> dict[str, list[Any]]:
    """Mean of x over the runs and mean regret a step, at steps that are evenly spaced on a logarithmic scale."""
    x = torch.nn.Parameter(torch.zeros(runs))
    optimizer = Adam([x], betas=(0.9, 0.99), eps=0.0, amsgrad=amsgrad, bias_correction=not amsgrad)
    regret: Tensor = torch.zeros(runs, dtype=torch.float64)
    seen = sorted({round(steps ** (i / 200)) for i in range(201)})
    found: dict[str, list[Any]] = {"step": [], "x": [], "regret": []}
    for t, slope in enumerate(gradients(setting, steps, runs), 1):
        optimizer.param_groups[0]["lr"] = ALPHA / math.sqrt(t)
        regret += (slope * (x.detach() + 1)).double()
        x.grad = slope
        optimizer.step()
        x.data.clamp_(-1.0, 1.0)
        if t in seen[len(found["step"]) : len(found["step"]) + 1]:
            found["step"].append(t)
            found["x"].append(round(float(x.detach().mean()), 4))
            found["regret"].append(round(float(regret.mean()) / t, 4))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="fewer steps, for a trial that writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, rows = time.process_time(), []
    for setting, steps, runs in (("online", ONLINE, 1), ("stochastic", STOCHASTIC, RUNS)):
        for amsgrad in (False, True):
            found = run(setting, arguments.steps or steps, runs, amsgrad)
            rows.append({"setting": setting, "rule": "AMSGrad" if amsgrad else "Adam", "runs": runs, **found})
            print(setting, rows[-1]["rule"], found["x"][-1], found["regret"][-1], flush=True)
    if arguments.steps is None:
        draw(rows)
        content = {"run": provenance(time.process_time() - start), "rows": rows}
        write("amsgrad_counterexample", content, table(rows))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Where the two end, as Markdown."""
    lines = [
        "# Adam and AMSGrad on the counter-example of Reddi, Kale & Kumar",
        "",
        "Mean of x over the runs, and mean regret a step, after all steps; the best point is x = −1, of regret 0.",
        "Written by `papers/amsgrad_counterexample.py`.",
        "",
        "![x by step](amsgrad_counterexample.png)",
        "",
        "| setting | rule | runs | steps | x, paper | x | regret a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = "−1" if row["rule"] == "AMSGrad" else "1"
        lines.append(
            f"| {row['setting']} | {row['rule']} | {row['runs']} | {row['step'][-1]:,} | {paper} | "
            f"{row['x'][-1]:.3f} | {row['regret'][-1]:.3f} |"
        )
    return lines


def draw(rows: list[dict[str, Any]]) -> None:
    """x and regret by step, as a PNG beside the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8, 5), sharex="col")
    for row in rows:
        column = 0 if row["setting"] == "online" else 1
        colour = "tab:red" if row["rule"] == "Adam" else "tab:blue"
        for axis, what in zip(axes[:, column], ("x", "regret")):
            axis.semilogx(row["step"], row[what], color=colour, label=row["rule"])
            axis.set_ylabel({"x": "x (best: −1)", "regret": "regret a step"}[what])
        axes[0, column].set_title(row["setting"], fontsize=9)
        axes[1, column].set_xlabel("step")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "amsgrad_counterexample.png", dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
