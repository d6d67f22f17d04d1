"""Training speed of a VAE against pythae, a bare PyTorch loop and the matrix-product floor, in one run.

    python benchmarks/vae_throughput.py --workdir DIR
    LIKELY_DATA=… python benchmarks/vae_throughput.py --workdir DIR --out benchmarks/results/vae_throughput

Two networks, 784-512-16-512-784 with ReLU (pythae's own default) and 784-200-200-50-200-200-784 with tanh (the
one-layer model of Burda et al. 2015), batch 100, Adam 1e-3, on the same binary images (a fixed draw of MNIST's grey
levels; of scikit-learn's digits, enlarged, where LIKELY_DATA is not set), from the same initial weights, for the same
number of epochs.

Each rival is a process of its own and trains one epoch when it is told to; the rivals take turns (turns.py).  Every
round gives a ratio; the table has medians over rounds.  With one thread the clock is the processor time of the process
(all of its threads), otherwise elapsed time.  The floor is the time of the matrix products of a step (forward, gradient
of the input, gradient of the weights) at exactly these shapes, by whichever of MKL and oneDNN is faster, and takes its
turn in every round too.

At the end every rival's weights are put into one likely model and evaluated by the same code on the same test images:
speed counts at equal held-out bound only.  pythae 0.1.2 is installed in an environment of its own under --workdir.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turns import Turns, machine, play, playing, versions, write_record

BATCH, LEARNING_RATE = 100, 1e-3
#: name: (hidden widths of the encoder, latent dimension, activation)
NETWORKS: dict[str, tuple[tuple[int, ...], int, str]] = {
    "784-512-16": ((512,), 16, "relu"),
    "784-200-200-50": ((200, 200), 50, "tanh"),
}
RIVALS = {
    "pythae": "pythae 0.1.2, as its users run it",
    "bare": "bare loop, fused Adam, float32",
    "bare-bf16": "bare loop, fused Adam, bfloat16 autocast",
    "likely": "likely `train`, float32",
    "likely-mkl": "likely `train`, float32, MKL as in the bare loop",
    "likely-defaults": "likely `train`, float32, with cosine decay and averaged weights (its defaults)",
    "likely-bf16": "likely `train`, bfloat16",
    "likely-bf16-compile": "likely `train`, bfloat16, compiled",
}


# --------------------------------------------------------------------------------------------------------------
# The rivals: each trains one epoch a turn
# --------------------------------------------------------------------------------------------------------------


def take_part(rival: str, network: str, epochs: int, workdir: Path, threads: int) -> None:
    """Be a rival."""
    turns = Turns()
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    folder = workdir / network
    images = np.load(workdir / "train.npy")
    if rival == "floor":
        products(turns, network, epochs)
        return
    if rival == "pythae":
        weights = train_pythae(turns, network, epochs, images, folder)
    elif rival.startswith("bare"):
        weights = train_bare(turns, network, epochs, images, folder, rival.endswith("bf16"))
    else:
        weights = train_likely(turns, network, epochs, images, folder, rival)
    np.savez(folder / f"{rival}.npz", **weights)
    turns.end(versions=versions())


def weights_of(layers: list[Any]) -> dict[str, Any]:
    """Weights and biases of linear layers, in the order of the network."""
    return {
        f"{kind}{number}": getattr(layer, kind).detach().numpy().copy()
        for number, layer in enumerate(layers)
        for kind in ("weight", "bias")
    }


def set_weights(layers: list[Any], weights: Any) -> None:
    import torch

    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.weight.copy_(torch.from_numpy(weights[f"weight{number}"]))
            layer.bias.copy_(torch.from_numpy(weights[f"bias{number}"]))


def train_bare(turns: Turns, network: str, epochs: int, images: Any, folder: Path, bf16: bool) -> dict[str, Any]:
    """The shortest loop that trains this VAE well: what one would write by hand."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    hidden, latent, activation = NETWORKS[network]
    act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]

    def perceptron(*widths: int) -> nn.Sequential:
        parts = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), act())]
        return nn.Sequential(*parts[:-1])

    encoder = perceptron(784, *hidden, 2 * latent)
    decoder = perceptron(latent, *reversed(hidden), 784)
    layers = [module for module in [*encoder, *decoder] if isinstance(module, nn.Linear)]
    set_weights(layers, np.load(folder / "start.npz"))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LEARNING_RATE, fused=True)
    data = torch.from_numpy(images)
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    turns.ready()
    for _ in range(epochs):
        turns.wait()
        for index in torch.randperm(len(data)).split(BATCH):
            x = data[index]
            with autocast:
                mean, log_scale = encoder(x).float().chunk(2, -1)
                logits = decoder(mean + log_scale.exp() * torch.randn_like(mean)).float()
                kl = 0.5 * (mean.square() + (2 * log_scale).exp() - 1).sum() - log_scale.sum()
                loss = (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl) / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        turns.done()
    return weights_of(layers)


