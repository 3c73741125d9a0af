import copy
import random
from contextlib import ExitStack, suppress
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, PAGCFGIdentitySelfAttnProcessor2_0
from einops import rearrange
from peft import LoraConfig

from sd_hyena.errors import BadInput
from sd_hyena.large.bricks import get_bricks
from sd_hyena.large.feed_forward import chunk_feed_forward
from sd_hyena.large.tiled_attention import brick_attention, split_attention
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.sites import find_sites
from sd_hyena.students.student import StudentSpec, build_student
from sd_hyena.students.swap import swapped
from tests.conftest import IN01, OUT11
from tests.fixtures import controlnet_of, image_of
from tests.gate import gated

TEXT = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(1))


def latents(height, width, batch=2):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(2))


def predict(unet, x, timestep=500, **kwargs):
    with torch.no_grad():
        return unet(x, timestep, TEXT[: len(x)].to(x), **kwargs).sample


def transformer_of(unet, name=IN01):
    return unet.get_submodule(name.split(".transformer_blocks")[0])


def owners(size, tiles):
    owner = torch.full(size, -1)
    for n, (top, left, height, width) in enumerate(tiles):
        owner[top : top + height, left : left + width] = n
    return owner.flatten()


def even(size, rows, columns):
    """The tiles of rows x columns nearly equal parts."""
    ys, xs = ([i * side // n for i in range(n + 1)] for side, n in zip(size, (rows, columns), strict=True))
    return [(top, left, bottom - top, right - left) for top, bottom in pairwise(ys) for left, right in pairwise(xs)]


class Masked:
    """The definition of tiled attention: global attention in which tokens of different tiles do not see each other."""

    def __init__(self, tiles_of):
        self.tiles_of = tiles_of  # by the number of tokens

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        batch, length, _ = x.shape
        normed = x if attn.group_norm is None else attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (p(normed).unflatten(2, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, length, batch)
            scores = scores + mask.view(batch, attn.heads, -1, length)
        owner = owners(*self.tiles_of(length))
        scores = scores.masked_fill(owner[:, None] != owner[None, :], -torch.inf)
        y = attn.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = y.transpose(1, 2).unflatten(2, hidden_states.shape[2:]) if hidden_states.ndim == 4 else y
        return (y + hidden_states * attn.residual_connection) / attn.rescale_output_factor


def by_definition(model, names, tiles_of):
    """A copy in float64 whose attentions of these names are tiled by definition."""
    model = copy.deepcopy(model).double()
    for name in names:
        model.get_submodule(name).set_processor(Masked(tiles_of))
    return model


def state_of(model):
    """All that a context manager could leave behind in a model."""
    modules = list(model.named_modules())
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for n, m in modules]
    return [(name, id(module)) for name, module in modules], hooks, list(model.state_dict())


@pytest.fixture(autouse=True)
def nothing_left_behind(shared_pipe):
    before = state_of(shared_pipe.unet), state_of(shared_pipe.vae)
    numbers = random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())
    yield
    assert (state_of(shared_pipe.unet), state_of(shared_pipe.vae)) == before
    assert (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())) == numbers


