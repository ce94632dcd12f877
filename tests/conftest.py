"What several test files share."

import atexit
import functools
import json
import os
import shutil
import tempfile
import unittest.mock
from pathlib import Path

import papermill
import pytest
import torch
from kernel_pool import Pool

from histonb.studies.study import _write_notebook

ROOT = Path(__file__).resolve().parents[1]


LONGEST = [f"test_{name}.py" for name in ("slurm", "reports", "jobs", "published", "memory", "losses", "multitask")]


def pytest_collection_modifyitems(items):
    "Begin with the longest files, so that no worker is left alone with one of them at the end."
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@functools.cache
def kernel_pool():
    "The kernels of this test process: one that has loaded torch is forked for each report."
    folder = tempfile.mkdtemp(prefix="kernels-")
    pool = Pool(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(pool.close)
    return pool


def write_report_notebook(root, name, parameters, cells):
    "Write a small report notebook into a repository; a cell that begins with # is prose."
    _write_notebook(root / f"nbs/reports/{name}.ipynb", parameters, *cells)


def run_report(notebook, folder, **parameters):
    "Run a report by papermill into `folder/run`; the error it ended with, and its metrics where there was none."
    folder.mkdir(exist_ok=True)
    with unittest.mock.patch.dict(os.environ, kernel_pool().environ):
        try:
            papermill.execute_notebook(
                str(ROOT / f"nbs/reports/{notebook}.ipynb"),
                str(folder / "out.ipynb"),
                parameters={"out": str(folder / "run"), **parameters},
                kernel_name="python3",
                cwd=str(folder),
                progress_bar=False,
            )
        except papermill.PapermillExecutionError as e:
            return str(e), None
    return "", json.loads((folder / "run/metrics.json").read_text())


@pytest.fixture
def one_thread():
    "Small matrices and batches: more threads would only wait for each other."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_curves(monkeypatch):
    "Trainings leave out the pictures of their log and of validation, which take longer than a short training."
    from histonb.pretrain.diagnostics import LiveCurves
    from histonb.segment import training

    monkeypatch.setattr(LiveCurves, "_draw", lambda curves: None)
    for name in ("draw_progress", "plot_task_curves"):
        monkeypatch.setattr(training, name, lambda *args: None)
