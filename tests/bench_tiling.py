"""Measure tiling and the tile store: `python tests/bench_tiling.py`.

On the slides of `bench_reading.py`, in interleaved rounds: the limit (decoding each internal tile of the kept tiles
once, 2 threads, nothing else), the whole stage (metrics, labels, store), the same without the store, HistoPrep, and a
script of openslide, numpy, skimage and PNG files in 2 processes. Then peak memory, false drops of the prefilter, the
store, and cost against number of slides.
"""

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_reading
import cv2
import imagecodecs
import numpy as np
import tifffile

from histonb.core.files import read_json, write_json
from histonb.core.progress import progress
from histonb.slides.slides import open_slide
from histonb.slides.tile_quality import tile_metrics
from histonb.slides.tile_rules import TileRule, tile_grid
from histonb.slides.tile_store import SlideTiles, TileShards
from histonb.slides.tiles import tile_slide
from histonb.synthetic.phantom import write_cohort

SIZE = 224
HISTOPREP = """
import sys, time, histoprep
start = time.perf_counter()
slide = histoprep.SlideReader(sys.argv[1])
threshold, mask = slide.get_tissue_mask()
found = slide.get_tile_coordinates(mask, width=224, overlap=0.0, max_background=0.9)
options = dict(save_metrics=True, num_workers=2, overwrite=True, verbose=False)
slide.save_regions(sys.argv[2], found, threshold=threshold, **options)
print(len(found), time.perf_counter() - start)
"""
COHORT = """
import re, sys, time
import pandas as pd
from histonb.slides.cohort import Cohort
from histonb.slides.tiling import tile_cohort
rows = pd.read_parquet(sys.argv[1])
start = time.perf_counter()
table = tile_cohort(Cohort("bench", rows, pd.DataFrame(columns=["slide", "path", "fault", "remedy"])), sys.argv[2])
seconds = time.perf_counter() - start
print(table.kept.sum(), seconds, int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])/1024)
"""


