"The collapse detector on made-up logs and on real runs, the figure of a run, and online kNN."

import math
import subprocess
import sys
import warnings

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from histonb.core.errors import BadInput
from histonb.core.files import append_jsonl, write_json
from histonb.models.backbones import build_backbone
from histonb.pretrain.config import PretrainConfig, resolve
from histonb.pretrain.diagnostics import LiveCurves, collapse, draw_curves, first_nonfinite
from histonb.pretrain.loading import crop_loader
from histonb.pretrain.online import OnlineKNN, reference_and_query
from histonb.pretrain.trainer import Trainer
from histonb.segment import validation as watching
from histonb.slides.tile_store import ShardWriter, pack
from histonb.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- detector, made-up rows

LOG_K = math.log(512)


def rows(information, entropy=3.0, steps=200, every=5, momentum=0.95, lr=1e-3, **more):
    "A log whose values are numbers, or functions of the step."

    def at(value, t):
        return value(t) if callable(value) else value

    return [
        {
            "step": t,
            "loss": at(entropy, t) + 0.1,
            "entropy": at(entropy, t),
            "information": at(information, t),
            "lr": at(lr, t),
            "momentum": momentum,
            "feature_std": 0.5,
            **more,
        }
        for t in range(every, steps + 1, every)
    ]


def kind(log):
    return (found := collapse(log, 512)) and found.kind


def test_stuck_at_log_k():
    found = collapse(rows(1e-5, LOG_K - 1e-4), 512)
    assert (found.kind, found.since, found.fatal) == ("log K", 5, True)
    for word in ("Stuck at log K", "since step 5", "6.238", "teacher_temp", "lr"):
        assert word in str(found)


def test_constant_output():
    found = collapse(rows(lambda t: 1.0 if t < 50 else 1e-9, lambda t: 3.0 if t < 50 else 1e-6), 512)
    assert (found.kind, found.since, found.fatal) == ("constant", 50, True)
    assert "center_momentum" in str(found) and "One prototype" in str(found)
    equal = collapse(rows(1e-8, 2.0, feature_std=1e-6), 512)  # undecided, but the same for all: the backbone is dead
    assert equal.kind == "constant" and "features themselves are equal" in str(equal) and "lower lr" in str(equal)


def test_dimensional_collapse_is_a_warning():
    narrow = [{"step": 50 * e, "rankme": 1.2} for e in range(1, 5)]
    found = collapse(sorted(rows(0.5) + narrow, key=lambda row: row["step"]), 512)
    assert (found.kind, found.since, found.fatal) == ("dimensional", 50, False)
    assert kind(rows(0.5) + narrow[:2]) is None
    assert kind(rows(0.5) + [{**row, "rankme": 2.5} for row in narrow]) is None
    assert kind(rows(1e-6, LOG_K) + narrow) == "log K"  # the worse one is told


def test_nothing_is_said_too_early():
    short = rows(1e-6, LOG_K, steps=60)
    assert kind(short) is None and kind(short + rows(1e-6, LOG_K, steps=70)[-2:]) == "log K"
    assert kind(rows(1e-6, LOG_K, steps=200, momentum=0.996)) is None  # such a teacher remembers 250 steps
    assert kind(rows(1e-6, LOG_K, steps=800, momentum=0.996)) == "log K"
    assert kind(rows(1e-6, LOG_K, lr=lambda t: t)) is None  # still warming up
    assert kind(rows(1e-6, 1e-4, lr=lambda t: t)) == "constant"  # no warm-up brings that back
    assert kind([]) is None and kind([{"step": 5, "rankme": 1.0}]) is None
    assert kind(rows(math.nan, math.nan)) is None  # not this detector's business


