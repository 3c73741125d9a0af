"""What people put around Stable Diffusion, with a student in place: the student is still called, and both act."""

import hashlib

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sd_hyena.large.regions import Region
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.options.sampler import set_scheduler
from sd_hyena.sites import find_sites
from sd_hyena.students.student import StudentSpec, build_student
from sd_hyena.students.swap import swapped
from tests.conftest import IN01
from tests.gate import gated

SHARED = dict(width=64, height=64, num_inference_steps=2, guidance_scale=4.0, output_type="latent")


@pytest.fixture
def pipe(own_pipe):
    return own_pipe


@pytest.fixture
def student():
    return counted(StudentSpec(IN01, "IN01", 32, "hyena2d", {"heads": 2, "landmarks": 8}, None))


def counted(spec: StudentSpec) -> torch.nn.Module:
    """A student that notes how many samples it is given in each call."""
    torch.manual_seed(0)
    student = build_student(spec).eval()
    student.batches = []
    student.register_forward_pre_hook(lambda _, arguments: student.batches.append(len(arguments[0])))
    return student


def image(pipe, **given) -> torch.Tensor:
    with torch.no_grad():
        options = {"prompt": "a red circle on blue", "generator": torch.Generator().manual_seed(0), **SHARED, **given}
        return pipe(**{name: value for name, value in options.items() if value is not None}).images


