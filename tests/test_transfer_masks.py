"Transfer to masks: networks, loss, budget, closing, baselines, masks in the layout of the data set, report."

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_report

from histonb.core.errors import BadInput
from histonb.datasets.ebhi import ebhi_seg, read_ebhi_pair
from histonb.metrics.overlap import OVERLAP_METRICS, mask_overlap, overlap_metrics
from histonb.models import backbones, cerberus
from histonb.models.medt import MedT
from histonb.training.pair_augmentation import EBHIAugment
from histonb.transfer import masks as t
from histonb.transfer.ebhi_dataset import EBHIDataset, rows_by_split, write_example
from histonb.transfer.freezable_encoders import load_freezable_encoder
from histonb.transfer.supervised import FitConfig

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared/data/EBHI-SEG"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="no ../shared/data/EBHI-SEG")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = t.NetworkConfig(arch="resnet18", width=0.125, plain_width=4, medt_width=4, medt_heads=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("ebhi"), n_cases=5, n_pictures=2)


@pytest.fixture(scope="module")
def pictures(root):
    return {
        k: EBHIDataset(v, 32, EBHIAugment() if k == "train" else None)
        for k, v in rows_by_split(ebhi_seg(root).slides, masks=True).items()
    }


@pytest.fixture
def weights(tmp_path):
    "A trained Cerberus, in small."
    torch.manual_seed(7)
    cerberus.save_cerberus(cerberus.Cerberus(["gland"], "resnet18", 0.125), tmp_path / "cerberus")
    return tmp_path / "cerberus"


def config(folder, **changes):
    return FitConfig(
        str(folder), **{"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu", "precision": "fp32"} | changes
    )


# Networks --------------------


@pytest.mark.parametrize("name", ["transferred", "joint", "unet", "segnet", "medt"])
def test_every_network_scores_every_pixel_and_is_a_function_of_its_seed(name):
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = (t.mask_network(name, SMALL, seed).eval() for seed in (0, 0, 1))
    assert torch.rand(1) == want  # the generator is left alone
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = [net(x) for net in (a, b, c)]
    if name == "joint":
        assert all(f["class"].shape == (2, 6) for f in found)
        found = [f["mask"] for f in found]
    assert found[0].shape == (2, 1, 64, 64) and torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_transferred_encoder_has_the_source_s_weights_and_the_other_one_its_shape(weights):
    sizes = dataclasses.replace(SMALL, source=str(weights), arch="resnet34", width=1.0)  # what the source says counts
    given = cerberus.load_cerberus(weights)[0].encoder.state_dict()
    nets = {k: t.mask_network(k, sizes) for k in ("transferred", "joint", "scratch")}
    for name, net in nets.items():
        own = net.trunk.net.state_dict()
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in given.items()}
        assert torch.equal(own["layer4.0.conv1.weight"], given["layer4.0.conv1.weight"]) == (name != "scratch")
    assert torch.equal(
        nets["transferred"].decoder.head[0].weight, nets["scratch"].decoder.head[0].weight
    )  # they differ in the encoder alone


def test_frozen_layers_do_not_learn(tmp_path, pictures, weights):
    sizes = dataclasses.replace(SMALL, source=str(weights), depth=3)
    before = {k: v.clone() for k, v in load_freezable_encoder(str(weights)).net.state_dict().items()}
    net, _ = t.train_mask_network("transferred", sizes, pictures["train"], pictures["val"], config(tmp_path / "run"))
    after = net.trunk.net.state_dict()
    same = {k for k in before if torch.equal(before[k], after[k])}
    assert {
        k for k in before if k.startswith(("conv1", "bn1", "layer1", "layer2"))
    } <= same  # statistics of batch norm too
    assert not {k for k in before if k.startswith(("layer3", "layer4")) and k.endswith("conv1.weight")} & same


