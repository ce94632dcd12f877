"""Multi-task training: tasks, targets, samples, data sets, and a training that resumes, learns and refuses."""

import argparse
import dataclasses
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_report
from forked import Forked
from safetensors.torch import save_file

from histonb.core.claims import hold
from histonb.core.errors import BadInput
from histonb.core.files import read_json, read_jsonl, write_json
from histonb.core.tasks import TASKS, Task, find_tasks
from histonb.datasets import glands
from histonb.datasets import readers as sets
from histonb.datasets import regions as data
from histonb.datasets.readers import training_cases
from histonb.models import cerberus
from histonb.models.cerberus import Cerberus
from histonb.segment import losses, samples, targets, training
from histonb.segment import validation as watching
from histonb.segment.predictors import load_predictor
from histonb.segment.scoring import score_run
from histonb.segment.training import MultiTaskTrainer, _loader, train
from histonb.segment.training_config import TrainConfig, resolve_train_config
from histonb.training.checkpoint import checkpoints
from histonb.transfer.freezable_encoders import load_freezable_encoder

REAL = Path(__file__).parents[2] / "shared/data"
needs_real = pytest.mark.skipif(not (REAL / "GlaS").exists(), reason="no ../shared/data/GlaS")
PHANTOMS = {"reader": "phantom_regions", "n": 8, "seed": 1, "size": 128}
TINY = dict(
    arch="resnet18",
    width=0.125,
    crop=64,
    batch_size=4,
    steps=6,
    device="cpu",
    precision="fp32",
    workers=0,
    log_every=2,
    val_fields=1,
    watch_every=1000,  # and at the end
)
pytestmark = pytest.mark.usefixtures("one_thread")


# --- tasks and network


def test_a_task_of_ones_own_is_one_line(tmp_path):
    vessel = Task("vessel", "instances", kernel=5)
    net = Cerberus(["gland", vessel], "resnet18", 0.0625)
    assert net.eval()(torch.rand(1, 3, 32, 32))["vessel"].shape == (1, 3, 32, 32)
    cerberus.save_cerberus(net, tmp_path)
    assert cerberus.load_cerberus(tmp_path)[0].tasks["vessel"] == vessel


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["glands"], "Did you mean `gland`"),
        (["gland", "gland"], "named twice"),
        ([], "there is none"),
        ([Task("x", "instance")], "Did you mean `instances`"),
    ],
)
def test_tasks_that_cannot_be(tasks, message):
    with pytest.raises(BadInput, match=message):
        find_tasks(tasks)


def test_encoders_that_cannot_be():
    with pytest.raises(BadInput, match="resnet34"):
        Cerberus(["gland"], "resnet43")
    with pytest.raises(BadInput, match="leaves 3 channels"):
        Cerberus(["gland"], "resnet18", 0.04)


@pytest.mark.parametrize("size", [(1, 1), (7, 20), (16, 16), (33, 50)])
def test_pictures_smaller_than_what_a_pixel_sees(size):
    net = Cerberus(("gland", "tissue"), "resnet18", 0.0625).eval()
    with torch.inference_mode():
        out = net(torch.rand(2, 3, *size))
    assert out["gland"].shape == (2, 3, *size) and out["tissue"].shape == (2, 9, 1, 1)
    assert all(torch.isfinite(s).all() for s in out.values())


def test_weights_that_cannot_be_read(tmp_path):
    net = Cerberus(["gland"], "resnet18", 0.0625)
    cerberus.save_cerberus(net, tmp_path)
    torch.save({"desc": {"backbone.conv1.weight": torch.zeros(1)}}, tmp_path / "other.tar")
    with pytest.raises(BadInput, match="no `decoder_head`"):
        cerberus.load_cerberus(tmp_path / "other.tar")
    torch.save({"desc": {"decoder_head.Gland.0.block.0.conv.weight": torch.zeros(1)}}, tmp_path / "half.tar")
    with pytest.raises(BadInput, match="not the weights of Cerberus"):
        cerberus.load_cerberus(tmp_path / "half.tar")
    (tmp_path / "cerberus.safetensors").write_bytes(b"no")
    with pytest.raises(BadInput, match="not the weights that cerberus.json describes"):
        cerberus.load_cerberus(tmp_path)
    (tmp_path / "cerberus.json").write_text("{}")
    with pytest.raises(BadInput, match="lacks `tasks`"):
        cerberus.load_cerberus(tmp_path)


