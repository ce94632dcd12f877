"Metrics of all masks of EBHI-Seg, with intervals, against scikit-learn by mask: python tests/bench_overlap.py"

import time
import warnings

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from histonb.core.files import repo_root, write_json
from histonb.metrics.overlap import mask_overlap, overlap_by_category, overlap_metrics

N, SIDE, N_CASES = 2228, 224, 353
SHARE = 0.05  # of the masks that scikit-learn is timed on


def masks(seed):
    "Discs of all sizes."
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:SIDE, :SIDE]
    some = np.stack(
        [((y - a) ** 2 + (x - b) ** 2 < r**2) for a, b, r in rng.uniform((60, 60, 10), (160, 160, 120), (100, 3))]
    ).view(np.uint8)
    return some[rng.integers(0, 100, N)]


def main():
    truth = masks(0)
    predicted = masks(1)
    rng = np.random.default_rng(0)
    categories = rng.integers(0, 6, N)
    cases = rng.integers(0, N_CASES, N)

    start = time.perf_counter()
    counts = mask_overlap(truth, predicted)
    counted = time.perf_counter() - start
    found = overlap_by_category(counts, categories, cases)
    seconds = time.perf_counter() - start

    n = int(SHARE * N)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = np.array(
            [
                precision_recall_fscore_support(t.ravel(), p.ravel(), average="binary", zero_division=0)[:3]
                for t, p in zip(truth[:n], predicted[:n], strict=True)
            ]
        )
    theirs = (time.perf_counter() - start) / SHARE
    assert np.abs(overlap_metrics(counts[:n])[:, [3, 4, 0]] - plain).max() < 1e-12 and found["all"]["n"] == N
    result = {
        "masks": N,
        "side": SIDE,
        "count_seconds": round(counted, 3),
        "seconds": round(seconds, 3),
        "sklearn_seconds": round(theirs, 1),
        "ratio": round(theirs / seconds),
    }
    write_json(repo_root(__file__) / "runs/bench/overlap.json", result)
    print(
        f"{N:,} masks of {SIDE}x{SIDE}: counts {counted:.2f} s, with metrics and intervals {seconds:.2f} s "
        f"(wanted: below 2 s); precision, recall and Dice of scikit-learn {theirs:.1f} s: {result['ratio']}x"
    )


if __name__ == "__main__":
    main()
