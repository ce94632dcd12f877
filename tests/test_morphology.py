"""Cell tables: shapes of known figures, stain, the gland of a nucleus, files that other programs read."""

import gzip
import json
import shutil
import uuid

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
from shapely.affinity import rotate, translate
from skimage.measure import regionprops_table

from histonb.annotate.exporting import MEASUREMENTS, to_slide_coordinates, write_objects
from histonb.annotate.slide import annotate_slide
from histonb.annotate.tile_merging import enclosing_glands, instance_outlines, instances_in_windows
from histonb.core.errors import BadInput
from histonb.core.files import read_json
from histonb.datasets.qupath import read_objects
from histonb.segment.instances import object_table
from histonb.segment.morphology import DENSITIES, SHAPE_MEASURES, mean_densities, shape_measures
from histonb.segment.predictors import StainPredictor
from histonb.synthetic.phantom import draw_slide
from histonb.synthetic.writing import write_slide

MPP = 0.25


@pytest.mark.parametrize("angle", [0, 20, 90, 135, 179])
@pytest.mark.parametrize("place", [(0, 0), (123_456, 98_765)])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_rectangle_and_an_ellipse_of_known_measures(angle, place, backwards):
    rectangle = shapely.box(-20, -5, 20, 5)
    ellipse = shapely.affinity.scale(shapely.Point(0, 0).buffer(1, quad_segs=200), 30, 12)
    # y points down, so what turns counter-clockwise for the eye turns the other way in these coordinates
    turned = [translate(rotate(s, -angle, origin=(0, 0)), *place) for s in (rectangle, ellipse)]
    shapes = shape_measures([shapely.reverse(s) if backwards else s for s in turned], MPP)
    assert [*shapes] == [*SHAPE_MEASURES]
    assert shapes["perimeter_um"][0] == pytest.approx(100 * MPP)
    assert shapes["circularity"][0] == pytest.approx(4 * np.pi * 400 / 100**2)
    assert shapes["major_axis_um"].tolist() == pytest.approx([4 * 40 / 12**0.5 * MPP, 60 * MPP], rel=1e-4)
    assert shapes["minor_axis_um"].tolist() == pytest.approx([4 * 10 / 12**0.5 * MPP, 24 * MPP], rel=1e-4)
    assert shapes["eccentricity"].tolist() == pytest.approx([(1 - 1 / 16) ** 0.5, (1 - 0.4**2) ** 0.5], rel=1e-4)
    assert shapes["solidity"].tolist() == pytest.approx([1, 1])
    away = np.abs(shapes["orientation_deg"] - angle)
    assert np.minimum(away, 180 - away).max() < 1e-3 and shapes["orientation_deg"].between(0, 180).all()


def test_a_notch_lowers_solidity_and_circularity():
    notched = shapely.Polygon([(0, 0), (10, 0), (10, 10), (6, 10), (6, 2), (4, 2), (4, 10), (0, 10)])
    whole, cut = shape_measures([shapely.box(0, 0, 10, 10), notched], 1.0).to_dict("records")
    assert cut["solidity"] == pytest.approx(0.84) and whole["solidity"] == pytest.approx(1)
    assert cut["circularity"] == pytest.approx(4 * np.pi * 84 / 56**2)


def test_traced_objects_have_the_axes_of_their_pixels():
    nuclei = draw_slide(3, (400, 350), cover=(0.6, 0.7)).nuclei
    whole = np.bincount(nuclei.ravel()) >= 60
    whole[np.unique(np.concatenate([nuclei[0], nuclei[-1], nuclei[:, 0], nuclei[:, -1]]))] = False
    nuclei = np.where(whole[nuclei], nuclei, 0)
    ours = shape_measures(instance_outlines(nuclei), 1.0)
    names = ["axis_major_length", "axis_minor_length", "eccentricity", "solidity", "orientation"]
    theirs = pd.DataFrame(regionprops_table(nuclei, properties=names))
    assert len(ours) == len(theirs) > 20
    for a, b in (("major_axis_um", names[0]), ("minor_axis_um", names[1])):
        assert np.abs(ours[a] / theirs[b] - 1).median() < 0.015
    turned = (ours["orientation_deg"] - np.degrees(theirs["orientation"]) - 90 + 90) % 180 - 90
    assert np.abs(turned[theirs["eccentricity"] > 0.6]).median() < 2
    assert ours["circularity"].between(0.2, 1).all() and ours["solidity"].between(0.4, 1 + 1e-9).all()