def published(net):
    "A network by the authors' names."
    heads = {task: name.split("/") for name, task in cerberus.PUBLISHED_TASKS.items()}
    layers = ("bn1", "relu1", "dropout", "conv1", "bn2", "relu2", "conv2")
    published = {"module.backbone.fc.weight": torch.zeros(1000, 512)}
    for key, tensor in net.state_dict().items():
        module, *rest = key.split(".")
        if module == "encoder":
            name = ".".join(["backbone", *rest])
        elif module == "map":
            name = "conv_map.weight"
        elif rest[0] == "tissue":
            name = f"decoder_head.Patch-Class.{layers[int(rest[1])]}.{rest[2]}"
        elif rest[1] == "blocks":
            block, layer = divmod(int(rest[3]), 3)
            kind = "bn" if layer else "conv"
            name = f"decoder_head.{heads[rest[0]][0]}.{rest[2]}.block.{block}.{kind}.{rest[4]}"
        else:
            layer = {"0": "0.block.0.conv", "1": "0.block.0.bn", "3": "1.conv"}[rest[2]]
            name = "output_head.{}.{}.x.{}.{}".format(*heads[rest[0]], layer, rest[3])
        published[f"module.{name}"] = tensor
    return published


def test_published_weights_keep_their_classes(tmp_path):
    "As `dataset.yml` of the authors' repository names them; a gland on the surface is no malignant one."
    net = Cerberus(cerberus.PUBLISHED_TASKS.values())
    torch.save({"desc": published(net)}, tmp_path / "weights.tar")
    found, _ = cerberus.load_cerberus(tmp_path / "weights.tar")
    assert all(a.equal(b) for a, b in zip(net.state_dict().values(), found.state_dict().values(), strict=True))
    assert {name: task.classes for name, task in found.tasks.items() if task.kind != "instances"} == {
        "gland-type-cerberus": ("none", "gland", "surface epithelium"),
        "nucleus-type": ("none", "neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective"),
        "tissue": (
            "background",
            "abnormal epithelium",
            "normal epithelium",
            "inflammatory",
            "muscle",
            "stroma",
            "debris",
            "mucous",
            "adipose",
        ),
    }
    torch.save(
        {"desc": {f"{k}.old" if "Gland#TYPE" in k else k: v for k, v in published(net).items()}},
        tmp_path / "foreign.tar",
    )
    with pytest.raises(BadInput, match="unexpected"):
        cerberus.load_cerberus(tmp_path / "foreign.tar")


PLAIN = [pytest.param(ending, marks=pytest.mark.slow) for ending in ("pth", "pth.tar", "")]


@pytest.mark.parametrize("ending", ["tar", "ckpt", "bin", "safetensors", *PLAIN])
def test_published_weights_under_any_name_and_wrapper(tmp_path, ending):
    net = Cerberus(["gland"])
    path = tmp_path / f"weights.{ending}".rstrip(".")
    state = published(net)
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    held = {
        "tar": {"desc": state},
        "ckpt": {"state_dict": {f"model._orig_mod.{k}": v for k, v in plain.items()}, "args": argparse.Namespace(a=1)},
        "bin": {"net": plain, "best": np.float64(0.5)},
    }.get(ending, plain)
    save_file(plain, path) if ending == "safetensors" else torch.save(held, path)
    for found in (cerberus.load_cerberus(path)[0], load_predictor(path).net):
        assert all(a.equal(b) for a, b in zip(net.state_dict().values(), found.state_dict().values(), strict=True))
    assert load_freezable_encoder(path).net.conv1.weight.equal(net.encoder.conv1.weight)