def test_no_false_alarm():
    assert kind(rows(0.12, 0.99 * LOG_K)) is None  # the loss sits at log K, the answers differ
    assert kind(rows(lambda t: 1e-3 if t < 150 else 0.3, LOG_K)) is None  # recovered
    assert kind(rows(lambda t: 0.3 if t < 150 else 1e-3, LOG_K)) is None  # 50 steps of silence are not yet long
    slow = rows(lambda t: 1e-4 * 2 ** (t / 40), lambda t: LOG_K - 1e-4 * 2 ** (t / 40))
    assert all(kind(slow[:n]) is None for n in range(len(slow)))


# every tenth step of the demo's settings (xcit_nano, K 512, EMA .98): loss near log K = 6.238 all along
DEMO = [
    [10, 5.787, 5.491, 0.2121, 0.4021, 0.0001339],
    [20, 6.074, 5.931, 0.1798, 0.3804, 0.0004315],
    [30, 5.961, 5.816, 0.2464, 0.4077, 0.0006219],
    [40, 5.54, 5.33, 0.3759, 0.456, 0.0006243],
    [50, 5.372, 5.155, 0.413, 0.4572, 0.0006228],
    [60, 5.215, 4.982, 0.4591, 0.492, 0.0006207],
    [70, 5.401, 5.178, 0.4384, 0.5033, 0.0006177],
    [80, 5.522, 5.275, 0.4318, 0.503, 0.000614],
    [90, 5.583, 5.338, 0.4396, 0.5209, 0.0006096],
    [100, 5.592, 5.342, 0.4602, 0.5434, 0.0006044],
    [110, 5.591, 5.377, 0.4702, 0.5585, 0.0005985],
    [120, 5.632, 5.369, 0.4744, 0.5566, 0.0005919],
]


def test_demo_run_is_not_alarmed():
    log = [
        {"step": s, "loss": l, "entropy": h, "information": i, "feature_std": f, "lr": r, "momentum": 0.98}
        for s, l, h, i, f, r in DEMO
    ]
    assert all(kind(log[:n]) is None for n in range(len(log) + 1))
    assert min(row["loss"] for row in log) > 0.8 * LOG_K


# ---- detector, real runs

TINY = dict(
    out_dim=64,
    hidden=64,
    bottleneck=32,
    n_local=0,
    global_size=32,
    global_scale=(0.4, 0.8),
    batch_size=8,
    steps=75,
    warmup_epochs=1.0,
    lr=1e-2,
    min_lr=1e-4,
    momentum=0.9,
    weight_decay_end=0.04,
    teacher_temp=0.04,
    freeze_last_epochs=0.0,
    clip=0.3,
    drop_path=0.0,
    precision="fp32",
    device="cpu",
    workers=0,
)


class Waves:
    "64 striped tiles of eight colours."

    def __len__(self):
        return 64

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        k = i % 8
        y, x = np.mgrid[:48, :48]
        wave = np.sin((0.2 + 0.15 * (k % 4)) * (x * np.cos(k) + y * np.sin(k)) + rng.uniform(0, 6))
        color = np.random.default_rng(k).uniform(110, 220, 3)
        return np.clip(color + 30 * wave[..., None] + 12 * rng.standard_normal((48, 48, 3)), 0, 255).astype(np.uint8), k


def run(**changes):
    "Rows of a short run, one a step."
    c = resolve(PretrainConfig("unused", **(TINY | changes)), 64)
    with torch.random.fork_rng():
        trainer = Trainer(c, 64)
        batches = iter(crop_loader(Waves(), c))
        rows = trainer.read_figures([trainer.train_step(batches) for _ in range(c.steps)])
        return [{"step": step, **row} for step, row in enumerate(rows, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes,expected",
    [
        ({}, None),
        ({"center_momentum": 1.0}, "constant"),
        ({"teacher_temp_start": 0.2, "teacher_temp": 0.2}, "log K"),
        ({"lr": 100.0}, "constant"),
    ],
)
def test_provoked_collapse_is_recognised(changes, expected):
    log = run(**changes)
    found = [collapse(log[:n], 64) for n in range(1, len(log) + 1)]
    assert {f.kind for f in found if f} == ({expected} if expected else set())
    if expected:
        assert found[-1] is not None


# ---- figure


def a_run(folder, log):
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {"out_dim": 512})
    (folder / "log.jsonl").touch()
    for row in log:
        append_jsonl(folder / "log.jsonl", row)
    return folder


