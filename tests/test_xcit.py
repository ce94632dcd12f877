"XCiT: the same weights give the same outputs and gradients as timm's; official names are read."

import pytest
import timm
import torch

from histonb.core.errors import BadInput
from histonb.models.xcit import XCIT, XCIT_SIZES, from_official, xcit

NAMES = [
    "xcit_nano_12_p16_224",
    "xcit_nano_12_p8_224",
    "xcit_tiny_12_p16_224",
    pytest.param("xcit_tiny_12_p8_224", marks=pytest.mark.slow),
    "xcit_small_12_p16_224",
    pytest.param("xcit_small_12_p8_224", marks=pytest.mark.slow),
]


def pair(name, **kwargs):
    "Ours and timm's with the same weights; LayerScale, norms and running statistics made uneven, so that they count."
    torch.manual_seed(0)
    ours = xcit(name, **kwargs)
    theirs = timm.create_model(name, num_classes=0, **kwargs)
    state = theirs.state_dict()
    for key, value in state.items():
        if "gamma" in key or "temperature" in key or key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith("running_mean") or (value.ndim == 1 and value.is_floating_point()):
            value.add_(0.1 * torch.randn_like(value))
    ours.load_state_dict(state)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def same_gradients(ours, theirs, tolerance):
    expected = dict(theirs.named_parameters())
    scale = max(p.grad.abs().max() for p in expected.values())
    for name, p in ours.named_parameters():
        difference = (p.grad - expected[name].grad).abs().max()
        assert difference <= tolerance * max(expected[name].grad.abs().max(), 1e-3 * scale), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "size", [(224, 224), (96, 160), (100, 100), (230, 97), (17, 33)], ids=str
)  # begun patches count, as in the official code
def test_outputs_equal_timm(name, size):
    ours, theirs = (m.eval() for m in pair(name))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gradients_equal_timm(name, train):
    ours, theirs = (m.train(train).double() for m in pair(name))
    x = torch.randn(2, 3, 96, 91, dtype=torch.double)
    weights = torch.randn(ours.num_features, dtype=torch.double)
    for model in (ours, theirs):
        (model(x) @ weights).sum().backward()
    same_gradients(ours, theirs, 2e-5)  # position codes and cosine scales are computed in single precision
    for key, value in theirs.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(ours.state_dict()[key], value, atol=1e-5, rtol=1e-5)


def test_eta_and_channels_equal_timm():
    ours, theirs = (m.eval() for m in pair("xcit_tiny_24_p16_224", in_chans=4))
    x = torch.randn(1, 4, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in XCIT if n.endswith("_224")])
def test_every_name_has_timms_parameters(name):
    with torch.device("meta"):
        ours = xcit(name)
        theirs = timm.create_model(name, num_classes=0)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    size = next(values for key, values in XCIT_SIZES.items() if f"_{key}_" in name)
    assert ours.cls_attn_blocks[0].tokens_norm == theirs.cls_attn_blocks[0].tokens_norm == size["tokens_norm"]
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert all(name[:-3] + size in XCIT for size in ("224", "384")) and name[:-4] in XCIT


def test_initial_values_equal_timm():
    ours = xcit("xcit_tiny_24_p16")
    theirs = timm.create_model("xcit_tiny_24_p16_224", num_classes=0)
    for (name, a), (_, b) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True):
        assert abs(a.mean() - b.mean()) < 0.3 * b.abs().mean() + 1e-9, name
        if a.numel() > 300:
            assert abs(a.std() - b.std()) <= 0.2 * b.std() + 1e-9, name


def test_official_names_as_timm_reads_them():
    model = xcit("xcit_nano_12_p16")
    state = model.state_dict()
    official = {}
    for key, value in state.items():
        if ".attn.q." in key:
            value = torch.cat([state[key.replace(".q.", f".{z}.")] for z in "qkv"])
            key = key.replace(".q.", ".qkv.")
        elif key.startswith("cls_attn_blocks.") and (".attn.k." in key or ".attn.v." in key):
            continue
        official[key.replace("pos_embed.", "pos_embeder.")] = value
    expected = timm.models.xcit.checkpoint_filter_fn(dict(official), model)
    dino = {
        "teacher": {f"module.backbone.{k}": v for k, v in official.items()}
        | {"module.head.mlp.0.weight": torch.ones(2)}
    }
    for given in (official, {"model": official | {"head.weight": torch.ones(2)}}, dino, state):
        found = from_official(given)
        assert set(found) == set(expected)
        assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_bfloat16_stays_close():
    model = xcit("xcit_nano_12_p16").eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        single = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
        whole = model.bfloat16()(x.bfloat16())
    for other in (half, whole):
        assert torch.nn.functional.cosine_similarity(single, other.float()).min() > 0.999


def test_dead_channels_give_no_nan():
    model = xcit("xcit_nano_12_p16").train()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:5] = 0  # channels of q that are zero at every token
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_maps_do_not_change_the_tokens():
    model = xcit("xcit_tiny_12_p8").eval()
    x = torch.randn(2, 3, 40, 61)
    with torch.no_grad():
        tokens, maps = model.forward_features(x, maps=True)
    with torch.no_grad():
        torch.testing.assert_close(tokens, model.forward_features(x), atol=1e-5, rtol=1e-5)
    assert maps.grid == (5, 8) and tokens.shape == (2, 41, 192)
    for attention in (*maps.xca, *maps.class_attention):
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_drop_path_acts_in_training_only():
    model = xcit("xcit_nano_12_p16", drop_path_rate=0.5)
    x = torch.randn(4, 3, 64, 64)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_bad_names_and_sizes():
    with pytest.raises(BadInput, match="Did you mean `xcit_small_12_p16`"):
        xcit("xcit_smal_12_p16")
    with pytest.raises(BadInput, match="smaller than a patch"):
        xcit("xcit_nano_12_p16")(torch.zeros(1, 3, 15, 64))
    with pytest.raises(BadInput, match="Use 2, 4, 8 or 16"):
        xcit("xcit_nano_12_p16", patch_size=14)


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_checkpointing_changes_nothing_but_memory(drop_path):
    found = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = xcit("xcit_nano_12_p16", drop_path_rate=drop_path).train()
        model.set_grad_checkpointing(enable)
        x = torch.randn(4, 3, 64, 64)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            out = model(x)
        out.square().sum().backward()
        found.append(
            (
                sum(sizes),
                out,
                torch.rand(1),
                {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers()),
            )
        )
    (plain, *expected, values), (less, *out, again) = found
    assert less < plain / 2
    assert all(
        torch.equal(a, b) for a, b in zip(expected, out, strict=True)
    )  # output, and the random numbers that follow
    assert values.keys() == again.keys() and all(torch.equal(values[k], again[k]) for k in values)


def test_a_step_left_out_for_all_images_still_has_gradients():
    model = xcit("xcit_nano_12_p16", drop_path_rate=0.999).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_dropped_images_are_as_if_the_branch_were_zero():
    torch.manual_seed(0)
    block = xcit("xcit_nano_12_p16", drop_path_rate=0.5).blocks[0].train()
    x = torch.randn(6, 16, 128)
    torch.manual_seed(1)
    got = block(x, (4, 4))
    torch.manual_seed(1)
    want = x
    for gamma, branch in (
        (block.gamma1, lambda z: block.attn(block.norm1(z))),
        (block.gamma3, lambda z: block.local_mp(block.norm3(z), (4, 4), torch.ones(128))),
        (block.gamma2, lambda z: block.mlp(block.norm2(z))),
    ):
        want = want + (torch.rand(6, 1, 1) < 0.5) / 0.5 * gamma * branch(want)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
