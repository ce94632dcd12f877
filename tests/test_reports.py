"""The reports: by hand with their defaults, and chained as a study from slides to the table."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import kernel_pool, run_report

from histonb.core.files import read_json
from histonb.datasets.example import example_tiles
from histonb.studies.execution import run_study
from histonb.studies.states import stage_states
from histonb.studies.study import load_study

ROOT = Path(__file__).resolve().parents[1]
REPORTS = sorted((ROOT / "nbs/reports").glob("*.ipynb"))

STUDY = """
study: tiny
title: The demo in small
stages:
  tiles:
    notebook: tiles
    parameters: {n_slides: 8, height: 1536, width: 1536, min_coverage: 0.05, val_fraction: 0.2, test_fraction: 0.3}
  pretrain:
    notebook: train_dino
    parameters: {tiles: "{tiles}", steps: 3, batch_size: 8}
  probe-colour:
    notebook: probe
    parameters: {tiles: "{tiles}", encoder: colour, probes: [knn, linear], n_boot: 100}
  probe-dino:
    notebook: probe
    parameters: {tiles: "{tiles}", encoder: "{pretrain}", name: dino, probes: [knn, linear], n_boot: 100}
  compare:
    notebook: compare_probes
    parameters: {probes: ["{probe-colour}", "{probe-dino}"], n_boot: 100}
