"Pre-training runs: in micro-batches, over processes, killed and continued, they stay the same; and what goes wrong."

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forked import Forked
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

from histonb.core.errors import BadInput
from histonb.core.files import read_json, read_jsonl, write_json
from histonb.datasets.example import example_tiles
from histonb.pretrain.config import PretrainConfig, as_config, preset, resolve
from histonb.pretrain.diagnostics import LiveCurves
from histonb.pretrain.loading import ResumableBatchSampler, crop_loader
from histonb.pretrain.pretraining import load_frozen_backbone, pretrain
from histonb.pretrain.trainer import Diverged, Trainer
from histonb.training import device as devices
from histonb.training import distributed as ranks
from histonb.training.checkpoint import checkpoints, read_checkpoint
from histonb.training.loop import Stopped

TINY = dict(
    arch="test_efficientnet",
    out_dim=32,
    hidden=32,
    bottleneck=16,
    n_local=2,
    global_size=32,
    local_size=16,
    batch_size=4,
    steps=6,
    warmup_epochs=1.0,
    lr=4e-3,
    momentum=0.9,
    precision="fp32",
    device="cpu",
    workers=0,
    log_every=1,
    checkpoint_every=2,
)
NO_BN = dict(arch="test_vit", drop_path=0.0, freeze_last_epochs=0.0, warmup_epochs=0.0, lr=1e-3)
SPEED = "images_per_s", "data_wait", "memory"


class Tiles:
    "Twelve noisy tiles of three colours."

    def __len__(self):
        return 12

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        return np.clip(np.array([200, 120, 160]) + 20 * (i % 3) + 20 * rng.standard_normal((48, 48, 3)), 0, 255).astype(
            np.uint8
        ), i % 3


class Uneven(Tiles):
    "Fewer tiles on the second process."

    def __len__(self):
        return 12 - 4 * int(os.environ["RANK"])


class Killer(Tiles):
    "The same, but a worker that loads the seventh tile dies."

    def __getitem__(self, i):
        if i == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")


def config(folder, **changes):
    return PretrainConfig(str(folder), **(TINY | changes))


def log(folder):
    return [{k: v for k, v in row.items() if k not in SPEED} for row in read_jsonl(Path(folder) / "log.jsonl")]


def losses(folder):
    return [row["loss"] for row in log(folder) if "loss" in row]


def last_state(folder):
    "The latest checkpoint of a run."
    return read_checkpoint(checkpoints(folder)[0][1])


def assert_same_run(a, b):
    assert log(a) == log(b)
    a = last_state(a)
    b = last_state(b)
    assert a["step"] == b["step"]
    for part in ("student", "teacher", "loss"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for p, q in zip(a["optimiser"]["state"].values(), b["optimiser"]["state"].values(), strict=True):
        assert all(torch.equal(p[k], q[k]) for k in p)


def stop_after(step):
    "An `on_epoch` that presses Ctrl-C; an epoch has three steps. The press is noticed at the end of the next step."

    def press(now, backbone):
        if now == step:
            signal.raise_signal(signal.SIGINT)

    return press


def run_slowly(config, tiles, elastic, pause):
    "Pre-train in a process of its own, with time between its steps in which a signal can come."

    def paused_step(trainer, batches):
        time.sleep(pause)
        return step(trainer, batches)

    torch.set_num_threads(1)
    LiveCurves._draw = lambda curves: None
    step, Trainer.train_step = Trainer.train_step, paused_step
    pretrain(config, tiles(), elastic=elastic)


def child(folder, processes=1, tiles=Tiles, elastic=False, pause=0.0, **changes):
    "Start the run in a process of its own, or in more than one."
    return Forked(run_slowly, config(folder, **changes), tiles, elastic, pause, processes=processes)


def torchrun_slowly(*args):
    "Do what `torchrun --standalone --nproc-per-node 2` does, whose processes are forked here."
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "test"]
    options = [*rendezvous, "--nproc-per-node", "2", "--start-method", "fork", "no program"]
    elastic_launch(torchrun.config_from_args(torchrun.parse_args(options))[0], run_slowly)(*args)


