"The phantom as a whole: its files, their truth, and that they depend on nothing but the seed."

import csv
import errno
import os
import signal
import subprocess
import sys
import time

import imagecodecs
import numpy as np
import pytest
import tifffile

from histonb.core.errors import BadInput
from histonb.synthetic import phantom
from histonb.synthetic.writing import write_mask, write_slide

SHAPE = (1100, 900)


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return phantom.write_cohort(
        tmp_path_factory.mktemp("phantom"), n_slides=4, seed=3, shape=SHAPE, workers=2, karolinska=0.25
    )


def test_same_bytes_whatever_the_workers(cohort, tmp_path):
    again = phantom.write_cohort(tmp_path, n_slides=4, seed=3, shape=SHAPE, workers=1, karolinska=0.25)
    assert files(again) == files(cohort)
    assert len(files(cohort)) == 4 * 2 + 1  # no temporary file is left


def test_another_seed_is_another_cohort(cohort, tmp_path):
    other = phantom.write_cohort(tmp_path, n_slides=1, seed=4, shape=SHAPE, workers=1)
    first = next(iter((cohort / "train_images").iterdir()))
    assert next((other / "train_images").iterdir()).read_bytes() != first.read_bytes()


def test_table_agrees_with_the_masks(cohort):
    with open(cohort / "train.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["image_id", "data_provider", "isup_grade", "gleason_score"]
    assert [r["data_provider"] for r in rows] == ["radboud"] * 3 + ["karolinska"]
    for row in rows:
        image = tifffile.imread(cohort / "train_images" / f"{row['image_id']}.tiff", key=0)
        mask = tifffile.imread(cohort / "train_label_masks" / f"{row['image_id']}_mask.tiff", key=0)
        assert mask.shape == image.shape == (*SHAPE, 3)
        assert not mask[..., 1:].any()
        if row["data_provider"] == "radboud":
            assert phantom.grade(mask[..., 0]) == (row["gleason_score"], int(row["isup_grade"]))
        else:
            assert set(np.unique(mask[..., 0])) == {0, 1, 2}
        tissue = mask[..., 0] > 0
        assert 0.1 < tissue.mean() < 0.6
        assert image[tissue].mean() + 20 < image[~tissue].mean()  # tissue is darker than glass


def test_tags_as_panda(cohort):
    with tifffile.TiffFile(next((cohort / "train_images").iterdir())) as tif:
        assert [p.shape for p in tif.pages] == [(1100, 900, 3), (275, 225, 3), (68, 56, 3)]
        for page in tif.pages:
            assert page.compression.name == "JPEG" and page.tile == (512, 512)
            x = page.tags["XResolution"].value
            y = page.tags["YResolution"].value
            assert page.tags["ResolutionUnit"].value == 3  # centimetres
            assert x == y and abs(1e4 * x[1] / x[0] - 0.48 * 900 / page.shape[1]) < 1e-3
            assert page.tags["YCbCrSubSampling"].value == (2, 2)
            assert 347 in page.tags
            assert "Software" not in page.tags and "DateTime" not in page.tags


def test_truth_is_consistent():
    p = phantom.draw_slide(5, (1500, 1100), (3, 5))
    assert set(np.unique(p.mask)) >= {0, 2, 3, 5}
    assert (p.mask[p.nuclei > 0] > 0).all()
    for number in range(1, p.glands.max() + 1):
        classes = np.unique(p.mask[p.glands == number])
        assert len(classes) <= 1 and set(classes) <= {2, 3, 4}
    inside = p.lumens > 0
    pairs = np.unique(np.stack([p.lumens[inside], p.glands[inside]]), axis=1)
    assert pairs[1].min() > 0 and len(np.unique(pairs[0])) == pairs.shape[1]  # every lumen in one gland
    assert not p.nuclei[inside].any()
    assert len(p.types) == p.nuclei.max() + 1 and set(p.types[1:]) == {1, 2, 3}
    dark = p.image[p.nuclei > 0].mean()
    assert dark + 30 < p.image[(p.mask > 0) & (p.nuclei == 0)].mean()


@pytest.mark.parametrize("pattern", [1, 2, 3, 4, 5])
def test_field_holds_its_pattern(pattern):
    p = phantom.draw_field(1, pattern, 300)
    assert p.image.shape == (300, 300, 3) and p.image.dtype == np.uint8
    assert set(np.unique(p.mask)) == ({1} if pattern == 1 else {1, pattern})
    assert p.glands.any() == (pattern in (2, 3, 4)) and p.lumens.any() == (pattern in (2, 3, 4))
    assert sorted(set(np.unique(p.nuclei))) == list(range(p.nuclei.max() + 1))


@pytest.mark.parametrize("shape", [(512, 512), (600, 1300), (1301, 603)])
def test_any_shape(shape):
    p = phantom.draw_slide(0, shape, (4,), instances=False)
    assert p.image.shape == (*shape, 3) and p.mask.shape == shape
    assert (p.mask > 0).any() and p.glands is None


def test_defects(tmp_path):
    root = phantom.write_cohort(tmp_path, n_slides=3, shape=SHAPE, workers=1, n_blank=1, n_pen=1)
    with open(root / "suspicious.csv", newline="") as f:
        listed = {r["image_id"]: r["reason"] for r in csv.DictReader(f)}
    assert listed == {"phantom0_001": "pen mark", "phantom0_002": "blank"}
    assert not tifffile.imread(root / "train_label_masks" / "phantom0_002_mask.tiff", key=0).any()
    plain = phantom.draw_slide((0, 1), SHAPE, phantom.CONTENTS[1], instances=False)
    marked = tifffile.imread(root / "train_images" / "phantom0_001.tiff", key=0)
    glass = plain.mask == 0
    assert (marked[glass].min(1) < 120).mean() > (plain.image[glass].min(1) < 120).mean() + 0.01


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tile": 256},
        {"photometric": "rgb", "bigtiff": True},
        {"shared_tables": False},
        {"subsampling": (2, 1)},
        {"compression": "lzw"},
        {"compression": "deflate", "tile": 240},
    ],
)
def test_layouts_read_back(tmp_path, options):
    image = phantom.draw_field(0, 3, 700).image
    write_slide(tmp_path / "a.tiff", image, **options)
    with tifffile.TiffFile(tmp_path / "a.tiff") as tif:
        page = tif.pages[0]
        assert page.tile == (options.get("tile", 512),) * 2
        assert tif.is_bigtiff == options.get("bigtiff", False)
        jpeg = options.get("compression", "jpeg") == "jpeg"
        assert page.photometric.name == ("RGB" if options.get("photometric") == "rgb" or not jpeg else "YCBCR")
        assert (347 in page.tags) == (jpeg and options.get("shared_tables", True))
        error = np.abs(page.asarray().astype(int) - image).mean()
        assert error < 5 if jpeg else error == 0
        if 347 in page.tags:  # the tables alone decode the abbreviated stream
            stream = tif.filehandle
            stream.seek(page.dataoffsets[0])
            tile = imagecodecs.jpeg8_decode(stream.read(page.databytecounts[0]), tables=page.tags[347].value)
            assert tile.shape == (*page.tile, 3)


