"""A Python that starts at once: forked from a process that has imported all of it already.

A launch of three parties is four processes, and each takes seconds to import the same. ``python()`` names a
program that takes the words that ``sys.executable`` takes, with the caller's environment, folder, streams and
signals. Lightning reads the rank from the environment when it is imported; each fork reads its own. There are
two processes to fork from, of unlike hash seeds, so that the order of a set at one party says nothing about
that at the next. What is about imports or a processor's settings uses ``sys.executable``.
"""

import atexit
import contextlib
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

_IMPORTS = ["numpy.random", "torch.distributed", "torch._dynamo", "scipy.signal", "tensorboard"]
_IMPORTS += ["torch.utils.tensorboard", "jsonargparse", "rich", "cryptography.x509", "peft"]
_IMPORTS += ["torch.distributed.launcher.api", "lightning.pytorch.cli", "lightning.pytorch.loggers"]
_IMPORTS += ["pellm_lightning.cli.federated_cli", "pellm_lightning.tasks"]
_IMPORTS += [f"transformers.models.{name}" for name in ("llama.modeling_llama", "bert.modeling_bert")]
_IMPORTS += ["attrs", "peft.tuners.lora.bnb", "datasets"]
_IMPORTS += ["matplotlib.backends.backend_svg", "torch.utils.serialization"]
_STARTS_NO_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""A fork has one thread: a lock that another one held at that moment, such as an allocator's, stays held."""
_REQUEST_BYTES = 1 << 20


@cache
def python() -> str:
    """Return the path of the program; what it forks from is one for all workers, and ends with the last."""
    place = Path(gettempdir(), f"pellm-python-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}")
    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _holds(place):
            _start(place)
    return str(place / "python")