def finished(process):
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out


def wait_for_steps(process, folder, steps):
    path = Path(folder) / "log.jsonl"
    while not path.exists() or sum("loss" in line for line in path.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


# One run, however it is computed


def trained(**changes):
    c = resolve(config("", **{**NO_BN, "steps": 10, "batch_size": 8, **changes}), 12)
    trainer = Trainer(c, 12)
    loader = iter(crop_loader(Tiles(), c))
    rows = [trainer.train_step(loader) for _ in range(c.steps)]
    return (
        [row["loss"] for row in rows],
        torch.cat([p.flatten() for p in trainer.student.parameters()]),
        trainer.loss.center,
    )


def test_four_micro_batches_equal_one_batch():
    whole = trained()
    parts = trained(micro_batch=2)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-5)
    assert not torch.equal(whole[1], trained(seed=1)[1])


@pytest.mark.parametrize(
    "changes", [dict(per_crop_backward=True), dict(n_global=1, n_local=3, micro_batch=4, per_crop_backward=True)]
)
def test_one_backward_a_crop_equals_one_in_all(changes):
    whole = trained(**changes | dict(micro_batch=0, per_crop_backward=False))
    parts = trained(**changes)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-5)


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    changes = {**NO_BN, "steps": 10, "batch_size": 8, "checkpoint_every": 100}
    two = child(tmp_path / "two", processes=2, **changes)
    pretrain(config(tmp_path / "one", **changes), Tiles())
    finished(two)
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=0, atol=1e-5)
    one = last_state(tmp_path / "one")
    two = last_state(tmp_path / "two")
    for part in ("student", "teacher", "loss"):
        assert all(torch.allclose(one[part][k], two[part][k], rtol=0, atol=1e-5) for k in one[part])
    assert (one["world"], two["world"]) == (1, 2)


def test_processes_share_an_epoch_without_overlap():
    samplers = [ResumableBatchSampler(12, 4, 0, 0, 3, accumulation_steps=2, rank=rank, world=2) for rank in (0, 1)]
    seen = [{key for batch in sampler for key in batch} for sampler in samplers]
    assert not seen[0] & seen[1] and {index for _, index in seen[0] | seen[1]} == set(range(12))


def test_processes_keep_one_model_with_batch_norm(tmp_path):
    finished(child(tmp_path / "two", processes=2, teacher_bn="ema", batch_size=4, steps=3))
    state = last_state(tmp_path / "two")
    assert all(torch.isfinite(v).all() for v in state["teacher"].values()) and len(losses(tmp_path / "two")) == 3
    means = [k for k in state["student"] if k.endswith("running_mean")]
    assert means and not any(torch.equal(state["student"][k], state["teacher"][k]) for k in means)


def test_teacher_differs_from_student_and_keeps_its_own_statistics(tmp_path):
    state = last_state(pretrain(config(tmp_path), Tiles()))
    means = [k for k in state["student"] if k.endswith("running_mean")]
    assert means and not any(torch.equal(state["student"][k], state["teacher"][k]) for k in means)
    ema = Trainer(resolve(config(tmp_path, teacher_bn="ema"), 12), 12)
    assert not ema.teacher.training and ema.student.training
    before = {k: v.clone() for k, v in ema.teacher.state_dict().items() if k.endswith("running_mean")}
    student = {k: v.clone() for k, v in before.items()}
    ema.train_step(crop_loader(Tiles(), ema.config))
    after = ema.student.state_dict()
    momentum = ema.schedules["momentum"][0]
    for k, v in before.items():
        assert not torch.equal(after[k], student[k])
        assert torch.allclose(ema.teacher.state_dict()[k], momentum * v + (1 - momentum) * after[k], atol=1e-6)


