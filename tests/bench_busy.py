"""Training steps on a busy machine, with threads that wait as the library has them and with OpenMP's own policy.

    python tests/bench_busy.py [--busy 0 12] [--rounds 10] [--threads 2] [--arch xcit_nano_12_p16_224]

Both sides take steps of forward and backward in turn, each in a process of its own, beside so many busy processes; a
ratio is the median over the pairs. Without busy processes on an idle machine it is what the policy costs (at most 3%);
with twelve on two cores, how much slower than its share of the machine a training is (at most 2 times). Prints a table
and writes runs/bench/busy.json.
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


def measure(sides, rounds):
    "Seconds of the steps of each side, which are taken in turn."
    times = {name: [] for name in sides}
    for i in range(rounds):
        for name in sides if i % 2 else reversed(sides):
            time.sleep(0.05)  # threads of the step before may still spin
            sides[name].stdin.write("step\n")
            times[name].append(float(sides[name].stdout.readline()))
    return times


def measure_beside(busy, args):
    "Steps by OpenMP's policy and by ours, both begun beside `busy` busy processes: medians, and the paired ratio."
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        time.sleep(0.2)
        policy = wait_policy()
        environs = {"default": dict(os.environ), "ours": os.environ | policy}
        sides = {name: start(environ, args.arch, args.threads) for name, environ in environs.items()}
        processes += sides.values()
        measure(sides, 2)  # warms up
        times = measure(sides, args.rounds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    row = {"busy": busy, "policy": " ".join(map("=".join, policy.items()))}
    row |= {f"{name}_s": statistics.median(t) for name, t in times.items()}
    ratios = [a / b for a, b in zip(times["default"], times["ours"], strict=True)]
    return row | {"times_faster": statistics.median(ratios)}


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
    rows = [measure_beside(busy, args) for busy in args.busy]
    for row in rows:
        share = max(1.0, (row["busy"] + args.threads) / os.cpu_count())  # as slow as it must be
        row["slower_than_share"] = row["ours_s"] / rows[0]["ours_s"] / share
        print(
            f"{row['busy']:2} busy processes: a step {row['default_s']:.3f} s by default, {row['ours_s']:.3f} s with "
            f"{row['policy']}, {row['times_faster']:.2f} times faster; {row['slower_than_share']:.2f} of its share"
        )
    write_json(repo_root() / "runs/bench/busy.json", rows)


if __name__ == "__main__":
    main()
