"""The reports: by hand with their defaults, and chained as a study from slides to the table."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from histonb.jobs.studies import run_study, stage_states, load_study

ROOT = Path(__file__).resolve().parents[1]
REPORTS = sorted((ROOT / "nbs/reports").glob("*.ipynb"))

STUDY = """
study: tiny
title: The demo in small
stages:
  tiles:
    notebook: 10_tiles
    parameters: {n_slides: 8, height: 1536, width: 1536, min_coverage: 0.05, val_fraction: 0.2, test_fraction: 0.3}
  pretrain:
    notebook: 20_pretrain
    parameters: {tiles: "{tiles}", steps: 3, batch_size: 8}
  probe-colour:
    notebook: 30_probe
    parameters: {tiles: "{tiles}", encoder: colour, probes: [knn, linear], n_boot: 100}
  probe-dino:
    notebook: 30_probe
    parameters: {tiles: "{tiles}", encoder: "{pretrain}", name: dino, probes: [knn, linear], n_boot: 100}
  compare:
    notebook: 90_compare
    parameters: {probes: ["{probe-colour}", "{probe-dino}"], n_boot: 100}
"""


@pytest.mark.parametrize("notebook", REPORTS, ids=[p.stem for p in REPORTS])
def test_report_runs_by_hand(notebook, tmp_path):
    """As a person would: papermill, a parameter file, any working folder."""
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(f"out: {tmp_path / 'run'}\n")
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", "--log-level", "ERROR",
               str(notebook), str(tmp_path / "out.ipynb"), "-f", str(parameters)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "HISTONB_BATCH": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["headline"]
    assert json.loads((tmp_path / "run/provenance.json").read_text())["packages"]["torch"]


def test_study_from_slides_to_table(tmp_path, monkeypatch):
    """A folder that looks like the repository, with a study of five stages in it."""
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
    assert states == {"tiles": "finished", "pretrain": "finished", "probe-colour": "finished", "probe-dino": "stale", "compare": "stale"}
