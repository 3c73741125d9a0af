import pytest
import torch

from sd_hyena.sites import find_sites, select
from sd_hyena.students.teacher import Teacher
from tests.conftest import IN01


def test_each_captured_input_through_its_site_gives_the_captured_target_bit_equal(unet, states):
    sites = find_sites(unet)
    activations = Teacher(unet, sites).activations(*states)
    assert list(activations) == [site.name for site in sites]
    for site in sites:
        activation = activations[site.name]
        with torch.no_grad():
            assert torch.equal(unet.get_submodule(site.name)(activation.input), activation.target)
        assert activation.size == site.size(10, 14)
        assert activation.input.shape == (2, activation.size[0] * activation.size[1], site.channels)
        assert activation.projections.to_q is unet.get_submodule(site.name).to_q
        assert not activation.input.requires_grad and not activation.input.is_inference()


@pytest.mark.parametrize("targets", ["IN01", "IN02,M00", "OUT11", "level1"])
def test_stopping_early_gives_the_activations_of_the_whole_forward(unet, states, targets):
    sites = select(find_sites(unet), targets)
    early, whole = Teacher(unet, sites).activations(*states), Teacher(unet, sites, whole=True).activations(*states)
    assert early.keys() == whole.keys() == {site.name for site in sites}
    for name in early:
        assert torch.equal(early[name].input, whole[name].input) and torch.equal(early[name].target, whole[name].target)


def test_an_early_stop_runs_nothing_behind_the_last_site(unet, states):
    ran = []
    hooks = [
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in ("conv_in", "down_blocks.0.resnets.1", "mid_block", "conv_out")
    ]
    Teacher(unet, select(find_sites(unet), "IN01")).activations(*states)
    for hook in hooks:
        hook.remove()
    assert ran == ["conv_in"]


def test_hooks_never_leak_and_the_teachers_own_output_is_untouched(unet, states):
    with torch.no_grad():
        before = unet(*states[:2], **states[2]).sample
    teacher = Teacher(unet, find_sites(unet))
    teacher.activations(*states)
    with pytest.raises(RuntimeError):
        teacher.activations(states[0][:, :3], *states[1:])  # three channels: the forward fails
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    with torch.no_grad():
        assert torch.equal(unet(*states[:2], **states[2]).sample, before)


def test_the_teacher_is_frozen(unet, states):
    Teacher(unet, find_sites(unet))
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())


def test_a_teacher_that_overflows_is_named(unet, states):
    weight = unet.get_submodule(IN01).to_out[0].bias
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = float("inf")
    try:
        with pytest.raises(FloatingPointError, match=r"down_blocks\.0.*not finite.*float32"):
            Teacher(unet, select(find_sites(unet), "IN01")).activations(*states)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_answers_are_the_attention_alone(unet):
    sites = select(find_sites(unet), "IN01,IN04")
    inputs = {site.name: torch.randn(2, h * w, site.channels) for site in sites for h, w in [site.size(6, 10)]}
    answers = Teacher(unet, sites).answers(inputs, (6, 10), torch.zeros(2))
    for site in sites:
        with torch.no_grad():
            assert torch.equal(answers[site.name].target, unet.get_submodule(site.name)(inputs[site.name]))
        assert answers[site.name].size == site.size(6, 10)
