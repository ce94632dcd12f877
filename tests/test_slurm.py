"""Studies on a real SLURM, started on the loopback: two virtual nodes with two GPUs each, as far as SLURM knows."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import write_report_notebook

from histonb.core.errors import BadInput
from histonb.core.files import read_json, read_jsonl
from histonb.studies.execution import run_study
from histonb.studies.ranks import RanksFailed, launch
from histonb.studies.slurm import load_profile, submit
from histonb.studies.states import stage_states
from histonb.studies.study import load_study

ROOT = Path(__file__).resolve().parents[1]
HISTONB = str(Path(sys.executable).with_name("histonb"))
START = "from histonb.studies.runs import start\nrun = start(out, {})"
LAUNCH = (
    "from histonb.studies.ranks import launch\nlaunch([run.out, steps, pause, failing], processes, module='standin')"
)
STANDIN = '''
"""A training in small: ranks with states of their own, steps that need all of them, exact stop and resume."""
import datetime, json, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
out, steps, pause, failing = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=100))
rank = dist.get_rank()
print("ranks", dist.get_world_size(), flush=True)
saved = out/f"rank-{rank}.json"
at = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "x": rank + 1, "sums": [], "starts": []}
at["starts"].append([os.environ.get("SLURM_NODEID"), os.environ.get("CUDA_VISIBLE_DEVICES"), at["step"]])
while at["step"] < steps:
    if rank == failing and at["step"] == 3: raise ValueError(f"rank {rank} has had enough")
    x = at["x"]*16807 % 2147483647
    value = torch.tensor([float(x), float((out/"stop").exists())], dtype=torch.float64)
    dist.all_reduce(value)
    if value[1]: break
    at.update(step=at["step"] + 1, x=x, sums=at["sums"] + [value[0].item()])
    if rank == 0 and at["step"] % 5 == 0: print("step", at["step"], flush=True)
    time.sleep(pause)
saved.write_text(json.dumps(at))
dist.barrier()
if rank == 0 and at["step"] < steps: (out/"stop").unlink(); (out/"stopped").touch()
dist.destroy_process_group()
'''


def sums(ranks, steps):
    """What the stand-in's ranks add up to without any interruption."""
    state = list(range(1, ranks + 1))
    found = []
    for _ in range(steps):
        state = [x * 16807 % 2147483647 for x in state]
        found.append(float(sum(state)))
    return found


@pytest.fixture
def root(tmp_path):
    """A repository with a notebook that does nothing much and one that trains."""
    (tmp_path / "nbs/reports").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "settings.ini").touch()
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "standin.py").write_text(STANDIN)
    (tmp_path / "site.yaml").write_text("partition: gpu\nenvironment: {GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: '1'}\n")
    write_report_notebook(
        tmp_path, "10_first", 'out = ""', [START, "import os; run.finish(job=os.environ.get('SLURM_JOB_ID'))"]
    )
    write_report_notebook(
        tmp_path,
        "20_train",
        'out = ""\nneeds = ""\nsteps = 10\npause = 0.0\nfailing = -1\nprocesses = 1',
        [START, LAUNCH, "run.finish(steps=steps)"],
    )
    write_report_notebook(
        tmp_path,
        "30_last",
        'out = ""\nneeds = ""',
        [START, "import os; run.finish(read=sorted(os.listdir(needs)) if needs else [])"],
    )
    return tmp_path


def study(root, text, name="small"):
    path = root / f"runs/{name}.yaml"
    path.write_text(f"study: {name}\nprofile: site.yaml\nstages:\n{text}")
    return path


def histonb(root, *args):
    return subprocess.run([HISTONB, *map(str, args)], cwd=root, capture_output=True, text=True, timeout=120)


TRAIN = """
  first: {notebook: 10_first}
  train:
    notebook: 20_train
    parameters: {needs: "{first}", steps: 60, pause: 0.1, processes: 0}
    resources: {nodes: 2, gpus: 2, cpus: 2, time: "0:20:00"}
  last:
    notebook: 30_last
    parameters: {needs: "{train}"}
"""


# What needs no SLURM


