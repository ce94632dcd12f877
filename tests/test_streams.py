"""Internal tiles: what is whole and what is damaged in a JPEG stream, and sizes that no bytes can fill."""

import io
import struct

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from histonb.slides.streams import EXPANSION, JPEG, Damaged, Level, check_proportion, decode, jpeg_frame

SIDE = 128


def picture(side=SIDE, seed=0):
    "Smooth colours and grain."
    y, x = np.mgrid[:side, :side]
    waves = np.stack([128 + 90 * np.sin(x / 17 + y / (23 + 20 * c) + c) for c in range(3)], -1)
    return np.clip(waves + np.random.default_rng(seed).normal(0, 6, waves.shape), 0, 255).astype(np.uint8)


def saved(form, pixels=None, **options):
    "The bytes of a file in which Pillow saves a picture."
    file = io.BytesIO()
    Image.fromarray(picture() if pixels is None else pixels).save(file, form, **options)
    return file.getvalue()


def exif_with_thumbnail():
    "An EXIF block as cameras write it: its second directory holds a JPEG."
    thumb = saved("JPEG", picture(32))
    entries = (
        struct.pack("<H", 3)
        + b"".join(
            struct.pack("<HHII", *entry)
            for entry in ((0x0103, 3, 1, 6), (0x0201, 4, 1, 56), (0x0202, 4, 1, len(thumb)))
        )
        + bytes(4)
    )
    return b"Exif\0\0II*\0" + struct.pack("<IHI", 8, 0, 14) + entries + thumb


def segment(marker, payload):
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def with_segment(stream, extra):
    return stream[:2] + extra + stream[2:]


def stream(**options):
    return imagecodecs.jpeg8_encode(picture(), level=85, **options)


