"""Shape and stain of many nuclei against scikit-image: `python tests/bench_morphology.py`.

Ellipses as large as nuclei at 0.5 um/px, in a picture of noise. Ours: outlines are traced, as every annotation does,
then measured (`shape_measures`) and their stain averaged (`mean_densities`). Theirs: `regionprops_table` of the same
measures and mean intensities of the stains. Processor time, interleaved rounds; then what 100,000 nuclei cost."""

import argparse
import time

import cv2
import numpy as np
from skimage.color import rgb2hed
from skimage.measure import regionprops_table

from histonb.annotate.tile_merging import instance_outlines
from histonb.segment.morphology import mean_densities, shape_measures

PROPERTIES = ("perimeter", "axis_major_length", "axis_minor_length", "eccentricity", "solidity", "orientation")
CELL = 32  # pixels from one nucleus to the next


def picture(n):
    "About `n` ellipses and a picture of noise."
    rng = np.random.default_rng(0)
    side = round(n**0.5)
    ids = np.zeros((side * CELL, side * CELL), np.int32)
    for i, (row, column) in enumerate(np.ndindex(side, side), 1):
        center = (column * CELL + CELL // 2, row * CELL + CELL // 2)
        axes = (int(rng.integers(7, 13)), int(rng.integers(5, 9)))
        cv2.ellipse(ids, center, axes, float(rng.uniform(0, 180)), 0, 360, i, -1)
    return ids, rng.integers(60, 250, (*ids.shape, 3)).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nuclei", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ids, image = picture(args.nuclei)
    n = int(ids.max())
    outlines = instance_outlines(ids)
    ways = {
        "outlines traced": lambda: instance_outlines(ids),
        "shapes": lambda: shape_measures(outlines, 0.5),
        "stain": lambda: mean_densities(ids, image),
        "regionprops_table, shapes": lambda: regionprops_table(ids, properties=PROPERTIES),
        "regionprops_table, stain": lambda: regionprops_table(ids, rgb2hed(image), properties=("mean_intensity",)),
    }
    seconds = {name: [] for name in ways}
    for i in range(args.rounds + 1):
        for name, run in ways.items():
            began = time.process_time()
            run()
            if i:
                seconds[name].append(time.process_time() - began)
    median = {name: float(np.median(s)) for name, s in seconds.items()}
    for name, s in median.items():
        print(f"  {name:28} {s:8.3f} s for {n:,} nuclei, {s / n * 1e5:7.1f} s for 100,000")
    measured = median["shapes"] + median["stain"]
    ours = measured + median["outlines traced"]
    theirs = median["regionprops_table, shapes"] + median["regionprops_table, stain"]
    print(
        f"{theirs / measured:.0f} times as fast as `regionprops_table` where outlines are there, "
        f"{theirs / ours:.1f} times with tracing them; 100,000 nuclei: {measured / n * 1e5:.1f} s, "
        f"{ours / n * 1e5:.1f} s with tracing"
    )


if __name__ == "__main__":
    main()