def test_weights_that_are_not_finite(tmp_path):
    net = Cerberus(["gland"], "resnet18", 0.0625)
    with torch.no_grad():
        net.decoders["gland"].head[3].bias[1] = torch.nan
    cerberus.save_cerberus(net, tmp_path)
    for load in (cerberus.load_cerberus, load_predictor, load_freezable_encoder):
        with pytest.raises(BadInput, match="`decoders.gland.head.3.bias` holds NaN"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 1e9}, "`width` is 1000000000.0"),
        ({"width": 40}, "not the weights of this Cerberus"),
        ({"width": "1"}, "`width` is '1'"),
        ({"arch": 3}, "`arch` is 3"),
        ({"arch": "resnet101"}, "can be narrower"),
        ({"arch": "resnet43"}, "no such backbone"),
        ({"mean": [0.5]}, "`mean` is"),
        ({"std": [0.5, 0, 0.5]}, "`std` is"),
        ({"max_stride": 8}, "all its maps are used"),
        ({"max_stride": None}, "`max_stride` is None"),
        ({"mpp": float("nan")}, "`mpp` is nan"),
        ({"mpp": -1}, "`mpp` is -1"),
        ({"tasks": {}}, r"`tasks` is {}"),
        ({"tasks": [3]}, r"`tasks` is \[3\]"),
        ({"tasks": [{"name": "gland"}]}, "`tasks` is"),
        ({"tasks": []}, "there is none"),
        ({"tasks": [{"name": "a.b", "kind": "instances"}]}, "cannot be the name of a task"),
        ({"tasks": [{"name": "keys", "kind": "instances"}]}, "cannot be the name"),
        ({"tasks": [{"name": "gland", "kind": "instances", "classes": []}]}, "`tasks` is"),
        ({"tasks": [{"name": "gland", "kind": 1}]}, "not of type"),
    ],
)
def test_what_stands_in_the_json_is_looked_at(tmp_path, change, message):
    cerberus.save_cerberus(Cerberus(["gland"], "resnet18", 0.0625), tmp_path)
    write_json(tmp_path / "cerberus.json", read_json(tmp_path / "cerberus.json") | change)
    with pytest.raises(BadInput, match=message) as e:
        cerberus.load_cerberus(tmp_path)
    assert str(e.value).isprintable() and len(str(e.value)) < 500


@pytest.mark.parametrize("content", ["true", "[]", "3", "{}", "null"])
def test_a_json_without_tasks_is_not_that_of_a_run(tmp_path, content):
    cerberus.save_cerberus(Cerberus(["gland"], "resnet18", 0.0625), tmp_path)
    (tmp_path / "cerberus.json").write_text(content)
    with pytest.raises(BadInput, match="lacks `tasks`"):
        cerberus.load_cerberus(tmp_path)
    with pytest.raises(BadInput, match="not Cerberus: no `decoder_head`"):
        cerberus.load_cerberus(tmp_path / "cerberus.safetensors")


def test_a_task_of_the_same_name_with_other_classes_is_not_trained_on(tmp_path):
    task = dataclasses.replace(TASKS["nucleus-type"], classes=("none", *"abcdef"))
    cerberus.save_cerberus(Cerberus(["nucleus", task], "resnet18", 0.125), tmp_path / "one")
    typed = dataclasses.replace(
        config(tmp_path / "two", steps=2, start=str(tmp_path / "one")), sets=(PHANTOMS | {"labels": ["nucleus-type"]},)
    )
    with pytest.raises(BadInput, match="its `nucleus-type` tells none, a, b"):
        train(typed)


# --- targets


def test_numbers_with_gaps_change_no_target():
    ids = np.zeros((40, 40), np.int32)
    ids[5:15, 5:15], ids[5:15, 15:25], ids[25:35, 10:30] = 1, 2, 3
    renamed = np.array([0, 40, 7, 1000], np.int32)[ids]
    assert (targets.instance_target(ids, 3) == targets.instance_target(renamed, 3)).all()
    assert np.array_equal(targets.weight_map(ids, 3), targets.weight_map(renamed, 3))


def test_objects_that_touch_are_kept_apart():
    ids = np.zeros((20, 30), np.int32)
    ids[5:15, 5:15], ids[5:15, 15:25] = 1, 2
    target = targets.instance_target(ids, 3)
    weight = targets.weight_map(ids, 3)
    assert (target[6:14, 14:16] == targets.CONTOUR).all() and (target[7:13, 7:13] == targets.INNER).all()
    assert weight[10, 14] > 9 > weight[10, 6]


def four_objects():
    ids = np.zeros((24, 40), np.int32)
    ids[3:12, 3:12], ids[5:20, 12:20], ids[14:22, 24:36], ids[2:8, 30:38] = 1, 2, 3, 4
    return ids


