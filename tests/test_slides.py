"""Slides: every TIFF layout against tifffile's decoding, scale, sharing between threads and processes, bad files."""

import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from histonb.core.errors import BadInput
from histonb.slides.slides import open_slide

REAL = Path(__file__).parents[2] / "shared/data"
SHAPE = (700, 533)


def image(shape=SHAPE, seed=0):
    "Smooth colours and grain, no two internal tiles alike."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = np.stack([128 + 90 * np.sin(x / 37 + y / (50 + 20 * c) + c) for c in range(3)], -1)
    return np.clip(waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)


def split_tables(data):
    "A JPEG stream apart: its tables as a stream of their own, and the rest."
    at, tables, rest = 2, b"", b""
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] in (0xDB, 0xC4):
            tables += data[at:end]
        else:
            rest += data[at:end]
        at = end
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest + data[at:]


def write_shared(path, pixels, color="YCBCR", subsampling="420", tile=128, **more):
    "A JPEG TIFF whose internal tiles share their tables."

    def encoded():
        for y in range(0, pixels.shape[0], tile):
            for x in range(0, pixels.shape[1], tile):
                cut = pixels[y : y + tile, x : x + tile]
                pad = np.pad(cut, ((0, tile - cut.shape[0]), (0, tile - cut.shape[1]), (0, 0)), "edge")
                yield imagecodecs.jpeg8_encode(
                    pad, level=80, colorspace="RGB", outcolorspace=color, subsampling=subsampling
                )

    streams = [split_tables(data) for data in encoded()]
    tifffile.imwrite(
        path,
        iter([rest for _, rest in streams]),
        shape=pixels.shape,
        dtype=np.uint8,
        tile=(tile, tile),
        compression="jpeg",
        photometric="rgb",
        compressionargs={"outcolorspace": color},
        subsampling=tuple(int(4 / int(v)) if int(v) else 2 for v in (subsampling[1], subsampling[2]))
        if color == "YCBCR"
        else None,
        jpegtables=streams[0][0],
        metadata=None,
        **more,
    )


def jpeg(subsampling=None):
    "JPEG options: a chroma subsampling, or none for plain RGB."
    return {
        "compression": "jpeg",
        "subsampling": subsampling,
        "compressionargs": {} if subsampling else {"outcolorspace": "RGB"},
    }


FORMATS = {
    "uncompressed tiles": {"tile": (128, 160)},
    "uncompressed strips": {"rowsperstrip": 50},
    "one strip": {"rowsperstrip": 700},
    "big-endian": {"tile": (128, 128), "byteorder": ">"},
    "BigTIFF": {"tile": (128, 128), "bigtiff": True, "compression": "lzw"},
    "LZW tiles": {"tile": (256, 256), "compression": "lzw"},
    "LZW differences": {"tile": (128, 128), "compression": "lzw", "predictor": 2},
    "LZW strips": {"rowsperstrip": 33, "compression": "lzw"},
    "deflate tiles": {"tile": (128, 128), "compression": "zlib"},
    "deflate differences": {"tile": (128, 128), "compression": "zlib", "predictor": 2},
    "deflate strips differences": {"rowsperstrip": 33, "compression": "zlib", "predictor": 2},
    "deflate planes": {"tile": (128, 128), "compression": "zlib", "planarconfig": "separate"},
    "packbits": {"tile": (128, 128), "compression": "packbits"},
    "JPEG 4:4:4": {"tile": (128, 128), **jpeg((1, 1))},
    "JPEG 4:2:2": {"tile": (128, 128), **jpeg((2, 1))},
    "JPEG 4:2:0": {"tile": (128, 128), **jpeg((2, 2))},
    "JPEG 4:2:0 BigTIFF": {"tile": (128, 128), "bigtiff": True, **jpeg((2, 2))},
    "JPEG RGB": {"tile": (128, 128), **jpeg()},
    "JPEG RGB planes": {"tile": (128, 128), "planarconfig": "separate", **jpeg()},
    "JPEG strips 4:2:0": {"rowsperstrip": 48, **jpeg((2, 2))},
    "JPEG strips RGB": {"rowsperstrip": 48, **jpeg()},
    "Zstandard": {"tile": (128, 128), "compression": "zstd"},
    "Zstandard differences": {"rowsperstrip": 33, "compression": "zstd", "predictor": 2},
    "LERC": {"tile": (128, 128), "compression": "lerc"},
    "LERC planes": {"tile": (128, 128), "compression": "lerc", "planarconfig": "separate"},
    "LERC strips in Zstandard": {"rowsperstrip": 33, "compression": "lerc", "compressionargs": {"compression": "zstd"}},
    "JPEG 2000": {"tile": (128, 128), "compression": "jpeg2000"},
}


