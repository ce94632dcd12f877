"Encoders and cached features: equal to the plain forward pass, right keys, damage found, input that must be refused."

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from histonb.core.errors import BadInput
from histonb.core.files import read_json
from histonb.models import backbones
from histonb.probe.encoders import load_encoder
from histonb.probe.features import cache_paths, extract, extract_all, load_features, tiles_key

NANO = "xcit_nano_12_p16_224"


class Tiles:
    "Random tiles with a table, counting what is read."

    def __init__(self, n=20, seed=0, transform=None, size=32):
        self.images = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        self.table = pd.DataFrame(
            {
                "slide": [f"s{i % 3}" for i in range(n)],
                "x": np.arange(n) * size,
                "y": 0,
                "level": 0,
                "mpp": 0.5,
                "label": 1,
            }
        )
        self.transform, self.reads = transform, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.reads += 1
        return self.images[i] if self.transform is None else self.transform(self.images[i]), 1


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def colour():
    return load_encoder("colour")


@pytest.fixture(scope="module")
def nano():
    return load_encoder(f"random:{NANO}")


# encoders


def test_encoder_equals_the_plain_forward_pass(nano):
    tiles = Tiles(6, size=64).images
    mean = torch.tensor(nano.spec.mean).view(3, 1, 1)
    std = torch.tensor(nano.spec.std).view(3, 1, 1)
    with torch.inference_mode():
        theirs = nano.model((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std)
    ours = nano(tiles)
    assert ours.dtype == np.float32 and ours.shape == (6, nano.spec.dim) and np.allclose(ours, theirs, atol=1e-5)
    assert nano.spec.random_init and nano.spec.patch == 16 and nano.spec.prefix_tokens == 1
    assert not nano.model.training and not any(p.requires_grad for p in nano.model.parameters())


def test_bf16_is_close_and_has_another_key(nano):
    half = load_encoder(f"random:{NANO}", bf16=True)
    tiles = Tiles(4, size=64).images
    assert half(tiles).dtype == np.float32 and half.key != nano.key
    assert np.allclose(half(tiles), nano(tiles), atol=0.1) and not np.array_equal(half(tiles), nano(tiles))


def test_colour_knows_no_structure(colour):
    tiles = Tiles(3).images
    shuffled = np.stack([np.random.default_rng(0).permutation(t.reshape(-1, 3)).reshape(t.shape) for t in tiles])
    assert np.allclose(colour(tiles), colour(shuffled), atol=1e-5)
    flat = colour(np.full((1, 8, 8, 3), 255, np.uint8))[0]
    assert np.allclose(flat[:6], [1, 1, 1, 0, 0, 0], atol=1e-6) and np.allclose(flat[6:].reshape(3, 16)[:, 0], 1)
    assert not colour.spec.random_init and colour.spec.dim == 54


def test_saved_backbone_brings_its_weights_and_normalisation(nano, tmp_path):
    backbones.save_backbone(nano.model, tmp_path / "run", NANO, mean=(0.7, 0.6, 0.7), std=(0.2, 0.3, 0.2))
    a = load_encoder(f"run:{tmp_path / 'run'}")
    b = load_encoder(str(tmp_path / "run"))
    c = load_encoder("dino", checkpoint=tmp_path / "run")
    assert a.key == b.key == c.key != nano.key and c.spec.name == "dino"
    assert c.spec.mean == (0.7, 0.6, 0.7) and c.spec.std == (0.2, 0.3, 0.2) and not c.spec.random_init
    for x, y in zip(nano.model.parameters(), c.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_key_follows_every_weight(nano):
    other = load_encoder(f"random:{NANO}")
    assert other.key == nano.key and load_encoder(f"random:{NANO}", seed=1).key != nano.key
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1e-3
    assert type(other)(other.spec, other.model, NANO).key != nano.key


@pytest.mark.parametrize(
    "name, says",
    [
        ("color", "Did you mean `colour`"),
        ("random:xcit_nano_12_p61_224", "xcit_nano_12_p16_224"),
        (NANO, f"Use `random:{NANO}`"),
        ("run:no/such/folder", "no/such/folder"),
        ("something else", "Choose one of"),
    ],
)
def test_unknown_encoders_are_named(name, says):
    with pytest.raises(BadInput) as e:
        load_encoder(name)
    assert says in str(e.value)


@pytest.mark.parametrize(
    "batch", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)]
)
def test_batches_of_another_kind_are_refused(colour, batch):
    with pytest.raises(BadInput, match="uint8 of shape"):
        colour(batch)


# features


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_features_in_order_whatever_the_batch(colour, workers, batch_size):
    expected = np.concatenate([colour(i[None]) for i in Tiles().images])
    assert np.allclose(extract(Tiles(), colour, batch_size=batch_size, workers=workers), expected, atol=1e-5)