def test_activation_checkpointing_changes_nothing():
    def run(**changes):
        c = resolve(config("", arch="xcit_nano_12_p16_224", drop_path=0.2, steps=3, **changes), 12)
        trainer = Trainer(c, 12)
        loader = iter(crop_loader(Tiles(), c))
        return [trainer.train_step(loader)["loss"] for _ in range(3)], trainer.student.state_dict()

    (a, plain), (b, recomputed) = run(), run(activation_checkpointing=True)
    assert np.allclose(a, b, rtol=0, atol=1e-6)
    assert all(torch.allclose(plain[k].float(), recomputed[k].float(), atol=1e-5) for k in plain)


def test_one_global_crop_trains(tmp_path):
    run = pretrain(config(tmp_path, n_global=1, n_local=5), Tiles())
    assert all(math.isfinite(x) for x in losses(run))
    assert load_frozen_backbone(run)(torch.zeros(1, 3, 32, 32)).shape == (1, 256)


# Stopped, killed, continued


def test_continued_run_equals_the_whole_one(tmp_path):
    pretrain(config(tmp_path / "whole"), Tiles())
    with pytest.raises(Stopped, match="step 4 of 6"):
        pretrain(config(tmp_path / "parts"), Tiles(), on_epoch=stop_after(3))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")[:4]
    assert (tmp_path / "parts" / "stopped").exists()
    pretrain(config(tmp_path / "parts", workers=1), Tiles())  # the number of workers does not matter
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts" / "stopped").exists()
    assert checkpoints(tmp_path / "whole")[0][1].name == checkpoints(tmp_path / "parts")[0][1].name  # equal bytes


