"Masks of tiles: against another library, at other resolutions and codes, cached; and what must be refused."

import pickle
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from torch.utils.data import DataLoader

from histonb.core.errors import BadInput
from histonb.datasets.cohorts import panda
from histonb.slides import masks as module
from histonb.slides.cohort import SLIDE_COLUMNS
from histonb.slides.encodings import encoding_table
from histonb.slides.labels import CODES, IGNORE
from histonb.slides.masks import MaskTiles, resize_labels, store_masks, tile_extent
from histonb.slides.slides import open_slide
from histonb.slides.tile_rules import TileRule
from histonb.slides.tile_store import TileShards
from histonb.slides.tiles import tile_slide
from histonb.slides.tiling import tile_cohort
from histonb.synthetic.phantom import write_cohort
from histonb.synthetic.writing import write_mask, write_slide


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    "A cohort of a Radboud and a Karolinska slide, its folder, and the table of its kept tiles."
    root = tmp_path_factory.mktemp("masks")
    cohort = panda(write_cohort(root / "cohort", 2, seed=1, shape=(1100, 1000), workers=1, karolinska=0.5))
    table = tile_cohort(
        cohort, root / "tiles", TileRule(min_coverage=0.7), workers=1
    )  # tiles with less ungraded tissue are kept
    return cohort, root, table[table.kept].reset_index(drop=True)


def by_hand(cohort, row, size=224):
    "The tile's mask from the file by tifffile, translated value by value."
    slide = cohort.slides.set_index("slide").loc[row.slide]
    values = tifffile.imread(slide["mask"], level=0)
    values = values[..., 0] if values.ndim == 3 else values
    cut = values[row.y : row.y + size, row.x : row.x + size]
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
    mixed = table.sample(frac=0.6, random_state=0)
    masks = MaskTiles(mixed, cohort.slides)
    tiles = TileShards(root / "tiles", mixed)
    assert masks.table.equals(tiles.table)
    for i, row in enumerate(mixed.itertuples()):
        assert np.array_equal(masks[i][0], by_hand(cohort, row))


def test_another_resolution(tiled):
    "A tile of 96 pixels at 2.4 times the slide's resolution covers 230; each pixel takes the nearest code of the mask."
    cohort, root, _ = tiled
    mpp = 2.4 * 0.48
    table = tile_cohort(cohort, root / "coarse", TileRule(mpp=mpp, size=96), workers=1)
    table = table[table.kept].reset_index(drop=True)
    masks = MaskTiles(table, cohort.slides, size=96)
    masks.check(0)
    for i in (0, len(table) - 1):
        whole = by_hand(cohort, table.loc[i], 230)
        assert masks.read(i).shape == (230, 230) and np.array_equal(masks.read(i), whole)
        at = np.floor((np.arange(96) + 0.5) * 230 / 96).astype(int)
        assert (masks[i][0] == whole[np.ix_(at, at)]).mean() > 0.99
    with open_slide(cohort.slides.image[0]) as slide:
        assert tile_extent(slide, 0, mpp, 96) == 230 and tile_extent(slide, 0, np.nan, 96) == 96
        assert tile_extent(slide, 1, np.nan, 96) == round(96 * slide.downsamples[1])


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


@pytest.mark.parametrize(
    "change",
    [
        lambda t, s: (t[::-1], s),
        lambda t, s: (t.assign(x=t.x + 1), s),
        lambda t, s: (t, s.assign(codes="radboud")),
        lambda t, s: (t.assign(mpp=1.0), s),
    ],
    ids=["order", "place", "codes", "resolution"],
)
def test_another_key(tiled, change):
    cohort, _, table = tiled
    assert module.masks_key(MaskTiles(*change(table, cohort.slides))) != module.masks_key(
        MaskTiles(table, cohort.slides)
    )


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
        for column, value in row.items():
            slides.loc[0, column] = str(tmp_path / value) if value.endswith(".tiff") else value
        return MaskTiles(table, slides)

    return make


@pytest.mark.parametrize(
    "row, path, says",
    [
        ({"slide": "another"}, "phantom1_000", "is not in the cohort"),
        ({"mask": ""}, "phantom1_000", "has no mask"),
        ({"mask": "gone.tiff"}, "gone.tiff", "is not there"),
        ({"codes": "radbud"}, "_mask.tiff", "unknown code table"),
        ({"mask": "small.tiff"}, "small.tiff", "the mask is 900x1100 pixels, its slide 1000x1100"),
        ({"mask": "strange.tiff"}, "strange.tiff", "mask values 9 are not among the codes"),
        ({"mask": "empty.tiff"}, "empty.tiff", "the tile table says"),
    ],
)
def test_refused(changed, tmp_path, row, path, says):
    with pytest.raises(BadInput) as e:
        masks = changed(**row)
        masks.check(0)
    assert says in e.value.fault and e.value.path.endswith(path) and e.value.remedy


