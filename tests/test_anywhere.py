"""Files with a model in them decode to the byte in every setting; hostile ones end in a named error."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import archive_cases
import decode_elsewhere
import fuzz_container
from archive_cases import CASES, Made, decode, make
from likely import models
from likely.archive import Archive
from likely.coding.errors import Damaged, FormatError, TooLarge, WrongModel
from likely.coding.fallback import compress, decompress
from likely.coding.weights import pack, unpack
from likely.contract import Integers, Model, NoCodec, Tokens, Unsupported

X86 = platform.machine() in ("x86_64", "AMD64")
LINUX = Path("/proc/self/statm").exists()
OLDEST = {
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
}
MIDDLE = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
#: A command that runs Python under an emulator of another processor; it needs torch, numpy and safetensors, such as
#: ``env PYTHONPATH=PACKAGES:src qemu-aarch64-static -L ROOT ROOT/usr/bin/python3.11`` with
#: ``debootstrap --foreign --arch=arm64 --include=python3,libgomp1,libstdc++6 bookworm ROOT``, its packages unpacked by
#: ``dpkg-deb -x``, and ``pip install --target PACKAGES --platform manylinux_2_28_aarch64 --only-binary=:all: …``.
FOREIGN = os.environ.get("LIKELY_FOREIGN_PYTHON", "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Cases, each made once."""
    kept: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in kept:
            kept[name] = make(name, tmp_path_factory.mktemp(name))
        return kept[name]

    return of