def check_every_way(path, truth, mask=False):
    "Whole level, regions and mapped tiles, also over the edges, equal the reference pixels."
    with open_slide(path, mask=mask) as slide:
        assert np.array_equal(slide.level(0), truth)
        pad = np.full((truth.shape[0] + 400, truth.shape[1] + 400, *truth.shape[2:]), slide.fill, np.uint8)
        pad[200:-200, 200:-200] = truth
        xy = [(x, y) for y in range(-100, truth.shape[0] + 90, 97) for x in range(-100, truth.shape[1] + 90, 97)][::-1]
        equal = slide.map_tiles(
            lambda i, tile: np.array_equal(tile, pad[xy[i][1] + 200 :, xy[i][0] + 200 :][:97, :97]), xy, size=97
        )
        assert len(equal) == len(xy) and all(equal)
        assert np.array_equal(slide.read(-20, 300, 120, 500), pad[500:1000, 180:300])
        assert (slide.read(5000, 5000, 10, 10) == slide.fill).all()


@pytest.mark.parametrize("name", FORMATS)
def test_pixels_equal_tifffile(tmp_path, name):
    path = tmp_path / "slide.tif"
    options = dict(FORMATS[name])
    pixels = np.moveaxis(image(), -1, 0) if options.get("planarconfig") else image()
    with tifffile.TiffWriter(
        path, bigtiff=options.pop("bigtiff", False), byteorder=options.pop("byteorder", None)
    ) as out:
        out.write(pixels, metadata=None, **{"photometric": "rgb", **options})
    truth = tifffile.TiffFile(path).pages[0].asarray()
    check_every_way(path, np.moveaxis(truth, 0, -1) if truth.shape[0] == 3 else truth)


@pytest.mark.parametrize(
    ("color", "subsampling"), [("YCBCR", "420"), ("YCBCR", "422"), ("YCBCR", "444"), ("RGB", "444")]
)
def test_shared_jpeg_tables(tmp_path, color, subsampling):
    path = tmp_path / "slide.tif"
    write_shared(path, image(), color, subsampling)
    page = tifffile.TiffFile(path).pages[0]
    assert page.jpegtables
    check_every_way(path, page.asarray())
    source = open_slide(path).jpeg_source()
    assert source.colorspace.upper() == color and source.subsampling.replace(":", "") == subsampling
    assert len(source.tables) == (1 if color == "RGB" else 2)


def test_colors_follow_the_photometric_tag(tmp_path):
    "RGB and YCbCr streams look alike to a decoder that guesses; both must come back near the colours that went in."
    for color in ("YCBCR", "RGB"):
        path = tmp_path / f"{color}.tif"
        write_shared(path, image(), color, "444")
        assert np.abs(open_slide(path).level(0).astype(int) - image()).mean() < 6


def test_jpeg_source_encodes_again_almost_without_loss(tmp_path):
    from io import BytesIO

    from PIL import Image

    for color, subsampling in (("YCBCR", "420"), ("RGB", "444")):
        path = tmp_path / f"{color}.tif"
        write_shared(path, image(), color, subsampling)
        with open_slide(path) as slide:
            tile = slide.read(128, 128, 224, 224)
            source = slide.jpeg_source()

        def decibels(tile=tile, source=source, **options):
            out = BytesIO()
            Image.fromarray(tile).save(
                out, "JPEG", keep_rgb=source.colorspace == "RGB", subsampling=source.subsampling, **options
            )
            error = np.mean((np.asarray(Image.open(out), float) - tile) ** 2)
            return 10 * np.log10(255**2 / max(error, 1e-6))

        assert decibels(qtables=source.tables) > max(45, decibels(quality=85))


