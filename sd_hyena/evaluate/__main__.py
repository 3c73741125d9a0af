"""python -m sd_hyena.evaluate out/hyena.pt: how close students are to their teacher, on what they never saw."""

import sys
from itertools import takewhile

from sd_hyena.evaluate.config import EvaluationConfig, check
from sd_hyena.options.command import run


def main(config: EvaluationConfig) -> None:
    check(config)
    from sd_hyena.evaluate.evaluation import evaluate

    evaluate(config)


if __name__ == "__main__":
    files = list(takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    given = ["--students", ",".join(files)] if files else []
    sys.exit(run(EvaluationConfig, main, [*given, *sys.argv[1 + len(files) :]]))
