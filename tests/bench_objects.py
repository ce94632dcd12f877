"One table of overlaps against the loops that people use, in one run: python tests/bench_objects.py"

import time

import cellseg_metrics
import cv2
import numpy as np

from histonb.core.files import repo_root, write_json
from histonb.metrics.objects import metrics_from_sums, object_sums, pair_counts


def field(n, seed, step):
    "Ellipses on a jittered grid, n a side, of which many touch."
    rng = np.random.default_rng(seed)
    ids = np.zeros((n * step, n * step), np.int32)
    for k in range(n * n):
        y, x = divmod(k, n)
        centre = ((x + 0.5) * step + rng.uniform(-3, 3), (y + 0.5) * step + rng.uniform(-3, 3))
        cv2.ellipse(ids, (centre, tuple(rng.uniform(0.6 * step, step, 2)), rng.uniform(0, 180)), k + 1, -1)
    return ids


def double_loop(truth, predicted):
    "AJI (Kumar et al. 2017) and PQ, a mask of each object against those it meets, as in the code of papers."
    masks = {k: predicted == k for k in np.unique(predicted) if k}
    used = set()
    both = 0
    union = 0
    hits = 0
    iou_sum = 0.0
    numbers = [k for k in np.unique(truth) if k]
    for k in numbers:
        t = truth == k
        met = [j for j in np.unique(predicted[t]) if j]
        ious = [(t & masks[j]).sum() / (t | masks[j]).sum() for j in met]
        if not met:
            union += t.sum()
            continue
        best = int(np.argmax(ious))
        both = both + (t & masks[met[best]]).sum()
        union = union + (t | masks[met[best]]).sum()
        used.add(met[best])
        if ious[best] > 0.5:
            hits = hits + 1
            iou_sum = iou_sum + ious[best]
    union += sum(m.sum() for j, m in masks.items() if j not in used)
    return both / union, 2 * iou_sum / (len(numbers) + len(masks))


def timed(f, *args):
    start = time.perf_counter()
    out = f(*args)
    return out, time.perf_counter() - start


def main():
    rows = {}
    for n, step in ((16, 16), (25, 40), (100, 20)):  # a patch, a picture of CoNSeP, many nuclei
        truth = field(n, 0, step)
        predicted = np.roll(field(n, 1, step), 3, 1)
        ours, seconds = timed(lambda a, b: metrics_from_sums(object_sums(pair_counts(a, b))), truth, predicted)
        row = {"objects": n * n, "pixels": truth.size, "seconds": round(seconds, 4)}
        if n < 100:
            (aji, pq), loop = timed(double_loop, truth, predicted)
            theirs, package = timed(cellseg_metrics.panoptic_quality, truth, predicted)
            assert (
                abs(ours["aji"] - aji) < 1e-12
                and abs(ours["pq"] - pq) < 1e-12
                and abs(ours["pq"] - theirs["pq"]) < 1e-6
            )
            row |= {
                "loop_seconds": round(loop, 2),
                "loop_ratio": round(loop / seconds),
                "package_seconds": round(package, 2),
                "package_ratio": round(package / seconds),
            }
        rows[f"{n * n} objects"] = row
        print(
            f"{n * n:6,} objects, {truth.shape[0]} px: all figures {1e3 * seconds:.1f} ms"
            + (
                ""
                if n == 100
                else f"; AJI and PQ in a loop {loop:.2f} s: {row['loop_ratio']}x; "
                f"PQ of cellseg_metrics {package:.2f} s: {row['package_ratio']}x"
            )
        )
    write_json(repo_root(__file__) / "runs/bench/objects.json", rows)


if __name__ == "__main__":
    main()
