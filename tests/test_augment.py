"Augmentation: the same views in every process and loader, DINO's pipeline against torchvision's, a real tile."

import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.measure import label, regionprops
from skimage.segmentation import clear_border
from torch.utils.data import DataLoader, Dataset

from histonb.core.errors import BadInput
from histonb.training import augmentation as augment
from histonb.training.augmentation import (
    MultiCrop,
    Normalise,
    channel_stats,
    eval_transform,
    hed_from_rgb,
    rgb_from_hed,
    to_tensor,
)

SLIDE = Path(__file__).parents[2] / "shared/data/panda/train_images/006f6aa35a78965c92fffd1fbd53a058.tiff"


def make_tile(seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(80, 256, (28, 28, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((224, 224), Image.Resampling.BICUBIC))


def fingerprint(recipe):
    "Digest of the views of three tiles."
    crops = MultiCrop(recipe=recipe, n_local=3)
    h = hashlib.blake2b(digest_size=16)
    for i in range(3):
        for view in crops(make_tile(i), (5, 0, i)):
            h.update(view.numpy().tobytes())
    return h.hexdigest()


class Tiles(Dataset):
    def __init__(self, crops):
        self.crops = crops

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.cat([v.flatten() for v in self.crops(make_tile(i), (0, i))])


@pytest.mark.parametrize("recipe", augment.RECIPES)
def test_same_views_in_another_process(recipe):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(fingerprint, (recipe,)) == fingerprint(recipe)


def test_same_views_with_any_number_of_workers():
    crops = MultiCrop(n_global=1, n_local=2)
    alone, forked = (torch.cat(list(DataLoader(Tiles(crops), batch_size=2, num_workers=n))) for n in (0, 2))
    assert torch.equal(alone, forked)


def test_views_of_one_tile_are_independent():
    "The draws of different transforms and views must not go together."
    crops = MultiCrop(n_global=2, n_local=0, global_scale=(1.0, 1.0))
    codes = []
    stains = []
    for seed in range(300):
        for number in (0, 1):
            crops.draw(make_tile(), seed)
            turn, jitter = crops.views[number].transforms[1:3]
            codes.append(turn.params["code"])
            stains.append(jitter.params["alpha"][0])
    codes = np.array(codes).reshape(300, 2)
    stains = np.array(stains).reshape(300, 2)
    assert np.bincount(codes[:, 0], minlength=8).min() > 15  # of 37.5 expected: all eight turns occur
    for a, b in [(codes[:, 0], codes[:, 1]), (stains[:, 0], stains[:, 1]), (codes[:, 0], stains[:, 0])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2  # 3.5 standard errors
    assert np.abs(stains).max() <= 0.08 < np.abs(stains).max() + 0.002


def test_probabilities_of_the_dino_recipe():
    crops = MultiCrop(recipe="dino", n_global=2, n_local=1, global_size=16, local_size=16)
    image = make_tile()[:32, :32]
    n = 1500
    applied = {(view, type(t).__name__): 0 for view in range(3) for t in crops.views[view].transforms}
    for seed in range(n):
        crops.draw(image, seed)
        for view in range(3):
            for t in crops.views[view].transforms:
                applied[view, type(t).__name__] += bool(t.params) or (t.p == 1)
    for (view, name), p in {
        (0, "ColorJitter"): 0.8,
        (0, "GaussianBlur"): 1.0,
        (1, "GaussianBlur"): 0.1,
        (2, "GaussianBlur"): 0.5,
        (0, "Solarize"): 0.0,
        (1, "Solarize"): 0.2,
        (2, "Solarize"): 0.0,
        (2, "ColorJitter"): 0.8,
    }.items():
        assert applied[view, name] / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5 + 1e-9), (view, name)


def test_dino_transforms_equal_torchvision():
    "Colour jitter, grey and solarise do to an image what torchvision does with the same factors."
    import albumentations.augmentations.pixel.functional as F
    import torchvision.transforms.functional as T

    image = make_tile()
    pil = Image.fromarray(image)
    for ours, theirs, factors, tolerance in [
        (F.adjust_brightness_torchvision, T.adjust_brightness, (0.6, 1.4), 1),
        (F.adjust_contrast_torchvision, T.adjust_contrast, (0.6, 1.4), 2),
        (F.adjust_saturation_torchvision, T.adjust_saturation, (0.8, 1.2), 2),
        (F.adjust_hue_torchvision, T.adjust_hue, (-0.1, 0.1), 8),
    ]:
        for factor in factors:
            gap = np.abs(ours(image, factor).astype(int) - np.asarray(theirs(pil, factor)))
            assert np.percentile(gap, 99) <= tolerance, (ours.__name__, factor)
    solarize = augment.dino(1)[-1]
    assert np.array_equal(solarize.apply(image, threshold=0.5), np.asarray(T.solarize(pil, 128)))


def test_stains_of_a_real_tile():
    if not SLIDE.exists():
        pytest.skip(f"needs {SLIDE}")
    import tifffile

    level = tifffile.imread(SLIDE, level=0)
    tile = max((level[y : y + 224, x : x + 224] for y in range(0, 7000, 448) for x in range(0, 1792, 224)), key=np.std)
    assert np.abs(rgb_from_hed(hed_from_rgb(tile)).astype(int) - tile).max() <= 1
    mean, std = channel_stats([tile])
    x = to_tensor(tile, mean, std)
    assert x.mean((1, 2)).abs().max() < 1e-4 and (x.std((1, 2), correction=0) - 1).abs().max() < 1e-4
    views = MultiCrop().draw(tile, 0)
    colour = np.array([v.mean((0, 1)) for v in views])
    assert [v.shape for v in views] == [(224, 224, 3)] * 2 + [(96, 96, 3)] * 8 and np.ptp(
        colour, 0
    ).max() > 5  # the views differ in stain


@pytest.mark.parametrize("n_global,n_local", [(1, 5), (1, 0), (3, 2)])
def test_any_number_of_views(n_global, n_local):
    views = MultiCrop(n_global=n_global, n_local=n_local, global_size=64, local_size=32)(make_tile(), 0)
    assert [v.shape[-1] for v in views] == [64] * n_global + [32] * n_local


@pytest.mark.parametrize(
    "image,words",
    [
        (np.zeros((10, 10, 4), np.uint8), "shape (10, 10, 4)"),
        (np.zeros((0, 10, 3), np.uint8), "shape (0, 10, 3)"),
        (np.zeros((10, 10, 3), np.float32), "float32"),
        (Image.new("RGB", (10, 10)), "Image"),
    ],
)
def test_bad_images_are_named(image, words):
    for function in (
        to_tensor,
        eval_transform(),
        hed_from_rgb,
        lambda x: MultiCrop()(x, 0),
        lambda x: channel_stats([x]),
    ):
        with pytest.raises(BadInput) as e:
            function(image)
        assert words in str(e.value)


@pytest.mark.parametrize("recipe", ["histology", "histology-strong"])
def test_cells_keep_their_size_in_an_extended_context(recipe):
    "Round cells of 13 px on a tile of 392 px: in crops of a share of (224/392/m)**2 they are m times as large."
    low, high = 0.9, 1.1
    scale = tuple((224 / 392 / m) ** 2 for m in (high, low))
    crop = MultiCrop(recipe=recipe, global_scale=scale).views[0].transforms[0]
    y, x = np.mgrid[:392, :392]
    cell = 13
    tile = np.full((392, 392, 3), 255, np.uint8)
    tile[(x % 28 - 14) ** 2 + (y % 28 - 14) ** 2 <= (cell / 2) ** 2] = 0
    whole = regionprops(label(tile[..., 0] < 128))[0].area
    sizes, sides = [], []
    for seed in range(60):
        crop.set_random_seed(seed)
        found = regionprops(label(clear_border(crop(image=tile)["image"][..., 0] < 128)))
        sizes.append(np.sqrt(np.mean([r.area for r in found]) / whole))
        boxes = np.array([r.bbox for r in found])
        sides.append((boxes[:, 2:] - boxes[:, :2]).mean(0) / cell)
    assert low - 0.01 <= min(sizes) < low + 0.03 and high - 0.03 < max(sizes) <= high + 0.01
    stretch = 0.9**-0.5
    assert low / stretch - 0.05 <= np.min(sides) and np.max(sides) <= high * stretch + 0.05


@pytest.mark.parametrize("stats", [(augment.MEAN, augment.STD), ((0.7, 0.5491, 1 / 3), (1e-3, 0.25, 1.0))])
def test_bytes_become_the_numbers_of_to_tensor(stats):
    images = [make_tile(i) for i in range(3)]
    expected = torch.stack([to_tensor(image, *stats) for image in images])
    rows_first = torch.from_numpy(np.stack(images)).movedim(-1, 1)
    for given in (rows_first, rows_first.contiguous()):
        made = Normalise(*stats)(given)
        assert made.is_contiguous() and torch.equal(made, expected)
    assert Normalise(*stats)(expected) is expected  # numbers are left as they are
    assert torch.equal(rows_first[0], torch.from_numpy(images[0]).movedim(-1, 0))  # and so is what was given
