"SICAPv2: every mask encoding, the official partition, patches that overlap, broken inputs, and the way to tiles."

import functools
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histonb.core.errors import BadInput
from histonb.datasets.images import KEEP_ALL, tile_images
from histonb.datasets.sicapv2 import GRADES, in_duplicate, non_overlapping, parse_names, sicapv2
from histonb.datasets.splits import check_leak
from histonb.slides.cohort import QUARANTINE_COLUMNS
from histonb.slides.encodings import ENCODINGS, detect_codes, encoding_table, evidence
from histonb.slides.labels import to_labels
from histonb.slides.tile_rules import TileRule
from histonb.slides.tiling import tile_cohort

REAL = Path(__file__).parents[2] / "shared/data/SICAPv2"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
SHADES = [name for name, codes in ENCODINGS.items() if codes[-1] > 5]
NUMBERS = [name for name in ENCODINGS if name not in SHADES]


def blobs(seed, labels=(1, 2, 3, 4), size=256, scale=16):
    "Labels in areas of about `scale` pixels, each class with a good part of the image."
    field = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32), (0, 0), scale)
    return np.array(labels, np.uint8)[
        np.searchsorted(np.quantile(field, np.arange(1, len(labels)) / len(labels)), field)
    ]


def encode(labels, encoding):
    return np.array([0, *ENCODINGS[encoding]], np.uint8)[labels]


def jpeg(mask, quality):
    out = BytesIO()
    Image.fromarray(mask).save(out, "JPEG", quality=quality)
    return np.asarray(Image.open(out))


# The encoding of masks


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("seed", range(3))
def test_exact_masks_come_back(encoding, seed):
    labels = blobs(seed)
    assert np.array_equal(to_labels(encode(labels, encoding), detect_codes(encode(labels, encoding))), labels)


@pytest.mark.parametrize("encoding", SHADES)
@pytest.mark.parametrize("quality", [40, 60, 75, 85, 95])
@pytest.mark.parametrize("scale", [5, 12, 30])
def test_jpeg_masks_come_back_but_for_borders(encoding, quality, scale):
    labels = blobs(1, scale=scale)
    mask = jpeg(encode(labels, encoding), quality)
    codes = detect_codes(mask)
    assert codes == encoding_table(encoding)
    inside = cv2.dilate(labels, np.ones((9, 9))) == cv2.erode(labels, np.ones((9, 9)))
    found = to_labels(mask, codes)
    assert (found != labels)[inside].mean() < 1e-3 and (found != labels).mean() < 0.03


@pytest.mark.parametrize("encoding", SHADES)
@pytest.mark.parametrize("how", ["halved", "doubled", "noise", "scattered"])
def test_other_ways_to_lose_precision(encoding, how):
    "Masks that were resized before they became JPEG, noise around the codes, and codes without any areas."
    labels = blobs(2)
    rng = np.random.default_rng(0)
    mask = encode(labels, encoding)
    if how == "halved":
        mask = jpeg(
            cv2.resize(encode(blobs(2, size=512, scale=32), encoding), (256, 256), interpolation=cv2.INTER_AREA), 75
        )
    elif how == "doubled":
        mask = jpeg(cv2.resize(mask, (512, 512), interpolation=cv2.INTER_LINEAR), 75)
    elif how == "scattered":
        mask = np.array(ENCODINGS[encoding], np.uint8)[rng.integers(0, 4, (256, 256))]
    if how in ("noise", "scattered"):
        mask = np.clip(np.round(mask + rng.normal(0, 5, mask.shape)), 0, 255).astype(np.uint8)
    assert detect_codes(mask) == encoding_table(encoding)


@pytest.mark.parametrize("quality", [None, 95, 75, 50])
def test_borders_are_no_codes(quality):
    "From 0 to 200 every value occurs on the way; 50, 100 and 150 are not present for that."
    mask = encode(blobs(3, (1, 4)), "0/50/100/200")
    mask = cv2.resize(mask, (512, 512), interpolation=cv2.INTER_LINEAR)
    if quality:
        mask = jpeg(mask, quality)
    assert evidence(mask).fits == dict.fromkeys(SHADES, {0, 200})
    with pytest.raises(BadInput, match="may be 0/50/100/200 or 0/100/150/200. Give more masks"):
        detect_codes(mask)


