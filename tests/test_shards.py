"""Shards: fidelity and size of stored tiles, many processes at once, and damage that is named."""

import pickle
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import tifffile
from torch.utils.data import DataLoader

from histonb.core.errors import BadInput
from histonb.datasets.cohorts import panda
from histonb.slides.slides import open_slide
from histonb.slides.streams import JpegSource
from histonb.slides.tile_rules import TileRule
from histonb.slides.tile_store import ShardWriter, SlideTiles, TileShards, jpeg_encoder, pack, read_tiles, shard_path
from histonb.slides.tiling import tile_cohort
from histonb.synthetic.phantom import draw_slide, write_cohort
from histonb.synthetic.writing import write_slide

REAL = Path(__file__).parents[2] / "shared/data"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = write_cohort(tmp_path_factory.mktemp("store") / "cohort", n_slides=2, seed=2, shape=(1800, 1400), workers=1)
    cohort = panda(root)
    tile_cohort(cohort, root.parent / "tiles")
    return root.parent / "tiles", dict(zip(cohort.slides.slide, cohort.slides.image, strict=True))


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((np.stack(a).astype(float) - np.stack(b)) ** 2)))


def grid(slide):
    (h, w) = slide.shapes[0]
    return [slide.read(x, y, 224, 224) for y in range(0, h - 223, 224) for x in range(0, w - 223, 224)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tile": 256, "shared_tables": False},
        {"photometric": "rgb"},
        {"subsampling": (1, 1)},
        {"subsampling": (2, 1)},
        {"quality": 90},
        {"compression": "lzw"},
    ],
    ids=str,
)
def test_stored_tiles_are_the_slide_s(tmp_path, options):
    write_slide(tmp_path / "a.tiff", draw_slide(seed=4, shape=(1120, 1120)).image, **options)
    with open_slide(tmp_path / "a.tiff") as slide:
        tiles = grid(slide)
        encode = jpeg_encoder(slide.jpeg_source(0))
    jpegs = [encode(t) for t in tiles]
    back = [imagecodecs.jpeg8_decode(j) for j in jpegs]
    assert psnr(tiles, back) > (45 if options.get("compression") else 55)
    if not options:
        assert np.mean([len(j) for j in jpegs]) < 10_000  # 4:2:0


def test_tables_of_no_standard_quality():
    tile = draw_slide(seed=4, shape=(512, 512)).image[:224, :224].copy()
    tables = [[min(255, 3 + (i + j) * k) for i in range(8) for j in range(8)] for k in (2, 3)]
    for source in (JpegSource(tables, "4:2:0", "YCbCr"), JpegSource(tables[:1], "4:4:4", "RGB")):
        encode = jpeg_encoder(source)
        once = imagecodecs.jpeg8_decode(encode(tile))  # what a slide with such tables holds
        assert 25 < psnr([tile], [once]) < 50 < 55 < psnr([once], [imagecodecs.jpeg8_decode(encode(once))])


@pytest.mark.skipif(not (REAL / "panda").exists(), reason="no ../shared/data/panda")
def test_the_real_slide_keeps_its_pixels():
    path = next((REAL / "panda/train_images").glob("*.tiff"))
    with open_slide(path) as slide:
        encode = jpeg_encoder(slide.jpeg_source(0))
    pixels = tifffile.imread(path, key=0)
    tiles = [
        np.ascontiguousarray(pixels[y : y + 224, x : x + 224]) for y in range(0, 7456, 224) for x in range(0, 1824, 224)
    ]
    tiles = [t for t in tiles if (t > 230).mean() < 0.5]
    assert psnr(tiles, [imagecodecs.jpeg8_decode(encode(t)) for t in tiles]) > 55


def test_many_processes_read_what_one_does(store):
    folder, slides = store
    shards = TileShards(folder)
    raw = SlideTiles(shards.table, slides)
    assert len(shards) == len(raw) == shards.table.kept.sum() > 20
    shards[0], raw[0]  # files are open in the parent before the workers start
    for dataset in (shards, raw):
        alone = [dataset[i] for i in range(len(dataset))]
        for context in ("fork", "spawn"):
            loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context=context)
            images, labels = (
                np.concatenate(part) for part in zip(*((i.numpy(), y.numpy()) for i, y in loader), strict=True)
            )
            assert np.array_equal(images, np.stack([i for i, _ in alone])) and labels.tolist() == [y for _, y in alone]
    assert psnr([shards[i][0] for i in range(len(shards))], [raw[i][0] for i in range(len(raw))]) > 55
    assert shards.labels.tolist() == shards.table.label.tolist()


def test_rows_transform_and_pickle(store):
    folder, slides = store
    table = TileShards(folder).table.iloc[[7, 3, 7]]
    for dataset in (TileShards(folder, table, transform=np.mean), SlideTiles(table, slides, transform=np.mean)):
        assert len(dataset) == 3 and dataset[0] == dataset[2] != dataset[1]
        assert dataset[-1] == dataset[2]
        with pytest.raises(IndexError):
            dataset[3]
        assert pickle.loads(pickle.dumps(dataset))[1] == dataset[1]
    with pytest.raises(BadInput, match="path is not given"):
        SlideTiles(table, {})


def test_resampled_tiles(store, tmp_path):
    folder, slides = store
    cohort = panda(folder.parent / "cohort")
    tile_cohort(cohort, tmp_path / "coarse", TileRule(mpp=0.8))
    shards = TileShards(tmp_path / "coarse")
    raw = SlideTiles(shards.table, slides)
    assert psnr([shards[i][0] for i in range(len(shards))], [raw[i][0] for i in range(len(raw))]) > 45


