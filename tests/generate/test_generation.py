import json

import numpy as np
import pytest
import torch
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.files.comparison import side_by_side, similarity
from sd_hyena.files.picture import read_metadata
from sd_hyena.generate import engine
from sd_hyena.generate.alternatives import load_alternatives
from sd_hyena.generate.generation import NotDrawn, generate
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options import generate_config
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.own_defaults import OwnDefaults
from sd_hyena.options.sampler import KARRAS, SAMPLERS
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01, OUT11
from tests.gate import gated, sampled

SMALL = dict(width=64, steps=2, num_images=2, cfg_scale=3.0, seed=11, prompt="a red circle on blue")


pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def students(tmp_path):
    """Three files: one for each of two sites, any size; one 1-D for 64 px."""
    torch.manual_seed(0)
    specs = {
        "a": StudentSpec(IN01, "IN01", 32, "pointwise", {}, None),
        "b": StudentSpec(OUT11, "OUT11", 32, "pointwise", {}, None),
        "c": StudentSpec(IN01, "IN01", 32, "causal", {}, (8, 8)),
    }
    paths = {}
    for name, spec in specs.items():
        paths[name] = str(tmp_path / f"{name}.safetensors")
        save_students(paths[name], StudentFile({spec.site: build_student(spec)}))
    return paths


def config(tmp_path, **options):
    return GenerateConfig(**{**SMALL, "out_dir": str(tmp_path / "images"), **options})


def pixels(paths):
    return [np.array(Image.open(path)) for path in paths]


