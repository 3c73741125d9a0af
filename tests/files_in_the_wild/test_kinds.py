"""A file is judged by all its names."""

import pytest
import torch
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.files.averaged import averages_as_weights
from sd_hyena.files.weights_kind import MODEL, kind_of, layout_of
from sd_hyena.models.location import model_path
from sd_hyena.models.single_file import LAYOUTS
from sd_hyena.options import given_path
from tests.files_in_the_wild import layouts
from tests.files_in_the_wild.conftest import assert_same, loaded
from tests.gate import gated, sampled
from tests.models.test_single_file import of_layout

ONE = torch.ones(2, 2)
STRAYS = {
    "a LoRA's": {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": ONE,
        "lora_te_x.alpha": torch.ones(()),
    },
    "diffusers' LoRA's": {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": ONE},
    "a LoHa's": {"lycoris_mid.hada_w1_a": ONE},
    "a ControlNet's": {"control_model.input_blocks.0.0.weight": ONE},
    "a text encoder's": {"text_model.embeddings.token_embedding.weight": ONE},
    "an embedding's": {"emb_params": ONE},
    "a student's": {"down_blocks.0.attentions.0.transformer_blocks.0.attn1/x": ONE},
    "a merge's": {"__index_level_0__": torch.arange(3), "cond_stage_model.logit_scale": torch.ones(())},
}


@pytest.mark.parametrize("stray", sampled(STRAYS, 8))
def test_a_whole_model_with_stray_tensors_is_that_model(state, shared_pipe, tmp_path, stray):
    path = layouts.saved(tmp_path / "merged.safetensors", state | STRAYS[stray])
    assert_same(loaded(path), shared_pipe)


def test_a_stray_layer_inside_the_unet_is_named_for_it_would_be_lost(state, tmp_path):
    path = layouts.saved(tmp_path / "x.safetensors", state | {layouts.LAYER.replace("weight", "lora_up.weight"): ONE})
    with pytest.raises(BadInput, match=r"does not know .*proj_in\.lora_up\.weight") as error:
        loaded(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", *gated([".ckpt"])])
def test_a_file_of_averages_alone_is_the_model_of_these(state, shared_pipe, tmp_path, suffix):
    path = layouts.saved(tmp_path / f"ema{suffix}", layouts.averaged(state))
    assert_same(loaded(path), shared_pipe)


def test_beside_weights_averages_are_left(state, shared_pipe, tmp_path):
    twice = layouts.averaged({name: value + 1 for name, value in state.items()})
    path = layouts.saved(tmp_path / "full.safetensors", {n: v for n, v in twice.items() if "ema" in n} | state)
    assert_same(loaded(path), shared_pipe)


@pytest.mark.parametrize("layout", [*gated(["sd15", "sd21"]), "sdxl"])
def test_the_names_of_all_layers_of_the_published_models_are_restored(layout):
    whole = layouts.whole(of_layout(layout), layout)
    assert (
        averages_as_weights(layouts.averaged(whole)).keys() - {"model_ema.decay", "model_ema.num_updates"}
        == whole.keys()
    )


def test_what_is_no_model_still_is_none_whatever_stray_names_it_has(state, tmp_path):
    vae = {name: value for name, value in state.items() if name.startswith("first_stage_model.")}
    for name, tensors, said in (
        ("lora", STRAYS["a LoRA's"] | vae, "a LoRA"),
        ("vae", vae | {"loss.logvar": torch.ones(())}, "a VAE"),
        (
            "unet",
            {n.removeprefix(layouts.UNET): v for n, v in state.items() if n.startswith(layouts.UNET)},
            "the UNet alone",
        ),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(BadInput, match=f"looks like {said}"):
            model_path(str(tmp_path / f"{name}.safetensors"))


def test_a_model_in_the_place_of_a_lora_or_a_vae_is_named_though_it_holds_one_too(state, tmp_path):
    path = str(layouts.saved(tmp_path / "merged.safetensors", state | STRAYS["a LoRA's"]))
    for option in (given_path.loras, given_path.vae):
        with pytest.raises(BadInput, match="looks like a Stable Diffusion model; give it as -m FILE"):
            option(path)


def test_a_vae_with_the_loss_it_was_trained_by_is_read(state, tmp_path, shared_pipe):
    from sd_hyena.models.vae import check_vae, load_vae
    from sd_hyena.options.shipped import SHIPPED_MODEL

    vae = {n.removeprefix("first_stage_model."): v for n, v in state.items() if n.startswith("first_stage_model.")}
    vae |= {"loss.discriminator.main.0.weight": ONE, "model_ema.decay": torch.ones(())}
    save_file(vae, tmp_path / "kl.vae.safetensors")
    check_vae(str(tmp_path / "kl.vae.safetensors"))
    read = load_vae(str(tmp_path / "kl.vae.safetensors"), SHIPPED_MODEL / "vae", torch.float32).state_dict()
    assert all(torch.equal(read[name], value) for name, value in shared_pipe.vae.state_dict().items())


def test_the_published_layouts_in_comfyuis_names_are_known():
    for layout, renamings in COMFYUI.items():
        names = layouts.renamed(layouts.whole(of_layout(layout), layout), *renamings)
        shapes = {name: tuple(value.shape) for name, value in names.items()}
        assert kind_of(names) is MODEL and layout_of(shapes) == layout and (LAYOUTS / layout).is_dir()


COMFYUI = {
    "sd15": [("cond_stage_model.", "text_encoders.clip_l.")],
    "sd21": [("cond_stage_model.model.", "text_encoders.clip_h.model.")],
    "sdxl": [
        ("conditioner.embedders.0.", "text_encoders.clip_l."),
        ("conditioner.embedders.1.model.", "text_encoders.clip_g.model."),
    ],
}


def test_sdxl_without_its_second_text_encoder_says_so():
    names = layouts.renamed(layouts.whole(of_layout("sdxl"), "sdxl"), *COMFYUI["sdxl"])
    shapes = {name: tuple(value.shape) for name, value in names.items() if "clip_g" not in name}
    with pytest.raises(BadInput, match="no second text encoder"):
        layout_of(shapes)
