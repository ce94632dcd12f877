"""What histonb 0.1 (commit 1b0ba30) wrote is still read: tiles, features, weights, and runs, which go on.

`files/of_0.1.tar.xz` was written by that commit: 24 tiles of two phantom slides, a pre-training of 4 steps with its two
checkpoints, features of its backbone, and a Cerberus of 4 steps. Its weights are rounded so that it is small.
"""

import dataclasses
import tarfile
from pathlib import Path

import numpy as np
import pytest

from histonb.core.digests import content_key
from histonb.core.files import read_json, read_jsonl
from histonb.core.parameters import build, with_present_names
from histonb.models import cerberus
from histonb.pretrain import pretraining
from histonb.pretrain.config import as_config
from histonb.probe.encoders import load_encoder
from histonb.probe.features import extract
from histonb.segment import training
from histonb.segment.training_config import TrainConfig
from histonb.slides.tile_store import TileShards


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The files, in a working folder of their own as they were made in."""
    with tarfile.open(Path(__file__).parent / "files/of_0.1.tar.xz") as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("old")


def test_tiles(old):
    store = TileShards(old / "tiles")
    image, label = store[3]
    assert len(store) == 24 and np.asarray(image).shape == (224, 224, 3)
    assert label == store.table.label[3]


def test_features_in_their_cache(old):
    """Found, not computed again; and computed anew they are the same."""
    store = TileShards(old / "tiles")
    encoder = load_encoder("run:old/run")
    before = {p: p.stat().st_mtime_ns for p in (old / "features").iterdir()}
    cached = extract(store, encoder, old / "features")
    assert {p: p.stat().st_mtime_ns for p in (old / "features").iterdir()} == before
    assert np.array_equal(cached[:3], np.load(old / "expected.npy"))
    assert np.allclose(extract(store, encoder), cached, atol=1e-5)


def test_a_pretraining_that_was_stopped_goes_on(old):
    run = old / "run"
    for name in ("backbone.json", "backbone.safetensors", "checkpoints/0000004-d4e66aa8ac3d2e19.pt"):
        (run / name).unlink()
    config = as_config(read_json(run / "config.json"), run)
    pretraining.pretrain(config)
    steps = [row["step"] for row in read_jsonl(run / "log.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4] and (run / "backbone.safetensors").exists()


def test_a_finished_pretraining_is_done(old):
    run = old / "run"
    before = content_key(run / "backbone.safetensors")
    pretraining.pretrain(as_config(read_json(run / "config.json"), run))
    assert content_key(run / "backbone.safetensors") == before


def test_a_cerberus_is_loaded_and_goes_on(old):
    run = old / "cerberus"
    net, about = cerberus.load_cerberus(run)
    assert [*net.tasks] == ["gland", "nucleus"] and about["step"] == 4
    for path in [*run.glob("cerberus.*"), *run.glob("checkpoints/0000004-*.pt")]:
        path.unlink()
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    values = with_present_names(read_json(run / "config.json"), names)  # as a user writes it today
    assert values["sets"][0]["reader"] == "phantom_regions" and values["sets"][0]["labels"] == ["gland", "nucleus"]
    training.train(build(TrainConfig, values, run))
    assert [row["step"] for row in read_jsonl(run / "log.jsonl") if "loss" in row] == [1, 2, 3, 4]
    assert (run / "cerberus.safetensors").exists()