@pytest.mark.parametrize("mask", ["small.tiff", "strange.tiff"])
def test_nothing_half_written(changed, tmp_path, mask):
    with pytest.raises(BadInput):
        store_masks(changed(mask=mask), tmp_path / "store")
    assert [*(tmp_path / "store").iterdir()] == []


def test_no_tiles_and_damaged_store(tiled, tmp_path):
    cohort, _, table = tiled
    with pytest.raises(BadInput, match="there is no tile"):
        store_masks(MaskTiles(table[:0], cohort.slides), tmp_path)
    masks = MaskTiles(table[:3], cohort.slides)
    store_masks(masks, tmp_path)
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="Delete it"):
        store_masks(masks, tmp_path)
    with open(path, "wb") as f:
        np.savez(f, a=np.zeros(3))
    with pytest.raises(BadInput, match="not a whole .npy file"):
        store_masks(masks, tmp_path)


# Masks of every kind ------------------------------------------------------------------------------------------------


def codes():
    "A mask of Radboud's codes: areas with borders in every direction."
    mask = np.zeros((448, 672), np.uint8)
    mask[:, 150:300], mask[100:350, 300:450], mask[250:, 450:] = 1, 3, 5
    return mask


def tiff(array, **options):
    return lambda path: tifffile.imwrite(path.with_suffix(".tiff"), array(), metadata=None, **options)


def plain(suffix, image, **options):
    return lambda path: image().save(path.with_suffix(suffix), **options)


def in_color(red=None, green=None, blue=None):
    return np.dstack([codes() * 0 if c is None else c for c in (red, green, blue)])


def in_palette():
    image = Image.fromarray(codes())
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 0, 0, 255, 255])
    return image


def four_bits(path):
    "A TIFF that says of its bytes that each holds two values."
    tifffile.imwrite(path, codes()[:, :336].copy(), metadata=None, rowsperstrip=448)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["BitsPerSample"].overwrite(4)
        tiff.pages[0].tags["ImageWidth"].overwrite(672)


