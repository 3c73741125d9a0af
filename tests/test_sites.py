import pytest
import torch

from sd_hyena.errors import BadInput
from sd_hyena.sites import find_sites, select

SD15 = [f"IN{n:02d}" for n in (1, 2, 4, 5, 7, 8)] + ["M00"] + [f"OUT{n:02d}" for n in range(3, 12)]


def attentions(unet):
    return {name for name, _ in unet.named_modules() if name.endswith("attn1")}


def test_sd15_has_its_16_sites_under_the_names_and_numbers_users_know(sd15):
    sites = find_sites(sd15)
    assert [site.short for site in sites] == SD15
    assert {site.name for site in sites} == attentions(sd15)
    by = {site.short: site for site in sites}
    for shorts, channels, level in [
        ("IN01 IN02 OUT09 OUT10 OUT11", 320, 0),
        ("IN04 IN05 OUT06 OUT07 OUT08", 640, 1),
        ("IN07 IN08 OUT03 OUT04 OUT05", 1280, 2),
        ("M00", 1280, 3),
    ]:
        assert {(by[s].channels, by[s].level, by[s].heads) for s in shorts.split()} == {(channels, level, 8)}
    assert by["IN01"].name == "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert by["OUT11"].name == "up_blocks.3.attentions.2.transformer_blocks.0.attn1"


def test_sdxl_has_its_70_sites_numbered_within_their_blocks(sdxl):
    sites = find_sites(sdxl)
    assert {site.name for site in sites} == attentions(sdxl) and len(sites) == 70
    by = {site.short: site for site in sites}
    assert by["IN04.0"].name == "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert (by["IN04.1"].channels, by["IN04.1"].heads, by["IN04.1"].level) == (640, 10, 1)
    assert (by["IN07.9"].channels, by["M00.9"].level, by["OUT02.9"].level, by["OUT05.1"].level) == (1280, 2, 2, 1)


def test_the_shipped_model_has_the_same_16_sites(unet):
    assert [site.short for site in find_sites(unet)] == SD15


def test_sites_are_in_the_order_in_which_a_forward_pass_meets_them(unet, states):
    met, sites = [], find_sites(unet)
    hooks = [
        unet.get_submodule(s.name).register_forward_hook(lambda *_, name=s.name: met.append(name))
        for s in reversed(sites)
    ]
    with torch.no_grad():
        unet(*states[:2], **states[2])
    for hook in hooks:
        hook.remove()
    assert met == [site.name for site in sites]


@pytest.mark.parametrize("height, width", [(32, 32), (10, 14), (9, 33), (64, 8)])
def test_a_sites_size_is_what_its_transformer_really_sees(unet, height, width):
    seen, sites = {}, find_sites(unet)
    hooks = [
        unet.get_submodule(s.transformer).register_forward_pre_hook(
            lambda _, args, name=s.name: seen.update({name: tuple(args[0].shape[-2:])})
        )
        for s in sites
    ]
    with torch.no_grad():
        unet(torch.zeros(1, 4, height, width), 5, torch.zeros(1, 32, 96))
    for hook in hooks:
        hook.remove()
    assert seen == {site.name: site.size(height, width) for site in sites}


@pytest.mark.parametrize(
    "targets, shorts",
    [
        ("IN01", "IN01"),
        ("in01", "IN01"),
        (" OUT11 , IN01,, ", "IN01 OUT11"),
        ("level0", "IN01 IN02 OUT09 OUT10 OUT11"),
        ("Level3", "M00"),
        ("OUT1*", "OUT10 OUT11"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", "IN01"),
        ("IN01,level0", "IN01 IN02 OUT09 OUT10 OUT11"),
        ("all", " ".join(SD15)),
    ],
)
def test_select_understands_names_groups_and_patterns_and_keeps_the_unets_order(sd15, targets, shorts):
    assert [site.short for site in select(find_sites(sd15), targets)] == shorts.split()


@pytest.mark.parametrize("targets", ["IN03", "level7", "IN01,foo", "", " , ", "*nothing*"])
def test_select_names_what_exists_when_asked_for_what_does_not(sd15, targets):
    with pytest.raises(BadInput, match=r"target.*IN01"):
        select(find_sites(sd15), targets)
