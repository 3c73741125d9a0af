"""Nothing that is drawn differs from what was asked without a line that says so: every option of generate.py has an effect
that can be seen, in pixels, files, evaluations or notes, or is refused by name. A new option needs a line here."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.generate.engine import Engine
from sd_hyena.generate.generation import generate
from sd_hyena.generate.watch import Watch
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.command import run
from sd_hyena.options.command_line import parse
from sd_hyena.options.effect import in_vain
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01
from tests.fixtures import controlnet_of

SMALL = dict(width=64, steps=1, num_images=1, cfg_scale=3.0, seed=11, prompt="a red circle on blue")
TILES = dict(width=128, tiled_diffusion="multidiffusion", tile_width=8, tile_height=8, overlap=4)
START = dict(init_image="start.png", steps=4)
INVERSION = START | dict(noise_inversion=2)
HYPERTILE = dict(width=128, hypertile=32)
VAE = dict(START, width=128, tiled_vae="fast", encoder_tile_size=64, decoder_tile_size=8)
CONTROL = dict(controlnet="controlnet", control_image="hint.png")
STUDENT = dict(hyena="student.safetensors")

DRAWN = {  # option: the options beside it, and the value that is held against its default there
    "model": ({}, "model"),
    "vae": ({}, "model/vae"),
    "hyena": ({}, "student.safetensors"),
    "target": (STUDENT, "OUT11"),  # a note: the file says
    "prompt": ({}, "a blue square"),
    "negative_prompt": ({}, "a blue square"),
    "clip_skip": ({}, 2),
    "embeddings": (dict(prompt="a style circle"), "style.safetensors"),
    "width": ({}, 72),
    "height": ({}, 72),
    "scale": (dict(START, width=0), 1.5),
    "num_images": ({}, 2),
    "batch_size": (dict(num_images=2), 2),
    "steps": ({}, 2),
    "cfg_scale": ({}, 5.0),
    "iteration": ({}, 2),
    "seed": ({}, 12),
    "scheduler": (dict(steps=2), "euler_a"),
    "karras": (dict(scheduler="euler", steps=4), True),
    "out_dir": ({}, "elsewhere"),
    "name_format": ({}, "x{n}"),
    "format": ({}, "webp"),
    "grid": ({}, True),
    "compare": (STUDENT, True),
    "init_image": (dict(steps=4), "start.png"),
    "resize": (dict(START, width=64, height=96), "fit"),
    "strength": (START, 0.9),
    "hires": (dict(steps=4), 2.0),
    "grow_strength": (dict(steps=4, hires=2.0), 0.8),
    "grow_steps": (dict(steps=4, hires=2.0), 3),
    "grow_options": (dict(grow="demofusion"), "c1=2.0"),  # a note: the canvas is not larger than the model's own
    "circular": ({}, True),
    "noise_inversion": (START, 2),
    "retouch": (INVERSION, 3.0),
    "renoise_strength": (INVERSION, 0.2),
    "renoise_kernel": (INVERSION, 2),
    "mask": (START, "mask.png"),
    "control_image": (CONTROL, "start.png"),
    "control_scale": (CONTROL, 0.3),
    "lora": ({}, "fur.safetensors"),
    "lora_dir": (dict(prompt="a fox <lora:fur:1>"), "."),
    "tiled_diffusion": (TILES | dict(tiled_diffusion="off"), "multidiffusion"),
    "tile_width": (TILES, 12),
    "tile_height": (TILES, 12),
    "overlap": (TILES, 1),
    "tile_batch_size": (TILES, 1),
    "tile_weights": (TILES, "uniform"),
    "regions": ({}, "regions.json"),
    "draw_background": (TILES | dict(regions="regions.json"), True),
    "tiled_vae": (dict(width=128, decoder_tile_size=8), "fast"),
    "encoder_tile_size": (VAE, 32),
    "decoder_tile_size": (VAE, 12),
    "color_fix": (VAE, True),
    "hypertile": ({}, 32),
    "hypertile_swap": (HYPERTILE, 1),
    "hypertile_depth": (HYPERTILE, 1),
    "attn_shape": ({}, "brick"),  # a note: it cuts nothing at this size
    "ff_chunk_size": ({}, 16),
    "attention_backend": ({}, "math"),
    "optimize": ({}, "halves"),
    "keep_attention": (STUDENT, "IN01"),
    "device": ({}, "cuda"),
    "offload": ({}, "model"),
    "dtype": ({}, "bfloat16"),
    "allow_huge": (dict(width=16392, model="nowhere"), True),  # one rule refuses the width, another then the model
}  # fmt: skip
TOLD = {  # what has its effect on the command line
    "from_image": ["--from", "old.png"],
    "model_dir": ["--from", "old.png", "--model_dir", "."],
    "vae_dir": ["--from", "old.png", "--vae_dir", "."],
    "embedding_dir": ["--from", "old.png", "--embedding_dir", "."],
}
ALONE = ("controlnet", "debug", "upscaler", "grow", "save_stages")  # below; generate/test_upscaled_start, test_growth


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_pipe):
    """A folder with one of each: another model, a student, pictures, a ControlNet, a LoRA, a style, regions."""
    folder = tmp_path_factory.mktemp("options")
    torch.manual_seed(0)
    other = load_pipeline(SHIPPED_MODEL, torch.device("cpu"), torch.float32)
    for part in (other.unet.conv_out, other.vae.decoder.conv_out):
        part.weight.data.mul_(1.5)
    other.save_pretrained(folder / "model")
    save_students(
        folder / "student.safetensors",
        StudentFile({IN01: build_student(StudentSpec(IN01, "IN01", 32, "pointwise", {}, None))}),
    )
    controlnet_of(shared_pipe.unet, 1).save_pretrained(folder / "controlnet")
    key = f"unet.{IN01}.to_v"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(1, 32), f"{key}.lora_B.weight": torch.ones(32, 1)},
        folder / "fur.safetensors",
    )
    save_file({"emb_params": torch.randn(1, 96)}, folder / "style.safetensors")
    noise = np.random.default_rng(0)
    for name in ("start", "hint"):
        Image.fromarray(noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64)).save(folder / f"{name}.png")
    Image.fromarray(np.repeat([[0], [255]], [32, 32], axis=0).repeat(64, axis=1).astype(np.uint8)).save(
        folder / "mask.png"
    )
    boxes = [{"x": x, "y": 0, "w": 0.6, "h": 1, "prompt": prompt} for x, prompt in ((0, "a"), (0.4, "a blue square"))]
    (folder / "regions.json").write_text(json.dumps({"bbox_controls": boxes}))
    info = PngInfo()
    info.add_text("parameters", 'a\nSteps: 5, Seed: 1, Model: fur, VAE: gone.pt, TI hashes: "style: 0123456789ab"')
    Image.new("RGB", (8, 8)).save(folder / "old.png", pnginfo=info)
    return folder


@pytest.fixture(scope="module")
def engine():
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def known():
    """What was observed already, by the options."""
    return {}


@pytest.fixture
def evaluations(monkeypatch):
    """What the networks compute: shapes and kernels of UNet and feed-forward layers."""
    seen = []
    for kind in (UNet2DConditionModel, FeedForward):
        original = kind.forward

        @functools.wraps(original)  # with its signature, which tiling reads
        def counted(self, *args, original=original, **kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
            seen.append((type(self).__name__, tuple(x.shape), x.dtype, kernels))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    return seen


class Noting(Watch):
    def __init__(self):
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


def observed(engine, evaluations, options: dict) -> dict | str:
    """What a drawing shows, or why it is refused; not what its metadata repeat of the options."""
    evaluations.clear()
    watch = Noting()
    try:
        paths = generate(GenerateConfig(**{**SMALL, "out_dir": "out", **options}), engine, watch)
    except BadInput as error:
        assert "\n" not in str(error)
        return str(error)
    pixels = [np.array(Image.open(path)).tobytes() for path in paths]
    names = [path.name for path in paths], [path.parent.name for path in paths]
    for path in paths:
        path.unlink()
    notes = [line for line in watch.notes if " · " not in line]  # but for the summary, which repeats options
    return dict(pixels=pixels, names=names, notes=notes, evaluations=list(evaluations))


def test_every_option_has_a_line_here():
    assert {f.name for f in dataclasses.fields(GenerateConfig)} == DRAWN.keys() | TOLD.keys() | set(ALONE)


@pytest.mark.parametrize("option", DRAWN)
def test_an_option_is_used_or_named(option, folder, engine, evaluations, known, monkeypatch):
    monkeypatch.chdir(folder)
    beside, value = DRAWN[option]
    (default,) = (f.default for f in dataclasses.fields(GenerateConfig) if f.name == option)
    assert value != beside.get(option, SMALL.get(option, default))
    if (key := json.dumps(beside)) not in known:
        known[key] = observed(engine, evaluations, beside)
    before, after = known[key], observed(engine, evaluations, beside | {option: value})
    assert after != before
    if isinstance(after, str) and not isinstance(before, str):
        assert option in after  # refused, and by its name
    unsaid = isinstance(after, dict) and isinstance(before, dict) and after["evaluations"] == before["evaluations"]
    if unsaid and after["pixels"] == before["pixels"] and after["names"] == before["names"]:
        assert any(option in note for note in after["notes"])


@pytest.mark.parametrize("option", TOLD)
def test_an_option_of_the_command_line_is_used_or_named(option, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def told(arguments: list[str]) -> tuple:
        try:
            config = parse(GenerateConfig, arguments)
        except BadInput as error:
            return (str(error),)
        return config.model, config.vae, config.embeddings, config.steps, capsys.readouterr().out

    assert told(TOLD[option]) != told(TOLD[option][:-2])


def test_a_controlnet_needs_its_picture_and_debug_shows_the_traceback(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(BadInput, match="controlnet='controlnet' needs --control_image too"):
        GenerateConfig(controlnet="controlnet")

    def main(config):
        raise BadInput("no")

    codes, errors = [], []
    for flags in ([], ["--debug"]):
        codes.append(run(GenerateConfig, main, ["-p", "a", *flags]))
        errors.append(capsys.readouterr().err)
    assert codes == [2, 2] and "Traceback" in errors[1] and "Traceback" not in errors[0]


IN_VAIN = {
    "resize": "fit", "strength": 0.9, "retouch": 2.0, "renoise_strength": 0.5, "renoise_kernel": 32, "control_scale": 0.5, "tile_width": 32,
    "tile_height": 32, "overlap": 8, "tile_batch_size": 2, "tile_weights": "uniform", "draw_background": True, "compare": True,
    "encoder_tile_size": 512, "decoder_tile_size": 64, "color_fix": True, "hypertile_swap": 3, "hypertile_depth": 1,
    "keep_attention": "IN01", "target": "OUT11", "upscaler": "x.pth", "grow_strength": 0.5, "grow_steps": 5, "save_stages": True,
}  # fmt: skip


@pytest.mark.parametrize("option", IN_VAIN)
def test_what_is_given_in_vain_is_told(option):
    (line,) = in_vain(GenerateConfig(**{option: IN_VAIN[option]}))
    assert line.startswith(f"note: {option}={IN_VAIN[option]!r} has no effect here, it needs --")
    assert in_vain(GenerateConfig()) == []


def test_a_negative_prompt_without_guidance_is_told_and_the_whole_list_is_tried():
    (line,) = in_vain(GenerateConfig(negative_prompt="blur", cfg_scale=1.0))
    assert "it needs --cfg_scale above 1" in line and in_vain(GenerateConfig(negative_prompt="blur")) == []
    needing = {f.name for f in dataclasses.fields(GenerateConfig) if f.metadata["needs"]}
    assert needing == IN_VAIN.keys() | {"negative_prompt", "grow_options"}
    assert in_vain(GenerateConfig(width=4096, tile_width=64, decoder_tile_size=64)) == []  # auto is on
