"""Every parser of ours meets inputs that nobody meant: it reads them, or refuses them as BadInput in one line."""

import copy
import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import ControlNetModel, UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save, save_file
from torch import nn

from sd_hyena.distil.resume import Resumable
from sd_hyena.distil.run_folder import AtomicCheckpointIO
from sd_hyena.errors import BadInput
from sd_hyena.files.averaged import averages_as_weights
from sd_hyena.files.mask import read_mask
from sd_hyena.files.names import check_format
from sd_hyena.files.picture import read_metadata, read_picture, write_image
from sd_hyena.files.picture_text import read_texts, user_comment
from sd_hyena.files.quantised import unquantised, without_scales
from sd_hyena.files.text import read_text
from sd_hyena.files.weights import check_weights, read_checkpoint, read_weights, shapes_of
from sd_hyena.files.weights_kind import layout_of
from sd_hyena.large.regions import read_regions
from sd_hyena.models.controlnet import check_controlnet, load_controlnet
from sd_hyena.models.lora.applied import Given, loras_in
from sd_hyena.models.lora.lora_file import read_lora
from sd_hyena.models.upscaler import load_upscaler
from sd_hyena.options import comfyui, given_path, infotext, invokeai
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.prompt_constructs import check_text_of
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.memory import is_out_of_memory
from sd_hyena.recipe import read_recipe
from sd_hyena.students.checkpoint import StudentFile, load_students, save_students
from sd_hyena.students.student import StudentSpec, build_student
from sd_hyena.text import prompt
from sd_hyena.text.textual_inversion import read_embeddings
from tests import upscalers
from tests.conftest import IN01
from tests.fetched import NotToBeHad
from tests.files_in_the_wild.adapters import FAMILIES, factors_of, in_the_original_layout
from tests.gate import sampled

HALVES = st.sampled_from(["\ud800", "\udcff"])  # of characters: no file can hold them
TEXT = st.text(st.characters(), max_size=40) | HALVES
NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")])
SCALARS = st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=6
)


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """Bytes overwritten, removed and put in between; sometimes cut short."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        content[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


def _places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _places(part, (*path, key))


@st.composite
def altered(draw, good):
    """Good values with a few replaced, removed or joined by strangers."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([place for place in _places(value) if place] or [()])) or (None,)
        if last is None:
            return draw(VALUES)
        parent = value
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            del parent[last]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(TEXT)] = draw(VALUES)
        else:
            parent[last] = draw(VALUES)
    return value


