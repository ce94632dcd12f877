"""Annotating slides: tiles equal to the whole, objects on seams once and whole, files others open, resuming."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import shapely
import torch

from histonb import cli
from histonb.annotate.editing import EDITS, count_edits, pair_outlines
from histonb.annotate.exporting import to_slide_coordinates, write_objects
from histonb.annotate.slide import annotate_slide
from histonb.annotate.tile_merging import enclosing_glands, instance_outlines, instances_in_window, instances_in_windows
from histonb.annotate.working_folder import ProbabilityCache, tiles_with_tissue, tissue_squares
from histonb.core.errors import BadInput
from histonb.core.files import read_json
from histonb.core.tasks import TASKS
from histonb.datasets.qupath import read_objects
from histonb.metrics.objects import metrics_from_sums, object_sums, pair_counts
from histonb.models.cerberus import Cerberus, save_cerberus
from histonb.segment.instances import extract_instances, majority_types, object_table
from histonb.segment.predictors import StainPredictor, TilePredictor, load_predictor
from histonb.segment.targets import instance_target
from histonb.segment.tiled_inference import (
    ResampledSlide,
    default_tile,
    inference_margin,
    predict_tiled,
    tile_boxes,
    to_input,
)
from histonb.slides.slides import Slide, open_slide
from histonb.synthetic.phantom import draw_field, draw_slide
from histonb.synthetic.writing import write_slide

REAL = Path(__file__).parents[2] / "shared/data/slides/CMU-1-Small-Region.svs"
HISTONB = str(Path(sys.executable).with_name("histonb"))
TYPES = {"gland": "", "lumen": "", "nucleus": "nucleus-type"}


def network(arch="resnet18", width=0.125, tasks=("gland", "nucleus", "tissue"), seed=0):
    "Random weights of which all have a say, with the statistics of real pictures."
    torch.manual_seed(seed)
    net = Cerberus(tasks, arch, width).train()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            m.momentum = 1.0
    with torch.no_grad():
        net(torch.cat([to_input(draw_field(i, size=288).image) for i in range(3)]))
    return net.eval()


@pytest.fixture(scope="module")
def picture():
    return draw_slide(4, (1000, 910), cover=(0.6, 0.7)).image


def cut(picture):
    return lambda x, y, w, h: picture[y : y + h, x : x + w]


def probabilities(net, picture):
    with torch.inference_mode():
        return {k: v[0].softmax(0).numpy() for k, v in net(to_input(picture)).items()}


def soft(scores):
    return {k: torch.from_numpy(v).softmax(0).numpy() for k, v in scores.items()}


@pytest.mark.parametrize(
    "arch, width, shape, tile",
    [
        ("resnet18", 0.125, (1000, 910), 288),
        ("resnet18", 0.125, (577, 433), 144),
        ("resnet34", 0.0625, (800, 910), 288),
    ],
)
def test_tiles_say_what_the_whole_picture_says(arch, width, shape, tile, picture, one_thread):
    net = network(arch, width)
    picture = picture[: shape[0], : shape[1]]
    whole = probabilities(net, picture)
    ours = soft(predict_tiled(net, cut(picture), shape, tile))
    for name in whole:
        assert ours[name].shape == whole[name].shape
        assert np.abs(ours[name] - whole[name]).max() < 1e-5, name
        assert np.ptp(whole[name], (1, 2)).max() > 0.1, "a network that says the same everywhere would prove nothing"


def test_a_margin_below_the_reach_is_wrong_and_this_would_be_seen(picture, one_thread):
    net = network()
    whole = probabilities(net, picture)["nucleus"]
    assert (
        np.abs(soft(predict_tiled(net, cut(picture), picture.shape[:2], 288, 96, ["nucleus"]))["nucleus"] - whole).max()
        > 1e-3
    )


@pytest.mark.parametrize("shape", [(1, 1), (9, 20), (100, 300), (150, 143), (160, 288)])
def test_small_pictures_are_read_as_they_are(shape, picture, one_thread):
    net = network()
    small = picture[400 : 400 + shape[0], 400 : 400 + shape[1]]
    whole = probabilities(net, small)
    ours = soft(predict_tiled(net, cut(small), shape, 144))
    for name in whole:
        assert ours[name].shape == whole[name].shape and np.abs(ours[name] - whole[name]).max() < 1e-5


def test_a_scorer_says_what_its_network_says_in_steps_of_a_255th(picture, one_thread):
    net = network()
    whole = probabilities(net, picture)
    found = dict(TilePredictor(net, ["tissue", "gland"], precision="fp32")(picture, (288, 288, 576, 432)))
    assert list(found) == ["tissue", "gland"]
    assert np.abs(found["gland"] / 255 - whole["gland"][:, 288:576, 288:432]).max() <= 0.5 / 255 + 1e-5
    assert np.abs(found["tissue"] / 255 - whole["tissue"][:, 2:4, 2:3]).max() <= 0.5 / 255 + 1e-5


def test_weights_and_tasks_are_found_or_named(tmp_path):
    net = network(tasks=("gland", "gland-type", "nucleus", "nucleus-type", "nucleus-type-consep"))
    save_cerberus(net, tmp_path, mpp=0.4)
    scorer = load_predictor(str(tmp_path))
    assert scorer.mpp == 0.4 and load_predictor(tmp_path, mpp=0.5).mpp == 0.5
    assert list(scorer.tasks) == ["gland", "gland-type", "nucleus", "nucleus-type"]  # of two types of nuclei the first
    assert scorer.digest == TilePredictor(net).digest != TilePredictor(network(seed=1)).digest
    for names, says in (
        (["nuclei"], "Did you mean `nucleus`"),
        (["gland-type"], "Ask for `gland` too"),
        (["nucleus", "nucleus-type", "nucleus-type-consep"], "two give types"),
        ([], "none"),
    ):
        with pytest.raises(BadInput, match=says):
            TilePredictor(net, names)
    with pytest.raises(BadInput, match="no such task"):
        load_predictor("stain", ["lumen"])
    with pytest.raises(BadInput, match="no such file"):
        load_predictor(tmp_path / "absent")
    with pytest.raises(BadInput, match="precision"):
        load_predictor(net, precision="fp16")
    with pytest.raises(BadInput, match="multiple of 16"):
        predict_tiled(net, None, (9, 9), margin=152)
    with pytest.raises(BadInput, match="such as 432"):
        tile_boxes((9, 9), 448)


def test_windows_of_a_resampled_slide_agree(tmp_path):
    image = draw_field(1, size=700).image
    write_slide(tmp_path / "a.tiff", image, mpp=0.48, compression="deflate")
    with open_slide(tmp_path / "a.tiff") as slide:
        assert np.array_equal(ResampledSlide(slide, 0.48, 64)(30, 100, 500, 333), image[100:433, 30:530])
        read = ResampledSlide(slide, 0.71, 128)
        whole = read(0, 0, *read.shape[::-1])
        for x, y, w, h in ((0, 0, 1, 1), (127, 100, 200, 300), (400, 1, 73, 472)):
            assert np.array_equal(read(x, y, w, h), whole[y : y + h, x : x + w])
        with pytest.raises(BadInput, match="but the slide has"):
            ResampledSlide(slide, 0.3)


# Objects


def certain(ids, task):
    return np.uint8(255) * (instance_target(ids, TASKS[task].kernel) == np.arange(3)[:, None, None])


def scene(seed, side=720):
    "Objects on every seam and corner, glands longer than any window, one with a hole, types that change inside."
    rng = np.random.default_rng(seed)
    glands, lumens, nuclei = np.zeros((3, side, side), np.int32)
    for i, (y, x) in enumerate(((y, x) for y in range(72, side, 72) for x in range(72, side, 72)), 1):
        cv2.ellipse(
            nuclei,
            (int(x + rng.integers(-6, 7)), int(y + rng.integers(-6, 7))),
            (int(rng.integers(7, 14)), int(rng.integers(6, 10))),
            float(rng.uniform(0, 180)),
            0,
            360,
            i,
            -1,
        )
    cv2.ellipse(glands, (380, 300), (320, 130), 20, 0, 360, 1, -1)
    cv2.ellipse(glands, (380, 300), (250, 70), 20, 0, 360, 0, -1)
    cv2.ellipse(glands, (560, 600), (110, 60), 0, 180, 360, 2, 40)
    for i, (x, y) in enumerate(((144, 576), (288, 640), (650, 70)), 3):
        cv2.ellipse(glands, (x, y), (50, 40), float(rng.uniform(0, 180)), 0, 360, i, -1)
        cv2.circle(lumens, (x, y), 15, i, -1)
    cv2.circle(lumens, (380, 300), 30, 1, -1)  # in the hole, which belongs to the gland
    cv2.circle(lumens, (60, 60), 15, 2, -1)  # in no gland
    kinds = np.where(nuclei > 0, 1 + (nuclei + np.arange(side) // 100) % 3, 0)
    return {
        "gland": certain(glands, "gland"),
        "lumen": certain(lumens, "lumen"),
        "nucleus": certain(nuclei, "nucleus"),
        "nucleus-type": np.uint8(200) * (kinds == np.arange(7)[:, None, None]),
    }


def at_once(found, task):
    "What `42_instances` makes of the whole picture."
    probs = {k: v / np.float32(255) for k, v in found.items()}
    ids = extract_instances(
        probs[task], task, within=extract_instances(probs["gland"], "gland") if task == "lumen" else None
    )
    types = TYPES[task]
    kinds = (
        majority_types(ids, np.where(probs[types][1:].any(0), probs[types][1:].argmax(0) + 1, 0).astype(np.uint8))
        if types
        else None
    )
    return object_table(ids, probs[types or task], kinds)


def in_windows(found, tile, **options):
    shape, read = found["gland"].shape[1:], lambda name, box: found[name][:, box[0] : box[2], box[1] : box[3]]
    tables = {
        task: instances_in_windows(read, task, shape, tile, types=types, **options) for task, types in TYPES.items()
    }
    glands = shapely.STRtree(shapely.from_wkb(tables["gland"]["outline"]))
    inside = enclosing_glands(shapely.from_wkb(tables["lumen"]["outline"].to_numpy(object)), glands) >= 0
    return tables | {"lumen": tables["lumen"][inside]}


def same(whole, windows, columns=("left", "top", "right", "bottom", "n", "type", "x", "y", "probability")):
    a, b = (t[list(columns)].sort_values(["left", "top", "n"], ignore_index=True) for t in (whole, windows))
    pd.testing.assert_frame_equal(a, b, check_dtype=False, atol=1e-3)
    return a


@pytest.mark.parametrize("tile, halo", [(144, 96), (288, 96), (144, None), (432, 64)])
def test_objects_on_seams_and_corners_come_out_once_and_whole(tile, halo):
    found = scene(tile)
    windows = in_windows(found, tile, halo=halo)
    assert len(same(at_once(found, "nucleus"), windows["nucleus"])) == 81
    assert len(same(at_once(found, "lumen"), windows["lumen"])) == 4
    whole = at_once(found, "gland")
    assert len(same(whole, windows["gland"], ("left", "top", "right", "bottom", "n"))) == 5
    assert (whole["right"] - whole["left"]).max() > tile + (
        halo or 0
    )  # one goes on beyond the window that its left end is in


def test_a_crowd_of_touching_nuclei_is_separated_as_at_once():
    phantom = draw_slide(3, (900, 800), cover=(0.6, 0.7))
    rng = np.random.default_rng(0)

    def blurred(ids, task):
        p = np.moveaxis(cv2.GaussianBlur(np.moveaxis(np.float32(certain(ids, task)), 0, -1), (0, 0), 1.5), -1, 0)
        p = np.clip(p * (1 + 0.2 * rng.standard_normal(p.shape, dtype=np.float32)), 1, None)
        return np.uint8(255 * p / p.sum(0))

    kinds = np.append(phantom.types, 0)[phantom.nuclei]
    found = {
        "gland": blurred(phantom.glands, "gland"),
        "lumen": blurred(phantom.lumens, "lumen"),
        "nucleus": blurred(phantom.nuclei, "nucleus"),
        "nucleus-type": np.uint8(255) * (kinds == np.arange(7)[:, None, None]),
    }
    windows = in_windows(found, 144)
    assert len(same(at_once(found, "nucleus"), windows["nucleus"])) > 200
    assert len(same(at_once(found, "gland"), windows["gland"])) > 5
    same(at_once(found, "lumen"), windows["lumen"])


@pytest.mark.parametrize("turn", range(4))
def test_an_object_around_a_tile_of_glass_has_an_owner(turn):
    ids = np.zeros((288, 288), np.int32)
    ids[40:210, 110:142] = ids[180:212, 110:250] = 1
    found = certain(np.ascontiguousarray(np.rot90(ids, turn)), "gland")
    has = np.rot90(np.array([[True, False], [True, True]]), turn)
    for (t, l, b, r), there in zip(tile_boxes((288, 288), 144), has.ravel(), strict=True):
        if not there:
            found[:, t:b, l:r] = np.uint8([255, 0, 0])[:, None, None]

    def read(name, box):
        return found[:, box[0] : box[2], box[1] : box[3]]

    tables = [
        instances_in_window(read, "gland", at, (288, 288), 144, has, halo=272)[0] for at in np.argwhere(has).tolist()
    ]
    assert sum(map(len, tables)) == 1


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("task", ["gland", "lumen", "nucleus"])
def test_long_objects_hang_together_by_a_neck_on_a_seam(task, turn):
    "Two lobes, each over a seam between tiles of 144 pixels, and a neck between them on a third seam."
    ids = np.zeros((288, 432), np.int32)
    ids[146:186, 129:214] = ids[100:143, 206:307] = ids[128:160, 194:226] = 1
    found = certain(np.ascontiguousarray(np.rot90(ids, turn)), task)
    whole, windows = (
        instances_in_windows(
            lambda name, box: found[:, box[0] : box[2], box[1] : box[3]], task, found.shape[1:], tile, halo=64
        )
        for tile in (432, 144)
    )
    assert len(windows) == len(whole) == 1 and windows["n"][0] == whole["n"][0]
    assert (
        shapely.area(shapely.symmetric_difference(*(shapely.from_wkb(t["outline"][0]) for t in (whole, windows))))
        < 0.01 * whole["n"][0]
    )


def test_long_objects_of_any_shape_are_those_of_one_window():
    scores = cv2.GaussianBlur(
        np.random.default_rng(3).standard_normal((1000, 1100)), (0, 0), 20, borderType=cv2.BORDER_REFLECT
    )[:576, :432]
    inner = 255 / (1 + np.exp(-3 * (scores / scores.std() - 0.6)))
    found = np.uint8([255 - np.uint8(inner), inner, 0 * inner])
    for task in ("gland", "lumen", "nucleus"):
        whole, windows = (
            instances_in_windows(
                lambda name, box: found[:, box[0] : box[2], box[1] : box[3]], task, found.shape[1:], tile
            )
            for tile in (576, 144)
        )
        same(whole, windows, ("left", "top", "right", "bottom", "n"))


def test_outlines_enclose_as_many_pixels_as_their_objects_have():
    phantom = draw_slide(3, (700, 600), cover=(0.6, 0.7))
    rng = np.random.default_rng(0)
    for task, ids in (("gland", phantom.glands), ("lumen", phantom.lumens), ("nucleus", phantom.nuclei)):
        p = np.moveaxis(cv2.GaussianBlur(np.moveaxis(np.float32(certain(ids, task)), 0, -1), (0, 0), 1.0), -1, 0)
        p = np.clip(p * (1 + 0.5 * rng.standard_normal(p.shape, dtype=np.float32)), 1, None)
        found = extract_instances(p / p.sum(0), task)
        pixels = np.bincount(found.ravel())[1:]
        assert np.abs(shapely.area(instance_outlines(found)) / pixels - 1).max() < 0.01, task
        assert len(pixels) > 3 and (task != "nucleus" or pixels.min() < 40)


def test_no_objects_are_a_table_too():
    found = {
        name: np.uint8(255) * (np.arange(c) == 0)[:, None, None].repeat(200, 1).repeat(300, 2)
        for name, c in (("gland", 3), ("lumen", 3), ("nucleus", 3), ("nucleus-type", 7))
    }
    assert {task: len(t) for task, t in in_windows(found, 144).items()} == {"gland": 0, "lumen": 0, "nucleus": 0}


def test_parts_refuse_what_is_damaged(tmp_path):
    parts = ProbabilityCache(tmp_path, (144, 144), 144, {"gland": TASKS["gland"]})
    p = certain(np.eye(144, dtype=np.int32), "gland")
    parts.write(0, [("gland", p)])
    assert np.array_equal(parts("gland", (3, 5, 100, 99)), p[:, 3:100, 5:99])
    whole = parts.path(0).read_bytes()
    flipped = [
        whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :]
        for i in (len(whole) // 8, len(whole) // 4, len(whole) // 2)
    ]
    for content in (b"", whole[:-30], whole[:100], *flipped):
        parts.path(0).write_bytes(content)
        with pytest.raises(BadInput, match="Delete this file"):
            ProbabilityCache(tmp_path, (144, 144), 144, parts.tasks)("gland", (0, 0, 9, 9))
    with open(parts.path(0), "wb") as f:
        np.save(f, np.zeros(3))  # an array in place of an archive
    with pytest.raises(BadInput, match="Delete this file"):
        ProbabilityCache(tmp_path, (144, 144), 144, parts.tasks)("gland", (0, 0, 9, 9))


# Slides


class Painted:
    "A network of colours: red below 175 is gland, much blue lumen, little green nucleus (type 2: little blue)."

    def __init__(self, stop=None, digest="painted"):
        self.tasks = {n: TASKS[n] for n in ("nucleus", "nucleus-type", "lumen", "gland", "tissue")}
        self.grid = 1
        self.mpp, self.margin, self.name, self.digest, self.precision, self.device = (
            0.5,
            16,
            "painted",
            digest,
            "fp32",
            "cpu",
        )
        self.stop, self.seen = stop, 0

    def __call__(self, image, keep):
        if self.seen == self.stop:
            raise KeyboardInterrupt
        self.seen += 1
        r, g, b = np.moveaxis(image.astype(int), -1, 0)
        glass = g > 210
        nucleus = g < 70
        masks = {"gland": (r < 175) | (nucleus & (r < 130)), "lumen": (r < 175) & (b > 210), "nucleus": nucleus}
        box = np.s_[keep[0] : keep[2], keep[1] : keep[3]]
        for name, mask in masks.items():
            yield name, certain(cv2.connectedComponents(np.uint8(mask & ~glass))[1], name)[:, *box]
        yield "nucleus-type", np.uint8(255) * (np.where(nucleus, 1 + (b < 60), 0)[box] == np.arange(7)[:, None, None])
        squares = [range(0, (k1 - k0) // 144) for k0, k1 in (keep[::2], keep[1::2])]
        if all(map(len, squares)):
            yield (
                "tissue",
                np.uint8(255)
                * (
                    np.array(
                        [
                            [4 * (not glass[box][y * 144 :, x * 144 :][:144, :144].mean() > 0.5) for x in squares[1]]
                            for y in squares[0]
                        ]
                    )
                    == np.arange(9)[:, None, None]
                ),
            )


def paint(shape=(2600, 2200)):
    "A slide at 0.25 um/px: glass, pink tissue, glands with lumina (one 2.5 tiles long), nuclei of two types."
    rng = np.random.default_rng(0)
    image = np.full((*shape, 3), 245, np.uint8)
    image[150:-500, 200:-150] = (220, 130, 180)
    cv2.ellipse(image, (1000, 900), (700, 160), 30, 0, 360, (150, 130, 180), -1)
    cv2.ellipse(image, (1000, 900), (500, 50), 30, 0, 360, (150, 130, 240), -1)
    for x, y in ((576, 1728), (1152, 1800), (1700, 1440), (1728, 500)):
        cv2.circle(image, (x, y), 120, (150, 130, 180), -1)
        cv2.circle(image, (x, y), 40, (150, 130, 240), -1)
    number = 0
    for y in range(250, shape[0] - 600, 97):
        for x in range(300, shape[1] - 250, 97):
            number += 1
            color = image[y, x] if image[y, x, 0] < 175 else image[y, x] // 2 * 2
            cv2.ellipse(
                image,
                (x, y),
                (16, 12),
                float(rng.uniform(0, 180)),
                0,
                360,
                (int(color[0]), 30, 120 if number % 2 else 30),
                -1,
            )
    return image, number


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "painted.tiff"
    image, number = paint()
    write_slide(path, image, mpp=0.25, compression="deflate", tile=256)
    return path, number


@pytest.fixture(scope="module")
def annotated(slide, tmp_path_factory):
    return annotate_slide(slide[0], Painted(), tmp_path_factory.mktemp("out"), tile=288)


def test_a_slide_gives_the_objects_of_the_whole_picture_in_its_own_pixels(slide, annotated):
    with open_slide(slide[0]) as s:
        read = ResampledSlide(s, 0.5)
        found = dict(Painted()(read(0, 0, *read.shape[::-1]), (0, 0, *read.shape)))
    table = pd.read_parquet(annotated / "objects.parquet")
    assert (
        len(table) and (table.groupby("task").id.apply(list).map(lambda ids: ids == list(range(1, len(ids) + 1)))).all()
    )
    for task in TYPES:
        whole = at_once(found, task)
        ours = table[table.task == task].assign(n=lambda t: (t.area_um2 / 0.25).round())
        whole[["left", "top", "right", "bottom", "x", "y"]] *= 2
        a, b = (t.sort_values(["left", "top"], ignore_index=True) for t in (whole, ours))
        assert len(a) == len(b) > 3
        assert (
            np.abs(
                a[["left", "top", "right", "bottom"]].to_numpy() - b[["left", "top", "right", "bottom"]].to_numpy()
            ).max()
            == 0
        )
        assert (
            np.abs(a[["n", "x", "y", "probability"]].to_numpy() - b[["n", "x", "y", "probability"]].to_numpy()).max()
            < 0.01
        )
        names = ("", *TASKS["nucleus-type"].classes[1:])
        if task == "nucleus":
            assert [names[k] for k in a.type] == b.type.tolist() and set(b.type) == {"neutrophil", "epithelial"}
    assert (table.task == "nucleus").sum() == slide[1]


def test_the_file_is_what_qupath_opens(annotated):
    text = (annotated / "objects.geojson").read_text()
    features = json.loads(text)["features"]
    table = pd.read_parquet(annotated / "objects.parquet").set_index("feature")
    assert json.loads(text)["type"] == "FeatureCollection" and text.count("\n") == len(features) + 2
    assert [f["id"] for f in features] == table.index.tolist() and table.index.is_unique
    shapes = shapely.from_geojson([json.dumps(f["geometry"]) for f in features])
    assert shapely.is_valid(shapes).all() and {f["geometry"]["type"] for f in features} == {"Polygon"}
    for f, shape in zip(features, shapes, strict=True):
        row = table.loc[f["id"]]
        about = f["properties"]
        ring = f["geometry"]["coordinates"][0]
        assert f["type"] == "Feature" and ring[0] == ring[-1] and len(f["geometry"]["coordinates"]) == 1
        assert about["objectType"] == ("detection" if row.task == "nucleus" else "annotation")
        assert about["classification"]["name"] == row.task.capitalize() + (f": {row.type}" if row.type else "")
        assert len(about["classification"]["color"]) == 3 and about["measurements"]["Area µm^2"] == pytest.approx(
            row.area_um2, abs=0.01
        )
        assert (
            np.abs(np.array(shape.bounds) - row[["left", "top", "right", "bottom"]].to_numpy(float)).max() <= 2.01
        )  # simplified by half a pixel of 0.5 um, rounded to it
        assert shape.area * 0.25**2 == pytest.approx(row.area_um2, rel=0.01)


def test_tissue_and_provenance(slide, annotated):
    about = read_json(annotated / "annotation.json")
    squares = cv2.imread(str(annotated / "tissue.png"), cv2.IMREAD_UNCHANGED)
    drawn = np.zeros((9, 7), int)
    drawn[0, 1:] = drawn[1:7, 1:] = 4
    assert squares.shape == (9, 7) and set(np.unique(squares)) == {0, 4} and (squares == drawn).mean() > 0.85
    tissue = read_json(annotated / "tissue.json")
    assert tissue["classes"]["4"]["name"] == "muscle" and tissue["square_pixels"] == 288
    assert cv2.imread(str(annotated / "tissue_colour.png")).shape == (72, 56, 3)
    assert (about["slide_mpp"], about["mpp"], about["size"], about["weights"], about["tile"]) == (
        0.25,
        0.5,
        [2200, 2600],
        "painted",
        288,
    )
    assert about["tissue_mm2"] == pytest.approx(1950 * 1850 * 0.25**2 / 1e6, rel=0.03)
    assert about["tiles"] == {"all": 20, "computed": 16}  # the last row is glass
    assert (
        sum(about["counts"].values()) == len(pd.read_parquet(annotated / "objects.parquet"))
        and about["counts"]["Gland"] == 5
    )
    assert not (annotated / "parts").exists()


def test_the_default_tile_grows_with_what_the_network_sees(slide, tmp_path):
    """At least two fifths of what is read are kept; a ResNet34 keeps its 1008. A slide ends with the tile it began."""
    for margin in range(0, 1500, 16):
        tile = default_tile(margin)
        assert tile % 144 == 0 and tile >= 1008 and (tile / (tile + 2 * margin)) ** 2 >= 0.4
        assert tile == 1008 or ((tile - 144) / (tile - 144 + 2 * margin)) ** 2 < 0.4
    assert [default_tile(margin) for margin in (176, 288, 576)] == [1008, 1008, 2016]
    far = Painted(0)
    far.margin = 300
    with pytest.raises(KeyboardInterrupt):
        annotate_slide(slide[0], far, tmp_path)
    assert read_json(tmp_path / "painted/settings.json")["tile"] == 1152
    with pytest.raises(KeyboardInterrupt):
        annotate_slide(slide[0], Painted(0), tmp_path)
    with pytest.raises(BadInput, match="tile 1152 -> 288"):
        annotate_slide(slide[0], Painted(0), tmp_path, tile=288)


@pytest.mark.parametrize("stop", [1, 5])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(stop, slide, annotated, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        annotate_slide(slide[0], Painted(stop), tmp_path, tile=288)
    assert not (tmp_path / "painted/objects.geojson").exists()
    rest = Painted()
    folder = annotate_slide(slide[0], rest, tmp_path, tile=288)
    assert rest.seen == read_json(annotated / "annotation.json")["tiles"]["computed"] - stop
    for path in annotated.iterdir():
        if path.name != "annotation.json":
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    a, b = (read_json(f / "annotation.json") for f in (annotated, folder))
    for about in (a, b):
        del about["seconds"]
        del about["slide_path"]  # from either folder
    assert a == b


def test_a_run_stopped_among_windows_or_while_writing_goes_on(slide, annotated, tmp_path, monkeypatch):
    from histonb.annotate import slide as module

    real = module.instances_in_window
    calls = []

    def stopping(read, task, at, *args, **kwargs):
        calls.append((task, tuple(at)))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(read, task, at, *args, **kwargs)

    monkeypatch.setattr(module, "instances_in_window", stopping)
    with pytest.raises(KeyboardInterrupt):
        annotate_slide(slide[0], Painted(), tmp_path, tile=288)
    monkeypatch.setattr("histonb.annotate.exporting.draw_outlines", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        annotate_slide(slide[0], Painted(0), tmp_path, tile=288)  # no tile is scored again
    assert not (tmp_path / "painted/objects.geojson").exists() and not list((tmp_path / "painted").glob(".*"))
    assert len(set(calls)) == len(calls) - 1  # the interrupted window only is looked at again
    monkeypatch.undo()
    folder = annotate_slide(slide[0], Painted(0), tmp_path, tile=288)
    for name in ("objects.geojson", "objects.parquet", "overview.png", "tissue.png"):
        assert (folder / name).read_bytes() == (annotated / name).read_bytes()


def test_a_folder_belongs_to_one_slide_one_network_and_one_set_of_settings(slide, annotated, tmp_path):
    out = annotated.parent
    assert annotate_slide(slide[0], Painted(0), out, tile=288) == annotated  # finished: nothing is computed
    for scorer, options, says in (
        (Painted(digest="other"), {"tile": 288}, "weights painted -> other"),
        (Painted(), {"tile": 432}, "tile 288 -> 432"),
        (StainPredictor(), {"tile": 288}, "tasks"),
    ):
        with pytest.raises(BadInput, match=says):
            annotate_slide(slide[0], scorer, out, **options)
    (tmp_path / "painted.tiff").write_bytes(slide[0].read_bytes() + b"\0")
    with pytest.raises(BadInput, match="file .*--overwrite"):
        annotate_slide(tmp_path / "painted.tiff", Painted(), out, tile=288)


@pytest.fixture
def finished(slide, annotated, tmp_path):
    "A slide and its finished annotation, to be spoilt."
    shutil.copy(slide[0], tmp_path / "painted.tiff")
    shutil.copytree(annotated, tmp_path / "out/painted")
    return tmp_path / "painted.tiff", tmp_path / "out/painted"


def test_a_copied_or_touched_slide_is_the_same_slide(finished):
    path, folder = finished  # a copy: of another time than what was annotated
    assert annotate_slide(path, Painted(0), folder.parent, tile=288) == folder
    os.utime(path, (1, 1))
    assert annotate_slide(path, Painted(0), folder.parent, tile=288) == folder


def test_a_finished_annotation_is_checked_before_it_is_believed(finished):
    path, folder = finished
    for name in (
        "objects.geojson",
        "objects.parquet",
        "overview.png",
        "tissue.png",
        "tissue_colour.png",
        "tissue.json",
    ):
        whole = (folder / name).read_bytes()
        for spoilt in (whole[:-9], whole[:-1] + b"\1", None):
            (folder / name).unlink()
            if spoilt:
                (folder / name).write_bytes(spoilt)
            for options in ({}, {"skip_existing": True}):
                with pytest.raises(BadInput, match=f"{name}: .*{'not the file' if spoilt else 'missing'}.*--overwrite"):
                    annotate_slide(path, Painted(0), folder.parent, tile=288, **options)
        (folder / name).write_bytes(whole)
    assert annotate_slide(path, Painted(0), folder.parent, tile=288) == folder
    (folder / "objects.geojson").unlink()
    annotate_slide(path, Painted(), folder.parent, tile=288, overwrite=True)
    annotate_slide(path, Painted(0), folder.parent, tile=288)


def test_an_annotation_is_overwritten_or_left_as_it_is_where_that_is_asked_for(finished):
    path, folder = finished
    before = (folder / "annotation.json").read_bytes()
    (folder / "notes.txt").write_text("a reader's own")
    assert (
        annotate_slide(path, Painted(0, digest="other"), folder.parent, tile=432, skip_existing=True) == folder
        and (folder / "annotation.json").read_bytes() == before
    )
    with pytest.raises(BadInput, match="other settings"):
        annotate_slide(path, Painted(0, digest="other"), folder.parent, tile=432)
    with pytest.raises(KeyboardInterrupt):
        annotate_slide(path, Painted(1, digest="other"), folder.parent, tile=432, overwrite=True)
    assert not (folder / "annotation.json").exists() and not (folder / "objects.geojson").exists()
    rest = Painted(digest="other")
    about = read_json(
        annotate_slide(path, rest, folder.parent, tile=432, skip_existing=True) / "annotation.json"
    )  # begun, not finished
    assert (
        about["weights"] == "other" and rest.seen == about["tiles"]["computed"] - 1 and (folder / "notes.txt").exists()
    )
    with pytest.raises(BadInput, match="Choose one"):
        annotate_slide(path, Painted(), folder.parent, overwrite=True, skip_existing=True)


def test_a_processor_computes_in_fp32_unless_asked_and_a_slide_ends_as_it_was_begun(tmp_path, monkeypatch):
    from histonb.training import device as devices

    monkeypatch.setattr(devices, "best_precision", lambda device: "bf16")
    net = network(tasks=("nucleus",))
    assert [TilePredictor(net, device="cpu", precision=p).precision for p in ("auto", "fp32", "bf16")] == [
        "fp32",
        "fp32",
        "bf16",
    ]
    write_slide(tmp_path / "a.tiff", draw_field(0, size=300).image, mpp=0.5)
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(TilePredictor, "__call__", lambda *_: exec("raise KeyboardInterrupt"))
        annotate_slide(tmp_path / "a.tiff", TilePredictor(net, precision="bf16"), tmp_path / "out")
    monkeypatch.undo()
    assert (
        read_json(annotate_slide(tmp_path / "a.tiff", TilePredictor(net), tmp_path / "out") / "annotation.json")[
            "precision"
        ]
        == "bf16"
    )
    with pytest.raises(BadInput, match="precision bf16 -> fp32"):
        annotate_slide(tmp_path / "a.tiff", TilePredictor(net, precision="fp32"), tmp_path / "out")


def test_two_processes_do_not_share_a_folder(slide, tmp_path):
    class Nested(Painted):
        def __call__(self, image, keep):
            with pytest.raises(BadInput, match="another process"):
                annotate_slide(slide[0], Painted(), tmp_path, tile=288)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotate_slide(slide[0], Nested(), tmp_path, tile=288)


def test_nothing_of_the_size_of_the_slide_is_read(slide, tmp_path, monkeypatch):
    real = Slide.read
    sizes = []

    def read(self, x, y, width, height, level=0):
        sizes.append((level, width * height))
        return real(self, x, y, width, height, level)

    monkeypatch.setattr(Slide, "read", read)
    annotate_slide(slide[0], Painted(), tmp_path, tile=288)
    assert max(n for level, n in sizes if level == 0) <= 1024**2 < 2600 * 2200 / 5


def test_slides_without_tissue_give_empty_files_and_say_so(tmp_path):
    write_slide(tmp_path / "glass.tiff", draw_slide(0, (900, 800), blank=True).image, mpp=0.48)
    folder = annotate_slide(tmp_path / "glass.tiff", Painted(0), tmp_path / "out")
    about = read_json(folder / "annotation.json")
    assert (
        "no tissue" in about["note"]
        and about["counts"] == {"Gland": 0, "Nucleus": 0, "Lumen": 0}
        and about["tiles"]["computed"] == 0
    )
    assert (
        read_json(folder / "objects.geojson")["features"] == []
        and len(pd.read_parquet(folder / "objects.parquet")) == 0
    )
    assert cv2.imread(str(folder / "overview.png")) is not None and not cv2.imread(str(folder / "tissue.png")).any()


def test_a_shred_of_tissue_is_not_missed(tmp_path):
    for k, (y, x, side, tiles) in enumerate(
        ((684, 396, 72, [[1, 0], [1, 1]]), (828, 828, 72, [[1, 1], [1, 2], [2, 1], [2, 2]]), (330, 330, 40, [[0, 0]]))
    ):
        image = np.full((1300, 1300, 3), 245, np.uint8)
        image[y : y + side, x : x + side] = (200, 120, 160)
        for levels in ((1, 4, 16), (1,)):
            write_slide(tmp_path / f"{k}{len(levels)}.tiff", image, mpp=0.5, levels=levels)
            with open_slide(tmp_path / f"{k}{len(levels)}.tiff") as s:
                squares = tissue_squares(s, 1.0, (1300, 1300))
            assert side**2 / 2 < squares.sum() * 144**2 < side**2 * 2  # at low resolution pixels count as a whole
            assert np.argwhere(tiles_with_tissue(squares, 432)).tolist() == tiles


@pytest.mark.parametrize("shape", [(40, 60), (150, 700)])
def test_slides_smaller_than_a_tile_or_the_reach(shape, tmp_path, one_thread):
    write_slide(tmp_path / "small.tiff", draw_field(0, size=700).image[: shape[0], : shape[1]], mpp=0.5, levels=(1,))
    folder = annotate_slide(
        tmp_path / "small.tiff", network(tasks=("gland", "lumen", "nucleus", "tissue")), tmp_path / "out"
    )
    assert read_json(folder / "annotation.json")["tiles"] == {"all": 1, "computed": 1}
    assert cv2.imread(str(folder / "tissue.png"), cv2.IMREAD_UNCHANGED).shape == tuple(
        max(1, -(-s // 16) * 16 // 144) for s in shape
    )


def test_slides_that_cannot_be_used_are_named_before_anything_is_written(slide, tmp_path):
    image = draw_field(0, size=300).image
    write_slide(tmp_path / "unknown.tiff", image, mpp=None)
    write_slide(tmp_path / "coarse.tiff", image, mpp=1.0)
    (tmp_path / "broken.tiff").write_bytes(b"II*\0")
    for name, says in (
        ("unknown", "does not say how many microns"),
        ("coarse", "but the slide has 1"),
        ("broken", "truncated or damaged"),
        ("absent", "no such file"),
    ):
        with pytest.raises(BadInput, match=says):
            annotate_slide(tmp_path / f"{name}.tiff", Painted(), tmp_path / "out")
    with pytest.raises(BadInput, match="multiple of 144"):
        annotate_slide(slide[0], Painted(), tmp_path / "out", tile=500)
    assert not (tmp_path / "out").exists()
    assert annotate_slide(tmp_path / "unknown.tiff", Painted(), tmp_path / "out", slide_mpp=0.5).exists()


@pytest.fixture
def damaged(slide, tmp_path):
    "The slide with one broken internal tile, in the midst of its tissue."
    data = bytearray(slide[0].read_bytes())
    with open_slide(slide[0]) as s:
        at = s.levels[0]
    offset = int(at.offsets[0, 7, 4])
    count = int(at.counts[0, 7, 4])
    data[offset : offset + count] = bytes(count)
    path = tmp_path / "painted.tiff"
    path.write_bytes(data)
    return path


def test_a_damaged_tile_of_the_slide_is_named_and_what_was_done_is_kept(damaged, tmp_path):
    with pytest.raises(BadInput, match=r"damaged internal tile \(level 0, row 7, column 4\)"):
        annotate_slide(damaged, Painted(), tmp_path / "out", tile=288, max_damaged=0)
    assert len(list((tmp_path / "out/painted/parts").glob("scores-*.npz"))) > 3


@pytest.mark.parametrize("left", [0, 1, 12])
def test_damage_that_is_allowed_costs_what_lies_on_it_and_is_counted(damaged, annotated, tmp_path, left):
    "Also by a run that was stopped, after it met the damage or before."
    whole = read_json(annotated / "annotation.json")

    def nuclei(about):
        return sum(n for name, n in about["counts"].items() if name.startswith("Nucleus"))

    if left:
        stopped = Painted(whole["tiles"]["computed"] - left)
        with pytest.raises(KeyboardInterrupt):
            annotate_slide(damaged, stopped, tmp_path / "out", tile=288)
        with pytest.raises(BadInput, match="row 7, column 4"):
            annotate_slide(damaged, Painted(), tmp_path / "out", tile=288, max_damaged=0)
    about = read_json(annotate_slide(damaged, Painted(), tmp_path / "out", tile=288) / "annotation.json")
    assert about["damaged"] == 1 and about["note"] == "1 internal tile is damaged and taken as glass"
    assert whole["damaged"] == 0 and whole["note"] == ""
    assert 0.9 * nuclei(whole) < nuclei(about) < nuclei(whole)


def test_an_object_table_without_groups_and_unknown_types_is_written(tmp_path):
    counts = write_objects(tmp_path, [], np.full((9, 9, 3), 255, np.uint8), 1.0)
    assert not counts and read_json(tmp_path / "objects.geojson") == {"type": "FeatureCollection", "features": []}
    table = pd.DataFrame(
        {
            "x": [5.0],
            "y": [5.0],
            "left": [0],
            "top": [0],
            "right": [9],
            "bottom": [9],
            "n": [81],
            "type": [0],
            "probability": [0.5],
            "outline": [shapely.to_wkb(shapely.box(0, 0, 9, 9))],
        }
    )
    assert to_slide_coordinates(table, "gland", ("none", "benign"))["type"].tolist() == [""]


@pytest.mark.skipif(not REAL.exists(), reason="no real slide here: ../shared/data/slides")
def test_a_real_slide(tmp_path):
    folder = annotate_slide(REAL, "stain", tmp_path, tasks=["nucleus"])
    table = pd.read_parquet(folder / "objects.parquet")
    features = read_json(folder / "objects.geojson")["features"]
    assert 2000 < len(table) == len(features) and table.x.between(0, 2220).all() and table.y.between(0, 2967).all()
    assert shapely.is_valid(shapely.from_geojson([json.dumps(f["geometry"]) for f in features])).all()
    assert 0.4 < read_json(folder / "annotation.json")["tissue_mm2"] < 1.0


@pytest.mark.parametrize("mpp", [None, 0.7])
def test_stain_says_the_same_in_any_tile(mpp, tmp_path):
    write_slide(tmp_path / "a.tiff", draw_slide(4, (760, 700), cover=(0.6, 0.7)).image, mpp=0.48)
    folders = [
        annotate_slide(tmp_path / "a.tiff", "stain", tmp_path / str(tile), mpp=mpp, tile=tile) for tile in (1008, 144)
    ]
    a, b = (
        pd.read_parquet(folder / "objects.parquet")
        .drop(columns=["id", "feature"])
        .sort_values(["task", "left", "top"], ignore_index=True)
        for folder in folders
    )
    pd.testing.assert_frame_equal(a, b)
    seams = 144 * (mpp or 0.5) / 0.48 * np.arange(1, 6)
    on_seams = ((a["left"].to_numpy()[:, None] < seams) & (a["right"].to_numpy()[:, None] > seams)).any(1)
    assert (a["task"] == "gland")[on_seams].sum() > 0 and (a["task"] == "nucleus")[on_seams].sum() > 9
    assert a["probability"].isna().all() and not any(
        "Probability" in f["properties"]["measurements"] for f in read_json(folders[0] / "objects.geojson")["features"]
    )
    for shape in read_objects(folders[1] / "objects.geojson")["outline"]:
        steps = np.abs(np.diff(shapely.get_coordinates(shape.exterior), axis=0))
        assert steps[steps.min(1) == 0].max(initial=0) < 100, "a straight edge along a seam"


# The command


@pytest.fixture
def histonb(monkeypatch, capsys):
    "The command in this process: its exit code and what it says."

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["histonb", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def test_the_command_annotates_and_names_what_it_cannot(tmp_path, histonb):
    for name, seed in (("a", 1), ("b", 2)):
        write_slide(tmp_path / f"{name}.tiff", draw_slide(seed, (700, 600), cover=(0.5, 0.6)).image, mpp=0.48)
    (tmp_path / "bad.tiff").write_bytes(b"nothing")
    slides = [tmp_path / f"{name}.tiff" for name in ("a", "bad", "b")]
    code, said, faults = histonb(
        "annotate", *slides, "--weights", "stain", "--tasks", "nucleus", "--out", tmp_path / "out"
    )
    assert (
        code == 2
        and "bad.tiff" in faults
        and said.count(" Nucleus in ") == 2
        and (tmp_path / "out/b/objects.geojson").exists()
    )
    assert (
        histonb("annotate", slides[0], "--weights", "stain", "--tasks", "nucleus", "--out", tmp_path / "out")[0] == 0
    )  # done before
    for args, says in (
        (("--tasks", "nuclei"), "Did you mean `nucleus`"),
        (("--tile", 500), "multiple of 144"),
        (("--weights", tmp_path), "cerberus.safetensors"),
    ):
        code, _, faults = histonb("annotate", slides[0], "--weights", "stain", "--out", tmp_path / "out2", *args)
        assert code == 2 and says in faults
    assert (
        "several slides of this name"
        in histonb("annotate", slides[0], tmp_path / "other/a.tiff", "--weights", "stain", "--out", tmp_path / "out")[2]
    )
    assert histonb("annotate", slides[1], "--weights", "stain", "--out", tmp_path / "out")[0] == 2


def test_the_command_looks_for_slides_before_weights(tmp_path, histonb, monkeypatch):
    from histonb.segment import predictors

    monkeypatch.setattr(predictors, "load_predictor", lambda *_: 1 / 0)
    for slides in (["nosuch.svs"], ["nosuch.svs", "nor_this.svs"]):
        code, _, faults = histonb("annotate", *slides, "--weights", "w.tar", "--out", tmp_path)
        assert code == 2 and "nosuch.svs: there is no such file" in faults and not list(tmp_path.iterdir())


def test_the_command_overwrites_and_skips(tmp_path, histonb):
    write_slide(tmp_path / "a.tiff", draw_slide(1, (700, 600), cover=(0.5, 0.6)).image, mpp=0.48)

    def annotate(*more):
        return histonb("annotate", tmp_path / "a.tiff", "--weights", "stain", "--out", tmp_path / "out", *more)

    assert annotate("--tasks", "nucleus")[0] == 0
    code, _, faults = annotate("--tasks", "nucleus", "--tile", 144)
    assert code == 2 and "tile 1008 -> 144" in faults and "--overwrite" in faults
    code, said, _ = annotate("--tile", 144, "--skip-existing")
    assert code == 0 and read_json(tmp_path / "out/a/annotation.json")["tile"] == 1008 and " Nucleus in " in said
    assert (
        annotate("--tasks", "nucleus", "--tile", 144, "--overwrite")[0] == 0
        and read_json(tmp_path / "out/a/annotation.json")["tile"] == 144
    )
    assert "Choose one" in annotate("--overwrite", "--skip-existing")[2]


def test_the_command_is_stopped_in_one_line(tmp_path, histonb, monkeypatch):
    write_slide(tmp_path / "a.tiff", draw_slide(1, (700, 600), cover=(0.5, 0.6)).image, mpp=0.48)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(StainPredictor, "__call__", stop)
    code, _, faults = histonb("annotate", tmp_path / "a.tiff", "--weights", "stain", "--out", tmp_path / "out")
    assert code == 130 and "goes on from here" in faults


def test_the_help_teaches():
    done = subprocess.run([HISTONB, "annotate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Examples:" in done.stdout and "QuPath" in done.stdout


def test_a_margin_is_the_reach_on_the_grid_of_the_stride():
    assert [inference_margin(Cerberus(("gland",), arch, 0.0625)) for arch in ("resnet18", "resnet34")] == [176, 288]


# What is left to correct


def test_outlines_give_the_pairs_of_maps():
    phantom = draw_field(5, size=500)
    found = np.roll(phantom.nuclei, (3, 2), (0, 1))
    by_outline = pair_outlines(instance_outlines(phantom.nuclei), instance_outlines(found))
    by_pixel = pair_counts(phantom.nuclei, found)
    a, b = (metrics_from_sums(object_sums(p)) for p in (by_outline, by_pixel))
    for figure in ("pq", "dq", "sq", "aji", "object_dice"):
        assert a[figure] == pytest.approx(b[figure], abs=0.02)
    assert count_edits(by_outline)["kept"] == pytest.approx(count_edits(by_pixel)["kept"], rel=0.05)


def test_edits_of_a_right_annotation_are_none_and_each_fault_is_one():
    squares = [shapely.box(x, y, x + 10, y + 10) for y in range(0, 200, 20) for x in range(0, 200, 20)]
    assert count_edits(pair_outlines(squares, squares)) == {
        "kept": 100,
        **dict.fromkeys(EDITS, 0),
        "sum": 0,
        "truth": 100,
    }
    halves = [shapely.box(x, 0, x + 4.9, 10) for x in (0, 5.1)]
    thirds = [shapely.box(20, y, 30, y + 3) for y in (0, 3.5, 7)]
    both = [shapely.box(40, 0, 70, 10)]
    found = halves + thirds + both + [shapely.box(81, 1, 84, 4), shapely.box(0, 300, 9, 309)] + squares[6:]
    assert {k: v for k, v in count_edits(pair_outlines(squares, found)).items() if k in EDITS} == {
        "split": 1,
        "merge": 3,
        "add": 1,
        "delete": 1,
        "redraw": 1,
    }
    for seed in range(5):
        rng = np.random.default_rng(seed)
        some = [shapely.box(x, y, x + w, y + h) for x, y, w, h in rng.uniform(3, 20, (60, 4)) * [9, 9, 1, 1]]
        other = count_edits(pair_outlines(squares, some))
        assert (
            min(other.values()) >= 0
            and other["kept"] + other["add"] + other["redraw"] <= 100
            and other["sum"] == sum(other[k] for k in EDITS)
        )


def test_annotations_are_read_back_also_those_of_others(annotated, tmp_path):
    back = read_objects(annotated / "objects.geojson")
    table = pd.read_parquet(annotated / "objects.parquet")
    assert back[["task", "type", "feature"]].values.tolist() == table[["task", "type", "feature"]].values.tolist()
    assert shapely.area(back["outline"].to_numpy()).sum() * 0.25**2 == pytest.approx(table["area_um2"].sum(), rel=0.01)
    (tmp_path / "list.geojson").write_text(
        json.dumps(
            [
                {"geometry": {"type": "MultiPolygon", "coordinates": [[[[0, 0], [1, 0], [1, 1], [0, 0]]]]}},
                {"geometry": None},
            ]
        )
    )
    assert read_objects(tmp_path / "list.geojson")[["task", "type", "name"]].values.tolist() == [["", "", ""]]
    for text, says in (
        ("{", "not valid JSON"),
        ("{}", "no list of features"),
        ('[{"geometry": {"type": "Polygon", "coordinates": [[1]]}}]', "cannot be read"),
    ):
        (tmp_path / "bad.geojson").write_text(text)
        with pytest.raises(BadInput, match=says):
            read_objects(tmp_path / "bad.geojson")


@pytest.mark.parametrize("what", ["gland-", "gland-edges-", "survey", "damaged"])
def test_damaged_work_that_was_begun_is_named(tmp_path, monkeypatch, what):
    "Anything else in place of a part is a `BadInput`, and so is a table without a column."
    write_slide(tmp_path / "s.tiff", draw_field(3, size=288).image, mpp=0.5, tile=144, levels=(1,))

    def annotate():
        return annotate_slide(tmp_path / "s.tiff", "stain", tmp_path / "out", tile=144)

    with monkeypatch.context() as patch:
        patch.setattr("histonb.annotate.slide.write_objects", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            annotate()
    parts = tmp_path / "out/s/parts"
    (parts / "damaged.json").write_text("[]")
    path = sorted(p for p in parts.iterdir() if p.name.startswith(what))[0]
    whole = path.read_bytes()
    for content in (b"[3]", b'[["a", 1, 2, "x"]]', whole[:-9] if what != "damaged" else b"["):
        path.write_bytes(content)
        with pytest.raises(BadInput):
            annotate()
    path.write_bytes(whole)
    if what == "gland-":
        pd.read_parquet(path).drop(columns="top").to_parquet(path)
        with pytest.raises(BadInput, match="not the parts of an annotation"):
            annotate()
        path.write_bytes(whole)
    assert (annotate() / "annotation.json").exists()
