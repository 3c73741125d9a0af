"""Students in ComfyUI's own sampler, against diffusers and against another way into the same model."""

import copy
import dataclasses
import gc
import logging
import re

import pytest
import torch

from sd_hyena.errors import BadInput
from sd_hyena.sites import find_sites
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import Student
from sd_hyena.students.untrained import untrained
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
def hyena(running, base, level0):
    """As a user gets them: from a file in models/hyena."""
    save_students(base / "models" / "hyena" / "level0.safetensors", StudentFile(level0, {"step": 7}))
    return call(running, "HyenaLoadStudents", file="level0.safetensors", dtype="as in the file")[0]


def applied(running, model, hyena, sites="all", start=0.0, end=1.0):
    return call(running, "HyenaApplyStudents", model=model, students=hyena, sites=sites, start=start, end=end)[0]


def with_landmarks(running, model, landmarks, sites="all", start=0.0, end=1.0):
    inputs = dict(landmarks=landmarks, sites=sites, start=start, end=end)
    return call(running, "HyenaApplyLandmarks", model=model, **inputs)[0]


def doubled(students):
    """Copies in double precision."""
    return {name: copy.deepcopy(student).double() for name, student in students.items()}


def swap_of(model):
    return model.model_options["transformer_options"]["patches"]["attn1_patch"][-1]


def difference(a, b):
    """Of latents as the UNet has them."""
    assert a.shape == b.shape
    return (a - b).abs().max().item() * models.SCALE


@pytest.mark.parametrize("height, width, batch", [(32, 32, 1), (35, 27, 2)])
def test_latents_are_those_of_diffusers_at_odd_sizes_too(running, own_pipe, hyena, level0, texts, height, width, batch):
    """In double precision: random students make of other orders of sums as much as the bound in single precision."""
    unet, texts = own_pipe.unet.double(), [text.double() for text in texts]
    x, (ours, theirs) = models.noise(height, width, batch).double(), (doubled(hyena.students), doubled(level0))
    want = models.drawn_by_diffusers(unet, texts, x, students=lambda step: theirs)
    got = models.drawn(applied(running, models.patcher_of(unet, torch.float64), StudentFile(ours, {})), texts, x)
    assert difference(got, want) < 1e-4 < 0.1 < difference(want, models.drawn_by_diffusers(unet, texts, x))


@pytest.mark.parametrize("height, width, batch", [(24, 24, 2), (35, 27, 1)])
def test_landmarks_need_no_file_and_are_those_of_diffusers(running, own_pipe, texts, height, width, batch):
    """In double precision: which cluster a token belongs to may hang on the last digits of single precision."""
    unet, texts = own_pipe.unet.double(), [text.double() for text in texts]
    x, landmarks = models.noise(height, width, batch).double(), 16
    got = models.drawn(with_landmarks(running, models.patcher_of(unet, torch.float64), landmarks), texts, x)
    cheaper = {  # where there are more than eight times as many tokens: levels 0 and 1
        site.name: student
        for site, student in zip(find_sites(unet), untrained(unet, "all", landmarks).students.values(), strict=True)
        if site.level < 2
    }
    want = models.drawn_by_diffusers(unet, texts, x, students=lambda step: cheaper)
    assert difference(got, want) < 1e-4 < 0.01 < difference(want, models.drawn_by_diffusers(unet, texts, x))


def test_landmarks_take_sdxl_parts_of_the_schedule_and_half_precision(running, own_pipe, texts, tiny_sdxl):
    """Each against a model whose attention modules were replaced."""
    x = models.noise(16, 24)
    model = models.patcher_of(own_pipe.unet, torch.bfloat16)
    students = untrained(own_pipe.unet, "level0", 16).students
    want = models.drawn(models.by_another_door(model, students), texts, x)
    got = models.drawn(with_landmarks(running, model, 16, "level0"), texts, x)
    assert difference(got, want) < 0.1
    xl = models.patcher_of(tiny_sdxl.unet, prediction="EPS")
    students = untrained(tiny_sdxl.unet, "level1", 8).students
    conditions = [models.condition(torch.ones(1, 32, 80), adm=torch.ones(1, 88)) for _ in texts]
    want = models.drawn(models.by_another_door(xl, students), conditions, x)
    assert (models.drawn(with_landmarks(running, xl, 8), conditions, x) - want).abs().max() < 1e-4 * want.std()
    plain = models.drawn(model, texts, x)
    assert torch.equal(models.drawn(with_landmarks(running, model, 16, start=1.0), texts, x), plain)
    assert torch.equal(models.drawn(with_landmarks(running, model, 512), texts, x), plain)


