"""What every room stands on: one writer a folder, whole files, keys of content, parameters, errors in one sentence."""

import dataclasses
import errno
import importlib
import json
import math
import os
import pickle
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from histonb.core import claims, digests, files
from histonb.core.claims import hold, is_held
from histonb.core.digests import content_key, folder_keys
from histonb.core.errors import BadInput, Refused, explain_refusal, refusals_explained
from histonb.core.files import append_jsonl, atomic_path, read_json, read_jsonl, write_json
from histonb.core.parameters import RANGES, RENAMED, build, check_ranges
from histonb.studies.study import parameter_types

ROOT = Path(__file__).resolve().parents[1]


# One writer

HOLDER = """
import sys, time
from histonb.core.claims import hold
with hold(sys.argv[1]): print('held', flush=True); time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder; it is ended by whoever asks, or at the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_which_one_is_there(tmp_path, holder):
    assert is_held(tmp_path / "run/.lock")
    with (
        pytest.raises(
            BadInput, match=f"another process is writing here .process {holder.pid} on {socket.gethostname()}"
        ),
        hold(tmp_path / "run"),
    ):
        pytest.fail("two writers in one folder")


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_holds_nothing(tmp_path, holder, reaped):
    """Also where its parent has not asked yet how it ended."""
    holder.kill()
    if reaped:
        holder.wait()
    else:
        while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
            time.sleep(0.01)
    assert not is_held(tmp_path / "run/.lock")
    with hold(tmp_path / "run"):
        assert is_held(tmp_path / "run/.lock")
    assert not (tmp_path / "run/.lock").exists()


def test_a_fork_of_the_holder_holds_nothing(tmp_path):
    """A loader's workers outlive a killed training by seconds."""
    code = (
        "import os, sys, time; from histonb.core.claims import hold\n"
        "with hold(sys.argv[1]):\n    if not os.fork(): time.sleep(300)\n    print('held', flush=True); time.sleep(300)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    with hold(tmp_path):
        pass
    os.killpg(process.pid, 9)


def elsewhere(path):
    """A claim as a process of another machine would have left it."""
    with hold(path):
        text = (path / ".lock").read_text()
    lines = [f"host=other-{socket.gethostname()}" if line.startswith("host=") else line for line in text.splitlines()]
    (path / ".lock").write_text("\n".join(lines) + "\n")


def test_another_machine_without_a_sign_of_life_is_succeeded(tmp_path, monkeypatch, capsys):
    """As after a node has died: the requeued job goes on by itself."""
    monkeypatch.setattr(claims, "LEASE_SECONDS", 1.0)
    elsewhere(tmp_path)
    with hold(tmp_path):
        pass
    assert "waiting 1 s for a sign of life" in capsys.readouterr().out


def test_another_machine_with_signs_of_life_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_SECONDS", 3.0)
    elsewhere(tmp_path)
    touch = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time\nwhile True: time.sleep(.2); os.utime(sys.argv[1])",
            str(tmp_path / ".lock"),
        ]
    )
    try:
        with pytest.raises(BadInput, match="on other-"), hold(tmp_path):
            pytest.fail("it lives")
    finally:
        touch.kill()
        touch.wait()


@pytest.mark.parametrize("content", [b"", b"filelock/2\npid=", b"\xff\x00garbage", b"x" * 3000])
def test_a_claim_that_cannot_be_read_is_succeeded(tmp_path, monkeypatch, content):
    monkeypatch.setattr(claims, "LEASE_SECONDS", 1.0)
    (tmp_path / ".lock").write_bytes(content)
    with hold(tmp_path):
        assert is_held(tmp_path / ".lock")


def test_no_lock_of_the_system_is_needed(tmp_path, monkeypatch):
    """On network drives flock may fail, or lock one machine only."""
    import fcntl

    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, fails)
    second = hold(tmp_path)
    with hold(tmp_path), pytest.raises(BadInput, match="another process is writing here"):
        second.__enter__()


def test_who_waits_gets_it_afterwards(tmp_path, holder):
    code = "import sys; from histonb.core.claims import hold\nwith hold(sys.argv[1], wait=True): print('mine')"
    waiting = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert "waiting for it" in waiting.stdout.readline()
    holder.kill()
    holder.wait()
    assert waiting.communicate(timeout=60)[0] == "mine\n"


def test_what_killed_processes_left_is_swept(tmp_path):
    left = [".new-0a1b2c3d.pt", ".curves-k_3f09zz.png", "checkpoints/.new-abc.pt", "parts/.scores-000001-deadbeef.npz"]
    kept = ["new.pt", "checkpoints/0000002-0011223344556677.pt", ".hidden", ".table.csv", "parts/scores-000001.npz"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with hold(tmp_path):
        pass
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {*kept}


# What the file system refuses


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ENAMETOOLONG]
)
def test_refusals_are_one_sentence_and_still_errors_of_the_system(number):
    with pytest.raises(BadInput) as caught, refusals_explained("runs/x"):
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value, OSError) and caught.value.errno == number and caught.value.path == "runs/x"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.errno) == (Refused, str(caught.value), number)
    assert explain_refusal(caught.value) is caught.value


