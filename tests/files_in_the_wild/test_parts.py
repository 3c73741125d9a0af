"""Only what will be read is checked, each part by itself; and what is wrong with it is told before a model is loaded."""

import json
import re
import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_hyena import doctor
from sd_hyena.doctor import DoctorConfig, Unwell
from sd_hyena.errors import BadInput
from sd_hyena.generate import engine
from sd_hyena.generate.generation import generate
from sd_hyena.models.location import model_path, model_sha256
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.models.vae import check_vae, load_vae
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.text.textual_inversion import load_embeddings, read_embeddings
from tests.files_in_the_wild import layouts
from tests.files_in_the_wild.conftest import CPU, assert_same, loaded
from tests.gate import gated, sampled

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0\nsize 4265146304\n"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(SHIPPED_MODEL, tmp_path / "model")


def with_checker(model):
    """The index of a published model, whose safety checker and feature extractor are not read."""
    index = json.loads((model / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "requires_safety_checker": True}
    (model / "model_index.json").write_text(json.dumps(index))


def debris(model, path, content=POINTER):
    (model / path).parent.mkdir(exist_ok=True)
    (model / path).write_bytes(content)


DEBRIS = {
    "a pointer in the safety checker": ("safety_checker/model.safetensors", POINTER),
    "text in the safety checker": ("safety_checker/pytorch_model.bin", b"hello"),
    "a damaged feature extractor": ("feature_extractor/preprocessor_config.json", b"{"),
    "a pointer beside": ("unet/diffusion_pytorch_model.bin", POINTER),
    "an old pickle beside": ("vae/diffusion_pytorch_model.bin", b"\x80\x02hello"),
    "a damaged variant beside": ("unet/diffusion_pytorch_model.fp16.safetensors", POINTER),
    "weights that training left": ("unet/diffusion_pytorch_model.non_ema.safetensors", POINTER),
    "macOS": ("unet/._diffusion_pytorch_model.safetensors", b"\0\5\x16\7\0\2\0\0Mac OS X"),
    "macOS, of another part": ("text_encoder/._model.safetensors", b"\0\5\x16\7\0\2\0\0Mac OS X"),
    "another program's": ("text_encoder/flax_model.msgpack", b"hello"),
    "an image encoder": ("image_encoder/model.safetensors", POINTER),
}


@pytest.mark.parametrize("what", sampled(DEBRIS, 4))
def test_what_is_not_read_does_not_matter(model, shared_pipe, what):
    with_checker(model)
    debris(model, *DEBRIS[what])
    assert_same(loaded(model), shared_pipe)
    assert model_sha256(model) == model_sha256(SHIPPED_MODEL)


HELD = ("vae", "fp16"), ("text_encoder", "old.bin"), ("unet", "fp16.bin")
FORMS = product(("unet", "vae", "text_encoder"), ("fp16", "bin", "fp16.bin", "old.bin"))


@pytest.mark.parametrize("part, form", [*HELD, *gated(one for one in FORMS if one not in HELD)])
def test_each_part_is_read_from_what_it_has(model, shared_pipe, part, form):
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    path = model / part / f"{stem}.safetensors"
    state = load_file(path)
    path.unlink()
    if form == "fp16":
        save_file(state, path.with_name(f"{stem}.fp16.safetensors"))
    else:
        stem = f"pytorch_{stem}" if part == "text_encoder" else stem
        name = path.with_name(f"{stem}.fp16.bin" if form == "fp16.bin" else f"{stem}.bin")
        torch.save(state, name, _use_new_zipfile_serialization=form != "old.bin")
    assert_same(loaded(model), shared_pipe)


def test_a_part_in_several_files_is_read_whole(model, shared_pipe):
    state = load_file(model / UNET)
    (model / UNET).unlink()
    halves, names = {}, sorted(state)
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, model / "unet" / file)
        halves |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": halves}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(loaded(model), shared_pipe)


def lacking(model, path):
    state = load_file(model / path)
    state.pop(sorted(state)[3])
    save_file(state, model / path)


def other_sizes(model, path):
    state = load_file(model / path)
    name = sorted(state)[3]
    save_file(state | {name: torch.ones(1, 2, 3)}, model / path)


FAULTS = {
    "a pointer": (lambda model, path: debris(model, path), "is a Git LFS pointer"),
    "cut": (lambda model, path: (model / path).write_bytes((model / path).read_bytes()[:-9]), "not a valid safetensors"),
    "missing": (lambda model, path: (model / path).unlink(), "has no weights in"),
    "a tensor missing": (lacking, "lacks "),
    "of other sizes": (other_sizes, r"of \(1, 2, 3\), not of"),
    "no config": (lambda model, path: (model / path).with_name("config.json").unlink(), "config.json cannot be read"),
    "a damaged config": (lambda model, path: (model / path).with_name("config.json").write_text("{"), "config.json cannot"),
}  # fmt: skip
OTHERS = {
    "scheduler": (
        lambda model: (model / "scheduler" / "scheduler_config.json").write_text("["),
        "scheduler_config.json",
    ),
    "tokenizer": (lambda model: shutil.rmtree(model / "tokenizer"), "no vocabulary in tokenizer/"),
    "another text encoder": (
        lambda model: replace_in(model / "model_index.json", "CLIPTextModel", "T5EncoderModel"),
        "T5EncoderModel, known is CLIPTextModel",
    ),
}


def replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def said_by_all(model, tmp_path, monkeypatch, capsys):
    """What generate says before it loads, which the doctor has to say too."""
    monkeypatch.setattr(doctor, "SIZES", ())
    monkeypatch.setattr(engine, "load_pipeline", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BadInput) as error:
        generate(GenerateConfig(model=str(model), device="cpu", out_dir=str(tmp_path / "out")))
    assert "\n" not in str(error.value)
    doctor._looked_at.cache_clear()
    with pytest.raises(Unwell, match="model"):
        doctor.main(DoctorConfig(model=str(model), device="cpu", out_dir=str(tmp_path)))
    assert "FAILS: " + str(error.value)[:60] in capsys.readouterr().out
    return str(error.value)


PATHS = (UNET, VAE, TEXT)
EACH = [(fault, PATHS[n % 3]) for n, fault in enumerate(FAULTS)]


@pytest.mark.parametrize("fault, path", [*EACH, *gated(one for one in product(FAULTS, PATHS) if one not in EACH)])
def test_what_is_read_is_checked_before_it_is_loaded_and_by_the_doctor(
    model, tmp_path, monkeypatch, capsys, path, fault
):
    make, said = FAULTS[fault]
    make(model, path)
    found = said_by_all(model, tmp_path, monkeypatch, capsys)
    assert re.search(said, found), found


@pytest.mark.parametrize("fault", OTHERS)
def test_so_are_the_parts_without_weights(model, tmp_path, monkeypatch, capsys, fault):
    make, said = OTHERS[fault]
    make(model)
    assert said in said_by_all(model, tmp_path, monkeypatch, capsys)


def test_so_are_single_files(state, tmp_path, monkeypatch, capsys):
    lacks = {name: value for name, value in state.items() if "output_blocks.3.0.in_layers.0.weight" not in name}
    for name, tensors, said in (
        ("lacks", lacks, "its UNet lacks"),
        ("no-vae", {n: v for n, v in state.items() if "first_stage" not in n}, "it holds no VAE; give one with --vae"),
        ("half-vae", {n: v for n, v in state.items() if "decoder.conv_out" not in n}, "its VAE lacks decoder.conv_out"),
        ("no-text", {n: v for n, v in state.items() if "layers.1.mlp" not in n}, "its text encoder lacks"),
    ):
        path = layouts.saved(tmp_path / f"{name}.safetensors", tensors)
        assert said in said_by_all(path, tmp_path, monkeypatch, capsys)


def test_a_vae_that_another_takes_the_place_of_is_not_read(model, state, tmp_path, shared_pipe):
    shutil.copytree(model / "vae", tmp_path / "other")
    debris(model, VAE)
    with pytest.raises(BadInput, match="Git LFS"):
        model_path(str(model))
    pipe = load_pipeline(model_path(str(model), str(tmp_path / "other")), CPU, torch.float32, str(tmp_path / "other"))
    assert_same(pipe, shared_pipe)
    path = layouts.saved(tmp_path / "x.safetensors", {n: v for n, v in state.items() if "first_stage" not in n})
    pipe = load_pipeline(model_path(str(path), str(tmp_path / "other")), CPU, torch.float32, str(tmp_path / "other"))
    assert_same(pipe, shared_pipe)


def test_a_vaes_folder_is_read_as_a_part_is(model, shared_pipe):
    debris(model, "vae/._x.safetensors")
    debris(model, "vae/diffusion_pytorch_model.bin")
    check_vae(str(model / "vae"))
    read = load_vae(str(model / "vae"), model, torch.float32).state_dict()
    assert all(torch.equal(read[name], value) for name, value in shared_pipe.vae.state_dict().items())
    other_sizes(model, VAE)
    with pytest.raises(BadInput, match=r"of \(1, 2, 3\), not of"):
        check_vae(str(model / "vae"))


def test_an_older_vae_with_other_names_in_its_middle_is_read(model, shared_pipe):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(model / VAE)
    for name in [name for name in state if "mid_block.attentions" in name]:
        for today, then in new.items():
            if f".{today}." in name:
                state[name.replace(f".{today}.", f".{then}.")] = state.pop(name)
    save_file(state, model / VAE)
    assert_same(loaded(model), shared_pipe)


def test_odd_files_in_a_folder_of_embeddings_do_not_matter_until_a_prompt_asks_for_one(tmp_path, own_pipe, capsys):
    from sd_hyena.text.encoding import chunks

    folder = tmp_path / "words"
    folder.mkdir()
    save_file({"emb_params": torch.ones(1, 96)}, folder / "good.safetensors")
    (folder / "pointer.safetensors").write_bytes(POINTER)
    (folder / "damaged.pt").write_bytes(b"PK\3\4 hello")
    (folder / "._good.safetensors").write_bytes(b"\0\5\x16\7")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2), "y": torch.ones(1)}, folder / "style.safetensors")
    load_embeddings(own_pipe, read_embeddings(str(folder)))
    assert "note: 3 files among the embeddings are left out" in capsys.readouterr().out
    assert len(chunks("a good circle", own_pipe.tokenizer)[0].ids) == 3
    for word, reason in (("pointer", "Git LFS"), ("damaged", "truncated"), ("style", "looks like a LoRA")):
        with pytest.raises(BadInput, match=f"{word}.* in the prompt: .*{reason}"):
            chunks(f"a {word}", own_pipe.tokenizer)
        with pytest.raises(BadInput, match=reason):
            read_embeddings(str(next(folder.glob(f"{word}.*"))))
