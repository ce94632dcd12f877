"Transfer to classes: head, balanced loss, SVMs, the table of depths and seeds, what a leak is worth, and its report."

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_report
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from histonb.core.errors import BadInput
from histonb.datasets.ebhi import EBHI_CLASSES, ebhi_seg
from histonb.datasets.splits import check_leak
from histonb.models import cerberus
from histonb.transfer.classes import (
    Classifier,
    class_loss,
    class_metrics,
    class_probabilities,
    class_weights,
    fine_tune,
    fit_svm,
    frozen_features,
    transfer_classes,
    unpaired_difference,
)
from histonb.transfer.ebhi_dataset import EBHIDataset, rows_by_split, write_example
from histonb.transfer.freezable_encoders import load_freezable_encoder
from histonb.transfer.supervised import FitConfig

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared/data/EBHI-SEG"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="no ../shared/data/EBHI-SEG")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("ebhi"), n_cases=5, n_pictures=2)


@pytest.fixture(scope="module")
def pictures(root):
    return read(root)


def read(root, split="grouped", side=32):
    return {k: EBHIDataset(rows, side, masks=False) for k, rows in rows_by_split(ebhi_seg(root, split).slides).items()}


def config(folder, **changes):
    return FitConfig(
        str(folder), **{"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu", "precision": "fp32"} | changes
    )


# --- network and loss


def test_balanced_weights_let_classes_weigh_alike():
    y = np.repeat([0, 1, 3], [8, 1, 3])
    w = class_weights(y, 4)
    assert w[2] == 0 and torch.isclose(w[torch.tensor(y)].mean(), torch.tensor(1.0))
    assert len({round(float(w[c] * (y == c).sum()), 5) for c in (0, 1, 3)}) == 1
    scores = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(y)
    each = -scores.log_softmax(1)[range(12), t]
    assert torch.isclose(class_loss(w)(scores, None, t), torch.stack([each[t == c].mean() for c in (0, 1, 3)]).mean())


def test_the_head_is_a_function_of_its_seed_and_leaves_the_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = (Classifier(load_freezable_encoder("", "resnet18", 0.125), seed=s) for s in (0, 0, 1))
    assert (
        torch.rand(1) == want
        and a.head[0].weight.equal(b.head[0].weight)
        and not a.head[0].weight.equal(c.head[0].weight)
    )


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_fine_tuning_changes_the_layers_it_names_and_no_other(pictures, tmp_path, depth):
    before = load_freezable_encoder("", "resnet18", 0.125)
    net, _ = fine_tune(
        load_freezable_encoder("", "resnet18", 0.125),
        depth,
        pictures["train"],
        pictures["val"],
        config(tmp_path, keep="last"),
    )
    changed = {
        before.layer_of(k) for k, v in net.trunk.net.state_dict().items() if not v.equal(before.net.state_dict()[k])
    }
    assert changed == set(range(depth, 5))


def test_the_kept_epoch_is_the_best_on_validation(pictures, tmp_path):
    for balanced, figure in ((False, "val_accuracy"), (True, "val_balanced_accuracy")):
        net, rows = fine_tune(
            load_freezable_encoder("", "resnet18", 0.125),
            1,
            pictures["train"],
            pictures["val"],
            config(tmp_path / figure, epochs=6, lr=0.01),
            balanced,
        )
        epoch = json.loads((tmp_path / figure / "fit.json").read_text())["epoch"]
        assert rows[epoch - 1][figure] == max(r[figure] for r in rows)
        p = class_probabilities(net, pictures["val"])
        assert np.isclose(
            (p.argmax(1) == pictures["val"].classes).mean(), rows[epoch - 1]["val_accuracy"]
        ) and np.allclose(p.sum(1), 1, atol=1e-5)


# --- SVM


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
@pytest.mark.parametrize("balanced", [False, True])
def test_svm_is_that_of_sklearn_on_scaled_features_with_the_best_cost(kernel, balanced):
    rng = np.random.default_rng(0)
    y = rng.choice(3, 150, p=[0.6, 0.3, 0.1])
    x = (rng.normal(size=(3, 5))[y] + rng.normal(size=(150, 5))) * 10.0 ** np.arange(5)
    svm, right = fit_svm(x[:60], y[:60], x[60:100], y[60:100], kernel, balanced)
    scaler = StandardScaler().fit(x[:60])
    want = {}
    for cost in right:
        model = SVC(C=cost, kernel=kernel, class_weight="balanced" if balanced else None).fit(
            scaler.transform(x[:60]), y[:60]
        )
        hit = model.predict(scaler.transform(x[60:100])) == y[60:100]
        want[cost] = np.mean([hit[y[60:100] == c].mean() for c in range(3)]) if balanced else hit.mean()
    assert right == pytest.approx(want) and len(set(right.values())) > 1
    assert svm[-1].C == min(c for c in right if right[c] == max(right.values()))


