"Probes: against scikit-learn, chosen strength, early stopping, absent classes, and input that must be refused."

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from histonb.core.errors import BadInput
from histonb.probe import probes
from histonb.probe.prototypes import draw_examples, few_shot, prototypes

SMALL = dict(hidden=(32, 16), batch_size=64, epochs=20, lr=5e-3)


pytestmark = pytest.mark.usefixtures("one_thread")


def data(n, seed, dim=16, classes=4):
    centers = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return (centers[y] + rng.normal(size=(n, dim))).astype(np.float32), y


@pytest.fixture
def splits():
    return data(400, 0), data(200, 1), data(300, 2)


@pytest.fixture(params=["knn", "linear", "mlp"])
def probe(request, splits):
    "Each probe with the same signature: train features, labels, test features."
    _, (x_val, y_val), _ = splits
    extra = {"knn": {}, "linear": {"l2": 0.01}, "mlp": {**SMALL, "x_val": x_val, "y_val": y_val}}[request.param]
    return lambda *a, **k: getattr(probes, request.param)(*a, **{**extra, **k})


def test_probabilities_that_classify(probe, splits):
    (x, y), _, (x_test, y_test) = splits
    p = probe(x, y, x_test)
    assert p.shape == (300, 4) and p.dtype == np.float32
    assert np.allclose(p.sum(1), 1, atol=1e-5) and (p >= 0).all()
    assert (p.argmax(1) == y_test).mean() > 0.85
    assert np.array_equal(p, probe(x, y, x_test))  # the same again


def test_class_absent_in_train(probe, splits):
    (x, y), _, (x_test, _) = splits
    keep = y != 2
    p = probe(x[keep], y[keep], x_test, n_classes=6)
    assert p.shape == (300, 6) and p[:, [2, 4, 5]].max() < 0.2 and np.isfinite(p).all()
    assert set(p.argmax(1)) <= {0, 1, 3}


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda x, y, t: (x, np.where(np.arange(len(y)) < 3, 255, y), t), "3 of label 255"),
        (lambda x, y, t: (x, np.where(np.arange(len(y)) < 2, -1, y), t), "2 of label -1"),
        (
            lambda x, y, t: (np.where(np.arange(len(x))[:, None] == 5, np.nan, x), y, t),
            "training features: NaN or infinite values in 1 of 400",
        ),
        (
            lambda x, y, t: (x, y, np.where(np.arange(len(t))[:, None] < 2, np.inf, t)),
            "NaN or infinite values in 2 of 300",
        ),
        (lambda x, y, t: (x, y * 0, t), "all 400 tiles are of class 0"),
        (lambda x, y, t: (x, y[:-1], t), "labels of shape"),
        (lambda x, y, t: (x, y, t[:, :3]), "3 features a tile where training had 16"),
        (lambda x, y, t: (x, y, t[:0]), "the split: it may be empty"),
        (lambda x, y, t: (x[:0], y[:0], t), "empty"),
    ],
)
def test_bad_input_is_named(probe, splits, spoil, says):
    (x, y), _, (x_test, _) = splits
    with pytest.raises(BadInput, match=says):
        probe(*spoil(x, y, x_test), n_classes=4)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.07), (50, 1.0), (1000, 0.2)])
def test_knn_equals_sklearn(splits, monkeypatch, k, temperature):
    (x, y), _, (x_test, _) = splits
    theirs = KNeighborsClassifier(
        min(k, len(x)), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    monkeypatch.setattr(probes, "MAX_SIMILARITIES", 7 * len(x))  # many blocks
    assert np.allclose(probes.knn(x, y, x_test, k, temperature), theirs.fit(x, y).predict_proba(x_test), atol=1e-5)


def test_knn_ignores_the_length_of_features_and_survives_a_zero(splits):
    (x, y), _, (x_test, _) = splits
    scale = np.random.default_rng(0).uniform(0.1, 10, (len(x), 1)).astype(np.float32)
    assert np.allclose(probes.knn(x * scale, y, x_test), probes.knn(x, y, x_test), atol=1e-4)
    assert np.isfinite(probes.knn(np.vstack([x, x[:1] * 0]), np.append(y, 0), x_test * 0)).all()
    for bad in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(BadInput, match="above zero"):
            probes.knn(x, y, x_test, **bad)


def test_knn_takes_a_read_only_memory_map(splits, tmp_path):
    (x, y), _, (x_test, _) = splits
    np.save(tmp_path / "x.npy", x)
    assert np.array_equal(probes.knn(np.load(tmp_path / "x.npy", mmap_mode="r"), y, x_test), probes.knn(x, y, x_test))


@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_linear_equals_sklearn_on_standardised_features(splits, l2):
    (x, y), _, (x_test, _) = splits
    mean = x.mean(0)
    std = x.std(0)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), max_iter=2000, tol=1e-8).fit((x - mean) / std, y)
    assert np.allclose(probes.linear(x, y, x_test, l2=l2), theirs.predict_proba((x_test - mean) / std), atol=5e-3)


