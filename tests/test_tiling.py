"""Tiling: the real slides against an independent reading, interruptions, and every kind of bad input."""

import dataclasses
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile

from histonb.core.errors import BadInput
from histonb.core.files import read_json, read_jsonl, write_json
from histonb.datasets.cohorts import panda
from histonb.datasets.splits import check_leak, grouped_split
from histonb.slides import tiling
from histonb.slides.cohort import Cohort
from histonb.slides.labels import IGNORE
from histonb.slides.slides import Slide, open_slide
from histonb.slides.tile_quality import FRACTIONS, QUALITY_METRICS, ink_fraction, tile_metrics
from histonb.slides.tile_rules import TileRule, apply_rule
from histonb.slides.tile_store import TileShards
from histonb.slides.tiles import TILE_COLUMNS, tile_slide
from histonb.slides.tiling import tile_cohort
from histonb.synthetic.phantom import draw_slide, write_cohort
from histonb.synthetic.writing import write_mask, write_slide

REAL = Path(__file__).parents[2] / "shared/data"
PANDA_ID = "006f6aa35a78965c92fffd1fbd53a058"
needs_panda = pytest.mark.skipif(not (REAL / "panda").exists(), reason="no ../shared/data/panda")
EMPTY = pd.DataFrame(columns=["slide", "path", "fault", "remedy"])


def real_slide():
    return REAL / f"panda/train_images/{PANDA_ID}.tiff", REAL / f"panda/train_label_masks/{PANDA_ID}_mask.tiff"


