"From probabilities to objects: there and back, each rule, odd pictures, types and tables, and bad input."

import cv2
import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes
from skimage.segmentation import watershed

from histonb.core.errors import BadInput
from histonb.core.tasks import TASKS
from histonb.metrics.objects import metrics_from_sums, object_sums, pair_counts
from histonb.segment import instances as s
from histonb.segment.targets import instance_target
from histonb.synthetic.phantom import draw_field

KINDS = ("gland", "lumen", "nucleus")


def certain(ids, task):
    return np.stack([instance_target(ids, TASKS[task].kernel) == c for c in range(3)]).astype(np.float32)


def discs(shape, radius, step, offset=0):
    "Discs on a grid, numbered with gaps; they touch where step is below twice the radius."
    ids = np.zeros(shape, np.int32)
    numbers = iter(range(5, 10_000, 7))
    for y in range(radius + 2, shape[0] - radius, step + 2):
        for x in range(radius + 2, shape[1] - radius, step):
            cv2.circle(ids, (x, y), radius, next(numbers), -1)
    return ids


def pq(truth, found):
    return float(metrics_from_sums(object_sums(pair_counts(truth, found)))["pq"])


@pytest.mark.parametrize("task, radius", [("gland", 30), ("lumen", 12), ("nucleus", 7)])
@pytest.mark.parametrize("touching", [False, True])
def test_objects_come_back(task, radius, touching):
    truth = discs((300, 400), radius, 2 * radius - (2 if touching else -14))
    found = s.extract_instances(certain(truth, task), task)
    assert found.dtype == np.int32 and np.array_equal(np.unique(found), np.arange(found.max() + 1))
    assert found.max() == len(np.unique(truth)) - 1
    assert pq(truth, found) > (0.95 if touching else 0.99)


@pytest.mark.parametrize("task", KINDS)
def test_numbers_and_place_do_not_matter(task):
    truth = discs((140, 200), {"gland": 26, "lumen": 10, "nucleus": 5}[task], 60)
    found = s.extract_instances(certain(truth, task), task)
    assert np.array_equal(
        found > 0, s.extract_instances(certain(np.where(truth > 0, truth * 13 + 1000, 0), task), task) > 0
    )
    turned = s.extract_instances(np.ascontiguousarray(certain(truth, task)[:, :, ::-1]), task)
    assert pq(found, turned[:, ::-1]) > 0.99


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 1), (40, 4)])
def test_odd_pictures(task, shape):
    "Smaller than the kernels, nothing there, and nothing but one object."
    for inside in (0.0, 1.0):
        probs = np.stack([np.full(shape, 1 - inside), np.full(shape, inside), np.zeros(shape)])
        found = s.extract_instances(probs, task)
        assert found.shape == shape and found.max() == int(
            inside > 0 and np.prod(shape) >= {"gland": 1000, "lumen": 150, "nucleus": 8}[task]
        )


@pytest.mark.parametrize("task", KINDS)
def test_one_object_may_fill_the_picture(task):
    probs = np.zeros((3, 50, 60), np.float32)
    probs[1] = 1
    assert (s.extract_instances(probs, task) == 1).all()


def test_least_sizes_scale_with_the_resolution():
    def square(side, size=100):
        probs = np.zeros((3, size, size))
        probs[0] = 1
        probs[:, 20 : 20 + side, 20 : 20 + side] = np.array([0, 1, 0])[:, None, None]
        return probs

    for mpp, ds in ((0.5, 1), (0.25, 2), (1.0, 0.5)):
        side = int(np.ceil(1000**0.5 * ds))
        assert s.glands(square(side), mpp).max() == 1 and s.glands(square(side - 1), mpp).max() == 0
    assert s.nuclei(square(2)).max() == 0 and s.nuclei(square(8)).max() == 1
    assert s.lumens(square(13)).max() == 1 and s.lumens(square(10)).max() == 0  # 13*13 and 10*10, and a rim of one


def test_glands_meet_but_do_not_merge_and_keep_their_lumens():
    truth = np.zeros((120, 200), np.int32)
    truth[20:100, 20:100], truth[20:100, 100:180] = 1, 2
    probs = certain(truth, "gland")
    probs[:, 50:70, 50:70] = np.array([1, 0, 0])[:, None, None]  # a lumen that the network leaves out
    found = s.glands(probs)
    assert found.max() == 2 and found[60, 60] == 1
    assert (found[30:90, 99] == 1).all() and (found[30:90, 100] == 2).all()
    assert all(np.array_equal(binary_fill_holes(found == k), found == k) for k in (1, 2))