@pytest.mark.parametrize(
    "classes, able", [((1,), ENCODINGS), ((1, 2), []), ((1, 3), []), ((1, 4), []), ((1, 2, 3), []), ((1, 2, 3, 4), [])]
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_mask_decides_only_what_it_shows(encoding, classes, able):
    "Whatever is decided is right, and what two encodings could mean is not decided."
    mask = encode(blobs(4, classes), encoding)
    values = {ENCODINGS[encoding][c - 1] for c in classes}
    family = NUMBERS if encoding in NUMBERS else SHADES
    possible = [name for name in (ENCODINGS if values == {0} else family) if values <= {*ENCODINGS[name]}]
    assert list(evidence(mask).fits) == possible
    if len(possible) == 1:
        assert detect_codes(mask) == encoding_table(encoding)
    else:
        with pytest.raises(BadInput) as e:
            detect_codes(mask, "some/masks")
        assert (
            "some/masks" in str(e.value) and all(str(v) in e.value.fault for v in values) and "codes=" in e.value.remedy
        )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_several_masks_decide_together(encoding):
    shown = [(1,), (1, 2), (1, 3), (1, 4)]
    masks = [encode(blobs(i, classes), encoding) for i, classes in enumerate(shown)]
    if encoding in SHADES:
        masks = [jpeg(mask, 75) for mask in masks]
    assert detect_codes(masks) == detect_codes(iter(masks)) == encoding_table(encoding)


def test_masks_of_nothing_that_is_known():
    for values in ((0, 1, 5), (0, 85, 170), (0, 255), (0, 128), (0, 30)):
        mask = np.array(values, np.uint8)[blobs(5, range(len(values)))]
        with pytest.raises(BadInput, match="fit none of the encodings"):
            detect_codes([encode(blobs(0), "0/3/4/5"), mask])
    with pytest.raises(BadInput, match="this mask is 0/1/2/3, those before it 0/3/4/5. Keep the masks of one release"):
        detect_codes([encode(blobs(0), "0/3/4/5"), encode(blobs(0), "0/1/2/3")])
    with pytest.raises(BadInput, match="no mask can be read"):
        detect_codes([])


def test_numbers_in_a_jpeg_are_not_taken_for_background():
    mask = jpeg(encode(blobs(6), "0/3/4/5"), 75)
    with pytest.raises(BadInput):
        detect_codes(mask)


# Where patches lie


def patch(slide, row, column, region=0, left=0, top=0, step=1024):
    return f"{slide}_Block_Region_{region}_{row}_{column}_xini_{left + step * column}_yini_{top + step * row}"


@pytest.mark.parametrize("step", [1024, 256])
@pytest.mark.parametrize("seed", range(4))
def test_no_two_kept_patches_overlap_and_none_is_missing(seed, step):
    rng = np.random.default_rng(seed)
    names = [
        patch(s, r, c, region, region * step * 7 + 300, region * step * 2, step)
        for s in "AB"
        for region in range(3)
        for r in range(6)
        for c in range(8)
        if rng.random() < 0.6
    ]
    rng.shuffle(names)
    lying = parse_names(pd.Series(names))
    keep = non_overlapping(lying)
    x = lying["x"].to_numpy()
    y = lying["y"].to_numpy()
    slide = lying["slide"].to_numpy()
    overlap = (np.abs(x[:, None] - x) < 2 * step) & (np.abs(y[:, None] - y) < 2 * step) & (slide[:, None] == slide)
    assert overlap[keep][:, keep].sum() == keep.sum()  # each with itself only
    assert overlap[:, keep].any(1).all()  # none could be added


@needs_real
def test_real_names_all_tell_their_place():
    table = pd.concat([pd.read_excel(REAL / f"partition/Test/{side}.xlsx") for side in ("Train", "Test")])
    lying = parse_names(table["image_name"].str.removesuffix(".jpg"))
    assert not lying.isna().any().any() and lying["slide"].nunique() == 155
    keep = non_overlapping(lying)
    assert keep.sum() == 3652
    for _, p in lying[keep].groupby("slide"):
        x = p["x"].to_numpy()
        y = p["y"].to_numpy()
        assert ((np.abs(x[:, None] - x) < 2048) & (np.abs(y[:, None] - y) < 2048)).sum() == len(p)


# The cohort

SLIDES = {"S1": 7, "S2": 7, "S3": 8, "S4": 9, "S5": 10}  # slide -> patient


def write_part(root, folder, train, test):
    for side, rows in (("Train", train), ("Test", test)):
        path = root / "partition" / folder / f"{side}.xlsx"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(
            [[p + ".jpg", *[int(g == grade) for g in GRADES], 0] for p, grade in rows],
            columns=["image_name", *GRADES, "G4C"],
        ).to_excel(path, index=False)


def listing(*slides):
    return [(patch(s, r, c), list(GRADES)[(r + c + int(s[1])) % 4]) for s in slides for r in range(2) for c in range(2)]


def write(root, encoding="0/3/4/5", suffix=".png", size=256):
    "Five slides of 2x2 patches; a patch listed as G4 has a mask of G4 and no cancer, and so on."
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i, (name, grade) in enumerate(listing(*SLIDES)):
        grain = np.clip([190, 130, 180] + np.random.default_rng(i).normal(0, 30, (size, size, 3)), 0, 255)
        Image.fromarray(grain.astype(np.uint8)).save(root / f"images/{name}.jpg", quality=90)
        labels = blobs(i, (1, GRADES[grade]), size)
        Image.fromarray(encode(labels, encoding)).save(root / f"masks/{name}{suffix}", quality=90)
    write_part(root, "Test", listing("S1", "S2", "S3", "S4"), listing("S5"))
    for i, held in enumerate(("S3", "S4", "S1", "S4")):
        held = ["S1", "S2"] if held == "S1" else [held]
        write_part(
            root,
            f"Validation/Val{i + 1}",
            listing(*[s for s in ("S1", "S2", "S3", "S4") if s not in held]),
            listing(*held),
        )
    pd.DataFrame(
        {"slide_id": [*SLIDES], "patient_id": [*SLIDES.values()], "Gleason_primary": 3, "Gleason_secondary": 4}
    ).to_excel(root / "wsi_labels.xlsx", index=False)
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "SICAPv2")


