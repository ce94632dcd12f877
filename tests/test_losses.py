"Losses beyond DINO's: in micro-batches, over processes, stopped and continued, they stay the same run."

import dataclasses
import functools

import numpy as np
import pytest
import torch
from test_trainer import (
    NO_BN,
    Tiles,
    assert_same_run,
    child,
    config,
    finished,
    last_state,
    log,
    losses,
    stop_after,
    trained,
)

from histonb.core.errors import BadInput
from histonb.models.backbones import build_backbone
from histonb.models.frontends import FRONTENDS, token_pixels
from histonb.models.masking import mask_patches, token_grid
from histonb.pretrain.config import PRESETS, preset, resolve
from histonb.pretrain.dino import clip_student
from histonb.pretrain.loading import crop_loader
from histonb.pretrain.memory import estimate_memory, measure_memory
from histonb.pretrain.networks import StudentPass
from histonb.pretrain.pretraining import load_frozen_backbone, pretrain
from histonb.pretrain.regularisers import regulariser_loss, sinkhorn
from histonb.pretrain.trainer import TeacherBatch, Trainer
from histonb.training.loop import Stopped

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")

PATCHES = dict(patch_weight=1.0)
ALL = dict(
    patch_weight=1.0, regulariser_weight=0.1, regulariser_group=2, centering="sinkhorn", clip=0.1, clip_how="network"
)
LOSSES = {
    "ibot": PATCHES,
    "shared head": dict(patch_weight=1.0, patch_head="shared"),
    "koleo": dict(regulariser_weight=0.1, regulariser_group=2),
    "kde": dict(regulariser_weight=0.1, regulariser="kde", regulariser_group=4),
    "sinkhorn": dict(centering="sinkhorn"),
    "dinov2": ALL,
}


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(torch.as_tensor(x), torch.as_tensor(y), rtol=0, atol=2e-5)


@functools.cache
def trained_plainly():
    return trained(steps=5)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_and_crop_by_crop_equal_one_batch(name):
    whole = trained(**LOSSES[name], steps=5)
    assert_close(whole, trained(**LOSSES[name], steps=5, micro_batch=4))
    assert_close(whole, trained(**LOSSES[name], steps=5, micro_batch=4, per_crop_backward=True))
    assert not np.allclose(whole[0], trained_plainly()[0], rtol=0, atol=1e-4)  # the student becomes another


def test_one_large_crop():
    changes = dict(n_global=1, n_local=3, steps=5, **ALL)
    assert_close(trained(**changes), trained(**changes, micro_batch=2))


@pytest.mark.parametrize(
    "changes", [ALL, dict(**PATCHES, pool="mean", n_global=1, mask_probability=1.0)], ids=["dinov2", "one crop"]
)
def test_two_processes_equal_one_with_the_whole_batch(tmp_path, changes):
    changes = {**NO_BN, "steps": 8, "batch_size": 8, "checkpoint_every": 100, **changes}
    two = child(tmp_path / "two", processes=2, **changes)
    pretrain(config(tmp_path / "one", **changes), Tiles())
    finished(two)
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=0, atol=2e-5)
    one = last_state(tmp_path / "one")
    two = last_state(tmp_path / "two")
    for part in ("student", "teacher", "loss", "patch_loss"):
        assert all(torch.allclose(one[part][k], two[part][k], rtol=0, atol=2e-5) for k in one[part])


def test_continued_run_equals_the_whole_one(tmp_path):
    changes = dict(ALL, arch="haar2d+xcit_nano_12_p8_224", drop_path=0.2, micro_batch=2, n_local=1, steps=5)
    pretrain(config(tmp_path / "whole", **changes), Tiles())
    with pytest.raises(Stopped):
        pretrain(config(tmp_path / "parts", **changes), Tiles(), on_epoch=stop_after(3))
    pretrain(config(tmp_path / "parts", workers=1, **changes), Tiles())
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert {"patch_loss", "spread_loss"} <= log(tmp_path / "whole")[0].keys()
    assert load_frozen_backbone(tmp_path / "whole")(torch.zeros(1, 3, 32, 32)).shape == (1, 128)


def test_centres_of_crops_and_patches_are_apart(tmp_path):
    c = resolve(config(tmp_path, arch="test_vit", patch_weight=1.0, patch_head="shared"), 12)
    trainer = Trainer(c, 12)
    loader = iter(crop_loader(Tiles(), c))
    batch = next(trainer.teacher_batches(iter(crop_loader(Tiles(), c)), 0.04))
    assert len(batch.patch_scores) == int(batch.masks.sum()) > 0
    trainer.train_step(loader)
    assert torch.allclose(trainer.patch_loss.center, 0.1 * batch.patch_scores.mean(0), atol=1e-5)
    assert torch.allclose(trainer.loss.center, 0.1 * batch.scores.mean((0, 1)), atol=1e-5)
    assert not torch.allclose(trainer.patch_loss.center, trainer.loss.center, atol=1e-4)