def test_weights_of_insides_are_those_of_the_authors():
    "Numbers that their `InstErodedContourMap` gives."
    weight = targets.weight_of_insides(four_objects(), 3)
    assert weight[8, 10:14] == pytest.approx(
        [1.0, 7.065307, 7.065307, 1.0], abs=1e-5
    ) and weight.sum() == pytest.approx(1159.2144, abs=1e-3)
    assert weight[11, 30:34] == pytest.approx([1.100562, 1.111090, 1.111090, 1.111090], abs=1e-5)
    assert (targets.weight_of_insides(four_objects(), 11) == 1).all()  # no inside is left of these
    one = np.where(four_objects() == 2, 1, 0)
    assert (targets.weight_of_insides(one, 3) == 1).all() and (targets.weight_of_insides(0 * one, 3) == 1).all()


def test_losses_of_types_are_those_of_the_authors():
    "Numbers that their training step gives, cross-entropy and Dice as it adds them."
    for classes, every, weights, want in (
        (7, 3, (12.0, 1.0, 2.0, 6.0, 12.0, 2.0), 10.28930950),
        (3, 2, (1.0, 1.0), 2.06040406),
    ):
        i = torch.arange(2 * 24 * 24).reshape(2, 24, 24)
        types = torch.where((i // 5) % every == 0, 1 + (i * i // 7) % (classes - 1), 0)
        scores = 2 * torch.sin(torch.arange(2 * classes * 24 * 24).float() * 0.7).reshape(2, classes, 24, 24)
        assert losses.type_loss_over_pixels(scores, types, weights).item() == pytest.approx(want, rel=1e-6)
        unknown = torch.where(types == 0, targets.UNKNOWN, types)  # objects whose type nobody knows count as none
        assert losses.type_loss_over_pixels(scores, unknown, weights).item() == pytest.approx(want, rel=1e-6)
    assert losses.type_loss_over_pixels(scores.requires_grad_(), 0 * types).item() == 0


@pytest.mark.parametrize("changes", [{"border": "insides"}, {"type_loss": "pixels"}])
def test_a_run_weighs_as_it_is_told(tmp_path, changes):
    def first(**more):
        of = dataclasses.replace(
            config(tmp_path / "-".join(["run", *more]), steps=1, log_every=1, **more),
            sets=(PHANTOMS | {"labels": ["nucleus", "nucleus-type"]},),
        )
        return next(row for row in read_jsonl(train(of) / "log.jsonl") if "loss" in row)

    a = first()
    b = first(**changes)
    name = "loss_nucleus" if "border" in changes else "loss_nucleus-type"
    assert {k for k in a if k.startswith("loss_") and a[k] != b[k]} == {name}


def test_an_empty_map_is_background_of_weight_one():
    ids = np.zeros((9, 9), np.uint16)
    assert not targets.instance_target(ids, 11).any() and (targets.weight_map(ids, 11) == 1).all()


@pytest.mark.parametrize("ids", [np.zeros((4, 4)), np.zeros((4, 4, 3), int), np.full((4, 4), -1)])
def test_maps_that_hold_no_ids(ids):
    with pytest.raises(BadInput):
        targets.instance_target(ids, 3)


def test_weights_do_not_depend_on_where_they_are_computed():
    rng = np.random.default_rng(0)
    ids = cv2.connectedComponents(np.uint8(rng.random((61, 47)) < 0.1))[1]
    first = targets.weight_map(ids, 3)
    for offset in range(1, 9):
        moved = np.empty(ids.size + 16, np.int32)[offset : offset + ids.size].reshape(ids.shape)
        moved[:] = ids
        junk = [np.empty(rng.integers(10, 9000)) for _ in range(4)]
        assert np.array_equal(targets.weight_map(moved, 3), first), len(junk)


# --- samples and sets


def test_samples_are_the_same_in_any_process():
    found, tasks = sets.read_sets([PHANTOMS])

    def batches(workers):
        c = resolve_train_config(TrainConfig("run", **TINY | {"workers": workers, "steps": 3}), [5])
        return list(training._loader(c, found, tasks, 0))

    for (a, s), (b, t) in zip(batches(0), batches(2), strict=True):
        assert a.equal(b) and s.keys() == t.keys()
        for name in s:
            assert all(p.equal(q) for p, q in zip(s[name], t[name], strict=True))


def test_a_set_is_seen_whole_before_anything_comes_again():
    found, tasks = sets.read_sets([PHANTOMS])
    seen = samples.MultiTaskDataset(found, tasks)
    seen.field = lambda number, row: rows.append(row) or samples.MultiTaskDataset.field(seen, number, row)
    rows = []
    for k in range(2 * len(found[0])):
        seen[0, k, 32]
    n = len(found[0])
    assert sorted(rows[:n]) == sorted(rows[n:]) == list(range(n)) and rows[:n] != rows[n:]


def test_kept_fields_stay_within_their_limit():
    found, tasks = sets.read_sets([PHANTOMS])
    seen = samples.MultiTaskDataset(found, tasks, cache_gib=2e-4)
    for row in range(4):
        seen.field(0, row)
    assert len(seen.cache) == 1 and np.array_equal(
        seen.field(0, 0).image, samples.MultiTaskDataset(found, tasks).field(0, 0).image
    )


def test_publishers_test_pictures_stay_test_pictures():
    table = pd.DataFrame(
        {
            "field": list("abcdefgh"),
            "case": [*"112233", "4", "5"],
            "split": ["train"] * 6 + ["testA", "testB"],
            "mpp": 0.5,
            "image": "",
            "map": "",
        }
    )
    found = sets.split_by_case(data.Regions("GlaS", table, pd.DataFrame(), ("gland",), None), val=0.3)
    split = found.table.set_index("field")["split"]
    assert (split[["g", "h"]] == "test").all() and set(split[:6]) == {"train", "val"}
    assert found.table.groupby("case")["split"].nunique().max() == 1


@needs_real
def test_glas_is_divided_by_patient():
    found = sets.split_by_case(glands.glas(REAL / "GlaS"), val=0.1, test=0.25)
    assert (
        set(found.table["split"]) == {"train", "val", "test"}
        and found.table.groupby("case")["split"].nunique().max() == 1
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"reader": "glass", "root": "."}, "Did you mean `glas`"),
        ({"reader": "glas"}, "lacks `root`"),
        ({"reader": "phantom_fields", "n": 2}, "`phantom_fields` is now called `phantom_regions`"),
        ({"reader": "phantom_regions", "n": 2, "truths": ["gland"]}, "`truths` is now called `labels`"),
        ({"reader": "folders", "root": ".", "truth": "gland"}, "`truth` is now called `task`"),
        ({"reader": "glas", "path": "."}, "takes no `path`"),
        ({"reader": "phantom_regions", "n": 2, "labels": ["glands"]}, "Did you mean `gland`"),
    ],
)
def test_sets_that_cannot_be(spec, message):
    with pytest.raises(BadInput, match=message):
        sets.read_set(spec)