def test_same_pixels_as_openslide_reads(tmp_path):
    openslide = pytest.importorskip("openslide", reason="openslide (extra `bench`) is not installed")
    image = phantom.draw_field(0, 3, 700).image
    write_slide(tmp_path / "a.tiff", image)
    with openslide.OpenSlide(str(tmp_path / "a.tiff")) as slide:
        assert slide.level_dimensions == ((700, 700), (175, 175), (43, 43))
        read = np.asarray(slide.read_region((0, 0), 0, (700, 700)))[..., :3]
    assert np.abs(read.astype(int) - tifffile.imread(tmp_path / "a.tiff", key=0)).max() <= 2


@pytest.mark.parametrize(
    "call",
    [
        lambda p: phantom.write_cohort(p / "c", n_slides=0),
        lambda p: phantom.write_cohort(p / "c", seed=-1),
        lambda p: phantom.write_cohort(p / "c", n_slides=2, n_blank=1, n_pen=2),
        lambda p: phantom.write_cohort(p / "c", n_slides=2, karolinska=1.5),
        lambda p: phantom.write_cohort(p / "c", shape=(300, 4000)),
        lambda p: phantom.draw_field(0, "cribriform"),
        lambda p: phantom.draw_slide(0, (600, 600), patterns=(6,)),
        lambda p: write_slide(p / "c" / "a.tiff", np.zeros((64, 64), np.uint8)),
        lambda p: write_slide(p / "c" / "a.tiff", np.zeros((64, 64, 3), np.uint8), mpp=0),
        lambda p: write_slide(p / "c" / "a.tiff", np.zeros((64, 64, 3), np.uint8), photometric="cmyk"),
        lambda p: write_mask(p / "c" / "a.tiff", np.zeros((64, 64), np.uint8), compression="jpeg"),
    ],
)
def test_bad_parameters(tmp_path, call):
    with pytest.raises(BadInput):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match=r"a\.tiff: cannot be written \(No space left on device\)"):
        write_slide(tmp_path / "a.tiff", np.zeros((64, 64, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupt_leaves_only_whole_files(tmp_path, workers):
    arguments = f"{str(tmp_path)!r}, 30, shape={SHAPE}, workers={workers}"
    code = f"from histonb.synthetic.phantom import write_cohort; write_cohort({arguments})"
    job = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not list(tmp_path.glob("train_label_masks/*_mask.tiff")):
        assert job.poll() is None
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGINT)  # what Ctrl-C does: the whole group
    assert job.wait(60) != 0
    assert not (tmp_path / "train.csv").exists()
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        assert not path.name.startswith("."), "a temporary file was left behind"
        assert tifffile.imread(path, key=0).shape == (*SHAPE, 3)