@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_and_killed_run_equals_the_whole_one(tmp_path, processes):
    """One is stopped by Ctrl-C, which a terminal sends to the training process and its worker alike, two by a file."""
    changes = dict(steps=14, checkpoint_every=5, drop_path=0.2, workers=1)
    finished(child(tmp_path / "whole", processes, **changes))
    for how in ("stop", "kill", "kill"):
        before = len(losses(tmp_path / "run")) if checkpoints(tmp_path / "run") else 0
        run = child(tmp_path / "run", processes, pause=0.15, **changes)
        wait_for_steps(run, tmp_path / "run", before + 2)
        if how == "kill":
            run.kill(signal.SIGKILL)
        elif processes == 1:
            run.kill(signal.SIGINT)
        else:
            (tmp_path / "run/stop").touch()
        error = run.communicate()[1]
        assert run.returncode
        if how == "stop":
            stopped = read_json(tmp_path / "run/stopped")["step"]
            assert f"Stopped: stopped at step {stopped} of 14" in error and not (tmp_path / "run/stop").exists()
            assert 2 <= last_state(tmp_path / "run")["step"] == stopped == len(losses(tmp_path / "run"))
    assert checkpoints(tmp_path / "run")[0][0] < 14, "it was killed too late for a test"
    finished(child(tmp_path / "run", processes, **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_two_processes_stop_together_where_torchrun_is_terminated(tmp_path):
    changes = dict(steps=100_000, checkpoint_every=100_000)
    run = Forked(torchrun_slowly, config(tmp_path / "run", **changes), Tiles, False, 0.1)
    wait_for_steps(run, tmp_path / "run", 2)
    os.kill(run.pid, signal.SIGTERM)  # torchrun itself passes it on
    error = run.communicate(timeout=120)[1]
    assert run.returncode and "got signal: 15" in error.lower()
    stopped = read_json(tmp_path / "run/stopped")["step"]
    assert last_state(tmp_path / "run")["step"] == stopped == len(losses(tmp_path / "run"))


def test_other_number_of_processes(tmp_path):
    with pytest.raises(Stopped):
        pretrain(config(tmp_path / "run"), Tiles(), on_epoch=stop_after(3))
    refused = child(tmp_path / "run", 2)
    assert "a run of 1 processes, continued on 2" in refused.communicate()[1] and refused.returncode
    out = finished(child(tmp_path / "run", 2, elastic=True))
    assert "continues on 2 processes a run of 1: not bit for bit" in out
    assert len(losses(tmp_path / "run")) == 6 and last_state(tmp_path / "run")["world"] == 2


def test_rows_after_the_checkpoint_are_not_logged_twice(tmp_path):
    c = resolve(config(tmp_path), 12)
    with pytest.raises(Stopped):
        pretrain(c, Tiles(), on_epoch=stop_after(3))
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 5, "loss": 0.5}\n')  # as after a kill between checkpoints
    pretrain(c, Tiles())
    assert [row["step"] for row in read_jsonl(tmp_path / "log.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_finished_run_is_returned_and_other_parameters_are_refused(tmp_path):
    pretrain(config(tmp_path), Tiles())

    def times():
        return {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "config.json"}

    before = times()
    pretrain(config(tmp_path, workers=2), Tiles())
    assert before == times()
    with pytest.raises(BadInput, match="out_dim 32 -> 64"):
        pretrain(config(tmp_path, out_dim=64), Tiles())
    pretrain(config(tmp_path, out_dim=64, steps=1), Tiles(), restart=True)
    assert len(losses(tmp_path)) == 1


def test_last_checkpoints_and_the_best_are_kept(tmp_path):
    scores = {3: 0.5, 6: 0.9, 9: 0.7, 12: 0.8}
    run = pretrain(config(tmp_path, steps=12, keep=2), Tiles(), on_epoch=lambda step, backbone: {"knn": scores[step]})
    assert [(step, best) for step, _, best in checkpoints(run)] == [(12, False), (10, False), (6, True)]
    assert load_frozen_backbone(run / "best")(torch.zeros(1, 3, 32, 32)).shape == (1, 256)
    assert json.loads((run / "best" / "backbone.json").read_text())["step"] == 6


def test_a_run_goes_on_where_its_tiles_have_moved_and_not_where_they_are_others(tmp_path):
    store = example_tiles(tmp_path / "first", n_slides=3, shape=(1024, 1024), seed=0)
    table = pd.read_parquet(store / "tiles.parquet")
    steps = 2 * (int(table.kept.sum()) // 4)

    def stop(step, backbone):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        pretrain(config(tmp_path / "run", tiles=str(store), steps=steps), on_epoch=stop)
    (tmp_path / "second").mkdir()
    moved = Path(shutil.move(store, tmp_path / "second" / "tiles"))
    again = config(tmp_path / "run", tiles=str(moved), steps=steps)
    table.iloc[::-1].to_parquet(moved / "tiles.parquet")
    with pytest.raises(BadInput, match="other parameters: data"):
        pretrain(again)
    table.to_parquet(moved / "tiles.parquet")
    pretrain(again)
    assert last_state(tmp_path / "run")["step"] == steps


def test_what_auto_chose_stays_chosen(tmp_path, monkeypatch):
    "A node that has bf16 in hardware, then one that has not."
    monkeypatch.setattr(devices, "best_precision", lambda device: "bf16")
    with pytest.raises(Stopped):
        pretrain(config(tmp_path, precision="auto", **NO_BN), Tiles(), on_epoch=stop_after(3))
    monkeypatch.setattr(devices, "best_precision", lambda device: "fp32")
    pretrain(config(tmp_path, precision="auto", **NO_BN), Tiles())
    assert json.loads((tmp_path / "config.json").read_text())["precision"] == "bf16" and len(losses(tmp_path)) == 6
    with pytest.raises(BadInput, match="precision 'bf16' -> 'fp32'.*pass elastic .`--elastic`"):
        pretrain(config(tmp_path, **NO_BN), Tiles())


def test_a_longer_run_says_why_it_is_another_one(tmp_path):
    pretrain(config(tmp_path), Tiles())
    with pytest.raises(BadInput, match="steps 6 -> 9.*schedules are laid out over all its steps"):
        pretrain(config(tmp_path, steps=9), Tiles())


def test_equal_runs_write_equal_bytes(tmp_path):
    names = [
        [p.name for _, p, _ in checkpoints(pretrain(config(tmp_path / n, steps=2), Tiles()))] for n in ("a", "deeper/b")
    ]
    assert names[0] == names[1] and len(names[0]) == 1  # the name holds the digest


# What goes wrong


def test_two_on_one_folder(tmp_path):
    run = child(tmp_path / "run", steps=100_000, pause=0.2)
    wait_for_steps(run, tmp_path / "run", 2)
    for restart in (False, True):
        with pytest.raises(BadInput, match=f"another process is writing here .process {run.pid} on"):
            pretrain(config(tmp_path / "run", steps=100_000), Tiles(), restart=restart)
    run.kill(signal.SIGKILL)  # and what it held is free at once
    pretrain(config(tmp_path / "run", steps=3), Tiles(), restart=True)
    assert len(losses(tmp_path / "run")) == 3
    run.communicate()


def test_all_checkpoints_spoilt_is_refused_each_time_until_begun_anew(tmp_path):
    with pytest.raises(Stopped):
        pretrain(config(tmp_path), Tiles(), on_epoch=stop_after(3))
    before = log(tmp_path)
    for _, path, _ in checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:-100])
    for _ in range(3):
        with pytest.warns(UserWarning) if checkpoints(tmp_path) else contextlib.nullcontext():
            with pytest.raises(
                BadInput,
                match="none of the 2 checkpoints is whole. Put a copy back, or begin again with restart=True",
            ):
                pretrain(config(tmp_path), Tiles())
        assert log(tmp_path) == before
    pretrain(config(tmp_path), Tiles(), restart=True)
    assert len(losses(tmp_path)) == 6


def test_processes_with_other_tiles_notice_it(tmp_path):
    run = child(tmp_path / "run", 2, tiles=Uneven)
    error = run.communicate(timeout=120)[1]
    assert run.returncode and "numbers of tiles differ between processes (8 to 12" in error


def test_no_process_waits_for_a_refused_first_one(tmp_path):
    pretrain(config(tmp_path), Tiles())
    run = child(tmp_path, 2, lr=1e-3)
    error = run.communicate(timeout=120)[1]
    assert run.returncode and "holds a run with other parameters" in error


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BadInput, match="torch finds 0 CUDA devices here. Choose auto or cpu"):
        pretrain(config(tmp_path, device="cuda"), Tiles())
    with pytest.raises(BadInput, match="`gpu` is no device"):
        pretrain(config(tmp_path, device="gpu"), Tiles())


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, backbone):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may grow beyond 100 kB

    try:
        with pytest.raises(BadInput, match="checkpoint of step 4 cannot be written"):
            pretrain(config(tmp_path), Tiles(), on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last_state(tmp_path)["step"] == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [
        checkpoints(tmp_path)[0][1].name
    ]  # nothing half-written beside it
    pretrain(config(tmp_path), Tiles())
    assert len(losses(tmp_path)) == 6


def test_spoilt_checkpoint_is_passed_over(tmp_path):
    pretrain(config(tmp_path / "whole"), Tiles())
    with pytest.raises(Stopped):
        pretrain(config(tmp_path / "run"), Tiles(), on_epoch=stop_after(3))
    (latest, path, _), (before, *_) = checkpoints(tmp_path / "run")
    assert (latest, before) == (4, 2)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="checkpoint passed over: .*not a whole checkpoint"):
        pretrain(config(tmp_path / "run"), Tiles())
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"step": Evil()}, tmp_path / "foreign.pt")
    with pytest.raises(BadInput, match="not a whole checkpoint"):
        read_checkpoint(tmp_path / "foreign.pt")
    assert not (tmp_path / "pwned").exists()