def test_other_errors_pass():
    with pytest.raises(BlockingIOError), refusals_explained("x"):
        raise BlockingIOError(errno.EAGAIN, "busy")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o755)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setuid(65534)
            with hold(tmp_path / "theirs"):
                pass
        except BadInput as e:
            code = 0 if "no permission" in str(e) else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(BadInput, match="a file stands where a folder is wanted"), hold(tmp_path / "out"):
        pass


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("name", ["調" * 80 + ".json", "a" * 250, "x." + "y" * 200, ".hidden"])
def test_any_name_that_the_file_system_takes(tmp_path, name):
    with atomic_path(tmp_path / name) as p:
        p.write_text("1")
    assert [q.name for q in tmp_path.iterdir()] == [name]


# Records


@pytest.mark.parametrize("text", ["{", "", "\x00", "[" * 100_000, "1" * 5000, '{"a": }'])
def test_broken_json_is_told(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadInput, match="not valid JSON"):
        read_json(tmp_path / "a.json")


def test_a_line_cut_short_costs_that_line(tmp_path):
    log = tmp_path / "log.jsonl"
    append_jsonl(log, {"step": 1})
    with open(log, "a") as f:
        f.write('{"step": 2, "lo')
    append_jsonl(log, {"step": 3})
    assert read_jsonl(log) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(BadInput, match="line 2 is not a record"):
        read_jsonl(tmp_path / "log.jsonl")


# Keys of content


def test_content_decides_and_not_the_date(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = tmp_path / "train.csv"
    large = tmp_path / "slide.tiff"
    for path, size in ((small, 100), (large, digests.ALWAYS_READ_BYTES + 1)):
        path.write_bytes(b"1" * size)
        key = content_key(path)
        os.utime(path, (1, 1))
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())
        assert content_key(path) == content_key(copy) == key
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(b"2" + b"1" * (size - 1))  # the same size
        os.utime(path, ns=times)  # and date
        assert content_key(path) != key


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "slide.tiff").write_bytes(bytes(digests.ALWAYS_READ_BYTES + 1))
    read = []
    hashed = digests.hashlib.file_digest
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda f, name: read.append(f.name) or hashed(f, name))
    assert len({content_key(tmp_path / "slide.tiff") for _ in range(3)}) == 1 and len(read) == 1
    (next((tmp_path / "cache").rglob("*.json"))).write_text("[")  # a memory that is spoilt is done without
    content_key(tmp_path / "slide.tiff")
    assert len(read) == 2


def test_a_folder_is_its_files(tmp_path):
    (tmp_path / "d/sub").mkdir(parents=True)
    (tmp_path / "d/sub/a").write_text("1")
    (tmp_path / "d/broken").symlink_to(tmp_path / "nowhere")
    before = folder_keys(tmp_path / "d")
    assert before["broken"] == "" and [*before] == ["broken", "sub/a"]
    (tmp_path / "d/sub/a").write_text("2")
    assert folder_keys(tmp_path / "d") != before


# Parameters

CONFIGS = {
    "histonb.pretrain.config": "PretrainConfig",
    "histonb.segment.training": "TrainConfig",
    "histonb.transfer.supervised": "FitConfig",
    "histonb.transfer.masks": "NetworkConfig",
    "histonb.slides.tiles": "TileRule",
    "histonb.studies.study": "Resources",
    "histonb.studies.slurm": "Profile",
}


def config_class(module):
    return getattr(importlib.import_module(module), CONFIGS[module])


