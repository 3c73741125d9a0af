import json

import pytest
import torch
from diffusers import DDPMScheduler

from sd_hyena.errors import BadInput
from sd_hyena.files.hashes import file_sha256 as sha256
from sd_hyena.models.example_prompts import prompts_of
from sd_hyena.models.location import model_path, model_sha256
from sd_hyena.models.prediction import as_noise
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.processes.device import pick_device, pick_dtype


def test_the_default_model_is_the_shipped_one():
    assert model_path("") == SHIPPED_MODEL
    assert model_sha256(SHIPPED_MODEL) == sha256(SHIPPED_MODEL / "unet" / "diffusion_pytorch_model.safetensors")


def test_another_kind_of_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(BadInput, match="looks like a FluxPipeline"):
        model_path(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"no": "class"}'])
def test_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(BadInput, match="damaged"):
        model_path(str(tmp_path))


def test_truncated_weights_are_found_before_the_model_is_loaded(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "unet").mkdir()
    whole = (SHIPPED_MODEL / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="not a valid safetensors file"):
        model_path(str(tmp_path))


def test_prompts_come_from_the_file_the_model_or_the_natural_list(tmp_path):
    (tmp_path / "mine.txt").write_text("\ufeffone\n\n two \n", "utf-8")
    assert prompts_of(SHIPPED_MODEL, str(tmp_path / "mine.txt")) == ["one", "two"]
    assert prompts_of(SHIPPED_MODEL)[0].split()[0] in ("a", "two", "three")
    assert len(prompts_of(tmp_path)) >= 50
    for content in (b"", b"\n\n", b"\xff\xfe\xff"):
        (tmp_path / "mine.txt").write_bytes(content)
        with pytest.raises(BadInput, match="prompts"):
            prompts_of(SHIPPED_MODEL, str(tmp_path / "mine.txt"))


def test_devices_and_precisions():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("tpu", "cuda:99", "cpu:x"):
        with pytest.raises(BadInput, match="device"):
            pick_device(name)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_prediction_told_as_noise_is_the_noise_whatever_the_model_predicts(kind):
    torch.manual_seed(0)
    scheduler = DDPMScheduler(prediction_type=kind)
    x0, noise, t = torch.randn(1, 4, 5, 7), torch.randn(1, 4, 5, 7), torch.tensor([640])
    predicted = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, t)
    tokens = lambda x: x.flatten(2).mT
    found = as_noise(scheduler, tokens(predicted), scheduler.add_noise(x0, noise, t), t)
    torch.testing.assert_close(found, tokens(noise), atol=1e-5, rtol=1e-5)
