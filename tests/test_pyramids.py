"""Encoders with a feature pyramid: their maps, weights, receptive field, and a training that starts from weights."""

import dataclasses

import numpy as np
import pytest
import torch
from forked import Forked

from histonb.commands.train_cerberus import train_cerberus_command
from histonb.core.errors import BadInput
from histonb.core.files import read_json, read_jsonl, write_json
from histonb.datasets.readers import read_sets
from histonb.models import backbones, cerberus
from histonb.models.cerberus import Cerberus
from histonb.models.pyramids import pyramid_encoder, start_encoder
from histonb.models.receptive_field import decoder_field, receptive_field
from histonb.models.starting_weights import load_start
from histonb.segment.predictors import TilePredictor
from histonb.segment.samples import MultiTaskDataset, TaskBatchSampler, collate
from histonb.segment.tiled_inference import inference_margin, predict_tiled
from histonb.segment.training import MultiTaskTrainer, train
from histonb.segment.training_config import TrainConfig, resolve_train_config
from histonb.training.checkpoint import checkpoints, read_checkpoint
from histonb.transfer.freezable_encoders import load_freezable_encoder

LITE0 = "efficientnet_lite0"
PHANTOMS = {"reader": "phantom_regions", "n": 8, "seed": 1, "size": 128}
pytestmark = pytest.mark.usefixtures("one_thread")


def config(out, **changes):
    values = dict(arch="resnet18", crop=64, batch_size=4, steps=2, device="cpu", precision="fp32", workers=0)
    return TrainConfig(str(out), (PHANTOMS | {"labels": ["gland", "nucleus"]},), **values | changes)


def normalised_by_noise(net):
    "Give batch norm statistics as if the network were trained."
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            m.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.rand(2, 3, 320, 320))
    return net.eval()


@pytest.mark.parametrize("arch", [LITE0, "convnext_atto", "regnetx_002"])
@pytest.mark.parametrize("size", [(1, 1), (50, 97)])
def test_any_pyramid_scores_every_pixel(arch, size):
    net = Cerberus(("gland", "tissue"), arch).eval()
    with torch.inference_mode():
        out = net(torch.rand(2, 3, *size))
    assert out["gland"].shape == (2, 3, *size) and out["tissue"].shape == (2, 9, 1, 1)
    assert all(torch.isfinite(s).all() for s in out.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_small_patch16_224",), "a decoder needs 3.* efficientnet_lite0"),
        (("xcit_nano_12_p16_224",), "no feature maps.* efficientnet_lite0"),
        (("haar2d+resnet34",), "no XCiT or ViT"),
        (("swin_tiny_patch4_window7_224",), "reads no picture of"),
        ((LITE0, 0.5), "only resnet18 and resnet34 can be narrower"),
        ((LITE0, 1.0, 4), "has feature maps at stride 2, stride 4 alone"),
        (("resnet34", 1.0, 8), "all its maps are used"),
        (("efficientnet_lite00",), "Did you mean `efficientnet_lite0`"),
    ],
)
def test_encoders_without_a_pyramid_are_refused(arguments, message):
    with pytest.raises(BadInput, match=message):
        pyramid_encoder(*arguments)


