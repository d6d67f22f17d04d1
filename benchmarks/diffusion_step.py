"""A training step of one U-Net here, in diffusers and, of its own design, in denoising-diffusion-pytorch, in one run.

    python benchmarks/diffusion_step.py --rivals PYTHON --out benchmarks/results/diffusion_step

The U-Net is that of DDPM at 32 x 32: 64 and 128 channels, two residual blocks at each of two resolutions, attention in
the middle, 3.66 million parameters; a batch of 16; float32; one thread.  A step is forward, backward and AdamW (fused,
PyTorch's).  diffusers' weights are put into our network first, and both must give the same output: it is the same
function.  denoising-diffusion-pytorch has a U-Net of its own design (another norm, linear attention), here with fewer
parameters.

Each rival is a process of its own and makes one step when it is told to; they take turns, the clock is the processor
time of the process, and the table has medians of ratios over rounds, so that what else the machine does falls on all
alike.  ``PYTHON`` is the interpreter of an environment with torch, diffusers and denoising-diffusion-pytorch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turns import Turns, machine, play, playing, versions, write_record

BATCH, SIZE, WIDTH, SCALES, DEPTH, GROUPS = 16, 32, 64, (1, 2), 2, 16
RIVALS = {
    "likely": "likely",
    "diffusers": "diffusers, as its users run it",
    "diffusers-last": "diffusers, channels last",
    "ddp": "denoising-diffusion-pytorch, as its users run it",
    "ddp-last": "denoising-diffusion-pytorch, channels last",
}


def take_part(rival: str, workdir: Path, rounds: int, bf16: bool) -> None:
    """Be a rival."""
    turns = Turns()
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, call = {"likely": ours, "diffusers": diffusers, "ddp": ddp}[rival.split("-")[0]]()
    memory_format = torch.channels_last if rival.endswith("last") else torch.contiguous_format
    network = network.to(memory_format=memory_format)
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=memory_format)
    level = torch.rand(BATCH)
    if rival in ("likely", "diffusers"):
        same_function(rival, network, call, x, level, workdir)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = call(network, x, level)
        loss = (out.float() - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    step()
    turns.ready()
    for _ in range(rounds):
        turns.wait()
        step()
        turns.done()
    turns.end(parameters=sum(p.numel() for p in network.parameters()), versions=versions())


Made = tuple[Any, Callable[..., Any]]


def ours() -> Made:
    from likely.networks.denoisers import denoiser

    network = denoiser("unet", (3, SIZE, SIZE), width=WIDTH, scales=SCALES, depth=DEPTH, groups=GROUPS)
    return network, lambda network, x, level: network(x, level)


def diffusers() -> Made:
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=DEPTH,
        block_out_channels=tuple(WIDTH * scale for scale in SCALES),
        down_block_types=("DownBlock2D",) * len(SCALES),
        up_block_types=("UpBlock2D",) * len(SCALES),
        norm_num_groups=GROUPS,
        attention_head_dim=WIDTH * SCALES[-1],
        freq_shift=1,
        flip_sin_to_cos=False,
    )
    return network, lambda network, x, level: network(x, 1000.0 * level).sample


def ddp() -> Made:
    from unittest import mock

    for name in ("torchvision", "pytorch_fid"):  # which its trainer uses and its network does not
        for part in ("", ".transforms", ".utils", ".fid_score", ".inception"):
            sys.modules[name + part] = mock.MagicMock()
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet

    network = Unet(dim=WIDTH, dim_mults=SCALES, channels=3, flash_attn=True)
    return network, lambda network, x, level: network(x, 1000.0 * level)


def same_function(rival: str, network: Any, call: Callable[..., Any], x: Any, level: Any, workdir: Path) -> None:
    """diffusers writes its weights and an output, likely reads the weights and must give that output."""
    import torch

    path = workdir / "diffusers.pt"
    if rival == "diffusers":
        with torch.no_grad():
            torch.save({"weights": network.state_dict(), "x": x, "level": level, "y": call(network, x, level)}, path)
        return
    saved = torch.load(path, weights_only=True)
    network.load_state_dict(translated(saved["weights"]), strict=False)
    with torch.no_grad():
        error = (call(network, saved["x"], saved["level"]) - saved["y"]).abs().max() / saved["y"].abs().max()
    assert error < 1e-4, f"another function than diffusers': outputs differ by {error:.1e}"


def translated(theirs: dict[str, Any]) -> dict[str, Any]:
    """diffusers' weights under our names."""
    import torch

    found: dict[str, Any] = {}
    shifts: list[Any] = []
    biases: list[Any] = []

    def copy(new: str, old: str) -> None:
        found.update({f"{new}.{kind}": theirs[f"{old}.{kind}"] for kind in ("weight", "bias")})

    def norm(new: str, old: str) -> None:
        found.update({f"{new}.gain": theirs[f"{old}.weight"], f"{new}.offset": theirs[f"{old}.bias"]})

    def block(new: str, old: str) -> None:
        norm(f"{new}.first", f"{old}.norm1")
        norm(f"{new}.second", f"{old}.norm2")
        found[f"{new}.first.weight"] = theirs[f"{old}.conv1.weight"]
        copy(f"{new}.second", f"{old}.conv2")
        shifts.append(theirs[f"{old}.time_emb_proj.weight"])
        biases.append(theirs[f"{old}.time_emb_proj.bias"] + theirs[f"{old}.conv1.bias"])
        if f"{old}.conv_shortcut.weight" in theirs:
            found[f"{new}.shortcut.weight"] = theirs[f"{old}.conv_shortcut.weight"].flatten(1)
            found[f"{new}.shortcut.bias"] = theirs[f"{old}.conv_shortcut.bias"]

    copy("input", "conv_in")
    copy("embedding.first", "time_embedding.linear_1")
    copy("embedding.second", "time_embedding.linear_2")
    number = 0
    for resolution in range(len(SCALES)):
        if resolution:
            copy(f"down.{number}.convolution", f"down_blocks.{resolution - 1}.downsamplers.0.conv")
            number += 1
        for layer in range(DEPTH):
            block(f"down.{number}.block", f"down_blocks.{resolution}.resnets.{layer}")
            number += 1
    block("middle.0.block", "mid_block.resnets.0")
    block("middle.1.block", "mid_block.resnets.1")
    old, new = "mid_block.attentions.0", "middle.0.attention"
    norm(new, f"{old}.group_norm")
    for kind in ("weight", "bias"):
        found[f"{new}.qkv.{kind}"] = torch.cat([theirs[f"{old}.to_{letter}.{kind}"] for letter in "qkv"])
    copy(f"{new}.output", f"{old}.to_out.0")
    number = 0
    for resolution in range(len(SCALES)):
        for layer in range(DEPTH + 1):
            block(f"up.{number}.block", f"up_blocks.{resolution}.resnets.{layer}")
            number += 1
        if resolution + 1 < len(SCALES):
            copy(f"up.{number}.convolution", f"up_blocks.{resolution}.upsamplers.0.conv")
            number += 1
    norm("output", "conv_norm_out")
    copy("output", "conv_out")
    found["shift.weight"], found["shift.bias"] = torch.cat(shifts), torch.cat(biases)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", default=sys.executable, metavar="PYTHON", help="interpreter of the rivals")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bfloat16", action="store_true", help="all rivals under autocast")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", choices=RIVALS)
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    parser.add_argument("--workdir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rival:
        take_part(arguments.rival, arguments.workdir, arguments.rounds, arguments.bfloat16)
        return
    chosen = ["diffusers", *(name for name in arguments.only or RIVALS if name != "diffusers")]
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            name: [
                sys.executable if name == "likely" else arguments.rivals,
                *(__file__, "--rival", name, "--workdir", folder, "--rounds", str(arguments.rounds)),
                *(["--bfloat16"] if arguments.bfloat16 else []),
            ]
            for name in chosen
        }
        with playing(commands, 1, Path(folder)) as players:
            rounds = play(players, arguments.rounds)
            ends = {name: player.end() for name, player in players.items()}
    rows = []
    for name in chosen:
        ratios = [theirs["cpu"] / own["cpu"] for theirs, own in zip(rounds[name], rounds.get("likely", rounds[name]))]
        rows.append({
            "rival": name,
            "seconds": statistics.median(turn["cpu"] for turn in rounds[name]),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "parameters": ends[name]["parameters"],
            "peak_bytes": ends[name]["peak_bytes"],
            "versions": ends[name]["versions"],
        })  # fmt: skip
    result = {
        "precision": "bfloat16 autocast" if arguments.bfloat16 else "float32",
        "rows": rows,
        "rounds": arguments.rounds,
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(table(result))
    if arguments.out:
        write_record(arguments.out, result, table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# A training step of a U-Net",
        "",
        f"Batch {BATCH} of 3 x {SIZE} x {SIZE}, {result['precision']}, one thread; processor seconds, medians of "
        f"{result['rounds']} rounds in turns.  A ratio above 1 is in our favour; in brackets its least and greatest.",
        "Written by `benchmarks/diffusion_step.py`.",
        "",
        "| network | parameters | seconds a step | ratio | peak memory of the process |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_range"]
        ratio = "" if row["rival"] == "likely" else f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
        lines.append(
            f"| {RIVALS[row['rival']]} | {row['parameters']:,} | {row['seconds']:.3f} | {ratio} | "
            f"{row['peak_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join([*lines, "", f"{result['machine']}; {result['date']}.", ""])


if __name__ == "__main__":
    main()
