"Metrics of objects: their definitions as plain loops, an independent implementation, and input that is refused."

import json

import cellseg_metrics
import numpy as np
import pytest
from scipy.spatial.distance import directed_hausdorff

from histonb.core.errors import BadInput
from histonb.metrics import objects as o


def random_map(rng, shape=(40, 50), n=12, gaps=True):
    "Rectangles over one another, with numbers that have gaps."
    ids = np.zeros(shape, int)
    for k in rng.permutation(60)[:n] + 1 if gaps else range(1, n + 1):
        y = rng.integers(0, shape[0] - 4)
        x = rng.integers(0, shape[1] - 4)
        ids[y : y + rng.integers(2, 12), x : x + rng.integers(2, 12)] = k
    return ids


def moved(rng, ids):
    "Another map that overlaps the first one in many ways."
    out = np.roll(ids, tuple(rng.integers(-2, 3, 2)), (0, 1))
    out[np.isin(out, rng.choice(np.unique(out), 3))] = rng.choice([0, 77])
    return np.where(rng.random() < 0.5, np.maximum(out, random_map(rng, ids.shape, 3)), out)


def masks(ids):
    return [ids == k for k in np.unique(ids[ids > 0])]


def aji(truth, predicted):
    "Kumar et al. 2017, algorithm 1."
    T = masks(truth)
    P = masks(predicted)
    used = set()
    both = 0
    union = 0
    for t in T:
        ious = [(t & p).sum() / (t | p).sum() for p in P]
        if not ious or max(ious) == 0:
            union += t.sum()
            continue
        j = int(np.argmax(ious))
        both = both + (t & P[j]).sum()
        union = union + (t | P[j]).sum()
        used.add(j)
    return both / (union + sum(p.sum() for j, p in enumerate(P) if j not in used))


def glas(truth, predicted):
    "F1, object Dice and object Hausdorff distance as the contest defined them."
    T = masks(truth)
    P = masks(predicted)

    def far(a, b):
        a, b = np.argwhere(a), np.argwhere(b)
        return max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])

    def partner(mask, others):
        return max(others, key=lambda other: (mask & other).sum(), default=None)

    hits = sum((t := partner(p, T)) is not None and (p & t).sum() > 0.5 * t.sum() for p in P)
    dice = []
    distance = []
    for mine, others in ((T, P), (P, T)):
        area = sum(m.sum() for m in mine)
        for m in mine:
            k = partner(m, others)
            dice.append(m.sum() / area * 2 * (m & k).sum() / (m.sum() + k.sum()))
            distance.append(m.sum() / area * (far(m, k) if (m & k).any() else min(far(m, other) for other in others)))
    return 2 * hits / (len(T) + len(P)), sum(dice) / 2, sum(distance) / 2


@pytest.mark.parametrize("seed", range(12))
def test_figures_are_their_definitions_written_as_loops(seed):
    rng = np.random.default_rng(seed)
    truth = random_map(rng)
    predicted = moved(rng, truth)
    f = o.metrics_from_sums(o.object_sums(o.pair_counts(truth, predicted, hausdorff=True)))
    assert f["aji"] == pytest.approx(aji(truth, predicted), abs=1e-12)
    assert (f["glas_f1"], f["object_dice"], f["object_hausdorff"]) == pytest.approx(glas(truth, predicted), abs=1e-9)
    assert f["dice"] == pytest.approx(
        2 * ((truth > 0) & (predicted > 0)).sum() / ((truth > 0).sum() + (predicted > 0).sum())
    )
    theirs = cellseg_metrics.panoptic_quality(
        truth, predicted
    )  # adds 1e-8 below the line, so that no hits give an SQ of 0
    assert {k: np.nan_to_num(f[k]) for k in theirs} == pytest.approx(theirs, abs=1e-6)
    assert f["pq"] == pytest.approx(f["dq"] * np.nan_to_num(f["sq"]), abs=1e-12)


def test_pairs_are_counted_as_pixels_are():
    rng = np.random.default_rng(0)
    truth = random_map(rng)
    predicted = random_map(rng)
    pairs = o.pair_counts(truth, predicted)
    assert np.array_equal(pairs.truth, np.unique(truth)[1:]) and np.array_equal(
        pairs.predicted, np.unique(predicted)[1:]
    )
    assert np.array_equal(pairs.truth_area, [(truth == k).sum() for k in pairs.truth])
    expected = {
        (t, p): n for t in pairs.truth for p in pairs.predicted if (n := ((truth == t) & (predicted == p)).sum())
    }
    assert {
        (pairs.truth[i], pairs.predicted[j]): n for i, j, n in zip(pairs.i, pairs.j, pairs.both, strict=True)
    } == expected


