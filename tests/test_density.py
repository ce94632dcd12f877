"""Density maps: per area of tissue, and in the overview where nuclei are specks."""

import cv2
import numpy as np
import pandas as pd
import pytest
import shapely
from matplotlib.figure import Figure

from histonb.annotate.exporting import density_maps, to_slide_coordinates, write_objects
from histonb.metrics.density import CELLS, DensityGrid, plot_maps, scale_bar

SIDE = 144.0  # pixels of a square, of 0.5 um


def grid(rows=12, columns=10, share=1.0):
    return DensityGrid(np.full((rows, columns), share) * 0.072**2, SIDE, 0.5)


def centres(rows, columns):
    return (v.ravel() * SIDE + SIDE / 2 for v in np.meshgrid(np.arange(columns), np.arange(rows)))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_density_is_per_area_of_tissue_up_to_its_edge(share):
    g = grid(share=share)
    g.tissue_mm2[:, 5:] = 0
    for _ in range(7):
        g.add_points(*centres(12, 5))
    density = g.density()
    assert density[:, :5] == pytest.approx(7 / (share * 0.072**2))
    assert np.isnan(density[:, 8:]).all()


def test_a_single_point_is_spread_and_not_lost():
    g = grid()
    g.add_points([5.2 * SIDE, 1e9], [6.8 * SIDE, -5.0])  # what lies beyond the slide counts in its last square
    assert g.counts[6, 5] == g.counts[0, 9] == 1 and g.counts.sum() == 2
    density = g.density()
    assert density.argmax() == 9 and density[6, 5] == density[3:10, 2:8].max()


def test_share_of_polygons_that_overlap_or_lie_on_glass():
    g = grid()
    box = shapely.box(2 * SIDE, 3 * SIDE, 8 * SIDE, 9 * SIDE)
    g.add_areas([box, box])
    assert g.filled.sum() / CELLS**2 == pytest.approx(36, abs=1)
    share = g.share()
    assert share[6, 5] == pytest.approx(1, abs=0.01) and share[0, 0] < 0.05 and np.nanmax(share) <= 1
    g.tissue_mm2[:] = 0  # a wide lumen is glass to a tissue detector
    assert g.share()[6, 5] == pytest.approx(1, abs=0.01) and np.isnan(g.share()[0, 0])


@pytest.mark.parametrize("um, width, text", [(10, 400, "500 µm"), (0.5, 1000, "100 µm"), (30, 800, "2 mm")])
def test_the_scale_bar_has_a_round_length(um, width, text):
    ax = Figure().subplots()
    scale_bar(ax, (300, width), um)
    start, end = ax.lines[0].get_xdata()
    assert ax.texts[0].get_text() == text
    length = float(text.split()[0]) * (1000 if "mm" in text else 1)
    assert (end - start) * um == pytest.approx(length)


def objects():
    "A gland and 300 nuclei, in pixels of level 0."
    rng = np.random.default_rng(0)
    boxes = [shapely.box(x, y, x + 12, y + 12) for x, y in rng.uniform(300, 900, (300, 2))]

    def table(outlines):
        b = shapely.bounds(outlines)
        sides = dict(zip(("left", "top", "right", "bottom"), b.T, strict=True))
        middle = {"x": b[:, [0, 2]].mean(1), "y": b[:, [1, 3]].mean(1)}
        rest = {"n": 144, "type": 0, "probability": np.nan, "outline": shapely.to_wkb(outlines)}
        return pd.DataFrame({**middle, **sides, **rest})

    gland = to_slide_coordinates(table([shapely.box(200, 200, 1000, 1000)]), "gland")
    return [gland, to_slide_coordinates(table(boxes), "nucleus")]


def test_the_overview_shows_maps_where_nuclei_are_specks(tmp_path):
    small = np.full((108, 90, 3), 200, np.uint8)
    seen = {}
    for name, scale in (("near", 2.0), ("far", 16.0)):
        g = grid()
        write_objects(tmp_path / name, objects(), small, scale, g)
        seen[name] = cv2.imread(str(tmp_path / name / "overview.png"))
        assert bool(density_maps(g)) == (name == "far")
    assert seen["near"].shape == small.shape
    assert seen["far"].shape[1] > 2 * seen["far"].shape[0] and (small == 200).all()
    again = write_objects(tmp_path / "again", objects(), small, 16.0, grid())
    assert again == {"Gland": 1, "Nucleus": 300}
    files = [(tmp_path / name / "overview.png").read_bytes() for name in ("far", "again")]
    assert files[0] == files[1]


def test_panels_follow_what_there_is():
    image = np.full((60, 90, 3), 200, np.uint8)
    g = grid(6, 9)
    assert density_maps(g) == {}
    g.add_points([100.0], [100.0])
    maps = density_maps(g)
    assert [*maps] == ["nuclei per mm² of tissue"]
    fig = plot_maps(image, 7.2, maps, 72, image)
    assert [ax.get_ylabel() for ax in fig.axes if ax.get_ylabel()] == ["nuclei per mm² of tissue"]
    assert fig.get_size_inches()[0] < fig.get_size_inches()[1] * 1.6, "a wide slide has its panels below each other"
    assert len(plot_maps(image, 7.2, {}, 72, image).axes) == 1
