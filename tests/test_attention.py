"Attention maps: against explicit matrices, against timm with its fused attention off, over tiles and slides."

import io
import itertools
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import tifffile
import timm
import torch

from histonb.core.errors import BadInput
from histonb.models.vit import class_attention, forward_with_attention, vit
from histonb.models.xcit import xcit
from histonb.probe.attention import View, attention_maps, available_maps, top_mass_mask, views
from histonb.probe.attention_plots import (
    overlap_vs_shifts,
    overlay,
    patch_fractions,
    plot_maps,
    plot_slide,
    slide_map,
    to_tile,
)
from histonb.probe.encoders import Encoder, EncoderSpec, load_encoder
from histonb.slides.slides import open_slide
from histonb.slides.tile_store import SlideTiles, resize_tile
from histonb.synthetic.phantom import draw_field

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def no_gradients(one_thread):
    with torch.no_grad():
        yield


def encoder_of(model, patch=16):
    "An encoder with uneven weights."
    torch.manual_seed(0)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return Encoder(
        EncoderSpec(
            "own",
            model.num_features,
            patch,
            (0.5, 0.4, 0.6),
            (0.2, 0.3, 0.25),
            getattr(model, "num_prefix_tokens", 0),
            None,
            True,
        ),
        model,
        "own",
    )


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def prepared(encoder, tiles):
    x = (torch.from_numpy(tiles).double() / 255 - torch.tensor(encoder.spec.mean).double()) / torch.tensor(
        encoder.spec.std
    ).double()
    return x.permute(0, 3, 1, 2).float()


VITS = [
    ("vit_tiny_patch16_224", {"depth": 3}),
    ("vit_tiny_patch16_224", {"depth": 3, "reg_tokens": 4}),
    ("vit_tiny_patch16_224", {"depth": 3, "qk_norm": True}),
    ("vit_tiny_patch16_224", {"depth": 3, "scale_attn_norm": True}),
    ("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 70}),
]


@pytest.mark.parametrize("name, kwargs", VITS, ids=str)
@pytest.mark.parametrize("size", [(64, 96), (100, 70)], ids=str)
def test_vit_is_timm_without_fused_attention(name, kwargs, size):
    model = vit(name, **kwargs)
    patch = model.patch_embed.patch_size[0]
    encoder = encoder_of(model, patch)
    tiles = noise(2, *size)
    (rows, columns), prefix, heads = (n // patch for n in size), model.num_prefix_tokens, model.blocks[0].attn.num_heads
    before = encoder(tiles)
    found = {
        kind: attention_maps(encoder, tiles, kind, range(len(model.blocks))).values
        for kind in ("class_attention", "token_norm")
    }
    assert np.array_equal(encoder(tiles), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for b in model.blocks for m in b.modules())
    matrices = []
    results = []
    for block in model.blocks:
        attn = block.attn
        attn.fused_attn = False
        attn.attn_drop.register_forward_pre_hook(lambda _, args: matrices.append(args[0]))
        attn.norm.register_forward_pre_hook(lambda _, args: results.append(args[0]))
    model(prepared(encoder, tiles))
    for k, matrix in enumerate(matrices):
        torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:-1]))
        expected = matrix[:, :, 0, prefix:].reshape(2, heads, rows, columns).numpy()
        np.testing.assert_allclose(
            found["class_attention"][:, heads * k : heads * (k + 1)], expected, atol=1e-6, rtol=1e-4
        )
        np.testing.assert_allclose(
            found["token_norm"][:, k], results[k][:, prefix:].norm(dim=-1).reshape(2, rows, columns).numpy(), rtol=1e-4
        )
    assert len(matrices) == len(results) == len(model.blocks)