@pytest.mark.parametrize(
    "log",
    [
        [],
        rows(0.5)[:1],
        [{"step": 5, "rankme": 12.0}],
        [{"step": 1, "loss": math.nan, "grad_norm": 0.0}],
        rows(0.5, knn=0.4, memory=1.0),
    ],
)
def test_curves_of_any_log(tmp_path, log):
    from matplotlib.figure import Figure

    fig = draw_curves(a_run(tmp_path, log), Figure())
    fig.savefig(tmp_path / "x.png")
    empty = sum(any(t.get_text() == "not logged" for t in ax.texts) for ax in fig.axes)
    assert empty == len(fig.axes) - len({k for row in log for k in row} - {"step"})


def test_curves_of_no_run_say_so(tmp_path):
    with pytest.raises(BadInput, match="holds no log.jsonl"):
        draw_curves(tmp_path)


def test_live_curves_leave_pyplot_alone(tmp_path):
    "In a fresh process: neither pyplot nor a backend is loaded, and the file is whole."
    a_run(tmp_path, rows(0.5))
    code = (
        "import sys; from histonb.pretrain.diagnostics import LiveCurves; assert 'matplotlib' not in sys.modules; "
        "live = LiveCurves(sys.argv[1]); live(); "
        "assert 'matplotlib' not in sys.modules; live(now=True); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "curves.png").read_bytes()[-8:-4] == b"IEND"


def test_live_curves_wait_and_never_raise(tmp_path, monkeypatch):
    live = LiveCurves(a_run(tmp_path, rows(0.5)), every=1000.0)
    drawn = []
    monkeypatch.setattr(live, "_draw", lambda: drawn.append(1))
    live()
    live()
    live(now=True)
    live()
    assert len(drawn) == 1

    def fail():
        raise RuntimeError("no disk")

    monkeypatch.setattr(live, "_draw", fail)
    with pytest.warns(UserWarning, match="no disk"):
        live(now=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live()  # and it does not try again at once
        LiveCurves(tmp_path / "nowhere")(now=True)  # a run without a log yet


# ---- online kNN


def a_store(folder, labels, shade=0, **columns):
    "A tile store of plain noisy tiles; class c is darker by `shade`*c."
    rng = np.random.default_rng(0)
    jpegs = [
        imagecodecs.jpeg8_encode(
            np.clip(rng.normal([220 - shade * c, 160, 190], 10, (32, 32, 3)), 0, 255).astype(np.uint8), level=95
        )
        for c in labels
    ]
    records = [pack(jpeg) for jpeg in jpegs]
    folder.mkdir()
    (folder / "part").write_bytes(b"".join(records))
    ShardWriter(folder).append(folder / "part")
    cases = [f"case{i // 2 % 12}" for i in range(len(labels))]
    pd.DataFrame(
        {
            "slide": cases,
            "case": cases,
            "label": labels,
            "kept": True,
            "shard": 0,
            "offset": np.cumsum([0, *map(len, records[:-1])]),
            "nbytes": [len(j) for j in jpegs],
            **columns,
        }
    ).to_parquet(folder / "tiles.parquet", index=False)
    return folder


def colour():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8, bias=False), nn.Dropout(0.5))


LABELS = [0, 1, 2, 1, 0, 2] * 20


def test_online_knn_separates(tmp_path):
    assert OnlineKNN(a_store(tmp_path / "clear", LABELS, shade=50), size=32)(colour())["knn"] > 0.95
    assert OnlineKNN(a_store(tmp_path / "alike", LABELS, shade=0), size=32)(colour())["knn"] < 0.6


