"""TVAE or CTGAN fitted to a table, in an environment of their own; called by synthetic.py.

    python benchmarks/synthetic_rivals.py tvae TRAIN.csv SAMPLED.csv '["age", …]' --rows N --epochs 300 --seed 0

The list names the numeric columns; all others are categories.  Prints CPU seconds of fit and of sampling as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version

import numpy as np
import pandas as pd
import torch
from ctgan import CTGAN, TVAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("tvae", "ctgan"))
    parser.add_argument("train")
    parser.add_argument("sampled")
    parser.add_argument("numeric", type=json.loads)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)  # noqa: NPY002  # what ctgan draws from
    frame = pd.read_csv(arguments.train, dtype=str, keep_default_na=False)
    for column in arguments.numeric:
        frame[column] = pd.to_numeric(frame[column])
    clock = [time.process_time()]
    model = (TVAE if arguments.model == "tvae" else CTGAN)(epochs=arguments.epochs)
    model.fit(frame, [column for column in frame if column not in arguments.numeric])
    clock.append(time.process_time())
    sampled = model.sample(arguments.rows)
    clock.append(time.process_time())
    sampled.to_csv(arguments.sampled, index=False)
    print(json.dumps({"fit": clock[1] - clock[0], "sample": clock[2] - clock[1], "version": version("ctgan")}))


if __name__ == "__main__":
    main()
