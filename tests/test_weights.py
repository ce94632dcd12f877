"Files of weights: every common layout is read, anything else is refused in one sentence, and nothing in it runs."

import argparse
import collections
import datetime
import functools
import json
import pathlib
import pickle
import random
import re
import subprocess
import sys
import tarfile
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from histonb.core.errors import BadInput
from histonb.core.files import read_json
from histonb.models.weight_files import read_state
from histonb.models.weights import check_tensors, find_network, flatten_state, load_weights, write_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = {
    "conv.weight": torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)),
    "norm.weight": torch.arange(4.0),
    "norm.bias": torch.ones(4),
}


def same(found):
    return found.keys() == STATE.keys() and all(torch.equal(found[k], STATE[k]) for k in STATE)


def one_sentence(error):
    "Path, fault and remedy in one readable line, without torch's advice."
    text = str(error)
    return text.isprintable() and len(text) < 500 and "weights_only" not in text and "safe_globals" not in text


@pytest.fixture
def foreign(monkeypatch):
    "Make a class of a package that is not installed; and make any later import of it fail."
    packages = []

    def make(module, name, base=object):
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            package = types.ModuleType(".".join(parts[:i]))
            package.__path__ = []
            monkeypatch.setitem(sys.modules, package.__name__, package)
        packages.append(module)
        found = type(name, (base,), {"__module__": module})
        setattr(package, name, found)
        return found

    def forget():
        for module in packages:
            monkeypatch.setitem(sys.modules, module, None)

    return make, forget


# containers

WRITERS = {
    "zip": torch.save,
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "safetensors": lambda state, path: save_file({k: v.contiguous() for k, v in state.items()}, path),
}


@pytest.mark.parametrize("ending", ["pth", "ckpt", "tar", "bin", "pth.tar", "safetensors", "model_best"])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_content_decides_not_the_ending(tmp_path, kind, ending):
    WRITERS[kind](STATE, tmp_path / f"w.{ending}")
    assert same(read_state(tmp_path / f"w.{ending}"))


@pytest.mark.parametrize("index", ["model.safetensors", "pytorch_model.bin"])
def test_shards(tmp_path, index):
    kind = "safetensors" if index.endswith("safetensors") else "zip"
    places = {k: f"model-{i}.part" for i, k in enumerate(STATE)}
    for k, place in places.items():
        WRITERS[kind]({k: STATE[k]}, tmp_path / place)
    path = tmp_path / f"{index}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert same(read_state(path)) and same(read_state(tmp_path))
    for content, says in [
        ("{", "not valid JSON"),
        ("[]", "weight_map"),
        ('{"weight_map": {"a": "../a.bin"}}', "no file beside it"),
        ('{"weight_map": {"a": 3}}', "no such file"),
        (json.dumps({"weight_map": {"a": "a" * 5000}}), "no file beside it"),
        (json.dumps({"weight_map": {"a": "\x1b[31m"}}), "no file beside it"),
        (json.dumps({"weight_map": places | {"x": "model-0.part"}}), "no file holds, such as `x`"),
    ]:
        path.write_text(content)
        with pytest.raises(BadInput, match=says) as e:
            read_state(tmp_path)
        assert one_sentence(e.value)
    path.write_text(json.dumps({"weight_map": places}))
    (tmp_path / "model-1.part").unlink()
    with pytest.raises(BadInput, match="model-1.part: there is no such file"):
        read_state(tmp_path)


def test_folders(tmp_path):
    with pytest.raises(BadInput, match="no file of weights"):
        read_state(tmp_path)
    torch.save(STATE, tmp_path / "a.pth")
    assert same(read_state(tmp_path))
    torch.save({}, tmp_path / "b.pth")
    with pytest.raises(BadInput, match=r"2 files of weights \(a.pth, b.pth\)"):
        read_state(tmp_path)
    torch.save(STATE, tmp_path / "pytorch_model.bin")  # as the hub's folders have it, beside others
    assert same(read_state(tmp_path))
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp/__0_0.distcp").touch()
    with pytest.raises(BadInput, match="split over processes.*dcp_to_torch"):
        read_state(tmp_path / "dcp")
    with pytest.raises(BadInput, match="no such file"):
        read_state(tmp_path / "none.pth")


# what lies beside weights

