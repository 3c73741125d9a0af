"""python -m sd_hyena.ui: the page, at http://127.0.0.1:7860."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from sd_hyena.errors import BadInput
from sd_hyena.options.command import run
from sd_hyena.ui.page_config import PageConfig

QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

_served: list[PageConfig] = []


def main(config: PageConfig) -> None:
    """Serve it until somebody ends the command."""
    if find_spec("gradio") is None:
        raise BadInput("the page needs gradio, which is not installed; pip install 'sd_hyena[ui]'")
    uploads = os.path.abspath(os.path.join(config.state_dir, "uploads"))
    os.environ |= QUIET | {"GRADIO_TEMP_DIR": uploads}  # before gradio is imported, which calls home as it is
    from sd_hyena.ui.server import serve

    _served.append(config)
    serve(config)


def command(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; once a page was served this process ends with it."""
    code = run(PageConfig, main, arguments)
    if _served:  # threads of the server may still compute, and torch does not survive that its process is taken apart
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(command())