def train_likely(turns: Turns, network: str, epochs: int, images: Any, folder: Path, rival: str) -> dict[str, Any]:
    import numpy as np
    import torch

    from likely.contract import Binary
    from likely.data.dataset import Dataset
    from likely.networks import linear
    from likely.training import train

    if rival == "likely-mkl":
        linear.ONEDNN = False
    model = build(network)
    start = dict(np.load(folder / "start.npz"))
    last = sum(key.startswith("bias") for key in start) - 1
    start[f"bias{last}"] = start[f"bias{last}"] - start["data_bias"]  # which `train` is going to add
    set_weights(linear_layers(model), start)
    steps = len(images) // BATCH

    class Epochs:
        def on_start(self, run: Any) -> None:
            turns.ready()
            turns.wait()

        def on_step(self, run: Any) -> None:
            if run.step % steps == 0:
                turns.done()
                if run.step < epochs * steps:
                    turns.wait()

    options: dict[str, Any] = {"decay": "constant", "warmup": 0, "average": False}
    if rival == "likely-defaults":
        options = {}
    train(
        model,
        Dataset(Binary((784,)), torch.from_numpy(images)),
        epochs=epochs,
        batch_size=BATCH,
        optimizer="adam",
        learning_rate=LEARNING_RATE,
        precision="bfloat16" if "bf16" in rival else "float32",
        compile=rival.endswith("compile"),
        progress=False,
        callbacks=[Epochs()],
        **options,
    )
    return weights_of(linear_layers(model))