def test_growing_covers_no_neighbour_and_ties_go_to_the_smaller_number():
    rng = np.random.default_rng(0)
    ids = np.zeros((40, 50), np.int32)
    ids[rng.integers(0, 40, 60), rng.integers(0, 50, 60)] = rng.permutation(60) + 1
    grown = s._grow(ids, 4)
    assert np.array_equal(grown[ids > 0], ids[ids > 0])
    assert np.array_equal(
        grown > 0, cv2.dilate(np.uint8(ids > 0), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))) > 0
    )
    tie = np.zeros((1, 5), np.int32)
    tie[0, 0], tie[0, 4] = 7, 3
    assert s._grow(tie, 2).tolist() == [[7, 7, 3, 3, 3]]
    assert np.array_equal(s._grow(ids, 0), ids)


def test_the_watershed_runs_on_few_pixels_with_the_same_result():
    rng = np.random.default_rng(2)
    truth = discs((200, 200), 6, 10)
    score = cv2.GaussianBlur(np.float32(certain(truth, "nucleus")[1] + rng.normal(0, 0.05, truth.shape)), (0, 0), 1)
    mask = cv2.GaussianBlur(np.float32(truth > 0), (0, 0), 1) > 0.3
    markers = s._label(score > 0.6, 3)
    assert markers.max() > 50
    assert np.array_equal(s._flood(score, markers, mask), watershed(-score, markers, mask=mask))


def test_nuclei_that_meet_at_corners_stay_apart():
    "Counts and PQ of the authors' post-processing on the same probabilities; connected across corners, 166 and .873."
    truth = draw_field(seed=5, pattern=4, size=384).nuclei.astype(np.int32)
    rng = np.random.default_rng(0)
    scores = 6 * np.eye(3, dtype=np.float32)[instance_target(truth, 3)].transpose(2, 0, 1) + rng.normal(
        0, 3.0, (3, *truth.shape)
    ).astype(np.float32)
    scores = np.exp(np.stack([cv2.GaussianBlur(channel, (0, 0), 1.0) for channel in scores]))
    found = s.extract_instances(scores / scores.sum(0), "nucleus")
    assert (found.max(), round(pq(truth, found), 3)) == (169, 0.895)
    corner = np.zeros((3, 20, 20))
    corner[0] = 1
    corner[:, 4:10, 4:10] = corner[:, 10:16, 10:16] = np.array([0, 1, 0])[:, None, None]
    assert s.nuclei(corner).max() == 2


def test_holes_by_object():
    ids = np.zeros((9, 9), np.int32)
    ids[1:8, 1:8], ids[2:7, 2:7], ids[3:6, 3:6], ids[4, 4] = 1, 0, 2, 0
    filled = s._fill(ids)
    assert filled[4, 4] == 2 and (filled[2, 2:7] == 0).all()
    ids[0:2, 4] = 0
    assert np.array_equal(s._fill(ids) == 2, filled == 2)
    assert np.array_equal(s._fill(np.zeros((3, 3), np.int32)), np.zeros((3, 3)))


def test_lumens_outside_of_glands_go():
    truth = np.zeros((100, 200), np.int32)
    for k, x in enumerate((30, 100, 170), 1):
        cv2.circle(truth, (x, 50), 15, k, -1)
    glands = np.zeros_like(truth)
    glands[:, :70] = 4
    glands[:, 92:108] = 9  # all of the first, a band of the second
    probs = certain(truth, "lumen")
    assert s.extract_instances(probs, "lumen").max() == 3
    kept = s.extract_instances(probs, "lumen", within=glands)
    assert kept.max() == 2 and (kept[truth == 3] == 0).all()  # the band holds more than half
    assert s.extract_instances(probs, "lumen", within=glands == 4).max() == 1
    assert s.extract_instances(probs, "lumen", within=0 * glands).max() == 0


def test_half_precision_does():
    truth = discs((100, 100), 5, 16)
    assert np.array_equal(s.nuclei(certain(truth, "nucleus").astype(np.float16)), s.nuclei(certain(truth, "nucleus")))


