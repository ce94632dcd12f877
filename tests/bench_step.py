"""Speed and memory of one DINO training step beside a plain transcription of the paper's loop over timm's XCiT.

    python tests/bench_step.py [--models xcit_nano_12_p16_224 ...] [--rounds 5] [--threads 2] [--batch 16] [--clock cpu]

Both train the same model with the same head on the same 2 x 224 + 6 x 96 crops, each in a process of its own, step by
step in turn; a ratio is the median over the rounds' pairs, and peak memory that of the process. Then: where the time of
our step goes, and what share of the machine's matrix-product peak is reached (of the whole network,
also where ours leaves
work out). Prints Markdown tables and writes runs/bench/step.json.
"""

import argparse
import math
import subprocess
import sys
import time

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

from histonb.core.files import repo_root, write_json
from histonb.pretrain.config import PretrainConfig, resolve
from histonb.pretrain.trainer import Trainer

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
K, TEACHER_TEMP, STUDENT_TEMP, MOMENTUM, LR, WEIGHT_DECAY, CLIP, DROP_PATH = (
    4096,
    0.04,
    0.1,
    0.996,
    3e-5,
    0.04,
    3.0,
    0.1,
)


# the paper's loop: algorithm 1 and appendix C of Caron et al. 2021, with the multi-crop of section 3.1


class PlainHead(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        for m in self.mlp:
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(256, K, bias=False))
        self.last_layer.parametrizations.weight.original0.data.fill_(1.0)
        self.last_layer.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PlainNet(nn.Module):
    def __init__(self, name, drop_path):
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=0, drop_path_rate=drop_path)
        self.head = PlainHead(self.backbone.num_features)

    def forward(self, crops):
        sizes, counts = torch.unique_consecutive(torch.tensor([x.shape[-1] for x in crops]), return_counts=True)
        tokens = []
        start = 0
        for count in counts.tolist():
            tokens.append(self.backbone(torch.cat(crops[start : start + count])))
            start += count
        return self.head(torch.cat(tokens))


class Plain:
    "Student, teacher, centre and optimiser, and the step, as the paper writes them."

    def __init__(self, name, bf16):
        self.bf16 = bf16
        self.center = torch.zeros(1, K)
        self.student = PlainNet(name, DROP_PATH)
        self.teacher = PlainNet(name, 0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        for p in self.teacher.parameters():
            p.requires_grad = False
        decayed = [p for p in self.student.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.student.parameters() if p.requires_grad and p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=LR, weight_decay=WEIGHT_DECAY
        )

    def loss(self, student, teacher):
        student = (student / STUDENT_TEMP).chunk(self.n_crops)
        teacher = F.softmax((teacher - self.center) / TEACHER_TEMP, dim=-1).detach().chunk(2)
        total, terms = 0, 0
        for g, q in enumerate(teacher):
            for v, s in enumerate(student):
                if v == g:
                    continue
                total += torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()
                terms += 1
        return total / terms

    def step(self, crops):
        crops = [crop for stacked in crops for crop in stacked]
        self.n_crops = len(crops)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            teacher = self.teacher(crops[:2])
            student = self.student(crops)
            loss = self.loss(student, teacher)
        if not math.isfinite(loss.item()):
            sys.exit(f"loss is {loss.item()}")
        self.optimiser.zero_grad()
        loss.backward()
        for p in self.student.parameters():
            if p.grad is not None:
                factor = CLIP / (p.grad.norm(2) + 1e-6)
                if factor < 1:
                    p.grad.mul_(factor)
        self.optimiser.step()
        with torch.no_grad():
            self.center = self.center * 0.9 + teacher.float().mean(0, keepdim=True) * 0.1
            for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                t.mul_(MOMENTUM).add_((1 - MOMENTUM) * s)
        return loss.item()


# ours


class Ours:
    def __init__(self, name, precision, batch, **kwargs):
        config = PretrainConfig(
            out="unused",
            arch=name,
            drop_path=DROP_PATH,
            out_dim=K,
            n_local=6,
            batch_size=batch,
            steps=10_000,
            warmup_epochs=0,
            freeze_last_epochs=0,
            lr=LR * 256 / batch,
            device="cpu",
            precision=precision,
            **kwargs,
        )
        self.trainer = Trainer(resolve(config, 100 * batch), 100 * batch)

    def step(self, crops):
        return self.trainer.train_step([crops])["loss"]


SIDES = {
    "paper fp32": lambda name, batch: Plain(name, False),
    "paper bf16": lambda name, batch: Plain(name, True),
    "ours fp32": lambda name, batch: Ours(name, "fp32", batch),
    "ours bf16": lambda name, batch: Ours(name, "bf16", batch),
}


def make_crops(batch):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(v, batch, 3, size, size, generator=generator) for v, size in ((2, 224), (6, 96))]


def serve(side, name, batch, clock):
    "Be one side: take a step for each line read, and answer with its seconds and the largest memory so far, in GiB."
    trained = SIDES[side](name, batch)
    crops = make_crops(batch)
    for _ in sys.stdin:
        start = CLOCKS[clock]()
        trained.step(crops)
        seconds = CLOCKS[clock]() - start
        with open("/proc/self/status") as f:
            peak = next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2**20
        print(seconds, peak, flush=True)