# --- training


def config(out, *more, **changes):
    return TrainConfig(
        str(out),
        (PHANTOMS | {"labels": ["gland", "nucleus"]}, PHANTOMS | {"labels": ["lumen"], "seed": 2}, *more),
        **TINY | changes,
    )


def figures(folder):
    return [
        {k: v for k, v in row.items() if k not in ("images_per_s", "data_wait", "memory")}
        for row in read_jsonl(Path(folder) / "log.jsonl")
    ]


def test_it_learns(tmp_path):
    train(
        TrainConfig(
            str(tmp_path),
            (PHANTOMS | {"n": 12, "labels": ["nucleus"]},),
            **TINY | {"steps": 60, "lr": 5e-3, "schedule": "cosine", "log_every": 15},
        )
    )
    rows = read_jsonl(tmp_path / "log.jsonl")
    lost = [row["loss"] for row in rows if "loss" in row]
    right = [row["val_dice_nucleus"] for row in rows if "val_dice_nucleus" in row]
    assert lost[-1] < 0.75 * lost[0] and right[-1] > 0.8


def test_two_on_one_folder(tmp_path):
    with hold(tmp_path), pytest.raises(BadInput, match="another process is writing here"):
        train(config(tmp_path, steps=2))


def test_a_run_is_made_longer_where_its_schedule_allows_it(tmp_path, no_curves):
    """A rate that falls in steps does not depend on how many steps follow; along a cosine it does."""
    changes = dict(schedule="step", decay_every=3, checkpoint_every=2)
    train(config(tmp_path / "whole", steps=6, **changes))
    train(config(tmp_path / "longer", steps=4, **changes))
    train(config(tmp_path / "longer", steps=6, **changes))
    whole, longer = (cerberus.load_cerberus(tmp_path / name)[0].state_dict() for name in ("whole", "longer"))
    assert all(torch.equal(whole[k], longer[k]) for k in whole)
    with pytest.raises(BadInput, match="has taken 6 steps already"):
        train(config(tmp_path / "longer", steps=5, **changes))
    train(config(tmp_path / "cosine", steps=2, schedule="cosine"))
    with pytest.raises(BadInput, match="schedules are laid out over all its steps"):
        train(config(tmp_path / "cosine", steps=4, schedule="cosine"))


