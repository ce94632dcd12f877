"The PANDA reader: the published table, a part of the files, lists of others, and broken inputs."

import random
from pathlib import Path

import pandas as pd
import pytest

from histonb.core.errors import BadInput
from histonb.datasets import cohorts
from histonb.datasets.cohorts import panda, read_xlsx
from histonb.datasets.readers import READERS, read_set
from histonb.slides.cohort import QUARANTINE_COLUMNS, SLIDE_COLUMNS
from histonb.slides.labels import CODES
from histonb.synthetic.phantom import write_cohort

PANDA = Path(__file__).parents[2] / "shared/data/panda"
HEADER = "image_id,data_provider,isup_grade,gleason_score\n"
needs_panda = pytest.mark.skipif(not PANDA.exists(), reason=f"needs {PANDA}")


def make(root, n=20, table=None, images=None, masks=()):
    "A folder in PANDA's layout with empty files: the reader opens none."
    for name in ("train_images", "train_label_masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    names = [f"s{i:02d}" for i in range(n)]
    rows = "".join(
        f"{name},{('radboud', 'karolinska')[i % 2]},{0 if i % 2 else 1},{'0+0' if i % 2 else '3+3'}\n"
        for i, name in enumerate(names)
    )
    (root / "train.csv").write_text(HEADER + rows if table is None else table)
    for name in names if images is None else images:
        (root / "train_images" / f"{name}.tiff").touch()
    for name in masks:
        (root / "train_label_masks" / f"{name}_mask.tiff").touch()
    return names


@needs_panda
def test_real_table_with_one_slide():
    cohort = panda(PANDA)
    assert list(cohort.slides) == SLIDE_COLUMNS and list(cohort.quarantine) == QUARANTINE_COLUMNS
    (row,) = cohort.slides.itertuples()
    assert (row.slide, row.codes, row.provider, row.isup, row.gleason) == (
        "006f6aa35a78965c92fffd1fbd53a058",
        "radboud",
        "radboud",
        3,
        "4+3",
    )
    assert Path(row.image).is_file() and Path(row.mask).is_file() and row.case == row.slide
    assert cohort.counts["listed but not in the folder"] == 10615 and len(cohort.quarantine) == 0


@needs_panda
def test_real_table_in_full(tmp_path):
    "All 10,616 slides of the published table, as empty files."
    listed = pd.read_csv(PANDA / "train.csv")
    make(tmp_path, table=(PANDA / "train.csv").read_text(), images=listed["image_id"], masks=listed["image_id"][100:])
    cohort = panda(tmp_path)
    assert len(cohort) == 10616 and cohort.counts["without mask"] == 100
    grades = cohort.grades()
    assert (grades.loc["radboud", "0+0"], grades.loc["karolinska", "0+0"], grades.loc["all", "0+0"]) == (
        967,
        1925,
        2892,
    )
    assert cohort.slides["provider"].value_counts().to_dict() == {"karolinska": 5456, "radboud": 5160}
    assert set(cohort.slides["codes"]) <= set(CODES)


@needs_panda
def test_real_slide_opens():
    from histonb.slides.labels import to_labels
    from histonb.slides.slides import open_slide

    row = next(panda(PANDA).slides.itertuples())
    with open_slide(row.image) as slide, open_slide(row.mask) as mask:
        assert slide.shapes[0] == mask.shapes[0]
        assert set(
            to_labels(mask.read_mask(0, 0, *mask.shapes[-1][::-1], level=len(mask.shapes) - 1), row.codes).ravel()
        ) <= {0, 1, 2, 3, 4}


def test_phantom_cohort(tmp_path):
    root = write_cohort(tmp_path / "phantom", n_slides=2, seed=0, shape=(1024, 1024), karolinska=0.5)
    cohort = panda(root)
    assert len(cohort) == 2 and set(cohort.slides["codes"]) == {"radboud", "karolinska"}
    assert all(Path(p).is_file() for c in ("image", "mask") for p in cohort.slides[c])
    assert "2 slides in 2 cases" in repr(cohort) and "<table" in cohort._repr_html_()


def test_few_missing_are_named_and_many_are_counted(tmp_path):
    names = make(tmp_path)
    for i in (3, 4):
        (tmp_path / "train_images" / f"{names[i]}.tiff").unlink()
    lost = panda(tmp_path)
    assert lost.quarantine["slide"].tolist() == names[3:5] and len(lost) == 18
    (tmp_path / "train_images" / f"{names[5]}.tiff").unlink()
    part = panda(tmp_path)
    assert len(part.quarantine) == 0 and part.counts["listed but not in the folder"] == 3 and len(part) == 17


def test_lists_of_others(tmp_path):
    names = make(tmp_path, masks=["s00", "s01"])
    (tmp_path / "s.csv").write_text('image_id,reason\ns04,"blank, or nearly"\ns04,pen\nnot-here,blank\n')
    (tmp_path / "d.csv").write_text("image_id,group\ns00,0\ns05,0\ns06,1\n")
    cohort = panda(tmp_path, suspicious=tmp_path / "s.csv", duplicates=tmp_path / "d.csv", limit=10)
    slides = cohort.slides.set_index("slide")
    assert "s04" not in slides.index and len(cohort) == 10 and cohort.counts["beyond the limit"] == 9
    assert cohort.quarantine["fault"].tolist() == ["listed as suspicious: blank, or nearly"]
    assert slides.loc["s00", "case"] == slides.loc["s05", "case"] != slides.loc["s06", "case"]
    assert slides.loc["s01", "case"] == "s01" and slides["case"].nunique() == 9
    assert slides["mask"].ne("").sum() == 2 and cohort.counts["without mask"] == 8
    assert names[0] == cohort.slides["slide"][0]


@pytest.mark.parametrize("blank", ["", " ", "nan", "NaN", "NA", "<NA>", "None", "null", "N/A", "-"])
def test_slides_of_no_group_are_no_case(tmp_path, blank):
    "A list of duplicates that names all slides, most without a group; and one group written in two ways."
    names = make(tmp_path)
    groups = {"s00": "4", "s05": "4.0", "s06": " 4", "s07": "x.0"}
    (tmp_path / "d.csv").write_text(
        "image_id,group\n" + "".join(f"{name},{groups.get(name, blank)}\n" for name in names)
    )
    case = panda(tmp_path, duplicates=tmp_path / "d.csv").slides.set_index("slide")["case"]
    assert (
        case["s00"] == case["s05"] == case["s06"] == "duplicates 4"
        and case["s07"] == "duplicates x.0"
        and case.nunique() == 18
    )
    for name in names:
        if name not in groups:
            assert case[name] == name


def test_a_table_that_another_program_saved(tmp_path):
    "Decimals, spaces, empty rows at the end."
    make(
        tmp_path,
        n=2,
        table=" image_id ,data_provider,isup_grade, gleason_score\n"
        "s00 ,radboud, 1.0,3+3\ns01,karolinska,0.0,0+0 \n,,,\n",
    )
    assert panda(tmp_path).slides[["slide", "isup", "gleason"]].values.tolist() == [
        ["s00", 1, "3+3"],
        ["s01", 0, "0+0"],
    ]


@pytest.mark.parametrize(
    "table,words",
    [
        (HEADER + "s00,radboud,1,3+3,x\n", "unreadable as CSV"),
        (HEADER + "s00,radboud,1,3+3\ns01,radboud,1,3+3,x,y\n", "unreadable as CSV"),
        (HEADER.replace("isup_grade", "image_id") + "s00,radboud,1,3+3\n", "no column `isup_grade`"),
        (HEADER + "s00,radboud\n", "`isup_grade` that is not a number from 0 to 5: `` for s00"),
        (HEADER + "s00,radboud,1.5,3+3\n", "that is not a number from 0 to 5"),
        (HEADER.replace("\n", ", image_id\n") + "s00,radboud,1,3+3,s00\n", "two columns `image_id`"),
    ],
)
def test_rows_that_do_not_fit_their_header(tmp_path, table, words):
    make(tmp_path, n=2, table=table)
    with pytest.raises(BadInput) as e:
        panda(tmp_path)
    assert words in str(e.value)


def test_endings_in_capitals_and_hidden_files(tmp_path):
    make(tmp_path, n=2, masks=["s00"])
    (tmp_path / "train_images/s01.tiff").rename(tmp_path / "train_images/s01.TIFF")
    (tmp_path / "train_label_masks/s01_MASK.TIFF").touch()
    (tmp_path / "train_images/._s00.tiff").touch()
    cohort = panda(tmp_path)
    assert cohort.slides["slide"].tolist() == ["s00", "s01"] and all(
        Path(p).exists() for c in ("image", "mask") for p in cohort.slides[c]
    )
    assert cohort.counts["in the folder but not listed"] == 0


def test_what_cannot_be_looked_at_is_named(tmp_path, monkeypatch):
    make(tmp_path)
    with pytest.raises(BadInput, match="cannot be found"):
        panda(tmp_path, suspicious=tmp_path / ("x" * 300))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cohorts.os, "scandir", refuse)
    with pytest.raises(BadInput, match=r"train_images: cannot be listed \(PermissionError.*Check its permissions"):
        panda(tmp_path)