def test_medt_sees_its_own_side_and_its_gates_wait():
    net = t.mask_network("medt", SMALL)
    keeper = t.unfreeze_gates(3)
    seen = []
    net.net.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[-1]))
    with torch.no_grad():
        assert net.eval()(torch.rand(1, 3, 96, 96)).shape[-1] == 96
    assert seen == [128]
    gates = next(m for m in net.modules() if isinstance(m, MedT)).gates().values()
    for epoch in (0, 2, 3, 9, 1):
        keeper(net, epoch)
        assert all(g.requires_grad == (epoch >= 3) for g in gates)
    keeper(t.mask_network("unet", SMALL), 0)  # others are left alone


def test_a_picture_at_the_network_s_own_side_is_not_resized():
    net = t.mask_network("medt", SMALL).eval()
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(net(x), net.net(x))


# Loss and prediction --------------------


def test_the_loss_of_empty_full_and_half_masks_by_hand():
    empty = torch.zeros(1, 4, 4, dtype=torch.uint8)
    full = torch.ones(1, 4, 4, dtype=torch.uint8)
    sure = torch.full((1, 1, 4, 4), 30.0)
    for scores, mask, want in (
        (-sure, empty, 0),
        (sure, full, 0),
        (sure, empty, 30 + 1 - 1 / 17),
        (-sure, full, 30 + 1 - 1 / 17),
    ):
        assert abs(float(t.mask_loss(scores, mask, None)) - want) < 1e-3
    joint = t.mask_loss({"mask": sure, "class": torch.zeros(1, 6)}, full, torch.tensor([2]))
    assert abs(float(joint) - np.log(6)) < 1e-4


class Bright(torch.nn.Module):
    "Foreground is what is brighter than half."

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.mean(1, keepdim=True) - 0.5 * self.one


def test_masks_come_out_at_the_size_and_in_the_order_of_the_truth(pictures):
    test = pictures["test"]
    masks, classes = t.predict_masks(Bright(), test)
    assert (
        masks.shape == test.masks.shape
        and masks.dtype == np.uint8
        and set(np.unique(masks)) <= {0, 1}
        and classes is None
    )
    wanted = (test.images.mean(-1) / 255 > 0.5).astype(np.uint8)
    assert overlap_metrics(mask_overlap(wanted, masks))[:, 0].mean() > 0.8  # at 32 px, but each picture is its own


def test_closing_fills_narrow_gaps_and_takes_nothing():
    mask = np.ones((1, 40, 40), np.uint8)
    mask[0, :, 10:13], mask[0, :, 25:37] = 0, 0
    out = t.close_masks(mask, 3)
    assert (out >= mask).all() and out[0, :, 10:13].all() and not out[0, :, 28:34].any()
    assert np.array_equal(t.close_masks(mask, 0), mask)
    for same in (np.zeros((1, 9, 9), np.uint8), np.ones((1, 9, 9), np.uint8)):
        assert np.array_equal(t.close_masks(same, 4), same)


def test_baselines_draw_what_they_say():
    image = np.full((60, 60, 3), (225, 190, 215), np.uint8)
    image[15:45, 15:45] = 90, 60, 130
    image[26:34, 26:34] = 250, 250, 250  # a lumen
    assert t.all_foreground(image).all()
    drawn = t.stain_mask(image, 2)
    assert drawn[20:40, 20:40].all() and not drawn[:8].any() and drawn.dtype == np.uint8
    assert set(np.unique(t.stain_mask(np.full((30, 30, 3), 200, np.uint8)))) <= {0, 1}  # nothing to tell apart


# Training --------------------


def test_all_networks_get_one_budget(tmp_path, pictures):
    seen = {}
    for name in ("transferred", "unet", "segnet"):
        _, log = t.train_mask_network(name, SMALL, pictures["train"], pictures["val"], config(tmp_path / name))
        about = json.loads((tmp_path / name / "config.json").read_text())
        seen[name] = {k: v for k, v in about.items() if k not in ("out", "network", "start", "learns")} | {
            "steps": log[-1]["step"],
            "lr": [r["lr"] for r in log],
        }
    assert seen["transferred"] == seen["unet"] == seen["segnet"]