WHOLE = {
    "plain": stream,
    "optimized": lambda: stream(optimize=True),
    "4:4:4": lambda: stream(subsampling="444"),
    "progressive": lambda: saved("JPEG", progressive=True),
    "restart marks": lambda: saved("JPEG", restart_marker_rows=1),
    "EXIF thumbnail": lambda: saved("JPEG", exif=exif_with_thumbnail()),
    "a comment of marks": lambda: with_segment(stream(), segment(0xFE, b"\xff\xda\xff\xd9\xff\xd8" * 20)),
    "a colour profile of marks": lambda: with_segment(
        stream(), segment(0xE2, b"ICC_PROFILE\0\1\1" + b"\xff\xd9\xff\x41" * 200)
    ),
    "fill bytes": lambda: with_segment(stream(), b"\xff\xff\xff" + segment(0xFE, b"x")),
    "several pictures": lambda: saved("MPO", save_all=True, append_images=[Image.fromarray(picture(seed=1))]),
    "zeros behind it": lambda: stream() + bytes(5000),
    "bytes of FF behind it": lambda: stream() + b"\xff" * 5000,
    "notes behind it": lambda: stream() + b"written by a program, on a Monday; " * 20,
    "a film behind it": lambda: stream() + np.random.default_rng(0).bytes(50_000),
    "the end mark twice": lambda: stream() + b"\xff\xd9",
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_streams_are_whole(name):
    data = WHOLE[name]()
    frame = jpeg_frame(data)
    assert (frame.bits, frame.height, frame.width, frame.samples) == (8, SIDE, SIDE, 3)
    assert np.abs(decode(level(JPEG, 6), data, 0).astype(int) - picture()).mean() < 8


def cut_in(data, what):
    "The stream with something written into the midst of it."
    half = len(data) // 2
    return data[:half] + what + data[half + len(what) :]


BROKEN = {
    "cut": lambda d: d[: len(d) // 2],
    "cut and padded": lambda d: d[: len(d) // 2] + bytes(len(d) // 2),
    "zeros": lambda d: bytes(len(d)),
    "no end mark": lambda d: d[:-2],
    "cut in its header": lambda d: d[:30],
    "empty": lambda d: b"",
    "end mark in its midst": lambda d: cut_in(d, b"\xff\xd9"),
    "end mark in its midst, padded": lambda d: cut_in(d, b"\xff\xd9") + bytes(3000),
    "end mark in its midst, another picture": lambda d: cut_in(d, b"\xff\xd9") + bytes(100) + stream(),
    "impossible mark": lambda d: cut_in(d, b"\xff\x41"),
    "start mark in its midst": lambda d: cut_in(d, b"\xff\xd8"),
    "a segment longer than the file": lambda d: with_segment(d, b"\xff\xfe\xff\xff"),
    "a segment without length": lambda d: with_segment(d, b"\xff\xfe\0\0"),
    "only tables": lambda d: d[: d.index(b"\xff\xc0")] + b"\xff\xd9",
    "no scan": lambda d: d[: d.index(b"\xff\xda")] + b"\xff\xd9",
    "no height": lambda d: d.replace(struct.pack(">BHH", 8, SIDE, SIDE), struct.pack(">BHH", 8, 0, SIDE)),
    "huge": lambda d: d.replace(struct.pack(">BHH", 8, SIDE, SIDE), struct.pack(">BHH", 8, 65500, 65500)),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", ["plain", "progressive", "EXIF thumbnail"])
def test_broken_streams_are_damaged(name, kind):
    data = BROKEN[name](WHOLE["plain"]() if "only" in name or "no " in name or name == "huge" else WHOLE[kind]())
    with pytest.raises(Damaged):
        jpeg_frame(data)
    with pytest.raises(Damaged):
        decode(level(JPEG, 6), data, 0)


def level(compression, photometric=2, shape=(SIDE, SIDE), tile=(SIDE, SIDE), samples=3, strips=False):
    "A level of one internal tile."
    none = np.zeros((1, 1, 1), int)
    return Level(shape, tile, none, none + 1, compression, photometric, samples, 1, None, strips)


def test_a_stream_may_be_larger_than_its_tile_and_smaller_where_nothing_is_seen():
    large = imagecodecs.jpeg8_encode(picture(160))
    small = imagecodecs.jpeg8_encode(picture(160)[:64, :96].copy())
    assert decode(level(JPEG, 6), large, 0).shape == (SIDE, SIDE, 3)
    assert decode(level(JPEG, 6, (60, 90)), small, 0).shape == (64, 96, 3)
    strip = level(JPEG, 6, (SIDE + 5, SIDE), strips=True)
    assert decode(strip, stream(), 1).shape == (5, SIDE, 3)  # a last strip that was encoded whole
    for wrong in (imagecodecs.jpeg8_encode(picture(300)), imagecodecs.jpeg8_encode(picture()[..., 0].copy())):
        with pytest.raises(Damaged):
            decode(level(JPEG, 6), wrong, 0)


def test_jpeg_2000_streams_have_the_size_of_their_tile():
    data = imagecodecs.jpeg2k_encode(picture())
    assert np.array_equal(decode(level(34712), data, 0), picture())
    at = data.index(b"\xff\x4f\xff\x51") + 8
    huge = data[:at] + struct.pack(">II", 60_000, 60_000) + data[at + 8 :]
    for wrong in (
        huge,
        data[:30],
        imagecodecs.jpeg2k_encode(picture(300)),
        imagecodecs.jpeg2k_encode(picture()[..., 0].copy()),
    ):
        with pytest.raises(Damaged):
            decode(level(34712), wrong, 0)


@pytest.mark.parametrize("compression", EXPANSION)
def test_sizes_out_of_proportion_are_refused_before_memory_is_asked_for(compression):
    with pytest.raises(Damaged, match="out of proportion"):
        check_proportion(10**13, 1000, compression, 10**6, 10**6)
    with pytest.raises(Damaged, match="out of proportion"):
        decode(level(compression, shape=(10**7,) * 2, tile=(10**7,) * 2), bytes(500), 0)


def test_the_emptiest_image_is_in_proportion():
    empty = np.zeros((1024, 1024, 3), np.uint8)
    for code, data in {
        5: imagecodecs.lzw_encode(empty),
        8: imagecodecs.zlib_encode(empty, 9),
        JPEG: saved("JPEG", empty, quality=30, optimize=True, progressive=True),
        32773: imagecodecs.packbits_encode(empty.reshape(1024, -1)),
        34712: imagecodecs.jpeg2k_encode(empty),
    }.items():
        check_proportion(empty.nbytes, len(data), code, 1024, 1024)
