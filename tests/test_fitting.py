"The base of the transfer study: pictures and their order, encoders that freeze, and a training that goes on exactly."

import json
import os
import signal
import threading

import cv2
import numpy as np
import pytest
import timm
import torch
from forked import Forked
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from histonb.core.claims import hold
from histonb.core.errors import BadInput
from histonb.core.files import read_jsonl
from histonb.datasets.ebhi import EBHI_CLASSES, ebhi_seg
from histonb.models import backbones, cerberus
from histonb.models.pyramids import resnet_encoder
from histonb.training import distributed as ranks
from histonb.training.checkpoint import checkpoints
from histonb.training.loop import Stopped
from histonb.training.pair_augmentation import EBHIAugment
from histonb.transfer.classes import class_loss
from histonb.transfer.ebhi_dataset import EBHIDataset, epoch_batches, rows_by_split, write_example
from histonb.transfer.freezable_encoders import INPUT_RANGES, FreezableEncoder, load_freezable_encoder
from histonb.transfer.supervised import FitConfig, fit_network, predict_batches, resolve_fit_config

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = ("seconds", "images_per_s", "data_wait", "memory")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("ebhi"), n_cases=4, n_pictures=2)


@pytest.fixture(scope="module")
def slides(root):
    return ebhi_seg(root, fractions=(0.5, 0.25, 0.25)).slides


@pytest.fixture(scope="module")
def train(slides):
    return EBHIDataset(rows_by_split(slides, masks=True)["train"], 32, EBHIAugment())


class Net(nn.Module):
    "A classifier with dropout and batch norm."

    def __init__(self, depth=1, source=""):
        super().__init__()
        self.trunk = load_freezable_encoder(source, "resnet18", 0.125).freeze(depth)
        torch.manual_seed(3)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(self.trunk.num_features, 6))

    def forward(self, x):
        return self.head(self.trunk(x))


def loss(scores, masks, classes):
    return F.cross_entropy(scores, classes)


def config(folder, **changes):
    return FitConfig(
        str(folder), **{"epochs": 3, "batch_size": 8, "workers": 0, "device": "cpu", "precision": "fp32"} | changes
    )


