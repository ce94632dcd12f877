"ViT: timm's outputs at its own size, this library's rule for other sizes, the attention, and training with DINO."

import copy
import math
from functools import partial

import numpy as np
import pytest
import timm
import torch

from histonb.core.errors import BadInput
from histonb.core.files import read_jsonl
from histonb.models import backbones
from histonb.models.backbones import build_backbone
from histonb.models.heads import DINOHead
from histonb.models.vit import VIT, class_attention, set_positions, vit
from histonb.models.xcit import xcit
from histonb.pretrain.config import PretrainConfig, resolve
from histonb.pretrain.dino import MultiCropNet, param_groups
from histonb.pretrain.pretraining import load_frozen_backbone, pretrain
from histonb.pretrain.trainer import Trainer

SMALL = "vit_tiny_patch16_224"


pytestmark = pytest.mark.usefixtures("one_thread")


def pair(name, **kwargs):
    "Ours and timm's with the same uneven weights."
    torch.manual_seed(0)
    ours = vit(name, **kwargs)
    theirs = timm.create_model(name, num_classes=0, **kwargs)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.02 * torch.randn_like(p))
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize(
    "name, kwargs",
    [
        (SMALL, {"depth": 3}),
        (SMALL, {"depth": 2, "reg_tokens": 4}),
        ("test_vit", {}),
        ("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 224}),
    ],
    ids=str,
)
def test_native_size_equals_timm(name, kwargs):
    ours, theirs = pair(name, **kwargs)
    x = torch.randn(2, 3, *ours.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (96, 160), (100, 70), (224, 230)], ids=str)
def test_sizes_are_cut_to_whole_patches(size):
    "As in DINO's ViT, whose one convolution has no padding."
    ours, _ = pair(SMALL, depth=2)
    x, (h, w) = torch.randn(2, 3, *size), (size[0] // 16 * 16, size[1] // 16 * 16)
    with torch.no_grad():
        assert ours.forward_features(x).shape == (2, 1 + h * w // 256, 192)
        assert torch.equal(ours(x), ours(x[..., :h, :w]))
        assert not torch.equal(ours(x), ours(x.flip(-1)))
    for model in (ours, xcit("xcit_nano_12_p16")):
        with pytest.raises(BadInput, match="8x32 px is smaller than a patch"):
            model(torch.zeros(2, 3, 8, 32))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224.augreg_in21k",
        "xcit_nano_12_p16_224.fb_in1k",
        "haar2d+xcit_nano_12_p16_224.fb_in1k",
        "resnet18.a1_in1k",
    ],
)
def test_a_tag_changes_nothing(name):
    "timm's tags name published weights; a network without weights is the same, and takes crops of any size."
    torch.manual_seed(0)
    tagged = build_backbone(name).eval()
    torch.manual_seed(0)
    plain = build_backbone(name.split(".")[0]).eval()
    x = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        assert type(tagged) is type(plain) and torch.equal(tagged(x), plain(x))


def test_a_tag_that_is_none_is_refused():
    with pytest.raises(BadInput, match="no such weights of timm. Did you mean `vit_tiny_patch16_224.augreg_in21k`"):
        build_backbone("vit_tiny_patch16_224.augreg_in22k")
    with pytest.raises(BadInput, match="no such backbone"):
        build_backbone("vit_tinny_patch16_224.augreg_in21k")


def test_position_codes_are_interpolated_not_cut():
    model, _ = pair(SMALL, depth=1)
    with torch.no_grad():
        model.pos_embed[:, 1:] = torch.linspace(0, 1, 14).repeat_interleave(14)[None, :, None]  # grows from row to row
        found = model._pos_embed(torch.zeros(1, 6, 6, 192))[0, 1:, 0].view(6, 6)
    assert torch.allclose(found, found[:, :1].expand(-1, 6), atol=1e-5)
    assert (found[1:, 0] > found[:-1, 0]).all() and found[0, 0] < 0.15 and found[-1, 0] > 0.85


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 4}, {"qk_norm": True}], ids=str)
def test_class_attention_is_that_of_unfused_timm(kwargs):
    model, _ = pair(SMALL, depth=2, **kwargs)
    x = torch.randn(2, 3, 96, 64)
    seen = []
    attn = model.blocks[-1].attn
    with torch.no_grad():
        tokens, ours = class_attention(model, x)
        assert torch.equal(tokens, model.forward_features(x)) and not attn._forward_pre_hooks
        attn.fused_attn = False
        attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(x)
    torch.testing.assert_close(ours, seen[0][:, :, 0], atol=1e-6, rtol=1e-5)
    assert ours.shape == (2, 3, model.num_prefix_tokens + 24)