@pytest.mark.parametrize(
    "probs, fault",
    [
        (np.zeros((2, 5, 5)), r"\(2, 5, 5\)"),
        (np.zeros((5, 5)), r"\(5, 5\)"),
        (np.zeros((3, 0, 5)), r"\(3, 0, 5\)"),
        (np.zeros((3, 5, 5), np.uint8), "uint8"),
        (np.full((3, 5, 5), 2.0), "values from 2 to 2"),
        (np.full((3, 5, 5), np.nan), "nan"),
    ],
)
def test_what_is_no_probability_is_refused(probs, fault):
    with pytest.raises(BadInput, match=fault):
        s.extract_instances(probs, "gland")


def test_wrong_requests_are_refused():
    probs = np.zeros((3, 5, 5))
    with pytest.raises(BadInput, match="Did you mean `nucleus`"):
        s.extract_instances(probs, "nuclei")
    with pytest.raises(BadInput, match="Only lumens"):
        s.extract_instances(probs, "gland", within=np.zeros((5, 5)))
    with pytest.raises(BadInput, match="glands of the same picture"):
        s.extract_instances(probs, "lumen", within=np.zeros((5, 6)))
    with pytest.raises(BadInput, match="um/px"):
        s.extract_instances(probs, "gland", mpp=0)


def test_types_are_those_of_most_pixels():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, (60, 60)) * 3
    types = rng.integers(0, 5, (60, 60)).astype(np.uint8)
    found = s.majority_types(ids, types)
    assert found.shape == (ids.max() + 1,) and found.dtype == np.uint8 and found[0] == 0
    for k in range(1, len(found)):
        votes = np.bincount(types[ids == k], minlength=5)
        if votes.sum() == 0:
            assert found[k] == 0
            continue
        first = votes.argmax()
        assert found[k] == (first if first else votes[1:].argmax() + 1)
    assert s.majority_types(ids, 0 * types).max() == 0
    assert s.majority_types(np.zeros((2, 2), int), np.ones((2, 2), np.uint8)).tolist() == [0]


def test_types_of_another_picture_are_refused():
    ids = np.ones((4, 4), int)
    with pytest.raises(BadInput, match="same picture"):
        s.majority_types(ids, np.ones((4, 5), np.uint8))
    with pytest.raises(BadInput, match="type_map"):
        s.majority_types(ids, np.ones((4, 4)))
    with pytest.raises(BadInput, match="0 to 255"):
        s.majority_types(ids, np.full((4, 4), 256))


def test_table_by_hand():
    ids = np.array([[0, 4, 4], [0, 4, 0], [9, 0, 0]])
    probs = np.zeros((3, 3, 3))
    probs[0] = 0.2
    probs[1] = 0.5
    probs[0, 2, 0] = 0.6
    t = s.object_table(ids, probs, mpp=0.25, x0=10, y0=20, scale=4)
    assert t["id"].tolist() == [4, 9] and t["n"].tolist() == [3, 1] and t["area_um2"].tolist() == [3 / 16, 1 / 16]
    assert t["x"].tolist() == pytest.approx([10 + 4 * (4 / 3 + 0.5), 12]) and t["y"].tolist() == pytest.approx(
        [20 + 4 * (1 / 3 + 0.5), 30]
    )
    assert t[["left", "top", "right", "bottom"]].values.tolist() == [[14, 20, 22, 28], [10, 28, 14, 32]]
    assert t["probability"].tolist() == pytest.approx([0.8, 0.4]) and t["type"].tolist() == [0, 0]
    types = np.array([0] * 4 + [1] + [0] * 4 + [2], np.uint8)
    t = s.object_table(ids, probs, types)
    assert t["type"].tolist() == [1, 2] and t["probability"].tolist() == pytest.approx([0.5, 0])
    assert s.object_table(ids)["probability"].isna().all()


def test_an_empty_table_has_the_same_columns():
    full = s.object_table(np.eye(3, dtype=int))
    empty = s.object_table(np.zeros((3, 3), int), np.zeros((3, 3, 3)), np.zeros(1, np.uint8))
    assert len(empty) == 0 and list(full) == list(empty) and (full.dtypes == empty.dtypes).all()


def test_tables_of_other_pictures_are_refused():
    ids = np.eye(3, dtype=int) * 2
    with pytest.raises(BadInput, match="probabilities"):
        s.object_table(ids, np.zeros((3, 3, 4)))
    with pytest.raises(BadInput, match="types"):
        s.object_table(ids, types=np.zeros(2, np.uint8))
    with pytest.raises(BadInput, match="types"):
        s.object_table(ids, np.zeros((2, 3, 3)), types=np.array([0, 0, 2]))
    with pytest.raises(BadInput, match="um/px"):
        s.object_table(ids, mpp=-1)