SPECS = {
    "hyena2d": StudentSpec(
        IN01, "IN01", 8, "hyena2d",
        {"rank": 1, "filter_order": 8, "reach": 8, "local": 3, "heads": 2, "landmarks": 2, "content": "landmarks"}, None,
    ),
    "landmarks": StudentSpec(IN01, "IN01", 8, "landmarks", {"heads": 2, "landmarks": 3}, None),
    "causal": StudentSpec(IN01, "IN01", 8, "causal", {"order": 2, "filter_order": 4, "emb_dim": 3}, (2, 3)),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict:
    """A good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    found = {"folder": folder}
    for name, spec in SPECS.items():
        for suffix in (".safetensors", ".pt"):
            save_students(folder / f"{name}{suffix}", StudentFile({IN01: build_student(spec)}, {"step": 7}))
            found[name + suffix] = (folder / f"{name}{suffix}").read_bytes()
        tensors, metadata = read_weights(folder / f"{name}.pt")
        found[f"{name} tensors"], found[f"{name} header"] = tensors, json.loads(metadata["sd_hyena"])
    run = {"config": to_dict(TrainConfig(out_dir=str(folder)))}
    AtomicCheckpointIO().save_checkpoint(
        {"global_step": 3, "sd_hyena": run, "state_dict": found["causal tensors"]}, folder / "x.ckpt"
    )
    found["ckpt"] = (folder / "x.ckpt").read_bytes()
    found["picture"] = {"config": to_dict(GenerateConfig(prompt="a fox", seed=5)), "regions": REGIONS}
    write_image(folder / "x.png", Image.new("RGB", (4, 4)), A1111, found["picture"])
    found["png"] = (folder / "x.png").read_bytes()
    for kind in ("jpg", "webp"):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
        exif[0x0110] = "prompt:" + json.dumps(COMFYUI)
        Image.new("RGB", (4, 4)).save(folder / f"x.{kind}", exif=exif)
        found[kind] = (folder / f"x.{kind}").read_bytes()
    return found | wild(folder)


def wild(folder: Path) -> dict[str, bytes]:
    """Good files of other programs."""
    word = {"string_to_param": torch.nn.ParameterDict({"*": torch.ones(2, 8)}), "name": "x"}
    torch.save(word, folder / "word.pt")
    torch.save(
        {"state_dict": {"x": torch.ones(9), "y": torch.ones(2, 3)}},
        folder / "old.ckpt",
        _use_new_zipfile_serialization=False,
    )
    layer = "model.diffusion_model.input_blocks.0.0."
    eight = {f"{layer}weight": torch.ones(3, 4).to(torch.float8_e4m3fn), f"{layer}scale_weight": torch.ones(3)}
    eight |= {f"{layer}comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)}
    save_file(eight | {"cond_stage_model.transformer.x": torch.ones(2)}, folder / "eight.safetensors")
    brush = Image.new("RGBA", (6, 5))
    brush.paste((255, 255, 255, 255), (1, 1, 4, 4))
    brush.save(folder / "mask.png")
    Image.new("F", (6, 5), 0.5).save(folder / "mask.tif")
    return {
        name: (folder / name).read_bytes()
        for name in ("word.pt", "old.ckpt", "eight.safetensors", "mask.png", "mask.tif")
    }


A1111 = 'a (fox:1.2)\nNegative prompt: b\nSteps: 5, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 64x72, Hyena: "a, b"'
REGIONS = {
    "bbox_controls": [
        {"x": 0.1, "y": 0, "w": 0.5, "h": 1, "prompt": "a", "neg_prompt": "b", "blend_mode": "Foreground", "seed": -1},
        {"x": 0.5, "y": 0.5, "w": 0.5, "h": 0.5, "feather_ratio": 0.2, "enable": True, "adapters": ["a"], "mask": ""},
    ]
}
COMFYUI = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "karras",
          "denoise": 1, "model": ["4", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "LoraLoader", "inputs": {"lora_name": "a", "strength_model": 1, "strength_clip": 1, "model": ["7", 0]}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["8", 0]}},
    "7": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
    "8": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["4", 1]}},
    "9": {"class_type": "VAEDecode", "inputs": {"vae": ["10", 0]}},
    "10": {"class_type": "VAELoader", "inputs": {"vae_name": "v"}},
}  # fmt: skip
INVOKEAI = {
    "positive_prompt": "a", "negative_prompt": "b", "steps": 5, "cfg_scale": 7.5, "seed": 3, "width": 64, "height": 64,
    "scheduler": "euler", "model": {"name": "x"}, "loras": [{"model": {"name": "y"}, "weight": 1}], "clip_skip": 1, "strength": 1,
    "image": {"prompt": [{"prompt": "a [b]", "weight": 1}], "steps": 5, "seed": 1, "sampler": "ddim", "width": 64, "height": 64},
}  # fmt: skip
BLOCK = {"Method": "MultiDiffusion", "Tile tile width": 64, "Tile Overlap": 8, "NoiseInv": True, "NoiseInv Steps": 9,
         "Region control": {"Region 1": REGIONS["bbox_controls"][0]}}  # fmt: skip
A1111_PAIRS = st.builds(
    "{}: {}".format,
    st.sampled_from(["Seed", "Size", "CFG scale", "Sampler", "Schedule type", "Model", "VAE", "TI hashes", "Lora hashes", "Hires steps",
                     "Denoising strength", "Tiled Diffusion", "multidiffusion_enabled", "multidiffusion_tile_width", "Hypertile U-Net",
                     "Hypertile U-Net swap size", "RNG", "Clip skip", "ControlNet 0"]),
    NUMBERS.map(str) | TEXT | st.sampled_from(["64x64", "True", '"a, b: c"', "{", "[1]", '{"a": 1}', '"', "1e400", "9" * 60]),
)  # fmt: skip
YAML_TAGS = st.sampled_from(
    ["", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "&a "]
)
YAML_VALUES = st.sampled_from(
    [
        "*a",
        "1e-4",
        "2001-99-99",
        "1:60",
        "0x",
        "<<",
        "=",
        "~",
        "[",
        "{}",
        "? x",
        "- a",
        ".nan",
        "IN01",
        "---",
        "4x",
        "''",
    ]
)
YAML_LINES = st.builds(
    "{}: {}{}".format,
    st.sampled_from(sorted(to_dict(TrainConfig()))) | TEXT | st.sampled_from(["<<", "?", "&a b", "1", "from_image"]),
    YAML_TAGS,
    YAML_VALUES | TEXT | NUMBERS.map(str),
)
GRAMMAR = st.lists(st.sampled_from(["(", ")", "[", "]", ":", "1.2", "\\", "BREAK", " ", "fox", "-", "."])).map("".join)
FORMATS = st.lists(
    st.sampled_from(["{", "}", "n", "h", ":", "05d", "!r", "..", "/", "\\", "x", "con", ".", " ", "9", "\ud800"])
).map("".join)


def _written(read: Callable[[Path], object], name: str) -> Callable:
    """What reads such a file, given its content."""

    def write_and_read(folder: Path, content) -> None:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        read(path)

    return write_and_read


def _from_header(good: dict, name: str) -> Callable:
    def read(folder: Path, header) -> None:
        (folder / "x.safetensors").write_bytes(save(good[f"{name} tensors"], {"sd_hyena": json.dumps(header)}))
        load_students(folder / "x.safetensors")

    return read


def _run(folder: Path, content: bytes) -> None:
    path = folder / "out" / "run" / "checkpoints" / "step-00003.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent.parent / "config.yaml").touch()
    path.write_bytes(content)
    Resumable.find(TrainConfig(resume=str(path)))


def _picture(folder: Path, metadata) -> None:
    path = folder / "picture.png"
    path.unlink(missing_ok=True)
    write_image(path, Image.new("RGB", (4, 4)), "", metadata)
    read_metadata(path)
    parse(GenerateConfig, ["--from", str(path)])


def _png(path: Path) -> None:
    read_metadata(path)
    parse(GenerateConfig, ["--from", str(path)])


def _weights(path: Path) -> None:
    for read in (check_weights, read_checkpoint, load_students):
        read(path)


def _foreign(path: Path) -> None:
    read_texts(path)
    parse(GenerateConfig, ["--from", str(path)])


def _block(path: Path) -> None:
    text = f"a\nSteps: 5, Tiled Diffusion: {json.dumps(path.read_text('utf-8', 'replace'))}"
    infotext.options(text, "x")
    info = PngInfo()
    info.add_itxt("parameters", text)
    Image.new("RGB", (4, 4)).save(path.with_suffix(".png"), pnginfo=info)
    read_regions(path.with_suffix(".png"))


LAYERS = {"to_q": nn.Linear(8, 8, bias=False), "conv": nn.Conv2d(4, 8, 3), "norm": nn.LayerNorm(8)}
MODULES = st.sampled_from([f"{start}{name}" for name in (*LAYERS, "other") for start in ("lora_unet_", "unet.", "x.")])
PARTS = st.sampled_from(
    "lora_up.weight lora_down.weight lora_mid.weight lora_A.weight lora_B.default.weight hada_w1_a hada_w1_b hada_w2_a "
    "hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w2 lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2 oft_blocks oft_diag rescale "
    "weight on_input ia3_l a1.weight a2.weight b1.weight b2.weight diff diff_b w_norm b_norm alpha scale dora_scale "
    "lora_magnitude_vector x".split()
)
WHOLE = {  # families as they are, for some of their tensors to be changed
    family: {f"lora_unet_{name}.{part}": value for part, value in factors_of(family, LAYERS[name].weight.shape).items()}
    for family in FAMILIES
    for name in ("to_q", "conv")
} | {"CP": {f"lora_unet_conv.{part}": value for part, value in factors_of("CP", (8, 4, 3, 3)).items()}}


@st.composite
def tensors(draw) -> torch.Tensor:
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 8, 9]), max_size=4))
    dtype = draw(st.sampled_from([torch.float32] * 4 + [torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]))
    value = draw(st.sampled_from([0.0, 1.0, -0.5, 1e-40, 1e30, -3e38, float("nan")]))
    return torch.full(shape, value).to(dtype)


@st.composite
def lora_tensors(draw) -> dict[str, torch.Tensor]:
    """A good file's with a few that are lost, of other shapes and dtypes, or strangers; or strangers alone."""
    found = dict(draw(st.sampled_from([*WHOLE.values(), {}])))
    for name in draw(st.lists(st.sampled_from(sorted(found)), max_size=2, unique=True)) if found else ():
        found.pop(name, None)
        if draw(st.booleans()):
            found[name] = draw(tensors())
    return found | draw(
        st.dictionaries(st.builds("{}.{}".format, MODULES | TEXT_OF_NAMES, PARTS), tensors(), max_size=3)
    )


TEXT_OF_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def _lora(folder: Path, content: bytes | dict) -> None:
    """Read, applied to a small network, and taken back: what is refused and what is not leaves its bits alone."""
    path = folder / "x.safetensors"
    path.write_bytes(content if isinstance(content, bytes) else save(content))
    network = nn.ModuleDict(LAYERS)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in network.named_parameters()}
    try:
        with loras_in(SimpleNamespace(unet=network), [Given(read_lora(path), 0.5)]), torch.no_grad():
            network["to_q"](torch.ones(1, 8)), network["conv"](torch.ones(1, 4, 3, 3))
    finally:
        for name, weight in network.named_parameters():
            assert weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1])
        assert not any(module._forward_hooks for module in network.modules())


