"The recipes without training: what they find on the phantom, on real pictures, and on pictures with nothing in them."
from pathlib import Path

import numpy as np
import pytest

from histonb.core import BadInput
from histonb.data.fields import at_mpp, folders, glas
from histonb.data.phantom import draw_field
from histonb.evaluate.objects import FIGURES, object_figures, pair_counts
from histonb.multitask.baseline import BASELINES, stain_glands, stain_nuclei

REAL = Path(__file__).parents[2]/"shared/data"


def figures(maps, drawn, groups): return {k: r["value"] for k, r in object_figures([pair_counts(*m) for m in zip(maps, drawn, strict=True)], groups).items() if k in FIGURES}


def measure(fields, task):
    "Figures on a data set, at 0.5 um/px."
    some = [at_mpp(fields[i], .5) for i in range(len(fields))]
    return object_figures([pair_counts(f.truth[task], BASELINES[task](f.image)) for f in some], fields.table["case"])


def test_phantom():
    fields = [draw_field((21, i), 3, 512) for i in range(3)]
    nuclei = figures([f.nuclei for f in fields], [stain_nuclei(f.image, .48) for f in fields], range(3))
    glands = figures([f.glands for f in fields], [stain_glands(f.image, .48) for f in fields], range(3))
    assert nuclei["pq"] > .6 and nuclei["dice"] > .9
    assert glands["object_dice"] > .6 and glands["glas_f1"] > .5


@pytest.mark.parametrize("task", BASELINES)
def test_pictures_with_nothing_in_them(task):
    rng = np.random.default_rng(0)
    blank = np.uint8(rng.normal(242, 1.5, (200, 300, 3)).clip(0, 255))
    for image in (blank, blank[:1, :1], blank[:3, :50], 0*blank, np.full((20, 20, 3), 255, np.uint8)):
        found = BASELINES[task](image)
        assert found.shape == image.shape[:2] and found.dtype == np.int32 and found.max() == 0


@pytest.mark.parametrize("task", BASELINES)
def test_what_is_no_picture_is_refused(task):
    with pytest.raises(BadInput, match="RGB"): BASELINES[task](np.zeros((20, 20)))
    with pytest.raises(BadInput, match="um/px"): BASELINES[task](np.zeros((20, 20, 3), np.uint8), mpp=0)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL/"GlaS").exists(), reason="no ../shared/data/GlaS")
def test_glas_is_as_the_notebook_tells():
    r = measure(glas(REAL/"GlaS"), "gland")
    assert r["n"] == 21 and [r[k]["value"] for k in ("object_dice", "glas_f1", "dice")] == pytest.approx([.660, .700, .670], abs=.01)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL/"consep_patches").exists(), reason="no ../shared/data/consep_patches")
def test_consep_is_as_the_notebook_tells():
    r = measure(folders(REAL/"consep_patches", "nucleus"), "nucleus")
    assert r["n"] == 432 and [r[k]["value"] for k in ("pq", "aji", "dice")] == pytest.approx([.255, .293, .680], abs=.01)