def write_mask_of(path):
    "A mask for a slide of `bench_reading`, in PANDA's layout: bands of all classes where there is tissue."
    where = bench_reading.tissue(np.random.default_rng(0))
    codes = (where * (1 + np.arange(where.shape[0])[:, None] // 40 % 5)).astype(np.uint8)
    height, width = bench_reading.HEIGHT, bench_reading.WIDTH

    def tiles(scale):
        for y in range(0, height // scale, 512):
            for x in range(0, width // scale, 512):
                at = np.ix_(
                    np.minimum(np.arange(y, y + 512) * scale // 16, codes.shape[0] - 1),
                    np.minimum(np.arange(x, x + 512) * scale // 16, codes.shape[1] - 1),
                )
                red = np.zeros((512, 512, 3), np.uint8)
                red[..., 0] = codes[at]
                yield imagecodecs.lzw_encode(red)

    partial = path.with_suffix(".partial")
    with tifffile.TiffWriter(partial, bigtiff=True) as out:
        for scale in (1, 4, 16):
            out.write(
                tiles(scale),
                shape=(height // scale, width // scale, 3),
                dtype=np.uint8,
                tile=(512, 512),
                compression="lzw",
                photometric="rgb",
                subfiletype=int(scale > 1),
                metadata=None,
            )
    partial.rename(path)


def run(code, *args, python=sys.executable):
    done = subprocess.run([python, "-c", code, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return [float(v) for v in done.stdout.split("\n")[-2].split()]


def histoprep_python(folder):
    "An environment of its own for HistoPrep; None, with a note, where it cannot be made."
    python = folder / "venv/bin/python"
    if not (folder / "venv/done").exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, capture_output=True)
            subprocess.run(
                [
                    python,
                    "-m",
                    "pip",
                    "install",
                    "-q",
                    "histoprep",
                    "openslide-bin",
                    "numpy<2",
                    "opencv-python-headless<4.12",
                ],
                check=True,
                capture_output=True,
                timeout=900,
            )
        except (subprocess.SubprocessError, OSError) as e:
            print(f"HistoPrep is left out: it could not be installed ({e})")
            return None
        (folder / "venv/done").touch()
    return python


def script_part(args):
    "Half a slide as a plain script does it: read every tile, measure, write a PNG."
    import openslide
    from PIL import Image
    from skimage.color import rgb2gray
    from skimage.feature import canny

    path, xy, folder = args
    slide = openslide.OpenSlide(path)
    kept = 0
    for x, y in xy:
        tile = np.asarray(slide.read_region((x, y), 0, (SIZE, SIZE)).convert("RGB"))
        grey = rgb2gray(tile)
        if (grey > 0.86).mean() > 0.9 or grey.std() < 0.02 or canny(grey).mean() < 0.01:
            continue
        Image.fromarray(tile).save(f"{folder}/{x}_{y}.png")
        kept += 1
    return kept


def with_script(pool, path, xy):
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        kept = sum(pool.map(script_part, [(path, xy[: len(xy) // 2], folder), (path, xy[len(xy) // 2 :], folder)]))
        return kept, time.perf_counter() - start


def stage(path, mask, store):
    start = time.perf_counter()
    with tempfile.TemporaryFile() as file:
        table, account = tile_slide(path, mask, "radboud", store=file if store else None)
    return time.perf_counter() - start, table, account


class Files:
    "The tiles of a store as separate JPEG files."

    def __init__(self, shards, folder):
        self.paths = [folder / f"{i}.jpg" for i in range(len(shards))]
        self.labels = shards.labels
        for i, path in enumerate(self.paths):
            path.write_bytes(shards.jpeg(i))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return imagecodecs.jpeg8_decode(self.paths[i].read_bytes()), int(self.labels[i])


def random_reads(dataset, order):
    "Tiles per second through 2 loader workers, once they run."
    from torch.utils.data import DataLoader

    batches = iter(DataLoader(dataset, batch_size=32, sampler=order, num_workers=2))
    next(batches)
    start = time.perf_counter()
    n = sum(len(labels) for _, labels in batches)
    return n / (time.perf_counter() - start)


def measure_slide(name, options, folder, args, pool, peer):
    path = folder / f"reading_{options['color'].lower()}_{options['tile']}.tiff"
    if not path.exists():
        bench_reading.write(path, **options)
    mask = folder / "reading_mask.tiff"
    if not mask.exists():
        write_mask_of(mask)
    _, table, account = stage(path, mask, False)
    kept = table[table.kept]
    xy = kept[["x", "y"]].to_numpy().tolist()
    times = {"limit": [], "whole stage": [], "coordinates only": [], "histoprep": [], "script": []}
    peer_tiles = 0
    for _ in progress(range(args.rounds), name, unit="round"):
        times["limit"].append(bench_reading.limit(path, xy)[0])
        times["whole stage"].append(stage(path, mask, True)[0])
        times["coordinates only"].append(stage(path, mask, False)[0])
        if peer:
            with tempfile.TemporaryDirectory() as out:
                peer_tiles, seconds = run(HISTOPREP, path, out, python=peer)
            times["histoprep"].append(seconds)
    with open_slide(path) as slide:
        everything = tile_grid(slide).xy.tolist()
        full = np.array(slide.map_tiles(lambda i, tile: tile_metrics(tile), everything))
    beside = [stage(path, mask, True)[0]]
    script_tiles, seconds = with_script(pool, path, [tuple(p) for p in everything])
    times["script"].append(seconds)
    beside.append(stage(path, mask, True)[0])  # a minute later the machine may be another
    should = {tuple(p) for p, m in zip(everything, full, strict=True) if TileRule().passes(*m)}
    median = {k: float(np.median(v)) for k, v in times.items() if v}
    speed = {
        "whole stage": len(kept) / median["whole stage"],
        "script": script_tiles / median["script"],
        "histoprep": peer_tiles / median.get("histoprep", np.inf),
    }

    import pandas as pd

    rows = pd.DataFrame(
        [{"slide": "a", "image": str(path), "mask": str(mask), "codes": "radboud", "cohort": "bench", "case": "a"}]
    )
    with tempfile.TemporaryDirectory() as out:
        out = Path(out)
        rows.to_parquet(out / "rows.parquet")
        _, _, peak = run(COHORT, out / "rows.parquet", out / "tiles")
        shards = TileShards(out / "tiles")
        raw = SlideTiles(shards.table, {"a": path})
        some = np.random.default_rng(0).permutation(len(shards))[:400]
        error = np.mean([np.mean((shards[i][0].astype(float) - raw[i][0]) ** 2) for i in some])
        (out / "files").mkdir()
        files = Files(shards, out / "files")
        order = np.random.default_rng(1).permutation(len(shards)).tolist()
        ratio = []
        for i in range(2 * args.rounds):  # the first of a pair has the cooler processor: take turns
            first, second = (random_reads(d, order) for d in ((shards, files) if i % 2 else (files, shards)))
            ratio.append(first / second if i % 2 else second / first)
        n_files = len(list((out / "tiles").glob("shard-*")))
        store = {
            "kb_a_tile": float(shards.table.nbytes.mean() + 8) / 1e3,
            "db": float(10 * np.log10(255**2 / error)),
            "files": n_files,
            "shards": int(shards.table["shard"].nunique()),
            "random_read_ratio": float(np.median(ratio)),
        }
    return {
        "slide": name,
        "candidates": len(everything),
        "kept": len(kept),
        "background": int(account.background.sum()),
        "seconds": median,
        "tiles_per_second": speed,
        "stage_to_limit": float(np.median(np.divide(times["whole stage"], times["limit"]))),
        "coordinates_to_limit": float(np.median(np.divide(times["coordinates only"], times["limit"]))),
        "to_histoprep": float(speed["whole stage"] / speed["histoprep"]) if peer else None,
        "to_script": float(len(kept) / np.mean(beside) / speed["script"]),
        "peak_mib": peak,
        "false_drops": len(should - {tuple(p) for p in xy}),
        "glass_read": len(table) - len(kept),
        "store": store,
    }


def measure_growth(folder, counts=(1, 10, 40)):
    "Seconds a slide and peak memory of jobs over more and more slides."
    from histonb.datasets.cohorts import panda

    root = folder / "growth"
    if not (root / "train.csv").exists():
        write_cohort(root, n_slides=4, shape=(6000, 4000))
    slides = panda(root).slides
    grown = []
    for n in counts:
        rows = slides.iloc[np.arange(n) % len(slides)].assign(slide=[f"s{i}" for i in range(n)])
        with tempfile.TemporaryDirectory() as out:
            rows.to_parquet(Path(out) / "rows.parquet")
            kept, seconds, peak = run(COHORT, Path(out) / "rows.parquet", Path(out) / "tiles")
        grown.append(
            {"slides": n, "kept": int(kept), "seconds_a_thousand_tiles": seconds / kept * 1e3, "peak_mib": peak}
        )
    return grown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", default="runs/bench", help="where slides, results and the other tool's environment are kept"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    peer = histoprep_python(folder)
    pool = multiprocessing.get_context("spawn").Pool(2)
    slides = [
        measure_slide(name, options, folder, args, pool, peer) for name, options in bench_reading.VARIANTS.items()
    ]
    pool.close()
    pool.join()
    growth = measure_growth(folder)
    write_json(folder / "tiling.json", {"slides": slides, "growth": growth})
    show(read_json(folder / "tiling.json"))


def show(result):
    print(
        "| slide | kept of candidates | limit s | whole stage, x limit (<= 4.5) | coordinates only, x limit (<= 3.5) "
        "| tiles/s | x HistoPrep (>= 4) "
        "| x script (>= 15) | peak MiB (< 300) | false drops | kB a tile (<= 10) | dB (>= 55) "
        "| files a shard (<= 2) | random reads, x files (>= 0.9) |\n|" + "---|" * 14
    )
    for r in result["slides"]:
        s = r["store"]
        print(
            f"| {r['slide']} | {r['kept']} of {r['candidates']} | {r['seconds']['limit']:.2f} "
            f"| {r['stage_to_limit']:.2f} | {r['coordinates_to_limit']:.2f} "
            f"| {r['tiles_per_second']['whole stage']:.0f} "
            f"| {'-' if r['to_histoprep'] is None else format(r['to_histoprep'], '.1f')} | {r['to_script']:.1f} "
            f"| {r['peak_mib']:.0f} | {r['false_drops']} | {s['kb_a_tile']:.1f} | {s['db']:.1f} "
            f"| {s['files'] / s['shards']:.0f} | {s['random_read_ratio']:.2f} |"
        )
    print("\n| slides | s a thousand tiles | peak MiB |\n|---|---|---|")
    for g in result["growth"]:
        print(f"| {g['slides']} | {g['seconds_a_thousand_tiles']:.2f} | {g['peak_mib']:.0f} |")


if __name__ == "__main__":
    main()
