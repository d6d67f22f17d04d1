"""A training step, and a draw, of Glow against normflows' of the same size, in one run.

    python benchmarks/glow_step.py --workdir DIR
    python benchmarks/glow_step.py --workdir DIR --out benchmarks/results/glow_step

Glow of 3 levels of ``steps`` steps with LU-decomposed convolutions, affine coupling and coupling networks of ``width``
channels, on 3 × 32 × 32 images; a step is the log-likelihood of a batch, its gradient, and Adam with lr 1e-3 (PyTorch's
fused one for all).  Data are smooth noise, the same for all: speed does not depend on it, and the mean log-likelihood
of the last steps is shown so that one sees that the rivals learn alike.

Each rival is a process of its own and makes some steps when it is told to; they take turns (turns.py).  Every round
gives a ratio, the table has medians over rounds.  The clock is processor time, one thread.  normflows 1.7.3 is
installed in an environment of its own under --workdir.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turns import Turns, machine, play, playing, versions, write_record

LEVELS, SHAPE = 3, (3, 32, 32)
RIVALS = {
    "normflows": "normflows 1.7.3",
    "likely": "likely, float32",
    "likely-bf16": "likely, coupling networks in bfloat16",
}


def images(n: int) -> Any:
    """Smooth random images of whole numbers 0 … 255, dequantised: float32, shape (n, 3, 32, 32)."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 3, 8, 8, generator=generator)
    fine = F.interpolate(coarse, scale_factor=4, mode="bilinear") + 0.1 * torch.randn(n, *SHAPE, generator=generator)
    return ((128 + 50 * fine).clamp(0, 255).floor() + torch.rand(n, *SHAPE, generator=generator)) / 256 - 0.5


def take_part(rival: str, steps: int, width: int, batch: int, rounds: int, each: int) -> None:
    """Be a rival: ``rounds`` turns of ``each`` training steps, then ``rounds`` turns of a draw of ``batch`` images."""
    turns = Turns()
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = images(batch * 8)
    score, draw, parameters = normflows(steps, width, x) if rival == "normflows" else likely(steps, width, x)
    optimiser = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    count = sum(p.numel() for p in parameters)

    def step(number: int) -> float:
        rows = x[number % 8 * batch : (number % 8 + 1) * batch]
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=rival.endswith("bf16")):
            loss = -score(rows).mean()
        loss.backward()
        optimiser.step()
        return -float(loss.detach())

    for number in range(2):
        step(number)
    turns.ready()
    for turn in range(rounds):
        turns.wait()
        last = [step(turn * each + number) for number in range(each)]
        turns.done(steps=each, nats=statistics.mean(last))
    with torch.no_grad():
        draw(2)
        for _ in range(rounds):
            turns.wait()
            draw(batch)
            turns.done(images=batch)
    turns.end(versions=versions(), parameters=count)


