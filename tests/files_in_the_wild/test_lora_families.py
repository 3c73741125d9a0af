"""LoRA files as people have them: each family and way of naming changes what its formula says, and is taken back exactly."""

import json
import re
from itertools import product

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.ia3 import IA3Config

from sd_hyena.errors import BadInput
from sd_hyena.generate import engine
from sd_hyena.large.regions import Region
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.models.lora.applied import Given, loras_in
from sd_hyena.models.lora.lora_file import read_lora
from sd_hyena.models.lora.module_index import modules_of
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.students.student import StudentSpec, build_student
from sd_hyena.students.swap import swapped
from tests.conftest import IN01
from tests.files_in_the_wild import adapters
from tests.files_in_the_wild.adapters import answer, factors_of, merged, question, tensors_of, written
from tests.fixtures import image_of
from tests.gate import gated, sampled
from tests.generate.test_large_images import config, drawn
from tests.ldm import of_unet

TO_Q, TO_V = f"{IN01}.to_q", f"{IN01}.to_v"
LINEAR = {
    "unet": [TO_Q, IN01.replace("attn1", "attn2.to_k"), IN01.replace("attn1", "ff.net.0.proj")],
    "text_encoder": ["encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1"],
}
CONVOLUTIONS = {
    "unet": ["down_blocks.0.attentions.0.proj_in", "down_blocks.1.resnets.0.conv1", "up_blocks.1.upsamplers.0.conv"]
}
EVERYWHERE = {"unet": LINEAR["unet"] + CONVOLUTIONS["unet"], "text_encoder": LINEAR["text_encoder"]}
ATTENTIONS = {"unet": [TO_Q, TO_V, f"{IN01}.to_out.0", IN01.replace("attn1", "attn2.to_k")]}


def everything(pipe) -> dict:
    """All that could differ afterwards: where weights lie, their bits, hooks, modules."""
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    state = {}
    for network, owner in networks.items():
        assert "loras" not in vars(owner)
        for path, module in owner.named_modules():
            state[network, path] = id(module), len(module._forward_hooks), len(module._forward_pre_hooks)
            for name, weight in module.named_parameters(recurse=False):
                state[network, path, name] = id(weight), weight.data_ptr(), weight.detach().numpy().tobytes()
    return state


@pytest.fixture
def pipe(pipe):
    """The shipped pipeline, and proof that nothing is left of a LoRA, to the last bit."""
    before = everything(pipe)
    yield pipe
    assert everything(pipe) == before


def loras(*paths, **strengths):
    return [Given(read_lora(path), **strengths) for path in paths]


def says_what_the_formula_says(pipe, network, path, weight, tolerance=1e-5):
    module = getattr(pipe, network).get_submodule(path)
    x = question(module.weight)
    with torch.no_grad():
        torch.testing.assert_close(module(x).double(), answer(module, weight, x), atol=tolerance, rtol=tolerance)


# Families


@pytest.mark.parametrize("strength", [*gated([1.0]), -0.7])
@pytest.mark.parametrize("family", [*adapters.FAMILIES, *adapters.FAMILIES_OF_CONVOLUTIONS, "BOFT"])
def test_a_family_changes_every_kind_of_layer_by_its_formula_and_leaves_no_bit_behind(pipe, tmp_path, family, strength):
    modules = EVERYWHERE
    if family in adapters.FAMILIES_OF_CONVOLUTIONS:
        modules = {"unet": CONVOLUTIONS["unet"][1:]}
    tensors, factors = tensors_of(pipe, family, modules)
    was = {place: getattr(pipe, place[0]).get_submodule(place[1]).weight.detach().clone() for place in factors}
    with loras_in(pipe, loras(written(tmp_path / "x.safetensors", tensors), strength=strength)) as applied:
        assert applied.names == ("x",) and not applied.notes
        for place, own in factors.items():
            says_what_the_formula_says(pipe, *place, merged(was[place], own, strength))
            assert (merged(was[place], own, strength) - was[place]).abs().max() > 1e-3  # a test that can fail


