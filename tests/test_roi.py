"""Annotating a part of a slide: nothing far away is read, objects stay whole, counts of regions add up."""

import json

import numpy as np
import pandas as pd
import pytest
import shapely
from PIL import Image
from test_annotate import Painted as PaintedAll
from test_annotate import paint

from histonb import cli
from histonb.annotate.roi import read_roi
from histonb.annotate.slide import annotate_slide
from histonb.annotate.tables import SUMMARY
from histonb.core.errors import BadInput
from histonb.core.files import read_json
from histonb.datasets.qupath import read_objects
from histonb.slides.slides import open_slide
from histonb.synthetic.phantom import draw_field
from histonb.synthetic.writing import write_slide

SIZE = (700, 2100)  # height and width
LEFT = (0, 0, 1000, 700)
RIGHT = (1000, 0, 1100, 700)
SMALL = "583,430,250,150"  # its corner lies in a nucleus


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "painted.tiff"
    write_slide(path, paint()[0][: SIZE[0], : SIZE[1]], mpp=0.25, compression="deflate", tile=256)
    return path


class Painted(PaintedAll):
    "Of the network of colours only glands, and nuclei with their types."

    def __init__(self, **options):
        super().__init__(**options)
        self.tasks = {name: self.tasks[name] for name in ("nucleus", "nucleus-type", "gland")}

    def __call__(self, image, keep):
        yield from (found for found in super().__call__(image, keep) if found[0] in self.tasks)


def box(x, y, width, height):
    return shapely.box(x, y, x + width, y + height)


def save(path, **regions):
    features = [
        {"type": "Feature", "geometry": shapely.geometry.mapping(shape), "properties": {"name": name}}
        for name, shape in regions.items()
    ]
    path.write_text(json.dumps(features))
    return str(path)


@pytest.fixture(scope="module")
def whole(slide, tmp_path_factory):
    return annotate_slide(slide, Painted(), tmp_path_factory.mktemp("whole"), tile=288)


@pytest.fixture(scope="module")
def halves(slide, tmp_path_factory):
    out = tmp_path_factory.mktemp("halves")
    region = save(out / "halves.geojson", left=box(*LEFT), right=box(*RIGHT))
    return annotate_slide(slide, Painted(), out, tile=288, region=region)


def objects_of(folder):
    table = read_objects(folder / "objects.geojson")
    numbers = pd.read_parquet(folder / "objects.parquet")
    return table.assign(x=numbers["x"], y=numbers["y"], area_um2=numbers["area_um2"])


def test_objects_in_a_region_are_those_of_the_whole_slide_and_tiles_far_away_are_not_read(slide, whole, tmp_path):
    predictor = Painted()
    folder = annotate_slide(slide, predictor, tmp_path, tile=288, region=SMALL)
    n_all = read_json(whole / "annotation.json")["tiles"]["computed"]
    assert predictor.seen == read_json(folder / "annotation.json")["tiles"]["computed"] < n_all
    expected = objects_of(whole)
    x, y, width, height = map(int, SMALL.split(","))
    expected = expected[expected["x"].between(x, x + width) & expected["y"].between(y, y + height)]
    expected = expected[expected["task"] == "nucleus"]  # the gland there is longer than what is read around
    found = objects_of(folder)
    found = found[found["task"] == "nucleus"]
    assert len(found) > 3
    keys = [sorted(shapely.to_wkb(t["outline"].to_numpy(), hex=True)) for t in (expected, found)]
    assert keys[0] == keys[1]
    crossing = [not o.within(box(x, y, width, height)) for o in found["outline"]]
    assert any(crossing), "an object across the border is kept whole"


def test_regions_that_make_the_slide_make_its_numbers(whole, halves):
    a, b = objects_of(whole), objects_of(halves)
    assert b.drop(columns=["name", "feature"]).equals(a.drop(columns=["name", "feature"]))
    table = pd.read_csv(halves / "summary.csv")
    assert tuple(table.columns) == SUMMARY and table["slide"].unique().tolist() == ["painted"]
    numbers = table.pivot(index="class", columns="region", values="objects")
    assert numbers.columns.tolist() == ["all", "left", "right"]
    assert (numbers["left"] + numbers["right"] == numbers["all"]).all()
    assert (numbers["all"] == pd.read_csv(whole / "summary.csv").set_index("class")["objects"].sort_index()).all()
    tissue = table.groupby("region")["tissue_mm2"].first()
    assert tissue["left"] + tissue["right"] == pytest.approx(tissue["all"], rel=1e-6)
    assert tissue["all"] == pytest.approx(read_json(whole / "annotation.json")["tissue_mm2"], rel=1e-6)


