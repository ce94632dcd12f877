"EBHI-Seg: the faults of the set, its cases and splits, broken folders, and the augmentation of pairs."

import hashlib
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from histonb.core.errors import BadInput
from histonb.datasets.ebhi import (
    EBHI_CLASSES,
    GLAND_CLASSES,
    ebhi_glands,
    ebhi_seg,
    parse_cases,
    read_ebhi_pair,
    split_table,
)
from histonb.datasets.regions import REGION_COLUMNS
from histonb.datasets.splits import SPLITS, check_leak
from histonb.slides.cohort import QUARANTINE_COLUMNS
from histonb.training.pair_augmentation import EBHIAugment

REAL = Path(__file__).parents[2] / "shared/data/EBHI-SEG"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")


def put(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def grain(seed):
    return np.random.default_rng(seed).integers(0, 256, (224, 224, 3), dtype=np.uint8)


def grey(seed):
    "A mask in all shades of grey."
    return np.random.default_rng(seed).integers(0, 256, (224, 224), dtype=np.uint8)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    "Each class with four cases of two pictures; one case of each class is in the class before too."
    root = tmp_path_factory.mktemp("ebhi") / "EBHI-SEG"
    for c, name in enumerate(EBHI_CLASSES):
        for k in range(4):
            number = 2012000 + 10 * ((c + 1) % 6) if k == 3 else 2012000 + 10 * c + k
            for i in range(2):
                picture = f"GT{number}-{k + 1}-400-{i:03d}.png"
                put(root / name / "image" / picture, grain(100 * c + 10 * k + i))
                put(root / name / "label" / picture, grey(100 * c + 10 * k + i))
    return root


@pytest.fixture
def root(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "EBHI-SEG"))


def first(root, name="Polyp", part="image"):
    return sorted((root / name / part).glob("*.png"))[0]


# What is read


def test_the_table_holds_what_the_folder_says(root):
    cohort = ebhi_seg(root)
    slides = cohort.slides
    assert len(slides) == 48 and len(cohort.quarantine) == 0 and list(cohort.quarantine) == QUARANTINE_COLUMNS
    for s in slides.to_dict("records"):
        image = Path(s["image"])
        assert (
            s["slide"] == f"{s['class']}/image/{image.name}"
            and Path(s["label"]) == image.parents[1] / "label" / image.name
        )
        assert EBHI_CLASSES[s["cls"]] == s["class"] and s["case"] == image.name.split("-")[0] and s["split"] in SPLITS
        assert s["foreground"] == (np.asarray(Image.open(s["label"])) > 127).mean()
    assert slides["case"].nunique() == 18 and EBHI_CLASSES == tuple(sorted(EBHI_CLASSES))
    assert cohort.grades().loc["Polyp", "all"] == 8


def test_a_pair_is_read_as_it_lies_and_thresholded(root):
    shades = np.zeros((224, 224), np.uint8)
    shades[:, :5] = [0, 1, 127, 128, 255]
    put(first(root, part="label"), shades)
    for row in (
        ebhi_seg(root).slides.query("slide == @first(@root).relative_to(@root).as_posix()").iloc[0],
        SimpleNamespace(image=first(root), label=first(root, part="label")),
    ):
        image, mask = read_ebhi_pair(row)
        assert image.dtype == mask.dtype == np.uint8 and np.array_equal(image, np.asarray(Image.open(first(root))))
        assert mask[0, :6].tolist() == [0, 0, 0, 1, 1, 0] and mask.sum() == 2 * 224


def test_glands_are_pieces_of_the_mask_without_holes_in_a_picture_as_wide_as_it_was(root):
    mask = np.zeros((224, 224), np.uint8)
    mask[20:60, 30:90] = mask[100:200, 30:60] = 255
    mask[35:45, 50:60] = 0
    put(first(root, part="label"), mask)
    (root / "Normal/label" / first(root, "Normal").name).unlink()
    fields = ebhi_glands(root)
    assert (
        len(fields) == 8 * len(GLAND_CLASSES) - 1
        and fields.labels == ("gland",)
        and list(fields.table) == REGION_COLUMNS
    )
    assert {*fields.table["image"].map(lambda p: Path(p).parts[-3])} == set(GLAND_CLASSES) and set(
        fields.table["split"]
    ) == {""}
    field = fields[int(np.flatnonzero(fields.table["image"] == str(first(root)))[0])]
    assert (
        field.image.shape == (224, 299, 3)
        and field.labels["gland"].shape == (224, 299)
        and field.labels["gland"].dtype == np.int32
    )
    ids, sizes = np.unique(field.labels["gland"], return_counts=True)
    assert ids.tolist() == [0, 1, 2] and sizes[1:] / (4 / 3) == pytest.approx([40 * 60, 100 * 30], rel=0.02)
    with pytest.raises(BadInput, match="Did you mean `Polyp`"):
        ebhi_glands(root, ["polyps"])