def test_block_output_comes_from_the_maps():
    model = vit("vit_tiny_patch16_224", depth=2, reg_tokens=2)
    encoder = encoder_of(model)
    tiles = noise(1, 64, 48)
    attn = model.blocks[1].attn
    kept = {}
    attn.fused_attn = False
    hook = attn.register_forward_hook(lambda _, args, out: kept.update(x=args[0], out=out))
    tokens, row = class_attention(model, prepared(encoder, tiles), 1)
    hook.remove()
    torch.testing.assert_close(row.sum(-1), torch.ones(1, 3))
    assert np.allclose(attention_maps(encoder, tiles, blocks=1).values.reshape(1, 3, -1), row[..., 3:], atol=1e-6)
    value = attn.qkv(kept["x"]).chunk(3, -1)[2].reshape(1, 15, 3, 64)
    result = torch.einsum("bhj,bjhd->bhd", row, value).flatten(1)
    torch.testing.assert_close(attn.proj(result), kept["out"][:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_tiny_12_p8"])
@pytest.mark.parametrize("size", [(64, 96), (50, 70)], ids=str)
def test_xcit_is_timm_by_hand(name, size):
    encoder = encoder_of(xcit(name), patch := int(name[-1:].replace("6", "16")))
    theirs = timm.create_model(f"{name}_224", num_classes=0).eval()
    tiles = noise(2, *size)
    seen = {}
    theirs.load_state_dict(encoder.model.state_dict())
    layers = {("block", k): theirs.blocks[k].attn for k in (0, 6, 11)} | {
        ("class layer", k): theirs.cls_attn_blocks[k].attn for k in (0, 1)
    }
    for key, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0]}))
    rows, columns = (-(-n // patch) for n in size)
    theirs(prepared(encoder, tiles))
    for (layer, k), x in seen.items():
        attn = layers[layer, k]
        b = len(x)
        n = x.shape[1]
        h = attn.num_heads
        if layer == "class layer":
            q = attn.q(x[:, :1]).view(b, 1, h, -1).transpose(1, 2)
            key = attn.k(x).view(b, n, h, -1).transpose(1, 2)
            a = (q @ key.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]
            found = attention_maps(encoder, tiles, "class_attention", k)
            np.testing.assert_allclose(found.values, a[..., 1:].reshape(b, h, rows, columns), atol=1e-6, rtol=1e-3)
            assert str(found.views[2]) == f"class attention, class layer {k}, head 2" and found.spatial
        else:
            q, key, v = attn.qkv(x).view(b, n, 3, h, -1).permute(2, 0, 3, 4, 1)
            a = (
                q
                / q.norm(dim=-1, keepdim=True)
                @ (key / key.norm(dim=-1, keepdim=True)).transpose(-2, -1)
                * attn.temperature
            ).softmax(-1)
            channel = attention_maps(encoder, tiles, "channel", k)
            np.testing.assert_allclose(channel.values, a, atol=1e-5, rtol=1e-3)
            np.testing.assert_allclose(channel.values.sum(-1), 1, atol=1e-5)
            assert not channel.spatial and "no place in the image" in str(channel.views[0])
            length = (a @ v).pow(2).sum((1, 2)).sqrt().view(b, 1, rows, columns)
            np.testing.assert_allclose(attention_maps(encoder, tiles, "token_norm", k).values, length, rtol=1e-3)


def test_wrapped_encoders_and_half_precision():
    plain = load_encoder("random:xcit_nano_12_p16_224")
    tiles = noise(2, 64, 48)
    expected = attention_maps(plain, tiles)
    for other in (
        load_encoder("random:xcit_nano_12_p16_224", pool="class+mean"),
        load_encoder("random:xcit_nano_12_p16_224", pool="patch"),
    ):
        assert np.array_equal(attention_maps(other, tiles).values, expected.values)
    half = attention_maps(
        load_encoder("random:vit_tiny_patch16_224", bf16=True), tiles, "class_attention", (0, 11), "mean"
    )
    single = attention_maps(load_encoder("random:vit_tiny_patch16_224"), tiles, "class_attention", (0, 11), "mean")
    assert (
        half.values.dtype == np.float32
        and np.allclose(half.values, single.values, rtol=0.05)
        and half.values.sum((2, 3)).max() < 1
    )
    mixed = attention_maps(plain, tiles, views(plain, "class_attention", -1, "mean") + views(plain, "token_norm", 3))
    assert np.allclose(mixed.values[:, 0], expected.values.mean(1), atol=1e-7) and [v.kind for v in mixed.views] == [
        "class_attention",
        "token_norm",
    ]


def test_what_is_not_there_is_refused():
    ours = load_encoder("random:xcit_nano_12_p16_224")
    theirs = load_encoder("random:vit_tiny_patch16_224")
    for call, message in [
        (lambda: views(ours, "attention"), "Did you mean `class_attention`"),
        (lambda: views(theirs, "channel"), "attention is between tokens"),
        (lambda: views(ours, "class_attention", 5), "no class layer 5. Choose from 0 to 1"),
        (lambda: views(theirs, blocks=-13), "no block -13. Choose from 0 to 11"),
        (lambda: views(theirs, blocks="last"), "no block last"),
        (lambda: views(ours, heads=[0, 4]), "no head 4. Choose from 0 to 3"),
        (lambda: views(ours, "token_norm", 0, 2), "one map for all heads together"),
        (lambda: views(load_encoder("random:resnet18")), "that is an XCiT"),
        (lambda: views(load_encoder("colour")), "no attention that can be shown"),
        (
            lambda: attention_maps(ours, noise(1, 32, 32), views(ours) + views(ours, "channel")),
            "with and without a place",
        ),
        (lambda: attention_maps(ours, noise(1, 32, 32), [View("class_attention", 7, 0)]), "no class layer 7"),
        (lambda: attention_maps(ours, noise(1, 32, 32)[0]), "uint8 of shape"),
        (lambda: attention_maps(ours, noise(1, 8, 32)), "smaller than a patch"),
        (lambda: views(load_encoder("random:vit_little_patch16_reg1_gap_256")), "has no class token"),
        (lambda: top_mass_mask(np.ones((2, 2)), 60), "Give a number above 0"),
        (lambda: class_attention(theirs.model, torch.zeros(1, 3, 32, 32), 12), "from 0 to 11"),
        (
            lambda: forward_with_attention(vit("vit_small_patch16_18x2_224", depth=1), torch.zeros(1, 3, 32, 32)),
            "without one plain attention",
        ),
        (lambda: to_tile(np.ones((2, 2)), (64, 32), 16), "does not fit a tile of 64x32"),
    ]:
        with pytest.raises(BadInput) as error:
            call()
        assert message in str(error.value)
    assert (
        available_maps(load_encoder("random:vit_little_patch16_reg1_gap_256")).keys() == {"token_norm"}
        and available_maps(load_encoder("random:resnet18")) == {}
    )


def smallest(value, share):
    "How many patches hold the share, by trying every set."
    enough = share * value.sum() * (1 - 1e-12)
    return next(
        n
        for n in range(1, value.size + 1)
        if any(value.ravel()[list(c)].sum() >= enough for c in itertools.combinations(range(value.size), n))
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6, 0.95, 1.0])
def test_masks_are_the_smallest_sets(share):
    values = np.random.default_rng(0).random((4, 2, 4)) ** 4
    for value, mask in zip(values, top_mass_mask(values, share), strict=True):
        assert mask.sum() == smallest(value, share) and value[mask].sum() >= share * value.sum() * (1 - 1e-12)


def test_masks_of_zeros():
    assert top_mass_mask(np.eye(3), 1.0).sum() == 3 and top_mass_mask(np.zeros((2, 2))).sum() == 0


def test_at_the_size_of_the_tile():
    values = np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)
    large = to_tile(values, (35, 47), 8)
    mask = to_tile(values > 0.5, (35, 47), 8)
    assert large.shape == mask.shape == (2, 3, 35, 47) and mask.dtype == bool
    assert (
        np.isnan(large[..., 32:, :]).all()
        and np.isnan(large[..., 40:]).all()
        and not np.isnan(large[..., :32, :40]).any()
    )
    assert not mask[..., 32:, :].any() and np.array_equal(patch_fractions(mask, (4, 5), 8), values > 0.5)
    assert np.allclose(large[..., :32, :40].mean((2, 3)), values.mean((2, 3)), atol=1e-5)
    drawn = overlay(noise(35, 47), large[0, 0])
    assert np.array_equal(drawn[32:], noise(35, 47)[32:]) and not np.array_equal(drawn[:32], noise(35, 47)[:32])
    assert (
        np.array_equal(overlay(noise(3, 3), np.full((3, 3), np.nan)), noise(3, 3))
        and overlay(noise(3, 3), np.ones((3, 3))).dtype == np.uint8
    )