def test_svm_that_cannot_be():
    x = np.random.default_rng(0).normal(size=(20, 3))
    y = np.arange(20) % 2
    with pytest.raises(BadInput, match="Did you mean `linear`"):
        fit_svm(x, y, x, y, "linaer")
    with pytest.raises(BadInput, match="all of one class"):
        fit_svm(x, y * 0, x, y)
    with pytest.raises(BadInput, match="not finite"):
        fit_svm(np.where(x == x.max(), np.nan, x), y, x, y)


def test_frozen_features_are_those_of_the_encoder_as_it_is(pictures):
    net = load_freezable_encoder("", "resnet18", 0.125)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = frozen_features(net, pictures["val"])
    want = net(torch.stack([pictures["val"][i][0] for i in range(len(x))]).float() / 255)
    assert np.allclose(x, want.detach().numpy(), atol=1e-4) and all(
        v.equal(before[k]) for k, v in net.state_dict().items()
    )


# --- the table


def test_the_table_is_equal_when_it_is_made_again_and_test_pictures_choose_nothing(pictures, tmp_path):
    ways = dict(arch="resnet18", width=0.125, first_layers=(1, 4), kernels=("rbf",), seeds=(0, 1))
    calls, runs, logs = transfer_classes(pictures, "", config(tmp_path / "a"), **ways)
    again, _, _ = transfer_classes(pictures, "", config(tmp_path / "b"), **ways)
    pd.testing.assert_frame_equal(calls, again)
    counts = calls.groupby("method", sort=False)["seed"].nunique()
    assert (
        counts.to_dict() == {"majority": 1, "layer 1": 2, "layer 4": 2, "svm rbf": 2}
        and len(runs) == 6
        and len(logs) == 4
    )
    assert (
        len(calls) == 7 * len(pictures["test"])
        and (calls["slide"].head(len(pictures["test"])) == pictures["test"].slides["slide"]).all()
    )
    turned = {
        **pictures,
        "test": EBHIDataset(pictures["test"].slides.assign(cls=(pictures["test"].classes + 1) % 6), 32, masks=False),
    }
    blind, other, _ = transfer_classes(turned, "", config(tmp_path / "c"), **ways)
    assert (
        (blind["called"] == calls["called"]).all()
        and (other["val_accuracy"] == runs["val_accuracy"]).all()
        and (blind["cls"] != calls["cls"]).all()
    )


def test_a_given_encoder_brings_its_arch_and_its_svm_has_one_seed(pictures, tmp_path):
    cerberus.save_cerberus(cerberus.Cerberus(["gland"], "resnet18", 0.125), tmp_path / "c")
    calls, runs, _ = transfer_classes(
        pictures,
        str(tmp_path / "c"),
        config(tmp_path / "a", epochs=1),
        first_layers=(4,),
        kernels=("linear",),
        seeds=(0, 1),
    )
    assert calls.groupby("method")["seed"].nunique().to_dict() == {"layer 4": 2, "majority": 1, "svm linear": 1}
    assert runs["cost"].notna().sum() == 1 and (runs.loc[runs["method"] == "layer 4", "learnt"] > 0).all()


def test_figures_of_several_seeds_are_their_mean_and_intervals_are_of_cases():
    calls = pd.DataFrame(
        {
            "slide": list("abcdefgh") * 2,
            "case": list("11223344") * 2,
            "cls": [0, 0, 1, 1, 2, 2, 3, 3] * 2,
            "method": "layer 1",
            "seed": [0] * 8 + [1] * 8,
            "called": [0, 0, 1, 1, 2, 2, 3, 3] + [0, 0, 1, 1, 0, 0, 0, 0],
            "p": 0.5,
        }
    )
    r = class_metrics(calls, 500)["layer 1"]
    assert (
        r["accuracy"]["value"] == 0.75 and r["repeats"]["accuracy"] == [1.0, 0.5] and r["n_groups"] == 4 and r["n"] == 8
    )
    assert r["accuracy"]["low"] <= 0.5 and r["accuracy"]["high"] == 1 and set(r["recall"]) == set(EBHI_CLASSES)


