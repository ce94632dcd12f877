"""Studies run through the real command and real kernels: what is skipped, what stops, and what is left behind."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from conftest import write_report_notebook

from histonb.core.errors import BadInput
from histonb.core.files import read_json
from histonb.core.parameters import RENAMED
from histonb.pretrain.config import PretrainConfig
from histonb.studies import states as states_module
from histonb.studies.execution import StageFailed, run_study, status
from histonb.studies.pages import format_duration, write_index, write_report
from histonb.studies.states import is_running
from histonb.studies.study import RENAMED_REPORTS, load_study, parameter_types

HISTONB = str(Path(sys.executable).with_name("histonb"))
ROOT = Path(__file__).resolve().parents[1]
STUDY = """
study: tiny
title: Two stages
stages:
  first:
    notebook: 10_first
    parameters: {n: 4}
  second:
    notebook: 20_second
    parameters: {first: "{first}"}
"""
FIRST = [
    "# First\n\nIt has $n^2$ as its result.",
    "from histonb.studies.runs import start\nrun = start(out, {'n': n})",
    "## Work",
    "print('working'); run.path('n.txt').write_text(str(n))",
    "run.finish(n=n, headline={'n squared': n**2})",
]
SECOND = [
    "# Second",
    "from pathlib import Path\nfrom histonb.studies.runs import start\nrun = start(out, {}, inputs={'first': first})",
    "total = int(Path(first, 'n.txt').read_text()) + 1",
    "run.finish(total=total)",
]
SLOW = [
    "# Slow",
    "import multiprocessing, time\nfrom histonb.core.files import atomic_path\n"
    "from histonb.studies.runs import start\nrun = start(out, {})",
    "worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(300,)); worker.start()\n"
    "with atomic_path(run.path('half.txt')) as f:\n"
    "    f.write_text('half'); print('worker', worker.pid, flush=True); time.sleep(300)",
    "run.finish()",
]


@pytest.fixture
def root(tmp_path):
    """A repository with a study of two stages."""
    (tmp_path / "nbs/reports").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "settings.ini").touch()
    write_report_notebook(tmp_path, "10_first", 'out = ""\nn = 1', FIRST)
    write_report_notebook(tmp_path, "20_second", 'out = ""\nfirst = ""', SECOND)
    (tmp_path / "runs/tiny.yaml").write_text(STUDY)
    return tmp_path


def run(root, *args, **kwargs):
    return subprocess.run([HISTONB, "run", *args], cwd=root, capture_output=True, text=True, **kwargs)


def states(root):
    return [row["state"] for row in status(root)]


def ran(output):
    """Which stages executed, from the log."""
    return re.findall(r"^(\w+): finished in", output, re.M)


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_study_runs_once_and_again_only_where_something_changed(root, capsys):
    def ran_now(**options):
        run_study(root / "runs/tiny.yaml", **options)
        return ran(capsys.readouterr().out)

    done = run(root, "runs/tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert ran(done.stdout) == ["first", "second"]
    assert "first: cell 4/5  Work" in done.stdout and "first | working" in done.stdout
    assert states(root) == ["finished", "finished"]
    assert read_json(root / "runs/tiny/second/metrics.json") == {"total": 5}
    for stage in ("first", "second"):
        left = {p.name for p in (root / "runs/tiny" / stage).iterdir()}
        assert {"notebook.ipynb", "metrics.json", "provenance.json", "report.html", "stage.json"} <= left
    assert ran_now() == []
    assert ran(run(root, "runs/tiny.yaml", "--only", "first", "--force").stdout) == ["first"]
    assert states(root) == ["finished", "finished"]  # what it read was made again, and is the same
    (root / "more.txt").write_text("5")
    write_report_notebook(
        root,
        "10_first",
        'out = ""\nn = 1',
        [
            c.replace("str(n)", "Path('more.txt').read_text()").replace("print(", "from pathlib import Path; print(")
            for c in FIRST
        ],
    )
    assert ran_now() == ["first", "second"]
    (root / "more.txt").write_text("6")  # what no parameter and no input tells of
    assert ran_now(only="first", force=True) == ["first"]
    assert [(r["state"], r["why"]) for r in status(root)] == [("finished", ""), ("stale", "changed: outputs of first")]
    assert ran_now() == ["second"]
    assert read_json(root / "runs/tiny/second/metrics.json") == {"total": 7}
    (root / "runs/tiny/first/metrics.json").unlink()
    assert ran_now() == ["first"]


def test_records_and_pages_hold_no_path_of_the_machine_and_load_nothing(root):
    run_study(root / "runs/tiny.yaml")
    pages = [*root.glob("runs/tiny/*/*.*"), root / "runs/tiny/index.html"]
    assert len(pages) > 9
    for page in pages:
        text = page.read_text()
        assert str(root) not in text, page
        if page.suffix == ".html":
            assert not re.search(
                r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=.?(?:https?:)?//|@import|url\(", text
            ), page
    index = (root / "runs/tiny/index.html").read_text()
    assert "first/report.html" in index and "n squared" in index and "2 of 2 stages finished" in index


def test_a_failing_stage_stops_the_study_and_leaves_no_success(root):
    write_report_notebook(
        root,
        "10_first",
        'out = ""\nn = 1',
        [*FIRST[:2], "run.finish(n=n)", "## After the end", "raise KeyError('no such slide')"],
    )
    done = run(root, "runs/tiny.yaml")
    assert done.returncode == 1
    assert "KeyError: 'no such slide'" in done.stderr and "runs/tiny/first/notebook.ipynb" in done.stderr
    assert "Traceback" not in done.stderr.split("raise KeyError")[1]  # the notebook's own traceback, not the runner's
    assert states(root) == ["failed", "not run"]
    folder = root / "runs/tiny/first"
    assert not (folder / "metrics.json").exists() and not (folder / "report.html").exists()
    assert read_json(folder / "notebook.ipynb")["metadata"]["histonb"] == {"state": "failed"}
    assert "failed" in (root / "runs/tiny/index.html").read_text()
    write_report_notebook(root, "10_first", 'out = ""\nn = 1', FIRST)
    run_study(root / "runs/tiny.yaml")
    assert states(root) == ["finished", "finished"]


def test_a_notebook_that_forgets_to_finish_has_failed(root):
    write_report_notebook(root, "10_first", 'out = ""\nn = 1', FIRST[:-1])
    with pytest.raises(StageFailed, match="without a metrics.json"):
        run_study(root / "runs/tiny.yaml")


def test_a_fault_in_the_input_is_told_in_one_line(root):
    write_report_notebook(
        root,
        "10_first",
        'out = ""\nn = 1',
        ["from histonb.core.errors import BadInput\nraise BadInput('a.tiff', 'it is empty', 'Download it again.')"],
    )
    with pytest.raises(StageFailed) as e:
        run_study(root / "runs/tiny.yaml")
    assert str(e.value).startswith("stage `first` failed in cell 3 of 3: a.tiff: it is empty. Download it again.\n")


def test_a_kernel_that_dies_is_a_failure(root):
    write_report_notebook(
        root,
        "10_first",
        'out = ""\nn = 1',
        [*FIRST[:2], "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "run.finish()"],
    )
    with pytest.raises(StageFailed, match="memory"):
        run_study(root / "runs/tiny.yaml")
    book = read_json(root / "runs/tiny/first/notebook.ipynb")
    assert "failed" in book["cells"][0]["source"]
    assert [c["metadata"]["papermill"]["status"] for c in book["cells"][-2:]] == ["failed", "pending"]


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_everything_in_order(root, signum, code):
    write_report_notebook(root, "10_first", 'out = ""\nn = 1', SLOW)
    process = subprocess.Popen(
        [HISTONB, "run", "runs/tiny.yaml"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    worker = next(int(line.split()[-1]) for line in process.stdout if "| worker" in line)
    assert is_running(root / "runs/tiny/first") and states(root) == ["running", "not run"]
    with pytest.raises(BadInput, match=f"run by process {process.pid}"):
        run_study(root / "runs/tiny.yaml")
    os.killpg(process.pid, signum)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in message and "goes on from here" in message
    folder = root / "runs/tiny/first"
    assert {p.name for p in folder.iterdir()} == {"notebook.ipynb", "stage.json"}  # no half-written file, no metrics
    assert read_json(folder / "notebook.ipynb")["metadata"]["histonb"] == {"state": "interrupted"}
    assert not alive(worker)
    assert not is_running(root / "runs/tiny/first") and states(root) == ["interrupted", "not run"]


def test_a_killed_runner_leaves_no_lock_and_no_kernel(root):
    write_report_notebook(
        root,
        "10_first",
        'out = ""\nn = 1',
        [*SLOW[:2], "import os, time; print('kernel', os.getpid(), flush=True); time.sleep(300)"],
    )
    process = subprocess.Popen(
        [HISTONB, "run", "runs/tiny.yaml"], cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    kernel = next(int(line.split()[-1]) for line in process.stdout if "| kernel" in line)
    process.kill()
    process.wait()
    assert states(root) == ["interrupted", "not run"]
    for _ in range(150):  # the kernel looks for its parent now and then
        if not alive(kernel):
            break
        time.sleep(0.2)
    assert not alive(kernel)
    write_report_notebook(root, "10_first", 'out = ""\nn = 1', FIRST)
    run_study(root / "runs/tiny.yaml")
    assert states(root) == ["finished", "finished"]


def test_what_a_stopped_stage_had_computed_is_there_when_it_resumes_but_not_when_it_changed(root):
    resume = [
        *FIRST[:2],
        "seen = run.path('part.txt').exists(); run.path('part.txt').write_text('x')\nassert seen, 'first time'",
        "run.finish(seen=seen)",
    ]
    write_report_notebook(root, "10_first", 'out = ""\nn = 1', resume)
    with pytest.raises(StageFailed, match="first time"):
        run_study(root / "runs/tiny.yaml", only="first")
    run_study(root / "runs/tiny.yaml", only="first")
    (root / "runs/tiny.yaml").write_text(STUDY.replace("n: 4", "n: 5"))
    with pytest.raises(StageFailed, match="first time"):
        run_study(root / "runs/tiny.yaml", only="first")


def test_full_disk_while_saving_the_notebook(root, monkeypatch):
    from papermill import engines

    saved = engines.write_ipynb

    def full(nb, path):
        if any(
            c.metadata.get("papermill", {}).get("status") in ("running", "completed") and "working" in c.source
            for c in nb.cells
        ):
            Path(path).write_text('{"cells": [')  # as far as it got
            raise OSError(errno.ENOSPC, "No space left on device", path)
        saved(nb, path)

    monkeypatch.setattr(engines, "write_ipynb", full)
    with pytest.raises(StageFailed, match="No space left on device: notebook.ipynb(.|\n)*Free some disk space"):
        run_study(root / "runs/tiny.yaml")
    assert {p.name for p in (root / "runs/tiny/first").iterdir()} == {"stage.json"}  # the torn notebook is gone
    monkeypatch.undo()
    run_study(root / "runs/tiny.yaml")
    assert states(root) == ["finished", "finished"]


def test_full_disk_for_the_whole_command(root):
    disk = root / "runs"
    plan = (disk / "tiny.yaml").read_text()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        (disk / "tiny.yaml").write_text(plan)
        write_report_notebook(
            root,
            "10_first",
            'out = ""\nn = 1',
            [*FIRST[:2], "with open(run.path('big.bin'), 'wb') as f: f.write(bytes(10**6))", FIRST[-1]],
        )
        done = run(root, "runs/tiny.yaml")
        assert done.returncode == 1
        assert "No space left on device" in done.stderr and "Free some disk space" in done.stderr
        assert not list(disk.rglob("metrics.json"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        ("n: 4", "m: 4", "stage `first`: unknown key `m`"),
        ("n: 4", "n: 4.5", "`n` is 4.5, not of type int"),
        ("10_first", "10_frist", "no notebook `10_frist` in nbs/reports. Did you mean `10_first`?"),
        ("{first}", "{frist}", "`{frist}`, which is no stage. Did you mean `first`?"),
        ("  first:\n", "  first:\n  first:\n", "`first` is given twice"),
        ("notebook: 20", "notebok: 20", "unknown key `notebok` in the stage. Did you mean `notebook`?"),
        ("stages:", "satges:", "unknown key `satges` in the study. Did you mean `stages`?"),
        ("study: tiny", "study: other", "Name it tiny like its file"),
    ],
)
def test_mistakes_are_found_before_anything_runs(root, right, wrong, message):
    path = root / "runs/tiny.yaml"
    path.write_text(STUDY.replace(right, wrong, 1))
    with pytest.raises(BadInput) as e:
        run_study(path)
    assert message in str(e.value) and "tiny.yaml" in str(e.value)
    assert not (root / "runs/tiny").exists()
    assert status(root)[0]["state"] == "unreadable"  # and does not hide the other studies


@pytest.mark.parametrize("former, now", RENAMED_REPORTS.items())
def test_the_former_name_of_a_report_leads_to_its_present_one(root, former, now):
    assert (ROOT / f"nbs/reports/{now}.ipynb").exists() and not (ROOT / f"nbs/reports/{former}.ipynb").exists()
    for name in (former, f"nbs/reports/{former}.ipynb"):
        (root / "runs/tiny.yaml").write_text(STUDY.replace("10_first", name))
        with pytest.raises(BadInput) as e:
            load_study(root / "runs/tiny.yaml")
        assert f"stage `first`: the report `{former}` is now called `{now}`. Rename it." in str(e.value)


@pytest.mark.parametrize("former, now", RENAMED.items())
def test_the_former_name_of_a_parameter_leads_to_its_present_one(root, former, now):
    write_report_notebook(root, "10_first", f'out = ""\nn = 1\n{now} = 0.5', FIRST)
    (root / "runs/tiny.yaml").write_text(STUDY.replace("n: 4", f"{former}: 0.5"))
    with pytest.raises(BadInput) as e:
        load_study(root / "runs/tiny.yaml")
    assert f"stage `first`: `{former}` is now called `{now}`. Rename it." in str(e.value)


@pytest.mark.parametrize(
    "given, said",
    [
        ("lr: fast", "`lr` is 'fast', not of type float | None"),
        ("steps: 10.5", "`steps` is 10.5"),
        ("arch: 18", "`arch` is 18"),
        ("head_bn: 1", "`head_bn` is 1"),
        ("global_scale: 0.4", "`global_scale` is 0.4"),
        ("global_scale: [a, b]", "`global_scale`"),
        ("batchsize: 8", "Did you mean `batch_size`"),
        ("lr: 0.1, global_scale: [0.4, 1], steps: 3, arch: resnet18, knn_every: null", ""),
    ],
)
def test_parameters_without_a_default_have_types_nevertheless(root, given, said):
    """What the preset of a pre-training decides is None in its report; a wrong value is found before anything runs."""
    (root / "nbs/reports/train_dino.ipynb").write_text((ROOT / "nbs/reports/train_dino.ipynb").read_text())
    study = root / "runs/tiny.yaml"
    study.write_text(STUDY + f"  train:\n    notebook: train_dino\n    parameters: {{{given}}}\n")
    if not said:
        assert load_study(study).stages["train"].parameters["lr"] == 0.1
        return
    with pytest.raises(BadInput) as error:
        load_study(study)
    assert said in str(error.value) and "stage `train`" in str(error.value)


def test_types_of_the_pretraining_report_are_those_of_its_configuration():
    hints = get_type_hints(PretrainConfig)
    types = parameter_types(ROOT / "nbs/reports/train_dino.ipynb")
    assert hints.keys() - types.keys() == {"mean", "std", "device"} and types.keys() - hints.keys() == {
        "processes",
        "elastic",
        "preset",
    }
    for name, hint in hints.items():
        wanted = str if get_origin(hint) is Literal else hint
        if get_origin(hint) is tuple:
            wanted = list[get_args(hint)[0]]
        if name in types:
            assert types[name] in (wanted, wanted | None), name


def test_unreadable_study_and_notebook(root):
    (root / "runs/tiny.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not readable as YAML"):
        load_study(root / "runs/tiny.yaml")
    (root / "runs/tiny.yaml").write_text(STUDY)
    (root / "nbs/reports/10_first.ipynb").write_text('{"cells": [')
    with pytest.raises(BadInput, match="10_first.ipynb: not valid JSON"):
        load_study(root / "runs/tiny.yaml")


def test_only_refuses_to_start_what_was_not_asked_for(root):
    with pytest.raises(BadInput, match="needs `first`, which is not run"):
        run_study(root / "runs/tiny.yaml", only="second")
    with pytest.raises(BadInput, match="no stage `frist`. Did you mean `first`?"):
        run_study(root / "runs/tiny.yaml", only="frist")


def test_an_input_file_that_changes_makes_its_stage_stale(root):
    table = root / "table.csv"
    table.write_text("1")
    write_report_notebook(root, "10_first", 'out = ""\nn = 1\ntable = ""', FIRST)
    (root / "runs/tiny.yaml").write_text(STUDY.replace("n: 4", "n: 4, table: table.csv"))
    run_study(root / "runs/tiny.yaml")
    table.write_text("2")
    assert [(r["state"], r["why"]) for r in status(root)] == [
        ("stale", "changed: inputs table"),
        ("stale", "first to be run again"),
    ]


@pytest.mark.parametrize("given", ["cohort", "[cohort]", "[{reader: glas, root: cohort}]"])
def test_a_label_corrected_in_place_makes_its_stage_stale(root, given):
    """Of equal size, in a folder named alone, in a list, or in a set's description; touching a file changes nothing."""
    (root / "cohort").mkdir()
    labels = root / "cohort/train.csv"
    labels.write_text("slide,grade\na,1\n")
    default = '""' if given == "cohort" else "[]"
    write_report_notebook(root, "10_first", f'out = ""\nn = 1\ncohort = {default}', FIRST)
    (root / "runs/tiny.yaml").write_text(STUDY.replace("n: 4", f"n: 4, cohort: {given}"))
    run_study(root / "runs/tiny.yaml")
    os.utime(labels, (1, 1))
    assert states(root) == ["finished", "finished"]
    labels.write_text("slide,grade\na,2\n")
    assert [(r["state"], r["why"]) for r in status(root)] == [
        ("stale", "changed: inputs cohort"),
        ("stale", "first to be run again"),
    ]


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("5")])
def test_an_output_that_is_gone_or_changed_is_made_again(root, change):
    run_study(root / "runs/tiny.yaml")
    change(root / "runs/tiny/first/n.txt")
    assert [(r["state"], r["why"]) for r in status(root)] == [
        ("stale", "no longer what it wrote: n.txt"),
        ("stale", "first to be run again"),
    ]
    run_study(root / "runs/tiny.yaml")
    assert (root / "runs/tiny/first/n.txt").read_text() == "4" and states(root) == ["finished", "finished"]