SMALL_UNET = dict(
    sample_size=8,
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=8,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


@functools.cache
def _steered() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small UNet, and its ControlNet in the original layout."""
    with torch.random.fork_rng():
        unet = UNet2DConditionModel(**SMALL_UNET)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(2, 2, 2, 2))
    return unet, in_the_original_layout(net)


@st.composite
def controlnet_tensors(draw) -> dict[str, torch.Tensor]:
    found = dict(_steered()[1])
    for name in draw(st.lists(st.sampled_from(sorted(found)), max_size=2, unique=True)):
        value = found.pop(name)
        if draw(st.booleans()):
            found[draw(st.just(name) | TEXT_OF_NAMES)] = draw(st.just(value) | tensors())
    return found


def _controlnet(folder: Path, content: bytes | dict) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(content if isinstance(content, bytes) else save(content))
    check_controlnet(str(path))
    load_controlnet(str(path), _steered()[0])


@functools.cache
def _upscalers() -> list[dict[str, torch.Tensor]]:
    """Weights of small ones of several architectures. Raises NotToBeHad."""
    swin = dict(img_size=8, embed_dim=8, depths=[1], num_heads=[2], window_size=4, mlp_ratio=1)
    dat = dict(img_size=8, embed_dim=32, depth=[1], num_heads=[2], split_size=[2, 4], expansion_factor=1, upscale=2)
    networks = [
        upscalers.compact(),
        upscalers.esrgan(2),
        upscalers.network("SwinIR", "SwinIR", **swin, upscale=2, upsampler="pixelshuffledirect"),
        upscalers.network("DAT", "DAT", **dat, upsampler="pixelshuffledirect"),
    ]
    return [*(net.state_dict() for net in networks), upscalers.in_new_names(upscalers.esrgan(4).state_dict())]


@st.composite
def upscaler_tensors(draw) -> dict[str, torch.Tensor]:
    """A good one's with a few that are lost, renamed, of other shapes, values and dtypes, or strangers."""
    found = dict(draw(st.sampled_from(_upscalers())))
    for name in draw(st.lists(st.sampled_from(sorted(found)), max_size=2, unique=True)):
        value, action = found.pop(name), draw(st.sampled_from(["remove", "rename", "replace", "fill", "reshape"]))
        if action == "rename":
            found[draw(TEXT_OF_NAMES | st.just(name.replace("0", "7")) | st.just(name.replace(".1.", ".33.")))] = value
        elif action == "replace":
            found[name] = draw(tensors())
        elif action == "fill":
            found[name] = torch.full_like(value, draw(st.sampled_from([0, 1, 2, 3, 63, 2**20, 2**31 - 1])))
        elif action == "reshape":
            found[name] = value.reshape(-1).repeat(draw(st.sampled_from([1, 1, 2, 3])))
    return found


def _upscaler(name: str) -> Callable[[Path, bytes | dict], None]:
    def read(folder: Path, content: bytes | dict) -> None:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else save(content))
        load_upscaler(path, torch.device("cpu"), torch.float32)

    return read


