"Annotated regions: instances cleaned, one resolution, every reader on its published layout, and what is refused."

import io
import pickle
import struct
import tracemalloc
import unicodedata
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.io import loadmat, savemat
from scipy.ndimage import label as components
from scipy.sparse import csr_array

import histonb.datasets.regions as regions
from histonb.core.errors import BadInput
from histonb.core.tasks import INSTANCE_CLASSES, TASKS, TISSUE_CLASSES
from histonb.datasets.annotations import read_map, type_map, types_by_id
from histonb.datasets.folders import NCT_CLASSES, folders, patch_folders
from histonb.datasets.glands import crag, glas
from histonb.datasets.matlab import read_mat
from histonb.datasets.nuclei import consep, lizard, pannuke
from histonb.datasets.readers import READERS, read_set
from histonb.datasets.regions import REGION_COLUMNS, Region, clean_instances, outline, phantom_regions, resample
from histonb.datasets.splits import check_leak, grouped_split
from histonb.slides.cohort import QUARANTINE_COLUMNS
from histonb.synthetic.phantom import draw_field

GLAS, CONSEP = (Path(__file__).parents[2] / "shared/data" / name for name in ("GlaS", "consep_patches"))


def needs(path):
    return pytest.mark.skipif(not path.exists(), reason=f"needs {path}")


def picture(seed=0, height=48, width=64):
    return np.random.default_rng(seed).integers(60, 220, (height, width, 3)).astype(np.uint8)


def squares(*numbers, height=48, width=64):
    "Instances side by side with gaps between them: 8 x 8 pixels each."
    ids = np.zeros((height, width), np.int32)
    for i, number in enumerate(numbers):
        ids[4:12, 4 + 12 * i : 12 + 12 * i] = number
    return ids


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_mat(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, arrays)


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


# one table of labels


def test_every_task_with_classes_names_them():
    assert {task.kind for task in TASKS.values()} == {"instances", "types", "patch"}
    assert all(task.classes == INSTANCE_CLASSES for task in TASKS.values() if task.kind == "instances")
    assert TASKS["nucleus-type"].classes[1:] == (
        "neutrophil",
        "epithelial",
        "lymphocyte",
        "plasma",
        "eosinophil",
        "connective",
    )
    assert sorted(NCT_CLASSES.values()) == list(range(9)) and len(TISSUE_CLASSES) == 9
    assert {folder: TISSUE_CLASSES[i] for folder, i in NCT_CLASSES.items()}["TUM"] == "abnormal epithelium"


def test_readers_are_found_by_name_and_wrong_names_get_the_right_one():
    assert READERS["glas"] is glas and READERS["pannuke"] is pannuke and READERS["folders"] is folders
    with pytest.raises(BadInput, match="Did you mean `lizard`"):
        read_set({"reader": "lizzard"})


# instances


def test_ids_close_up_in_their_order():
    ids = squares(9, 2, 500)
    clean = clean_instances(ids, "x")
    assert clean.dtype == np.int32
    assert [clean[6, 6], clean[6, 18], clean[6, 30]] == [2, 1, 3]
    assert np.array_equal(clean > 0, ids > 0)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int64, np.float64, np.uint64])
def test_ids_may_come_in_any_type_of_whole_numbers(dtype):
    assert np.array_equal(clean_instances(squares(1, 1).astype(dtype), "x"), squares(1, 2))


def test_pieces_of_one_id_become_instances():
    ids = squares(3, 1, 3)
    clean = clean_instances(ids, "x")
    assert clean.max() == 3 and components(clean > 0)[1] == 3
    assert {*np.unique(clean[ids == 3])} == {2, 3} and {*np.unique(clean[ids == 1])} == {1}


def test_touching_instances_stay_apart_and_corners_hold_together():
    ids = np.zeros((20, 20), int)
    ids[:10, :10], ids[:10, 10:] = 1, 2
    ids[10:, 10:] = 1  # touches the first square of number 1 at a corner
    assert np.array_equal(clean_instances(ids, "x"), ids)


@pytest.mark.parametrize(("extra", "instances"), [(1, 1), (regions.SLIVER - 1, 1), (regions.SLIVER, 2)])
def test_slivers_go_and_larger_pieces_stay(extra, instances):
    ids = squares(1)
    ids[40, 20 : 20 + extra] = 1
    clean = clean_instances(ids, "x")
    assert clean.max() == instances and (clean > 0).sum() == 64 + extra * (instances - 1)


def test_an_instance_that_is_small_as_a_whole_stays():
    ids = squares(1)
    ids[40, 20:22], ids[44, 20] = 2, 2  # two pieces, both small: the larger is the instance
    clean = clean_instances(ids, "x")
    assert clean.max() == 2 and (clean == 2).sum() == 2


def test_an_empty_map_is_fine():
    clean = clean_instances(np.zeros((5, 7), np.uint8), "x")
    assert clean.shape == (5, 7) and clean.dtype == np.int32 and not clean.any()


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        (squares(-1), "`-1` is not the number"),
        (squares(1) / 2, "`0.5` is not the number"),
        (np.full((4, 4), np.nan), "`nan` is not the number"),
        (np.full((4, 4), 1e300), "is not the number"),
        (np.full((4, 4), 2**64 - 1, np.uint64), "is not the number"),
        (picture(), "not a map with one number a pixel"),
        (np.zeros(4), "not a map with one number a pixel"),
    ],
)
def test_maps_without_instance_numbers_are_refused(ids, fault):
    with pytest.raises(BadInput, match=fault) as e:
        clean_instances(ids, "the/map.png")
    assert e.value.path == "the/map.png"


def test_an_outline_is_the_inner_border():
    image = picture()
    ids = squares(1)
    drawn = outline(image, ids, (1, 2, 3))
    changed = (drawn == (1, 2, 3)).all(-1)
    assert changed.sum() == 8 * 8 - 6 * 6 and not changed[ids == 0].any()
    assert np.array_equal(image, picture())  # a copy was drawn on


# resolution


def region():
    ids = squares(1, 2)
    types = np.array([0, 2, 255], np.uint8)[ids]
    return Region(picture(), {"nucleus": ids, "nucleus-type": types, "tissue": 4}, 0.5)


@pytest.mark.parametrize(
    ("mpp", "size"), [(0.25, (96, 128)), (1.0, (24, 32)), (0.62, (39, 52)), (0.5, (48, 64)), (100.0, (1, 1))]
)
def test_a_field_is_resampled_with_its_maps(mpp, size):
    f = resample(region(), mpp)
    assert f.mpp == mpp and f.image.shape == (*size, 3) and f.image.dtype == np.uint8
    assert f.labels["nucleus"].shape == size and f.labels["nucleus"].dtype == np.int32
    assert f.labels["nucleus-type"].shape == size and f.labels["nucleus-type"].dtype == np.uint8
    assert f.labels["tissue"] == 4
    assert {*np.unique(f.labels["nucleus-type"])} <= {0, 2, 255}


def test_shrinking_averages_and_enlarging_and_back_is_exact_for_maps():
    f = region()
    half = resample(f, 1.0)
    assert np.abs(half.image - f.image.reshape(24, 2, 32, 2, 3).mean((1, 3))).max() <= 0.5
    back = resample(resample(f, 0.25), 0.5)
    assert np.array_equal(back.labels["nucleus"], f.labels["nucleus"]) and np.array_equal(
        back.labels["nucleus-type"], f.labels["nucleus-type"]
    )


