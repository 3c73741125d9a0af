"""How a page looks at what is going on: a timer asks, and is stopped by the answer that it is over."""

from __future__ import annotations

from typing import Any

import gradio as gr

from sd_hyena.ui.draw_tab import QUICK

OFTEN = 0.4  # seconds between two looks at a job


def go_on_looking(event: Any, *timers: gr.Timer) -> None:
    """Behind an event that starts timers: the answer that stopped them may have been on its way, and come after that."""
    event.then(lambda: [gr.Timer(active=True)] * len(timers), None, list(timers), **QUICK)
