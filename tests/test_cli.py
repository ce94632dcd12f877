"""The command as a person uses it."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

HISTONB = str(Path(sys.executable).with_name("histonb"))
ROOT = Path(__file__).resolve().parents[1]


def histonb(*args, cwd=ROOT):
    return subprocess.run([HISTONB, *map(str, args)], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("command", [(), ("run",), ("status",), ("doctor",), ("tile",)])
def test_help_says_what_a_command_does(command):
    done = histonb(*command, "--help")
    assert done.returncode == 0 and "Usage: histonb" in done.stdout
    if command in ((), ("run",), ("tile",)):
        assert "Examples:" in done.stdout


@pytest.mark.parametrize(
    "args, hint",
    [
        (["stauts"], "status"),
        (["run", "runs/x.yaml", "--forse"], "--force"),
        (["run", "runs/absent.yaml"], "no such file. Give the path of a study"),
        (["tile", "absent.tiff", "--out", "OUT"], "absent.tiff"),
    ],
)
def test_mistakes_get_a_hint_and_no_traceback(args, hint, tmp_path):
    done = histonb(*[str(tmp_path / "out") if a == "OUT" else a for a in args])
    assert done.returncode == 2
    assert hint in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_the_traceback():
    done = histonb("--debug", "run", "runs/absent.yaml")
    assert done.returncode != 0 and "Traceback" in done.stderr and "BadInput" in done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "histonb",
        "histonb.core.files",
        "histonb.cli",
        "histonb.studies.runs",
        "histonb.studies.execution",
        "histonb.studies.pages",
    ],
)
def test_nothing_heavy_is_imported_early(module):
    heavy = {"torch", "numpy", "pandas", "papermill", "nbformat", "nbconvert", "matplotlib", "timm"}
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_doctor_names_findings_and_remedies():
    done = histonb("doctor")
    assert done.returncode == 0, done.stdout
    for word in ("Python", "torch", "cores", "memory", "disk", "codecs", "git", "kernel", "SLURM", "extra `bench`"):
        assert word in done.stdout
    for line, following in zip(done.stdout.splitlines(), done.stdout.splitlines()[1:] + [""], strict=True):
        if line.startswith(("  note", "  MISSING")):
            assert "->" in following, f"no remedy after: {line}"


def test_status_outside_a_repository_and_without_studies(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").touch()
    assert "no studies" in histonb("status", cwd=tmp_path).stdout


def test_tile_a_cohort_and_single_slides(tmp_path):
    from histonb.synthetic.phantom import write_cohort

    write_cohort(tmp_path / "cohort", n_slides=2, shape=(1500, 1200), workers=0)
    done = histonb("tile", tmp_path / "cohort", "--out", tmp_path / "tiles")
    assert done.returncode == 0, done.stderr
    tiles = pd.read_parquet(tmp_path / "tiles/tiles.parquet")
    assert tiles["slide"].nunique() == 2 and tiles["kept"].any() and (tiles.loc[tiles["kept"], "label"] >= 0).all()
    slides = sorted((tmp_path / "cohort/train_images").glob("*.tiff"))
    broken = tmp_path / "broken.tiff"
    broken.write_bytes(b"")
    done = histonb("tile", *slides, broken, "--out", tmp_path / "single", "--coordinates-only")
    assert done.returncode == 0, done.stderr
    single = pd.read_parquet(tmp_path / "single/tiles.parquet")
    assert single["kept"].sum() == tiles["kept"].sum() and (single["label"] == -1).all()
    assert "1 slides in" in done.stdout and "broken" in (tmp_path / "single/quarantine.csv").read_text()


def test_tile_takes_files_of_any_name_and_sets_unusable_ones_aside(tmp_path):
    "Equal stems, long and strange names; and whatever cannot even be looked for."
    from histonb.synthetic.phantom import write_cohort

    write_cohort(tmp_path / "cohort", n_slides=1, shape=(1000, 1000), workers=0)
    slide = next((tmp_path / "cohort/train_images").glob("*.tiff"))
    names = [
        "a/x.tiff",
        "b/x.tiff",
        "x.svs",
        "y.b.tiff",
        ".z.tiff",
        "\u8abf" * 28 + ".tiff",
        "100%41 #?'\n.TIFF",
        "-q.tiff",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(slide)
    undecodable = b"caf\xe9.tiff"
    endless = "n" * 300 + ".tiff"
    (tmp_path / "loop.tiff").symlink_to(tmp_path / "loop.tiff")
    done = histonb(
        "tile",
        "--out",
        "out",
        "--coordinates-only",
        "--",
        *names,
        endless,
        "loop.tiff",
        "a",
        undecodable.decode(errors="surrogateescape"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(tmp_path / "out/tiles.parquet")
    quarantine = pd.read_csv(tmp_path / "out/quarantine.csv", keep_default_na=False)
    assert table["slide"].unique().tolist() == [
        "a/x.tiff",
        "b/x.tiff",
        "x.svs",
        "y.b",
        ".z",
        "\u8abf" * 28,
        "100%41 #?'\n",
        "-q",
    ]
    assert quarantine["slide"].tolist() == ["caf\\udce9", "n" * 300, "loop", "a"] and (quarantine["remedy"] != "").all()
    assert "4 slides in" in done.stdout
    alone = histonb("tile", endless, "--out", "alone", cwd=tmp_path)
    assert alone.returncode == 2 and "Traceback" not in alone.stderr and "n" * 300 in alone.stderr


def test_annotate_goes_on_after_a_slide_that_raises_anything(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from histonb import cli
    from histonb.annotate import slide as annotate
    from histonb.core.errors import BadInput
    from histonb.core.files import write_json
    from histonb.segment import predictors

    def annotated(slide, scorer, out, **options):
        if slide.stem == "bad":
            raise IndexError("index 7 is out of bounds")
        if slide.stem == "full":
            raise OSError(28, "No space left on device")
        if slide.stem == "known":
            raise BadInput(slide, "no such file", "Check the path.")
        if slide.stem != "half":
            write_json(out / slide.stem / "annotation.json", {"counts": {"Gland": 3}, "tissue_mm2": 1.0, "note": ""})
        return out / slide.stem

    monkeypatch.setattr(annotate, "annotate_slide", annotated)
    monkeypatch.setattr(predictors, "load_predictor", lambda *args: None)
    for name in ("a", "bad", "full"):
        (tmp_path / f"{name}.svs").touch()

    def run(*slides):
        return CliRunner().invoke(
            cli.app,
            ["annotate", *(str(tmp_path / slide) for slide in slides), "--weights", "stain", "--out", str(tmp_path)],
        )

    done = run("a.svs", "bad.svs", "known.svs", "half.svs", "b.svs")
    assert done.exit_code == 2 and done.stdout.count("3 Gland in 1.00 mm2") == 2
    for said in (
        "bad.svs: unexpected IndexError in annotate.py, line",
        "known.svs: no such file",
        "half/annotation.json: there is no such file",
    ):
        assert said in done.output
    assert isinstance(run("bad.svs").exception, BadInput)
    assert run("a.svs", "full.svs", "b.svs").exception.errno == 28


def test_tile_says_how_much_of_a_slide_is_damaged(tmp_path):
    "And takes as much as its option allows; a resolution that is missing is asked for by the name of the other."
    import numpy as np
    from typer.testing import CliRunner

    from histonb import cli
    from histonb.slides.slides import open_slide
    from histonb.synthetic.phantom import draw_slide
    from histonb.synthetic.writing import write_slide

    slide = tmp_path / "a.tiff"
    write_slide(slide, draw_slide(1, (1000, 1000), cover=(0.6, 0.7)).image, mpp=None, tile=256)
    data = bytearray(slide.read_bytes())
    with open_slide(slide) as opened:
        at = opened.levels[0]
    fullest = np.argmax(at.counts)
    data[at.offsets.flat[fullest] : at.offsets.flat[fullest] + 100] = bytes(100)
    slide.write_bytes(data)

    def tile(out, *options):
        return CliRunner().invoke(cli.app, ["tile", str(slide), "--out", str(tmp_path / out), *options])

    assert "damaged internal tile" in str(tile("a", "--max-damaged", "0").exception)
    assert "tiles lie on damaged pixels" in tile("a").stdout
    assert "`--slide-mpp 0.5`" in str(tile("b", "--mpp", "0.5").exception)
    assert tile("b", "--mpp", "0.5", "--slide-mpp", "0.5").exit_code == 0
    assert tile("c", "--mpp", "0.5", "--mpp", "0.75", "--slide-mpp", "0.5").exit_code == 0
    assert {*pd.read_parquet(tmp_path / "c/tiles.parquet").mpp} == {0.5, 0.75}
