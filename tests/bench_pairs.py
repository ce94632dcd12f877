"""Speed of reading and augmenting pairs of a picture and its mask, beside PIL and torchvision.

One core; the PNG files are synthetic fields in EBHI-Seg's form. Prints a Markdown table and writes
runs/bench/pairs.json: `python tests/bench_pairs.py`.
"""

import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image

from histonb.core.files import repo_root, write_json
from histonb.datasets.ebhi import MASK_THRESHOLD, read_ebhi_pair
from histonb.synthetic.phantom import draw_field
from histonb.training.pair_augmentation import EBHIAugment

NEAREST, BILINEAR = TF.InterpolationMode.NEAREST, TF.InterpolationMode.BILINEAR


class Torchvision:
    "The transforms of `ebhi` with torchvision on PIL images, drawn once for picture and mask."

    def __init__(self, elastic=True):
        self.elastic = elastic

    def __call__(self, row, seed):
        image, mask = (
            Image.open(row.image).convert("RGB"),
            Image.open(row.label).point(lambda v: 255 * (v > MASK_THRESHOLD)),
        )
        if random.random() < 0.5 and self.elastic:
            field = T.ElasticTransform.get_params([150.0, 150.0], [10.0, 10.0], [image.height, image.width])
            image = TF.elastic_transform(image, field, BILINEAR)
            mask = TF.elastic_transform(mask, field, NEAREST)
        if random.random() < 0.5:
            image = TF.adjust_contrast(TF.adjust_brightness(image, random.uniform(0.8, 1.2)), random.uniform(0.8, 1.2))
        if random.random() < 0.5:
            angle = random.uniform(-35, 35)
            image = TF.rotate(image, angle, BILINEAR)
            mask = TF.rotate(mask, angle, NEAREST)
        if random.random() < 0.5:
            image = TF.hflip(image)
            mask = TF.hflip(mask)
        if random.random() < 0.1:
            image = TF.vflip(image)
            mask = TF.vflip(mask)
        if random.random() < 0.15:
            image = TF.gaussian_blur(image, random.choice([3, 5, 7]), random.uniform(0.8, 1.4))
        return np.asarray(image), np.asarray(mask) > 0


class Ours:
    "`read` and `EBHIAugment`."

    def __init__(self, elastic=True):
        self.augment = EBHIAugment()
        if not elastic:
            self.augment.transforms.transforms[0].p = 0

    def __call__(self, row, seed):
        return self.augment(*read_ebhi_pair(row), seed)


def plain(row, seed):
    "Reading alone, as one writes it with PIL."
    return np.asarray(Image.open(row.image).convert("RGB")), np.asarray(Image.open(row.label)) > MASK_THRESHOLD


def write(folder, n=32):
    "Pictures, and masks with soft borders, as PNG files."
    rows = []
    for i in range(n):
        field = draw_field(seed=i, pattern=3 + i % 2, size=224)
        row = SimpleNamespace(image=str(folder / f"{i}.png"), label=str(folder / f"{i}_label.png"))
        noise = np.random.default_rng(i).normal(
            0, 6, field.image.shape
        )  # a camera's grain: real pictures are no smaller as PNG
        Image.fromarray((field.image + noise).clip(0, 255).astype(np.uint8)).save(row.image)
        Image.fromarray(255 * (field.mask > 1).astype(np.uint8)).resize((112, 112)).resize(
            (224, 224), Image.Resampling.BILINEAR
        ).save(row.label)
        rows.append(row)
    return rows


def rate(pairs, rows, n):
    "Pairs a second of CPU time: on one core, whatever else the machine does."
    for row in rows:
        pairs(row, 0)
    start = time.process_time()
    for i in range(n):
        pairs(rows[i % len(rows)], (1, i))
    return n / (time.process_time() - start)


def main():
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    stages = {
        "read": (plain, lambda row, seed: read_ebhi_pair(row)),
        "read and augmented, but not bent": (Torchvision(elastic=False), Ours(elastic=False)),
        "read and augmented": (Torchvision(), Ours()),
    }
    runs = {stage: ([], []) for stage in stages}
    with tempfile.TemporaryDirectory() as folder:
        rows = write(Path(folder))
        size = sum(Path(r.image).stat().st_size for r in rows) / len(rows)
        for _ in range(3):  # in turn, so that a busy moment falls on all alike
            for stage, both in stages.items():
                for pairs, found in zip(both, runs[stage], strict=True):
                    found.append(rate(pairs, rows, 64 if stage == "read and augmented" else 192))
    table = [
        {"stage": stage, "torchvision_pairs_s": float(np.median(theirs)), "pairs_s": float(np.median(ours))}
        for stage, (theirs, ours) in runs.items()
    ]
    print(
        f"| pairs of 224 px, {size / 1e3:.0f} kB a picture "
        "| PIL and torchvision, pairs/s | histonb, pairs/s | ratio |\n"
        "|---|---|---|---|"
    )
    for r in table:
        r["ratio"] = r["pairs_s"] / r["torchvision_pairs_s"]
        print(f"| {r['stage']} | {r['torchvision_pairs_s']:.0f} | {r['pairs_s']:.0f} | {r['ratio']:.1f} |")
    write_json(repo_root() / "runs/bench/pairs.json", {"px": 224, "kB": size / 1e3, "rows": table})


if __name__ == "__main__":
    main()
