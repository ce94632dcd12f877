"Published encoders, rebuilt from files in each maker's layout with random weights, against independent constructions."

import argparse
import pathlib
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from histonb.core.errors import BadInput
from histonb.models.heads import DINOHead
from histonb.models.published import ENCODERS, load_published
from histonb.probe.encoders import load_encoder
from histonb.probe.published import BONY_REPORT
from histonb.studies.study import load_study

TILES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)


def prepared(tiles, mean, std):
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def official_xcit(state):
    "timm's names turned into those of the official code."
    out = {}
    parts = {}
    for name, value in state.items():
        found = re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)([qkv])\.(weight|bias)", name)
        if found:
            parts.setdefault(f"{found[1]}qkv.{found[3]}", {})[found[2]] = value
        else:
            out[name.replace("pos_embed.", "pos_embeder.")] = value
    return out | {k: torch.cat([v[x] for x in "qkv"]) for k, v in parts.items()}


@pytest.fixture(scope="module")
def bony(tmp_path_factory):
    "A file as the study published it, and the networks in it: timm's, and a head."
    torch.manual_seed(0)
    body = timm.create_model("xcit_medium_24_p16_224", num_classes=0).eval()
    head = DINOHead(512, 4096).eval()
    names = {"original0": "weight_g", "original1": "weight_v"}
    old = {
        re.sub(r"parametrizations\.weight\.(original\d)", lambda m: names[m[1]], k): v
        for k, v in head.state_dict().items()
    }
    teacher = {f"module.backbone.{k}": v for k, v in official_xcit(body.state_dict()).items()} | {
        f"module.head.{k}": v for k, v in old.items()
    }
    path = tmp_path_factory.mktemp("bony") / "checkpoint.pth"
    torch.save({"teacher": teacher, "student": {"module.backbone.cls_token": torch.zeros(1)}, "epoch": 20}, path)
    return path, body, head


def test_bony(bony):
    path, body, head = bony
    ours = load_encoder("bony", path)
    x = prepared(TILES, ours.spec.mean, ours.spec.std)
    with torch.no_grad():
        token = body(x)
    assert (
        np.allclose(ours(TILES), token, atol=1e-4)
        and ours.spec.dim == 512
        and ours.spec.patch == 16
        and not ours.spec.random_init
    )
    assert ours.report["matched"] == len(body.state_dict()) and not ours.report["missing"] + ours.report["unexpected"]
    scores = load_encoder("bony", path, pool="head")
    z = F.normalize(
        F.linear(
            F.gelu(F.linear(F.gelu(F.linear(token, *head.mlp[0].parameters())), *head.mlp[2].parameters())),
            *head.mlp[4].parameters(),
        ),
        dim=-1,
    )
    v = F.normalize(head.last_layer.parametrizations.weight.original1, dim=-1)
    assert (
        scores.spec.dim == 4096 and np.allclose(scores(TILES), (z @ v.T).detach(), atol=1e-5) and scores.key != ours.key
    )
    both = load_encoder("bony", path, pool="class+mean", depths=(-2, -1))
    assert both(TILES).shape == (2, 4 * 512) and np.allclose(both(TILES)[:, 1024:1536], token, atol=1e-4)


def test_bonywave_sees_the_haar_approximation(bony):
    path, body, _ = bony
    ours = load_encoder("bonywave", path)
    x = prepared(TILES, ours.spec.mean, ours.spec.std)
    approximation = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 2
    with torch.no_grad():
        assert np.allclose(ours(TILES), body(approximation), atol=1e-4)
    assert ours.key != load_encoder("bony", path).key