def train_slowly(config):
    "Train in a process of its own, with time between its steps in which a signal can come."

    def paused_step(trainer, batches):
        time.sleep(0.15)
        return step(trainer, batches)

    torch.set_num_threads(1)
    training.draw_progress = training.plot_task_curves = lambda *args: None
    step, MultiTaskTrainer.train_step = MultiTaskTrainer.train_step, paused_step
    train(config)


def test_a_run_that_is_stopped_and_killed_goes_on_exactly(tmp_path, no_curves):
    changes = dict(steps=14, checkpoint_every=3, log_every=1, watch_every=5)
    train(config(tmp_path / "whole", **changes))
    for how in (signal.SIGTERM, signal.SIGKILL):
        before = len(figures(tmp_path / "run")) if checkpoints(tmp_path / "run") else 0
        run = Forked(train_slowly, config(tmp_path / "run", **changes))
        while run.poll() is None and (not checkpoints(tmp_path / "run") or len(figures(tmp_path / "run")) < before + 2):
            time.sleep(0.05)
        assert run.poll() is None, run.communicate()[1]
        run.kill(how)
        error = run.communicate()[1]
        if how == signal.SIGTERM:
            stopped = read_json(tmp_path / "run/stopped")["step"]
            assert checkpoints(tmp_path / "run")[0][0] == stopped and f"stopped at step {stopped} of 14" in error
    assert 0 < checkpoints(tmp_path / "run")[0][0] < 14, "it was killed too late for a test"
    train(config(tmp_path / "run", **changes))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    a, b = (cerberus.load_cerberus(tmp_path / name)[0].state_dict() for name in ("whole", "run"))
    assert all(a[k].equal(b[k]) for k in a)


def test_a_finished_run_returns_at_once(tmp_path, no_curves):
    train(config(tmp_path, steps=2))
    before = (tmp_path / "cerberus.safetensors").stat().st_mtime_ns
    assert (
        train(config(tmp_path, steps=2)) == tmp_path
        and (tmp_path / "cerberus.safetensors").stat().st_mtime_ns == before
    )
    with pytest.raises(BadInput, match="crop 64 -> 96"):
        train(config(tmp_path, steps=2, crop=96))
    train(config(tmp_path, steps=2, crop=96), restart=True)


