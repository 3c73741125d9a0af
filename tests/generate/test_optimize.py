"""--optimize: every step computes what the model computes, and leaves no trace when it ends."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.generate import engine, optimize
from sd_hyena.generate.generation import generate
from sd_hyena.generate.optimize import check_optimize, optimized
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import OPTIMIZATIONS, GenerateConfig
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites
from sd_hyena.students.student import build_student, spec_for
from sd_hyena.students.swap import StandIn, swapped
from tests.conftest import IN01, command
from tests.fixtures import image_of
from tests.gate import gated, sampled
from tests.students.test_swap import distance, lora

ROUGH = {"bf16": 0.06, "int8": 0.08}  # of the latents after a step; the rest only sums in another order
WITHOUT_COMPILER = tuple(step for step in OPTIMIZATIONS if step not in ("compile", "graphs"))


def everything(module):
    """What the parts of a module are: their attributes by identity, their weights by storage, dtype and strides."""
    found = {}
    for name, part in module.named_modules():
        own = {key: id(value) for key, value in vars(part).items()}
        children = {key: id(value) for key, value in part._modules.items()}
        weights = {**part._parameters, **part._buffers}
        stored = {k: (id(w), w.data_ptr(), w.dtype, w.stride()) for k, w in weights.items() if w is not None}
        found[name] = own, children, stored
    return found


@pytest.fixture
def students(unet):
    """Untrained, of the default operator, for the finest level."""
    train = TrainConfig(operator_options="long=separable")  # with implicit filters
    with torch.random.fork_rng():
        torch.manual_seed(0)
        specs = [spec_for(s, "hyena2d", train.options_of_operator(), (8, 8)) for s in find_sites(unet) if s.level == 0]
        return {spec.site: build_student(spec).eval().requires_grad_(False) for spec in specs}


def available(step):
    if step == "int8":
        pytest.importorskip("torchao", reason="the optimize extra is not installed")


@pytest.mark.parametrize("step", ["bf16", "qkv", *gated(step for step in OPTIMIZATIONS if step not in ("bf16", "qkv"))])
def test_nothing_is_left_behind_after_an_exception_with_students_swapped_in(pipe, students, step):
    available(step)
    plain, before = image_of(pipe, steps=1), everything(pipe.unet)
    with swapped(pipe.unet, students):
        within, inside = image_of(pipe, steps=1), everything(pipe.unet)
        with pytest.raises(ZeroDivisionError), optimized(pipe.unet, [step], students.values()):
            assert everything(pipe.unet) != inside
            raise ZeroDivisionError
        assert everything(pipe.unet) == inside and torch.equal(image_of(pipe, steps=1), within)
    assert everything(pipe.unet) == before and torch.equal(image_of(pipe, steps=1), plain)


@pytest.mark.parametrize("step", sampled(WITHOUT_COMPILER, 3))
def test_each_step_draws_the_same_picture_whether_students_come_before_or_after(pipe, students, step):
    available(step)
    plain = image_of(pipe, steps=1)
    with swapped(pipe.unet, students):
        with_students = image_of(pipe, steps=1)
        with optimized(pipe.unet, [step], students.values()):
            before = image_of(pipe, steps=1)
            assert all(s.mixer.long.down.last.weight.dtype == torch.float32 for s in students.values())
    with optimized(pipe.unet, [step], students.values()):
        alone = image_of(pipe, steps=1)
        with swapped(pipe.unet, students):
            after = image_of(pipe, steps=1)
        assert torch.equal(image_of(pipe, steps=1), alone)
    assert distance(alone, plain) < ROUGH.get(step, 1e-5)
    for image in (before, after):
        assert distance(image, with_students) < ROUGH.get(step, 1e-5)


@pytest.mark.slow  # a minute: every kind of block is compiled
def test_compiled_blocks_and_students_draw_the_same_picture_and_warn_of_nothing(pipe, students, recwarn):
    with swapped(pipe.unet, students):
        eager = image_of(pipe)
        with optimized(pipe.unet, ["compile", "qkv", "channels_last"], students.values()):
            assert distance(image_of(pipe), eager) < 1e-5
        assert torch.equal(image_of(pipe), eager)
    assert not [warning for warning in recwarn if "Dynamo" in str(warning.message)]


def test_the_order_of_naming_does_not_matter(pipe):
    images = []
    for steps in (("bf16", "qkv", "halves"), ("halves", "qkv", "bf16")):
        with optimized(pipe.unet, steps):
            images.append(image_of(pipe, steps=1))
    assert torch.equal(*images)


def test_only_the_attentions_that_stay_are_fused_and_a_swap_within_gets_the_plain_projections(pipe, students):
    with swapped(pipe.unet, students), optimized(pipe.unet, ["qkv"]):
        fused = [name for name, m in pipe.unet.named_modules() if isinstance(m, Attention) and hasattr(m, "to_qkv")]
        assert len(fused) == 16 - len(students) and not set(fused) & set(students)
        assert isinstance(pipe.unet.get_submodule(IN01), StandIn)


def test_halves_cut_everything_that_has_the_batch_and_nothing_else(unet):
    source = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=source)
    latents, text, timestep = random(3, 4, 8, 16), random(3, 32, 96), torch.tensor([700, 40, 3])
    seen = []
    hook = unet.conv_in.register_forward_hook(lambda _m, args, _y: seen.append(len(args[0])))
    middle = random(3, unet.config.block_out_channels[-1], 1, 2)
    given = dict(encoder_hidden_states=text, mid_block_additional_residual=middle, down_block_additional_residuals=None)
    whole = unet(latents, timestep, **given).sample
    with optimized(unet, ["halves"]):
        parts = unet(latents, timestep, **given).sample
        tuples = unet(latents, timestep, **given, return_dict=False)
        single = unet(latents[:1], timestep[0], encoder_hidden_states=text[:1]).sample
    hook.remove()
    assert seen == [3, 1, 2, 1, 2, 1]
    assert distance(parts, whole) < 1e-5 and torch.equal(tuples[0], parts)
    assert torch.equal(single, unet(latents[:1], timestep[0], encoder_hidden_states=text[:1]).sample)


@pytest.mark.parametrize("step", ["qkv", "int8"])
def test_what_would_lose_a_lora_is_refused_before_anything_changes(own_pipe, step):
    lora(own_pipe.unet)
    before = everything(own_pipe.unet)
    with pytest.raises(BadInput, match="LoRA"), optimized(own_pipe.unet, ["bf16", step]):
        pass
    assert everything(own_pipe.unet) == before


@pytest.mark.parametrize(
    "options, says",
    [
        ({"optimize": "bf16,warp"}, "optimize='warp' is none of bf16"),
        ({"optimize": "bf16", "dtype": "float32"}, "contradict"),
        ({"optimize": "compile", "offload": "model"}, "--offload off"),
        ({"optimize": "qkv", "lora": "a.safetensors"}, "LoRA"),
        ({"keep_attention": "auto", "offload": "model"}, "name the sites"),
    ],
)
def test_options_that_contradict_each_other_are_told(options, says):
    with pytest.raises(BadInput, match=says):
        GenerateConfig(**options)


def test_a_step_that_cannot_be_taken_here_is_told_before_a_model_loads(monkeypatch, tmp_path):
    def never(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(engine, "load_pipeline", never)
    with pytest.raises(BadInput, match=r"optimize=graphs .*device=cpu"):
        generate(GenerateConfig(optimize="sdpa,graphs", width=64, device="cpu", out_dir=str(tmp_path)))
    with pytest.raises(BadInput, match="leave one of them out"):
        check_optimize(["graphs", "compile"], torch.device("cuda"))
    monkeypatch.setattr(optimize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'sd_hyena\[optimize\]'"):
        check_optimize(["int8"], torch.device("cpu"))


def test_compiling_without_a_compiler_is_one_line(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(BadInput, match=r"optimize=compile needs a C\+\+ compiler"):
        check_optimize(["compile"], torch.device("cpu"))


def test_an_unknown_step_ends_the_command_with_2_and_one_line(tmp_path):
    done = command("generate.py", "--optimize", "bf16,warp", "-o", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "warp" in done.stderr


@pytest.mark.usefixtures("loaded_once")
def test_a_picture_says_how_it_was_made_faster_and_is_repeated_so(tmp_path):
    given = dict(width=64, steps=2, num_images=1, seed=3, prompt="a red circle on blue", out_dir=str(tmp_path))
    [path] = generate(GenerateConfig(**given, optimize="qkv, channels_last", tiled_diffusion="mixture"))
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path)])
    assert again.optimizations == ("qkv", "channels_last")
    [second] = generate(again)
    [plain] = generate(GenerateConfig(**given))
    images = [np.array(Image.open(file)).astype(int) for file in (path, second, plain)]
    assert np.array_equal(images[0], images[1]) and np.abs(images[0] - images[2]).max() <= 1