def test_histoencoder(tmp_path):
    torch.manual_seed(0)
    body = timm.create_model("xcit_small_12_p16_224", num_classes=0).eval()
    torch.save(body.state_dict(), tmp_path / "prostate_small.pth")
    stats = dict(mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2))
    ours = load_encoder("histoencoder-small", tmp_path / "prostate_small.pth", **stats)
    with torch.no_grad():
        tokens = body.forward_features(prepared(TILES, **stats))
    assert np.allclose(ours(TILES), tokens[:, 0], atol=1e-4)  # as their `extract_features` where nothing is asked of it
    both = load_encoder("histoencoder-small", tmp_path / "prostate_small.pth", pool="class+mean", **stats)
    assert np.allclose(both(TILES), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), atol=1e-4)
    with pytest.raises(BadInput, match="publish no normalisation"):
        load_encoder("histoencoder-small", tmp_path / "prostate_small.pth")


# Hibou: a small number of blocks would be another model, so it is the real size, written out by hand

D, DEPTH, HEADS, HIDDEN = 768, 12, 12, 2048


def hibou_state(side=16):
    "Random weights under the names of the transformers library."
    g = torch.Generator().manual_seed(0)

    def w(*shape):
        return 0.02 * torch.randn(*shape, generator=g)

    state = {
        "embeddings.cls_token": w(1, 1, D),
        "embeddings.mask_token": w(1, D),
        "embeddings.register_tokens": w(1, 4, D),
        "embeddings.position_embeddings": w(1, 1 + side**2, D),
        "embeddings.patch_embeddings.projection.weight": w(D, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": w(D),
        "layernorm.weight": 1 + w(D),
        "layernorm.bias": w(D),
    }
    for i in range(DEPTH):
        b = f"encoder.layer.{i}."
        for n in ("norm1", "norm2"):
            state |= {f"{b}{n}.weight": 1 + w(D), f"{b}{n}.bias": w(D)}
        for n in ("query", "key", "value"):
            state |= {f"{b}attention.attention.{n}.weight": w(D, D), f"{b}attention.attention.{n}.bias": w(D)}
        state |= {
            f"{b}attention.output.dense.weight": w(D, D),
            f"{b}attention.output.dense.bias": w(D),
            f"{b}mlp.weights_in.weight": w(2 * HIDDEN, D),
            f"{b}mlp.weights_in.bias": w(2 * HIDDEN),
            f"{b}mlp.weights_out.weight": w(D, HIDDEN),
            f"{b}mlp.weights_out.bias": w(D),
            f"{b}layer_scale1.lambda1": w(D),
            f"{b}layer_scale2.lambda1": w(D),
        }
    return state


def hibou_by_hand(s, x):
    "Tokens (B, 5 + N, D) after the last norm."

    def norm(z, n):
        return F.layer_norm(z, (D,), s[f"{n}.weight"], s[f"{n}.bias"], 1e-6)

    def linear(z, n):
        return F.linear(z, s[f"{n}.weight"], s[f"{n}.bias"])

    e = "embeddings."
    patches = (
        F.conv2d(x, s[f"{e}patch_embeddings.projection.weight"], s[f"{e}patch_embeddings.projection.bias"], stride=14)
        .flatten(2)
        .transpose(1, 2)
    )
    z = torch.cat([s[f"{e}cls_token"].expand(len(x), -1, -1), patches], 1) + s[f"{e}position_embeddings"]
    z = torch.cat([z[:, :1], s[f"{e}register_tokens"].expand(len(x), -1, -1), z[:, 1:]], 1)
    for i in range(DEPTH):
        b = f"encoder.layer.{i}."
        h = norm(z, f"{b}norm1")
        q, k, v = (
            linear(h, f"{b}attention.attention.{n}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        a = (q @ k.transpose(-1, -2) / (D // HEADS) ** 0.5).softmax(-1) @ v
        z = z + s[f"{b}layer_scale1.lambda1"] * linear(a.transpose(1, 2).flatten(2), f"{b}attention.output.dense")
        gate, value = linear(norm(z, f"{b}norm2"), f"{b}mlp.weights_in").chunk(2, -1)
        z = z + s[f"{b}layer_scale2.lambda1"] * linear(F.silu(gate) * value, f"{b}mlp.weights_out")
    return norm(z, "layernorm")


def native(state, chunked):
    "The same weights under the names of DINOv2's own code."
    out = {}
    for name, value in state.items():
        if ".attention.attention." in name:
            continue
        for old, new in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("encoder.layer.", "blocks.0." if chunked else "blocks."),
            ("attention.output.dense", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("weights_in", "w12"),
            ("weights_out", "w3"),
            ("layernorm", "norm"),
        ):
            name = name.replace(old, new)
        out[name] = value
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            out[f"blocks.{'0.' if chunked else ''}{i}.attn.qkv.{kind}"] = torch.cat(
                [state[f"encoder.layer.{i}.attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
            )
    return out


def test_hibou_in_both_layouts(tmp_path):
    state = hibou_state()
    tiles = np.random.default_rng(1).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    expected = hibou_by_hand(state, prepared(tiles, ENCODERS["hibou-b"].mean, ENCODERS["hibou-b"].std))
    save_file(state, tmp_path / "model.safetensors")
    ours = load_encoder("hibou-b", tmp_path / "model.safetensors")
    assert (ours.spec.dim, ours.spec.patch, ours.spec.prefix_tokens) == (768, 14, 5) and not ours.report["missing"]
    assert np.allclose(ours(tiles), expected[:, 0], atol=1e-4)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in native(state, True).items()}}, tmp_path / "native.pth")
    for pool in ("class", "class+mean"):
        theirs = load_encoder("hibou-b", tmp_path / "native.pth", pool=pool)(tiles)
        assert np.allclose(theirs[:, :D], expected[:, 0], atol=1e-4)
    assert np.allclose(theirs[:, D:], expected[:, 5:].mean(1), atol=1e-4)
    torch.save(native(state, False), tmp_path / "plain.pth")
    model, head, report = load_published("hibou-b", tmp_path / "plain.pth")
    assert head is None and report["matched"] == len(model.state_dict())


def test_hibou_of_another_grid(tmp_path):
    torch.save(native(hibou_state(side=37), False), tmp_path / "large.pth")
    model, _, _ = load_published("hibou-b", tmp_path / "large.pth")
    assert model.pos_embed.shape == (1, 37**2, D) and model(torch.zeros(1, 3, 224, 224)).shape == (1, D)


def test_hibou_l_has_its_widths():
    with torch.device("meta"):
        model = ENCODERS["hibou-l"].build({})
    assert (
        model.num_features,
        len(model.blocks),
        model.blocks[0].mlp.fc2.in_features,
        model.blocks[0].attn.num_heads,
    ) == (1024, 24, 2736, 16)


# What does not fit


def test_files_that_do_not_fit(tmp_path, bony):
    small = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    torch.save(small.state_dict(), tmp_path / "vit.pth")
    torch.save(timm.create_model("vit_small_patch8_224").state_dict(), tmp_path / "vit8.pth")
    assert load_encoder("vit_tiny_patch16_224", tmp_path / "vit.pth")(TILES).shape == (
        2,
        192,
    )  # its classifier is left out
    for name, path, message in [
        (
            "vit_small_patch16_224",
            tmp_path / "vit.pth",
            r"vit.pth: not the weights of vit_small_patch16_224.*wanted \(1, 1, 384\)",
        ),
        ("vit_tiny_patch16_224", bony[0], "not the weights of vit_tiny"),
        ("bony", tmp_path / "vit.pth", "vit.pth: not the weights of bony: 0 of 713 tensors match"),
        ("hibou-b", tmp_path / "vit.pth", "missing .reg_token"),
        (
            "vit_small_patch16_224",
            tmp_path / "vit8.pth",
            "vit8.pth: weights for patches of another size than those of vit_small_patch16_224",
        ),
        ("vit_tiny_patch16_224", tmp_path / "none.pth", "no such folder or file"),
    ]:
        with pytest.raises(BadInput, match="(?s)" + message):
            load_encoder(name, path)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "vit.pth").read_bytes()[:10_000])
    with pytest.raises(BadInput, match="cut.pth: not a whole torch file"):
        load_encoder("vit_tiny_patch16_224", tmp_path / "cut.pth")
    part = {k: v for k, v in small.state_dict().items() if not k.startswith("blocks.11.")}
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(BadInput, match="12 missing"):
        load_encoder("vit_tiny_patch16_224", tmp_path / "part.pth")
    assert len(load_encoder("vit_tiny_patch16_224", tmp_path / "part.pth", strict=False).report["missing"]) == 12


