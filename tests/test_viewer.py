"""The slide viewer: pages that open from the file system, faults that are said, and how Chromium sees them."""

import json
import re
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import shapely
from browser import CHROMIUM, Browser
from typer.testing import CliRunner

from histonb import cli
from histonb.annotate.slide import annotate_slide
from histonb.annotate.tile_pyramid import TilePyramid, write_pyramid
from histonb.annotate.viewer_layers import HALF, MapLayer, object_layers, outline_steps
from histonb.annotate.viewing import add_annotation, folder_bytes, new_viewer, view_annotation
from histonb.core.errors import BadInput
from histonb.slides.slides import open_slide
from histonb.synthetic.phantom import draw_slide
from histonb.synthetic.writing import write_slide


def values_of(path):
    "What a script hands to the page."
    return json.loads("[" + path.read_text().partition("(")[2].rpartition(")")[0] + "]")


def view(*arguments):
    return CliRunner().invoke(cli.app, ["view", *map(str, arguments)])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Two annotated slides."
    home = tmp_path_factory.mktemp("viewer")
    for seed, name in enumerate(("a", "b c#é")):
        write_slide(home / f"slides/{name}.tiff", draw_slide(seed, (900, 800), cover=(0.5, 0.6)).image, mpp=0.48)
        annotate_slide(home / f"slides/{name}.tiff", "stain", home / "annotated")
    return home


@pytest.fixture(scope="module")
def page(home):
    done = view(home / "annotated", "--out", home / "page")
    assert done.exit_code == 0, done.output
    return home / "page/index.html"


# tiles


