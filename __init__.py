"""The node pack, where this repository lies in ComfyUI's `custom_nodes`. Without ComfyUI this file does nothing."""

import sys

if "folder_paths" in sys.modules:  # ComfyUI's
    from .comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