def _pickled(tensors: dict[str, torch.Tensor]) -> bytes:
    content = io.BytesIO()
    torch.save({"params_ema": tensors}, content)
    return content.getvalue()


def _eight_bits(path: Path) -> None:
    given_path.model(str(path))
    unquantised(averages_as_weights(read_checkpoint(path)))
    layout_of(averages_as_weights(without_scales(shapes_of(path))))


def _image(path: Path) -> None:
    read_picture(path)
    read_mask(path)


PARSERS = {
    "a LoRA": lambda good: (damaged(save(next(iter(WHOLE.values())))), _lora),
    "the tensors of a LoRA": lambda good: (lora_tensors(), _lora),
    "a ControlNet": lambda good: (damaged(save(_steered()[1])), _controlnet),
    "the tensors of a ControlNet": lambda good: (controlnet_tensors(), _controlnet),
    "an upscaler": lambda good: (
        st.sampled_from(_upscalers()[:2]).map(save).flatmap(damaged), _upscaler("x.safetensors")
    ),
    "an upscaler's .pth": lambda good: (damaged(_pickled(_upscalers()[0])), _upscaler("x.pth")),
    "the tensors of an upscaler": lambda good: (upscaler_tensors(), _upscaler("x.safetensors")),
    "a .safetensors": lambda good: (damaged(good["causal.safetensors"]), _written(_weights, "x.safetensors")),
    "a .pt": lambda good: (damaged(good["causal.pt"]), _written(_weights, "x.pt")),
    "an embedding": lambda good: (damaged(good["word.pt"]), _written(lambda path: read_embeddings(str(path)), "x.pt")),
    "a file of torch before 1.6": lambda good: (damaged(good["old.ckpt"]), _written(_weights, "x.ckpt")),
    "float8 with scales": lambda good: (damaged(good["eight.safetensors"]), _written(_eight_bits, "x.safetensors")),
    "a mask": lambda good: (damaged(good["mask.png"]) | damaged(good["mask.tif"]), _written(_image, "x.png")),
    "a text": lambda good: (
        st.binary(max_size=60) | damaged("Ein Kreis, ○".encode("utf-16")), _written(read_text, "x.txt")
    ),
    "a checkpoint to resume": lambda good: (damaged(good["ckpt"]), _run),
    "the header of a 1-D student": lambda good: (altered(good["causal header"]), _from_header(good, "causal")),
    "the header of a 2-D student": lambda good: (altered(good["hyena2d header"]), _from_header(good, "hyena2d")),
    "the header of 2-D landmarks": lambda good: (altered(good["landmarks header"]), _from_header(good, "landmarks")),
    "a PNG": lambda good: (damaged(good["png"]), _written(_png, "x.png")),
    "the metadata of a PNG": lambda good: (altered(good["picture"]), _picture),
    "A1111's parameters": lambda good: (
        TEXT | damaged(A1111.encode()).map(lambda b: b.decode("utf-8", "surrogateescape")),
        lambda _, text: infotext.options(text, "x"),
    ),
    "a JPEG's user comment": lambda good: (
        st.binary(max_size=60) | damaged(b"UNICODE\0" + A1111.encode("utf-16-be")),
        lambda _, comment: infotext.options(user_comment(comment), "x"),
    ),
    "a JPEG": lambda good: (damaged(good["jpg"]), _written(_foreign, "x.jpg")),
    "a WebP": lambda good: (damaged(good["webp"]), _written(_foreign, "x.webp")),
    "A1111's keys": lambda good: (
        st.lists(A1111_PAIRS, max_size=6).map(lambda pairs: "a\nSteps: 5, " + ", ".join(pairs)),
        lambda _, text: infotext.options(text, "x"),
    ),
    "ComfyUI's graph": lambda good: (
        altered(COMFYUI).map(json.dumps) | damaged(json.dumps(COMFYUI).encode()).map(lambda b: b.decode("utf-8", "replace")),
        lambda _, text: comfyui.options(text, "x"),
    ),
    "InvokeAI's metadata": lambda good: (
        altered(INVOKEAI).map(json.dumps),
        lambda _, text: (invokeai.options(text, "x"), invokeai.options_of_version_2(text, "x")),
    ),
    "Tiled Diffusion's block": lambda good: (
        altered(BLOCK).map(str) | damaged(str(BLOCK).encode()).map(lambda b: b.decode("utf-8", "replace")),
        _written(lambda path: _block(path), "x.txt"),
    ),
    "constructs of a prompt": lambda good: (
        st.lists(st.sampled_from([*"[]()|:<>{}_\\ ", "a", "1.5", "AND", "lora", "__", "$$"])).map("".join) | TEXT,
        lambda _, text: check_text_of(text, "prompt"),
    ),
    "regions": lambda good: (
        altered(REGIONS).map(json.dumps) | damaged(json.dumps(REGIONS).encode()),
        _written(read_regions, "x.json"),
    ),
    "a prompt": lambda good: (TEXT | GRAMMAR, lambda _, text: prompt.parse(text)),
    "a name format": lambda good: (TEXT | FORMATS, lambda _, text: check_format(text, "nh").format(n=10**6, h=3).encode()),
    "a YAML file": lambda good: (
        st.lists(YAML_LINES, max_size=4).map("\n".join) | damaged(yaml.safe_dump(to_dict(TrainConfig())).encode()),
        _written(lambda path: parse(TrainConfig, ["--config", str(path)]), "x.yaml"),
    ),
    "a recipe": lambda good: (
        st.lists(YAML_LINES, max_size=6).map("\n---\n".join),
        _written(lambda path: read_recipe([str(path)]), "x.yaml"),
    ),
    "the command line": lambda good: (
        st.lists(st.sampled_from(["-W", "-H", "--seed=", "-c", "--hyena", "-p", "64", "1e3", "nan"]) | TEXT, max_size=4),
        lambda _, arguments: parse(GenerateConfig, [a for a in arguments if a not in ("-h", "--help")]),
    ),
}  # fmt: skip