@pytest.mark.parametrize("family", sampled(adapters.READ_BY_LYCORIS, 2))
def test_a_weight_is_merged_as_lycoris_itself_merges_it(pipe, tmp_path, family):
    """At strength 1. It reads LoHa and LoKr with alpha other than rank twice over (docs/log.md), so here they are equal."""
    from lycoris.modules import get_module, make_module

    chosen = CONVOLUTIONS["unet"][1:] if "CP" in family else EVERYWHERE["unet"]
    modules = {"unet": chosen[:4] if family == "BOFT" else chosen}  # its BOFT takes powers of two alone
    tensors, factors = tensors_of(pipe, family, modules)
    with loras_in(pipe, loras(written(tmp_path / "x.safetensors", tensors))):
        pass
    for (network, path), own in factors.items():
        module = getattr(pipe, network).get_submodule(path)
        theirs = {"alpha": torch.tensor(0.0)} | own
        kind, parts = get_module({f"m.{name}": value for name, value in theirs.items()}, "m")
        with torch.no_grad():
            peer = make_module(kind, parts, "m", module).get_merged_weight(shape=module.weight.shape)[0]
        with loras_in(pipe, loras(tmp_path / "x.safetensors")):
            says_what_the_formula_says(pipe, network, path, peer)


def test_lengths_belong_to_the_axis_that_has_so_many_and_of_a_square_to_the_one_that_their_shape_names(pipe, tmp_path):
    wide, square = IN01.replace("attn1", "attn2.to_k"), TO_Q
    for path, shape, rows in (
        (wide, (1, 32), True),
        (wide, (96,), False),
        (square, (32,), True),
        (square, (1, 32), False),
    ):
        was = pipe.unet.get_submodule(path).weight.clone()
        own = factors_of("LoRA", was.shape) | {
            "dora_scale": 1 + torch.arange(len(torch.zeros(shape).flatten())).view(shape)
        }
        file = written(
            tmp_path / "x.safetensors", {f"lora_unet_{path.replace('.', '_')}.{n}": v for n, v in own.items()}
        )
        meant = own | {"dora_scale": own["dora_scale"].view((-1, 1) if rows else (1, -1))}
        with loras_in(pipe, loras(file)):
            says_what_the_formula_says(pipe, "unet", path, merged(was, meant), 1e-4)


def test_norms_and_biases_take_their_differences(pipe, tmp_path):
    norm, conv = "down_blocks.0.resnets.0.norm1", "down_blocks.0.resnets.0.conv1"
    before = {name: pipe.unet.state_dict()[name].clone() for name in (f"{norm}.weight", f"{norm}.bias", f"{conv}.bias")}
    draw = adapters._draw(1)
    tensors = {f"lora_unet_{norm.replace('.', '_')}.{part}": draw(32) for part in ("w_norm", "b_norm")}
    tensors |= {f"lora_unet_{conv.replace('.', '_')}.diff_b": draw(32)}
    with loras_in(pipe, loras(written(tmp_path / "x.safetensors", tensors), strength=0.5)):
        for (name, was), change in zip(before.items(), tensors.values(), strict=True):
            torch.testing.assert_close(pipe.unet.state_dict()[name], was + 0.5 * change)


def test_ranks_may_differ_from_module_to_module(pipe, tmp_path):
    draw, tensors = adapters._draw(2), {}
    for path, rank in ((TO_Q, 1), (TO_V, 7)):
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": draw(rank, 32), f"{name}.lora_up.weight": draw(32, rank)}
    was = {path: pipe.unet.get_submodule(path).weight.clone() for path in (TO_Q, TO_V)}
    up_down = list(tensors.values())
    with loras_in(pipe, loras(written(tmp_path / "x.safetensors", tensors))):
        says_what_the_formula_says(pipe, "unet", TO_Q, was[TO_Q] + up_down[1] @ up_down[0])  # no alpha: no scale
        says_what_the_formula_says(pipe, "unet", TO_V, was[TO_V] + up_down[3] @ up_down[2])


