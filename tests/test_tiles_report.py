"The report on tiles over cohorts of pictures: sicapv2 and pairs, by parameters alone."

import pandas as pd
import pytest
import test_pairs
import test_sicapv2
from conftest import run_report

from histonb.slides.slides import open_slide
from histonb.slides.tile_store import SlideTiles, TileShards
from histonb.synthetic.phantom import write_cohort


def test_sicapv2_with_its_official_parts(tmp_path):
    root = test_sicapv2.write(tmp_path / "SICAPv2", size=512)
    error, metrics = run_report(
        "tiles",
        tmp_path,
        cohort="sicapv2",
        root=str(root),
        split="given",
        val_partition="Val1",
        mpp=[512 / 224],
        keep_all=True,
    )
    assert metrics, error[-3000:]
    table = pd.read_parquet(tmp_path / "run/tiles.parquet")
    assert metrics["slides"] == metrics["tiles"] == 20 and metrics["leak"]["leaking_cases"] == 0
    assert table.groupby("split").case.agg(set).to_dict() == {
        "train": {"patient 7", "patient 9"},
        "val": {"patient 8"},
        "test": {"patient 10"},
    }
    assert (
        table.label == table.slide.map(dict(test_sicapv2.listing(*test_sicapv2.SLIDES))).map(test_sicapv2.GRADES)
    ).all()
    assert {*metrics["per_class"]} == {"healthy", "gleason3", "gleason4", "gleason5"}
    stored = TileShards(tmp_path / "run")
    slides = {p.stem: p for p in (root / "images").iterdir()}
    straight = SlideTiles(stored.table, slides, slide_mpp=dict.fromkeys(slides, 1.0))
    for i in range(0, 20, 7):
        assert abs(stored[i][0].astype(int) - straight[i][0]).mean() < 4


def test_a_cohort_at_two_resolutions(tmp_path):
    error, metrics = run_report("tiles", tmp_path, n_slides=5, height=1400, width=1200, mpp=[0.96, 0.48])
    assert metrics, error[-3000:]
    table = pd.read_parquet(tmp_path / "run/tiles.parquet")
    assert metrics["slides"] == 5 and metrics["leak"]["leaking_cases"] == 0 and metrics["leak"]["cases"] == 5
    kept = table[table.kept].groupby("case")
    assert kept.mpp.agg(set).eq({0.48, 0.96}).all() and kept.split.nunique().eq(1).all()
    assert len(TileShards(tmp_path / "run")) == metrics["tiles"]


def test_pairs_from_a_code_table_in_text(tmp_path):
    images = tmp_path / "images"
    masks = tmp_path / "masks"
    for i in range(6):
        for folder, name, array in (
            (images, f"p{i}.jpg", test_pairs.grain(i, 448, 672)),
            (masks, f"p{i}_m.png", test_pairs.codes_of(i, 448, 672)),
        ):
            folder.mkdir(exist_ok=True)
            test_pairs.Image.fromarray(array).save(folder / name)
    (masks / "p5_m.png").unlink()
    given = dict(
        cohort="pairs",
        root=str(images),
        masks=str(masks),
        mask_rule="*_m",
        codes="0: gleason3, 1: healthy, 2: healthy, 3: healthy, 4: ignore",
    )
    error, metrics = run_report(
        "tiles", tmp_path, **given, min_coverage=0.1, val_fraction=0.2, test_fraction=0.2, limit=4
    )
    assert metrics, error[-3000:]
    table = pd.read_parquet(tmp_path / "run/tiles.parquet")
    assert (
        metrics["slides"] == 4
        and metrics["quarantined"] == 1
        and metrics["per_class"] == {"gleason3": 24}
        and {*table.split} == {"train", "val", "test"}
    )
    error, refused = run_report("tiles", tmp_path, **{**given, "codes": "0: gleson3"})
    assert refused is None and "did you mean" in error.lower()


@pytest.mark.parametrize(
    "parameters, says",
    [
        ({"cohort": "sicap"}, "Did you mean `sicapv2`?"),
        ({"cohort": "panda", "provider": "radbud"}, "Did you mean `radboud`?"),
    ],
)
def test_misspelt_parameters(tmp_path, parameters, says):
    from test_cohorts import make

    make(tmp_path / "set")
    error, refused = run_report("tiles", tmp_path, root=str(tmp_path / "set"), **parameters)
    assert refused is None and says in error


def test_a_slide_that_can_be_tiled_but_not_drawn(tmp_path):
    "The level between the two that tiling reads is damaged: the picture says so, and the report comes to its end."
    root = write_cohort(tmp_path / "cohort", n_slides=4, seed=0, shape=(2048, 1300), workers=0)
    for path in (root / "train_images").iterdir():
        with open_slide(path) as slide:
            at = int(slide.levels[1].offsets[0, 0, 0])
        data = bytearray(path.read_bytes())
        data[at : at + 64] = bytes(64)
        path.write_bytes(data)
    error, metrics = run_report("tiles", tmp_path, cohort="panda", root=str(root), split="random-tiles")
    assert metrics and metrics["slides"] == 4 and metrics["quarantined"] == 0, error[-3000:]