"""


SHORTER = {name: {"epochs": 1, "seeds": 1} for name in ("decode_masks", "reconstruct")}
WHOLE = [pytest.param(name, {}, marks=pytest.mark.slow, id=f"{name}, whole") for name in SHORTER]
BY_HAND = [pytest.param(p.stem, SHORTER.get(p.stem, {}), id=p.stem) for p in REPORTS] + WHOLE


@pytest.mark.parametrize("notebook, changes", BY_HAND)
def test_report_runs_by_hand(notebook, changes, tmp_path):
    """With its defaults, in any working folder; those that train for long with their defaults in `make test-all`."""
    error, found = run_report(notebook, tmp_path, **changes)
    assert found, error[-3000:]
    assert found["headline"]
    assert json.loads((tmp_path / "run/provenance.json").read_text())["packages"]["torch"]


def test_a_report_runs_by_the_command(tmp_path):
    """As a person would: papermill and a parameter file."""
    (tmp_path / "p.yaml").write_text(f"out: {tmp_path / 'run'}\nseed: 3\n")
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", "-f", "p.yaml"]
    command += [str(ROOT / "nbs/reports/join_stores.ipynb"), "out.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_json(tmp_path / "run/provenance.json")["parameters"]["seed"] == 3


@pytest.mark.parametrize("arch, drawn", [("resnet18", False), ("vit_tiny_patch16_224.augreg_in21k", True)])
def test_pretraining_comes_to_its_end_with_any_backbone(arch, drawn, tmp_path, small_tiles):
    """Also where the network has no attention to draw, where its name has a tag, and with fewer tiles than pictures."""
    error, found = run_report(
        "train_dino", tmp_path, tiles=str(small_tiles), arch=arch, steps=2, batch_size=4, workers=0
    )
    assert found, error[-3000:]
    book = (tmp_path / "out.ipynb").read_text()
    assert found["steps"] == 2 and (f"{arch} has no class token" in book) != drawn


@pytest.fixture(scope="module")
def small_tiles(tmp_path_factory):
    """A store of five tiles in train."""
    store = example_tiles(tmp_path_factory.mktemp("few") / "tiles", n_slides=4, seed=0)
    table = pd.read_parquet(store / "tiles.parquet")
    kept = table[table.split == "train"].index[:5]
    table.assign(split=table.split.where(table.index.isin(kept), "test")).to_parquet(store / "tiles.parquet")
    return store


def probe(tmp_path, tiles, **parameters):
    """Run the probe report."""
    return run_report(
        "probe", tmp_path / "probe", **{"tiles": str(tiles), "encoder": "colour", "n_boot": 50, **parameters}
    )


def test_probe_report_counts_a_leak_and_refuses_what_cannot_be_learnt(tmp_path):
    tiles = example_tiles(tmp_path / "tiles", n_slides=6, seed=0)
    table = pd.read_parquet(tiles / "tiles.parquet")
    _, found = probe(tmp_path, tiles, protocol="random-tiles", probes=["knn", "prototypes"], shots=[1, 3])
    assert (
        found["leak"]["leaking_cases"] > 0
        and set(found["few_shot"]) == {"1", "3"}
        and found["protocol"] == "random-tiles"
    )
    assert 0 <= found["results"]["knn"]["calibration"]["ece"]["value"] <= 1
    tested = table.label[(table.split == "test") & ~table.label.isin([-1, 255])].iloc[0]
    table.assign(label=table.label.where((table.split != "train") | (table.label != tested), -1)).to_parquet(
        tiles / "tiles.parquet"
    )
    error, found = probe(tmp_path, tiles)
    assert (
        found is None and "`train` has no tile of class" in error and not (tmp_path / "probe/run/metrics.json").exists()
    )
    table.assign(split="train").to_parquet(tiles / "tiles.parquet")
    error, found = probe(tmp_path, tiles)
    assert found is None and "no labelled tile is in `val`" in error


def test_types_are_learnt_as_a_second_stage(tmp_path):
    error, first = run_report("train_cerberus", tmp_path / "objects", steps=4, n_boot=50)
    assert first and set(first["tasks"]) == {"gland", "nucleus", "lumen"}, error[-2000:]
    of = first["results"]["phantom, nucleus"]
    gain = first["over_baseline"]["phantom, nucleus, threshold and watershed"]["pq"]
    assert (
        abs(gain["value"] - (of["cerberus"]["pq"]["value"] - of["threshold and watershed"]["pq"]["value"])) < 1e-9
        and gain["low"] <= gain["value"] <= gain["high"]
    )
    error, second = run_report(
        "train_cerberus",
        tmp_path / "types",
        steps=2,
        n_boot=50,
        start=str(tmp_path / "objects/run"),
        freeze=True,
        tasks=["nucleus-type"],
        baseline=False,
        name="types",
        sets=[{"reader": "phantom_regions", "n": 10, "seed": 1, "size": 128}],
    )
    assert second and second["tasks"] == ["nucleus-type"], error[-2000:]
    assert set(second["results"]["phantom, nucleus-type"]["types"]["n_objects"]) >= {"lymphocyte", "epithelial"}


def test_study_from_slides_to_table(tmp_path, monkeypatch):
    """A folder that looks like the repository, with a study of five stages in it."""
    for name, value in kernel_pool().environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    (tmp_path / "settings.ini").symlink_to(ROOT / "settings.ini")
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs/tiny.yaml"
    path.write_text(STUDY)
    run_study(path)
    folder = tmp_path / "runs/tiny"
    for stage in ("tiles", "pretrain", "probe-colour", "probe-dino", "compare"):
        for name in ("notebook.ipynb", "metrics.json", "provenance.json", "report.html"):
            assert (folder / stage / name).stat().st_size > 0, f"{stage}/{name}"
    index = (folder / "index.html").read_text()
    assert "compare/report.html" in index and "balanced accuracy" in index.lower()

    compared = json.loads((folder / "compare/metrics.json").read_text())
    predictions = pd.read_parquet(folder / "probe-dino/predictions.parquet")
    tiles = pd.read_parquet(folder / "tiles/tiles.parquet")
    assert compared["test_tiles"] == len(predictions) == ((tiles.split == "test") & ~tiles.label.isin([-1, 255])).sum()
    hits = (predictions.label == predictions.linear).groupby(predictions.label).mean()
    assert abs(compared["results"]["dino, linear"]["balanced_accuracy"]["value"] - hits.mean()) < 1e-9
    assert set(predictions.slide).isdisjoint(tiles.slide[tiles.split == "train"])

    before = {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.json")}
    run_study(path)  # everything is finished: nothing runs again
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.json")}
    path.write_text(STUDY.replace("n_boot: 100}\n  compare", "n_boot: 101}\n  compare"))
    states = {row["stage"]: row["state"] for row in stage_states(load_study(path))}
    assert states == {
        "tiles": "finished",
        "pretrain": "finished",
        "probe-colour": "finished",
        "probe-dino": "stale",
        "compare": "stale",
    }
