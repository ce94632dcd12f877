"""Speed of multi-crop: tiles/s for 2 x 224 + 8 x 96 from a 224 px tile, beside torchvision's transforms on PIL images.

Prints a Markdown table and writes runs/bench/augment.json: `python tests/bench_augment.py`.
"""

import random
import time

import cv2
import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from histonb.core.files import repo_root, write_json
from histonb.synthetic.phantom import draw_field
from histonb.training.augmentation import MEAN, STD, MultiCrop


class Blur:
    "PIL's own blur, as in DINO's code; torchvision's is several times slower."

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Torchvision:
    "DINO's augmentation as its authors write it: torchvision transforms on PIL images."

    def __init__(self, n_local=8):
        def view(size, scale, blur, solarize):
            return T.Compose(
                [
                    T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                    T.RandomHorizontalFlip(0.5),
                    T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                    T.RandomGrayscale(0.2),
                    T.RandomApply([Blur()], p=blur),
                    T.RandomSolarize(128, p=solarize),
                    T.ToTensor(),
                    T.Normalize(MEAN, STD),
                ]
            )

        self.views = [
            view(224, (0.4, 1.0), 1.0, 0.0),
            view(224, (0.4, 1.0), 0.1, 0.2),
            *[view(96, (0.05, 0.4), 0.5, 0.0)] * n_local,
        ]

    def __call__(self, image, seed):
        return [view(Image.fromarray(image)) for view in self.views]


class Tiles(Dataset):
    def __init__(self, tiles, crops):
        self.tiles, self.crops = tiles, crops

    def __len__(self):
        return 64 * len(self.tiles)

    def __getitem__(self, i):
        return self.crops(self.tiles[i % len(self.tiles)], (0, i))


def rate(crops, tiles, threads, n=32):
    "Tiles a second in this process."
    cv2.setNumThreads(threads)
    start = time.perf_counter()
    for i in range(n):
        crops(tiles[i % len(tiles)], (0, i))
    cv2.setNumThreads(0)
    return n / (time.perf_counter() - start)


def loaded_rate(crops, tiles, batch=32):
    "Tiles a second from a loader with two workers, its start left out."
    loader = iter(DataLoader(Tiles(tiles, crops), batch_size=batch, num_workers=2))
    for _ in range(2):
        next(loader)
    start = time.perf_counter()
    n = 4 if isinstance(crops, Torchvision) else 10
    for _ in range(n):
        next(loader)
    return n * batch / (time.perf_counter() - start)


def main():
    torch.set_num_threads(1)
    tiles = [draw_field(seed=i, pattern=3 + i % 2, size=224).image for i in range(8)]
    pipelines = {
        "torchvision on PIL, dino": Torchvision(),
        "histonb, dino": MultiCrop(recipe="dino"),
        "histonb, histology": MultiCrop(),
        "histonb, dino, as bytes": MultiCrop(recipe="dino").draw,  # as trainings load them
        "histonb, histology, as bytes": MultiCrop().draw,
    }
    measures = {
        "tiles_s": lambda c: rate(c, tiles, 0),
        "tiles_s_cv2_threads": lambda c: rate(c, tiles, 2),
        "tiles_s_2_workers": lambda c: loaded_rate(c, tiles),
    }
    runs = {(name, measure): [] for measure in measures for name in pipelines}
    for _ in range(3):  # in turn, so that a busy moment falls on all alike
        for name, measure in runs:
            runs[name, measure].append(measures[measure](pipelines[name]))
    rows = [{"pipeline": name, **{m: float(np.median(runs[name, m])) for m in measures}} for name in pipelines]
    for row in rows:
        row["ratio"], row["ratio_2_workers"] = (
            row["tiles_s"] / rows[0]["tiles_s"],
            row["tiles_s_2_workers"] / rows[0]["tiles_s_2_workers"],
        )
    print(
        "| 2 x 224 + 8 x 96 px from one 224 px tile | tiles/s, 1 process | with 2 OpenCV threads "
        "| tiles/s, 2 workers | times torchvision, 1 process | 2 workers |\n|---|---|---|---|---|---|"
    )
    for r in rows:
        print(
            f"| {r['pipeline']} | {r['tiles_s']:.0f} | {r['tiles_s_cv2_threads']:.0f} | {r['tiles_s_2_workers']:.0f} "
            f"| {r['ratio']:.1f} | {r['ratio_2_workers']:.1f} |"
        )
    write_json(repo_root() / "runs/bench/augment.json", {"views": "2 x 224 + 8 x 96 from 224", "rows": rows})


if __name__ == "__main__":
    main()