def test_a_network_learns_and_the_best_epoch_is_kept(tmp_path, pictures):
    plain = {k: EBHIDataset(p.slides, 32) for k, p in pictures.items()}
    c = config(tmp_path / "run", epochs=25, lr=5e-3)
    net, log = t.train_mask_network("joint", SMALL, plain["train"], plain["train"], c)
    dice = overlap_metrics(mask_overlap(plain["train"].masks, t.predict_masks(net, plain["train"])[0]))[:, 0].mean()
    share = plain["train"].masks.mean((1, 2))
    best = max(log, key=lambda r: r["val_both"])
    assert dice == pytest.approx(best["val_dice"], abs=1e-6) and dice > (2 * share / (1 + share)).mean() + 0.15
    assert (
        best["val_both"] == pytest.approx((best["val_dice"] + best["val_accuracy"]) / 2) and best["val_accuracy"] > 0.5
    )
    assert t.train_mask_network("joint", SMALL, plain["train"], plain["train"], c)[1] == log
    with pytest.raises(BadInput, match="other parameters"):
        t.train_mask_network("unet", SMALL, plain["train"], plain["train"], c)


# Scores --------------------


def test_the_table_of_scores_has_the_counts_of_each_picture(pictures):
    test = pictures["test"]
    drawn = {"all": np.ones_like(test.masks), "none": np.zeros_like(test.masks), "truth": test.masks}
    scores = t.score_masks(drawn, test)
    assert list(scores) == ["slide", "case", "class", "network", "tp", "fp", "fn"] and len(scores) == 3 * len(test)
    found = t.network_metrics(scores, 50)
    assert all(found["truth"]["all"][f"image_{f}"]["value"] == 1 for f in OVERLAP_METRICS) and found["none"]["all"][
        "failed"
    ] == len(test)
    for name, masks in drawn.items():
        assert np.array_equal(
            t.network_counts(scores.sample(frac=1, random_state=0), name)[["tp", "fp", "fn"]],
            mask_overlap(test.masks, masks)[np.argsort(test.slides["slide"], kind="stable")],
        )
        mine = test.slides["class"] == "Polyp"
        assert found[name]["Polyp"]["image_dice"]["value"] == pytest.approx(
            overlap_metrics(mask_overlap(test.masks[mine], masks[mine]))[:, 0].mean()
        )


# Masks where there are none --------------------


def test_written_masks_complete_the_set(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "EBHI-SEG"))
    cohort = ebhi_seg(copy)
    bare = t.unlabelled(cohort)
    assert len(bare) == 2 and set(bare["class"]) == {"Low-grade IN"} and all(Path(p).exists() for p in bare["image"])
    masks = np.zeros((2, 224, 224), np.uint8)
    masks[:, 40:90, 100:] = 1
    t.write_masks(masks, bare, copy)
    complete = ebhi_seg(copy)
    assert not (complete.slides["label"] == "").any() and not len(t.unlabelled(complete))
    row = next(complete.slides[complete.slides["slide"] == bare["slide"][0]].itertuples())
    assert np.array_equal(read_ebhi_pair(row)[1], masks[0])


def test_truth_is_never_overwritten(root, tmp_path):
    slides = ebhi_seg(root).slides
    some = slides[slides["label"] != ""].head(1)
    before = Path(some["label"].iloc[0]).read_bytes()
    with pytest.raises(BadInput, match="this is the truth"):
        t.write_masks(np.ones((1, 224, 224), np.uint8), some, root)
    assert Path(some["label"].iloc[0]).read_bytes() == before
    [path] = t.write_masks(np.ones((1, 224, 224), np.uint8), some, tmp_path)
    assert path.relative_to(tmp_path).as_posix() == some["slide"].iloc[0].replace("/image/", "/label/")


# What must be refused --------------------


