"The bootstrap through confusion matrices against a plain loop over scikit-learn: python tests/bench_metrics.py"

import time
import warnings

import numpy as np
from sklearn import metrics as sk

from histonb.core.files import repo_root, write_json
from histonb.metrics.classification import (
    CLASSIFICATION_METRICS,
    confusion_by_group,
    confusion_metrics,
)
from histonb.metrics.intervals import bootstrap_groups

N_SLIDES, TILES, N_CLASSES, N_BOOT = 100, 100, 5, 1000
SHARE = 0.05  # of the resamples that the plain loop is timed on


def plain(y, p, slides, times):
    "Draw slides, gather their tiles, ask scikit-learn: (B, 4)."
    rows = [np.flatnonzero(slides == s) for s in range(N_SLIDES)]
    out = []
    for t in times:
        drawn = np.concatenate([rows[s] for s in np.repeat(np.arange(N_SLIDES), t)])
        a = y[drawn]
        b = p[drawn]
        out.append(
            [
                sk.accuracy_score(a, b),
                sk.balanced_accuracy_score(a, b),
                sk.f1_score(a, b, average="macro"),
                sk.cohen_kappa_score(a, b, weights="quadratic"),
            ]
        )
    return np.array(out)


def main():
    rng = np.random.default_rng(0)
    slides = np.repeat(np.arange(N_SLIDES), TILES)
    y = rng.choice(N_CLASSES, len(slides), p=[0.4, 0.3, 0.15, 0.1, 0.05])
    p = np.where(rng.random(len(y)) < 0.7, y, rng.integers(0, N_CLASSES, len(y)))

    start = time.perf_counter()
    ours = confusion_metrics(bootstrap_groups(confusion_by_group(y, p, slides, N_CLASSES), N_BOOT, seed=0))
    ours_seconds = time.perf_counter() - start

    times = np.random.default_rng(0).multinomial(N_SLIDES, np.full(N_SLIDES, 1 / N_SLIDES), size=N_BOOT)[
        : int(SHARE * N_BOOT)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        theirs = plain(y, p, slides, times)
        plain_seconds = (time.perf_counter() - start) / SHARE

    worst = np.abs(np.stack([ours[k][: len(times)] for k in CLASSIFICATION_METRICS], 1) - theirs).max()
    assert worst < 1e-12, worst
    result = {
        "tiles": len(y),
        "slides": N_SLIDES,
        "resamples": N_BOOT,
        "seconds": round(ours_seconds, 4),
        "plain_seconds": round(plain_seconds, 2),
        "ratio": round(plain_seconds / ours_seconds),
        "largest_difference": worst,
    }
    write_json(repo_root(__file__) / "runs/bench/metrics.json", result)
    print(
        f"{N_BOOT} resamples of {N_SLIDES} slides, {len(y):,} tiles: {1e3 * ours_seconds:.1f} ms, "
        f"scikit-learn in a loop {plain_seconds:.1f} s: {result['ratio']}x"
    )


if __name__ == "__main__":
    main()
