"Pairs of pictures and masks: name rules, code tables, formats, what is set aside, and the way to tiles."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from histonb.core.errors import BadInput
from histonb.datasets.images import tile_images
from histonb.datasets.pairs import mask_name, pairs
from histonb.datasets.splits import check_leak
from histonb.slides.cohort import QUARANTINE_COLUMNS
from histonb.slides.labels import IGNORE
from histonb.slides.tile_rules import TileRule
from histonb.slides.tiling import tile_cohort

REAL = Path(__file__).parents[2] / "shared/data/gleason_pairs"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
CODES = {0: 2, 1: 3, 2: 4, 3: 1, 4: 1}
SMALL = TileRule(size=64, max_emptiness=0.999, background=1.0, min_edges=0.0, max_homogeneity=1.0)


def grain(seed, height=128, width=192):
    return np.clip([190, 130, 180] + np.random.default_rng(seed).normal(0, 30, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


def codes_of(seed, height=128, width=192):
    "Code masks in blocks of 16 pixels."
    return np.kron(np.random.default_rng(seed).integers(0, 5, (height // 16, width // 16)), np.ones((16, 16))).astype(
        np.uint8
    )


def palette(mask):
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.ravel().tolist())
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 90, 90, 90, 3, 2, 1])
    return image


def planes(path, pixels, **options):
    "Red, green and blue as three pages."
    tifffile.imwrite(
        path,
        np.moveaxis(pixels, -1, 0),
        photometric="minisblack",
        metadata={"axes": "CYX", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"},
        **options,
    )


PICTURES = {
    "png": lambda p, a: Image.fromarray(a).save(f"{p}.png"),
    "tif": lambda p, a: Image.fromarray(a).save(f"{p}.tif"),
    "bmp": lambda p, a: Image.fromarray(a).save(f"{p}.bmp"),
    "jpg": lambda p, a: Image.fromarray(a).save(f"{p}.jpg", quality=95, subsampling=0),
    "ome": lambda p, a: planes(f"{p}.ome.tif", a),
    "ome tiles": lambda p, a: planes(f"{p}.ome.tiff", a, tile=(64, 64), compression="zlib"),
    "ome jpeg": lambda p, a: planes(f"{p}.OME.TIF", a, compression="jpeg", compressionargs={"level": 95}),
    "opaque": lambda p, a: Image.fromarray(np.dstack([a, a[..., :1] * 0 + 255])).save(f"{p}.png"),
}
MASKS = {
    "png": lambda p, m: Image.fromarray(m).save(f"{p}.png"),
    "bmp": lambda p, m: Image.fromarray(m).save(f"{p}.bmp"),
    "tif": lambda p, m: Image.fromarray(m).save(f"{p}.tif"),
    "tiled": lambda p, m: tifffile.imwrite(f"{p}.tiff", m, tile=(64, 64), compression="lzw"),
    "red": lambda p, m: Image.fromarray(np.dstack([m, m * 0, m * 0 + 7])).save(f"{p}.png"),
    "palette": lambda p, m: palette(m).save(f"{p}.png"),
    "palette tif": lambda p, m: palette(m).save(f"{p}.tif"),
    "palette bmp": lambda p, m: palette(m).save(f"{p}.bmp"),
    "opaque": lambda p, m: Image.fromarray(np.dstack([m, m * 0 + 255])).save(f"{p}.png"),
    "ome": lambda p, m: tifffile.imwrite(f"{p}.ome.tif", m, photometric="minisblack"),
    "ome planes": lambda p, m: planes(f"{p}.ome.tif", np.dstack([m, m * 0, m * 0])),
}


@pytest.mark.parametrize("picture, mask", [*[(k, "png") for k in PICTURES], *[("png", k) for k in MASKS]])
def test_every_format_gives_the_same_fractions(tmp_path, picture, mask):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    PICTURES[picture](tmp_path / "images/a.b", grain(0))
    MASKS[mask](tmp_path / "masks/a.b_mask", codes_of(0))
    cohort = pairs(tmp_path / "images", tmp_path / "masks", CODES, "*_mask", size=64)
    assert len(cohort) == 1 and not len(cohort.quarantine)
    table = tile_cohort(cohort, tmp_path / "tiles", SMALL, workers=1)
    assert len(table) == 6
    for t in table.itertuples():
        cut = codes_of(0)[t.y : t.y + 64, t.x : t.x + 64]
        assert np.allclose([t.f1, t.f2, t.f3, t.f4], [(cut >= 3).mean(), *[(cut == c).mean() for c in range(3)]])
        assert t.label == max([1, *[c + 2 for c in range(3) if (cut == c).any()]])
    if picture.startswith("ome"):
        assert set(table["mpp"]) == {0.25}
    from histonb.slides.tile_store import TileShards

    stored = TileShards(tmp_path / "tiles")[0][0].astype(int)
    assert (
        np.abs(stored - grain(0)[:64, :64]).mean() < 8 and stored.mean((0, 1))[0] - stored.mean((0, 1))[1] > 50
    )  # in colour


def write(root, rule="*", n=4, images="images", masks="masks", suffix=".png"):
    for i in range(n):
        for folder, name, image in (
            (images, f"p{i}.jpg", grain(i)),
            (masks, mask_name(f"p{i}", rule) + suffix, codes_of(i)),
        ):
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root / images, root / masks


def test_rows(tmp_path):
    cohort = pairs(*write(tmp_path), CODES, mpp=0.5, size=64)
    slides = cohort.slides
    assert slides["slide"].tolist() == slides["case"].tolist() == [f"p{i}.jpg" for i in range(4)]
    assert (
        set(slides["cohort"]) == {"pairs"} and set(slides["mpp"]) == {0.5} and all(c == CODES for c in slides["codes"])
    )
    assert (
        list(cohort.quarantine) == QUARANTINE_COLUMNS and "4 slides in 4 cases" in repr(cohort) and cohort._repr_html_()
    )
    assert (
        pairs(tmp_path / "images", tmp_path / "masks", "0:2, 1:gleason4, 2:4, 3:healthy, 4:1", size=64).slides["codes"][
            0
        ]
        == CODES
    )


@pytest.mark.parametrize(
    "rule, image, mask",
    [
        ("*", "a", "a"),
        ("*_mask", "a", "a_mask"),
        ("{stem}_mask", "a", "a_mask"),
        ("mask-*", "a.1", "mask-a.1"),
        ("*_img -> *_seg", "a_img", "a_seg"),
        ("*_img->*_seg", "a_b", ""),
        ("img* -> *", "img7", "7"),
        ("(*) -> *", "(7)", "7"),
        ("*_img -> *", "_img", ""),
    ],
)
def test_name_rules(rule, image, mask):
    assert mask_name(image, rule) == mask


@pytest.mark.parametrize("rule", ["", "mask", "**", "* -> mask", "mask -> *", "*->*->*", "{stam}_mask"])
def test_rules_that_are_none(rule, tmp_path):
    with pytest.raises(BadInput, match="no name rule"):
        mask_name("a", rule)
    with pytest.raises(BadInput, match="no name rule"):
        pairs(*write(tmp_path), CODES, rule)


def test_unpaired_files_are_named(tmp_path):
    images, masks = write(tmp_path, "*_mask", n=5)
    (masks / "p1_mask.png").unlink()
    (images / "p2.jpg").unlink()
    Image.fromarray(grain(0, 32, 32)).save(images / "small.jpg")
    Image.fromarray(codes_of(0, 32, 32)).save(masks / "small_mask.png")
    cohort = pairs(images, masks, CODES, "*_mask", size=64)
    found = cohort.quarantine.set_index("slide")
    assert found["fault"].to_dict() == {
        "small.jpg": "32x32 pixels, smaller than a tile of 64x64",
        "p1.jpg": "no mask called `p1_mask`",
        "p2_mask.png": "a mask without picture",
    }
    assert found.loc["p1.jpg", "path"] == str(images / "p1.jpg") and found.loc["p2_mask.png", "path"] == str(
        masks / "p2_mask.png"
    )
    assert cohort.slides["slide"].tolist() == ["p0.jpg", "p3.jpg", "p4.jpg"]


def test_bad_masks_are_set_aside_when_cut(tmp_path):
    images, masks = write(tmp_path, n=6)
    Image.fromarray(codes_of(0)[:64]).save(masks / "p0.png")
    Image.fromarray(codes_of(1) + 3).save(masks / "p1.png")
    (masks / "p2.png").write_bytes((masks / "p2.png").read_bytes()[:100])
    Image.fromarray(codes_of(3) + np.uint16(300)).save(masks / "p3.png")
    (images / "p4.jpg").write_bytes((images / "p4.jpg").read_bytes()[:3000])
    table = tile_images(pairs(images, masks, CODES, size=64), tmp_path / "tiles", SMALL, workers=2)
    assert set(table["slide"]) == {"p5.jpg"}
    aside = pd.read_csv(tmp_path / "tiles/quarantine.csv").set_index("slide")
    for slide, file, says in [
        ("p0.jpg", "masks/p0.png", "the mask is 192x64 pixels, its slide 192x128"),
        ("p1.jpg", "masks/p1.png", "mask values 5, 6, 7 are not among the codes [0, 1, 2, 3, 4]"),
        ("p2.jpg", "masks/p2.png", "damaged"),
        ("p3.jpg", "masks/p3.png", "16 bits a sample, with values up to 30"),
        ("p4.jpg", "images/p4.jpg", "damaged"),
    ]:
        assert (
            says in aside.loc[slide, "fault"]
            and aside.loc[slide, "path"] == str(tmp_path / file)
            and aside.loc[slide, "remedy"]
        )


def test_masks_that_lost_their_codes_are_set_aside(tmp_path):
    "JPEG puts codes between codes that are there, and colours are no codes: neither becomes a label."
    images, masks = write(tmp_path, n=4)
    (masks / "p0.png").unlink()
    Image.fromarray(codes_of(0)).save(masks / "p0.jpg", quality=95)
    Image.fromarray(codes_of(1)).save(masks / "p1.png", "JPEG", quality=75)
    Image.fromarray(np.dstack([codes_of(2), codes_of(3), codes_of(2)])).save(masks / "p2.png")
    table = tile_images(pairs(images, masks, CODES, size=64), tmp_path / "tiles", SMALL, workers=1)
    aside = pd.read_csv(tmp_path / "tiles/quarantine.csv").set_index("slide")["fault"]
    assert set(table["slide"]) == {"p3.jpg"} and aside.str[:22].to_dict() == {
        "p0.jpg": "stored as JPEG, which ",
        "p1.jpg": "stored as JPEG, which ",
        "p2.jpg": "its green or blue diff",
    }


def test_names_in_either_spelling_of_accents(tmp_path):
    "As archives of different systems have them: a mask is found, by a rule and in folders too."
    images, masks = write(tmp_path, n=1)
    (images / "caf\u00e9").mkdir()
    (masks / "cafe\u0301").mkdir()
    (images / "p0.jpg").rename(images / "caf\u00e9/n\u00e9.jpg")
    (masks / "p0.png").rename(masks / "cafe\u0301/ne\u0301_m.PNG")
    cohort = pairs(images, masks, CODES, "*_m", size=64)
    assert len(cohort) == 1 and not len(cohort.quarantine) and Path(cohort.slides["mask"][0]).exists()


def test_what_is_to_be_ignored(tmp_path):
    table = tile_images(pairs(*write(tmp_path), {**CODES, 4: IGNORE}, size=64), tmp_path / "tiles", SMALL, workers=1)
    assert table["fignore"].max() > 0 and np.allclose(
        table[[f"f{i}" for i in range(5)]].sum(axis=1) + table["fignore"], 1
    )


@pytest.mark.parametrize("where, rule", [("set", "*_seg"), ("set/gt", "*"), ("set/masks", "*_seg")])
def test_masks_beside_and_below_the_pictures(tmp_path, where, rule):
    images, masks = write(tmp_path, rule, images="set", masks=where)
    cohort = pairs(images, masks, CODES, rule, size=64)
    assert cohort.slides["slide"].tolist() == [f"p{i}.jpg" for i in range(4)] and not len(cohort.quarantine)


def test_folders_within_folders_and_a_table(tmp_path):
    for case in ("a", "b"):
        write(tmp_path, "*_m", n=3, images=f"images/{case}", masks=f"masks/{case}")
    rows = [f"{case}/p{i}.jpg,patient {case},{'train' if case == 'a' else 'test'}" for case in "ab" for i in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(["file,who,part", *rows, "a/p9.jpg,patient a,train"]))
    cohort = pairs(
        tmp_path / "images",
        tmp_path / "masks",
        CODES,
        "*_m",
        tmp_path / "t.csv",
        "file",
        case="who",
        split="part",
        size=64,
    )
    assert (
        len(cohort) == 6
        and cohort.slides["case"].nunique() == 2
        and cohort.quarantine["slide"].tolist() == ["a/p9.jpg"]
    )
    assert all(Path(r.mask).parent.name == r.case[-1] for r in cohort.slides.itertuples())
    table = tile_images(cohort, tmp_path / "tiles", SMALL, workers=1)
    assert (
        table.groupby("case")["split"].agg(set).to_dict() == {"patient a": {"train"}, "patient b": {"test"}}
        and check_leak(table)["leaking_cases"] == 0
    )


def test_what_fits_nothing_is_refused(tmp_path):
    images, masks = write(tmp_path)
    for says, arguments in [
        (
            "p0.jpg asks for `p0_mask`. Correct the rule `*_mask`: there is, for example, p0.png",
            (images, masks, CODES, "*_mask"),
        ),
        ("asks for `nothing`", (images, masks, CODES, "*_img -> *")),
        ("its own mask", (images, images, CODES)),
        ("Give the folder of the masks", (images, tmp_path / "none", CODES)),
        ("no pictures here", (tmp_path / "none", masks, CODES)),
        ("Did you mean `radboud`?", (images, masks, "radbod")),
        ("`7`, for mask value 0, is no class", (images, masks, {0: 7})),
    ]:
        with pytest.raises(BadInput) as e:
            pairs(*arguments, size=64)
        assert says in str(e.value)
    (masks / "p0.tif").write_bytes((masks / "p0.png").read_bytes())
    with pytest.raises(BadInput, match="has the same name. Keep one"):
        pairs(images, masks, CODES)


@needs_real
def test_real_pairs(tmp_path):
    cohort = pairs(REAL / "images", REAL / "masks", "0: gleason3, 1: gleason4, 2: gleason5, 3: healthy, 4: healthy")
    assert len(cohort) == 11 and not len(cohort.quarantine)
    table = tile_cohort(cohort.take(3), tmp_path / "tiles", TileRule(min_coverage=0.05), workers=1)
    for t in table.groupby("slide").head(3).itertuples():
        cut = np.asarray(Image.open(REAL / "masks" / (Path(t.slide).stem + ".png")))[t.y : t.y + 224, t.x : t.x + 224]
        assert np.allclose(
            [t.f0, t.f1, t.f2, t.f3, t.f4], [0, (cut >= 3).mean(), *[(cut == c).mean() for c in range(3)]], atol=1e-6
        )
    assert table["slide"].nunique() == 3 and set(table["label"]) <= {1, 2, 3, 4}