def distance(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def with_student(pipe, student, steps: int = 2, rows: int = 2, **given) -> torch.Tensor:
    """The image with the student, which was called in every step, with so many rows; without it is another."""
    student.batches.clear()
    with swapped(pipe.unet, {IN01: student}):
        drawn = image(pipe, **given)
    assert student.batches == [rows] * steps
    assert distance(image(pipe, **given), drawn) > 1e-3
    return drawn


# IP-Adapter


@pytest.fixture
def ip_adapter(pipe, tmp_path):
    """A folder as IP-Adapters are published, of random weights: image encoder, projection, keys and values."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=32, projection_dim=24, num_hidden_layers=1, num_attention_heads=2)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, image_size=224, patch_size=56))
    encoder.save_pretrained(tmp_path / "models" / "image_encoder")
    width = pipe.unet.config.cross_attention_dim
    tensors = {"proj.weight": torch.randn(4 * width, 24), "proj.bias": torch.zeros(4 * width)}
    tensors |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    tensors = {f"image_proj.{name}": value for name, value in tensors.items()}
    names = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(names):
        out = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for key in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{key}.weight"] = torch.randn(out, width) / 8
    save_file(tensors, tmp_path / "models" / "ip-adapter.safetensors")
    return dict(
        pretrained_model_name_or_path_or_dict=str(tmp_path), subfolder="models", weight_name="ip-adapter.safetensors"
    )


@pytest.mark.parametrize("first", ["swap", *gated(["adapter"])])
def test_an_ip_adapter_and_a_student_act_together_whichever_comes_first(pipe, student, ip_adapter, first):
    picture = lambda colour: Image.new("RGB", (64, 64), colour)
    without = with_student(pipe, student)
    if first == "adapter":
        pipe.load_ip_adapter(**ip_adapter)
    with swapped(pipe.unet, {IN01: student}):
        if first == "swap":
            pipe.load_ip_adapter(**ip_adapter)
        student.batches.clear()
        red, blue = (image(pipe, ip_adapter_image=picture(colour)) for colour in ("red", "blue"))
        assert student.batches == [2] * 4
        assert distance(red, without) > 1e-2 and distance(red, blue) > 1e-4
        pipe.set_ip_adapter_scale(0.0)
        assert distance(image(pipe, ip_adapter_image=picture("red")), without) < 1e-4
    pipe.set_ip_adapter_scale(1.0)
    with_student(pipe, student, ip_adapter_image=picture("red"))


# Guidance and features


def test_perturbed_attention_guidance_asks_the_student_for_its_third_row_too(pipe, student):
    guided = AutoPipelineForText2Image.from_pipe(
        pipe, enable_pag=True, pag_applied_layers=["down_blocks.0.attentions.1"]
    )
    plain = with_student(pipe, student)
    none = with_student(guided, student, pag_scale=0.0)
    some = with_student(guided, student, rows=3, pag_scale=3.0)
    assert distance(none, plain) < 1e-5 < 1e-2 < distance(some, plain)


def test_perturbed_attention_where_a_student_stands_is_refused_by_name(pipe, student):
    """A student has no attention map to perturb; diffusers says which layer it misses, and the swap is undone."""
    guided = AutoPipelineForText2Image.from_pipe(
        pipe, enable_pag=True, pag_applied_layers=["down_blocks.0.attentions.0"]
    )
    attention = pipe.unet.get_submodule(IN01)
    with (
        pytest.raises(ValueError, match=r"Cannot find PAG layer .*down_blocks\.0\.attentions\.0"),
        swapped(pipe.unet, {IN01: student}),
    ):
        image(guided, pag_scale=3.0)
    assert pipe.unet.get_submodule(IN01) is attention


def test_freeu_changes_what_a_swapped_unet_draws(pipe, student):
    plain = with_student(pipe, student)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert distance(with_student(pipe, student), plain) > 1e-2
    pipe.disable_freeu()
    assert torch.equal(with_student(pipe, student), plain)


@pytest.mark.parametrize("kernel", ["_native_math", *gated(["native"])])
def test_diffusers_attention_backends_leave_the_student_alone(pipe, student, kernel):
    plain = with_student(pipe, student)
    pipe.unet.set_attention_backend(kernel)
    assert distance(with_student(pipe, student), plain) < 1e-4


# LoRAs


@pytest.fixture
def loras(pipe):
    """Two LoRAs on the projections that the student stands on, and on others."""
    for name, seed in (("style", 1), ("other", 2)):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
        pipe.unet.add_adapter(config, name)
    return pipe


@pytest.mark.gate
def test_several_loras_reach_the_student_by_their_weights(loras, student):
    pipe = loras
    drawn = {}
    for weights in ((0, 0), (1, 0), (0, 1), (0.5, 0.5)):
        pipe.set_adapters(["style", "other"], list(weights))
        drawn[weights] = with_student(pipe, student)
    pipe.set_adapters(["style"], [1.0])
    assert distance(drawn[1, 0], with_student(pipe, student)) < 1e-5
    for a in drawn:
        assert all(distance(drawn[a], drawn[b]) > 1e-3 for b in drawn if a != b)
    pipe.unet.disable_adapters()
    assert distance(drawn[0, 0], with_student(pipe, student)) < 1e-5


@pytest.mark.parametrize("first", ["swap", *gated(["fuse"])])
def test_fused_loras_act_on_the_student_as_loaded_ones_and_are_unfused(loras, student, first):
    pipe = loras
    pipe.set_adapters(["style", "other"], [0.8, 0.3])
    loaded = with_student(pipe, student)
    if first == "fuse":
        pipe.fuse_lora()
        assert distance(with_student(pipe, student), loaded) < 1e-4
        pipe.unfuse_lora()
    else:
        with swapped(pipe.unet, {IN01: student}):
            pipe.fuse_lora()
            assert distance(image(pipe), loaded) < 1e-4
            pipe.unfuse_lora()
    assert distance(with_student(pipe, student), loaded) < 1e-4


def test_a_lora_of_a_region_acts_on_the_student_there_alone(loras, student):
    """Of the prediction of one step; tiles that do not touch, so that each half is a picture of its own."""
    pipe = loras
    pipe.set_adapters(["style", "other"], [1.0, 1.0])
    text = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(3))
    latents = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))

    def predicted(x, regions=()):
        with tiled_diffusion(pipe, tile_width=8, tile_height=8, overlap=0, regions=regions), torch.no_grad():
            told = pipe.encode_prompt("a red circle", torch.device("cpu"), 1, True)
            both = torch.cat(told[1::-1]) if regions else text
            return pipe.unet(x, torch.tensor(500), both, return_dict=False)[0]

    halves = [Region(x=i / 2, y=0, w=0.5, h=1, adapters=adapters) for i, adapters in enumerate((("other",), ()))]
    with swapped(pipe.unet, {IN01: student}):
        found = predicted(latents, halves)
        text = torch.cat(pipe.encode_prompt("a red circle", torch.device("cpu"), 1, True)[1::-1])
        pipe.set_adapters(["other"], [1.0])
        left = predicted(latents[..., :8])
        pipe.unet.disable_adapters()
        right = predicted(latents[..., 8:])
        assert distance(found[..., :8], left) < 1e-4 and distance(found[..., 8:], right) < 1e-4
        assert distance(predicted(latents[..., :8]), left) > 1e-3
    assert sum(student.batches) >= 8


# Pictures


def controlnet(unet, seed: int) -> ControlNetModel:
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16, 16, 16)).eval()
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.2)  # zero in a new ControlNet
    return net


@pytest.mark.gate
def test_several_controlnets_act_beside_a_student_each_by_its_scale(pipe, student):
    plain, bright, dark = with_student(pipe, student), torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    nets = MultiControlNetModel([controlnet(pipe.unet, 1), controlnet(pipe.unet, 2)])
    both = AutoPipelineForText2Image.from_pipe(pipe, controlnet=nets)
    one = AutoPipelineForText2Image.from_pipe(pipe, controlnet=nets.nets[0])
    drawn = lambda *scales: with_student(
        both, student, image=[bright, dark], controlnet_conditioning_scale=list(scales)
    )
    assert distance(drawn(0.0, 0.0), plain) < 1e-5
    assert distance(drawn(0.7, 0.0), with_student(one, student, image=bright, controlnet_conditioning_scale=0.7)) < 1e-5
    assert distance(drawn(0.7, 0.7), drawn(0.7, 0.0)) > 1e-3


@pytest.mark.gate
def test_img2img_and_inpainting_call_the_student_in_the_steps_that_are_left(pipe, student):
    given = dict(image=Image.new("RGB", (64, 64), "red"), width=None, height=None, strength=0.5)
    given |= dict(num_inference_steps=4)
    weak = with_student(AutoPipelineForImage2Image.from_pipe(pipe), student, steps=2, **given)
    strong = with_student(AutoPipelineForImage2Image.from_pipe(pipe), student, steps=3, **given | {"strength": 0.75})
    assert distance(weak, strong) > 1e-2
    left = torch.zeros(1, 1, 64, 64)
    left[..., 32:] = 1
    painter = AutoPipelineForInpainting.from_pipe(pipe)
    given |= dict(mask_image=left, strength=1.0, num_inference_steps=2)
    painted, other = (with_student(painter, student, prompt=p, **given) for p in ("a red circle", "two blue squares"))
    assert torch.equal(painted[..., :4], other[..., :4]) and distance(painted[..., 4:], other[..., 4:]) > 1e-3


def test_sdxl_hands_over_from_base_to_refiner_with_students_in_both(tiny_sdxl):
    """With one UNet for both the picture is that of a single run, bit for bit; and each student serves its own part."""
    base = AutoPipelineForText2Image.from_pipe(tiny_sdxl)
    set_scheduler(base, "ddim")
    refiner = StableDiffusionXLImg2ImgPipeline(**base.components, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    site = next(site for site in find_sites(base.unet) if site.short == "IN04.0")
    spec = StudentSpec(site.name, site.short, site.channels, "hyena2d", {"heads": site.heads, "landmarks": 4}, None)
    one, other = counted(spec), counted(spec)
    torch.nn.init.normal_(other.change[0].weight)
    given = dict(num_inference_steps=10)
    with swapped(base.unet, {site.name: one}):
        whole = image(base, **given)
        assert one.batches == [2] * 10
        first = image(base, **given, denoising_end=0.6)
        assert one.batches == [2] * 16
        second = dict(image=first, width=None, height=None, denoising_start=0.6, **given)
        assert torch.equal(image(refiner, **second), whole)
    plain = image(refiner, **second)
    with swapped(base.unet, {site.name: other}):
        assert distance(image(refiner, **second), whole) > 1e-4 < distance(plain, whole)
    assert other.batches == [2] * 4


# Files


def test_a_pipeline_that_is_saved_with_students_and_loras_fused_in_saves_itself_alone(pipe, student, tmp_path):
    def hashes(folder):
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    pipe.save_pretrained(tmp_path / "plain")
    with swapped(pipe.unet, {IN01: student}):
        pipe.save_pretrained(tmp_path / "swapped")
    assert hashes(tmp_path / "plain") == hashes(tmp_path / "swapped") != {}
