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
            times = [
                (seconds(ours, x, bf16), seconds(theirs, x, bf16))
                if i % 2
                else (seconds(theirs, x, bf16), seconds(ours, x, bf16))[::-1]
                for i in range(rounds)
            ]
            best = [min(column) for column in zip(*times, strict=True)]
            rows.append(
                dict(
                    size=size,
                    batch=batch,
                    precision="bf16" if bf16 else "fp32",
                    ours=batch / best[0],
                    timm=batch / best[1],
                    ratio=best[0] / best[1],
                )
            )
            print(
                "{size:4d} px  {precision}  ours {ours:6.1f} img/s  timm {timm:6.1f} img/s  time ours/timm {ratio:.2f}".format(
                    **rows[-1]
                ),
                flush=True,
            )
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