def test_maps_are_not_shifted_against_the_picture():
    ids = squares(1)
    f = Region(np.repeat((ids * 200).astype(np.uint8)[..., None], 3, 2), {"nucleus": ids}, 0.5)
    for mpp in (1.5, 1.0, 0.3):
        g = resample(f, mpp)
        weight = g.image[..., 0].astype(float)
        inside = g.labels["nucleus"] > 0
        for axis in np.indices(inside.shape):
            assert abs((axis * weight).sum() / weight.sum() - axis[inside].mean()) <= 0.51


def test_ids_that_vanish_are_numbered_away_and_large_ids_survive():
    ids = squares(1, 2, 3)
    ids[ids == 2] = 0
    ids[5, 17] = 2  # one pixel, missed at a third of the resolution
    f = resample(Region(picture(), {"gland": ids}, 0.5), 1.5)
    assert f.labels["gland"].max() == 2 and {*np.unique(f.labels["gland"])} == {0, 1, 2}
    many = np.arange(300 * 300, dtype=np.int32).reshape(300, 300) + 2**24  # beyond what float32 counts
    assert resample(Region(picture(0, 300, 300), {"gland": many}, 0.5), 0.25).labels["gland"].max() == 300 * 300


@pytest.mark.parametrize("mpp", [0, -1, np.nan, np.inf])
def test_a_resolution_that_is_none_is_refused(mpp):
    with pytest.raises(BadInput, match="Give a positive number"):
        resample(region(), mpp)


# a list of regions


def test_phantom_fields_depend_on_seed_and_index_alone():
    few = phantom_regions(2, 5, 128)
    many = phantom_regions(9, 5, 128)
    other = phantom_regions(2, 6, 128)
    assert few.table.equals(many.table[:2])
    assert {*many.table["pattern"]} <= {2, 3, 4} and many.table["pattern"].nunique() > 1
    a = few[1]
    b = many[1]
    assert np.array_equal(a.image, b.image) and all(np.array_equal(a.labels[t], b.labels[t]) for t in a.labels)
    assert not np.array_equal(a.image, other[1].image)


def test_phantom_truth_is_what_was_drawn():
    f = phantom_regions(3, 5, 160)[2]
    row = phantom_regions(3, 5, 160).table.iloc[2]
    drawn = draw_field((5, 2), row["pattern"], 160)
    assert np.array_equal(f.image, drawn.image) and f.mpp == 0.48
    for task, ids in (("gland", drawn.glands), ("lumen", drawn.lumens), ("nucleus", drawn.nuclei)):
        assert f.labels[task].dtype == np.int32 and {*np.unique(f.labels[task])} == {*range(f.labels[task].max() + 1)}
        assert ((f.labels[task] > 0) != (ids > 0)).sum() < 5 * regions.SLIVER  # nothing but slivers is lost
    lizards = {1: 2, 2: 3, 3: 6}
    inside = f.labels["nucleus"] > 0
    assert [lizards[t] for t in drawn.types[drawn.nuclei[inside]]] == f.labels["nucleus-type"][inside].tolist()
    assert not f.labels["nucleus-type"][~inside].any()


def test_fields_are_taken_iterated_and_pickled():
    some = phantom_regions(4, 1, 128)
    assert [*some.table.columns[:6]] == REGION_COLUMNS and [*some.quarantine.columns] == QUARANTINE_COLUMNS
    names = some.table["field"]
    assert some.take([2, 0]).table["field"].tolist() == [names[2], names[0]]
    assert some.take(names == names[3]).table["field"].tolist() == [names[3]]
    assert some.take(np.array([False, True, True, False])).table["field"].tolist() == [names[1], names[2]]
    assert len(some.take([])) == 0 and len(some) == 4
    assert np.array_equal(some.take([2])[0].image, some[2].image) and np.array_equal(some[-1].image, some[3].image)
    assert len([*some.take([0, 1])]) == 2
    with pytest.raises(IndexError):
        some[4]
    assert np.array_equal(pickle.loads(pickle.dumps(some))[1].image, some[1].image)
    assert repr(some) == "phantom: 4 regions in 4 cases (gland, lumen, nucleus, nucleus-type)"
    assert "gland" in repr(some[0]) and "128x128 at 0.48 um/px" in repr(some[0])


@pytest.mark.parametrize(("n", "seed", "size"), [(0, 0, 128), (1, -1, 128)])
def test_impossible_phantoms_are_refused(n, seed, size):
    with pytest.raises(BadInput):
        phantom_regions(n, seed, size)


# types


def test_types_follow_ids_and_not_rows():
    ids = squares(4, 8, 2)
    types = types_by_id(ids, np.array([[8], [2], [99], [4]]), np.array([[1], [2], [3], [4]]), "x")
    assert [types[6, 6], types[6, 18], types[6, 30], types[0, 0]] == [4, 1, 2, 0]
    truth = type_map(types_by_id(ids, [8], [1], "x"), clean_instances(ids, "x"), "nucleus-type", "x")
    assert [truth[6, 6], truth[6, 18], truth[0, 0]] == [255, 1, 0] and truth.dtype == np.uint8


@pytest.mark.parametrize("numbers", [np.uint8, np.uint16, np.int32, float])
@pytest.mark.parametrize("ids", [np.uint8, np.uint16, np.int64, float])
def test_types_are_found_whatever_type_the_numbers_have(ids, numbers):
    assert np.array_equal(types_by_id(squares(5, 9).astype(ids), np.array([9, 5], numbers), [2, 1], "x"), squares(1, 2))


def test_types_that_cannot_be_are_refused():
    ids = squares(1, 2)
    with pytest.raises(BadInput, match="1 types for 2 instances"):
        types_by_id(ids, [1, 2], [1], "x")
    with pytest.raises(BadInput, match="instance 1 is listed twice"):
        types_by_id(ids, [1, 1], [1, 2], "x")
    with pytest.raises(BadInput, match="type 7 is none of nucleus-type"):
        type_map(ids * 7, ids, "nucleus-type", "x")
    with pytest.raises(BadInput, match="type 0.5 is none of gland-type"):
        type_map(ids / 2, ids, "gland-type", "x")
    with pytest.raises(BadInput, match="types of shape"):
        type_map(ids[1:], ids, "gland-type", "x")


# files


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif"])
@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_maps_are_named(tmp_path, name, share):
    save(tmp_path / name, picture()[..., 0])  # noise, which fills the file to its end
    cut(tmp_path / name, share)
    with pytest.raises(BadInput, match=name):
        read_map(tmp_path / name)


@pytest.mark.parametrize("compress", [False, True])
def test_broken_mat_files_are_named(tmp_path, compress):
    path = tmp_path / "a.mat"
    savemat(
        path,
        {"inst_map": np.random.default_rng(0).integers(0, 9, (30, 40)), "id": np.arange(9), "name": "x"},
        do_compression=compress,
    )
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    good = 0
    places = [*range(0, 200, 7), *rng.integers(0, len(whole) - 8, 60)]
    damaged = [whole[:at] for at in places] + [
        whole[:at] + rng.bytes(8) + whole[at + 8 :] for at in places if compress
    ]  # only zlib has a checksum
    for data in damaged:
        path.write_bytes(data)
        try:
            read_mat(path, "inst_map", "id")
        except BadInput as e:
            assert e.path == str(path)
        else:
            good += 1
    assert good < 0.2 * len(damaged)  # what is cut behind the two arrays, or lies in the header's text
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="no `inst_type` in it, but inst_map, id, name"):
        read_mat(path, "inst_type")
    with pytest.raises(BadInput, match="there.mat"):
        read_mat(tmp_path / "not_there.mat", "id")