def test_files_on_one_module_add_up_in_any_order_whatever_their_families(pipe, tmp_path):
    families = ("LoRA", "DoRA", "OFT")
    files = [
        written(tmp_path / f"{family}.safetensors", tensors_of(pipe, family, {"unet": [TO_Q]}, seed=seed)[0])
        for seed, family in enumerate(families)
    ]
    was = pipe.unet.get_submodule(TO_Q).weight.clone()
    changes = [merged(was, factors_of(family, was.shape, seed + 1)) - was for seed, family in enumerate(families)]
    for order in (files, files[::-1]):
        with loras_in(pipe, loras(*order)) as applied:
            assert sorted(applied.names) == sorted(families)
            says_what_the_formula_says(pipe, "unet", TO_Q, was + sum(changes))


def test_text_encoders_may_be_given_a_strength_of_their_own(pipe, tmp_path):
    tensors, factors = tensors_of(pipe, "DoRA", LINEAR)
    was = {place: getattr(pipe, place[0]).get_submodule(place[1]).weight.clone() for place in factors}
    file = written(tmp_path / "x.safetensors", tensors)
    for strength, text_strength in ((0.3, 0.0), (0.0, 0.6), (0.3, -0.2)):
        with loras_in(pipe, loras(file, strength=strength, text_strength=text_strength)):
            for place, own in factors.items():
                expected = merged(was[place], own, strength if place[0] == "unet" else text_strength)
                says_what_the_formula_says(pipe, *place, expected)


# Names, dtypes, containers


@pytest.mark.parametrize("style", adapters.STYLES)
def test_a_module_is_found_under_every_name_that_programs_give_it(pipe, tmp_path, style):
    unet_alone = style in ("ComfyUI", "the original", "diffusers, attention processors")
    modules = ATTENTIONS if unet_alone else ATTENTIONS | {"text_encoder": LINEAR["text_encoder"]}
    tensors, factors = tensors_of(pipe, "LoRA", modules, style)
    was = {place: getattr(pipe, place[0]).get_submodule(place[1]).weight.clone() for place in factors}
    with loras_in(pipe, loras(written(tmp_path / "x.safetensors", tensors))) as applied:
        assert not applied.notes
        for place, own in factors.items():
            says_what_the_formula_says(pipe, *place, merged(was[place], own))


@pytest.mark.parametrize("which", ["shared_pipe", "tiny_sdxl"])
def test_every_module_of_a_unet_is_found_under_its_original_name(which, request):
    unet = request.getfixturevalue(which).unet
    index = modules_of(unet)
    for ours, theirs in zip(unet.state_dict(), of_unet(unet), strict=True):
        theirs = theirs.removeprefix("model.diffusion_model.").rpartition(".")[0].replace(".", "_")
        assert index[theirs][0] == ours.rpartition(".")[0]


def test_both_text_encoders_of_sdxl_take_their_own_parts(tiny_sdxl, tmp_path):
    unet = next(path for path in dict(tiny_sdxl.unet.named_modules()) if path.endswith("attn2.to_k"))
    inner = lambda encoder: next(p for p, _ in encoder.named_modules() if p.endswith("layers.1.self_attn.q_proj"))
    modules = {"unet": [unet], "text_encoder": [inner(tiny_sdxl.text_encoder)]}
    modules |= {"text_encoder_2": [inner(tiny_sdxl.text_encoder_2)]}
    for style in ("kohya, SDXL", "kohya, A1111", "diffusers", "PEFT"):
        if style == "PEFT":  # whose files are of one network each, and do not say of which
            modules = {"text_encoder_2": modules["text_encoder_2"]}
        tensors, factors = tensors_of(tiny_sdxl, "DoRA", modules, style)
        was = {place: getattr(tiny_sdxl, place[0]).get_submodule(place[1]).weight.clone() for place in factors}
        with loras_in(tiny_sdxl, loras(written(tmp_path / "x.safetensors", tensors))) as applied:
            assert not applied.notes
            for place, own in factors.items():
                says_what_the_formula_says(tiny_sdxl, *place, merged(was[place], own))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_the_stored_numbers_count_in_whatever_dtype_and_container(pipe, tmp_path, dtype, suffix):
    tensors, factors = tensors_of(pipe, "LoRA", {"unet": [TO_Q]})
    was = pipe.unet.get_submodule(TO_Q).weight.clone()
    stored = {name: value.to(dtype).float() for name, value in factors["unet", TO_Q].items()}
    with loras_in(pipe, loras(written(tmp_path / f"x{suffix}", tensors, dtype))):
        says_what_the_formula_says(pipe, "unet", TO_Q, merged(was, stored))


