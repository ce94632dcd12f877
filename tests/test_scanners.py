"Other scanners' files, which OpenSlide reads behind the same `Slide`: geometry, pixels, sharing, damage, refusals."

import multiprocessing
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import scanner_files
import tifffile

from histonb.core.errors import BadInput
from histonb.slides.cohort import QUARANTINE_COLUMNS, SLIDE_COLUMNS, Cohort
from histonb.slides.slides import open_slide
from histonb.slides.tile_rules import TileRule
from histonb.slides.tile_store import SlideTiles, TileShards
from histonb.slides.tiles import tile_slide
from histonb.slides.tiling import tile_cohort
from histonb.synthetic.phantom import draw_slide

openslide = pytest.importorskip("openslide", reason="openslide is an extra (`scanners`)")

KINDS = ["ndpi", "vms", "dicom", "mirax", "aperio_33003", "scn", "bif"]
EXACT = {"dicom", "mirax", "scn", "bif"}  # stored without loss
RULE = TileRule(size=128, max_emptiness=0.97)


@pytest.fixture(scope="module")
def picture():
    return draw_slide(3, (1024, 1536), instances=False).image


@pytest.fixture(scope="module")
def files(picture, tmp_path_factory):
    "One file of each kind, all of the same picture."
    written = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        written[kind] = getattr(scanner_files, f"write_{kind}")(folder / "slide", picture)
    return written


@pytest.fixture(scope="module")
def plain(picture, tmp_path_factory):
    "The same picture in a TIFF that our own reader takes."
    path = tmp_path_factory.mktemp("plain") / "slide.tiff"
    with tifffile.TiffWriter(path) as out:
        for factor in (1, 4):
            level = scanner_files.shrunk(picture, factor)
            more = {"subfiletype": int(factor > 1), "metadata": None, **scanner_files.CM}
            out.write(level, photometric="rgb", tile=(256, 256), compression="zlib", **more)
    return path