def test_masks_depend_on_tile_and_epoch_alone():
    def first(**changes):
        c = config("", arch="test_vit", patch_weight=1.0, global_size=96, **changes)
        return next(iter(crop_loader(Tiles(), resolve(c, 12))))[-1]

    whole = first(batch_size=8)
    part = first(batch_size=8, micro_batch=2)
    assert torch.equal(whole[:, :2], part) and whole.shape == (2, 8, 6, 6)
    assert torch.equal(whole.flatten(2).sum(-1).count_nonzero(0), torch.ones(8, dtype=torch.long))  # one crop of two
    assert not torch.equal(whole, first(batch_size=8, seed=1))


def test_a_patch_head_alone_learns_nothing_of_frozen_prototypes():
    c = resolve(config("", arch="test_vit", patch_weight=1.0, freeze_last_epochs=1.0), 12)
    trainer = Trainer(c, 12)
    before = [head.last_layer.weight.clone() for head in (trainer.student.head, trainer.student.patch_head)]
    trainer.train_step(iter(crop_loader(Tiles(), c)))
    trainer.train_step(iter(crop_loader(Tiles(), c)))
    assert all(
        torch.equal(a, head.last_layer.weight)
        for a, head in zip(before, (trainer.student.head, trainer.student.patch_head), strict=True)
    )


def test_koleo_enters_as_dinov2_has_it():
    "A tenth of the sum over both large crops. DINOv2's own class gives .5539 and .5450."
    features = torch.sin(torch.arange(2 * 8 * 16.0)).view(2, 8, 16)
    assert torch.allclose(regulariser_loss(features), torch.tensor([0.5539072155952454, 0.5450376272201538]), atol=1e-6)
    c = resolve(config("", **NO_BN, batch_size=8, regulariser_weight=0.1), 12)
    trainer = Trainer(c, 12)
    trainer.parallel = lambda crops, masks, hidden: (features, torch.zeros(2, 8, c.out_dim))
    crops = [torch.zeros(2, 8, 3, 32, 32)]
    q = torch.full((2, 8, c.out_dim), 1 / c.out_dim)
    batch = TeacherBatch(crops, None, None, None, None, q)
    one = StudentPass(crops[0], first=0, large=True)
    apart = trainer.student_losses(batch, one, None)["regulariser"]
    assert c.regulariser_weight * apart.item() == pytest.approx(0.10989449173212051, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(per_crop_backward=True), dict(n_global=1, n_local=3)],
    ids=["two crops", "crop by crop", "one crop"],
)
def test_gradient_and_log_have_the_sum_over_large_crops(changes):
    c = resolve(config("", **NO_BN | dict(batch_size=4, regulariser_weight=0.7) | changes), 12)
    with_it = Trainer(c, 12)
    without = Trainer(dataclasses.replace(c, regulariser_weight=0.0), 12)
    batch = next(iter(crop_loader(Tiles(), c)))
    for trainer in (with_it, without):
        trainer._accumulate(next(trainer.teacher_batches([batch], 0.04)), 0)
    apart = regulariser_loss(with_it.student([with_it.normalise(batch[0])])[0]).sum()
    weights = [*with_it.student.backbone.parameters()]
    for p, q, g in zip(
        weights, without.student.backbone.parameters(), torch.autograd.grad(apart, weights), strict=True
    ):
        assert torch.allclose(p.grad, (0 if q.grad is None else q.grad) + 0.7 * g, atol=1e-4)
    again = Trainer(c, 12)
    assert again.train_step(iter([batch]))["spread_loss"].item() == pytest.approx(apart.item(), abs=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, dict(patch_head="shared"), dict(patch_weight=0.0)], ids=["two heads", "one head", "no patches"]
)
def test_backbone_and_heads_are_clipped_apart(changes):
    "As DINOv2's trainer does, which calls torch's `clip_grad_norm_` for each of its student's networks."
    c = resolve(config("", **dict(patch_weight=1.0, arch="vit_tiny_patch16_224") | changes), 12)
    student = Trainer(c, 12).student
    reference = Trainer(c, 12).student
    for n, (p, q) in enumerate(zip(student.parameters(), reference.parameters(), strict=True)):
        if not p.requires_grad:
            continue
        p.grad = n * torch.randn(p.shape)
        q.grad = p.grad.clone()
    networks = [
        [*reference.backbone.parameters(), *([reference.mask_token] if c.patch_weight else [])],
        [*reference.head.parameters()],
    ]
    if c.patch_weight and c.patch_head == "separate":
        networks.append([*reference.patch_head.parameters()])
    norms = torch.stack([torch.nn.utils.clip_grad_norm_(part, 3.0) for part in networks])
    assert len({round(n.item()) for n in norms}) == len(norms)  # each is scaled by a factor of its own
    assert torch.allclose(clip_student(student, 3.0, "network"), norms.norm())
    for p, q in zip(student.parameters(), reference.parameters(), strict=True):
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6)
    assert preset("dinov2", out="").clip_how == "network"


