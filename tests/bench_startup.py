"""How long a person waits before anything happens: `python tests/bench_startup.py` writes runs/bench/startup.json.

Wall time of whole processes, the interpreter's own start included. Targets: .3 s for the import, .5 s for help.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from histonb.core.files import repo_root, write_json

HISTONB = str(Path(sys.executable).with_name("histonb"))
CASES = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import histonb": [sys.executable, "-c", "import histonb"],
    "import histonb.studies.execution": [sys.executable, "-c", "import histonb.studies.execution"],
    "histonb --help": [HISTONB, "--help"],
}
TARGETS = {"import histonb": 0.3, "histonb --help": 0.5}


def seconds(command):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(repeats=15):
    times = {name: [] for name in CASES}
    for i in range(repeats + 1):  # side by side, so that a busy machine slows all alike
        for name, command in CASES.items():
            spent = seconds(command)
            if i:  # the first warms the disk cache
                times[name].append(spent)
    rows = [
        {
            "case": name,
            "median_s": round(statistics.median(t), 3),
            "min_s": round(min(t), 3),
            "target_s": TARGETS.get(name),
        }
        for name, t in times.items()
    ]
    for row in rows:
        print(
            f"{row['case']:30} median {row['median_s']:.3f} s, best {row['min_s']:.3f} s"
            + (f", target {row['target_s']} s" if row["target_s"] else "")
        )
    write_json(repo_root() / "runs/bench/startup.json", rows)


if __name__ == "__main__":
    main()
