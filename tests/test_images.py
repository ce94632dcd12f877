"""Folders of pictures: what is read, what is refused, what comes back from the store, and stores joined."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from histonb.core.errors import BadInput
from histonb.core.files import read_json
from histonb.datasets import images as images_module
from histonb.datasets.cohorts import read_csv
from histonb.datasets.images import KEEP_ALL, class_names, find_pictures, images, join_stores, tile_images
from histonb.datasets.splits import check_leak
from histonb.slides.tile_rules import TileRule
from histonb.slides.tile_store import TileShards

REAL = Path(__file__).parents[2] / "shared/data"
needs_real = pytest.mark.skipif(not (REAL / "EBHI-SEG").exists(), reason="no ../shared/data/EBHI-SEG")


def picture(path, height=64, width=64, seed=0, mode="RGB"):
    "Grain in the colours of stained tissue."
    path.parent.mkdir(parents=True, exist_ok=True)
    grain = np.random.default_rng(seed).normal(0, 30, (height, width, 3))
    Image.fromarray(np.clip([190, 130, 180] + grain, 0, 255).astype(np.uint8)).convert(mode).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    "Three classes of four pictures, two cases each, every ending; masks and other files beside them."
    root = tmp_path / "set"
    rows = []
    for c in range(3):
        for i, suffix in enumerate((".png", ".jpg", ".bmp", ".tif")):
            picture(root / f"class{c}/image/{i:03d}{suffix}", seed=10 * c + i)
            picture(root / f"class{c}/label/{i:03d}{suffix}")
            rows.append(f"set/class{c}/image/{i:03d}{suffix},class{c},case{c}{i // 2},{'train' if i < 2 else 'val'}")
    picture(root / "extra/field.PNG", 150, 200)
    picture(root / "extra/field_anno.bmp", 150, 200)
    (root / ".DS_Store").write_text("")
    picture(root / ".hidden/a.png")
    picture(root / "extra/._field.png")
    (root / "readme.txt").write_text("")
    (tmp_path / "splits.csv").write_text("\n".join(["image,cls,case,split", *rows]))
    return root


def labelled(root, **options):
    return images(root, root.parent / "splits.csv", label="cls", case="case", split="split", size=64, **options)


SMALL = TileRule(size=64, max_emptiness=0.999, background=1.0, min_edges=0.0, max_homogeneity=1.0)


def test_masks_and_hidden_files_are_no_pictures(root):
    names = [p.relative_to(root).as_posix() for p in find_pictures(root)]
    assert (
        len(names) == 13
        and "extra/field.PNG" in names
        and not [n for n in names if "label" in n or "anno" in n or "/." in n]
    )


def test_tiles_come_back_with_their_class_case_and_split(root, tmp_path):
    table = tile_images(labelled(root), tmp_path / "store", SMALL, workers=1)
    assert class_names(tmp_path / "store") == {0: "class0", 1: "class1", 2: "class2"}
    cut = table[table.slide == "extra/field.PNG"]
    assert sorted(zip(cut.x, cut.y)) == [(x, y) for x in (0, 64, 128) for y in (0, 64)]  # no overlap, the rest left out
    assert set(cut.label) == {-1} and set(cut.case) == {"extra/field.PNG"} and set(cut.split) == {""}
    whole = table[table.slide != "extra/field.PNG"]
    assert len(whole) == 12 and (whole.label == whole.slide.str[5].astype(int)).all()
    assert whole.groupby("case").size().tolist() == [2] * 6 and check_leak(table)["leaking_cases"] == 0
    store = TileShards(tmp_path / "store")
    assert store.check() == len(table) == 18 and table.kept.all()
    for i, row in store.table.iterrows():
        image, label = store[i]
        with Image.open(root / row.slide) as p:
            truth = np.asarray(p.convert("RGB"))[row.y : row.y + 64, row.x : row.x + 64]
        assert label == row.label and np.abs(image.astype(int) - truth).mean() < 6
    again = tile_images(labelled(root), tmp_path / "store", SMALL, workers=1)
    pd.testing.assert_frame_equal(table, again)  # nothing is lost by going on


def test_without_a_table_each_picture_is_a_case(root, tmp_path):
    cohort = images(root, size=64)
    assert (cohort.slides["case"] == cohort.slides["slide"]).all() and len(cohort) == 13
    table = tile_images(cohort, tmp_path / "store", SMALL, workers=1)
    assert set(table.label) == {-1} and class_names(tmp_path / "store")[4] == "gleason5"  # no names of its own
    assert "13 pictures" in repr(cohort).replace("slides", "pictures") and cohort._repr_html_()


def test_resolution_of_pictures(root, tmp_path):
    table = tile_images(
        images(root, size=64, mpp=0.25),
        tmp_path / "store",
        TileRule(size=64, mpp=0.5, min_edges=0.0, max_homogeneity=1.0),
        workers=1,
    )
    assert set(table.slide) == {"extra/field.PNG"} and len(table) == 1  # 128 pixels of it make a tile
    assert TileShards(tmp_path / "store")[0][0].shape == (64, 64, 3)


def test_small_broken_and_odd_pictures_are_quarantined(root, tmp_path):
    picture(root / "bad/small.png", 63, 200)
    picture(root / "bad/grey.png", mode="L")
    picture(root / "bad/whole.png")
    (root / "bad/broken.png").write_bytes((root / "bad/whole.png").read_bytes()[:3000])
    (root / "bad/empty.jpg").write_bytes(b"")
    (root / "bad/text.tif").write_text("text")
    table = tile_images(images(root, size=64), tmp_path / "store", SMALL, workers=1)
    found = pd.read_csv(tmp_path / "store/quarantine.csv").set_index("slide")["fault"]
    assert found["bad/small.png"] == "200x63 pixels, smaller than a tile of 64x64"
    assert "one channel" in found["bad/grey.png"] and "damaged" in found["bad/broken.png"]
    assert "empty" in found["bad/empty.jpg"] and "not a TIFF" in found["bad/text.tif"]
    assert len(found) == 5 and "bad/whole.png" in set(table.slide)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".jpg"])
@pytest.mark.parametrize("rounded", [np.floor, np.rint])
def test_pictures_from_nought_to_one_are_quarantined(root, tmp_path, suffix, rounded):
    "They would be black tiles, which `KEEP_ALL` keeps."
    dark = rounded(np.asarray(Image.open(picture(root / "dark/a.png"))) / 255).astype(np.uint8)
    Image.fromarray(dark).save(
        (root / "dark/a").with_suffix(suffix), **{"subsampling": 0, "quality": 100} if suffix == ".jpg" else {}
    )
    if suffix != ".png":
        (root / "dark/a.png").unlink()
    tifffile.imwrite(root / "dark/b.tif", np.float32(dark), photometric="rgb")
    tile_images(images(root, size=64), tmp_path / "store", SMALL, workers=1)
    aside = read_csv(tmp_path / "store/quarantine.csv", ["slide"]).set_index("slide")["fault"]
    seen = np.asarray(Image.open((root / "dark/a").with_suffix(suffix))).max()
    assert aside.to_dict() == {
        f"dark/a{suffix}": f"black: no value above {seen}",
        "dark/b.tif": "32 bits a sample, floating point, not 8 without a sign",
    }


def test_a_listed_picture_that_is_missing_is_named(root, tmp_path):
    (root / "class1/image/002.bmp").unlink()
    cohort = labelled(root)
    assert cohort.quarantine[["slide", "fault"]].values.tolist() == [
        ["set/class1/image/002.bmp", "listed in splits.csv but not in the folder"]
    ]
    assert len(cohort) == 12


@pytest.mark.parametrize(
    "table, options, says",
    [
        ("image,cls\nfield,a\n", dict(case="case"), "no column `case`"),
        ("image,case\nfield,\n", dict(case="case"), "1 pictures have no `case`"),
        ("image,case\nfield,1\nfield,2\n", dict(case="case"), "occur more than once"),
        ("image,case\nfield,1\nextra/field.PNG,2\n", dict(case="case"), "names field.PNG twice"),
        ("image,cls\n000.png,a\n", dict(label="cls"), "`000.png` names 3 pictures"),
        ("image,split\nfield,training\n", dict(split="split"), "`training` is not a split"),
        ("image,cls\nother.png,a\n", dict(label="cls"), "none of its 1 pictures"),
        ("image,cls\n", dict(label="cls"), "It is empty"),
        ("", {}, "unreadable as CSV"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(root, table, options, says):
    (root.parent / "t.csv").write_text(table)
    with pytest.raises(BadInput, match=says):
        images(root, root.parent / "t.csv", size=64, **options)


def test_no_pictures(tmp_path):
    (tmp_path / "masks").mkdir()
    picture(tmp_path / "masks/a.png")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadInput, match="no pictures here"):
            images(folder)


def test_all_pictures_too_small(root, tmp_path):
    with pytest.raises(BadInput, match="none of 0 slides could be tiled"):
        tile_images(images(root), tmp_path / "store", KEEP_ALL, workers=1)


def test_joined_stores_keep_every_pixel_and_only_one_sources_labels(root, tmp_path):
    picture(tmp_path / "more/a.png", 128, 128, 77)
    picture(tmp_path / "more/b.png", 64, 64, 78)
    first = tmp_path / "first"
    second = tmp_path / "second"
    tile_images(labelled(root), first, SMALL, workers=1)
    tile_images(images(tmp_path / "more", size=64), second, SMALL, workers=1)
    table = join_stores([second, first], tmp_path / "joined", labelled=first)
    both = TileShards(tmp_path / "joined")
    parts = [TileShards(second), TileShards(first)]
    assert both.check() == len(table) == 18 + 5
    for i in range(len(both)):
        assert both.jpeg(i) == (parts[0].jpeg(i) if i < 5 else parts[1].jpeg(i - 5))
    assert (
        set(table.slide[:5]) == {"second/a.png", "second/b.png"}
        and set(table.label[:5]) == {-1}
        and set(table.split[:5]) == {"train"}
    )
    assert (
        table.label[5:].tolist() == parts[1].table.label.tolist()
        and table.split[5:].tolist() == parts[1].table.split.tolist()
    )
    assert read_json(tmp_path / "joined/classes.json") == ["class0", "class1", "class2"]
    assert set(join_stores([second, first], tmp_path / "blind").label) == {-1}
    with pytest.raises(BadInput, match="tiles differ in size"):
        picture(tmp_path / "large/a.png", 96, 96)
        tile_images(
            images(tmp_path / "large", size=96),
            tmp_path / "third",
            TileRule(size=96, min_edges=0.0, max_homogeneity=1.0),
            workers=1,
        )
        join_stores([first, tmp_path / "third"], tmp_path / "x")


@needs_real
def test_ebhi_seg_as_it_lies():
    cohort = images(REAL / "EBHI-SEG", REAL / "EBHI-SEG/splits.csv", label="cls", case="case", split="split")
    listed = pd.read_csv(REAL / "EBHI-SEG/splits.csv")
    assert len(cohort) == len(listed) and not len(cohort.quarantine)
    truth = listed.set_index(listed.image.str.removeprefix("EBHI-SEG/")).loc[cohort.slides["slide"]]
    assert (truth.cls.to_numpy() == cohort.slides["class"]).all() and (
        truth.case.to_numpy() == cohort.slides["case"]
    ).all()


@needs_real
def test_glas_by_patient_without_its_masks():
    cohort = images(REAL / "GlaS", REAL / "GlaS/Grade.csv", picture="name", case="patient ID")
    assert (
        len(cohort) == 24
        and cohort.slides["case"].nunique() == 12
        and not cohort.slides["slide"].str.contains("anno").any()
    )


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("classes.json", '{"a": 1}', "not a list of different names"),
        ("classes.json", '["a", "a"]', "not a list of different names"),
        ("classes.json", "[1, 2]", "not a list"),
        ("classes.json", '["a",', "not valid JSON"),
        ("classes.json", '["\\ud800"]', "not a list of different names"),
        ("rule.json", "[]", "it tells no `size`"),
        ("rule.json", '{"size": "64"}', "it tells no `size`"),
        ("rule.json", None, "there is no such file"),
        ("rule.json", "", "not valid JSON"),
        ("account.parquet", None, "there is no such table"),
        ("account.parquet", "PAR1", "unreadable as a Parquet table"),
        ("account.parquet", "text", "its column `label` does not hold whole numbers"),
        ("tiles.parquet", None, "there is no tile table here"),
        ("tiles.parquet", "PAR1", "unreadable"),
        ("quarantine.csv", "slide,path\na,b\n", "no column `fault`"),
        ("quarantine.csv", "", "unreadable as CSV"),
    ],
)
def test_stores_with_a_damaged_file_are_not_joined(root, tmp_path, name, content, says):
    tile_images(labelled(root), tmp_path / "store", SMALL, workers=1)
    path = tmp_path / "store" / name
    if content is None:
        path.unlink()
    elif content == "text":
        pd.read_parquet(path).assign(label="a").to_parquet(path)
    else:
        path.write_text(content)
    with pytest.raises(BadInput, match=says) as e:
        join_stores([tmp_path / "store"], tmp_path / "joined", labelled=tmp_path / "store")
    assert e.value.path == str(path) and e.value.remedy
    if name == "classes.json":
        with pytest.raises(BadInput, match=says):
            class_names(tmp_path / "store")


@pytest.mark.parametrize("spelling", ["nan", "NA", "", " ", "None", "-"])
def test_pictures_of_no_case_are_no_case(root, spelling):
    "A case that another program wrote as nothing is none: the whole table is refused, not one case made of them."
    (root.parent / "t.csv").write_text(
        f"image,case\nclass0/image/000.png,1.0\nclass0/image/001.jpg,1\nclass0/image/002.bmp,{spelling}\n"
    )
    with pytest.raises(BadInput, match="1 pictures have no `case`"):
        images(root, root.parent / "t.csv", case="case", size=64)
    (root.parent / "t.csv").write_text("image,case\nclass0/image/000.png,1.0\nclass0/image/001.jpg,1\n")
    assert images(root, root.parent / "t.csv", case="case", size=64).slides["case"].value_counts()["1"] == 2


def test_names_of_every_kind_are_found_and_cut(tmp_path):
    "Dots, equal stems, capitals, marks of other programs, accents in two spellings; a table may spell them otherwise."
    names = [
        "a.b.png",
        "x.png",
        "x.PNG",
        "x.tif",
        "100%41.png",
        "a#b?c.bmp",
        " sp ace .png",
        "quo'te\".png",
        "new\nline.png",
        "Pre\u0301l.png",
        "\u8abf" * 28 + ".png",
        "NA.png",
        "v.ome.tif",
    ]
    for i, name in enumerate(names):
        picture(tmp_path / "set" / name, seed=i)
    (tmp_path / "set/link.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "set/folder.png").mkdir()
    with open(bytes(tmp_path / "set") + b"/caf\xe9.png", "wb") as f:
        f.write((tmp_path / "set/NA.png").read_bytes())
    pd.DataFrame({"image": ["Pr\u00e9l", "sp ace .png", "NA", "a.b", "new\nline.png"], "case": ["p1"] * 5}).to_csv(
        tmp_path / "t.csv", index=False
    )
    cohort = images(tmp_path / "set", tmp_path / "t.csv", case="case", size=64)
    assert sorted(cohort.slides["slide"]) == sorted([*names, "link.png"]) and (cohort.slides["case"] == "p1").sum() == 5
    assert cohort.quarantine[["slide", "fault"]].values.tolist() == [["caf\\udce9.png", "its name is not UTF-8 text"]]
    table = tile_images(cohort, tmp_path / "store", SMALL, workers=1)
    assert sorted(table.slide) == sorted(names) and TileShards(tmp_path / "store").check() == len(names)
    assert read_csv(tmp_path / "store/quarantine.csv", ["slide"])["slide"].tolist() == ["caf\\udce9.png", "link.png"]


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    real = images_module.os.scandir

    def scandir(path):
        if str(path).endswith("class1"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(images_module.os, "scandir", scandir)
    with pytest.raises(BadInput, match=r"class1: cannot be listed \(Permission denied\). Check its permissions"):
        images(root, size=64)