def _holds(place: Path) -> bool:
    """Hold the originals that another worker has started, until this process ends; whether they run."""
    try:
        os.open(place / "held", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # never started, or nobody reads: they have ended
        return False
    return True


def _start(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(0o700)
    os.mkfifo(place / "held")
    held = os.open(place / "held", os.O_RDONLY | os.O_NONBLOCK)
    assert _holds(place)
    ready, tells_ready = os.pipe()
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **_STARTS_NO_THREAD}
    for seed in range(2):
        original = subprocess.Popen(
            [sys.executable, __file__, "serve", f"{place}/{seed}", str(tells_ready)],
            stdin=held,  # it ends when nobody holds the other end
            env=environ | {"PYTHONHASHSEED": str(seed + 1)},
            pass_fds=[tells_ready],
        )
        original.returncode = 0  # it may outlive this process, of which Popen would warn
    os.close(tells_ready), os.close(held)
    with os.fdopen(ready, "rb") as file:
        assert file.read() == b"++", "what is forked from has not come up"
    program = place / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" run "{place}" "$@"\n')
    program.chmod(0o700)


# ---- the program


def run(folder: str, words: list[str]) -> None:
    """Have the words run by a fork; end as it ends, pass on the signals that come meanwhile."""
    request = json.dumps({"words": words, "environ": dict(os.environ), "cwd": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(f"{folder}/{int(os.environ.get('RANK', os.getpid())) % 2}")
        socket.send_fds(line, [len(request).to_bytes(4, "big")], [0, 1, 2])
        line.sendall(request)
        answers = line.makefile("rb")
        pid = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, _: _pass_on(pid, number))
        code = int(answers.readline() or 1)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _pass_on(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended, which is about to be read
        os.kill(pid, number)


# ---- what is forked from


class Original:
    """Forks for each request; in the fork ``serve`` returns the request."""

    def __init__(self, path: str) -> None:
        self._lines: dict[int, socket.socket] = {}
        """The line to each fork's program, by the fork's process."""
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen(16)
        self._selector = selectors.DefaultSelector()
        ended, tells_ended = os.pipe()
        os.set_blocking(ended, False), os.set_blocking(tells_ended, False)
        self._pipe = (ended, tells_ended)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(tells_ended)
        self._selector.register(ended, selectors.EVENT_READ, "ended")
        self._selector.register(self._server, selectors.EVENT_READ, "request")
        self._selector.register(0, selectors.EVENT_READ, "over")

    def serve(self) -> dict[str, Any] | None:
        """Return a request, in the fork that is to fulfil it; None when all is over."""
        while True:
            for key, _ in self._selector.select():
                if key.data == "over":
                    os.close(0)  # nobody takes it for one that runs
                    self._kill(*self._lines)
                    return None
                if key.data == "request":
                    request = self._fork()
                    if request is not None:
                        return request
                elif key.data == "ended":
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._pipe[0], 1024)
                    self._report()
                elif key.data in self._lines:  # its program was killed, and so it is
                    self._selector.unregister(key.fileobj)
                    self._kill(key.data)

    def _fork(self) -> dict[str, Any] | None:
        line, _ = self._server.accept()
        head, streams, _, _ = socket.recv_fds(line, 4, 3)
        content = bytearray()
        while len(content) < int.from_bytes(head, "big"):
            content += line.recv(_REQUEST_BYTES)
        pid = os.fork()
        if pid == 0:
            self._leave()
            line.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
        for stream in streams:
            os.close(stream)
        if pid == 0:
            return json.loads(content)
        line.sendall(b"%d\n" % pid)
        self._lines[pid] = line
        self._selector.register(line, selectors.EVENT_READ, pid)
        return None

    def _leave(self) -> None:
        """Hold nothing of what the original holds."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        self._selector.close()
        self._server.close()
        for line in self._lines.values():
            line.close()
        for end in self._pipe:
            os.close(end)

    def _report(self) -> None:
        for pid in list(self._lines):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                line = self._lines.pop(pid)
                with contextlib.suppress(KeyError):
                    self._selector.unregister(line)
                with contextlib.suppress(OSError):
                    line.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                line.close()

    def _kill(self, *pids: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def become(request: dict[str, Any], own: list[str]) -> None:
    """Make this process what ``python *words`` begins as; ``own`` is where modules were found before."""
    from multiprocessing import process

    import numpy as np
    from lightning.fabric.utilities import rank_zero

    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    process.ORIGINAL_DIR = os.getcwd()  # where a process that is spawned looks for the script
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        stream.reconfigure(line_buffering=number == 2 or stream.isatty())
        setattr(sys, name, stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    faulthandler.enable(2)  # a launch that ends by a signal says where it was
    np.random.seed()  # as a process of its own has one
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    words = request["words"]
    while words[0] in ("-u",):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        words = words[1:]
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    here = os.getcwd() if words[0] in ("-m", "-c") else str(Path(words[0]).resolve().parent)
    sys.path[:] = [here, *(path for path in added if path), *own]
    importlib.invalidate_caches()
    sys.argv = words


def name_methods_quickly() -> None:
    """Spare torchrun 1.6 s a launch: for the names in its events it compares its stack with every module."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name


def look_up_plugins_once() -> None:
    """Spare each Trainer the metadata of every package that is installed."""
    from lightning.fabric.utilities import registry

    registry.entry_points = cache(registry.entry_points)
    registry._load_external_callbacks("lightning.pytorch.callbacks_factory")


def main() -> None:
    verb, place, *words = sys.argv[1:]
    if verb == "run":
        run(place, words)
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own = [path for path in sys.path[1:] if path not in given]
    gc.disable()  # a sixth of the time of the imports, which leave nothing to collect
    for name in _IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    name_methods_quickly()
    look_up_plugins_once()
    original = Original(place)
    os.write(int(words[0]), b"+")
    os.close(int(words[0]))
    gc.freeze()  # a fork need not look through what it has not made
    gc.enable()
    request = original.serve()
    if request is None:
        shutil.rmtree(Path(place).parent, ignore_errors=True)  # the other one does, too
        os._exit(0)
    import runpy

    become(request, own)
    status: Any = 0
    try:
        if sys.argv[0] == "-c":
            code = sys.argv.pop(1)
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        elif sys.argv[0] == "-m":
            name = sys.argv[1]
            sys.argv = sys.argv[1:]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    if not isinstance(status, int):
        sys.exit(status)
    end(status)


def end(status: int) -> None:
    """End as an interpreter does, but do not take apart what it has imported: half a second each time."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()  # what the program has made is taken down, with its connections
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    main()