def test_what_kohya_wrote_is_drawn_as_diffusers_draws_it(own_pipe, tmp_path):
    tensors, _ = tensors_of(own_pipe, "LoRA", {"unet": ATTENTIONS["unet"]})
    file = written(tmp_path / "x.safetensors", tensors)
    with loras_in(own_pipe, loras(file)):
        ours = image_of(own_pipe, steps=2)
    plain = image_of(own_pipe, steps=2)
    own_pipe.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = image_of(own_pipe, steps=2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - plain).norm() > 1e-2 * plain.norm()


PEFT_CONFIGS = {
    "LoRA": LoraConfig(r=4, lora_alpha=10, init_lora_weights=False),
    "LoRA, by the root": LoraConfig(r=4, lora_alpha=10, use_rslora=True, init_lora_weights=False),
    "LoRA, alphas": LoraConfig(r=4, lora_alpha=10, alpha_pattern={"attn1.to_v": 3}, init_lora_weights=False),
    "DoRA": LoraConfig(r=4, lora_alpha=10, use_dora=True, init_lora_weights=False),
    "LoHa": LoHaConfig(r=4, alpha=10, init_weights=False),
    "LoKr": LoKrConfig(r=4, alpha=10, init_weights=False),
    "(IA)³": IA3Config(feedforward_modules=[], init_ia3_weights=False),
}


@pytest.mark.parametrize("family", PEFT_CONFIGS)
def test_what_peft_itself_writes_means_what_it_means_to_peft(own_pipe, pipe, tmp_path, family):
    settings = PEFT_CONFIGS[family]
    settings.target_modules = [TO_Q, TO_V, "down_blocks.1.resnets.0.conv1"]
    torch.manual_seed(0)
    model = get_peft_model(own_pipe.unet, settings)
    for name, weight in model.named_parameters():
        if "ia3_l" in name or "magnitude" in name:
            torch.nn.init.uniform_(weight, 0.5, 2)
    model.save_pretrained(tmp_path)
    with loras_in(pipe, loras(tmp_path / "adapter_model.safetensors")), torch.no_grad():
        for path in settings.target_modules:
            ours = pipe.unet.get_submodule(path)
            x = question(ours.weight)
            theirs = model.base_model.model.get_submodule(path)(x)
            torch.testing.assert_close(ours(x), theirs, atol=1e-5, rtol=1e-5)


def test_the_alpha_in_the_header_of_diffusers_files_counts(pipe, tmp_path):
    tensors, factors = tensors_of(pipe, "LoRA", {"unet": [TO_Q, TO_V]}, "diffusers")
    tensors = {name: value for name, value in tensors.items() if not name.endswith("alpha")}
    header = {"unet.r": 3, "unet.lora_alpha": 12, "unet.alpha_pattern": {TO_V: 1.5}}
    file = written(tmp_path / "x.safetensors", tensors, metadata={"lora_adapter_metadata": json.dumps(header)})
    was = {path: pipe.unet.get_submodule(path).weight.clone() for path in (TO_Q, TO_V)}
    with loras_in(pipe, loras(file)):
        for path, alpha in ((TO_Q, 12.0), (TO_V, 1.5)):
            own = factors["unet", path] | {"alpha": torch.tensor(alpha)}
            says_what_the_formula_says(pipe, "unet", path, merged(was[path], own))


# What is counted and what is refused


