"""Speed and memory of the scattering transform beside kymatio's torch backend, and whether both agree.

    python tests/bench_scattering.py [rounds]      writes runs/bench/scattering.json

kymatio needs SciPy before 1.17, so both go into a folder of their own (.venv/kymatio) that only this benchmark sees.
J=2, L=8, order 2 on a batch of 8x3x224x224, interleaved; a ratio is the median over the rounds' pairs. Peak memory is
that of a process that runs one of the two.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from histonb.core.files import repo_root, write_json
from histonb.models.scattering import Scattering

BATCH = 8
SIZE = 224


def both(J, size):
    from kymatio.torch import Scattering2D

    return {"ours": Scattering(J), "kymatio": Scattering2D(J=J, shape=(size, size), L=8)}


def agreement():
    "The largest difference for each number of scales."
    differences = {}
    for J, size in ((2, 224), (3, 96), (4, 128)):
        x = torch.rand(2, 3, size, size)
        ours, theirs = (f(x) for f in both(J, size).values())
        differences[J] = float((ours - theirs).abs().max())
        assert ours.shape == theirs.shape and differences[J] < 1e-4, differences
    return differences


def seconds(f, x):
    start = time.perf_counter()
    with torch.inference_mode():
        f(x)
    return time.perf_counter() - start


def inside(what, rounds):
    "Measure in a process where kymatio can be imported."
    torch.manual_seed(0)
    x = torch.rand(BATCH, 3, SIZE, SIZE)
    transforms = both(2, SIZE)
    if what != "speed":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds(transforms[what], x)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    differ = agreement()
    times = np.array([[seconds(f, x) for f in transforms.values()] for _ in range(rounds + 1)][1:])
    return {
        "differ": differ,
        "images_per_s": dict(zip(transforms, (BATCH / np.median(times, 0)).tolist(), strict=True)),
        "times_faster": float(np.median(times[:, 1] / times[:, 0])),
    }


def main(rounds=5):
    site = Path(sys.prefix) / "kymatio"
    if not (site / "kymatio").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        subprocess.run([*install, "scipy<1.17", "kymatio", "appdirs", "configparser"], check=True)

    def run(what):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--inside", what, str(rounds)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(repo_root())))},
        )
        return json.loads(done.stdout.splitlines()[-1])

    result = run("speed") | {"memory_mib": {what: run(what) for what in ("ours", "kymatio")}}
    print("largest difference: " + ", ".join(f"J={J} {v:.1e}" for J, v in result["differ"].items()))
    speed = result["images_per_s"]
    memory = result["memory_mib"]
    print(
        f"J=2, L=8, order 2, {BATCH}x3x{SIZE}x{SIZE}: ours {speed['ours']:.1f} img/s, kymatio {speed['kymatio']:.1f}, "
        f"{result['times_faster']:.2f} times as fast; memory {memory['ours']:.0f} and {memory['kymatio']:.0f} MiB"
    )
    write_json(
        repo_root() / "runs" / "bench" / "scattering.json",
        {"threads": torch.get_num_threads(), "torch": torch.__version__, **result},
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        print(json.dumps(inside(sys.argv[2], int(sys.argv[3]))))
    else:
        main(*map(int, sys.argv[1:2]))
