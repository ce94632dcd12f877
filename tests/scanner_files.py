"Small files as scanners write them that are no plain pyramids: NDPI, VMS, DICOM, MIRAX, SCN, Aperio 33003, BIF."

import io
import struct

import cv2
import imagecodecs
import numpy as np
import tifffile
from PIL import Image

MPP = 0.5  # um per pixel of every file
CM = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}


def shrunk(pixels, factor):
    return cv2.resize(pixels, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)


def jpeg(pixels, blocks=0):
    "A JPEG that one may enter after so many blocks of 8 px, by its restart marks."
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95, subsampling="4:4:4", restart_marker_blocks=blocks)
    return out.getvalue()


def write_ndpi(path, pixels):
    "Hamamatsu NDPI: each level is a single JPEG with restart marks; sides are multiples of 64."
    with tifffile.TiffWriter(path.with_suffix(".ndpi")) as out:
        for factor in (1, 4):
            level = shrunk(pixels, factor) if factor > 1 else pixels
            out.write(
                iter([jpeg(level, 8)]),
                shape=level.shape,
                dtype=np.uint8,
                rowsperstrip=level.shape[0],
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(1, 1),
                metadata=None,
                extratags=[(65420, "I", 1, 1, True), (65421, "f", 1, 20.0 / factor, True), (65424, "i", 1, 0, True)],
                **CM,
            )
    return path.with_suffix(".ndpi")


def write_vms(path, pixels):
    "Hamamatsu VMS: a text that names JPEGs beside it, here two halves and the map, which is the small level."
    half = pixels.shape[1] // 2
    (path.parent / "left.jpg").write_bytes(jpeg(pixels[:, :half], 8))
    (path.parent / "right.jpg").write_bytes(jpeg(pixels[:, half:], 8))
    (path.parent / "map.jpg").write_bytes(jpeg(shrunk(pixels, 4), 8))
    lines = ["[Virtual Microscope Specimen]", "NoJpegColumns=2", "NoJpegRows=1", "MapFile=map.jpg"]
    lines += ["ImageFile=left.jpg", "ImageFile(1,0)=right.jpg"]
    lines += [
        f"PhysicalWidth={round(pixels.shape[1] * MPP * 1e3)}",
        f"PhysicalHeight={round(pixels.shape[0] * MPP * 1e3)}",
    ]
    path.with_suffix(".vms").write_text("\n".join(lines) + "\n")
    return path.with_suffix(".vms")


def _element(group, number, kind, value):
    "One element of a DICOM file with explicit little-endian kinds."
    if isinstance(value, str):
        value = value.encode()
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    elif isinstance(value, int):
        value = struct.pack({"US": "<H", "UL": "<I"}[kind], value)
    if kind in ("OB", "SQ"):
        return struct.pack("<HH2sHI", group, number, kind.encode(), 0, len(value)) + value
    return struct.pack("<HH2sH", group, number, kind.encode(), len(value)) + value


def _item(*elements):
    "One item of a DICOM sequence."
    content = b"".join(elements)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def _dicom_level(pixels, mpp, uid, tile=256):
    "One level of a DICOM slide: tiles without compression, row by row."
    wsi, explicit = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.1.2.1"
    meta = _element(2, 1, "OB", b"\0\1") + _element(2, 2, "UI", wsi) + _element(2, 3, "UI", uid)
    meta += _element(2, 0x10, "UI", explicit) + _element(2, 0x12, "UI", "1.2.3")
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % tile), (0, -width % tile), (0, 0)), "edge")
    rows, columns = padded.shape[0] // tile, padded.shape[1] // tile
    frames = padded.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    spacing = _element(0x28, 0x30, "DS", f"{mpp / 1e3}\\{mpp / 1e3}")
    measures = _element(0x28, 0x9110, "SQ", _item(spacing))
    data = [
        _element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
        _element(8, 0x16, "UI", wsi),
        _element(8, 0x18, "UI", uid),
        _element(0x20, 0xE, "UI", "1.2.3.4"),
        _element(0x20, 0x9311, "CS", "TILED_FULL"),
        _element(0x28, 2, "US", 3),
        _element(0x28, 4, "CS", "RGB"),
        _element(0x28, 6, "US", 0),
        _element(0x28, 8, "IS", str(rows * columns)),
        *(
            _element(0x28, number, "US", value)
            for number, value in ((0x10, tile), (0x11, tile), (0x100, 8), (0x101, 8))
        ),
        _element(0x28, 0x102, "US", 7),
        _element(0x28, 0x103, "US", 0),
        _element(0x48, 6, "UL", width),
        _element(0x48, 7, "UL", height),
        _element(0x5200, 0x9229, "SQ", _item(measures)),
        _element(0x7FE0, 0x10, "OB", frames.tobytes()),
    ]
    return bytes(128) + b"DICM" + _element(2, 0, "UL", len(meta)) + meta + b"".join(data)