def test_stage_two_holds_all_that_stage_one_knows(tmp_path, no_curves):
    train(config(tmp_path / "one", steps=2))
    typed = dataclasses.replace(
        config(tmp_path / "two", steps=4, start=str(tmp_path / "one"), freeze=True),
        sets=(PHANTOMS | {"labels": ["nucleus-type"]},),
    )
    train(typed)
    a, b = (cerberus.load_cerberus(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    assert all(a[k].equal(b[k]) for k in a), "also the statistics of batch norm"
    assert {k.split(".")[1] for k in b.keys() - a.keys()} == {"nucleus-type"}
    with pytest.raises(BadInput, match="trained at 0.5 um/px, not 0.25"):
        train(dataclasses.replace(typed, out=str(tmp_path / "three"), mpp=0.25))


@pytest.mark.parametrize("sampling", samples.SAMPLINGS)
def test_patches_and_fields_in_one_run(tmp_path, sampling):
    rng = np.random.default_rng(0)
    for name in ("TUM", "STR", "LYM"):
        (tmp_path / "patches" / name).mkdir(parents=True)
        for i in range(4):
            cv2.imwrite(
                str(tmp_path / "patches" / name / f"{name}-{i}.png"),
                rng.integers(0, 255, (150, 150, 3), dtype=np.uint8),
            )
    train(
        config(
            tmp_path / "run",
            {"reader": "patch_folders", "root": str(tmp_path / "patches")},
            sampling=sampling,
            batch_size=6,
            steps=6,
            log_every=6,
        )
    )
    rows = figures(tmp_path / "run")
    assert {"loss_tissue", "loss_gland", "loss_nucleus", "loss_lumen"} <= next(
        row for row in rows if "loss" in row
    ).keys()
    assert {"val_acc_tissue", "val_dice_gland", "val_dice_nucleus", "val_dice_lumen"} <= next(
        row for row in rows if "val_dice_gland" in row
    ).keys()


def test_a_set_has_its_share_of_every_step():
    found, tasks = sets.read_sets([PHANTOMS | {"labels": [name]} for name in ("gland", "lumen")])
    c = resolve_train_config(
        TrainConfig("run", **TINY | {"shares": (2, 1), "batch_size": 6, "workers": 0}), list(map(len, found))
    )
    for _, truth in _loader(c, found, tasks, 0):
        assert {name: len(rows) for name, (rows, *_) in truth.items()} == {"gland": 4, "lumen": 2}


def test_networks_are_compared_by_the_samples_of_their_sets(tmp_path):
    of = [PHANTOMS | {"labels": [name]} for name in ("gland", "lumen")]
    runs = {
        "both": {"sets": of, "shares": (2, 1), "steps": 6},
        "glands": {"sets": of[:1], "steps": 4},
        "fewer": {"sets": of[:1], "steps": 3},
    }
    for name, given in runs.items():
        folder = train(TrainConfig(str(tmp_path / name), **TINY | given | {"batch_size": 3}))
        score_run(folder, name)
        write_json(folder / "metrics.json", {"name": name})

    def compared(*names):
        error, metrics = run_report(
            "compare_tasks", tmp_path / "-".join(names), networks=[str(tmp_path / name) for name in names], n_boot=20
        )
        assert metrics, error[-3000:]
        return metrics["equal"], metrics["different"]

    assert compared("both", "glands") == (["samples of each task"], [])  # 12 of glands either way
    assert compared("both", "fewer") == ([], ["steps"])

    def refused(*names):
        return run_report(
            "compare_cases", tmp_path / "-".join(names), networks=[str(tmp_path / name) for name in names], n_boot=20
        )[0]

    assert "are tested by two of them" in refused("both", "glands")
    fields = tmp_path / "glands/fields.csv"
    fields.write_text(fields.read_text().replace(",test,", ",train,"))
    assert "glands was trained on cases that it is tested on" in refused("glands", "both")


def test_a_task_without_data(tmp_path):
    with pytest.raises(BadInput, match="no set has data of this task"):
        train(config(tmp_path, tasks=("gland", "tissue")))


def test_a_task_without_truth_in_a_batch_is_no_loss():
    found, tasks = sets.read_sets([PHANTOMS | {"labels": ["gland"]}])
    trainer = MultiTaskTrainer(resolve_train_config(TrainConfig("run", **TINY), [4]), find_tasks(["gland", "lumen"]))
    seen = samples.MultiTaskDataset(found, tasks)
    row = trainer.train_step(iter([samples.collate([seen[0, k, 64] for k in range(4)])]))
    assert "loss_lumen" not in row and all(p.grad is None for p in trainer.net.decoders["lumen"].parameters())


def test_a_loss_that_is_not_finite_stops_the_run():
    found, tasks = sets.read_sets([PHANTOMS | {"labels": ["gland"]}])
    trainer = MultiTaskTrainer(resolve_train_config(TrainConfig("run", **TINY), [4]), tasks)
    seen = samples.MultiTaskDataset(found, tasks)
    with torch.no_grad():
        next(trainer.net.parameters()).fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="step 1: the loss is not finite .gland nan"):
        trainer.train_step(iter([samples.collate([seen[0, k, 64] for k in range(4)])]))


def test_types_that_nobody_knows_are_not_learnt_nor_judged():
    task = TASKS["nucleus-type"]
    scores = torch.randn(7, 8, 8)
    types = np.zeros((8, 8), np.uint8)
    types[2:6, 2:6] = targets.UNKNOWN
    assert watching._task_metric(task, scores, (types,)) is None
    types[2:4, 2:4] = 1
    scores[:] = -9.0
    scores[1] = 9.0
    assert watching._task_metric(task, scores, (types,)) == 1


def test_a_field_smaller_than_the_crop_is_reflected():
    field = data.Region(
        np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8),
        {"gland": np.ones((20, 30), np.int32)},
        0.5,
    )
    image, truth = samples.draw_sample(field, 96, (0,))
    assert image.shape == (96, 96, 3) and (truth["gland"] == 1).all() and image.std() > 5