def train_pythae(turns: Turns, network: str, epochs: int, images: Any, folder: Path) -> dict[str, Any]:
    """pythae's pipeline; its default network where it is that of the benchmark, else one of the same form."""
    import logging

    import numpy as np
    import torch
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback
    from torch import nn

    logging.disable(logging.INFO)
    hidden, latent, activation = NETWORKS[network]
    act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]

    def perceptron(*widths: int) -> nn.Sequential:
        return nn.Sequential(*(part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), act())))

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron(784, *hidden)
            self.embedding, self.log_var = nn.Linear(hidden[-1], latent), nn.Linear(hidden[-1], latent)

        def forward(self, x: Any) -> Any:
            h = self.body(x)
            return ModelOutput(embedding=self.embedding(h), log_covariance=self.log_var(h))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron(latent, *reversed(hidden))
            self.last = nn.Linear(hidden[0], 784)

        def forward(self, z: Any) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.last(self.body(z))))

    config = VAEConfig(input_dim=(784,), latent_dim=latent, reconstruction_loss="bce")
    own = network == "784-512-16"
    model = VAE(config) if own else VAE(config, encoder=Encoder(), decoder=Decoder())
    in_encoder = [m for m in model.encoder.modules() if isinstance(m, nn.Linear)]
    in_decoder = [m for m in model.decoder.modules() if isinstance(m, nn.Linear)]
    body = len(hidden)
    # pythae has log σ² where the others have log σ: half of it, in one layer with the mean.
    start = np.load(folder / "start.npz")
    with torch.no_grad():
        for number, layer in enumerate([*in_encoder[:body], None, *in_decoder]):
            for kind in ("weight", "bias"):
                value = torch.from_numpy(start[f"{kind}{number}"])
                if layer is not None:
                    getattr(layer, kind).copy_(value)
                else:
                    getattr(model.encoder.embedding, kind).copy_(value[:latent])
                    getattr(model.encoder.log_var, kind).copy_(2 * value[latent:])

    class Epochs(TrainingCallback):
        running = False

        def on_epoch_begin(self, training_config: Any, **ignored: Any) -> None:
            if self.running:
                turns.done()
            else:
                turns.ready()
                self.running = True
            turns.wait()

    settings = BaseTrainerConfig(
        output_dir=str(folder / "pythae"),
        num_epochs=epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        optimizer_cls="Adam",
        keep_best_on_train=True,
    )
    TrainingPipeline(model=model, training_config=settings)(train_data=images, callbacks=[Epochs()])
    turns.done()
    weights = weights_of([*in_encoder[:body], nn.Linear(1, 1), *in_decoder])
    for kind in ("weight", "bias"):
        mean, log_var = getattr(model.encoder.embedding, kind), getattr(model.encoder.log_var, kind)
        weights[f"{kind}{body}"] = torch.cat([mean, 0.5 * log_var]).detach().numpy()
    return weights


# --------------------------------------------------------------------------------------------------------------
# The floor
# --------------------------------------------------------------------------------------------------------------


def product_shapes(network: str) -> list[tuple[str, int, int, int]]:
    """The matrix products of a step: name and m, n, k of (m × k) times (k × n)."""
    hidden, latent, _ = NETWORKS[network]
    widths = [(784, *hidden, 2 * latent), (latent, *reversed(hidden), 784)]
    shapes = []
    for part in widths:
        for a, b in itertools.pairwise(part):
            shapes.append(("forward", BATCH, b, a))
            shapes.append(("weight gradient", b, a, BATCH))
            if (part, a) != (widths[0], 784):
                shapes.append(("input gradient", BATCH, a, b))
    return shapes


def flops(network: str) -> int:
    """Floating-point operations of the matrix products of one step."""
    return sum(2 * m * n * k for _, m, n, k in product_shapes(network))


def products(turns: Turns, network: str, rounds: int, repetitions: int = 40) -> None:
    """Time the products of a step, by each library and precision, in every round."""
    import torch

    libraries: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
        "float32 MKL": (torch.float32, torch.mm),
        "bfloat16 oneDNN": (torch.bfloat16, torch.mm),
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        linear = torch.ops.mkldnn._linear_pointwise
        libraries["float32 oneDNN"] = (torch.float32, lambda a, b: linear(a, b.t(), None, "none", [], ""))
    operands: dict[str, list[tuple[Any, Any]]] = {}
    for name, (dtype, _) in libraries.items():
        operands[name] = []
        for kind, m, n, k in product_shapes(network):
            # as they lie in memory in a step: activations and gradients by example, weights by output
            a = torch.randn(k, m).to(dtype).t() if kind == "weight gradient" else torch.randn(m, k).to(dtype)
            b = torch.randn(n, k).to(dtype).t() if kind == "forward" else torch.randn(k, n).to(dtype)
            operands[name].append((a, b))
    turns.ready()
    for _ in range(rounds):
        turns.wait()
        seconds = {}
        for name, (_, multiply) in libraries.items():
            for a, b in operands[name]:
                multiply(a, b)
            start = (time.process_time(), time.perf_counter())
            for _ in range(repetitions):
                for a, b in operands[name]:
                    multiply(a, b)
            seconds[name] = [
                (time.process_time() - start[0]) / repetitions,
                (time.perf_counter() - start[1]) / repetitions,
            ]
        turns.done(products=seconds)
    turns.end(versions={})