@pytest.mark.parametrize("compress", [False, True])
def test_mat_files_hold_what_scipy_reads(tmp_path, compress):
    rng = np.random.default_rng(0)
    arrays = {
        f"{np.dtype(kind).name}_{i}": (rng.random(shape) * 200).astype(kind)
        for i, shape in enumerate([(3, 5), (1, 1), (0, 1), (2, 3, 4)])
        for kind in (
            float,
            np.float32,
            np.uint8,
            np.int8,
            np.uint16,
            np.int16,
            np.int32,
            np.uint32,
            np.int64,
            np.uint64,
            bool,
        )
    }
    others = {
        "text": "some words",
        "cell": np.array(["a", np.ones(3)], object),
        "struct": {"a": 1.0, "b": "c"},
        "complex": np.ones(3) * 1j,
        "sparse": csr_array(np.eye(3)),
    }
    savemat(tmp_path / "a.mat", arrays | others, do_compression=compress)
    known = loadmat(tmp_path / "a.mat")
    for name in arrays:
        (found,) = read_mat(tmp_path / "a.mat", name)
        assert (
            found.dtype == known[name].dtype and np.array_equal(found, known[name]) and found.shape == known[name].shape
        ), name
    for name in others:
        with pytest.raises(BadInput, match=f"`{name}` in it is no array of numbers"):
            read_mat(tmp_path / "a.mat", name)


def test_mat_files_of_other_kinds(tmp_path, monkeypatch):
    "The other order of bytes is read; versions 4 and 7.3, and a file that unpacks without end, are refused in words."
    path = tmp_path / "a.mat"
    element = (
        struct.pack(">IIII", 6, 8, 9, 0)
        + struct.pack(">IIii", 5, 8, 1, 3)
        + struct.pack(">HH", 2, 1)
        + b"id\0\0"
        + struct.pack(">HH", 3, 2)
        + b"\7\x08\x09\0"
    )
    path.write_bytes(
        b"MATLAB 5.0".ljust(124) + struct.pack(">H", 0x100) + b"MI" + struct.pack(">II", 14, len(element)) + element
    )
    assert read_mat(path, "id")[0].tolist() == loadmat(path)["id"].tolist() == [[7, 8, 9]]
    savemat(path, {"id": np.arange(3)}, format="4")
    with pytest.raises(BadInput, match="not of version 5 to 7.*save it as MATLAB version 7"):
        read_mat(path, "id")
    path.write_bytes(
        b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<H", 0x200) + b"IM" + bytes(384) + b"\x89HDF\r\n\x1a\n"
    )
    with pytest.raises(BadInput, match="not of version 5 to 7"):
        read_mat(path, "id")
    monkeypatch.setattr("histonb.datasets.matlab._MAX_BYTES", 2**20)
    bomb = zlib.compress(bytes(2**20 + 1000))
    path.write_bytes(
        b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM" + struct.pack("<II", 15, len(bomb)) + bomb
    )
    with pytest.raises(BadInput, match="more than 1048576 bytes"):
        read_mat(path, "id")
    savemat(path, {"id": np.arange(3)})
    path.write_bytes(path.read_bytes() + path.read_bytes()[128:])
    with pytest.raises(BadInput, match="two variables `id`"):
        read_mat(path, "id")


def test_no_wrong_byte_of_a_mat_file_ends_the_process(tmp_path):
    "Which the sizes and types in it do, where they are believed."
    path = tmp_path / "a.mat"
    savemat(path, {"inst_map": squares(5, 2, 9).astype(float), "id": np.arange(3)})
    whole = path.read_bytes()
    refused = 0
    for at in range(124, 200):
        for value in {0, 5, 9, 17, 127} - {whole[at]}:
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                read_mat(path, "inst_map", "id")
            except BadInput as e:
                refused += e.path == str(path)
    assert refused > 150


def test_sixteen_bits_and_palettes_keep_their_numbers(tmp_path):
    ids = squares(300, 65535, 2).astype(np.uint16)
    save(tmp_path / "a.png", ids)
    tifffile.imwrite(tmp_path / "a.tif", ids.astype(np.int32))
    colored = Image.fromarray(squares(1, 2, 3).astype(np.uint8)).convert("P")
    colored.putdata(squares(1, 2, 3).ravel().tolist())
    colored.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 200, 0, 0])
    colored.save(tmp_path / "p.png")
    assert np.array_equal(read_map(tmp_path / "a.png"), ids) and np.array_equal(read_map(tmp_path / "a.tif"), ids)
    colored.save(tmp_path / "p.tif")
    tifffile.imwrite(tmp_path / "w.tif", squares(1, 2, 3).astype(np.uint8), photometric="miniswhite")
    for name in ("p.png", "p.tif", "w.tif"):
        assert np.array_equal(read_map(tmp_path / name), squares(1, 2, 3))


# GlaS


def make_glas(root, names=("train_1", "train_2", "testA_1", "testB_1"), rows=None):
    for i, name in enumerate(names):
        save(root / f"{name}.bmp", picture(i))
        save(root / f"{name}_anno.bmp", squares(2 * i + 1, 2 * i + 2).astype(np.uint8))
    rows = rows or [f"{name},{i // 2}, {'malignant' if i % 2 else 'benign'}, healthy" for i, name in enumerate(names)]
    (root / "Grade.csv").write_text(
        "\n".join(["name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)", *rows]) + "\n"
    )
    return root


def test_glas_gives_glands_grades_patients_and_splits(tmp_path):
    g = glas(make_glas(tmp_path))
    table = g.table.set_index("field")
    assert table["split"].to_dict() == {"train_1": "train", "train_2": "train", "testA_1": "testA", "testB_1": "testB"}
    assert table["case"].to_dict() == {
        "train_1": "patient 0",
        "train_2": "patient 0",
        "testA_1": "patient 1",
        "testB_1": "patient 1",
    }
    assert g.labels == ("gland", "gland-type") and {*table["mpp"]} == {0.62} and not len(g.quarantine)
    for i, row in g.table.iterrows():
        f = g[i]
        assert np.array_equal(f.labels["gland"], squares(1, 2)) and f.mpp == 0.62
        assert np.array_equal(
            f.labels["gland-type"],
            (squares(1, 2) > 0) * (1 + int(row["field"].endswith("_2") or row["field"] == "testB_1")),
        )
    assert np.array_equal(g.take(g.table["field"] == "train_2")[0].image, picture(1))


def test_glas_sets_aside_what_cannot_be_used(tmp_path):
    root = make_glas(tmp_path, [f"train_{i}" for i in range(1, 7)])
    (root / "train_1_anno.bmp").unlink()
    (root / "train_2.bmp").unlink()
    save(root / "train_3_anno.bmp", squares(1, height=50).astype(np.uint8))
    text = (
        (root / "Grade.csv")
        .read_text()
        .replace("train_4,1, malignant", "train_4,1, unknown")
        .replace("train_5,2,", "train_5,,")
    )
    (root / "Grade.csv").write_text(text)
    save(root / "other.bmp", picture())
    save(root / "other_anno.bmp", squares(1).astype(np.uint8))
    g = glas(root)
    assert g.table["field"].tolist() == ["train_6"] and g.counts == {"left out": 6}
    faults = g.quarantine.set_index("slide")["fault"]
    assert {*faults.index} == {"train_1", "train_2", "train_3", "train_4", "train_5", "other"}
    assert faults["train_1"] == "a picture without map" and faults["train_2"] == "a map without picture"
    assert (
        faults["train_3"] == "64x50 pixels, its picture 64x48"
        and "Grade.csv" in faults["train_4"]
        and "Grade.csv" in faults["other"]
    )