def shown(kind, picture):
    "What a file shows of the picture: an SCN has two areas apart, overlapping tiles stop with the last whole one."
    if kind == "bif":
        return picture[:, :1472]
    if kind == "scn":
        gap = np.full((1024, 768, 3), 255, np.uint8)
        return np.concatenate([picture[:, :768], gap, picture[:, 768:]], 1)
    return picture


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_and_geometry(files, picture, kind):
    wanted = shown(kind, picture)
    with open_slide(files[kind]) as slide:
        assert slide.base.shape == wanted.shape[:2] and slide.mpp == pytest.approx(0.5)
        for (height, width), (fx, fy) in zip(slide.shapes, slide.factors, strict=True):
            assert fx == fy and (height, width) == (wanted.shape[0] // fy, wanted.shape[1] // fx)
        difference = np.abs(slide.level(0).astype(int) - wanted)
        assert difference.max() == 0 if kind in EXACT else difference.mean() < 1.5
        if kind != "bif":  # which has one level
            level = slide.factors.index((4.0, 4.0))
            small = scanner_files.shrunk(wanted, 4)
            assert np.abs(slide.level(level).astype(int) - small).mean() < 2.5
            part = slide.read(400, 240, 64, 48, level)
            assert np.array_equal(part, slide.level(level)[60:108, 100:164])
        assert (slide.read(-30, -30, 30, 30) == 255).all() and (slide.read(9000, 0, 9, 9) == 255).all()
        whole = slide.level(0)
        xy = [(x, y) for y in range(-50, 1000, 300) for x in range(-50, 1500, 300)]
        equal = slide.map_tiles(lambda i, tile: np.array_equal(tile, slide.read(*xy[i], 200, 200)), xy, 200)
        assert all(equal) and np.array_equal(slide.read(100, 100, 200, 200), whole[100:300, 100:300])
        assert slide.jpeg_source() is None and max(slide.thumbnail(100).shape) == 100


def test_what_was_not_scanned_is_white_and_lies_outside(files):
    "A canvas as large as the glass is cut to its bounds; gaps within are white, though OpenSlide has them transparent."
    with open_slide(files["mirax"]) as slide, openslide.OpenSlide(files["mirax"]) as other:
        assert other.dimensions == (2560, 1536) and slide.base.shape == (1024, 1536)
        assert (slide.read(-8, 0, 8, 8) == 255).all()
        assert np.array_equal(slide.read(0, 0, 64, 64), np.asarray(other.read_region((640, 384), 0, (64, 64)))[..., :3])
    with open_slide(files["scn"]) as slide, openslide.OpenSlide(files["scn"]) as other:
        assert np.asarray(other.read_region((1900, 2000), 0, (50, 50)))[..., 3].max() == 0
        assert (slide.read(900, 0, 50, 50) == 255).all() and (slide.read(900, 0, 50, 50, 1)[:, :200] == 255).any()


@pytest.mark.parametrize("kind", ["mirax", "dicom"])
def test_tiling_gives_what_it_gives_of_a_plain_file(files, plain, kind):
    mask = np.zeros((256, 384), np.uint8)
    mask[100:, 50:300] = 3
    tifffile.imwrite(files[kind].with_name("mask.tiff"), mask, metadata=None)
    for rule in (RULE, TileRule(size=96, mpp=0.8, max_emptiness=0.97), TileRule(size=64, level=1)):
        found, wanted = (
            tile_slide(path, files[kind].with_name("mask.tiff"), "radboud", rule)[0] for path in (files[kind], plain)
        )
        names = ["slide", "case"]
        pd.testing.assert_frame_equal(found.drop(columns=names), wanted.drop(columns=names))
        assert found.kept.sum() > 5 and found.f2.max() > 0.9 or found.f3.max() > 0.9


def cut_cohort(paths):
    "A cohort of these files, without masks."
    rows = [(path.parent.name, str(path), "", "histonb", "c", path.parent.name, "", -1, "") for path in paths]
    return Cohort("scanners", pd.DataFrame(rows, columns=SLIDE_COLUMNS), pd.DataFrame(columns=QUARANTINE_COLUMNS))


def test_a_cohort_goes_on_past_bad_files(files, tmp_path):
    "Tiling in processes of its own, with files that are cut off or of no kind; tiles come back from store and slide."
    bad = {
        "cut.ndpi": files["ndpi"].read_bytes()[:20_000],
        "cut.dcm": files["dicom"].read_bytes()[:300],
        "alone.mrxs": files["mirax"].read_bytes(),
        "notes.vms": b"[Virtual Microscope Specimen]\nNoJpegColumns=1\n",
    }
    paths = [files["mirax"], files["ndpi"], files["dicom"]]
    for name, data in bad.items():
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / name)
        paths[-1].write_bytes(data)
    cohort = cut_cohort(paths)
    table = tile_cohort(cohort, tmp_path / "out", RULE, workers=4)
    assert table.groupby("slide").kept.sum().gt(5).to_dict() == {path.parent.name: True for path in paths[:3]}
    quarantine = pd.read_csv(tmp_path / "out/quarantine.csv")
    assert sorted(quarantine.slide) == sorted(bad)
    for row in quarantine.itertuples():
        assert row.slide in row.path and "unexpected" not in row.fault and row.remedy
    store = TileShards(tmp_path / "out")
    direct = SlideTiles(store.table, dict(zip(cohort.slides.slide, cohort.slides.image, strict=True)), size=128)
    for i in range(0, len(store), 7):
        assert np.abs(np.asarray(store[i][0]).astype(int) - direct[i][0]).mean() < 4  # but for the JPEG


@pytest.mark.parametrize("kind", ["ndpi", "mirax"])
def test_threads_forks_and_pickles(files, kind):
    with open_slide(files[kind], mpp=0.25) as slide:
        xy = [(x, y) for y in range(0, 1000, 333) for x in range(0, 1500, 333)]
        wanted = [slide.read(*p, 150, 150).sum() for p in xy]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda p: slide.read(*p, 150, 150).sum(), xy)) == wanted
        with multiprocessing.get_context("fork").Pool(2, _take, (slide,)) as pool:
            assert pool.map(_sum, xy) == wanted
        again = pickle.loads(pickle.dumps(slide))
        assert again.mpp == 0.25 and again.read(*xy[5], 150, 150).sum() == wanted[5]
        again.close()
    again.close()  # twice is once