class Recorder(torch.nn.Module):
    """A student that answers with its site's attention and keeps what it met."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.met = [attention], []

    def forward(self, x, projections, size):
        self.met.append((x.clone(), size))
        return self.attention[0](x)


class Enough(Exception):
    """What was to be seen has been seen."""


def enough(*_):
    raise Enough


# What a tile is


@pytest.mark.parametrize(
    "width, height, rows, columns", [(96, 64, 2, 3), (64, 96, 3, 2), (76, 115, 3, 2), (128, 64, 2, 4)]
)
def test_tiles_are_true_rectangles_of_the_picture_for_any_height_and_width(unet, width, height, rows, columns):
    whole, recorder = [], Recorder(unet.get_submodule(IN01))
    block = unet.get_submodule(IN01.removesuffix(".attn1"))
    hooks = [block.norm1.register_forward_hook(lambda _m, _a, y: whole.append(y.clone()))]
    hooks.append(block.attn2.register_forward_pre_hook(enough))
    with swapped(unet, {IN01: recorder}), split_attention(unet, tile_size=256, swap_size=1), pytest.raises(Enough):
        predict(unet, latents(height, width))
    for hook in hooks:
        hook.remove()
    picture = whole[0].unflatten(1, (height, width))
    wanted = {(h, w): [] for _, _, h, w in even((height, width), rows, columns)}
    for top, left, h, w in even((height, width), rows, columns):
        wanted[h, w].append(picture[:, top : top + h, left : left + w].flatten(1, 2))
    assert {size for _, size in recorder.met} == set(wanted)
    for x, size in recorder.met:
        assert torch.equal(x, torch.stack(wanted[size], 1).flatten(0, 1))
        assert min(size) >= 32


@pytest.mark.parametrize("height, width, rows, columns", [(10, 14, 2, 3), (11, 5, 2, 1), (9, 17, 2, 4)])
def test_a_split_unet_computes_global_attention_masked_to_the_tiles(unet, height, width, rows, columns):
    names = [site.name for site in find_sites(unet) if site.level == 0]
    tiled = ((height, width), even((height, width), rows, columns))
    truth = predict(by_definition(unet, names, lambda _: tiled), latents(height, width).double())
    with split_attention(unet, tile_size=32, swap_size=1):
        torch.testing.assert_close(predict(unet, latents(height, width)), truth.float(), rtol=1e-4, atol=2e-5)
    assert (predict(unet, latents(height, width)) - truth).norm() > 0.01 * truth.norm()


@pytest.mark.parametrize("shape", [*gated(["brick"]), "tile", "shifted"])
def test_bricks_and_windows_compute_global_attention_masked_to_them(unet, shape):
    grids, truth = {35 * 17: (35, 17), 18 * 9: (18, 9)}, copy.deepcopy(unet).double()
    for n, site in enumerate(find_sites(unet)):
        if site.level < 2:
            tiles = {length: (size, get_bricks(size[1], size[0], n, 8, 9, shape)) for length, size in grids.items()}
            truth.get_submodule(site.name).set_processor(Masked(tiles.get))
    truth = predict(truth, latents(35, 17, 1).double())
    with brick_attention(unet, 8, 9, shape):
        torch.testing.assert_close(predict(unet, latents(35, 17, 1)), truth.float(), rtol=1e-4, atol=2e-5)


def test_hypertile_on_a_square_is_reproduced_bit_for_bit_when_the_same_grid_is_forced(unet, monkeypatch):
    x, sites = latents(16, 16), [site.name for site in find_sites(unet) if site.level == 0]
    with split_attention(unet, 1.0, 64, 1):
        ours = predict(unet, x)
    for name in sites:
        attention = unet.get_submodule(name)

        def hypertile(hidden_states, *args, plain=attention.forward, **kwargs):
            folded = rearrange(hidden_states, "b (nh h nw w) c -> (b nh nw) (h w) c", nh=2, nw=2, h=8, w=8)
            out = plain(folded, *args, **kwargs)
            return rearrange(out, "(b nh nw) (h w) c -> b (nh h nw w) c", nh=2, nw=2, h=8, w=8)

        monkeypatch.setitem(vars(attention), "forward", hypertile)
    assert torch.equal(predict(unet, x), ours)


def test_gradients_are_those_of_the_masked_attention(unet):
    transformer = copy.deepcopy(transformer_of(unet)).double()
    name = "transformer_blocks.0.attn1"
    size, x = (9, 13), torch.randn(2, 32, 9, 13, dtype=torch.double, generator=torch.Generator().manual_seed(0))

    def gradient(model, x):
        x = x.clone().requires_grad_()
        y = model(x, encoder_hidden_states=TEXT.double()).sample
        (y * torch.arange(13)).sum().backward()
        return x.grad

    holder = copy.deepcopy(unet).double()
    with split_attention(holder, tile_size=32, swap_size=1):
        ours = gradient(transformer_of(holder), x)
    transformer.get_submodule(name).set_processor(Masked(lambda _: (size, even(size, 2, 3))))
    torch.testing.assert_close(ours, gradient(transformer, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["keys", "keys of each head", "pairs", "pairs of each head"])
def test_a_mask_holds_within_the_tiles(unet, kind):
    size, batch, length, heads = (9, 14), 2, 126, unet.get_submodule(IN01).heads
    rows = {"keys": (batch, 1), "keys of each head": (batch * heads, 1)}.get(kind)
    rows = rows or ((batch, length) if kind == "pairs" else (batch * heads, length))
    mask = torch.randn(*rows, length, generator=torch.Generator().manual_seed(0)) * 3
    x = torch.randn(batch, 32, *size, generator=torch.Generator().manual_seed(1))

    def call(model, x, mask):
        with torch.no_grad():
            return transformer_of(model)(x, encoder_hidden_states=TEXT.to(x), attention_mask=mask).sample

    truth = by_definition(unet, [IN01], lambda _: (size, even(size, 2, 3)))
    wanted = call(truth, x.double(), mask.double()).float()
    with split_attention(unet, tile_size=32, swap_size=1):
        torch.testing.assert_close(call(unet, x, mask), wanted, rtol=1e-4, atol=1e-5)
        if kind == "pairs":
            with pytest.raises(BadInput, match=r"mask of shape \(2, 126, 125\) cannot be tiled over 126 tokens"):
                call(unet, x, mask[..., 1:])
    assert (call(unet, x, None) - wanted).norm() > 0.01 * wanted.norm()


def test_what_a_processor_makes_of_the_parts_of_its_batch_holds(own_pipe):
    """Perturbed-attention guidance: the last third of the batch skips the mixing, so tiles change nothing there."""
    unet = own_pipe.unet
    unet.get_submodule(IN01).set_processor(PAGCFGIdentitySelfAttnProcessor2_0())
    x, text = torch.randn(3, 32, 8, 12, generator=torch.Generator().manual_seed(0)), TEXT[:1].expand(3, -1, -1)
    with torch.no_grad():
        plain = transformer_of(unet)(x, encoder_hidden_states=text).sample
        with split_attention(unet, tile_size=32, swap_size=1):
            tiled = transformer_of(unet)(x, encoder_hidden_states=text).sample
    torch.testing.assert_close(tiled[2], plain[2], rtol=1e-5, atol=1e-5)
    assert all((tiled[i] - plain[i]).norm() > 1e-3 * plain[i].norm() for i in (0, 1))


# The VAE


def test_a_vae_attends_in_tiles_while_its_norm_sees_the_whole_map(pipe):
    vae, z = pipe.vae, latents(11, 14)
    names = [f"{side}.mid_block.attentions.0" for side in ("encoder", "decoder")]
    image = torch.rand(2, 3, 88, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    truth = by_definition(vae, names, lambda _: ((11, 14), even((11, 14), 2, 3)))
    with torch.no_grad():
        decoded, encoded = truth.decode(z.double()).sample, truth.encode(image.double()).latent_dist.parameters
        with split_attention(vae, tile_size=32, swap_size=1):
            torch.testing.assert_close(vae.decode(z).sample, decoded.float(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(vae.encode(image).latent_dist.parameters, encoded.float(), rtol=1e-4, atol=1e-4)
        plain = vae.decode(z).sample
        assert (plain - decoded).abs().max() > 1e-2  # the tiles do matter
        with split_attention(vae, tile_size=128):
            assert torch.equal(vae.decode(z).sample, plain)


def test_a_vae_tiled_twice_still_has_its_norm_over_the_whole_map(pipe):
    vae, z = pipe.vae, latents(17, 9)
    tiles = [(top + y, left + x, h, w) for top, left, H, W in even((17, 9), 2, 1) for y, x, h, w in even((H, W), 2, 2)]
    truth = by_definition(vae, ["decoder.mid_block.attentions.0"], lambda _: ((17, 9), tiles))
    with (
        torch.no_grad(),
        split_attention(vae, tile_size=64, swap_size=1),
        split_attention(vae, tile_size=32, swap_size=1),
    ):
        torch.testing.assert_close(vae.decode(z).sample, truth.decode(z.double()).sample.float(), rtol=1e-4, atol=1e-4)


# A ControlNet


def test_a_controlnet_attends_in_the_tiles_of_its_masked_definition_and_is_as_it_was(unet):
    controlnet = controlnet_of(unet, 0)
    sites = find_sites(controlnet)
    assert [site.name for site in sites] == [s.name for s in find_sites(unet) if not s.name.startswith("up_blocks")]
    hint = torch.rand(2, 3, 80, 112, generator=torch.Generator().manual_seed(3))

    def answer(model, x):
        with torch.no_grad():
            down, middle = model(x, 500, TEXT.to(x), hint.to(x), return_dict=False)
        return [*down, middle]

    x, before = latents(10, 14), state_of(controlnet)
    tiled = ((10, 14), even((10, 14), 2, 3))
    names = [site.name for site in sites if site.level == 0]
    truth = answer(by_definition(controlnet, names, lambda _: tiled), x.double())
    plain = answer(controlnet, x)
    with split_attention(controlnet, tile_size=32, swap_size=1), chunk_feed_forward(controlnet, 33):
        for found, wanted in zip(answer(controlnet, x), truth, strict=True):
            torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-4)
    with brick_attention(controlnet, 8, 8):
        assert not torch.allclose(answer(controlnet, x)[-1], plain[-1], atol=1e-4)
    assert state_of(controlnet) == before
    assert all(map(torch.equal, answer(controlnet, x), plain)) and (plain[-1] - truth[-1]).abs().max() > 1e-3


# Students


def student(name=IN01, operator="hyena2d", size=None, **options):
    options = {"heads": 2, **options} if operator == "hyena2d" else options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = build_student(StudentSpec(name, name, 32, operator, options, size)).eval()
        for p in built.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return built


class ByHand(torch.nn.Module):
    """A student called tile by tile, without a context manager."""

    def __init__(self, student, tiles):
        super().__init__()
        self.student, self.tiles = student, tiles

    def forward(self, x, projections, size):
        picture, out = x.unflatten(1, size), torch.full_like(x.unflatten(1, size), torch.nan)
        for top, left, h, w in self.tiles:
            part = picture[:, top : top + h, left : left + w]
            out[:, top : top + h, left : left + w] = self.student(part.flatten(1, 2), projections, (h, w)).unflatten(
                1, (h, w)
            )
        return out.flatten(1, 2)


def test_students_are_tiled_whether_swapped_in_before_or_after(unet):
    x, students = latents(17, 10), {site.name: student(site.name) for site in find_sites(unet) if site.level == 0}
    with swapped(unet, {name: ByHand(each, even((17, 10), 4, 2)) for name, each in students.items()}):
        by_hand = predict(unet, x)
    with swapped(unet, students):
        whole = predict(unet, x)
        with split_attention(unet, tile_size=32, swap_size=1):
            before = predict(unet, x)
        assert torch.equal(predict(unet, x), whole)
    with split_attention(unet, tile_size=32, swap_size=1):
        attention = predict(unet, x)
        with swapped(unet, students):
            after = predict(unet, x)
        assert torch.equal(predict(unet, x), attention)
    assert torch.equal(before, after) and (before - whole).norm() > 1e-2 * whole.norm()
    torch.testing.assert_close(before, by_hand, rtol=1e-4, atol=1e-5)


def test_a_student_of_one_size_serves_any_image_in_tiles_of_that_size(unet):
    ours = {IN01: student(operator="causal", size=(8, 8), order=2)}
    with swapped(unet, ours):
        with pytest.raises(BadInput, match="8x8 cells and met 24x16"):
            predict(unet, latents(16, 24))
        with split_attention(unet, tile_size=64, swap_size=1):
            assert predict(unet, latents(16, 24)).isfinite().all()


@pytest.mark.parametrize("swap_first", [True, False])
def test_tilings_nest_and_the_inner_one_cuts_the_tiles_of_the_outer_one(unet, swap_first):
    recorder = Recorder(unet.get_submodule(IN01))
    with ExitStack() as stack:
        swaps = [lambda: swapped(unet, {IN01: recorder})]
        tilings = [
            lambda: split_attention(unet, tile_size=128, swap_size=1),
            lambda: brick_attention(unet, 8, 8, "tile"),
        ]
        for block in swaps + tilings if swap_first else tilings + swaps:
            stack.enter_context(block())
        predict(unet, latents(32, 20))
    assert sum(x.shape[0] * x.shape[1] for x, _ in recorder.met) == 2 * 32 * 20
    wanted = {(h, w) for _, _, H, W in even((32, 20), 2, 1) for _, _, h, w in even((H, W), 2, 3)}
    assert {size for _, size in recorder.met} == wanted
    assert all(x.shape[1] == size[0] * size[1] for x, size in recorder.met)


def test_an_inner_tiling_ends_with_its_block(unet):
    x = latents(32, 16)
    plain = predict(unet, x)
    with split_attention(unet, tile_size=128, swap_size=1):
        one = predict(unet, x)
        with brick_attention(unet, 8, 8, max_depth=0):
            assert not torch.equal(predict(unet, x), one)
        assert torch.equal(predict(unet, x), one) and not torch.equal(one, plain)


def test_a_student_behind_a_tiling_that_cuts_nothing_still_learns_the_tile_of_the_outer_one(unet):
    recorder = Recorder(unet.get_submodule(IN01))
    with (
        swapped(unet, {IN01: recorder}),
        split_attention(unet, tile_size=64, swap_size=1),
        brick_attention(unet, 64, 64),
    ):
        predict(unet, latents(16, 24))
    assert {size for _, size in recorder.met} == {(8, 8)}


# Which sites, which steps


@pytest.fixture(scope="module")
def sdxl():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            block_out_channels=(16, 32, 32),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2],
            attention_head_dim=[1, 2, 2],
            cross_attention_dim=96,
            layers_per_block=1,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ).eval()


def met(unet, call, name=None):
    """The sizes of tiles (batch, tokens) that each attention met during a call, by level or of one site."""
    result, hooks = {}, []
    for site in find_sites(unet):
        key = site.level if name is None else site.name
        note = lambda _m, args, key=key: result.setdefault(key, []).append(tuple(args[0].shape[:2]))
        hooks.append(unet.get_submodule(site.name).register_forward_pre_hook(note))
    call()
    for hook in hooks:
        hook.remove()
    return result if name is None else result[name]


@pytest.mark.parametrize("max_depth, scale_depth", product(range(4), (False, True)))
def test_depth_is_counted_from_the_finest_level_that_attends_in_sd_1_and_in_sdxl(unet, sdxl, max_depth, scale_depth):
    extra = {"text_embeds": torch.zeros(2, 16), "time_ids": torch.zeros(2, 6)}
    for model, finest, deepest, given in [(unet, 0, 3, {}), (sdxl, 1, 2, {"added_cond_kwargs": extra})]:
        with split_attention(model, tile_size=32, swap_size=1, max_depth=max_depth, scale_depth=scale_depth):
            tiles = met(model, lambda m=model, g=given: predict(m, latents(40, 24), **g))
        assert set(tiles) == set(range(finest, deepest + 1))
        for level, calls in tiles.items():
            height, width, depth = 40 >> level, 24 >> level, level - finest
            smallest = 4 << depth if scale_depth else 4
            rows, columns = (max(1, side // smallest) if depth <= max_depth else 1 for side in (height, width))
            tiles_of = [(h, w) for _, _, h, w in even((height, width), rows, columns)]
            assert set(calls) == {(2 * tiles_of.count((h, w)), h * w) for h, w in tiles_of}, level


def grids(unet, name=IN01, timesteps=(500,), size=(24, 40)):
    """The tiles of a site at each of these timesteps; nothing that comes behind it is computed."""

    def call(timestep):
        with suppress(Enough):
            predict(unet, latents(*size, 1), timestep)

    behind = unet.get_submodule(f"{name.removesuffix('.attn1')}.attn2").register_forward_pre_hook(enough)
    try:
        return [tuple(met(unet, lambda t=t: call(t), name)) for t in timesteps]
    finally:
        behind.remove()


RUN = (900, 700, 500, 300, 100)


def test_draws_depend_on_the_seed_the_step_and_the_site_alone(unet):
    given = dict(tile_size=32, swap_size=3)
    with split_attention(unet, seed=7, **given):
        first, again = grids(unet, timesteps=RUN), grids(unet, timesteps=RUN)
        twice = grids(unet, timesteps=(900, 700, 700, 500))
        other_site = grids(unet, IN01.replace("attentions.0", "attentions.1"), RUN)
    with split_attention(unet, seed=7, **given):
        later = grids(unet, timesteps=RUN)
    assert first == again == later and twice == [first[0], first[1], first[1], first[2]]
    assert len(set(first)) > 1 and other_site != first
    with split_attention(unet, seed=8, **given):
        assert grids(unet, timesteps=RUN) != first
    fresh = []
    for _ in range(2):
        with split_attention(unet, **given):
            fresh.append(grids(unet, timesteps=RUN))
    assert fresh[0] != fresh[1]


def test_only_the_smallest_tiles_are_drawn_and_all_of_them(unet):
    with split_attention(unet, tile_size=32, swap_size=2, seed=0):
        drawn = grids(unet, timesteps=range(990, 0, -33), size=(12, 20))
    assert {sum(batch for batch, _ in grid) for grid in drawn} == {3 * 5, 3 * 4, 2 * 5, 2 * 4}


@pytest.mark.gate
def test_the_same_seed_gives_the_same_image_also_as_the_second_of_a_block(pipe):
    plain = image_of(pipe, width=96)
    with split_attention(pipe.unet, tile_size=32, seed=3):
        one, two = image_of(pipe, width=96), image_of(pipe, width=96)
    with split_attention(pipe.unet, tile_size=32, seed=4):
        other = image_of(pipe, width=96)
    assert torch.equal(one, two) and not torch.equal(one, other) and not torch.equal(one, plain)
    assert torch.equal(image_of(pipe, width=96), plain)
    with brick_attention(pipe.unet, 8, 8):
        one, two = image_of(pipe, width=96), image_of(pipe, width=96)
    assert torch.equal(one, two) and not torch.equal(one, plain)


def test_bricks_take_turns_over_the_sites_and_over_the_steps(unet):
    sites = {site.name: n for n, site in enumerate(find_sites(unet))}

    def wanted(number):
        tiles = [(h, w) for _, _, h, w in get_bricks(40, 24, number, 8, 8)]
        return sorted((tiles.count(tile), tile[0] * tile[1]) for tile in set(tiles))

    for name in (IN01, OUT11):
        with brick_attention(unet, 8, 8, max_depth=0):
            run = grids(unet, name, (900, 700, 700, 500, 300, 100, 900))
        assert [sorted(one) for one in run] == [wanted(sites[name] + step) for step in (0, 1, 1, 2, 3, 4, 0)]


def test_only_the_timesteps_of_the_range_are_tiled_ends_included(unet):
    x = latents(12, 8)
    plain = {t: predict(unet, x, t) for t in (700, 500, 499, 40, 39)}
    with split_attention(unet, tile_size=32, swap_size=1, timestep_range=(40, 500)):
        equal = {t: torch.equal(predict(unet, x, torch.tensor(t)), plain[t]) for t in plain}
    assert equal == {700: True, 500: False, 499: False, 40: False, 39: True}


def test_hypertiles_ratio_changes_nothing_and_disable_leaves_the_model_alone(unet):
    x = latents(12, 20)
    plain = predict(unet, x)
    with split_attention(unet, 20 / 12, 32, 1):
        one = predict(unet, x)
    with split_attention(unet, aspect_ratio=0.1, tile_size=32, swap_size=1):
        assert torch.equal(predict(unet, x), one) and not torch.equal(one, plain)
    before = state_of(unet)
    with split_attention(unet, 1.0, 32, disable=True):
        assert state_of(unet) == before and torch.equal(predict(unet, x), plain)
    with split_attention(unet, tile_size=256), brick_attention(unet, 64, 64):  # larger than the picture
        assert torch.equal(predict(unet, x), plain)


# Leaving no trace


class Failing(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x, projections, size):
        raise self.error


@pytest.mark.parametrize(
    "error, swap_first",
    [
        (RuntimeError("on purpose"), True),
        (KeyboardInterrupt(), False),
        *gated([(RuntimeError("on purpose"), False), (KeyboardInterrupt(), True)]),
    ],
)
def test_an_exception_within_a_call_leaves_nothing_behind_and_the_tiling_goes_on(unet, error, swap_first):
    x = latents(12, 20)
    plain, before = predict(unet, x), state_of(unet)
    swap = lambda: swapped(unet, {OUT11: Failing(error)})
    with split_attention(unet, tile_size=32, seed=0), brick_attention(unet, 8, 8):
        tiled, inside = predict(unet, x), state_of(unet)
        with pytest.raises(type(error)), swap():
            predict(unet, x)
        assert state_of(unet) == inside and torch.equal(predict(unet, x), tiled)
    with pytest.raises(type(error)), ExitStack() as stack:
        if swap_first:
            stack.enter_context(swap())
        stack.enter_context(split_attention(unet, tile_size=32, seed=0))
        stack.enter_context(brick_attention(unet, 8, 8))
        if not swap_first:
            stack.enter_context(swap())
        predict(unet, x)
    assert state_of(unet) == before and torch.equal(predict(unet, x), plain)


def test_between_calls_the_model_has_its_own_modules_and_keys(unet):
    (modules, _, keys), x = state_of(unet), latents(12, 20)
    with split_attention(unet, tile_size=32), brick_attention(unet, 8, 8):
        predict(unet, x)
        assert (state_of(unet)[0], state_of(unet)[2]) == (modules, keys)


def slicing(pipe):
    pipe.enable_attention_slicing(1)


def fused_qkv(pipe):
    pipe.unet.fuse_qkv_projections()


def other_processors(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())


def lora(pipe):
    torch.manual_seed(0)
    given = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v", "ff.net.2"], init_lora_weights=False)
    pipe.unet.add_adapter(given, "style")


@pytest.mark.parametrize("feature", [*gated([slicing, other_processors]), fused_qkv, lora])
def test_what_changes_attentions_works_before_and_within_a_tiling_and_outlives_it(shared_pipe, feature):
    x, results = latents(12, 20), []
    for within in (False, True):
        pipe = load_pipeline(SHIPPED_MODEL, torch.device("cpu"), torch.float32)
        with torch.random.fork_rng(), ExitStack() as stack:
            if not within:
                feature(pipe)
            stack.enter_context(split_attention(pipe.unet, tile_size=32, swap_size=1))
            if within:
                feature(pipe)
            results.append(predict(pipe.unet, x))
        results.append(predict(pipe.unet, x))
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[3], rtol=0, atol=0)
    assert (results[0] - results[1]).norm() > 0.01 * results[1].norm()
    with split_attention(shared_pipe.unet, tile_size=32, swap_size=1):
        same = (predict(shared_pipe.unet, x) - results[0]).norm() < 1e-4 * results[0].norm()
    assert same == (feature is not lora)


def test_gradient_checkpointing_computes_the_same_tiles_again(own_pipe):
    unet, x = own_pipe.unet, latents(12, 20)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing()
        unet.train().zero_grad()
        with split_attention(unet, tile_size=32, swap_size=3, seed=0):
            unet(x, 500, TEXT).sample.square().sum().backward()
        gradients.append(unet.get_submodule(IN01).to_q.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_cross_attention_in_the_place_of_self_attention_is_left_alone():
    """`only_cross_attention`: the keys are the text's, so there is nothing to save."""
    blocks = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    blocks["mid_block_type"] = None
    small = dict(block_out_channels=(32,), norm_num_groups=4, layers_per_block=1, attention_head_dim=2)
    with torch.random.fork_rng():
        unet = UNet2DConditionModel(**blocks, **small, cross_attention_dim=96, only_cross_attention=True).eval()
    plain = predict(unet, latents(12, 8))
    with split_attention(unet, tile_size=32, swap_size=1):
        assert torch.equal(predict(unet, latents(12, 8)), plain)


