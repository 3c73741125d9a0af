"""The shipped workflows through ComfyUI's own executor, small models in place of the files that they name."""

import asyncio
import json
import types

import pytest
import torch
from PIL import Image

from sd_hyena.students.checkpoint import StudentFile, save_students
from tests.comfyui import models
from tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / "comfyui" / "workflows").glob("*.json"))
SIZES = {
    "sd15_2048_students": (2048, 2048),
    "sdxl_students": (2048, 1152),
    "landmarks": (2048, 1152),
    "exact_vae": (4096, 4096),
}
SMALLER = 16  # so many times fewer pixels a side


class Text:
    """ComfyUI's CLIP, as far as CLIPTextEncode needs one."""

    def __init__(self, width: int, pooled: int):
        self.width, self.pooled = width, pooled

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(len(text))
        adm = torch.randn(1, self.pooled, generator=generator)
        return [[torch.randn(1, 32, self.width, generator=generator), {"adm": adm}]]


def prompt_of(workflow, nodes):
    """What the page sends for a workflow: links and the widgets' values by the names of a node's inputs."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        wired = {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        sockets, inputs, values = {i["name"] for i in node["inputs"]}, {}, iter(node["widgets_values"])
        declared = nodes[node["type"]].INPUT_TYPES()
        for name, (_, *more) in (declared["required"] | declared.get("optional", {})).items():
            if name in sockets:
                inputs |= {name: wired[name]} if name in wired else {}
                continue
            inputs[name] = next(values)
            if more and (more[0].get("control_after_generate") or more[0].get("image_upload")):
                next(values)
        assert next(values, None) is None, f"{node['type']} has more values than inputs"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.fixture
def loader(running, monkeypatch, unet, tiny_sdxl):
    """CheckpointLoaderSimple with the named files standing for small models."""
    vae = models.vae_of()

    class Loader:
        RETURN_TYPES, FUNCTION = ("MODEL", "CLIP", "VAE"), "load"

        @classmethod
        def INPUT_TYPES(cls):
            names = ["v1-5-pruned-emaonly-fp16.safetensors", "sd_xl_base_1.0.safetensors"]
            return {"required": {"ckpt_name": (names,)}}

        def load(self, ckpt_name):
            if "xl" in ckpt_name:
                return models.patcher_of(tiny_sdxl.unet, prediction="EPS"), Text(80, 88), vae
            return models.patcher_of(unet), Text(96, 1), vae

    monkeypatch.setitem(running.nodes.NODE_CLASS_MAPPINGS, "CheckpointLoaderSimple", Loader)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_to_its_picture(running, base, loader, unet, tiny_sdxl, path, monkeypatch):
    folder = base / "models" / "hyena"
    for name, students in {
        "sd15_level0": models.students_of(unet, "level0"),
        "sdxl_level1": models.students_of(tiny_sdxl.unet, "level1"),
    }.items():
        save_students(folder / f"{name}.safetensors", StudentFile(students, {}))
    (base / "input").mkdir(exist_ok=True)
    Image.linear_gradient("L").convert("RGB").save(base / "input" / "example.png")
    prompt = prompt_of(json.loads(path.read_text()), running.nodes.NODE_CLASS_MAPPINGS)
    for node in prompt.values():
        inputs = node["inputs"]
        inputs |= {side: inputs[side] // SMALLER for side in ("width", "height") if side in inputs}
        inputs |= {"steps": 2} if "steps" in inputs else {}
        inputs |= {"tile_size": 64} if "tile_size" in inputs else {}
        if node["class_type"] == "HyenaModelInfo":
            inputs |= {"width": 2048, "height": 2048}
    valid, error, outputs, errors = asyncio.run(running.execution.validate_prompt("1", prompt, None))
    assert valid, (error, errors)
    server = types.SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *of: None, last_prompt_id=None)
    executor = running.execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0})
    executor.execute(prompt, "1", {}, outputs)
    assert executor.success, executor.status_messages[-1]
    (save,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "SaveImage")
    (file,) = (base / "output").glob(f"{save['filename_prefix']}*.png")
    wide, high = SIZES[path.stem]
    with Image.open(file) as image:
        assert image.size == (wide // SMALLER, high // SMALLER)
        assert min(high - low for low, high in image.convert("RGB").getextrema()) > 50
