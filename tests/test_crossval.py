"""Cross-validation: cases stay together, nothing of the test is learnt, folds are equal, intervals hold the truth."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest

from histonb.core.errors import BadInput
from histonb.metrics import classification as metrics
from histonb.probe import cross_validation as crossval
from histonb.probe.cross_validation import case_folds, cross_validate, predict_tuned

pytestmark = pytest.mark.usefixtures("one_thread")


def cohort(n_cases=40, dim=6, signal=1.5, stain=1.0, seed=0, tiles=10):
    "Features of cases of unequal size; part tells the class, part the case."
    rng = np.random.default_rng(seed)
    label = np.arange(n_cases) % 4 % 3  # classes of 2:1:1
    case = np.repeat(np.arange(n_cases), rng.integers(1, tiles, n_cases))
    centers = np.random.default_rng(9).normal(0, signal, (3, dim))
    x = centers[label[case]] + rng.normal(0, stain, (n_cases, dim))[case] + rng.normal(0, 0.5, (len(case), dim))
    return x.astype(np.float32), label[case], np.char.add("case ", case.astype(str))


def test_folds_keep_cases_together_and_use_each_tile_once():
    _, y, case = cohort()
    folds = case_folds(y, case, 5, repeats=6, seed=3)
    assert folds.shape == (6, len(y)) and set(folds.ravel()) == set(range(5))
    for fold in folds:
        for k in range(5):
            assert set(case[fold == k]).isdisjoint(case[fold != k])
        assert pd.crosstab(fold, y).to_numpy().min() > 0  # every class in every fold: there are cases enough
    assert len({fold.tobytes() for fold in folds}) == 6


def test_folds_depend_on_nothing_but_labels_cases_and_seed():
    x, y, case = cohort()
    assert np.array_equal(case_folds(y, case, 5, 3, 1)[1:], case_folds(y, case, 5, 2, 2))
    before = case_folds(y, case)
    np.random.seed(0)
    np.random.random(5)
    assert np.array_equal(before, case_folds(pd.Series(y), pd.Series(case)))


@pytest.mark.parametrize(
    "y, case, options, says",
    [
        ([0, 0, 1, 1], ["a", "b", "c", "c"], dict(n_folds=2), "one case only has class 1"),
        ([0, 0, 1, 1], ["a", "b", "c", "d"], dict(n_folds=5), "5 folds of 4 cases"),
        ([0, 0, 1, 1], ["a", "b", "c", "d"], dict(n_folds=1), "1 folds"),
        ([0, 0, 1, 1], ["a", "b", "c", "d"], dict(n_folds=2, repeats=0), "0 times"),
        ([0, 0, 1, 1], ["a", "b", "c", ""], dict(n_folds=2), "without a case"),
        ([0, 0, 1, 1], ["a", "b", "c", None], dict(n_folds=2), "without a case"),
    ],
)
def test_unusable_folds_are_named(y, case, options, says):
    with pytest.raises(BadInput, match=says):
        case_folds(y, np.array(case, object), **options)


def test_a_case_in_two_folds_and_an_unknown_probe_are_refused():
    x, y, case = cohort()
    with pytest.raises(BadInput, match="a case lies in two folds"):
        cross_validate("knn", x, y, case, np.arange(len(y))[None] % 5, 3)
    with pytest.raises(BadInput, match="Did you mean `linear`"):
        cross_validate("liner", x, y, case, case_folds(y, case, 5, 1), 3)


@pytest.mark.parametrize("probe", ["knn", "linear", "mlp"])
def test_out_of_fold_equals_a_probe_that_never_saw_the_fold(probe, monkeypatch):
    monkeypatch.setattr(crossval, "mlp", partial(crossval.mlp, hidden=(16, 8), epochs=4))  # one that is quickly trained
    x, y, case = cohort(16, tiles=5)
    folds = case_folds(y, case, 3, 2)
    p = cross_validate(probe, x, y, case, folds, 3)
    assert p.shape == (2, len(y), 3) and np.allclose(p.sum(-1), 1, atol=1e-4)
    test = folds[1] == 2
    assert np.array_equal(p[1, test], predict_tuned(probe, x[~test], y[~test], case[~test], x[test], 3, seed=1))
    if probe == "linear":  # other features and labels in the test fold change nothing of the probe
        spoilt = x.copy()
        other = y.copy()
        spoilt[test], other[test] = 1e3, 0
        again = predict_tuned(probe, spoilt[~test], other[~test], case[~test], x[test], 3, seed=1)
        assert np.array_equal(p[1, test], again)


def test_scale_and_strength_come_from_the_training_cases(monkeypatch):
    "What is fitted in a fold sees training cases only, and the strength is chosen on cases it was not fitted on."
    x, y, case = cohort()
    row = {tuple(v): c for v, c in zip(x.tolist(), case)}
    seen = []
    held = []
    sweep = crossval.fit_linear_path

    def spy(x_train, y_train, *options, **more):
        seen.append({row[tuple(v)] for v in x_train.tolist()})
        for probe in sweep(x_train, y_train, *options, **more):
            assert np.allclose(probe.mean, x_train.mean(0), atol=1e-4)
            yield watched(probe)

    def watched(probe):
        def call(x_out):
            held.append({row[tuple(v)] for v in x_out.tolist()})
            assert held[-1].isdisjoint(seen[-1])
            return probe(x_out)

        call.l2 = probe.l2
        return call

    monkeypatch.setattr(crossval, "fit_linear_path", spy)
    fold = case_folds(y, case, 3, 1)
    cross_validate("linear", x, y, case, fold, 3)
    assert len(seen) == 3 * crossval.INNER_FOLDS and len(held) == len(seen) * len(crossval.STRENGTHS)
    for i, cases in enumerate(seen):
        assert cases | held[i * len(crossval.STRENGTHS)] == set(case[fold[0] != i // crossval.INNER_FOLDS])


@pytest.mark.parametrize("probe, trials", [("knn", 8), ("linear", 2)])
def test_labels_shuffled_by_case_give_chance(probe, trials):
    values = []
    for seed in range(trials):
        x, _, case = cohort(60, dim=30, stain=3, seed=seed, tiles=8)
        number = np.unique(case, return_inverse=True)[1]
        y = np.random.default_rng(seed).permutation(np.arange(60) % 3)[number]
        p = cross_validate(probe, x, y, case, case_folds(y, case, 5, 1, seed), 3)[0]
        values.append(metrics.classification_metrics(y, p, case, list("abc"), 2)["balanced_accuracy"]["value"])
    assert abs(np.mean(values) - 1 / 3) < 0.1
    tile = np.arange(len(y))  # the same question divided by tile: what a leak would look like
    leaky = cross_validate(probe, x, y, tile, case_folds(y, tile, 5, 1), 3)[0]
    assert metrics.classification_metrics(y, leaky, case, list("abc"), 2)["balanced_accuracy"]["value"] > 0.6


def test_balanced_probe_serves_the_rare_class():
    x, y, case = cohort(60, signal=0.6, stain=0.5)
    keep = (y != 2) | (np.unique(case, return_inverse=True)[1] % 5 == 0)
    x = x[keep]
    y = y[keep]
    case = case[keep]
    folds = case_folds(y, case, 3, 1)
    recall = {
        b: metrics.classification_metrics(
            y, cross_validate("linear", x, y, case, folds, 3, balanced=b)[0], case, list("abc"), 2
        )["recall"]["c"]["value"]
        for b in (False, True)
    }
    assert recall[True] > recall[False]


def repeated(y, p, case, **options):
    return metrics.classification_metrics(
        np.tile(y, len(p)),
        p.argmax(-1).ravel(),
        np.tile(case, len(p)),
        list("abc"),
        repeat=np.repeat(np.arange(len(p)), len(y)),
        **options,
    )


def test_repeats_count_tiles_once_and_show_their_spread():
    x, y, case = cohort()
    p = cross_validate("knn", x, y, case, case_folds(y, case, 5, 4), 3)
    r = repeated(y, p, case, n_boot=200)
    alone = [metrics.classification_metrics(y, v, case, list("abc"), 2)["balanced_accuracy"]["value"] for v in p]
    assert r["n"] == len(y) and np.allclose(r["repeats"]["balanced_accuracy"], alone)
    assert np.isclose(r["balanced_accuracy"]["value"], np.mean(alone)) and np.isclose(
        np.sum(r["confusion"]), len(y), atol=0.1
    )
    json.dumps(r)
    same = repeated(y, np.stack([p[0]] * 4), case, n_boot=200)
    once = metrics.classification_metrics(y, p[0], case, list("abc"), 200)
    for m in metrics.CLASSIFICATION_METRICS:
        assert np.allclose(list(same[m].values()), list(once[m].values()))  # calls repeated are no more tiles
    with pytest.raises(BadInput, match="Each repeat must call every tile once"):
        metrics.classification_metrics(y, p[0], case, list("abc"), repeat=np.arange(len(y)) > 2)


def test_complete_resamples_have_every_class():
    "A class on one case, always called rightly: a resample without it is no figure of three classes."
    y = np.repeat([0, 1, 2], [100, 100, 10])
    case = np.r_[np.arange(200) // 10, np.full(10, 20)]
    p = np.where((np.arange(210) % 2 == 0) | (y == 2), y, (y + 1) % 2)
    low = {
        c: metrics.classification_metrics(y, p, case, list("abc"), 400, complete=c)["balanced_accuracy"]["low"]
        for c in (False, True)
    }
    assert low[False] == 0.5 and np.isclose(low[True], 2 / 3)
    gap = metrics.paired_difference(y, p, np.where(y == 2, 0, p), case, 3, 400, complete=True)["balanced_accuracy"]
    assert np.allclose([gap["low"], gap["high"]], 1 / 3)


def test_interval_of_repeated_calls_holds_the_truth():
    "Calls with a known chance to be right that varies by case: 95 of 100 intervals ought to hold it."
    inside = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        case = np.repeat(np.arange(60), rng.integers(2, 12, 60))
        y = (np.arange(60) % 3)[case]
        right = rng.random((3, len(case))) < rng.beta(6, 4, 60)[case]  # mean .6
        calls = np.where(right, y, (y + 1) % 3)
        r = metrics.classification_metrics(
            np.tile(y, 3), calls.ravel(), np.tile(case, 3), list("abc"), 200, seed, np.repeat(range(3), len(y))
        )
        inside.append(r["balanced_accuracy"]["low"] <= 0.6 <= r["balanced_accuracy"]["high"])
    assert np.mean(inside) > 0.88


def test_paired_difference_on_the_same_folds_sees_what_two_intervals_do_not():
    x, y, case = cohort(60, signal=1.0)
    folds = case_folds(y, case, 5, 3)
    noise = np.random.default_rng(1).normal(0, 0.8, x.shape).astype(np.float32)
    good, bad = (cross_validate("knn", f, y, case, folds, 3) for f in (x, x + noise))
    a = repeated(y, good, case)
    b = repeated(y, bad, case)
    gap = metrics.paired_difference(
        np.tile(y, 3), good.argmax(-1).ravel(), bad.argmax(-1).ravel(), np.tile(case, 3), 3
    )["balanced_accuracy"]
    assert np.isclose(gap["value"], a["balanced_accuracy"]["value"] - b["balanced_accuracy"]["value"])

    def width(r):
        return r["high"] - r["low"]

    assert width(gap) < width(a["balanced_accuracy"]) and gap["low"] > 0