@dataclass
class Tally:
    read: int = 0
    refused: int = 0


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """What an error was raised in place of; its message may quote whatever the input says."""
    while error is not None:
        yield error
        error = error.__context__


def feed(parser: str, good: dict, folder: Path, examples: int, **chosen: bool) -> Tally:
    """Give the parser so many inputs; anything but an answer or a one-line BadInput fails, with the input in hand."""
    try:
        inputs, read = PARSERS[parser](good)
    except NotToBeHad as error:
        pytest.skip(f"no spandrel to test with: {error}")
    tally = Tally()

    quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))

    @settings(max_examples=examples, **quiet, **chosen)
    @given(inputs)
    def meets(content):
        try:
            read(folder, content)
            tally.read += 1
        except BadInput as error:
            tally.refused += 1
            assert not any(
                isinstance(cause, (MemoryError, RuntimeError)) and is_out_of_memory(cause) for cause in causes(error)
            )
            assert len(str(error).splitlines()) <= 1, str(error)

    with torch.random.fork_rng():
        meets()
    return tally


@pytest.mark.parametrize("parser", sampled(PARSERS, 2))
def test_any_input_is_read_or_refused_in_one_line(parser, good, tmp_path):
    """The same inputs each time: among sixty others there may be none to refuse."""
    assert feed(parser, good, tmp_path, 60, derandomize=True).refused + (parser == "a prompt") > 0


@pytest.mark.slow
@pytest.mark.parametrize("parser", PARSERS)
def test_any_of_20_000_inputs_is_read_or_refused_in_one_line(parser, good, tmp_path):
    assert feed(parser, good, tmp_path, 20_000).refused + (parser == "a prompt") > 0
