"""Jupyter kernels that start at once: forked from a process that has loaded the large libraries.

`Pool` starts that process and writes a kernel specification, by the name of `python3`, whose command is this file with
the kernel's connection file. The command asks the process for a fork, and ends with it; the fork ends with the command.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

LARGE = ["torch", "timm", "albumentations", "pandas", "pyarrow.parquet", "tifffile", "scipy.ndimage", "skimage.measure"]
LARGE += ["sklearn.linear_model", "sklearn.neighbors", "matplotlib.pyplot", "matplotlib_inline.backend_inline"]
LARGE += ["papermill", "ipykernel.kernelapp", "histonb.pretrain.pretraining", "histonb.segment.training"]


class Pool:
    """A process to fork kernels from, and the environment in which Jupyter finds it."""

    def __init__(self, folder):
        folder = Path(folder)
        spec = folder / "kernels/python3/kernel.json"
        spec.parent.mkdir(parents=True)
        command = [sys.executable, "-I", __file__, "{connection_file}"]
        spec.write_text(json.dumps({"argv": command, "display_name": "forked", "language": "python"}))
        self.environ = {"JUPYTER_PATH": str(folder), "KERNEL_POOL": str(folder / "socket"), "HISTONB_BATCH": "1"}
        self.process = subprocess.Popen([sys.executable, __file__], env={**os.environ, **self.environ})
        while not (folder / "socket").exists() and self.process.poll() is None:
            time.sleep(0.1)

    def close(self):
        """End the process; kernels have ended before."""
        self.process.kill()
        self.process.wait()


def serve(path):
    """Load the large libraries, then fork a kernel for everyone who asks."""
    for name in LARGE:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended kernels leave nothing behind
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen()
    os.rename(path + ".new", path)  # whoever sees it is heard
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            be_kernel(connection)
        connection.close()


def be_kernel(connection):
    """Run a kernel as asked for, until it is shut down or whoever asked is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked = json.loads(connection.makefile().readline())
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environ"])
    sys.path[0] = ""  # as in a kernel, the working folder

    def end_together():
        connection.recv(1)
        os._exit(1)

    threading.Thread(target=end_together, daemon=True).start()
    from ipykernel.kernelapp import IPKernelApp

    kernel = IPKernelApp.instance()
    kernel.initialize(["-f", asked["connection_file"], "--HistoryManager.hist_file=:memory:"])
    kernel.start()
    os._exit(0)


def ask(connection_file):
    """Ask for a kernel, and stay as long as it does."""
    environ = {k: v for k, v in os.environ.items() if k != "JPY_PARENT_PID"}  # which is not its parent
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(environ["KERNEL_POOL"])
    asked = {"connection_file": connection_file, "folder": os.getcwd(), "environ": environ}
    connection.sendall(json.dumps(asked).encode() + b"\n")
    connection.recv(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ask(sys.argv[1])
    else:
        serve(os.environ["KERNEL_POOL"])