def test_glas_without_its_table_or_pictures_is_refused(tmp_path):
    with pytest.raises(BadInput, match="Grade.csv"):
        glas(tmp_path)
    (tmp_path / "Grade.csv").write_text("name,patient,grade (GlaS)\na,1,benign\n")
    with pytest.raises(BadInput, match="no column `patient ID`.*Did you mean `patient`"):
        glas(tmp_path)
    with pytest.raises(BadInput, match="no pictures here"):
        glas(make_glas(tmp_path, [], ["train_1,1, benign, healthy"]))
    with pytest.raises(BadInput, match="no region can be used"):
        glas(make_glas(tmp_path, ["train_1"], ["train_9,1, benign, healthy"]))


def test_what_breaks_after_listing_is_named_on_reading(tmp_path):
    g = glas(make_glas(tmp_path))
    order = g.table["field"].tolist().index
    cut(tmp_path / "train_1.bmp")
    with pytest.raises(BadInput, match=r"train_1\.bmp"):
        g[order("train_1")]
    cut(tmp_path / "train_2_anno.bmp")
    with pytest.raises(BadInput, match=r"train_2_anno\.bmp"):
        g[order("train_2")]
    save(tmp_path / "testA_1_anno.bmp", picture())
    with pytest.raises(BadInput, match="testA_1_anno.bmp: .*not colours"):
        g[order("testA_1")]
    save(tmp_path / "testB_1_anno.bmp", squares(1, width=60).astype(np.uint8))
    with pytest.raises(BadInput, match="testB_1_anno.bmp: 60x48 pixels, its picture 64x48"):
        g[order("testB_1")]
    save(tmp_path / "testB_1.bmp", picture()[..., 0])
    with pytest.raises(BadInput, match="one channel"):
        g[order("testB_1")]


def test_fields_with_one_map_are_set_aside_unless_it_is_empty(tmp_path):
    make_glas(tmp_path)
    for name in ("train_2", "testA_1"):
        save(tmp_path / f"{name}_anno.bmp", squares(5).astype(np.uint8))
    g = glas(tmp_path)
    assert g.table["field"].tolist() == ["testB_1", "train_1"] and g.quarantine["slide"].tolist() == [
        "testA_1",
        "train_2",
    ]
    assert "byte for byte, that of train_2" in g.quarantine["fault"][0]
    for name in ("train_2", "testA_1"):
        save(tmp_path / f"{name}_anno.bmp", squares().astype(np.uint8))
    assert len(glas(tmp_path)) == 4


@needs(GLAS)
def test_real_glas_is_read():
    g = glas(GLAS)
    assert len(g) + len(g.quarantine) == 24 and g.table["case"].nunique() == 12
    assert g.quarantine["slide"].tolist() == [
        "train_1",
        "train_4",
        "train_49",
    ]  # the map of train_1 is a copy of train_12's, of another size; that of train_4 is train_49's
    for f, name in zip(g, g.table["field"], strict=True):
        published = np.asarray(Image.open(GLAS / f"{name}_anno.bmp"))
        assert np.array_equal(f.labels["gland"], published)  # clean as published
        assert {*np.unique(f.labels["gland-type"][published > 0])} <= {1, 2} and not f.labels["gland-type"][
            published == 0
        ].any()
    assert g[g.table["field"].tolist().index("train_12")].labels["gland-type"].max() == 1
    assert g[g.table["field"].tolist().index("train_10")].labels["gland-type"].max() == 2
    check_leak(grouped_split(g.table, (0.6, 0.2, 0.2), label="grade", seed=0))


def test_glas_by_a_table_that_another_program_saved(tmp_path):
    "Numbers have decimals, grades capitals, an empty cell is nan: one patient stays one case, and none is called nan."
    rows = ["train_1,7.0, Benign, x", "train_2, 7 ,malignant, x", "testA_1,nan,benign,x", "testB_1,,benign,x"]
    g = glas(make_glas(tmp_path, rows=rows))
    assert g.table[["field", "case", "grade"]].values.tolist() == [
        ["train_1", "patient 7", 1],
        ["train_2", "patient 7", 2],
    ]
    assert sorted(g.quarantine["slide"]) == ["testA_1", "testB_1"]


def test_names_in_either_spelling_of_accents(tmp_path):
    "An accent apart in one name and composed in the other, as archives from different systems have them."
    apart, composed = (unicodedata.normalize(form, "Pr\u00e9l\u00e8vement_1") for form in ("NFD", "NFC"))
    save(tmp_path / f"images/{apart}.png", picture())
    save(tmp_path / f"instances/{composed}.PNG", squares(1, 2).astype(np.uint8))
    f = folders(tmp_path, "gland")
    assert f.table["field"].tolist() == [composed] and f[0].labels["gland"].max() == 2


# CRAG


def test_crag_gives_glands_and_its_two_splits(tmp_path):
    for part, i in (("train", 1), ("train", 2), ("valid", 1)):
        save(tmp_path / f"{part}/Images/{part}_{i}.png", picture(i))
        save(tmp_path / f"{part}/Annotation/{part}_{i}.png", squares(3 + i, 7 + i * (part == "train")).astype(np.uint8))
    (tmp_path / "train/Annotation/train_2.png").unlink()
    c = crag(tmp_path)
    assert c.table[["field", "split"]].values.tolist() == [["train/train_1", "train"], ["valid/valid_1", "val"]]
    assert c.quarantine["slide"].tolist() == ["train/train_2"] and c.labels == ("gland",)
    assert np.array_equal(c[1].labels["gland"], squares(1, 2)) and np.array_equal(c[1].image, picture(1))
    with pytest.raises(BadInput, match="no pictures here"):
        crag(tmp_path / "train")


# CoNSeP


def make_consep(root):
    for part, name in (("Train", "train_1"), ("Test", "test_1")):
        opaque = np.dstack([picture(1), np.full((48, 64), 255, np.uint8)])
        save(root / part / f"Images/{name}.png", opaque)
        save_mat(
            root / part / f"Labels/{name}.mat",
            inst_map=squares(5, 2, 9).astype(float),
            type_map=squares(4, 7, 2).astype(float),
        )
    return root


def test_consep_merges_seven_types_to_four(tmp_path):
    c = consep(make_consep(tmp_path))
    assert c.table[["field", "split", "mpp"]].values.tolist() == [
        ["Train/train_1", "train", 0.25],
        ["Test/test_1", "test", 0.25],
    ]
    f = c[0]
    assert np.array_equal(f.image, picture(1))
    assert np.array_equal(f.labels["nucleus"], squares(2, 1, 3)) and np.array_equal(
        f.labels["nucleus-type-consep"], squares(3, 4, 2)
    )
    every = np.arange(8)[None].repeat(8, 0)
    save_mat(tmp_path / "Train/Labels/train_1.mat", inst_map=squares(1, 1, 1), type_map=np.tile(every, (6, 8)))
    assert {*np.unique(c[0].labels["nucleus-type-consep"])} == {
        0,
        1,
        2,
        3,
        4,
        255,
    }  # a pixel of a nucleus that has no type


def test_consep_refuses_other_types_sizes_and_keys(tmp_path):
    c = consep(make_consep(tmp_path))
    label = tmp_path / "Train/Labels/train_1.mat"
    for arrays, fault in [
        ({"inst_map": squares(1), "type_map": squares(8)}, "type 8 is none"),
        ({"inst_map": squares(1)}, "no `type_map`"),
        ({"inst_map": squares(1), "type_map": squares(1)[:, 1:]}, "types of shape"),
        ({"inst_map": squares(1)[1:], "type_map": squares(1)[1:]}, "64x47 pixels, its picture 64x48"),
        ({"inst_map": squares(1) * 0.5, "type_map": squares(1)}, "not the number of an instance"),
    ]:
        save_mat(label, **arrays)
        with pytest.raises(BadInput, match=fault) as e:
            c[0]
        assert e.value.path == str(label)
    label.unlink()
    assert consep(tmp_path).quarantine["slide"].tolist() == ["Train/train_1"]