BESIDE = {
    "Namespace": argparse.Namespace(arch="vit_small", lr=5e-4),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "partial": functools.partial(int, base=2),
    "numpy scalar": np.float64(0.5),
    "numpy numbers": [np.float32(1), np.int64(2), np.bool_(True), np.str_("a")],
    "numpy array": np.arange(3),
    "numpy objects": np.array(["a", None], object),
    "random states": (np.random.get_state(), random.getstate(), torch.get_rng_state()),
    "paths": [pathlib.PosixPath("a"), pathlib.PurePosixPath("b")],
    "Size": torch.Size([1, 2]),
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "Counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], 5),
    "set": {1, 2},
    "frozenset": frozenset("a"),
    "time": [datetime.datetime(2026, 1, 2), datetime.timedelta(3)],
    "version": torch.torch_version.TorchVersion("2.6"),
    "bytes": b"ab",
    "complex": 1j,
    "classes": [int, dict],
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("what", BESIDE)
def test_harmless_values_beside_weights(tmp_path, what, legacy):
    torch.save({"model": STATE, "beside": BESIDE[what]}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert same(read_state(tmp_path / "w.pth")["model"])


def test_classes_of_torch_beside_weights(tmp_path):
    held = {
        "model": STATE,
        "args": argparse.Namespace(
            norm=functools.partial(nn.LayerNorm, eps=1e-6), act=nn.GELU, optimizer=torch.optim.AdamW
        ),
    }
    torch.save(held, tmp_path / "w.pth")
    assert same(read_state(tmp_path / "w.pth")["model"])
    torch.save(held, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # with the source of the classes in it
    with pytest.raises(BadInput, match="holds more than tensors: the class of a network"):
        read_state(tmp_path / "old.pth")


@pytest.mark.parametrize(
    "module, name, base",
    [
        ("omegaconf.dictconfig", "DictConfig", object),
        ("yacs.config", "CfgNode", dict),
        ("easydict", "EasyDict", dict),
        ("lightning.fabric.utilities.data", "AttributeDict", dict),
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", object),
        ("mmengine.logging.history_buffer", "HistoryBuffer", object),
        ("numpy.core.multiarray", "Old", object),
    ],
)
def test_configurations_of_packages_that_are_not_here(tmp_path, module, name, base, foreign):
    make, forget = foreign
    made = make(module, name, base)
    value = made(lr=0.1) if base is dict else made()
    value.__dict__["_content"] = {"lr": 0.1}
    torch.save({"state_dict": STATE, "hyper_parameters": value, "callbacks": {made: 1}}, tmp_path / "last.ckpt")
    forget()
    assert same(read_state(tmp_path / "last.ckpt")["state_dict"])


def test_weights_inside_a_mapping_of_another_package(tmp_path, foreign):
    make, forget = foreign
    made = make("easydict", "EasyDict", dict)
    torch.save({"a": made(STATE), "b": collections.defaultdict(dict, net=STATE)}, tmp_path / "w.pth")
    forget()
    held = read_state(tmp_path / "w.pth")
    assert same(held["a"]) and same(held["b"]["net"])


# what is refused


class Runs:
    "Would make a file when it is unpickled."

    def __init__(self, call, *args):
        self.reduce = call, args

    def __reduce__(self):
        return self.reduce


def exec_call(path):
    return Runs(exec, f"open({str(path)!r}, 'w')")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        exec_call,
        lambda p: Runs(pathlib.Path(p).touch),
        lambda p: Runs(functools.partial(open, p, "w")),
        lambda p: Runs(functools.reduce, exec, [f"open({str(p)!r}, 'w')"]),
    ],
    ids=["exec", "method", "partial", "reduce"],
)
def test_nothing_runs(tmp_path, make, legacy):
    target = tmp_path / "made"
    torch.save({"model": STATE, "beside": make(target)}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadInput, match="holds more than tensors") as e:
        read_state(tmp_path / "w.pth")
    assert one_sentence(e.value) and not target.exists()


def test_foreign_classes_are_named(tmp_path, foreign):
    make, forget = foreign
    torch.save({"net": make("my_project.models", "Net", nn.Module)()}, tmp_path / "net.pth")
    forget()
    says = r"net.pth: holds more than tensors: `my_project.models.Net`, whose code would have to run\. Ask .* alone\.$"
    with pytest.raises(BadInput, match=says) as e:
        read_state(tmp_path / "net.pth")
    assert one_sentence(e.value)
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "whole.pth")
    with pytest.raises(BadInput, match=r"an object of `torch.nn.modules.container.Sequential`") as e:
        read_state(tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BadInput, match="a list, not tensors by name"):
        read_state(tmp_path / "list.pth")


OTHERS = {
    "is empty": b"",
    "a web page": b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><title>\xc3\x84nmelden</title>",
    "a web page, ": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346\n",
    "a text file": b'{"error": "Repository not found"}',
    "a text file, ": b"404: Not Found",
    "a gzip archive": b"\x1f\x8b\x08\0\0\0\0\0",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "a NumPy array": b"\x93NUMPY\x01\0",
    "a GGUF file": b"GGUF\3\0\0\0",
    "not a whole torch file": b"PK\3\4",
    "neither a safetensors nor a torch file": bytes(range(256)),
    "a pickle that torch.save did not write": pickle.dumps({"a": 1}),
    "not a whole safetensors file": (2**62).to_bytes(8, "little") + b"{}",
    "not a whole safetensors file ": (200).to_bytes(8, "little") + b'{"a":',
}


