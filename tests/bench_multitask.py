"""Multi-task training: decoders run only where there are labels against everywhere; samples/s; waiting for data."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from histonb.core.files import read_jsonl
from histonb.datasets import readers as sets
from histonb.segment import samples
from histonb.segment.training import MultiTaskTrainer, train
from histonb.segment.training_config import TrainConfig, resolve_train_config

SETS = tuple(
    {"reader": "phantom_regions", "n": 8, "seed": s, "size": 256, "labels": t}
    for s, t in ((1, ["gland"]), (2, ["lumen"]), (3, ["nucleus"]))
)
SIZE = dict(arch="resnet18", width=0.5, crop=192, batch_size=12, device="cpu")


def everywhere(trainer):
    "The same trainer, whose decoders see every sample; losses are of those with truth, as before."
    net = trainer.net

    def asked(images, rows):
        scores = type(net).forward(net, images, dict.fromkeys(net.tasks, slice(None)))
        return {name: scores[name][r] for name, r in rows.items()}

    net.forward = asked
    return trainer


def main():
    torch.set_num_threads(1)
    found, tasks = sets.read_sets(SETS)
    config = resolve_train_config(TrainConfig("run", **SIZE), [5, 5, 5])
    seen = samples.MultiTaskDataset(found, tasks)
    keys = [samples.TaskBatchSampler((False,) * 3, "mixed", 12, 192, 0, 8).batch(step) for step in range(8)]
    for key in keys[0] + keys[1]:
        seen.field(key[0], 0)
    batches = [samples.collate([seen[k] for k in batch]) for batch in keys[:4]]
    began = time.process_time()
    for batch in keys[4:]:
        samples.collate([seen[k] for k in batch])
    making = (time.process_time() - began) / 48
    seconds = {"where there is truth": [], "everywhere": []}
    trainers = {
        "where there is truth": MultiTaskTrainer(config, tasks),
        "everywhere": everywhere(MultiTaskTrainer(config, tasks)),
    }
    for batch in batches:  # in turn, so that both have the same machine
        for name, trainer in trainers.items():
            began = time.process_time()
            trainer.train_step(iter([batch]))
            seconds[name].append(time.process_time() - began)
    step = {name: float(np.median(s[1:])) for name, s in seconds.items()}
    print(
        f"a step of 12 samples of 192 px, three tasks, {config.precision}, one core: "
        f"{step['where there is truth']:.2f} s, "
        f"{step['everywhere'] / step['where there is truth']:.2f}x faster than with every decoder everywhere"
    )
    print(
        f"making a sample with its targets: {1000 * making:.0f} ms, "
        f"{12 * making / step['where there is truth']:.0%} of what learning from it takes"
    )
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainConfig(
                str(Path(folder) / "run"),
                SETS,
                **SIZE,
                steps=12,
                workers=1,
                log_every=4,
                watch_every=1000,
                val_fields=1,
            )
        )
        rows = [row for row in read_jsonl(Path(folder) / "run/log.jsonl") if "data_wait" in row]
    print(
        f"a run with one worker: {rows[-1]['images_per_s']:.1f} samples/s, "
        f"{rows[-1]['data_wait']:.1%} of the time waiting for data (target: under 5%)"
    )


if __name__ == "__main__":
    main()
