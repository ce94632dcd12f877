"U-Net, SegNet and MedT: their form, their parts against transcriptions, what they refuse, and that they learn."

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from histonb.core.errors import BadInput
from histonb.models import segnet
from histonb.models.medt import AxialAttention, MedT, MedTBranch, cut_patches, join_patches
from histonb.models.segnet import SegNet
from histonb.models.unet import UNet, check_images
from histonb.synthetic.phantom import draw_field

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "unet": lambda **kw: UNet(width=8, **kw),
    "paper's unet": lambda **kw: UNet(width=8, norm=False, **kw),
    "segnet": lambda **kw: SegNet(width=8, **kw),
    "medt": lambda **kw: MedT(width=8, heads=2, **kw),
}


def make(name, **kwargs):
    torch.manual_seed(0)
    return SMALL[name](**kwargs)


def count(model):
    return sum(p.numel() for p in model.parameters())


# All alike


@pytest.mark.parametrize("name", SMALL)
def test_scores_have_the_size_of_the_image(name):
    model = make(name, in_chans=1, num_classes=6).eval()
    x = torch.rand(2, 1, 128, 128)
    with torch.no_grad():
        maps = model.forward_features(x)
        scores = model(x)
        assert (
            maps.shape == (2, model.num_features, 128, 128)
            and scores.shape == (2, 6, 128, 128)
            and scores.isfinite().all()
        )
        torch.testing.assert_close(model.head(maps), scores)
        assert scores.min() < 0 < scores.max()  # no sigmoid, no softmax


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_that_is_trained_gets_a_gradient(name):
    model = make(name)
    model(torch.rand(2, 3, 128, 128)).square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_on_a_cpu_forward_and_backward(name):
    model = make(name)
    x = torch.rand(2, 3, 128, 128)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(x)
    assert scores.dtype == torch.bfloat16 and scores.isfinite().all()
    scores.float().square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", SMALL)
def test_weights_go_to_a_file_and_back(name, tmp_path):
    model = make(name).eval()
    other = SMALL[name]().eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


@pytest.mark.parametrize(
    "name, fits, shape, remedy",
    [
        ("unet", 16, (1, 3, 100, 224), "to 96x224 or 112x224"),
        ("unet", 16, (1, 3, 224, 8), "to 224x16."),
        ("unet", 16, (1, 3, 0, 16), "to 16x16."),
        ("segnet", 32, (1, 3, 240, 240), "to 224x224 or 256x256"),
        ("segnet", 32, (1, 3, 16, 50), "to 32x32 or 32x64"),
        ("medt", 128, (1, 3, 224, 224), "Resize to 128x128"),
        ("medt", 128, (1, 3, 128, 64), "Resize to 128x128"),
        ("medt", 128, (1, 3, 256, 256), "Resize to 128x128"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(name, fits, shape, remedy):
    model = make(name).eval()
    with pytest.raises(BadInput, match=remedy):
        model(torch.zeros(shape))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, fits, fits)).shape[2:] == (fits, fits)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(3, 128, 128), (1, 4, 128, 128), (1, 128, 128, 3)], ids=str)
def test_what_is_no_batch_of_images_is_refused(name, shape):
    with pytest.raises(BadInput, match=r"Give a batch \(B, 3, H, W\)"):
        make(name)(torch.zeros(shape))