def test_a_vae_without_attention_is_left_alone():
    with torch.random.fork_rng():
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False)
    with torch.no_grad():
        plain = vae.decode(latents(12, 8)).sample
        with split_attention(vae, tile_size=32):
            assert torch.equal(vae.decode(latents(12, 8)).sample, plain)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(tile_size=0), "tile_size=0 must be at least 32 pixels"),
        (dict(swap_size=0), "swap_size=0 must be at least 1"),
        (dict(max_depth=4), "max_depth=4 must be 0, 1, 2 or 3"),
        (dict(max_depth=-1), "max_depth=-1 must be"),
        (dict(timestep_range=(500, 40)), r"timestep_range=\(500, 40\) must be \(low, high\)"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_changes(pipe, given, words):
    with pytest.raises(BadInput, match=words) as raised, split_attention(pipe.unet, **given):
        pass
    assert "\n" not in str(raised.value)


def test_a_model_without_self_attention_is_refused(pipe):
    for model, words in [(pipe, "StableDiffusionPipeline; give pipe.unet or pipe.vae"), (pipe.unet.conv_in, "Conv2d")]:
        with pytest.raises(BadInput, match=words), split_attention(model):
            pass
    with pytest.raises(BadInput, match="a VAE has no timesteps"), split_attention(pipe.vae, timestep_range=(0, 9)):
        pass
    with pytest.raises(BadInput, match="attn_shape='hex'"), brick_attention(pipe.unet, 8, 8, "hex"):
        pass
