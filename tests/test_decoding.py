"""Decoding: metrics against hand-worked values and reference libraries, the pitfall of the Bony report's error,
training, memory, and input that must be refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import f1_score, jaccard_score
from torch.nn import functional as F

from histonb.core.errors import BadInput
from histonb.models.decoders import MaskDecoder, MLPClassifier, PatchSegmenter
from histonb.probe import decoder_scores as scoring
from histonb.probe import dense_probes as decoding
from histonb.probe.decoder_scores import MASK_METRICS, Constant, mask_counts, mask_scores
from histonb.probe.encoders import load_encoder
from histonb.probe.features import cache_paths, extract, load_features
from histonb.slides.labels import IGNORE, LABELS

pytestmark = pytest.mark.usefixtures("one_thread")


def toy(n=48, seed=0, size=32):
    """Masks of a left and a right class, tokens (n, 16, 5) that show them, vectors (n, 10) that name them, images,
    slides of six tiles."""
    rng = np.random.default_rng(seed)
    left = rng.integers(0, 5, n)
    right = rng.integers(0, 5, n)
    cut = rng.integers(8, 24, n)
    masks = (
        np.where(np.arange(size) < cut[:, None], left[:, None], right[:, None])[:, None]
        .repeat(size, 1)
        .astype(np.uint8)
    )
    tokens = (masks[..., None] == np.arange(5)).reshape(n, 4, 8, 4, 8, 5).mean((2, 4)).reshape(n, 16, 5) + rng.normal(
        0, 0.1, (n, 16, 5)
    )
    vectors = np.concatenate([np.eye(5)[left], np.eye(5)[right]], 1) + rng.normal(0, 0.1, (n, 10))
    images = (masks[..., None] * np.array([50, 30, 10])).astype(np.uint8)
    return masks, tokens.astype(np.float16), vectors.astype(np.float32), images, np.arange(n) // 6


TRAIN = np.arange(24)
VAL = np.arange(24, 36)
TEST = np.arange(36, 48)
QUICK = dict(epochs=3, batch_size=8, lr=5e-3)


# the decoders themselves


def restated(dim, channels=1):
    "The decoder of the Bony report's figure 21, layer by layer; independent of ours."
    layers = [torch.nn.Linear(dim, 256 * 7 * 7), torch.nn.Unflatten(1, (256, 7, 7))]
    for a, b in ((256, 128), (128, 64), (64, 32), (32, 16)):
        layers += [
            torch.nn.ConvTranspose2d(a, b, kernel_size=3, stride=2, padding=1, output_padding=1),
            torch.nn.BatchNorm2d(b),
            torch.nn.ReLU(),
        ]
    last = torch.nn.ConvTranspose2d(16, channels, kernel_size=3, stride=2, padding=1, output_padding=1)
    return torch.nn.Sequential(*layers, last, torch.nn.Sigmoid())


@pytest.mark.parametrize("channels", [1, 3])
def test_mask_decoder_is_that_of_figure_21(channels):
    "Images, gradients and running statistics of the figure's layers; 392,545 parameters after `fc`; 224 px in 0..1."
    torch.manual_seed(0)
    ours = MaskDecoder(64, channels)
    theirs = restated(64, channels)
    named = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    assert list(named)[:2] == ["fc.weight", "fc.bias"]
    ours.load_state_dict(named)
    x = torch.randn(3, 64)
    out = ours(x)
    wanted = theirs(x)
    assert out.shape == (3, channels, 224, 224) and 0 < out.min() and out.max() < 1
    assert torch.allclose(out, wanted, atol=1e-6)
    (out**2).mean().backward()
    (wanted**2).mean().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)
    ours.eval(), theirs.eval()
    assert torch.allclose(ours(x), theirs(x), atol=1e-6) and torch.allclose(ours(x[1:2]), ours(x)[1:2], atol=1e-6)
    if channels == 1:
        assert sum(p.numel() for p in ours.decode.parameters()) == 392_545


def test_classifier_has_the_reports_widths():
    "7192, 2048, 512 and 128 by default: 45,312,285 parameters on the 4096 scores."
    with torch.device("meta"):
        model = MLPClassifier(4096)
    assert [m.out_features for m in model if isinstance(m, torch.nn.Linear)] == [7192, 2048, 512, 128, 5]
    assert sum(p.numel() for p in model.parameters()) == 45_312_285


@pytest.mark.parametrize("grid, size", [(14, 224), (7, 224), (16, 224), (4, 32), (14, 56)])
def test_segmenter_shapes(grid, size):
    model = PatchSegmenter(12, 4, grid, size, width=32).eval()
    x = torch.randn(2, grid * grid, 12)
    assert model(x).shape == (2, 4, size, size)
    assert torch.allclose(model(x[1:]), model(x)[1:], atol=1e-5)


def test_grids_that_are_not_as_large_as_the_tile():
    "Seven patches of 16 on 100 pixels are cut at its edge, six repeat their last row; whole patches are unchanged."
    span = decoding.grid_span(49, 16, 100)
    assert (span, decoding.grid_span(36, 16, 100), decoding.grid_span(196, 16, 224)) == (1.12, 0.96, 1.0)
    x = torch.randn(2, 49, 6)

    def made(size, grid=7, span=1.0):
        torch.manual_seed(0)
        return PatchSegmenter(6, 3, grid, size, width=32, span=span).eval()

    assert torch.allclose(made(100, span=span)(x), made(112)(x)[..., :100, :100], atol=1e-5)
    padded = made(100, 6, 0.96)(x[:, :36])
    whole = made(96, 6)(x[:, :36])
    assert (
        padded.shape == (2, 3, 100, 100)
        and torch.allclose(padded[..., :96, :96], whole, atol=1e-5)
        and torch.equal(padded[..., 99, :96], padded[..., 95, :96])
    )
    masks, tokens, _, _, _ = toy()
    a, b = (decoding.fit_segmenter(tokens, masks, TRAIN, VAL, **QUICK, **k) for k in ({}, {"span": 1.25}))
    assert a(tokens[:2]).shape == b(tokens[:2]).shape and a.history != b.history


def test_segmenter_keeps_places():
    "Tokens mirrored left to right give mirrored scores, where the kernels are symmetric."
    torch.manual_seed(0)
    model = PatchSegmenter(6, 3, 4, 32, width=32)
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.weight.data = (m.weight.data + m.weight.data.flip(-1)) / 2
    x = torch.randn(1, 4, 4, 6)
    assert torch.allclose(model(x.flip(2).flatten(1, 2)), model(x.flatten(1, 2)).flip(-1), atol=1e-5)


# losses


def test_the_trap():
    "The study's error of zero is at most 2.5e-4, whatever the mask; pixels to ignore do not count."
    rng = np.random.default_rng(0)
    zero = torch.zeros(4, 1, 8, 8)
    for top in range(1, 5):
        ids = torch.from_numpy(rng.integers(0, top + 1, (4, 8, 8)).astype(np.uint8))
        assert 0 < decoding.code_mse(zero, ids) <= (top / 255) ** 2 <= decoding.ZERO_BOUND < 2.5e-4
    assert decoding.code_mse(zero, torch.full((4, 8, 8), 4, dtype=torch.uint8)).item() == pytest.approx(
        decoding.ZERO_BOUND
    )
    half = torch.full((1, 1, 1, 4), 3 / 255)
    ids = torch.tensor([[[3, 1, IGNORE, IGNORE]]], dtype=torch.uint8)
    assert decoding.code_mse(half, ids).item() == pytest.approx((2 / 255) ** 2 / 2)
    assert decoding.code_mse(half, torch.full((1, 1, 4), IGNORE)).item() == 0


def test_soft_dice_by_hand():
    p = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.1, 0.4, 0.7, 0.8], [0, 0, 0, 0]]).view(1, 3, 1, 4)
    scores = (p + 1e-12).log()
    ids = torch.tensor([[[0, 0, 1, IGNORE]]])
    want = (
        2 * (0.9 + 0.6) / (0.9 + 0.6 + 0.3 + 2) + 2 * 0.7 / (0.1 + 0.4 + 0.7 + 1)
    ) / 2  # class 2 is not there, the last pixel does not count
    assert decoding.class_dice(scores, ids).item() == pytest.approx(want, abs=1e-6)
    ce = -np.log([0.9, 0.6, 0.7]).mean()
    assert decoding.ce_dice(scores, ids).item() == pytest.approx(ce + 1 - want, abs=1e-5)
    assert F.cross_entropy(scores, ids, ignore_index=IGNORE).item() == pytest.approx(ce, abs=1e-5)


def test_soft_dice_ends():
    ids = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    sure = F.one_hot(ids, 5).permute(0, 3, 1, 2) * 60.0
    assert decoding.class_dice(sure, ids).item() == pytest.approx(1, abs=1e-6)
    assert decoding.class_dice(sure.roll(1, 1), ids).item() == pytest.approx(0, abs=1e-6)
    nothing = torch.zeros(1, 5, 4, 4, requires_grad=True)
    value = decoding.ce_dice(nothing, torch.full((1, 4, 4), IGNORE))
    value.backward()
    assert value.item() == 0 and torch.isfinite(nothing.grad).all()


# figures


@pytest.fixture
def scored():
    "Random scores on random masks with pixels to ignore: model, features, masks, slides."
    rng = np.random.default_rng(1)
    masks = rng.choice(np.uint8([0, 1, 2, 3, IGNORE]), (18, 12, 12), p=[0.4, 0.3, 0.15, 0.05, 0.1])
    called = np.where(rng.random(masks.shape) < 0.6, masks, rng.integers(0, 5, masks.shape)) % 5
    outputs = np.eye(5, dtype=np.float32)[called].transpose(0, 3, 1, 2)
    return (
        (lambda x: outputs[x[:, 0].astype(int)]),
        np.arange(18.0)[:, None],
        masks,
        called,
        np.repeat(list("abcdef"), 3),
    )


def test_dice_and_iou_against_scikit_learn(scored):
    model, x, masks, called, slide = scored
    result = mask_scores(mask_counts(model, x, masks, range(18), batch_size=5), slide)
    keep = masks != IGNORE
    for figure, theirs in {"dice": f1_score, "iou": jaccard_score}.items():
        want = theirs(masks[keep], called[keep], average=None, labels=range(5), zero_division=0)
        got = [result[f"class_{figure}"][LABELS[c]]["value"] for c in range(5)]
        assert np.allclose(got[:4], want[:4]) and np.isnan(got[4])  # gleason5 is nowhere in the truth
        assert result[figure]["value"] == pytest.approx(want[:4].mean())
    assert result["mse"]["value"] == pytest.approx((((called - masks.astype(float)) / 255)[keep] ** 2).mean())
    assert np.array_equal(np.sum(result["confusion"]), keep.sum())


def test_figures_by_tile(scored):
    model, x, masks, called, slide = scored
    counts = mask_counts(model, x, masks, range(18))
    result = mask_scores(counts, slide)
    per_tile = []
    per_class = {c: [] for c in range(4)}
    for m, k in zip(masks, called):
        keep = m != IGNORE
        there = np.unique(m[keep])
        dice = f1_score(m[keep], k[keep], average=None, labels=there)
        per_tile.append(dice.mean())
        for c, d in zip(there, dice):
            per_class[c].append(d)
    assert np.allclose(scoring.tile_dice(counts), per_tile)
    assert result["tile_dice"]["value"] == pytest.approx(np.mean(per_tile))
    for c in range(4):
        assert result["class_tile_dice"][LABELS[c]]["value"] == pytest.approx(np.mean(per_class[c]))


def test_by_hand():
    dice, iou = scoring.dice_and_iou([[6, 2], [1, 3]])
    assert np.allclose(dice, [12 / 15, 6 / 9]) and np.allclose(iou, [6 / 9, 3 / 6])


def test_intervals_draw_slides(scored):
    "The interval is that of whole slides: the middle 95% of figures of resampled slides, worked out apart."
    model, x, masks, _, slide = scored
    counts = mask_counts(model, x, masks, range(18))
    result = mask_scores(counts, slide, n_boot=300, seed=5)
    times = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=300)
    by_slide = counts["confusion"].reshape(6, 3, 5, 5).sum(1)
    draws = [np.nanmean(scoring.dice_and_iou((t[:, None, None] * by_slide).sum(0))[0]) for t in times]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (result["dice"]["low"], result["dice"]["high"]) == (pytest.approx(low), pytest.approx(high))
    twice = {
        k: np.repeat(v, 4, 0) for k, v in counts.items()
    }  # the same tiles four times, in the same slides: no more certain
    again = mask_scores(twice, np.repeat(slide, 4), n_boot=300, seed=5)
    for m in MASK_METRICS:
        assert again[m]["low"] == pytest.approx(result[m]["low"]) and again[m]["high"] == pytest.approx(
            result[m]["high"]
        )


def test_one_slide_has_no_interval(scored):
    model, x, masks, _, _ = scored
    result = mask_scores(mask_counts(model, x, masks, range(18)), ["s"] * 18)
    assert np.isfinite(result["dice"]["value"]) and np.isnan(result["dice"]["low"]) and "no interval" in result["note"]
    assert "[" not in scoring.score_table({"x": result})["dice"]["x"]


def test_complete_resamples():
    "A class on one slide only, the better drawn one: without it the mean is that of the other alone, below all others."
    confusion = np.zeros((10, 2, 2), int)
    confusion[:, 0] = [2, 8]
    confusion[0, 1] = [0, 30]
    counts = {"confusion": confusion, "error": np.zeros(10)}
    loose, strict = (mask_scores(counts, np.arange(10), ["a", "b"], complete=c)["dice"] for c in (False, True))
    assert loose["value"] == strict["value"] == pytest.approx((40 / 120 + 60 / 140) / 2)
    assert loose["low"] == pytest.approx(1 / 3) and strict["low"] == pytest.approx(strict["value"])


def test_repeats(scored):
    model, x, masks, _, slide = scored
    one = mask_counts(model, x, masks, range(18))
    other = mask_counts(
        Constant(np.eye(5, dtype=np.float32)[0][:, None, None].repeat(12, 1).repeat(12, 2)), x, masks, range(18)
    )
    both = mask_scores([one, other], slide)
    assert both["repeats"]["dice"] == [mask_scores(c, slide)["dice"]["value"] for c in (one, other)] and both["n"] == 18
    assert min(both["repeats"]["dice"]) < both["dice"]["value"] < max(both["repeats"]["dice"])
    same = mask_scores([one, one, one], slide)
    for m in MASK_METRICS:
        assert same[m] == pytest.approx(mask_scores(one, slide)[m])


def test_one_channel_calls_the_nearest_class():
    values, ids = scoring.decode_output(np.array([0, 1.4, 1.6, 4.2, 200], np.float32).reshape(1, 1, 1, 5) / 255)
    assert ids.ravel().tolist() == [0, 1, 2, 4, 4] and values.ravel()[1] == pytest.approx(1.4 / 255)


def test_images_against_scikit_image():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 24, 24, 3), np.uint8)
    drawn = rng.random((5, 3, 24, 24), np.float32)
    errors = scoring.image_errors(
        lambda x: drawn[x[:, 0].astype(int)], np.arange(5.0)[:, None], images, range(5), batch_size=2
    )
    for (mse, psnr, ssim), image, d in zip(errors, images / 255, drawn.transpose(0, 2, 3, 1)):
        assert mse == pytest.approx(((image - d) ** 2).mean(), rel=1e-5) and psnr == pytest.approx(
            -10 * np.log10(mse), rel=1e-4
        )
        assert psnr == pytest.approx(peak_signal_noise_ratio(image, d.astype(float), data_range=1), rel=1e-4)
        assert ssim == pytest.approx(
            structural_similarity(image, d.astype(float), channel_axis=-1, data_range=1), abs=1e-4
        )
    result = scoring.image_scores(errors, list("aabbb"))
    assert [result[k]["value"] for k in scoring.IMAGE_METRICS] == pytest.approx(errors.mean(0).tolist())
    assert result["psnr"]["low"] <= result["psnr"]["value"] <= result["psnr"]["high"] and result["n_groups"] == 2


def test_blur():
    tile = np.zeros((33, 33, 3), np.uint8)
    tile[16, 16] = 255
    assert np.array_equal(scoring.blur_tile(tile, 0), tile)
    soft = scoring.blur_tile(tile, 2.0)
    assert soft[16, 16, 0] == pytest.approx(255 / (2 * np.pi * 4), abs=1.5) and np.array_equal(
        soft, soft.transpose(1, 0, 2)
    )


# baselines


def test_baselines():
    masks, _, vectors, images, _ = toy()
    counts = decoding.class_counts(masks, TRAIN)
    found = scoring.mask_baselines(counts)
    assert found["train mean"].output[0, 3, 3] == pytest.approx(masks[TRAIN].mean() / 255)
    votes = np.stack([np.bincount(column, minlength=5).argmax() for column in masks[TRAIN].reshape(24, -1).T]).reshape(
        32, 32
    )
    assert np.array_equal(found["majority by pixel"].output.argmax(0), votes)
    errors = {
        name: mask_scores(mask_counts(m, vectors, masks, TRAIN), TRAIN)["mse"]["value"] for name, m in found.items()
    }
    assert errors["train mean"] < errors["zero"] < decoding.ZERO_BOUND  # the mean is the best constant
    assert np.allclose(
        scoring.mean_image(images, TRAIN).output, images[TRAIN].mean(0).transpose(2, 0, 1) / 255, atol=1e-6
    )


def test_counts_leave_out_what_is_to_be_ignored():
    masks = np.full((3, 4, 4), IGNORE, np.uint8)
    masks[0, 0, 0] = 2
    counts = decoding.class_counts(masks, range(3))
    assert counts.sum() == 1 and counts[2, 0, 0] == 1
    with pytest.raises(BadInput, match="no gradable pixel"):
        scoring.mask_baselines(counts * 0)
    with pytest.raises(BadInput, match="tile 1 has class ids 7"):
        decoding.class_counts(np.full((2, 4, 4), [[[0]], [[7]]], np.uint8), range(2))


# training


def test_features_that_show_the_mask_are_read():
    masks, tokens, vectors, images, slide = toy()
    fitted = decoding.fit_segmenter(tokens, masks, TRAIN, VAL, epochs=20, batch_size=4, lr=5e-3)
    dice = mask_scores(mask_counts(fitted, tokens, masks, TEST), slide[TEST])["dice"]["value"]
    lost = scoring.mask_baselines(decoding.class_counts(masks, TRAIN))["majority by pixel"]
    assert dice > 0.7 > 0.4 > mask_scores(mask_counts(lost, tokens, masks, TEST), slide[TEST])["dice"]["value"]
    drawn = decoding.fit_reconstructor(tokens, images, TRAIN, VAL, epochs=15, batch_size=4, lr=5e-3)
    errors = {
        name: scoring.image_errors(m, tokens, images, TEST)[:, 0].mean()
        for name, m in (("drawn", drawn), ("mean", scoring.mean_image(images, TRAIN)))
    }
    assert errors["drawn"] < 0.4 * errors["mean"]


@pytest.mark.parametrize("kind", ["study", "sound", "images"])
def test_seeds_and_workers(kind):
    masks, tokens, vectors, images, _ = toy()
    x, targets, fit = {
        "study": (vectors, masks, decoding.fit_mask_decoder),
        "sound": (tokens, masks, decoding.fit_segmenter),
        "images": (vectors, images, decoding.fit_reconstructor),
    }[kind]
    first, again, other, workers = (
        fit(x, targets, TRAIN, VAL, **QUICK, **k) for k in ({}, {}, {"seed": 1}, {"workers": 1})
    )
    assert first.history == again.history == workers.history and np.array_equal(first(x[TEST]), again(x[TEST]))
    assert first.history != other.history
    assert first(x[TEST]).shape == (12, {"study": 1, "sound": 5, "images": 3}[kind], 32, 32)


def test_stops_early_with_the_best_weights():
    masks, tokens, _, _, _ = toy()
    noise = np.random.default_rng(0).normal(size=tokens.shape).astype(np.float16)
    fitted = decoding.fit_segmenter(noise, masks, TRAIN, VAL, epochs=60, patience=3, batch_size=4, lr=1e-2)
    losses = [h["val_loss"] for h in fitted.history]
    assert len(losses) == fitted.best_epoch + 4 < 60 and np.argmin(losses) == fitted.best_epoch
    total = sum(
        decoding.ce_dice(torch.from_numpy(fitted(x.numpy())), y).item() * len(y)
        for x, y in decoding.feature_batches(noise, masks, VAL, 4)
    )
    assert total / len(VAL) == pytest.approx(losses[fitted.best_epoch], rel=1e-4)


def test_test_rows_are_never_read():
    masks, tokens, _, _, _ = toy()

    class Watched:
        def __init__(self, array):
            self.array = array
            self.ndim = array.ndim
            self.shape = array.shape
            self.seen = set()

        def __len__(self):
            return len(self.array)

        def __getitem__(self, i):
            self.seen.update(np.atleast_1d(i).tolist())
            return self.array[i]

    x = Watched(tokens)
    y = Watched(masks)
    decoding.fit_segmenter(x, y, TRAIN, VAL, **QUICK)
    assert x.seen == {*TRAIN, *VAL} and y.seen == {*TRAIN, *VAL, 0}


def test_memory_is_that_of_a_batch(tmp_path):
    "Features of 300 MB on disk: what is asked of them at once stays within a few megabytes, and so do targets."
    path = tmp_path / "features.npy"
    n = 3000
    shape = (16, 3200)
    big = np.lib.format.open_memmap(path, "w+", np.float16, (n, *shape))  # a sparse file of zeros

    class Meter:
        def __init__(self, array):
            self.array, self.ndim, self.shape, self.most = array, array.ndim, array.shape, 0

        def __len__(self):
            return len(self.array)

        def __getitem__(self, i):
            out = self.array[i]
            self.most = max(self.most, out.nbytes)
            return out

    masks = toy(n)[0]
    x = Meter(np.load(path, mmap_mode="r"))
    y = Meter(masks)
    mean, std = decoding.feature_scale(x, np.arange(n))
    assert mean.shape == (3200,) and (std == 1).all() and x.most < 8e6 < big.nbytes / 30
    x.most = 0
    batch = next(iter(decoding.feature_batches(x, y, np.arange(n)[::-1], batch_size=4)))
    assert batch[0].shape == (4, *shape) and x.most == 2 * np.prod(shape) and y.most == 32 * 32
    mask_counts(lambda f: np.zeros((len(f), 1, 32, 32), np.float32), x, y, np.arange(40), batch_size=4)
    assert x.most == 2 * np.prod(shape)


# what is refused


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda x, y, t, v: (x[:-1], y, t, v), "47 rows for 48 targets"),
        (lambda x, y, t, v: (x, y, t, []), "val: this part has no tile"),
        (lambda x, y, t, v: (x, y, np.zeros(48, bool), v), "train: this part has no tile"),
        (lambda x, y, t, v: (x, y, [*t, 48], v), "row 48 of 48"),
        (
            lambda x, y, t, v: (x, np.concatenate([np.minimum(y[:24], 3), y[24:]]), t, v),
            "no pixel of gleason5, which val has",
        ),
        (lambda x, y, t, v: (np.where(np.arange(48)[:, None, None] == 3, np.nan, x), y, t, v), "NaN or infinite"),
        (lambda x, y, t, v: (np.where(np.arange(48)[:, None, None] == 30, np.nan, x), y, t, v), "val loss is nan"),
        (lambda x, y, t, v: (x[:, :15], y, t, v), "15 tokens are no square grid"),
        (lambda x, y, t, v: (x[:, 0], y, t, v), "Give patch tokens"),
        (lambda x, y, t, v: (x, y[:, :, :30], t, v), "30x32 pixels"),
        (lambda x, y, t, v: (x, y + 3, t, v), "there are 5 classes"),
    ],
)
def test_segmenter_refuses(change, says):
    masks, tokens, _, _, _ = toy()
    with pytest.raises(BadInput) as e:
        decoding.fit_segmenter(*change(tokens, masks, TRAIN, VAL), **QUICK)
    assert says in str(e.value) and e.value.remedy


def test_others_refuse():
    masks, tokens, vectors, images, slide = toy()
    with pytest.raises(BadInput, match="patch tokens are for `fit_segmenter`"):
        decoding.fit_mask_decoder(tokens, masks, TRAIN, VAL)
    with pytest.raises(BadInput, match="multiple of 32"):
        decoding.fit_mask_decoder(vectors, masks[:, :20, :20], TRAIN, VAL)
    with pytest.raises(BadInput, match="at least one"):
        decoding.fit_mask_decoder(vectors, masks, TRAIN, VAL, epochs=0)
    fitted = decoding.fit_mask_decoder(vectors, masks, TRAIN, VAL, epochs=1)
    with pytest.raises(BadInput, match="9 numbers where training had 10"):
        fitted(vectors[:, :9])
    counts = mask_counts(fitted, vectors, masks, TEST)
    with pytest.raises(BadInput, match="5 groups for 12 scored tiles"):
        mask_scores(counts, slide[:5])
    with pytest.raises(BadInput, match="without a group"):
        mask_scores(counts, [None, *slide[TEST][1:]])
    with pytest.raises(BadInput, match="scored: this part has no tile"):
        mask_counts(fitted, vectors, masks, [])
    with pytest.raises(BadInput, match="which test has"):
        decoding.check_classes({"train": np.array([5, 3, 0]), "test": np.array([1, 0, 2])}, ["a", "b", "c"])


def test_features_of_other_tiles(tmp_path):
    "A cache file is taken for the tiles it was made of, and for no others."

    class Tiles:
        def __init__(self, table):
            self.table = table

        def __len__(self):
            return len(self.table)

        def __getitem__(self, i):
            return np.full((8, 8, 3), 20 * i, np.uint8), 0

    table = pd.DataFrame(
        {"slide": list("aabb"), "x": [0, 8, 0, 8], "y": 0, "level": 0, "mpp": [np.nan, np.nan, 0.5, 0.5], "label": 0}
    )
    colour = load_encoder("colour")
    features = extract(Tiles(table), colour, tmp_path)
    (path,) = cache_paths(Tiles(table), [colour], tmp_path)
    found = load_features(path, table)
    assert np.array_equal(found, features) and not found.flags.writeable
    for other, says in [
        (table[:3], "features of 4 tiles, the table has 3"),
        (table[::-1], "`slide` differs in 4 rows: row 0 has a, the table b"),
        (table.assign(y=[0, 0, 0, 9]), "`y` differs in 1 rows"),
        (table.assign(mpp=[np.nan, 0.5, 0.5, 0.5]), "`mpp` differs in 1 rows"),
    ]:
        with pytest.raises(BadInput) as e:
            load_features(path, other)
        assert says in e.value.fault and e.value.path == str(path)
    path.with_suffix(".parquet").unlink()
    with pytest.raises(BadInput, match="there is no such file"):
        load_features(path, table)


def test_pictures():
    assert scoring.best_median_worst(np.linspace(1, 0, 11)) == {"best": [0, 1], "median": [4, 5], "worst": [9, 10]}
    assert scoring.best_median_worst([np.nan, 0.5, 0.7]) == {"best": [2]}
    for n in range(3, 9):
        found = [i for at in scoring.best_median_worst(np.arange(n)).values() for i in at]
        assert len(found) == len({*found})