def test_dry_run_shows_the_jobs_and_writes_nothing(root):
    path = study(root, TRAIN)
    done = histonb(root, "run", path, "--on", "slurm", "--profile", ROOT / "slurm/marenostrum5.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    first, train, last = map(shlex.split, done.stdout.splitlines())
    assert {
        "--account=ehpc000",
        "--qos=acc_ehpc",
        "--nodes=2",
        "--gres=gpu:2",
        "--cpus-per-task=2",
        "--time=0:20:00",
        "--dependency=afterok:{first}",
        "--kill-on-invalid-dep=yes",
        "--output=runs/small/train/slurm-%j.out",
    } <= set(train)
    assert train[train.index("slurm/stage.sbatch") :] == [
        "slurm/stage.sbatch",
        "-m",
        "singularity",
        "-e",
        "NCCL_SOCKET_IFNAME=ib",
        "-e",
        "GLOO_SOCKET_IFNAME=ib0",
        "-e",
        "SLURM_CPU_BIND=none",
        "runs/small.yaml",
        "train",
        *shlex.split(load_profile(ROOT / "slurm/marenostrum5.yaml").container),
        "python",
    ]
    assert (
        not [o for o in first if o.startswith(("--dependency", "--gres", "--cpus"))]
        and "--dependency=afterok:{train}" in last
    )
    assert not (root / "runs/small").exists()
    only = histonb(root, "run", path, "--on", "slurm", "--only", "last", "--dry-run")
    assert only.returncode == 2 and "stage `last` needs `train`, which is not run" in only.stderr
    assert "Add `--on slurm`" in histonb(root, "run", path, "--dry-run").stderr


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        ("nodes: 2", "node: 2", "unknown key `node` in `resources`. Did you mean `nodes`?"),
        ("nodes: 2", "nodes: two", "`nodes` is 'two', not of type int"),
        ("nodes: 2", "nodes: 0", "`nodes` is 0. Choose a number 1 or more"),
        ('"0:20:00"', "soon", "`time` is 'soon'. Write it like 24:00:00"),
        ("gpus: 2", "memory: lots", "`memory` is 'lots'. Write it like 64G"),
    ],
)
def test_mistakes_in_resources_are_found_before_anything_is_submitted(root, right, wrong, message):
    with pytest.raises(BadInput) as e:
        submit(study(root, TRAIN.replace(right, wrong)), dry_run=True)
    assert message in str(e.value) and "stage `train`" in str(e.value)


def test_mistakes_in_a_profile(root):
    for text, message in [
        ("acount: me", "Did you mean `account`?"),
        ("cpus_per_gpu: many", "not of type int"),
        ("modules: cuda", "not of type"),
        ("- a", "not a list of"),
    ]:
        (root / "site.yaml").write_text(text)
        with pytest.raises(BadInput) as e:
            submit(study(root, TRAIN), dry_run=True)
        assert message in str(e.value) and "site.yaml" in str(e.value)
    with pytest.raises(BadInput, match="no such file"):
        submit(study(root, TRAIN), profile="absent.yaml", dry_run=True)


def test_no_slurm_on_this_machine(root, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="no SLURM on this machine"):
        submit(study(root, TRAIN))


