"""Results of a recipe: a JSON file, a table in Markdown, and where they come from."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import likely

RESULTS = Path(__file__).parent / "results"


def provenance(seconds: float) -> dict[str, Any]:
    """Command, machine, versions and date of a run that took so many CPU seconds."""
    return {
        "command": shlex.join(["python", f"papers/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "cpu_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"likely": likely.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(name: str, content: dict[str, Any], table: list[str]) -> None:
    """Write ``results/NAME.json`` and ``results/NAME.md``; ``content`` has the provenance under ``run``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    run = content["run"]
    foot = (
        f"`{run['command']}`: {run['cpu_seconds']} CPU s, {run['threads']} thread(s), {run['machine']}, {run['date']}."
    )
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    text = "\n".join([*table, "", foot, f"Versions: {versions}.", ""])
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
