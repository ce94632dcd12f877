"""Speed of the library's XCiT beside timm's: forward and backward, interleaved, on this machine.

python tests/bench_xcit.py [name] [rounds]      writes runs/bench/xcit.json
"""

import sys
import time

import timm
import torch

from histonb.core.files import repo_root, write_json
from histonb.models.xcit import xcit


def seconds(model, x, bf16):
    start = time.perf_counter()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        loss = model(x).float().square().mean()
    loss.backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    model.zero_grad()
    return elapsed


def main(name="xcit_nano_12_p16_224", rounds=7):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    ours = xcit(name).to(device)
    theirs = timm.create_model(name, num_classes=0).to(device)
    theirs.load_state_dict(ours.state_dict())
    rows = []
    for size, batch in ((224, 8), (96, 32)):
        x = torch.randn(batch, 3, size, size, device=device)
        for bf16 in (False, True):
            for model in (ours, theirs):
                seconds(model, x, bf16)  # warm-up
            times = {"ours": [], "timm": []}
            pair = [("ours", ours), ("timm", theirs)]
            for i in range(rounds):
                for label, model in pair if i % 2 else pair[::-1]:
                    times[label].append(seconds(model, x, bf16))
            best = {label: min(values) for label, values in times.items()}
            speed = {label: batch / value for label, value in best.items()}
            ratio = best["ours"] / best["timm"]
            precision = "bf16" if bf16 else "fp32"
            rows.append(dict(size=size, batch=batch, precision=precision, **speed, ratio=ratio))
            speeds = f"ours {speed['ours']:6.1f} img/s  timm {speed['timm']:6.1f} img/s"
            print(f"{size:4d} px  {precision}  {speeds}  time ours/timm {ratio:.2f}", flush=True)
    write_json(
        repo_root() / "runs" / "bench" / "xcit.json",
        dict(
            name=name,
            device=device,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            timm=timm.__version__,
            what="forward + backward, best of interleaved rounds; ratio = time ours / time timm",
            rows=rows,
        ),
    )


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
