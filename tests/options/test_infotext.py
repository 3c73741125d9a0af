import json
import re
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.models.location import model_sha256
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.infotext import options, parameters
from sd_hyena.options.prompt_constructs import check_text_of
from sd_hyena.options.sampler import KARRAS, SAMPLERS
from sd_hyena.options.shipped import SHIPPED_MODEL
from tests.faults.conftest import ended
from tests.gate import sampled


def a1111(text: str) -> dict[str, str]:
    """The documented grammar of A1111's `parameters`, as an oracle: prompt, negative prompt, `key: value` pairs."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    result, part = {"Prompt": [], "Negative prompt": []}, "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            part, line = "Negative prompt", line.removeprefix("Negative prompt:").strip()
        result[part].append(line)
    found = {key: json.loads(value) if value.startswith('"') else value.strip() for key, value in pairs}
    return {key: "\n".join(value).strip() for key, value in result.items()} | found


def test_a1111_reads_what_we_write():
    config = GenerateConfig(
        prompt="a fox, (snow:1.2)\nsecond line", negative_prompt="blur, text", scheduler="dpm++_2m", karras=True, seed=42,
        steps=31, cfg_scale=6.5, width=768, height=512, clip_skip=2,
    )  # fmt: skip
    read = a1111(parameters(to_dict(config), 'tiny, "sd"', "0123456789abcdef", "IN01:hyena, OUT11:hyena"))
    assert read["Prompt"] == "a fox, (snow:1.2)\nsecond line" and read["Negative prompt"] == "blur, text"
    assert (read["Steps"], read["Sampler"], read["CFG scale"], read["Seed"]) == ("31", "DPM++ 2M Karras", "6.5", "42")
    assert (read["Size"], read["Model hash"], read["Model"]) == ("768x512", "0123456789", 'tiny, "sd"')
    assert read["Hyena"] == "IN01:hyena, OUT11:hyena" and read["Clip skip"] == "2"
    square = a1111(parameters(to_dict(GenerateConfig(width=640).filled()), "m", "0" * 64))
    assert square["Size"] == "640x640" and "Clip skip" not in square


def is_plain(text: str) -> bool:
    try:
        check_text_of(text, "prompt")
        return True
    except BadInput:
        return False


prompts = (
    st.text(string.printable.replace("\r", "") + "é💥", max_size=80)
    .map(lambda text: "\n".join(line.strip() for line in text.replace("Negative prompt:", "").strip().split("\n")))
    .filter(is_plain)
)  # what is refused as a construct is tested elsewhere
configs = st.fixed_dictionaries(
    dict(
        prompt=prompts,
        negative_prompt=prompts,
        scheduler=st.sampled_from(sorted(SAMPLERS)),
        steps=st.integers(1, 999),
        cfg_scale=st.integers(0, 300).map(lambda tenths: tenths / 10),
        seed=st.integers(0, 2**32 - 1),
        width=st.integers(8, 500).map(lambda cells: 8 * cells),
        height=st.integers(8, 500).map(lambda cells: 8 * cells),
        clip_skip=st.integers(1, 12),
    )
)


@given(configs, st.booleans(), st.text(string.printable, max_size=30))
@settings(max_examples=300, deadline=None)
def test_we_read_what_we_write_and_so_does_a1111(values, karras, model):
    values |= {"karras": karras and values["scheduler"] in KARRAS}
    text = parameters(to_dict(GenerateConfig(**values)), model, "f" * 64)
    found = options(text, "x")
    assert found.options | {"clip_skip": values["clip_skip"]} == values and not found.left
    assert all(hash_ == "f" * 10 for _, hash_ in found.names.get("model", []))
    oracle = a1111(text)
    assert (oracle["Prompt"], oracle["Negative prompt"]) == (values["prompt"], values["negative_prompt"])
    assert oracle["Steps"] == str(values["steps"]) and oracle["Seed"] == str(values["seed"])
    assert (
        oracle["Size"] == f"{values['width']}x{values['height']}" and float(oracle["CFG scale"]) == values["cfg_scale"]
    )
    assert oracle["Model hash"] == "f" * 10


OLD = """masterpiece, (fox:1.2), [snow], <lora:fur:0.7>
second line: a, b: c, d: e
Negative prompt: (worst quality:1.4), blur
Negative prompt: more of it
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 4294967294, Size: 768x512, Model hash: 93b79e09ed, \
Model: any-v4, Conditional mask weight: 1.0, Clip skip: 2, ENSD: 31337"""
NEW = """a fox
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x640, Model hash: 93b79e09ed, \
Model: v1-5, Lora hashes: "fur: aabbcc, Seed: 99", TI hashes: "easy: ddeeff", Hires upscale: 2, Version: v1.10.1"""


def test_an_older_image_of_a1111_is_read():
    found = options(OLD, "x")
    assert found.options == dict(
        prompt="masterpiece, (fox:1.2), [snow], <lora:fur:0.7>\nsecond line: a, b: c, d: e",
        negative_prompt="(worst quality:1.4), blur\nmore of it", steps=20, scheduler="dpm++_2m", karras=True,
        cfg_scale=7.5, seed=4294967294, width=768, height=512, clip_skip=2,
    )  # fmt: skip
    assert [text for text, _ in found.left] == ["noise of a GPU (no RNG: CPU)", "ENSD 31337"]
    assert found.names == {"model": [("any-v4", "93b79e09ed")]}


def test_a_newer_image_of_a1111_is_read_and_keys_inside_quotes_are_not():
    found = options(NEW, "x")
    assert found.options == dict(
        prompt="a fox", negative_prompt="", steps=25, scheduler="dpm++_2m", karras=True, cfg_scale=7.0, seed=1,
        width=512, height=640, hires=2.0, grow="auto", grow_strength=0.7, grow_steps=25,
    )  # fmt: skip
    assert [text for text, _ in found.left] == ["noise of a GPU (no RNG: CPU)"]
    assert found.names["lora"] == [("fur", "aabbcc")] and found.names["embeddings"] == [("easy", "ddeeff")]


@pytest.mark.parametrize(
    "sampler, schedule, expected, unknown",
    [
        ("Euler a", "Automatic", ("euler_a", False), []),
        ("DPM++ 2M", "Automatic", ("dpm++_2m", True), []),
        ("DPM++ 2M", "", ("dpm++_2m", False), []),
        ("DPM++ 2M SDE", "Automatic", ("dpm++_2m_sde", False), ["schedule 'Exponential'"]),
        ("DPM++ 2M SDE Karras", "", ("dpm++_2m_sde", True), []),
        ("Euler", "SGM Uniform", ("euler", False), ["schedule 'SGM Uniform'"]),
        ("UniPC", "Uniform", ("unipc", False), []),
        ("Restart", "Karras", None, ["sampler 'Restart'"]),
        ("", "", None, []),
    ],
)
def test_samplers_and_their_noise_levels(sampler, schedule, expected, unknown):
    pairs = {"Steps": 5, "Sampler": sampler, "Schedule type": schedule}
    found = options("a\n" + ", ".join(f"{key}: {value}" for key, value in pairs.items() if value) + ", RNG: CPU", "x")
    assert [text for text, _ in found.left] == unknown
    assert (found.options.get("scheduler"), found.options.get("karras")) == (expected or (None, None))


DAMAGED = [
    "", "a fox", "a fox\nNegative prompt: b", "Steps: many, Seed: 1, Size: 64x64", "Steps: 5, Seed: , Size: 64x64",
    "Steps: 5, Size: 64", "Steps: 5, Size: 64x64x64", "Steps: 5, CFG scale: high, Seed: 2", "Steps: 5, Clip skip: 1.5",
    "Steps: 20, Seed: " + "9" * 5000, "Seed: 1, Size: 64x64, Sampler: Euler", '{"prompt": "a workflow", "steps": 3}',
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_text_is_one_clear_line(text):
    with pytest.raises(BadInput, match=r"^x\.png: its parameters are damaged") as error:
        options(text, "x.png")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["Steps:", " 5", ",", '"', "\\", "Size: 6x4", "\n", "a"])).map("".join)
)
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_or_refused(text):
    for given_text in (text, f"{text}\nSteps: 5, {text}"):
        try:
            found = options(given_text, "x")
        except BadInput:
            continue
        assert set(found.options) <= set(to_dict(GenerateConfig())) and all(
            isinstance(text, str) for text, _ in found.left
        )


@pytest.mark.parametrize("piece", sampled(["a,", 'a:"\\q",', 'a:"x,', "a:   ", "\n", '\\"', "Steps: 5,"], 3))
def test_enormous_texts_are_read_or_refused(piece):
    try:
        options(piece * 20_000 + ", Steps: 5", "x")
    except BadInput as error:
        assert len(str(error)) < 200


def png(path, text: str):
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


def test_from_takes_the_options_of_an_a1111_image_and_flags_win(tmp_path):
    (tmp_path / "loras").mkdir()
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, tmp_path / "loras" / "fur.safetensors")
    given = ["--from", png(tmp_path / "x.png", OLD), "-s", "3", "--lora_dir", str(tmp_path / "loras")]
    config = parse(GenerateConfig, given)
    assert config.lora == f"{tmp_path / 'loras' / 'fur.safetensors'}:0.7"
    assert config.prompt == "masterpiece, (fox:1.2), [snow],\nsecond line: a, b: c, d: e"
    assert (config.seed, config.steps, config.width, config.height, config.clip_skip) == (4294967294, 3, 768, 512, 2)
    assert (config.scheduler, config.karras, config.num_images) == ("dpm++_2m", True, 1)


def test_what_cannot_be_had_is_said(tmp_path, capsys):
    text = "a\nSteps: 5, Sampler: {}, Schedule type: Karras, Seed: 1, Size: 64x64"
    config = parse(GenerateConfig, ["--from", png(tmp_path / "x.png", text.format("Restart"))])
    assert config.scheduler == "ddim" and not config.karras
    assert "so the picture will differ: sampler 'Restart'; noise of a GPU" in capsys.readouterr().out
    config = parse(GenerateConfig, ["--from", png(tmp_path / "x.png", text.format("Restart")), "--scheduler", "heun"])
    assert config.scheduler == "heun" and "Restart" not in capsys.readouterr().out
    config = parse(GenerateConfig, ["--from", png(tmp_path / "x.png", text.format("Euler a"))])
    assert config.scheduler == "euler_a" and not config.karras
    assert "Karras' noise levels for euler_a" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["a\nSteps: 5, Size: 65x64", "a\nSteps: 5, Seed: 18446744073709551616", "a\nSteps: 5, CFG scale: nan"]
)
def test_values_beyond_our_rules_are_one_line_too(tmp_path, text):
    with pytest.raises(BadInput) as error:
        parse(GenerateConfig, ["--from", png(tmp_path / "x.png", text)])
    assert "\n" not in str(error.value)


def test_the_command_draws_an_a1111_image_again_and_writes_what_it_read(tmp_path):
    text = "a (red:1.2) circle\nNegative prompt: [blue]\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 7, Size: 72x64, Clip skip: 2"
    done = ended(tmp_path, GenerateConfig, "--from", png(tmp_path / "x.png", text), "-o", tmp_path / "again")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "again" / "image_000.png") as image:
        assert image.size == (72, 64)
        read = a1111(image.info["parameters"])
    expected = a1111(text) | {"Model hash": model_sha256(SHIPPED_MODEL)[:10]}
    assert {key: read[key] for key in expected} == expected
    damaged = ended(tmp_path, GenerateConfig, "--from", png(tmp_path / "y.png", "Steps: x"), "-o", tmp_path / "again")
    assert damaged.code == 2 and "damaged" in damaged.last_line and "Traceback" not in damaged.err
