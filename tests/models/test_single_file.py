"""Models as people have them: single files of every layout, their VAEs, inpainting, and what is no model at all."""

import json
import os
import re
import shutil
import socket
import sys
import types
import zipfile
from itertools import pairwise

import accelerate
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sd_hyena.distil.training import train
from sd_hyena.errors import BadInput
from sd_hyena.files.hashes import file_sha256 as sha256
from sd_hyena.generate import engine, order
from sd_hyena.generate.drawing import decoded
from sd_hyena.generate.generation import generate
from sd_hyena.models.clip_vocabulary import MERGES, clip_tokenizer, merges_and_ids
from sd_hyena.models.inpainting import painting_masks
from sd_hyena.models.location import model_path, model_sha256
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.models.prediction import predicts_velocity
from sd_hyena.models.single_file import LAYOUTS
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.sampler import set_scheduler
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.students.checkpoint import StudentFile, load_students, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests import ldm
from tests.conftest import IN01, ROOT
from tests.faults.conftest import ended
from tests.files_in_the_wild.conftest import assert_same
from tests.fixtures import image_of
from tests.gate import gated, sampled

CPU = torch.device("cpu")
PROMPT = "a red circle on blue"


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks for the network fails, and the libraries do not know that they are offline."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="session")
def files(folders, tmp_path_factory):
    """The same as single files: (layout, suffix) -> path, each with its configuration beside it."""
    root, found = tmp_path_factory.mktemp("files"), {}
    for layout, folder in folders.items():
        state = ldm.single_file(load_pipeline(folder, CPU, torch.float32), layout) | extras(layout)
        shutil.copytree(folder, root / layout, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(state, root / f"{layout}.safetensors")
        torch.save({"epoch": 3, "state_dict": state}, root / f"{layout}.ckpt")
        found |= {(layout, suffix): root / f"{layout}{suffix}" for suffix in (".safetensors", ".ckpt")}
    return found


def extras(layout):
    """What published files hold besides."""
    ema = {f"model_ema.diffusion_model{i}": torch.ones(1) for i in range(101)}
    text = {"sd15": "cond_stage_model.transformer.text_model.embeddings.position_ids"}
    text |= {"sd21": "cond_stage_model.model.logit_scale", "sdxl": "conditioner.embedders.1.model.logit_scale"}
    return {"alphas_cumprod": torch.ones(1000), text[layout]: torch.arange(77), "model_ema.decay": torch.ones(())} | ema


def pixels(pipe):
    return decoded(pipe, image_of(pipe))


@pytest.mark.parametrize("layout", ["sd15", *gated(["sd21", "sdxl"])])
def test_a_single_file_draws_bit_for_bit_what_its_folder_draws_without_a_network(no_network, folders, files, layout):
    expected = pixels(load_pipeline(folders[layout], CPU, torch.float32))
    assert expected.std() > 0
    for suffix in (".safetensors", ".ckpt"):
        pipe = load_pipeline(model_path(str(files[layout, suffix])), CPU, torch.float32)
        assert np.array_equal(pixels(pipe), expected)


@pytest.mark.parametrize("shift", [8, *gated([0, 16, 24])])
def test_the_picture_does_not_depend_on_where_in_the_file_the_weights_lie(files, tmp_path, shared_pipe, shift):
    shutil.copytree(files["sd15", ".safetensors"].with_suffix(""), tmp_path / "mine")
    state = load_file(files["sd15", ".safetensors"]) | {"a": torch.ones(3)}
    save_file(state, tmp_path / "mine.safetensors", {"x": "x" * shift})
    assert torch.equal(
        image_of(load_pipeline(tmp_path / "mine.safetensors", CPU, torch.float32)), image_of(shared_pipe)
    )


REAL = {  # parameters as published, and the names by which diffusers knows the layouts
    "sd15": (859_520_964, 123_060_480, 0, "model.diffusion_model.output_blocks.11.0.skip_connection.weight"),
    "sd21": (865_910_724, 340_387_840, 0, "cond_stage_model.model.transformer.resblocks.23.ln_1.weight"),
    "sdxl": (2_567_463_684, 123_060_480, 694_659_840, "conditioner.embedders.1.model.text_projection"),
}


def of_layout(layout):
    """The real model of a layout as a namespace of modules, on the meta device."""
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    with torch.device("meta"):
        parts = {n: kind.from_config(kind.load_config(LAYOUTS / layout, subfolder=n)) for n, kind in kinds.items()}
        for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if (LAYOUTS / layout / name).exists():
                parts[name] = kind(CLIPTextConfig.from_pretrained(LAYOUTS / layout / name))
    return types.SimpleNamespace(**parts)


@pytest.mark.parametrize("layout", REAL)
def test_the_configurations_that_ship_are_the_published_models(layout):
    model = of_layout(layout)
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in vars(model).items()}
    unet, text, text_2, key = REAL[layout]
    assert counted.pop("vae") == 83_653_863
    assert counted == {"unet": unet, "text_encoder": text} | ({"text_encoder_2": text_2} if text_2 else {})
    assert key in ldm.single_file(model, layout)