# Lizard


def make_lizard(root):
    for i, name in enumerate(("consep_1", "glas_2", "dpath_3")):
        save(root / f"Lizard_Images{1 + i // 2}/{name}.png", picture(i))
        save_mat(
            root / f"Lizard_Labels/Labels/{name}.mat",
            inst_map=squares(1, 2, 3),
            id=np.array([[3], [1], [2]]),
            **{"class": np.array([[6], [1], [4]])},
            bbox=np.zeros((3, 4)),
            centroid=np.zeros((3, 2)),
        )
    (root / "Lizard_Labels/info.csv").write_text(
        "Filename,Source,Split\nconsep_1,consep,1\nglas_2,glas,3\ndpath_3,dpath,2\n"
    )
    return root


def test_lizard_finds_classes_through_ids(tmp_path):
    make_lizard(tmp_path)
    (tmp_path / "Lizard_Labels/Labels/._consep_1.mat").write_bytes(b"what macOS leaves")
    z = lizard(tmp_path)
    assert not len(z.quarantine)
    assert z.table[["field", "case", "split", "source"]].values.tolist() == [
        ["consep_1", "consep_1", "fold1", "consep"],
        ["glas_2", "glas_2", "fold3", "glas"],
        ["dpath_3", "dpath_3", "fold2", "dpath"],
    ]
    for i in range(3):
        f = z[i]
        assert np.array_equal(f.image, picture(i)) and f.mpp == 0.5
        assert np.array_equal(f.labels["nucleus"], squares(1, 2, 3)) and np.array_equal(
            f.labels["nucleus-type"], squares(1, 4, 6)
        )


def test_lizard_needs_a_fold_and_sets_the_rest_aside(tmp_path):
    make_lizard(tmp_path)
    save(tmp_path / "overlay/consep_1.png", picture())  # drawn outlines of the same names do not disturb
    info = tmp_path / "Lizard_Labels/info.csv"
    info.write_text("Filename,Source,Split\nconsep_1,consep,1\nglas_2,glas,4\n")
    z = lizard(tmp_path)
    assert z.table["field"].tolist() == ["consep_1"] and {*z.quarantine["slide"]} == {"glas_2", "dpath_3"}
    info.write_text("Filename,Source,Fold\nconsep_1,consep,1\n")
    with pytest.raises(BadInput, match="no column `Split`"):
        lizard(tmp_path)
    info.unlink()
    with pytest.raises(BadInput, match="info.csv: there is no such file"):
        lizard(tmp_path)


def test_lizard_refuses_two_pictures_of_one_name(tmp_path):
    make_lizard(tmp_path)
    save(tmp_path / "Lizard_Images2/consep_1.png", picture())
    with pytest.raises(BadInput, match="have one name"):
        lizard(tmp_path)


@pytest.mark.parametrize("spelling", ["{}.0", " {} ", "fold{}", "Fold_{}", "split {}", "{}.00"])
def test_lizard_knows_its_folds_however_they_are_written(tmp_path, spelling):
    "Another program has saved the table: numbers came back with decimals, and names with their endings."
    make_lizard(tmp_path)
    rows = [
        f"{name}.png,{source},{spelling.format(fold)}"
        for name, source, fold in (("consep_1", "consep", 1), ("glas_2", "glas", 3), ("dpath_3", "dpath", 2))
    ]
    (tmp_path / "Lizard_Labels/info.csv").rename(tmp_path / "Lizard_Labels/Info.CSV")
    (tmp_path / "Lizard_Labels/Info.CSV").write_text("\n".join([" Filename, Source ,Split", *rows, "lost_9.png,crag,"]))
    z = lizard(tmp_path)
    assert z.table[["field", "split", "source"]].values.tolist() == [
        ["consep_1", "fold1", "consep"],
        ["glas_2", "fold3", "glas"],
        ["dpath_3", "fold2", "dpath"],
    ]


@pytest.mark.parametrize("wrong", ["1.5", "4", "0", "nan", "", "1 2", "test"])
def test_lizard_takes_nothing_else_for_a_fold(tmp_path, wrong):
    make_lizard(tmp_path)
    (tmp_path / "Lizard_Labels/info.csv").write_text(
        f"Filename,Source,Split\nconsep_1,consep,1\nglas_2,glas,{wrong}\ndpath_3,dpath,2\n"
    )
    z = lizard(tmp_path)
    assert z.table["field"].tolist() == ["consep_1", "dpath_3"] and z.quarantine["slide"].tolist() == ["glas_2"]


def test_lizard_in_other_folders_and_numbers(tmp_path):
    "Pictures in one folder of another name, labels in capitals, and ids and classes as 1.0."
    make_lizard(tmp_path)
    for i, name in enumerate(("consep_1", "glas_2", "dpath_3")):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"Lizard_Images{1 + i // 2}/{name}.png").rename(tmp_path / f"images/{name}.PNG")
        (tmp_path / f"Lizard_Labels/Labels/{name}.mat").rename(tmp_path / f"Lizard_Labels/Labels/{name}.MAT")
        save_mat(
            tmp_path / f"Lizard_Labels/Labels/{name}.MAT",
            inst_map=squares(1, 2, 3) * 1.0,
            id=np.array([[3.0], [1.0], [2.0]]),
            **{"class": np.array([[6.0], [1.0], [4.0]])},
        )
    z = lizard(tmp_path)
    assert (
        len(z) == 3
        and np.array_equal(z[1].labels["nucleus-type"], squares(1, 4, 6))
        and np.array_equal(z[1].image, picture(2))
    )


# PanNuke


def make_pannuke(root, fold=1, n=3, dtype=np.float64, organs=("Colon", "Breast", "Colon")):
    images = root / f"Fold {fold}/images/fold{fold}"
    masks = root / f"Fold {fold}/masks/fold{fold}"
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    stack = np.zeros((n, 48, 64, 6), dtype)
    stack[..., 0], stack[..., 1], stack[..., 4] = squares(1, 2), squares(0, 0, 1), squares(0, 0, 0, 1)
    stack[..., 5] = squares(1, 1, 1, 1) == 0
    np.save(images / "images.npy", np.stack([picture(i) for i in range(n)]).astype(dtype))
    np.save(images / "types.npy", np.array(organs))
    np.save(masks / "masks.npy", stack)
    return root


def test_pannuke_makes_numbers_unique_over_channels(tmp_path):
    make_pannuke(tmp_path)
    make_pannuke(tmp_path, fold=2, organs=("Skin",) * 3)
    p = pannuke(tmp_path)
    assert (
        p.table["split"].tolist() == ["fold1"] * 3 + ["fold2"] * 3
        and p.table["organ"].tolist() == ["Colon", "Breast", "Colon"] + ["Skin"] * 3
    )
    assert p.table["case"].is_unique and p.table["field"].tolist()[3] == "fold2_0000"
    f = p[4]
    assert np.array_equal(f.image, picture(1)) and f.image.dtype == np.uint8 and f.mpp == 0.25
    assert np.array_equal(f.labels["nucleus"], squares(1, 2, 3, 4)) and np.array_equal(
        f.labels["nucleus-type-pannuke"], squares(1, 1, 2, 5)
    )