def test_a_module_that_the_model_does_not_have_is_named(pipe, tmp_path):
    tensors, _ = tensors_of(pipe, "LoRA", {"unet": [TO_Q, TO_V]})
    strange = {n.replace("down_blocks_0", "down_blocks_7"): v for n, v in tensors.items() if "to_q" in n}
    (note,) = used(pipe, written(tmp_path / "x.safetensors", tensors | strange))
    assert "changes 2 of its 3 modules; this model has no lora_unet_down_blocks_7_" in note and "x.safetensors" in note
    (note,) = used(pipe, written(tmp_path / "x.safetensors", tensors | {"lora_unet_x.bias_indices": torch.ones(2)}))
    assert "lora_unet_x.bias_indices is left out; LoRA, LoCon, LoHa" in note
    name = next(iter(tensors)).split(".")[0]
    (note,) = used(pipe, written(tmp_path / "x.safetensors", tensors | {f"{name}.rescale": torch.ones(2)}))
    assert f"{name}.rescale is left out" in note


def used(pipe, path) -> tuple[str, ...]:
    with loras_in(pipe, loras(path)) as applied:
        return applied.notes


def with_one(tensors, end, value):
    return tensors | {name: value for name in list(tensors)[:3] if name.endswith(end)}


NAME = f"lora_unet_{TO_Q.replace('.', '_')}"
GOOD = {f"{NAME}.{part}": value for part, value in factors_of("LoRA", (32, 32)).items()}
ELSEWHERE = {f"lora_unet_{n}.{part}": v for n in ("a_b", "c") for part, v in factors_of("LoRA", (4, 4)).items()}
REFUSED = {  # found in the file, before any model
    "NaN": (with_one(GOOD, "down.weight", torch.full((3, 32), torch.nan)), "is damaged: .*lora_down.weight holds NaN"),
    "infinities": (with_one(GOOD, "alpha", torch.tensor(torch.inf)), "is damaged: .*alpha holds NaN or infinities"),
    "NaN in float8": (
        with_one(GOOD, "down.weight", torch.full((3, 32), torch.nan).to(torch.float8_e5m2)), "is damaged"),
    "no numbers": (with_one(GOOD, "down.weight", torch.empty(0, 32)), "holds no real numbers"),
    "half a LoRA": ({n: v for n, v in GOOD.items() if "up" not in n}, r"is not whole: .*to_q has lora_down alone"),
    "half a LoHa": ({f"{NAME}.hada_w1_a": torch.ones(32, 3)}, "is not whole: .*hada_w1_a alone"),
    "twice": (GOOD | {f"{NAME}.lora_A.weight": torch.ones(3, 32)}, "says twice what lora_unet_"),
    "a model": ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)}, "looks like a Stable Diffusion mod"),
    "a VAE": ({"decoder.conv_in.weight": torch.ones(2, 2)}, "looks like a VAE; give it as --vae"),
    "anything": ({"x.y": torch.ones(2)}, "looks like no LoRA that is known here: x.y; LoRA, LoCon, LoHa"),
    "an embedding in pieces": (
        {"bundle_emb.a.string_to_param.x": torch.ones(2, 96), "bundle_emb.a.string_to_param.y": torch.ones(2, 96)},
        "bundles an embedding 'a' of x, y"),
    "an embedding of whole numbers": ({"bundle_emb.a.clip_l": torch.ones(2, 9, dtype=int)}, "is no list of vectors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_right_is_refused_before_a_model_is_loaded(tmp_path, case):
    tensors, said = REFUSED[case]
    for suffix in (".safetensors", ".pt"):
        with pytest.raises(BadInput, match=said) as error:
            read_lora(written(tmp_path / f"x{suffix}", tensors))
        assert f"x{suffix}" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


FLUX = "lora_unet_double_blocks_0_img_attn_proj"
MISFITS = {  # found where file and model meet
    "zeros": ({n: torch.zeros_like(v) for n, v in GOOD.items()}, "changes nothing: its numbers are zero"),
    "zeros of a LoHa": ({f"{NAME}.{p}": 0 * v for p, v in factors_of("LoHa", (32, 32)).items()}, "numbers are zero"),
    "another shape": (
        {f"{NAME}.{p}": v for p, v in factors_of("LoRA", (32, 48)).items()},
        r"does not fit this model: lora_unet_.*to_q is of 32x48, the model's of 32x32"),
    "factors that do not go together": (GOOD | {f"{NAME}.lora_up.weight": torch.ones(32, 5)}, "does not fit this model"),
    "another LoKr": ({f"{NAME}.{p}": v for p, v in factors_of("LoKr", (32, 48)).items()}, "is of 32x48, the model's"),
    "another OFT": ({f"{NAME}.oft_blocks": torch.ones(3, 5, 5)}, "does not fit this model"),
    "an odd BOFT": ({f"{NAME}.oft_blocks": torch.ones(1, 2, 3, 3)}, "does not fit this model"),
    "another (IA)³": ({f"{NAME}.weight": torch.ones(7), f"{NAME}.on_input": torch.tensor(False)}, "does not fit"),
    "another whole difference": ({f"{NAME}.diff": torch.ones(32, 31)}, "is of 32x31, the model's of 32x32"),
    "another number of lengths": (GOOD | {f"{NAME}.dora_scale": torch.ones(31, 1)}, "has 31 lengths for a weight of 32x32"),
    "a bias for none": (GOOD | {f"{NAME}.diff_b": torch.ones(32)}, "has a bias of 32, the model's none"),
    "more than any memory": (
        {f"{NAME}.lora_up.weight": torch.ones(500_000, 1), f"{NAME}.lora_down.weight": torch.ones(1, 500_000)},
        "is of 500000x500000, the model's of 32x32"),
    "SDXL": (
        {f"{NAME.replace('attn1_to_q', 'attn2_to_k')}.{p}": v for p, v in factors_of("LoRA", (32, 2048)).items()},
        "is of 32x2048, the model's of 32x96; it was made for SDXL"),
    "Flux": (
        {f"{FLUX}.{p}": v for p, v in factors_of("LoRA", (8, 8)).items()},
        f"changes nothing: this model has none of its 1 modules, the first of them {FLUX}; it was made for Flux"),
    "some model": (ELSEWHERE, "none of its 2 modules, the first of them lora_unet_a_b; give one that was made for it"),
    "a transformer": (
        {f"transformer.transformer_blocks.0.attn.to_q.{p}": v for p, v in factors_of("LoRA", (8, 8)).items()},
        "it was made for a model with a transformer instead of a UNet"),
    "one module under two names": (
        GOOD | {n.replace(NAME, f"unet.{TO_Q}"): v for n, v in GOOD.items()}, "says twice what down_blocks.0.*as unet.down"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_file_of_another_model_is_refused_in_one_line(pipe, tmp_path, case):
    tensors, said = MISFITS[case]
    with (
        pytest.raises(BadInput, match=said) as error,
        loras_in(pipe, loras(written(tmp_path / "x.safetensors", tensors))),
    ):
        pass
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("family, part", [("LoRA", "lora_up"), ("LoRA", "alpha"), ("DoRA", "dora_scale")])
def test_changes_that_a_dtype_cannot_hold_are_refused(own_pipe, tmp_path, family, part):
    tensors, _ = tensors_of(own_pipe, family, {"unet": [TO_Q]})
    tensors = {name: value * 1e37 if part in name else value for name, value in tensors.items()}
    own_pipe.unet.to(torch.float16)
    before = everything(own_pipe)
    file = written(tmp_path / "x.safetensors", tensors)
    with (
        pytest.raises(BadInput, match="too large for float16; give it a smaller weight"),
        loras_in(own_pipe, loras(file)),
    ):
        pass
    assert everything(own_pipe) == before


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e30", "-1e3"])
def test_a_weight_that_is_no_weight_is_refused_with_its_entry(tmp_path, weight):
    file = written(tmp_path / "x.safetensors", GOOD)
    with pytest.raises(BadInput, match=re.escape(f":{weight}': the weight must lie between -100 and 100")):
        parse(GenerateConfig, ["--lora", f"{file}:{weight}"])


def test_the_bits_come_back_after_an_exception_too(pipe, tmp_path):
    tensors, _ = tensors_of(pipe, "LoRA", EVERYWHERE)
    file = written(tmp_path / "x.safetensors", tensors)
    other = written(tmp_path / "y.safetensors", tensors_of(pipe, "OFT", EVERYWHERE)[0])
    with pytest.raises(ZeroDivisionError), loras_in(pipe, loras(file, other)):
        raise ZeroDivisionError


# Regions, students, pictures


SQUARE = dict(width=64, height=64)


@pytest.mark.parametrize("family", [*gated(["LoRA", "DoRA"]), "OFT", *gated(["a whole difference"])])
def test_a_region_has_its_own_loras_of_any_family_and_its_text_too(pipe, tmp_path, family):
    """In two halves that do not touch, one with a LoRA and one without: each is the picture that it would be by itself."""
    files = []
    for number, name in enumerate(("style.v1", "half")):  # a name with a dot; a name that modules have themselves
        modules = EVERYWHERE if number else {"unet": EVERYWHERE["unet"]}
        tensors, _ = tensors_of(pipe, family, modules, seed=10 * number)
        files.append(written(tmp_path / f"{name}.safetensors", tensors))
    latents = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))

    def predicted(x, regions=()):
        with tiled_diffusion(pipe, tile_width=8, tile_height=8, overlap=0, regions=regions), torch.no_grad():
            told = torch.cat(pipe.encode_prompt("a red circle", torch.device("cpu"), 1, True)[1::-1])
            return pipe.unet(x, torch.tensor(500), told, return_dict=False)[0]

    told = ((("style.v1",), ()), (("style_v1", "half"), ("half",)))
    alone = {}
    for names, chosen in {(): [], ("style",): files[:1], ("half",): files[1:], ("style", "half"): files}.items():
        with loras_in(pipe, loras(*chosen, strength=0.5)):
            alone[names] = [predicted(latents[..., i : i + 8]) for i in (0, 8)]
    with loras_in(pipe, loras(*files, strength=0.5)):
        for adapters_, expected in zip(told, ((("style",), ()), (("style", "half"), ("half",))), strict=True):
            halves = [Region(x=i / 2, y=0, w=0.5, h=1, adapters=names) for i, names in enumerate(adapters_)]
            found = predicted(latents, halves)
            for i, names in enumerate(expected):
                torch.testing.assert_close(found[..., 8 * i : 8 * i + 8], alone[names][i], atol=1e-4, rtol=1e-3)
        whole = predicted(latents[..., :8])
        torch.testing.assert_close(whole, alone["style", "half"][0], atol=1e-5, rtol=1e-5)
        assert (whole - alone[()][0]).norm() > 1e-2 * whole.norm()
        with pytest.raises(BadInput, match=r"adapter 'other' is not loaded; there are style\.v1, half"):
            predicted(latents, [Region(x=0, y=0, w=1, h=1, adapters=("other",))])


@pytest.mark.parametrize("family, first", sampled(product(["LoRA", "DoRA", "LoKr"], ["swap", "LoRA"]), 3))
def test_a_student_reads_the_merged_projections_whichever_comes_first(pipe, tmp_path, family, first):
    torch.manual_seed(0)
    student = build_student(StudentSpec(IN01, "IN01", 32, "hyena2d", {"heads": 2}, None)).eval()
    tensors, factors = tensors_of(pipe, family, {"unet": [TO_Q, TO_V, f"{IN01}.to_out.0"]})
    file = written(tmp_path / "x.safetensors", tensors)
    attention = pipe.unet.get_submodule(IN01)
    by_hand = {path: merged(pipe.unet.get_submodule(path).weight, own).float() for (_, path), own in factors.items()}
    kept = {path: pipe.unet.get_submodule(path).weight.data for path in by_hand}
    with swapped(pipe.unet, {IN01: student}):
        plain = image_of(pipe, steps=1)
        for path, weight in by_hand.items():
            pipe.unet.get_submodule(path).weight.data = weight.detach()
        expected = image_of(pipe, steps=1)
        for path, weight in kept.items():
            pipe.unet.get_submodule(path).weight.data = weight
    around = [swapped(pipe.unet, {IN01: student}), loras_in(pipe, loras(file))]
    outer, inner = around if first == "swap" else around[::-1]
    with outer, inner:
        found = image_of(pipe, steps=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).norm() > 1e-3 * plain.norm() and pipe.unet.get_submodule(IN01) is attention


def test_a_dora_is_not_drawn_as_a_lora_and_the_command_says_what_it_leaves(tmp_path, loaded_once, own_pipe, capsys):
    tensors, _ = tensors_of(own_pipe, "DoRA", EVERYWHERE)
    dora = written(tmp_path / "dora.safetensors", tensors | {f"{FLUX}.diff": torch.ones(2)})
    lora = written(tmp_path / "lora.safetensors", {n: v for n, v in tensors.items() if "dora" not in n})
    pictures = [drawn(tmp_path, **SQUARE, lora=str(file)) for file in (dora, lora)] + [drawn(tmp_path, **SQUARE)]
    assert not any(np.array_equal(pictures[i], pictures[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    said = capsys.readouterr()
    assert said.out.count(f"changes 8 of its 9 modules; this model has no {FLUX}") == 1


@pytest.mark.parametrize("family", [*gated(["LoRA"]), "DoRA"])
def test_an_engine_that_stays_loaded_takes_a_lora_and_its_rounding_back(tmp_path, loaded_once, own_pipe, family):
    """Also after a drawing in half precision, for which the factors were rounded too."""
    tensors, _ = tensors_of(own_pipe, family, EVERYWHERE)
    file = str(written(tmp_path / "x.safetensors", tensors))
    kept = engine.Engine()
    draw = lambda **options: [
        np.array(d.image) for d in kept.draw(config(tmp_path, **SQUARE, steps=1, **options))
    ].pop()
    plain, told = draw(), draw(lora=file)
    draw(lora=file, optimize="bf16")
    again, half, back = draw(lora=file), draw(lora=f"{file}:0.5"), draw()
    assert np.array_equal(told, again) and np.array_equal(plain, back)
    assert not any(np.array_equal(a, b) for a, b in ((plain, told), (half, told), (half, plain)))
    written(tmp_path / "x.safetensors", {name: -value for name, value in tensors.items()})  # changed on disk
    assert not np.array_equal(draw(lora=file), told)
    kept.close()


def test_a_bundled_embedding_is_a_word_of_the_prompt_as_one_in_a_file_of_its_own_is(tmp_path, shared_pipe):
    vectors = 3 * torch.randn(2, 96, generator=torch.Generator().manual_seed(3))
    tensors, _ = tensors_of(shared_pipe, "LoRA", {"unet": [TO_Q]})
    alone = {"bundle_emb.wordless.string_to_param.*": vectors}
    read = read_lora(written(tmp_path / "x.safetensors", tensors | alone))
    assert torch.equal(read.embeddings["wordless"][0], vectors) and len(read.changes) == 1
    torch.save(vectors, tmp_path / "wordless.pt")
    lora = str(written(tmp_path / "y.safetensors", alone))
    bundled = drawn(tmp_path, **SQUARE, prompt="wordless on blue", lora=lora)
    assert np.array_equal(
        bundled, drawn(tmp_path, **SQUARE, prompt="wordless on blue", embeddings=str(tmp_path / "wordless.pt"))
    )
    assert not np.array_equal(bundled, drawn(tmp_path, **SQUARE, prompt="on blue", lora=lora))
    too_wide = written(tmp_path / "z.safetensors", {"bundle_emb.wide.string_to_param.*": torch.ones(1, 768)})
    with pytest.raises(BadInput, match=r"z\.safetensors' is for text encoders of width 768, the model's have 96"):
        drawn(tmp_path, **SQUARE, lora=str(too_wide))
