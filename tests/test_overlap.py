"Overlap of binary masks: scikit-learn, values by hand, intervals by case, impossible rows, and input that is refused."

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from histonb.core.errors import BadInput
from histonb.metrics import overlap as o
from histonb.transfer.ebhi_published import ACCURACY, published_masks


def random_masks(rng, n, side=12):
    return (rng.random((n, side, side)) < rng.uniform(0.1, 0.9, (n, 1, 1))).view(np.uint8)


def test_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    a = random_masks(rng, 30)
    b = random_masks(rng, 30)
    each = o.overlap_metrics(o.mask_overlap(a, b))
    for t, p, f in zip(a, b, each, strict=True):
        t = t.ravel()
        p = p.ravel()
        assert np.allclose(
            f[[0, 1, 3, 4]], [g(t, p) for g in (f1_score, jaccard_score, precision_score, recall_score)], atol=1e-12
        )
        assert np.isclose(f[2], 1 - (t != p).sum() / (t & p).sum())


def test_counts_add_up_whatever_the_type():
    rng = np.random.default_rng(1)
    a = random_masks(rng, 5)
    b = random_masks(rng, 5)
    counts = o.mask_overlap(a, b)
    assert np.array_equal(counts, o.mask_overlap(a.astype(bool), list(b)))
    assert np.array_equal(counts[:, 0] + counts[:, 2], a.sum((1, 2))) and np.array_equal(
        counts[:, 0] + counts[:, 1], b.sum((1, 2))
    )


@pytest.mark.parametrize(
    ("truth", "predicted", "wanted"),
    [(0, 0, [1, 1, 1, 1, 1]), (0, 1, [0, 0, np.nan, 0, 0]), (1, 0, [0, 0, np.nan, 0, 0]), (1, 1, [1, 1, 1, 1, 1])],
)
def test_empty_and_full_masks_have_defined_values(truth, predicted, wanted):
    full = np.full((1, 4, 4), truth, np.uint8), np.full((1, 4, 4), predicted, np.uint8)
    assert np.array_equal(o.overlap_metrics(o.mask_overlap(*full))[0], wanted, equal_nan=True)


def test_means_pooled_figures_and_failures_by_hand():
    counts = np.array([[900, 0, 100], [900, 100, 0], [0, 0, 10], [50, 50, 0]])
    found = o.overlap_by_category(counts, ["Polyp", "Polyp", "Polyp", "Normal"], ["a", "a", "b", "c"], n_boot=50)
    assert list(found) == ["Normal", "Polyp", "all"]
    polyp = found["Polyp"]
    assert np.isclose(polyp["image_dice"]["value"], (18 / 19 + 18 / 19 + 0) / 3) and np.isclose(
        polyp["pooled_dice"]["value"], 3600 / 3810
    )
    assert np.isclose(polyp["image_conformity"]["value"], 1 - 1 / 9) and np.isclose(
        polyp["pooled_conformity"]["value"], 1 - 210 / 1800
    )
    assert (polyp["failed"], polyp["n"], polyp["n_groups"]) == (1, 3, 2) and "2 cases" in polyp["note"]
    assert found["all"]["n"] == 4 and found["all"]["n_groups"] == 3


def test_a_category_with_one_case_has_no_interval():
    found = o.overlap_by_category([[5, 1, 1], [5, 0, 1]], ["x", "x"], ["a", "a"])["x"]
    assert (
        np.isnan(found["image_dice"]["low"])
        and "One case only" in found["note"]
        and np.isfinite(found["image_dice"]["value"])
    )


def test_only_failures_give_no_conformity():
    found = o.overlap_by_category([[0, 1, 1], [0, 3, 1]], ["x", "x"], ["a", "b"], n_boot=20)["x"]
    assert np.isnan(found["image_conformity"]["value"]) and found["failed"] == 2 and found["image_dice"]["value"] == 0
    assert o.overlap_table({"net": {"x": found}}).loc[("x", "net"), "conformity"] == "-"


def test_intervals_are_of_cases_not_of_pictures():
    rng = np.random.default_rng(3)
    level = rng.uniform(0.2, 0.9, 12)
    case = np.repeat(np.arange(12), 20)
    d = np.repeat(level, 20)
    counts = np.rint(np.column_stack([1000 * d, 1000 - 1000 * d, 1000 - 1000 * d])).astype(int)
    width = {}
    for name, groups in (("case", case), ("picture", np.arange(240))):
        e = o.overlap_by_category(counts, ["x"] * 240, groups)["x"]["image_dice"]
        width[name] = e["high"] - e["low"]
        assert e["low"] < e["value"] < e["high"]
    assert width["case"] > 3 * width["picture"]  # sqrt(20) = 4.5
    assert o.overlap_by_category(counts, ["x"] * 240, case) == o.overlap_by_category(counts, ["x"] * 240, case)


def test_differences_are_paired():
    rng = np.random.default_rng(4)
    a = rng.integers(1, 500, (60, 3))
    b = a + [[0, 5, 0]]
    case = rng.integers(0, 15, 60)
    kind = rng.choice(["x", "y"], 60)
    between = o.overlap_difference(a, b, kind, case)
    first, second = (o.overlap_by_category(c, kind, case) for c in (a, b))
    for name in ("x", "y", "all"):
        for figure in ("image_dice", "pooled_jaccard", "image_conformity"):
            assert np.isclose(
                between[name][figure]["value"], first[name][figure]["value"] - second[name][figure]["value"]
            )
        assert between[name]["image_dice"]["low"] > 0
        assert (
            between[name]["image_dice"]["high"] - between[name]["image_dice"]["low"]
            < first[name]["image_dice"]["high"] - first[name]["image_dice"]["low"]
        )


