"Curation: what is planted is found and nothing else, caps hold exactly, files equal memory, bad input is named."

import numpy as np
import pandas as pd
import pytest
import torch

from histonb.core.errors import BadInput
from histonb.curate.clusters import UnitRows, cluster_levels, hierarchy, kmeans, moments, neighbours
from histonb.curate.curation import balanced_sample, cap_slides, components, curate, near_duplicates, rank_in_group
from histonb.datasets.example import example_tiles
from histonb.datasets.images import join_stores, store_with
from histonb.slides.tile_store import TileShards

pytestmark = pytest.mark.usefixtures("one_thread")


def planted(n=600, copies=60, dim=48, seed=0):
    "Rows of far apart directions, then near-copies of the first of them; float16."
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim))
    return np.concatenate([x, x[:copies] + 0.1 * rng.standard_normal((copies, dim))]).astype(np.float16)


def tile_table(n=660, tested=0, slides=12):
    return pd.DataFrame(
        {
            "slide": [f"s{i % slides}" for i in range(n)],
            "kept": True,
            "split": np.where(np.arange(n) < tested, "test", "train"),
        }
    )


def entropy(cluster):
    p = np.bincount(cluster) / len(cluster)
    return -(p[p > 0] * np.log(p[p > 0])).sum()


@pytest.mark.parametrize("cells", [1, 40])
def test_planted_duplicates_and_only_those(cells):
    x = planted()
    of, cosine = near_duplicates(x, 0.95, cells)
    gone = np.flatnonzero(of >= 0)
    assert {frozenset((int(i), int(of[i]))) for i in gone} == {frozenset((i, 600 + i)) for i in range(60)}
    unit = UnitRows(x)[:]
    assert np.allclose(cosine[gone], (unit[gone] * unit[of[gone]]).sum(1), atol=1e-5) and cosine[gone].min() >= 0.95


def test_identical_rows_reach_one():
    x = np.repeat(planted(20, 0), 5, 0)
    of, cosine = near_duplicates(x, 1)
    assert (of < 0).sum() == 20 and np.allclose(cosine[of >= 0], 1, atol=1e-5)
    assert (np.bincount(components(x, 1), minlength=20) == 5).all()
    assert (components(x, 1, cells=7)[:, None] == components(x, 1, cells=7)).sum() == 20 * 25


def test_many_equal_rows_take_blocks(monkeypatch):
    "Blocks of a few rows find what one block finds."
    x = planted(300, 40)
    whole = near_duplicates(x, 0.95)[0]
    monkeypatch.setattr("histonb.curate.curation.MAX_COSINES", 1000)
    assert np.array_equal(near_duplicates(x, 0.95)[0], whole)


def test_neighbours_are_exact_across_blocks(monkeypatch):
    x = planted()
    s = UnitRows(x)[:] @ UnitRows(x)[:].T
    monkeypatch.setattr("histonb.curate.clusters.ROWS", 100)
    index, cosine = neighbours(x, x, 4)
    assert np.allclose(cosine, -np.sort(-s, 1)[:, :4], atol=1e-5)
    assert np.allclose(np.take_along_axis(s, index, 1), cosine, atol=1e-5)
    assert (neighbours(x, x)[0][:, 0] == np.arange(660)).all()


def test_clusters_are_whole_nested_and_even_at_odds():
    centres = np.random.default_rng(0).standard_normal((3, 16))
    kind = np.repeat([0, 1, 2], [400, 40, 4])
    x = centres[kind] + 0.05 * np.random.default_rng(1).standard_normal((444, 16))
    cluster = neighbours(x, kmeans(x, 3, seed=0))[0][:, 0]
    assert pd.crosstab(kind, cluster).to_numpy().astype(bool).sum() == 3  # the rare kind has a cluster of its own
    found, (fine, coarse) = hierarchy(np.repeat(x[:50], 9, 0), (60, 6))  # fewer different rows than clusters
    assert np.array_equal(np.unique(fine), np.arange(len(found))) and len(found) <= 50
    assert (pd.DataFrame({"fine": fine, "coarse": coarse}).groupby("fine").coarse.nunique() == 1).all()
    assert cluster_levels(1_000_000) == (10000, 1000) and cluster_levels(1) == (1, 1)


