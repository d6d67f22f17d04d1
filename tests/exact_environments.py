"""A script that evaluates exact and plain networks in every setting that one process can have; see ``test_exact.py``.

It prints, as JSON, the digests of the first outputs that each setting gave: ``{kind: {setting: digest}}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from likely import exact
from likely.contract import Binary, Integers
from likely.distributions import head
from likely.networks import decoder, encoder
from likely.networks.mlp import make_activation
from likely.noise import KeyedNoise

ROWS, FEW, FIRST = 1000, 64, 7


class Transformer(nn.Module):
    """Token embeddings, one causal layer of attention, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.output = nn.Linear(32, 11)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device), 1)
        return self.output(self.layers(self.embedding(x.long()), mask))


class Head(nn.Module):
    """A decoder and the numbers of its likelihood."""

    def __init__(self, network: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.network, self.likelihood = network, likelihood

    def forward(self, z: Tensor) -> Tensor:
        return self.likelihood.parameters_of(self.network(z))  # type: ignore[operator]


def filled(module: nn.Module, seed: int) -> nn.Module:
    """The module in evaluation, its parameters replaced by numbers that no library draws."""
    for number, parameter in enumerate(module.parameters()):
        noise = KeyedNoise(seed + number, torch.arange(max(1, parameter.numel())))
        width = max(1, parameter[0].numel()) if parameter.dim() > 1 else 100
        values = (noise.uniform((parameter.numel(),)) - 0.5) * (3.0 / width**0.5)
        parameter.data.copy_(values.reshape(parameter.shape))
    return module.eval()


def networks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, module and input of every network that is compared."""
    noise, few = KeyedNoise(0, torch.arange(ROWS)), KeyedNoise(1, torch.arange(FEW))
    binary, image = Binary((200,)), Integers((3, 8, 8), 256)
    yield "encoder", encoder("mlp", (200,), 0, (96, 64), "silu"), noise.uniform((ROWS, 200)).round()
    mlp = decoder("residual", 20, binary.shape, (96, 96), "gelu")
    yield "decoder", Head(mlp, head("auto", binary, (96,))), noise.uniform((ROWS, 20)) * 6.0 - 3.0
    yield "convolutions", encoder("conv", image.shape, 0, (8, 16, 24), "elu"), few.uniform((FEW, 3, 8, 8)) * 2.0 - 1.0
    conv = decoder("conv", 20, image.shape, (8, 16, 24), "silu")
    context = conv.out_shape
    assert isinstance(context, tuple)
    yield "image", Head(conv, head("auto", image, context)), few.uniform((FEW, 20)) * 6.0 - 3.0
    norms = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), make_activation("tanh"), nn.ConvTranspose2d(8, 4, 4, 2)
    )
    yield "norms", norms, few.uniform((FEW, 3, 8, 8)) * 2.0 - 1.0
    yield "transformer", Transformer(), (few.uniform((FEW, 9)) * 11.0).floor()


def settings(rows: int, most: bool) -> Iterator[tuple[str, int]]:
    """Name and batch size of every setting, which is in force while it is yielded; ``most`` of them, or two."""
    if not most:
        yield from (("batch 1", 1), (f"batch {FEW}", FEW))
        return
    for batch in {1: 0, 7: 0, FEW: 0, rows: 0}:
        yield f"batch {batch}", batch
    torch.set_num_threads(2)
    yield "2 threads", FEW
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.conv.fp32_precision = "bf16"  # type: ignore[attr-defined]
    yield "reduced precision", FEW
    torch.backends.mkldnn.conv.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)
    yield "subnormals flushed", 7
    torch.set_flush_denormal(False)


def digest(function: Callable[[Tensor], Tensor], x: Tensor, batch: int) -> str:
    """Digest of the outputs for the first rows, computed in batches of that size."""
    with torch.no_grad():
        outputs = [function(part) for part in x.split(batch)[: -(-FIRST // batch)]]
    return hashlib.blake2b((torch.cat(outputs)[:FIRST] + 0.0).contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    for seed, (name, module, x) in enumerate(networks()):
        module = filled(module, 100 * seed)
        kinds = {"float32": module, "exact32": exact.network(module), "exact64": exact.network(module, "exact64")}
        for kind, function in kinds.items():
            of_kind = found.setdefault(kind, {})
            for setting, batch in settings(len(x), most=kind != "exact64"):
                of_kind[f"{name}, {setting}"] = digest(function, x, batch)
            if isinstance(function, exact.Network):
                found.setdefault(f"{kind} probe", {})[name] = function.probe().hex()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