def _take(slide):
    globals()["SHARED"] = slide


def _sum(p):
    return SHARED.read(*p, 150, 150).sum()  # noqa: F821


def test_damage_costs_the_tiles_on_it_alone(picture, tmp_path):
    "OpenSlide answers every call after its first error with that error: the file is opened anew."
    path = scanner_files.write_mirax(tmp_path / "slide", picture)
    data = path.with_suffix("") / "Data0000.dat"
    stored = bytearray(data.read_bytes())
    second = stored.index(b"\x89PNG", stored.index(b"\x89PNG") + 1)
    stored[second + 60 : second + 2000] = bytes(1940)
    data.write_bytes(stored)
    with pytest.raises(
        BadInput, match="damaged internal tile .level 0, row 0, column 0.: OpenSlide cannot read it"
    ) as e:
        open_slide(path).level(0)
    assert e.value.path == str(path)
    for threads in (1, 4):
        with open_slide(path, max_damaged=1) as slide:
            xy = [(x, y) for y in range(0, 1024, 128) for x in range(0, 1536, 128)]
            tiles = slide.map_tiles(lambda i, tile: tile.copy(), xy, 128, threads=threads)
            assert [*slide.damaged] == [(0, 0, 0)] and slide.touches_damage(200, 0, 128)
            for (x, y), tile in zip(xy, tiles, strict=True):
                wanted = picture[y : y + 128, x : x + 128]
                assert (tile == 255).all() if x < 512 and y < 512 else np.array_equal(tile, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_without_openslide_errors_name_the_extra(files, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(BadInput, match=r"pip install 'histonb\[scanners\]'") as e:
        open_slide(files[kind])
    assert e.value.path == str(files[kind])


def test_what_no_scanner_wrote_stays_refused(files, tmp_path):
    "OpenSlide would read 16 bits as 8, and choose the first of two pages: our reader's refusal stands."
    for name, options, says in (
        ("bits.tif", {"dtype": np.uint16}, "16 bits"),
        ("webp.tif", {"compression": "webp"}, "unsupported compression WEBP"),
    ):
        pixels = np.zeros((512, 512, 3), options.pop("dtype", np.uint8))
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb", tile=(256, 256), metadata=None, **options)
        with pytest.raises(BadInput, match=says):
            open_slide(tmp_path / name)
    renamed = tmp_path / "renamed.tif"
    renamed.write_bytes(files["ndpi"].read_bytes())
    with open_slide(renamed) as slide:  # known by its tags
        assert slide.base.shape == (1024, 1536) and slide.base.tile == (512, 512)
    with pytest.raises(BadInput, match="a Hamamatsu NDPI"):
        open_slide(files["ndpi"], mask=True)  # the codes of a mask must be exact
    with pytest.raises(BadInput, match="a folder.*any one of a DICOM"):
        open_slide(files["dicom"].parent)


def test_scale_by_the_same_rules(picture, tmp_path, monkeypatch):
    "Oblong and implausible pixels, and a scale that is given."
    picture = picture[:256, :384]
    monkeypatch.setattr(scanner_files, "MPP", 99.0)
    path = scanner_files.write_mirax(tmp_path / "far", picture)
    with open_slide(path) as slide, pytest.raises(BadInput, match="does not say"):
        slide.mpp  # noqa: B018
    monkeypatch.setattr(scanner_files, "MPP", 0.5)
    path = scanner_files.write_mirax(tmp_path / "oblong", picture)
    ini = path.with_suffix("") / "Slidedat.ini"
    ini.write_text(ini.read_text().replace("PIXEL_Y=0.5", "PIXEL_Y=0.6"))
    with pytest.raises(BadInput, match="0.5 by 0.6 micrometres, not square"):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5 and slide.level_mpp(1) == 2.0
