"""Annotating with the network in large tiles against the published scheme: `python tests/bench_annotate.py`.

The same network, with random weights, on the same phantom slide and machine. Published: 448 pixels are read and the
middle 144 kept, every task decoded on all 448, in batches as its authors run it. Ours: `TilePredictor` at its default
tile. Windows of each are timed in interleaved rounds, from pixels in memory to probabilities in memory. Then the
difference of both from the whole picture, the peak of memory (each in a process of its own), and what a slide's
annotation costs beside the network."""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from histonb.annotate.slide import annotate_slide
from histonb.core.files import read_json
from histonb.models.cerberus import Cerberus
from histonb.segment.predictors import TilePredictor
from histonb.segment.tiled_inference import TILE, inference_margin, score_tile, to_input
from histonb.synthetic.phantom import draw_field, draw_slide
from histonb.synthetic.writing import write_slide

READ, KEPT = 448, 144
CUT = (READ - KEPT) // 2


def network(arch, width, tasks):
    "Random weights of which all have a say, with the statistics of a phantom's pictures."
    torch.manual_seed(0)
    net = Cerberus(tasks, arch, width).train()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            m.momentum = 1.0
    with torch.no_grad():
        net(torch.cat([to_input(draw_field(i, size=288).image) for i in range(3)]))
    return net.eval()


@torch.inference_mode()
def published(net, images):
    "Probabilities of the middle of each picture."
    scores = net(torch.cat([to_input(i) for i in images]))
    return {
        n: (s.softmax(1) if s.shape[-1] < READ else s[..., CUT:-CUT, CUT:-CUT].softmax(1)).numpy()
        for n, s in scores.items()
    }


