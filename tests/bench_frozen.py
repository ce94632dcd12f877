"""Frozen encoders: probes from cached features, extraction beside timm's own loop, and a large logistic probe.

    python tests/bench_frozen.py [--tiles 2000] [--epochs 20] [--rounds 3]

The Bony report (Vaysse 2025) runs the encoder again in every epoch; here features are computed once. Both train the
same classifier for the same epochs on the same tiles; with --quick the first epoch of the report's way is timed and
multiplied. Extraction: the same weights and tiles (JPEG), ours from the tile store, theirs from files through PIL;
interleaved rounds, medians. Prints Markdown tables and writes runs/bench/frozen.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from histonb.core.files import repo_root, write_json
from histonb.datasets.example import example_tiles
from histonb.models.decoders import MLPClassifier
from histonb.probe.encoders import load_encoder
from histonb.probe.features import extract
from histonb.probe.probes import fit_linear, fit_linear_path, fit_mlp
from histonb.slides.tile_store import TileShards

NANO = "xcit_nano_12_p16_224"


class Files(Dataset):
    "Tiles as files, opened with PIL and normalised by hand, as most scripts do."

    def __init__(self, folder, spec):
        self.paths = sorted(Path(folder).glob("*.jpg"))
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = torch.from_numpy(np.array(Image.open(self.paths[i]).convert("RGB"))).permute(2, 0, 1).float() / 255
        return (image - self.mean) / self.std


class Repeated:
    "A store's tiles again and again, up to a number."

    def __init__(self, tiles, n):
        self.tiles = tiles
        self.n = n
        self.table = tiles.table.iloc[np.arange(n) % len(tiles)].reset_index(drop=True)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.tiles[i % len(self.tiles)]


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def report_epochs(tiles, encoder, y, epochs, hidden, batch=256):
    "The Bony report's way: tiles through the encoder in every epoch, then a step of the classifier."
    model = MLPClassifier(encoder.spec.dim, 5, hidden)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(tiles)).split(batch):
            features = torch.from_numpy(encoder(np.stack([tiles[int(i)][0] for i in rows])))
            loss = F.cross_entropy(model(features), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def probes(tiles, args):
    encoder = load_encoder(f"random:{NANO}")
    labels = np.arange(len(tiles)) % 5
    y = torch.from_numpy(labels)
    rows = []
    began = time.perf_counter()
    x = extract(tiles, encoder)
    once = time.perf_counter() - began
    measured = 1 if args.quick else args.epochs
    for name, hidden in (
        ("MLP (2048, 512, 128)", (2048, 512, 128)),
        ("Bony report's MLP (7192, 2048, 512, 128)", (7192, 2048, 512, 128)),
    ):
        theirs = timed(lambda hidden=hidden: report_epochs(tiles, encoder, y, measured, hidden))
        theirs *= args.epochs / measured
        ours = timed(lambda hidden=hidden: fit_mlp(x, labels, n_classes=5, hidden=hidden, epochs=args.epochs))
        rows.append((name, theirs, ours))
    rows.append(("linear (report's way: MLP)", rows[0][1], timed(lambda: fit_linear(x, labels, l2=0.01, n_classes=5))))
    what = f"{len(tiles)} tiles, {args.epochs} epochs, {NANO}"
    columns = "encoder in every epoch, s | from cached features, s | times | times, features counted in"
    print(f"\n| {what} | {columns} |\n|---|---|---|---|---|")
    for name, theirs, ours in rows:
        times = f"{theirs / ours:.0f} | {theirs / (ours + once):.1f}"
        print(f"| {name} | {theirs:.0f} | {ours:.1f} | {times} |", flush=True)
    return {"features_s": once, "rows": rows, "epochs_measured": measured}


def extraction(tiles, args):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(len(tiles)):
            (Path(folder) / f"{i:05d}.jpg").write_bytes(tiles.jpeg(i))
        for name in (NANO, "vit_tiny_patch16_224"):
            encoder = load_encoder(f"random:{name}")
            model = timm.create_model(name, num_classes=0).eval()
            model.load_state_dict(encoder.model.state_dict())
            files = Files(folder, encoder.spec)
            out = {}

            @torch.inference_mode()
            def theirs(model=model, files=files, out=out):
                out["timm"] = torch.cat([model(x) for x in DataLoader(files, batch_size=64)]).numpy()

            def ours(encoder=encoder, out=out):
                out["ours"] = extract(tiles, encoder)

            times = np.array([[timed(f) for f in (theirs, ours)] for _ in range(args.rounds + 1)][1:])
            ratio = float(np.median(times[:, 0] / times[:, 1]))
            gap = float(np.abs(out["timm"] - out["ours"]).max())
            rows.append((name, *(len(tiles) / np.median(times, 0)), ratio, gap))
    columns = "timm and PIL, tiles/s | ours, tiles/s | times | largest difference"
    print(f"\n| extraction, {len(tiles)} tiles | {columns} |\n|---|---|---|---|---|")
    for name, a, b, ratio, gap in rows:
        print(f"| {name} | {a:.0f} | {b:.0f} | {ratio:.2f} | {gap:.1e} |", flush=True)
    return rows


def logistic(n=100_000, dim=512):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, n)
    x = (0.15 * rng.normal(size=(5, dim)).astype(np.float32))[y] + rng.normal(size=(n, dim)).astype(np.float32)
    one = timed(lambda: fit_linear(x, y, l2=0.01))
    path = timed(lambda: list(fit_linear_path(x, y)))
    print(f"\nLogistic probe on {n:,} x {dim}: {one:.1f} s with one strength, {path:.1f} s along six")
    return {"one": one, "six": path}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="time one epoch of the report's way and multiply")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tiles = TileShards(example_tiles(Path(folder) / "tiles", n_slides=8))
        results = {
            "extraction": extraction(tiles, args),
            "logistic": logistic(),
            "probes": probes(Repeated(tiles, args.tiles), args),
        }
    write_json(repo_root() / "runs" / "bench" / "frozen.json", vars(args) | results)


if __name__ == "__main__":
    main()
