"Splits: cases stay whole, classes are everywhere, and leaks are found, on PANDA's table and on small cohorts."

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from histonb.core.errors import BadInput
from histonb.datasets.splits import SPLITS, check_leak, grouped_split, random_tile_split, split_counts

TRAIN = Path(__file__).parents[2] / "shared/data/panda/train.csv"


def make(n_cases, seed, classes=(1, 2, 3, 4)):
    "A tile table: one to three classes in every case, 20 to 200 tiles of each."
    rng = np.random.default_rng(seed)
    rows = [
        (f"c{i}", label)
        for i in range(n_cases)
        for label in rng.choice(classes, rng.integers(1, 4), replace=False)
        for _ in range(rng.integers(20, 200))
    ]
    return pd.DataFrame(rows, columns=["case", "label"])


@pytest.mark.skipif(not TRAIN.exists(), reason=f"needs {TRAIN}")
def test_panda_is_balanced_by_grade_and_provider():
    table = pd.read_csv(TRAIN, dtype={"isup_grade": str}).assign(case=lambda t: t["image_id"])
    split = grouped_split(table, label=["isup_grade", "data_provider"])
    assert check_leak(split)["leaking_cases"] == 0
    for label in ("isup_grade", "data_provider"):
        held = split_counts(split, label=label)
        assert np.abs(held["rows"] / len(table) - [0.8, 0.1, 0.1, 1]).max() < 0.002
        assert np.abs(held.loc[list(SPLITS)].iloc[:, 2:] - held.loc["all"].iloc[2:]).max().max() < 0.005


@pytest.mark.skipif(not TRAIN.exists(), reason=f"needs {TRAIN}")
def test_duplicates_of_panda_stay_together():
    table = pd.read_csv(TRAIN)
    table["case"] = np.random.default_rng(0).integers(0, 4000, len(table))
    split = grouped_split(table, label="isup_grade")
    assert (
        split.groupby("case")["split"].nunique().max() == 1
        and np.abs(split_counts(split, label="isup_grade")["rows"] / len(table) - [0.8, 0.1, 0.1, 1]).max() < 0.005
    )


@pytest.mark.parametrize("n_cases", [10, 15, 20])
@pytest.mark.parametrize("seed", range(6))
def test_small_cohorts_hold_every_class_everywhere(n_cases, seed):
    table = make(n_cases, seed)
    cases = table.groupby("label")["case"].nunique()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        split = grouped_split(table, seed=seed)
    check_leak(split)
    where = split.groupby("label")["split"].nunique()
    assert (where[cases >= 3] == 3).all()
    assert len(said) == (cases < 3).sum()
    assert split.groupby("split")["case"].nunique()["train"] >= 0.5 * n_cases


def test_a_class_too_rare_is_said():
    table = pd.concat([make(12, 0, classes=(1, 2, 3)), pd.DataFrame({"case": ["c0"] * 5, "label": [4] * 5})])
    with pytest.warns(UserWarning, match="label 4 occurs in 1 of 12 cases"):
        grouped_split(table)


def test_same_seed_same_split_in_any_order():
    table = make(15, 1)
    split = grouped_split(table, seed=3)["split"]
    for seed in range(3):
        assert grouped_split(table.sample(frac=1, random_state=seed), seed=3)["split"].sort_index().equals(split)
    assert len({tuple(grouped_split(table, seed=s)["split"]) for s in range(5)}) > 2


def test_dropped_and_ignored_tiles_do_not_count():
    "A class of dropped or ignored tiles is no class, but the tiles follow their case."
    table = make(12, 2)
    extra = pd.DataFrame({"case": [f"c{i}" for i in range(12)] * 2, "label": [255] * 12 + [-1] * 12})
    dropped = pd.DataFrame({"case": ["c0", "new"], "label": [9, 9], "kept": False})
    both = pd.concat([table, extra]).assign(kept=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = grouped_split(pd.concat([both, dropped], ignore_index=True))
    check_leak(split)
    assert split["split"].isin(SPLITS).all()


def test_two_way_split():
    split = grouped_split(make(10, 0), fractions=(0.7, 0, 0.3))
    assert set(split["split"]) == {"train", "test"} and check_leak(split)["leaking_cases"] == 0


def test_columns_and_index_stay():
    table = make(10, 0).assign(x=1.5).sample(frac=1, random_state=0)
    for split in (grouped_split(table), random_tile_split(table)):
        pd.testing.assert_frame_equal(split.drop(columns="split"), table)
        assert "split" not in table


def test_random_tile_split_leaks_and_is_caught():
    table = make(20, 0)
    split = random_tile_split(table, seed=1)
    n = split["split"].value_counts()[list(SPLITS)].to_numpy()
    assert np.abs(n - len(table) * np.array([0.8, 0.1, 0.1])).max() <= 1
    assert split["split"].equals(random_tile_split(table, seed=1)["split"]) and not split["split"].equals(
        random_tile_split(table, seed=2)["split"]
    )
    with pytest.raises(BadInput, match="20 of 20 cases occur in more than one split"):
        check_leak(split)
    counted = check_leak(split, strict=False)
    assert counted == {"rows": len(table), "cases": 20, "leaking_cases": 20, "leaking_rows": int(n[1:].sum())}


def test_one_tile_that_leaks_is_found():
    split = grouped_split(make(20, 0)).reset_index(drop=True)
    row = split.index[split["split"] == "test"][0]
    split.loc[row, "split"] = "train"
    case = split.loc[row, "case"]
    with pytest.raises(BadInput, match=f"1 of 20 cases .*{case} in train and test"):
        check_leak(split)
    assert check_leak(split, strict=False)["leaking_rows"] == (split["case"] == case).sum() - 1


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda t: grouped_split(t, group="slides"), "no column `slides`"),
        (lambda t: grouped_split(t, label="lable"), "Did you mean `label`?"),
        (lambda t: grouped_split(t[:0]), "no rows"),
        (lambda t: grouped_split(t, fractions=(0.8, 0.3, 0.1)), "not three shares"),
        (lambda t: grouped_split(t, fractions=(1.2, -0.1, -0.1)), "not three shares"),
        (lambda t: grouped_split(t.assign(case="only")), "1 cases cannot fill 3 splits"),
        (lambda t: grouped_split(t.assign(case=t["case"].where(t["case"] != "c0"))), "rows have no `case`"),
        (lambda t: grouped_split(t.assign(case=t["case"].replace("c0", ""))), "rows have no `case`"),
        (lambda t: grouped_split(t.assign(case=t["case"].replace("c0", " "))), "rows have no `case`"),
        (lambda t: random_tile_split(t, fractions=(0.5, 0.5)), "not three shares"),
        (lambda t: check_leak(t), "no column `split`"),
        (lambda t: check_leak(t.assign(split=None)), "no row has a split"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(BadInput) as e:
        call(make(10, 0))
    assert words in str(e.value)