def test_every_number_of_every_configuration_and_report_has_a_range():
    known = {name for names in RANGES.values() for name in names.split()}
    for module in CONFIGS:
        fields = {f.name: f.type for f in dataclasses.fields(config_class(module))}
        numbers = {name for name, kind in fields.items() if any(word in str(kind) for word in ("int", "float"))}
        assert numbers <= known, f"{module}: enter {numbers - known} in core.parameters.RANGES"
    for path in (ROOT / "nbs/reports").glob("*.ipynb"):
        numbers = {
            name for name, kind in parameter_types(path).items() if any(word in str(kind) for word in ("int", "float"))
        }
        assert numbers <= known, f"{path.name}: enter {numbers - known} in core.parameters.RANGES"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"mean": (127.0, 127.0, 127.0)}, "from 0 to 1"),
        ({"lr": -1.0}, "above 0"),
        ({"momentum": 2.0}, "from 0 to 1"),
        ({"drop_path": 1.5}, "below 1"),
        ({"clip": -1.0}, "0 or more"),
        ({"log_every": 0}, "1 or more"),
        ({"workers": -1}, "0 or more"),
        ({"seed": -1}, "0 or more"),
        ({"mean": (0.5, 0.5)}, "Give 3 numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "above 0, up to 1"),
        ({"global_scale": (1.0, 0.4)}, "least first"),
        ({"lr": math.nan}, "above 0"),
        ({"weight_decay": math.inf}, "0 or more"),
        ({"student_temp": 0.0}, "above 0"),
        ({"checkpoint_every": 0}, "1 or more"),
        ({"keep": 0}, "1 or more"),
        ({"min_lr": 1.0, "lr": 1e-3}, "Lower min_lr"),
        ({"mean": (0.5, 0.5, 0.5)}, "Give both, or neither"),
    ],
)
def test_impossible_settings_of_a_pre_training(values, says):
    from histonb.pretrain.config import PretrainConfig, preset

    with pytest.raises(BadInput, match=f"`{next(iter(values))}`.*{says}|`mean` or `std`.*{says}"):
        PretrainConfig("out", **values)
    with pytest.raises(BadInput):
        preset("tiny", out="out", **values)


@pytest.mark.parametrize(
    ("module", "values"),
    [
        ("histonb.segment.training", {"lr": -1.0}),
        ("histonb.segment.training", {"mpp": 0.0}),
        ("histonb.segment.training", {"glass_probability": 2.0}),
        ("histonb.segment.training", {"log_every": 0}),
        ("histonb.segment.training", {"val_share": 1.0}),
        ("histonb.segment.training", {"width": 0.0}),
        ("histonb.transfer.supervised", {"weight_decay": -0.1}),
        ("histonb.transfer.supervised", {"workers": -1}),
        ("histonb.transfer.supervised", {"lr": 0.0}),
        ("histonb.transfer.masks", {"depth": 9}),
        ("histonb.transfer.masks", {"medt_heads": 0}),
    ],
)
def test_impossible_settings_of_other_trainings(module, values):
    where = {} if CONFIGS[module] == "NetworkConfig" else {"out": "out"}
    with pytest.raises(BadInput, match=f"`{next(iter(values))}` is"):
        config_class(module)(**where, **values)


@pytest.mark.parametrize(
    "values",
    [{"white": 0}, {"mpp": 0.0}, {"mpp": -0.5}, {"level": -1}, {"max_emptiness": math.nan}, {"min_coverage": 1.5}],
)
def test_impossible_rules_of_tiles(values):
    from histonb.slides.tile_rules import TileRule

    with pytest.raises(BadInput):
        TileRule(**values)


@pytest.mark.parametrize("former, now", RENAMED.items())
def test_the_former_name_of_a_parameter_leads_to_its_present_one(former, now):
    config = dataclasses.make_dataclass("Config", [(now, float, 1.0)])
    with pytest.raises(BadInput) as e:
        build(config, {former: 1.0}, "mine.yaml")
    assert str(e.value) == f"mine.yaml: `{former}` is now called `{now}`. Rename it."
    assert now not in RENAMED


def test_a_former_name_says_nothing_where_the_present_one_is_no_parameter():
    with pytest.raises(BadInput, match="unknown parameter"):
        build(dataclasses.make_dataclass("Config", [("lr", float, 1.0)]), {next(iter(RENAMED)): 1.0})


def test_whole_numbers_of_any_library_are_checked():
    import numpy as np

    with pytest.raises(BadInput):
        check_ranges({"lr": float(np.float64(-1))})
    with pytest.raises(BadInput, match="`lr` is 1000"):
        check_ranges({"lr": 10**400})  # larger than any float
    check_ranges({"steps": 0, "name": "x", "recipe": ["a"], "norm_last_layer": True, "unknown": -5})
    assert json.dumps(files.as_json({1: (np.float32(1), np.arange(2))})) == '{"1": [1.0, [0, 1]]}'


def test_an_error_can_be_printed_whatever_it_is_about():
    "JSON may hold half a character, and a name bytes that are no letters."
    error = BadInput("a\udcff.json", "`\ud800` in it", "Delete \udcff.")
    assert (
        str(error).encode() and error.path == "a\\udcff.json" and str(pickle.loads(pickle.dumps(error))) == str(error)
    )


@pytest.mark.parametrize(
    "text, says",
    [
        ("[]", "holds no names and values"),
        ("3", "holds no names"),
        ("null", "holds no names"),
        ("{}", "no `a` in it"),
        ("{", "not valid JSON"),
    ],
)
def test_a_record_that_is_none(tmp_path, text, says):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadInput, match=says):
        files.read_record(tmp_path / "x.json", "a")