def test_numbers_of_objects_do_not_matter():
    rng = np.random.default_rng(1)
    truth = random_map(rng, gaps=False)
    predicted = random_map(rng, gaps=False)
    other = rng.permutation(1000)[:30] * 1000 + 70_000
    other[0] = 0
    a, b = (
        o.object_sums(o.pair_counts(*maps, hausdorff=True))
        for maps in ((truth, predicted), (other[truth].astype(np.uint32), other[predicted]))
    )
    assert a == pytest.approx(b)


def test_maps_without_background_and_of_one_pixel():
    full = np.arange(1, 13).reshape(3, 4)
    for ids in (full, np.ones((1, 1), np.uint8)):
        f = o.metrics_from_sums(o.object_sums(o.pair_counts(ids, ids, hausdorff=True)))
        assert {k: float(v) for k, v in f.items()} == dict.fromkeys(o.OBJECT_METRICS[:-1], 1.0) | {
            "object_hausdorff": 0.0
        }


def test_an_iou_of_one_half_is_no_hit_and_half_of_an_object_is_not_covered():
    truth = np.array([[1, 1, 0, 2, 2]])
    predicted = np.array([[1, 0, 0, 2, 2]])
    s = dict(zip(o.OBJECT_SUMS, o.object_sums(o.pair_counts(truth, predicted)), strict=True))
    assert s["hits"] == 1 and s["glas_hits"] == 1


def test_a_joined_object_covers_several_but_hits_one():
    truth = np.array([[1, 1, 1, 2, 2, 3]])
    predicted = np.full((1, 6), 9)
    f = o.metrics_from_sums(o.object_sums(o.pair_counts(truth, predicted)))
    assert f["glas_f1"] == 2 * 1 / (3 + 1)
    assert f["aji"] == (3 + 2 + 1) / (6 + 6 + 6)  # each object of the truth takes it


def test_empty_maps_are_defined():
    none = np.zeros((30, 40), int)
    some = np.zeros((30, 40), int)
    some[3:6, 3:6] = 1
    both, missed, invented = (
        o.pair_counts(*maps, hausdorff=True) for maps in ((none, none), (some, none), (none, some))
    )
    assert np.isnan([*o.metrics_from_sums(o.object_sums(both)).values()]).all()
    for pairs in (missed, invented):
        f = o.metrics_from_sums(o.object_sums(pairs))
        assert np.isnan(f.pop("sq")) and f.pop("object_hausdorff") == 50 and set(f.values()) == {0.0}
    r = o.object_metrics([both, missed], ["a", "b"])
    assert r["picture_pq"]["value"] == 0 and np.isnan(r["pictures"]["pq"][0])
    alone = o.object_metrics([both], ["a"])
    assert np.isnan(alone["pq"]["value"]) and np.isnan(alone["picture_dice"]["value"]) and np.isnan(alone["pq"]["low"])


def test_pooled_figures_are_of_the_pictures_side_by_side():
    rng = np.random.default_rng(2)
    truths = [random_map(rng, n=n) for n in (3, 12, 20)]
    predicted = [moved(rng, t) for t in truths]

    def beside(maps):
        return np.concatenate([np.where(m > 0, m + 100 * i, 0) for i, m in enumerate(maps)], 1)

    r = o.object_metrics([o.pair_counts(t, p) for t, p in zip(truths, predicted, strict=True)], ["a", "b", "c"])
    whole = o.metrics_from_sums(o.object_sums(o.pair_counts(beside(truths), beside(predicted))))
    assert {k: r[k]["value"] for k in whole} == pytest.approx({k: float(v) for k, v in whole.items()})
    for k in whole:
        assert r[f"picture_{k}"]["value"] == pytest.approx(np.mean(r["pictures"][k]))
        assert r[k]["low"] <= r[k]["value"] <= r[k]["high"]


def test_intervals_come_from_cases_and_reruns_are_equal():
    rng = np.random.default_rng(3)
    pairs = [o.pair_counts(t := random_map(rng), moved(rng, t)) for _ in range(12)]
    by_case, again, by_picture = (
        o.object_metrics(pairs, g)
        for g in ([f"case {i // 6}" for i in range(12)], [f"case {i // 6}" for i in range(12)], range(12))
    )
    assert json.dumps(by_case) == json.dumps(again)
    assert by_case["n_groups"] == 2 and by_case["note"] and by_picture["note"] == ""
    assert by_case["aji"]["value"] == by_picture["aji"]["value"] and by_case["aji"]["low"] != by_picture["aji"]["low"]


