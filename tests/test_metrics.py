"Classification figures: against scikit-learn and by hand, intervals by slide, and input that must be refused."

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from histonb.core.errors import BadInput
from histonb.metrics import classification as m
from histonb.slides.labels import LABELS


@pytest.fixture
def cohort():
    rng = np.random.default_rng(0)
    y = rng.choice(5, 800, p=[0, 0.6, 0.2, 0.15, 0.05])
    proba = rng.dirichlet(np.ones(5), 800) + 1.2 * np.eye(5)[y] * (rng.random(800) < 0.6)[:, None]
    return y, proba / proba.sum(1, keepdims=True), np.array([f"slide {i % 20}" for i in range(800)])


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_values_equal_sklearn(cohort):
    y, proba, slides = cohort
    p = proba.argmax(1)
    r = m.classification_metrics(y, proba, slides, LABELS, n_boot=50)
    assert r["accuracy"]["value"] == pytest.approx(sk.accuracy_score(y, p), abs=1e-12)
    assert r["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(y[y > 0], p[y > 0]), abs=1e-12)
    assert r["macro_f1"]["value"] == pytest.approx(sk.f1_score(y, p, average="macro"), abs=1e-12)
    assert r["quadratic_kappa"]["value"] == pytest.approx(sk.cohen_kappa_score(y, p, weights="quadratic"), abs=1e-12)
    assert np.array_equal(r["confusion"], sk.confusion_matrix(y, p, labels=range(5)))
    recall = sk.recall_score(y, p, labels=range(1, 5), average=None)
    assert [r["recall"][LABELS[i]]["value"] for i in range(1, 5)] == pytest.approx(list(recall), abs=1e-12)
    assert np.isnan(r["recall"]["background"]["value"])  # the class does not occur


def test_perfect_constant_and_reversed():
    y = np.arange(4).repeat(10)
    slides = np.tile(np.arange(5), 8)
    perfect, constant, reverse = (m.classification_metrics(y, p, slides, list("abcd"), 100) for p in (y, y * 0, 3 - y))
    assert [perfect[k]["value"] for k in m.CLASSIFICATION_METRICS] == [1, 1, 1, 1] and perfect["accuracy"]["low"] == 1
    assert constant["balanced_accuracy"]["value"] == 0.25 and constant["quadratic_kappa"]["value"] == pytest.approx(0)
    assert reverse["quadratic_kappa"]["value"] == pytest.approx(-1)


def test_probabilities_and_predictions_agree(cohort):
    y, proba, slides = cohort
    assert json.dumps(m.classification_metrics(y, proba, slides, LABELS)) == json.dumps(
        m.classification_metrics(y, proba.argmax(1), slides, LABELS)
    )


def test_intervals_by_slide_are_wider_than_by_tile():
    rng = np.random.default_rng(1)
    slide = np.repeat(np.arange(20), 50)
    y = rng.integers(0, 3, 1000)
    p = np.where(rng.random(1000) < rng.uniform(0.3, 1, 20)[slide], y, (y + 1) % 3)
    by_slide, by_tile = (m.classification_metrics(y, p, g, list("abc"))["accuracy"] for g in (slide, np.arange(1000)))
    assert by_slide["high"] - by_slide["low"] > 2 * (by_tile["high"] - by_tile["low"])
    assert by_slide["low"] < by_slide["value"] < by_slide["high"]


def test_seed_and_order_of_tiles_do_what_they_should(cohort):
    y, proba, slides = cohort
    first = m.classification_metrics(y, proba, slides, LABELS, seed=1)
    assert json.dumps(first) == json.dumps(m.classification_metrics(y, proba, slides, LABELS, seed=1))
    assert first["accuracy"]["low"] != m.classification_metrics(y, proba, slides, LABELS, seed=2)["accuracy"]["low"]
    back = np.r_[np.arange(20), np.random.default_rng(0).permutation(np.arange(20, 800))]  # same order of slides
    assert json.dumps(first) == json.dumps(m.classification_metrics(y[back], proba[back], slides[back], LABELS, seed=1))


def test_one_group_has_no_interval(cohort):
    y, proba, _ = cohort
    r = m.classification_metrics(y, proba, np.zeros(len(y)), LABELS)
    assert np.isnan([r[k][e] for k in m.CLASSIFICATION_METRICS for e in ("low", "high")]).all() and not np.isnan(
        r["accuracy"]["value"]
    )
    assert "One slide only" in r["note"]
    assert "3 slides only" in m.classification_metrics(y, proba, np.arange(len(y)) % 3, LABELS)["note"]
    assert m.classification_metrics(y, proba, np.arange(len(y)) % 30, LABELS)["note"] == ""


def test_class_of_a_single_slide_is_left_out_of_resamples_without_it():
    y = np.array([0] * 30 + [1] * 10)
    slide = np.array([0] * 10 + [1] * 10 + [2] * 10 + [3] * 10)
    p = y.copy()
    p[30:35] = 0
    r = m.classification_metrics(y, p, slide, ["common", "rare"])
    assert r["recall"]["rare"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert r["balanced_accuracy"]["high"] == 1 and not np.isnan(r["balanced_accuracy"]["low"])


def test_paired_difference_is_tighter_than_the_intervals(cohort):
    y, proba, slides = cohort
    worse = np.where(np.random.default_rng(3).random(len(y)) < 0.1, 1, proba.argmax(1))
    gap = m.paired_difference(y, proba, worse, slides, 5)["balanced_accuracy"]
    single = m.classification_metrics(y, proba, slides, LABELS)["balanced_accuracy"]
    assert gap["low"] > 0 and gap["high"] - gap["low"] < single["high"] - single["low"]
    same = m.paired_difference(y, proba, proba, slides, 5)
    assert all(same[k] == {"value": 0, "low": 0, "high": 0} for k in m.CLASSIFICATION_METRICS)


@pytest.mark.parametrize(
    "y, p, groups, says",
    [
        ([0, -1, 255], [0, 0, 0], [0, 0, 0], "1 of label -1, 1 of label 255"),
        ([0, 1], [0, 5], [0, 0], "1 of label 5"),
        ([0, 1], [0], [0, 0], "2 labels, 1 predictions"),
        ([0, 1], [0, 1], [0], "1 groups"),
        ([], [], [], "non-empty"),
        ([0, 1], [[0.1, 0.9], [0.2, 0.8]], [0, 0], "2 columns for 3 classes"),
        ([0, 1], [[0.1, 0.9, 0], [np.nan, 0.8, 0]], [0, 0], "NaN in 1 rows"),
        ([0, 1.5], [0, 1], [0, 0], "not whole numbers"),
        ([0, 1], [0, 1], ["a", None], "1 tiles without a group"),
    ],
)
def test_bad_input_is_named(y, p, groups, says):
    with pytest.raises(BadInput, match=says):
        m.classification_metrics(y, p, groups, ["a", "b", "c"])


def test_table_and_picture(cohort):
    y, proba, slides = cohort
    r = m.classification_metrics(y, proba, slides, LABELS, n_boot=100)
    row = m.metrics_table({"dino": r}, recall=True).loc["dino"]
    assert row["recall background"] == "-" and row["accuracy"].startswith(f"{r['accuracy']['value']:.3f} [")
    ax = m.plot_confusion(r)
    assert sorted(int(t.get_text()) for t in ax.texts) == sorted(np.ravel(r["confusion"]))
    json.dumps(r)  # can stand in metrics.json


def test_calibration_against_a_plain_loop():
    from histonb.metrics.calibration import calibration

    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 400)
    y = rng.integers(0, 3, 400)
    slide = rng.integers(0, 9, 400)
    said = p.max(1)
    right = p.argmax(1) == y
    ece = 0.0
    for b in range(10):
        inside = (said >= b / 10) & ((said < (b + 1) / 10) | (b == 9))
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - said[inside].mean())
    found = calibration(y, p, slide, bins=10, n_boot=300)
    assert abs(found["ece"]["value"] - ece) < 1e-9
    assert abs(found["brier"]["value"] - np.mean([((p[i] - np.eye(3)[y[i]]) ** 2).sum() for i in range(400)])) < 1e-9
    assert found["ece"]["low"] < found["ece"]["high"] and sum(b["n"] for b in found["bins"]) == 400
    assert np.isnan(calibration(y, p, np.zeros(400))["ece"]["low"])  # one slide: no interval
