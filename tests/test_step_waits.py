"""No training step waits for a GPU: what would make the host wait is counted on tensors without data, no GPU needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from histonb.pretrain import trainer as trainer_module
from histonb.pretrain.config import PretrainConfig, resolve
from histonb.pretrain.trainer import Trainer

aten = torch.ops.aten
GPU = torch.device("cuda")
READING = {aten.nonzero, aten._local_scalar_dense, aten.masked_select, aten.equal, aten.unique_dim, aten._unique2}
SMALL = 64 * 1024  # bytes that CUDA takes along with a call, from whatever memory


def reads(packet, args):
    """Whether an operator brings a value to the host, such as one that the size of its result depends on."""
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return packet in READING or (packet is aten.repeat_interleave and len(args) == 1)


class Waits(TorchDispatchMode):
    """Operators that make the host wait for a GPU, in the order in which they were called.

    On the host, where reading a value costs nothing, half of each mask is true."""

    def __init__(self):
        super().__init__()
        self.waits = []
        self.pinned = []  # tensors, by identity
        self.sums = []  # (tensor, value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten._pin_memory:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        where = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if "cuda" in where and reads(packet, args):
            self.waits.append(str(packet))
        if packet is aten.nonzero:
            return args[0].new_zeros((args[0].numel() // 2, args[0].ndim), dtype=torch.long)
        if packet is aten._local_scalar_dense:
            return next((value for x, value in self.sums if x is args[0]), 1)
        out = func(*args, **kwargs)
        if packet in (aten._to_copy, aten.copy_):
            self._copied(packet, args, kwargs, out)
        if packet is aten.sum and args[0].dtype == torch.bool:
            self.sums.append((out, args[0].numel() // 2))
        return out

    def _copied(self, packet, args, kwargs, out):
        """Note a copy between host and GPU for which the host waits."""
        source = args[1] if packet is aten.copy_ else args[0]
        if {source.device.type, out.device.type} != {"cpu", "cuda"}:
            return
        free = kwargs.get("non_blocking", False) or (packet is aten.copy_ and len(args) > 2 and args[2])
        free = free and out.is_cuda
        if free and source.numel() * source.element_size() > SMALL:
            free = any(x is source for x in self.pinned)
        if not free:
            self.waits.append(f"{packet} {source.device.type} to {out.device.type}")


@pytest.fixture
def waits():
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as mode:
        yield mode.waits


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.sum().item(),
        lambda x: bool(torch.isfinite(x).all()),
        lambda x: x.cpu(),
        lambda x: x.new_tensor(2.0),
        lambda x: torch.zeros(4).to(GPU),
        lambda x: torch.zeros(10**5).to(GPU, non_blocking=True),
    ],
)
def test_what_waits_is_seen(waits, call):
    try:
        call(torch.ones(4, device=GPU))
    except RuntimeError:
        pass  # the size of the result is not known; it was noted before
    assert waits


def test_what_does_not_wait_is_not(waits):
    x = torch.ones(4, device=GPU)
    torch.zeros(10**5).pin_memory().to(GPU, non_blocking=True)
    torch.zeros(4).to(GPU, non_blocking=True)
    torch.where(x > 0, x, 0.0).index_select(0, torch.zeros(2, dtype=torch.long, device=GPU))
    assert not waits


def move(module, *args, **kwargs):
    """Do what `Module.to(GPU)` does, which cannot exchange tensors without data."""
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = None if p is None else torch.nn.Parameter(p.detach().to(GPU), p.requires_grad)
        for name, x in part._buffers.items():
            part._buffers[name] = None if x is None else x.to(GPU)
    return module


SIZES = dict(out_dim=64, hidden=64, bottleneck=32, n_local=2, global_size=64, local_size=32, batch_size=4, steps=4)
KINDS = {
    "xcit": dict(arch="xcit_nano_12_p16_224", micro_batch=2, clip_how="network"),
    "patches, crop by crop": dict(
        arch="xcit_nano_12_p16_224", patch_weight=1.0, per_crop_backward=True, start_pull=0.1
    ),
    "all losses": dict(arch="test_vit", patch_weight=1.0, regulariser_weight=0.1, centering="sinkhorn", n_global=1),
    "convolutions": dict(
        arch="test_efficientnet", teacher_bn="ema", regulariser_weight=0.1, regulariser="kde", drop_path=0.0
    ),
}


def trainer_and_batch(device, changes):
    """A trainer, and the micro-batches of a step; every second patch is masked."""
    options = dict(device=device, precision="fp32", drop_path=0.2, warmup_epochs=0.0)
    c = resolve(PretrainConfig("", **SIZES | options | changes), 8)
    size = c.micro_batch or c.batch_size
    batch = [torch.zeros(n, size, 3, px, px) for n, px in ((c.n_global, c.global_size), (c.n_local, c.local_size))]
    if c.patch_weight:
        side = c.global_size // 16
        batch.append(torch.arange(c.n_global * size * side**2).view(c.n_global, size, side, side) % 2 == 0)
    trainer = Trainer(c, 8)
    return trainer, [batch] * trainer.accumulation_steps


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_step_does_not_wait(waits, monkeypatch, changes):
    """All of a step but the way back, for which PyTorch wants a real GPU."""
    monkeypatch.setattr(trainer_module, "mask_weights", lambda masks, views: torch.zeros(masks.numel() // 2))
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **kwargs: x)  # it asks whether to draw again
    monkeypatch.setattr(torch.nn.Module, "to", move)
    trainer, batches = trainer_and_batch("cuda", changes)

    def fill_gradients(loss):
        for p in trainer.student.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", fill_gradients)
    del waits[:]  # of building the networks
    row = trainer.train_step(batches)
    assert not waits and {x.device.type for x in row.values() if isinstance(x, torch.Tensor)} == {"cuda"}


class Reads(TorchDispatchMode):
    """Operators that bring a value to the host, on whatever device."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if reads(func.overloadpacket, args):
            self.reads.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_the_way_back_brings_nothing_to_the_host(monkeypatch, changes):
    backward = torch.Tensor.backward
    modes = []

    def watched(loss):
        with Reads() as mode:
            backward(loss)
        modes.append(mode)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    trainer, batches = trainer_and_batch("cpu", changes)
    trainer.train_step(batches)
    assert modes and not [name for mode in modes for name in mode.reads]


def test_figures_are_read_all_at_once(monkeypatch):
    trainer, batches = trainer_and_batch("cpu", KINDS["convolutions"])
    rows = [trainer.train_step(batches) for _ in range(3)]
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: lists.append(x) or tolist(x))
    with Reads() as mode:
        numbers = trainer.read_figures(rows)
    assert not mode.reads and len(lists) == 1
    assert all(isinstance(value, float) for row in numbers for value in row.values())
    assert trainer.read_figures(numbers) == numbers and len(lists) == 1