def test_gap_is_the_difference_of_independent_divisions():
    rng = np.random.default_rng(0)

    def calls(right):
        return pd.DataFrame({"case": np.repeat(np.arange(50), 4), "cls": np.arange(200) % 6}).assign(
            called=lambda t: np.where(rng.random(200) < right, t["cls"], (t["cls"] + 1) % 6)
        )

    a = calls(0.9)
    b = calls(0.5)
    found = unpaired_difference(a, b)["accuracy"]
    assert found["value"] == pytest.approx((a["cls"] == a["called"]).mean() - (b["cls"] == b["called"]).mean())
    assert found["low"] < found["value"] < found["high"] and 0.05 < found["high"] - found["low"] < 0.35
    back = unpaired_difference(b, a)["accuracy"]
    assert back["value"] == -found["value"] and back["high"] == pytest.approx(-found["low"], abs=0.03)
    assert np.isnan(unpaired_difference(a[a["case"] == 0], b)["accuracy"]["low"])


# --- report


def test_report_tells_both_divisions_and_the_published_row(tmp_path):
    error, found = run_report("transfer_classes", tmp_path, seeds=[0, 1], epochs=1, balanced=True, n_boot=50)
    assert found, error[-3000:]
    assert (
        set(found["results"]) == {"grouped", "random"}
        and found["published"]["layer 1"] == 0.852
        and found["published"]["majority"] is None
    )
    assert set(found["gap"]) == {"majority", "layer 1", "layer 4", "svm rbf", "svm linear"}
    calls = pd.read_parquet(tmp_path / "run/calls.parquet")
    for split, of in found["results"].items():
        mine = calls[(calls["division"] == split) & (calls["method"] == "layer 1")]
        assert (
            of["layer 1"]["accuracy"]["value"] == pytest.approx((mine["cls"] == mine["called"]).mean())
            and mine["seed"].nunique() == 2
        )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"splits": ["groupd"]}, "Did you mean `grouped`"),
        ({"source": "nowhere"}, "no such file or folder"),
        ({"first_layers": [0]}, "`first_layers` is [0]. Choose a number from 1 to 5"),
    ],
)
def test_report_names_what_is_wrong(tmp_path, parameters, message):
    error, found = run_report("transfer_classes", tmp_path, **parameters)
    assert found is None and message in error and not (tmp_path / "run/metrics.json").exists()


# --- the real pictures


@needs_real
def test_real_pictures_are_divided_by_case_and_random_division_leaks():
    grouped = ebhi_seg(REAL, "grouped").slides
    leaky = ebhi_seg(REAL, "random").slides
    assert check_leak(grouped)["leaking_cases"] == 0 and check_leak(leaky, strict=False)["leaking_cases"] > 50
    assert all(set(p["class"]) == set(EBHI_CLASSES) for s in (grouped, leaky) for p in rows_by_split(s).values())


@pytest.mark.slow
@needs_real
def test_real_pictures_are_told_better_than_by_the_majority(tmp_path):
    pictures = read(REAL, "random", 64)
    x = {
        k: np.concatenate([p.images.reshape(len(p), -1, 3).mean(1), p.images.reshape(len(p), -1, 3).std(1)], 1)
        for k, p in pictures.items()
    }
    svm, _ = fit_svm(x["train"], pictures["train"].classes, x["val"], pictures["val"].classes)  # colours alone
    assert svm.score(x["test"], pictures["test"].classes) > np.bincount(pictures["test"].classes).max() / len(
        pictures["test"]
    )


def test_budget_is_part_of_a_run(pictures, tmp_path):
    c = config(tmp_path)
    fine_tune(load_freezable_encoder("", "resnet18", 0.125), 1, pictures["train"], pictures["val"], c)
    with pytest.raises(BadInput, match="batch_size 8 -> 16"):
        fine_tune(
            load_freezable_encoder("", "resnet18", 0.125),
            1,
            pictures["train"],
            pictures["val"],
            dataclasses.replace(c, batch_size=16),
        )
    with pytest.raises(BadInput, match="start"):
        fine_tune(load_freezable_encoder("", "resnet18", 0.125, seed=5), 1, pictures["train"], pictures["val"], c)
