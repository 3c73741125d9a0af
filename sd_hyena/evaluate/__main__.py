"""sd-hyena evaluate out/hyena.pt: how close students are to their teacher, on what they never saw. See --help."""

from __future__ import annotations

import sys
from itertools import takewhile

from sd_hyena.evaluate.config import EvaluationConfig, checked
from sd_hyena.options.command import run
from sd_hyena.processes.progress import work


def main(config: EvaluationConfig) -> None:
    config = checked(config)
    with work("loading PyTorch and diffusers", announced=False):
        from sd_hyena.evaluate.evaluation import evaluate

    evaluate(config)


def command(arguments: list[str] | None = None) -> int:
    """Run the command line, whose first plain arguments are files, and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    files = list(takewhile(lambda argument: not argument.startswith("-"), given))
    options = ["--students", ",".join(files)] if files else []
    return run(EvaluationConfig, main, [*options, *given[len(files) :]])


if __name__ == "__main__":
    sys.exit(command())
