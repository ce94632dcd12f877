"Ten thousand nuclei and the glands of a slide, against a loop over objects: python tests/bench_instances.py"

import time

import cv2
import numpy as np
from scipy import ndimage
from skimage.measure import regionprops
from skimage.segmentation import watershed

from histonb.core.files import repo_root, write_json
from histonb.metrics.objects import metrics_from_sums, object_sums, pair_counts
from histonb.segment.instances import glands, majority_types, nuclei, object_table
from histonb.segment.targets import instance_target


def field(n, step, seed=0):
    "Ellipses on a jittered grid, n a side, of which many touch."
    rng = np.random.default_rng(seed)
    ids = np.zeros((n * step, n * step), np.int32)
    for k in range(n * n):
        y, x = divmod(k, n)
        centre = (
            (x + 0.5) * step + rng.uniform(-0.15, 0.15) * step,
            (y + 0.5) * step + rng.uniform(-0.15, 0.15) * step,
        )
        cv2.ellipse(ids, (centre, tuple(rng.uniform(0.6 * step, step, 2)), rng.uniform(0, 180)), k + 1, -1)
    return ids


def soft(ids, kernel, seed=1):
    "Probabilities as a network gives them: (3, H, W), blurred and noisy."
    p = np.stack([instance_target(ids, kernel) == c for c in range(3)], -1).astype(np.float32)
    p = cv2.GaussianBlur(p, (0, 0), 0.7) + np.random.default_rng(seed).normal(0, 0.03, p.shape).astype(np.float32)
    p = np.clip(p, 1e-3, 1)
    return np.ascontiguousarray((p / p.sum(-1, keepdims=True)).transpose(2, 0, 1))


EIGHT = np.ones((3, 3))
PLUS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def label(mask, smallest):
    ids = ndimage.label(mask, EIGHT)[0]
    for r in regionprops(ids):
        if r.area < smallest:
            ids[r.slice][r.image] = 0
    return ids


def fill(ids):
    for r in regionprops(ids):
        ids[r.slice][ndimage.binary_fill_holes(r.image) & (ids[r.slice] == 0)] = r.label
    return ids


def loop_nuclei(probs):
    mask = label(cv2.erode(np.uint8(probs[1] + probs[2] > 0.5), PLUS), 8) > 0
    return watershed(-probs[1], fill(label(probs[1] > 0.5, 4)), mask=mask)


def loop_glands(probs):
    ids = label(probs[1] - (probs[2] > 0.5) > 0.55, 1000)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11))
    out = np.zeros_like(ids)
    for r in regionprops(ids):
        whole = ndimage.binary_fill_holes(cv2.dilate(np.uint8(ids == r.label), kernel))
        out[whole & (out == 0)] = r.label
    return out


def loop_types(ids, types):
    out = np.zeros(ids.max() + 1, np.uint8)
    for r in regionprops(ids):
        found, votes = np.unique(types[r.slice][r.image], return_counts=True)
        votes[found == 0] = 0
        out[r.label] = found[votes.argmax()]
    return out


def loop_table(ids, probs):
    return [(r.label, *r.centroid, *r.bbox, r.area, r.intensity_mean) for r in regionprops(ids, 1 - probs[0])]


def timed(f, *args, repeats=3):
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        out = f(*args)
        best = min(best, time.perf_counter() - start)
    return out, best


def main():
    truth = field(100, 24)
    probs = soft(truth, 3)
    types = np.random.default_rng(0).choice(5, 10_001).astype(np.uint8)[truth]
    rows = {}
    ids, seconds = timed(nuclei, probs)
    for name, ours, loop, args in (
        ("nuclei", nuclei, loop_nuclei, (probs,)),
        ("types", majority_types, loop_types, (ids, types)),
        ("table", object_table, loop_table, (ids, probs)),
        ("glands", glands, loop_glands, (soft(field(12, 200), 11),)),
    ):
        found, seconds = timed(ours, *args)
        theirs, slow = timed(loop, *args, repeats=1)
        if name == "types":
            assert np.array_equal(found, theirs)
        if name == "table":
            assert np.allclose(found["probability"], [r[-1] for r in theirs], atol=1e-5)
        if name in ("nuclei", "glands"):
            assert (pq := metrics_from_sums(object_sums(pair_counts(theirs, found)))["pq"]) > 0.98, pq
        rows[name] = {"seconds": round(seconds, 3), "loop_seconds": round(slow, 2), "ratio": round(slow / seconds, 1)}
        print(f"{name}: {seconds:.2f} s; with loops {slow:.2f} s: {slow / seconds:.1f}x")
    fit = metrics_from_sums(object_sums(pair_counts(truth, ids)))
    print(
        f"{len(np.unique(truth)) - 1:,} nuclei on {truth.shape[0]} x {truth.shape[1]} px, "
        f"{ids.max():,} found, PQ {fit['pq']:.3f}"
    )
    write_json(
        repo_root(__file__) / "runs/bench/instances.json",
        rows | {"objects": int(ids.max()), "pq": round(float(fit["pq"]), 4)},
    )


if __name__ == "__main__":
    main()