def test_a_picture_without_mask_stays_and_its_twin_goes(root):
    bare = root / "Low-grade IN/image/GT2012149-2-400-001.png"
    put(bare, grain(7))
    (bare.parent / "GTGT2012149-2-400-001.png").write_bytes(bare.read_bytes())
    cohort = ebhi_seg(root)
    assert cohort.quarantine[["slide", "fault"]].values.tolist() == [
        [f"Low-grade IN/image/GTGT{bare.name[2:]}", f"byte for byte Low-grade IN/image/{bare.name}"]
    ]
    row = cohort.slides.set_index("slide").loc[f"Low-grade IN/image/{bare.name}"]
    assert (
        row["label"] == ""
        and np.isnan(row["foreground"])
        and row["case"] == "GT2012149"
        and cohort.counts["without mask"] == 1
    )
    with pytest.raises(BadInput, match="it has no mask"):
        read_ebhi_pair(row)


def test_of_twins_the_one_with_a_mask_stays(root):
    copy = root / "Normal/image/GT2000001-1-400-001.png"  # sorted before, without mask
    copy.write_bytes(first(root, "Polyp").read_bytes())
    assert ebhi_seg(root).quarantine["slide"].tolist() == [copy.relative_to(root).as_posix()]


def test_pictures_of_one_size_but_other_bytes_are_no_twins(root):
    a, b = sorted((root / "Polyp/image").glob("*.png"))[:2]
    size = max(a.stat().st_size, b.stat().st_size)
    for p in (a, b):
        p.write_bytes(p.read_bytes().ljust(size, b"\0"))  # bytes after the end of a PNG change nothing
    assert a.stat().st_size == b.stat().st_size and len(ebhi_seg(root)) == 48


def test_masks_that_are_foreground_all_over_are_flagged_not_dropped(root):
    put(first(root, "Adenocarcinoma", "label"), np.full((224, 224), 200, np.uint8))
    cohort = ebhi_seg(root)
    assert len(cohort) == 48 and cohort.counts["with a mask that is foreground all over"] == 1
    assert Path(cohort.slides.set_index("foreground").loc[1.0, "label"]) == first(root, "Adenocarcinoma", "label")


def test_hidden_files_and_folders_without_pictures_do_not_matter(root):
    for place in (root, root / "Polyp", root / "Polyp/image", root / "Polyp/label"):
        (place / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "docs").mkdir()
    (root / ".cache/image").mkdir(parents=True)
    (root / "readme.md").write_text("EBHI-Seg")
    assert len(ebhi_seg(root)) == 48


@pytest.mark.parametrize("spelling", ["low-grade in", "Low_grade_IN", "Low-Grade IN ", "LowgradeIN"])
def test_class_folders_are_known_by_their_letters(root, spelling):
    (root / "Low-grade IN").rename(root / spelling)
    slides = ebhi_seg(root).slides
    assert (slides["class"] == "Low-grade IN").sum() == 8
    assert slides.loc[slides["class"] == "Low-grade IN", "slide"].str.startswith(f"{spelling}/image/").all()


# Cases


@pytest.mark.parametrize(
    "name, case",
    [
        ("GT2012149-2-400-001", "GT2012149"),
        ("GTGT2012149-2-400-001", "GT2012149"),
        ("GTxc2013010-1-400-003", "GTxc2013010"),
        ("GTDC2100277-1-400-001", "GTDC2100277"),
        ("gtgtXC12-1-400-1", "gtXC12"),
        ("2012149-2-400-001", None),
        ("GT-1-400-001", None),
        ("photo", None),
    ],
)
def test_a_name_tells_its_case(name, case):
    found = parse_cases(pd.Series([name]))[0]
    assert found == case if case else pd.isna(found)


