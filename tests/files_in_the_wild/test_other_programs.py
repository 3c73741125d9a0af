"""Pictures of ComfyUI, InvokeAI and programs that are not read: what they are, and what of them could be taken."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.options import comfyui, invokeai
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.generate_config import GenerateConfig
from tests.faults.test_fuzz import altered

GRAPH = {  # as ComfyUI's default workflow is saved, with a LoRA, a VAE and a node that nobody knows
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1,
        "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd/v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 2}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox, embedding:easy", "clip": ["11", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blur", "clip": ["11", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["12", 0]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {"class_type": "LoraLoader", "inputs": {
        "lora_name": "a/fur.safetensors", "strength_model": 0.8, "strength_clip": 0.8, "model": ["4", 0], "clip": ["4", 1]}},
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
    "12": {"class_type": "VAELoader", "inputs": {"vae_name": "v.pt"}},
}  # fmt: skip
INVOKE = {
    "app_version": "5.0", "generation_mode": "txt2img", "positive_prompt": "a fox", "negative_prompt": "blur", "width": 512,
    "height": 768, "seed": 99, "rand_device": "cpu", "cfg_scale": 7.5, "cfg_rescale_multiplier": 0, "steps": 30,
    "scheduler": "dpmpp_2m_k", "clip_skip": 1, "model": {"key": "x", "hash": "blake3:1", "name": "v1-5", "base": "sd-1"},
    "loras": [], "controlnets": [], "vae": None, "strength": None, "hrf_enabled": False,
}  # fmt: skip
INVOKE_2 = {
    "model": "stable diffusion", "model_weights": "v1-5", "app_version": "2.3", "image": {
        "prompt": [{"prompt": "a fox [blur, text]", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5, "threshold": 0, "perlin": 0,
        "width": 512, "height": 512, "seed": 7, "sampler": "k_euler_a", "type": "txt2img", "variations": [], "hires_fix": False},
}  # fmt: skip


def changed(node: str, **inputs) -> dict:
    graph = copy.deepcopy(GRAPH)
    graph[node]["inputs"] |= inputs
    return graph


WITHOUT_LORA = {key: node for key, node in changed("3", model=["4", 0]).items() if key != "10"}
WITHOUT_LORA["11"] = {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["4", 1]}}


def comfy(graph) -> comfyui.Found:
    return comfyui.options(json.dumps(graph), "x.png")


def left(found) -> list[str]:
    return [text for text, _ in found.left]


def test_comfyui_s_graph_is_followed_from_its_sampler():
    found = comfy(GRAPH)
    assert found.options == dict(
        steps=20, cfg_scale=8.0, seed=156680208700286 % 2**32, scheduler="dpm++_2m", karras=True, width=512, height=640,
        prompt="a fox, embedding:easy <lora:fur:0.8>", negative_prompt="blur", clip_skip=2,
    )  # fmt: skip
    names = {"model": [("sd/v1-5.safetensors", "")], "vae": [("v.pt", "")], "embeddings": [("easy", "")]}
    assert found.names == names and not found.left and "seed 156680208700286 is taken as" in found.notes[0]


@pytest.mark.parametrize(
    "graph, named",
    [
        (changed("3", sampler_name="dpmpp_3m_sde"), "sampler 'dpmpp_3m_sde'"),
        (changed("3", scheduler="exponential"), "schedule 'exponential'"),
        (changed("3", sampler_name="euler_ancestral"), "Karras' noise levels for euler_a"),
        (changed("3", denoise=0.5), "the picture that it was drawn from (denoise 0.5); give --init_image"),
        (changed("10", strength_clip=0.5), "node LoraLoader"),
        (changed("6", text="a (fox:1.3)"), "ComfyUI's way of weighting words"),
        (changed("6", text=["99", 0]), "the prompt, whose text another node makes"),
        (GRAPH | {"20": {"class_type": "FreeU_V2", "inputs": {"model": ["4", 0]}}}, "node FreeU_V2"),
        (GRAPH | {"20": {"class_type": "ControlNetApply", "inputs": {}}}, "node ControlNetApply"),
        (changed("3", latent_image=["13", 0]) | {"13": {"class_type": "VAEEncode", "inputs": {}}}, "node VAEEncode"),
    ],
)
def test_what_comfyui_does_otherwise_is_named(graph, named):
    assert any(named in text for text in left(comfy(graph)))


def test_a_conditioning_between_is_followed_and_named_and_a_text_may_come_from_a_node_of_text():
    between = {"13": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0], "strength": 1}}}
    found = comfy(changed("3", positive=["13", 0]) | between)
    assert found.options["prompt"].startswith("a fox") and left(found) == ["node ControlNetApply"]
    found = comfy(
        changed("6", text=["13", 0]) | {"13": {"class_type": "String Literal", "inputs": {"string": "a cat"}}}
    )
    assert found.options["prompt"].startswith("a cat") and not found.left


def test_an_embedding_of_comfyui_is_found_by_its_name_or_named_and_not_drawn_as_text(tmp_path, capsys):
    graph = copy.deepcopy(WITHOUT_LORA)
    graph["6"]["inputs"]["text"] = "a fox, (embedding:styles/Easy.pt:1.1), embedding:gone, red"
    graph["7"]["inputs"]["text"] = "embedding:sub\\bad-hands.safetensors"
    info = PngInfo()
    info.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    save_file({"emb_params": torch.ones(1, 96)}, tmp_path / "easy.safetensors")
    config = parse(GenerateConfig, ["--from", str(tmp_path / "x.png"), "--embedding_dir", str(tmp_path)])
    assert config.prompt == "a fox, (embedding:easy:1.1), , red" and config.negative_prompt == ""
    assert config.embeddings == str(tmp_path / "easy.safetensors")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not followed" in line)
    assert "embedding 'gone' (is not in" in line and "embedding 'bad-hands' (is not in" in line and "'easy'" not in line


def test_two_samplers_or_none_are_refused_with_their_names():
    with pytest.raises(BadInput, match="drawn by 2 KSamplers of ComfyUI"):
        comfy(GRAPH | {"20": GRAPH["3"]})
    with pytest.raises(BadInput, match=r"0 KSamplers of ComfyUI .SamplerCustomAdvanced"):
        comfy({"1": {"class_type": "SamplerCustomAdvanced", "inputs": {}}})


def test_invokeai_s_metadata_are_read():
    found = invokeai.options(json.dumps(INVOKE), "x.png")
    assert found.options == dict(
        steps=30, cfg_scale=7.5, seed=99, width=512, height=768, prompt="a fox", negative_prompt="blur", scheduler="dpm++_2m",
        karras=True, clip_skip=2,
    )  # fmt: skip
    assert found.names == {"model": [("v1-5", "")]} and not found.left
    found = invokeai.options_of_version_2(json.dumps(INVOKE_2), "x.png")
    assert found.options == dict(
        prompt="a fox", negative_prompt="blur, text", steps=50, cfg_scale=7.5, seed=7, width=512, height=512,
        scheduler="euler_a", karras=False,
    )  # fmt: skip
    assert found.names == {"model": [("v1-5", "")]} and not found.left


@pytest.mark.parametrize(
    "change, named",
    [
        ({"scheduler": "kdpm_2"}, "sampler 'kdpm_2'"),
        ({"rand_device": "cuda"}, "rand_device cuda"),
        ({"seamless_x": True}, "seamless_x True"),
        ({"controlnets": [{"x": 1}]}, "controlnets"),
        ({"hrf_enabled": True}, "hrf_enabled True"),
        ({"generation_mode": "img2img"}, "give --init_image"),
        ({"positive_prompt": "a fox++"}, "compel's weights in its prompt"),
        ({"positive_style_prompt": "old"}, "a positive style prompt"),
        ({"cfg_rescale_multiplier": 0.7}, "cfg_rescale_multiplier 0.7"),
        ({"a_new_key": 3}, "a_new_key 3"),
    ],
)
def test_what_invokeai_does_otherwise_is_named(change, named):
    assert any(named in text for text in left(invokeai.options(json.dumps(INVOKE | change), "x.png")))


def test_invokeai_s_loras_stand_in_the_prompt():
    loras = [{"model": {"name": "fur"}, "weight": 0.7}, {"lora": {"model_name": "old"}, "weight": 1}]
    found = invokeai.options(json.dumps(INVOKE | {"loras": loras}), "x.png")
    assert found.options["prompt"] == "a fox <lora:fur:0.7> <lora:old:1>"


def png(path, **texts) -> str:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name.replace("__", "-"), text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


def test_the_command_says_whose_picture_it_is(tmp_path, capsys):
    config = parse(GenerateConfig, ["--from", png(tmp_path / "c.png", prompt=json.dumps(WITHOUT_LORA), workflow="{}")])
    assert (config.prompt, config.steps, config.width, config.num_images) == ("a fox", 20, 512, 1)
    assert "(ComfyUI), so the picture will differ: model 'sd/v1-5.safetensors'" in (line := capsys.readouterr().out)
    assert (
        "; vae 'v.pt'" in line
        and "; embedding 'easy' (give --embeddings, or --embedding_dir" in line
        and "node" not in line
    )
    config = parse(GenerateConfig, ["--from", png(tmp_path / "i.png", invokeai_metadata=json.dumps(INVOKE))])
    assert (
        config.scheduler == "dpm++_2m"
        and "(InvokeAI), so the picture will differ: model 'v1-5'" in capsys.readouterr().out
    )
    config = parse(GenerateConfig, ["--from", png(tmp_path / "2.png", sd__metadata=json.dumps(INVOKE_2), Dream="x")])
    assert config.prompt == "a fox"


def test_a_webp_of_comfyui_has_its_graph_in_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(WITHOUT_LORA)
    exif[0x010F] = "workflow:{}"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.webp", exif=exif)
    assert parse(GenerateConfig, ["--from", str(tmp_path / "x.webp")]).steps == 20


@pytest.mark.parametrize(
    "texts, program",
    [
        ({"Software": "NovelAI", "Comment": "{}", "Description": "a fox"}, "NovelAI"),
        ({"parameters": '{"prompt": "a", "fooocus_version": "2"}'}, "Fooocus"),
        ({"parameters": '{"prompt": "a"}', "fooocus_scheme": "fooocus"}, "Fooocus"),
        ({"parameters": '{"sui_image_params": {"prompt": "a"}}'}, "SwarmUI"),
        ({"workflow": "{}"}, "ComfyUI, without the values"),
        ({"Dream": '"a fox" -s 50'}, "InvokeAI 1"),
    ],
)
def test_a_picture_of_a_program_that_is_not_read_says_whose_it_is(tmp_path, texts, program):
    with pytest.raises(BadInput, match=f"was made by {program}.*give -p"):
        parse(GenerateConfig, ["--from", png(tmp_path / "x.png", **texts)])


READERS = [(comfyui.options, GRAPH), (invokeai.options, INVOKE), (invokeai.options_of_version_2, INVOKE_2)]


@pytest.mark.parametrize("read, good", READERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_metadata_are_read_or_refused_in_one_line(read, good, data):
    text = json.dumps(data.draw(altered(good)))
    try:
        found = read(text, "x.png")
    except BadInput as error:
        assert "\n" not in str(error)
        return
    assert set(found.options) <= set(to_dict(GenerateConfig())) and all("\n" not in one for one in left(found))