@pytest.mark.parametrize(
    "cell, says",
    [
        ("exit()", "ended before its last cell, with `exit..`: leave that out"),
        ("quit(2)", "SystemExit: 2"),
        ("import os; os._exit(3)", "ended by the notebook itself, with exit code 3: leave out `os._exit"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL: was there enough memory"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("open('/proc/nothing/here', 'w')", "FileNotFoundError"),
        ("raise PermissionError(13, 'Permission denied', 'x')", "x: you have no permission to write here"),
    ],
)
def test_how_a_notebook_ended_is_told_in_one_sentence(root, cell, says):
    write_report_notebook(root, "10_first", 'out = ""\nn = 1', [*FIRST[:2], cell, FIRST[-1]])
    with pytest.raises(StageFailed, match=f"stage `first` failed in cell .*{says}"):
        run_study(root / "runs/tiny.yaml")


def test_a_notebook_that_prints_too_much_is_cut(root):
    write_report_notebook(
        root, "10_first", 'out = ""\nn = 1', [*FIRST[:4], "for i in range(20): print('x'*1_000_000)", FIRST[-1]]
    )
    run_study(root / "runs/tiny.yaml")
    for name in ("notebook.ipynb", "report.html"):
        text = (root / "runs/tiny/first" / name).read_text()
        assert len(text) < 500_000 and "characters are left out" in text


@pytest.mark.parametrize(
    "cell, says",
    [
        ('out = ""\nn = = 1', "line 2 of the parameters cell is not Python"),
        ('%matplotlib inline\nout = ""', "line 1 of the"),
        ('out = ""\nn = None', "Write its type"),
        ('out = ""\nn = 2 + f(3)', "in the parameters cell"),
    ],
)
def test_a_parameters_cell_that_is_no_list_of_values(root, cell, says):
    write_report_notebook(root, "10_first", cell, FIRST)
    with pytest.raises(BadInput, match=says):
        load_study(root / "runs/tiny.yaml")


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "a: &a [x, x, x, x, x, x, x, x]\n"
            + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 8)}]\n" for m, n in zip("abcdef", "bcdefg", strict=True)),
            "aliases written out",
        ),
        ("a: &a [*a]", "nested without end"),
        ("[" * 5000, "nested without end"),
        ("a: 2001-99-99", "month"),
        ("a: " + "1" * 5000, "digits"),
        ("a: \0", "unacceptable character"),
        ("!!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_yaml_that_is_no_study(root, text, says):
    (root / "runs/tiny.yaml").write_text(text)
    with pytest.raises(BadInput, match=says):
        load_study(root / "runs/tiny.yaml")


@pytest.mark.parametrize("name", ["no", "on", "1", "2024-01-01", "~"])
def test_a_stage_whose_name_is_no_text_to_yaml(root, name):
    (root / "runs/tiny.yaml").write_text(STUDY.replace("first:", f"{name}:").replace("{first}", f"{{{name}}}"))
    with pytest.raises(BadInput, match="Put the name in quotes"):
        load_study(root / "runs/tiny.yaml")


@pytest.mark.parametrize("name", ["..", ".hidden", "a b", "a/b"])
def test_a_study_whose_name_is_no_folder(root, name):
    path = root / "runs" / f"{name.replace('/', '_')}.yaml"
    path.write_text(STUDY.replace("study: tiny", f"study: '{path.stem}'"))
    if "/" not in name:
        with pytest.raises(BadInput, match="not a name for a folder"):
            load_study(path)


def test_a_broken_record_of_a_stage_counts_as_none(root):
    run_study(root / "runs/tiny.yaml")
    path = root / "runs/tiny/first/stage.json"
    record = read_json(path)
    made = record["made_from"]
    for broken in (
        [],
        3,
        record | {"made_from": None},
        record | {"made_from": made | {"inputs": 3}},
        record | {"made_from": {}},
        record | {"state": []},
        record | {"seconds": "x"},
    ):
        path.write_text(json.dumps(broken))
        assert states(root) == ["not run", "stale"]
    path.write_text(json.dumps(record))
    for name, content in (("metrics.json", "[]"), ("provenance.json", "[]"), ("provenance.json", '{"files": 3}')):
        whole = (path.parent / name).read_text()
        (path.parent / name).write_text(content)
        assert states(root) == ["unreadable"]
        if content == "[]":
            with pytest.raises(BadInput):
                write_report(path.parent)
        (path.parent / name).write_text(whole)
    for name, write in (("study.json", write_index), ("first/notebook.ipynb", write_report)):
        damaged = root / "runs/tiny" / name
        for content in ("[]", '{"cells": [3]}', '{"study": 1, "title": 2, "stages": [3]}', "{"):
            damaged.write_text(content)
            with pytest.raises(BadInput):
                write(damaged.parent)


@pytest.mark.parametrize(
    "cell",
    [
        3,
        {},
        {"metadata": []},
        {"metadata": {"tags": 3}, "cell_type": "code", "source": ""},
        {"metadata": {}, "cell_type": "code", "source": [3]},
    ],
)
def test_cells_that_are_none_are_no_notebook(root, cell):
    (root / "nbs/reports/10_first.ipynb").write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(BadInput, match="not a notebook"):
        load_study(root / "runs/tiny.yaml")


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (119.6, "2 min 0 s"),
        (3599.7, "1 h 0 min"),
        (7170, "2 h 0 min"),
        (None, ""),
    ],
)
def test_lengths_of_time(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "given, says",
    [
        ({"nn": 5}, "unknown parameter `nn`. Did you mean `n`"),
        ({"n": "many"}, "`n` is 'many', not of type int"),
        ({"workers": -1}, "`workers` is -1"),
        ({"spread_weight": 0.2}, "`spread_weight` is now called `regulariser_weight`"),
    ],
)
def test_a_report_refuses_what_papermill_gives_it_wrongly(root, given, says):
    """By hand, where no study checks."""
    import papermill

    write_report_notebook(
        root,
        "10_first",
        'out = ""\nn = 1\nworkers = 0\nregulariser_weight = 0.1',
        [
            "# First",
            "from histonb.studies import runs\nrun = runs.start(out, runs.scalars(globals()))",
            "run.finish(n=n)",
        ],
    )

    def run_it(**more):
        papermill.execute_notebook(
            str(root / "nbs/reports/10_first.ipynb"),
            str(root / "o.ipynb"),
            parameters={"out": str(root / "o"), **more},
            kernel_name="python3",
            progress_bar=False,
        )

    with pytest.raises(papermill.PapermillExecutionError) as error:
        run_it(**given)
    assert says in error.value.evalue
    run_it(n=3)
    assert read_json(root / "o/provenance.json")["parameters"] == {
        "out": str(root / "o"),
        "n": 3,
        "workers": 0,
        "regulariser_weight": 0.1,
    }


def test_a_changed_library_is_told_but_runs_nothing(root, monkeypatch):
    run_study(root / "runs/tiny.yaml")
    monkeypatch.setattr(states_module, "library_digest", lambda: "another")
    assert [(r["state"], r["why"]) for r in status(root)] == [("finished", "the library has changed since")] * 2


def test_a_notebook_run_by_hand_gets_its_page_too(root):
    import papermill

    papermill.execute_notebook(
        str(root / "nbs/reports/10_first.ipynb"),
        str(root / "notebook.ipynb"),
        parameters={"out": str(root)},
        kernel_name="python3",
        progress_bar=False,
    )
    page = write_report(root).read_text()
    assert "<h1>First</h1>" in page and "n squared" in page