def test_a_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "pwned").touch, ()

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BadInput, match="holds more than tensors"):
        load_encoder("vit_tiny_patch16_224", tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


def test_weights_are_found_in_a_folder_and_never_fetched_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTONB_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("went to the network"))
    with pytest.raises(BadInput, match="no weights here.*weights fetch"):
        load_encoder("histoencoder-small", mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(BadInput, match="HPAI-BSC/Bony.*pass the file as checkpoint.$"):
        load_encoder("bony", download=True)
    body = timm.create_model("xcit_small_12_p16_224", num_classes=0)
    torch.save(body.state_dict(), tmp_path / "histoencoder-small.pth")
    assert load_encoder("histoencoder-small", mean=(0.5,) * 3, std=(0.2,) * 3).spec.dim == 384


# what training scripts leave, in their own layouts

VIT = "vit_tiny_patch16_224"


def old_names(head):
    "A head's weights as torch called them when the published checkpoints were written."
    names = {"original0": "weight_g", "original1": "weight_v"}
    return {
        re.sub(r"parametrizations\.weight\.(original\d)", lambda m: names[m[1]], k): v
        for k, v in head.state_dict().items()
    }


@pytest.fixture(scope="module")
def trained():
    "A ViT, its DINO head without and with batch norm."
    torch.manual_seed(0)
    return (
        timm.create_model(VIT, num_classes=0).eval(),
        DINOHead(192, 32, 24, 16).eval(),
        DINOHead(192, 32, 24, 16, batch_norm=True).eval(),
    )


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_dino_writes(tmp_path, trained, legacy, normed):
    "All that main_dino.py puts into checkpoint.pth."
    body = trained[0]
    head = trained[1 + normed]
    network = {f"backbone.{k}": v for k, v in body.state_dict().items()} | {
        f"head.{k}": v for k, v in old_names(head).items()
    }
    student = {f"module.{k}": torch.zeros_like(v) for k, v in network.items()}
    optimizer = torch.optim.AdamW(body.parameters())
    args = argparse.Namespace(
        arch="vit_tiny", lr=5e-4, global_crops_scale=(0.4, 1.0), output_dir=pathlib.PosixPath("out")
    )
    held = {
        "student": student,
        "teacher": network,
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": args,
        "dino_loss": {"center": torch.zeros(1, 32)},
        "fp16_scaler": {"scale": 65536.0, "_growth_tracker": np.int64(3)},
    }
    torch.save(held, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=not legacy)
    ours = load_encoder(VIT, tmp_path / "checkpoint.pth")
    with torch.no_grad():
        token = body(F.interpolate(prepared(TILES, ours.spec.mean, ours.spec.std), 224))
        assert torch.equal(ours.model(F.interpolate(prepared(TILES, ours.spec.mean, ours.spec.std), 224)), token)
        assert torch.allclose(
            load_encoder(VIT, tmp_path / "checkpoint.pth", pool="head").model[1](token), head(token), atol=1e-6
        )
    assert ours.report["taken"] == "teacher/backbone." and not ours.report["missing"] + ours.report["unexpected"]


LAYOUTS = {
    "torch.compile": lambda body, head: {
        "teacher": {f"_orig_mod.backbone.{k}": v for k, v in body.items()}
        | {f"_orig_mod.dino_head.{k}": v for k, v in head.items()}
    },
    "DINOv2": lambda body, head: {
        "model": {
            f"{n}.{part}.{k}": v if n == "teacher" else v * 0
            for n in ("student", "teacher")
            for part, state in (
                ("backbone", body),
                ("ibot_head", {k: v * 0 for k, v in head.items()}),
                ("dino_head", head),
            )
            for k, v in state.items()
        }
    },
    "lightly": lambda body, head: {
        "state_dict": {
            f"{n}_{part}.{k}": v if n == "teacher" else v * 0
            for n in ("student", "teacher")
            for part, state in (("backbone.wrapped_model._model", body), ("head", head))
            for k, v in state.items()
        },
        "hyper_parameters": {"args": argparse.Namespace(lr=1)},
        "pytorch-lightning_version": "2.5",
    },
    "half precision": lambda body, head: {
        "teacher": {f"module.backbone.{k}": v.half() for k, v in body.items()}
        | {f"module.head.{k}": v for k, v in head.items()}
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_and_backbones_of_other_training_scripts(tmp_path, trained, layout):
    body, head, _ = trained
    torch.save(LAYOUTS[layout](body.state_dict(), old_names(head)), tmp_path / "last.ckpt")
    found, scores, report = load_published(VIT, tmp_path / "last.ckpt")
    x = torch.randn(2, 3, 224, 224)
    tolerance = 2e-2 if layout == "half precision" else 0
    with torch.no_grad():
        assert torch.allclose(found(x), body(x), atol=tolerance) and torch.allclose(
            scores(body(x)), head(body(x)), atol=1e-6
        )
    assert report["matched"] == len(body.state_dict())


def test_a_vit_of_dinov2_under_all_its_names(tmp_path):
    "DINOv2 without registers keeps the class token's position code, with them timm does not."
    for name, registers in (("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4)):
        torch.manual_seed(1)
        theirs = timm.create_model(name, num_classes=0, img_size=112).eval()
        theirs.cls_token.data.normal_()
        state = dict(theirs.state_dict()) | {"mask_token": torch.zeros(1, 384)}
        if registers:
            state["register_tokens"] = state.pop("reg_token")
            code = torch.randn(1, 1, 384)  # is added to the token
            state["cls_token"], state["pos_embed"] = state["cls_token"] - code, torch.cat([code, state["pos_embed"]], 1)
        torch.save(state, tmp_path / "official.pth")
        found, _, report = load_published(name, tmp_path / "official.pth")
        x = torch.randn(1, 3, 112, 112)
        with torch.no_grad():
            assert torch.allclose(found(x), theirs(x), atol=1e-4)
        assert found.patch_embed.img_size == (112, 112) and not report["unexpected"]  # built for the grid of the file


def test_a_vit_of_transformers(tmp_path):
    "As Phikon and other plain ViTs of the hub are published, queries, keys and values apart."
    theirs = timm.create_model(VIT, num_classes=0).eval()
    words = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings",
        "cls_token": "embeddings.cls_token",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "blocks.": "encoder.layer.",
    }
    state = {"pooler.dense.weight": torch.zeros(192, 192)}
    for name, tensor in theirs.state_dict().items():
        if name.startswith("norm."):
            name = f"layernorm.{name[5:]}"
        for ours, other in words.items():
            name = name.replace(ours, other)
        qkv = dict(zip(("query", "key", "value"), tensor.chunk(3), strict=True)) if ".attn.qkv." in name else {}
        state |= {name.replace("attn.qkv", f"attention.attention.{k}"): t.clone() for k, t in qkv.items()} or {
            name: tensor
        }
    x = torch.randn(1, 3, 224, 224)
    for prefix in ("", "vit."):
        save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
        found, _, report = load_published(VIT, tmp_path)
        with torch.no_grad():
            assert torch.equal(found(x), theirs(x)) and report["matched"] == len(theirs.state_dict())


def test_positions_are_an_option_of_the_loader(tmp_path, trained):
    torch.save(trained[0].state_dict(), tmp_path / "vit.pth")
    plain, dino = (load_encoder(VIT, tmp_path / "vit.pth", positions=p) for p in ("timm", "dino"))
    own = np.random.default_rng(2).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    assert (
        np.array_equal(plain(own), dino(own)) and not np.allclose(plain(TILES), dino(TILES)) and plain.key != dino.key
    )
    model, _, _ = load_published(VIT, tmp_path / "vit.pth", positions="dino")
    with torch.no_grad():
        assert np.allclose(model(prepared(TILES, dino.spec.mean, dino.spec.std)), dino(TILES), atol=1e-5)
    with pytest.raises(BadInput, match="`dino` for PooledBackbone|`dino` for XCiT"):
        load_encoder("random:xcit_nano_12_p16_224", positions="dino")


def test_weights_that_are_not_finite(tmp_path, trained):
    for value in (torch.nan, torch.inf):
        state = dict(trained[0].state_dict())
        state["blocks.3.mlp.fc1.bias"] = torch.full_like(state["blocks.3.mlp.fc1.bias"], value)
        torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
        for strict in (True, False):
            with pytest.raises(BadInput, match="w.pth: `blocks.3.mlp.fc1.bias` holds NaN or infinite"):
                load_encoder(VIT, tmp_path / "w.pth", strict=strict)
    save_file(
        {k: torch.full_like(v, torch.nan) if k == "pos_embed" else v for k, v in trained[0].state_dict().items()},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(BadInput, match="`pos_embed` holds NaN"):
        load_encoder(VIT, tmp_path / "w.safetensors")


ENDINGS = [f"histoencoder-small{ending}" for ending in (".ckpt", ".pth.tar", ".bin", "", "/pytorch_model.bin")]


@pytest.mark.parametrize("name", ENDINGS)
def test_any_ending_is_found_in_the_folder_of_weights(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HISTONB_WEIGHTS", str(tmp_path))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save({"model": {}}, tmp_path / name)
    with pytest.raises(BadInput, match=f"{name.split('/')[0]}: not the weights of histoencoder-small"):
        load_encoder("histoencoder-small", mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.mark.parametrize(
    "key, value",
    [
        ("mean", (0.5, 0.5)),
        ("mean", (0.5, 0.5, np.nan)),
        ("std", (0.2, 0, 0.2)),
        ("std", (0.2, -0.2, 0.2)),
        ("std", ".2"),
        ("mean", 0.5),
        ("mean", ("a", "b", "c")),
    ],
)
def test_a_normalisation_is_three_numbers(key, value):
    with pytest.raises(BadInput, match=f"{key}: .* is not three numbers"):
        load_encoder("random:xcit_nano_12_p16_224", **{key: value})


def test_what_the_report_printed():
    assert {
        task: {name: row[task] for name, row in BONY_REPORT.items()} for task in ("classes", "masks", "reconstruction")
    } == {
        "classes": {"bony": 0.812, "hibou": 0.831, "histoencoder": 0.816},
        "masks": {"bony": 2.934e-6, "hibou": 1.455e-6, "histoencoder": 1.003e-6},
        "reconstruction": {"bony": 0.0008, "hibou": 0.1, "histoencoder": None},
    }


def test_the_benchmark_is_that_of_the_report():
    "Three tasks on three sets, each encoder by its authors' feature; Bony by the scores that the report probed."
    stages = load_study(Path(__file__).resolve().parents[1] / "runs/bench.yaml").stages
    assert {stages[name].parameters["cohort"] for name in ("panda", "sicapv2", "deepgleason")} == {
        "panda",
        "sicapv2",
        "pairs",
    }
    for name, pool in (("bony", "head"), ("hibou", "class"), ("histoencoder", "class")):
        for kind, notebook in (("classes", "probe"), ("deepgleason", "decode_masks")):
            stage = stages[f"{kind}-{name}"]
            assert stage.notebook.endswith(f"{notebook}.ipynb") and stage.parameters["pool"] == pool, stage.name
        assert stages[f"deepgleason-{name}"].parameters["tiles"] == "runs/bench/deepgleason"
    assert stages["recap-deepgleason"].parameters["masks"] == [
        f"runs/bench/deepgleason-{name}" for name in ("bony", "hibou", "histoencoder", "imagenet")
    ]
