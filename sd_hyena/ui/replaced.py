"""What gradio's sessions hold of components that took the place of others."""

from __future__ import annotations

import gradio as gr


def forget_replaced(blocks: gr.Blocks) -> int:
    """Take the components out of the open pages' states that nothing refers to any more; how many.

    An answer that does not give a value (also `gr.skip()`, and what a dict of answers leaves out) puts a new component
    into the place of the old one in the page's state. gradio 6.31 then enters it under its own number, too, and
    leaves it there when the next one comes.
    """
    ours, gone = set(blocks.blocks), 0
    for state in list(blocks.state_holder.session_data.values()):
        held = state.blocks_config.blocks
        current = {held[number]._id for number in ours & held.keys()}
        for number in held.keys() - ours - current:
            held.pop(number, None)
            state.config_values.pop(number, None)
            gone += 1
    return gone