def test_rows_say_what_the_tables_say(root):
    cohort = sicapv2(root)
    slides = cohort.slides
    assert list(cohort.quarantine) == QUARANTINE_COLUMNS and not len(cohort.quarantine) and len(cohort) == 20
    assert slides["slide"].tolist() == [p for p, _ in listing(*SLIDES)]
    assert slides["class"].map({"healthy": "NC", "gleason3": "G3", "gleason4": "G4", "gleason5": "G5"}).tolist() == [
        g for _, g in listing(*SLIDES)
    ]
    assert (slides["case"] == "patient " + slides["wsi"].map(SLIDES).astype(str)).all() and set(slides["mpp"]) == {1.0}
    assert (slides["split"] == slides["wsi"].eq("S5").map({True: "test", False: "train"})).all()
    assert all(Path(p).is_file() for c in ("image", "mask") for p in slides[c])
    assert "20 slides in 4 cases" in repr(cohort) and "<table" in cohort._repr_html_()
    assert check_leak(slides)["leaking_cases"] == 0


def test_patients_as_other_programs_write_them(root):
    "7, 7.0 and a cell with a space are one patient; nan and nothing are nobody, and each slide its own case."
    pd.DataFrame({"slide_id": [*SLIDES], "patient_id": ["7", "7.0", " 7", "nan", ""]}).to_excel(
        root / "wsi_labels.xlsx", index=False
    )
    assert sicapv2(root).slides.groupby("wsi")["case"].first().to_dict() == {
        **dict.fromkeys(["S1", "S2", "S3"], "patient 7"),
        "S4": "S4",
        "S5": "S5",
    }