def test_checkpoint_of_another_network_is_named(tmp_path):
    run = pretrain(config(tmp_path / "a"), Tiles())
    other = Trainer(resolve(config("", out_dim=64, arch="vit_tiny_patch16_224"), 12), 12)
    with pytest.raises(BadInput, match="(?s)Missing key.*backbone.cls_token|backbone.*vit_tiny"):
        other.load_state_dict(last_state(run))


def test_not_finite_is_named():
    c = resolve(config("unused"), 12)
    trainer = Trainer(c, 12)
    loader = iter(crop_loader(Tiles(), c))
    rows = [trainer.train_step(loader)]
    before = {name: p.clone() for name, p in trainer.student.named_parameters()}
    with torch.no_grad():
        trainer.teacher.backbone.conv_stem.weight[0, 0] = math.nan
    rows += [trainer.train_step(loader) for _ in range(2)]  # nothing is asked before the figures are read
    assert all(torch.equal(p, before[name]) for name, p in trainer.student.named_parameters())
    with pytest.raises(
        Diverged, match="step 2: the loss is not finite; first not finite: backbone.conv_stem.weight. Lower lr"
    ):
        trainer.read_figures(rows)


def test_no_checkpoint_of_a_run_that_is_not_finite(tmp_path):
    """Also where the checkpoint is due before a row of the log; the one before is kept."""

    def spoil(step, backbone):
        if step == 3:
            with torch.no_grad():
                backbone.conv_stem.weight[0, 0] = math.nan

    with pytest.raises(Diverged, match="step 4: the loss is not finite"):
        pretrain(config(tmp_path, log_every=100), Tiles(), on_epoch=spoil)
    assert last_state(tmp_path)["step"] == 2


