"""Processes that start at once: forked from one that has loaded the library, alone or as the ranks of a group."""

import atexit
import multiprocessing
import os
import signal
import tempfile
import unittest.mock
from multiprocessing import forkserver

from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "histonb.cli", "histonb.pretrain.pretraining", "histonb.segment.training"])
RUNNING = set()


class Forked:
    """A call of a function in one process, or in each rank of a group as torchrun starts them.

    Each process leads a session of its own. It ends as a program does: with a traceback and code 1 after an error."""

    def __init__(self, function, *args, processes=1, **kwargs):
        with unittest.mock.patch.dict(os.environ, OMP_NUM_THREADS="1", HISTONB_BATCH="1"):
            forkserver.ensure_running()
        self.files = [tempfile.NamedTemporaryFile(prefix="forked-") for _ in ("out", "error")]
        environ = {}
        if processes > 1:
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        self.processes = []
        for rank in range(processes):
            rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if environ else {}
            call = ([file.name for file in self.files], environ | rank, function, args, kwargs)
            self.processes.append(CONTEXT.Process(target=_call, args=call))
            self.processes[-1].start()
        RUNNING.add(self)

    @property
    def pid(self):
        """Of the first process."""
        return self.processes[0].pid

    @property
    def codes(self):
        """Exit codes, None where a process runs."""
        return [process.exitcode for process in self.processes]

    @property
    def returncode(self):
        """Zero where all processes ended well, None where one runs."""
        return None if None in self.codes else next(filter(None, self.codes), 0)

    def poll(self):
        """Return the code of a process that has ended; None where all run."""
        return next((code for code in self.codes if code is not None), None)

    def kill(self, signum):
        """Send a signal to every process and to those that it has started."""
        for process in self.processes:
            os.killpg(process.pid, signum)

    def communicate(self, timeout=300):
        """Wait for all processes; returns what they wrote to standard output and to standard error."""
        for process in self.processes:
            process.join(timeout)
        RUNNING.discard(self)
        if self.returncode is None:
            self.kill(signal.SIGKILL)
            raise TimeoutError(f"exit codes {self.codes} after {timeout} s")
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode())
        return texts


@atexit.register
def _end_all():
    """Leave no process behind where a test failed."""
    for run in RUNNING:
        for process in run.processes:
            process.kill()


def _call(files, environ, function, args, kwargs):
    """Call the function in a process that is set up as a program of its own."""
    os.setsid()
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environ)
    function(*args, **kwargs)