def test_online_knn_leaves_no_trace(tmp_path):
    ask = OnlineKNN(a_store(tmp_path / "tiles", LABELS, shade=50), size=32)
    model = build_backbone("xcit_nano_12_p16_224", drop_path_rate=0.5).train()
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    first = ask(model)
    assert first == ask(model) and model.training  # without dropout's chance, though the model is in train mode
    assert torch.equal(generators[0], torch.get_rng_state()) and generators[1] == np.random.get_state()[1].tolist()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert ask(model) == first  # fp32 was asked for
        assert 0 <= ask(model, bf16=True)["knn"] <= 1
        model(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_online_knn_reads_each_tile_once(tmp_path):
    store = a_store(tmp_path / "tiles", LABELS, shade=50)
    ask = OnlineKNN(store, size=32)
    before = ask(colour())
    for path in store.glob("shard-*"):
        path.unlink()
    assert ask(colour()) == before


def test_online_knn_of_broken_features_is_no_number(tmp_path):
    model = colour()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    assert math.isnan(OnlineKNN(a_store(tmp_path / "tiles", LABELS), size=32)(model)["knn"])


def test_both_sides_share_no_case_and_are_bounded(tmp_path):
    table = pd.read_parquet(a_store(tmp_path / "tiles", LABELS) / "tiles.parquet")
    voters, asked = reference_and_query(table, 30)
    assert not set(voters["case"]) & set(asked["case"])
    assert len(voters) == 30 and len(asked) <= 30 and voters["label"].value_counts().max() <= 10
    given = table.assign(split=np.where(table["case"] < "case5", "val", "train"))
    voters, asked = reference_and_query(given, 1000)
    assert (
        set(voters["split"]) == {"train"} and set(asked["split"]) == {"val"} and len(voters) + len(asked) == len(table)
    )


@pytest.mark.parametrize(
    "labels,message",
    [
        ([-1] * 12, "none of its 12 tiles has a label"),
        ([255] * 12, "none of its 12 tiles"),
        ([3] * 12, "all labels are 3"),
        ([1, -1] * 6, "all labels are 1"),
    ],
)
def test_table_without_labels_is_named(tmp_path, labels, message):
    with pytest.raises(BadInput, match=message) as e:
        OnlineKNN(a_store(tmp_path / "tiles", labels))
    assert str(tmp_path / "tiles") in str(e.value) and "knn_tiles" in str(e.value)


# ---- numbers that are none


def test_suspect_names_a_parameter():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = 3e20
    assert first_nonfinite(model.named_parameters()) == "all finite so far, the largest value 3.0e+20 in 1.weight"
    with torch.no_grad():
        model[1].bias[1] = math.inf
    assert first_nonfinite([*model.named_parameters(), ("none", None)]) == "first not finite: 1.bias"


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", '{"out_dim": "x"}'),
        ("log.jsonl", '{"step": {}, "loss": 1, "lr": 1}\n'),
        ("log.jsonl", '{"step": 1, "loss": [], "lr": []}\n'),
        ("log.jsonl", '{"loss": 1, "lr": 1}\n'),
    ],
)
def test_curves_of_damaged_records_say_so(tmp_path, name, text):
    from matplotlib.figure import Figure

    append_jsonl(tmp_path / "log.jsonl", {"step": 1, "loss": 1.0})
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=name):
        draw_curves(tmp_path, Figure())
    if name == "log.jsonl":
        with pytest.raises(BadInput, match=name):
            watching.plot_task_curves(tmp_path, Figure())


def test_records_of_a_run_that_are_none(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadInput, match="holds no names and values"):
        checkpoint.same_run(tmp_path, {"lr": 1})
    (tmp_path / "log.jsonl").write_text('{"step": null}\n')
    with pytest.raises(BadInput, match="`None` is not a step"):
        checkpoint.truncate_log(tmp_path / "log.jsonl", 3)
