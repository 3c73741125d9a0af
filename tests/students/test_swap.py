import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

from sd_hyena.sites import find_sites
from sd_hyena.students.student import StudentSpec, build_student
from sd_hyena.students.swap import StandIn, swapped
from tests.conftest import IN01, OUT11
from tests.fixtures import image_of
from tests.gate import gated


class Identity(torch.nn.Module):
    """A student that is the site's attention: softmax over the site's own projections."""

    def __init__(self, attention):
        super().__init__()
        self.attention = [attention]  # a list, so that it is not registered twice
        self.calls, self.sizes = 0, set()

    def forward(self, x, projections, size):
        self.calls += 1
        self.sizes.add(size)
        attention, batch = self.attention[0], x.shape[0]
        q, k, v = (
            p(x).view(batch, -1, attention.heads, x.shape[-1] // attention.heads).transpose(1, 2)
            for p in projections[:3]
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(x.shape)
        return projections.to_out[1](projections.to_out[0](y))


class Silent(torch.nn.Module):
    """A student that answers zero and counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, projections, size):
        self.calls += 1
        return torch.zeros_like(x)


def identities(unet):
    return {site.name: Identity(unet.get_submodule(site.name)) for site in find_sites(unet)}


def test_the_identity_swap_of_all_sites_gives_a_bit_equal_image(pipe):
    plain = image_of(pipe)
    students = identities(pipe.unet)
    with swapped(pipe.unet, students):
        assert torch.equal(image_of(pipe), plain)
    assert all(student.calls == 2 for student in students.values())
    assert torch.equal(image_of(pipe), plain)


@pytest.mark.parametrize("width, height", [(96, 64), (64, 136), (72, 104)])
def test_a_student_learns_the_true_height_and_width(pipe, width, height):
    students = identities(pipe.unet)
    with swapped(pipe.unet, students):
        image_of(pipe, width=width, height=height, steps=1)
    for site in find_sites(pipe.unet):
        assert students[site.name].sizes == {site.size(height // 8, width // 8)}


def test_a_swap_changes_the_image_and_restores_modules_keys_and_output_also_after_an_exception(pipe):
    plain, keys, attention = image_of(pipe), list(pipe.unet.state_dict()), pipe.unet.get_submodule(IN01)
    with pytest.raises(RuntimeError, match="on purpose"), swapped(pipe.unet, {IN01: Silent()}):
        assert isinstance(pipe.unet.get_submodule(IN01), StandIn)
        assert not torch.equal(image_of(pipe), plain)
        raise RuntimeError("on purpose")
    assert pipe.unet.get_submodule(IN01) is attention and list(pipe.unet.state_dict()) == keys
    assert torch.equal(image_of(pipe), plain)


def test_swaps_nest_and_undo_in_order(pipe):
    plain = image_of(pipe)
    with swapped(pipe.unet, {IN01: Silent()}):
        one = image_of(pipe)
        with swapped(pipe.unet, {OUT11: Silent()}):
            assert not torch.equal(image_of(pipe), one)
        assert torch.equal(image_of(pipe), one)
    assert torch.equal(image_of(pipe), plain)


@pytest.mark.parametrize("name", ["down_blocks.9.attn1", "down_blocks.0.resnets.0", "conv_in"])
def test_a_path_that_is_no_site_raises_before_anything_changes(pipe, name):
    attention = pipe.unet.get_submodule(IN01)
    with pytest.raises(KeyError), swapped(pipe.unet, {IN01: Silent(), name: Silent()}):
        pass
    assert pipe.unet.get_submodule(IN01) is attention


def test_a_student_refuses_encoder_states_and_masks(unet):
    with swapped(unet, {IN01: Silent()}):
        stand_in, x = unet.get_submodule(IN01), torch.zeros(1, 4, 32)
        with pytest.raises(ValueError, match="no mask"):
            stand_in(x, attention_mask=torch.zeros(1, 4))
        with pytest.raises(ValueError, match="encoder"):
            stand_in(x, encoder_hidden_states=x)


def slicing(pipe):
    pipe.enable_attention_slicing(1)
    return pipe.disable_attention_slicing


def freeu(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipe.disable_freeu


def fused_qkv(pipe):
    pipe.unet.fuse_qkv_projections()
    return pipe.unet.unfuse_qkv_projections


def other_processors(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())  # the slow one: another order of the same sums
    return lambda: None


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("feature", [*gated([slicing, freeu]), fused_qkv, *gated([other_processors])])
@pytest.mark.parametrize("first", [*gated(["swap"]), "feature"])
def test_a_student_survives_what_replaces_attention_processors(own_pipe, feature, first):
    pipe, silent = own_pipe, Silent()
    plain = image_of(pipe)
    undo = feature(pipe) if first == "feature" else None
    with swapped(pipe.unet, {IN01: silent}):
        undo = undo or feature(pipe)
        with_student = image_of(pipe)
        assert silent.calls == 2 and not torch.allclose(with_student, plain, atol=1e-3)
        if first == "swap":
            undo()
            image_of(pipe)
            assert silent.calls == 4
    if first == "feature":
        undo()
    assert distance(image_of(pipe), plain) < 1e-4 < distance(with_student, plain) / 10


def lora(unet, targets=("to_q", "to_v")):
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=list(targets), init_lora_weights=False), "style")


@pytest.mark.parametrize("first", [*gated(["swap"]), "lora"])
def test_a_lora_loaded_before_or_after_the_swap_reaches_the_student_and_outlives_the_swap(own_pipe, first):
    """The student stands on the site's own projections, so the LoRA changes what it answers."""
    pipe = own_pipe
    student = build_student(StudentSpec(IN01, "IN01", 32, "pointwise", {}, None)).eval()
    plain = image_of(pipe)
    with swapped(pipe.unet, {IN01: student}):
        without_lora = image_of(pipe)
    if first == "lora":
        lora(pipe.unet)
    with swapped(pipe.unet, {IN01: student}):
        if first == "swap":
            lora(pipe.unet)
        stand_in = pipe.unet.get_submodule(IN01)
        assert hasattr(stand_in.to_q, "lora_A")
        with_lora = image_of(pipe)
        pipe.unet.disable_adapters()
        assert distance(image_of(pipe), without_lora) < 1e-5
        pipe.unet.enable_adapters()
    assert distance(with_lora, without_lora) > 1e-3 and distance(image_of(pipe), plain) > 1e-3
    assert pipe.unet.get_submodule(IN01).to_q is stand_in.to_q  # the attention left behind knows the LoRA too


def test_a_controlnet_works_on_a_swapped_unet(own_pipe):
    pipe = own_pipe
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 16, 16, 16)).eval()
    for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.2)  # zero in a new ControlNet
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder",)}
    controlled = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)

    def image(hint):
        given = dict(num_inference_steps=2, width=64, height=64, output_type="latent")
        return controlled(
            "a red circle on blue", image=hint, generator=torch.Generator().manual_seed(0), **given
        ).images

    silent = Silent()
    dark, bright = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    plain = image(bright)
    with swapped(pipe.unet, {IN01: silent}):
        swapped_bright, swapped_dark = image(bright), image(dark)
    assert silent.calls == 4
    assert distance(swapped_bright, plain) > 1e-3 and distance(swapped_dark, swapped_bright) > 1e-5
    assert torch.equal(image(bright), plain)