# --------------------------------------------------------------------------------------------------------------
# The same model for all
# --------------------------------------------------------------------------------------------------------------


def build(network: str) -> Any:
    from likely.contract import Binary
    from likely.models.vae import VAE

    hidden, latent, activation = NETWORKS[network]
    return VAE(Binary((784,)), latent_dim=latent, hidden=hidden, activation=activation)


def linear_layers(model: Any) -> list[Any]:
    """Linear layers of a likely VAE in the order of the network."""
    from torch import nn

    parts = (model.encoder, model.posterior_head, model.decoder, model.likelihood_head)
    return [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]


def make_start(network: str, images: Any, folder: Path) -> None:
    """Initial weights for all: those that likely starts from, with the data's log-odds as output bias."""
    import numpy as np
    import torch

    from likely.contract import Binary
    from likely.data.dataset import Dataset, Passes

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build(network)
    layers = linear_layers(model)
    before = layers[-1].bias.detach().clone()
    model.initialise(Passes(Dataset(Binary((784,)), torch.from_numpy(images))))
    np.savez(folder / "start.npz", data_bias=(layers[-1].bias.detach() - before).numpy(), **weights_of(layers))


def held_out_bounds(network: str, rivals: list[str], workdir: Path) -> dict[str, Any]:
    """Held-out bound of every rival's weights, by one evaluator: nats per image."""
    import numpy as np
    import torch

    from likely.contract import Binary
    from likely.data.dataset import Dataset
    from likely.evaluation import held_out

    data = Dataset(Binary((784,)), torch.from_numpy(np.load(workdir / "test.npy")))
    found: dict[str, Any] = {}
    for rival in rivals:
        model = build(network)
        set_weights(linear_layers(model), np.load(workdir / network / f"{rival}.npz"))
        found[rival] = held_out(model, data, seed=0)
    reference = found["bare"].example_nats
    bounds = {}
    for rival, result in found.items():
        difference = result.example_nats - reference
        bounds[rival] = {
            "nats": result.nats,
            "standard_error": result.standard_error,
            "minus_bare": float(difference.mean()),
            "minus_bare_standard_error": float(difference.std() / math.sqrt(len(difference))),
        }
    return bounds


# --------------------------------------------------------------------------------------------------------------
# Data, environment, machine
# --------------------------------------------------------------------------------------------------------------


def make_data(workdir: Path, n: int) -> str:
    """Write train.npy and test.npy, binary images of 784 pixels; return what they are."""
    import numpy as np

    rng = np.random.default_rng(0)
    if os.environ.get("LIKELY_DATA"):
        import gzip

        folder = Path(os.environ["LIKELY_DATA"]) / "mnist"
        parts = []
        for name in ("train", "t10k"):
            with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
                parts.append(np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784) / np.float32(255))
        train, test = parts[0][:n], parts[1]
        what = f"MNIST: the first {n:,} training images, all 10,000 test images; a fixed binary draw of the grey levels"
    else:
        from sklearn.datasets import load_digits

        small = load_digits().images.astype(np.float32) / 16
        large = np.pad(small.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2))).reshape(-1, 784)
        train, test = large[rng.integers(0, 1400, n)], large[1400:]
        what = f"scikit-learn's digits enlarged to 28 × 28: {n:,} draws of the first 1,400, and the other 397"
    for name, grey in (("train", train), ("test", test)):
        np.save(workdir / f"{name}.npy", (rng.random(grey.shape, np.float32) < grey).astype(np.float32))
    return what


def pythae_environment(workdir: Path) -> Path:
    """Python of an environment with pythae 0.1.2."""
    folder = workdir / "pythae-environment"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making an environment for pythae in {folder} …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for requirement in ("torch==2.13.0", "pythae==0.1.2"):
            subprocess.run([str(python), "-m", "pip", "install", "-q", requirement], check=True)
        (folder / "ready").touch()
    return python


