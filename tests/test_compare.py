"""The comparison report on imitated probes: over a parameter, on the same folds, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest

from histonb.core.files import write_json
from histonb.metrics import classification as metrics
from histonb.probe.cross_validation import case_folds

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["a", "b", "c"]


def probe(folder, name, skill, seed=0, out_dim=None):
    "Outputs of a cross-validated probe stage, calls drawn at random with the given chance to be right."
    rng = np.random.default_rng(5)
    case = np.repeat(np.arange(30), rng.integers(2, 9, 30))
    y = (np.arange(30) % 3)[case]
    fold = case_folds(y, case, 3, 2, seed)
    tiles = pd.DataFrame(
        {"slide": case.astype(str), "case": case.astype(str), "x": np.arange(len(y)), "y": 0, "label": y}
    )
    called = pd.concat([tiles.assign(repeat=r, fold=f) for r, f in enumerate(fold)], ignore_index=True)
    right = np.random.default_rng(len(name)).random(len(called)) < skill
    called["linear"] = np.where(right, called.label, (called.label + 1) % 3)
    folder.mkdir()
    called.to_parquet(folder / "predictions.parquet", index=False)
    result = metrics.classification_metrics(
        called.label, called.linear, called.case, CLASSES, 200, repeat=called.repeat
    )
    write_json(
        folder / "metrics.json",
        {
            "encoder": name,
            "random_init": out_dim is None,
            "slides": {"all": 30},
            "results": {"linear": result},
            "pretraining": {"out_dim": out_dim, "lr": 1e-3, "out": str(folder)} if out_dim else {},
        },
    )
    return folder


def compare(out, **parameters):
    out.mkdir()
    papermill.execute_notebook(
        ROOT / "nbs/reports/compare_probes.ipynb",
        out / "notebook.ipynb",
        kernel_name="python3",
        progress_bar=False,
        parameters={"out": str(out), "n_boot": 100, **parameters},
    )
    return json.loads((out / "metrics.json").read_text())


def test_over_a_parameter_on_the_same_folds(tmp_path):
    folders = [
        probe(tmp_path / "r", "random", 0.5),
        *(probe(tmp_path / str(k), f"K {k}", skill, out_dim=k) for k, skill in ((4096, 0.8), (1024, 0.6), (2048, 0.7))),
    ]
    found = compare(
        tmp_path / "out", probes=[str(f) for f in folders], reference="random", axis="out_dim", complete=True
    )
    assert found["over"] == {"K 1024": 1024, "K 2048": 2048, "K 4096": 4096} and list(found["over"])[0] == "K 1024"
    calls = {f.name: pd.read_parquet(f / "predictions.parquet") for f in folders}
    recall = {n: (c.linear == c.label).groupby(c.label).mean().mean() for n, c in calls.items()}
    gap = found["differences"]["K 4096, linear"]["balanced_accuracy"]
    assert abs(gap["value"] - (recall["4096"] - recall["r"])) < 1e-9 and gap["low"] > 0
    assert found["test_tiles"] == len(calls["r"]) // 2 and len(found["differences"]) == 3


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(seed=1), "was scored on other tiles, or in other folds"),
        (dict(name="random"), "two of them are called the same"),
        (dict(axis="out_dims"), "Did you mean `out_dim`"),
    ],
)
def test_what_cannot_be_compared(tmp_path, change, says):
    folders = [
        probe(tmp_path / "r", "random", 0.5),
        probe(tmp_path / "k", change.get("name", "K"), 0.6, change.get("seed", 0), 1024),
    ]
    with pytest.raises(papermill.PapermillExecutionError, match=says):
        compare(tmp_path / "out", probes=[str(f) for f in folders], axis=change.get("axis", ""))
