"""Starting weights: features at several depths beside one, layer-wise rates in a training step, reading ImageNet's.

    python tests/bench_weights.py [--tiles 192] [--rounds 7] [--clock cpu]

Two sides take turns in one process (reading weights: in processes of their own); a ratio, or a difference, is the
median over the rounds. Targets: several depths at most 1.05 times one, layer-wise rates not to be told from equal
ones, weights read in under 2 s. Prints Markdown tables and writes runs/bench/weights.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from histonb.core.files import repo_root, write_json
from histonb.datasets.example import example_tiles
from histonb.pretrain.config import PretrainConfig, resolve
from histonb.pretrain.trainer import Trainer
from histonb.probe.encoders import load_encoder
from histonb.probe.features import extract
from histonb.slides.tile_store import TileShards

CLOCKS = {"wall": time.perf_counter, "cpu": lambda: sum(os.times()[:4])}  # cpu: with the processes waited for
DEPTHS = {
    "imagenet": (2, 3, 4),
    "random:vit_tiny_patch16_224": (4, 6, 8, 11),
    "random:xcit_nano_12_p16_224": (5, 8, 11),
}
READ = "from histonb.models.starting_weights import load_start; load_start({!r})"


def in_turn(sides, rounds, clock):
    "Seconds of functions that take turns, (rounds, sides); the first round warms up."
    times = []
    for i in range(rounds + 1):
        spent = {}
        for name in list(sides) if i % 2 else list(sides)[::-1]:
            start = CLOCKS[clock]()
            sides[name]()
            spent[name] = CLOCKS[clock]() - start
        times.append([spent[name] for name in sides])
    return np.array(times[1:])


def compared(times):
    "Median ratio of the second side to the first, and the middle half of the rounds' ratios."
    ratios = times[:, 1] / times[:, 0]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {"times": float(middle), "low": float(low), "high": float(high), "seconds": np.median(times, 0).tolist()}


def extraction(tiles, args):
    rows = {}
    for name, depths in DEPTHS.items():
        one, several = (load_encoder(name, pool="class", depths=d) for d in (depths[-1:], depths))
        sides = {"one": lambda e=one: extract(tiles, e), "several": lambda e=several: extract(tiles, e)}
        rows[f"{name}, depths {' '.join(map(str, depths))}"] = compared(in_turn(sides, args.rounds, args.clock))
    return rows


def make_trainer(arch, layer_decay, batch=16):
    config = PretrainConfig(
        out="unused",
        arch=arch,
        out_dim=1024,
        n_local=2,
        batch_size=batch,
        steps=10_000,
        warmup_epochs=0,
        freeze_last_epochs=0,
        device="cpu",
        precision="fp32",
        layer_decay=layer_decay,
    )
    return Trainer(resolve(config, 100 * batch), 100 * batch)


def steps(args, batch=16):
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(2, batch, 3, size, size, generator=generator) for size in (128, 64)]
    rows = {}
    for arch in ("vit_tiny_patch16_224", "efficientnet_lite0"):
        trainers = {decay: make_trainer(arch, decay, batch) for decay in (1.0, 0.75)}
        sides = {decay: lambda t=trainer: t.train_step([crops]) for decay, trainer in trainers.items()}
        rows[f"{arch}, layer_decay .75"] = compared(in_turn(sides, 2 * args.rounds, args.clock))
    return rows


def reading(args):
    "Seconds that ImageNet's weights add to a new process that makes the same network with random ones."
    sides = {}
    for name in ("random:efficientnet_lite0", "imagenet"):
        command = [sys.executable, "-c", READ.format(name)]
        sides[name] = lambda command=command: subprocess.run(command, check=True)
    times = in_turn(sides, args.rounds, args.clock)
    return {"adds_s": float(np.median(times[:, 1] - times[:, 0])), "seconds": np.median(times, 0).tolist()}


def table(what, rows):
    print(f"\n| {what} | times | middle half of the rounds | target |\n|---|---|---|---|")
    for name, row in rows.items():
        target = "at most 1.05" if "depths" in name else "1 within the rounds"
        print(f"| {name} | {row['times']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {target} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiles", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiles = TileShards(example_tiles(Path(folder) / "tiles", n_slides=4))
        tiles = TileShards(tiles.folder, tiles.table.head(args.tiles))
        results = {"extraction": extraction(tiles, args)}
        table(f"extraction of {len(tiles)} tiles, several depths beside the last", results["extraction"])
    results["steps"] = steps(args)
    table("a step of DINO beside one with equal rates", results["steps"])
    results["reading"] = reading(args)
    print(f"\nReading ImageNet's weights adds {results['reading']['adds_s']:.2f} s (target: under 2 s)")
    write_json(repo_root() / "runs" / "bench" / "weights.json", vars(args) | results)


if __name__ == "__main__":
    main()
