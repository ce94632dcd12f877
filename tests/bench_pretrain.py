"""Whole pre-training runs from shards: the share of time that a step waits for data, and what a second process brings.

    python tests/bench_pretrain.py [--arch xcit_small_12_p16_224] [--steps 8] [--batch 16]

Every run is `histonb pretrain` on synthetic tiles, 2 x 224 + 6 x 96 crops;
the first half of its steps warms up and is left
out. Prints a Markdown table and writes runs/bench/pretrain.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from histonb.core.files import read_jsonl, repo_root, write_json
from histonb.datasets.example import example_tiles

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"


def run(folder, processes, threads, **values):
    "Medians of images/s and of the share of waiting, over the later half of a run."
    config = folder / "config.json"
    out = folder / f"{processes}x{threads}"
    write_json(config, dict(out=str(out), tiles=str(folder / "tiles"), n_local=6, log_every=1, **values))
    start = TORCHRUN + (str(processes),) if processes > 1 else ()
    subprocess.run(
        [sys.executable, *start, "-m", "histonb.cli", "pretrain", str(config)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HISTONB_BATCH": "1"},
    )
    rows = [row for row in read_jsonl(out / "log.jsonl") if "data_wait" in row]
    rows = rows[len(rows) // 2 :]
    return {"processes": processes, "threads": threads} | {
        k: float(np.median([row[k] for row in rows])) for k in ("images_per_s", "data_wait", "memory")
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="xcit_small_12_p16_224")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--batch", type=int, default=16, help="tiles a step of one process; two processes take twice as many"
    )
    args = parser.parse_args()
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        example_tiles(folder)
        common = dict(arch=args.arch, steps=args.steps)
        rows = [
            run(folder, 1, cores, batch_size=args.batch, workers=2, **common),
            run(folder, 1, 1, batch_size=args.batch, workers=1, **common),
            run(folder, 2, 1, batch_size=2 * args.batch, workers=1, **common),
        ]
    print(
        f"\n| {args.arch}, {args.batch} tiles a process and step | threads of each | workers of each | images/s "
        "| times one process of 1 thread | waiting for data | peak memory of a process |\n|---|---|---|---|---|---|---|"
    )
    for r, workers in zip(rows, (2, 1, 1), strict=True):
        print(
            f"| {r['processes']} process(es) | {r['threads']} | {workers} | {r['images_per_s']:.2f} "
            f"| {r['images_per_s'] / rows[1]['images_per_s']:.2f} | {r['data_wait']:.1%} | {r['memory']:.2f} GiB |"
        )
    write_json(repo_root() / "runs" / "bench" / "pretrain.json", vars(args) | {"rows": rows})


if __name__ == "__main__":
    main()