def test_backbone_makes_vits_and_others():
    assert torch.equal(*(m(torch.ones(1, 3, 50, 40)) for m in [build_backbone("test_vit").eval()] * 2))
    assert build_backbone("resnet18")(torch.zeros(2, 3, 64, 64)).shape == (2, 512)
    with pytest.raises(BadInput, match="vit_tiny_patch16_224"):
        vit("vit_tini_patch16_224")
    assert SMALL in VIT and "resnet18" not in VIT


def test_what_weight_decay_leaves_alone():
    backbone = vit(SMALL, depth=2, reg_tokens=4, init_values=1e-5)
    net = MultiCropNet(backbone, DINOHead(192, 32, 32, 16))
    names = {id(p): name for name, p in net.named_parameters()}
    decay, rest = ({names[id(p)] for p in group["params"]} for group in param_groups(net))
    assert {
        "backbone.pos_embed",
        "backbone.cls_token",
        "backbone.reg_token",
        "backbone.blocks.0.ls1.gamma",
        "backbone.norm.weight",
    } <= rest
    assert {"backbone." + n for n in backbone.no_weight_decay() if getattr(backbone, n, None) is not None} <= rest
    assert (
        all(n.endswith(".weight") or n.endswith("original1") for n in decay)
        and "backbone.patch_embed.proj.weight" in decay
    )
    assert decay | rest | {"head.last_layer.parametrizations.weight.original0"} == set(names.values())