def test_turns_caps_and_balance_by_hand():
    assert rank_in_group(np.array([1, 0, 1, 1, 0]), np.array([5, 1, 3, 4, 0])).tolist() == [2, 1, 0, 1, 0]
    three = np.repeat([0, 1, 2], [10, 4, 1])
    assert np.bincount(three[balanced_sample([three], 7)]).tolist() == [3, 3, 1]
    four = np.repeat([0, 1, 2, 3], 10)
    assert np.bincount(four[balanced_sample([four, (four > 0).astype(int)], 12)]).tolist() == [6, 2, 2, 2]
    rng = np.random.default_rng(0)
    slide = rng.integers(0, 9, 2000)
    cluster = rng.integers(0, 30, 2000)
    keep = cap_slides(slide, cluster, 50, 3)
    assert pd.Series(slide[keep]).value_counts().max() == 50
    assert pd.DataFrame({"slide": slide, "cluster": cluster})[keep].value_counts().max() <= 3
    assert np.bincount(cluster[cap_slides(slide, cluster, per_cluster=1)]).max() <= 9


def test_balance_is_flatter_than_chance():
    rng = np.random.default_rng(0)
    cluster = rng.choice(50, 5000, p=(p := 1 / np.arange(1, 51)) / p.sum())
    chance = rng.permutation(5000) < 800
    keep = balanced_sample([cluster], 800)
    assert keep.sum() == 800 and entropy(cluster[keep]) > entropy(cluster[chance]) + 0.3
    kept = np.bincount(cluster[keep], minlength=50)
    there = np.bincount(cluster, minlength=50)
    assert (kept[kept < there] >= kept.max() - 1).all()  # whoever is cut is cut to one level


def test_no_evaluation_twin_is_left():
    x = planted()
    curated = curate(tile_table(tested=40), x, duplicate=0.95, leak=0.9)
    assert set(curated.index[curated.dropped == "near evaluation"]) == set(range(600, 640))
    assert (curated.duplicate_of[600:640] == np.arange(40)).all()
    assert (
        set(curated.index[curated.dropped == "duplicate"]) <= {*range(40, 60), *range(640, 660)}
        and (curated.dropped == "duplicate").sum() == 20
    )
    tested = curated.split == "test"
    assert curated.kept[tested].all() and (curated.dropped[tested] == "").all()
    unit = UnitRows(x)[:]
    assert (unit[curated.kept & ~tested] @ unit[tested].T).max() < 0.9
    apart = curate(tile_table(), x, evaluation=x[600:610], duplicate=None, leak=0.9)
    assert (apart.duplicate_of[:10] == 660 + np.arange(10)).all() and (apart.dropped == "near evaluation").sum() == 20
    assert (curate(tile_table(tested=40), x, duplicate=None, leak=None).dropped == "").all()