def normflows(steps: int, width: int, x: Any) -> tuple[Any, Any, list[Any]]:
    """Log-likelihood, sampler and parameters of normflows' Glow, as its own example builds it."""
    import normflows as nf

    channels, height, side = SHAPE
    bases, merges, flows = [], [], []
    for level in range(LEVELS):
        size = channels * 2 ** (LEVELS + 1 - level)
        flows.append([nf.flows.GlowBlock(size, width, split_mode="channel", scale=True) for _ in range(steps)])
        flows[-1].append(nf.flows.Squeeze())
        if level:
            merges.append(nf.flows.Merge())
            shape = (channels * 2 ** (LEVELS - level), height // 2 ** (LEVELS - level), side // 2 ** (LEVELS - level))
        else:
            shape = (channels * 2 ** (LEVELS + 1), height // 2**LEVELS, side // 2**LEVELS)
        bases.append(nf.distributions.GlowBase(shape))
    model = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    model.log_prob(x[:64], None)  # the first batch sets its ActNorms
    return lambda rows: model.log_prob(rows, None), lambda n: model.sample(n), list(model.parameters())


def likely(steps: int, width: int, x: Any) -> tuple[Any, Any, list[Any]]:
    """Log-likelihood, sampler and parameters of likely's Glow."""
    from likely.contract import Reals
    from likely.models.glow import Glow

    model = Glow(Reals(SHAPE), levels=LEVELS, depth=steps, width=width)
    model.initialise([(x[:64], None)])
    return lambda rows: model.bound(rows).nats, lambda n: model.sample(n), list(model.parameters())


def environment(workdir: Path) -> str:
    """The interpreter of an environment with normflows."""
    folder = workdir / "venv"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in ("torch==2.13.0", "normflows==1.7.3"):
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    return str(python)


def measure(arguments: argparse.Namespace, steps: int, width: int) -> dict[str, Any]:
    """One architecture: medians over rounds, and of the ratios to normflows within a round."""
    own = [sys.executable, str(Path(__file__).resolve())]
    rival = [environment(arguments.workdir), str(Path(__file__).resolve())]
    common = ["--batch", str(arguments.batch), "--rounds", str(arguments.rounds), "--each", str(arguments.each)]
    size = ["--steps", str(steps), "--width", str(width)]
    commands = {name: [*(rival if name == "normflows" else own), "--player", name, *size, *common] for name in RIVALS}
    with playing(commands, 1, arguments.workdir / "logs") as players:
        training = play(players, arguments.rounds)
        drawing = play(players, arguments.rounds)
        ends = {name: player.end() for name, player in players.items()}
    rows = []
    for name in RIVALS:
        cost = [turn["cpu"] / turn["steps"] for turn in training[name]]
        rows.append({
            "rival": name,
            "step_seconds": statistics.median(cost),
            "speed_up": ratio(training, name),
            "draw_seconds": statistics.median(turn["cpu"] for turn in drawing[name]),
            "draw_speed_up": ratio(drawing, name),
            "nats": training[name][-1]["nats"],
            "peak_mib": round(ends[name]["peak_bytes"] / 2**20),
            "parameters": ends[name]["parameters"],
        })  # fmt: skip
    return {"steps": steps, "width": width, "rows": rows, "versions": {n: e["versions"] for n, e in ends.items()}}


def ratio(turns: dict[str, list[dict[str, Any]]], name: str) -> float:
    """Median over rounds of normflows' time over this rival's."""
    return statistics.median(a["cpu"] / b["cpu"] for a, b in zip(turns["normflows"], turns[name]))


def table(results: dict[str, Any]) -> str:
    lines = [
        "# A training step of Glow",
        "",
        f"Command: `{results['command']}`.  {results['date']}, 1 thread, processor time; batch {results['batch']}, "
        f"{results['rounds']} rounds of {results['each']} steps: medians, and medians of the ratios within a round.",
        f"Machine: {results['machine']['processor']}, {results['machine']['cores']} cores, "
        f"{results['machine']['vector_units']}.",
        "",
        "Images of 3 × 32 × 32, 3 levels.  ×: time of normflows ÷ own time.  nats: mean log-likelihood in the last round.",
    ]
    for measured in results["measured"]:
        lines += [
            "",
            f"## {measured['steps']} steps a level, {measured['width']} channels",
            "",
            "| | parameters | ms a step | × | ms a draw of a batch | × | nats | peak MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {RIVALS[row['rival']]} | {row['parameters']:,} | {1e3 * row['step_seconds']:.0f} | "
            f"{row['speed_up']:.2f} | {1e3 * row['draw_seconds']:.0f} | {row['draw_speed_up']:.2f} | "
            f"{row['nats']:.0f} | {row['peak_mib']:,} |"
            for row in measured["rows"]
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--steps", type=int, nargs="+", default=[4])
    parser.add_argument("--width", type=int, nargs="+", default=[128])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", type=int, default=8, help="training steps of a turn")
    parser.add_argument("--player", choices=RIVALS, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.player:
        take_part(
            arguments.player, arguments.steps[0], arguments.width[0], arguments.batch, arguments.rounds, arguments.each
        )
        return
    if arguments.workdir is None:
        parser.error("--workdir is needed")
    arguments.workdir = arguments.workdir.resolve()
    measured = [measure(arguments, *size) for size in zip(arguments.steps, arguments.width)]
    results = {
        "command": "python benchmarks/glow_step.py --workdir WORKDIR",
        "date": datetime.now(UTC).date().isoformat(),
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "each": arguments.each,
        "machine": machine(),
        "measured": measured,
    }
    text = table(results)
    print(text)
    if arguments.out is not None:
        write_record(arguments.out, results, text)
    shutil.rmtree(arguments.workdir / "logs", ignore_errors=True)


if __name__ == "__main__":
    main()