def test_densities_are_those_of_the_pixels_of_an_object():
    image = np.full((20, 30, 3), 255, np.uint8)
    image[5:10, 5:10] = image[10:15, 20:25] = (100, 60, 150)
    image[10:15, 5:10] = (240, 120, 180)
    ids = np.zeros((20, 30), int)
    ids[5:10, 5:10] = 2
    ids[10:15, 5:10] = 5
    ids[5:15, 20:25] = 3  # half of it is glass
    table = mean_densities(ids, image)
    assert table.index[table.notna().all(axis=1)].tolist() == [2, 3, 5]
    assert table.loc[2].tolist() == pytest.approx((2 * table.loc[3]).tolist())
    density = -np.log10(np.array([100, 60, 150]) / 255)
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    assert table.loc[2].tolist() == pytest.approx(np.linalg.solve(vectors.T, density)[:2], rel=1e-4)
    assert table.loc[2, "haematoxylin_od"] > 0.3 > table.loc[5, "haematoxylin_od"]
    with pytest.raises(BadInput, match="same picture"):
        mean_densities(ids, image[:-1])


def test_the_gland_of_an_object_is_the_one_that_holds_most_of_it():
    glands = shapely.STRtree([shapely.box(0, 0, 100, 100), shapely.box(100, 0, 200, 100)])
    at = [(10, 10), (96, 20), (91, 40), (195, 94), (198, 96), (300, 300)]
    outlines = np.array([shapely.box(x, y, x + 10, y + 10) for x, y in at])
    assert enclosing_glands(outlines, glands).tolist() == [0, 1, 0, -1, -1, -1]
    # no gland holds more than half of it, but both together do; the larger share wins
    assert enclosing_glands(np.array([shapely.box(93, -7, 108, 13)]), glands).tolist() == [1]
    assert enclosing_glands(np.array([], object), glands).tolist() == []
    assert enclosing_glands(outlines[:2], shapely.STRtree([])).tolist() == [-1, -1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A slide without a border of glass, and its annotation."""
    folder = tmp_path_factory.mktemp("cells")
    image = draw_slide(4, (760, 700), cover=(0.6, 0.7)).image[150:500, 150:520]
    write_slide(folder / "a.tiff", np.ascontiguousarray(image), mpp=0.48)
    annotate_slide(folder / "a.tiff", "stain", folder / "whole")
    return folder


@pytest.fixture(scope="module")
def packed(folder):
    """The same in another folder, with packed GeoJSON."""
    return annotate_slide(folder / "a.tiff", "stain", folder / "packed", compress=True)


def test_stain_and_shape_do_not_depend_on_the_tiles(folder):
    annotate_slide(folder / "a.tiff", "stain", folder / "tiles", tile=144)
    a, b = (
        pd.read_parquet(folder / name / "a/objects.parquet").sort_values(["task", "left", "top"], ignore_index=True)
        for name in ("whole", "tiles")
    )
    columns = ["task", *SHAPE_MEASURES, *DENSITIES, "on_border"]
    pd.testing.assert_frame_equal(a[columns], b[columns], atol=1e-4)
    assert a[[*SHAPE_MEASURES, *DENSITIES]].notna().all(axis=None)
    nuclei = a[a["task"] == "nucleus"]
    assert nuclei["haematoxylin_od"].min() > 0.05 and 5 < nuclei["major_axis_um"].median() < 20


def test_each_nucleus_names_its_gland_and_what_the_border_cuts_is_marked(folder):
    table = pd.read_parquet(folder / "whole/a/objects.parquet")
    outlines = shapely.from_wkb(table["geometry"])
    glands = dict(zip(table["id"][table["task"] == "gland"], outlines[table["task"] == "gland"], strict=True))
    nuclei = table["task"] == "nucleus"
    inside = nuclei & table["gland"].notna()
    assert 10 < inside.sum() < nuclei.sum() and table.loc[table["task"] == "gland", "gland"].isna().all()
    for number, outline in zip(table["gland"][inside], outlines[inside], strict=True):
        assert outline.intersection(glands[int(number)]).area >= 0.5 * outline.area - 1e-6
    everything = shapely.union_all(list(glands.values()))
    free = outlines[nuclei & table["gland"].isna()]
    assert (shapely.area(shapely.intersection(free, everything)) < 0.5 * shapely.area(free)).all()
    bounds = shapely.bounds(outlines)
    near = (bounds[:, :2].min(1) < 0.6) | (bounds[:, 2] > 369.4) | (bounds[:, 3] > 349.4)
    assert 0 < table["on_border"].sum() < len(table) and (table["on_border"] == near).mean() > 0.99


def test_the_table_is_geoparquet(folder):
    file = pq.ParquetFile(folder / "whole/a/objects.parquet")
    about = json.loads(file.schema_arrow.metadata[b"geo"])
    assert json.loads(file.metadata.metadata[b"geo"]) == about
    assert about["version"] == "1.0.0" and about["primary_column"] == "geometry"
    column = about["columns"]["geometry"]
    assert column["encoding"] == "WKB" and column["geometry_types"] == ["Polygon"] and column["crs"] is None
    outlines = shapely.from_wkb(file.read(["geometry"])["geometry"].to_pylist())
    assert column["bbox"] == pytest.approx(shapely.total_bounds(outlines).tolist())
    drawn = read_objects(folder / "whole/a/objects.geojson")["outline"]
    assert shapely.equals_exact(outlines, drawn.to_numpy(object), 1e-9).all()
    table = file.read().to_pandas()
    again = shape_measures(outlines, 0.48)
    pd.testing.assert_frame_equal(table[[*SHAPE_MEASURES]], again, check_exact=False, atol=1e-6)


def test_geopandas_reads_the_table(folder):
    geopandas = pytest.importorskip("geopandas")
    frame = geopandas.read_parquet(folder / "whole/a/objects.parquet")
    assert frame.crs is None and frame.geometry.name == "geometry" and (frame.geometry.area > 0).all()


def test_qupath_gets_the_measurements_flat(folder):
    table = pd.read_parquet(folder / "whole/a/objects.parquet").set_index("feature")
    for feature in read_json(folder / "whole/a/objects.geojson")["features"]:
        row = table.loc[feature["id"]]
        measured = feature["properties"]["measurements"]
        assert all(isinstance(v, float) for v in measured.values()) and "childObjects" not in feature
        for column, (name, digits) in MEASUREMENTS.items():
            if pd.isna(row[column]):
                assert name not in measured
            else:
                assert measured[name] == pytest.approx(float(row[column]), abs=0.6 * 10**-digits)


def test_packed_geojson_is_written_and_read(folder, packed, tmp_path):
    assert not (packed / "objects.geojson").exists()
    content = (packed / "objects.geojson.gz").read_bytes()
    assert gzip.decompress(content) == (folder / "whole/a/objects.geojson").read_bytes()
    assert content[3:8] == bytes(5), "no name and no time: equal objects give equal files"
    assert read_objects(packed / "objects.geojson.gz").equals(read_objects(folder / "whole/a/objects.geojson"))
    with pytest.raises(BadInput, match="compress True -> False"):
        annotate_slide(folder / "a.tiff", "stain", packed.parent)
    for spoilt in (content[:-20], b"no gzip", content[:200] + b"xx" + content[202:]):
        (tmp_path / "bad.geojson.gz").write_bytes(spoilt)
        with pytest.raises(BadInput, match=r"bad\.geojson\.gz: not valid JSON"):
            read_objects(tmp_path / "bad.geojson.gz")


def test_an_annotation_of_before_is_still_known(folder, tmp_path):
    """Settings of 0.2 do not say whether the GeoJSON is packed."""
    out = shutil.copytree(folder / "whole/a", tmp_path / "a")
    settings = read_json(out / "settings.json")
    assert settings.pop("compress") is False
    (out / "settings.json").write_text(json.dumps(settings))
    assert annotate_slide(folder / "a.tiff", "stain", tmp_path) == out
    with pytest.raises(BadInput, match="compress False -> True"):
        annotate_slide(folder / "a.tiff", "stain", tmp_path, compress=True)


class Other(StainPredictor):
    "Finds the same as another network, and is not the same."

    def __init__(self):
        super().__init__()
        self.digest = "another"


def test_identifiers_belong_to_slide_network_and_object(folder, packed, tmp_path):
    def features(slide, predictor, out):
        return pd.read_parquet(annotate_slide(slide, predictor, tmp_path / out) / "objects.parquet")["feature"]

    first = pd.read_parquet(folder / "whole/a/objects.parquet")["feature"]
    assert first.is_unique and all(uuid.UUID(f).version == 5 for f in first)
    assert pd.read_parquet(packed / "objects.parquet")["feature"].tolist() == first.tolist()
    other = features(folder / "a.tiff", Other(), "other")
    assert len(other) == len(first) and not set(other) & set(first)
    (tmp_path / "a.tiff").write_bytes((folder / "a.tiff").read_bytes() + b"\0")
    assert not set(features(tmp_path / "a.tiff", "stain", "slide")) & set(first)


def test_long_objects_have_the_stain_of_the_whole():
    ids = np.zeros((288, 432), np.int32)
    cv2.ellipse(ids, (216, 144), (200, 60), 10, 0, 360, 1, -1)
    image = np.random.default_rng(0).integers(60, 255, (288, 432, 3)).astype(np.uint8)
    inner = np.uint8(255) * (np.stack([ids == 0, ids == 1, ids < 0]))

    def table(tile):
        return instances_in_windows(
            lambda name, box: inner[:, box[0] : box[2], box[1] : box[3]],
            "gland",
            ids.shape,
            tile,
            halo=64,
            read_image=lambda box: image[box[0] : box[2], box[1] : box[3]],
        )

    pieces, whole = table(144), table(432)
    assert len(pieces) == len(whole) == 1
    assert pieces[[*DENSITIES]].to_numpy() == pytest.approx(whole[[*DENSITIES]].to_numpy(), abs=1e-5)
    assert whole["haematoxylin_od"].notna().all()


def test_tables_without_a_picture_have_no_stain(tmp_path):
    ids = np.zeros((40, 40), np.int32)
    ids[5:20, 5:30] = 1
    outlines = shapely.to_wkb(instance_outlines(ids))
    table = to_slide_coordinates(object_table(ids).assign(outline=outlines), "nucleus", mpp=0.5)
    assert table[[*DENSITIES]].isna().all(axis=None) and table["gland"].isna().all() and not table["on_border"].any()
    write_objects(tmp_path, [table], np.zeros((9, 9, 3), np.uint8), 4.0)
    measured = read_json(tmp_path / "objects.geojson")["features"][0]["properties"]["measurements"]
    assert "Gland ID" not in measured and "Hematoxylin: OD mean" not in measured and measured["Perimeter µm"] > 30
    assert pd.read_parquet(tmp_path / "objects.parquet")["gland"].isna().all()
