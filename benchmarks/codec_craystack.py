"""BB-ANS by craystack, for the images and the networks of ``codec.py``: a player of ``turns.py``.

    PYTHONPATH=CRAYSTACK:DEPENDENCIES python codec_craystack.py RUN IMAGES.npy BATCH ROUNDS

Set up as its own example for binary images is (examples/binary_mnist_vae.py, where BATCH is 10): one lane of the coder
for every pixel and latent variable of a batch, precisions 8 (prior), 14 (posterior) and 16 bits (pixels).
The networks are float32, evaluated by PyTorch.  A turn encodes all images and decodes them.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import likely
from turns import Turns

PRIOR_BITS, POSTERIOR_BITS, PIXEL_BITS = 8, 14, 16


def main() -> None:
    import craystack as cs
    from autograd.builtins import tuple as ag_tuple
    from craystack import bb_ans

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Popping from empty message")  # its initial bits
    turns = Turns()
    model: Any = likely.load(Path(sys.argv[1])).model.eval()
    images = np.load(sys.argv[2]).astype(np.uint64)
    batch, rounds = int(sys.argv[3]), int(sys.argv[4])
    batches = np.split(images, len(images) // batch)
    latents, pixels = batch * model.latent_dim, batch * images.shape[1]

    @torch.no_grad()
    def posterior(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q = model.posterior(torch.from_numpy(x.astype(np.float32)))
        return q.mean.numpy(), q.log_scale.exp().numpy()

    @torch.no_grad()
    def likelihood(z: np.ndarray) -> np.ndarray:
        return torch.sigmoid(model.likelihood(torch.from_numpy(np.float32(z))).logits).numpy()

    def view(head: Any) -> Any:
        shape = (batch, model.latent_dim), (batch, images.shape[1])
        return ag_tuple((np.reshape(head[:latents], shape[0]), np.reshape(head[latents:], shape[1])))

    vae = bb_ans.VAE(likelihood, posterior, lambda p: cs.Bernoulli(p, PIXEL_BITS), PRIOR_BITS, POSTERIOR_BITS)
    push, pop = cs.repeat(cs.substack(vae, view), len(batches))
    turns.ready()
    for _ in range(rounds):
        turns.wait()
        start = time.process_time(), time.perf_counter()
        (message,) = push(cs.base_message(latents + pixels), batches)
        flat = cs.flatten(message)
        middle = time.process_time(), time.perf_counter()
        _, decoded = pop(cs.unflatten(flat, latents + pixels))
        end = time.process_time(), time.perf_counter()
        if not np.array_equal(np.concatenate(decoded), images):
            raise SystemExit("craystack gave back other images")
        turns.done(
            encode=[middle[0] - start[0], middle[1] - start[1]],
            decode=[end[0] - middle[0], end[1] - middle[1]],
            bytes=4 * len(flat),
        )
    turns.end()


if __name__ == "__main__":
    main()
