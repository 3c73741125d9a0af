"""ComfyUI's `prompt`: the graph that a picture was drawn by, as JSON; what of it is unambiguous is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options.found import Found, plain_name, quoted
from sd_hyena.options.sampler import KARRAS

SAMPLERS = {
    "ddim": "ddim",
    "euler": "euler",
    "euler_ancestral": "euler_a",
    "heun": "heun",
    "lms": "lms",
    "dpmpp_2m": "dpm++_2m",
    "dpmpp_2m_sde": "dpm++_2m_sde",
    "dpmpp_2m_sde_gpu": "dpm++_2m_sde",
    "uni_pc": "unipc",
}
WITHOUT_EFFECT = ("SaveImage", "PreviewImage", "Note", "MarkdownNote", "Reroute", "PrimitiveNode", "ShowText|pysssss")
TEXT_KEYS = ("text", "string", "value", "text_g", "prompt")
DEEPEST = 64  # links from the sampler to a file
EMBEDDING = re.compile(r"\bembedding:([\w./\\\-]+)")
WEIGHTS = re.compile(r"[^\\]\([^()]+:[0-9.]+\)")

Node = dict[str, Any]


def options(text: str, source: str) -> Found:
    """Raises BadInput, which names `source`, for a graph that is none or has no single sampler."""
    return _Graph(text, source).read()


class _Graph:
    """The nodes by number, and which of them are understood."""

    def __init__(self, text: str, source: str):
        try:
            nodes = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{source}: its parameters are damaged ({str(error)[:80]})") from None
        nodes = nodes if isinstance(nodes, dict) else {}
        self.nodes = {
            str(key): node for key, node in nodes.items() if isinstance(node, dict) and isinstance(_kind(node), str)
        }
        if not self.nodes:
            raise BadInput(f"{source}: its parameters are damaged (no nodes of ComfyUI)")
        self.found = Found("ComfyUI", source)
        self.understood: set[str] = set()

    def read(self) -> Found:
        found = self.found
        samplers = [key for key, node in self.nodes.items() if _kind(node) in ("KSampler", "KSamplerAdvanced")]
        if len(samplers) != 1:
            kinds = ", ".join(sorted({quoted(_kind(node)) for node in self.nodes.values() if "ampler" in _kind(node)}))
            raise BadInput(
                f"{found.source} was drawn by {len(samplers)} KSamplers of ComfyUI ({kinds[:80] or 'no sampler'}); "
                "one can be read, give the options instead"
            )
        self.understood.add(samplers[0])
        given = _inputs(self.nodes[samplers[0]])
        for key, option, whole in (("steps", "steps", True), ("cfg", "cfg_scale", False)):
            if (value := self._value(given.get(key))) is not None:
                found.number(option, value, key, whole)
        seed = given.get("seed", given.get("noise_seed"))
        if (seed := self._value(seed)) is not None:
            found.seed(seed, "seed")
        self._sampling(given)
        self._follow(given.get("latent_image"), self._latent)
        found.options["prompt"] = found.options["negative_prompt"] = ""
        self._follow(given.get("positive"), lambda node: self._text(node, "prompt"))
        self._follow(given.get("negative"), lambda node: self._text(node, "negative_prompt"))
        self._follow(given.get("model"), self._model)
        self._rest()
        if any(WEIGHTS.search(found.options[name]) for name in ("prompt", "negative_prompt")):
            found.leave("ComfyUI's way of weighting words")
        return found

    def _follow(self, link: Any, read: Callable[[Node], Any]) -> None:
        """Read the node at the other end of a link; `read` returns the next link or None."""
        for _ in range(DEEPEST):
            node = self._at(link)
            if node is None:
                return
            link = read(node)

    def _at(self, link: Any) -> Node | None:
        key = str(link[0]) if isinstance(link, list) and link else ""
        if key not in self.nodes or (key in self.understood and _kind(self.nodes[key]) == "KSampler"):
            return None
        return self.nodes[key] | {"key": key}

    def _value(self, value: Any) -> Any:
        """A value, or that of the primitive node it is linked to; None if that has none."""
        for _ in range(DEEPEST):
            if not isinstance(value, list):
                return value
            if (node := self._at(value)) is None:
                return None
            given = _inputs(node)
            value = next((given[key] for key in ("value", "seed", "int", "float", *TEXT_KEYS) if key in given), None)
            self.understood.add(node["key"])
        return None

    def _sampling(self, given: dict[str, Any]) -> None:
        found = self.found
        name, levels = self._value(given.get("sampler_name")), self._value(given.get("scheduler"))
        if isinstance(name, str) and name in SAMPLERS:
            ours = SAMPLERS[name]
            found.options |= {"scheduler": ours, "karras": levels == "karras" and ours in KARRAS}
            if levels == "karras" and ours not in KARRAS:
                found.leave(f"Karras' noise levels for {ours}", "scheduler")
            elif levels not in (None, "normal", "karras"):
                found.leave(f"schedule {quoted(levels)!r}", "karras")
        else:
            found.leave(f"sampler {quoted(name)!r}", "scheduler")
        denoise = self._value(given.get("denoise"))
        if denoise is not None and (denoise := found.read_number(denoise, "denoise")) < 1:
            found.beside["strength"] = denoise
            found.leave(f"the picture that it was drawn from (denoise {denoise:g}); give --init_image", "init_image")
        for key, neutral in (("add_noise", "enable"), ("start_at_step", 0), ("return_with_leftover_noise", "disable")):
            if key in given and given[key] != neutral:
                found.leave(f"{key} {quoted(given[key])}")
        end = given.get("end_at_step")
        if isinstance(end, int) and end < found.options.get("steps", 0):
            found.leave(f"end_at_step {end}")

    def _latent(self, node: Node) -> Any:
        given = _inputs(node)
        if _kind(node) not in ("EmptyLatentImage", "EmptySD3LatentImage"):
            return None
        self.understood.add(node["key"])
        width, height = self._value(given.get("width")), self._value(given.get("height"))
        if width is not None and height is not None:
            self.found.size(width, height)
        return None

    def _text(self, node: Node, option: str) -> Any:
        """The text of a conditioning; a node between changes it, and is named by `_rest`."""
        given = _inputs(node)
        if _kind(node).startswith("CLIPTextEncode"):
            text = next((value for key in TEXT_KEYS if isinstance(value := self._value(given.get(key)), str)), None)
            self.understood.add(node["key"])
            if text is None:
                self.found.leave(f"the {option.replace('_', ' ')}, whose text another node makes", option)
                return None
            self.found.options[option] = EMBEDDING.sub(self._embedding, text)
            self._follow(given.get("clip"), self._clip)
            return None
        links = [value for key, value in given.items() if isinstance(value, list) and "conditioning" in key.lower()]
        links += [given[key] for key in ("positive", "negative") if key in given and key.startswith(option[:3])]
        return links[0] if links else None

    def _embedding(self, match: re.Match) -> str:
        """Its name without folders and suffix, which named_files.py takes out again if there is no such file."""
        word, end = plain_name(match[1].rstrip("./\\-")), match[1][len(match[1].rstrip("./\\-")) :]
        self.found.name("embeddings", word)
        return f"embedding:{word}{end}"

    def _clip(self, node: Node) -> Any:
        given = _inputs(node)
        if _kind(node) == "CLIPSetLastLayer":
            layer = self._value(given.get("stop_at_clip_layer"))
            if isinstance(layer, int) and layer < 0:
                self.found.options["clip_skip"] = -layer
                self.understood.add(node["key"])
        return given.get("clip")

    def _model(self, node: Node) -> Any:
        given = _inputs(node)
        if _kind(node) in ("CheckpointLoaderSimple", "CheckpointLoader"):
            if isinstance(name := self._value(given.get("ckpt_name")), str):
                self.found.name("model", name)
                self.understood.add(node["key"])
            return None
        if _kind(node) in ("LoraLoader", "LoraLoaderModelOnly"):
            name, unet = self._value(given.get("lora_name")), self._value(given.get("strength_model"))
            text = self._value(given.get("strength_clip", unet))
            if isinstance(name, str) and unet is not None and unet == text and node["key"] not in self.understood:
                stem = name.replace("\\", "/").rpartition("/")[2].rsplit(".", 1)[0]
                self.found.options["prompt"] += f" <lora:{stem}:{self.found.read_number(unet, 'strength_model'):g}>"
                self.understood.add(node["key"])
        return given.get("model")

    def _rest(self) -> None:
        """The VAE, and the names of all nodes that were not understood."""
        for key, node in self.nodes.items():
            kind = _kind(node)
            if key in self.understood or kind in WITHOUT_EFFECT:
                continue
            if kind == "VAEDecode":
                self._follow(_inputs(node).get("vae"), self._vae)
                self.understood.add(key)
        left = [
            key for key, node in self.nodes.items() if key not in self.understood and _kind(node) not in WITHOUT_EFFECT
        ]
        for kind in dict.fromkeys(_kind(self.nodes[key]) for key in left):
            self.found.leave(f"node {quoted(kind)}")

    def _vae(self, node: Node) -> Any:
        if _kind(node) == "VAELoader" and isinstance(name := self._value(_inputs(node).get("vae_name")), str):
            self.found.name("vae", name)
            self.understood.add(node["key"])
        return None


def _kind(node: Node) -> Any:
    return node.get("class_type")


def _inputs(node: Node) -> dict[str, Any]:
    given = node.get("inputs")
    return given if isinstance(given, dict) else {}