def test_masks_in_colours_do_not_decide(root):
    "A mask whose red looks like codes, but which has colours, is no evidence, and set aside when it is cut."
    name = listing(*SLIDES)[0][0]
    labels = blobs(0)
    Image.fromarray(np.dstack([np.uint8(labels > 2), labels * 50, labels])).save(root / f"masks/{name}.png")
    assert sicapv2(root).slides["codes"][0] == encoding_table("0/3/4/5")
    tile_cohort(sicapv2(root).take(2), root.parent / "tiles", KEEP_ALL, workers=1)
    assert (
        "not the codes of a mask" in pd.read_csv(root.parent / "tiles/quarantine.csv")["fault"][0]
        or "mask values" in pd.read_csv(root.parent / "tiles/quarantine.csv")["fault"][0]
    )


def test_parts_of_the_partition(root):
    assert sicapv2(root, "Val1").slides.groupby("split")["wsi"].agg(set).to_dict() == {
        "train": {"S1", "S2", "S4"},
        "test": {"S3"},
    }
    assert sicapv2(root, "Val3").slides.groupby("split")["wsi"].agg(set).to_dict() == {
        "train": {"S3", "S4"},
        "test": {"S1", "S2"},
    }
    assert sicapv2(root, val="Val2").slides.groupby("split")["wsi"].agg(set).to_dict() == {
        "train": {"S1", "S2", "S3"},
        "val": {"S4"},
        "test": {"S5"},
    }


@pytest.mark.parametrize(
    "encoding, suffix",
    [
        ("0/1/2/3", ".png"),
        ("0/3/4/5", ".png"),
        ("0/3/4/5", ".tif"),
        ("0/50/100/200", ".jpg"),
        ("0/100/150/200", ".jpg"),
        ("0/100/150/200", ".png"),
    ],
)
def test_masks_in_every_encoding_become_the_same_tiles(tmp_path, encoding, suffix):
    root = write(tmp_path / "set", encoding, suffix)
    cohort = sicapv2(root)
    assert all(codes == encoding_table(encoding) for codes in cohort.slides["codes"])
    rule = TileRule(size=128, max_emptiness=0.999, background=1.0, min_edges=0.0, max_homogeneity=1.0)
    table = tile_cohort(cohort, tmp_path / "tiles", rule, workers=1)
    assert len(table) == 80 and table["kept"].all()
    graded = dict(listing(*SLIDES))
    for i, (name, grade) in enumerate(graded.items()):
        truth = blobs(i, (1, GRADES[grade]))
        for t in table[table["slide"] == name].itertuples():
            cut = truth[t.y : t.y + 128, t.x : t.x + 128]
            shares = [getattr(t, f"f{c}") for c in range(5)]
            assert np.allclose(shares, [(cut == c).mean() for c in range(5)], atol=0 if suffix != ".jpg" else 0.02)
            if suffix != ".jpg":
                assert t.label == cut.max()
    assert set(table["split"]) == {"train", "test"} and check_leak(table)["leaking_cases"] == 0
    told = cohort.slides.set_index("slide")
    for column in ("split", "case", "cohort"):
        assert (table[column] == table["slide"].map(told[column])).all()


def test_without_masks_a_tile_has_the_class_of_its_patch(root, tmp_path):
    rule = TileRule(size=128, max_emptiness=0.999, background=1.0, min_edges=0.0, max_homogeneity=1.0)
    table = tile_cohort(sicapv2(root, masks=False), tmp_path / "a", rule, workers=1)
    assert (table["label"] == table["slide"].map(dict(listing(*SLIDES))).map(GRADES)).all() and table["f0"].isna().all()
    account = pd.read_parquet(tmp_path / "a/account.parquet")
    assert account.groupby("label")["kept"].sum().to_dict() == table.groupby("label").size().to_dict()
    assert not (tmp_path / "a/classes.json").exists()  # histonb's own ids
    for name, grade in listing(*SLIDES):
        if grade == "G3":
            (root / f"masks/{name}.png").unlink()
    mixed = tile_images(sicapv2(root), tmp_path / "b", rule, workers=1)
    assert set(mixed["label"][mixed["f0"].isna()]) == {2} and set(mixed["label"][mixed["f0"].notna()]) == {1, 3, 4}
    again = tile_images(sicapv2(root), tmp_path / "b", rule, workers=1)
    pd.testing.assert_frame_equal(mixed, again)