def bare(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def equal(a, b):
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- pictures


def test_pictures_are_what_the_files_hold(slides):
    part = rows_by_split(slides, masks=True)["val"]
    seen = EBHIDataset(part)
    for i, row in part.iterrows():
        image, mask, cls = seen[i]
        assert np.array_equal(image.movedim(0, -1).numpy(), np.asarray(Image.open(row["image"])))
        assert (
            np.array_equal(mask.numpy(), np.asarray(Image.open(row["label"])) > 127)
            and EBHI_CLASSES[cls] == row["class"]
        )


def test_smaller_pictures_are_means_over_areas_and_masks_stay_masks(train):
    image, mask, _ = train[4]
    assert np.array_equal(
        image.movedim(0, -1).numpy(), cv2.resize(train.images[4], (32, 32), interpolation=cv2.INTER_AREA)
    )
    assert abs(mask.float().mean() - train.masks[4].mean()) < 0.03 and set(np.unique(mask)) <= {0, 1}


def test_augmentation_follows_from_seed_epoch_and_picture(slides):
    part = rows_by_split(slides, masks=True)["train"]
    one, again, other = (EBHIDataset(part, 32, EBHIAugment(), seed) for seed in (0, 0, 1))
    assert one[2, 5][0].equal(again[2, 5][0]) and one[2, 5][1].equal(again[2, 5][1])
    different = [
        not one[key][0].equal(b) for key in ((2, 0), (2, 5)) for b in (one[key[1]][0], one[3, key[1]][0], other[key][0])
    ]
    assert sum(different) >= 5
    assert EBHIDataset(part, 32)[1, 0][0].equal(
        EBHIDataset(part, 32)[0][0]
    )  # without augmentation an epoch changes nothing


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own(train):
    n = len(train)
    shown = [[i for b in epoch_batches(train, 2, epoch) for _, i in b] for epoch in range(3)]
    assert all(len(s) == n // 2 * 2 == len(set(s)) for s in shown) and shown[0] != shown[1] != shown[2]
    assert {epoch for b in epoch_batches(train, 4, 7) for epoch, _ in b} == {7}
    assert [len(b) for b in epoch_batches(train, n + 5, 0)] == [n]


@pytest.mark.parametrize("change", ["no mask", "size of mask", "lost picture"])
def test_pictures_that_cannot_be_used(slides, tmp_path, change):
    part = rows_by_split(slides)["train"].head(3).copy()
    if change == "no mask":
        part.loc[1, "label"] = ""
    if change == "size of mask":
        Image.fromarray(np.zeros((100, 224), np.uint8)).save(tmp_path / "small.png")
        part.loc[1, "label"] = str(tmp_path / "small.png")
    if change == "lost picture":
        part.loc[1, "image"] = str(tmp_path / "lost.png")
    message = {"no mask": "has no mask", "size of mask": "100x224, not 224x224", "lost picture": "cannot be decoded"}[
        change
    ]
    with pytest.raises(BadInput, match=message):
        EBHIDataset(part)
    if change == "no mask":
        assert EBHIDataset(part, masks=False)[1][1].sum() == 0


def test_parts_that_cannot_be_learnt(slides):
    with pytest.raises(BadInput, match="test: no picture"):
        rows_by_split(slides[slides["split"] != "test"])
    one = slides[(slides["class"] != "Polyp") | (slides["case"] == slides["case"][slides["class"] == "Polyp"].iloc[0])]
    with pytest.raises(BadInput, match="Polyp: it has one case, and that is not in training"):
        rows_by_split(one.assign(split=one["split"].where(one["class"] != "Polyp", "val")))
    with pytest.raises(BadInput, match="none of its 4 cases is in training"):
        rows_by_split(slides.assign(split=slides["split"].where(slides["class"] != "Polyp", "val")))
    with pytest.raises(BadInput, match="there is no picture"):
        EBHIDataset(slides[:0])
    with pytest.raises(BadInput, match="Batch norm"):
        epoch_batches(EBHIDataset(slides[:1], masks=False), 8, 0)


# --- encoders


def moved(net, images):
    "Layers that a step of training changes."
    net.train()
    before = {k: v.clone() for k, v in net.net.state_dict().items()}
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    net(images).square().sum().backward()
    optimiser.step()
    assert all((p.grad is not None) == (net.layer_of(name) >= net.depth) for name, p in net.net.named_parameters())
    return {net.layer_of(k) for k, v in net.net.state_dict().items() if not v.equal(before[k])}


@pytest.mark.parametrize("arch", ["resnet18", "xcit_nano_12_p16_224", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_layers_before_the_depth_get_neither_gradient_nor_statistics(arch, depth):
    torch.manual_seed(0)
    net = FreezableEncoder(
        resnet_encoder(arch, 0.125) if arch == "resnet18" else backbones.build_backbone(arch)
    ).freeze(depth)
    assert moved(net, torch.rand(4, 3, 32, 32)) == set(range(depth, 5))


def test_what_is_frozen_stays_in_eval_inside_another_network():
    net = Net(depth=3).train()
    training = {
        net.trunk.layer_of(name)
        for name, m in net.trunk.net.named_modules()
        if isinstance(m, nn.BatchNorm2d) and m.training
    }
    assert training == {3, 4} and net.head[0].training
    assert not any(m.training for m in net.eval().modules())
    net.trunk.freeze(1)
    assert all(m.training for m in net.train().modules())


def test_encoders_of_all_sources_see_what_their_networks_see(tmp_path):
    images = torch.rand(2, 3, 64, 64)
    net = cerberus.Cerberus(["gland"], "resnet18", 0.125).eval()
    cerberus.save_cerberus(net, tmp_path / "c")
    want = net.encode(images)
    for path in (tmp_path / "c", tmp_path / "c" / "cerberus.safetensors"):
        got = load_freezable_encoder(path).eval()
        assert all(a.equal(b) for a, b in zip(got.feature_maps(images), want, strict=True)) and got.features(
            images
        ).equal(want[-1].mean((2, 3)))
    net = backbones.build_backbone("resnet18").eval()
    backbones.save_backbone(net, tmp_path / "d", "resnet18", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    got = load_freezable_encoder(tmp_path / "d").eval()
    got.net.conv1.stride = net.conv1.stride  # stepping again, it is timm's network
    assert torch.allclose(got(images), net((images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.2), atol=1e-4)
    assert got.layer_of("layer2.0") == 2 and len(got.widths) == 5


@pytest.mark.parametrize("fault", ["other arch", "other width", "of no encoder", "damaged", "empty folder", "lost"])
def test_weights_of_another_encoder_are_refused(tmp_path, fault):
    path = tmp_path / "w.safetensors"
    arch = "resnet18"
    width = 1.0
    save_file(
        {"other arch": timm.create_model("resnet34").state_dict, "of no encoder": lambda: {"a": torch.zeros(2)}}.get(
            fault, timm.create_model("resnet18").state_dict
        )(),
        path,
    )
    if fault == "other width":
        width = 0.5
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    if fault == "empty folder":
        path = tmp_path / "none"
        path.mkdir()
    if fault == "lost":
        path = tmp_path / "lost.pth"
    message = {
        "other arch": "not the weights of resnet18",
        "other width": "of another shape",
        "of no encoder": "0 of",
        "damaged": "not a whole safetensors",
        "empty folder": "neither cerberus.json nor",
        "lost": "no such file",
    }[fault]
    with pytest.raises(BadInput, match=message):
        load_freezable_encoder(path, arch, width)


@pytest.mark.parametrize(
    "name, wrapped, known",
    [
        ("resnet.pth", lambda s: s, False),
        ("resnet.tar", lambda s: s, False),
        ("resnet.pth.tar", lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}, False),
        ("resnet.pt", lambda s: {"model": s}, False),
        ("resnet.pth", lambda s: {"desc": s}, True),
        ("resnet.tar", lambda s: {"desc": {f"module.{k}": v for k, v in s.items()}}, True),
        (
            "resnet.tar",
            lambda s: {f"module.backbone.{k}": v for k, v in s.items()} | {"module.conv_map.weight": torch.zeros(2, 2)},
            True,
        ),
    ],
)
def test_a_resnet_tells_which_pictures_it_has_seen_or_is_asked(tmp_path, name, wrapped, known):
    "That of Cerberus' authors reads 0..1 and is named like torchvision's, which reads standardised pictures."
    net = backbones.build_backbone("resnet18").eval()
    torch.save(
        wrapped({**net.state_dict(), "fc.weight": torch.zeros(9, 512), "fc.bias": torch.zeros(9)}), tmp_path / name
    )

    def features(**said):
        got = load_freezable_encoder(tmp_path / name, "resnet18", **said).eval()
        got.net.conv1.stride = net.conv1.stride
        return got(torch.full((1, 3, 64, 64), 0.7))

    unit, standardised = (
        net((torch.full((1, 3, 64, 64), 0.7) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        for mean, std in (INPUT_RANGES["0..1"], INPUT_RANGES["imagenet"])
    )
    assert torch.allclose(features(inputs="0..1"), unit, atol=1e-4) and not torch.allclose(
        unit, standardised, atol=1e-2
    )
    if known:
        assert torch.allclose(features(), unit, atol=1e-4)
        with pytest.raises(BadInput, match="in 0..1"):
            features(inputs="imagenet")
    else:
        assert torch.allclose(features(inputs="imagenet"), standardised, atol=1e-4)
        with pytest.raises(BadInput, match=r"do not tell which pictures it has seen.* `inputs`"):
            features()


def test_inputs_are_asked_of_files_of_resnets_only(tmp_path):
    cerberus.save_cerberus(cerberus.Cerberus(["gland"], "resnet18", 0.125), tmp_path)
    for source in ("", tmp_path):
        with pytest.raises(BadInput, match="Leave it empty"):
            load_freezable_encoder(source, inputs="0..1")
    with pytest.raises(BadInput, match="Did you mean `imagenet`"):
        load_freezable_encoder("w.pth", inputs="image-net")


def test_a_transformer_has_no_maps(tmp_path):
    backbones.save_backbone(
        backbones.build_backbone("xcit_nano_12_p16_224"), tmp_path, "xcit_nano_12_p16_224", (0.5,) * 3, (0.2,) * 3
    )
    net = load_freezable_encoder(tmp_path)
    with pytest.raises(BadInput, match="Give weights of Cerberus"):
        net.feature_maps(torch.rand(1, 3, 32, 32))
    with pytest.raises(BadInput, match="no maps"):
        net.widths  # noqa: B018
    with pytest.raises(BadInput, match="there is no layer 6"):
        net.freeze(6)


# --- training


def test_equal_parameters_give_equal_runs_and_other_seeds_do_not(train, tmp_path):
    nets = [Net() for _ in range(3)]
    rows = [fit_network(net, loss, train, config(tmp_path / str(i), seed=i == 2)) for i, net in enumerate(nets)]
    assert bare(rows[0]) == bare(rows[1]) and equal(nets[0], nets[1])
    assert not equal(nets[0], nets[2])


def test_processes_that_augment_change_nothing(train, tmp_path):
    nets = [Net(), Net()]
    for net, workers in zip(nets, (0, 2), strict=True):
        fit_network(net, loss, train, config(tmp_path / str(workers), workers=workers, epochs=2))
    assert equal(*nets)


@pytest.mark.parametrize("how", ["file", "signal"])
def test_a_run_that_is_stopped_goes_on_exactly(train, tmp_path, how):
    def right(net):
        return {
            "accuracy": float((torch.cat(list(predict_batches(net, train))).argmax(1).numpy() == train.classes).mean())
        }

    whole = Net()
    rows = fit_network(whole, loss, train, config(tmp_path / "whole"), right)
    asked = []

    def stop(net, epoch):
        if epoch in asked or epoch == 0:
            return
        asked.append(epoch)
        if how == "file":
            (tmp_path / "halves" / "stop").touch()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(Stopped):
            fit_network(Net(), loss, train, config(tmp_path / "halves"), right, stop)
        assert (tmp_path / "halves" / "stopped").exists() and not (tmp_path / "halves" / "weights.safetensors").exists()
    halves = Net()
    again = fit_network(halves, loss, train, config(tmp_path / "halves"), right, stop)
    assert (
        asked == [1, 2] and bare(again) == bare(rows) and equal(whole, halves) and not checkpoints(tmp_path / "halves")
    )
    assert not (tmp_path / "halves" / "stopped").exists()


def test_a_stage_that_is_asked_to_stop_stops_each_of_its_trainings(train, tmp_path, monkeypatch):
    """As a job of SLURM asks: in the folder of the stage, below which its trainings have theirs."""
    monkeypatch.setenv("HISTONB_STAGE", str(tmp_path))

    def stop(net, epoch):
        (tmp_path / "stop").touch()

    with pytest.raises(Stopped):
        fit_network(Net(), loss, train, config(tmp_path / "first"), at_epoch=stop)
    assert not (tmp_path / "stop").exists() and (tmp_path / "stopped").exists()
    assert json.loads((tmp_path / "first/stopped").read_text())["step"] == 1
    n = len(train)
    fit_network(Net(), loss, train, config(tmp_path / "second", epochs=1, batch_size=n), at_epoch=stop)  # at its end
    assert (tmp_path / "stop").exists()
    with pytest.raises(Stopped):
        fit_network(Net(), loss, train, config(tmp_path / "third"))


def test_a_crash_between_epochs_loses_no_epoch_twice(train, tmp_path):
    def crash(net, epoch):
        if epoch == 2:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit_network(Net(), loss, train, config(tmp_path / "a"), at_epoch=crash)
    with open(tmp_path / "a" / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": 10**6, "epoch": 9}) + "\n")  # of an epoch that has no checkpoint
    net = Net()
    want = Net()
    rows = fit_network(net, loss, train, config(tmp_path / "a"))
    assert bare(rows) == bare(fit_network(want, loss, train, config(tmp_path / "b"))) and equal(net, want)


def test_the_best_epoch_is_kept_and_ties_are_told_by_the_next_figure(train, tmp_path):
    figures = iter([(0.5, -2.0), (0.7, -3.0), (0.7, -1.0), (0.6, 0.0)])
    seen = []

    def select(net):
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
        return dict(zip(("accuracy", "likelihood"), next(figures), strict=True))

    net = Net()
    rows = fit_network(net, loss, train, config(tmp_path / "best", epochs=4), select)
    assert json.loads((tmp_path / "best" / "fit.json").read_text())["epoch"] == 3
    assert all(v.equal(seen[2][k]) for k, v in net.state_dict().items()) and not net.training
    assert [r["val_accuracy"] for r in rows] == [0.5, 0.7, 0.7, 0.6]
    last = Net()
    numbers = iter([(0.5, 0.0), (0.4, 0.0), (0.3, 0.0), (0.2, 0.0)])
    fit_network(
        last, loss, train, config(tmp_path / "last", epochs=4, keep="last"), lambda net: {"accuracy": next(numbers)[0]}
    )
    assert json.loads((tmp_path / "last" / "fit.json").read_text())["epoch"] == 4 and all(
        v.equal(seen[3][k]) for k, v in last.state_dict().items()
    )


def test_a_frozen_encoder_is_untouched_by_a_whole_run(train, tmp_path):
    net = Net(depth=3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fit_network(net, loss, train, config(tmp_path, lr=0.01, weight_decay=0.1))
    changed = {k for k, v in net.state_dict().items() if not v.equal(before[k])}
    held = {k for k in before if k.startswith("trunk.net") and net.trunk.layer_of(k.removeprefix("trunk.net.")) < 3}
    assert not changed & held and any(k.startswith("trunk.net.layer3") for k in changed) and "head.1.weight" in changed


def test_what_begins_later_begins_in_its_epoch(train, tmp_path):
    net = Net()
    seen = []

    def late(net, epoch):
        net.head[1].bias.requires_grad_(epoch >= 2)
        seen.append((epoch, net.head[1].bias.detach().clone()))

    fit_network(net, loss, train, config(tmp_path, weight_decay=0.1), at_epoch=late)
    assert [e for e, _ in seen] == [0, 1, 2] and seen[0][1].equal(seen[2][1]) and not seen[2][1].equal(net.head[1].bias)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lr": 0.5}, "lr 0.001 -> 0.5"), ({"epochs": 9}, "epochs 3 -> 9"), ({"seed": 4}, "seed 0 -> 4")],
)
def test_a_run_of_other_parameters_does_not_go_on(train, tmp_path, changes, message):
    fit_network(Net(), loss, train, config(tmp_path))
    with pytest.raises(BadInput, match=message):
        fit_network(Net(), loss, train, config(tmp_path, **changes))
    assert len(fit_network(Net(), loss, train, config(tmp_path, **changes), restart=True)) == changes.get("epochs", 3)


def test_a_run_of_other_weights_layers_or_pictures_does_not_go_on(train, slides, tmp_path):
    fit_network(Net(), loss, train, config(tmp_path))
    other = Net()
    nn.init.zeros_(other.head[1].bias)
    with pytest.raises(BadInput, match="start"):
        fit_network(other, loss, train, config(tmp_path))
    with pytest.raises(BadInput, match="learns"):
        fit_network(Net(depth=2), loss, train, config(tmp_path))
    with pytest.raises(BadInput, match="pictures"):
        fit_network(
            Net(), loss, EBHIDataset(rows_by_split(slides, masks=True)["val"], 32, EBHIAugment()), config(tmp_path)
        )
    with pytest.raises(BadInput, match="augment"):
        fit_network(Net(), loss, EBHIDataset(rows_by_split(slides, masks=True)["train"], 32), config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"), [({"epochs": 0}, "epochs"), ({"lr": -1.0}, "lr"), ({"batch_size": 1}, "Batch norm")]
)
def test_parameters_that_cannot_work(train, tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        fit_network(Net(), loss, train, config(tmp_path, **changes))


def test_a_loss_that_is_not_finite_ends_the_run(train, tmp_path):
    with pytest.raises(ArithmeticError, match="Lower lr"):
        fit_network(Net(), lambda s, m, c: s.sum() / 0.0, train, config(tmp_path))
    assert not (tmp_path / "weights.safetensors").exists()


def test_two_on_one_folder(train, tmp_path):
    with hold(tmp_path), pytest.raises(BadInput, match="another process is writing here"):
        fit_network(Net(), loss, train, config(tmp_path))


def test_a_damaged_checkpoint_is_passed_over(train, tmp_path):
    def stop(net, epoch):
        if epoch == 2:
            (tmp_path / "stop").touch()

    with pytest.raises(Stopped):
        fit_network(Net(), loss, train, config(tmp_path), lambda net: {"a": 1.0 - 1e-9}, stop)
    step, path, best = checkpoints(tmp_path)[0]
    assert not best
    path.write_bytes(path.read_bytes()[:-10])
    net = Net()
    want = Net()
    with pytest.warns(UserWarning, match="passed over"):
        fit_network(net, loss, train, config(tmp_path), lambda net: {"a": 1.0 - 1e-9})
    fit_network(want, loss, train, config(tmp_path / "whole"), lambda net: {"a": 1.0 - 1e-9})
    assert equal(net, want)


def test_masks_are_learnt_by_the_same_loop_and_answers_come_in_order(train, tmp_path):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)
            )

        def forward(self, x):
            return {"mask": self.body(x)[:, 0]}

    def cross(found, masks, classes):
        return F.binary_cross_entropy_with_logits(found["mask"], masks.float())

    net = Pixels()
    rows = fit_network(net, cross, train, config(tmp_path, epochs=12, lr=0.02))
    assert rows[-1]["loss"] < rows[0]["loss"]
    found = torch.cat([a["mask"] for a in predict_batches(net, train, 5)])
    assert found.shape == (len(train), 32, 32) and found.dtype == torch.float32
    alone = net(train[7][0][None].float() / 255)["mask"][0]
    assert torch.allclose(found[7], alone, atol=1e-4)
    masks = torch.stack([train[i][1] for i in range(len(train))])
    assert ((found > 0) == masks.bool()).float().mean() > max(masks.float().mean(), 1 - masks.float().mean())


def test_the_log_tells_speed_and_waiting(train, tmp_path):
    rows = fit_network(Net(), loss, train, config(tmp_path))
    assert rows == read_jsonl(tmp_path / "log.jsonl") and [r["epoch"] for r in rows] == [1, 2, 3]
    assert all(0 <= r["data_wait"] <= 1 and r["images_per_s"] > 0 and r["memory"] > 0 for r in rows)
    assert rows[0]["lr"] > rows[1]["lr"] > rows[2]["lr"] > 0


def test_training_in_another_thread_needs_no_signals(train, tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(fit_network(Net(), loss, train, config(tmp_path, epochs=1))))
    thread.start()
    thread.join(60)
    assert len(done[0]) == 1


def test_the_best_epoch_survives_a_stop(train, tmp_path):
    figures = iter([0.9, 0.1, 0.2])

    def select(net):
        return {"accuracy": next(figures)}

    def stop(net, epoch):
        if epoch == 2:
            (tmp_path / "stop").touch()

    with pytest.raises(Stopped):
        fit_network(Net(), loss, train, config(tmp_path), select, stop)
    fit_network(Net(), loss, train, config(tmp_path), select)
    assert json.loads((tmp_path / "fit.json").read_text()) == {
        "epoch": 1,
        "epochs": 3,
        "steps": 3 * (len(train) // 8),
        "best": [0.9],
    }


# --- several processes


class Plain(nn.Module):
    "A classifier without batch norm and dropout: what it learns does not depend on how a batch is divided."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Conv2d(8, 8, 3, 2), nn.Tanh())
        self.head = nn.Linear(8, 6)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def late_bias(folder, net, epoch):
    "Let the bias of the head learn from the second epoch on, and keep what each process holds at each epoch."
    bias = net.head[1].bias if isinstance(net, Net) else net.head.bias
    bias.requires_grad_(epoch >= 1)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    torch.save(state, f"{folder}-epoch-{epoch}-rank-{ranks.rank()}.pt")


def fit_rank(make, slides, config, stopped_by=None):
    "Fit in a process of a group; one of them is asked to stop in the second epoch."
    torch.set_num_threads(1)
    pictures = EBHIDataset(rows_by_split(slides, masks=True)["train"], 32, EBHIAugment())
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0, 0.1])

    def at_epoch(net, epoch):
        late_bias(config.out, net, epoch)
        if epoch == 1 and ranks.rank() == stopped_by:
            signal.raise_signal(signal.SIGTERM)

    fit_network(make(), class_loss(weights), pictures, config, lambda net: {"accuracy": 0.5}, at_epoch)


def ended(process):
    out, error = process.communicate()
    assert process.returncode == 0, error


def at_epoch_2(folder, rank):
    return torch.load(f"{folder}-epoch-2-rank-{rank}.pt")


def weights_of(folder):
    return load_file(folder / "weights.safetensors")


def test_two_processes_equal_one_with_the_whole_batch(slides, tmp_path):
    two = Forked(fit_rank, Plain, slides, config(tmp_path / "two"), processes=2)
    fit_rank(Plain, slides, config(tmp_path / "one"))
    ended(two)
    one, *both = at_epoch_2(tmp_path / "one", 0), *(at_epoch_2(tmp_path / "two", rank) for rank in (0, 1))
    assert all(both[0][k].equal(both[1][k]) for k in both[0])
    assert all(torch.allclose(one[k], both[0][k], rtol=0, atol=1e-5) for k in one)
    assert not one["head.bias"].equal(Plain().head.bias) and one["unused.weight"].equal(Plain().unused.weight)
    rows = [read_jsonl(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert np.allclose(*([row["loss"] for row in of] for of in rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stopped_by", [0, 1])
def test_two_processes_that_are_stopped_together_go_on_exactly(slides, tmp_path, stopped_by):
    """With batch norm and dropout; each process normalises by its own pictures, and they keep one network."""
    stopped = Forked(fit_rank, Net, slides, config(tmp_path / "halves"), stopped_by, processes=2)
    whole = Forked(fit_rank, Net, slides, config(tmp_path / "whole"), processes=2)
    assert "stopped at step" in stopped.communicate()[1] and stopped.codes == [1, 1]
    step = json.loads((tmp_path / "halves/stopped").read_text())["step"]
    assert checkpoints(tmp_path / "halves")[0][0] == step and not (tmp_path / "halves/fit.json").exists()
    with pytest.raises(BadInput, match="a run of 2 processes, continued on 1"):
        fit_rank(Net, slides, config(tmp_path / "halves"))
    ended(Forked(fit_rank, Net, slides, config(tmp_path / "halves"), processes=2))
    ended(whole)
    a, b = (weights_of(tmp_path / name) for name in ("halves", "whole"))
    assert all(a[k].equal(b[k]) for k in a)
    first, second = (at_epoch_2(tmp_path / "whole", rank) for rank in (0, 1))
    assert all(first[k].equal(second[k]) for k in first) and any("running_mean" in k for k in first)
    logs = (bare(read_jsonl(tmp_path / name / "log.jsonl")) for name in ("halves", "whole"))
    assert next(logs) == next(logs)


def test_a_batch_that_cannot_be_shared_is_refused(train):
    assert [len(b) for b in epoch_batches(train, 8, 0, 2)] == [8] * (len(train) // 8)
    assert [len(b) for b in epoch_batches(train, 100, 0, 5)] == [len(train) // 5 * 5]
    for size, such in ((9, "Choose 8"), (2, "Choose 4")):
        with pytest.raises(BadInput, match=f"{size} for 2 processes.*{such}"):
            resolve_fit_config(config("", batch_size=size), 2)
