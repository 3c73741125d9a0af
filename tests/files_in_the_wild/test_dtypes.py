"""Dtypes and containers of the wild."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.files.quantised import widened
from sd_hyena.files.weights import check_weights, read_checkpoint, read_pickle
from sd_hyena.models.location import model_path
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.models.vae import load_vae
from sd_hyena.options import given_path
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.text.textual_inversion import read_embeddings
from tests import ldm
from tests.files_in_the_wild import layouts
from tests.files_in_the_wild.conftest import CPU, assert_holds, assert_same, loaded
from tests.gate import gated, sampled


@pytest.mark.parametrize("dtype", layouts.FLOAT8, ids=str)
def test_float8_is_widened_exactly(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert widened(every).dtype == torch.float16
    assert torch.equal(widened(every).double().nan_to_num(7), every.double().nan_to_num(7))


@pytest.mark.parametrize("dtype", sampled(layouts.FLOAT8[:2], 2), ids=str)
def test_a_model_in_float8_is_the_model_of_these_numbers(state, tmp_path, dtype):
    file = layouts.cast(state, "", dtype)
    assert_holds(loaded(layouts.saved(tmp_path / "fp8.safetensors", file)), file)


def test_a_unet_alone_in_float8_and_a_vae_of_its_own(state, shared_pipe, tmp_path):
    file = layouts.cast(state, layouts.UNET, torch.float8_e4m3fn)
    path = layouts.saved(tmp_path / "fp8.ckpt", file)
    pipe = loaded(path)
    assert_same(pipe, shared_pipe, "vae", "text_encoder")
    assert torch.equal(pipe.unet.conv_in.weight, shared_pipe.unet.conv_in.weight.to(torch.float8_e4m3fn).float())
    vae = {name: value.to(torch.float8_e5m2) for name, value in ldm.of_vae(shared_pipe.vae, "").items()}
    save_file(vae, tmp_path / "vae.safetensors")
    read = load_vae(str(tmp_path / "vae.safetensors"), SHIPPED_MODEL / "vae", torch.float32)
    assert torch.equal(
        read.decoder.conv_in.weight, shared_pipe.vae.decoder.conv_in.weight.to(torch.float8_e5m2).float()
    )


def test_a_folder_in_float8_is_read_as_its_numbers(shared_pipe, tmp_path):
    shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    unet = {name: value.to(torch.float8_e4m3fn) for name, value in shared_pipe.unet.state_dict().items()}
    save_file(unet, tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    read = load_pipeline(model_path(str(tmp_path / "model")), CPU, torch.float32).unet.state_dict()
    assert all(torch.equal(read[name], value.float()) for name, value in unet.items())


@pytest.mark.parametrize("newer", [False, True], ids=["scaled_fp8", "comfy_quant"])
@pytest.mark.parametrize("by_row", [*gated([False]), True], ids=["one scale", "a scale for each row"])
def test_scales_are_multiplied_in(state, tmp_path, newer, by_row):
    file, truth = layouts.scaled(state, newer, by_row)
    assert_holds(loaded(layouts.saved(tmp_path / "scaled.safetensors", file)), truth)


@pytest.mark.parametrize(
    "extra, said",
    [
        ({"proj_in.weight_scale": torch.ones(5)}, r"proj_in\.weight_scale is of \(5,\)"),
        ({"proj_in.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}, "quantised as nvfp4"),
        ({"proj_in.comfy_quant": torch.tensor(list(b"{"), dtype=torch.uint8)}, "does not say how"),
        ({"proj_in.weight.absmax": torch.ones(3)}, "blocks of 4 bits"),
        ({"proj_in.weight.quant_state.bitsandbytes__nf4": torch.ones(3)}, "blocks of 4 bits"),
    ],
)
def test_what_is_quantised_in_another_way_is_named(state, tmp_path, extra, said):
    extra = {layouts.LAYER.replace("proj_in.weight", name): value for name, value in extra.items()}
    path = layouts.saved(tmp_path / "x.safetensors", state | extra)
    with pytest.raises(BadInput, match=said) as error:
        loaded(path)
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_not_a_number_in_float8_is_found(state, tmp_path):
    state = layouts.cast(copy.deepcopy(state), layouts.UNET, torch.float8_e4m3fn)
    state[layouts.LAYER].view(torch.uint8)[0, 0] = 0x7F
    with pytest.raises(BadInput, match=r"is damaged: .*proj_in\.weight holds NaN"):
        loaded(layouts.saved(tmp_path / "x.safetensors", state))


def test_text_encoders_in_comfyuis_names_are_read(state, shared_pipe, tmp_path):
    path = layouts.saved(
        tmp_path / "comfy.safetensors", layouts.renamed(state, ("cond_stage_model.", "text_encoders.clip_l."))
    )
    assert_same(loaded(path), shared_pipe)


@pytest.mark.parametrize("openclip", [False, True], ids=["transformers' names", "OpenCLIP's names"])
def test_both_text_encoders_of_sdxl_in_comfyuis_names_are_read(tiny_sdxl, tmp_path, monkeypatch, openclip):
    from diffusers import EulerDiscreteScheduler

    monkeypatch.setattr(tiny_sdxl, "scheduler", EulerDiscreteScheduler())
    tiny_sdxl.save_pretrained(tmp_path / "model")
    state = layouts.whole(tiny_sdxl, "sdxl")
    if openclip:
        state = layouts.renamed(state, ("conditioner.embedders.1.", "text_encoders.clip_g."))
    else:
        state = {name: value for name, value in state.items() if not name.startswith("conditioner.embedders.1.")}
        state |= ldm.of_clip(tiny_sdxl.text_encoder_2, "text_encoders.clip_g.")
        projection = state.pop("text_encoders.clip_g.transformer.text_model.text_projection.weight")
        state["text_encoders.clip_g.transformer.text_projection.weight"] = projection
        state["text_encoders.clip_g.logit_scale"] = torch.ones(())
    state = layouts.renamed(state, ("conditioner.embedders.0.", "text_encoders.clip_l."))
    pipe = loaded(layouts.saved(tmp_path / "comfy.safetensors", state, tmp_path / "model"))
    assert_same(pipe, tiny_sdxl, "unet", "text_encoder", "text_encoder_2")


def test_what_torch_before_1_6_wrote_is_read(state, shared_pipe, tmp_path):
    path = layouts.saved(tmp_path / "old.ckpt", {})
    layouts.before_zip({"epoch": 3, "state_dict": {name: value.half() for name, value in state.items()}}, path)
    assert_same(loaded(path), shared_pipe)  # the shipped weights are of half precision themselves
    embedding = layouts.before_zip({"string_to_param": {"*": torch.ones(2, 96)}}, tmp_path / "style.pt")
    assert torch.equal(read_embeddings(str(embedding))[0].vectors[0], torch.ones(2, 96))


def test_an_old_file_that_claims_more_than_it_holds_or_asks_for_more_than_tensors_is_refused(tmp_path):
    path = layouts.before_zip({"state_dict": {"x": torch.ones(50_000)}}, tmp_path / "old.ckpt")
    content = path.read_bytes()
    true, false = b"M" + (50_000).to_bytes(2, "little"), b"J" + (2**31 - 1).to_bytes(4, "little")
    assert content.count(true) == 2  # the storage's length, the tensor's
    path.write_bytes(content.replace(true, false))
    for read in (check_weights, read_checkpoint):
        with pytest.raises(BadInput, match=r"old\.ckpt.*claims 2147483647 numbers"):
            read(path)
    path.write_bytes(content[:-1000])
    with pytest.raises(BadInput, match=r"old\.ckpt"):
        read_checkpoint(path)

    path = layouts.before_zip({"x": print}, tmp_path / "more.ckpt")
    with pytest.raises(BadInput, match=r"not executed \(it asks for .*print"):
        read_pickle(path)


def test_an_embedding_of_the_original_code_holds_a_parameter_dict(tmp_path):
    vectors = torch.randn(3, 96)
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": vectors})}
    torch.save(content, tmp_path / "cat-toy.pt")
    (embedding,) = read_embeddings(str(tmp_path / "cat-toy.pt"))
    assert embedding.word == "cat-toy" and torch.equal(embedding.vectors[0], vectors)
    layouts.before_zip(content, tmp_path / "older.pt")  # with the class's source, which torch.load refuses to look at
    with pytest.raises(BadInput, match=r"older\.pt.*not executed \(Only persistent_load of storage") as error:
        read_embeddings(str(tmp_path / "older.pt"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", layouts.FLOAT8[:2], ids=str)
def test_embeddings_in_float8_are_read(tmp_path, dtype):
    vectors = torch.randn(2, 96).to(dtype)
    save_file({"emb_params": vectors}, tmp_path / "a.safetensors")
    torch.save({"string_to_param": {"*": vectors}}, tmp_path / "b.pt")
    for embedding in read_embeddings(f"{tmp_path}/a.safetensors,{tmp_path}/b.pt"):
        assert torch.equal(embedding.vectors[0].float(), vectors.float())


@pytest.mark.parametrize(
    "name", ["MODEL.SAFETENSORS", *gated(["Model.SafeTensors", "model.sft", "MODEL.CKPT", "model.PT"])]
)
def test_suffixes_are_read_in_any_case(state, shared_pipe, tmp_path, name):
    assert_same(loaded(layouts.saved(tmp_path / name, state)), shared_pipe)


def test_suffixes_of_vaes_and_embeddings_too(shared_pipe, tmp_path):
    save_file(ldm.of_vae(shared_pipe.vae, ""), tmp_path / "X.VAE.SAFETENSORS")
    given_path.vae(str(tmp_path / "X.VAE.SAFETENSORS"))
    read = load_vae(str(tmp_path / "X.VAE.SAFETENSORS"), SHIPPED_MODEL / "vae", torch.float32)
    assert torch.equal(read.decoder.conv_in.weight, shared_pipe.vae.decoder.conv_in.weight)
    (tmp_path / "words").mkdir()
    save_file({"emb_params": torch.ones(1, 96)}, tmp_path / "words" / "A.SAFETENSORS")
    torch.save(torch.ones(1, 96), tmp_path / "words" / "B.PT")
    assert [one.word for one in read_embeddings(str(tmp_path / "words"))] == ["A", "B"]


STAND_INS = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0\nsize 4265146304\n",
    "git-annex pointer": b"/annex/objects/SHA256E-s4265146304--6ce0.safetensors\n",
    "web page": b"\xef\xbb\xbf<!DOCTYPE html>\n<html><title>Log in</title></html>",
    "text of 15 bytes": b"Entry not found",
}


@pytest.mark.parametrize("what", STAND_INS)
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "X.BIN"])
def test_what_a_download_left_in_place_of_weights_is_called_by_its_name(tmp_path, what, name):
    path = tmp_path / name
    path.write_bytes(STAND_INS[what])
    for read in (given_path.model, given_path.vae, check_weights, read_checkpoint):
        with pytest.raises(BadInput, match=f"{name}' is a {what}") as error:
            read(str(path))
        assert "\n" not in str(error.value)


def test_other_formats_are_called_by_their_name(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\0\0\0\3")
    with pytest.raises(BadInput, match=r"x\.gguf' is GGUF.*expected a \.safetensors"):
        given_path.model(str(tmp_path / "x.gguf"))