def test_a_lora_on_a_replaced_site_acts_before_and_behind_the_node(running, model, own_pipe, hyena, level0, texts):
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
    plain = models.drawn(applied(running, model, hyena), texts, x)
    before = applied(running, comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0], hyena)
    behind = comfy.sd.load_lora_for_models(applied(running, model, hyena), None, lora, 0.7, 0)[0]
    for both in (before, behind):
        assert difference(models.drawn(both, texts, x), want) < 1e-4 < 0.1 < difference(plain, want)


@pytest.mark.parametrize(
    "dtype, side, close", [(torch.float32, 32, 1e-5), (torch.bfloat16, 16, 0.1), (torch.float16, 8, 0.01)]
)
def test_areas_and_half_precision_are_as_with_the_module_itself_replaced(
    running, unet, hyena, level0, texts, dtype, side, close
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
    got = models.drawn(applied(running, model, hyena), prompts, x)
    want = models.drawn(models.by_another_door(model, level0), prompts, x)
    assert sizes == {(side, side), (side, side // 2)} and hooks
    assert difference(got, want) < close < 0.5 * difference(want, models.drawn(model, prompts, x))
    assert {p.dtype for s in hyena.students.values() for p in s.parameters()} == {torch.float32}


def test_in_tiles_that_another_node_cuts_students_meet_the_tiles_own_grid(running, model, hyena, level0, texts):
    def in_two(apply_model, call):
        return torch.cat([apply_model(x, call["timestep"], **call["c"]) for x in call["input"].split([13, 11], 3)], 3)

    x = models.noise(16, 24)
    model.set_model_unet_function_wrapper(in_two)
    want = models.drawn(models.by_another_door(model, level0), texts, x)
    assert difference(models.drawn(applied(running, model, hyena), texts, x), want) < 1e-5
    assert difference(want, models.drawn(model, texts, x)) > 1e-2


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("node", ["HyperTile", "ToMe"])
def test_where_another_node_changes_the_tokens_attention_stays_and_it_is_said_once(
    running, model, hyena, texts, node, order, caplog
):
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_tomesd import TomePatchModel

    def other(model):
        done = HyperTile.execute(model, 128, 1, 0, False) if node == "HyperTile" else TomePatchModel.execute(model, 0.5)
        return done[0]

    model, x = other(model) if order == "before" else model, models.noise(32, 32)
    torch.manual_seed(0)  # ToMe draws
    want = models.drawn(model if order == "before" else other(model), texts, x)
    both = applied(running, model, hyena)
    both = other(both) if order == "behind" else both
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(models.drawn(both, texts, x), want)
    said = [record.getMessage() for record in caplog.records if "Hyena" in record.getMessage()]
    assert len(said) == 1 and "another node changes the tokens" in said[0]


def test_two_models_in_one_process_sdxl_with_all_its_sites_draw_as_in_diffusers(
    running, model, unet, hyena, level0, texts, tiny_sdxl
):
    xl = tiny_sdxl.unet
    students = models.students_of(xl, "all", landmarks=9)
    one = applied(running, model, hyena)
    other = applied(running, models.patcher_of(xl, prediction="EPS"), StudentFile(students, {}))
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
    assert (second - want_xl).abs().max() < 3e-5 * want_xl.std()


def test_the_node_leaves_its_model_as_it_was_and_unloading_restores_it_bit_for_bit(running, model, hyena, texts):
    x, before = models.noise(16, 24), copy.deepcopy(model.model.state_dict())
    plain = models.drawn(model, texts, x)
    swapped = applied(running, model, hyena)
    assert not torch.equal(models.drawn(swapped, texts, x), plain)
    assert torch.equal(models.drawn(model, texts, x), plain)
    swapped.detach()
    after = model.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(models.drawn(model, texts, x), plain)


def test_ten_clones_hold_one_copy_of_the_students(running, model, hyena):
    def held():
        gc.collect()
        students = [thing for thing in gc.get_objects() if isinstance(thing, Student)]
        return sum({p.data_ptr(): p.nbytes for s in students for p in s.parameters()}.values())

    before, chain = held(), [applied(running, model, hyena)]
    for _ in range(10):
        chain.append(chain[-1].clone())
    assert held() == before > 4 * sum(p.numel() for s in hyena.students.values() for p in s.parameters())
    assert len({id(swap_of(clone)) for clone in chain}) == 1


def test_students_are_used_between_start_and_end_and_the_other_file_in_the_rest(
    running, model, unet, hyena, level0, texts
):
    others, x = models.students_of(unet, "IN02,OUT09", seed=5), models.noise(16, 24)
    both = applied(running, model, hyena, end=0.5)
    both = applied(running, both, StudentFile(others, {}), start=0.5)
    want = models.drawn_by_diffusers(unet, texts, x, students=lambda step: level0 if step < 2 else others)
    other = models.drawn_by_diffusers(unet, texts, x, students=lambda step: others if step < 2 else level0)
    assert difference(models.drawn(both, texts, x), want) < 1e-4 < 0.1 < difference(want, other)


def test_sites_can_be_chosen(running, model, unet, hyena, level0, texts):
    x = models.noise(16, 24)
    few = {name: student for name, student in level0.items() if student.spec.short.startswith("OUT")}
    want = models.drawn_by_diffusers(unet, texts, x, students=lambda step: few)
    assert difference(models.drawn(applied(running, model, hyena, "OUT*"), texts, x), want) < 1e-4
    with pytest.raises(BadInput, match="has students for IN01 IN02"):
        applied(running, model, hyena, "level1")
    with pytest.raises(BadInput, match="target='level7' is no site of this model"):
        applied(running, model, hyena, "level7")


def test_a_student_that_cannot_serve_leaves_attention_and_says_so_once(running, model, unet, texts, caplog):
    """One of another width, two of another size, one as the ancestor published them that fits."""
    x = models.noise(16, 24)
    wide = models.students_of(unet, "IN04", seed=1)
    wrong = next(iter(wide.values()))
    wrong.spec = dataclasses.replace(wrong.spec, short="IN01")
    rows = models.students_of(unet, "OUT09,OUT10", "bidirectional", latent=(24, 16))
    fits = models.students_of(unet, "OUT11", "safari", latent=(16, 24))
    want = models.drawn_by_diffusers(unet, texts, x, students=lambda step: fits)
    with caplog.at_level(logging.WARNING):
        got = models.drawn(applied(running, model, StudentFile(wide | rows | fits, {})), texts, x)
    assert difference(got, want) < 1e-4
    said = [record.getMessage() for record in caplog.records if "Hyena" in record.getMessage()]
    assert len(said) == 2 and "64 channels and the model 32" in said[0] and "serves the size" in said[1]


def test_a_later_replacement_of_the_same_block_wins_and_an_earlier_one_serves_where_ours_does_not(
    running, model, hyena, texts, caplog
):
    def nothing(q, k, v, options):
        return torch.zeros_like(v)

    x, theirs = models.noise(16, 24), model.clone()
    theirs.set_model_attn1_replace(nothing, "input", 1)
    want = models.drawn(theirs, texts, x)
    assert torch.equal(models.drawn(applied(running, theirs, hyena, "IN01", start=1.0), texts, x), want)
    later = applied(running, model, hyena, "IN01")
    later.set_model_attn1_replace(nothing, "input", 1, 0)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(models.drawn(later, texts, x), want)
    assert [
        r.getMessage().count("another node replaces it too") for r in caplog.records if "Hyena" in r.getMessage()
    ] == [1]


def test_files_are_joined_cast_and_watched_for_changes(running, base, hyena, unet):
    folder = base / "models" / "hyena"
    save_students(folder / "more.pt", StudentFile(models.students_of(unet, "IN04"), {"step": 3}))
    inputs = running.nodes.NODE_CLASS_MAPPINGS["HyenaLoadStudents"].INPUT_TYPES()
    assert {"level0.safetensors", "more.pt"} <= set(inputs["required"]["file"][0])
    more = dict(file="more.pt", dtype="bfloat16")
    both, text = call(running, "HyenaLoadStudents", **more, with_students=hyena)
    assert len(both.students) == 6 and "IN04" in text and "step: 3" in text
    dtypes = {s.spec.short: s.change_out.weight.dtype for s in both.students.values()}
    assert dtypes["IN04"] == torch.bfloat16 and dtypes["IN01"] == torch.float32
    with pytest.raises(BadInput, match="both files have a student for IN04"):
        call(running, "HyenaLoadStudents", **more, with_students=both)
    changed = running.nodes.NODE_CLASS_MAPPINGS["HyenaLoadStudents"].IS_CHANGED
    before = changed(**more)
    save_students(folder / "more.pt", StudentFile(models.students_of(unet, "IN04", seed=9), {"step": 4}))
    assert changed(**more) != before
    (folder / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(BadInput, match=r"bad\.safetensors"):
        call(running, "HyenaLoadStudents", file="bad.safetensors", dtype="float32")


def test_the_report_counts_what_a_size_costs(running, model, hyena):
    def told(width, height):
        return call(running, "HyenaModelInfo", model=model, students=hyena, width=width, height=height)["result"][0]

    small, large = told(256, 256), told(2048, 1024)
    assert "IN01     256x128 cells, 32 channels: hyena2d" in large and "M00" in large
    times = [float(re.search(r"([\d.]+) times cheaper, by", text)[1]) for text in (small, large)]
    assert times[0] < 3 < 7 < times[1]