def test_types_are_counted_apart():
    truth = np.array([[1, 1, 0, 2, 2, 0, 3, 3, 0, 4]])
    predicted = np.array([[7, 7, 0, 5, 5, 0, 0, 0, 0, 4]])
    t = np.array([0, 1, 1, 2, 0])
    p = np.zeros(8, int)
    p[[7, 5, 4]] = 1, 2, 2
    r = o.type_metrics([o.pair_counts(truth, predicted)], [t], [p], ["a"], ("none", "a", "b", "c"))
    # a: 1 found, 2 called b; b: 3 missed, 5 and 4 wrong (4 has no type in the truth); c: nowhere
    assert r["pq"]["a"]["value"] == 2 / 3 and r["pq"]["b"]["value"] == 0 and np.isnan(r["pq"]["c"]["value"])
    assert r["mpq"]["value"] == pytest.approx(1 / 3) and r["n_objects"] == {"a": 2, "b": 1, "c": 0}


def test_what_hits_an_object_of_unknown_type_is_not_counted():
    pairs = [o.pair_counts(np.array([[1, 1, 0, 2, 2, 0, 0]]), np.array([[1, 1, 0, 2, 2, 0, 3]]))]
    called = np.array([0, 1, 1, 1], np.uint8)
    for kind, value in ((2, 2 / (1 + 3)), (255, 2 / (1 + 2))):
        truth = np.array([0, 1, kind], np.uint8)
        r = o.type_metrics(pairs, [truth], [called], ["a"], ("none", "a", "b"))
        assert r["pq"]["a"]["value"] == value and r["n_objects"] == {"a": 1, "b": int(kind == 2)}
        assert truth[2] == kind and called.tolist() == [0, 1, 1, 1]  # left as they were
    with pytest.raises(BadInput, match="predicted_types"):
        o.type_metrics(pairs, [called], [truth[[0, 1, 1, 2]]], ["a"], ("none", "a", "b"))


def test_one_type_is_plain_panoptic_quality():
    rng = np.random.default_rng(4)
    maps = [(t := random_map(rng), moved(rng, t)) for _ in range(5)]
    pairs = [o.pair_counts(*m) for m in maps]
    ones = [np.ones(100, np.uint8)] * 5
    assert o.type_metrics(pairs, ones, ones, range(5), ("none", "any"))["mpq"] == pytest.approx(
        o.object_metrics(pairs, range(5))["pq"]
    )


@pytest.mark.parametrize(
    "truth, predicted, fault",
    [
        (np.zeros((3, 3), int), np.zeros((3, 4), int), "a map of"),
        (np.zeros((3, 3), int), np.full((3, 3), -1), "negative"),
        (np.zeros((3, 3)), np.zeros((3, 3), int), "float64"),
        (np.zeros((3, 3, 1), int), np.zeros((3, 3, 1), int), "shape"),
        (np.zeros((0, 3), int), np.zeros((0, 3), int), "shape"),
        (np.full((3, 3), 2**40), np.zeros((3, 3), int), "as large as"),
    ],
)
def test_maps_that_are_none_are_refused(truth, predicted, fault):
    with pytest.raises(BadInput, match=fault):
        o.pair_counts(truth, predicted)


def test_lists_that_do_not_fit_are_refused():
    ids = np.array([[0, 1, 3]])
    pairs = o.pair_counts(ids, ids)
    with pytest.raises(BadInput, match="2 groups for 1"):
        o.object_metrics([pairs], ["a", "b"])
    with pytest.raises(BadInput, match="without a group"):
        o.object_metrics([pairs], [None])
    with pytest.raises(BadInput, match="no picture"):
        o.object_metrics([], [])
    with pytest.raises(BadInput, match="some pictures only"):
        o.object_metrics([pairs, o.pair_counts(ids, ids, hausdorff=True)], ["a", "b"])
    good = np.array([0, 1, 0, 1])
    with pytest.raises(BadInput, match="of 1 and 2 pictures for 1"):
        o.type_metrics([pairs], [good], [good, good], ["a"], ("none", "a"))
    for wrong in (good[:3], good * 1.0, good + 1, -good):
        with pytest.raises(BadInput):
            o.type_metrics([pairs], [good], [wrong], ["a"], ("none", "a"))
