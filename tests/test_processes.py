"""How threads wait in processes that the library starts, unless the user has chosen; importing sets nothing."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_report_notebook

from histonb.core import processes
from histonb.core.processes import NEVER, SHORT
from histonb.slides import tiling
from histonb.studies import ranks
from histonb.studies.notebooks import execute_notebook

POLICIES = [
    ({}, (None, SHORT)),
    ({"GOMP_SPINCOUNT": NEVER}, (None, SHORT)),  # of a process of ours that was started when the machine was busy
    ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
    ({"GOMP_SPINCOUNT": "9"}, (None, "9")),
]
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SHOW = "import os; print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"


@pytest.fixture(params=POLICIES, ids=["none", "ours", "active", "spin count"])
def policy(request, monkeypatch):
    """The policy that processes shall have, where the user's environment has this one."""
    own, expected = request.param
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_running", lambda: 1)
    return expected


QUIET = "from histonb.core import processes; processes._running = lambda: 1"
BUSY = "from histonb.core import processes; processes._running = lambda: 10_000"


def python(code, **own):
    return subprocess.run([sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True)


def test_the_command(policy):
    code = f"import atexit, histonb.cli, sys; sys.argv = ['', '--version']; atexit.register(lambda: exec({SHOW!r}))"
    assert python(f"{QUIET}; {code}; histonb.cli.main()").stdout.splitlines()[1] == " ".join(map(str, policy))


def test_openmp_takes_what_the_command_sets(monkeypatch):
    """Its own library tells how often a waiting thread asks again before it sleeps."""
    (torch,) = importlib.util.find_spec("torch").submodule_search_locations
    library = next(Path(torch).glob("lib/libgomp*.so*"), None)
    if library is None:
        pytest.skip("this PyTorch comes with another OpenMP")
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    load = f"import ctypes; ctypes.CDLL({str(library)!r})"
    code = f"import atexit, histonb.cli, sys; sys.argv = ['', '--version']; atexit.register(lambda: exec({load!r}))"
    for others, expected in ((QUIET, SHORT), (BUSY, NEVER)):
        done = python(f"{others}; {code}; histonb.cli.main()", OMP_DISPLAY_ENV="verbose")
        assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr
    assert "GOMP_SPINCOUNT = '300000'" in python(load, OMP_DISPLAY_ENV="verbose").stderr


def test_a_kernel(policy, tmp_path, capsys):
    write_report_notebook(tmp_path, "shown", 'out = ""', [SHOW])
    execute_notebook(tmp_path / "nbs/reports/shown.ipynb", tmp_path / "run/notebook.ipynb", {}, tmp_path, "shown")
    assert f"shown | {policy[0]} {policy[1]}" in capsys.readouterr().out


def test_ranks(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_torchrun_command", lambda *args: [sys.executable, "-c", SHOW])
    process = ranks._start_torchrun({"processes": 1}, tmp_path, 0)
    assert process.communicate()[0].split() == list(map(str, policy))


def test_a_worker_that_tiles(policy):
    before = dict(os.environ)
    with tiling._pool(1) as pool:
        assert tuple(pool.map(os.getenv, NAMES)) == policy
    assert dict(os.environ) == before  # here nothing is set


def test_running_processes_are_counted(monkeypatch, tmp_path):
    """By Linux; elsewhere the machine counts as idle."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        time.sleep(0.5)
        assert max(processes._running() for _ in range(20)) >= 4
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    monkeypatch.setattr(processes, "LOADAVG", tmp_path / "absent")
    assert processes._running() == 1


def test_importing_sets_nothing(monkeypatch):
    modules = "histonb, histonb.cli, histonb.studies.execution, histonb.studies.ranks"
    code = f"import os; before = dict(os.environ); import {modules}; print(before == dict(os.environ))"
    assert python(code).stdout.strip() == "True"
