"Masks of tiles: against the files read by another library, other resolutions and codes, caching, and input that must be refused."
import pickle
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from torch.utils.data import DataLoader

from histonb.core import BadInput
from histonb.data import masks as module
from histonb.data.cohorts import SLIDE_COLUMNS, panda
from histonb.data.labels import CODES, IGNORE
from histonb.data.masks import MaskTiles, extent, resize_labels, store_masks
from histonb.data.phantom import write_cohort
from histonb.data.shards import TileShards
from histonb.data.slides import open_slide
from histonb.data.tiling import TileRule, tile_cohort
from histonb.data.writing import write_mask


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    "A cohort of a Radboud and a Karolinska slide, its folder, and the table of its kept tiles."
    root = tmp_path_factory.mktemp("masks")
    cohort = panda(write_cohort(root / "cohort", 2, seed=1, shape=(1100, 1000), workers=1, karolinska=.5))
    table = tile_cohort(cohort, root / "tiles", TileRule(min_coverage=.7), workers=1)  # tiles with less ungraded tissue are kept
    return cohort, root, table[table.kept].reset_index(drop=True)


def by_hand(cohort, row, size=224):
    "The tile's mask from the file by tifffile, translated value by value."
    slide = cohort.slides.set_index("slide").loc[row.slide]
    values = tifffile.imread(slide["mask"], level=0)
    values = values[..., 0] if values.ndim == 3 else values
    cut = values[row.y:row.y + size, row.x:row.x + size]
    return np.vectorize(CODES[slide["codes"]].get)(cut).astype(np.uint8)


def test_masks_are_those_of_the_file(tiled):
    cohort, _, table = tiled
    masks = MaskTiles(table, cohort.slides)
    assert set(cohort.slides.codes) == {"radboud", "karolinska"} and len(masks) == len(table) > 10
    for i in range(len(table)):
        labels, label = masks[i]
        assert labels.dtype == np.uint8 and label == table.label[i]
        assert np.array_equal(labels, by_hand(cohort, table.loc[i]))
    assert any(IGNORE in masks[i][0] for i in range(len(table)))
    assert masks.check(0) == len(table)


def test_order_is_that_of_the_table(tiled):
    "Any rows in any order, the same as the tile store serves them."
    cohort, root, table = tiled
    mixed = table.sample(frac=.6, random_state=0)
    masks, tiles = MaskTiles(mixed, cohort.slides), TileShards(root / "tiles", mixed)
    assert masks.table.equals(tiles.table)
    for i, row in enumerate(mixed.itertuples()): assert np.array_equal(masks[i][0], by_hand(cohort, row))


def test_another_resolution(tiled):
    "A tile of 96 pixels at 2.4 times the slide's resolution covers 230; each pixel takes a code of the mask, the nearest one."
    cohort, root, _ = tiled
    mpp = 2.4 * .48
    table = tile_cohort(cohort, root / "coarse", TileRule(mpp=mpp, size=96), workers=1)
    table = table[table.kept].reset_index(drop=True)
    masks = MaskTiles(table, cohort.slides, size=96)
    masks.check(0)
    for i in (0, len(table) - 1):
        whole = by_hand(cohort, table.loc[i], 230)
        assert masks.read(i).shape == (230, 230) and np.array_equal(masks.read(i), whole)
        at = np.floor((np.arange(96) + .5) * 230 / 96).astype(int)
        assert (masks[i][0] == whole[np.ix_(at, at)]).mean() > .99
    with open_slide(cohort.slides.image[0]) as slide:
        assert extent(slide, 0, mpp, 96) == 230 and extent(slide, 0, np.nan, 96) == 96
        assert extent(slide, 1, np.nan, 96) == round(96 * slide.downsamples[1])


def test_smaller_masks_hold_no_new_class():
    codes = np.random.default_rng(0).choice(np.uint8([0, 4, IGNORE]), (224, 224))
    small = resize_labels(codes, 96)
    assert small.shape == (96, 96) and set(np.unique(small)) == {0, 4, IGNORE}
    assert resize_labels(codes, 224) is codes


def test_workers_and_open_files(tiled):
    cohort, _, table = tiled
    masks = MaskTiles(table, cohort.slides, keep_open=1)
    alone = [masks[i][0] for i in range(len(masks))]
    assert len(masks.opened) == 1
    assert len(pickle.loads(pickle.dumps(masks)).opened) == 0
    read = [m for batch, _ in DataLoader(masks, 4, num_workers=2) for m in batch.numpy()]
    assert np.array_equal(read, alone)