@pytest.mark.parametrize("shape", [(35, 47), (33, 41), (40, 48)], ids=str)
def test_patches_over_the_edge_are_cut_there(shape):
    "The last row and column of an XCiT's grid reach over the edge of the tile."
    rng = np.random.default_rng(0)
    values = rng.random((2, 5, 6)).astype(np.float32)
    pixels = rng.random((2, *shape)) < 0.3
    large = to_tile(values, shape, 8)
    mask = to_tile(values > 0.5, shape, 8)
    assert np.array_equal(large, to_tile(values, (40, 48), 8)[:, : shape[0], : shape[1]]) and not np.isnan(large).any()
    assert np.array_equal(mask, np.kron(values > 0.5, np.ones((8, 8), bool))[:, : shape[0], : shape[1]])
    shares = patch_fractions(pixels, (5, 6), 8)
    for y, x in itertools.product(range(5), range(6)):
        assert np.allclose(shares[:, y, x], pixels[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean((1, 2)))
    assert np.array_equal(patch_fractions(mask, (5, 6), 8), values > 0.5)
    with pytest.raises(BadInput, match="does not fit"):
        to_tile(values, (48, 48), 8)


def test_figures_are_small():
    tiles = draw_field(0, 4, 256).image[None, :224, :224]
    xcits = encoder_of(xcit("xcit_nano_12_p16", num_heads=8))
    vits = encoder_of(vit("vit_tiny_patch16_224", num_heads=6))
    for encoder, what, blocks, share in (
        (vits, "class_attention", (0, 4, 8, 11), None),
        (vits, "class_attention", (0, 4, 8, 11), 0.6),
        (xcits, "channel", (0, 4, 8, 11), None),
    ):
        fig = plot_maps(tiles[0], attention_maps(encoder, tiles, what, blocks), share=share)
        file = io.BytesIO()
        fig.savefig(file, format="jpeg", pil_kwargs={"quality": 70})
        assert len(file.getvalue()) < 100_000 and len(fig.axes) == 4 * (1 + (8 if encoder is xcits else 6))
    with pytest.raises(BadInput, match="no place"):
        plot_maps(tiles[0], attention_maps(xcits, tiles, "channel"), share=0.6)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    "A slide of two levels whose red grows to the right, and the table of its tiles."
    path = tmp_path_factory.mktemp("slide") / "one.tiff"
    image = np.zeros((512, 768, 3), np.uint8)
    image[..., 0] = np.linspace(20, 250, 768)
    image[..., 1] = np.linspace(0, 255, 512)[:, None]
    with tifffile.TiffWriter(path) as tiff:
        for level in (image, image[::2, ::2]):
            tiff.write(
                level,
                photometric="rgb",
                tile=(128, 128),
                subfiletype=int(len(level) < 512),
                compression="zlib",
                resolution=(1e4 / 0.5, 1e4 / 0.5),
                resolutionunit=3,
            )
    return path


def table_of(xy, level=0, mpp=0.5):
    return pd.DataFrame(
        {"slide": "one", "x": [x for x, _ in xy], "y": [y for _, y in xy], "level": level, "mpp": mpp, "label": 0}
    )


def red_encoder():
    "A ViT whose token norm is the mean red of the patch."
    model = vit("vit_tiny_patch16_224", depth=1)
    for p in model.parameters():
        p.zero_()
    model.patch_embed.proj.weight[0, 0], model.patch_embed.proj.weight[1, 0] = 1 / 256, -1 / 256
    model.patch_embed.proj.bias[2:4] = torch.tensor([1e3, -1e3])  # keeps the scale in the normalisation
    block = model.blocks[0]
    block.norm1.weight.fill_(1e3 * (2 / 192) ** 0.5)
    block.attn.qkv.weight[0, 0] = block.attn.qkv.weight[192, 0] = (
        1e3  # a patch attends to those of its own red: sharply to the reddest
    )
    block.attn.qkv.weight[384, 0] = 1
    return Encoder(EncoderSpec("red", 192, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1, None, True), model, "red")


@pytest.mark.parametrize("level, mpp, side", [(0, 0.5, 64), (1, 1.0, 128), (0, 1.0, 128), (0, np.nan, 64)], ids=str)
def test_tiles_lie_where_they_were(slide, level, mpp, side):
    encoder = red_encoder()
    xy = [(0, 0), (side, 0), (2 * side, 2 * side), (768 - side, 512 - side)]
    tiles = SlideTiles(table_of(xy, level, mpp), {"one": slide}, size=64)
    found = slide_map(slide, tiles, encoder, "token_norm", size=96, tile=64, batch_size=3)
    assert found.values.shape == (1, 64, 96) and found.downsample == 8 and found.image.shape == (64, 96, 3)
    n = side // 8
    covered = np.zeros((64, 96), bool)
    for i, (x, y) in enumerate(xy):
        alone = attention_maps(encoder, tiles[i][0][None], "token_norm").values[0, 0]
        there = found.values[0, y // 8 : y // 8 + n, x // 8 : x // 8 + n]
        covered[y // 8 : y // 8 + n, x // 8 : x // 8 + n] = True
        assert np.allclose(there.mean(), alone.mean(), rtol=1e-3)
        assert np.allclose(
            alone, tiles[i][0][..., 0].max() / 255, atol=0.04
        )  # attention is at the reddest patch of its tile
    assert np.array_equal(~np.isnan(found.values[0]), covered)


def test_maps_of_odd_tiles_do_not_reach_into_the_next(slide):
    "An XCiT on tiles of 90 pixels has six patches of 16 a side, 96 pixels: neighbours still meet at the tile's edge."
    encoder = load_encoder("random:xcit_nano_12_p16_224")
    table = table_of([(0, 0), (64, 0)])
    both, first, second = (
        slide_map(
            slide,
            SlideTiles(rows, {"one": slide}, lambda t: resize_tile(t, 90), size=64),
            encoder,
            "token_norm",
            size=96,
            tile=64,
        ).values[0]
        for rows in (table, table.iloc[[0]], table.iloc[[1]])
    )
    assert not (~np.isnan(first) & ~np.isnan(second)).any()
    assert np.allclose(both, np.where(np.isnan(first), second, first), equal_nan=True, rtol=1e-4)
    assert np.array_equal(~np.isnan(both), np.pad(np.ones((8, 16), bool), ((0, 56), (0, 80))))


def test_overlap_scale_and_memory(slide):
    encoder = load_encoder("random:vit_tiny_patch16_224")
    calls = []
    table = table_of([(0, 0), (32, 0), (320, 160), (400, 320)])
    tiles = SlideTiles(table, {"one": slide}, lambda t: calls.append(1) or resize_tile(t, 96), size=64)
    found = slide_map(slide, tiles, encoder, size=96, tile=64, scale="tile", batch_size=2)
    whole = found.values[0]
    assert len(calls) == 4 and np.nanmin(whole) >= 0 and np.nanmax(whole) <= 1
    first, second = (
        slide_map(
            slide,
            SlideTiles(table.iloc[[i]], {"one": slide}, lambda t: resize_tile(t, 96), size=64),
            encoder,
            size=96,
            tile=64,
            scale="tile",
        ).values[0]
        for i in (0, 1)
    )
    assert np.allclose(whole[:8, 4:8], (first + second)[:8, 4:8] / 2, atol=1e-5) and np.allclose(
        whole[:8, :4], first[:8, :4], atol=1e-5
    )
    plot_slide(found, label="vit")
    with open_slide(slide) as opened:
        assert np.allclose(
            slide_map(opened, tiles, encoder, size=96, tile=64, scale="tile").values,
            found.values,
            atol=1e-3,
            equal_nan=True,
        )
    with pytest.raises(BadInput, match="Did you mean `tile`"):
        slide_map(slide, tiles, encoder, scale="tiles")
    with pytest.raises(BadInput, match="no tile of the table is of this slide"):
        slide_map(slide, SimpleNamespace(table=table.assign(slide="two")), encoder)
    with pytest.raises(BadInput, match="no place on a slide"):
        slide_map(slide, tiles, load_encoder("random:xcit_nano_12_p16_224"), "channel")


def test_chance_is_the_mean_of_all_shifts():
    rng = np.random.default_rng(0)
    kept = rng.random((5, 3, 4)) < 0.4
    target = rng.random((5, 3, 4))
    found = overlap_vs_shifts(kept, target, draws=4000)
    shifts = [
        sum((np.roll(k, s, (0, 1)) * t).sum() for k, t in zip(kept, target, strict=True)) / kept.sum()
        for s in itertools.product(range(3), range(4))
    ]
    assert np.isclose(found["chance"], np.mean(shifts)) and np.isclose(
        found["observed"], (kept * target).sum() / kept.sum()
    )
    drawn = [
        sum((np.roll(k, rng.integers(0, (3, 4)), (0, 1)) * t).sum() for k, t in zip(kept, target, strict=True))
        / kept.sum()
        for _ in range(4000)
    ]
    assert np.allclose([found["low"], found["high"]], np.quantile(drawn, [0.025, 0.975]), atol=0.02)
    assert overlap_vs_shifts(np.zeros((1, 2, 2)), np.ones((1, 2, 2)))["observed"] == 0