def test_a_mask_of_another_encoding_is_set_aside_when_cut(root, tmp_path):
    names = [p for p, g in listing(*SLIDES) if g == "G3"]
    Image.fromarray(encode(blobs(0), "0/1/2/3")).save(root / f"masks/{names[0]}.png")
    Image.fromarray(blobs(0)[:100]).save(root / f"masks/{names[1]}.png")
    (root / f"masks/{names[2]}.png").write_bytes(b"\x89PNG broken")
    tile_cohort(sicapv2(root, codes="0/3/4/5"), tmp_path / "tiles", KEEP_ALL, workers=1)
    found = pd.read_csv(tmp_path / "tiles/quarantine.csv").set_index("slide")["fault"]
    assert "mask values 1, 2 are not among the codes" in found[names[0]] and "256x100 pixels" in found[names[1]]
    assert "damaged" in found[names[2]] and len(found) == 3
    with pytest.raises(BadInput, match="Keep the masks of one release together|fit none") as e:
        sicapv2(root)
    assert names[0] in str(e.value) or names[1] in str(e.value)


def test_masks_that_cannot_decide(root):
    for name, _ in listing(*SLIDES):
        Image.fromarray(np.zeros((256, 256), np.uint8)).save(root / f"masks/{name}.png")
    assert sicapv2(root).slides["codes"].tolist() == [{0: 1}] * 20  # background is all there is
    for i, (name, _) in enumerate(listing(*SLIDES)):
        Image.fromarray(encode(blobs(i, (1, 2)), "0/3/4/5")).save(root / f"masks/{name}.png")
    with pytest.raises(BadInput, match="mask values 0, 3 may be 0/1/2/3 or 0/3/4/5"):
        sicapv2(root)
    assert sicapv2(root, codes="0/3/4/5").slides["codes"][0] == {0: 1, 3: 2, 4: 3, 5: 4}
    assert sicapv2(root, codes="0: healthy, 3: gleason5").slides["codes"][0] == {0: 1, 3: 4}
    for name, _ in listing(*SLIDES):
        (root / f"masks/{name}.png").write_bytes(b"")
    with pytest.raises(BadInput, match="no mask can be read"):
        sicapv2(root)


def test_png_and_jpeg_masks_are_looked_at_apart(root):
    for i, (name, grade) in enumerate(listing("S1", "S2", "S3")):
        (root / f"masks/{name}.png").unlink()
        Image.fromarray(encode(blobs(i, (1, GRADES[grade])), "0/50/100/200")).save(
            root / f"masks/{name}.jpg", quality=90
        )
    slides = sicapv2(root).slides
    assert all(
        c == encoding_table("0/50/100/200" if m.endswith("jpg") else "0/3/4/5")
        for c, m in zip(slides["codes"], slides["mask"])
    )


def test_patches_that_no_table_lists(root):
    for i, name in enumerate([patch("S1", 3, 3), patch("S5", 3, 3), patch("S9", 0, 0)]):
        (root / f"images/{name}.jpg").write_bytes((root / f"images/{patch('S1', 0, 0)}.jpg").read_bytes())
    assert sicapv2(root).counts["in the folder but not listed"] == 3
    more = sicapv2(root, unlisted=True)
    new = more.slides[20:]
    assert (
        new["split"].tolist() == ["train", "test", ""]
        and set(new["class"]) == {""}
        and new["case"].tolist() == ["patient 7", "patient 10", "S9"]
    )
    fold = sicapv2(root, "Val1", unlisted=True).slides
    assert set(fold[fold["wsi"] == "S5"]["split"]) == {""}  # a test slide stays out of the folds


def test_only_patches_that_share_no_pixel(root):
    few = sicapv2(root, overlap=False)
    assert few.slides["slide"].tolist() == [patch(s, 0, 0) for s in SLIDES] and few.counts["overlapping"] == 15
    old = root / f"images/{patch('S1', 0, 0)}.jpg"
    new = root / "images/S1_else.jpg"
    old.rename(new)
    table = [("S1_else", "G3"), *listing("S1", "S2", "S3", "S4")[1:]]
    write_part(root, "Test", table, listing("S5"))
    few = sicapv2(root, overlap=False)
    assert few.quarantine["fault"].tolist() == ["its name does not say where it lies"] and few.slides["slide"][
        0
    ] == patch("S1", 0, 1)
    assert sicapv2(root).slides["wsi"][0] == "S1"  # it is needed for this only