@pytest.mark.parametrize("script", ["stage.sbatch", "cluster.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / "slurm" / script], check=True)


def test_container_recipe():
    """Header, sections, and shell that parses; the image itself is built where there is Apptainer."""
    lines = (ROOT / "slurm/histonb.def").read_text().splitlines()
    header = dict(line.split(": ") for line in lines[: lines.index("")])
    assert header == {"Bootstrap": "docker", "From": "debian:bookworm-slim"}
    sections = {}
    name = None
    for line in lines[len(header) :]:
        if line.startswith("%"):
            name = line[1:]
            assert name not in sections
            sections[name] = []
        elif name:
            assert not line or line.startswith("    "), line
            sections[name].append(line.strip())
        else:
            assert not line or line.startswith("#"), line
    assert set(sections) == {"files", "post", "environment", "test", "runscript", "labels", "help"}
    for shell in ("post", "environment", "test", "runscript"):
        subprocess.run(["bash", "-n"], input="\n".join(sections[shell]), text=True, check=True)
    for source, target in (line.split() for line in sections["files"] if line):
        assert (ROOT / source).exists() and target.startswith("/opt/histonb/")
    assert sections["post"][0] == "set -e"


@pytest.mark.parametrize(
    "which, signals", [("notebook", ["KILL"]), ("torchrun", ["KILL"]), ("torchrun", ["TERM", "TERM"])]
)
def test_ranks_end_with_their_notebook_and_their_torchrun_however_these_end(root, which, signals):
    (root / "run").mkdir()
    code = "from histonb.studies.ranks import launch; launch(['run', 6000, 0.1, -1], 2, module='standin')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "HISTONB_STAGE": str(root / "run")},
    )
    assert any("step 5" in line for line in process.stdout)
    torchrun = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    for name in signals:
        os.kill(process.pid if which == "notebook" else torchrun, getattr(signal, f"SIG{name}"))
        time.sleep(0.3)
    process.communicate()
    end = time.monotonic() + 30
    while time.monotonic() < end and processes(root):
        time.sleep(0.3)
    assert not processes(root)


def processes(root):
    """Processes whose command line or environment names a folder."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(root).encode() in (p / "cmdline").read_bytes() + (p / "environ").read_bytes()
                and int(p.name) != os.getpid()
            ):
                found.append(int(p.name))
        except OSError:
            pass
    return found


# On the cluster


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine, for the tests of this file."""
    if not all(
        shutil.which(p, path=os.environ["PATH"] + ":/usr/sbin") for p in ("slurmctld", "slurmd", "munged", "sbatch")
    ):
        lack = "no SLURM here: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        assert not os.environ.get("CI"), lack
        pytest.skip(lack)
    folder = Path(tempfile.mkdtemp(prefix="hb-"))
    patch = pytest.MonkeyPatch()
    try:
        subprocess.run([ROOT / "slurm/cluster.sh", "start", folder / "c", str(free_port())], check=True, timeout=60)
        patch.setenv("SLURM_CONF", str(folder / "c/slurm.conf"))
        patch.setenv("HISTONB_BATCH", "1")
        yield
        subprocess.run(["scancel", "--me"], timeout=30)
    finally:
        subprocess.run([ROOT / "slurm/cluster.sh", "stop", folder / "c"], timeout=60)
        patch.undo()
        shutil.rmtree(folder)


def free_port():
    """The first of three free ports, outside the range that jobs use."""
    while True:
        port = random.randrange(31000, 39000)
        try:
            for p in range(port, port + 3):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", p))
            return port
        except OSError:
            pass


def until(condition, path, seconds=300):
    """Wait for a condition; what the jobs of the study wrote is shown where it does not come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.3)
    logs = "\n".join(f"== {p}\n{p.read_text()[-3000:]}" for p in path.with_suffix("").rglob("slurm-*.out"))
    queue = subprocess.run(["squeue", "--all", "--states=all"], capture_output=True, text=True).stdout
    pytest.fail(f"waited {seconds} s in vain\n{queue}\n{logs}\n{states(path)}")


def states(path):
    return {row["stage"]: row["state"] for row in stage_states(load_study(path))}


def job(number):
    """What SLURM knows of a job."""
    text = subprocess.run(["scontrol", "show", "job", "-o", str(number)], capture_output=True, text=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", text))


def log(path, stage):
    return "".join(p.read_text() for p in (path.with_suffix("") / stage).glob("slurm-*.out"))


def steps(path, stage="train"):
    """How far a training has come, from its log."""
    return max(map(int, re.findall(r"step (\d+)", log(path, stage))), default=0)


def test_a_study_on_two_nodes_is_preempted_requeued_and_ends_as_if_never_interrupted(root, cluster):
    path = study(root, TRAIN)
    done = histonb(root, "run", path, "--on", "slurm")
    assert done.returncode == 0, done.stderr
    jobs = dict(re.findall(r"^(\w+): job (\d+), log in", done.stdout, re.M))
    assert list(jobs) == ["first", "train", "last"]
    shown = histonb(root, "status").stdout
    assert re.search(rf"train +pending .*job {jobs['train']}: waits for (Dependency|None|Priority)", shown), shown
    until(lambda: steps(path) >= 10, path)
    assert states(path) == {"first": "finished", "train": "running", "last": "pending"}
    again = histonb(root, "run", path, "--on", "slurm")
    assert (
        f"train: running, job {jobs['train']}" in again.stdout
        and "first: finished before" in again.stdout
        and "sbatch" not in again.stdout
    )
    with pytest.raises(BadInput, match="being run by process|running on the cluster"):
        run_study(path, only="train")
    subprocess.run(
        ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1", "--output=/dev/null"],
        cwd=root,
        check=True,
    )
    until(lambda: states(path)["train"] == "requeued", path)
    until(lambda: states(path)["last"] == "finished", path)
    assert states(path) == dict.fromkeys(jobs, "finished")

    folder = path.with_suffix("")
    ranks = [read_json(folder / f"train/rank-{r}.json") for r in range(4)]
    assert ranks[0]["sums"] == sums(4, 60)
    assert [len(r["starts"]) for r in ranks] == [2] * 4 and 10 <= ranks[0]["starts"][1][2] < 60
    assert [r["starts"][0][:2] for r in ranks] == [["0", "0,1"], ["0", "0,1"], ["1", "0,1"], ["1", "0,1"]]
    info = job(jobs["train"])
    assert info["Restarts"] == "1" and info["JobState"] == "COMPLETED"
    text = log(path, "train")
    assert "back into the queue" in text and "train | step 60" in text and text.count("ranks 4") == 2
    assert {"notebook.ipynb", "metrics.json", "report.html", "stage.json", "provenance.json"} <= {
        p.name for p in (folder / "train").iterdir()
    }
    assert not (folder / "train/stopped").exists()
    until(lambda: "3 of 3 stages finished" in (folder / "index.html").read_text(), path)
    assert read_json(folder / "first/metrics.json") == {"job": jobs["first"]}


def test_a_failing_rank_fails_the_job_and_cancels_what_needs_it(root, cluster):
    path = study(
        root,
        """
  train:
    notebook: 20_train
    parameters: {failing: 3, processes: 2}
    resources: {nodes: 2, gpus: 1}
  last:
    notebook: 30_last
    parameters: {needs: "{train}"}
""",
    )
    jobs = submit(path)
    until(lambda: job(jobs["train"])["JobState"] == "FAILED", path)
    until(lambda: job(jobs["last"])["JobState"] == "CANCELLED", path)
    assert states(path) == {"train": "failed", "last": "not run"}
    assert stage_states(load_study(path))[0]["why"].endswith("rank 3 of 4: ValueError: rank 3 has had enough")
    book = read_json(path.with_suffix("") / "train/notebook.ipynb")
    trace = json.dumps(book["cells"])
    assert "ValueError: rank 3 has had enough" in trace and "standin.py" in trace
    assert "failed" in book["cells"][0]["source"]


def test_a_rank_that_aborts_on_its_way_out_is_told_by_what_it_raised(tmp_path, monkeypatch):
    """Threads of the process group may end a process that is ending already; a real crash has no traceback."""
    monkeypatch.delenv("HISTONB_STAGE", raising=False)
    tried = "try:\n    raise ValueError('enough')\nexcept ValueError:\n    sys.excepthook(*sys.exc_info())"
    for name, first in (("raises", tried), ("crashes", "")):
        last = "print('terminate called', file=sys.stderr)\nos.abort()"
        (tmp_path / f"{name}.py").write_text(f"import os, sys\n{first}\n{last}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(RanksFailed, match="rank 0 of 1: ValueError: enough$"):
        launch([], module="raises")
    with pytest.raises(RanksFailed, match="rank 0 of 1: killed by SIGABRT"):
        launch([], module="crashes")


def test_an_array_and_a_job_that_waits_for_it(root, cluster):
    """An array submitted by hand: its stages run side by side; one that is stopped is requeued alone."""
    seed = "{notebook: 20_train, parameters: {steps: 30, pause: 0.2}, resources: {gpus: 1}}"
    path = study(
        root,
        f"  seed-0: {seed}\n  seed-1: {seed}\n  last: {{notebook: 30_last, parameters: {{needs: '{{seed-1}}'}}}}\n",
    )

    def sbatch(*options):
        done = subprocess.run(
            ["sbatch", "--parsable", *options, sys.executable], cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    for name in ("seed-0", "seed-1", "last"):
        (path.with_suffix("") / name).mkdir(parents=True)
    array = sbatch(
        "--array=0-1",
        "--gres=gpu:1",
        "--job-name=small.seeds",
        "--output=runs/small/seed-%a/slurm-%j.out",
        "slurm/stage.sbatch",
        "-e",
        "GLOO_SOCKET_IFNAME=lo",
        "runs/small.yaml",
        "seed-%a",
    )
    last = sbatch(
        f"--dependency=afterok:{array}",
        "--output=runs/small/last/slurm-%j.out",
        "slurm/stage.sbatch",
        "runs/small.yaml",
        "last",
    )
    until(lambda: min(steps(path, "seed-0"), steps(path, "seed-1")) >= 5, path)
    subprocess.run(["scancel", "--signal=USR1", "--batch", f"{array}_1"], check=True)
    until(lambda: job(last)["JobState"] == "COMPLETED", path)
    ranks = [read_json(path.with_suffix("") / f"seed-{i}/rank-0.json") for i in range(2)]
    assert [r["sums"] for r in ranks] == [sums(1, 30)] * 2
    assert [len(r["starts"]) for r in ranks] == [1, 2]


@pytest.mark.filterwarnings("ignore:label")
def test_the_trainer_stops_near_its_time_limit_and_ends_with_the_very_same_weights(root, cluster):
    from histonb.datasets.example import example_tiles

    tiles = example_tiles(root / "tiles", n_slides=3, seed=0)
    config = {
        "preset": "tiny",
        "tiles": str(tiles),
        "steps": 20,
        "batch_size": 8,
        "log_every": 1,
        "checkpoint_every": 1000,
        "workers": 0,
    }
    write_report_notebook(
        root,
        "21_dino",
        'out = ""',
        [
            START,
            "from histonb.core.files import write_json\n"
            f"write_json(run.path('dino.json'), {config} | {{'out': str(run.out)}})",
            "from histonb.studies.ranks import launch\nlaunch(['pretrain', run.path('dino.json')], processes=2)",
            "run.finish()",
        ],
    )
    path = study(root, "  train: {notebook: 21_dino, resources: {gpus: 2}}\n")
    number = submit(path)["train"]
    folder = path.with_suffix("") / "train"
    until(lambda: len(losses(folder)) >= 2, path)
    subprocess.run(
        ["scancel", "--signal=USR1", "--batch", number], check=True
    )  # as SLURM does by itself, five minutes before
    (root / "whole.json").write_text(json.dumps(config | {"out": "whole"}))  # meanwhile, the same without interruption
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "histonb.cli",
            "pretrain",
            "whole.json",
        ],
        cwd=root,
        check=True,
        capture_output=True,
        timeout=300,
    )
    until(lambda: states(path)["train"] == "finished", path)
    assert job(number)["Restarts"] == "1" and "back into the queue" in log(path, "train")
    assert len(losses(folder)) == 20 and losses(folder) == losses(root / "whole")
    weights = sorted(p.name for p in folder.glob("*.safetensors"))
    assert weights
    for name in weights:
        assert (folder / name).read_bytes() == (root / "whole" / name).read_bytes(), name


def losses(folder):
    rows = read_jsonl(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    return [row["loss"] for row in rows if "loss" in row]


def test_cancelling_ends_everything_and_two_jobs_of_a_stage_exclude_each_other(root, cluster):
    path = study(
        root,
        """
  train: {notebook: 20_train, parameters: {steps: 6000, pause: 0.1}, resources: {gpus: 1}}
  last: {notebook: 30_last, parameters: {needs: "{train}"}}
""",
    )
    jobs = submit(path)
    until(lambda: steps(path) >= 5, path)
    second = subprocess.run(
        [
            "sbatch",
            "--parsable",
            "--output=second.out",
            "slurm/stage.sbatch",
            "runs/small.yaml",
            "train",
            sys.executable,
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    until(lambda: job(second)["JobState"] == "FAILED", path)
    assert re.search(
        f"this stage is being run by process|on the cluster as job {jobs['train']}", (root / "second.out").read_text()
    )
    assert states(path) == {"train": "running", "last": "pending"}
    subprocess.run(["scancel", jobs["train"]], check=True)
    until(lambda: states(path) == {"train": "interrupted", "last": "not run"}, path)
    until(lambda: job(jobs["last"])["JobState"] == "CANCELLED", path)
    until(lambda: not processes(root), path)
