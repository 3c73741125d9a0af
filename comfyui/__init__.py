"""The node pack for ComfyUI: this folder in `custom_nodes`, or the whole repository, whose root hands on to it."""

from . import core
from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "core"]
