"""Training images/s with each front end, beside the same network without one: `python tests/bench_frontends.py`.

DINO's step at the paper's crop sizes (2 x 224 and 6 x 96 px) through this library's trainer, in interleaved rounds
of one step each."""

import argparse
import itertools
import time

import numpy as np
import torch

from histonb.models.frontends import FRONTENDS
from histonb.models.masking import token_grid
from histonb.pretrain.config import preset, resolve
from histonb.pretrain.trainer import Trainer

PREFIXES = "", *(f"{name}+" for name in FRONTENDS)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--arch", nargs="+", default=["xcit_nano_12_p16_224", "xcit_small_12_p16_224"])
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--rounds", type=int, default=3)
args = parser.parse_args()

for arch in args.arch:
    crops = [torch.randn(2, args.batch, 3, 224, 224), torch.randn(6, args.batch, 3, 96, 96)]
    trainers = {}
    for front in PREFIXES:
        c = preset("histology", out="", arch=front + arch, n_local=6, batch_size=args.batch, micro_batch=0)
        trainers[front] = Trainer(resolve(c, 10**4), 10**4)
    seconds = {front: [] for front in PREFIXES}
    for i, (front, trainer) in itertools.product(range(args.rounds + 1), trainers.items()):
        began = time.perf_counter()
        trainer.train_step(itertools.repeat(crops))
        if i:
            seconds[front].append(time.perf_counter() - began)
    print(f"{arch}, {trainers[''].config.precision}, batch {args.batch}, {torch.get_num_threads()} threads")
    for front in PREFIXES:
        ratio = np.median(np.array(seconds[""]) / np.array(seconds[front]))
        backbone = trainers[front].student.backbone
        grids = ["x".join(map(str, token_grid(backbone, (size, size)))) for size in (224, 96)]
        speed = f"{args.batch / np.median(seconds[front]):7.1f} images/s, {ratio:.2f} times those without"
        print(f"  {front.rstrip('+') or 'none':16} {speed}; tokens {' and '.join(grids)}")
