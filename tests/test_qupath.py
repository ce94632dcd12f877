"""Corrections that come back from QuPath: outlines that stay where they are, regions to learn from, edits to count."""

import gzip
import json

import numpy as np
import pytest
import shapely

from histonb import cli
from histonb.annotate.editing import correction_metrics, count_corrections, tabulate_corrections
from histonb.annotate.slide import annotate_slide
from histonb.core.errors import BadInput
from histonb.datasets import qupath as module
from histonb.datasets.qupath import paint_instances, qupath, read_corrections, read_objects
from histonb.datasets.readers import read_set
from histonb.models.cerberus import Cerberus, load_cerberus, save_cerberus
from histonb.segment.training import train
from histonb.segment.training_config import TrainConfig
from histonb.synthetic.phantom import draw_field
from histonb.synthetic.writing import write_slide

MPP = 0.5
SIZE = (300, 320)  # height and width


def feature(shape, name=None, **about):
    return {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(shape),
        "properties": {"objectType": "annotation", "classification": name and {"name": name}, **about},
    }


def save(path, features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


@pytest.fixture
def slide(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(60, 220, (*SIZE, 3), np.uint8)
    write_slide(tmp_path / "a.tiff", image, mpp=MPP, compression="deflate")
    return tmp_path / "a.tiff", image


GLAND = shapely.Point(80, 70).buffer(30)
NUCLEUS = shapely.box(40, 40, 48, 46)
CHECKED = shapely.box(10, 20, 210, 180)
OBJECTS = [feature(GLAND, "Gland: benign"), feature(NUCLEUS, "NUCLEUS")]


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated")
    image = draw_field(3, pattern=3, size=300).image
    write_slide(folder / "p.tiff", image, mpp=MPP, compression="deflate")
    return folder / "p.tiff", annotate_slide(folder / "p.tiff", "stain", folder / "out", tasks=["nucleus"])


# outlines


@pytest.mark.parametrize(
    ("classification", "task", "kind"),
    [
        ({"name": "Gland: Benign", "colorRGB": -1}, "gland", "Benign"),
        ({"names": ["Gland", "benign"], "color": [1, 2, 3]}, "gland", "benign"),
        ("GLAND", "gland", ""),
        ({}, "", ""),
        (None, "", ""),
    ],
)
def test_classes_are_read_as_every_version_of_qupath_writes_them(classification, task, kind, tmp_path):
    one = feature(GLAND)
    one["properties"]["classification"] = classification
    table = read_objects(save(tmp_path / "a.geojson", [one]))
    assert table[["task", "type"]].values.tolist() == [[task, kind]]


def test_children_cells_and_packed_files_are_read(tmp_path):
    cell = feature(GLAND, "nucleus", objectType="cell") | {"nucleusGeometry": shapely.geometry.mapping(NUCLEUS)}
    path = save(tmp_path / "a.geojson", [feature(GLAND, "gland", childObjects=[cell])])
    table = read_objects(path)
    assert table["task"].tolist() == ["gland", "nucleus"] and table["outline"][1].equals(NUCLEUS)
    (tmp_path / "b.geojson.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_objects(tmp_path / "b.geojson.gz").equals(table)


def test_only_what_encloses_an_area_is_an_object(tmp_path):
    bow = {"type": "Polygon", "coordinates": [[[0, 0], [8, 8], [8, 0], [0, 8], [0, 0]]]}
    line = {"type": "Polygon", "coordinates": [[[0, 0], [8, 8], [0, 0]]]}
    point = {"type": "Point", "coordinates": [1, 1]}
    features = [{"type": "Feature", "geometry": g, "properties": {}} for g in (bow, line, point, None)]
    (outline,) = read_objects(save(tmp_path / "a.geojson", features))["outline"]
    assert outline.area == 32 and outline.is_valid and len(outline.geoms) == 2


def test_painting_is_exact_with_holes_parts_and_any_scale():
    hole = shapely.box(2, 2, 14, 12).difference(shapely.box(5, 5, 9, 9))
    parts = shapely.MultiPolygon([shapely.box(16, 1, 19, 4), shapely.box(16, 10, 19, 14)])
    ids = paint_instances([hole, parts], (16, 20))
    assert [(ids == i).sum() for i in (1, 2)] == [12 * 10 - 16, 9 + 12] and not ids[5:9, 5:9].any()
    assert np.array_equal(paint_instances([hole, parts], (8, 6), 14, 8), ids[8:, 14:])
    twice = paint_instances([hole, parts], (32, 40), scale=0.5)
    assert np.array_equal(twice, ids.repeat(2, 0).repeat(2, 1))


def test_what_is_exported_changed_and_imported_leaves_the_rest_where_it_was(annotated, tmp_path):
    _, folder = annotated
    content = json.loads((folder / "objects.geojson").read_text())
    before = read_objects(folder / "objects.geojson")
    gone = content["features"].pop(5)
    content["features"][7]["geometry"] = shapely.geometry.mapping(before["outline"][8].buffer(2))
    content["features"].append(feature(shapely.box(0, 0, 300, 300)))
    corrections = read_corrections(save(tmp_path / "p.geojson", content["features"]), (300, 300))
    after = corrections.objects.set_index("feature")["outline"]
    same = before[~before["feature"].isin([gone["id"], before["feature"][8]])].set_index("feature")["outline"]
    assert len(after) == len(before) - 1 and len(same) > 50
    assert shapely.hausdorff_distance(same.to_numpy(), after[same.index].to_numpy()).max() < 0.1


# regions


def test_checked_regions_are_a_data_set(slide, tmp_path):
    path, image = slide
    outside = feature(shapely.box(250, 250, 260, 260), "gland")
    regions = qupath(path, save(tmp_path / "x.geojson", [*OBJECTS, feature(CHECKED), outside]))
    assert repr(regions) == "qupath: 1 region in 1 case (gland, nucleus, gland-type)"
    region = regions[0]
    assert np.array_equal(region.image, image[20:180, 10:210]) and region.mpp == MPP
    assert region.labels["gland"].max() == region.labels["nucleus"].max() == 1
    assert (region.labels["gland-type"] == region.labels["gland"]).all()  # benign is 1
    assert abs((region.labels["gland"] > 0).sum() - GLAND.area) < 20
    assert np.argwhere(region.labels["nucleus"]).min(0).tolist() == [20, 30]


def test_beyond_a_region_of_any_shape_is_glass(slide, tmp_path):
    path, image = slide
    circle = shapely.Point(80, 70).buffer(20)  # inside the gland
    region = qupath(path, save(tmp_path / "x.geojson", [*OBJECTS, feature(circle, "Checked")]), tasks=["gland"])[0]
    inside = region.labels["gland"] > 0
    assert np.array_equal(region.image[inside], image[50:90, 60:100][inside])
    assert (region.image[~inside] == module.BLANK).all() and abs(inside.sum() - circle.area) < 20


def test_large_regions_are_read_in_pieces_that_make_the_whole(slide, tmp_path, monkeypatch):
    path, image = slide
    annotation = save(tmp_path / "x.geojson", [*OBJECTS, feature(CHECKED)])
    whole = qupath(path, annotation)[0]
    monkeypatch.setattr(module, "SIDE", 90)
    pieces = qupath(path, annotation)
    assert len(pieces) == 6
    joined = np.vstack([np.hstack([pieces[3 * r + c].image for c in range(3)]) for r in range(2)])
    assert np.array_equal(joined, whole.image)


def test_a_folder_of_slides_is_a_set_and_what_cannot_be_used_is_set_aside(slide, tmp_path):
    path, image = slide
    for name in ("p1_b.tiff", "p1_c.tiff"):
        write_slide(tmp_path / name, image, mpp=MPP, compression="deflate")
    (out := tmp_path / "corrected").mkdir()
    good = [*OBJECTS, feature(CHECKED)]
    for name in ("p1_b.tiff.geojson", "p1_c.geojson", "other.geojson"):
        save(out / name, good)
    save(out / "a.geojson", OBJECTS)
    spec = {"reader": "qupath", "slides": tmp_path, "annotations": out, "case": "(.+)_", "labels": ["gland"]}
    regions = read_set(spec)
    assert regions.table["case"].tolist() == ["p1", "p1"] and regions.labels == ("gland",)
    faults = dict(zip(regions.quarantine["slide"], regions.quarantine["fault"], strict=True))
    assert "no region in it was checked" in faults["a"] and "no files in" in faults["other"]


def test_labels_are_what_every_annotation_has_or_what_is_asked_for(slide, tmp_path):
    path, _ = slide
    empty = save(tmp_path / "x.geojson", [feature(CHECKED)])
    with pytest.raises(BadInput, match="no task that every annotation"):
        qupath(path, empty)
    assert not qupath(path, empty, tasks=["gland"])[0].labels["gland"].any()
    typed = save(tmp_path / "y.geojson", [feature(NUCLEUS, "nucleus: Dead"), feature(CHECKED)])
    assert qupath(path, typed).labels == ("nucleus", "nucleus-type-pannuke")
    with pytest.raises(BadInput, match="not of nucleus-type"):
        qupath(path, typed, tasks=["nucleus", "nucleus-type"])


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (OBJECTS, "no region in it was checked"),
        ([*OBJECTS, feature(shapely.Point(80, 80).buffer(60))], "no region in it was checked"),  # no rectangle
        ([*OBJECTS, feature(shapely.box(0, 0, 90, 90), "Glnad"), feature(CHECKED)], "Did you mean `gland`"),
        ([*OBJECTS, feature(shapely.Point(50, 50).buffer(9)), feature(CHECKED)], "without a class"),
        ([*OBJECTS, feature(shapely.box(400, 20, 430, 50), "gland"), feature(CHECKED)], "1 of 4 objects lie outside"),
        ([*OBJECTS, feature(shapely.box(400, 20, 430, 50))], "1 of 3 objects lie outside the 320x300 pixels"),
        ([feature(GLAND, "gland: bening"), feature(CHECKED)], "Did you mean `benign`"),
    ],
)
def test_what_cannot_be_right_is_said_in_a_sentence(features, says, slide, tmp_path):
    with pytest.raises(BadInput, match=says):
        qupath(slide[0], save(tmp_path / "x.geojson", features))


def test_coordinates_that_are_no_numbers_are_named(slide, tmp_path):
    path = save(tmp_path / "x.geojson", [*OBJECTS, feature(CHECKED)])
    path.write_text(path.read_text().replace("[10.0, ", "[NaN, "))
    with pytest.raises(BadInput, match="cannot be read|no numbers"):
        qupath(slide[0], path)


def test_cut_files_are_named(slide, tmp_path):
    path = save(tmp_path / "x.geojson", [*OBJECTS, feature(CHECKED)])
    whole = path.read_bytes()
    for content in (b"", whole[:-40], gzip.compress(whole)[:-30], b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="not valid JSON"):
            qupath(slide[0], path)


def test_a_trained_network_learns_from_corrections_and_keeps_its_other_tasks(slide, tmp_path, one_thread, no_curves):
    save_cerberus(Cerberus(("gland", "lumen", "nucleus"), "resnet18", 0.0625), tmp_path / "before", mpp=MPP)
    annotation = save(tmp_path / "x.geojson", [*OBJECTS, feature(CHECKED)])
    spec = {
        "reader": "qupath",
        "slides": str(slide[0]),
        "annotations": str(annotation),
        "labels": ["gland"],
        "test": [],
    }
    # fmt: off
    config = TrainConfig(
        out=str(tmp_path / "run"), sets=(spec,), start=str(tmp_path / "before"), mpp=MPP, crop=64, batch_size=2,
        steps=1, val_share=0.0, workers=0, device="cpu",
    )
    # fmt: on
    folder = train(config)
    assert list(load_cerberus(folder)[0].tasks) == ["gland", "lumen", "nucleus"]
    assert "a_10_20,a,train,qupath" in (folder / "fields.csv").read_text()
    save(annotation, [OBJECTS[0], feature(CHECKED)])
    with pytest.raises(BadInput, match="data"):
        train(config)  # another correction of the same name is other data


# edits


def test_edits_are_counted_by_class_inside_what_was_checked(tmp_path):
    boxes = [shapely.box(x, 10, x + 8, 18) for x in range(0, 200, 20)]
    names = ["Gland: benign"] * 5 + ["Nucleus"] * 5
    old = [feature(b, n) | {"id": str(i)} for i, (b, n) in enumerate(zip(boxes, names, strict=True))]
    new = json.loads(json.dumps(old))
    new[0]["properties"]["classification"]["name"] = "gland: malignant"
    new[1]["geometry"] = shapely.geometry.mapping(boxes[1].buffer(1))
    new[2]["id"] = "drawn anew, at the same place"
    new[6]["geometry"] = shapely.geometry.mapping(shapely.affinity.translate(boxes[6], 0.05))  # less than a tenth
    del new[9], new[5], new[3]  # the last lies outside
    new += [feature(shapely.box(30, 60, 38, 68), "Nucleus"), feature(shapely.box(0, 0, 170, 100), "checked")]
    before = read_objects(save(tmp_path / "old.geojson", old))
    table = tabulate_corrections(before, read_corrections(save(tmp_path / "new.geojson", new), (100, 300)))
    counts = table.set_index("class")[["kept", "changed", "reclassified", "deleted", "added", "before", "after"]]
    assert counts.loc["Gland"].tolist() == [2, 2, 1, 1, 0, 5, 4]
    assert counts.loc["Gland: benign"].tolist() == [2, 2, 1, 1, 0, 5, 3]
    assert counts.loc["Gland: malignant"].tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert counts.loc["Nucleus"].tolist() == [3, 0, 0, 1, 1, 4, 4]
    metrics = correction_metrics(table).set_index("class")
    grown = 64 / boxes[1].buffer(1).area
    assert metrics["pq"]["Gland"] == pytest.approx(2 * (3 + grown) / 9)
    assert metrics["dice"]["Gland"] == pytest.approx(2 * 4 * 64 / (5 * 64 + 3 * 64 + 64 / grown), rel=1e-6)
    assert metrics["edited"]["Nucleus"] == 2 / 5


def test_the_command_tells_how_much_was_edited(annotated, tmp_path, monkeypatch, capsys):
    _, folder = annotated
    content = json.loads((folder / "objects.geojson").read_text())["features"]
    n = len(content)
    save(tmp_path / "p.tiff.geojson", [*content[2:], feature(shapely.box(0, 0, 300, 300))])
    save(tmp_path / "q.geojson", content)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["histonb", "edits", *map(str, arguments)])
        with pytest.raises(SystemExit) as e:
            cli.main()
        return e.value.code, *capsys.readouterr()

    code, out, _ = run(tmp_path / "p.tiff.geojson", "--annotated", folder.parent, "--out", tmp_path / "edits.csv")
    assert code == 0 and f"Nucleus {n - 2}" in " ".join(out.split())
    assert (tmp_path / "edits.csv").read_text().startswith("slide,class,kept")
    code, out, err = run(tmp_path / "p.tiff.geojson", tmp_path / "q.geojson", "--annotated", folder.parent)
    assert code == 2 and "Nucleus" in out and "no annotation of `q`" in err
    with pytest.raises(BadInput, match="lie outside"):
        count_corrections(folder, save(tmp_path / "z.geojson", [feature(shapely.box(900, 0, 950, 90))]))