def test_pannuke_gives_a_pixel_of_two_channels_to_the_later(tmp_path):
    make_pannuke(tmp_path)
    path = tmp_path / "Fold 1/masks/fold1/masks.npy"
    masks = np.load(path)
    masks[0, 4:12, 8:16, 3] = 7  # a dead nucleus over half of the first
    np.save(path, masks)
    f = pannuke(tmp_path)[0]
    assert [f.labels["nucleus-type-pannuke"][6, x] for x in (5, 9, 13)] == [1, 4, 4] and f.labels["nucleus"].max() == 5
    assert len({f.labels["nucleus"][6, x] for x in (5, 9, 18)}) == 3


def test_pannuke_never_unpickles(tmp_path):
    make_pannuke(tmp_path)
    np.save(tmp_path / "Fold 1/images/fold1/types.npy", np.array(["Colon"] * 3, object), allow_pickle=True)
    assert pannuke(tmp_path).table["organ"].tolist() == [""] * 3
    for organs in (np.array(["Colon"] * 2), np.array(["Colon", "Breast", "\ud800"]), np.arange(3), np.array("Colon")):
        np.save(tmp_path / "Fold 1/images/fold1/types.npy", organs)
        assert pannuke(tmp_path).table["organ"].tolist() == [""] * 3
    np.save(tmp_path / "Fold 1/images/fold1/images.npy", np.array([picture(), None], object), allow_pickle=True)
    with pytest.raises(BadInput, match="images.npy: unreadable as an array"):
        pannuke(tmp_path)


def test_pannuke_is_not_loaded_whole(tmp_path):
    folder = tmp_path / "fold1"
    n = 200
    for kind, channels in (("images", 3), ("masks", 6)):
        (folder / kind / "fold1").mkdir(parents=True)
        np.lib.format.open_memmap(
            folder / kind / f"fold1/{kind}.npy", "w+", np.float64, (n, 256, 256, channels)
        ).flush()  # a sparse file: nothing is written
    tracemalloc.start()
    try:
        p = pannuke(tmp_path)
        assert len(p) == n and p[n - 1].labels["nucleus"].max() == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e7  # the arrays have 940 million bytes


LAYOUTS = {
    "published": "Fold {n}/{kind}/fold{n}/{file}.npy",
    "without the folder of the fold": "Fold {n}/{kind}/{file}.npy",
    "flat": "fold{n}/{file}.npy",
    "flat, named as published": "Fold {n}/{file}.npy",
    "merged": "{kind}/fold{n}/{file}.npy",
    "first release": "Part {n}/{Kind}/{file}.npy",
    "one folder": "fold{n}_{file}.npy",
    "one folder, number last": "{file}_fold{n}.npy",
    "deeper": "pannuke/Fold {n}/{kind}/fold{n}/{file}.npy",
    "numbered": "{file}_{n}.npy",
    "capitals": "FOLD{n}/{KIND}/{FILE}.NPY",
    "by kind": "{file}/fold{n}.npy",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pannuke_as_people_unpack_it(tmp_path, layout):
    for n in (1, 2, 3):
        source = make_pannuke(tmp_path / "source", n, organs=(f"organ {n}",) * 3) / f"Fold {n}"
        for kind, file in (("images", "images"), ("images", "types"), ("masks", "masks")):
            target = (
                tmp_path
                / "set"
                / LAYOUTS[layout].format(
                    n=n, kind=kind, Kind=kind.title(), KIND=kind.upper(), file=file, FILE=file.upper()
                )
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            (source / kind / f"fold{n}/{file}.npy").rename(target)
    (tmp_path / "set/README.md").write_text("")
    (tmp_path / "set/._images.npy").write_bytes(b"what macOS leaves")
    p = pannuke(tmp_path / "set")
    published = [f"fold{n}" for n in (1, 2, 3) for _ in range(3)]
    assert sorted(p.table["split"]) == published and not len(p.quarantine) and p.table["field"].is_unique
    assert (p.table["organ"] == "organ " + p.table["split"].str[-1]).all()
    for i in (0, 4, 8):
        assert np.array_equal(p[i].image, picture(i % 3)) and np.array_equal(
            p[i].labels["nucleus-type-pannuke"], squares(1, 1, 2, 5)
        )


def test_pannuke_of_one_fold_and_of_names_that_tell_none(tmp_path):
    make_pannuke(tmp_path)
    for folder in ("images", "masks"):
        (tmp_path / f"Fold 1/{folder}/fold1").rename(tmp_path / f"Fold 1/{folder}/mine")
    assert {*pannuke(tmp_path / "Fold 1").table["split"]} == {"fold1"}
    (tmp_path / "Fold 1").rename(tmp_path / "colon")
    assert {*pannuke(tmp_path / "colon").table["split"]} == {"mine"}


def test_pannuke_sets_aside_a_fold_that_cannot_be_read(tmp_path):
    "Of three folds one has two numbers in its path, one is broken, one there twice: what is whole and clear is read."
    for n in (1, 2, 3):
        make_pannuke(tmp_path, n)
    make_pannuke(tmp_path / "again", 1)
    (tmp_path / "Fold 2/images/fold2").rename(tmp_path / "Fold 2/images/fold3")
    (tmp_path / "Fold 2/masks/fold2").rename(tmp_path / "Fold 2/masks/fold3")
    cut(tmp_path / "Fold 3/images/fold3/images.npy")
    p = pannuke(tmp_path)
    assert {*p.table["split"]} == {"fold1"} and len(p) == 3
    assert dict(zip(p.quarantine["slide"], p.quarantine["fault"].str[:28], strict=True)) == {
        "Fold 2/images/fold3/images.npy": "its path names the folds 2 a",
        "fold3": "unreadable as an array (Valu",
        "fold1": "this fold is here twice",
    }


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        ("images/fold1/images.npy", np.zeros((2, 48, 64, 3)), "masks of shape"),
        ("images/fold1/images.npy", np.zeros((3, 48, 64)), "not numbers of"),
        ("masks/fold1/masks.npy", np.zeros((3, 48, 64, 5)), "not numbers of"),
        ("masks/fold1/masks.npy", np.zeros((3, 48, 32, 6)), "masks of shape"),
        ("images/fold1/images.npy", np.zeros((3, 48, 64, 3), complex), "not numbers of"),
    ],
)
def test_pannuke_refuses_arrays_that_do_not_fit(tmp_path, name, array, fault):
    np.save(make_pannuke(tmp_path) / "Fold 1" / name, array)
    with pytest.raises(BadInput, match=fault):
        pannuke(tmp_path)


def test_pannuke_names_broken_and_missing_arrays(tmp_path):
    make_pannuke(tmp_path)
    make_pannuke(tmp_path, fold=2)
    (tmp_path / "Fold 2/masks/fold2/masks.npy").unlink()
    p = pannuke(tmp_path)
    assert len(p) == 3 and p.quarantine["slide"].tolist() == ["fold2"]
    np.save(tmp_path / "Fold 1/images/fold1/images.npy", np.full((3, 48, 64, 3), 300.0))
    with pytest.raises(BadInput, match="beyond 0 and 255"):
        p[0]
    cut(tmp_path / "Fold 1/masks/fold1/masks.npy")
    with pytest.raises(BadInput, match="masks.npy: unreadable as an array"):
        pannuke(tmp_path)
    with pytest.raises(BadInput, match="no images.npy here"):
        pannuke(tmp_path / "Fold 1/masks")


# folders of classes


