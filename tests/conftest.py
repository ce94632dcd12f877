"What several test files share."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]


def run_report(notebook, folder, **parameters):
    "Run a report as a person would, papermill and a parameter file, into `folder/run`; its standard error, and its metrics where it came to its end."
    folder.mkdir(exist_ok=True)
    (folder / "p.yaml").write_text(yaml.safe_dump({"out": str(folder / "run"), **parameters}))
    command = [
        sys.executable,
        "-m",
        "papermill",
        "-k",
        "python3",
        "--no-progress-bar",
        "--log-level",
        "ERROR",
        str(ROOT / f"nbs/reports/{notebook}.ipynb"),
        str(folder / "out.ipynb"),
        "-f",
        str(folder / "p.yaml"),
    ]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "HISTONB_BATCH": "1"}, capture_output=True, text=True)
    return done.stderr, json.loads((folder / "run/metrics.json").read_text()) if done.returncode == 0 else None


@pytest.fixture
def one_thread():
    "Small matrices and batches: more threads would only wait for each other."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
