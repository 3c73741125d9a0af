"""Students in ComfyUI's own sampler, against diffusers and against another way into the same model."""

import logging

import pytest
import torch

from sd_hyena.students.checkpoint import StudentFile, save_students
from tests.comfyui import models
from tests.comfyui.engine import call
from tests.conftest import IN01

PROMPT = "a red circle left of two blue squares on green stripes"


@pytest.fixture(scope="module")
def texts(shared_pipe):
    return shared_pipe.encode_prompt(PROMPT, "cpu", 1, True, "")


@pytest.fixture(scope="module")
def level0(shared_pipe):
    return models.students_of(shared_pipe.unet, "level0")


@pytest.fixture
def hyena(comfy, base, level0):
    """As a user gets them: from a file in models/hyena."""
    save_students(base / "models" / "hyena" / "level0.safetensors", StudentFile(level0, {"step": 7}))
    return call(comfy, "HyenaLoadStudents", file="level0.safetensors", dtype="as in the file")[0]


def applied(comfy, model, hyena, sites="all", start=0.0, end=1.0):
    return call(comfy, "HyenaApplyStudents", model=model, students=hyena, sites=sites, start=start, end=end)[0]


def swap_of(model):
    return model.model_options["transformer_options"]["patches"]["attn1_patch"][-1]


def difference(a, b):
    """Of latents as the UNet has them."""
    assert a.shape == b.shape
    return (a - b).abs().max().item() * models.SCALE


@pytest.mark.parametrize("height, width, batch", [(32, 32, 1), (35, 27, 2)])
def test_latents_are_those_of_diffusers_at_odd_sizes_too(
    comfy, model, unet, hyena, level0, texts, height, width, batch
):
    x = models.noise(height, width, batch)
    want = models.drawn_by_diffusers(unet, texts, x, students=lambda step: level0)
    got = models.drawn(applied(comfy, model, hyena), texts, x)
    assert difference(got, want) < 1e-4 < 0.1 < difference(want, models.drawn_by_diffusers(unet, texts, x))


def test_a_lora_on_a_replaced_site_acts_before_and_behind_the_node(comfy, model, own_pipe, hyena, level0, texts):
    import comfy.sd

    lora, unet = {}, own_pipe.unet
    generator = torch.Generator().manual_seed(1)
    for name, module in unet.get_submodule(IN01).named_modules():
        if isinstance(module, torch.nn.Linear):
            up, down = (torch.randn(shape, generator=generator) * 0.2 for shape in ((32, 4), (4, 32)))
            key = f"lora_unet_{IN01.replace('.', '_')}_{name.replace('.', '_')}"
            lora |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)}
            module.weight.data += 0.7 * 0.5 * up @ down
    assert len(lora) == 12
    x = models.noise(32, 24)
    want = models.drawn_by_diffusers(unet, texts, x, students=lambda step: level0)
    plain = models.drawn(applied(comfy, model, hyena), texts, x)
    before = applied(comfy, comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0], hyena)
    behind = comfy.sd.load_lora_for_models(applied(comfy, model, hyena), None, lora, 0.7, 0)[0]
    for both in (before, behind):
        assert difference(models.drawn(both, texts, x), want) < 1e-4 < difference(plain, want)


@pytest.mark.parametrize(
    "dtype, side, close", [(torch.float32, 32, 1e-5), (torch.bfloat16, 16, 0.1), (torch.float16, 8, 0.01)]
)
def test_areas_and_half_precision_are_as_with_the_module_itself_replaced(
    comfy, unet, hyena, level0, texts, dtype, side, close
):
    """The right half has its own prompt, so students meet grids of the whole and of the half in one step."""
    model = models.patcher_of(unet, dtype)
    half = models.condition(texts[1], area=(side, side // 2, 0, side // 2), strength=1.0, set_area_to_bounds=False)
    prompts = ([*models.condition(texts[0]), *half], texts[1])
    x, sizes = models.noise(side, side), set()
    hooks = [
        student.mixer.register_forward_hook(lambda mixer, args, out: sizes.add(args[2]))
        for student in hyena.students.values()
    ]
    got = models.drawn(applied(comfy, model, hyena), prompts, x)
    want = models.drawn(models.by_another_door(model, level0), prompts, x)
    print(dtype, difference(got, want), difference(want, models.drawn(model, prompts, x)))
    assert sizes == {(side, side), (side, side // 2)} and hooks
    assert difference(got, want) < close < 0.5 * difference(want, models.drawn(model, prompts, x))
    assert {p.dtype for s in hyena.students.values() for p in s.parameters()} == {torch.float32}


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("node", ["HyperTile", "ToMe"])
def test_where_another_node_changes_the_tokens_attention_stays_and_it_is_said_once(
    comfy, model, hyena, texts, node, order, caplog
):
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_tomesd import TomePatchModel

    def other(model):
        done = HyperTile.execute(model, 128, 1, 0, False) if node == "HyperTile" else TomePatchModel.execute(model, 0.5)
        return done[0]

    model, x = other(model) if order == "before" else model, models.noise(32, 32)
    torch.manual_seed(0)  # ToMe draws
    want = models.drawn(model if order == "before" else other(model), texts, x)
    both = applied(comfy, model, hyena)
    both = other(both) if order == "behind" else both
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(models.drawn(both, texts, x), want)
    said = [record.getMessage() for record in caplog.records if "Hyena" in record.getMessage()]
    assert len(said) == 1 and "another node changes the tokens" in said[0]


def test_two_models_in_one_process_sdxl_with_all_its_sites_draw_as_in_diffusers(
    comfy, model, unet, hyena, level0, texts, tiny_sdxl
):
    xl = tiny_sdxl.unet
    students = models.students_of(xl, "all", landmarks=9)
    one = applied(comfy, model, hyena)
    other = applied(comfy, models.patcher_of(xl, prediction="EPS"), StudentFile(students, {}))
    generator = torch.Generator().manual_seed(3)
    texts_xl = torch.randn(2, 1, 32, 80, generator=generator)
    pooled, ids = torch.randn(1, 40, generator=generator), torch.tensor([[144, 184, 0, 0, 144, 184]])
    adm = torch.cat([pooled, xl.add_time_proj(ids.flatten()).flatten()[None]], 1)
    told = {"text_embeds": pooled.repeat(2, 1), "time_ids": ids.repeat(2, 1)}
    x = models.noise(18, 23)
    for _ in range(2):
        first = models.drawn(one, texts, x)
        second = models.drawn(other, tuple(models.condition(t, adm=adm) for t in texts_xl), x)
    want = models.drawn_by_diffusers(unet, texts, x, students=lambda step: level0)
    want_xl = models.drawn_by_diffusers(xl, texts_xl, x, "epsilon", lambda step: students, added_cond_kwargs=told)
    assert len(students) == 12
    assert difference(first, want) < 1e-4
    assert (second - want_xl).abs().max() < 1e-5 * want_xl.std()