def test_numbers_are_those_of_the_objects(whole):
    objects = objects_of(whole)
    table = pd.read_parquet(whole / "summary.parquet").set_index("class")
    nuclei = objects[objects["task"] == "nucleus"]
    glands = objects[objects["task"] == "gland"]
    centres = shapely.points(nuclei["x"], nuclei["y"])
    distance = np.array([shapely.distance(c, glands["outline"].to_numpy()).min() for c in centres]) * 0.25
    row = table.loc["Nucleus"]
    assert row["objects"] == len(nuclei) and row["per_mm2"] == pytest.approx(len(nuclei) / row["tissue_mm2"])
    assert row["in_glands"] == (distance == 0).sum() > 0
    assert row["per_gland"] == pytest.approx(row["in_glands"] / len(glands))
    assert row["gland_distance_um"] == pytest.approx(np.median(distance))
    assert row["area_um2_median"] == nuclei["area_um2"].median()
    assert table.loc["Gland", "area_share"] == pytest.approx(glands["area_um2"].sum() / row["tissue_mm2"] / 1e6)
    shares = table["type_share"]
    assert shares["Nucleus"] == 1 and shares[["Nucleus: neutrophil", "Nucleus: epithelial"]].sum() == 1
    assert np.isnan(table.loc["Gland", "gland_distance_um"])


def test_a_rectangle_an_outline_and_a_mask_say_the_same(slide, tmp_path):
    x, y, width, height = 200, 100, 650, 400
    mask = np.zeros((SIZE[0] // 10, SIZE[1] // 10), np.uint8)
    mask[y // 10 : (y + height) // 10, x // 10 : (x + width) // 10] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks/painted.png")
    outline = save(tmp_path / "a.geojson", a=box(x, y, width, height))
    with open_slide(slide) as s:
        areas = [
            read_roi(region, s).area
            for region in ("200,100,650,400", "50,25,162.5,100um", outline, str(tmp_path / "masks"))
        ]
    for area in areas:
        assert area.symmetric_difference(box(x, y, width, height)).area < 100


def test_a_folder_belongs_to_its_region(slide, halves):
    out = halves.parent
    region = str(out / "halves.geojson")
    assert annotate_slide(slide, Painted(stop=0), out, tile=288, region=region) == halves  # nothing is computed
    for other in (None, SMALL):
        with pytest.raises(BadInput, match="begun with other settings"):
            annotate_slide(slide, Painted(), out, tile=288, region=other)


@pytest.mark.parametrize(
    ("region", "says"),
    [
        ("5000,0,10,10", "`rectangle` lies outside the 2100x700 pixels"),
        ("0,0,0,10", "a rectangle of 0 by 10"),
        ("0,0,10", "there is no such file"),
        ("folder", "no region for painted.tiff"),
        ("empty.geojson", "no annotation in it that is a region"),
        ("far.geojson", "`far` lies outside"),
        ("black.png", "nothing is marked"),
        ("wide.png", "proportions"),
    ],
)
def test_regions_that_cannot_be_used_are_named_before_anything_is_written(region, says, slide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    save(tmp_path / "empty.geojson")
    save(tmp_path / "far.geojson", near=box(0, 0, 9, 9), far=box(9000, 0, 9, 9))
    Image.fromarray(np.zeros((70, 210), np.uint8)).save(tmp_path / "black.png")
    Image.fromarray(np.ones((210, 70), np.uint8)).save(tmp_path / "wide.png")
    with pytest.raises(BadInput, match=says):
        annotate_slide(slide, Painted(), tmp_path / "out", region=region)
    assert not (tmp_path / "out").exists()


def test_the_command_annotates_regions_and_puts_all_slides_on_a_page(tmp_path, monkeypatch, capsys):
    for i in range(2):
        write_slide(tmp_path / f"s{i}.tiff", draw_field(i, size=200).image, mpp=0.5, compression="deflate")
    slides = [str(tmp_path / f"s{i}.tiff") for i in range(2)]
    options = ["--weights", "stain", "--tasks", "nucleus", "--region", "0,0,100,100", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["histonb", "annotate", *slides, *options])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 0, capsys.readouterr().err
    assert "summary.html: 2 slides" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out/summary.csv")
    assert set(table["slide"]) == {"s0", "s1"} and set(table["region"]) == {"all", "rectangle"}
    assert "s1/overview.png" in (tmp_path / "out/summary.html").read_text()