def test_image_i_does_not_depend_on_the_batch_size_or_on_how_many_are_made(tmp_path):
    together = pixels(generate(config(tmp_path, num_images=3, batch_size=3)))
    alone = pixels(generate(config(tmp_path, num_images=3, batch_size=1)))
    third = pixels(generate(config(tmp_path, num_images=1, seed=13)))
    for a, b in zip([*together, together[2]], [*alone, *third], strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1  # float32 sums in another order, rounded to 8 bits
    assert not np.array_equal(alone[0], alone[1])


def test_the_same_seed_gives_the_same_image_and_leaves_global_randomness_alone(tmp_path):
    state = torch.get_rng_state()
    first, second = (pixels(generate(config(tmp_path, num_images=1))) for _ in range(2))
    assert np.array_equal(first, second) and torch.equal(torch.get_rng_state(), state)


def test_nothing_is_ever_overwritten_and_the_numbers_of_a_folder_go_on(tmp_path):
    names = [path.name for _ in range(2) for path in generate(config(tmp_path, steps=1))]
    assert names == [f"image_00{n}.png" for n in range(4)]


@pytest.mark.parametrize(
    "scheduler", ["euler_a", "dpm++_2m", *gated(s for s in SAMPLERS if s not in ("euler_a", "dpm++_2m"))]
)
def test_every_scheduler_draws_and_ancestral_noise_is_seeded(tmp_path, scheduler):
    first, second = (pixels(generate(config(tmp_path, scheduler=scheduler, num_images=1, steps=4))) for _ in range(2))
    assert np.array_equal(first, second) and first[0].std() > 0
    if scheduler in KARRAS:
        karras = pixels(generate(config(tmp_path, scheduler=scheduler, karras=True, num_images=1, steps=4)))
        assert not np.array_equal(karras, first)


def test_alternatives_are_written_under_h_and_students_joined_by_plus_work_together(tmp_path, students):
    a, b = students["a"], students["b"]
    given = config(tmp_path, hyena=f"{a}, {b},{a}+{b},", num_images=1, name_format="h{h}-n{n}")
    paths = generate(given)
    assert [path.name for path in paths] == ["h0-n0.png", "h1-n0.png", "h2-n0.png"]
    alone, other, both = pixels(paths)
    (plain,) = pixels(generate(config(tmp_path, num_images=1)))
    images = [alone, other, both, plain]
    assert not any(np.array_equal(x, y) for i, x in enumerate(images) for y in images[:i])


def test_the_same_site_twice_is_refused(tmp_path, students):
    with pytest.raises(BadInput, match="IN01 twice"):
        generate(config(tmp_path, hyena=f"{students['a']}+{students['c']}"))


def test_names_count_images_and_iterations(tmp_path):
    paths = generate(config(tmp_path, steps=1, num_images=2, iteration=2, name_format="{b}_{i}_{n:02d}"))
    assert [path.stem for path in paths] == ["0_0_00", "0_1_01", "1_0_02", "1_1_03"]


def test_guidance_zero_turns_guidance_off_and_an_empty_negative_prompt_does_not(tmp_path, own_pipe):
    sizes = []
    own_pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    generate(config(tmp_path, num_images=1, cfg_scale=0.0))
    generate(config(tmp_path, num_images=1, cfg_scale=5.0, negative_prompt=""))
    assert sizes == [1, 1, 2, 2]


@pytest.mark.gate
def test_the_negative_prompt_matters(tmp_path):
    plain = pixels(generate(config(tmp_path, num_images=1)))
    negative = pixels(generate(config(tmp_path, num_images=1, negative_prompt="a red circle on blue")))
    assert not np.array_equal(plain, negative)


def test_a_1d_student_at_another_size_is_refused_with_both_sizes(tmp_path, students):
    with pytest.raises(BadInput, match=r"trained at 64x64.*not 96x64.*-W 64 -H 64"):
        generate(config(tmp_path, hyena=students["c"], width=96, height=64))
    assert not (tmp_path / "images").exists() or not list((tmp_path / "images").glob("*.png"))


def test_from_repeats_an_image_with_its_students_and_flags_win(tmp_path, students):
    _, second = generate(config(tmp_path, hyena=students["a"], scheduler="euler", steps=3))
    repeated = parse(GenerateConfig, ["--from", str(second), "-o", str(tmp_path / "again")])
    assert repeated.seed == 12 and repeated.scheduler == "euler" and repeated.hyena == students["a"]
    assert np.array_equal(pixels(generate(repeated)), pixels([second]))
    assert parse(GenerateConfig, ["--from", str(second), "-s", "5"]).steps == 5


@pytest.mark.gate
def test_the_image_of_one_alternative_repeats_that_one_alone(tmp_path, students):
    first, second = generate(config(tmp_path, hyena=f"{students['a']},{students['b']}", num_images=1))
    for path, name in ((first, "a"), (second, "b")):
        again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again")])
        assert again.hyena == students[name]
        assert np.array_equal(pixels(generate(again)), pixels([path]))


def test_compare_images_lie_beside_their_images(tmp_path, students):
    paths = generate(config(tmp_path, hyena=students["a"], compare=True, num_images=1, steps=1, name_format="sub/h{h}"))
    assert [path.relative_to(tmp_path / "images").as_posix() for path in paths] == ["sub/h0.png", "sub/h0-compare.png"]


@pytest.mark.gate
def test_half_precision_draws_with_filters_in_float32(tmp_path, students, own_pipe):
    own_pipe.unet.to(torch.bfloat16)
    own_pipe.vae.to(torch.bfloat16)
    own_pipe.text_encoder.to(torch.bfloat16)
    (loaded,) = load_alternatives(students["c"], own_pipe.unet)
    student = loaded.students[IN01]
    assert {p.dtype for p in student.mixer.filter_fn.parameters()} == {torch.float32}
    assert student.change_out.weight.dtype == torch.bfloat16
    (image,) = pixels(generate(config(tmp_path, hyena=students["c"], num_images=1)))
    assert image.std() > 0


def test_compare_writes_teacher_student_and_difference_with_their_distance(tmp_path, students, capsys):
    image, compared = generate(config(tmp_path, hyena=students["a"], compare=True, num_images=1))
    (plain,) = pixels(generate(config(tmp_path, num_images=1)))
    student, row = pixels([image, compared])
    assert row.shape == (64, 192, 3)
    assert np.array_equal(row, side_by_side(plain, student))
    assert read_metadata(compared)["psnr"] == pytest.approx(similarity(plain, student)[0])


def test_similarity_of_known_images():
    a = np.full((32, 32, 3), 100, np.uint8)
    psnr, ssim = similarity(a, a)
    assert psnr == 100 and ssim == pytest.approx(1)
    assert similarity(a, a + 10)[0] == pytest.approx(10 * np.log10(255**2 / 100))


def test_a_long_prompt_is_read_to_its_end_and_said_to_be_long(tmp_path, capsys):
    first = pixels(generate(config(tmp_path, num_images=1, prompt="red " * 50)))
    assert "note: the prompt is read in 2 chunks of 30 tokens" in capsys.readouterr().out
    assert not np.array_equal(first, pixels(generate(config(tmp_path, num_images=1, prompt="red " * 49 + "blue"))))


def test_weights_embeddings_and_clip_skip_travel_in_the_picture_and_repeat_it(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "load_pipeline", load_pipeline)  # without the first run's word
    (plain,) = generate(config(tmp_path, num_images=1))
    torch.save({"string_to_param": {"*": torch.ones(2, 96)}, "name": "inner"}, tmp_path / "Striped.pt")
    prompt = r"a (red:1.4) \(circle\) BREAK striped"
    given = config(tmp_path, num_images=1, prompt=prompt, clip_skip=2, embeddings=str(tmp_path))
    (path,) = generate(given)
    assert not np.array_equal(*pixels([plain, path]))
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again")])
    assert (again.prompt, again.clip_skip, again.embeddings) == (prompt, 2, str(tmp_path))
    assert np.array_equal(pixels(generate(again)), pixels([path]))
    with pytest.raises(BadInput, match="clip_skip=9"):
        generate(config(tmp_path, clip_skip=9))


@pytest.mark.parametrize(
    "prompt", sampled(["", "💥 Ünïcödé שלום", "a\0b", " ", "((((", "(a:9999999999)", "(a:0)", "red, " * 999], 8)
)
def test_odd_prompts_work(tmp_path, prompt):
    assert len(generate(config(tmp_path, num_images=1, prompt=prompt))) == 1


def test_without_a_prompt_the_models_own_one_is_drawn_or_else_its_first_example(tmp_path, monkeypatch):
    (path,) = generate(config(tmp_path, num_images=1, prompt=None))
    own = json.loads((SHIPPED_MODEL / "generation.json").read_text())["prompt"]
    assert read_metadata(path)["config"]["prompt"] == own
    monkeypatch.setattr(generate_config, "own_defaults", lambda _: OwnDefaults())
    (path,) = generate(config(tmp_path, num_images=1, prompt=None))
    first = (SHIPPED_MODEL / "prompts.txt").read_text().splitlines()[0]
    assert read_metadata(path)["config"]["prompt"] == first != own


def test_one_line_says_what_is_drawn(tmp_path, students, capsys):
    both = f"{students['a']}+{students['b']}"
    generate(config(tmp_path, num_images=1, hyena=f"{both},{students['a']}", device="cpu", dtype="float32"))
    line = (
        "a red circle on blue · 64x64 · 2 steps of ddim · guidance 3 · seed 11 · float32 on cpu · a+b (2 students) · "
    )
    assert capsys.readouterr().out.splitlines().count(f"{line}a (1 student)") == 1
    generate(config(tmp_path, prompt="red " * 50, cfg_scale=0.0, scheduler="euler", karras=True, device="cpu"))
    said = [line for line in capsys.readouterr().out.splitlines() if " · " in line]
    assert said == [
        f"{'red ' * 15}... · 64x64 · 2 steps of euler karras · no guidance · 2 pictures, seeds from 11 · float32 on cpu"
    ]


@pytest.mark.gate
def test_names_go_on_where_a_format_has_a_number_and_other_names_get_one(tmp_path):
    names = lambda form: [path.name for path in generate(config(tmp_path, num_images=1, name_format=form))]
    assert [names("a/x-{n:3d}"), names("a/x-{n:3d}")] == [["x-  0.png"], ["x-  1.png"]]
    (tmp_path / "images" / "a" / "x-041-compare.jpg").touch()
    assert [names("a/x-{n}"), names("plain"), names("plain")] == [["x-42.png"], ["plain.png"], ["plain-1.png"]]


def test_a_nan_from_the_vae_is_decoded_again_and_never_saved_black(tmp_path, own_pipe, monkeypatch):
    decode, calls = own_pipe.vae.decode, []

    def once_nan(latents):
        calls.append(1)
        result = decode(latents)
        if len(calls) == 1:
            result.sample = result.sample * float("nan")
        return result

    monkeypatch.setattr(own_pipe.vae, "decode", once_nan)
    (image,) = pixels(generate(config(tmp_path, num_images=1)))
    assert len(calls) == 2 and image.std() > 0
    with torch.no_grad():
        own_pipe.vae.post_quant_conv.weight.fill_(float("nan"))
    with pytest.raises(NotDrawn, match=r"1 of 1 images failed.*VAE"):
        generate(config(tmp_path, num_images=1, name_format="black"))
    assert not (tmp_path / "images" / "black.png").exists()


@pytest.mark.gate
def test_when_one_image_fails_the_others_are_written_and_the_command_says_which(tmp_path, own_pipe, monkeypatch):
    alone = pixels(generate(config(tmp_path, num_images=3, batch_size=1)))
    decode, met = own_pipe.vae.decode, []

    def broken(latents):
        met.append(latents.mean().item())
        result = decode(latents)
        if (
            met[-1] == pytest.approx(met[:2][-1], abs=1e-6) and len(met) > 1
        ):  # the second image, however often it is tried
            result.sample = result.sample * float("nan")
        return result

    monkeypatch.setattr(own_pipe.vae, "decode", broken)
    with pytest.raises(NotDrawn, match=r"1 of 3 images failed, the others are in .*; image 1: .*NaN"):
        generate(config(tmp_path, num_images=3, batch_size=3, out_dir=str(tmp_path / "rest")))
    rest = sorted((tmp_path / "rest").iterdir())
    assert [path.stem for path in rest] == ["image_000", "image_002"]
    for a, b in zip(pixels(rest), [alone[0], alone[2]], strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


def test_a_batch_that_does_not_fit_is_halved_and_one_image_that_does_not_fit_gets_advice(tmp_path, own_pipe):
    three = dict(num_images=3, steps=1)
    alone = pixels(generate(config(tmp_path, **three, batch_size=1)))
    most = [2]

    def full(_unet, arguments):
        if len(arguments[0]) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    own_pipe.unet.register_forward_pre_hook(full)
    assert np.array_equal(pixels(generate(config(tmp_path, **three, batch_size=3))), alone)
    most[0] = 1
    with pytest.raises(NotDrawn, match=r"3 of 3 images failed.*out of memory; try --tiled_diffusion"):
        generate(config(tmp_path, **three, batch_size=3))


@pytest.mark.gate
def test_a_vae_without_memory_decodes_in_tiles_and_gives_the_same_image(tmp_path, own_pipe, monkeypatch, capsys):
    options = dict(num_images=1, width=264, height=136, steps=1)
    (plain,) = pixels(generate(config(tmp_path, **options)))

    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(type(own_pipe.vae), "_decode", full)
    (tiled,) = pixels(generate(config(tmp_path, **options)))
    assert np.abs(plain.astype(int) - tiled).max() <= 1
    assert "decoding in tiles of 32 cells" in capsys.readouterr().out


@pytest.mark.gate
def test_the_attention_backend_is_really_chosen(tmp_path, own_pipe):
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    seen = []
    own_pipe.unet.conv_in.register_forward_hook(lambda *_: seen.append(_cur_sdpa_kernel_backends()))
    generate(config(tmp_path, num_images=1, attention_backend="math"))
    assert seen == [[SDPBackend.MATH]] * 2
    generate(config(tmp_path, num_images=1))
    assert len(seen[-1]) > 1