def test_the_gap_between_divisions_is_wider_than_a_paired_difference():
    rng = np.random.default_rng(6)
    d = np.repeat(rng.uniform(0.3, 0.9, 15), 4)
    counts = np.rint(np.column_stack([1000 * d, 1000 - 1000 * d, 1000 - 1000 * d])).astype(int)
    case = np.repeat(np.arange(15), 4)
    gap = o.overlap_unpaired(counts, case, counts, case)
    paired = o.overlap_difference(counts, counts, ["x"] * 60, case)["x"]
    for figure, e in gap.items():
        assert (
            e["value"] == paired[figure]["value"] == 0
            and e["low"] < 0 < e["high"]
            and paired[figure]["low"] == paired[figure]["high"] == 0
        )
    assert np.isnan(o.overlap_unpaired(counts, case, counts, np.zeros(60))["image_dice"]["low"])


# What cannot be


def test_any_rounded_table_of_real_counts_passes():
    rng = np.random.default_rng(5)
    for digits in (2, 3, 4):
        for _ in range(100):
            counts = rng.integers(0, 60, (rng.integers(1, 10), 3)) * rng.integers(0, 2, (1, 3))
            found = o.overlap_by_category(counts, ["x"] * len(counts), range(len(counts)), n_boot=2)["x"]
            pooled, mean = (
                {k: round(found[f"{kind}_{k}"]["value"], digits) for k in o.OVERLAP_METRICS}
                for kind in ("pooled", "image")
            )
            assert o.consistency(pooled, digits)[0] == "consistent", (counts, pooled)
            assert o.consistency(mean, digits)[0] != "impossible", (counts, mean)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"dice": 0.965, "jaccard": 0.308, "conformity": -1.514},
            "impossible",
        ),  # Jaccard far below what this Dice allows
        ({"dice": 0.4, "jaccard": 0.5}, "impossible"),  # above the Dice
        ({"dice": 0.9, "precision": 0.8, "recall": 0.8}, "impossible"),  # above their harmonic mean
        ({"dice": 0.8, "jaccard": 0.7}, "only as a mean"),
        ({"dice": 0.8, "jaccard": 0.667, "precision": 0.8, "recall": 0.8}, "consistent"),
        ({"dice": 0.8, "conformity": 0.2}, "only as a mean"),
        ({"dice": 0.8}, "untested"),
        ({}, "untested"),
        ({"dice": np.nan, "jaccard": 0.3}, "untested"),
    ],
)
def test_verdicts_by_hand(row, said):
    assert o.consistency(row)[0] == said


def test_the_tolerance_is_that_of_rounding():
    assert o.consistency({"dice": 0.90, "jaccard": 0.81}, 2)[0] == "consistent"  # .895 ... .905 means .810 ... .827
    assert o.consistency({"dice": 0.900, "jaccard": 0.810}, 3)[0] == "impossible"  # .8995 means .8173


def test_published_rows_are_judged_not_named():
    table = published_masks()
    assert (
        len(table) == 24
        and not table.duplicated(["network", "class"]).any()
        and table["network"].value_counts().to_dict() == dict.fromkeys(("Cerberus", "U-Net", "SegNet", "MedT"), 6)
    )
    dice = table[table["network"] == "Cerberus"].set_index("class")["dice"].to_dict()
    assert dice == {
        "Normal": 0.967,
        "Polyp": 0.967,
        "High-grade IN": 0.936,
        "Low-grade IN": 0.964,
        "Adenocarcinoma": 0.928,
        "Serrated adenoma": 0.937,
    }
    assert table.loc[table["consistency"] == "impossible", ["class", "network"]].values.tolist() == [["Polyp", "U-Net"]]
    mended = o.consistency_table(
        table[["dice", "jaccard", "conformity"]].assign(dice=table["dice"].where(table["network"] != "U-Net", 0.47))
    )
    assert "impossible" not in set(mended["consistency"])
    assert set(ACCURACY) == {"layer 1", "layer 2", "layer 3", "layer 4", "svm"} and all(
        0 < v < 1 for v in ACCURACY.values()
    )


# What must be refused


@pytest.mark.parametrize(
    ("truth", "predicted", "said"),
    [
        (np.zeros((1, 4, 4), np.uint8), np.zeros((1, 5, 4), np.uint8), "Resize the prediction"),
        (np.zeros((1, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8), "2 masks for 1"),
        (np.full((1, 4, 4), 255, np.uint8), np.zeros((1, 4, 4), np.uint8), "Threshold"),
        (np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4)), "float64"),
    ],
)
def test_masks_that_are_none_are_refused(truth, predicted, said):
    with pytest.raises(BadInput, match=said):
        o.mask_overlap(truth, predicted)


def test_tables_that_do_not_match_are_refused():
    for counts, categories, cases, said in (
        ([[1, 2, 3]], ["a", "b"], ["c"], "category of each"),
        ([[1, 2, 3]], ["a"], ["c", "d"], "case of each"),
        ([[1, 2]], ["a"], ["c"], "mask_overlap"),
        ([[1, 2, 3]], ["a"], [None], "without a group"),
    ):
        with pytest.raises(BadInput, match=said):
            o.overlap_by_category(counts, categories, pd.Series(cases))
    with pytest.raises(BadInput, match="same pictures"):
        o.overlap_difference([[1, 2, 3]], [[1, 2, 3]] * 2, ["a"], ["c"])
    with pytest.raises(BadInput, match="image or pooled"):
        o.overlap_table({}, "median")