@pytest.mark.parametrize("provider", ["radboud", "karolinska"])
def test_one_provider(tmp_path, provider):
    make(tmp_path, masks=["s00", "s01"])
    cohort = panda(tmp_path, provider=provider)
    assert len(cohort) == 10 and set(cohort.slides["provider"]) == set(cohort.slides["codes"]) == {provider}
    assert (
        cohort.counts["of another provider"] == 10
        and cohort.counts["in the folder but not listed"] == 0
        and not len(cohort.quarantine)
    )
    assert panda(tmp_path).counts["of another provider"] == 0
    for i in range(provider == "karolinska", 20, 2):
        (tmp_path / f"train_images/s{i:02d}.tiff").unlink()
    with pytest.raises(BadInput, match=f"none of the 10 slides of train.csv from {provider}"):
        panda(tmp_path, provider=provider)
    assert len(panda(tmp_path)) == 10


@pytest.mark.parametrize(
    "provider, says",
    [
        ("radbound", "Did you mean `radboud`?"),
        ("", "unknown provider"),
        ("Radboud", "Did you mean `radboud`?"),
        ("x", "Choose one of: karolinska, radboud"),
    ],
)
def test_unknown_provider(tmp_path, provider, says):
    make(tmp_path)
    with pytest.raises(BadInput, match="unknown provider") as e:
        panda(tmp_path, provider=provider)
    assert says in str(e.value)