def test_class_folders_give_tissues(tmp_path):
    for name in ("ADI", "TUM", "BACK"):
        (tmp_path / name).mkdir()
        for i in range(2):
            tifffile.imwrite(tmp_path / f"{name}/{name}-{i}.tif", picture(i), photometric="rgb")
    p = patch_folders(tmp_path)
    assert p.table["field"].tolist() == [
        "ADI/ADI-0",
        "ADI/ADI-1",
        "BACK/BACK-0",
        "BACK/BACK-1",
        "TUM/TUM-0",
        "TUM/TUM-1",
    ]
    assert (
        [f.labels for f in p] == [{"tissue": t} for t in (8, 8, 0, 0, 1, 1)]
        and {*p.table["mpp"]} == {0.5}
        and p.labels == ("tissue",)
    )
    assert np.array_equal(p[5].image, picture(1))
    assert "abnormal epithelium" in repr(p[5])


def test_class_folders_of_other_names_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no pictures here"):
        patch_folders(tmp_path)
    save(tmp_path / "NORMAL/a.tif", picture())
    with pytest.raises(BadInput, match=r"NORMAL: not the folder of a class\. Did you mean `NORM`"):
        patch_folders(tmp_path)


# maps and pictures that were spoilt before they came here


def make_crag(root):
    for i, part in enumerate(("train", "valid")):
        save(root / f"{part}/Images/{part}_1.png", picture(1))
        save(root / f"{part}/Annotation/{part}_1.png", squares(3 + i, 7).astype(np.uint8))
    return root


def make_classes(root):
    for name in ("ADI", "TUM"):
        (root / name).mkdir()
        tifffile.imwrite(root / f"{name}/{name}-1.tif", picture(), photometric="rgb")
    return root


def glands():
    "Five glands, and the pieces that JPEG makes of them."
    ids = np.zeros((48, 64), np.uint8)
    for i in range(5):
        cv2.ellipse(ids, (7 + 12 * i, 24), (5, 20), 0, 0, 360, i + 1, -1)
    return ids


def after_jpeg(ids):
    data = io.BytesIO()
    Image.fromarray(ids).save(data, "JPEG", quality=90)
    return np.asarray(Image.open(data))


def into_channel(root, ids):
    path = root / "Fold 1/masks/fold1/masks.npy"
    masks = np.load(path) * 0
    masks[0, ..., 0] = ids
    np.save(path, masks)


MAPS = {  # reader -> how it is called, how its set is made, how the first map is written
    "glas": (glas, make_glas, lambda r, ids: save(r / "testA_1_anno.bmp", ids)),
    "crag": (crag, make_crag, lambda r, ids: save(r / "train/Annotation/train_1.png", ids)),
    "consep": (
        consep,
        lambda r: make_consep(r),
        lambda r, ids: save_mat(r / "Train/Labels/train_1.mat", inst_map=ids * 1.0, type_map=(ids > 0) * 1.0),
    ),
    "lizard": (
        lizard,
        lambda r: make_lizard(r),
        lambda r, ids: save_mat(
            r / "Lizard_Labels/Labels/consep_1.mat",
            inst_map=ids,
            id=np.unique(ids)[1:, None],
            **{"class": np.unique(ids)[1:, None] * 0 + 1},
        ),
    ),
    "pannuke": (pannuke, lambda r: make_pannuke(r), into_channel),
    "folders": (
        lambda r: folders(r, "gland"),
        lambda r: make_folder(r, False),
        lambda r, ids: save(r / "instances/a_1_000.png", ids),
    ),
}


@pytest.mark.parametrize("reader", MAPS)
def test_maps_that_lost_their_numbers_are_refused_by_every_reader(tmp_path, reader):
    read, make, write = MAPS[reader]
    root = make(tmp_path)
    write(root, glands())
    regions = read(root)
    assert regions[0].labels[regions.labels[0]].max() == 5
    for lost in (
        after_jpeg(glands()),
        cv2.resize(
            cv2.resize(glands(), (45, 34), interpolation=cv2.INTER_AREA), (64, 48), interpolation=cv2.INTER_LINEAR
        ),
    ):
        write(root, lost)
        with pytest.raises(BadInput, match="specks and lines between other instances"):
            regions[0]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.jpeg", "a.tif", "a.webp", "a.jp2"])
def test_maps_in_files_that_lose_numbers_are_refused(tmp_path, name):
    "Whatever the ending says, and even where little is lost."
    path = tmp_path / name
    ids = squares(1, 2).astype(np.uint8)
    if name == "a.tif":
        tifffile.imwrite(path, ids, compression="jpeg")
    else:
        Image.fromarray(ids).save(path, {".webp": "WEBP", ".jp2": "JPEG2000"}.get(path.suffix, "JPEG"), quality=100)
    with pytest.raises(BadInput, match=r"stored as \w+, which changes numbers.*PNG"):
        read_map(path)
    for whole in ("lzw", "zlib", None):
        tifffile.imwrite(tmp_path / "whole.tif", ids, compression=whole)
        assert np.array_equal(read_map(tmp_path / "whole.tif"), ids)


