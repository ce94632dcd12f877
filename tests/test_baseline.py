"The recipes without training: what they find on the phantom, on real pictures, and on pictures with nothing in them."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from histonb.core.errors import BadInput
from histonb.datasets.folders import folders
from histonb.datasets.glands import glas
from histonb.datasets.regions import resample
from histonb.metrics.objects import OBJECT_METRICS, object_metrics, pair_counts
from histonb.segment.baselines import (
    CLASSICAL,
    STAIN_RECIPES,
    is_tuning_case,
    stain_glands,
    stain_nuclei,
    threshold_glands,
)
from histonb.synthetic.phantom import draw_field

REAL = Path(__file__).parents[2] / "shared/data"


def figures(maps, drawn, groups):
    return {
        k: r["value"]
        for k, r in object_metrics([pair_counts(*m) for m in zip(maps, drawn, strict=True)], groups).items()
        if k in OBJECT_METRICS
    }


RECIPES = {f"{who}, {task}": recipe for who, recipes in CLASSICAL.items() for task, recipe in recipes.items()}


def measure(fields, task, recipe):
    "Figures on a data set, at 0.5 um/px."
    some = [resample(fields[i], 0.5) for i in range(len(fields))]
    return object_metrics([pair_counts(f.labels[task], recipe(f.image)) for f in some], fields.table["case"])


def test_phantom():
    fields = [draw_field((21, i), 3, 512) for i in range(3)]
    nuclei = figures([f.nuclei for f in fields], [stain_nuclei(f.image, 0.48) for f in fields], range(3))
    glands = figures([f.glands for f in fields], [stain_glands(f.image, 0.48) for f in fields], range(3))
    assert nuclei["pq"] > 0.6 and nuclei["dice"] > 0.9
    assert glands["object_dice"] > 0.6 and glands["glas_f1"] > 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_pictures_with_nothing_in_them(name):
    rng = np.random.default_rng(0)
    blank = np.uint8(rng.normal(242, 1.5, (200, 300, 3)).clip(0, 255))
    for image in (blank, blank[:1, :1], blank[:3, :50], 0 * blank, np.full((20, 20, 3), 255, np.uint8)):
        found = RECIPES[name](image)
        assert found.shape == image.shape[:2] and found.dtype == np.int32 and found.max() == 0


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_no_picture_is_refused(name):
    with pytest.raises(BadInput, match="RGB"):
        RECIPES[name](np.zeros((20, 20)))
    with pytest.raises(BadInput, match="um/px"):
        RECIPES[name](np.zeros((20, 20, 3), np.uint8), mpp=0)


def test_dark_rings_are_glands_with_what_they_enclose_and_a_waist_divides_them():
    image = np.full((800, 1200, 3), 240, np.uint8)
    y, x = np.mgrid[:800, :1200]
    for middle in (400, 720):
        far = np.hypot(y - 400, x - middle)
        image[(far < 200) & (far > 130)] = (90, 60, 140)
    found = threshold_glands(image)
    assert (
        found.max() == 2
        and found[400, 400]
        and found[400, 720]
        and found[400, 400] != found[400, 720]
        and not found[60, 60]
    )
    assert {*STAIN_RECIPES.values()} < {*RECIPES.values()}


def test_cases_that_set_numbers_are_known():
    scores = pd.DataFrame(
        [
            ("GlaS", "patient 13"),
            ("GlaS", "patient 1"),
            ("consep_patches", "train_27"),
            ("consep_patches", "train_2"),
            ("CRAG", "patient 13"),
        ],
        columns=["set", "case"],
    )
    assert is_tuning_case(scores).tolist() == [True, False, True, False, False]


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "GlaS").exists(), reason="no ../shared/data/GlaS")
def test_glas_is_as_the_notebook_tells():
    fields = glas(REAL / "GlaS")
    for recipe, told in ((stain_glands, [0.660, 0.700, 0.670]), (threshold_glands, [0.383, 0.244, 0.587])):
        r = measure(fields, "gland", recipe)
        assert r["n"] == 21 and [r[k]["value"] for k in ("object_dice", "glas_f1", "dice")] == pytest.approx(
            told, abs=0.01
        )


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "consep_patches").exists(), reason="no ../shared/data/consep_patches")
def test_consep_is_as_the_notebook_tells():
    r = measure(folders(REAL / "consep_patches", "nucleus"), "nucleus", stain_nuclei)
    assert r["n"] == 432 and [r[k]["value"] for k in ("pq", "aji", "dice")] == pytest.approx(
        [0.255, 0.293, 0.680], abs=0.01
    )