def test_the_receptive_field_is_what_the_layers_sum_to():
    "Of the ResNets; of EfficientNet-Lite0 half of each kernel at its stride, and the decoders as in the ResNets."
    fields = {arch: receptive_field(Cerberus(["gland"], arch, 0.0625)) for arch in ("resnet18", "resnet34")}
    assert fields == {"resnet18": 170, "resnet34": 286}
    net = Cerberus(["gland"], LITE0)
    stride, down = 1, 0
    for name, m in net.encoder.named_modules():
        if isinstance(m, torch.nn.Conv2d) and m.kernel_size[0] > 1:
            down += stride * (m.kernel_size[0] // 2)
            stride *= m.stride[0]
    up = sum(4 * s for s in (16, 8, 4, 2)) + 2  # a doubling and two convolutions; the last doubling
    assert abs(receptive_field(net) - (down + up)) <= 1
    assert receptive_field(Cerberus(["gland"], LITE0, max_stride=16)) < receptive_field(net) / 2
    assert decoder_field(Cerberus(["gland"], "resnet18", 0.0625)) == 45


def test_tiles_of_another_encoder_equal_a_single_pass():
    "Tiles begin on the grid of stride 32 though 144 is no multiple of it."
    net = normalised_by_noise(Cerberus(("gland", "tissue"), LITE0))
    picture = np.random.default_rng(0).integers(0, 256, (270, 1290, 3), np.uint8)

    def read(x, y, w, h):
        return picture[y : y + h, x : x + w]

    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        whole = {name: s[0].numpy() for name, s in net(x).items()}
    tiled = predict_tiled(net, read, picture.shape[:2], 144)
    for name, scores in whole.items():
        assert tiled[name].shape == scores.shape
        assert np.abs(tiled[name] - scores).max() < 1e-4 * np.abs(scores).max()
    narrow = predict_tiled(net, read, picture.shape[:2], 144, 96, ["gland"])["gland"]
    assert np.abs(narrow - whole["gland"]).max() > 1e-2
    assert inference_margin(net) == 576


@pytest.mark.parametrize(
    ("arch", "stem_stride", "strides"),
    [
        (LITE0, 1, (1, 2, 4, 8, 16)),
        (LITE0, 2, (2, 4, 8, 16, 32)),
        ("resnet10t", 1, (1, 2, 4, 8, 16)),  # a stem of three convolutions
        ("resnet18", 1, (1, 2, 4, 8, 16)),
        ("resnet18", 2, (2, 4, 8, 16, 32)),
    ],
)
def test_the_stem_has_the_stride_that_is_asked_for_and_the_same_weights(tmp_path, arch, stem_stride, strides):
    width = 0.125 if arch == "resnet18" else 1.0
    torch.manual_seed(0)
    usual = Cerberus(("gland", "tissue"), arch, width).eval()
    torch.manual_seed(0)
    net = Cerberus(("gland", "tissue"), arch, width, stem_stride=stem_stride).eval()
    assert net.pyramid.strides == strides and net.decoders["gland"].stride == stem_stride
    theirs = usual.encoder.state_dict()
    assert all(t.equal(theirs[name]) for name, t in net.encoder.state_dict().items())
    cerberus.save_cerberus(net.with_tasks(("gland", "lumen")), tmp_path)
    again, about = cerberus.load_cerberus(tmp_path)
    images = torch.rand(1, 3, 50, 97)
    with torch.inference_mode():
        scores, same = net(images)["gland"], again(images)["gland"]
    assert scores.shape[-2:] == (50, 97) and scores.equal(same) and about["stem_stride"] == stem_stride


@pytest.mark.parametrize(("arch", "stem"), [(LITE0, "conv_stem"), ("resnet18", "conv1")])
def test_a_stem_of_stride_1_computes_what_one_of_stride_2_skips(arch, stem):
    "With published weights; of the first convolution every second value is that at stride 2."
    start = load_start("imagenet" if arch == LITE0 else "random", arch)
    fine, coarse = (pyramid_encoder(arch, stem_stride=stride).eval() for stride in (1, 2))
    for net in (fine, coarse):
        report = start_encoder(net, start)
        assert report["missing"] + report["unexpected"] + report["reshaped"] == []
    images = torch.rand(1, 3, 64, 96)
    every, second = (net.get_submodule(stem)(images) for net in (fine, coarse))
    assert torch.allclose(every[..., ::2, ::2], second, atol=1e-5) and every.shape[-2:] == (64, 96)


def test_tiles_of_a_network_with_a_stem_of_stride_1_equal_a_single_pass():
    "It sees half as far as with its own stem, and begins on a grid of 16."
    net = normalised_by_noise(Cerberus(("gland",), LITE0, stem_stride=1))
    stride, down = 1, 0
    for m in net.encoder.modules():
        if isinstance(m, torch.nn.Conv2d) and m.kernel_size[0] > 1:
            down += stride * (m.kernel_size[0] // 2)
            stride *= m.stride[0]
    assert stride == 16 and abs(receptive_field(net) - (down + sum(4 * s for s in (8, 4, 2, 1)))) <= 1
    picture = np.random.default_rng(0).integers(0, 256, (144, 910, 3), np.uint8)
    with torch.inference_mode():
        whole = net(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)["gland"][0].numpy()

    def read(x, y, w, h):
        return picture[y : y + h, x : x + w]

    tiled, narrow = (predict_tiled(net, read, picture.shape[:2], 144, m)["gland"] for m in (inference_margin(net), 48))
    assert np.abs(tiled - whole).max() < 1e-4 * np.abs(whole).max() < np.abs(narrow - whole).max()


def test_stems_that_fit_one_stride_alone_are_refused():
    with pytest.raises(BadInput, match="a stem that fits one stride alone"):
        pyramid_encoder("convnext_atto", stem_stride=1)
    with pytest.raises(BadInput, match="stem_stride: 3. Choose 1, 2"):
        pyramid_encoder(LITE0, stem_stride=3)
    assert resolve_train_config(config("", arch=LITE0, stem_stride=1, crop=48), [1]).crop == 48


def test_networks_that_see_the_whole_picture_are_not_tiled(tmp_path):
    net = Cerberus(["gland"], "efficientnet_b0")
    cerberus.save_cerberus(net, tmp_path)
    for refused in (lambda: inference_margin(net), lambda: TilePredictor(tmp_path, device="cpu")):
        with pytest.raises(BadInput, match="squeeze-excite.* efficientnet_lite0"):
            refused()


def test_imagenet_starts_the_encoder_and_stays_with_it(tmp_path, capsys):
    imagenet = load_start("imagenet", LITE0)
    run = train(config(tmp_path / "a", arch=LITE0, weights="imagenet", lr=1e-30))
    net, about = cerberus.load_cerberus(run)
    theirs = imagenet.model.state_dict()
    for name, p in net.encoder.named_parameters():
        assert torch.allclose(p, theirs[name], atol=1e-6), name
    assert torch.allclose(net.mean.flatten(), torch.tensor(imagenet.mean)) and about["std"] == pytest.approx(
        imagenet.std
    )
    assert about["encoder_weights"]["digest"] == imagenet.digest == read_json(run / "config.json")["weights_digest"]
    assert "efficientnet_lite0 from imagenet" in capsys.readouterr().out
    encoder = load_freezable_encoder(run).eval()
    images = torch.rand(1, 3, 64, 64)
    assert encoder.feature_maps(images)[-1].equal(net.encode(images)[-1])
    second = MultiTaskTrainer(resolve_train_config(config("", start=str(run)), [1]), net.tasks.values())
    assert second.net.mean.equal(net.mean) and second.net.arch == LITE0


def test_random_and_imagenet_have_the_same_decoders():
    trainers = [
        MultiTaskTrainer(
            resolve_train_config(config("", arch=LITE0, weights=w), [1]), Cerberus(["gland"]).tasks.values()
        )
        for w in ("", "imagenet")
    ]
    a, b = (t.net.decoders.state_dict() for t in trainers)
    assert all(a[k].equal(b[k]) for k in a)
    assert not trainers[0].net.encoder.conv_stem.weight.equal(trainers[1].net.encoder.conv_stem.weight)


def test_a_run_of_dino_starts_the_encoder_of_cerberus(tmp_path):
    net = backbones.build_backbone("resnet18")
    backbones.save_backbone(net, tmp_path / "dino", "resnet18", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    trainer = MultiTaskTrainer(
        resolve_train_config(config("", weights=str(tmp_path / "dino")), [1]), Cerberus(["gland"]).tasks.values()
    )
    assert trainer.net.encoder.layer1[0].conv1.weight.equal(net.layer1[0].conv1.weight)
    assert trainer.net.encoder.conv1.stride == (1, 1) and trainer.net.mean.flatten().tolist() == pytest.approx(
        [0.5, 0.4, 0.3]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arch="resnet34", weights="imagenet+"), "no such weights"),
        (dict(weights="DINO"), "weights of resnet34, not of resnet18.* Set arch to resnet34"),
        (dict(weights="DINO", arch="resnet34", width=0.5), "of another shape"),
        (dict(weights="GREY", arch="resnet18"), "has? 1 channel|have 1 channel"),
        (dict(weights="imagenet", start="x"), "beside `start`"),
        (dict(crop=48, arch=LITE0), "multiple of 32, such as 64"),
        (dict(encoder_lr=-1.0), "`encoder_lr` is -1.0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, changes, message):
    for name, arch, channels in (("DINO", "resnet34", 3), ("GREY", "resnet18", 1)):
        if changes.get("weights") == name:
            net = backbones.build_backbone(arch, in_chans=channels)
            net.in_chans = channels
            backbones.save_backbone(net, tmp_path / name, arch, (0.5,) * channels, (0.2,) * channels)
            changes = changes | {"weights": str(tmp_path / name)}
    with pytest.raises(BadInput, match=message):
        train(config(tmp_path / "run", **changes))


def test_a_lower_rate_of_the_encoder_and_an_exact_resume(tmp_path):
    def moved(**changes):
        c = resolve_train_config(config("", width=0.125, **changes), [8])
        trainer = MultiTaskTrainer(c, Cerberus(["gland", "nucleus"]).tasks.values())
        before = {k: v.clone() for k, v in trainer.net.named_parameters()}
        sets, tasks = read_sets(c.sets)
        samples = MultiTaskDataset(sets, tasks)
        trainer.train_step(iter([collate([samples[0, k, 64] for k in range(4)])]))
        change = {k: (v - before[k]).abs().max().item() for k, v in trainer.net.named_parameters()}
        return {part: max(v for k, v in change.items() if k.startswith(part)) for part in ("encoder.", "decoders.")}

    equal, slow = moved(), moved(encoder_lr=0.1)
    assert slow["encoder."] == pytest.approx(0.1 * equal["encoder."], rel=1e-2)
    assert slow["decoders."] == pytest.approx(equal["decoders."], rel=1e-2)
    small = dict(width=0.125, encoder_lr=0.1, steps=4, checkpoint_every=2, schedule="step")
    whole = train(config(tmp_path / "whole", **small))
    half = train(config(tmp_path / "half", **small | {"steps": 2}))
    train(dataclasses.replace(config(half, **small)))
    a, b = (cerberus.load_cerberus(run)[0].state_dict() for run in (whole, half))
    assert all(x.equal(y) for x, y in zip(a.values(), b.values(), strict=True))


# --- several processes


def train_with_fixed_statistics(path):
    "Run the command with batch norm in eval mode, whose statistics of a part of the batch are others than of all."
    torch.set_num_threads(1)
    batch_norm = torch.nn.BatchNorm2d
    batch_norm.train = lambda self, mode=True: torch.nn.Module.train(self, False)
    train_cerberus_command(path)


@pytest.mark.parametrize("type_loss", ["objects", "pixels"])
def test_two_processes_equal_one_also_where_one_lacks_labels(tmp_path, type_loss):
    "In the first step one process has glands alone, the other nuclei and their types too."
    sets = (PHANTOMS | {"labels": ["gland"]}, PHANTOMS | {"seed": 2, "labels": ["nucleus", "nucleus-type"]})
    changes = dict(width=0.125, shares=(2, 1), steps=3, log_every=1, checkpoint_every=1, keep=3, type_loss=type_loss)
    runs = {n: dataclasses.replace(config(tmp_path / str(n), **changes), sets=sets) for n in (1, 2)}
    for n, c in runs.items():
        write_json(tmp_path / f"{n}.json", dataclasses.asdict(c))
        process = Forked(train_with_fixed_statistics, tmp_path / f"{n}.json", processes=n)
        assert process.communicate()[1] is not None and process.returncode == 0, process.communicate()[1]
    first = [read_checkpoint(checkpoints(c.out)[-1][1]) for c in runs.values()]
    assert [state["step"] for state in first] == [1, 1] and [state["world"] for state in first] == [1, 2]
    one, two = (state["optimiser"]["state"] for state in first)
    assert one.keys() == two.keys()  # the same parameters have had a gradient
    for k in one:
        a, b = one[k]["exp_avg"], two[k]["exp_avg"]
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * max(a.abs().max().item(), 1e-3))
    rows = [[row for row in read_jsonl(tmp_path / str(n) / "log.jsonl") if "loss" in row] for n in (1, 2)]
    for a, b in zip(*rows, strict=True):
        names = [name for name in a if name.startswith("loss")]
        assert names == [name for name in b if name.startswith("loss")]
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-3)
    assert cerberus.load_cerberus(tmp_path / "2")[1]["step"] == 3
    with pytest.raises(BadInput, match="a run of 2 processes, continued on 1"):
        train(dataclasses.replace(runs[2], steps=4, schedule="step"))


def test_processes_divide_a_batch():
    whole = TaskBatchSampler([False, False], "mixed", 6, 64, 0, 3).batch(1)
    parts = [[*TaskBatchSampler([False, False], "mixed", 6, 64, 0, 3, (), rank, 2)][1] for rank in (0, 1)]
    assert parts[0] + parts[1] == whole
    with pytest.raises(BadInput, match="4 for 3 processes.* Choose 6"):
        resolve_train_config(config(""), [8], world=3)