def test_networks_that_cannot_be_are_refused(tmp_path):
    for name, sizes, said in (
        ("u-net", SMALL, "Did you mean `unet`"),
        ("scratch", SMALL, "leave `scratch` out"),
        ("medt", dataclasses.replace(SMALL, medt_side=96), "multiple of 128"),
    ):
        with pytest.raises(BadInput, match=said):
            t.mask_network(name, sizes)
    with pytest.raises(BadInput, match="`depth` is 7. Choose a number from 1 to 5"):
        dataclasses.replace(SMALL, depth=7)
    torch.manual_seed(0)
    backbones.save_backbone(
        backbones.build_backbone("xcit_nano_12_p16_224"), tmp_path, "xcit_nano_12_p16_224", (0.5,) * 3, (0.5,) * 3
    )
    with pytest.raises(BadInput, match="no maps at several strides"):
        t.mask_network("transferred", dataclasses.replace(SMALL, source=str(tmp_path)))
    torch.save(backbones.build_backbone("resnet18").state_dict(), tmp_path / "other.pth")
    with pytest.raises(BadInput, match="not the weights of resnet34"):
        t.mask_network("transferred", t.NetworkConfig(source=str(tmp_path / "other.pth"), arch="resnet34"))


def test_sides_and_masks_that_do_not_fit_are_refused(tmp_path, pictures, root):
    odd = {k: EBHIDataset(p.slides, 48) for k, p in pictures.items()}
    with pytest.raises(BadInput, match="multiples of 32"):
        t.train_mask_network("segnet", SMALL, odd["train"], odd["val"], config(tmp_path / "odd"))
    with pytest.raises(BadInput, match="it has no mask"):
        EBHIDataset(t.unlabelled(ebhi_seg(root)), 32)
    with pytest.raises(BadInput, match="Give a mask of each"):
        t.write_masks(np.zeros((1, 224, 224), np.uint8), pictures["test"].slides, tmp_path)
    with pytest.raises(BadInput, match="Give 0 or more"):
        t.close_masks(pictures["test"].masks, -1)


# The report --------------------


def test_the_report_refuses_before_it_trains(tmp_path):
    error, found = run_report("transfer_masks", tmp_path, n_boot=50, leak=["medt"])
    assert found is None and "not among the networks" in error and not (tmp_path / "run/grouped").exists()


@pytest.mark.slow
def test_the_report_tells_what_its_files_say(tmp_path, root, weights):
    error, found = run_report(
        "transfer_masks",
        tmp_path,
        n_boot=50,
        root=str(root),
        source=str(weights),
        networks=["transferred", "scratch", "medt"],
        leak=["scratch"],
        epochs=1,
        closing=0,
    )
    assert found, error[-3000:]
    scores = pd.read_parquet(tmp_path / "run/scores.parquet")
    assert set(scores["network"]) == {"transferred", "from scratch", "MedT", "all foreground", "stain"} and set(
        scores["division"]
    ) == {"grouped", "random"}
    part = scores[(scores["division"] == "grouped") & (scores["network"] == "MedT")]
    assert found["results"]["grouped"]["MedT"]["all"]["image_dice"]["value"] == pytest.approx(
        overlap_metrics(part[["tp", "fp", "fn"]])[:, 0].mean()
    )
    assert (
        found["leaking"]["grouped"] == 0 < found["leaking"]["random"]
        and set(found["gap"]) == {"from scratch"}
        and found["closing"] == {}
    )
    assert "impossible" not in found["own_consistency"] and [
        r["network"] for r in found["published"] if r["consistency"] == "impossible"
    ] == ["U-Net"]
    written = sorted(
        p.relative_to(tmp_path / "run/annotated").as_posix() for p in (tmp_path / "run/annotated").rglob("*.png")
    )
    assert (
        len(written) == len(found["annotated"])
        and written[-1].split("/")[1] == "label"
        and "Low-grade IN/label/GTGT2012149-2-400-001.png" in written
    )


@needs_real
@pytest.mark.slow
def test_the_stain_knows_less_than_it_costs_on_real_pictures():
    "All foreground beats a threshold, as the share of foreground says."
    slides = ebhi_seg(REAL).slides.sample(60, random_state=0).reset_index(drop=True)
    p = EBHIDataset(slides, 224)
    dice = {
        name: overlap_metrics(mask_overlap(p.masks, [draw(i) for i in p.images]))[:, 0].mean()
        for name, draw in t.MASK_BASELINES.items()
    }
    share = p.masks.mean((1, 2))
    assert (
        dice["all foreground"] == pytest.approx((2 * share / (1 + share)).mean())
        and 0.6 < dice["stain"] < dice["all foreground"]
    )