def test_every_level_is_the_slide_and_odd_sizes_lose_no_pixel(tmp_path):
    rng = np.random.default_rng(0)
    grey = cv2.resize(rng.integers(0, 255, (34, 28), np.uint8), (1337, 1601), interpolation=cv2.INTER_CUBIC)
    image = np.repeat(grey[..., None], 3, 2)
    write_slide(tmp_path / "a.tiff", image, mpp=0.5)
    with open_slide(tmp_path / "a.tiff") as slide:
        whole = slide.level(0)
        pyramid = TilePyramid(slide, slide.mpp, 95)
        pyramid.write(tmp_path / "tiles")
    for level in range(pyramid.n_levels):
        rows, columns = pyramid.grid(level)
        read = [[cv2.imread(str(tmp_path / f"tiles/{level}/{r}_{c}.jpg")) for c in range(columns)] for r in range(rows)]
        picture = np.vstack([np.hstack(row) for row in read])[..., ::-1]
        factor = 2 ** (pyramid.n_levels - 1 - level)
        assert picture.shape[:2] == tuple(-(-n // factor) for n in whole.shape[:2])
        below, right = (-n % factor for n in whole.shape[:2])
        padded = cv2.copyMakeBorder(whole, 0, below, 0, right, cv2.BORDER_REPLICATE)
        small = cv2.resize(padded, picture.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(picture.astype(int) - small).mean() < 4
    assert len(list((tmp_path / "tiles").glob("*/*"))) == sum(np.prod(pyramid.grid(i)) for i in range(pyramid.n_levels))


def test_an_estimate_that_was_too_low_is_mended(home, tmp_path, monkeypatch):
    from histonb.annotate import tile_pyramid

    with open_slide(home / "slides/a.tiff") as slide:
        monkeypatch.setattr(tile_pyramid, "estimate_bytes", lambda *_: {85: 0, 75: 0, 60: 0})
        pyramid = write_pyramid(slide, tmp_path / "tiles", 50_000)
    assert pyramid.bytes == folder_bytes(tmp_path / "tiles") <= 50_000


@pytest.mark.parametrize("megabytes", [1.6, 2.5])
def test_a_viewer_keeps_to_its_bytes(megabytes, home, tmp_path):
    done = view(home / "annotated", "--out", tmp_path / "v", "--megabytes", megabytes)
    assert done.exit_code == 0, done.output
    assert 0.5e6 < folder_bytes(tmp_path / "v") <= megabytes * 1e6


# objects


def test_outlines_come_back_as_they_were():
    rng = np.random.default_rng(0)
    outlines = [shapely.Point(*xy).buffer(r) for *xy, r in rng.uniform(5, 900, (20, 3))]
    outlines += [shapely.MultiPolygon([shapely.box(0, 0, 9, 9), shapely.box(20, 0, 29, 9)])]
    for outline, rings in zip(outlines, outline_steps(np.array(outlines, object))):
        places = [np.cumsum(np.reshape(ring, (-1, 2)), axis=0) * HALF for ring in rings]
        back = shapely.multipolygons([shapely.Polygon(ring) for ring in places])
        assert shapely.hausdorff_distance(outline, back) <= HALF


def test_every_object_is_in_one_square_with_its_measurements(home):
    folder = home / "annotated/a"
    table = pd.read_parquet(folder / "objects.parquet")
    table["outline"] = shapely.from_wkb(table.pop("geometry"))
    layers = object_layers(table, 0.48)
    areas = []
    for cell in layers.cells:
        name, objects = json.loads("[" + layers.scripts[cell["name"]].partition("(")[2].rpartition(")")[0] + "]")
        assert name == cell["name"] and {*objects["classes"]} == {*cell["classes"]}
        areas += objects["rows"]["Area µm²"]
        for rings in objects["outlines"]:
            x, y = (np.cumsum(rings[0][i::2]) * HALF for i in (0, 1))
            assert cell["left"] - 1 <= x.min() and x.max() <= cell["right"] + 1
            assert cell["top"] - 1 <= y.min() and y.max() <= cell["bottom"] + 1
    assert sorted(areas) == sorted(table["area_um2"].round(2)) and len(areas) > 100
    assert sum(c["count"] for c in layers.classes) == len(table)


# faults


def test_what_cannot_be_shown_is_said(home, tmp_path):
    annotation = tmp_path / "annotated/a"
    shutil.copytree(home / "annotated/a", annotation)

    def fault(**options):
        with pytest.raises(BadInput) as caught:
            view_annotation(annotation, tmp_path / "v", **options)
        assert not (tmp_path / "v").exists() and not list(tmp_path.glob(".v*"))
        return str(caught.value)

    assert "a.tiff is not where it was. Say where it is with --slides" in fault()
    assert "not the slide that a was annotated on" in fault(slides=home / "slides/b c#é.tiff")
    whole = (annotation / "objects.geojson").read_text()
    other = tmp_path / "other.geojson"
    other.write_text(whole[: len(whole) // 2])
    assert "other.geojson: not valid JSON" in fault(slides=home / "slides", objects=other)
    other.write_text(re.sub(r"\[(\d+\.\d+), ", r"[90\1, ", whole))
    assert "objects lie outside the 800x900 pixels" in fault(slides=home / "slides", objects=other)
    for name in ("objects.geojson", "objects.parquet"):
        content = (annotation / name).read_bytes()
        (annotation / name).write_bytes(content[:-100])
        assert f"{name}: not the file that annotation.json describes" in fault(slides=home / "slides")
        (annotation / name).write_bytes(content)
    assert "no finished annotation" in str(view(tmp_path).exception)


def test_a_folder_that_is_no_viewer_is_kept_and_a_failed_viewer_leaves_the_old_one(home, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="is no viewer"):
        view_annotation(home / "annotated/a", tmp_path / "v")
    assert (tmp_path / "v/mine.txt").read_text() == "mine"
    page = view_annotation(home / "annotated/a", tmp_path / "w")
    with pytest.raises(KeyboardInterrupt), new_viewer(tmp_path / "w") as viewer:
        add_annotation(viewer, home / "annotated/a")
        raise KeyboardInterrupt
    assert page.exists() and not list(tmp_path.glob(".w*"))


def test_a_slide_that_went_is_named_in_the_page_and_the_others_are_shown(home, tmp_path):
    shutil.copytree(home / "annotated", tmp_path / "annotated")
    done = view(tmp_path / "annotated", "--slides", home / "slides/a.tiff")
    assert done.exit_code == 2 and "not the slide that b c#é was annotated on" in done.output
    (slides,) = values_of(tmp_path / "annotated/viewer/slides.js")
    assert [s["name"] for s in slides] == ["a", "b c#é"] and "annotated on" in slides[1]["fault"]
    done = view(tmp_path / "annotated", "--slides", tmp_path)
    assert isinstance(done.exception, BadInput)


def test_annotate_makes_a_viewer_and_links_to_it(home, tmp_path):
    arguments = ["annotate", str(home / "slides/a.tiff"), "--weights", "stain", "--out", str(tmp_path), "--viewer"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    page = tmp_path / "a/viewer/index.html"
    assert page.exists() and "a/viewer/index.html" in (tmp_path / "summary.html").read_text()
    made = page.stat().st_mtime_ns
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0 and page.stat().st_mtime_ns == made
    annotate_slide(home / "slides/a.tiff", "stain", tmp_path, tasks=["nucleus"], overwrite=True)
    assert not page.exists(), "a viewer of objects that are gone"


def test_no_page_holds_more_than_pixels_of_the_scan(page):
    "No label, macro image or date: tiles hold no tags, the scripts no words of the scanner."
    for path in page.parent.rglob("*.jpg"):
        content = path.read_bytes()
        assert not re.search(rb"Exif|http|Date", content[:600])
    for path in page.parent.rglob("slides/**/*.js"):
        assert not re.search("Aperio|ImageDescription|DateTime|label|macro", path.read_text())
    assert "THIS SOFTWARE IS PROVIDED" in (page.parent / "openseadragon-LICENSE.txt").read_text()


# the browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
READY = "histonb.state.viewer && histonb.state.viewer.world.getItemCount()"
INK = """(() => {
    const c = histonb.state.canvas;
    return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v).length;
})()"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def look(browser, um):
    "Show the middle of the slide at so many um per pixel, when all squares in view are there."
    browser.run(
        "(() => { const {viewer, slide} = histonb.state, v = viewer.viewport; v.goHome(true);"
        f" v.zoomTo(slide.mpp * slide.width / ({um} * v.getContainerSize().x), null, true); }})()"
    )
    browser.wait("(histonb.state.frames.length = 0, true)")
    browser.run("new Promise(r => setTimeout(r, 300))")
    browser.wait("histonb.state.slide.cells.every(c => c.state !== 'loading')")
    browser.run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r(0))))")


@pytest.mark.browser
@needs_chromium
def test_a_page_from_disk_pans_zooms_and_switches(page, browser):
    browser.open(page)
    browser.wait(READY)
    look(browser, 0.6)
    ink = browser.run(INK)
    assert ink > 1000, "outlines are drawn"
    for switch in range(browser.run("document.querySelectorAll('#layers input').length")):
        browser.run(f"document.querySelectorAll('#layers input')[{switch}].click()")
    browser.run("new Promise(r => setTimeout(r, 100))")
    assert browser.run("histonb.state.slide.classes.some(c => c.on)") is False
    for switch in range(2):
        browser.run(f"document.querySelectorAll('#layers input')[{switch}].click()")
    centre = "histonb.state.viewer.viewport.getCenter()"
    before = browser.run(f"{centre}.x")
    browser.mouse("mousePressed", 500, 400, button="left", clickCount=1)
    for x in range(500, 390, -10):
        browser.mouse("mouseMoved", x, 400, button="left", buttons=1)
    browser.mouse("mouseReleased", 390, 400, button="left", clickCount=1)
    assert browser.run(f"{centre}.x") > before, "dragged to the left"
    zoom = browser.run("histonb.state.viewer.viewport.getZoom()")
    browser.run("document.getElementById('zoom-in').click()")
    assert browser.run("histonb.state.viewer.viewport.getZoom()") == pytest.approx(2 * zoom)
    look(browser, 4)
    assert "µm" in browser.run("document.getElementById('scale-text').textContent") or "mm" in browser.run(
        "document.getElementById('scale-text').textContent"
    )
    assert not browser.faults()
    assert all(address.startswith(("file:", "data:", "blob:")) for address in browser.requests())


@pytest.mark.browser
@needs_chromium
def test_the_scale_bar_is_right_and_a_click_shows_the_object(page, browser):
    browser.open(page)
    browser.wait(READY)
    look(browser, 0.5)
    text, width = browser.run(
        "[document.getElementById('scale-text').textContent, document.getElementById('scale-bar').clientWidth]"
    )
    assert float(text.split()[0]) == pytest.approx(0.5 * width, rel=0.03), "um of a bar of pixels of 0.5 um"
    place = browser.run(
        """(() => {
        const {viewer, slide, canvas} = histonb.state, v = viewer.viewport, size = v.getContainerSize();
        const scale = v.getZoom(true) * size.x / slide.width, o = v.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
        const box = canvas.getBoundingClientRect();
        for (const cell of slide.cells) {
            if (cell.task !== 'nucleus' || cell.state !== 'loaded') continue;
            for (const [k, b] of cell.objects.boxes.entries()) {
                const x = o.x + scale * (b.left + b.right) / 2, y = o.y + scale * (b.top + b.bottom) / 2;
                if (x > 350 && x < 800 && y > 100 && y < 600 && cell.objects.rows['Circularity'][k] > 0.8)
                    return [box.x + x, box.y + y, cell.objects.rows['Area µm²'][k]];
            }
        }
        })()"""
    )
    browser.click(*place[:2])
    browser.wait("!document.getElementById('card').hidden")
    shown = browser.run("document.getElementById('card').innerText")
    assert "Nucleus" in shown and re.search(rf"Area µm²\s+{place[2]:g}\b", shown)


@pytest.mark.browser
@needs_chromium
def test_a_narrow_page_fits_and_another_slide_is_chosen(page, browser):
    browser.resize(420, 800, touch=True)
    browser.open(page, "#b%20c%23%C3%A9")
    browser.run("location.reload()")
    browser.wait("typeof histonb !== 'undefined' && " + READY)
    assert browser.run("document.title") == "b c#é"
    assert browser.run("document.documentElement.scrollWidth") == 420
    assert browser.run("document.getElementById('panel').open") is False
    browser.resize(1280, 800)


@pytest.mark.browser
@needs_chromium
def test_a_page_that_lost_its_files_says_so(page, browser, tmp_path):
    shutil.copytree(page.parent, tmp_path / "page")
    says = "document.getElementById('fault').textContent"
    shutil.rmtree(tmp_path / "page/slides/a/tiles")
    browser.open(tmp_path / "page/index.html")
    browser.wait(f"{says}.includes('copy the whole folder again')")
    (tmp_path / "page/slides/a/slide.js").unlink()
    browser.open(tmp_path / "page/index.html")
    browser.wait(f"{says}.includes('slide.js is missing')")
    (tmp_path / "page/slides.js").unlink()
    browser.open(tmp_path / "page/index.html")
    browser.wait(f"{says}.includes('slides.js is missing')")


@pytest.mark.browser
@needs_chromium
def test_many_objects_are_drawn_piece_by_piece(browser, tmp_path):
    "At any scale only some of them are on the canvas: what a frame costs does not grow with the slide."
    write_slide(tmp_path / "a.tiff", np.full((1024, 1024, 3), 230, np.uint8), mpp=2.0)  # 4 square millimetres
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, 1024, (20_000, 2))
    octagon = np.stack([f(np.arange(8) * np.pi / 4) for f in (np.cos, np.sin)], -1) * 2
    outlines = shapely.polygons(centres[:, None] + octagon)
    table = pd.DataFrame({"task": "nucleus", "type": "", "outline": outlines, "area_um2": 45.0})
    density = np.histogram2d(*centres.T, bins=16)[0]
    with new_viewer(tmp_path / "v") as viewer, open_slide(tmp_path / "a.tiff") as slide:
        viewer.add(slide, "a", table, [MapLayer("nuclei", density, 64, on=True, for_specks=True)])
    browser.open(tmp_path / "v/index.html")
    browser.wait(READY)
    loaded = "histonb.state.slide.cells.filter(c => c.state === 'loaded').length"
    assert browser.run(loaded) == 0, "a density map when zoomed out"
    look(browser, 0.5)
    assert 0 < browser.run(loaded) < 0.5 * browser.run("histonb.state.slide.cells.length")
    assert not browser.faults()