class Patches:
    "A set of small fields, each of one colour, with nuclei 1..n without gaps."

    def __init__(self, n, side=32):
        self.n, self.side = n, side

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        truth = np.zeros((self.side, self.side), np.int32)
        for k in range(i + 1):
            truth[4 + 2 * k, 4:8] = k + 1
        return data.Region(
            np.full((self.side, self.side + i, 3), 20 * i + 40, np.uint8),
            {"nucleus": np.pad(truth, ((0, 0), (0, i)))},
            0.25,
        )


def test_fields_side_by_side_keep_all_their_objects_apart():
    found = samples.tile_regions([Patches(9)[i] for i in (3, 0, 5, 8)])
    assert found.image.shape == (64, 64, 3) and found.mpp == 0.25
    assert sorted(np.unique(found.labels["nucleus"])) == list(range(4 + 1 + 6 + 9 + 1))
    for (y, x), i, first in (((0, 0), 3, 0), ((0, 32), 0, 4), ((32, 0), 5, 5), ((32, 32), 8, 11)):
        there = found.labels["nucleus"][y : y + 32, x : x + 32]
        assert (found.image[y : y + 32, x : x + 32] == 20 * i + 40).all() and np.array_equal(
            np.where(there, there - first, 0), Patches(9)[i].labels["nucleus"][:, :32]
        )


def test_a_crop_larger_than_the_fields_shows_several_of_them():
    seen = samples.MultiTaskDataset([Patches(9)], find_tasks(["nucleus"]))
    image, truth = seen.sample(0, 4, 48)  # 96 pixels of a field: three by three
    assert len(np.unique(cv2.medianBlur(image[..., 0], 5) // 8)) > 3 and truth["nucleus"].max() > 9
    again = samples.MultiTaskDataset([Patches(9)], find_tasks(["nucleus"])).sample(0, 4, 48)
    assert np.array_equal(image, again[0]) and np.array_equal(truth["nucleus"], again[1]["nucleus"])


def test_glass_is_empty_in_every_map_and_never_in_a_patch_with_one_class():
    rng = np.random.default_rng(0)
    image = np.full((96, 96, 3), 60, np.uint8)
    truth = {"gland": np.ones((96, 96), np.int32), "gland-type": np.full((96, 96), 2, np.uint8)}
    shares = []
    for _ in range(40):
        ended, left = samples.cut_tissue(rng, image, truth)
        glass = ended[..., 0] > 140  # halfway
        assert np.mean(glass == (left["gland"] == 0)) > 0.99 and np.array_equal(
            left["gland"] == 0, left["gland-type"] == 0
        )
        assert left["gland"].dtype == np.int32 and left["gland-type"].dtype == np.uint8
        shares.append(glass.mean())
    assert min(shares) < 0.1 and max(shares) > 0.7 and truth["gland"].all()
    patch = data.Region(np.full((96, 96, 3), 60, np.uint8), {"tissue": 3}, 0.5)
    image, truth = samples.draw_sample(patch, 64, (0,), glass_probability=1.0)
    assert image.max() < 120 and truth["tissue"] == 3


@pytest.mark.parametrize(
    "text, says", [("", "unreadable as CSV"), ("set,field,case\n", "no column `split`"), (None, "unreadable as CSV")]
)
def test_what_was_learnt_from_is_read_exactly_or_refused(tmp_path, text, says):
    "Names that other readers would take for nothing, or trim, are names: a leak must not pass by them."
    rows = [("GlaS", " a ", "train"), ("GlaS", "NA", "train"), ("GlaS", "1.0", "val"), ("CRAG", "1.0", "train")]
    pd.DataFrame(rows, columns=["set", "case", "split"]).to_csv(tmp_path / "fields.csv", index=False)
    assert training_cases(tmp_path) == {"GlaS": {" a ", "NA"}, "CRAG": {"1.0"}}
    if text is None:
        (tmp_path / "fields.csv").unlink()
    else:
        (tmp_path / "fields.csv").write_text(text)
    with pytest.raises(BadInput, match=f"fields.csv: {says}"):
        training_cases(tmp_path)