def counted(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() / 2


def peak(*args):
    "GiB that a process of its own holds at most, and while it has done nothing."
    code = (
        f"import runpy, sys; sys.argv = ['bench', *{[str(a) for a in args]!r}]; "
        f"runpy.run_path({__file__!r}, run_name='__main__'); print('peak', open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(re.search(r"VmHWM:\s*(\d+) kB", done.stdout)[1]) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--tasks", default="gland,lumen,nucleus,tissue")
    parser.add_argument("--tile", type=int, default=TILE)
    parser.add_argument("--batch", type=int, default=4, help="windows of 448 at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", choices=("published", "ours", "idle"), help="one round of one of them, to see its memory"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = network(args.arch, args.width, args.tasks.split(","))
    margin = inference_margin(net)
    tile = args.tile
    picture = np.random.default_rng(0).integers(0, 255, (tile + 2 * margin, tile + 2 * margin, 3), np.uint8)
    small = np.random.default_rng(0).integers(0, 255, (args.batch, READ, READ, 3), np.uint8)
    keep = margin, margin, margin + tile, margin + tile
    scorer = TilePredictor(net, precision="fp32")
    if args.only:
        if args.only == "published":
            published(net, small)
        if args.only == "ours":
            dict(scorer(picture, keep))
        return
    print(f"{args.arch}, width {args.width}, {args.tasks}, {args.threads} threads, {torch.__version__}")

    theirs = counted(published, net, small) / len(small) / KEPT**2
    ours = counted(lambda: list(score_tile(net, to_input(picture), keep))) / tile**2
    print(
        f"multiply-adds a pixel: {theirs / 1e3:.0f} thousand as published, "
        f"{ours / 1e3:.0f} thousand "
        f"in tiles of {tile} with margins of {margin}: {theirs / ours:.2f} times fewer"
    )

    plain = network(args.arch, args.width, args.tasks.split(","))  # as its authors run it: float32, channels first
    ways = {
        "published, as its authors run it": (lambda: published(plain, small), len(small) * KEPT**2),
        "published, channels last": (lambda: published(net, small), len(small) * KEPT**2),
        "ours, fp32": (lambda: dict(scorer(picture, keep)), tile**2),
    }
    if TilePredictor(net).precision == "bf16":
        half = TilePredictor(net, precision="bf16")
        ways["ours, bf16"] = lambda: dict(half(picture, keep)), tile**2
    seconds = {name: [] for name in ways}
    for i in range(args.rounds + 1):
        for name, (run, _) in ways.items():
            began = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - began)
    speed = {name: np.array([pixels * 0.25e-6 / s for s in seconds[name]]) for name, (_, pixels) in ways.items()}
    for name, mm2 in speed.items():
        print(
            f"  {name:32} {np.median(mm2):.5f} mm2/s, "
            + ", ".join(f"{np.median(mm2 / speed[other]):.2f} times `{other}`" for other in list(ways)[:2])
        )

    phantom = draw_slide(4, (1500, 1300), cover=(0.6, 0.7)).image
    with torch.inference_mode():
        whole = {n: s[0].softmax(0).numpy() for n, s in net(to_input(phantom)).items() if s.shape[-1] == 1300}
    # on the grid of the whole picture, so that only the margin makes a difference
    top = 10 * 16 + 64
    left = 12 * 16 + 64
    box = np.s_[:, top + CUT : top + CUT + KEPT, left + CUT : left + CUT + KEPT]
    window = published(net, [phantom[top : top + READ, left : left + READ]])
    gap = {n: np.abs(window[n][0] - w[box]) for n, w in whole.items()}
    print(
        f"published margin {CUT}: probabilities differ from the whole picture's "
        f"by up to {max(g.max() for g in gap.values()):.1e}, "
        f"on average {np.mean([g.mean() for g in gap.values()]):.1e}"
    )
    shifted = published(
        net, [phantom[top - CUT % 16 : top - CUT % 16 + READ, left - CUT % 16 : left - CUT % 16 + READ]]
    )
    gap = {
        n: np.abs(shifted[n][0] - w[:, top - CUT % 16 + CUT :, left - CUT % 16 + CUT :][:, :KEPT, :KEPT])
        for n, w in whole.items()
    }
    print(
        f"  its windows lie 8 pixels off the grid of 16, all alike; from the whole picture on the grid that "
        f"differs by up to {max(g.max() for g in gap.values()):.1e}, "
        f"on average {np.mean([g.mean() for g in gap.values()]):.1e}"
    )
    inner = (576, 432, 1008, 864)
    t = inference_margin(net)
    outer = [max(inner[0] - t, 0), max(inner[1] - t, 0), min(inner[2] + t, 1500), min(inner[3] + t, 1300)]
    ours = {
        n: s[0].softmax(0).numpy()
        for n, s in score_tile(
            net,
            to_input(phantom[outer[0] : outer[2], outer[1] : outer[3]]),
            (inner[0] - outer[0], inner[1] - outer[1], inner[2] - outer[0], inner[3] - outer[1]),
        )
        if n in whole
    }
    window = np.s_[:, inner[0] : inner[2], inner[1] : inner[3]]
    largest = max(np.abs(s - whole[n][window]).max() for n, s in ours.items())
    print(f"ours: by up to {largest:.1e}")

    options = [
        "--arch",
        args.arch,
        "--width",
        args.width,
        "--tasks",
        args.tasks,
        "--tile",
        args.tile,
        "--batch",
        args.batch,
    ]
    idle, theirs, ours = (peak(*options, "--only", what) for what in ("idle", "published", "ours"))
    print(
        f"memory: {ours:.2f} GiB in tiles of {tile}, {theirs:.2f} GiB as published "
        f"in batches of {args.batch}; {idle:.2f} GiB before anything is computed"
    )

    with tempfile.TemporaryDirectory() as folder:
        write_slide(Path(folder) / "a.tiff", draw_slide(4, (2 * tile, 2 * tile), cover=(0.6, 0.7)).image, mpp=0.5)
        began = time.perf_counter()
        counts = read_json(annotate_slide(Path(folder) / "a.tiff", "stain", folder, tile=tile) / "annotation.json")[
            "counts"
        ]
        print(
            f"a slide of {4 * tile**2 / 4e6:.2f} mm2 by stain, without a network: "
            f"{time.perf_counter() - began:.1f} s for {sum(counts.values())} objects with all files; "
            f"the network alone: "
            + ", ".join(f"{4 * np.median(s):.0f} s {n}" for n, s in seconds.items() if n.startswith("ours"))
        )


if __name__ == "__main__":
    main()
