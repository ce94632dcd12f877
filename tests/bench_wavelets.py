"""Speed of the wavelet transforms beside ptwt and pytorch_wavelets: forward and backward on 64x3x224x224, interleaved.

    python tests/bench_wavelets.py [rounds]      writes runs/bench/wavelets.json

All give the same bands; a ratio is the median over the rounds' pairs. Only ptwt has a transform in three dimensions.
"""

import sys
import time
import warnings

import numpy as np
import ptwt
import torch

from histonb.core.files import repo_root, write_json
from histonb.models.wavelets import dwt

warnings.filterwarnings("ignore", message="pkg_resources")
from pytorch_wavelets import DWTForward  # noqa: E402


def transforms(wavelet, mode):
    "Name -> function from an image to the list aa, ad, da, dd, in two dimensions."
    module = DWTForward(J=1, wave=wavelet, mode=mode)

    def with_ptwt(x):
        coarse, (da, ad, dd) = ptwt.wavedec2(x, wavelet, level=1, mode=mode)
        return [coarse, ad, da, dd]

    def with_pytorch_wavelets(x):
        coarse, (details,) = module(x)
        da, ad, dd = details.unbind(2)
        return [coarse, ad, da, dd]

    return {
        "ours": lambda x: list(dwt(x, (-2, -1), wavelet, mode).values()),
        "ptwt": with_ptwt,
        "pytorch_wavelets": with_pytorch_wavelets,
    }


def volumes(wavelet, mode):
    "The same in three dimensions, colour among them."
    names = list(dwt(torch.zeros(2, 2, 2), (-3, -2, -1)))

    def with_ptwt(x):
        coarse, details = ptwt.wavedec3(x, wavelet, level=1, mode=mode)
        return [coarse, *(details[n] for n in names[1:])]

    return {"ours": lambda x: list(dwt(x, (-3, -2, -1), wavelet, mode).values()), "ptwt": with_ptwt}


def seconds(transform, x, gradients):
    x.grad = None
    start = time.perf_counter()
    torch.autograd.backward(transform(x), gradients)
    return time.perf_counter() - start


def main(rounds=7):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 224, 224, requires_grad=True)
    rows = []
    for kind, wavelet, mode in (
        ("2d", "haar", "zero"),
        ("2d", "db2", "symmetric"),
        ("2d", "db4", "symmetric"),
        ("3d", "haar", "zero"),
    ):
        functions = {"2d": transforms, "3d": volumes}[kind](wavelet, mode)
        bands = {name: f(x) for name, f in functions.items()}
        gradients = [torch.randn_like(b) for b in bands["ours"]]
        for name, other in bands.items():
            for a, b in zip(bands["ours"], other, strict=True):
                assert torch.allclose(a, b, atol=1e-5), name
        del bands
        times = {name: [] for name in functions}
        for _ in range(rounds + 1):
            for name, f in functions.items():
                times[name].append(seconds(f, x, gradients))
        times = {name: np.array(t[1:]) for name, t in times.items()}
        row = {
            "kind": kind,
            "wavelet": wavelet,
            "mode": mode,
            "ms": {n: float(np.median(t) * 1e3) for n, t in times.items()},
            "times_faster": {n: float(np.median(t / times["ours"])) for n, t in times.items() if n != "ours"},
        }
        rows.append(row)
        print(
            f"{kind} {wavelet} ({mode}): ours {row['ms']['ours']:.0f} ms; "
            + "; ".join(f"{n} {row['ms'][n]:.0f} ms, {v:.2f} times as long" for n, v in row["times_faster"].items()),
            flush=True,
        )
    write_json(
        repo_root() / "runs" / "bench" / "wavelets.json",
        {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows},
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
