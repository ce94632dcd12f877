"""Training steps on a busy machine, with threads that sleep while they wait and with OpenMP's own policy.

    python tests/bench_busy.py [--busy 0 12] [--rounds 10] [--threads 2] [--arch xcit_nano_12_p16_224]

Both sides take steps of forward and backward in turn, each in a process of its own, beside so many busy processes; a
ratio is the median over the pairs. Without busy processes on an idle machine it is what passive waiting costs (at most
3%); with twelve on two cores, how much slower than its share of the machine a training is (at most 2 times). Prints a
table and writes runs/bench/busy.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

from histonb.core.files import repo_root, write_json
from histonb.core.processes import wait_policy

BUSY = "while True: pass"


def serve(arch, threads):
    "Take a step for each line read, and answer with its seconds."
    import torch

    from histonb.models.xcit import xcit

    torch.set_num_threads(threads)
    model = xcit(arch)
    images = torch.randn(8, 3, 112, 112)
    for _ in sys.stdin:
        began = time.perf_counter()
        model(images).sum().backward()
        print(time.perf_counter() - began, flush=True)


def start(environ, arch, threads):
    command = [sys.executable, __file__, "--serve", "--arch", arch, "--threads", str(threads)]
    return subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def measure(sides, busy, rounds):
    "Seconds of the steps of each side, which are taken in turn beside `busy` busy processes."
    times = {name: [] for name in sides}
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        for i in range(rounds):
            for name in sides if i % 2 else reversed(sides):
                sides[name].stdin.write("step\n")
                times[name].append(float(sides[name].stdout.readline()))
    finally:
        for process in others:
            process.kill()
            process.wait()
    return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 12])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arch", default="xcit_nano_12_p16_224")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.arch, args.threads)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    environs = {"default": dict(os.environ), "passive": os.environ | wait_policy()}
    sides = {name: start(environ, args.arch, args.threads) for name, environ in environs.items()}
    rows = []
    try:
        measure(sides, 0, 2)  # warms up
        for busy in args.busy:
            times = measure(sides, busy, args.rounds)
            ratios = [a / b for a, b in zip(times["default"], times["passive"], strict=True)]
            seconds = {name: statistics.median(t) for name, t in times.items()}
            rows.append({"busy": busy, "default_s": seconds["default"], "passive_s": seconds["passive"]})
            rows[-1]["times_faster"] = statistics.median(ratios)
    finally:
        for process in sides.values():
            process.kill()
            process.wait()
    idle = rows[0]["passive_s"]
    for row in rows:
        share = max(1.0, (row["busy"] + args.threads) / os.cpu_count())  # as slow as it must be
        row["slower_than_share"] = row["passive_s"] / idle / share
        print(
            f"{row['busy']:2} busy processes: a step {row['default_s']:.3f} s by default, {row['passive_s']:.3f} s "
            f"passive, {row['times_faster']:.2f} times faster; {row['slower_than_share']:.2f} of its share's time"
        )
    write_json(repo_root() / "runs/bench/busy.json", rows)


if __name__ == "__main__":
    main()
