"""A diffusion model on CIFAR-10 in 25 minutes of one GPU: exact bound on the whole test set.

Paper: Kingma et al. 2021 (arXiv 2107.00630), Table 1: 2.65 bits/dim without augmentation, after 10 million steps of a
U-Net without down-sampling.  That takes weeks of one GPU; here a transformer between residual blocks at full resolution
(`dit`) is trained for minutes.  The goal is 3.00.

Protocol: no augmentation; averaged weights; learning rate to zero within the run; the bound in continuous time, with
the exact reconstruction term of 256 levels, at 64 stratified levels an image and noise that belongs to the image, in
float32; all test images; no choice is made on the test set.

    LIKELY_DATA=… python papers/vdm_cifar10.py                # one GPU, 25 minutes of training
    LIKELY_DATA=… python papers/vdm_cifar10.py --small        # one core, some minutes: a small U-Net, 1,000 test images
    python papers/vdm_cifar10.py --dry-run                    # 50 steps of a small network on a CPU, writes nothing

LIKELY_DATA has ``cifar10/`` with sheets of 32 × 32 tiles (WebP, lossless) and ``index.npz``.  With --run the training
can be resumed, and the weights are kept in that folder.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from glow_cifar10 import SPACE, read_cifar
from likely import units
from likely.contract import Model
from likely.data import Dataset
from likely.data.images import write_sheet
from likely.evaluation import held_out
from likely.models import find
from likely.noise import StreamNoise
from likely.training import train
from records import RESULTS, provenance, write

FINE = (6, 7)
MODEL: dict[str, Any] = {
    "network": "dit",
    "network_options": {
        "width": 384,
        "depth": 10,
        "heads": 6,
        "patch": 2,
        "stem": 128,
        "stem_depth": 2,
        "fourier": FINE,
    },
    "parameterisation": "f",
}
SMALL: dict[str, Any] = {
    "network": "unet",
    "network_options": {"width": 32, "depth": 1, "scales": (1, 2), "fourier": FINE},
    "parameterisation": "f",
}
DRY: dict[str, Any] = {
    "network": "dit",
    "network_options": {"width": 32, "depth": 1, "heads": 2, "stem": 8, "fourier": FINE},
    "parameterisation": "f",
}
TRAINING: dict[str, Any] = {
    "batch_size": 512,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "optimizer_options": {"betas": (0.9, 0.99)},
    "warmup": 200,
    "decay": "linear",
    "average_fraction": 0.05,
    "precision": "bfloat16",
    "compile": True,
    "patience": None,
    "evaluate_examples": 500,
}
#: What --small and --dry-run change of it.
TRAINING_SMALL: dict[str, Any] = {
    "batch_size": 16,
    "learning_rate": 2e-3,
    "compile": False,
    "device": "cpu",
    "precision": "float32",
    "evaluate_examples": 100,
}
TRAINING_DRY: dict[str, Any] = {
    **TRAINING_SMALL,
    "batch_size": 4,
    "warmup": 5,
    "evaluate_every": 50,
}
LEVELS, SAMPLES, SAMPLE_STEPS = 64, 64, 64
#: Test images and levels of --small, and its steps: about ten minutes of one core.
SMALL_TEST, SMALL_LEVELS, SMALL_STEPS = 1000, 16, 4000


def operations(model: Model, batch: Tensor) -> int:
    """Floating-point operations of a training step for one example, counted by PyTorch: products and convolutions."""
    counter = FlopCounterMode(display=False)
    with counter:
        model.loss(
            batch, noise=StreamNoise(torch.Generator(batch.device).manual_seed(0), batch.device)
        ).value.backward()
    model.zero_grad()
    return counter.get_total_flops() // len(batch)


def sheet(model: Model, path: Path, n: int) -> None:
    """``n`` samples as one picture."""
    device = next(model.parameters()).device
    noise = StreamNoise(torch.Generator(device).manual_seed(0), device)
    images = model.sample(n, noise=noise, sampler="dpm", steps=SAMPLE_STEPS)  # type: ignore[call-arg]
    write_sheet(images.to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy(), path)


def pretend(n: int) -> tuple[Dataset, Dataset, Dataset]:
    """Images of noise, for a dry run without the data."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Dataset(SPACE, pixels[0]), Dataset(SPACE, pixels[1]), Dataset(SPACE, pixels[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="length of the training")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s that the device can do in bfloat16")
    parser.add_argument("--run", type=Path, help="folder of the run, to resume it")
    parser.add_argument("--small", action="store_true", help="one core, a small network")
    parser.add_argument("--steps", type=int, default=SMALL_STEPS, help="length of the training with --small")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    folder, dry, small = os.environ.get("LIKELY_DATA"), arguments.dry_run, arguments.small
    if dry or small:
        torch.set_num_threads(1)
    if dry and not folder:
        train_set, valid_set, test_set = pretend(16)
    else:
        assert folder, "expected the folder of the data in LIKELY_DATA"
        train_set, valid_set, test_set = read_cifar(Path(folder) / "cifar10", 32 if dry else None)
    options = {**TRAINING, "batch_size": arguments.batch, "learning_rate": arguments.learning_rate}
    length: dict[str, Any] = {"budget": 60.0 * arguments.minutes}
    model_options, levels = MODEL, LEVELS
    if dry:
        model_options, levels, options, length = DRY, 4, {**options, **TRAINING_DRY}, {"steps": 50}
        test_set = test_set.subset(slice(0, 4))
    elif small:
        model_options, levels, length = SMALL, SMALL_LEVELS, {"steps": arguments.steps}
        options |= TRAINING_SMALL
        test_set = test_set.subset(slice(0, SMALL_TEST))
    torch.manual_seed(arguments.seed)
    model = find("vdm")(SPACE, **model_options)
    parameters = sum(p.numel() for p in model.parameters())

    started = time.process_time()
    run, resume = arguments.run, arguments.run is not None
    result = train(
        model, train_set, valid_set, seed=arguments.seed, run=run, resume=resume, progress=not dry, **length, **options
    )
    speed = result.examples_per_second
    device = next(result.model.parameters()).device
    model = result.model.eval()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model.bound_levels = levels  # type: ignore[assignment]
    bound = held_out(model, test_set)
    per_example = operations(model, train_set.x[:2].to(device).float())
    content = {
        "bits_per_dim": units.bits_per_dim(bound.nats, SPACE.dims),
        "standard_error": -units.bits_per_dim(bound.standard_error, SPACE.dims),
        "parts": {name: units.bits_per_dim(nats, SPACE.dims) for name, nats in bound.parts.items()},
        "levels": model.bound_levels,
        "test_images": bound.n,
        "valid_bits_per_dim": result.valid and units.bits_per_dim(result.valid["nats"], SPACE.dims),
        "parameters": parameters,
        "steps": result.steps,
        "epochs": round(result.steps * result.options.batch_size / len(train_set), 1),
        "seconds": round(result.seconds),
        "images_per_second": speed,
        "gflop_per_image": per_example / 1e9,
        "fraction_of_peak": speed * per_example / (arguments.peak * 1e12),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "options": {"model": model_options, "training": {**options, **length}},
        "run": provenance(time.process_time() - started),
    }
    if dry:
        print("\n".join(table(content)))
        return
    name = "vdm_cifar10_small" if small else "vdm_cifar10"
    write(name, content, table(content, name))
    sheet(model, RESULTS / f"{name}.png", SAMPLES)