def in_turn(pair, name, batch, rounds, threads, clock):
    "Steps of two sides in turn, each in a process that waits for the other: {side: seconds}, {side: GiB}."
    command = [
        sys.executable,
        __file__,
        "--models",
        name,
        "--batch",
        str(batch),
        "--threads",
        str(threads),
        "--clock",
        clock,
        "--serve",
    ]
    children = {
        n: subprocess.Popen([*command, n], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        for n in pair
    }
    times = {n: [] for n in pair}
    peak = {}
    try:
        for i in range(rounds + 1):  # the first round warms up
            for n in pair if i % 2 else pair[::-1]:
                children[n].stdin.write("step\n")
                answer = children[n].stdout.readline().split()
                if not answer:
                    sys.exit(f"{n} of {name} ended with code {children[n].wait()}; -9 is a lack of memory")
                seconds, peak[n] = map(float, answer)
                if i:
                    times[n].append(seconds)
    finally:
        for child in children.values():
            child.terminate()
        for child in children.values():
            child.communicate()
    return {n: np.array(t) for n, t in times.items()}, peak


PAIRS = [("paper fp32", "ours fp32"), ("paper fp32", "ours bf16"), ("paper bf16", "ours bf16")]


def measure(name, batch, rounds, threads, clock):
    "A row for each pair: images/s and memory of both, and how many times faster and larger ours is."
    rows = []
    for pair in PAIRS:
        times, peak = in_turn(pair, name, batch, rounds, threads, clock)
        paper, ours = pair
        rows.append(
            dict(
                model=name,
                paper=paper,
                ours=ours,
                paper_images_per_s=batch / float(np.median(times[paper])),
                images_per_s=batch / float(np.median(times[ours])),
                times=float(np.median(times[paper] / times[ours])),
                paper_gib=peak[paper],
                gib=peak[ours],
            )
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def gemm_peak(dtype, clock, n=1536, repeats=8):
    "Best rate of a square matrix product, GFLOP/s."
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))

    def seconds():
        start = CLOCKS[clock]()
        a @ b
        return CLOCKS[clock]() - start

    return 2 * n**3 / min(seconds() for _ in range(repeats)) / 1e9


def step_flops(name, batch):
    "Multiplications and additions of the matrix products and convolutions of the paper's step, groups not counted."
    from torch.utils.flop_counter import FlopCounterMode

    side = Plain(name, False)
    with FlopCounterMode(display=False) as counter:
        side.step(make_crops(batch))
    counts = counter.get_flop_counts()["Global"]
    return sum(n for kind, n in counts.items() if "mm" in str(kind))


def table(header, rows):
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


KINDS = {  # what an operator's time counts as; the first match counts
    "matrix products": ("mm", "linear", "bmm", "matmul"),
    "convolutions": ("conv",),
    "optimiser, EMA, clipping": ("adam", "foreach", "lerp"),
    "norms": ("norm",),
    "GELU": ("gelu",),
    "softmax, loss": ("softmax",),
    "copies": ("copy", "cat", "contiguous", "clone", "fill", "zero"),
}


def profile(name, batch):
    "Where the time of our step goes: by kind of operator, and the largest operators."
    side = Ours(name, "bf16", batch)
    crops = make_crops(batch)
    side.step(crops)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        side.step(crops)
    own = sorted(((e.key, e.self_cpu_time_total / 1e6, e.count) for e in p.key_averages()), key=lambda e: -e[1])
    whole = sum(seconds for _, seconds, _ in own)
    kinds = {}
    for key, seconds, _ in own:
        kind = next(
            (k for k, words in KINDS.items() if any(w in key.lower() for w in words)), "other elementwise, dispatch"
        )
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    table(["operator", "calls", "ms", "share"], [(k, c, f"{1000 * s:.0f}", f"{s / whole:.0%}") for k, s, c in own[:12]])
    table(
        ["kind", "ms", "share"],
        [(k, f"{1000 * s:.0f}", f"{s / whole:.0%}") for k, s in sorted(kinds.items(), key=lambda kv: -kv[1])],
    )
    return {k: s / whole for k, s in kinds.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["xcit_nano_12_p16_224", "xcit_small_12_p16_224"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine (one thread)"
    )
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.serve:
        return serve(args.serve, args.models[0], args.batch, args.clock)
    results = []
    peaks = {}
    for name in args.models:
        peaks = {"fp32": gemm_peak(torch.float32, args.clock), "bf16": gemm_peak(torch.bfloat16, args.clock)}
        rows = measure(name, args.batch, args.rounds, args.threads, args.clock)
        flops = step_flops(name, args.batch)
        for r in rows:
            r["share_of_peak"] = flops * r["images_per_s"] / args.batch / 1e9 / peaks[r["ours"][-4:]]
        table(
            [
                f"{name}, {args.threads} thread(s), {args.clock} time",
                "paper, images/s",
                "ours, images/s",
                "times",
                "paper, GiB",
                "ours, GiB",
                "of the matrix-product peak",
            ],
            [
                (
                    f"{r['ours']} beside {r['paper']}",
                    f"{r['paper_images_per_s']:.2f}",
                    f"{r['images_per_s']:.2f}",
                    f"{r['times']:.2f}",
                    f"{r['paper_gib']:.2f}",
                    f"{r['gib']:.2f}",
                    f"{r['share_of_peak']:.0%}",
                )
                for r in rows
            ],
        )
        print("Matrix-product peak, GFLOP/s: " + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items()))
        results.append(dict(rows=rows, flops=flops, peak_gflops=peaks, profile=profile(name, args.batch)))
    write_json(
        repo_root() / "runs" / "bench" / "step.json",
        dict(
            threads=args.threads,
            clock=args.clock,
            batch=args.batch,
            torch=torch.__version__,
            timm=timm.__version__,
            results=results,
        ),
    )


if __name__ == "__main__":
    main()