def test_sinkhorn_is_the_even_assignment_of_a_reference():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((40, 8))
    q = np.exp(scores / 0.5).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * 8
        q /= q.sum(0, keepdims=True) * 40
    assert np.allclose(sinkhorn(torch.tensor(scores), 0.5).numpy(), (q * 40).T, atol=1e-6)


@pytest.mark.parametrize("front", FRONTENDS)
@pytest.mark.parametrize("network", ["xcit_nano_12_p16_224", "vit_tiny_patch16_224"])
def test_front_ends_train_hide_and_come_back(tmp_path, front, network):
    arch = f"{front}+{network}"
    changes = dict(arch=arch, steps=1, batch_size=2, global_size=64, local_size=32, n_local=1, patch_weight=1.0)
    run = pretrain(config(tmp_path, **changes), Tiles())
    model = load_frozen_backbone(run)
    x = torch.rand(1, 3, 224, 224)
    tokens = model.forward_features(x)
    grid = token_grid(model, (224, 224))
    assert grid == ((14, 14) if front.startswith("scattering") else (7, 7)) and tokens.shape[1] == 1 + grid[0] * grid[1]
    mask = torch.zeros(1, *grid, dtype=torch.bool)
    mask[0, :2] = True
    changed = x.clone()
    changed[:, :, : 224 // grid[0] * 2] = 0.5  # two rows of tokens
    with mask_patches(model, mask, torch.zeros(tokens.shape[-1])):
        assert torch.equal(model.forward_features(x), model.forward_features(changed))


@pytest.mark.parametrize("front", ["", *(f"{name}+" for name in FRONTENDS)])
@pytest.mark.parametrize("network", ["xcit_nano_12_p8_224", "xcit_nano_12_p16_224", "vit_tiny_patch16_224"])
def test_grids_and_masks_of_any_size(front, network):
    "The grid is that of the tokens, and nothing of a masked patch reaches them, up to the edge of the image."
    model = build_backbone(front + network).eval()
    for size in ((70, 101), (67, 96), (80, 81)):
        grid = token_grid(model, size)
        x = torch.rand(1, 3, *size)
        with torch.no_grad():
            tokens = model.forward_features(x)
        assert tokens.shape[1] == 1 + grid[0] * grid[1]
        mask = torch.zeros(1, *grid, dtype=torch.bool)
        mask[0, -1], mask[0, :, -1] = True, True
        hidden = np.kron(mask[0], np.ones((token_pixels(model),) * 2, bool))[
            : size[0], : size[1]
        ]  # pixels past a whole patch stay in sight
        changed = x.clone()
        changed[:, :, : hidden.shape[0], : hidden.shape[1]][:, :, torch.from_numpy(hidden)] = 0.5
        with torch.no_grad(), mask_patches(model, mask, torch.ones(tokens.shape[-1])):
            assert torch.equal(model.forward_features(x), model.forward_features(changed))


def test_crops_of_begun_patches_train_with_hidden_ones():
    c = resolve(config("", **PATCHES, arch="xcit_nano_12_p16_224", global_size=40, local_size=24, steps=1), 12)
    trainer = Trainer(c, 12)
    batch = next(iter(crop_loader(Tiles(), c)))
    assert batch[-1].shape[-2:] == (3, 3)
    assert np.isfinite(trainer.train_step(iter([batch]))["patch_loss"])


def test_a_front_end_reads_rgb_of_a_token_at_least():
    model = build_backbone("haar3d+xcit_nano_12_p16_224").eval()
    with pytest.raises(BadInput, match="1x1 px is smaller than a token of 32"):
        model(torch.rand(1, 3, 1, 1))
    with pytest.raises(BadInput, match="RGB"):
        model(torch.rand(1, 4, 64, 64))
    with pytest.raises(BadInput, match="RGB"):
        build_backbone("haar3d+xcit_nano_12_p16_224", in_chans=4)
    with pytest.raises(BadInput, match="no such front end. Did you mean `haar3d`"):
        build_backbone("haar3+xcit_nano_12_p16_224")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.rand(1, 3, 65, 70)).isfinite().all()  # odd sides
    assert model.bfloat16()(torch.rand(1, 3, 64, 64).bfloat16()).isfinite().all()


def test_an_estimate_leaves_nothing_behind_in_scattering():
    changes = dict(out="", global_size=80, n_local=0, batch_size=2)
    estimate_memory(preset("tiny", arch="scattering+xcit_nano_12_p16_224", **changes))
    assert type(build_backbone("scattering+xcit_nano_12_p16_224").eval()(torch.rand(1, 3, 80, 80))) is torch.Tensor


def test_presets_can_be_resolved():
    for name in PRESETS:
        resolve(preset(name, out="run"), 10**6)


@pytest.mark.slow
def test_memory_of_a_patch_loss():
    changes = dict(out="", out_dim=8192, global_size=96, local_size=64, n_local=1, precision="fp32")
    plain = estimate_memory(preset("cpu", **changes))["total"]
    c = preset("cpu", **changes, patch_weight=1.0)
    estimate = estimate_memory(c)["total"]
    assert estimate > 1.05 * plain and 0.7 < estimate / measure_memory(c) < 1.2