TILES = {"tile": (256, 256)}
CODES_OF = Image.fromarray
READ = {
    "one channel": tiff(codes, **TILES),
    "strips": tiff(codes, rowsperstrip=17, compression="lzw"),
    "big end first": tiff(codes, byteorder=">", compression="zlib", predictor=True, **TILES),
    "packbits": tiff(codes, compression="packbits", **TILES),
    "white is nought": tiff(codes, photometric="miniswhite", **TILES),
    "red": tiff(lambda: in_color(codes()), photometric="rgb", compression="lzw", **TILES),
    "red with a constant": tiff(lambda: in_color(codes(), None, codes() * 0 + 7), photometric="rgb", **TILES),
    "the same in all": tiff(lambda: np.dstack([codes()] * 3), photometric="rgb", **TILES),
    "opaque": tiff(
        lambda: np.dstack([in_color(codes()), codes() * 0 + 255]),
        photometric="rgb",
        extrasamples=["unassalpha"],
        **TILES,
    ),
    "planes": tiff(lambda: in_color(codes()).transpose(2, 0, 1), photometric="rgb", planarconfig="separate", **TILES),
    "16 bits": tiff(lambda: codes().astype(np.uint16), **TILES),
    "16 bits, big end first": tiff(
        lambda: codes().astype(">u2"), byteorder=">", compression="zlib", predictor=True, **TILES
    ),
    "16-bit png": plain(".png", lambda: CODES_OF(codes().astype(np.uint16))),
    "4-bit png": plain(".png", in_palette, bits=4),
    "Zstandard": tiff(codes, compression="zstd", predictor=True, **TILES),
    "LERC": tiff(codes, compression="lerc", **TILES),
    "LERC in Zstandard": tiff(codes, compression="lerc", compressionargs={"compression": "zstd"}, **TILES),
    "LERC, 16 bits, in deflate": tiff(
        lambda: codes().astype(np.uint16), compression="lerc", compressionargs={"compression": "deflate"}, **TILES
    ),
    "one column more": tiff(lambda: np.pad(codes(), ((0, 0), (0, 1)))),
    "palette tiff": plain(".tiff", in_palette),
    "palette png": plain(".png", in_palette),
    "palette bmp": plain(".bmp", in_palette),
    "png": plain(".png", lambda: CODES_OF(codes())),
    "bmp": plain(".bmp", lambda: CODES_OF(codes())),
    "png with opacity": plain(".png", lambda: CODES_OF(codes()).convert("LA")),
    "rgb png": plain(".png", lambda: CODES_OF(in_color(codes()))),
    "capitals": plain(".PNG", lambda: CODES_OF(codes())),
}
REFUSED = {
    "codes in green": (
        tiff(lambda: in_color(None, codes()), photometric="rgb", **TILES),
        "colours, not the codes of a mask",
    ),
    "green in planes": (
        tiff(lambda: in_color(None, codes()).transpose(2, 0, 1), photometric="rgb", planarconfig="separate", **TILES),
        "colours",
    ),
    "colours whose red is a code": (
        plain(".png", lambda: CODES_OF(in_color(np.minimum(codes(), 1), codes() * 50, codes() * 9))),
        "colours, not",
    ),
    "jpg": (plain(".jpg", lambda: CODES_OF(codes()), quality=100), "stored as JPEG, which changes the values"),
    "jpg called png": (plain(".png", lambda: CODES_OF(codes()), format="JPEG", quality=95), "stored as JPEG"),
    "jpeg tiff": (tiff(codes, compression="jpeg", compressionargs={"level": 95}, **TILES), "stored as JPEG"),
    "jpeg 2000 tiff": (tiff(codes, compression="jpeg2000", **TILES), "stored as JPEG"),
    "codes above 255": (
        tiff(lambda: codes() + np.uint16(295) * (codes() == 5), **TILES),
        "values up to 300: a code is at most 255",
    ),
    "int8": (tiff(lambda: codes().astype(np.int8), **TILES), "8 bits a sample, signed"),
    "int32": (tiff(lambda: codes().astype(np.int32), **TILES), "32 bits a sample, signed"),
    "float": (tiff(lambda: codes() / 5, **TILES), "64 bits a sample, floating point"),
    "4 bits": (lambda path: four_bits(path.with_suffix(".tiff")), "4 bits a sample.*one channel for the codes"),
    "0/255": (tiff(lambda: np.uint8(codes() > 2) * 255, **TILES), "mask values 255 are not among the codes"),
    "unknown code": (tiff(lambda: np.where(codes() == 5, 7, codes()).astype(np.uint8), **TILES), "mask values 7"),
    "two thirds": (tiff(lambda: codes()[:298, :448].copy()), "the mask is 448x298 pixels, its slide 672x448"),
    "two rows short": (tiff(lambda: codes()[:-2]), "the mask is 672x446.*smaller by a whole number"),
    "twice as large": (tiff(lambda: codes().repeat(2, 0).repeat(2, 1)), "the mask is 1344x896"),
    "half as wide": (tiff(lambda: codes()[:, ::2].copy()), "the mask is 336x448"),
    "a dot": (tiff(lambda: codes()[:4, :6].copy()), "the mask is 6x4"),
    "transposed": (tiff(lambda: codes().T.copy()), "the mask is 448x672"),
    "empty": (tiff(lambda: codes() * 0, **TILES), "marks nothing"),
    "no file": (lambda path: path.with_suffix(".png").write_bytes(b""), "empty"),
    "cut": (lambda path: path.with_suffix(".tiff").write_bytes(b"II*\0" + bytes(99)), "damaged"),
    "npy": (lambda path: np.save(path.with_suffix(".npy"), codes()), "not a TIFF"),
}


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    "A slide under `codes`, and its tiles by the plain mask."
    path = tmp_path_factory.mktemp("kinds") / "slide.tiff"
    write_slide(
        path,
        np.clip(np.array([190, 130, 180]) + np.random.default_rng(0).normal(0, 30, (448, 672, 3)), 0, 255).astype(
            np.uint8
        ),
        mpp=0.5,
    )
    write_mask(path.with_name("plain.tiff"), codes())
    return path, tile_slide(path, path.with_name("plain.tiff"), "radboud")[0]


def written(path, write):
    write(path / "mask.any")
    return next(path.glob("mask.*"))


