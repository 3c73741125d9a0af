"""Students without training: attention itself where landmarks abound, near it where they do not, for any layout."""

import types

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import read_metadata
from sd_hyena.generate.generation import generate
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.landmarks import Landmarks
from sd_hyena.sites import find_sites
from sd_hyena.students.swap import swapped
from sd_hyena.students.untrained import untrained
from tests.fixtures import image_of

LEVEL0 = ["IN01", "IN02", "OUT09", "OUT10", "OUT11"]


@pytest.mark.parametrize(
    "entry, count, sites",
    [
        ("landmarks", None, ""),
        ("landmarks:64", 64, ""),
        ("landmarks:level0", None, "level0"),
        ("landmarks:32:IN01:OUT*", 32, "IN01,OUT*"),
        (" landmarks : all : 12 ", 12, "all"),
    ],
)
def test_the_forms_of_an_entry(entry, count, sites):
    assert Landmarks.read(entry) == Landmarks(count, sites)


@pytest.mark.parametrize("entry", ["landmarks:0", "landmarks:-3", "landmarks:", "landmarks:8:9", "landmarks:99999999"])
def test_an_entry_that_means_nothing_is_refused_in_one_line(entry):
    with pytest.raises(BadInput, match="must be landmarks, landmarks:COUNT"):
        parse(GenerateConfig, ["-y", entry])


def test_other_names_are_files_and_so_is_a_file_called_landmarks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Landmarks.read("landmarks.pt") is None and Landmarks.read("landmark") is None
    (tmp_path / "landmarks").touch()
    assert Landmarks.read("landmarks") is None


def test_with_as_many_landmarks_as_tokens_a_student_is_its_attention(pipe):
    students = untrained(pipe.unet, "all", 64)
    assert len(students) == 16 and not list(torch.nn.ModuleList(students.values()).parameters())
    plain = image_of(pipe)
    with swapped(pipe.unet, students):
        torch.testing.assert_close(image_of(pipe), plain, atol=1e-4, rtol=1e-4)


def test_fewer_landmarks_leave_little_of_the_attention_out_and_more_leave_less(unet, states):
    latents, timestep, condition = states
    with torch.no_grad():
        whole = unet(latents, timestep, **condition).sample
        spread = (whole - whole.mean()).square().mean()

        def error(count: int) -> float:
            with swapped(unet, untrained(unet, "all", count)):
                return float((unet(latents, timestep, **condition).sample - whole).square().mean() / spread)

        errors = [error(count) for count in (8, 24, 96)]
    assert errors == sorted(errors, reverse=True) and errors[0] < 0.1 and errors[1] < 0.03


def test_a_lora_on_a_replaced_site_is_followed(own_pipe):
    torch.manual_seed(0)
    own_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    with_attention = image_of(own_pipe)
    with swapped(own_pipe.unet, untrained(own_pipe.unet, "all", 64)):
        torch.testing.assert_close(image_of(own_pipe), with_attention, atol=1e-4, rtol=1e-4)


def test_stable_diffusion_2_and_sdxl_are_drawn_with_too(tiny_sdxl):
    torch.manual_seed(0)
    second = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[2, 4],
        cross_attention_dim=16,
        use_linear_projection=True,
        norm_num_groups=16,
    ).eval()
    latents, text = torch.randn(2, 4, 10, 6), torch.randn(2, 7, 16)
    with torch.no_grad():
        plain = second(latents, torch.tensor(500), text).sample
        for count, tolerance in ((60, 1e-4), (12, 0.3)):
            with swapped(second, untrained(second, "all", count)):
                torch.testing.assert_close(
                    second(latents, torch.tensor(500), text).sample, plain, atol=tolerance, rtol=tolerance
                )
    plain = image_of(tiny_sdxl)
    students = untrained(tiny_sdxl.unet, "all", 64)
    assert len(students) == len(find_sites(tiny_sdxl.unet)) > 5
    with swapped(tiny_sdxl.unet, students):
        torch.testing.assert_close(image_of(tiny_sdxl), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("loaded_once")
def test_the_picture_says_so_and_repeats_bit_for_bit(tmp_path, capsys):
    given = dict(width=64, height=72, steps=2, num_images=1, cfg_scale=3.0, seed=5, prompt="a red circle on blue")
    config = GenerateConfig(**given, hyena="landmarks:8:level0", out_dir=str(tmp_path / "a"))
    (path,) = generate(config)
    assert "landmarks:8:level0 at IN01 IN02 OUT09 OUT10 OUT11\n" in capsys.readouterr().out
    students = read_metadata(path)["students"]
    assert students == ", ".join(f"{short}:landmarks:8:level0" for short in LEVEL0)
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "b")])
    (plain,) = generate(GenerateConfig(**given, out_dir=str(tmp_path / "c")))
    first, second, other = (np.array(Image.open(p)) for p in (path, *generate(again), plain))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


@pytest.mark.usefixtures("loaded_once")
def test_without_a_choice_they_stand_where_they_make_a_site_cheaper(tmp_path, own_pipe, monkeypatch, capsys):
    black = lambda z: types.SimpleNamespace(sample=torch.zeros(len(z), 3, 8 * z.shape[2], 8 * z.shape[3]))
    monkeypatch.setattr(own_pipe.vae, "decode", black)  # nobody looks at these pictures
    given = dict(height=64, steps=1, num_images=1, cfg_scale=0.0, seed=5, out_dir=str(tmp_path))
    generate(GenerateConfig(**given, width=64, hyena="landmarks:64"))
    assert "landmarks:64 at no site: attention is cheaper at this size" in capsys.readouterr().out
    generate(GenerateConfig(**given, width=1024, hyena="landmarks:8"))
    assert "landmarks:8 at IN01 IN02 " in capsys.readouterr().out
    (path,) = generate(GenerateConfig(**given, width=1024, grow="off", hyena="landmarks"))
    said = "landmarks:128 at IN01 IN02 OUT09 OUT10 OUT11\n"
    told = capsys.readouterr().out
    assert said in told and "landmarks:128 (5 students)" in told
    assert read_metadata(path)["students"] == ", ".join(f"{short}:landmarks:128" for short in LEVEL0)
    several = "landmarks:8:IN01+landmarks:IN02:OUT1*"
    generate(GenerateConfig(**given, width=64, hyena=several))  # where as many as there are tokens is attention itself
    assert "landmarks:8:IN01 at IN01, landmarks:256:IN02:OUT1* at IN02 OUT10 OUT11\n" in capsys.readouterr().out
    with pytest.raises(BadInput, match="XX99"):
        generate(GenerateConfig(**given, width=64, hyena="landmarks:XX99"))