def table(content: dict[str, Any], name: str = "") -> list[str]:
    """The result as Markdown, the paper's figure first."""
    peak = f", {100 * content['fraction_of_peak']:.1f} % of the peak" if content["device"] != "CPU" else ""
    parts = ", ".join(f"{name} {value:.4f}" for name, value in content["parts"].items())
    return [
        "# A diffusion model on CIFAR-10",
        "",
        "Bits/dim on the test set, a bound in continuous time, no augmentation; ± is the standard error over images.",
        "Written by `papers/vdm_cifar10.py`.",
        "",
        "| model | parameters | images seen | bits/dim |",
        "|---|---|---|---|",
        "| VDM (Kingma et al. 2021, Table 1) | 31M | 1,280M | 2.65 |",
        f"| ours | {content['parameters'] / 1e6:.1f}M | "
        f"{content['steps'] * content['options']['training']['batch_size'] / 1e6:.2f}M | "
        f"{content['bits_per_dim']:.3f} ± {content['standard_error']:.3f} |",
        "",
        f"Parts: {parts}; {content['test_images']:,} images at {content['levels']} levels each.",
        f"Training: {content['seconds']:,} s on {content['device']}, {content['images_per_second']:,.0f} images/s, "
        f"{content['gflop_per_image']:.2f} GFLOP an image{peak}.",
        "",
        f"![samples]({name}.png)",
    ]


if __name__ == "__main__":
    main()