def write_dicom(path, pixels):
    "DICOM: a file for each level; any one of them is the slide."
    for i, factor in enumerate((1, 4)):
        level = shrunk(pixels, factor) if factor > 1 else pixels
        path.with_name(f"{i}.dcm").write_bytes(_dicom_level(level, MPP * factor, f"1.2.3.4.{i}"))
    return path.with_name("1.dcm")


def write_mirax(path, pixels, camera=128, canvas=(12, 20), corner=(3, 5)):
    "MIRAX: pictures of the camera on a canvas (rows, columns), of which those from `corner` on were taken."
    rows, columns = pixels.shape[0] // camera, pixels.shape[1] // camera
    pages = []
    data = b"DATA"
    for exponent in (0, 2):
        step = 2**exponent
        records = []
        for row in range(corner[0] // step * step, corner[0] + rows, step):
            for column in range(corner[1] // step * step, corner[1] + columns, step):
                side = camera * step
                picture = np.full((side, side, 3), 255, np.uint8)
                y, x = (row - corner[0]) * camera, (column - corner[1]) * camera
                part = pixels[max(y, 0) : y + side, max(x, 0) : x + side]
                picture[max(-y, 0) :, max(-x, 0) :][: part.shape[0], : part.shape[1]] = part
                stored = imagecodecs.png_encode(shrunk(picture, step) if exponent else picture)
                records.append((row * canvas[1] + column, len(data), len(stored), 0))
                data += stored
        pages.append(records)
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / "Data0000.dat").write_bytes(data)
    head = b"01.02" + b"SLIDE"
    at = len(head) + 8 + 4 * len(pages)  # after the two roots and the pointers to the levels
    pointers, body = b"", b""
    for records in pages:
        start = at + len(body)
        pointers += struct.pack("<i", start)
        body += struct.pack("<iiii", 0, start + 8, len(records), 0) + b"".join(struct.pack("<4i", *r) for r in records)
    roots = struct.pack("<ii", len(head) + 8, 0)
    (folder / "Index.dat").write_bytes(head + roots + pointers + body)
    section = (
        "IMAGE_CONCAT_FACTOR={}\nOVERLAP_X=0\nOVERLAP_Y=0\nMICROMETER_PER_PIXEL_X={}\nMICROMETER_PER_PIXEL_Y={}\n"
        f"IMAGE_FILL_COLOR_BGR=16777215\nDIGITIZER_WIDTH={camera}\nDIGITIZER_HEIGHT={camera}\nIMAGE_FORMAT=PNG\n"
    )
    (folder / "Slidedat.ini").write_text(
        f"[GENERAL]\nSLIDE_ID=SLIDE\nIMAGENUMBER_X={canvas[1]}\nIMAGENUMBER_Y={canvas[0]}\nOBJECTIVE_MAGNIFICATION=20\n"
        "[HIERARCHICAL]\nHIER_COUNT=1\nNONHIER_COUNT=0\nINDEXFILE=Index.dat\nHIER_0_NAME=Slide zoom level\n"
        "HIER_0_COUNT=2\nHIER_0_VAL_0_SECTION=L0\nHIER_0_VAL_1_SECTION=L1\n[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data0000.dat\n"
        f"[L0]\n{section.format(0, MPP, MPP)}[L1]\n{section.format(2, 4 * MPP, 4 * MPP)}"
    )
    path.with_suffix(".mrxs").write_bytes(jpeg(shrunk(pixels, 8)))  # a picture of the glass
    return path.with_suffix(".mrxs")


def write_aperio_33003(path, pixels):
    "Aperio SVS whose JPEG 2000 holds luma and chroma."
    with tifffile.TiffWriter(path.with_suffix(".svs")) as out:
        for factor in (1, 4):
            level = shrunk(pixels, factor) if factor > 1 else pixels
            luma = np.ascontiguousarray(cv2.cvtColor(level, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
            cuts = [
                luma[y : y + 256, x : x + 256]
                for y in range(0, luma.shape[0], 256)
                for x in range(0, luma.shape[1], 256)
            ]
            whole = [np.pad(c, ((0, 256 - c.shape[0]), (0, 256 - c.shape[1]), (0, 0)), "edge") for c in cuts]
            out.write(
                iter([imagecodecs.jpeg2k_encode(c, codecformat="j2k", mct=False, reversible=True) for c in whole]),
                shape=level.shape,
                dtype=np.uint8,
                tile=(256, 256),
                compression=33003,
                photometric="rgb",
                metadata=None,
                description=f"Aperio Image Library\n|AppMag = 20|MPP = {MPP}",
            )
    return path.with_suffix(".svs")


def write_scn(path, pixels):
    "Leica SCN: two areas of one glass, each with two levels, apart by as much as each is wide."
    nm = round(1e3 * MPP)
    side = pixels.shape[1] // 2
    height = pixels.shape[0]
    lighting = (
        "<scanSettings><illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings>"
        "<objectiveSettings><objective>20</objective></objectiveSettings></scanSettings>"
    )

    def image(size, left, top, pages):
        dimensions = "".join(f'<dimension sizeX="{w}" sizeY="{h}" ifd="{i}"/>' for i, h, w in pages)
        view = f'<view sizeX="{size[1] * nm}" sizeY="{size[0] * nm}" offsetX="{left * nm}" offsetY="{top * nm}"/>'
        return f'<image><pixels sizeX="{size[1]}" sizeY="{size[0]}">{dimensions}</pixels>{view}{lighting}</image>'

    pages = [np.full((80, 100, 3), 240, np.uint8)]
    images = [image((8000, 10_000), 0, 0, [(0, 80, 100)])]
    for i in range(2):
        area = pixels[:, i * side : (i + 1) * side]
        pages += [np.ascontiguousarray(area), shrunk(area, 4)]
        levels = [(2 * i + 1, height, side), (2 * i + 2, height // 4, side // 4)]
        images.append(image((height, side), 1000 + 2 * i * side, 2000, levels))
    text = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection sizeX="{10_000 * nm}" sizeY="{8000 * nm}">{"".join(images)}</collection></scn>'
    )
    with tifffile.TiffWriter(path.with_suffix(".scn"), bigtiff=True) as out:
        for i, page in enumerate(pages):
            about = {"description": None if i else text, "metadata": None, **CM}
            out.write(page, photometric="rgb", tile=(256, 256), compression="lzw", **about)
    return path.with_suffix(".scn")


def write_bif(path, pixels, tile=128, overlap=16):
    "Ventana BIF: internal tiles that overlap their neighbours, as its XML says."
    step = tile - overlap
    rows, columns = ((side - overlap) // step for side in pixels.shape[:2])
    stored = np.concatenate(
        [np.concatenate([pixels[r * step :, c * step :][:tile, :tile] for c in range(columns)], 1) for r in range(rows)]
    )

    def number(row, column):  # from the lower left, to and fro
        up = rows - 1 - row
        return up * columns + (column if up % 2 == 0 else columns - 1 - column) + 1

    joint = '<TileJointInfo Confidence="100" Direction="{}" Tile1="{}" Tile2="{}" OverlapX="{}" OverlapY="{}"/>'
    joints = [
        joint.format("RIGHT", number(r, c), number(r, c + 1), overlap, 0)
        for r in range(rows)
        for c in range(columns - 1)
    ]
    joints += [
        joint.format("UP", number(r, c), number(r - 1, c), 0, overlap) for r in range(1, rows) for c in range(columns)
    ]
    info = (
        f'<EncodeInfo Ver="2"><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0" Width="{tile}" Height="{tile}" '
        f'NumRows="{rows}" NumCols="{columns}" Pos-X="0" Pos-Y="0">{"".join(joints)}</ImageInfo></SlideStitchInfo>'
        '<AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    ).encode()
    scan = f'<iScan Magnification="20" ScanRes="{MPP}" ScannerModel="x"/>'.encode()
    label = np.full((100, 200, 3), 240, np.uint8)
    with tifffile.TiffWriter(path.with_suffix(".bif"), bigtiff=True) as out:
        for page, text, xml in ((label, "Label Image", scan), (stored, "level=0 mag=20 quality=90", info)):
            tag = [(700, "B", len(xml), xml, True)]
            options = {"photometric": "rgb", "metadata": None, "description": text, "extratags": tag}
            out.write(page, tile=(tile, tile), compression="lzw", **options)
    return path.with_suffix(".bif")