def start_up() -> dict[str, float] | None:
    """Seconds of `likely --help` and of importing PyTorch: medians of nine."""
    command = shutil.which("likely", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if command is None:
        return None
    seconds = {}
    lines = {"likely --help": [command, "--help"], "import torch": [sys.executable, "-c", "import torch"]}
    for name, line in lines.items():
        times = []
        for _ in range(9):
            start = time.perf_counter()
            if subprocess.run(line, capture_output=True).returncode:
                return None
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
    return seconds


# --------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------


def compare(network: str, names: list[str], pythons: dict[str, str], arguments: Any) -> dict[str, Any]:
    """Train one network by all rivals; everything measured."""
    import numpy as np

    images = np.load(arguments.workdir / "train.npy")
    make_start(network, images, arguments.workdir / network)
    steps, clock = len(images) // BATCH, "cpu" if arguments.threads == 1 else "wall"
    options = ["--network", network]
    for name in ("epochs", "workdir", "threads"):
        options += [f"--{name}", str(getattr(arguments, name))]
    commands = {
        name: [pythons.get(name, sys.executable), str(Path(__file__).resolve()), "--rival", name, *options]
        for name in [*names, "floor"]
    }
    with playing(commands, arguments.threads, arguments.workdir / network) as players:
        turns = play(players, arguments.epochs)
        ends = {name: player.end() for name, player in players.items()}

    later = slice(arguments.warm_up, None)
    seconds = {name: [turn[clock] / steps for turn in turns[name]][later] for name in names}
    libraries = list(turns["floor"][0]["products"])
    number = ("cpu", "wall").index(clock)
    floor = {name: [turn["products"][name][number] for turn in turns["floor"]][later] for name in libraries}
    float32 = min((name for name in libraries if "float32" in name), key=lambda name: statistics.median(floor[name]))
    bfloat16 = "bfloat16 oneDNN"

    def ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below))

    bounds = held_out_bounds(network, names, arguments.workdir)
    rows = {}
    for name in names:
        floor_name = bfloat16 if "bf16" in name else float32
        rows[name] = {
            "milliseconds_per_step": 1000 * statistics.median(seconds[name]),
            "images_per_second": BATCH / statistics.median(seconds[name]),
            "times_pythae": ratio(seconds["pythae"], seconds[name]) if "pythae" in names else None,
            "of_bare_time": ratio(seconds[name], seconds["bare"]),
            "share_of_floor": ratio(floor[floor_name], seconds[name]),
            "floor": floor_name,
            "first_epoch_seconds": turns[name][0]["wall"],
            "fastest_milliseconds_per_step": 1000 * min(seconds[name]),
            "peak_mib": ends[name]["peak_bytes"] / 2**20,
            "held_out": bounds[name],
            "versions": ends[name]["versions"],
            "epoch_seconds": [round(turn[clock], 4) for turn in turns[name]],
        }
    work = flops(network)
    return {
        "rows": rows,
        "flops_per_step": work,
        "floor": {
            name: {
                "milliseconds_per_step": 1000 * statistics.median(values),
                "gflops_per_second": work / statistics.median(values) / 1e9,
            }
            for name, values in floor.items()
        },
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    settings = record["settings"]
    clock = "processor time" if settings["threads"] == 1 else "elapsed time"
    lines = [
        "# Training speed of a VAE",
        "",
        f"Command: `{record['command']}`. {record['date']}, {settings['threads']} thread(s), {clock}.",
        f"Machine: {record['machine']['processor']}, {record['machine']['cores']} cores, "
        f"{record['machine']['vector_units']}, {record['machine']['system']}; PyTorch {record['versions']['torch']}.",
        f"Data: {record['data']}. Batch {BATCH}, Adam {LEARNING_RATE:g}, {settings['epochs']} epochs of "
        f"{settings['images'] // BATCH} steps; medians over {settings['epochs'] - settings['warm_up']} rounds, and "
        "medians of the ratios within a round.",
        "",
    ]
    for network, result in record["networks"].items():
        lines += [
            f"## {network}: {result['flops_per_step'] / 1e6:.0f} MFLOP in the matrix products of a step",
            "",
            "| | images/s | ms/step | × pythae | time ÷ bare | share of floor | held-out ELBO, nats | − bare "
            "| peak MiB | first epoch, s |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in result["rows"].items():
            bound = row["held_out"]
            times = "" if row["times_pythae"] is None else f"{row['times_pythae']:.2f}"
            lines.append(
                f"| {RIVALS[name]} | {row['images_per_second']:,.0f} | {row['milliseconds_per_step']:.2f} | {times} "
                f"| {row['of_bare_time']:.2f} | {100 * row['share_of_floor']:.0f} % "
                f"| {bound['nats']:.2f} ± {bound['standard_error']:.2f} "
                f"| {bound['minus_bare']:+.2f} ± {bound['minus_bare_standard_error']:.2f} "
                f"| {row['peak_mib']:.0f} | {row['first_epoch_seconds']:.1f} |"
            )
        lines.append("")
        for name, floor in result["floor"].items():
            lines.append(
                f"- products alone, {name}: {floor['milliseconds_per_step']:.2f} ms a step, "
                f"{floor['gflops_per_second']:.0f} GFLOP/s"
            )
        lines.append("")
    if record["start_up_seconds"]:
        text = ", ".join(f"`{name}` {seconds:.2f} s" for name, seconds in record["start_up_seconds"].items())
        lines += [f"Start-up (elapsed, median of 9): {text}.", ""]
    lines += [
        "Share of floor: time of the products alone, in the row's precision and by the faster library, over time of "
        "the step. ELBO: one sample a test image, by one evaluator with the same noise for all; ± is one standard "
        "error. The first epoch includes what is done once, such as imports on first use and compilation.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="for the data and pythae's environment; kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=30, help="epochs, one a round")
    parser.add_argument("--warm-up", type=int, default=3, help="first rounds that are left out of the medians")
    parser.add_argument("--images", type=int, default=9000)
    parser.add_argument("--network", choices=NETWORKS, help="one of the two only")
    parser.add_argument("--without", nargs="*", choices=[name for name in RIVALS if name != "bare"], default=[])
    parser.add_argument("--out", type=Path, help="write the record to OUT.json and the table to OUT.md")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rival:
        take_part(arguments.rival, arguments.network, arguments.epochs, arguments.workdir.resolve(), arguments.threads)
        return
    if arguments.epochs <= arguments.warm_up:
        parser.error("--epochs: expected more than --warm-up")
    if arguments.images % BATCH:
        parser.error(f"--images: expected a multiple of the batch size {BATCH}")

    import torch

    torch.set_num_threads(arguments.threads)
    arguments.workdir = arguments.workdir.resolve()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    names = [name for name in RIVALS if name not in arguments.without]
    pythons = {"pythae": str(pythae_environment(arguments.workdir))} if "pythae" in names else {}
    shown = " ".join(argument for argument in sys.argv[1:])
    shown = shown.replace(str(arguments.workdir), "WORKDIR")
    record: dict[str, Any] = {
        "command": f"python benchmarks/vae_throughput.py {shown}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            **{name: getattr(arguments, name) for name in ("threads", "epochs", "warm_up", "images")},
        },
        "data": make_data(arguments.workdir, arguments.images),
        "networks": {},
        "start_up_seconds": start_up(),
    }
    for network in [arguments.network] if arguments.network else NETWORKS:
        record["networks"][network] = compare(network, names, pythons, arguments)
    print(table(record))
    if arguments.out:
        write_record(arguments.out, record, table(record))


if __name__ == "__main__":
    main()
