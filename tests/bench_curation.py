"""Curation of many tiles on the CPU: seconds and memory of each part, and ratios against what one would use instead.

    python tests/bench_curation.py [--n 100000] [--small 50000]

Synthetic features (kinds of very unequal frequency, variants of each, and 5% near-copies), N x 512 in float16, written
to a file and read as a memory map. scikit-learn is compared on the first `--small` rows in float32 in memory,
which it needs: same rows, as many clusters, and the same measure of quality, the mean of 1 - cosine to the direction
of the own cluster. Prints two Markdown tables.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.neighbors import NearestNeighbors

from histonb.core.files import repo_root, write_json
from histonb.core.progress import progress
from histonb.curate.clusters import UnitRows, blocks, cluster_levels, hierarchy, kmeans, moments, neighbours
from histonb.curate.curation import balanced_sample, cap_slides, curate, near_duplicates


def write(path, n, dim=512, kinds=2000, seed=0):
    "Features block by block into a file, and the number of near-copies among them."
    rng = np.random.default_rng(seed)
    centres, variants = (rng.standard_normal((k, dim), np.float32) for k in (kinds, 10 * kinds))
    share = 1 / np.arange(1, kinds + 1)
    x = np.lib.format.open_memmap(path, "w+", np.float16, (n, dim))
    copies = 0
    for part in progress(blocks(n), "synthetic features", unit="blocks"):
        size = part.stop - part.start
        kind = rng.choice(kinds, size, p=share / share.sum())
        block = (
            centres[kind]
            + 0.6 * variants[10 * kind + rng.integers(0, 10, size)]
            + 0.6 * rng.standard_normal((size, dim), np.float32)
        )
        twins = size // 20
        block[-twins:] = block[:twins] + 0.1 * rng.standard_normal((twins, dim), np.float32)
        x[part], copies = block, copies + twins
    x.flush()
    return copies


def loss(x, cluster):
    "Mean of 1 - cosine of rows to the mean direction of their cluster."
    _, cluster = np.unique(cluster, return_inverse=True)
    sums = torch.zeros(cluster.max() + 1, x.shape[1]).index_add_(0, torch.from_numpy(cluster), torch.from_numpy(x))
    return float(1 - (x * torch.nn.functional.normalize(sums, dim=1).numpy()[cluster]).sum(1).mean())


def timed(function, *args, **kwargs):
    "The result, and seconds of wall clock and of all cores."
    wall = time.perf_counter()
    cpu = time.process_time()
    return function(*args, **kwargs), np.array([time.perf_counter() - wall, time.process_time() - cpu])


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def against(x, k):
    "The same on the same rows by scikit-learn and by histonb: seconds of all cores, and quality."
    queries = x[:2000]
    rows = []
    (_, theirs), t = timed(
        lambda: NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(x).kneighbors(queries)
    )
    (ours, _), o = timed(neighbours, queries, x, 10)
    rows.append(
        {
            "part": f"10 neighbours of 2,000 in {len(x):,}",
            "scikit-learn s": t[1],
            "histonb s": o[1],
            "scikit-learn": "exact",
            "histonb": f"{(ours == theirs).mean():.4%} the same",
        }
    )
    theirs, t = timed(lambda: MiniBatchKMeans(k, random_state=0, n_init=1).fit(x).labels_)
    ours, o = timed(lambda: neighbours(x, kmeans(x, k))[0][:, 0])
    rows.append(
        {
            "part": f"{k:,} clusters of {len(x):,}",
            "scikit-learn s": t[1],
            "histonb s": o[1],
            "scikit-learn": f"{loss(x, theirs):.4f}",
            "histonb": f"{loss(x, ours):.4f}",
        }
    )
    for row in rows:
        row["times faster"] = row["scikit-learn s"] / row["histonb s"]
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--small", type=int, default=50_000, help="rows of the comparison")
    parser.add_argument("--tested", type=int, default=2000, help="rows that are evaluation tiles")
    args = parser.parse_args()
    n = args.n
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        copies, seconds = timed(write, path, n)
        x = UnitRows(np.load(path, mmap_mode="r"))
        rows.append(("synthetic features", *seconds, peak(), f"{copies:,} near-copies"))

        def part(name, function, *a, note=lambda found: "", **k):
            found, seconds = timed(function, *a, **k)
            rows.append((name, *seconds, peak(), note(found)))
            print(f"{name}: {seconds[0]:.1f} s", flush=True)
            return found

        tested = np.arange(min(args.tested, n // 10))
        learnt = np.arange(min(args.tested, n // 10), n)
        part("mean and standard deviation", moments, x.features)
        part("check of all rows", UnitRows, x.features)
        part(
            f"near {len(tested):,} evaluation tiles, exact",
            neighbours,
            x.take(learnt),
            x.take(tested),
            note=lambda f: f"{(f[1] >= 0.9).sum():,} at .9",
        )
        of, _ = part(
            "near-duplicates", near_duplicates, x.take(learnt), 0.95, note=lambda f: f"{(f[0] >= 0).sum():,} dropped"
        )
        kept = learnt[of < 0]
        _, member = part(
            f"{' and '.join(f'{k:,}' for k in cluster_levels(len(kept)))} clusters", hierarchy, x.take(kept)
        )
        slide = kept % (n // 1000)
        part("slide caps", cap_slides, slide, member[0], 500, 20)
        part("balance", balanced_sample, member, len(kept) // 2)
        total, cpu = (sum(r[i] for r in rows[2:]) for i in (1, 2))
        small = x[: args.small]  # float32, of length 1
        if n <= 100_000:
            table = pd.DataFrame(
                {"slide": np.arange(n) % (n // 1000), "split": np.where(np.arange(n) < len(tested), "test", "train")}
            )
            curated = part("curate: all of it", curate, table, x.features, per_slide=500, per_cluster=20, target=n // 2)
            rows[-1] = (
                *rows[-1][:4],
                ", ".join(f"{k or 'kept'} {v:,}" for k, v in curated.dropped.value_counts().items()),
            )
        high = peak()
        print(
            f"\n{n:,} x {x.shape[1]} float16, {torch.get_num_threads()} threads; all parts {total:.0f} s, "
            f"{cpu:.0f} s of all cores; peak {high:.2f} GiB "
            f"(the mapped file of {path.stat().st_size / 2**30:.2f} GiB counts as far as it is cached)\n"
        )
        print("| part | seconds | of all cores | peak GiB so far | |\n|---|---|---|---|---|")
        for name, s, c, memory, note in rows:
            print(f"| {name} | {s:.1f} | {c:.1f} | {memory:.2f} | {note} |")
        compared = against(small, max(args.small // 100, 10)).round(4)
    print(
        "\n| part | scikit-learn s of all cores | histonb s | times faster | scikit-learn | histonb |\n"
        "|---|---|---|---|---|---|"
    )
    for r in compared.to_dict("records"):
        print(
            f"| {r['part']} | {r['scikit-learn s']:.1f} | {r['histonb s']:.1f} | {r['times faster']:.1f} "
            f"| {r['scikit-learn']} | {r['histonb']} |"
        )
    write_json(
        repo_root() / "runs/bench/curation.json",
        {
            "n": n,
            "parts": rows,
            "seconds": total,
            "cpu_seconds": cpu,
            "peak_gib": high,
            "against": compared.to_dict("records"),
        },
    )


if __name__ == "__main__":
    main()