def test_pairs_with_their_own_codes(tmp_path):
    "A cohort of plain pictures: the codes are a table, and the resolution is unknown."
    rng = np.random.default_rng(0)
    values = rng.choice(np.uint8([0, 50, 100]), (2, 300, 260))
    rows = []
    for i, v in enumerate(values):
        paths = [str(tmp_path / f"{kind}{i}.png") for kind in ("image", "mask")]
        cv2.imwrite(paths[0], rng.integers(0, 255, (300, 260, 3), np.uint8))
        cv2.imwrite(paths[1], v)
        rows.append({"slide": f"p{i}", "image": paths[0], "mask": paths[1], "codes": {0: 1, 50: 2, 100: 255}})
    table = pd.DataFrame({"slide": ["p1", "p0"], "x": [30, 0], "y": [70, 60], "level": 0, "mpp": np.nan, "label": 2})
    masks = MaskTiles(table, pd.DataFrame(rows).reindex(columns=SLIDE_COLUMNS))
    want = np.array([1, 2, 255], np.uint8)[values // 50]
    assert np.array_equal(masks[0][0], want[1, 70:294, 30:254]) and np.array_equal(masks[1][0], want[0, 60:284, :224])


def test_stored_once(tiled, tmp_path, monkeypatch):
    cohort, _, table = tiled
    masks = MaskTiles(table, cohort.slides)
    stored = store_masks(masks, tmp_path)
    assert isinstance(stored, np.memmap) and not stored.flags.writeable and stored.dtype == np.uint8
    assert np.array_equal(stored, [masks[i][0] for i in range(len(masks))])
    monkeypatch.setattr(MaskTiles, "read", lambda *_: pytest.fail("read again"))
    assert np.array_equal(store_masks(MaskTiles(table, cohort.slides), tmp_path), stored)


@pytest.mark.parametrize("change", [
    lambda t, s: (t[::-1], s), lambda t, s: (t.assign(x=t.x + 1), s), lambda t, s: (t, s.assign(codes="radboud")),
    lambda t, s: (t.assign(mpp=1.), s)], ids=["order", "place", "codes", "resolution"])
def test_another_key(tiled, change):
    cohort, _, table = tiled
    assert module.masks_key(MaskTiles(*change(table, cohort.slides))) != module.masks_key(MaskTiles(table, cohort.slides))


def test_key_follows_the_mask_file(tiled, tmp_path):
    cohort, _, table = tiled
    first = table[table.slide == cohort.slides.slide[0]]
    path = tmp_path / "mask.tiff"
    path.write_bytes(Path(cohort.slides["mask"][0]).read_bytes())
    slides = cohort.slides.assign(mask=[str(path), cohort.slides["mask"][1]])
    before = module.masks_key(MaskTiles(first, slides))
    write_mask(path, np.zeros((1100, 1000), np.uint8))
    assert module.masks_key(MaskTiles(first, slides)) != before


@pytest.fixture
def changed(tiled, tmp_path):
    "Masks with something changed in the first row of the cohort."
    cohort, _, table = tiled
    write_mask(tmp_path / "small.tiff", np.zeros((1100, 900), np.uint8))
    write_mask(tmp_path / "strange.tiff", np.full((1100, 1000), 9, np.uint8))
    write_mask(tmp_path / "empty.tiff", np.zeros((1100, 1000), np.uint8))
    def make(**row):
        slides = cohort.slides.copy()
        for column, value in row.items(): slides.loc[0, column] = str(tmp_path / value) if value.endswith(".tiff") else value
        return MaskTiles(table, slides)
    return make


@pytest.mark.parametrize("row, path, says", [
    ({"slide": "another"}, "phantom1_000", "is not in the cohort"),
    ({"mask": ""}, "phantom1_000", "has no mask"),
    ({"mask": "gone.tiff"}, "gone.tiff", "is not there"),
    ({"codes": "radbud"}, "_mask.tiff", "unknown code table"),
    ({"mask": "small.tiff"}, "small.tiff", "the mask is 900x1100 pixels, its slide 1000x1100"),
    ({"mask": "strange.tiff"}, "strange.tiff", "mask values 9 are not among the codes"),
    ({"mask": "empty.tiff"}, "empty.tiff", "the tile table says"),
])
def test_refused(changed, tmp_path, row, path, says):
    with pytest.raises(BadInput) as e:
        masks = changed(**row)
        masks.check(0)
    assert says in e.value.fault and e.value.path.endswith(path) and e.value.remedy


@pytest.mark.parametrize("mask", ["small.tiff", "strange.tiff"])
def test_nothing_half_written(changed, tmp_path, mask):
    with pytest.raises(BadInput): store_masks(changed(mask=mask), tmp_path / "store")
    assert [*(tmp_path / "store").iterdir()] == []


def test_no_tiles_and_damaged_store(tiled, tmp_path):
    cohort, _, table = tiled
    with pytest.raises(BadInput, match="there is no tile"): store_masks(MaskTiles(table[:0], cohort.slides), tmp_path)
    masks = MaskTiles(table[:3], cohort.slides)
    store_masks(masks, tmp_path)
    path, = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="Delete it"): store_masks(masks, tmp_path)