def test_cache_is_used_and_is_the_same(colour, tmp_path):
    plain = extract(Tiles(), colour)
    first = extract(Tiles(), colour, tmp_path)
    again = Tiles()
    assert np.array_equal(extract(again, colour, tmp_path), plain) and np.array_equal(first, plain)
    assert again.reads < len(again)  # only what makes the key
    path = cache_paths(Tiles(), [colour], tmp_path)[0]
    assert np.array_equal(np.load(path), plain)
    record = read_json(path.with_suffix(".json"))
    table = pd.read_parquet(path.with_suffix(".parquet"))
    assert (
        record["shape"] == [20, 54]
        and record["encoder"]["name"] == "colour"
        and record["encoder"]["random_init"] is False
    )
    assert table[["slide", "x"]].equals(Tiles().table[["slide", "x"]])
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".npy", ".parquet"]


def test_random_init_reaches_the_record(nano, tmp_path):
    extract(Tiles(3), nano, tmp_path)
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["encoder"]["random_init"] is True


def test_key_follows_tiles_and_transform_but_not_labels():
    base = tiles_key(Tiles())

    def with_table(**columns):
        tiles = Tiles()
        tiles.table = tiles.table.assign(**columns)
        return tiles_key(tiles)

    assert with_table(label=3, split="test") == base
    shuffled = Tiles()
    shuffled.table = shuffled.table.iloc[::-1].reset_index(drop=True)
    others = [
        with_table(slide="x"),
        with_table(x=0),
        with_table(mpp=0.25),
        tiles_key(Tiles(seed=1)),
        tiles_key(Tiles(19)),
        tiles_key(Tiles(transform=lambda t: 255 - t)),
        tiles_key(shuffled),
    ]
    assert len({base, *others}) == 8


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:-2] + b"zz"),
        lambda p: np.save(p, np.zeros((20, 54), np.float32)),
        lambda p: np.save(p, np.zeros((19, 54), np.float32)),
        lambda p: p.unlink(),
        lambda p: p.with_suffix(".json").unlink(),
        lambda p: p.with_suffix(".json").write_text("{}"),
        lambda p: p.with_suffix(".json").write_text("{"),
    ],
)
def test_damage_is_found_said_and_mended(colour, tmp_path, capsys, spoil):
    plain = np.array(extract(Tiles(), colour, tmp_path))
    spoil(cache_paths(Tiles(), [colour], tmp_path)[0])
    tiles = Tiles()
    assert np.array_equal(extract(tiles, colour, tmp_path), plain)
    assert "computing the features again" in capsys.readouterr().out and tiles.reads > len(tiles)
    again = Tiles()
    extract(again, colour, tmp_path)
    assert again.reads < len(again)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_goes_on(nano, tmp_path, error):
    class Breaks(Tiles):
        def __getitem__(self, i):
            if self.reads > 22:
                raise error
            return super().__getitem__(i)

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        extract(Breaks(), nano, tmp_path, batch_size=4)
    (part,) = tmp_path.iterdir()
    assert part.suffix == ".part"
    with open(part, "ab") as f:
        f.write(b"half a row")  # as a kill would leave it
    tiles = Tiles()
    assert np.array_equal(extract(tiles, nano, tmp_path, batch_size=4), extract(Tiles(), nano, batch_size=4))
    assert tiles.reads == 9 + 20 - 12 and not list(tmp_path.glob("*.part"))  # the key reads nine


def test_spoilt_part_is_begun_again(nano, tmp_path):
    (path,) = cache_paths(Tiles(), [nano], tmp_path)
    path.with_suffix(".part").write_bytes(b"no header")
    assert np.array_equal(extract(Tiles(), nano, tmp_path), extract(Tiles(), nano))