def test_the_sizes_that_are_named_fit():
    for height in range(0, 70):
        try:
            check_images(torch.zeros(1, 1, height, 48), 1, 16)
        except BadInput as e:
            named = [int(word.split("x")[0]) for word in str(e).split("resize to ")[1].rstrip(".").split(" or ")]
            assert named == sorted({max(16, height // 16 * 16), max(16, math.ceil(height / 16) * 16)})
        else:
            assert height % 16 == 0 and height


@pytest.mark.parametrize(
    "name, steps", [("unet", 60), ("segnet", 60), pytest.param("medt", 40, marks=pytest.mark.slow)]
)
def test_four_pictures_are_learnt_by_heart(name, steps):
    side = 128 if name == "medt" else 64
    fields = [draw_field(10 + seed, pattern, size=128) for seed, pattern in enumerate((2, 3, 4, 3))]
    step = 128 // side
    images = (
        torch.tensor(np.stack([f.image[::step, ::step] for f in fields]) / 255)
        .permute(0, 3, 1, 2)
        .float()
        .sub(0.7)
        .div(0.2)
    )
    masks = torch.tensor(np.stack([f.mask[::step, ::step] > 1 for f in fields])[:, None]).float()
    torch.manual_seed(1)
    model = SegNet(width=16) if name == "segnet" else SMALL[name]()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(20):
            model(images)  # running statistics
        model.eval()
        for half in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                drawn = model(images) > 0
            assert 2 * (drawn * masks).sum() / (drawn.sum() + masks.sum()) > 0.95, f"bfloat16: {half}"


# U-Net


def test_unet_has_the_layers_of_the_paper():
    with torch.device("meta"):
        paper = UNet(norm=False)
        normed = UNet()
    layers = [m for m in paper.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) == 23 and not [m for m in paper.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.out_channels for m in layers[:10:2]] == [64, 128, 256, 512, 1024]
    assert (count(paper), count(normed)) == (31_031_745, 31_037_633)


def test_a_bridge_of_the_unet_carries_its_own_level():
    "With all maps from below silenced, the scores still know the image; with the bridge silenced too, they do not."
    model = make("unet").eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for p in model.up[-1].parameters():
            p.zero_()
        assert model(x).std() > 1e-3 and not torch.allclose(model(x[:1]), model(x[1:]))
        model.join[-1][0].weight[:, :8] = 0
        assert torch.allclose(model(x[:1]), model(x[1:]))


# SegNet


def test_segnet_has_the_encoder_of_vgg16_and_its_mirror_image():
    vgg = timm.create_model("vgg16_bn", num_classes=0).eval()
    model = SegNet().eval()
    shapes = [
        [tuple(m.weight.shape) for m in part.modules() if isinstance(m, nn.Conv2d)]
        for part in (vgg.features, model.encode, model.decode)
    ]
    assert shapes[0] == shapes[1]
    assert [(b, a, *k) for a, b, *k in shapes[0][:0:-1]] == shapes[2]
    assert count(model) == 29_443_585


def plain_pool(x):
    "2x2 max-pooling of (B, C, H, W) and the places of the maxima, written out."
    B, C, H, W = x.shape
    top = torch.empty(B, C, H // 2, W // 2)
    place = torch.empty(B, C, H // 2, W // 2, dtype=torch.long)
    for i in range(H // 2):
        for j in range(W // 2):
            windows = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(2)
            top[:, :, i, j], k = windows.max(2)
            place[:, :, i, j] = (2 * i + k // 2) * W + 2 * j + k % 2
    return top, place


def plain_unpool(x, place):
    "The inverse, written out."
    B, C, H, W = x.shape
    out = torch.zeros(B, C, 4 * H * W)
    for b in range(B):
        for c in range(C):
            out[b, c, place[b, c].flatten()] = x[b, c].flatten()
    return out.view(B, C, 2 * H, 2 * W)


def test_segnet_unpools_with_the_places_of_its_own_levels():
    model = make("segnet").eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        y = x
        places = []
        for block in model.encode:
            y, place = plain_pool(block(y))
            places.append(place)
        for block in model.decode:
            y = block(plain_unpool(y, places.pop()))
        torch.testing.assert_close(model.head(y), model(x))


def test_segnet_depends_on_the_places(monkeypatch):
    "Unpooled to the corners of the windows, the result is another one: the places are used, not merely kept."
    model = make("segnet").eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        right = model(x)
        unpool = F.max_unpool2d

        def corners(y, place, size):
            h, w = y.shape[2:]
            first = 2 * torch.arange(h)[:, None] * 2 * w + 2 * torch.arange(w)
            return unpool(y, first.expand_as(place).contiguous(), size)

        monkeypatch.setattr(segnet.F, "max_unpool2d", corners)
        assert not torch.allclose(model(x), right)


# MedT


def standardised(x, norm):
    "Batch normalisation of (N, C, ...) written out."
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean = x.mean(dims, keepdim=True)
    var = x.var(dims, unbiased=False, keepdim=True)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


def transcription(layer, x, normed):
    "Equation 2 of MedT in loops over heads and pixels; `normed`: terms are standardised where the layer does it."
    B, C, H, W = x.shape
    lines = x.permute(0, 2, 1, 3) if layer.axis == 3 else x.permute(0, 3, 1, 2)
    lines = lines.reshape(-1, C, x.shape[layer.axis])  # (N, C, L)
    N, _, L = lines.shape
    heads = layer.heads
    d = C // layer.heads
    qkv = torch.stack([layer.qkv.weight @ line for line in lines])
    if normed:
        qkv = standardised(qkv, layer.norm)
    R = layer.positions
    terms = torch.zeros(3, N, heads, L, L)
    for h in range(heads):
        part = qkv[:, h * 2 * d : (h + 1) * 2 * d]
        for i in range(L):
            for j in range(L):
                q = part[:, : d // 2, i]
                k = part[:, d // 2 : d, j]
                r = R[:, i - j + L - 1]
                terms[:, :, h, i, j] = torch.stack([(q * k).sum(1), q @ r[: d // 2], k @ r[d // 2 : d]])
    if normed:
        terms = standardised(torch.cat([*terms], 1), layer.norm_scores).view(N, 3, heads, L, L).transpose(0, 1)
    g = layer.gates
    weights = (terms[0] + g["q"] * terms[1] + g["k"] * terms[2]).softmax(-1)
    values = torch.zeros(2, N, C, L)
    for h in range(heads):
        v = qkv[:, h * 2 * d + d : (h + 1) * 2 * d]
        for i in range(L):
            for j in range(L):
                values[0, :, h * d : (h + 1) * d, i] += weights[:, h, i, j, None] * v[:, :, j]
                values[1, :, h * d : (h + 1) * d, i] += weights[:, h, i, j, None] * R[d:, i - j + L - 1]
    if normed:
        values = standardised(torch.cat([*values], 1), layer.norm_values).view(N, 2, C, L).transpose(0, 1)
    y = (g["v1"] * values[0] + g["v2"] * values[1]).view(B, -1, C, L)
    return y.permute(0, 2, 1, 3) if layer.axis == 3 else y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("heads, dim", [(1, 4), (2, 8), (4, 8)])
@pytest.mark.parametrize("normed", [False, True])
def test_axial_attention_is_the_formula_of_the_paper(axis, heads, dim, normed):
    torch.manual_seed(axis)
    x = torch.randn(2, dim, 5, 7)
    layer = AxialAttention(dim, heads, x.shape[axis], axis)
    with torch.no_grad():
        for p in [
            *layer.gates.values(),
            *layer.norm.parameters(),
            *layer.norm_scores.parameters(),
            *layer.norm_values.parameters(),
        ]:
            p.add_(0.5 * torch.randn_like(p))
        if not normed:
            layer.norm = layer.norm_scores = layer.norm_values = nn.Identity()
        torch.testing.assert_close(layer(x), transcription(layer, x, normed), atol=1e-5, rtol=1e-4)


def test_the_gates_act_on_what_is_normalised():
    "In front of the normalisation a factor would be divided away again."
    torch.manual_seed(0)
    layer = AxialAttention(8, 2, 6, 3)
    x = torch.randn(4, 8, 6, 6)
    with torch.no_grad():
        before = layer(x)
        layer.gates["v1"].mul_(2)
        layer.gates["v2"].mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.gates["q"].fill_(3.0)
        assert not torch.allclose(layer(x), 2 * before, atol=0.05)


def test_closed_gates_make_attention_blind_to_order():
    torch.manual_seed(0)
    layer = AxialAttention(8, 2, 6, 3).eval()
    x = torch.randn(2, 8, 4, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        assert not torch.allclose(layer(x[..., order]), layer(x)[..., order], atol=1e-3)
        for name in ("q", "k", "v2"):
            layer.gates[name].zero_()
        torch.testing.assert_close(layer(x[..., order]), layer(x)[..., order])


def test_pieces_come_in_reading_order_and_go_back():
    x = torch.randn(3, 2, 8, 12)
    pieces = cut_patches(x)
    assert pieces.shape == (48, 2, 2, 3) and torch.equal(join_patches(pieces), x)
    for n in range(48):
        assert torch.equal(pieces[n], x[n // 16, :, 2 * (n % 16 // 4) :, 3 * (n % 4) :][:, :2, :3])


def test_all_pieces_at_once_are_the_pieces_one_by_one():
    torch.manual_seed(0)
    branch = MedTBranch(3, 32, 8, 2, 32, (1, 2, 4, 1), True)
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        branch(cut_patches(x))  # statistics that are not the initial ones
        branch.eval()
        one_by_one = torch.zeros(2, 8, 128, 128)
        for i in range(4):
            for j in range(4):
                one_by_one[..., 32 * i : 32 * i + 32, 32 * j : 32 * j + 32] = branch(
                    x[..., 32 * i : 32 * i + 32, 32 * j : 32 * j + 32]
                )
        torch.testing.assert_close(join_patches(branch(cut_patches(x))), one_by_one, atol=1e-5, rtol=1e-4)


def test_a_piece_knows_nothing_of_the_others_but_the_global_branch_does():
    model = make("medt").eval()
    x = torch.randn(1, 3, 128, 128)
    changed = x.clone()
    changed[..., :32, :32] += 1
    with torch.no_grad():
        local, whole = (
            branch(changed) - branch(x)
            for branch in (lambda x: join_patches(model.local_branch(cut_patches(x))), model.global_branch)
        )
    assert (
        local[..., :32, :32].abs().max() > 1e-3 and local[..., 32:, :].abs().max() == local[..., 32:].abs().max() == 0
    )
    assert whole[..., 96:, 96:].abs().max() > 0


def test_gates_stay_until_they_are_trained():
    model = make("medt")
    x = torch.rand(1, 3, 128, 128)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)  # made before, with all parameters

    def step():
        before = {n: g.item() for n, g in model.gates().items()}
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return [g.item() != before[n] for n, g in model.gates().items()]

    assert len(model.gates()) == 4 * 2 * (3 + 8) and not any(step())
    model.train_gates()
    assert all(step())
    model.freeze_gates()
    assert not any(step())


@pytest.mark.parametrize(
    "fault, kwargs",
    [
        ("200 px is not a multiple of 128. Give 128 or 256", {"img_size": 200}),
        ("Give 128", {"img_size": 0}),
        ("12 channels cannot be divided among 8 heads", {"width": 12}),
        ("cannot be divided", {"heads": 0}),
    ],
)
def test_a_medt_that_cannot_be_made_says_why(fault, kwargs):
    with pytest.raises(BadInput, match=fault):
        MedT(**kwargs)


def test_medt_has_the_size_of_the_authors_but_for_what_they_never_call():
    with torch.device("meta"):
        one = MedT()
        two = MedT(num_classes=2)
        large = MedT(img_size=256)
    assert (count(one), count(two)) == (1_529_569, 1_529_586)
    longer = [
        (a.positions.shape[1] - b.positions.shape[1]) * a.positions.shape[0]
        for a, b in zip(*([m for m in net.modules() if isinstance(m, AxialAttention)] for net in (large, one)))
    ]
    assert count(large) - count(one) == sum(longer) > 0  # another size changes the positions alone