def test_caps_hold_in_the_table_and_the_target_is_met():
    x = planted()
    table = tile_table(tested=60, slides=7)
    curated = curate(table, x, per_slide=50, per_cluster=6, target=200, levels=(12, 3))
    training = curated[curated.kept & (curated.split == "train")]
    assert (
        len(training) == 200
        and training.slide.value_counts().max() <= 50
        and training[["slide", "cluster"]].value_counts().max() <= 6
    )
    assert set(curated.dropped) == {"", "near evaluation", "slide cap", "balanced away"}
    assert (curated.kept == (curated.dropped == "")).all() and (curated[["cluster", "cluster1"]] >= 0).all(axis=None)
    case = curate(table.assign(case=table.slide.str[1].astype(int) // 4), x, slide="case", per_slide=20)
    assert case[case.kept & (case.split == "train")].case.value_counts().max() <= 20


def test_dropped_before_stays_dropped():
    x = planted()
    table = tile_table()
    table.loc[600:, "kept"] = False
    curated = curate(table, x)
    assert (
        not curated.kept[600:].any()
        and (curated.dropped == "").all()
        and (curated.cluster[600:] == -1).all()
        and curated.kept[:600].all()
    )


def test_memory_map_of_float16_equals_memory_and_runs_repeat(tmp_path):
    x = planted()
    table = tile_table(tested=40)
    np.save(tmp_path / "x.npy", x)
    options = dict(per_slide=40, target=300, levels=(20, 4), standardise=True)
    curated = curate(table, np.load(tmp_path / "x.npy", mmap_mode="r"), **options)
    pd.testing.assert_frame_equal(curated, curate(table, x.astype(np.float32), **options))
    assert not curated.kept.equals(curate(table, x, **options, seed=1).kept)


def test_moments_survive_a_large_mean():
    x = np.random.default_rng(0).standard_normal((5000, 3)).astype(np.float32) + np.float32(1000)
    mean, std = moments(x)
    assert np.allclose(mean, x.astype(np.float64).mean(0)) and np.allclose(std, x.astype(np.float64).std(0), rtol=1e-4)
    assert torch.from_numpy(UnitRows(x, (mean, std))[:]).norm(dim=1).allclose(torch.ones(5000))


X = planted(40, 0)
NAN, ZERO = (np.where(np.arange(40)[:, None] == 7, v, X) for v in (np.nan, 0))


@pytest.mark.parametrize(
    "table, features, options, message",
    [
        (tile_table(41), X, {}, "40 rows, the table has 41"),
        (tile_table(40), NAN, {}, "NaN or infinite values in row 7"),
        (tile_table(40), ZERO, {}, "nothing but zeros in row 7"),
        (tile_table(40), X[:, 0], {}, "expected an array"),
        (tile_table(40), X, {"levels": (41,)}, "41 are wanted of 40 tiles"),
        (tile_table(40), X, {"levels": (4, 8)}, "do not fall"),
        (tile_table(40), X, {"duplicate": 1.01}, "duplicate: 1.01 is no cosine"),
        (tile_table(40), X, {"leak": -1}, "leak: -1 is no cosine"),
        (tile_table(40), X, {"slide": "slides"}, "Did you mean `slide`?"),
        (tile_table(40)[:0], X[:0], {}, "it has no rows"),
        (tile_table(40, tested=40), X, {}, "no kept tile is for training"),
        (tile_table(40, tested=4), X, {"leak": -0.999}, "nothing is left"),
        (tile_table(40), X, {"evaluation": X[:, :9]}, "48 numbers a tile against 9"),
        (tile_table(40), X, {"evaluation": NAN}, "evaluation: NaN"),
        (tile_table(40), X, {"per_slide": -1}, "0 is no limit"),
    ],
)
def test_bad_input_is_named(table, features, options, message):
    with pytest.raises(BadInput, match=message):
        curate(table, features, **options)


@pytest.mark.filterwarnings("ignore:label . occurs")
def test_store_with_another_table_shares_its_pixels(tmp_path):
    tiles = example_tiles(tmp_path / "example", n_slides=3, shape=(768, 768), workers=1)
    table = pd.read_parquet(tiles / "tiles.parquet")
    half = table.assign(kept=table.kept & (table.index % 2 == 0), dropped="")
    store_with(half, tiles, tmp_path / "half")
    served = TileShards(tmp_path / "half")
    assert len(served) == half.kept.sum() and served.check() == len(served)
    assert (tmp_path / "half/shard-00000.tiles").samefile(tiles / "shard-00000.tiles")
    assert set(curate(tile_table(40).assign(why=""), X, per_slide=2).query("~kept").why) == {"curated"}
    with pytest.raises(BadInput, match="is one of the stores"):
        join_stores([tiles, tmp_path / "half"], tiles)
    with pytest.raises(BadInput, match="is the store itself"):
        store_with(half, tiles, tiles)
    assert TileShards(tiles).check() == table.kept.sum()