@needs_panda
def test_real_table_of_one_provider():
    cohort = panda(PANDA, provider="radboud")
    assert len(cohort) == 1 and cohort.counts["listed but not in the folder"] == 5159
    with pytest.raises(BadInput, match="none of the 5456 slides"):
        panda(PANDA, provider="karolinska")


def test_some_slides_evenly_spread(tmp_path):
    names = make(tmp_path)
    cohort = panda(tmp_path)
    assert (
        cohort.take(3).slides["slide"].tolist() == [names[0], names[10], names[19]]
        and cohort.take(3).counts["beyond the limit"] == 17
    )
    assert len(cohort.take(1)) == 1 and cohort.take(19).slides["slide"].nunique() == 19
    for limit in (0, None, 20, 99):
        assert cohort.take(limit) is cohort


def test_workbooks(tmp_path):
    path = tmp_path / "t.xlsx"
    pd.DataFrame({"id": ["0012", "1e5", None], "n": [1, 0, None], "text": ["nan", None, None]}).to_excel(
        path, index=False
    )
    assert read_xlsx(path, ["id", "n"], key="id").values.tolist() == [
        ["0012", "1", "nan"],
        ["1e5", "0", ""],
    ]  # no numbers, no empty rows
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for i in range(150):
        harmed = bytearray(whole)
        for _ in range(rng.randrange(1, 40)):
            harmed[rng.randrange(len(harmed))] = rng.randrange(256)
        path.write_bytes(harmed if i % 3 else harmed[: rng.randrange(len(harmed))])
        try:
            read_xlsx(path, ["id"])
        except BadInput as e:
            refused += "unreadable as Excel workbook" in str(e) or "no column" in str(e)
    assert refused > 100


def test_readers_are_found_in_one_place():
    assert READERS["panda"] is panda and {"sicapv2", "pairs", "images", "ebhi_seg", "glas", "consep"} <= {*READERS}
    with pytest.raises(BadInput, match="no reader `glass` of annotated regions.*Did you mean `glas`?"):
        read_set({"reader": "glass"})


def test_a_table_saved_by_a_spreadsheet(tmp_path):
    make(tmp_path, n=1, table="\ufeff" + HEADER.replace("\n", "\r\n") + "s00,radboud,0,negative\r\n")
    assert panda(tmp_path).slides["gleason"].tolist() == ["0+0"]


@pytest.mark.parametrize(
    "table,words",
    [
        ("", "unreadable as CSV"),
        ("\x00\x01\x02", "no column `image_id`"),
        (HEADER + 's00,"radboud,1,3+3\n', "unreadable as CSV"),
        (HEADER.replace("image_id", "image"), "Did you mean `image`?"),
        (HEADER + "s00,radboud,1,3+3\ns00,radboud,1,3+3\n", "1 values of `image_id` occur more than once (s00)"),
        (HEADER + "s00,radbound,1,3+3\n", "Did you mean `radboud`?"),
        (HEADER + "s00,radboud,6,3+3\n", "`isup_grade` that is not a number from 0 to 5: `6` for s00"),
        (HEADER + "s00,radboud,1,\n", "`gleason_score`"),
        (HEADER + "other,radboud,1,3+3\n", "none of the 1 slides of train.csv is here"),
        (HEADER, "none of the 0 slides"),
    ],
)
def test_broken_tables(tmp_path, table, words):
    make(tmp_path, n=1, table=table)
    with pytest.raises(BadInput) as e:
        panda(tmp_path)
    assert words in str(e.value) and str(tmp_path) in str(e.value)


def test_broken_folders_and_lists(tmp_path):
    make(tmp_path / "good")
    cases = [
        (dict(root=tmp_path), "there is no train.csv here"),
        (dict(root=tmp_path / "none"), "there is no train.csv here"),
        (dict(suspicious=tmp_path / "none.csv"), "there is no such file"),
    ]
    for name, text, words in [
        ("bytes", b"\xff\xfe\x80\x00", "unreadable as CSV"),
        ("column", b"image_id,why\ns00,x\n", "no column `reason`"),
    ]:
        (tmp_path / name).write_bytes(text)
        cases.append((dict(suspicious=tmp_path / name), words))
    (tmp_path / "twice").write_text("image_id,group\ns00,1\ns00,2\n")
    cases.append((dict(duplicates=tmp_path / "twice"), "`image_id` occur more than once"))
    for arguments, words in cases:
        with pytest.raises(BadInput) as e:
            panda(**{"root": tmp_path / "good", **arguments})
        assert words in str(e.value)