def hollow(layout):
    """The tensors of a real model's file; each is one number, seen everywhere."""
    state = ldm.single_file(of_layout(layout), layout)
    one = torch.full((1,), 0.01, dtype=torch.float16)
    return {name: one.expand(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("layout", sampled(REAL, 3))
def test_a_file_of_the_published_sizes_needs_nothing_beside_it(no_network, tmp_path, monkeypatch, layout):
    monkeypatch.setattr("sd_hyena.models.pipeline.tell_prediction", lambda _: None)  # it would take minutes here
    path, tensors = tmp_path / "model.safetensors", hollow(layout)
    header, end = {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": "F16",
            "shape": list(value.shape),
            "data_offsets": [end, end := end + 2 * value.numel()],
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)  # gigabytes that are not there
    monkeypatch.setattr("sd_hyena.models.single_file.read_checkpoint", lambda _: tensors)
    pipe = load_pipeline(model_path(str(path)), CPU, torch.float16)
    ids = pipe.tokenizer("a photo of a cat", padding="max_length").input_ids
    pad = 0 if layout == "sd21" else 49407
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, *[pad] * 70]
    assert pipe.unet.config.sample_size == {"sd15": 64, "sd21": 96, "sdxl": 128}[layout]
    assert pipe.vae.config.scaling_factor == (0.13025 if layout == "sdxl" else 0.18215)


def test_the_vocabulary_is_the_published_one_and_gives_published_ids():
    assert sha256(MERGES) in (ROOT / "NOTICE").read_text()
    ids = clip_tokenizer("<|endoftext|>")(["hello world!", "A photo of a  cat", "diffusion"]).input_ids
    assert ids[:2] == [[49406, 3306, 1002, 256, 49407], [49406, 320, 1125, 539, 320, 2368, 49407]]
    assert ids[2] == naive_ids("diffusion</w>")


def naive_ids(word):
    """Byte-pair encoding by its definition: the earliest merge that applies, again and again."""
    merges, ids = merges_and_ids()
    pieces = [*word[: -len("</w>") - 1], word[-len("</w>") - 1 :]]
    while found := [merges.index(pair) for pair in pairwise(pieces) if pair in merges]:
        pair = merges[min(found)]
        i = next(i for i, two in enumerate(pairwise(pieces)) if two == pair)
        pieces[i : i + 2] = ["".join(pair)]
    return [49406, *(ids[piece] for piece in pieces), 49407]


def test_a_model_of_other_sizes_without_its_configuration_is_told_what_it_needs(files, tmp_path):
    path = shutil.copy(files["sd15", ".safetensors"], tmp_path / "mine.safetensors")
    with pytest.raises(
        BadInput,
        match=r"looks like Stable Diffusion 1\.x, but its UNet has .* of \(128, 32\), not of \(1280, 320\).*mine",
    ) as error:
        load_pipeline(model_path(str(path)), CPU, torch.float32)
    assert "\n" not in str(error.value)


def test_the_text_encoders_older_names_are_known(files, tmp_path, shared_pipe):
    shutil.copytree(files["sd15", ".safetensors"].with_suffix(""), tmp_path / "mine")
    state = load_file(files["sd15", ".safetensors"]).items()
    save_file(
        {n.replace("transformer.text_model.", "transformer."): v for n, v in state}, tmp_path / "mine.safetensors"
    )
    assert_same(load_pipeline(tmp_path / "mine.safetensors", CPU, torch.float32), shared_pipe)


def test_a_configuration_that_does_not_fit_or_is_damaged_is_refused(files, tmp_path):
    path = shutil.copy(files["sd15", ".safetensors"], tmp_path / "mine.safetensors")
    shutil.copytree(files["sd15", ".safetensors"].with_suffix(""), tmp_path / "mine")
    config = tmp_path / "mine" / "unet" / "config.json"
    config.write_text(
        config.read_text().replace('"norm_num_groups": 16', '"norm_num_groups": 16, "cross_attention_dim": 90')
    )
    with pytest.raises(BadInput, match=r"to_k\.weight of \(32, 96\), not of \(32, 90\), as .*mine says"):
        load_pipeline(model_path(str(path)), CPU, torch.float32)
    config.write_text("{")
    with pytest.raises(BadInput, match="cannot be built as"):
        load_pipeline(model_path(str(path)), CPU, torch.float32)


def test_the_hash_is_of_the_file_or_of_the_unet_that_is_loaded(files, tmp_path, own_pipe):
    path = files["sd15", ".ckpt"]
    assert model_sha256(path) == sha256(path)
    own_pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    unet = tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    assert model_sha256(tmp_path / "half") == sha256(unet)


def test_a_folder_that_has_half_precision_only_is_loaded(no_network, tmp_path, shared_pipe, own_pipe):
    own_pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    pipe = load_pipeline(model_path(str(tmp_path / "half")), CPU, torch.float32)
    assert_same(pipe, shared_pipe)  # the shipped weights are of half precision themselves


def test_a_file_is_asked_whether_it_predicts_noise_or_velocity(own_pipe):
    assert predicts_velocity(own_pipe)
    at_the_last_timestep = lambda sample, *_args, **_kwargs: types.SimpleNamespace(sample=0.98 * sample + 0.1)
    own_pipe.unet.forward = at_the_last_timestep  # what a good model of epsilon says there
    assert not predicts_velocity(own_pipe)


def test_a_model_that_says_it_was_trained_from_pure_noise_is_sampled_so(files, tmp_path):
    shutil.copytree(files["sdxl", ".safetensors"].with_suffix(""), tmp_path / "mine")
    save_file(load_file(files["sdxl", ".safetensors"]) | {"ztsnr": torch.ones(1)}, tmp_path / "mine.safetensors")
    pipe = load_pipeline(tmp_path / "mine.safetensors", CPU, torch.float32)
    set_scheduler(pipe, "ddim")
    assert float(pipe.scheduler.alphas_cumprod[-1]) == 0
    pipe.scheduler.set_timesteps(4)
    assert int(pipe.scheduler.timesteps[0]) == 999


def test_a_state_dict_that_holds_itself_is_no_trap(tmp_path):
    content = {"epoch": 1}
    content["state_dict"] = content
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(BadInput, match="no file of weights that is known"):
        model_path(str(tmp_path / "model.ckpt"))


def test_a_folder_that_lacks_a_part_is_refused(tmp_path):
    shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    (tmp_path / "model" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="no whole pipeline"):
        load_pipeline(model_path(str(tmp_path / "model")), CPU, torch.float32)


@pytest.mark.gate
def test_a_student_is_trained_on_a_single_file_and_records_its_hash(files, tmp_path):
    path = files["sd15", ".ckpt"]
    outcome = train(
        TrainConfig(
            teacher_model=str(path), width=64, n_steps=2, batch_size=2, num_samples=2, sample_steps=2, device="cpu",
            out_dir=str(tmp_path / "out"), log_dir=str(tmp_path / "logs"), validate_every_n_steps=0, seed=1,
        )
    )  # fmt: skip
    assert load_students(outcome.exported).training["teacher_sha256"] == sha256(path)
    (image,) = generate(small(tmp_path, model=str(path), hyena=str(tmp_path / "out" / "hyena.pt")))
    assert f"Model hash: {sha256(path)[:10]}" in Image.open(image).info["parameters"]


def small(tmp_path, **options):
    base = dict(width=64, steps=2, num_images=1, cfg_scale=3.0, seed=11, prompt=PROMPT, device="cpu")
    return GenerateConfig(**{**base, "out_dir": str(tmp_path / "images"), **options})


def drawn(tmp_path, **options):
    (path,) = generate(small(tmp_path, **options))
    return np.array(Image.open(path))


class Callback:
    """As Lightning pickled it: a class that is a key, and an instance with state."""


def test_what_lightning_left_in_a_checkpoint_is_read_and_does_nothing(files, tmp_path, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (Callback,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    one = module.ModelCheckpoint()
    one.best = np.float64(0.5)
    content = torch.load(files["sd15", ".ckpt"], weights_only=True)
    content |= {
        "callbacks": {module.ModelCheckpoint: one},
        "loss": np.float32(0.25),
        "optimizer_states": [{"lr": 1e-4}],
    }
    torch.save(content, tmp_path / "model.ckpt")
    shutil.copytree(files["sd15", ".ckpt"].with_suffix(""), tmp_path / "model")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert model_path(str(tmp_path / "model.ckpt")) == tmp_path / "model.ckpt"


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def no_model(name, folder, whole):
    """Write what is no model, under the name that a user would give it."""
    one, path = torch.ones(2, 2), folder / f"{name.replace(' ', '-')}.safetensors"
    tensors = {
        "LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": one},
        "LoRA of diffusers": {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": one},
        "SD3": {"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": one},
        "Flux": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": one},
        "ControlNet": {"control_model.input_blocks.0.0.weight": one},
        "refiner": {"conditioner.embedders.0.model.ln_final.weight": one, "model.diffusion_model.input_blocks.0.0.weight": one},
        "embedding": {"emb_params": one},
        "UNet of diffusers": {"down_blocks.0.resnets.0.conv1.weight": one, "conv_in.weight": one},
        "text encoder": {"text_model.embeddings.token_embedding.weight": one},
        "Playground": {"edm_mean": one, "model.diffusion_model.input_blocks.0.0.weight": one},
        "something": {"a": one},
        "nothing": {},
        "InstructPix2Pix": {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 8, 3, 3)},
        "UNet alone": {n: v for n, v in load_file(whole).items() if n.startswith("model.")},
    }  # fmt: skip
    if name in tensors:
        save_file({key: value.clone() for key, value in tensors[name].items()}, path)
    elif name == "VAE":
        save_file({n: v for n, v in load_file(whole).items() if n.startswith("first_stage_model.")}, path)
    elif name == "students":
        spec = StudentSpec(IN01, "IN01", 32, "pointwise", {}, None)
        save_students(path, StudentFile({IN01: build_student(spec)}))
    elif name == "truncated":
        path.write_bytes(whole.read_bytes()[: 10**6])
    elif name == "pickle":
        torch.save({"state_dict": {}}, path)
    elif name == "truncated ckpt":
        path = path.with_suffix(".ckpt")
        path.write_bytes(whole.with_suffix(".ckpt").read_bytes()[: 10**6])
    elif name == "safetensors as ckpt":
        path = path.with_suffix(".ckpt")
        shutil.copy(whole, path)
    elif name == "payload":
        path = path.with_suffix(".ckpt")
        torch.save({"state_dict": {"x": Payload(folder / "executed")}}, path)
    elif name == "endless":
        path = path.with_suffix(".ckpt")
        torch.save({"state_dict": {"x": torch.zeros(1).expand(2**20, 2**20)}}, path)
    elif name == "text":
        path = path.with_suffix(".txt")
        path.write_text("hello")
    elif name == "bomb":
        torch.save({"state_dict": {"x": torch.zeros(10**6)}}, path)
        path, stored = path.with_suffix(".ckpt"), path
        with zipfile.ZipFile(stored) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            for part in source.namelist():
                bomb.writestr(part, source.read(part))
    return path


NO_MODELS = {
    "LoRA": "a LoRA; give it as --lora",
    "LoRA of diffusers": "a LoRA; give it as --lora",
    "VAE": "a VAE; give it as --vae",
    "students": "trained students; give it as -y",
    "SD3": "Stable Diffusion 3",
    "Flux": "Flux",
    "ControlNet": "a ControlNet",
    "refiner": "SDXL's refiner",
    "embedding": "a textual inversion",
    "UNet of diffusers": "give the folder",
    "UNet alone": "no text encoder",
    "text encoder": "a text encoder",
    "Playground": "Playground 2.5",
    "something": "no file of weights that is known",
    "nothing": "no file of weights that is known",
    "InstructPix2Pix": "8 channels (InstructPix2Pix)",
    "truncated": "not a valid safetensors file",
    "pickle": "looks like a PyTorch pickle",
    "truncated ckpt": "truncated",
    "safetensors as ckpt": "a safetensors file",
    "payload": "not executed (it asks for posix.system)",
    "text": "expected a .safetensors or .ckpt file",
    "bomb": "would unpack to",
    "endless": "x claims more numbers than are stored",
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_named_in_one_line_before_a_model_is_built(files, tmp_path, monkeypatch, name):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(engine, "load_pipeline", lambda *_: pytest.fail("it was built"))
    path = no_model(name, tmp_path, files["sd15", ".safetensors"])
    with pytest.raises(BadInput, match=re.escape(NO_MODELS[name])) as error:
        generate(small(tmp_path, model=str(path)))
    assert path.name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_the_command_says_so_and_exits_with_2(files, tmp_path):
    path = no_model("payload", tmp_path, files["sd15", ".safetensors"])
    done = ended(tmp_path, TrainConfig, "-m", path, "-W", 64)
    assert done.code == 2 and done.err.count("\n") == 1 and "not executed" in done.err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("option, name", [("vae", "LoRA"), ("vae", "students"), ("lora", "VAE"), ("hyena", "LoRA")])
def test_a_file_in_the_wrong_place_is_named_there_too(files, tmp_path, own_pipe, monkeypatch, option, name):
    monkeypatch.setattr(engine, "load_pipeline", lambda *_: own_pipe)
    path = no_model(name, tmp_path, files["sd15", ".safetensors"])
    with pytest.raises(BadInput, match=f"looks like {re.escape(NO_MODELS[name])}") as error:
        generate(small(tmp_path, **{option: str(path)}))
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_damaged_numbers_are_refused(files, tmp_path):
    path = tmp_path / "mine.safetensors"
    shutil.copytree(files["sd15", ".safetensors"].with_suffix(""), tmp_path / "mine")
    state = load_file(files["sd15", ".safetensors"])
    state["model.diffusion_model.time_embed.0.weight"][3, 4] = float("nan")
    save_file(state, path)
    with pytest.raises(BadInput, match=r"damaged: time_embedding\.linear_1\.weight holds NaN"):
        load_pipeline(path, CPU, torch.float32)


def test_tensors_that_no_layer_takes_are_not_passed_over(files, tmp_path):
    path = tmp_path / "mine.safetensors"
    shutil.copytree(files["sd21", ".safetensors"].with_suffix(""), tmp_path / "mine")
    save_file(
        load_file(files["sd21", ".safetensors"]) | {"model.diffusion_model.label_emb.0.0.weight": torch.ones(2)}, path
    )
    with pytest.raises(BadInput, match="layers that this one does not know"):
        load_pipeline(path, CPU, torch.float32)


@pytest.fixture(scope="module")
def other_vae(shared_pipe, tmp_path_factory):
    """The shipped VAE with another last layer: a folder of it, and the model's folder with it."""
    root = tmp_path_factory.mktemp("vae")
    shutil.copytree(SHIPPED_MODEL, root / "model")
    vae = AutoencoderKL.from_pretrained(SHIPPED_MODEL, subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.3
    vae.save_pretrained(root / "model" / "vae")
    vae.save_pretrained(root / "vae")
    save_file(ldm.of_vae(vae, ""), root / "bare.safetensors")
    torch.save({"state_dict": ldm.of_vae(vae, "")}, root / "bare.ckpt")
    save_file(ldm.of_vae(vae), root / "prefixed.safetensors")
    save_file(vae.state_dict(), root / "diffusers.safetensors")
    vae.save_pretrained(root / "half", variant="fp16")  # which names the file, whatever its numbers
    return root


@pytest.mark.gate
def test_another_vae_is_used_whatever_it_comes_in(files, other_vae, tmp_path):
    expected = drawn(tmp_path, model=str(other_vae / "model"))
    assert not np.array_equal(expected, drawn(tmp_path))
    for name in ("vae", "half", "bare.safetensors", "bare.ckpt", "prefixed.safetensors", "diffusers.safetensors"):
        assert np.array_equal(drawn(tmp_path, vae=str(other_vae / name)), expected), name
    model = str(files["sd15", ".safetensors"])
    assert np.array_equal(drawn(tmp_path, model=model, vae=str(other_vae / "vae")), expected)


def test_a_file_without_a_vae_needs_one(files, other_vae, tmp_path):
    path = tmp_path / "mine.safetensors"
    shutil.copytree(files["sd15", ".safetensors"].with_suffix(""), tmp_path / "mine")
    state = load_file(files["sd15", ".safetensors"])
    save_file({n: v for n, v in state.items() if not n.startswith("first_stage_model.")}, path)
    with pytest.raises(BadInput, match=r"holds no VAE; give one with --vae FILE, or a file that has its own$"):
        load_pipeline(model_path(str(path)), CPU, torch.float32)
    assert drawn(tmp_path, model=str(path), vae=str(other_vae / "bare.ckpt")).std() > 0


@pytest.mark.gate
def test_a_student_is_trained_with_another_vae_and_on_its_latents(other_vae, tmp_path):
    options = dict(width=64, n_steps=1, batch_size=2, num_samples=2, sample_steps=1, validate_every_n_steps=0, seed=1)
    options |= dict(device="cpu", out_dir=str(tmp_path / "out"), log_dir=str(tmp_path / "logs"))
    for vae in ("", str(other_vae / "bare.ckpt"), str(other_vae / "vae")):
        outcome = train(TrainConfig(**options, vae=vae))
        assert load_students(outcome.exported).training["config"]["vae"] == vae
    own, *other = sorted((tmp_path / "out" / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    own, one, same = (load_file(path)["latents"] for path in (own, *other))
    assert torch.equal(one, same) and not torch.equal(own, one)
    with pytest.raises(BadInput, match="vae='/nowhere' does not exist"):
        train(TrainConfig(**options, vae="/nowhere"))


def test_a_vae_of_other_sizes_or_of_another_kind_is_refused(tmp_path):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    save_file(ldm.of_vae(vae, ""), tmp_path / "small.safetensors")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "tiny" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    for name, said in (
        ("small.safetensors", "does not suit this model"),
        ("tiny", "is a AutoencoderTiny"),
        ("hollow", "cannot be loaded"),
        ("no", "exist"),
    ):
        with pytest.raises(BadInput, match=said) as error:
            generate(small(tmp_path, vae=str(tmp_path / name)))
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def inpainting(files, shared_pipe, tmp_path_factory):
    """The shipped model for inpainting: its UNet looks at the mask a little, and not at the picture under it."""
    root = tmp_path_factory.mktemp("inpainting")
    state = load_file(files["sd15", ".safetensors"])
    key = "model.diffusion_model.input_blocks.0.0.weight"
    rest = torch.zeros(len(state[key]), 5, 3, 3)
    state[key] = torch.cat([state[key], rest], dim=1)
    save_file(state, root / "blind.safetensors")
    rest[:, 0] = 0.05
    state[key] = torch.cat([state[key][:, :4], rest], dim=1)
    save_file(state, root / "seeing.safetensors")
    for name in ("blind", "seeing"):
        shutil.copytree(files["sd15", ".safetensors"].with_suffix(""), root / name)
    return root


@pytest.mark.gate
def test_an_inpainting_model_draws_from_nothing_and_one_that_ignores_the_mask_draws_what_four_channels_draw(
    inpainting, shared_pipe
):
    blind, seeing = (
        image_of(load_pipeline(inpainting / f"{n}.safetensors", CPU, torch.float32)) for n in ("blind", "seeing")
    )
    torch.testing.assert_close(blind, image_of(shared_pipe), atol=1e-4, rtol=1e-4)  # sums of more terms
    assert not torch.allclose(seeing, blind, atol=1e-3)


def test_an_inpainting_folder_is_read_as_its_file_is(inpainting, tmp_path):
    pipe = load_pipeline(inpainting / "seeing.safetensors", CPU, torch.float32)
    expected = image_of(pipe, steps=1)
    with painting_masks(pipe.unet):
        StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False).save_pretrained(tmp_path)
    assert torch.equal(image_of(load_pipeline(model_path(str(tmp_path)), CPU, torch.float32), steps=1), expected)


def test_an_inpainting_model_is_told_mask_and_picture(inpainting, tmp_path, monkeypatch):
    Image.fromarray(np.full((64, 96, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    mask = np.zeros((64, 96), np.uint8)
    mask[:, :48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    pipe, seen = load_pipeline(inpainting / "seeing.safetensors", CPU, torch.float32), []
    monkeypatch.setattr(engine, "load_pipeline", lambda *_: pipe)
    pipe.unet.conv_in.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    pictures = dict(init_image=str(tmp_path / "picture.png"), mask=str(tmp_path / "mask.png"))
    drawn(
        tmp_path,
        width=96,
        height=64,
        steps=4,
        strength=1.0,
        tiled_diffusion="mixture",
        tile_width=8,
        tile_height=8,
        **pictures,
    )
    assert {x.shape[1:] for x in seen} == {(9, 8, 8)}
    masked = {round(float(row), 2) for x in seen for row in x[:, 4].mean((1, 2))}
    assert masked == {0.75, 0.25}  # 6 of 12 columns, in tiles of 8 that start at 0 and 4


@pytest.mark.gate
def test_a_student_of_an_inpainting_model_is_trained(inpainting, tmp_path):
    outcome = train(
        TrainConfig(
            teacher_model=str(inpainting / "seeing.safetensors"), width=64, n_steps=1, batch_size=2, num_samples=2,
            sample_steps=2, stage="end_to_end", device="cpu", out_dir=str(tmp_path / "out"), seed=1,
            log_dir=str(tmp_path / "logs"), validate_every_n_steps=0,
        )
    )  # fmt: skip
    assert outcome.exported.is_file()


def test_offload_needs_a_second_memory(tmp_path):
    with pytest.raises(BadInput, match="offload=model"):
        generate(small(tmp_path, offload="model"))


@pytest.mark.parametrize("mode", ["model", *gated(["group", "sequential"])])
def test_offloaded_weights_draw_the_same_with_tiles_and_students(tmp_path, monkeypatch, mode):
    spec = StudentSpec(IN01, "IN01", 32, "pointwise", {}, None)
    torch.manual_seed(0)
    save_students(tmp_path / "a.pt", StudentFile({IN01: build_student(spec)}))
    options = dict(
        hyena=str(tmp_path / "a.pt"), tiled_diffusion="mixture", tile_width=8, tile_height=8, tiled_vae="exact"
    )
    options |= dict(width=96, num_images=2, decoder_tile_size=8)
    expected = [np.array(Image.open(path)) for path in generate(small(tmp_path, **options))]
    monkeypatch.setattr(order, "check_offload", lambda *_: None)  # from the CPU to the CPU: the hooks are the same
    moving = (
        accelerate.cpu_offload
    )  # diffusers calls it with "cpu:0", which for accelerate is another device than "cpu"
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _device, **options: moving(model, CPU, **options))
    given = [np.array(Image.open(path)) for path in generate(small(tmp_path, offload=mode, **options))]
    assert all(np.array_equal(a, b) for a, b in zip(expected, given, strict=True))