def test_missing_files_and_unclear_rows(root):
    (root / f"images/{patch('S1', 0, 0)}.jpg").unlink()
    rows = listing("S1", "S2", "S3", "S4")
    write_part(root, "Test", rows, listing("S5"))
    path = root / "partition/Test/Train.xlsx"
    table = pd.read_excel(path)
    table.loc[3, "G3"], table.loc[3, "G4"], table.loc[4, [*GRADES]] = 1, 1, 0
    table["NC"] = table["NC"].astype(object)
    table.loc[5, "NC"] = "?"
    table.to_excel(path, index=False)
    cohort = sicapv2(root)
    assert cohort.quarantine["slide"].tolist() == [rows[i][0] for i in (0, 3, 4, 5)]
    assert cohort.quarantine["fault"][0] == "listed in partition Test but not in the folder"
    assert (
        cohort.quarantine["fault"][1].startswith("not of one class: NC ")
        and "NC ?" in cohort.quarantine["fault"][3]
        and len(cohort) == 16
    )
    for name, _ in rows[:8]:
        (root / f"images/{name}.jpg").unlink(missing_ok=True)
    part = sicapv2(root)
    assert (
        part.counts["listed but not in the folder"] == 8 and not part.quarantine["fault"].str.contains("folder").any()
    )


def test_without_masks_or_patients(root, tmp_path):
    (root / "wsi_labels.xlsx").unlink()
    for path in (root / "masks").iterdir():
        path.unlink()
    (root / "masks").rmdir()
    slides = sicapv2(root).slides
    assert (
        (slides["case"] == slides["wsi"]).all() and set(slides["mask"]) == {""} and set(slides["codes"]) == {"histonb"}
    )
    assert sicapv2(root).take(5).slides["slide"].tolist() == slides["slide"].iloc[[0, 5, 10, 14, 19]].tolist()