def tissue(shape, seed=0):
    "Pixels with nuclei and grain, of about the brightness of stained tissue."
    rng = np.random.default_rng(seed)
    small = rng.normal(0, 1, (shape[0] // 8 + 1, shape[1] // 8 + 1)).astype(np.float32)
    grain = cv2.resize(small, shape[::-1], interpolation=cv2.INTER_CUBIC)[..., None] * 45 + rng.normal(
        0, 6, (*shape, 3)
    )
    return np.clip(np.array([205, 150, 190]) + grain, 0, 255).astype(np.uint8)


def half_slide(path, mpp=0.5, shape=(896, 896), seed=0, **options):
    "A slide whose left half is tissue, and its mask: rows of tiles of classes 1, 3, 4 and 0."
    image = np.full((*shape, 3), 244, np.uint8)
    image[:, : shape[1] // 2] = tissue((shape[0], shape[1] // 2), seed)
    mask = np.zeros(shape, np.uint8)
    for row, code in enumerate((1, 3, 4, 0)):
        mask[224 * row : 224 * row + 224, : shape[1] // 2] = code
    write_slide(path, image, mpp=mpp, tile=256, **options)
    mask_path = path.with_name(path.stem + "_mask.tiff")
    write_mask(mask_path, mask, mpp=mpp, tile=256)
    return path, mask_path


def cohort_of(rows):
    table = pd.DataFrame(rows, columns=["slide", "image", "mask", "codes"]).astype(str)
    return Cohort("test", table.assign(cohort="test", case=table.slide, provider="", isup=0, gleason=""), EMPTY)


def content(folder):
    "The bytes of every file of a result but its journal."
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "journal.jsonl"}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = write_cohort(
        tmp_path_factory.mktemp("phantoms") / "cohort", n_slides=4, seed=1, shape=(1800, 1400), workers=1
    )
    return panda(root)


@needs_panda
def test_labels_of_the_real_slide_against_the_whole_mask():
    slide, mask = real_slide()
    table, _ = tile_slide(slide, mask, "radboud")
    codes = tifffile.imread(mask, key=0)[..., 0]
    to_class = {0: 0, 1: 1, 2: 1, 3: 2, 4: 3, 5: 4}
    for row in table.itertuples():
        values, counts = np.unique(codes[row.y : row.y + 224, row.x : row.x + 224], return_counts=True)
        fractions = dict.fromkeys(range(5), 0)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            fractions[to_class[value]] += count / 224**2
        assert row.label == max(to_class[v] for v in values.tolist())
        assert np.allclose([row.f0, row.f1, row.f2, row.f3, row.f4], list(fractions.values()), atol=1e-6)
    assert set(table.label[table.kept]) >= {1, 2}


@needs_panda
@pytest.mark.parametrize(
    "rule", [TileRule(), TileRule(max_emptiness=0.95, min_edges=0.005, max_homogeneity=0.98)], ids=["default", "loose"]
)
def test_prefilter_drops_nothing_that_the_real_slide_keeps(rule):
    path, mask = real_slide()
    pixels = tifffile.imread(path, key=0)
    table, account = tile_slide(path, mask, "radboud", rule)
    measured = {}
    for y in range(0, pixels.shape[0] - 223, 224):
        for x in range(0, pixels.shape[1] - 223, 224):
            measured[x, y] = tile_metrics(np.ascontiguousarray(pixels[y : y + 224, x : x + 224]))
    assert set(zip(table.x[table.kept], table.y[table.kept], strict=True)) == {
        k for k, m in measured.items() if rule.passes(*m)
    }
    assert account.background.sum() > 100  # and it does reject glass
    assert np.allclose(table[QUALITY_METRICS], [measured[t.x, t.y] for t in table.itertuples()], atol=0.01)


@pytest.mark.skipif(not (REAL / "slides").exists(), reason="no ../shared/data/slides")
def test_a_slide_of_one_level_is_read_in_full():
    path = REAL / "slides/CMU-1-Small-Region.svs"
    table, account = tile_slide(path)
    with open_slide(path) as slide:
        assert len(slide.shapes) == 1
    assert account.background.sum() == 0 and account.candidates.sum() == -(-2967 // 224) * -(-2220 // 224)
    assert table.kept.mean() > 0.5 and set(table.label) == {-1}
    coarse, _ = tile_slide(path, rule=TileRule(mpp=1.0))
    assert coarse.mpp.eq(1).all() and len(coarse) == (2967 // 449) * (
        2220 // 449
    )  # 224 px of 1 um are 449 px of 0.499 um


@pytest.mark.skipif(not (REAL / "GlaS").exists(), reason="no ../shared/data/GlaS")
def test_plain_images_are_slides_of_one_level(tmp_path):
    for path in (
        REAL / "GlaS/train_1.bmp",
        next((REAL / "EBHI-SEG/Normal/image").glob("*.png")),
        next((REAL / "SICAPv2/images").glob("*.jpg")),
    ):
        pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        with open_slide(path) as slide:
            assert slide.shapes == [pixels.shape[:2]]
            assert np.array_equal(slide.level(0), pixels) or path.suffix == ".jpg"
        table, account = tile_slide(path)
        assert len(table) == (pixels.shape[0] // 224) * (pixels.shape[1] // 224) and table.kept.any()
        assert np.allclose(
            table[QUALITY_METRICS],
            [tile_metrics(pixels[t.y : t.y + 224, t.x : t.x + 224].copy()) for t in table.itertuples()],
            atol=0.02,
        )
        (tmp_path / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(BadInput, match="truncated or damaged"):
            open_slide(tmp_path / path.name)
    image = next((REAL / "gleason_pairs/images").glob("*.jpg"))
    mask = REAL / f"gleason_pairs/masks/{image.stem}.png"
    table, _ = tile_slide(image, mask, {0: 2, 1: 3, 2: 4, 3: 1, 4: 1})
    codes = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
    to_class = np.array([2, 3, 4, 1, 1])
    for t in table.itertuples():
        assert t.label == to_class[codes[t.y : t.y + 224, t.x : t.x + 224]].max()
    table = tile_cohort(cohort_of([("a", image, "", "histonb")]), tmp_path / "out")
    assert TileShards(tmp_path / "out").check() == table.kept.sum() > 0


def test_thin_biopsies_survive(tmp_path):
    image = np.full((1792, 1792, 3), 244, np.uint8)
    for x in (100, 700, 1500):
        image[:, x : x + 32] = tissue((1792, 32), x)  # cores of 16 um, 14% of a tile
    write_slide(tmp_path / "thin.tiff", image, mpp=0.5)
    table, account = tile_slide(tmp_path / "thin.tiff")
    assert table.kept.sum() == 3 * 8 and account.background.sum() == 5 * 8


def test_prefilter_agrees_with_full_resolution_on_phantoms(phantoms):
    for row in phantoms.slides.itertuples():
        every, _ = tile_slide(row.image, row.mask, row.codes, TileRule(background=1.0, max_emptiness=0.9999))
        table, account = tile_slide(row.image, row.mask, row.codes)
        kept = apply_rule(every, TileRule())
        assert set(map(tuple, kept[kept.kept][["x", "y"]].to_numpy())) == set(
            map(tuple, table[table.kept][["x", "y"]].to_numpy())
        )
        assert account.background.sum() > 0


def test_ignored_tissue_is_dropped_and_accounted(tmp_path):
    slide, mask = half_slide(tmp_path / "a.tiff")
    table, account = tile_slide(slide, mask, {0: 0, 1: 1, 3: IGNORE, 4: 3})
    assert table.kept.sum() == 6 and (table.why == "ignored").sum() == 2
    assert table.label[table.why == "ignored"].eq(IGNORE).all() and table.fignore[table.why == "ignored"].eq(1).all()
    assert account.set_index("label").loc[IGNORE, "ignored"] == 2 and account.candidates.sum() == 16


def test_both_providers_in_one_cohort(tmp_path):
    root = write_cohort(tmp_path / "cohort", n_slides=4, seed=0, shape=(1800, 1400), karolinska=0.5, workers=1)
    cohort = panda(root)
    table = tile_cohort(cohort, tmp_path / "tiles").merge(cohort.slides[["slide", "codes"]])
    assert set(table.codes) == {"radboud", "karolinska"}
    swedish = table[table.codes == "karolinska"]
    assert set(swedish.label) <= {0, 1, IGNORE} and swedish.label[swedish.kept].le(1).all()
    assert (swedish.fignore[swedish.kept] == 0).all()  # no kept tile holds ungraded cancer
    assert table.fignore[table.codes == "radboud"].eq(0).all()


def test_what_a_cohort_says_of_whole_slides_goes_to_their_tiles(tmp_path):
    "Split, case and, where no mask labels the tiles, the class: histonb's id, or a number by the alphabet."
    image, mask = half_slide(tmp_path / "a.tiff")
    cohort = cohort_of(
        [("masked", image, mask, "radboud"), ("bare", image, "", "radboud"), ("unknown", image, "", "radboud")]
    )
    told = cohort.slides.assign(split=["val", "test", ""], case=["c1", "c2", "c3"])

    def tiles(classes, rows=slice(None)):
        out = tmp_path / f"{'-'.join(classes)}{len(told[rows])}"
        table = tile_cohort(Cohort("test", told[rows].assign(**{"class": classes}), EMPTY), out, workers=1)
        account = pd.read_parquet(out / "account.parquet")
        for slide, of_slide in table.groupby("slide"):
            counts = account[account.slide == slide].set_index("label")
            assert (
                counts.kept[counts.kept > 0].to_dict()
                == of_slide.label[of_slide.kept].value_counts().sort_index().to_dict()
            )
        names = (out / "classes.json").read_text() if (out / "classes.json").exists() else ""
        return table, table.groupby("slide").label.agg(set).to_dict(), names

    table, labels, names = tiles(["gleason5", "gleason3", ""])
    assert (
        labels == {"masked": {0, 1, 2, 3}, "bare": {2}, "unknown": {-1}} and not names
    )  # the mask is believed, not the class
    assert table.groupby("slide")[["split", "case"]].first().T.to_dict("list") == {
        "masked": ["val", "c1"],
        "bare": ["test", "c2"],
        "unknown": ["", "c3"],
    }
    _, labels, names = tiles(["Tumor", "Normal", ""])
    assert (
        labels == {"masked": {0, 1, 2, 3}, "bare": {-1}, "unknown": {-1}} and not names
    )  # two meanings of a number in one table are none
    table, labels, names = tiles(["Tumor", "Normal"], slice(1, None))
    assert labels == {"bare": {1}, "unknown": {0}} and names.split('"')[1::2] == ["Normal", "Tumor"]
    pd.testing.assert_frame_equal(apply_rule(table), table)  # deciding again takes no label away


def test_a_code_table_as_text(tmp_path):
    image, mask = half_slide(tmp_path / "a.tiff")
    text, _ = tile_slide(image, mask, "0: background, 1: healthy, 3: gleason3, 4: gleason4")
    pd.testing.assert_frame_equal(text, tile_slide(image, mask, "radboud")[0])
    for codes, says in [
        ("0: healthy, 1: tumour", "`tumour`, for mask value 1, is no class"),
        ({0: 9}, "is no class"),
        ("radbound", "Did you mean `radboud`?"),
        ("0=1", "unknown code table"),
    ]:
        with pytest.raises(BadInput, match=says):
            tile_slide(image, mask, codes)


def test_levels_and_resolutions_read_the_same_mask_pixels(tmp_path):
    image = tissue((1803, 2011))
    mask = np.zeros((1803, 2011), np.uint8)
    mask[700, 900] = 5  # one pixel, which no downsampled mask shows
    mask[mask == 0] = 1
    write_slide(tmp_path / "a.tiff", image, mpp=0.5)
    write_mask(tmp_path / "a_mask.tiff", mask, mpp=0.5)
    for rule, extent in (
        (TileRule(), 224),
        (TileRule(level=1), 896),
        (TileRule(mpp=1.0), 448),
        (TileRule(mpp=1.3), 582),
        (TileRule(mpp=2.0), 896),
    ):
        table, _ = tile_slide(tmp_path / "a.tiff", tmp_path / "a_mask.tiff", "radboud", rule)
        hit = table[table.label == 4]
        assert len(hit) == 1, rule
        assert hit.x.item() <= 900 < hit.x.item() + extent + 1 and hit.y.item() <= 700 < hit.y.item() + extent + 1
        assert hit.f4.item() == pytest.approx(1 / extent**2, rel=0.02)
    padded, _ = tile_slide(tmp_path / "a.tiff", tmp_path / "a_mask.tiff", "radboud", TileRule(edge="pad"))
    corner = padded[(padded.x == 224 * 8) & (padded.y == 224 * 8)].iloc[0]
    assert corner.emptiness > 1 - (2011 - 224 * 8) * (1803 - 224 * 8) / 224**2 - 1e-9  # white beyond the border
    assert corner.f1 == pytest.approx((2011 - 224 * 8) * (1803 - 224 * 8) / 224**2)


def test_result_does_not_depend_on_the_workers(phantoms, tmp_path):
    one = tile_cohort(phantoms, tmp_path / "one", workers=1)
    for workers in (2, 4):
        tile_cohort(phantoms, tmp_path / str(workers), workers=workers)
    assert content(tmp_path / "one") == content(tmp_path / "2") == content(tmp_path / "4")
    assert TileShards(tmp_path / "4").check() == one.kept.sum() == len(TileShards(tmp_path / "one"))
    assert list(one.columns) == [
        "slide",
        "x",
        "y",
        "level",
        "mpp",
        *QUALITY_METRICS,
        "kept",
        "why",
        "label",
        *FRACTIONS,
        "cohort",
        "case",
        "split",
        "shard",
        "offset",
        "nbytes",
    ]
    bare = tile_cohort(phantoms, tmp_path / "bare", store=False)
    assert set(bare["shard"]) == {-1} and not list((tmp_path / "bare").glob("*.tiles"))
    pd.testing.assert_frame_equal(
        bare.drop(columns=["shard", "offset", "nbytes"]), one.drop(columns=["shard", "offset", "nbytes"])
    )


further = [pytest.param(name, 4, marks=pytest.mark.slow) for name in ("SIGINT", "SIGTERM")]


@pytest.mark.parametrize(("name", "workers"), [("SIGKILL", 2), ("SIGINT", 2), *further])
def test_killed_and_run_again(phantoms, tmp_path, name, workers):
    rows = [(f"{r.slide}_{i}", r.image, r.mask, r.codes) for i in range(6) for r in phantoms.slides.itertuples()]
    cohort = cohort_of(rows)
    whole = tile_cohort(cohort, tmp_path / "whole")
    cohort.slides.to_parquet(tmp_path / "slides.parquet")
    code = (
        "import sys, pandas as pd\n"
        "from histonb.slides.cohort import Cohort\n"
        "from histonb.slides.tiling import tile_cohort\n"
        "if __name__ == '__main__':\n"
        "    slides = pd.read_parquet(sys.argv[1] + '/slides.parquet')\n"
        "    quarantine = pd.DataFrame(columns=['slide', 'path', 'fault', 'remedy'])\n"
        "    cohort = Cohort('test', slides, quarantine)\n"
        "    tile_cohort(cohort, sys.argv[1] + '/killed', workers=int(sys.argv[2]))\n"
    )
    (tmp_path / "job.py").write_text(code)
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py", tmp_path, str(workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    journal = tmp_path / "killed/journal.jsonl"
    end = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < end and job.poll() is None
    os.killpg(job.pid, getattr(signal, name))
    job.wait(60)
    assert not (tmp_path / "killed/tiles.parquet").exists()  # it was caught half-way
    if name == "SIGINT":
        assert not [p for p in (tmp_path / "killed").rglob(".*")]  # nothing half-written stays
    done = len(read_jsonl(journal))
    assert 2 <= done < len(rows)
    again = tile_cohort(cohort, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert TileShards(tmp_path / "killed").check() == whole.kept.sum() == again.kept.sum()
    assert len(read_jsonl(journal)) == len(rows)  # no slide was done twice


def test_bad_slides_are_quarantined_and_the_rest_goes_on(tmp_path):
    good, good_mask = half_slide(tmp_path / "good.tiff")
    whole = good.read_bytes()
    (tmp_path / "empty.tiff").write_bytes(b"")
    (tmp_path / "cut.tiff").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tiff").write_text("this is not a slide" * 100)
    with open_slide(good) as slide:
        at = int(slide.levels[0].offsets[0, 1, 0])
    (tmp_path / "stream.tiff").write_bytes(whole[:at] + b"\0" * 200 + whole[at + 200 :])
    nomask, _ = half_slide(tmp_path / "nomask.tiff")
    nompp, nompp_mask = half_slide(tmp_path / "nompp.tiff", mpp=None)
    write_mask(tmp_path / "small_mask.tiff", np.ones((600, 600), np.uint8))
    write_mask(tmp_path / "codes_mask.tiff", np.full((896, 896), 9, np.uint8))
    write_mask(tmp_path / "void_mask.tiff", np.zeros((896, 896), np.uint8))
    write_slide(tmp_path / "glass.tiff", np.full((896, 896, 3), 245, np.uint8))
    rows = [
        ("good", good, good_mask, "radboud"),
        ("empty", tmp_path / "empty.tiff", good_mask, "radboud"),
        ("cut", tmp_path / "cut.tiff", good_mask, "radboud"),
        ("text", tmp_path / "text.tiff", good_mask, "radboud"),
        ("gone", tmp_path / "gone.tiff", good_mask, "radboud"),
        ("stream", tmp_path / "stream.tiff", good_mask, "radboud"),
        ("nomask", nomask, "", "radboud"),
        ("nompp", nompp, nompp_mask, "radboud"),
        ("lostmask", good, tmp_path / "lost_mask.tiff", "radboud"),
        ("small", good, tmp_path / "small_mask.tiff", "radboud"),
        ("codes", good, tmp_path / "codes_mask.tiff", "radboud"),
        ("void", good, tmp_path / "void_mask.tiff", "radboud"),
        ("glass", tmp_path / "glass.tiff", "", "radboud"),
        ("last", good, good_mask, "radboud"),
    ]
    expected = {
        "empty": "empty (0 bytes)",
        "cut": "truncated",
        "text": "not a TIFF",
        "gone": "no such file",
        "lostmask": "no such file",
        "small": "600x600 pixels, its slide 896x896",
        "codes": "mask values 9 are not among",
        "void": "marks nothing",
        "glass": "no tissue",
    }
    for workers in (2, 4):
        table = tile_cohort(cohort_of(rows), tmp_path / f"out{workers}", workers=workers)
        assert table.slide.unique().tolist() == ["good", "stream", "nomask", "nompp", "last"]
        assert table.groupby("slide").kept.sum().to_dict() == {
            **dict.fromkeys(["good", "nomask", "nompp", "last"], 8),
            "stream": 4,
        }
        assert table.why[table.slide == "stream"].value_counts()["damaged"] == 4  # tiles of 224 that lie on one of 256
        assert set(table.label[table.slide == "nomask"]) == {-1} and table.mpp[table.slide == "nompp"].isna().all()
        assert table.label[table.kept & (table.slide == "good")].value_counts().to_dict() == {0: 2, 1: 2, 2: 2, 3: 2}
        quarantine = pd.read_csv(tmp_path / f"out{workers}/quarantine.csv").set_index("slide")
        assert list(quarantine.index) == list(expected)
        for slide, fault in expected.items():
            assert fault in quarantine.fault[slide] and quarantine.remedy[slide]
        assert not (tmp_path / f"out{workers}/parts").exists()
        TileShards(tmp_path / f"out{workers}").check()
    with pytest.raises(BadInput, match="empty.tiff"):
        tile_cohort(cohort_of(rows), tmp_path / "strict", strict=True)
    scaled = tile_cohort(
        cohort_of(rows[6:8]), tmp_path / "scaled", TileRule(mpp=0.5)
    )  # here a slide needs its resolution
    assert set(scaled.slide) == {"nomask"}
    assert "how many microns" in pd.read_csv(tmp_path / "scaled/quarantine.csv").fault[0]
    known = cohort_of(rows[7:8])
    known.slides["mpp"] = 0.5  # which the cohort may give
    assert tile_cohort(known, tmp_path / "known", TileRule(mpp=0.5)).mpp.eq(0.5).all()


@pytest.mark.parametrize(
    "error",
    [
        IndexError("beyond"),
        ZeroDivisionError(),
        MemoryError("1 TiB"),
        OSError(errno.EIO, "Input/output error"),
        RecursionError(),
        AssertionError("a"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
        cv2.error("(-215)"),
        np.linalg.LinAlgError("singular"),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("where", ["open", "read", "cut"])
def test_any_exception_costs_its_slide_only(tmp_path, monkeypatch, error, where):
    "Whatever a slide raises, and wherever: it is set aside with type and place, twice, and a job that is strict stops."
    image, mask = half_slide(tmp_path / "a.tiff", shape=(896, 448))
    bad, _ = half_slide(tmp_path / "bad.tiff", shape=(896, 448))

    def evil(real):
        def raising(slide, *args, **kwargs):
            if Path(getattr(slide, "path", slide)).name == "bad.tiff":
                raise error
            return real(slide, *args, **kwargs)

        return raising

    target, name = {"open": (tiling, "open_slide"), "read": (Slide, "internal_tile"), "cut": (tiling, "tile_slide")}[
        where
    ]
    monkeypatch.setattr(target, name, evil(getattr(target, name)))
    cohort = cohort_of(
        [("first", image, mask, "radboud"), ("bad", bad, mask, "radboud"), ("last", image, mask, "radboud")]
    )
    for _ in range(2):
        table = tile_cohort(cohort, tmp_path / "out", workers=1)
        quarantine = pd.read_csv(tmp_path / "out/quarantine.csv", keep_default_na=False)
        assert (
            table.slide.unique().tolist() == ["first", "last"]
            and quarantine.slide.tolist() == ["bad"]
            and quarantine.path.tolist() == [str(bad)]
        )
        assert (
            re.match(rf"unexpected {type(error).__name__} in \w+\.py, line \d+ \(\w+\)", quarantine.fault[0])
            and quarantine.remedy[0]
        )
    assert len(read_jsonl(tmp_path / "out/journal.jsonl")) == 2
    with pytest.raises(BadInput, match=f"bad.tiff: unexpected {type(error).__name__}") as raised:
        tile_cohort(cohort, tmp_path / "strict", workers=1, strict=True)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
    ids=["Ctrl-C", "disk", "quota"],
)
def test_what_is_no_slides_fault_stops_the_job(phantoms, tmp_path, monkeypatch, error):
    def raising(*args, **kwargs):
        raise error

    monkeypatch.setattr(tiling, "tile_slide", raising)
    with pytest.raises(
        KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BadInput,
        match=None if isinstance(error, KeyboardInterrupt) else "the disk is full",
    ):
        tile_cohort(phantoms, tmp_path / "out", workers=1)


def test_a_worker_that_dies_costs_its_slide_only(phantoms, tmp_path):
    rows = [(f"s{i}", r.image, r.mask, r.codes) for i, r in enumerate(pd.concat([phantoms.slides] * 2).itertuples())]
    cohort_of(rows).slides.to_parquet(tmp_path / "slides.parquet")
    (tmp_path / "job.py").write_text("""import os, signal, sys
import pandas as pd
from histonb.slides import tiling
from histonb.slides.cohort import Cohort
whole = tiling._tile
def dying(job):
    if job.slide == "s2": os.kill(os.getpid(), signal.SIGSEGV)
    if job.slide == "s5": os._exit(7)
    return whole(job)
dying.__module__, dying.__qualname__, tiling._tile = "histonb.slides.tiling", "_tile", dying
if __name__ == "__main__":
    slides = pd.read_parquet("slides.parquet")
    quarantine = pd.DataFrame(columns=["slide", "path", "fault", "remedy"])
    tiling.tile_cohort(Cohort("test", slides, quarantine), "out", workers=4)
""")
    done = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(tmp_path / "out/tiles.parquet")
    quarantine = pd.read_csv(tmp_path / "out/quarantine.csv")
    assert quarantine.slide.tolist() == ["s2", "s5"] and quarantine.path.tolist() == [rows[2][1], rows[5][1]]
    assert [re.search(r"the process that tiled it died \((.*)\)", fault)[1] for fault in quarantine.fault] == [
        "SIGSEGV",
        "exit code 7",
    ]
    whole = tile_cohort(cohort_of([row for row in rows if row[0] not in ("s2", "s5")]), tmp_path / "whole")
    pd.testing.assert_frame_equal(table, whole)
    assert TileShards(tmp_path / "out").check() == whole.kept.sum() and not (tmp_path / "out/parts").exists()


def test_a_worker_killed_by_somebody_costs_nothing(phantoms, tmp_path):
    rows = [(f"{r.slide}_{i}", r.image, r.mask, r.codes) for i in range(4) for r in phantoms.slides.itertuples()]
    cohort = cohort_of(rows)
    parent = os.getpid()
    killed = threading.Event()

    def kill():
        "One of the two workers, once the first slides are done."
        while not killed.is_set():
            workers = [
                p
                for p in subprocess.run(
                    ["pgrep", "-P", str(parent), "-f", "spawn_main"], capture_output=True, text=True
                ).stdout.split()
                if p
            ]
            journal = tmp_path / "out/journal.jsonl"
            if len(workers) == 2 and journal.exists() and journal.read_bytes().count(b"\n") >= 2:
                os.kill(int(workers[0]), signal.SIGKILL)
                killed.set()
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        table = tile_cohort(cohort, tmp_path / "out", workers=4)
    finally:
        was_killed = killed.is_set()
        killed.set()
        thread.join()
    assert was_killed and pd.read_csv(tmp_path / "out/quarantine.csv").empty
    tile_cohort(cohort, tmp_path / "whole", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole") and table.slide.nunique() == len(rows)


NAMES = [
    ".hidden",
    "..",
    "a.b.c",
    "100%41",
    "a#b?c",
    "sp ace",
    "quo'te\"",
    "new\nline",
    "tab\t",
    "\u00e9",
    "e\u0301",
    "A",
    "a",
    "up/down",
    "NA",
    "\u8abf" * 28,
    "\u75c5" * 120,
    "x" * 240,
]


def test_names_of_every_kind(tmp_path):
    "Hidden, long, or in any script: the tiles of a slide are kept under its own name, by one process and by two."
    image, mask = half_slide(tmp_path / "a.tiff", shape=(896, 448))
    cohort = cohort_of(
        [(name, image, mask, "radboud") for name in NAMES]
        + [("lost, \u8abf", tmp_path / ("\u8abf" * 200 + ".tiff"), "", "radboud")]
    )
    for workers in (1, 4):
        out = tmp_path / f"out{workers}"
        table = tile_cohort(cohort, out, workers=workers)
        assert table.slide.unique().tolist() == NAMES and table[table.kept].groupby("slide").size().eq(4).all()
        assert TileShards(out).check() == 4 * len(NAMES) and not (out / "parts").exists()
        quarantine = pd.read_csv(out / "quarantine.csv")
        assert quarantine.slide.tolist() == ["lost, \u8abf"]
        assert tile_cohort(cohort, out, workers=workers).equals(table)
    assert content(tmp_path / "out1") == content(tmp_path / "out4")


def test_a_mask_that_only_some_slides_have(tmp_path):
    "However a table says that there is none."
    image, mask = half_slide(tmp_path / "a.tiff", shape=(896, 448))
    cohort = cohort_of([(name, image, mask, "radboud") for name in ("a", "b", "c", "d")])
    cohort.slides["mask"] = pd.Series([str(mask), "", None, np.nan], dtype=object)
    table = tile_cohort(cohort, tmp_path / "out", workers=1)
    assert table.groupby("slide").f0.apply(lambda f: f.notna().all()).to_dict() == {
        "a": True,
        "b": False,
        "c": False,
        "d": False,
    }


def test_a_resolution_that_is_known_of_some_slides_only(tmp_path):
    "A column of numbers and gaps: a gap is no resolution, and the file's own counts."
    (image, mask), (bare, bare_mask) = (
        half_slide(tmp_path / "a.tiff", shape=(896, 448)),
        half_slide(tmp_path / "b.tiff", mpp=None, shape=(896, 448)),
    )
    cohort = cohort_of([("told", bare, bare_mask, "radboud"), ("says", image, mask, "radboud")])
    cohort.slides["mpp"] = [0.5, np.nan]
    assert tile_cohort(cohort, tmp_path / "out", TileRule(mpp=0.5)).groupby("slide").mpp.first().to_dict() == {
        "told": 0.5,
        "says": 0.5,
    }


def broken(path, places, level=0, name="broken"):
    "A copy of a slide or mask in which internal tiles at (row, column) of a level are zeros."
    data = bytearray(path.read_bytes())
    with open_slide(path, mask=True) as slide:
        at = slide.levels[level]
    for row, column in places:
        start = at.offsets[0, row, column]
        count = at.counts[0, row, column]
        data[start : start + count] = bytes(count)
    copy = path.with_name(f"{name}_{path.name}")
    copy.write_bytes(data)
    return copy


def lies_on(table, row, column, side=256, tile=224):
    "Which tiles of a table lie on an internal tile."

    def over(start, number):
        return (start < (number + 1) * side) & (start + tile > number * side)

    return over(table.x, column) & over(table.y, row)


def test_one_broken_internal_tile_costs_the_tiles_on_it(tmp_path):
    slide, mask = half_slide(tmp_path / "a.tiff")
    whole, before = tile_slide(slide, mask, "radboud")
    cases = {"slide": (broken(slide, [(1, 0)]), mask), "mask": (slide, broken(mask, [(1, 0)]))}
    for name, files in cases.items():
        table, account = tile_slide(*files, "radboud")
        lost = lies_on(table, 1, 0)
        assert lost.sum() == 4 and (table.why == "damaged").equals(lost)
        assert not table.kept[lost].any() and (table.nbytes[lost] == -1).all()
        assert table.loc[lost, QUALITY_METRICS].isna().to_numpy().all()
        assert table.loc[lost, FRACTIONS].isna().to_numpy().all() == (name == "mask")  # the label is not known, or is
        rest = whole[~lost].assign(slide=table.slide[0], case=table.case[0])
        pd.testing.assert_frame_equal(table[~lost].drop(columns="offset"), rest.drop(columns="offset"))
        assert account.damaged.sum() == 4 and account.kept.sum() == before.kept.sum() - 4
        assert account.candidates.sum() == before.candidates.sum()
        pd.testing.assert_frame_equal(apply_rule(table), table)
        with pytest.raises(BadInput, match=r"damaged internal tile .level 0, row 1, column 0"):
            tile_slide(*files, "radboud", TileRule(max_damaged=0))
    two = broken(slide, [(1, 0), (2, 1)])
    all_tissue = [(row, column) for row in range(4) for column in range(2)]
    with pytest.raises(BadInput, match="2 internal tiles are damaged, 1 may be"):
        tile_slide(two, mask, "radboud", TileRule(max_damaged=1))
    assert tile_slide(two, mask, "radboud", TileRule(max_damaged=2))[1].damaged.sum() > 4
    with pytest.raises(BadInput, match="no tile is kept.*damaged"):
        tile_slide(broken(slide, all_tissue), mask, "radboud")
    with pytest.raises(BadInput, match="max_damaged. is -1"):
        TileRule(max_damaged=-1)


def test_damage_at_low_resolution_is_not_glass(tmp_path):
    "What cannot be seen at low resolution is looked at in full."
    slide, mask = half_slide(tmp_path / "a.tiff")
    whole, before = tile_slide(slide, mask, "radboud")
    unread = before.background.sum()
    assert unread == 7  # of the right half
    for level in (1, 2):
        table, account = tile_slide(broken(slide, [(0, 0)], level), mask, "radboud")
        assert table.kept.sum() == whole.kept.sum() and account.damaged.sum() == 0
        assert account.background.sum() == (0 if level == 2 else unread)  # only the coarsest is looked at


def test_damage_is_counted_in_a_cohort(tmp_path):
    slide, mask = half_slide(tmp_path / "a.tiff")
    hurt = broken(slide, [(1, 0)])
    lost = broken(slide, [(0, 0), *((row, 1) for row in range(4))], name="lost")
    cohort = cohort_of(
        [("good", slide, mask, "radboud"), ("hurt", hurt, mask, "radboud"), ("lost", lost, mask, "radboud")]
    )
    for workers in (1, 4):
        out = tmp_path / f"out{workers}"
        table = tile_cohort(cohort, out, TileRule(max_damaged=4), workers=workers)
        account = pd.read_parquet(out / "account.parquet").groupby("slide")[["damaged", "kept", "candidates"]].sum()
        assert account.to_dict("index") == {
            "good": {"damaged": 0, "kept": 8, "candidates": 16},
            "hurt": {"damaged": 4, "kept": 4, "candidates": 16},
        }
        quarantine = pd.read_csv(out / "quarantine.csv").set_index("slide")
        assert "internal tiles are damaged, 4 may be" in quarantine.fault["lost"]
        assert TileShards(out).check() == table.kept.sum() == 12
    for allowed, slides in ((0, ["good"]), (16, ["good", "hurt", "lost"]), (4, ["good", "hurt"])):
        again = tile_cohort(
            cohort, out, TileRule(max_damaged=allowed)
        )  # in the same folder, as if it were the first time
        fresh = tile_cohort(cohort, tmp_path / f"fresh{allowed}", TileRule(max_damaged=allowed))
        assert again.slide.unique().tolist() == slides
        pd.testing.assert_frame_equal(again.drop(columns="offset"), fresh.drop(columns="offset"))
        assert TileShards(out).check() == fresh.kept.sum()


def test_what_a_folder_is_protected_from(phantoms, tmp_path):
    tile_cohort(phantoms, tmp_path / "out")
    before = content(tmp_path / "out")
    assert not (tmp_path / "out/parts").exists()
    with pytest.raises(BadInput, match="another rule .size 224 -> 256"):
        tile_cohort(phantoms, tmp_path / "out", TileRule(size=256))
    with pytest.raises(BadInput, match="store True -> False"):
        tile_cohort(phantoms, tmp_path / "out", store=False)
    with pytest.raises(BadInput, match="occur twice"):
        tile_cohort(Cohort("twins", pd.concat([phantoms.slides] * 2), EMPTY), tmp_path / "out")
    assert content(tmp_path / "out") == before
    shard = tmp_path / "out/shard-00000.tiles"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(BadInput, match="shard-00000.tiles: truncated"):
        tile_cohort(phantoms, tmp_path / "out")


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("rule.json", "[1, 2]", "no rule of tiling"),
        ("rule.json", '{"size": 224', "not valid JSON"),
        ("rule.json", "{}", "no rule of tiling"),
        ("tiles.parquet", "PAR1", "unreadable as a Parquet table"),
        ("tiles.parquet", "without slide", "no column `slide`"),
        ("tiles.parquet", "without f0", "no column `f0`"),
        ("journal.jsonl", '{"slide": "a"}\n', "a line is not of a journal of tiles"),
        (
            "journal.jsonl",
            '{"slide": "phantom1_000", "key": "x", "shard": 0, "start": 0, "end": 5, "incomplete": 0, "background": 0, '
            '"damaged": "x"}\n',
            "a line is not of a journal",
        ),
        ("journal.jsonl", "[1]\n", "line 1 is not a record"),
        ("journal.jsonl", '{"slide": "a", \n{}\n', "line 1 is not a record"),
        ("journal.jsonl", b"\xff\xfe\n", "line 1 is not a record"),
        (
            "journal.jsonl",
            '{"slide": "phantom1_000", "key": "x", "shard": "0", "start": 0, "end": 5, "incomplete": 0, '
            '"background": 0}\n',
            "a line is not of a journal of tiles",
        ),
    ],
)
def test_a_store_with_a_damaged_file_is_refused_by_name(phantoms, tmp_path, name, content, says):
    "And what is whole stays as it is."
    tile_cohort(phantoms, tmp_path / "out")
    path = tmp_path / "out" / name
    if str(content).startswith("without"):
        pd.read_parquet(path).drop(columns=content.split()[1]).to_parquet(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = content_of_files(tmp_path / "out")
    with pytest.raises(BadInput, match=says) as e:
        tile_cohort(phantoms, tmp_path / "out")
    assert name in e.value.path or says == "another rule"
    assert e.value.remedy and content_of_files(tmp_path / "out") == before
    if name == "tiles.parquet":  # what the remedy says
        path.unlink()
        assert (
            tile_cohort(phantoms, tmp_path / "out").slide.nunique()
            == TileShards(tmp_path / "out").table.slide.nunique()
            == len(phantoms)
        )


def test_a_damaged_part_is_named_and_done_again_when_deleted(phantoms, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tiling, "_assemble", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tile_cohort(phantoms, tmp_path / "out", workers=1)
    part = sorted((tmp_path / "out/parts").glob("*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(BadInput, match=f"{part.name}: unreadable as a Parquet table.*Delete it and run again"):
        tile_cohort(phantoms, tmp_path / "out", workers=1)
    part.unlink()
    table = tile_cohort(phantoms, tmp_path / "out", workers=1)
    pd.testing.assert_frame_equal(
        table.drop(columns="offset"), tile_cohort(phantoms, tmp_path / "whole").drop(columns="offset")
    )
    assert TileShards(tmp_path / "out").check() == table.kept.sum()


def test_two_jobs_in_one_folder(phantoms, tmp_path, monkeypatch):
    def meanwhile(*args, **kwargs):
        with pytest.raises(BadInput, match="another process"):
            tile_cohort(phantoms, tmp_path / "out")
        return EMPTY

    monkeypatch.setattr(tiling, "_run", meanwhile)
    tile_cohort(phantoms, tmp_path / "out")


@pytest.mark.parametrize("where", ["part", "shard", "journal", "table"])
def test_full_disk(phantoms, tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    first = Cohort("test", phantoms.slides[:2], EMPTY)
    tile_cohort(first, tmp_path / "out")
    before = content(tmp_path / "out")
    with monkeypatch.context() as patch:
        if where == "part":
            patch.setattr(pd.DataFrame, "to_parquet", full)
        if where == "shard":
            patch.setattr("histonb.slides.tile_store.shutil.copyfileobj", full)
        if where == "journal":
            patch.setattr(tiling, "append_jsonl", full)
        if where == "table":
            patch.setattr(tiling, "_assemble", full)
        with pytest.raises(BadInput, match="the disk is full"):
            tile_cohort(phantoms, tmp_path / "out")
    after = content_of_files(tmp_path / "out")
    if where in ("part", "shard"):
        assert after == before  # the old state is intact
    assert after["tiles.parquet"] == before["tiles.parquet"] and TileShards(tmp_path / "out").check()
    tile_cohort(phantoms, tmp_path / "out")
    tile_cohort(phantoms, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def content_of_files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file() and p.name != "journal.jsonl"}


def test_a_changed_slide_is_done_again_and_a_mended_one_joins(phantoms, tmp_path):
    rows = [(r.slide, tmp_path / Path(r.image).name, r.mask, r.codes) for r in phantoms.slides.itertuples()]
    for (_, image, _, _), source in zip(rows, phantoms.slides.image, strict=True):
        shutil.copy(source, image)
    whole = rows[1][1].read_bytes()
    rows[1][1].write_bytes(whole[:1000])
    cohort = cohort_of(rows)
    assert tile_cohort(cohort, tmp_path / "out").slide.nunique() == 3
    rows[1][1].write_bytes(whole)  # downloaded again
    shutil.copy(phantoms.slides.image[0], rows[2][1])  # and another was replaced
    table = tile_cohort(cohort, tmp_path / "out")
    assert table.slide.unique().tolist() == [r[0] for r in rows] and pd.read_csv(tmp_path / "out/quarantine.csv").empty
    fresh = tile_cohort(cohort, tmp_path / "fresh")
    pd.testing.assert_frame_equal(table.drop(columns=["offset"]), fresh.drop(columns=["offset"]))
    TileShards(tmp_path / "out").check()
    fewer = tile_cohort(
        Cohort("fewer", cohort.slides[:1], EMPTY), tmp_path / "out"
    )  # a slide taken off the list leaves the table
    assert fewer.slide.unique().tolist() == [rows[0][0]]


def test_several_resolutions_in_one_store(phantoms, tmp_path):
    "Each is what it is alone, cases are one over all, and the result depends on no order, worker or interruption."
    mpps = (0.5, 1.0, 2.0)
    table = tile_cohort(phantoms, tmp_path / "all", mpps=mpps, workers=4)
    places = ["shard", "offset"]
    for mpp in mpps:
        alone = tile_cohort(phantoms, tmp_path / str(mpp), TileRule(mpp=mpp))
        ours = table[table.mpp == mpp].reset_index(drop=True)
        pd.testing.assert_frame_equal(ours.drop(columns=places), alone.drop(columns=places))
        stores = [TileShards(tmp_path / "all", ours[ours.kept]), TileShards(tmp_path / str(mpp))]
        assert [stores[0].jpeg(i) for i in range(len(stores[0]))] == [stores[1].jpeg(i) for i in range(len(stores[1]))]
    account = pd.read_parquet(tmp_path / "all/account.parquet")
    alone = [pd.read_parquet(tmp_path / f"{mpp}/account.parquet") for mpp in mpps]
    summed = pd.concat(alone).groupby(["slide", "label"], as_index=False).sum()
    pd.testing.assert_frame_equal(account.sort_values(["slide", "label"], ignore_index=True), summed)
    split = grouped_split(table[table.kept], (0.5, 0.25, 0.25))
    assert check_leak(split)["leaking_cases"] == 0 and split.groupby("case").mpp.nunique().eq(3).all()

    tile_cohort(phantoms, tmp_path / "turned", mpps=mpps[::-1], workers=1)
    tile_cohort(Cohort("two", phantoms.slides[:2], EMPTY), tmp_path / "stopped", mpps=mpps)
    before = read_jsonl(tmp_path / "stopped/journal.jsonl")
    tile_cohort(phantoms, tmp_path / "stopped", mpps=mpps)
    assert content(tmp_path / "all") == content(tmp_path / "turned") == content(tmp_path / "stopped")
    lines = [(row["slide"], row["mpp"]) for row in read_jsonl(tmp_path / "stopped/journal.jsonl")]
    assert len(before) == 6 and lines == [(slide, mpp) for slide in phantoms.slides.slide for mpp in mpps]
    with pytest.raises(BadInput, match="another rule .mpp .0.5, 1.0, 2.0. -> 0.5"):
        tile_cohort(phantoms, tmp_path / "all", TileRule(mpp=0.5))
    with pytest.raises(BadInput, match="names one twice"):
        tile_cohort(phantoms, tmp_path / "twice", mpps=(1, 1.0))


def test_a_slide_that_has_only_some_of_the_resolutions(tmp_path):
    fine, coarse = half_slide(tmp_path / "fine.tiff")[0], half_slide(tmp_path / "coarse.tiff", mpp=1.0)[0]
    (tmp_path / "empty.tiff").write_bytes(b"")
    rows = [("fine", fine, "", "radboud"), ("coarse", coarse, "", "radboud")]
    cohort = cohort_of([*rows, ("empty", tmp_path / "empty.tiff", "", "radboud")])
    table = tile_cohort(cohort, tmp_path / "out", mpps=(0.5, 1.0))
    assert table.groupby("slide").mpp.agg(set).to_dict() == {"fine": {0.5, 1.0}, "coarse": {1.0}}
    quarantine = pd.read_csv(tmp_path / "out/quarantine.csv").set_index("slide")
    assert sorted(quarantine.index) == ["coarse", "empty"]  # the empty file once, though it failed twice
    assert quarantine.fault["coarse"].startswith("at 0.5 um/px: tiles at 0.5 um/px are finer than the slide")
    assert "um/px" not in quarantine.fault["empty"]
    with pytest.raises(BadInput, match="finer than the slide"):
        tile_cohort(cohort, tmp_path / "strict", mpps=(0.5, 1.0), strict=True)


def test_a_journal_of_an_earlier_version_told_no_resolution(phantoms, tmp_path):
    rule = TileRule(mpp=1.0)
    tile_cohort(phantoms, tmp_path, rule)
    journal = tmp_path / "journal.jsonl"
    journal.write_text(re.sub(', "mpp": 1.0', "", journal.read_text()))
    before = content(tmp_path)
    tile_cohort(phantoms, tmp_path, rule)
    assert content(tmp_path) == before and len(read_jsonl(journal)) == len(phantoms.slides)


# Ink ----------------------------------------------------------------------------------------------------------------


def test_ink_is_looked_for_only_where_asked(tmp_path):
    "A pen mark costs the tiles under it; without a threshold the table is the one of before, to the column."
    draw = draw_slide(1, (1120, 1120), pen=True, instances=False)
    write_slide(tmp_path / "s.tiff", draw.image, mpp=0.5)
    plain, counts = tile_slide(tmp_path / "s.tiff")
    assert list(plain) == TILE_COLUMNS and counts.ink.sum() == 0
    rule = TileRule(max_ink=0.05)
    table, counts = tile_slide(tmp_path / "s.tiff", rule=rule)
    dropped = table[table.why == "ink"]
    assert 2 < counts.ink.sum() == len(dropped) < 20 and dropped.ink.gt(0.05).all()
    assert plain.kept[dropped.index].all() and not table.kept[table.ink > 0.05].any()
    pd.testing.assert_frame_equal(table[QUALITY_METRICS], plain[QUALITY_METRICS])
    for t in table.itertuples():
        truth = draw.image[t.y : t.y + 224, t.x : t.x + 224]
        assert t.ink == pytest.approx(ink_fraction(truth), abs=0.03)  # but for the JPEG
    again = apply_rule(table, dataclasses.replace(rule, max_ink=0.9))
    assert again.kept.sum() == plain.kept.sum()
    with pytest.raises(BadInput, match="ink was not measured.*Tile again"):
        apply_rule(plain, rule)


def test_ink_in_a_cohort_that_is_begun_by_an_earlier_version(tmp_path):
    "Its rule knew no ink: it goes on without; with a threshold it is another rule."
    cohort = cohort_of([(name, half_slide(tmp_path / f"{name}.tiff")[0], "", "histonb") for name in "ab"])

    def tile(folder, slides, **options):
        return tile_cohort(cohort.take(slides), tmp_path / folder, TileRule(**options), workers=1, store=False)

    tile("plain", 1)
    rule = read_json(tmp_path / "plain/rule.json")
    del rule["max_ink"]
    write_json(tmp_path / "plain/rule.json", rule)
    table = tile("plain", 2)
    assert list(table) == TILE_COLUMNS and table.slide.nunique() == 2
    with pytest.raises(BadInput, match="max_ink 1.0 -> 0.1"):
        tile("plain", 2, max_ink=0.1)
    for slides in (1, 2):  # goes on from the table that is there
        table = tile("ink", slides, max_ink=0.1)
        assert "ink" in table and table.slide.nunique() == slides
