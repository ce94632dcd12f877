"""Transfer: the cost of making a picture, of fine-tuning from each layer on, of each network, and of waiting."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from histonb.datasets.ebhi import ebhi_seg
from histonb.training.pair_augmentation import EBHIAugment
from histonb.transfer.classes import fine_tune
from histonb.transfer.ebhi_dataset import EBHIDataset, rows_by_split, write_example
from histonb.transfer.freezable_encoders import load_freezable_encoder
from histonb.transfer.masks import NETWORK_NAMES, NetworkConfig, train_mask_network
from histonb.transfer.supervised import FitConfig


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        part = rows_by_split(ebhi_seg(write_example(folder, n_cases=10)).slides, masks=True)
        train = EBHIDataset(part["train"], 96, EBHIAugment(), masks=False)
        val = EBHIDataset(part["val"], 96, masks=False)
        began = time.process_time()
        for i in range(len(train)):
            train[0, i]
        making = (time.process_time() - began) / len(train)
        speed = {}
        wait = {}
        for depth in (1, 4):
            _, rows = fine_tune(
                load_freezable_encoder("", "resnet18", 0.5),
                depth,
                train,
                val,
                FitConfig(str(Path(folder) / str(depth)), epochs=6, batch_size=16, device="cpu", workers=1),
            )
            speed[depth], wait[depth] = (
                float(np.median([r[k] for r in rows[1:]])) for k in ("images_per_s", "data_wait")
            )
        masked = {k: EBHIDataset(part[k], 96, EBHIAugment() if k == "train" else None) for k in ("train", "val")}
        sizes = NetworkConfig(arch="resnet18", width=0.5, plain_width=16)
        for name in ("transferred", "unet", "segnet"):
            _, rows = train_mask_network(
                name,
                sizes,
                masked["train"],
                masked["val"],
                FitConfig(str(Path(folder) / name), epochs=4, batch_size=16, device="cpu", workers=1),
            )
            speed[name], wait[name] = (
                float(np.median([r[k] for r in rows[1:]])) for k in ("images_per_s", "data_wait")
            )
    print(
        f"a picture of 96 px, ResNet18 of width .5, one core: {speed[1]:.0f} pictures/s "
        f"from layer 1 on, {speed[4] / speed[1]:.1f}x that from layer 4 on"
    )
    print(f"augmenting a picture: {1000 * making:.1f} ms, {making * speed[1]:.0%} of what learning from it takes")
    print(
        f"with one worker: {wait[1]:.1%} of the time waiting for data "
        f"from layer 1 on, {wait[4]:.1%} from layer 4 on (target: under 5%)"
    )
    for name in ("transferred", "unet", "segnet"):
        print(
            f"masks, {NETWORK_NAMES[name]}: {speed[name] / speed['unet']:.2f}x U-Net's pictures/s "
            f"({speed[name]:.0f}), {wait[name]:.1%} of the time waiting for data"
        )


if __name__ == "__main__":
    main()