def test_checkpointing_gives_the_same_gradient():
    gradients = []
    for saving in (False, True):
        torch.manual_seed(0)
        model = vit(SMALL, depth=3, drop_path_rate=0.4).train()
        model.set_grad_checkpointing(saving)
        model(torch.randn(4, 3, 48, 32)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


class Tiles:
    "Eight noisy tiles of four colours."

    def __len__(self):
        return 8

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        return np.clip(np.array([200, 100 + 20 * (i % 4), 160]) + 20 * rng.standard_normal((64, 64, 3)), 0, 255).astype(
            np.uint8
        ), i % 4


@pytest.mark.parametrize("sizes", [(224, 96), (32, 16)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains(tmp_path, sizes, precision, monkeypatch):
    monkeypatch.setattr(backbones, "build_backbone", partial(build_backbone, depth=2))
    config = PretrainConfig(
        str(tmp_path),
        arch=SMALL,
        out_dim=32,
        hidden=32,
        bottleneck=16,
        n_local=2,
        global_size=sizes[0],
        local_size=sizes[1],
        batch_size=4,
        steps=4,
        precision=precision,
        device="cpu",
        workers=0,
        log_every=1,
    )
    start = {n: p.clone() for n, p in Trainer(resolve(config, 8), 8).student.backbone.named_parameters()}
    run = pretrain(config, Tiles())
    assert all(math.isfinite(row["loss"]) for row in read_jsonl(run / "log.jsonl") if "loss" in row)
    teacher = load_frozen_backbone(run)
    assert not torch.equal(teacher.pos_embed, start["pos_embed"]) and teacher(torch.zeros(1, 3, 48, 32)).shape == (
        1,
        192,
    )


# DINO's own way to resize position codes; every number comes from its published code


def test_dino_resizes_position_codes_as_its_authors_do():
    model = vit(SMALL, depth=1, positions="dino")
    steps = torch.arange(196.0).view(14, 14)
    with torch.no_grad():
        model.pos_embed[:, 1:] = torch.sin(0.7 * steps + 0.01 * steps * steps).reshape(1, 196, 1)
        model.pos_embed[:, 0] = 5.0
        model.cls_token.zero_()
    expected = {
        (96, 96): (-2.5253, [-0.02867, -1.05822, -0.20334, -0.29857, -0.06518, 0.54389, 0.46845, -0.63051, -0.57112]),
        (112, 176): (0.3581, [-0.38439, 0.04038, -0.14806, 0.03524, 0.20879, -0.47579, -0.43415, 0.42919, 0.65506]),
        (448, 230): (2.5283, [0.07456, 0.24507, -1.12257, 0.65166, -0.28772, -0.32095, 0.04015, -1.15471, 0.93078]),
        (224, 112): (1.0949, [0.28635, -0.16847, -0.6761, 0.03467, 0.14954, -0.15013, -0.54138, -0.66022, 0.28863]),
    }
    for (height, width), (total, some) in expected.items():
        a = height // 16
        b = width // 16
        with torch.no_grad():
            codes = model._pos_embed(torch.zeros(1, a, b, 192))[0, :, 0]
        corners = codes[1:].unflatten(0, (a, b))[[0, a // 2, -1]][:, [0, b // 3, -1]]
        assert codes[0] == 5 and torch.allclose(corners.flatten(), torch.tensor(some), atol=2e-5)
        assert abs(codes[1:].sum().item() - total) < 1e-3


def by_formula(model):
    "Weights that any code can write down, so that two of them can be compared without a file."
    for i, (name, p) in enumerate(sorted(model.named_parameters())):
        wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (0.37 + 0.001 * i)).float().reshape(p.shape)
        is_scale = name.endswith(("norm1.weight", "norm2.weight")) or name == "norm.weight"
        p.copy_(wave * (0.05 if p.ndim > 1 else 0.1) + is_scale)
    codes = torch.sin(torch.arange(model.pos_embed.numel(), dtype=torch.float64) * 0.11).float()
    model.pos_embed.copy_(codes.reshape(model.pos_embed.shape))
    return model.eval()


@pytest.mark.parametrize(
    "size, expected",
    [
        ((224, 224), [1.54024, 0.29589, 4.07712, 1.14654, 1.31836, 1.63475]),
        ((96, 96), [1.53851, 0.29969, 4.07339, 1.14608, 1.32169, 1.63741]),
        ((112, 176), [1.53802, 0.30096, 4.07236, 1.14607, 1.32275, 1.63824]),
        ((230, 97), [1.53854, 0.29977, 4.07346, 1.14616, 1.32175, 1.63747]),
        ((448, 448), [1.5385, 0.29954, 4.07355, 1.146, 1.3215, 1.63725]),
    ],
    ids=str,
)
def test_dinos_own_code_gives_these_features(size, expected):
    with torch.no_grad():
        model = by_formula(build_backbone(SMALL, positions="dino"))
        image = torch.cos(torch.arange(3 * 448 * 448, dtype=torch.float64) * 0.013).float().reshape(1, 3, 448, 448)
        assert torch.allclose(model(image[..., : size[0], : size[1]])[0, :6], torch.tensor(expected), atol=3e-5)


def test_positions_stay_with_the_model():
    model = vit(SMALL, depth=1, positions="dino")
    again = copy.deepcopy(model)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        model.pos_embed.normal_()
        assert not torch.allclose(model.eval()(x), again.eval()(x))  # each resizes its own codes
        again.load_state_dict(model.state_dict())
        assert torch.equal(model(x), again(x))
        plain = vit(SMALL, depth=1).eval()
        plain.load_state_dict(model.state_dict())
        own = torch.ones(1, 3, 224, 224)
        assert torch.equal(plain(own), model(own)) and not torch.allclose(plain(x), model(x))
        registers = vit("vit_small_patch14_reg4_dinov2", depth=1, img_size=224, positions="dino").eval()
        assert registers.forward_features(torch.randn(1, 3, 112, 70)).shape == (1, 5 + 8 * 5, 384)
    with pytest.raises(BadInput, match="unknown `dinov1`.*Did you mean `dino`"):
        vit(SMALL, positions="dinov1")
    with pytest.raises(BadInput, match="`dino` for XCiT, which learns none"):
        set_positions(xcit("xcit_nano_12_p16"), "dino")
