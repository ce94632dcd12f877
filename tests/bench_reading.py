"""Measure how fast every tissue tile of a slide is read: `python tests/bench_reading.py`.

Makes two slides of 20,000x25,000 px with about 18% tissue, once, and times side by side, in interleaved rounds:
the limit (decoding each needed internal tile once, 2 threads, nothing else), `map_tiles` of our own reader, `map_tiles`
of the same `Slide` behind which OpenSlide reads, and openslide in 2 processes.
Checks that the pixels equal openslide's and that the peak memory of a process that only reads stays low.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
import unittest.mock
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import tifffile

from histonb.core.files import read_json, write_json
from histonb.core.progress import progress
from histonb.slides import scanners
from histonb.slides.metadata import OtherFormat
from histonb.slides.slides import open_slide

WIDTH, HEIGHT, SIZE, QUALITY = 20_000, 25_000, 224, 70
VARIANTS = {
    "YCbCr 4:2:0, shared tables, 256 px": {
        "tile": 256,
        "color": "YCBCR",
        "subsampling": "420",
        "shared": True,
        "big": False,
    },
    "RGB 4:4:4, BigTIFF, 512 px": {"tile": 512, "color": "RGB", "subsampling": "444", "shared": False, "big": True},
}


def texture(rng, side=2048):
    """H&E-like pixels: pink stroma in waves, purple nuclei, and the fine grain of a scanner."""

    def noise(cell):
        small = rng.standard_normal((side // cell, side // cell)).astype(np.float32)
        return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)

    eosin = 0.35 + 0.10 * noise(64) + 0.07 * noise(16) + 0.05 * noise(4) + 0.07 * noise(2)
    hematoxylin = 0.08 + 0.03 * noise(32) + 0.03 * noise(4)
    for x, y, a, b, turn in zip(
        *rng.integers(0, side, (2, 9000)), *rng.integers(5, 12, (2, 9000)), rng.integers(0, 180, 9000), strict=True
    ):
        cv2.ellipse(
            hematoxylin, (int(x), int(y)), (int(a), int(b)), int(turn), 0, 360, float(rng.uniform(0.5, 0.9)), -1
        )
    hematoxylin = cv2.GaussianBlur(hematoxylin, (0, 0), 1.2) * (1 + 0.25 * noise(4))
    stains = np.array(
        [[0.55, 0.83, 0.30], [0.10, 0.95, 0.45]], np.float32
    )  # absorption of hematoxylin and eosin: r, g, b
    density = np.maximum(hematoxylin, 0)[..., None] * stains[0] + np.maximum(eosin, 0)[..., None] * stains[1]
    grain = rng.standard_normal((side, side, 3)).astype(np.float32) * 4
    return np.clip(245 * np.exp(-density) + grain, 0, 255).astype(np.uint8)


def tissue(rng):
    """Where tissue lies, one pixel for 16: a few biopsy-like cores, 15-20% of the slide."""
    mask = np.zeros((HEIGHT // 16 + 1, WIDTH // 16 + 1), np.uint8)
    h, w = mask.shape
    for i in range(3):
        t = np.linspace(0.08, 0.92, 200)
        x = w * (0.2 + 0.3 * i) + w * 0.05 * np.sin(t * rng.uniform(4, 9) + i)
        cv2.polylines(mask, [np.stack([x, t * h], 1).astype(np.int32)], False, 1, int(w * 0.068))
    ragged = cv2.resize(rng.standard_normal((h // 12, w // 12)).astype(np.float32), (w, h))
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 9) + 0.12 * ragged > 0.5


def split_tables(data):
    """A JPEG stream apart: (its tables as a stream of their own, the rest)."""
    at, tables, rest = 2, b"", b""
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] in (0xDB, 0xC4):
            tables += data[at:end]
        else:
            rest += data[at:end]
        at = end
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest + data[at:]


def write(path, tile, color, subsampling, shared, big, seed=0):
    """One slide of three levels, 1/4/16."""
    rng = np.random.default_rng(seed)
    where = tissue(rng)
    textures = [texture(rng) for _ in range(3)]
    blank = np.clip(243 + rng.standard_normal((2048, 2048, 3)) * 0.8, 0, 255).astype(np.uint8)
    below = np.empty((HEIGHT // 4, WIDTH // 4, 3), np.uint8)

    def encode(pixels):
        pad = np.pad(pixels, ((0, tile - pixels.shape[0]), (0, tile - pixels.shape[1]), (0, 0)), "edge")
        data = imagecodecs.jpeg8_encode(
            pad, level=QUALITY, colorspace="RGB", outcolorspace=color, subsampling=subsampling
        )
        return split_tables(data)[1] if shared else data

    def cut(pixels):
        for y in range(0, pixels.shape[0], tile):
            for x in range(0, pixels.shape[1], tile):
                yield encode(np.ascontiguousarray(pixels[y : y + tile, x : x + tile]))

    def level0():
        for n, y in enumerate(progress(range(0, HEIGHT, 2048), f"writing {path.name}", unit="band")):
            h = min(2048, HEIGHT - y)
            band = np.concatenate([blank] * 10, 1)[:h, :WIDTH]
            inside = (
                cv2.resize(
                    where[y // 16 : (y + h + 15) // 16].astype(np.uint8), (where.shape[1] * 16, (h + 15) // 16 * 16)
                )[:h, :WIDTH]
                > 0
            )
            cells = np.concatenate([np.roll(textures[(n + i) % 3], 300 * n, 1) for i in range(10)], 1)[:h, :WIDTH]
            band[inside] = cells[inside]
            below[y // 4 : (y + h) // 4] = cv2.resize(
                band[: h // 4 * 4], (WIDTH // 4, h // 4), interpolation=cv2.INTER_AREA
            )
            yield from cut(band)

    tables = split_tables(
        imagecodecs.jpeg8_encode(
            blank[:64, :64], level=QUALITY, colorspace="RGB", outcolorspace=color, subsampling=subsampling
        )
    )[0]
    partial = path.with_suffix(".partial")
    with tifffile.TiffWriter(partial, bigtiff=big) as out:
        for level in range(3):
            if level == 2:
                below = cv2.resize(below, (WIDTH // 16, HEIGHT // 16), interpolation=cv2.INTER_AREA)
            out.write(
                cut(below) if level else level0(),
                shape=(HEIGHT // 4**level, WIDTH // 4**level, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                compression="jpeg",
                photometric="rgb",
                compressionargs={"outcolorspace": color},
                subfiletype=1 if level else 0,
                subsampling=(2, 2) if subsampling == "420" else None,
                jpegtables=tables if shared else None,
                resolution=(1e4 / 0.48 / 4**level,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    grid = [
        (x, y)
        for y in range(0, HEIGHT - SIZE + 1, SIZE)
        for x in range(0, WIDTH - SIZE + 1, SIZE)
        if where[y // 16 : (y + SIZE) // 16, x // 16 : (x + SIZE) // 16].mean() > 0.1
    ]
    write_json(path.with_suffix(".json"), {"tissue": float(where.mean()), "xy": grid})
    os.replace(partial, path)


def limit(path, xy):
    """Decode the internal tiles that `xy` touches, each once, in 2 threads, and do nothing else."""
    with open_slide(path) as slide:
        at = slide.levels[0]
    side = at.tile[0]
    space = "RGB" if at.photometric == 2 else "YCBCR"
    need = sorted(
        {
            (r, c)
            for x, y in xy
            for r in range(y // side, (y + SIZE - 1) // side + 1)
            for c in range(x // side, (x + SIZE - 1) // side + 1)
        }
    )
    jobs = [(int(at.offsets[0, r, c]), int(at.counts[0, r, c])) for r, c in need]
    file = os.open(path, os.O_RDONLY)

    def work(part):
        out = np.empty((side, side, 3), np.uint8)
        for offset, count in part:
            imagecodecs.jpeg8_decode(
                os.pread(file, count, offset), tables=at.tables, colorspace=space, outcolorspace="RGB", out=out
            )

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (jobs[0::2], jobs[1::2])))
    seconds = time.perf_counter() - start
    os.close(file)
    return seconds, sum(n for _, n in jobs) / (len(jobs) * side**2)


def ours(path, xy, function=lambda i, tile: None):
    start = time.perf_counter()
    with open_slide(path) as slide:
        found = slide.map_tiles(function, xy, SIZE, threads=2)
    return time.perf_counter() - start, found


def behind_slide(path, xy, function=lambda i, tile: None):
    "The same as `ours`, read by OpenSlide, which is otherwise not asked for a plain pyramid."
    start = time.perf_counter()
    with unittest.mock.patch.object(scanners, "_PLAIN", (None,)), open_slide(path) as slide:
        slide.close()
        slide._read_scanner(scanners.ScannerFile(path, OtherFormat(path, "", "")))
        found = slide.map_tiles(function, xy, SIZE, threads=2)
    return time.perf_counter() - start, found


def openslide_part(args):
    import openslide

    path, xy, check = args
    slide = openslide.OpenSlide(path)
    tiles = (np.asarray(slide.read_region(p, 0, (SIZE, SIZE)).convert("RGB")) for p in xy)
    return [zlib.crc32(t) if check else None for t in tiles]


def with_openslide(pool, path, xy, check=False):
    half = len(xy) // 2
    start = time.perf_counter()
    parts = pool.map(openslide_part, [(path, xy[:half], check), (path, xy[half:], check)])
    return time.perf_counter() - start, sum(parts, [])


def peak(path):
    """Peak resident memory, MiB, of a fresh process that reads every tissue tile; and of the import alone."""
    code = (
        "import json, re, sys; from histonb.slides.slides import open_slide\n"
        "def mib():\n"
        "    status = open('/proc/self/status').read().replace(chr(9), '')\n"
        "    return int(re.search('VmHWM: *(.*) kB', status)[1]) / 1024\n"
        "base = mib(); xy = json.load(open(sys.argv[2]))['xy']\n"
        "with open_slide(sys.argv[1]) as s: s.map_tiles(lambda i, tile: None, xy)\n"
        "print(base, mib())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, Path(path).with_suffix(".json")], capture_output=True, text=True, check=True
    )
    return [float(v) for v in done.stdout.split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="runs/bench", help="where the slides and reading.json are kept")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    rows = []
    pool = multiprocessing.get_context("spawn").Pool(2)
    for name, options in VARIANTS.items():
        path = folder / f"reading_{options['color'].lower()}_{options['tile']}.tiff"
        if not path.exists():
            write(path, **options)
        truth = read_json(path.with_suffix(".json"))
        xy = [tuple(p) for p in truth["xy"]]
        equal = ours(path, xy, lambda i, tile: zlib.crc32(tile))[1] == with_openslide(pool, path, xy, check=True)[1]
        times = {"limit": [], "map_tiles": [], "behind_slide": [], "openslide": []}
        for _ in range(args.rounds):
            seconds, density = limit(path, xy)
            times["limit"].append(seconds)
            times["map_tiles"].append(ours(path, xy)[0])
            times["behind_slide"].append(behind_slide(path, xy)[0])
            times["openslide"].append(with_openslide(pool, path, xy)[0])
        to_limit = np.median(np.divide(times["map_tiles"], times["limit"]))
        faster = np.median(np.divide(times["openslide"], times["map_tiles"]))
        behind = np.median(np.divide(times["behind_slide"], times["map_tiles"]))
        equal &= (
            behind_slide(path, xy, lambda i, tile: zlib.crc32(tile))[1]
            == ours(path, xy, lambda i, tile: zlib.crc32(tile))[1]
        )
        base, top = peak(path)
        rows.append(
            {
                "slide": name,
                "tissue": truth["tissue"],
                "tiles": len(xy),
                "bytes_per_pixel": density,
                "pixels_equal": equal,
                "seconds": {k: float(np.median(v)) for k, v in times.items()},
                "times_limit": float(to_limit),
                "times_faster_than_openslide": float(faster),
                "times_faster_than_openslide_behind_slide": float(behind),
                "peak_mib": top,
                "import_mib": base,
            }
        )
    pool.close()
    pool.join()
    write_json(folder / "reading.json", rows)
    print(
        "| slide | tissue | tiles | byte/px | limit s | map_tiles s | OpenSlide behind `Slide` s "
        "| openslide s (2 processes) "
        "| x limit (<= 1.4) | x faster than OpenSlide behind `Slide` (>= 3) | x faster than openslide (>= 3) "
        "| pixels equal | peak MiB (< 150), of it imports |\n|" + "---|" * 13
    )
    for r in rows:
        s = r["seconds"]
        print(
            f"| {r['slide']} | {r['tissue']:.1%} | {r['tiles']} | {r['bytes_per_pixel']:.2f} "
            f"| {s['limit']:.2f} | {s['map_tiles']:.2f} | {s['behind_slide']:.2f} | {s['openslide']:.2f} "
            f"| {r['times_limit']:.2f} | {r['times_faster_than_openslide_behind_slide']:.1f} "
            f"| {r['times_faster_than_openslide']:.1f} "
            f"| {'yes' if r['pixels_equal'] else 'NO'} | {r['peak_mib']:.0f}, {r['import_mib']:.0f} |"
        )
    sys.exit(0 if all(r["pixels_equal"] for r in rows) else 1)


if __name__ == "__main__":
    main()
