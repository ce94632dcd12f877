"""Read-out at several depths and pre-training from weights: what is computed, what stands still, what a run keeps."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from histonb.core.errors import BadInput
from histonb.models.backbones import build_backbone, save_backbone
from histonb.models.depths import depth_widths, find_depths, read_dim, read_features, read_patches
from histonb.pretrain.config import PretrainConfig, preset, resolve, schedules
from histonb.pretrain.continuing import StartPull, freeze_first_layers, layer_rates, parameter_layers
from histonb.pretrain.pretraining import pretrain
from histonb.pretrain.regularisers import kde, regulariser_loss
from histonb.probe.encoders import load_encoder

TINY = dict(
    arch="test_efficientnet",
    out_dim=16,
    hidden=16,
    bottleneck=8,
    n_local=1,
    global_size=32,
    local_size=16,
    batch_size=4,
    epochs=2.0,
    warmup_epochs=0.0,
    workers=0,
    precision="fp32",
    drop_path=0.0,
    freeze_last_epochs=0.0,
)


class Tiles:
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8), 0


@pytest.fixture
def weights(tmp_path):
    """A backbone with statistics and normalisation of its own."""
    model = build_backbone("test_efficientnet").train()
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32) + 1)
    save_backbone(model.eval(), tmp_path / "start", "test_efficientnet", (0.7, 0.5, 0.7), (0.2, 0.2, 0.2))
    return str(tmp_path / "start"), model


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientnet_lite0", "resnet18"])
def test_depths_are_those_of_timm(name):
    model = build_backbone(name).eval()
    x = torch.randn(2, 3, 64, 64)
    chosen = [1, 3]
    with torch.no_grad():
        theirs = model.forward_intermediates(x, indices=chosen, intermediates_only=True)
        ours = read_patches(model, x, [1])
        assert ours.shape[2] == theirs[0].shape[1]
        if name.startswith("vit"):
            tokens = model.get_intermediate_layers(x, chosen, norm=True, return_prefix_tokens=True)
            want = torch.cat([prefix[:, 0] for _, prefix in tokens], 1)
        else:
            want = torch.cat([torch.layer_norm(m.mean((2, 3)), m.shape[1:2]) for m in theirs], 1)
        assert torch.allclose(read_features(model, x, depths=chosen), want, atol=1e-5)
        assert torch.equal(
            read_features(model, x, depths=(1, 3)), read_features(model, x, depths=(1, 3 - len(depth_widths(model))))
        )
        swapped = read_features(model, x, depths=(3, 1))
        assert torch.allclose(swapped, torch.cat([read_features(model, x, depths=(d,)) for d in (3, 1)], 1), atol=1e-6)
    assert want.shape[1] == read_dim(model, "class", chosen)


def test_depths_of_an_xcit():
    model = build_backbone("xcit_nano_12_p16_224").eval()
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        assert torch.allclose(read_features(model, x, depths=(13,)), model(x), atol=1e-6)
        tokens = model.forward_features(x)
        assert torch.allclose(read_features(model, x, "class+mean", (-1,))[:, 128:], tokens[:, 1:].mean(1), atol=1e-6)
        early = read_features(model, x, depths=(4,))  # no class token yet: the mean patch token
        assert torch.allclose(early, read_patches(model, x, (4,)).mean(1), atol=1e-6)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "depths, message",
    [((12,), "from 0 to 11"), ((1, -11), "twice"), (("last",), "no depth last"), ((1.0,), "no depth 1.0")],
)
def test_depths_that_are_not_there(depths, message):
    with pytest.raises(BadInput, match=message):
        find_depths(build_backbone("vit_tiny_patch16_224"), depths)


def test_an_encoder_at_several_depths(weights):
    folder, model = weights
    tiles = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    encoder = load_encoder(folder, depths=(2, 3))
    assert encoder(tiles).shape == (3, encoder.spec.dim) and encoder.spec.dim == sum(depth_widths(model)[2:4])
    assert encoder.key != load_encoder(folder, depths=(3, 2)).key != load_encoder(folder).key
    patches = load_encoder(folder, depths=(2, 3), pool="patch")
    assert patches(tiles).shape == (3, (32 // patches.spec.patch) ** 2, encoder.spec.dim)


def test_layers_and_rates():
    model = build_backbone("xcit_nano_12_p16_224")
    layers = parameter_layers(model)
    assert layers.keys() == dict(model.named_parameters()).keys()
    assert layers["cls_token"] == layers["patch_embed.proj.0.0.weight"] == 0 and layers["blocks.0.norm1.weight"] == 1
    rates = layer_rates(model, 0.5, 0.2)
    last = max(layers.values())
    assert rates["norm.weight"] == 1 and rates["blocks.0.norm1.weight"] == 0.5 ** (last - 1)
    assert rates["cls_token"] == pytest.approx(0.2 * 0.5**last)
    assert set(layer_rates(model, 1.0).values()) == {1.0}
    with pytest.raises(BadInput, match="nothing would learn"):
        freeze_first_layers(model, last + 1)


def test_rates_of_the_optimiser(tmp_path, weights):
    from histonb.pretrain.trainer import Trainer

    c = resolve(PretrainConfig(str(tmp_path), **TINY | {"layer_decay": 0.5, "embed_lr": 0.1}), 8)
    trainer = Trainer(c, 8)
    trainer._set_rates({"lr": 1.0, "weight_decay": 0.1})
    rates = layer_rates(trainer.student.backbone, 0.5, 0.1)
    names = {id(p): name for name, p in trainer.student.backbone.named_parameters()}
    for group in trainer.optimiser.param_groups:
        for p in group["params"]:
            assert group["lr"] == pytest.approx(rates.get(names.get(id(p)), 1.0))
    assert sum(len(g["params"]) for g in trainer.optimiser.param_groups) == sum(
        p.requires_grad for p in trainer.student.parameters()
    )


def test_the_rate_grows_with_the_root_of_the_batch():
    c = dataclasses.replace(
        preset("tiny", out="x", lr=1e-3, lr_rule="sqrt", batch_size=256, warmup_epochs=0.0), steps=10
    )
    assert schedules(c, 1024)["lr"][0] == pytest.approx(5e-4)


def test_a_density_of_another_width():
    x = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1)
    assert regulariser_loss(x, "kde", kappa=10.0)[0] == kde(x[0], 10.0) != kde(x[0])


def test_the_pull_is_decay_towards_the_start():
    layer = torch.nn.Linear(3, 3)
    pull = StartPull(layer, {id(layer.bias): 0.5})
    start = [p.detach().clone() for p in layer.parameters()]
    with torch.no_grad():
        for p in layer.parameters():
            p += 2
    pull(0.1)
    assert torch.allclose(layer.weight, start[0] + 1.8) and torch.allclose(layer.bias, start[1] + 1.9)


def run(folder, weights, **changes):
    return pretrain(PretrainConfig(str(folder), weights=weights, **TINY | changes), Tiles(), restart=True)


def state(folder):
    return torch.load(max((folder / "checkpoints").iterdir()), weights_only=True)


def test_a_run_from_weights_keeps_what_they_were(tmp_path, weights, capsys):
    name, model = weights
    out = run(
        tmp_path / "run", name, lr=1e-9, min_lr=1e-12, weight_decay=0.0, weight_decay_end=0.0, batch_norm="frozen"
    )
    assert "test_efficientnet from" in capsys.readouterr().out
    record = json.loads((out / "start.json").read_text())
    assert record["digest"] and record["mean"] == [0.7, 0.5, 0.7] and record["missing"] == 0
    about = json.loads((out / "backbone.json").read_text())
    assert about["mean"] == [0.7, 0.5, 0.7] and about["start"]["digest"] == record["digest"]
    after = load_encoder(str(out)).model.state_dict()
    for key, value in model.state_dict().items():
        assert torch.allclose(after[key].float(), value.float(), atol=1e-6), key  # nothing learnt, no statistics moved
    with pytest.raises(BadInput, match="weights of test_efficientnet, not of test_vit"):
        run(tmp_path / "other", name, arch="test_vit")
    assert not (tmp_path / "other").exists()


def test_statistics_move_unless_they_are_frozen(tmp_path, weights):
    name, model = weights
    moved = {}
    for how in ("train", "frozen"):
        student = state(run(tmp_path / how, name, batch_norm=how))["student"]
        moved[how] = not torch.equal(student["backbone.bn1.running_mean"], model.bn1.running_mean)
    assert moved == {"train": True, "frozen": False}


def test_what_stands_still(tmp_path, weights):
    name, model = weights
    first = state(run(tmp_path / "first", name, freeze_layers=2))["student"]
    assert torch.equal(first["backbone.conv_stem.weight"], model.conv_stem.weight)
    assert not torch.equal(first["backbone.conv_head.weight"], model.conv_head.weight)
    alone = state(run(tmp_path / "alone", name, freeze_backbone_epochs=2.0))["student"]
    assert torch.equal(alone["backbone.conv_head.weight"], model.conv_head.weight)


def test_a_strong_pull_holds_the_start(tmp_path, weights):
    name, model = weights
    distances = {}
    for pull in (0.0, 1e3):
        student = state(run(tmp_path / f"{pull}", name, start_pull=pull, lr=0.032, min_lr=5e-4))["student"]
        distances[pull] = (student["backbone.conv_head.weight"] - model.conv_head.weight).norm()
    assert distances[1e3] < 0.7 * distances[0.0]


def test_a_stopped_run_goes_on_without_the_weights(tmp_path, weights):
    name, _ = weights
    options = dict(start_pull=1.0, layer_decay=0.8, batch_norm="frozen", depths=(1, 2), checkpoint_every=1)
    whole = run(tmp_path / "whole", name, **options)
    config = PretrainConfig(str(tmp_path / "stopped"), weights=name, **TINY | options)

    def stop_once(step, backbone):
        (tmp_path / "stopped" / "stop").touch()

    from histonb.training.loop import Stopped

    with pytest.raises(Stopped):
        pretrain(config, Tiles(), on_epoch=stop_once)
    shutil.rmtree(name)
    out = pretrain(config, Tiles())
    a, b = state(whole), state(out)
    assert a["step"] == b["step"]
    for key in a["student"]:
        assert torch.equal(a["student"][key], b["student"][key]), key
    assert json.loads((out / "backbone.json").read_text())["depths"] == [1, 2]
    assert load_encoder(str(out)).spec.dim == sum(depth_widths(build_backbone("test_efficientnet"))[1:3])


def test_depths_and_masked_patches_do_not_go_together(tmp_path):
    config = PretrainConfig(
        str(tmp_path), **TINY | {"arch": "vit_tiny_patch16_224", "depths": (3, 11), "patch_weight": 1.0}
    )
    with pytest.raises(BadInput, match="with patch_weight the head reads the end"):
        resolve(config, 8)
