"""Frame times of the slide viewer with 100,000 nuclei and 2,000 glands, in Chromium without a GPU."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from browser import CHROMIUM, Browser

from histonb.annotate.viewer_layers import MapLayer
from histonb.annotate.viewing import new_viewer
from histonb.slides.slides import open_slide
from histonb.synthetic.phantom import draw_field
from histonb.synthetic.writing import write_slide

SIDE = 11_264  # pixels of 0.5 um: 32 square millimetres
SCALES = (11, 4, 1.9, 0.85, 0.75, 0.25)  # um per pixel of the screen
PAN = """(async () => {
    const {viewer, slide} = histonb.state, v = viewer.viewport, P = OpenSeadragon.Point;
    const um = UM, step = um / slide.mpp / slide.width, times = [];
    v.zoomTo(slide.mpp * slide.width / (um * v.getContainerSize().x), null, true);
    v.panTo(new P(0.3, 0.3), true);
    await new Promise(r => setTimeout(r, 2000));
    for (let i = 0; i < 90; i++) {
        v.panBy(new P((i % 30 < 15 ? 12 : -12) * step, (i % 20 < 10 ? 3 : -3) * step), true);
        times.push(await new Promise(requestAnimationFrame));
    }
    return times.slice(1).map((t, i) => t - times[i]);
})()"""


def ellipses(rng, n, radius, points):
    "Outlines of n objects all over the slide."
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radii = radius * rng.lognormal(0, 0.25, (n, 2)) * (1 + 0.1 * rng.normal(size=(points, n, 1)))
    places = radii * np.stack([np.cos(angle), np.sin(angle)], -1)[:, None]
    return shapely.polygons((places + rng.uniform(0, SIDE, (n, 2))).swapaxes(0, 1))


def write_page(folder):
    "A viewer of a slide with many objects."
    rng = np.random.default_rng(0)
    write_slide(folder / "a.tiff", np.tile(draw_field(0, size=1024).image, (11, 11, 1)), mpp=0.5)
    tables = []
    for task, n, radius, points in (("gland", 2000, 80, 120), ("nucleus", 100_000, 7, 16)):
        outlines = ellipses(rng, n, radius, points)
        tables.append(
            pd.DataFrame({"task": task, "type": "", "outline": outlines, "area_um2": shapely.area(outlines) / 4})
        )
    centres = shapely.get_coordinates(shapely.centroid(tables[1]["outline"].to_numpy()))
    density = np.histogram2d(*centres.T[::-1], bins=78)[0]
    with new_viewer(folder / "page") as viewer, open_slide(folder / "a.tiff") as slide:
        maps = [MapLayer("nuclei per square", density, SIDE / 78, on=True, for_specks=True)]
        print(viewer.add(slide, "a", pd.concat(tables, ignore_index=True), maps))
    return folder / "page/index.html"


def main():
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        browser.open(write_page(Path(folder)))
        browser.wait("histonb.state.viewer && histonb.state.viewer.world.getItemCount()")
        for um in SCALES:
            for on in ("true", "false"):
                browser.run(f"[...histonb.state.slide.classes, ...histonb.state.slide.maps].forEach(l => l.on = {on})")
                times = browser.run(PAN.replace("UM", str(um)))
                said = "with objects" if on == "true" else "slide alone "
                print(
                    f"{um:5} um/px, {said}: {np.median(times):.0f} ms a frame, 95% below {np.percentile(times, 95):.0f}"
                )


if __name__ == "__main__":
    main() if CHROMIUM else print("no Chromium here")