def test_damage_is_named(store, tmp_path):
    folder, _ = store
    table = TileShards(folder).table
    whole = shard_path(folder, 0).read_bytes()
    copy = shard_path(tmp_path, 0)
    table.assign(kept=True).to_parquet(tmp_path / "tiles.parquet")
    with pytest.raises(BadInput, match="shard-00000.tiles: the shard is missing"):
        TileShards(tmp_path).check()
    at = int(table.offset[9] + table.nbytes[9] // 2)
    copy.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    damaged = TileShards(tmp_path)
    damaged[8], damaged[10]  # their neighbours are whole
    with pytest.raises(BadInput, match="shard-00000.tiles: damaged"):
        damaged[9]
    with pytest.raises(BadInput, match="shard-00000.tiles: damaged"):
        damaged.check()
    copy.write_bytes(whole[:-1])
    with pytest.raises(BadInput, match="shard-00000.tiles: truncated"):
        TileShards(tmp_path).check()
    copy.write_bytes(b"")
    with pytest.raises(BadInput, match="shard-00000.tiles: truncated"):
        TileShards(tmp_path)[0]
    copy.write_bytes(whole)
    assert TileShards(tmp_path).check() == len(table)
    with pytest.raises(BadInput, match="no tile table"):
        TileShards(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="1 of 1 tiles of the table are not stored"):
        TileShards(tmp_path, pd.DataFrame(table[:1]).assign(shard=-1))


def damaged_tables(table):
    "What befalls a tile table: name -> how the file is written."
    columns = {f"without {name}": table.drop(columns=name) for name in ("kept", "shard", "offset", "nbytes", "label")}
    wrong = {
        "kept as text": table.assign(kept="yes"),
        "offsets with decimals": table.assign(offset=table.offset + 0.5),
        "labels by name": table.assign(label="gleason3"),
        "x of nothing": table.assign(x=np.nan),
        "mpp as text": table.assign(mpp="0.5"),
        "before its shard": table.assign(offset=-5),
        "nothing in it": table.assign(nbytes=0),
        "another table": pd.DataFrame({"slide": ["a"], "emptiness": [0.5]}),
    }
    return {name: t.to_parquet for name, t in (columns | wrong).items()}


@pytest.fixture
def copy(store, tmp_path):
    "A store of its own, and the bytes of its table."
    for path in store[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "name", damaged_tables(pd.DataFrame({c: [0] for c in ("kept", "shard", "offset", "nbytes", "label", "mpp", "x")}))
)
def test_a_table_that_is_no_tile_table_is_refused(copy, name):
    table = pd.read_parquet(copy / "tiles.parquet")
    damaged_tables(table)[name](copy / "tiles.parquet")
    for read in (TileShards, read_tiles):
        with pytest.raises(BadInput) as e:
            read(copy)
        assert e.value.path == str(copy / "tiles.parquet") and e.value.fault and e.value.remedy
    if name.startswith("without") and name != "without kept":
        with pytest.raises(BadInput, match=f"no column `{name.split()[1]}` in this tile table"):
            TileShards(copy, pd.read_parquet(copy / "tiles.parquet"))


def test_a_table_that_is_damaged_anywhere_is_refused(copy):
    "Cut short, garbage, another kind of file, a folder; and one bit flipped in any page."
    path = copy / "tiles.parquet"
    rng = np.random.default_rng(0)
    whole = path.read_bytes()
    right = read_tiles(copy)
    for data in (
        b"",
        whole[:-1],
        whole[: len(whole) // 2],
        whole[4:],
        b"PAR1" + bytes(2000) + b"PAR1",
        b"<html>not found</html>" * 50,
        b"slide,x,y\na,0,0\n",
    ):
        path.write_bytes(data)
        with pytest.raises(BadInput, match="tiles.parquet: unreadable as a Parquet table"):
            TileShards(copy)
    refused = 0
    for at in rng.integers(4, len(whole) - 8, 60).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
        try:
            assert read_tiles(copy).equals(right), at  # what nobody reads, such as statistics
        except BadInput as e:
            refused += e.path == str(path)
    assert refused > 30
    path.unlink()
    path.mkdir()
    with pytest.raises(BadInput, match="there is no tile table here"):
        TileShards(copy)


def test_further_columns_are_asked_for_by_name(copy):
    assert TileShards(copy, columns=["slide", "f0"]).table["f0"].notna().all()
    with pytest.raises(BadInput, match="no column `cases` in this tile table. Did you mean `case`"):
        TileShards(copy, columns=["cases"])
    table = pd.read_parquet(copy / "tiles.parquet")
    with pytest.raises(BadInput, match="no column `level`"):
        SlideTiles(table.drop(columns="level"), dict.fromkeys(table.slide, "x"))


def test_places_beyond_a_shard_are_refused_before_memory_is_asked_for(copy):
    table = TileShards(copy).table
    for change in ({"nbytes": 2**40}, {"offset": 2**62}, {"shard": 7}):
        with pytest.raises(BadInput, match="truncated|the shard is missing"):
            TileShards(copy, table.assign(**change))[0]


def test_a_tile_that_is_no_jpeg_is_named(tmp_path):
    shard_path(tmp_path, 0).write_bytes(pack(b"no JPEG"))
    table = pd.DataFrame({"shard": [0], "offset": [0], "nbytes": [7], "label": [1]})
    with pytest.raises(BadInput, match="tile 0 cannot be decoded"):
        TileShards(tmp_path, table)[0]


def test_other_files_beside_shards_are_left_alone(tmp_path):
    for name in ("shard-00000.tiles", "shard-00001.tiles", "shard-copy.tiles"):
        (tmp_path / name).write_bytes(b"12345")
    ShardWriter(tmp_path, {0: 3})
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {"shard-00000.tiles": 3, "shard-copy.tiles": 5}