def test_levels_with_inexact_factors(tmp_path):
    "Karolinska's pyramids: 4.0005 and 16.006 in place of 4 and 16."
    path = tmp_path / "slide.tif"
    small = image()
    with tifffile.TiffWriter(path) as out:
        for i, d in enumerate((1, 4, 16)):
            out.write(
                small[::d, ::d][: SHAPE[0] // d, : SHAPE[1] // d],
                photometric="rgb",
                tile=(64, 64),
                compression="zlib",
                subfiletype=int(i > 0),
                metadata=None,
            )
    with open_slide(path) as slide:
        assert slide.shapes == [(700, 533), (175, 133), (43, 33)]
        assert slide.downsamples[1] == pytest.approx((700 / 175 + 533 / 133) / 2) and slide.downsamples[1] != 4
        for level, d in enumerate((1, 4, 16)):
            assert np.array_equal(slide.level(level), small[::d, ::d][: SHAPE[0] // d, : SHAPE[1] // d])
        truth = slide.level(1)
        xy = [(x * slide.downsamples[1], y * slide.downsamples[1]) for y in (0, 50, 120) for x in (0, 31, 90)]

        def same(i, tile):
            x, y = [round(v / slide.downsamples[1]) for v in xy[i]]
            return np.array_equal(tile, truth[y : y + 40, x : x + 40])

        assert all(slide.map_tiles(same, xy, size=40, level=1))


def write_ome(path, unit="µm"):
    planes = np.moveaxis(image(), -1, 0)
    with tifffile.TiffWriter(path, ome=True) as out:
        more = {"photometric": "minisblack", "tile": (128, 128), "compression": "zlib"}
        out.write(planes, subifds=2, metadata={"axes": "CYX", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": unit}, **more)
        for d in (2, 4):
            out.write(planes[:, ::d, ::d], subfiletype=1, **more)


@pytest.mark.parametrize(("unit", "mpp"), [("µm", 0.25), ("mm", None)])
def test_ome_units(tmp_path, unit, mpp):
    write_ome(tmp_path / "slide.ome.tif", unit)
    assert open_slide(tmp_path / "slide.ome.tif")._mpp == mpp  # a quarter of a millimetre is no scanner's pixel


def test_ome_with_planar_channels_and_subifds(tmp_path):
    write_ome(tmp_path / "slide.ome.tif")
    check_every_way(tmp_path / "slide.ome.tif", image())
    with open_slide(tmp_path / "slide.ome.tif") as slide:
        assert slide.shapes == [(700, 533), (350, 267), (175, 134)] and slide.mpp == 0.25
        assert np.array_equal(slide.level(2), image()[::4, ::4])


COLOUR_PAGES = {
    "strips": {},
    "LZW": {"compression": "lzw"},
    "tiles": {"tile": (128, 128), "compression": "zlib"},
    "as ZYX": {"axes": "ZYX"},
    "no OME": {"axes": None},
    "JPEG": {"compression": "jpeg", "tile": (128, 128)},
    "big": {"bigtiff": True},
}


@pytest.mark.parametrize("name", COLOUR_PAGES)
def test_red_green_and_blue_as_pages(tmp_path, name):
    "DeepGleason's layout: pages 0, 1 and 2 hold one colour each; also as a pyramid of such pages."
    path = tmp_path / "slide.ome.tif"
    options = dict(COLOUR_PAGES[name])
    axes = options.pop("axes", "CYX")
    big = options.pop("bigtiff", False)
    with tifffile.TiffWriter(path, bigtiff=big, ome=axes is not None) as out:
        out.write(
            np.moveaxis(image(), -1, 0), photometric="minisblack", metadata={"axes": axes} if axes else None, **options
        )
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages) == 3
        truth = np.stack([page.asarray() for page in tiff.pages], -1)
    check_every_way(path, truth)
    with open_slide(path) as slide:
        source = slide.jpeg_source()
        assert source is None if name != "JPEG" else source.colorspace == "RGB"  # three grey streams are a colour image
    with tifffile.TiffWriter(path) as out:
        for d in (1, 2):
            for c in range(3):
                out.write(image()[::d, ::d, c].copy(), photometric="minisblack", tile=(64, 64), metadata=None)
    with open_slide(path) as slide:
        assert slide.shapes == [(700, 533), (350, 267)] and np.array_equal(slide.level(1), image()[::2, ::2])


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_a_mask_with_a_palette_holds_numbers(tmp_path, suffix):
    from PIL import Image

    codes = np.random.default_rng(0).integers(0, 6, SHAPE).astype(np.uint8)
    painted = Image.fromarray(codes).convert("P")
    painted.putdata(codes.ravel().tolist())
    painted.putpalette([c for i in range(6) for c in (250 - i, 7 * i, 90)])
    painted.save(tmp_path / f"mask.{suffix}")
    check_every_way(tmp_path / f"mask.{suffix}", codes, mask=True)
    if suffix != "tif":
        check_every_way(tmp_path / f"mask.{suffix}", np.asarray(painted.convert("RGB")))


def test_a_grey_mask_with_opacity(tmp_path):
    from PIL import Image

    codes = np.random.default_rng(0).integers(0, 6, SHAPE).astype(np.uint8)
    Image.fromarray(np.dstack([codes, codes * 0 + 255])).save(tmp_path / "mask.png")
    check_every_way(tmp_path / "mask.png", codes, mask=True)
    refused(tmp_path / "mask.png", "one channel, not RGB")


def test_svs_layout_leaves_out_thumbnail_label_and_macro(tmp_path):
    path = tmp_path / "slide.svs"
    big = image((1024, 1280))
    note = "Aperio Image Library v11\n1280x1024 (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"
    with tifffile.TiffWriter(path) as out:
        write = {**jpeg(), "photometric": "rgb", "metadata": None}
        out.write(big, tile=(256, 256), description=note, **write)
        out.write(big[::4, ::4].copy(), rowsperstrip=16, description="Aperio thumbnail", **write)
        out.write(big[::4, ::4].copy(), tile=(256, 256), description=note, **write)
        out.write(image((100, 90)), rowsperstrip=16, subfiletype=1, description="Aperio\nlabel 90x100", **write)
        out.write(image((90, 300)), rowsperstrip=16, subfiletype=9, description="Aperio\nmacro 300x90", **write)
    with open_slide(path) as slide:
        assert slide.shapes == [(1024, 1280), (256, 320)] and slide.mpp == 0.499


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [
        ((20000, 20000), "CENTIMETER", 0.5),
        ((50800, 50800), "INCH", 0.5),
        ((72, 72), "INCH", None),
        ((1, 1), "NONE", None),
        ((1, 1), "CENTIMETER", None),
        ((0, 1), "CENTIMETER", None),
        ((4294967295 / 208816, 4294967295 / 208816), "CENTIMETER", 0.486188),
    ],
)
def test_mpp_from_resolution_tags(tmp_path, resolution, unit, mpp):
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path,
        image((64, 64)),
        photometric="rgb",
        tile=(64, 64),
        resolution=resolution,
        resolutionunit=unit,
        metadata=None,
    )
    with open_slide(path) as slide:
        if mpp:
            assert slide.mpp == pytest.approx(mpp, rel=1e-3)
        else:
            with pytest.raises(BadInput, match="microns.*mpp=0.5"):
                slide.mpp
            with pytest.raises(BadInput):
                slide.read_mpp(0, 0, 10, 10, 1.0)
    with open_slide(path, mpp=0.3) as slide:
        assert slide.mpp == 0.3  # what the caller says wins


def test_read_mpp_chooses_the_level_and_averages(tmp_path):
    path = tmp_path / "slide.tif"
    pixels = image((512, 512))
    with tifffile.TiffWriter(path) as out:
        for d in (1, 4):
            out.write(
                pixels.reshape(512 // d, d, 512 // d, d, 3).mean((1, 3)).astype(np.uint8),
                photometric="rgb",
                tile=(64, 64),
                resolution=(20000 / d,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    with open_slide(path) as slide:
        assert np.array_equal(slide.read_mpp(100, 60, 40, 30, 0.5), pixels[60:90, 100:140])
        assert np.array_equal(slide.read_mpp(64, 64, 50, 50, 2.0), slide.level(1)[16:66, 16:66])
        half = pixels.reshape(256, 2, 256, 2, 3).mean((1, 3))
        assert np.abs(slide.read_mpp(0, 0, 256, 256, 1.0) - half).max() <= 1
        assert slide.read_mpp(0, 0, 100, 80, 0.25).shape == (80, 100, 3)
        assert slide.thumbnail(100).shape == (100, 100, 3)


def test_masks_read_codes(tmp_path):
    codes = np.random.default_rng(0).integers(0, 6, SHAPE).astype(np.uint8)
    codes[128:384, 128:512] = 3  # internal tiles of one code
    for name, pixels, photometric in (
        ("rgb", np.stack([codes, codes * 0, codes * 0], -1), "rgb"),
        ("grey", codes, "minisblack"),
    ):
        for compression in ("zlib", "lzw", None):
            path = tmp_path / f"{name}_{compression}.tif"
            tifffile.imwrite(
                path, pixels, photometric=photometric, compression=compression, tile=(128, 128), metadata=None
            )
            check_every_way(path, codes, mask=True)
            with open_slide(path, mask=True) as mask:
                assert np.array_equal(mask.read_mask(7, 9, 50, 60), codes[9:69, 7:57])
    with open_slide(tmp_path / "rgb_zlib.tif") as slide:
        assert np.array_equal(slide.read_mask(7, 9, 50, 60), codes[9:69, 7:57])


def test_sparse_tiles_are_white_and_masks_zero(tmp_path):
    path = tmp_path / "sparse.tif"
    tifffile.imwrite(path, image((256, 256)), photometric="rgb", tile=(128, 128), compression="zlib", metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        tiff.pages[0].tags["TileByteCounts"].overwrite([counts[0], 0, *counts[2:]])
    with open_slide(path) as slide:
        assert np.array_equal(slide.level(0)[:128, :128], image((256, 256))[:128, :128])
        assert (slide.level(0)[:128, 128:] == 255).all()
    with open_slide(path, mask=True) as mask:
        assert (mask.level(0)[:128, 128:] == 0).all()


def _forked(args):
    slide, x, y = args
    return x, y, slide.read(x, y, 60, 50)


def test_threads_and_forked_processes_share_a_slide(tmp_path):
    path = tmp_path / "slide.tif"
    write_shared(path, image())
    places = [(int(x), int(y)) for x, y in np.random.default_rng(1).integers(0, 450, (200, 2))]
    with open_slide(path) as slide:
        truth = slide.level(0)
        again = pickle.loads(pickle.dumps(slide))
        assert np.array_equal(again.level(0), truth)
        slide.map_tiles(lambda i, tile: None, places, size=50)  # leaves no thread behind that a fork could lose
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda p: (*p, slide.read(*p, 60, 50)), places))
        global _shared
        _shared = slide
        with multiprocessing.get_context("fork").Pool(3) as pool:
            found += pool.map(_inherited, places)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found += pool.map(_forked, [(slide, *p) for p in places[:3]])
    for x, y, pixels in found:
        assert np.array_equal(pixels, truth[y : y + 50, x : x + 60])


def _inherited(place):
    return (*place, _shared.read(*place, 60, 50))


def test_an_error_in_the_function_ends_the_map(tmp_path):
    path = tmp_path / "slide.tif"
    write_shared(path, image())

    def fail(i, tile):
        if i == 5:
            raise KeyError("mine")

    with open_slide(path) as slide, pytest.raises(KeyError, match="mine"):
        slide.map_tiles(fail, [(x, y) for y in range(0, 600, 50) for x in range(0, 500, 50)], size=50)


# Bad files ----------------------------------------------------------------------------------------------------------


def refused(path, fault, **options):
    with pytest.raises(BadInput, match=fault) as caught:
        open_slide(path, **options)
    assert str(path) in str(caught.value) and caught.value.remedy


def test_files_that_are_no_slides(tmp_path):
    refused(tmp_path / "absent.tiff", "no such file")
    refused(tmp_path, "a folder")
    (tmp_path / "empty.tiff").touch()
    refused(tmp_path / "empty.tiff", "0 bytes")
    (tmp_path / "text.tiff").write_text("this is not a slide")
    refused(tmp_path / "text.tiff", "not a TIFF")
    (tmp_path / "head.tiff").write_bytes(b"II*\0" + bytes(4))
    refused(tmp_path / "head.tiff", "damaged|truncated")


@pytest.mark.parametrize("big", [False, True])
def test_every_truncation_is_noticed(tmp_path, big):
    whole = tmp_path / "whole.tif"
    cut = tmp_path / "cut.tif"
    with tifffile.TiffWriter(whole, bigtiff=big) as out:
        for d in (1, 4):
            out.write(
                image()[::d, ::d].copy(),
                photometric="ycbcr",
                compression="jpeg",
                tile=(128, 128),
                subfiletype=int(d > 1),
                metadata=None,
            )
    data = whole.read_bytes()
    for n in [5, 9, 20, 100, 300, *np.linspace(500, len(data) - 1, 40).astype(int)]:
        cut.write_bytes(data[:n])
        refused(cut, "truncated|damaged")


def test_pixels_that_are_not_rgb(tmp_path):
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, image().astype(np.uint16), photometric="rgb", tile=(128, 128))
    refused(path, "16 bits")
    tifffile.imwrite(path, image()[..., 0], photometric="minisblack", tile=(128, 128))
    refused(path, "one channel.*mask=True")
    tifffile.imwrite(path, image(), photometric="rgb", tile=(128, 128), compression="webp")
    refused(path, "unsupported compression WEBP")


@pytest.mark.parametrize("harm", ["zeros", "random", "cut", "early end", "other size"])
def test_a_damaged_jpeg_tile_is_named(tmp_path, harm):
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, image(), photometric="ycbcr", compression="jpeg", tile=(128, 128), metadata=None)
    page = tifffile.TiffFile(path).pages[0]
    # row 1, column 2 of 6x5
    offset = page.dataoffsets[7]
    count = page.databytecounts[7]
    data = bytearray(path.read_bytes())
    old = bytes(data[offset : offset + count])
    small = imagecodecs.jpeg8_encode(np.zeros((64, 64, 3), np.uint8))
    data[offset : offset + count] = {
        "zeros": bytes(count),
        "random": np.random.default_rng(0).bytes(count),
        "cut": old[: count // 2] + bytes(count - count // 2),
        "early end": old[: count // 2] + b"\xff\xd9" + old[count // 2 + 2 :],
        "other size": (small + old)[:count],
    }[harm]
    path.write_bytes(data)
    with open_slide(path) as slide:
        for read in (
            lambda: slide.level(0),
            lambda: slide.map_tiles(lambda i, tile: None, [(0, 0), (300, 150), (350, 200)], 64),
        ):
            with pytest.raises(BadInput, match=r"row 1, column 2") as caught:
                read()
            assert str(path) in str(caught.value)
        assert slide.read(0, 0, 100, 100).shape == (100, 100, 3)  # the rest can still be read


@pytest.mark.parametrize("compression", ["zlib", "lzw"])
def test_a_damaged_packed_tile_is_named(tmp_path, compression):
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, image(), photometric="rgb", compression=compression, tile=(128, 128), metadata=None)
    page = tifffile.TiffFile(path).pages[0]
    data = bytearray(path.read_bytes())
    offset = page.dataoffsets[7]
    count = page.databytecounts[7]
    data[offset + 10 : offset + count] = bytes(count - 10)
    path.write_bytes(data)
    with open_slide(path) as slide, pytest.raises(BadInput, match="row 1, column 2"):
        slide.level(0)


def saved(path, form, pixels, **options):
    from PIL import Image

    Image.fromarray(pixels).save(path, form, **options)
    return path


@pytest.mark.parametrize("kind", ["thumbnail", "several pictures", "zeros behind it", "notes behind it", "progressive"])
def test_photographs_as_cameras_write_them(tmp_path, kind):
    from PIL import Image
    from test_streams import exif_with_thumbnail

    options = {
        "thumbnail": {"exif": exif_with_thumbnail()},
        "progressive": {"progressive": True},
        "several pictures": {"save_all": True, "append_images": [Image.fromarray(image(seed=1))]},
    }.get(kind, {})
    path = saved(tmp_path / "photo.jpg", "MPO" if "several" in kind else "JPEG", image(), **options)
    behind = {"zeros behind it": bytes(3000), "notes behind it": b"a note\xff\xfe" * 50}.get(kind, b"")
    path.write_bytes(path.read_bytes() + behind)
    with open_slide(path) as slide:
        assert np.array_equal(slide.level(0), np.asarray(Image.open(path)))


@pytest.mark.parametrize("pad", ["zeros", "FF"])
def test_internal_tiles_that_are_padded_to_whole_blocks(tmp_path, pad):
    "Writers that give every tile whole disk blocks: the byte counts reach beyond the streams."
    path = with_broken_tiles(tmp_path / "slide.tif", [])
    truth = tifffile.imread(path)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        page = tiff.pages[0]
        data = path.read_bytes()
        streams = [data[a : a + n] for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        whole = [s + (b"\xff" if pad == "FF" else b"\0") * (4096 + -len(s) % 4096) for s in streams]
        starts = np.cumsum([len(data), *map(len, whole)])
        page.tags["TileOffsets"].overwrite(starts[:-1].tolist())
        page.tags["TileByteCounts"].overwrite([len(s) for s in whole])
    with open(path, "ab") as f:
        f.seek(starts[0])
        f.truncate()
        f.write(b"".join(whole))
    with open_slide(path) as slide:
        assert np.array_equal(slide.level(0), truth)


def with_broken_tiles(path, places, levels=(1,)):
    "A JPEG slide of 128 px tiles with broken streams at (row, column) of level 0."
    with tifffile.TiffWriter(path) as out:
        for d in levels:
            pixels = np.ascontiguousarray(image()[::d, ::d])
            out.write(pixels, photometric="ycbcr", compression="jpeg", tile=(128, 128), metadata=None)
    page = tifffile.TiffFile(path).pages[0]
    data = bytearray(path.read_bytes())
    for row, column in places:
        at = page.dataoffsets[5 * row + column]
        data[at : at + 50] = bytes(50)
    path.write_bytes(data)
    return path


def test_damage_that_is_allowed_is_blank_and_listed(tmp_path):
    path = with_broken_tiles(tmp_path / "slide.tif", [(1, 2), (4, 0)])
    whole = tifffile.imread(with_broken_tiles(tmp_path / "whole.tif", []))
    with open_slide(path, max_damaged=2) as slide:
        found = slide.level(0)
        broken = np.zeros(SHAPE, bool)
        broken[128:256, 256:384] = broken[512:640, :128] = True
        assert (found[broken] == 255).all() and np.array_equal(found[~broken], whole[~broken])
        assert set(slide.damaged) == {(0, 1, 2), (0, 4, 0)} and "does not begin as a JPEG" in slide.damaged[0, 1, 2]
        near = {(200, 130): False, (217, 130): True, (383, 255): True, (384, 255): False, (300, 256): False}
        assert {xy: slide.touches_damage(*xy, 40) for xy in near} == near
        assert pickle.loads(pickle.dumps(slide)).max_damaged == 2
    with open_slide(path, max_damaged=2) as slide:
        xy = [(x, y) for y in range(0, 700, 60) for x in range(0, 533, 60)]
        lost = slide.map_tiles(lambda i, tile: slide.touches_damage(*xy[i], 60), xy, 60, threads=4)
        assert lost == [bool(broken[y : y + 60, x : x + 60].any()) for x, y in xy]
    too_many, one = (
        "2 internal tiles are damaged, 1 may be.*row 4, column 0",
        "damaged internal tile .level 0, row 1, column 2",
    )
    for allowed, fault in ((1, too_many), (0, one)):
        with open_slide(path, max_damaged=allowed) as slide, pytest.raises(BadInput, match=fault):
            slide.level(0)
    with open_slide(path, mask=True, max_damaged=2) as mask:
        assert (mask.level(0)[broken] == 0).all()


def test_whatever_a_codec_raises_is_the_librarys_own_error(tmp_path, monkeypatch):
    path = with_broken_tiles(tmp_path / "slide.tif", [])

    def failing(error):
        def decode(*args):
            raise error

        return decode

    for error in (TypeError("odd"), IndexError("odd"), RecursionError("odd"), AssertionError("odd")):
        monkeypatch.setattr("histonb.slides.tiled_file.decode", failing(error))
        fault = f"level 0, row 0, column 0.: {type(error).__name__}: odd"
        with open_slide(path) as slide, pytest.raises(BadInput, match=fault):
            slide.read(0, 0, 9, 9)
        with open_slide(path, max_damaged=99) as slide:
            assert (slide.read(0, 0, 9, 9) == 255).all() and slide.damaged
    says_nothing_of_the_file = {OSError(5, "Input/output error"): "cannot be read", MemoryError(): "no memory"}
    for error, fault in says_nothing_of_the_file.items():
        monkeypatch.setattr("histonb.slides.tiled_file.decode", failing(error))
        with open_slide(path, max_damaged=99) as slide, pytest.raises(BadInput, match=fault):
            slide.read(0, 0, 9, 9)
        assert not slide.damaged


@pytest.mark.parametrize("name", ["tiff", "pages", "level", "mpp"])
def test_whatever_is_raised_while_a_slide_is_opened_is_the_librarys_own_error(tmp_path, monkeypatch, name):
    path = with_broken_tiles(tmp_path / "slide.tif", [])
    where = {
        "tiff": "image_files.tifffile.TiffFile",
        "pages": "slides.pyramid_pages",
        "level": "slides.read_level",
        "mpp": "slides.find_mpp",
    }[name]
    for error in (TypeError, ZeroDivisionError, AttributeError, OverflowError, MemoryError):

        def fail(*args, error=error):
            raise error("odd")

        with monkeypatch.context() as m:
            m.setattr(f"histonb.slides.{where}", fail)
            refused(path, f"{error.__name__}.*odd")


def test_plain_images_out_of_proportion(tmp_path):
    import struct

    png = imagecodecs.png_encode(image((32, 32)))
    bmp = imagecodecs.bmp_encode(image((32, 32)))
    for name, data in {
        "a.png": png[:16] + struct.pack(">II", 50_000, 50_000) + png[24:],
        "b.bmp": bmp[:18] + struct.pack("<ii", 50_000, -50_000) + bmp[26:],
        "c.png": png[:16] + struct.pack(">II", 0, 0) + png[24:],
        "d.png": png[:20],
        "e.bmp": bmp[:20],
        "f.jpg": b"\xff\xd8\xff\xe0\0",
    }.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "truncated or damaged")
        refused(tmp_path / name, "truncated or damaged", mask=True)


@pytest.mark.parametrize("given", [0, -1, float("inf")])
def test_a_resolution_that_is_none_is_refused(tmp_path, given):
    refused(with_broken_tiles(tmp_path / "slide.tif", []), "micrometres per pixel are given", mpp=given)


def test_the_first_broken_tile_does_not_hide_how_the_others_were_made(tmp_path):
    broken = with_broken_tiles(tmp_path / "a.tif", [(0, 0), (0, 1)])
    whole = with_broken_tiles(tmp_path / "b.tif", [])
    with open_slide(broken) as one, open_slide(whole) as other:
        assert one.jpeg_source() == other.jpeg_source()


MINI = REAL.parent / "cases/faults/mini"


ALTERED = """
import re, resource, sys
from pathlib import Path
from histonb.core.errors import BadInput
from histonb.slides.slides import open_slide
used = int(re.search(r"VmSize:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])*1024
resource.setrlimit(resource.RLIMIT_AS, (used + 200*2**20,)*2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    for mask in (False, True):
        try:
            with open_slide(path, mask=mask) as slide: slide.level(0), slide.thumbnail(100)
        except BadInput as e: print(path.name, mask, e.fault)
"""


@pytest.mark.skipif(not MINI.exists() or sys.platform != "linux", reason="no ../shared/cases/faults/mini, or no Linux")
def test_files_that_were_altered_by_hand():
    "Every one but the seed is refused in the library's own words, when it is opened or read, within 200 MiB."
    done = subprocess.run([sys.executable, "-c", ALTERED, MINI], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    scale = {"ome_resolution.tiff", "resolutionunit_count2.tiff"}  # of a mask, the scale is not asked for
    assert said == {
        (p.name, str(mask))
        for p in MINI.iterdir()
        for mask in (False, True)
        if p.stem != "seed" and not (mask and p.name in scale)
    }
    assert "unexpected" not in done.stdout


# Real files ---------------------------------------------------------------------------------------------------------


def real(pattern):
    found = sorted(REAL.glob(pattern))
    if not found:
        pytest.skip(f"no real data at {REAL.name}/{pattern}")
    return found


def test_real_panda_slide():
    path = real("panda/train_images/*.tiff")[0]
    with open_slide(path) as slide, tifffile.TiffFile(path) as tiff:
        assert slide.shapes == [(7680, 2048), (1920, 512), (480, 128)] and slide.mpp == pytest.approx(0.486, abs=1e-3)
        for level in range(3):
            assert np.array_equal(slide.level(level), tiff.pages[level].asarray())
        whole = slide.level(0)
        xy = [(x, y) for y in range(0, 7680, 224) for x in range(0, 2048, 224)]

        def same(i, tile):
            x, y = xy[i]
            cut = whole[y : y + 224, x : x + 224]
            return np.array_equal(tile[: cut.shape[0], : cut.shape[1]], cut)

        assert all(slide.map_tiles(same, xy))
        assert slide.jpeg_source().colorspace == "RGB"


def test_real_panda_masks():
    for path in real("panda/train_label_masks/*.tiff"):
        with open_slide(path, mask=True) as mask, tifffile.TiffFile(path) as tiff:
            assert np.array_equal(mask.level(0), tiff.pages[0].asarray()[..., 0]) and mask.level(0).max() <= 5


def test_real_svs():
    path = real("slides/*.svs")[0]
    with open_slide(path) as slide, tifffile.TiffFile(path) as tiff:
        assert slide.shapes == [(2967, 2220)] and slide.mpp == 0.499
        assert np.array_equal(slide.level(0), tiff.pages[0].asarray())


def test_real_slides_equal_openslide():
    openslide = pytest.importorskip("openslide", reason="openslide is an extra (`scanners`)")
    for path in [*real("panda/train_images/*.tiff"), *real("slides/*.svs")]:
        with open_slide(path) as slide, openslide.OpenSlide(path) as other:
            assert np.array_equal(
                slide.level(0), np.asarray(other.read_region((0, 0), 0, other.dimensions).convert("RGB"))
            )
