"""Commands in forks of this process, which has imported everything already: real processes, with real signals and exit codes."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

for _module in ("distil.training", "evaluate.evaluation", "generate.generation"):  # everything, that is
    import_module(f"sd_hyena.{_module}")

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 300  # seconds: no test waits for one that hangs
SAID = (".1", ".2")  # the files of a child's folder for what it says
SHIM = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(fileno={number})
socket.send_fds(server, [json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()], [1, 2])
sys.exit(int(server.recv(8) or 70))
"""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it; and what it said."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


@dataclass(frozen=True)
class Child:
    """A process beside the test; what it says goes to the files .1 and .2 of `folder`."""

    pid: int
    folder: Path

    def said(self) -> str:
        """So far."""
        return "".join((self.folder / name).read_text() for name in SAID)

    def end(self, number: int | None = None) -> Ended:
        """Send it a signal, if one is given, and wait."""
        if number is not None:
            os.kill(self.pid, number)
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), *((self.folder / name).read_text() for name in SAID))


def fork(body: Callable[[], int], folder: Path, outputs: tuple[int, ...] = ()) -> Child:
    """Run `body` in a fork of this process and end it with the code that it returns.

    `outputs` are two open files that take what it says, in place of those in `folder`."""
    sys.stdout.flush(), sys.stderr.flush()
    files = outputs or tuple(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) for name in SAID)
    if pid := os.fork():
        for file in () if outputs else files:
            os.close(file)
        return Child(pid, folder)
    code = 70
    gc.freeze()  # what is garbage here was the parent's, and some of it would join threads that a fork does not have
    try:
        for number, stream, file in zip((1, 2), ("stdout", "stderr"), files, strict=True):
            os.dup2(file, number)
            setattr(sys, stream, os.fdopen(number, "w", 1, encoding="utf-8", closefd=False))
        torch.set_grad_enabled(True)
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def python(arguments: list[str]) -> int:
    """What `python ARGUMENTS` does, for a script or -m MODULE, and its exit code."""
    module = arguments[0] == "-m"
    sys.argv = arguments[1:] if module else arguments
    sys.path.insert(0, os.getcwd() if module else str(Path(sys.argv[0]).resolve().parent))
    try:
        if module:
            warnings.filterwarnings("ignore", r".* found in sys\.modules", RuntimeWarning)  # it was imported before
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0
        print(exit_.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def started(*arguments, cwd: Path, env: Mapping[str, str] | None = None) -> Child:
    """`python ARGUMENTS` in the folder `cwd`, begun."""

    def body() -> int:
        signal.alarm(LONGEST)
        os.chdir(cwd)
        os.environ.update({"PYTHONPATH": str(ROOT), **(env or {})})  # for what it starts itself
        return python([*map(str, arguments)])

    return fork(body, Path(tempfile.mkdtemp()))


def forked(*arguments, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """The same, waited for: `tests.conftest.command` without the seconds that importing takes."""
    ended = started(*arguments, cwd=cwd, env=env).end()
    return subprocess.CompletedProcess(arguments, ended.code, ended.out, ended.err)


@contextmanager
def python_that_forks(path: Path) -> Iterator[int]:
    """A `python` at `path`, for scripts: what it is given runs in a fork of a fork of this process, one at a time.

    Yields the number of the open file that the scripts must inherit."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path.write_text(SHIM.format(python=sys.executable, number=theirs.fileno()))
    path.chmod(0o755)
    server = fork(lambda: _serve(ours, theirs), path.parent)
    ours.close()
    try:
        yield theirs.fileno()
    finally:
        theirs.close()
        ended = server.end()
    assert ended.code == 0, ended.err


def _serve(ours: socket.socket, theirs: socket.socket) -> int:
    theirs.close()
    while True:
        given, outputs, _, _ = socket.recv_fds(ours, 2**20, 2)
        if not given:
            return 0
        arguments, folder, environment = json.loads(given)

        def body(arguments=arguments, folder=folder, environment=environment) -> int:
            ours.close()
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            return python(arguments)

        ended = os.waitpid(fork(body, Path(folder), tuple(outputs)).pid, 0)[1]
        for output in outputs:
            os.close(output)
        code = os.waitstatus_to_exitcode(ended)
        ours.send(str(code if code >= 0 else 128 - code).encode())