def test_dead_worker_is_named(tmp_path):
    with pytest.raises(BadInput, match="workers: a process that makes crops died"):
        pretrain(config(tmp_path, workers=1), Killer())


def test_dead_process_ends_the_others(tmp_path):
    run = child(tmp_path / "run", 2, tiles=Killer)  # without workers, the process itself dies
    error = run.communicate(timeout=120)[1]
    assert sorted(run.codes) == [-signal.SIGKILL, 1] and "Connection closed by peer" in error


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=13), "13 with 12 tiles"),
        (dict(n_global=1, n_local=0), "no pair"),
        (dict(steps=0, epochs=0.0), "no step"),
        (dict(micro_batch=3), "does not divide"),
        (dict(sync_bn="yes"), "does not exist on cpu"),
    ],
)
def test_impossible_parameters(tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        pretrain(config(tmp_path, **changes), Tiles())
    assert not checkpoints(tmp_path)


def test_batch_that_processes_cannot_share(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "launched_world_size", lambda: 3)
    with pytest.raises(BadInput, match="4 tiles cannot be shared by 3 processes. Choose 3 or 6"):
        pretrain(config(tmp_path), Tiles())


def test_tiles_that_are_no_pictures(tmp_path):
    with pytest.raises(BadInput, match="tile .: an array of float64"):
        pretrain(config(tmp_path), [(np.full((48, 48, 3), np.nan), 0)] * 12)


def test_no_tiles(tmp_path):
    with pytest.raises(BadInput, match="no tiles"):
        pretrain(dataclasses.replace(config(tmp_path)), [])


def test_a_run_s_own_config_starts_it_again(tmp_path):
    """`histonb pretrain runs/mine/config.json`, which tells of the tiles too, and is what the reports read."""
    config = preset("tiny", out=str(tmp_path), steps=2, n_local=1)
    write_json(tmp_path / "config.json", dataclasses.asdict(config) | {"n_images": 40, "data": "0123456789abcdef"})
    assert as_config(read_json(tmp_path / "config.json"), tmp_path) == config
    with pytest.raises(BadInput, match="mine.yaml.*data_"):
        as_config({"data_": 1}, "mine.yaml")