def test_two_processes_and_one_cache(nano, tmp_path):
    """The second waits, then takes what the first has made."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); torch.set_num_threads(1)\n"
        "from test_features import *\nnano = load_encoder(f'random:{NANO}')\n"
        "print('ready', flush=True); sys.stdin.readline(); tiles = Tiles(120)\n"
        "np.save(sys.argv[3], extract(tiles, nano, sys.argv[1], batch_size=4)); print(tiles.reads)"
    )

    def start(i):
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                code,
                str(tmp_path / "cache"),
                os.path.dirname(__file__),
                str(tmp_path / f"{i}.npy"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    processes = [start(i) for i in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    said = []
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        said.append(process.communicate(timeout=120)[0])
    right = extract(Tiles(120), nano, batch_size=4)
    for i in range(2):
        assert np.array_equal(np.load(tmp_path / f"{i}.npy"), right)
    assert sorted(int(s.split()[-1]) for s in said) == [
        9,
        129,
    ]  # one read them all, the other no more than its key wants
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".json", ".npy", ".parquet"]


def test_the_same_encoder_twice_does_not_wait_for_itself(nano, tmp_path):
    a, b = extract_all(Tiles(), [nano, nano], tmp_path)
    assert np.array_equal(a, b)


def test_damaged_features_are_never_served(nano, tmp_path):
    tiles = Tiles()
    extract(tiles, nano, tmp_path)
    (path,) = cache_paths(tiles, [nano], tmp_path)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    right = np.array(load_features(path, tiles.table))
    rng = np.random.default_rng(0)
    served = 0
    for p, data in files.items():
        for _ in range(16):
            at = int(rng.integers(len(data)))
            p.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
            try:
                found = load_features(path, tiles.table)
            except BadInput:
                continue
            finally:
                p.write_bytes(data)
            served += p.suffix == ".npy"
            assert np.array_equal(found, right)  # where the record's remarks were hit
    assert not served


def test_one_pass_for_several_encoders(nano, colour, tmp_path):
    class Breaks(Tiles):
        def __getitem__(self, i):
            if self.reads > 22:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    tokens = load_encoder(f"random:{NANO}", pool="patch")
    with pytest.raises(KeyboardInterrupt):
        extract(Breaks(), colour, tmp_path, batch_size=4)  # one of the three is further than the others
    tiles = Tiles()
    found = extract_all(tiles, [nano, colour, tokens], tmp_path, batch_size=4)
    assert tiles.reads == 9 + 20
    for a, encoder in zip(found, [nano, colour, tokens], strict=True):
        assert np.allclose(a, extract(Tiles(), encoder, batch_size=4), atol=2e-3)
    assert found[2].dtype == np.float16 and found[2].shape == (20, 4, 128)


def test_memory_does_not_grow_with_the_cohort(tmp_path):
    "The features are never held: only what is written to the file."
    import tracemalloc

    class Wide:
        key = "wide"
        spec = load_encoder("colour").spec.__class__("wide", 20_000, None, (0,) * 3, (1,) * 3, 0, None, False)

        def to(self, device):
            return self

        def __call__(self, tiles):
            return np.zeros((len(tiles), 20_000), np.float32)

    tracemalloc.start()
    out = extract(Tiles(600, size=4), Wide(), tmp_path, batch_size=8)  # 48 MB of features, .6 MB a batch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.nbytes == 48_000_000 and peak < 12_000_000


def test_bad_input_is_named(colour, tmp_path):
    rng = np.random.default_rng(0)
    cases = {
        "there is none": Tiles(0),
        "another image each time": Tiles(transform=lambda t: t ^ rng.integers(0, 9, t.shape, np.uint8)),
        "uint8 (H,W,3)": Tiles(transform=lambda t: t / 255),
        "sizes differ": Tiles(transform=lambda t: t[:16] if t[0, 0, 0] % 2 else t),
    }
    for says, tiles in cases.items():
        with pytest.raises(BadInput) as e:
            extract(tiles, colour, tmp_path)
        assert says in str(e.value)
    bare = Tiles()
    del bare.table
    with pytest.raises(BadInput, match="without a cache"):
        extract(bare, colour, tmp_path)
    assert extract(bare, colour).shape == (20, 54)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("harm", ["archive", "surrogate", "list"])
def test_features_beside_damaged_records_are_computed_again(colour, tmp_path, harm, capsys):
    right = np.array(extract(Tiles(), colour, tmp_path))
    (path,) = cache_paths(Tiles(), [colour], tmp_path)
    record = read_json(path.with_suffix(".json"))
    if harm == "archive":
        with open(path, "wb") as f:
            np.savez(f, a=right)
    else:
        path.with_suffix(".json").write_text(json.dumps([] if harm == "list" else record | {"dtype": "\ud800"}))
    with pytest.raises(BadInput):
        load_features(path, Tiles().table)
    assert np.array_equal(extract(Tiles(), colour, tmp_path), right) and capsys.readouterr().out.encode()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (20, 54",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (21, 54), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (20, 0), }",
        "{",
    ],
)
def test_a_part_with_a_damaged_header_is_begun_anew(colour, tmp_path, header):
    right = np.array(extract(Tiles(), colour, tmp_path, batch_size=4))
    (path,) = cache_paths(Tiles(), [colour], tmp_path)
    data = path.read_bytes()
    for p in tmp_path.iterdir():
        p.unlink()
    path.with_suffix(".part").write_bytes(
        data[:10] + header.encode().ljust(len(data) - right.nbytes - 11) + b"\n" + data[-right.nbytes : -20 * 54]
    )
    assert np.array_equal(extract(Tiles(), colour, tmp_path, batch_size=4), right)


def test_a_part_of_other_features_is_refused(colour, tmp_path):
    extract(Tiles(), colour, tmp_path, batch_size=4)
    (path,) = cache_paths(Tiles(), [colour], tmp_path)
    path.with_suffix(".part").write_bytes(path.read_bytes()[: -14 * 54 * 4].replace(b"54)", b"27)"))
    path.unlink()
    with pytest.raises(BadInput, match="those that follow are of"):
        extract(Tiles(), colour, tmp_path, batch_size=4)
