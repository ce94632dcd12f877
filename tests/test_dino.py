"DINO's parts against a plain double loop, on real backbones, and with the crops of the study."

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from histonb.core.errors import BadInput
from histonb.models.backbones import build_backbone
from histonb.models.heads import DINOHead, split_checkpoint
from histonb.pretrain.config import preset, schedules
from histonb.pretrain.dino import (
    DINOLoss,
    MultiCropNet,
    cosine_schedule,
    ema_update,
    param_groups,
    stack_crops,
    view_pairs,
)
from histonb.training.augmentation import MultiCrop


def plain_loss(student, teacher, center, teacher_temp, student_temp):
    total, pairs = 0.0, 0
    for g in range(len(teacher)):
        q = F.softmax((teacher[g] - center) / teacher_temp, -1)
        for v in range(len(student)):
            if v == g:
                continue
            total += -(q * F.log_softmax(student[v] / student_temp, -1)).sum(-1).mean()
            pairs += 1
    return total / pairs


@pytest.mark.parametrize("n_global, n_local", [(2, 8), (1, 5), (3, 0), (2, 0), (3, 2)])
def test_loss_equals_the_double_loop(n_global, n_local):
    torch.manual_seed(0)
    K, B = 32, 5
    loss = DINOLoss(K, n_global, n_local)
    center = torch.zeros(K)
    s = torch.randn(n_global + n_local, B, K, requires_grad=True)
    for _ in range(3):  # the centre of each step is the one before the update
        t = torch.randn(n_global, B, K)
        value = loss(s[loss.skip :], t, 0.05)
        assert value.item() == pytest.approx(plain_loss(s, t, center, 0.05, 0.1).item(), rel=1e-5)
        loss.update_center(t)
        center = 0.9 * center + 0.1 * t.mean((0, 1))
        assert torch.allclose(loss.center, center, atol=1e-6)
    (got,) = torch.autograd.grad(value, s)
    (want,) = torch.autograd.grad(plain_loss(s, t, (center - 0.1 * t.mean((0, 1))) / 0.9, 0.05, 0.1), s)
    assert torch.allclose(got, want, atol=1e-6)
    if n_global == 1:
        assert not got[0].any()  # no pair uses the student's view of the one global crop


def test_the_study_has_five_pairs():
    assert view_pairs(1, 5).sum() == 5
    assert DINOLoss(8, 1, 5).pairs.shape == (1, 5)
    for crops in ((1, 0), (0, 2), (0, 0)):
        with pytest.raises(BadInput, match="no pair"):
            view_pairs(*crops)


def test_old_keys_of_the_last_layer_load_strictly():
    head = DINOHead(8, 16, hidden=8, bottleneck=4)
    old = {
        "module.head."
        + k.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): v
        for k, v in head.state_dict().items()
    } | {"module.backbone.norm.weight": torch.ones(1)}
    assert {"module.head.last_layer.weight_g", "module.head.last_layer.weight_v"} < old.keys()
    other = DINOHead(8, 16, hidden=8, bottleneck=4)
    other.load_state_dict(split_checkpoint({"student": {}, "teacher": old})[1])
    z = torch.randn(3, 8)
    assert torch.equal(head(z), other(z))


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "vit_tiny_patch16_224"])
def test_every_trainable_parameter_is_in_one_group(name):
    net = MultiCropNet(build_backbone(name), DINOHead(build_backbone(name).num_features, 16, 8, 4))
    decay, free = (group["params"] for group in param_groups(net))
    assert sorted(map(id, decay + free)) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    names = {id(p): n for n, p in net.named_parameters()}
    assert not [names[id(p)] for p in decay if names[id(p)].endswith(("bias", "cls_token", "temperature", "pos_embed"))]
    assert "head.mlp.0.weight" in [names[id(p)] for p in decay]


def test_stacked_crops_give_what_single_crops_give():
    torch.manual_seed(0)
    net = MultiCropNet(build_backbone("xcit_nano_12_p16_224"), DINOHead(128, 16, 8, 4)).eval()
    samples = [[torch.randn(3, size, size) for size in (64, 64, 32, 32, 32)] for _ in range(2)]
    with torch.inference_mode():
        tokens, scores = net(stack_crops(samples))
        for b, sample in enumerate(samples):
            for v, crop in enumerate(sample):
                single = net.backbone(crop[None])[0]
                assert torch.allclose(tokens[v, b], single, atol=1e-4)
                assert torch.allclose(scores[v, b], net.head(single), atol=1e-4)


def test_teacher_statistics_follow_the_named_policy():
    student, teacher = (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)) for _ in range(2))
    student(torch.randn(64, 4) + 3)
    own = teacher[1].running_mean.clone()
    ema_update(teacher, student, 0.5)
    assert torch.equal(teacher[1].running_mean, own)
    ema_update(teacher, student, 0.5, buffers="ema")
    assert torch.allclose(teacher[1].running_mean, 0.5 * (own + student[1].running_mean))


def test_schedule_ends():
    values = cosine_schedule(0.996, 1.0, 1000, warmup=100, warmup_start=0.9)
    assert (values[0], values[100], values[-1]) == (0.9, 0.996, 1.0)
    assert (np.diff(values) >= 0).all() and len(values) == 1000
    assert math.isclose(cosine_schedule(2.0, 0.0, 101)[50], 1.0)


def test_bony_names_what_dino_does_not_say():
    "Every default of DINO's own trainer but the values of the Bony report, and Meta's rate; the temperature is .04."
    dino = dict(
        norm_last_layer=True,
        momentum=0.996,
        momentum_end=1.0,
        head_bn=False,
        teacher_temp_start=0.04,
        teacher_temp=0.04,
        teacher_temp_epochs=0.0,
        student_temp=0.1,
        center_momentum=0.9,
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip=3.0,
        clip_how="tensor",
        epochs=100.0,
        freeze_last_epochs=1.0,
        warmup_epochs=10.0,
        min_lr=1e-6,
        drop_path=0.1,
        hidden=2048,
        bottleneck=256,
    )
    report = dict(arch="xcit_medium_24_p16_224", out_dim=4096, n_global=1, n_local=5, batch_size=9600, micro_batch=100)
    c = preset("bony", out="")
    for name, value in (dino | report).items():
        assert getattr(c, name) == value, name
    assert c.lr * c.batch_size / 256 == pytest.approx(1e-3)
    crops = MultiCrop(
        c.n_global, c.n_local, c.global_size, c.local_size, c.global_scale or None, c.local_scale or None, c.recipe
    )
    assert (crops.global_scale, crops.local_scale) == ((0.4, 1.0), (0.05, 0.4))
    values = schedules(dataclasses.replace(c, steps=50, batch_size=10), 100)
    assert np.all(values["teacher_temp"] == 0.04)