def test_capitals_do_not_make_another_case_but_letters_do():
    found = parse_cases(
        pd.Series(["GTxc2013010-1-400-003", "GTXC2013010-2-400-003", "GT2013010-1-400-001", "GTdc2013010-1-400-001"])
    )
    assert found.tolist() == ["GTXC2013010", "GTXC2013010", "GT2013010", "GTdc2013010"]


def test_a_mask_in_other_capitals_is_found(root):
    image = first(root)
    label = first(root, part="label")
    label.rename(label.with_name(label.name.lower()))
    assert ebhi_seg(root).slides.set_index("image").loc[str(image), "label"] == str(label.with_name(label.name.lower()))
    image.rename(image.with_name(image.name.replace("GT", "gt")))  # now both; another picture must not take its mask
    put(image, grain(999))
    labels = ebhi_seg(root).slides.set_index("image")["label"]
    assert labels[str(image)] == "" and labels[str(image.with_name(image.name.replace("GT", "gt")))].endswith(
        label.name.lower()
    )


# Divisions


def test_grouped_keeps_cases_together_and_classes_everywhere(root):
    cohort = ebhi_seg(root)
    assert check_leak(cohort.slides)["leaking_cases"] == 0 and (cohort.grades() > 0).all(axis=None)
    assert (
        ebhi_seg(root).slides["split"].tolist()
        == cohort.slides["split"].tolist()
        != ebhi_seg(root, seed=1).slides["split"].tolist()
    )


def test_random_is_the_published_protocol(root):
    cohort = ebhi_seg(root, "random", seed=3)
    assert cohort.slides["split"].value_counts()[list(SPLITS)].tolist() == [19, 19, 10]  # 4:4:2 of 48
    assert (
        cohort.counts["in cases that are in train as well"]
        == check_leak(cohort.slides, strict=False)["leaking_rows"]
        > 0
    )
    assert "in cases that are in train as well" in repr(cohort) and "as well" not in repr(ebhi_seg(root))


@pytest.mark.parametrize("above", ["EBHI-SEG/", "", "other/place/"])
def test_a_table_divides_as_it_says(root, above):
    table = split_table(ebhi_seg(root, "random"))
    assert table["image"].str.startswith("EBHI-SEG/").all()
    table["image"] = table["image"].str.replace("EBHI-SEG/", above)
    table.sample(frac=1, random_state=0).to_csv(root / "splits.csv", index=False)
    assert split_table(ebhi_seg(root, "table"))["split"].tolist() == table["split"].tolist()


def test_an_empty_mask_is_one(root):
    put(one_mask(root), np.zeros((224, 224), np.uint8))
    cohort = ebhi_seg(root)
    assert len(cohort) == 48 and (cohort.slides["foreground"] == 0).sum() == 1


def test_what_a_table_does_not_name_has_no_split(root):
    table = (
        split_table(ebhi_seg(root))
        .iloc[1:]
        .replace({"image": {"EBHI-SEG/Polyp/image/GT2012040-1-400-000.png": "EBHI-SEG/Polyp/image/GT1-1-400-000.png"}})
    )
    table.to_csv(root / "splits.csv", index=False)
    cohort = ebhi_seg(root, "table")
    assert (
        len(cohort) == 48
        and (cohort.slides["split"] == "").sum() == cohort.counts["without split"] == 2
        and cohort.counts["listed but not in the folder"] == 1
    )