@pytest.mark.parametrize("name", ["a.png", "b.tif"])
def test_no_flipped_bit_of_a_map_is_read_as_another_number(tmp_path, name):
    "Files with a checksum are held to it, which the decoder alone does not do."
    path = tmp_path / name
    ids = squares(1, 2, 3).astype(np.uint8)
    if name == "a.png":
        save(path, ids)
    else:
        tifffile.imwrite(path, ids, compression="zlib", metadata=None)
    whole = path.read_bytes()
    begin = whole.index(b"IDAT") + 4 if name == "a.png" else tifffile.TiffFile(path).pages[0].dataoffsets[0]
    for at in range(begin, begin + 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = read_map(path)
        except BadInput:
            continue
        assert np.array_equal(found, ids), at


def test_crowded_nuclei_are_no_lost_numbers():
    "Touching instances, slivers between them, and two hundred of them: as drawn they are read, at half the size too."
    rng = np.random.default_rng(0)
    ids = np.zeros((256, 256), np.int32)
    for i in range(200):
        cv2.ellipse(
            ids,
            rng.integers(0, 256, 2).tolist(),
            rng.integers(4, 12, 2).tolist(),
            int(rng.integers(180)),
            0,
            360,
            i + 1,
            -1,
        )
    for some in (ids, ids[::2, ::2]):
        assert clean_instances(some, "x").max() > 80
    with pytest.raises(BadInput, match="lost to JPEG or to smoothing"):
        clean_instances(cv2.resize(ids.astype(np.float32), (128, 128), interpolation=cv2.INTER_AREA).round(), "x")


def as_tiff(path, image):
    tifffile.imwrite(path, image, photometric="rgb")


BLACK = {  # reader -> how it is called, how its set is made, its first picture
    "glas": (glas, make_glas, "testA_1.bmp"),
    "crag": (crag, make_crag, "train/Images/train_1.png"),
    "consep": (consep, lambda r: make_consep(r), "Train/Images/train_1.png"),
    "lizard": (lizard, lambda r: make_lizard(r), "Lizard_Images1/consep_1.png"),
    "folders": (lambda r: folders(r, "gland"), lambda r: make_folder(r, False), "images/a_1_000.jpg"),
    "patch_folders": (patch_folders, make_classes, "ADI/ADI-1.tif"),
}


@pytest.mark.parametrize("reader", BLACK)
@pytest.mark.parametrize("rounded", [np.floor, np.rint])
def test_pictures_from_nought_to_one_are_refused_by_every_reader(tmp_path, reader, rounded):
    read, make, name = BLACK[reader]
    regions = read(make(tmp_path))
    save(tmp_path / name, rounded(picture() / 255).astype(np.uint8))
    with pytest.raises(BadInput, match=f"{name}: black: no value above [01].*0 to 255"):
        regions[0]
    tifffile.imwrite((tmp_path / name).with_suffix(".tif"), np.float32(picture() / 255), photometric="rgb")
    if name.endswith(".tif"):
        with pytest.raises(BadInput, match="32 bits"):
            regions[0]


def test_arrays_from_nought_to_one_are_refused(tmp_path):
    path = make_pannuke(tmp_path) / "Fold 1/images/fold1/images.npy"
    images = np.load(path)
    for wrong in (images / 255, np.float32(images / 255), (images / 255).astype(np.uint8)):
        np.save(path, wrong)
        with pytest.raises(BadInput, match="images.npy: black: no value above [01]"):
            pannuke(tmp_path)[0]
    for right in (images, np.float32(images), images.astype(np.uint8), images.astype(np.uint16)):
        np.save(path, right)
        assert np.array_equal(pannuke(tmp_path)[0].image, picture(0))


@pytest.mark.parametrize(
    "error",
    [IndexError("beyond"), ZeroDivisionError(), MemoryError(), OSError(5, "Input/output error"), RecursionError()],
    ids=lambda e: type(e).__name__,
)
def test_whatever_a_region_raises_is_said_of_it(tmp_path, monkeypatch, error):
    regions = crag(make_crag(tmp_path))

    def raising(*args, **options):
        raise error

    monkeypatch.setattr("histonb.datasets.glands.read_image", raising)
    with pytest.raises(BadInput, match=f"Annotation/train_1.png: unexpected {type(error).__name__} in glands.py, line"):
        regions[0]
    with pytest.raises(IndexError):
        regions[2]  # which ends a loop


# any folder


def make_folder(root, types=True):
    for i, name in enumerate(("a_1_000", "a_1_001", "b_000")):
        save(root / f"images/{name}.jpg", picture(i))
        save(root / f"instances/{name}.png", squares(400 + i, 7, 12).astype(np.uint16))
        if types:
            save_mat(root / f"types/{name}.mat", inst_type=np.array([[1], [2], [4]]), inst_centroid=np.zeros((3, 2)))
    return root


def test_a_folder_is_read_with_types_in_the_order_of_ids(tmp_path):
    f = folders(make_folder(tmp_path), "nucleus", types="types")
    assert (
        f.table["case"].tolist() == ["a_1", "a_1", "b"]
        and f.labels == ("nucleus", "nucleus-type-consep")
        and f.table["mpp"].tolist() == [0.25] * 3
    )
    assert np.array_equal(f[0].labels["nucleus"], squares(3, 1, 2)) and np.array_equal(
        f[0].labels["nucleus-type-consep"], squares(4, 1, 2)
    )
    assert np.array_equal(pickle.loads(pickle.dumps(f))[0].labels["nucleus"], squares(3, 1, 2))


def test_a_folder_takes_other_tasks_maps_and_cases(tmp_path):
    make_folder(tmp_path, types=False)
    (tmp_path / "instances").rename(tmp_path / "masks")
    f = folders(tmp_path, "gland", maps="masks", mpp=0.5, case=r"(\w)_\d_")
    assert (
        f.table["case"].tolist() == ["a", "a", "b_000"] and f.labels == ("gland",) and f[0].mpp == 0.5
    )  # the last has no such part
    assert f.counts["with a name that tells no case"] == 1


def test_a_folder_sets_aside_what_lacks_a_part(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "types/a_1_000.mat").unlink()
    (tmp_path / "instances/b_000.png").unlink()
    save(tmp_path / "instances/c_000.png", squares(1).astype(np.uint8))
    f = folders(tmp_path, "nucleus", types="types")
    assert f.table["field"].tolist() == ["a_1_001"]
    assert dict(zip(f.quarantine["slide"], f.quarantine["fault"], strict=True)) == {
        "a_1_000": "a picture without types",
        "b_000": "a picture without map",
        "c_000": "a map without picture",
    }
    (tmp_path / "types/a_1_001.mat").unlink()
    with pytest.raises(BadInput, match="no region can be used"):
        folders(tmp_path, "nucleus", types="types")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"task": "nuclei"}, "Did you mean `nucleus`"),
        ({"task": "tissue"}, "no task of the kind instances"),
        ({"task": "nucleus", "types": "types", "type_task": "gland"}, "kind types"),
        ({"task": "nucleus", "case": "("}, "no regular expression"),
        ({"task": "nucleus", "case": "a"}, "0 groups"),
        ({"task": "nucleus", "maps": "masks"}, "none of 3 pictures has a map"),
    ],
)
def test_a_folder_refuses_what_does_not_fit(tmp_path, options, fault):
    with pytest.raises(BadInput, match=fault):
        folders(make_folder(tmp_path), **options)


def test_a_folder_refuses_types_of_another_map(tmp_path):
    f = folders(make_folder(tmp_path), "nucleus", types="types")
    save_mat(tmp_path / "types/a_1_000.mat", inst_type=np.array([[1], [2]]))
    with pytest.raises(BadInput, match=r"a_1_000\.mat: 2 types for 3 instances"):
        f[0]
    save_mat(tmp_path / "types/a_1_001.mat", inst_type=np.array([[1], [2], [5]]))
    with pytest.raises(BadInput, match="type 5 is none of nucleus-type-consep"):
        f[1]
    save(tmp_path / "instances/b_000.png", np.zeros((48, 64), np.uint16))
    save_mat(tmp_path / "types/b_000.mat", inst_type=np.zeros((0, 1)))
    assert not f[2].labels["nucleus-type-consep"].any()  # a patch without nuclei


@needs(CONSEP)
def test_real_patches_of_consep_are_read():
    f = folders(CONSEP, "nucleus", types="types")
    assert len(f) == 432 and not len(f.quarantine) and f.table["case"].nunique() == 27
    rows = range(0, 432, 27)
    for i in rows:
        one = f[i]
        row = f.table.iloc[i]
        raw = read_map(row["map"])
        types, centres = read_mat(row["types"], "inst_type", "inst_centroid")
        assert one.image.shape == (256, 256, 3) and not np.isin(one.labels["nucleus-type-consep"], [255]).any()
        for number, t, (x, y) in zip(np.setdiff1d(raw, [0]), types.ravel(), centres, strict=True):
            ys, xs = np.nonzero(raw == number)
            assert abs(xs.mean() - x) < 1 and abs(ys.mean() - y) < 1  # the row is this instance's
            assert {*np.unique(one.labels["nucleus-type-consep"][raw == number])} <= {int(t), 0}  # 0: a sliver


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_an_archive_in_place_of_an_array_is_refused(tmp_path, kind):
    make_pannuke(tmp_path)
    path = next(tmp_path.rglob(f"{kind}.npy"))
    with open(path, "wb") as f:
        np.savez(f, a=np.zeros(3))
    with pytest.raises(BadInput, match="unreadable as an array"):
        pannuke(tmp_path)


def test_organs_that_are_no_letters_are_left_out(tmp_path):
    make_pannuke(tmp_path)
    path = next(tmp_path.rglob("types.npy"))
    data = path.read_bytes()
    path.write_bytes(data[:-5] + b"\x31" + data[-4:])
    assert (pannuke(tmp_path).table["organ"] == "").all() and pannuke(tmp_path)[0].image.any()


def test_a_table_that_lists_nothing_is_no_foreign_error(tmp_path):
    make_lizard(tmp_path)
    (tmp_path / "Lizard_Labels/info.csv").write_text("Filename,Source,Split\n")
    with pytest.raises(BadInput, match="does not give its fold"):
        lizard(tmp_path)
    save(tmp_path / "glas/train_1.bmp", picture())
    save(tmp_path / "glas/train_1_anno.bmp", squares(1).astype(np.uint8))
    (tmp_path / "glas/Grade.csv").write_text("name, patient ID, grade (GlaS)\n")
    with pytest.raises(BadInput, match="does not give its patient"):
        glas(tmp_path / "glas")
