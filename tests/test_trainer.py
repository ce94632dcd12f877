"Pre-training runs: continued runs equal whole ones, and what happens when something goes wrong."
import dataclasses
import math
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from histonb.core import BadInput, read_jsonl
from histonb.pretrain.trainer import Diverged, PretrainConfig, Trainer, crop_loader, load_backbone, pretrain, settle

TINY = dict(out_dim=32, hidden=32, bottleneck=16, n_local=2, global_size=32, local_size=16, batch_size=4, steps=6, warmup_epochs=1.,
            lr=4e-3, momentum=.9, precision="fp32", device="cpu", workers=0, log_every=1, checkpoint_every=2)

class Tiles:
    "Twelve noisy tiles of three colours."
    def __len__(self): return 12
    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        return np.clip(np.array([200, 120, 160]) + 20*(i % 3) + 20*rng.standard_normal((48, 48, 3)), 0, 255).astype(np.uint8), i % 3

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def config(folder, **changes): return PretrainConfig(str(folder), **(TINY | changes))
def losses(folder): return [row["loss"] for row in read_jsonl(folder/"log.jsonl") if "loss" in row]

def stop_after(step):
    "An `on_epoch` that presses Ctrl-C; an epoch has three steps."
    def press(now, backbone):
        if now == step: signal.raise_signal(signal.SIGINT)
    return press

def test_continued_run_equals_the_whole_one(tmp_path):
    pretrain(config(tmp_path/"whole"), Tiles())
    with pytest.raises(KeyboardInterrupt, match="step 3 of 6"): pretrain(config(tmp_path/"parts"), Tiles(), on_epoch=stop_after(3))
    assert losses(tmp_path/"parts") == losses(tmp_path/"whole")[:3]
    pretrain(config(tmp_path/"parts", workers=1), Tiles())  # the number of workers does not matter
    assert losses(tmp_path/"parts") == losses(tmp_path/"whole")
    a, b = (torch.load(tmp_path/name/"state.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("student", "teacher", "loss"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])

def test_rows_after_the_checkpoint_are_not_logged_twice(tmp_path):
    c = settle(config(tmp_path), 12)
    with pytest.raises(KeyboardInterrupt): pretrain(c, Tiles(), on_epoch=stop_after(3))
    with open(tmp_path/"log.jsonl", "a") as f: f.write('{"step": 4, "loss": 0.5}\n')  # as after a kill between checkpoints
    pretrain(c, Tiles())
    assert [row["step"] for row in read_jsonl(tmp_path/"log.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]

def test_one_global_crop_trains(tmp_path):
    run = pretrain(config(tmp_path, n_global=1, n_local=5), Tiles())
    assert all(math.isfinite(x) for x in losses(run))
    assert load_backbone(run)(torch.zeros(1, 3, 32, 32)).shape == (1, 128)

def test_teacher_differs_from_student_and_keeps_its_own_statistics(tmp_path):
    state = torch.load(pretrain(config(tmp_path), Tiles())/"state.pt", weights_only=True)
    means = [k for k in state["student"] if k.endswith("running_mean")]
    assert means and not any(torch.equal(state["student"][k], state["teacher"][k]) for k in means)
    with torch.random.fork_rng():
        ema = Trainer(settle(config(tmp_path, teacher_bn="ema"), 12), 12)
    assert not ema.teacher.training and ema.student.training

def test_finished_run_is_returned_and_other_parameters_are_refused(tmp_path):
    pretrain(config(tmp_path), Tiles())
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != "config.json"}
    pretrain(config(tmp_path, workers=2), Tiles())
    assert before == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != "config.json"}
    with pytest.raises(BadInput, match="out_dim 32 -> 64"): pretrain(config(tmp_path, out_dim=64), Tiles())
    pretrain(config(tmp_path, out_dim=64, steps=1), Tiles(), restart=True)
    assert len(losses(tmp_path)) == 1

def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[2]); from test_trainer import *; torch.set_num_threads(1); "
            "pretrain(config(sys.argv[1], steps=100_000, workers=1, checkpoint_every=100_000), Tiles())")
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), os.path.dirname(__file__)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path/"log.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert child.poll() is None, child.stderr.read()
        time.sleep(.2)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the training process and its worker alike
    error = child.communicate()[1]
    assert child.returncode != 0 and "KeyboardInterrupt: stopped at step" in error
    assert torch.load(tmp_path/"state.pt", weights_only=True)["step"] >= 1

def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    def fill(step, backbone):
        if step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may grow beyond 100 kB
    try:
        with pytest.raises(BadInput, match="checkpoint of step 4 cannot be written"): pretrain(config(tmp_path), Tiles(), on_epoch=fill)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(tmp_path/"state.pt", weights_only=True)["step"] == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # nothing half-written beside it
    pretrain(config(tmp_path), Tiles())
    assert len(losses(tmp_path)) == 6

def test_broken_checkpoint_is_named(tmp_path):
    with pytest.raises(KeyboardInterrupt): pretrain(config(tmp_path), Tiles(), on_epoch=stop_after(3))
    state = tmp_path/"state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(BadInput, match="not a readable checkpoint"): pretrain(config(tmp_path), Tiles())

def test_not_finite_is_named():
    c = settle(config("unused"), 12)
    trainer = Trainer(c, 12)
    crops = next(iter(crop_loader(Tiles(), c)))
    crops[1][0, 0] = math.nan
    with pytest.raises(Diverged, match="step 1: the loss is not finite; first not finite: crops of \\(16, 16\\) pixels"): trainer.train_step(crops)

@pytest.mark.parametrize("changes, message", [(dict(batch_size=13), "13 with 12 tiles"), (dict(n_global=1, n_local=0), "no pair"), (dict(steps=0, epochs=0.), "no step")])
def test_impossible_parameters(tmp_path, changes, message):
    with pytest.raises(BadInput, match=message): pretrain(config(tmp_path, **changes), Tiles())
    assert not (tmp_path/"state.pt").exists()

def test_no_tiles(tmp_path):
    with pytest.raises(BadInput, match="no tiles"): pretrain(dataclasses.replace(config(tmp_path)), [])
