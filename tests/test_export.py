"Export: timm alone loads it and computes the same; the card tells the truth; nothing half-written is left behind."

import json
import subprocess
import sys

import pandas as pd
import pytest
import timm
import torch

from histonb.core.digests import digest
from histonb.core.errors import BadInput
from histonb.core.files import append_jsonl, read_json, write_json
from histonb.models import backbones
from histonb.pretrain.config import PRESETS, preset
from histonb.pretrain.export import card, export, last_metrics, nearest_preset, origin, timm_config
from histonb.probe.encoders import load_encoder

MEAN = (0.71, 0.58, 0.72)
STD = (0.19, 0.23, 0.18)

LOAD = """
import sys
sys.modules["histonb"] = None
import json, timm, torch
torch.set_num_threads(1)
work, out = sys.argv[1], {}
images = torch.load(work + "/images.pt", weights_only=True)
for folder, (name, kwargs) in json.loads(sys.argv[2]).items():
    loaded = [timm.create_model(f"local-dir:{work}/{folder}", pretrained=True).eval(),
              timm.create_model(
                  name, num_classes=0, checkpoint_path=f"{work}/{folder}/model.safetensors", **kwargs
              ).eval()]
    data = timm.data.resolve_model_data_config(loaded[0])
    with torch.inference_mode(): features = [[m(x) for x in images] for m in loaded]
    out[folder] = {"features": features, "mean": list(data["mean"]), "std": list(data["std"]),
                   "size": list(data["input_size"]),
                   "dim": loaded[0].num_features, "crop": data["crop_pct"]}
torch.save(out, work + "/found.pt")
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def finished(folder, arch="xcit_nano_12_p16_224", step=10, **changes):
    "A run's folder as the trainer leaves it, without the training; weights and statistics uneven."
    config = preset("cpu", out=str(folder), arch=arch, **changes)
    torch.manual_seed(0)
    model = backbones.build_backbone(arch)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand_like(value))
    folder.mkdir()
    backbones.save_backbone(model, folder, arch, MEAN, STD, step=step, steps=10)
    write_json(folder / "config.json", vars(config) | {"n_images": 1234})
    for s, loss in ((5, 6.0), (10, 5.5)):
        append_jsonl(folder / "log.jsonl", {"step": s, "loss": loss, "entropy": 2.0})
    append_jsonl(folder / "log.jsonl", {"step": 10, "epoch": 1.0, "rankme": 17.25, "knn": 0.5625})
    return folder


def test_timm_alone_computes_the_same(tmp_path):
    names = {
        "xcit_nano_12_p16_224": ("xcit_nano_12_p16_224", {}),
        "xcit_nano_12_p16": ("xcit_nano_12_p16_224", {}),
        "vit_tiny_patch16_224": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        "resnet18": ("resnet18", {}),
    }
    for arch in names:
        export(finished(tmp_path / f"run-{arch}", arch), tmp_path / arch)
    images = [torch.randn(1, 3, 224, 224), torch.randn(2, 3, 96, 64)]
    torch.save(images, tmp_path / "images.pt")
    subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path, json.dumps(names)], check=True, capture_output=True, timeout=300
    )
    for arch, found in torch.load(tmp_path / "found.pt", weights_only=True).items():
        model = backbones.load_backbone(tmp_path / f"run-{arch}")[0]
        with torch.inference_mode():
            for loaded in found["features"]:
                for x, theirs in zip(images, loaded, strict=True):
                    torch.testing.assert_close(theirs, model(x), atol=1e-4, rtol=1e-4)
        assert (found["mean"], found["std"], found["size"], found["crop"]) == (
            list(MEAN),
            list(STD),
            [3, 112, 112],
            1.0,
        )
        assert found["dim"] == model.num_features == read_json(tmp_path / arch / "config.json")["num_features"]


def test_channels_are_kept(tmp_path):
    model = backbones.build_backbone("xcit_nano_12_p16_224", in_chans=4).eval()
    out = tmp_path / "run"
    finished(out)
    backbones.save_backbone(model, out, "xcit_nano_12_p16_224", [0.5] * 4, [0.2] * 4, step=10, steps=10)
    loaded = timm.create_model(f"local-dir:{export(out, tmp_path / 'out')}", pretrained=True).eval()
    x = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)


def test_card_says_what_is_known(tmp_path):
    run = finished(tmp_path / "run")
    text = (export(run, tmp_path / "out", licence="CC BY-NC-SA 4.0") / "README.md").read_text()
    for part in (
        "| rankme | 17.25 |",
        "| knn | 0.5625 |",
        "| loss | 5.5 |",
        "1,234 tiles",
        "10 of 10",
        "preset `cpu` |",
        "commit not recorded",
        "CC BY-NC-SA 4.0",
        str(MEAN),
        str(STD),
        '"local-dir:out"',
        "Not a medical device",
        digest(run / "backbone.safetensors"),
    ):
        assert part in text, part
    assert "not the last" not in text and str(tmp_path) not in text
    assert "None is stated" in card(run, read_json(run / "backbone.json"), read_json(tmp_path / "out" / "config.json"))


def test_origin_names_tiles_commit_and_resolution(tmp_path):
    store = tmp_path / "tiles"
    store.mkdir()
    pd.DataFrame({"mpp": [0.48, 0.5, 0.48]}).to_parquet(store / "tiles.parquet")
    run = finished(tmp_path / "run", tiles=str(store))
    write_json(run / "provenance.json", {"git": {"commit": "abc123", "dirty": True}})
    assert origin(run) == {
        "commit": "abc123 with local changes",
        "tiles": digest(store / "tiles.parquet"),
        "mpp": 0.48,
        "images": 1234,
    }
    text = card(run, backbones.load_backbone(run)[1], timm_config(*backbones.load_backbone(run)))
    assert "commit abc123 with local changes" in text and "0.48 um/px" in text and str(store) not in text


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised(name):
    config = json.loads(json.dumps(vars(preset(name, out="x", tiles="y", device="cpu", workers=3)))) | {
        "precision": "bf16"
    }
    assert nearest_preset(config) == (name, {})
    assert nearest_preset(config | {"lr": 1.5}) == (name, {"lr": 1.5})


def test_unfinished_existing_and_broken_are_refused(tmp_path):
    run = finished(tmp_path / "run", step=7)
    with pytest.raises(BadInput, match="step 7 of 10"):
        export(run, tmp_path / "out")
    assert (
        "7 of 10, 32 tiles each (**not the last step**)"
        in (export(run, tmp_path / "out", unfinished=True) / "README.md").read_text()
    )
    with pytest.raises(BadInput, match="exists already"):
        export(run, tmp_path / "out", unfinished=True)
    with pytest.raises(BadInput, match="no such file"):
        export(tmp_path, tmp_path / "other")
    (run / "config.json").unlink()
    with pytest.raises(BadInput, match="no config.json"):
        export(run, tmp_path / "other", unfinished=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_difference_in_timm_leaves_nothing_behind(tmp_path, monkeypatch):
    run = finished(tmp_path / "run")
    create = timm.create_model

    def other(*args, **kwargs):
        model = create(*args, **kwargs)
        with torch.no_grad():
            model.norm.bias.add_(1.0)
        return model

    monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(AssertionError):
        export(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_log_without_rows(tmp_path):
    run = finished(tmp_path / "run")
    (run / "log.jsonl").unlink()
    assert last_metrics(run) == {}
    assert "| figure at the end |" in card(
        run, backbones.load_backbone(run)[1], timm_config(*backbones.load_backbone(run))
    )


@pytest.mark.parametrize("arch", ["xcit_nano_12_p16_224", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("pool", ["mean", "class+mean"])
def test_what_was_trained_is_what_timm_gives(tmp_path, arch, pool):
    run = finished(tmp_path / "run", arch, pool=pool)
    model = backbones.load_backbone(run)[0]
    backbones.save_backbone(model, run, arch, MEAN, STD, step=10, steps=10, pool=pool)
    out = export(run, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval().double()
    model = model.double()  # in which equal networks agree to far more than the order of their sums
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    text = (out / "README.md").read_text()
    with torch.inference_mode():
        ours = backbones.image_features(model, x, pool)[:, : model.num_features]
        torch.testing.assert_close(loaded(x), ours, atol=1e-10, rtol=1e-10)
        if pool == "class+mean":
            mean = loaded.forward_features(x)[:, loaded.num_prefix_tokens :].mean(1)
            torch.testing.assert_close(mean, backbones.image_features(model, x, "mean"), atol=1e-10, rtol=1e-10)
            assert "the mean patch token was trained beside it" in text
        else:
            kwargs = read_json(out / "config.json")["model_args"]
            again = timm.create_model(arch, num_classes=0, checkpoint_path=out / "model.safetensors", **kwargs)
            torch.testing.assert_close(again.eval().double()(x), ours, atol=1e-10, rtol=1e-10)
            assert 'global_pool="avg"' in text and "the class token was not trained" in text


def test_the_best_by_knn(tmp_path):
    run = finished(tmp_path / "run")
    other = backbones.build_backbone("xcit_nano_12_p16_224").eval()
    (run / "best").mkdir()
    backbones.save_backbone(other, run / "best", "xcit_nano_12_p16_224", MEAN, STD, step=5, steps=10)
    out = export(run, tmp_path / "out", best=True)
    x = torch.randn(1, 3, 64, 64)
    text = (out / "README.md").read_text()
    with torch.inference_mode():
        torch.testing.assert_close(
            timm.create_model(f"local-dir:{out}", pretrained=True).eval()(x), other(x), atol=1e-5, rtol=1e-5
        )
    assert "5 of 10, 32 tiles each (**not the last step**)" in text and "| loss | 6 |" in text and "rankme" not in text


# folders for timm are read back


SIZED = pytest.param("xcit_nano_12_p16_224", marks=pytest.mark.slow)  # with its size in the name


@pytest.mark.parametrize("arch", ["xcit_nano_12_p16", "vit_tiny_patch16_224", "resnet18", SIZED])
def test_an_export_is_loaded_again(tmp_path, arch):
    run = finished(tmp_path / "run", arch)
    out = export(run, tmp_path / "out")
    model = backbones.load_backbone(run)[0]
    x = torch.randn(1, 3, 96, 96)
    for path in (out, out / "model.safetensors", out / "config.json"):
        again, info = backbones.load_backbone(path)
        with torch.inference_mode():
            assert torch.equal(again(x), model(x))
        assert (info["mean"], info["std"]) == (list(MEAN), list(STD))
        assert load_encoder(str(path)).spec.mean == load_encoder("anything", checkpoint=path).spec.mean == MEAN
    assert load_encoder(f"run:{out}").key == load_encoder("x", checkpoint=out).key


@pytest.mark.parametrize("arch", ["xcit_nano_12_p16_224", "vit_tiny_patch16_224"])
def test_an_export_of_mean_tokens_is_the_same_backbone(tmp_path, arch):
    run = finished(tmp_path / "run", arch, pool="mean")
    model = backbones.load_backbone(run)[0]
    x = torch.randn(1, 3, 96, 96)
    backbones.save_backbone(model, run, arch, MEAN, STD, step=10, steps=10, pool="mean")
    again, info = backbones.load_backbone(export(run, tmp_path / "out"))
    with torch.inference_mode():
        assert torch.equal(backbones.image_features(again, x, info["pool"]), backbones.image_features(model, x, "mean"))


def test_a_folder_of_the_hub_is_loaded(tmp_path):
    "As timm's own push_to_hf_hub writes it: a classifier, a tag in the name, arguments of the model."
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=4, init_values=1e-5, img_size=112).eval()
    cfg = {"tag": "mine", "mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 112, 112]}
    args = {"img_size": 112, "init_values": 1e-5, "num_classes": 4, "dynamic_img_size": True}
    write_json(
        tmp_path / "config.json",
        {"architecture": "vit_tiny_patch16_224.mine", "model_args": args, "pretrained_cfg": cfg},
    )
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    model, info = backbones.load_backbone(tmp_path)
    x = torch.randn(1, 3, 112, 112)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), theirs.forward_head(theirs.forward_features(x), pre_logits=True))
    assert info["std"] == [0.25] * 3
    for changed, says in [
        ({"checkpoint_path": "/etc/passwd"}, "`checkpoint_path` is not known here"),
        ({"img_size": 10**9}, "`img_size` is 1000000000"),
        ({"depth": 10**9}, "`depth` is not known"),
        ({"in_chans": "3"}, "`in_chans` is '3'"),
        ({"init_values": [1]}, r"`init_values` is \[1\]"),
    ]:
        write_json(
            tmp_path / "config.json",
            {"architecture": "vit_tiny_patch16_224", "model_args": changed, "pretrained_cfg": cfg},
        )
        with pytest.raises(BadInput, match=says):
            backbones.load_backbone(tmp_path)


def test_what_is_no_run_is_not_exported(tmp_path):
    out = export(finished(tmp_path / "run"), tmp_path / "out")
    with pytest.raises(BadInput, match="is no pre-training run"):
        export(out, tmp_path / "again")
    backbones.save_backbone(backbones.build_backbone(NANO), tmp_path / "run", NANO, MEAN, STD)  # without its step
    with pytest.raises(BadInput, match="is no pre-training run"):
        export(tmp_path / "run", tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_backbone_trained_by_its_mean_token_is_asked_for_that(tmp_path):
    model = backbones.build_backbone(NANO)
    backbones.save_backbone(model, tmp_path, NANO, MEAN, STD, pool="mean")
    mean, asked, token = (load_encoder("x", tmp_path, pool=pool) for pool in ("", "mean", "class"))
    assert mean.key == asked.key != token.key


NANO = "xcit_nano_12_p16_224"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"name": None}, "lacks the `name`"),
        ({"name": "xcit_nana_12_p16"}, "no such backbone"),
        ({"name": "xcit_large_24_p8_224"}, "not the weights of xcit_large"),
        ({"name": "\x1b[31mred"}, "lacks the `name`"),
        ({"name": "zzz"}, "no such backbone.*and 1[0-9]* more"),
        ({"mean": [0.5, 0.5]}, "lacks `mean`"),
        ({"mean": "abc"}, "lacks `mean`"),
        ({"std": [0, 0, 0]}, "lacks `std`"),
        ({"std": [float("nan")] * 3}, "lacks `std`"),
        ({"in_chans": 0}, "`in_chans` is 0"),
        ({"in_chans": 10**30}, "`in_chans` is 1000"),
        ({"in_chans": True}, "`in_chans` is True"),
        ({"in_chans": 4, "mean": [0.5] * 4, "std": [0.5] * 4}, "not the weights"),
        ({"weights": "0" * 16}, "not the weights that backbone.json describes"),
    ],
)
def test_what_stands_in_the_json_is_looked_at(tmp_path, change, says):
    run = finished(tmp_path / "run")
    write_json(run / "backbone.json", read_json(run / "backbone.json") | change)
    for load in (backbones.load_backbone, lambda path: load_encoder("x", checkpoint=path)):
        with pytest.raises(BadInput, match=says) as e:
            load(run)
        assert str(e.value).isprintable() and len(str(e.value)) < 1000


def test_json_that_is_none(tmp_path):
    run = finished(tmp_path / "run")
    for content, says in [
        ("[]", "holds no names"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("3", "holds no names"),
        ("{}", "lacks the `name`"),
    ]:
        (run / "backbone.json").write_text(content)
        with pytest.raises(BadInput, match=says):
            backbones.load_backbone(run)
        with pytest.raises(BadInput, match=says):
            load_encoder("x", checkpoint=run / "backbone.safetensors")


def test_a_json_beside_foreign_weights_is_not_taken_for_ours(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "best.pth")
    write_json(tmp_path / "best.json", {"epoch": 3, "name": "my run"})
    assert load_encoder("vit_tiny_patch16_224", tmp_path / "best.pth").spec.dim == 192
    with pytest.raises(BadInput, match="best.json: lacks|does not tell which network it is of"):
        load_encoder(str(tmp_path / "best.pth"))
    with pytest.raises(BadInput, match="NaN"):
        nan = {k: v * torch.nan for k, v in backbones.build_backbone(NANO).state_dict().items()}
        write_json(tmp_path / "nan.json", {"name": NANO, "mean": [0.5] * 3, "std": [0.5] * 3})
        torch.save(nan, tmp_path / "nan.pth")
        backbones.load_backbone(tmp_path / "nan.pth")
