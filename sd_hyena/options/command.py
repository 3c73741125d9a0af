"""How a command ends: exit codes, one line for an error, signals that save before they stop.

0 done, 1 failure at run time, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import codecs
import io
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

from sd_hyena.errors import BadInput
from sd_hyena.options.command_line import Config, parse
from sd_hyena.processes.group import may_speak

Input = TypeVar("Input")
BESIDE_THE_POINT = (
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers",
)  # what importing torchao says, used or not
# the last one is how Windows ends a group of processes
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


class Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which Lightning turns into an exit with 1."""


class Terminated(BaseException):
    """SIGTERM arrived, or Windows' SIGBREAK."""


AS_IT_IS = (
    "sd_hyena.as_it_is"  # names of files that are no text are printed by their bytes, what a terminal lacks by its code
)


def _as_it_is(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(AS_IT_IS, _as_it_is)


def run(config_class: type[Config], main: Callable[[Config], None], arguments: list[str] | None = None) -> int:
    """Parse, run `main(config)` and return the exit code."""
    return run_parsed(lambda: parse(config_class, arguments), main, arguments)


def run_parsed(read: Callable[[], Input], main: Callable[[Input], None], arguments: list[str] | None = None) -> int:
    """The same for what `read` makes of the command line."""
    for name in BESIDE_THE_POINT:
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a pipe, too, lines are there when they are written
            stream.reconfigure(line_buffering=True, errors=AS_IT_IS)
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    try:
        given = read()
        _raise_on_signals()
        main(given)
        return 0
    except SystemExit as exit_:  # --help, --print_config
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except (KeyboardInterrupt, Interrupted):
        _say("interrupted")
        return 130
    except Terminated:
        _say("terminated")
        return 143
    except Exception as error:
        if debug:
            traceback.print_exc()
        bad_input = isinstance(error, BadInput)
        line = " ".join(str(error).split()) or "no further message"
        _say(f"error: {line}" if bad_input else f"error: {type(error).__name__}: {line}")
        return 2 if bad_input else 1


def _say(line: str) -> None:
    """One line in all, however many processes end."""
    if may_speak():
        print(line, file=sys.stderr, flush=True)


def _raise_on_signals() -> None:
    def handler(number, _frame):
        raise Interrupted if number == signal.SIGINT else Terminated

    if threading.current_thread() is threading.main_thread():
        for number in ENDS:
            signal.signal(number, handler)