@pytest.mark.parametrize("kind", READ)
def test_masks_that_hold_codes_are_read_by_the_rules(slide, tmp_path, kind):
    path, wanted = slide
    mask = written(tmp_path, READ[kind])
    found, _ = tile_slide(path, mask, "radboud")
    pd.testing.assert_frame_equal(found, wanted)
    table = found.assign(slide="s")
    masks = MaskTiles(table, pd.DataFrame([{"slide": "s", "image": str(path), "mask": str(mask), "codes": "radboud"}]))
    assert masks.check(0) == len(table) and np.array_equal(
        masks[0][0], np.array([0, 1, 1, 2, 3, 4], np.uint8)[codes()[:224, :224]]
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_other_masks_are_refused_by_what_they_are(slide, tmp_path, kind):
    path, wanted = slide
    write, says = REFUSED[kind]
    mask = written(tmp_path, write)
    with pytest.raises(BadInput, match=says) as e:
        tile_slide(path, mask, "radboud")
    assert e.value.path == str(mask) and e.value.remedy
    rows = pd.DataFrame([{"slide": "s", "image": str(path), "mask": str(mask), "codes": "radboud"}])
    with pytest.raises(BadInput, match="the tile table says" if kind in ("empty", "0/255") else says) as e:
        MaskTiles(wanted.assign(slide="s"), rows).check(0)
    assert e.value.path == str(mask)


def test_shades_may_be_jpeg(slide, tmp_path):
    "A table that knows all values takes the nearest shade, so a JPEG of them is read; the shades alone are not enough."
    shades = np.array([0, 50, 50, 100, 200, 200], np.uint8)[codes()]
    Image.fromarray(shades).save(tmp_path / "mask.jpg", quality=90)
    found = tile_slide(slide[0], tmp_path / "mask.jpg", encoding_table("0/50/100/200"))[0]
    assert np.allclose(found.f4, (codes() == 5)[:, :672].reshape(2, 224, 3, 224).mean((1, 3)).ravel(), atol=0.02)
    with pytest.raises(BadInput, match="stored as JPEG"):
        tile_slide(slide[0], tmp_path / "mask.jpg", {0: 1, 50: 2, 100: 3, 200: 4})


@pytest.mark.parametrize("factor", [2, 4, 7, 16])
@pytest.mark.parametrize("rounded", [np.floor, np.ceil])
def test_smaller_masks_lie_over_their_slide(slide, tmp_path, factor, rounded):
    "A tile's classes are those of the pixels of the mask nearest to it, and labels for decoders are the same ones."
    path, wanted = slide
    height, width = (int(rounded(side / factor)) for side in codes().shape)
    y, x = (np.minimum(np.arange(n) * factor + factor // 2, whole - 1) for n, whole in ((height, 448), (width, 672)))
    tifffile.imwrite(tmp_path / "mask.tiff", codes()[np.ix_(y, x)], metadata=None)
    found, _ = tile_slide(path, tmp_path / "mask.tiff", "radboud")
    assert np.abs(found.filter(regex="^f") - wanted.filter(regex="^f")).to_numpy().max() < 2.2 * factor / 224
    row = {"slide": "s", "image": str(path), "mask": str(tmp_path / "mask.tiff"), "codes": "radboud"}
    masks = MaskTiles(found.assign(slide="s"), pd.DataFrame([row]))
    assert masks.check(0) == len(found)
    plain = np.array([0, 1, 1, 2, 3, 4], np.uint8)[codes()]
    for i, t in enumerate(found.itertuples()):
        labels, _ = masks[i]
        assert labels.shape == (224, 224)
        assert (labels == plain[t.y : t.y + 224, t.x : t.x + 224]).mean() > 1 - 4 * factor / 224


def test_a_mask_is_aligned_once_however_often_it_is_asked_for(slide, tmp_path):
    small = codes()[::4, ::4].copy()
    tifffile.imwrite(tmp_path / "mask.tiff", small, resolution=(5e3, 5e3), resolutionunit="CENTIMETER")
    with open_slide(slide[0]) as image, open_slide(tmp_path / "mask.tiff", mask=True) as mask:
        for _ in range(2):
            mask.align_to(image)
            assert mask.factors == [(4.0, 4.0)] and mask.mpp == 0.5 and mask.level_mpp(0) == 2.0
        assert mask.pixels_across(224) == 56 and mask.pixels_across(1) == 1
        assert np.array_equal(mask.read(400, 200, 20, 10), codes()[200:240:4, 400:480:4])


def test_masks_of_single_bits(slide, tmp_path):
    "The value is 0 or 1, however it is stored; what is 1 in one file is white in another."
    marked = codes() > 2
    marked[447], marked[:, 671] = False, False  # a mask may be short of a row and a column, which are then 0
    wanted = [marked[t.y : t.y + 224, t.x : t.x + 224].mean() for t in slide[1].itertuples()]
    for name, options in {
        "a.tiff": {},
        "b.tiff": {"compression": "packbits"},
        "c.tiff": {"compression": "tiff_lzw"},
        "d.png": {},
        "e.bmp": {},
    }.items():
        Image.fromarray(marked[:447, :671]).save(tmp_path / name, **options)
        found, _ = tile_slide(slide[0], tmp_path / name, {0: 0, 1: 3})
        assert np.allclose(found.f3, wanted), name