def test_broken_folders_and_tables(root):
    def fails(says, *args, **kwargs):
        with pytest.raises(BadInput) as e:
            sicapv2(*args, **kwargs)
        assert says in str(e.value) and e.value.remedy

    fails("no `images` and `partition` here", root.parent)
    fails("Did you mean `Val", root, "Val5")
    fails("Did you mean `Test`?", root, "test")
    fails("beside the partition `Val1`", root, "Val1", val="Val2")
    fails("Did you mean `0/3/4/5`?", root, codes="0/3/4/6")
    fails("unknown code table `radbod`", root, codes="radbod")
    write_part(root, "Validation/Val1", listing("S1", "S3"), listing("S2"))
    fails("1 of 2 cases are on more than one side (patient 7 in train and test)", root, "Val1")
    write_part(root, "Validation/Val1", listing("S1")[:2], listing("S1")[2:])
    fails("1 of 1 slides are on more than one side (S1 in train and test)", root, "Val1")
    write_part(root, "Validation/Val1", listing("S1"), listing("S1", "S2"))
    fails("4 patches are in both parts", root, "Val1")
    write_part(root, "Validation/Val1", listing("S1", "S1"), listing("S3"))
    fails("4 values of `image_name` occur more than once", root, "Val1")
    write_part(root, "Validation/Val1", [("Z_Block_Region_0_0_0_xini_0_yini_0", "G3")], [])
    fails("none of the 1 patches of partition Val1 is here", root, "Val1")
    path = root / "partition/Validation/Val1/Train.xlsx"
    pd.read_excel(path).rename(columns={"G3": "Grade3"}).to_excel(path, index=False)
    fails("no column `G3`", root, "Val1")
    whole = path.read_bytes()
    for n in (0, 10, len(whole) // 3, len(whole) - 5):
        path.write_bytes(whole[:n])
        fails("unreadable as Excel workbook", root, "Val1")
    path.unlink()
    fails("there is no such file", root, "Val1")
    pd.DataFrame({"slide_id": ["S1", "S1"], "patient_id": [1, 2]}).to_excel(root / "wsi_labels.xlsx", index=False)
    fails("values of `slide_id` occur more than once", root)
    (root / "wsi_labels.xlsx").unlink()
    (root / f"images/{patch('S1', 0, 0)}.png").write_bytes(b"")
    fails("has the same name", root)


# The real sample

DUPLICATES = """
    16B0001851_Block_Region_3
    16B0003388_Block_Region_5
    16B0003394_Block_Region_1
    16B0022608_Block_Region_2
    16B0022786_Block_Region_0
    16B0023614_Block_Region_3
    16B0026792_Block_Region_3
    16B0027040_Block_Region_10
    18B0005478J_Block_Region_13
    18B0005478J_Block_Region_10
""".split()


def test_duplicate_regions_are_told_by_slide_and_number():
    names = pd.Series(
        [f"{d}_1_2_xini_0_yini_5" for d in DUPLICATES]
        + ["16B0001851_Block_Region_1_1_2_xini_0_yini_5", "16B0001851_Block_Region_31_1_2_xini_0_yini_5", "other"]
    )
    assert in_duplicate(parse_names(names)).tolist() == [True] * 10 + [False] * 3


@needs_real
def test_real_sample():
    cohort = sicapv2(REAL, duplicates=True)
    assert (
        len(cohort) == 7
        and set(cohort.slides["mask"]) == {""}
        and cohort.slides["case"].str.startswith("patient ").all()
    )
    assert (
        cohort.counts["listed but not in the folder"] == 12081 - 7
        and cohort.counts["in the folder but not listed"] == 3
    )
    assert len(sicapv2(REAL, unlisted=True, duplicates=True)) == 10
    without = sicapv2(REAL, unlisted=True)
    assert (
        len(without) == 9
        and without.counts["in duplicate regions"] == 1
        and not without.slides["slide"].str.startswith(tuple(f"{d}_" for d in DUPLICATES)).any()
    )


@needs_real
def test_real_partition_in_full(tmp_path, monkeypatch):
    "Every listed patch, as empty files: the counts of the publication, and no patient on two sides."
    read_once = functools.cache(pd.read_excel)
    monkeypatch.setattr(pd, "read_excel", lambda path, **options: read_once(path, **options).copy())
    for name in ("partition", "wsi_labels.xlsx"):
        (tmp_path / name).symlink_to(REAL / name)
    (tmp_path / "images").mkdir()
    for side in ("Train", "Test"):
        for name in pd.read_excel(REAL / f"partition/Test/{side}.xlsx")["image_name"]:
            (tmp_path / "images" / name).touch()
    cohort = sicapv2(tmp_path, val="Val1", duplicates=True)
    slides = cohort.slides
    assert (
        len(slides) == 12081
        and slides["wsi"].nunique() == 155
        and slides["case"].nunique() == 95
        and not len(cohort.quarantine)
    )
    assert slides["split"].value_counts().to_dict() == {"train": 7472, "val": 2487, "test": 2122}
    assert slides[slides["split"] == "test"]["class"].value_counts().to_dict() == {
        "gleason4": 853,
        "healthy": 644,
        "gleason3": 393,
        "gleason5": 232,
    }
    assert check_leak(slides)["leaking_cases"] == 0
    for i in (2, 3, 4):
        assert len(sicapv2(tmp_path, f"Val{i}", duplicates=True)) == 9959
    assert len(sicapv2(tmp_path, overlap=False, duplicates=True)) == 3652
    once = sicapv2(tmp_path)
    assert (
        once.slides["split"].value_counts().to_dict() == {"train": 9959 - 436, "test": 2122 - 128}
        and once.counts["in duplicate regions"] == 564
    )
    assert {*slides["slide"]} - {*once.slides["slide"]} == {
        *slides["slide"][slides["slide"].str.startswith(tuple(f"{d}_" for d in DUPLICATES))]
    }
    assert once.slides["wsi"].nunique() == 155  # each slide keeps another region


@needs_real
def test_real_patches_become_tiles(tmp_path):
    table = tile_cohort(sicapv2(REAL), tmp_path / "tiles", TileRule(mpp=512 / 224), workers=1)
    told = sicapv2(REAL).slides.set_index("slide")["class"].map({"gleason3": 2, "gleason4": 3, "gleason5": 4})
    assert (
        len(table) == 6
        and (table["label"] == table["slide"].map(told)).all()
        and (table["mpp"] - 512 / 224).abs().max() < 1e-9
    )