@pytest.mark.parametrize(
    "text, fault",
    [
        (
            "image,split\nPolyp/image/GT2012040-1-400-000.png,training\n",
            "`training` is not a split. Call them train, val and test",
        ),
        ("image,part\nx,train\n", "no column `split`"),
        ("image,split\nnone.png,train\n", "none of its 1 pictures is here"),
        ("", "unreadable as CSV"),
        (
            "image,split\na/Polyp/image/GT2012040-1-400-000.png,train\nPolyp/image/GT2012040-1-400-000.png,val\n",
            "it names Polyp/image/GT2012040-1-400-000.png twice",
        ),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(root, text, fault):
    (root / "splits.csv").write_text(text)
    with pytest.raises(BadInput, match=fault):
        ebhi_seg(root, "table")


def test_without_a_table_there_is_no_division_by_table(root):
    with pytest.raises(BadInput, match=r"splits\.csv: there is no such file"):
        ebhi_seg(root, "table")


def test_a_class_of_one_case_is_announced(root):
    for part in ("image", "label"):
        for p in sorted((root / "Normal" / part).glob("*.png"))[2:]:
            p.unlink()
    with pytest.warns(UserWarning, match="class Normal occurs in 1 of 16 cases, so not in every split"):
        slides = ebhi_seg(root).slides
    assert slides.loc[slides["class"] == "Normal", "split"].nunique() == 1


# What is set aside, and what is refused


def cut_short(path):
    path.write_bytes(path.read_bytes()[:20_000])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def one_mask(root):
    return first(root, part="label")


@pytest.mark.parametrize(
    "name, damage, fault",
    [
        (
            "small mask",
            lambda r: put(one_mask(r), np.zeros((100, 224), np.uint8)),
            "its mask GT2012040-1-400-000.png of shape 100x224, not 224x224",
        ),
        ("coloured mask", lambda r: put(one_mask(r), grain(0)), "of shape 224x224x3, not 224x224"),
        ("cut mask", lambda r: cut_short(one_mask(r)), "its mask GT2012040-1-400-000.png cannot be decoded"),
        ("empty mask", lambda r: one_mask(r).write_bytes(b""), "its mask GT2012040-1-400-000.png cannot be decoded"),
        (
            "text as mask",
            lambda r: one_mask(r).write_text("mask"),
            "its mask GT2012040-1-400-000.png cannot be decoded",
        ),
        ("large picture", lambda r: put(first(r), np.zeros((448, 448, 3), np.uint8)), "448x448 RGB, not 224x224 RGB"),
        ("grey picture", lambda r: put(first(r), grey(0)), "224x224 L, not 224x224 RGB"),
        ("cut picture", lambda r: cut_short(first(r)), "cannot be decoded"),
        ("flipped byte", lambda r: flip_a_byte(first(r)), "cannot be decoded"),
        ("empty picture", lambda r: first(r).write_bytes(b""), "cannot be decoded"),
        ("dark picture", lambda r: put(first(r), (grain(0) / 255).astype(np.uint8)), "black: no value above 1"),
        (
            "dark mask",
            lambda r: put(one_mask(r), grey(0) // 255),
            "its mask GT2012040-1-400-000.png no value is above 1: all would be background",
        ),
        ("grey mask", lambda r: put(one_mask(r), grey(0) // 3), "no value is above 85"),
        (
            "deep picture",
            lambda r: first(r).write_bytes(imagecodecs.png_encode(grain(0).astype(np.uint16) * 257)),
            "uint16 in place of 8 bits",
        ),
        ("deep mask", lambda r: put(one_mask(r), grey(0).astype(np.uint16) * 257), "uint16 in place of 8 bits"),
        (
            "lost mask",
            lambda r: (one_mask(r).unlink(), one_mask(r).with_name(first(r).name).symlink_to(r / "none")),
            "cannot be decoded",
        ),
        (
            "name",
            lambda r: first(r).rename(first(r).with_name("GT_photo.png")) and one_mask(r).unlink(),
            "its name does not tell its case",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) and len(v) < 16 else "",
)
def test_one_bad_picture_is_named_and_the_others_are_read(root, name, damage, fault):
    damage(root)
    cohort = ebhi_seg(root)
    assert len(cohort) == 47 and len(cohort.quarantine) == 1 and cohort.counts["set aside"] == 1
    row = cohort.quarantine.iloc[0]
    assert (
        fault in row["fault"]
        and row["slide"].startswith("Polyp/image/")
        and Path(row["path"]).is_file()
        and row["remedy"]
    )
    for s in cohort.slides.itertuples():
        read_ebhi_pair(s)


def test_a_mask_without_picture_is_named(root):
    first(root).unlink()
    cohort = ebhi_seg(root)
    assert len(cohort) == 47 and cohort.quarantine[["slide", "fault"]].values.tolist() == [
        ["Polyp/label/GT2012040-1-400-000.png", "a mask without picture"]
    ]


def test_a_class_without_masks_is_read(root):
    for p in (root / "Polyp/label").iterdir():
        p.unlink()
    (root / "Polyp/label").rmdir()
    assert (ebhi_seg(root).slides["label"] == "").sum() == 8


def test_a_pair_that_was_damaged_later_says_so(root):
    row = ebhi_seg(root).slides.iloc[0]
    cut_short(Path(row["image"]))
    with pytest.raises(BadInput, match="cannot be decoded"):
        read_ebhi_pair(row)
    Path(row["image"]).unlink()
    with pytest.raises(BadInput, match="No such file"):
        read_ebhi_pair(row)


@pytest.mark.parametrize(
    "damage, fault",
    [
        (lambda r: (r / "Polyp").rename(r / "Polip"), "Polip: unknown class. Did you mean `Polyp`?"),
        (lambda r: (r / "Normal").rename(r / "Healthy"), "Healthy: unknown class. Choose one of: Adenocarcinoma"),
        (lambda r: (r / "Polyp/image").rename(r / "Polyp/images"), "Polyp: there is no folder `image` in it"),
        (lambda r: (r / "Low_grade IN/image").mkdir(parents=True), "beside it is the same class"),
        (
            lambda r: [(r / c).rename(r / f".{c}") for c in EBHI_CLASSES],
            "no class has a folder here. Give the folder that holds Adenocarcinoma",
        ),
        (lambda r: [p.unlink() for p in r.glob("*/image/*")], "no pictures in any class"),
    ],
)
def test_a_folder_that_cannot_be_right_is_refused(root, damage, fault):
    damage(root)
    with pytest.raises(BadInput) as e:
        ebhi_seg(root)
    assert fault in str(e.value)


def test_other_refusals(root):
    with pytest.raises(BadInput, match="no class has a folder here"):
        ebhi_seg(root / "nothing")
    with pytest.raises(BadInput, match="unknown division `groupd`. Did you mean `grouped`?"):
        ebhi_seg(root, "groupd")
    with pytest.raises(BadInput, match="are not three shares"):
        ebhi_seg(root, fractions=(0.5, 0.5))


# The set itself


@needs_real
def test_the_part_at_hand_is_what_its_table_says():
    cohort = ebhi_seg(REAL, "table")
    table = pd.read_csv(REAL / "splits.csv", dtype=str)
    ours = split_table(cohort).set_index("image").loc[table["image"]].reset_index()
    pd.testing.assert_frame_equal(ours.astype(object), table.astype(object), check_dtype=False)
    assert (
        len(cohort) == 797 and not len(cohort.quarantine) and cohort.counts["in cases that are in train as well"] == 0
    )
    full = cohort.slides[cohort.slides["foreground"] == 1]
    assert (
        set(full["class"]) == {"Adenocarcinoma"}
        and len(full) == cohort.counts["with a mask that is foreground all over"] > 0
    )
    by_class = cohort.slides.groupby("class")["foreground"].mean()
    assert 0.5 < by_class.min() < by_class.max() < 0.75
    image, mask = read_ebhi_pair(cohort.slides[cohort.slides["class"] == "Polyp"].iloc[0])
    assert image.shape == (224, 224, 3) and mask.shape == (224, 224) and set(np.unique(mask)) == {0, 1}


@needs_real
def test_the_part_at_hand_divides_by_case():
    grouped = ebhi_seg(REAL)
    random = ebhi_seg(REAL, "random")
    assert check_leak(grouped.slides)["leaking_cases"] == 0 and (grouped.grades() > 0).all(axis=None)
    assert check_leak(random.slides, strict=False)["leaking_rows"] > 0.8 * (random.slides["split"] != "train").sum()


# Augmentation


def pair(seed=0, side=224):
    "A smooth picture and a mask of four numbers."
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(80, 256, (28, 28, 3), dtype=np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    return image, np.array([0, 3, 7, 255], np.uint8)[rng.integers(0, 4, (7, 7))].repeat(side // 7, 0).repeat(
        side // 7, 1
    )


def fingerprint():
    augment = EBHIAugment()
    h = hashlib.blake2b(digest_size=16)
    for i in range(12):
        for part in augment(*pair(i), (5, 0, i)):
            h.update(part.tobytes())
    return h.hexdigest()


class Pairs(Dataset):
    def __init__(self):
        self.augment = EBHIAugment()

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return np.dstack(self.augment(*pair(i), (0, i)))


def test_same_pairs_in_another_process_and_with_any_number_of_workers():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(fingerprint) == fingerprint()
    alone, forked = (torch.cat(list(DataLoader(Pairs(), batch_size=2, num_workers=n))) for n in (0, 2))
    assert torch.equal(alone, forked)


def test_what_came_in_stays_and_what_comes_out_has_its_form():
    image, mask = pair()
    kept = image.copy(), mask.copy()
    augment = EBHIAugment()
    for seed in range(30):
        out = augment(image, mask, seed)
        assert [(a.shape, a.dtype, a.flags.c_contiguous) for a in out] == [
            ((224, 224, 3), np.uint8, True),
            ((224, 224), np.uint8, True),
        ]
        assert set(np.unique(out[1])) <= {0, 3, 7, 255}
    assert np.array_equal(image, kept[0]) and np.array_equal(mask, kept[1])


def test_a_mask_goes_where_its_picture_goes():
    "A mask in black and white as the picture: both are moved alike, whatever colours and blur do."
    side = np.zeros((224, 224), np.uint8)
    cv2.ellipse(side, (90, 120), (50, 30), 25, 0, 360, 1, -1)
    cv2.rectangle(side, (150, 20), (200, 70), 1, -1)
    augment = EBHIAugment()
    moved = 0
    for seed in range(80):
        image, mask = augment(np.repeat(side[..., None] * 200 + 20, 3, 2).astype(np.uint8), side, seed)
        assert ((image[..., 0] > (int(image.max()) + int(image.min())) / 2) != mask).mean() < 0.01
        moved += (mask != side).mean() > 0.02
    assert moved > 40


def test_each_transform_comes_as_often_and_as_strong_as_said():
    augment, (image, mask) = EBHIAugment(), pair(side=70)
    came = []
    angles = []
    kernels = []
    for seed in range(2000):
        augment(image, mask, (3, seed))
        elastic, light, rotate, horizontal, vertical, blur = augment.transforms.transforms
        came.append([bool(t.params) for t in augment.transforms.transforms])
        if rotate.params:
            angles.append(np.degrees(np.arctan2(rotate.params["matrix"][1, 0], rotate.params["matrix"][0, 0])))
        if blur.params:
            kernels.append(len(blur.params["kernel"]))
    came = np.array(came)
    assert np.abs(came.mean(0) - [0.5, 0.5, 0.5, 0.5, 0.1, 0.15]).max() < 0.04  # 3.6 standard errors
    assert 34 < max(angles) <= 35 and -35 <= min(angles) < -34 and abs(np.mean(angles)) < 3
    assert set(kernels) == {3, 5, 7}
    together = np.corrcoef(came.T)
    assert np.abs(together[~np.eye(6, dtype=bool)]).max() < 0.1  # 4.5 standard errors: no two go together


@pytest.mark.parametrize(
    "image, mask, fault",
    [
        (np.zeros((9, 9, 3), np.float32), np.zeros((9, 9), np.uint8), "is not an RGB image"),
        (np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8), "is not an RGB image"),
        (
            np.zeros((9, 9, 3), np.uint8),
            np.zeros((9, 8), np.uint8),
            r"shape \(9, 8\) is no mask of a picture of 9x9 px",
        ),
        (np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), bool), "a bool array"),
        (np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9, 1), np.uint8), "is no mask"),
        (np.zeros((9, 9, 3), np.uint8), None, "a NoneType is no mask"),
    ],
)
def test_what_is_no_pair_is_refused(image, mask, fault):
    with pytest.raises(BadInput, match=fault):
        EBHIAugment()(image, mask, 0)


@needs_real
def test_real_pairs_are_augmented():
    augment = EBHIAugment()
    foreground = []
    for i, row in enumerate(ebhi_seg(REAL).take(24).slides.itertuples()):
        image, mask = augment(*read_ebhi_pair(row), i)
        assert image.shape == (224, 224, 3) and set(np.unique(mask)) <= {0, 1}
        foreground.append((mask.mean(), row.foreground))
    assert np.abs(np.diff(foreground)).max() < 0.25 and np.corrcoef(np.transpose(foreground))[0, 1] > 0.8