def test_linear_chooses_the_best_strength_on_val_and_not_on_test(splits):
    (x, y), (x_val, y_val), (x_test, _) = splits
    noise = np.random.default_rng(0).normal(size=(400, 300)).astype(np.float32)
    fitted = probes.fit_linear(np.hstack([x, noise]), y, np.hstack([x_val, noise[:200]]), y_val)
    assert fitted.l2 == min(fitted.val_loss, key=fitted.val_loss.get) and tuple(fitted.val_loss) == probes.L2
    alone = probes.fit_linear(np.hstack([x, noise]), y, l2=fitted.l2)
    assert np.allclose(alone.weight, fitted.weight, atol=0.02)  # the path does not matter, only where it ends
    with pytest.raises(BadInput, match="neither val tiles nor a strength"):
        probes.linear(x, y, x_test)
    with pytest.raises(BadInput, match="val labels"):
        probes.linear(x, y, x_test, x_val=x_val, y_val=np.where(y_val == 1, 255, y_val))


def test_scale_of_features_does_not_matter_to_linear_and_mlp(splits):
    (x, y), _, (x_test, _) = splits
    stretch = np.logspace(-2, 2, x.shape[1], dtype=np.float32)
    assert np.allclose(
        probes.linear(x * stretch + 5, y, x_test * stretch + 5, l2=0.1), probes.linear(x, y, x_test, l2=0.1), atol=2e-2
    )
    assert (
        probes.mlp(x * stretch, y, x_test * stretch, **SMALL).argmax(1) == probes.mlp(x, y, x_test, **SMALL).argmax(1)
    ).mean() > 0.97


def test_mlp_stops_early_and_keeps_the_best(splits):
    (x, y), (x_val, y_val), _ = splits
    fitted = probes.fit_mlp(
        x, np.random.default_rng(0).permutation(y), x_val, y_val, hidden=(128, 64), batch_size=32, patience=4
    )
    loss = [h["val_loss"] for h in fitted.history]
    assert len(loss) < 100 and fitted.best_epoch == int(np.argmin(loss)) == len(loss) - 5
    assert np.isclose(-np.log(fitted(x_val)[np.arange(200), y_val]).mean(), min(loss), atol=1e-4)
    plain = probes.fit_mlp(x, y, **{**SMALL, "epochs": 3})
    assert len(plain.history) == 3 and plain.best_epoch == 2 and np.isnan(plain.history[0]["val_loss"])


def test_mlp_seed_decides_and_leaves_the_callers_numbers_alone(splits):
    (x, y), _, (x_test, _) = splits
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = probes.mlp(x, y, x_test, seed=1, **SMALL)
    assert torch.equal(torch.rand(2), expected)
    assert np.array_equal(first, probes.mlp(x, y, x_test, seed=1, **SMALL))
    assert not np.array_equal(first, probes.mlp(x, y, x_test, seed=2, **SMALL))


def test_mlp_takes_any_number_of_tiles(splits):
    (x, y), _, (x_test, _) = splits
    assert np.isfinite(
        probes.mlp(x[:33], y[:33], x_test, n_classes=4, **{**SMALL, "epochs": 2})
    ).all()  # a last batch of one


# A few examples


def test_prototypes_against_scikit_learn():
    from sklearn.neighbors import NearestCentroid

    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 300)
    x = (rng.normal(size=(4, 12))[y] + rng.normal(size=(300, 12))).astype(np.float32)
    z = x - x.mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    sums = np.stack([z[y == c].sum(0) for c in range(4)])
    model = NearestCentroid()
    model.classes_ = np.arange(4)
    model.centroids_ = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    nearest = ((z[:, None] - model.centroids_) ** 2).sum(2).argmin(1)
    p = prototypes(x, y, x)
    assert np.array_equal(p.argmax(1), nearest) and np.allclose(p.sum(1), 1, atol=1e-5)


def test_examples_are_drawn_from_many_cases_and_by_seed():
    y = np.repeat([0, 1], [40, 6])
    cases = np.r_[np.repeat(np.arange(4), 10), [7, 7, 7, 8, 8, 9]]
    rows = draw_examples(y, cases, 4, seed=3)
    assert len({*cases[rows][y[rows] == 0]}) == 4 and {*cases[rows][y[rows] == 1]} == {7, 8, 9}
    assert np.array_equal(rows, draw_examples(y, cases, 4, seed=3)) and not np.array_equal(
        rows, draw_examples(y, cases, 4, seed=4)
    )
    calls = few_shot(
        np.random.default_rng(0).normal(size=(46, 3)).astype(np.float32),
        y,
        cases,
        np.ones((5, 3)),
        shots=(1, 9),
        draws=3,
    )
    assert {n: c.shape for n, c in calls.items()} == {1: (3, 5), 9: (3, 5)}
    with pytest.raises(BadInput, match="At least one"):
        draw_examples(y, cases, 0)


def test_a_softmax_before_the_loss_cannot_get_below_its_floor():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    x = (6 * np.eye(3)[y] + rng.normal(size=(90, 3))).astype(np.float32)
    losses = [
        min(
            h["train_loss"]
            for h in probes.fit_mlp(x, y, epochs=60, hidden=(16,), batch_size=30, lr=1e-2, twice=t).history
        )
        for t in (False, True)
    ]
    assert losses[0] < 0.2 and losses[1] > np.log(1 + 2 / np.e) - 1e-4
