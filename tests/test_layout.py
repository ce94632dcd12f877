"""Which pages of a file are the slide, how much smaller levels are, how large a pixel is: layouts of many scanners."""

import struct

import cv2
import numpy as np
import pytest
import tifffile

from histonb.core.errors import BadInput
from histonb.slides.pyramid import padded_factor
from histonb.slides.slides import open_slide
from histonb.slides.tile_rules import TileRule, low_resolution_glass, tile_grid
from histonb.slides.tile_store import resize_tile, tile_span
from histonb.slides.tiles import tile_slide

SIZE = (960, 1280)


def tissue(shape=SIZE, seed=0):
    "Glass with a band of tissue of many shades."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    inside = np.abs(y - 0.35 - 0.1 * np.sin(7 * x + seed)) < 0.14
    coarse = cv2.resize(rng.normal(0, 1, (24, 32)).astype(np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 3, (*shape, 3))
    pixels = np.where(inside[..., None], np.array([180, 120, 160]) + 40 * coarse[..., None], 244) + grain
    return np.clip(pixels, 0, 255).astype(np.uint8)


def shrunk(pixels, d):
    return cv2.resize(pixels, (round(pixels.shape[1] / d), round(pixels.shape[0] / d)), interpolation=cv2.INTER_AREA)


def label(shape):
    "Writing on white."
    pixels = np.full((*shape, 3), 240, np.uint8)
    for i in range(1, 5):
        cv2.putText(
            pixels, "H17-204", (4, i * shape[0] // 5), cv2.FONT_HERSHEY_SIMPLEX, shape[1] / 160, (10, 10, 10), 3
        )
    return pixels


def write(path, pages, tile=(64, 64), compression="jpeg"):
    "A TIFF of (pixels, options) pages."
    with tifffile.TiffWriter(path) as out:
        for pixels, more in pages:
            more = {"tile": tile, "compression": compression, **more}
            if more["tile"] is None:
                more.pop("tile")
            more["description"] = more.get("description", "").encode() or None
            out.write(pixels, photometric="rgb", metadata=None, software=False, **more)
    return path


def shapes(path):
    with open_slide(path) as slide:
        return slide.shapes


SLIDE = tissue()
LEVELS = [(SLIDE, {}), (shrunk(SLIDE, 4), {"subfiletype": 1}), (shrunk(SLIDE, 16), {"subfiletype": 1})]
WANTED = [SIZE, (240, 320), (60, 80)]
MACRO = tissue((200, 600), 3)


def ome(*images):
    "OME's description: of each image its name, (height, width), and more attributes."

    def one(i, name, size, more):
        rest = "Type='uint8' SizeZ='1' SizeC='3' SizeT='1'"
        return (
            f"<Image ID='Image:{i}' Name='{name}'><Pixels SizeX='{size[1]}' SizeY='{size[0]}' {rest} {more}>"
            f"<TiffData IFD='{i}'/></Pixels></Image>"
        )

    head = '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    return head + "".join(one(i, *image) for i, image in enumerate(images)) + "</OME>"


def scn(*images, more=""):
    "Leica's description: of each image the size in nm and (height, width, page) of each level."

    def one(name, nm, levels):
        (h, w, _), dims = (
            levels[0],
            "".join(f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{i}"/>' for r, (h, w, i) in enumerate(levels)),
        )
        view = f'<view sizeX="{round(w * nm)}" sizeY="{round(h * nm)}" offsetX="0" offsetY="0"/>'
        return f'<image name="{name}"><pixels sizeX="{w}" sizeY="{h}">{dims}</pixels>{view}</image>'

    head = '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
    inside = "".join(one(*image) for image in images) + more
    return f'{head}<collection sizeX="10000000" sizeY="3000000">{inside}</collection></scn>'


def with_description(pages, text):
    return [(pages[0][0], {**pages[0][1], "description": text}), *pages[1:]]


APERIO = "Aperio Leica Biosystems GT450 v1.0.0\n"
LAYOUTS = {
    "slide first": LEVELS,
    "ascending": LEVELS[::-1],
    "any order": [LEVELS[1], LEVELS[0], LEVELS[2]],
    "macro first, unmarked": [(MACRO, {}), *LEVELS],
    "macro first, by OME's names": with_description(
        [(tissue((1200, 1600), 5), {}), LEVELS[0]], ome(("macro", (1200, 1600), ""), ("scan", SIZE, ""))
    ),
    "label last, by OME's names": with_description(
        [*LEVELS, (label((960, 1000)), {})],
        ome(("scan", SIZE, ""), ("", (240, 320), ""), ("", (60, 80), ""), ("slide.svs - label", (960, 1000), "")),
    ),
    "macro first, proportions of the slide, another resolution": with_description(
        [(tissue((240, 320), 5), {}), LEVELS[0]],
        ome(("a", (240, 320), 'PhysicalSizeX="16"'), ("b", SIZE, 'PhysicalSizeX="0.5"')),
    ),
    "Leica SCN": with_description(
        [(tissue((1000, 300), 5), {}), (tissue((250, 75), 5), {}), *LEVELS],
        scn(("macro", 16000, [(1000, 300, 0), (250, 75, 1)]), ("main", 500, [(*SIZE, 2), (240, 320, 3), (60, 80, 4)])),
    ),
    "Leica SCN, larger macro": with_description(
        [(tissue((1600, 1000), 5), {}), *LEVELS],
        scn(("macro", 16000, [(1600, 1000, 0)]), ("main", 500, [(*SIZE, 1), (240, 320, 2), (60, 80, 3)])),
    ),
    "Leica Versa's label": with_description(
        [*LEVELS, (label((1500, 1500)), {})],
        scn(("main", 500, [(*SIZE, 0), (240, 320, 1), (60, 80, 2)]), more='<supplementalImage type="label" ifd="3"/>'),
    ),
    "Ventana BIF": [
        (label((1500, 1200)), {"description": "Label_Image"}),
        (shrunk(SLIDE, 8), {"description": "Probability_Image"}),
        *[(p, {"description": f"level={i} mag={20 / 4**i:g} quality=90"}) for i, (p, _) in enumerate(LEVELS)],
    ],
    "Aperio": [
        LEVELS[0],
        (shrunk(SLIDE, 3), {"tile": None, "rowsperstrip": 16, "description": APERIO + "1280x960 -> 427x320 - "}),
        (LEVELS[1][0], {}),
        (LEVELS[2][0], {}),
        (label((300, 280)), {"tile": None, "subfiletype": 1, "description": APERIO + "label 280x300"}),
        (MACRO, {"tile": None, "subfiletype": 9, "description": APERIO + "macro 600x200"}),
    ],
    "GT450, which describes nothing": [
        LEVELS[0],
        (LEVELS[1][0], {}),
        (LEVELS[2][0], {}),
        (label((300, 280)), {"tile": None, "subfiletype": 1}),
        (tissue((900, 900), 2), {"subfiletype": 9}),
    ],
    "Hamamatsu's lenses": [
        (tissue((1500, 500), 5), {"extratags": [(65421, "f", 1, -1.0, True)]}),
        *LEVELS,
        (tissue((1200, 1200), 6), {"extratags": [(65421, "f", 1, -2.0, True)]}),
    ],
    "macro by its page's name": [(tissue((1500, 500), 5), {"extratags": [(285, "s", 6, "Macro", True)]}), *LEVELS],
    "tiled label of the slide's proportions, marked": [
        *LEVELS,
        (label((120, 160)), {"description": APERIO + "label 160x120"}),
    ],
    "tiled label of the slide's proportions": [*LEVELS, (label((120, 160)), {})],
    "tiled label, as small as the last level": [*LEVELS, (label((60, 80)), {"subfiletype": 1})],
    "tiled label between the levels": [LEVELS[0], (label((480, 640)), {"subfiletype": 1}), *LEVELS[1:]],
    "tiled label of one internal tile": [*LEVELS, (label((64, 64)), {})],
    "macro of the slide's proportions": [(tissue((320, 427), 5), {}), *LEVELS],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_slide_is_found_among_the_pages(tmp_path, name):
    path = tmp_path / "slide.tif"
    pages = LAYOUTS[name]
    write(path, pages)
    wanted = WANTED if {p.shape[:2] for p, _ in pages} >= {*WANTED} else [SIZE]
    with open_slide(path) as slide:
        assert slide.shapes == wanted
        for i, shape in enumerate(wanted):
            truth = next(p for p, _ in LEVELS if p.shape[:2] == shape)
            assert np.abs(slide.level(i).astype(int) - truth).mean() < 4


AMBIGUOUS = {
    "two slides": [LEVELS[0], (tissue(seed=1), {})],
    "nearly as large": [LEVELS[0], (tissue((900, 900), 1), {})],
    "macro of a small scan": [(tissue((400, 1600), 1), {}), LEVELS[0]],
    "a stack": [LEVELS[0]] * 4,
    "two scans of one resolution": with_description(
        [LEVELS[0], (tissue((200, 200), 1), {})],
        ome(("a", SIZE, 'PhysicalSizeX="0.25"'), ("b", (200, 200), 'PhysicalSizeX="0.25"')),
    ),
    "two areas of an SCN": with_description(
        [LEVELS[0], (tissue((240, 320), 1), {})], scn(("a", 250, [(*SIZE, 0)]), ("b", 250, [(240, 320, 1)]))
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_stays_ambiguous_is_refused_with_the_pages(tmp_path, name):
    path = write(tmp_path / "slide.tif", AMBIGUOUS[name])
    page = r"page \d \(\d+x\d+\)"
    with pytest.raises(BadInput, match=f"not clear which page is the slide: {page}, {page}") as caught:
        open_slide(path)
    assert "file of its own" in caught.value.remedy
    with pytest.raises(BadInput, match="not clear"):
        open_slide(path, mask=True)


def test_a_file_of_nothing_but_a_label_is_that(tmp_path):
    assert shapes(write(tmp_path / "label.tif", [(label((300, 400)), {"description": "Label"})])) == [(300, 400)]


def test_inner_pages_that_are_no_levels_are_left_out(tmp_path):
    with tifffile.TiffWriter(tmp_path / "slide.tif") as out:
        out.write(SLIDE, photometric="rgb", tile=(64, 64), subifds=3, metadata=None)
        for pixels in (shrunk(SLIDE, 4), MACRO, label((240, 320))):
            out.write(pixels, photometric="rgb", tile=(64, 64), subfiletype=1, metadata=None)
    assert shapes(tmp_path / "slide.tif") == [SIZE, (240, 320)]


# Levels -------------------------------------------------------------------------------------------------------------

CAMELYON = [
    [
        (86016, 89600),
        (43008, 45056),
        (21504, 22528),
        (10752, 11264),
        (5632, 5632),
        (3072, 3072),
        (1536, 1536),
        (1024, 1024),
        (512, 512),
    ],
    [
        (97792, 221184),
        (49152, 110592),
        (24576, 55296),
        (12288, 27648),
        (6144, 13824),
        (3072, 7168),
        (1536, 3584),
        (1024, 2048),
        (512, 1024),
        (512, 512),
    ],
    [
        (61440, 53760),
        (30720, 27136),
        (15360, 13824),
        (7680, 7168),
        (4096, 3584),
        (2048, 2048),
        (1024, 1024),
        (512, 512),
    ],
]


@pytest.mark.parametrize("sizes", CAMELYON)
def test_levels_that_were_padded_to_whole_tiles(sizes):
    found = [1]
    for size in sizes[1:]:
        found.append(padded_factor(sizes[0], size, (512, 512), tuple(found)) or sizes[0][0] / size[0])
    assert found == [2**i for i in range(len(sizes))]


@pytest.mark.parametrize(
    ("whole", "shape"),
    [
        ((8192, 4096), (2048, 1024)),
        ((700, 533), (175, 133)),
        ((100_000, 711), (3125, 22)),
        ((1000, 800), (448, 384)),
        ((1024, 1024), (1024, 1024)),
    ],
)
def test_levels_that_were_not_padded(whole, shape):
    assert padded_factor(whole, shape, (64, 64)) is None


def padded(pixels, d, tile=64):
    small = shrunk(pixels, d)
    return np.pad(small, [(0, -small.shape[0] % tile), (0, -small.shape[1] % tile), (0, 0)], constant_values=244)


def philips(spacings):
    "Philips' description; spacings in mm, rows first."

    def attribute(name, content):
        return f'<Attribute Name="{name}">{content}</Attribute>'

    def element(kind, content):
        return f'<DataObject ObjectType="{kind}">{content}</DataObject>'

    sizes = [attribute("DICOM_PIXEL_SPACING", f"&quot;{y}&quot; &quot;{x}&quot;") for y, x in spacings]
    levels = "".join(element("PixelDataRepresentation", size) for size in sizes)
    of_levels = attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", f"<Array>{levels}</Array>")
    images = [attribute("PIM_DP_IMAGE_TYPE", "LABELIMAGE"), attribute("PIM_DP_IMAGE_TYPE", "WSI") + of_levels]
    scanned = "".join(element("DPScannedImage", image) for image in images)
    images = attribute("PIM_DP_SCANNED_IMAGES", f"<Array>{scanned}</Array>")
    return '<?xml version="1.0"?>' + element("DPUfsImport", images)


def far_corner(shape=(1344, 1408)):
    "Glass whose far corner is tissue, and its mask."
    pixels = np.full((*shape, 3), 244, np.uint8)
    codes = np.zeros(shape, np.uint8)
    pixels[-500:-52, -500:-52] = np.minimum(tissue((448, 448)), 205)
    codes[-500:-52, -500:-52] = 1
    return pixels, codes


@pytest.mark.parametrize("described", [False, True])
def test_padded_levels_fit_the_slide_and_its_mask(tmp_path, described):
    pixels, codes = far_corner()
    factors = [1, 2, 4, 8, 16]
    pages = [(padded(pixels, d), {"subfiletype": int(d > 1), "compression": "zlib"}) for d in factors]
    assert [p.shape[:2] for p, _ in pages] == [(1344, 1408), (704, 704), (384, 384), (192, 192), (128, 128)]
    if described:
        pages = with_description(pages, philips([(0.00025 * d, 0.00025 * d) for d in factors]))
    write(tmp_path / "slide.tif", pages)
    tifffile.imwrite(tmp_path / "mask.tif", codes, tile=(64, 64), metadata=None)
    with open_slide(tmp_path / "slide.tif", None if described else 0.25) as slide:
        assert (
            slide.mpp == 0.25
            and slide.factors == [(d, d) for d in factors]
            and slide.shapes == [(-(-1344 // d), -(-1408 // d)) for d in factors]
        )
        for i, d in enumerate(factors):
            assert (
                np.abs(
                    slide.read(1344 - 496, 1408 - 560, 400 // d, 400 // d, i).astype(int)
                    - shrunk(pixels[848:1248, 848:1248], d)
                ).mean()
                < 3
            )
        for rule in (
            TileRule(size=64),
            TileRule(size=64, mpp=0.5),
            TileRule(size=64, level=2),
            TileRule(size=32, mpp=1.4),
        ):
            table, _ = tile_slide(slide, tmp_path / "mask.tif", {0: 0, 1: 1}, rule)
            side = rule.size * table.mpp[0] / 0.25
            covered = sum(codes[t.y : t.y + round(side), t.x : t.x + round(side)].sum() for t in table.itertuples())
            assert (
                covered > 0.99 * codes[: int(1344 // side * side), : int(1408 // side * side)].sum()
            )  # no tissue is rejected unread
            for t in table.itertuples():
                span = tile_span(slide, t.level, t.mpp, rule.size)
                picture = resize_tile(slide.read(t.x, t.y, span, span, t.level), rule.size)
                assert abs((cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) < 225).mean() - t.f1) < 0.12


def test_spacings_win_over_sizes(tmp_path):
    "The smallest levels of a padded pyramid could have many factors; where the file says which, it is that one."
    pixels = np.full((640, 640, 3), 244, np.uint8)
    factors = [1, 4, 16, 32]
    pixels[100:500, 50:400] = tissue((400, 350))
    pages = [(padded(pixels, d), {"subfiletype": int(d > 1)}) for d in factors]
    square, oblong = (philips([(0.0002 * d, x * d) for d in factors]) for x in (0.0002, 0.0003))
    with open_slide(write(tmp_path / "slide.tif", with_description(pages, square))) as slide:
        assert slide.downsamples == factors and slide.mpp == pytest.approx(0.2)
    write(tmp_path / "slide.tif", with_description(pages, oblong))
    with pytest.raises(BadInput, match="0.3 by 0.2"):
        open_slide(tmp_path / "slide.tif")
    with open_slide(tmp_path / "slide.tif", mpp=0.2) as slide:
        assert slide.downsamples == factors


@pytest.mark.parametrize("turned", [False, True])
def test_thin_pyramids_have_a_factor_along_each_axis(tmp_path, turned):
    "A long strip of glass, halved and rounded down as vips does it: the far end stays where it is."
    pixels = np.full((237, 30_000, 3), 244, np.uint8)
    codes = np.zeros((237, 30_000), np.uint8)
    for x in (300, 9000, 21_000, 29_000):
        pixels[:, x : x + 600] = np.minimum(tissue((600, 600)), 205)[180 : 180 + 237]
        codes[:, x : x + 600] = 1
    levels = [pixels]
    for _ in range(5):
        h = levels[-1].shape[0] // 2
        w = levels[-1].shape[1] // 2
        levels.append(cv2.resize(levels[-1][: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_AREA))
    if turned:
        levels = [np.ascontiguousarray(a.swapaxes(0, 1)) for a in levels]
        codes = np.ascontiguousarray(codes.T)
    write(tmp_path / "thin.tif", [(a, {"subfiletype": int(i > 0)}) for i, a in enumerate(levels)])
    with open_slide(tmp_path / "thin.tif", 0.5) as slide:
        assert slide.shapes == [a.shape[:2] for a in levels]
        for level, (fx, fy) in enumerate(slide.factors):
            long = fy if turned else fx
            at = (0, 28_000) if turned else (28_000, 0)
            size = (4, round(2000 / long)) if turned else (round(2000 / long), 4)
            profile = slide.read(*at, *size, level).mean((1, 2) if turned else (0, 2))
            assert abs(np.argmax(profile < 225) - 1000 / long) <= 1  # to a pixel of the level
        for rule in (TileRule(size=64), TileRule(size=64, mpp=0.7), TileRule(size=32, mpp=2.0)):
            g = tile_grid(slide, rule)
            inside = np.array([codes[y : y + g.extent, x : x + g.extent].mean() for x, y in g.xy])
            glass = low_resolution_glass(slide, g)
            assert not ((glass >= rule.background) & (inside > 0.25)).any()
            assert np.abs(1 - glass - inside).max() < 0.35  # a pixel of the level on either side


def test_ordinary_levels_keep_one_factor(tmp_path):
    "Sizes that are rounded to a pixel say nothing of the shape of pixels: 4.0005 is 4.0005 both ways."
    pixels = tissue((1003, 1327))
    cut = [pixels[: 1003 // d * d, : 1327 // d * d] for d in (1, 4, 16)]
    write(tmp_path / "slide.tif", [(shrunk(a, d), {}) for a, d in zip(cut, (1, 4, 16), strict=True)])
    with open_slide(tmp_path / "slide.tif") as slide:
        assert slide.downsamples == [1, (1003 / 250 + 1327 / 331) / 2, (1003 / 62 + 1327 / 82) / 2]
        assert slide.factors == [(d, d) for d in slide.downsamples]


# Micrometres per pixel -----------------------------------------------------------------------------------------------

CM, INCH, NONE, MM, UM = 3, 2, 1, 4, 5


def tags(x, y=None, unit=CM):
    "Resolution tags: a numerator and a denominator for each axis, and a unit; without one the tag is missing."
    return {282: x, 283: x if y is None else y} | ({296: (unit,)} if unit is not None else {})


def set_tags(path, values):
    "Write the three resolution tags of a little-endian TIFF anew; one without a value becomes a tag that nobody knows."
    data = bytearray(path.read_bytes())
    (at,) = struct.unpack("<I", data[4:8])
    (n,) = struct.unpack("<H", data[at : at + 2])
    for entry in range(at + 2, at + 2 + 12 * n, 12):
        (code,) = struct.unpack("<H", data[entry : entry + 2])
        value = values.get(code)
        if code not in (282, 283, 296):
            continue
        if value is None:
            data[entry : entry + 2] = struct.pack("<H", 65000 + code)
        elif code == 296:
            numbers = struct.pack(f"<{len(value)}H", *value)
            data[entry + 4 : entry + 12] = struct.pack("<I", len(value)) + numbers.ljust(4, b"\0")
        else:
            data[entry + 4 : entry + 12] = struct.pack("<II", 1, len(data))
            data += struct.pack("<II", *value)
    path.write_bytes(data)


def pixels_element(attributes, shape=(64, 64), name=""):
    return ome((name, shape, attributes))


VIPS = (
    '<?xml version="1.0"?><image><properties><property><name>openslide.mpp-x</name>'
    '<value type="VipsRefString">0.252</value></property></properties></image>'
)
MPP = {
    "pixels a centimetre": (tags((20000, 1)), "", 0.5),
    "inches are the default": (tags((50800, 1), unit=None), "", 0.5),
    "inches": (tags((2540, 1), unit=INCH), "", 10),
    "millimetres": (tags((2000, 1), unit=MM), "", 0.5),
    "micrometres": (tags((2, 1), unit=UM), "", 0.5),
    "no unit": (tags((2000, 1), unit=NONE), "", None),
    "72 dots an inch": (tags((72, 1), unit=INCH), "", None),
    "1 a centimetre": (tags((1, 1)), "", None),
    "0": (tags((0, 1)), "", None),
    "1/0": (tags((1, 0)), "", None),
    "as fractions": (tags((4294967295, 214748)), "", 0.5),
    "100x": (tags((204082, 1)), "", 0.049),
    "not square by 1%": (tags((20000, 1), (20200, 1)), "", 0.5),
    "not square": (tags((20000, 1), (40000, 1)), "", "0.5 by 0.25"),
    "not square by 3%": (tags((20000, 1), (20600, 1)), "", "not square"),
    "only along x": ({282: (20000, 1), 296: (CM,)}, "", 0.5),
    "Aperio": (tags((72, 1), unit=INCH), "Aperio Image Library|AppMag = 20|MPP = 0.4990", 0.499),
    "Aperio's comma": ({}, "Aperio|MPP = 0,2520|AppMag = 40", 0.252),
    "Aperio in scientific": ({}, "Aperio|MPP = 2.5e-1", 0.25),
    "Aperio without spaces": ({}, "Aperio|MPP=0.25", 0.25),
    "Aperio's 0": (tags((20000, 1)), "Aperio|MPP = 0", 0.5),
    "magnification only": ({}, "Aperio|AppMag = 40", None),
    "not an MPP": ({}, "Aperio|OldMPP = 3|MPP = 0.25", 0.25),
    "ImageJ": (tags((2, 1), unit=NONE), "ImageJ=1.53t\nunit=micron\nspacing=1.0\n", 0.5),
    "ImageJ's mu": (tags((2, 1), unit=NONE), "ImageJ=1.53t\nunit=\\u00B5m\n", 0.5),
    "ImageJ in centimetres": (tags((20000, 1)), "ImageJ=1.53t\nunit=cm\n", 0.5),
    "ImageJ in pixels": (tags((1, 1), unit=NONE), "ImageJ=1.53t\nunit=pixel\n", None),
    "ImageJ, not square": (tags((2, 1), (4, 1), unit=NONE), "ImageJ=1.53t\nunit=micron\n", "not square"),
    "OME": ({}, pixels_element('PhysicalSizeX="0.25" PhysicalSizeY="0.25"'), 0.25),
    "OME, one axis": ({}, pixels_element('PhysicalSizeX="0.25"'), 0.25),
    "OME, single quotes and spaces": ({}, pixels_element("PhysicalSizeX = '0.25'"), 0.25),
    "OME in scientific": ({}, pixels_element("PhysicalSizeX='2.5e-1'"), 0.25),
    "OME's comma": ({}, pixels_element("PhysicalSizeX='0,25'"), 0.25),
    "OME, an entity": ({}, pixels_element('PhysicalSizeX="0.25" PhysicalSizeXUnit="&#181;m"'), 0.25),
    "OME, the other mu": ({}, pixels_element('PhysicalSizeX="0.25" PhysicalSizeXUnit="&#956;m"'), 0.25),
    "OME in nm": ({}, pixels_element('PhysicalSizeX="250" PhysicalSizeXUnit="nm"'), 0.25),
    "OME in pm": ({}, pixels_element('PhysicalSizeX="250000" PhysicalSizeXUnit="pm"'), 0.25),
    "OME in mm": ({}, pixels_element('PhysicalSizeX="0.00025" PhysicalSizeXUnit="mm"'), 0.25),
    "OME in inches": ({}, pixels_element('PhysicalSizeX="0.00001" PhysicalSizeXUnit="in"'), 0.254),
    "OME in angstrom": ({}, pixels_element('PhysicalSizeX="2500" PhysicalSizeXUnit="&#197;"'), 0.25),
    "OME in two units": ({}, pixels_element('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.25"'), 0.25),
    "OME in pixels": ({}, pixels_element('PhysicalSizeX="1" PhysicalSizeXUnit="pixel"'), None),
    "OME in its own frame": ({}, pixels_element('PhysicalSizeX="1" PhysicalSizeXUnit="reference frame"'), None),
    "OME in pixels, tags know": (tags((20000, 1)), pixels_element('PhysicalSizeX="1" PhysicalSizeXUnit="pixel"'), 0.5),
    "OME's 0, tags know": (tags((20000, 1)), pixels_element('PhysicalSizeX="0" PhysicalSizeY="0"'), 0.5),
    "OME's 0 along y": ({}, pixels_element('PhysicalSizeX="0.25" PhysicalSizeY="0"'), 0.25),
    "OME, not square": ({}, pixels_element('PhysicalSizeX="0.25" PhysicalSizeY="0.5"'), "0.25 by 0.5"),
    "OME, negative": ({}, pixels_element('PhysicalSizeX="-1.61736E9"'), None),
    "OME, no number": ({}, pixels_element('PhysicalSizeX="nan"'), None),
    "OME, no number that can be read": ({}, pixels_element('PhysicalSizeX="1e.5"'), "does not say.*1e.5"),
    "OME cannot be read, tags know": (tags((20000, 1)), pixels_element('PhysicalSizeX="wide"'), 0.5),
    "OME, the macro's only": ({}, ome(("", (64, 64), ""), ("", (10, 10), 'PhysicalSizeX="16"')), None),
    "OME, the macro's first": (
        {},
        ome(("", (10, 10), 'PhysicalSizeX="16"'), ("", (64, 64), 'PhysicalSizeX="0.25"')),
        0.25,
    ),
    "OME of another picture": ({}, ome(("", (640, 640), 'PhysicalSizeX="0.25"')), None),
    "XML that is none": (tags((20000, 1)), "<OME is broken", 0.5),
    "vips": (tags((28, 1)), VIPS, 0.252),
    "Ventana": (tags((72, 1), unit=INCH), "level=0 mag=40 quality=90", 0.2325),
    "Philips": ({}, philips([(0.000227273, 0.000227273)]), 0.227273),
    "Philips, not square": ({}, philips([(0.0003, 0.0002)]), "0.2 by 0.3"),
    "Leica": (tags((72, 1), unit=INCH), scn(("main", 250, [(64, 64, 0)])), 0.25),
    "two units of resolution": ({**tags((20000, 1)), 296: (3, 0)}, "", "does not say.*ResolutionUnit"),
}


@pytest.mark.parametrize("name", MPP)
def test_micrometres_per_pixel(tmp_path, name):
    extra, text, wanted = MPP[name]
    path = tmp_path / "slide.tif"
    xmp = b"<iScan Magnification='40' ScanRes = '0.2325'/>"
    more = [(700, 1, len(xmp), xmp, True)] if name == "Ventana" else ()
    tifffile.imwrite(
        path,
        tissue((64, 64)),
        photometric="rgb",
        tile=(64, 64),
        metadata=None,
        software=False,
        extratags=more,
        description=text.encode() or None,
    )
    set_tags(path, extra)
    if isinstance(wanted, str):
        with pytest.raises(BadInput, match=wanted) as caught:
            open_slide(path)
        assert "--slide-mpp 0.5" in caught.value.remedy and "mpp=0.5" in caught.value.remedy
        with open_slide(path, mask=True) as mask, pytest.raises(BadInput, match=wanted):
            mask.mpp
    elif wanted is None:
        with open_slide(path) as slide, pytest.raises(BadInput, match="does not say how many microns.*--slide-mpp 0.5"):
            slide.mpp
    else:
        with open_slide(path) as slide:
            assert slide.mpp == pytest.approx(wanted, rel=1e-3)
    with open_slide(path, mpp=0.3) as slide:
        assert slide.mpp == 0.3