@pytest.fixture(scope="module")
def folder(made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of three vaes, a mixture and a gaussian, and a control in plain float32."""
    here = tmp_path_factory.mktemp("files")
    for name in ("vae-counts", "vae-image", "vae-table", "mixture-table", "gaussian-table"):
        (here / f"{name}.lk").write_bytes(made(name).embedded)
    with decode_elsewhere.setting("plain", native=True):
        control = make("vae-image", tmp_path_factory.mktemp("control")).embedded
        (here / "vae-image.float.lk").write_bytes(control)
        np.savez(here / "vae-image.float.npz", outputs=decode_elsewhere.outputs(control, 65))
    for name in ("vae-image", "vae-table"):
        np.savez(here / f"{name}.npz", outputs=decode_elsewhere.outputs(made(name).embedded, 65))
    return here


def elsewhere(folder: Path, command: list[str], environment: dict[str, str], *settings: str) -> dict[str, Any]:
    """What a process in another setting makes of the files."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, str(root / "tests" / "decode_elsewhere.py"), str(folder), *settings],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, Any], made: Callable[[str], Made], setting: str) -> None:
    here = found[setting]
    for name in ("vae-counts", "vae-image", "vae-table", "mixture-table", "gaussian-table"):
        assert here[name] == archive_cases.digest(made(name).original), (setting, name)
    assert here["vae-image outputs"] == here["vae-table outputs"] == 0.0, setting


def test_batches_threads_and_precision_change_nothing(folder: Path, made: Callable[[str], Made]) -> None:
    settings = ("2 threads", "batch 1", "reduced precision")
    found = elsewhere(folder, [sys.executable], {}, *settings)
    for setting in settings:
        check(found, made, setting)
    if X86:  # the control: plain floats do change
        assert found["batch 1"]["vae-image.float outputs"] > 0.01


def test_flushed_subnormals_change_nothing() -> None:
    file = (Path(__file__).parent / "golden" / "vae-binary-1.0.lk").read_bytes()  # its activation has subnormal values
    expected = decode(file)
    with decode_elsewhere.setting("subnormals flushed", native=False):
        assert decode(file) == expected
        assert sys.float_info.min * 0.5 == 0.0 or not torch.set_flush_denormal(True)  # as it was


@pytest.mark.skipif(not X86, reason="the instruction sets are those of x86-64")
@pytest.mark.parametrize("environment", [OLDEST, MIDDLE], ids=["oldest", "middle"])
def test_instruction_sets_and_libraries_change_nothing(
    folder: Path, made: Callable[[str], Made], environment: dict[str, str]
) -> None:
    found = elsewhere(folder, [sys.executable], environment, "plain")
    check(found, made, "plain")
    if environment is OLDEST and torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert found["plain"]["vae-image.float outputs"] > 0.01


@pytest.mark.skipif(not FOREIGN, reason="LIKELY_FOREIGN_PYTHON names no Python of another processor")
def test_another_processor_changes_nothing(folder: Path, made: Callable[[str], Made]) -> None:
    command = shlex.split(FOREIGN)
    assert shutil.which(command[0])
    found = elsewhere(folder, command, {}, "plain")
    assert found["machine"] != platform.machine()
    check(found, made, "plain")


# Hostile files ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not LINUX, reason="needs Linux to limit memory")
@pytest.mark.parametrize(("name", "count"), [("independent-table", 600), ("gaussian-table", 300), ("vae-counts", 100)])
def test_mutants_end_in_a_named_error_or_the_original(made: Callable[[str], Made], name: str, count: int) -> None:
    outcomes, faults = fuzz_container.fuzz(made(name).embedded, decode, count, seed=1, seconds=60.0)
    assert not faults
    assert {outcome for _, outcome in outcomes} >= {"Damaged", "Truncated", "exact original"}


@pytest.mark.skipif(not LINUX, reason="needs Linux to limit memory")
def test_mutants_end_so_with_a_model_that_is_given(made: Callable[[str], Made]) -> None:
    case = made("mixture-table")
    _, faults = fuzz_container.fuzz(
        case.bare, lambda data: decode(data, case.model, case.schema), 200, seed=2, seconds=60.0
    )
    assert not faults


def test_a_file_without_its_model_says_so(made: Callable[[str], Made]) -> None:
    case = made("gaussian-table")
    with pytest.raises(FormatError, match="holds no model"):
        decode(case.bare)
    assert decode(case.bare, case.model, case.schema) == case.original
    other = made("mixture-table")
    with pytest.raises(WrongModel):
        decode(case.bare, other.model, case.schema)


def altered(packed: bytes, change: Callable[[Any], Any]) -> bytes:
    """A packed model with another description."""
    size, stored = struct.unpack_from("<II", packed)
    said = json.loads(decompress(packed[8 : 8 + stored], size))
    text = change(said)
    text = text if isinstance(text, bytes) else json.dumps(said).encode()
    again = compress(text)
    return struct.pack("<II", len(text), len(again)) + again + packed[8 + stored :]


def option(name: str, value: Any) -> Callable[[Any], None]:
    def change(said: Any) -> None:
        said[0]["options"][name] = value

    return change


def entry(which: int, value: Any) -> Callable[[Any], None]:
    def change(said: Any) -> None:
        said[2][0][which] = value

    return change


def said_of_space(name: str, value: Any) -> Callable[[Any], None]:
    def change(said: Any) -> None:
        said[0]["space"][name] = value

    return change


HOSTILE: dict[str, tuple[Callable[[Any], Any], type[FormatError]]] = {
    "wide layers": (option("hidden", [1 << 20, 1 << 20]), TooLarge),
    "a wider number": (option("hidden", [1 << 40]), TooLarge),
    "many layers": (option("hidden", [1] * 100_000), TooLarge),
    "many latent dimensions": (option("latent_dim", 1 << 24), TooLarge),
    "a large prior": (option("prior_options", {"components": 1 << 23}), FormatError),
    "a list for a number": (option("latent_dim", [2]), Damaged),
    "an option that is not there": (option("surprise", 1), Damaged),
    "infinity": (option("dropout", float("inf")), Damaged),
    "a text": (option("network", "os.system"), Damaged),
    "a large space": (said_of_space("shape", [1 << 20, 1 << 20]), TooLarge),
    "a space of nothing": (said_of_space("shape", []), Damaged),
    "another model": (lambda said: said[0].update(model="../contract"), Damaged),
    "a large tensor": (entry(2, [1 << 20, 1 << 20]), TooLarge),
    "a negative size": (entry(2, [-1, -1]), FormatError),
    "many axes": (entry(2, [1] * 100), Damaged),
    "an infinite size": (entry(2, [float("inf")]), Damaged),
    "nothing, very long": (entry(2, [0, 10**30]), Damaged),
    "another type": (entry(1, "complex64"), Damaged),
    "deep": (lambda said: b"[" * 100_000, Damaged),
    "no JSON": (lambda said: b"\xff\xfe", Damaged),
    "a number": (lambda said: b"7", Damaged),
}


@pytest.mark.skipif(not LINUX, reason="needs Linux to limit memory")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_models_are_refused_before_they_are_made(made: Callable[[str], Made], name: str) -> None:
    change, error = HOSTILE[name]
    hostile = altered(pack(made("vae-counts").model, models.describe), change)
    with fuzz_container.memory_limit(128 << 20), pytest.raises(error):
        unpack(hostile, models.build)


def test_a_small_file_cannot_declare_many_cells(made: Callable[[str], Made]) -> None:
    case = made("gaussian-table")
    parts = fuzz_container.parse(case.bare)
    (chunk,) = (chunk for chunk in parts.chunks if chunk["kind"].startswith("rows"))
    chunk["rows"], chunk["raw_size"] = 1 << 24, 1 << 30
    with Archive(fuzz_container.assemble(parts)) as archive, pytest.raises(TooLarge, match="cells"):
        _ = archive.restore(case.model, case.schema, workers=1).value


def has_codec(model: type[Model]) -> bool:
    """Whether a model has a codec, for a small image or for a text."""
    for space in (Integers((1, 4, 4), 4), Tokens(3, 3)):
        with contextlib.suppress(NoCodec, Unsupported):
            model.tiny(space).codec()
            return True
    return False


def test_every_family_with_a_codec_is_among_the_cases() -> None:
    assert {case.model for case in CASES.values()} == {name for name in models.names() if has_codec(models.find(name))}


@pytest.mark.parametrize("name", CASES)
def test_golden_files_hold_rows_coded_by_their_model(name: str) -> None:
    with Archive(Path(__file__).parent / "golden" / f"{name}-1.0.lk") as archive:
        assert {entry.kind for entry in archive.reader.chunks} == {"schema", "model", "head", "rows"}
        assert archive.reader.size <= 20_000