@pytest.mark.parametrize("ending", ["pth", "safetensors", "tar"])
@pytest.mark.parametrize("says", OTHERS)
def test_other_files_are_called_by_their_name(tmp_path, says, ending):
    (tmp_path / f"w.{ending}").write_bytes(OTHERS[says])
    with pytest.raises(BadInput, match=says.strip(" ,")) as e:
        read_state(tmp_path / f"w.{ending}")
    assert one_sentence(e.value)


def test_archives_are_called_by_their_name(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        tar.add(tmp_path / "w.npz", "w.npz")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as z:
        z.write(tmp_path / "w.npz", "folder/w.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("w/data.pkl", pickle.dumps({}, 2))
        z.writestr("w/data/0", bytes(10_000_000))
    for name, says in [
        ("w.npz", "a NumPy archive"),
        ("w.zip", "zip archive without PyTorch"),
        ("w.tar", "a tar archive"),
        ("w.pt", "TorchScript"),
        ("bomb.pth", "twenty times"),
    ]:
        with pytest.raises(BadInput, match=says) as e:
            read_state(tmp_path / name)
        assert one_sentence(e.value)


@pytest.mark.parametrize("kind", WRITERS)
def test_cut_files(tmp_path, kind):
    WRITERS[kind](STATE, tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    for n in range(1, len(whole), max(1, len(whole) // 40)):
        (tmp_path / "w").write_bytes(whole[:n])
        with pytest.raises(BadInput) as e:
            read_state(tmp_path / "w")
        assert one_sentence(e.value)


def test_a_changed_bit_is_noticed_where_there_are_checksums(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[content.find(STATE["conv.weight"].numpy().tobytes()) + 5] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(BadInput, match="not a whole torch file .*CRC-32"):
        read_state(tmp_path / "w.pth")
    kept = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "none.pth")
    finally:
        torch.serialization.set_crc32_options(kept)
    assert same(read_state(tmp_path / "none.pth"))


def test_tensors_that_are_split_over_processes(tmp_path, foreign):
    make, forget = foreign
    value = make("xorch.distributed.tensor", "DTensor")()
    torch.save({"w": value}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    forget()
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes().replace(b"xorch", b"torch"))
    with pytest.raises(BadInput, match="holds tensors that are split over processes. Ask its makers to gather") as e:
        read_state(tmp_path / "w.pth")
    assert one_sentence(e.value)


def test_a_newer_pickle_protocol(tmp_path):
    torch.save(STATE, tmp_path / "w.pth", pickle_protocol=4)
    with pytest.raises(BadInput, match="pickle protocol 4") as e:
        read_state(tmp_path / "w.pth")
    assert one_sentence(e.value)


# the network in it

OWN = {k: torch.zeros_like(v) for k, v in STATE.items()}
ZEROS = {k: torch.zeros_like(v) for k, v in STATE.items()}


def under(prefix, state=STATE):
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize(
    "held",
    [
        STATE,
        {"state_dict": STATE},
        {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        {"model_state": STATE},
        {"params": {"net": under("module.")}},
        *(
            under(p)
            for p in (
                "module.",
                "backbone.",
                "student.",
                "encoder.",
                "trunk.",
                "model.",
                "_orig_mod.",
                "module._orig_mod.",
                "wrapped_model._model.",
                "visual.trunk.",
                "0.",
                "base_encoder.",
            )
        ),
        {"backbone._orig_mod." + k: v for k, v in STATE.items()} | {"head.weight": torch.zeros(2)},
        {k.replace(".", "._fsdp_wrapped_module.", 1): v for k, v in STATE.items()},
        {"student": under("module.backbone.", ZEROS), "teacher": under("backbone.")},
        {
            "model": under("student.backbone.", ZEROS)
            | under("teacher.backbone.")
            | under("teacher.dino_head.", {"w": torch.ones(1)})
        },
        under("student_backbone.", ZEROS) | under("teacher_backbone."),
        {"state_dict": ZEROS, "state_dict_ema": STATE},
        {"model": ZEROS, "model_ema": under("module.")},
        {"model": STATE, "ema": STATE},
        under("encoder_q.") | under("encoder_k.", ZEROS) | {"queue": torch.zeros(2, 2)},
        under("backbone.") | under("momentum_backbone.", ZEROS),
        STATE | {"head.weight": torch.zeros(2), "mask_token": torch.zeros(1)},
        STATE | {"decoder_blocks.0.weight": torch.zeros(1), "projection_head.0.weight": torch.zeros(1)},
    ],
    ids=lambda held: " ".join(list(held)[:1] + list(held)[-1:]),
)
def test_the_network_is_found_in_any_wrapper(held):
    found, prefix = find_network(flatten_state(held), OWN, "w.pth")
    assert same(found), prefix


def test_two_networks_alike_are_not_guessed():
    with pytest.raises(BadInput, match="several networks of this kind, under `a/` and `b/`"):
        find_network(flatten_state({"a": STATE, "b": ZEROS}), OWN, "w.pth")
    assert same(
        find_network(flatten_state({"a": STATE, "b": {"conv.weight": torch.zeros(1)}}), OWN, "w.pth")[0]
    )  # a part of one is none


def test_nested_dictionaries_end():
    loop = dict(STATE)
    many = {"w": torch.zeros(1)}
    loop["self"] = loop
    for _ in range(40):
        many = {"a": many, "b": many}  # 2**40 paths
    assert flatten_state(loop).keys() == STATE.keys() and len(flatten_state(many)) <= 1


# into the model


def net():
    return nn.Sequential(collections.OrderedDict(conv=nn.Conv2d(3, 4, 2, bias=False), norm=nn.LayerNorm(4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken(dtype):
    model = net()
    load_weights(model, {k: v.to(dtype) for k, v in STATE.items()}, "w.pth", "a net")
    assert model.norm.weight.dtype == torch.float32 and torch.equal(model.norm.weight.data, STATE["norm.weight"])


def quantised(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t, 1.0, 0, torch.qint8)


BAD = {
    "holds NaN or infinite": torch.tensor([0, 1, torch.nan, 2]),
    "holds NaN or infinite numbers": torch.tensor([0, 1, -torch.inf, 2]),
    "NaN": torch.full((4,), torch.nan).half(),
    "NaN or infinite": torch.full((4,), torch.nan).to(torch.float8_e4m3fn),
    "a shape but no values": torch.empty(4, device="meta"),
    "is sparse": torch.ones(4).to_sparse(),
    "is complex": torch.ones(4, dtype=torch.complex64),
    "NaN or infinite numbers": torch.full((4,), 1e300, dtype=torch.float64),
    "is quantised": quantised(torch.ones(4)),
    "holds torch.int8": torch.ones(4, dtype=torch.int8),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("says", BAD)
def test_tensors_that_nothing_can_be_computed_with(tmp_path, says, strict):
    with pytest.raises(BadInput, match=f"w.pth: `norm.weight` .*{says}|w.pth: `norm.weight` {says}"):
        load_weights(net(), STATE | {"norm.weight": BAD[says]}, "w.pth", "a net", strict)
    torch.save(STATE | {"norm.weight": BAD[says]}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match="`norm.weight`"):
        load_weights(net(), flatten_state(read_state(tmp_path / "w.pth")), "w.pth", "a net", strict)


def test_a_tensor_that_claims_more_than_the_file_holds():
    with pytest.raises(BadInput, match="more numbers than the file holds"):
        check_tensors({"w": torch.zeros(1).expand(10**9)}, "w.pth")


def test_what_does_not_fit_is_listed_and_cut(tmp_path):
    state = {f"{'x' * 300}\x1b[31m.{i}": torch.zeros(1) for i in range(500)} | {"norm.weight": torch.zeros(5)}
    with pytest.raises(BadInput, match=re.escape("2 missing (conv.weight; norm.bias), 500 unexpected (xxx")) as e:
        load_weights(net(), state, "w.pth", "a net")
    assert "1 of another shape (norm.weight (5,), wanted (4,))" in str(e.value) and one_sentence(e.value)


def test_old_files_lack_the_counter_of_batch_norm():
    state = {k: v for k, v in nn.BatchNorm2d(3).state_dict().items() if k != "num_batches_tracked"}
    assert load_weights(nn.BatchNorm2d(3), state, "w.pth", "a norm")["missing"] == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"],
    ids=lambda content: content[:6],
)
def test_json_that_cannot_be_read(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BadInput, match="x.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_record_that_claims_to_be_a_folder_is_refused(tmp_path):
    "torch takes it for read, and gives what lay in memory."
    path = tmp_path / "w.pth"
    torch.save(STATE, path)
    data = bytearray(path.read_bytes())
    for place in [m.start() for m in re.finditer(rb"PK\x01\x02", data)]:
        data[place + 38] |= 0x10
    path.write_bytes(data)
    with pytest.raises(BadInput, match="is a folder"):
        read_state(path)


def test_a_full_disk_while_weights_are_written(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(BadInput, match=r"w\.safetensors: the disk is full(.|\n)*Free some disk space"):
            write_tensors({"a": torch.zeros(10**5)}, tmp_path / "w.safetensors")
        assert not list(tmp_path.iterdir())  # nothing half-written is left
        write_tensors(STATE, tmp_path / "w.safetensors")
        assert read_state(tmp_path / "w.safetensors").keys() == STATE.keys()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
