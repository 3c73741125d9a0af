import copy
import gc
import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

import sd_hyena.large.steps as steps_module
import sd_hyena.large.tiled_network as tiled_network
from sd_hyena.errors import BadInput
from sd_hyena.large import progress
from sd_hyena.large import tiled_vae as tiled_vae_module
from sd_hyena.large.steps import Moments
from sd_hyena.large.tile_store import TileStore
from sd_hyena.large.tiled_network import TiledNetwork
from sd_hyena.large.tiled_vae import VAETiling, disable_tiled_vae, enable_tiled_vae, tiled_vae
from sd_hyena.large.vae_steps import decoder_steps, encoder_steps
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.processes.progress import Work
from tests.gate import gated

CPU = torch.device("cpu")


def a_vae(channels=(16, 32), layers=1, groups=4, seed=0, down="DownEncoderBlock2D", up="UpDecoderBlock2D", **more):
    """Random, with norms that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        vae = AutoencoderKL(
            block_out_channels=channels,
            layers_per_block=layers,
            norm_num_groups=groups,
            down_block_types=(down,) * len(channels),
            up_block_types=(up,) * len(channels),
            **more,
        )
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(generator=generator)
        elif hasattr(module, "weight"):
            scale = module.weight[0].numel() ** -0.5
            module.weight.data.normal_(std=1.5 * scale, generator=generator)
            module.bias.data.normal_(std=0.1, generator=generator)
    return vae.eval().requires_grad_(False)


LAYOUTS = {
    "two levels": dict(),
    "the layout of SD": dict(channels=(8, 16, 32, 32), layers=2, groups=8),
    "no attention, no quant convolutions": dict(
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False
    ),
    "attention at each level, wider ends": dict(
        channels=(32, 16), down="AttnDownEncoderBlock2D", up="AttnUpDecoderBlock2D"
    ),
    "16 latent channels, gelu, one group": dict(latent_channels=16, act_fn="gelu", groups=1),
}


@pytest.fixture(scope="module")
def vae():
    return a_vae().double()


@pytest.fixture(scope="module")
def tiny():
    """The shipped model's."""
    return AutoencoderKL.from_pretrained(SHIPPED_MODEL / "vae").float().eval().requires_grad_(False)


def uneven(*shape, seed=0, dtype=torch.float64):
    """Noise whose mean and strength change over the map, so that no tile stands for another."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = torch.linspace(-1, 1, shape[2], dtype=torch.float64)[:, None]
    x = torch.linspace(-1, 1, shape[3], dtype=torch.float64)
    brighter = torch.arange(1, shape[0] + 1, dtype=torch.float64)[:, None, None, None]
    return (noise * (x + 1.2) * 0.5 + 2 * y * brighter).to(dtype)


def encoded(vae, x):
    return vae.encode(x).latent_dist.parameters


def decoded(vae, z):
    return vae.decode(z).sample


def difference(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a - b).abs().max().item()


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize(
    "layout, tile",
    [
        pytest.param(layout, tile, id=f"{name}-{tile}", marks=[pytest.mark.gate] if tile == gate else [])
        for (name, layout), gate in zip(LAYOUTS.items(), (8, 3, 8, 8, 3), strict=True)
        for tile in (3, 8)
    ],
)
def test_exact_equals_the_untiled_vae_in_float64_for_any_layout_and_size(layout, tile):
    vae = a_vae(**layout).double()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    z = uneven(2, vae.config.latent_channels, 11, 19)
    x = uneven(2, 3, 11 * factor, 19 * factor + factor // 2 + 1)  # the width is no multiple of the factor
    want = encoded(vae, x), decoded(vae, z)
    options = dict(encoder_tile_size=tile * factor, decoder_tile_size=tile, stats_dtype=torch.float64)
    with tiled_vae(vae, **options):
        assert difference(encoded(vae, x), want[0]) < 1e-11
        assert difference(decoded(vae, z), want[1]) < 1e-11


def test_exact_in_float32_is_as_good_as_the_untiled_vae_and_better_where_that_is_coarse(tiny):
    """On a CPU the untiled VAE loses digits when its tensors are channels-last, as those of a batch are."""
    z, x = uneven(2, 4, 11, 21, dtype=torch.float32), uneven(2, 3, 88, 168, dtype=torch.float32).clamp(-1, 1)
    precise = copy.deepcopy(tiny).double()
    with tiled_vae(tiny, encoder_tile_size=64, decoder_tile_size=8):
        got = encoded(tiny, x), decoded(tiny, z)
    assert difference(got[0].double(), encoded(precise, x.double())) < 1e-4
    assert difference(got[1].double(), decoded(precise, z.double())) < 1e-5
    one_by_one = torch.cat([decoded(tiny, one) for one in z.split(1)])
    assert difference(got[1], one_by_one) < 1e-4


def test_the_offload_changes_no_bit_and_leaves_no_file(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, z = uneven(1, 3, 34, 22), uneven(1, 4, 17, 11)
    results = []
    for offload in ("none", "cpu", "disk"):
        with tiled_vae(vae, offload=offload, encoder_tile_size=9, decoder_tile_size=4):
            results.append((encoded(vae, x), decoded(vae, z)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["exact", "fast", "two_pass", "classic", "blend"])
def test_an_image_of_one_tile_is_bit_equal_whatever_the_mode_and_the_vaes_own_tiling(mode, tiny):
    x, z = uneven(1, 3, 64, 56, dtype=torch.float32), uneven(1, 4, 8, 7, dtype=torch.float32)
    want = encoded(tiny, x), decoded(tiny, z)
    own = copy.deepcopy(tiny)
    own.enable_tiling()
    own.tile_latent_min_size = own.tile_sample_min_size = 4
    for vae in (tiny, own):
        with tiled_vae(vae, mode, encoder_tile_size=64, decoder_tile_size=8):
            assert torch.equal(encoded(vae, x), want[0]) and torch.equal(decoded(vae, z), want[1])
    assert own.use_tiling and own.tile_latent_min_size == 4


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_attention_in_chunks_is_attention(vae, chunk, monkeypatch):
    monkeypatch.setattr(steps_module, "QUERIES", chunk + 2)
    monkeypatch.setattr(tiled_network, "QUERIES", chunk + 2)
    monkeypatch.setattr(steps_module, "KEYS", chunk)
    sharp = copy.deepcopy(vae)
    sharp.decoder.mid_block.attentions[0].to_q.weight.data *= 30  # so that the running maximum moves
    sharp.decoder.mid_block.attentions[0].rescale_output_factor = 1.3
    sharp.decoder.mid_block.resnets[0].output_scale_factor = 0.7
    z = uneven(2, 4, 9, 5)
    want = decoded(sharp, z)
    with tiled_vae(sharp, decoder_tile_size=4, stats_dtype=torch.float64):
        assert difference(decoded(sharp, z), want) < 1e-11


def test_moments_of_uneven_tiles_are_those_of_the_whole_far_from_zero_too():
    x = torch.randn(3, 6, 10, 7, generator=torch.Generator().manual_seed(0)) + 300 * torch.arange(1, 4).view(3, 1, 1, 1)
    x[:, :, :4] -= 50
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        moments = Moments(2, dtype)
        for tile in (x[:, :, :3], x[:, :, 3:, :1], x[:, :, 3:, 1:1], x[:, :, 3:, 1:]):
            moments.add(tile)
        whole = x.double().reshape(3, 2, -1)
        variance = moments.squares.double() / moments.count
        assert moments.count == 3 * 70
        torch.testing.assert_close(moments.mean.double(), whole.mean(-1), rtol=tolerance, atol=0)
        torch.testing.assert_close(variance, whole.var(-1, correction=0), rtol=tolerance, atol=0)


def rolled(x, by):
    return x.roll((by, -2 * by), (2, 3))


@pytest.mark.parametrize("mode", ["exact", "two_pass"])
@pytest.mark.parametrize("tile", [5, 99])
def test_circular_has_no_borders_a_rolled_input_gives_the_rolled_output(vae, tile, mode):
    x, z = uneven(1, 3, 20, 30), uneven(1, 4, 10, 15)
    options = dict(encoder_tile_size=2 * tile, decoder_tile_size=tile, stats_dtype=torch.float64)
    by = 1 if mode == "exact" else 5  # a first pass sees tiles: roll by whole ones
    with tiled_vae(vae, mode, padding_mode="circular", **options):
        assert difference(encoded(vae, rolled(x, 2 * by)), rolled(encoded(vae, x), by)) < 1e-11
        assert difference(decoded(vae, rolled(z, by)), rolled(decoded(vae, z), 2 * by)) < 1e-11
        circular = decoded(vae, z)
    assert difference(circular, decoded(vae, z)) > 0.1


def test_a_circular_map_is_the_middle_of_a_plane_tiled_with_it():
    vae, z, store = a_vae(mid_block_add_attention=False).double(), uneven(1, 4, 12, 15), TileStore("none", CPU)
    circular = TiledNetwork(decoder_steps(vae), 5, store, torch.float64, circular=True)
    torus = circular(z)
    plane = TiledNetwork(decoder_steps(vae), 99, store, torch.float64)(z.repeat(1, 1, 3, 3), circular.measured)
    assert difference(plane[:, :, 24:48, 30:60], torus) < 1e-11


@pytest.mark.parametrize("circular", [*gated([False]), True])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_with_the_true_statistics_long_segments_with_long_halos_are_exact_too(side, circular):
    vae = a_vae((8, 16, 16), groups=4).double()
    steps = encoder_steps(vae) if side == "encoder" else decoder_steps(vae)
    x, tile = (uneven(2, 3, 120, 132), 40) if side == "encoder" else (uneven(2, 4, 30, 33), 7)
    exact = TiledNetwork(steps, 999, TileStore("none", CPU), torch.float64, circular)
    want = exact(x)
    tiles = TiledNetwork(steps, tile, TileStore("none", CPU), torch.float64, circular)
    assert len(tiled_network.cut(steps, exact.measured)) == 3 < 10 < len(tiled_network.cut(steps, {}))
    assert difference(tiles(x, exact.measured), want) < 1e-11


def test_a_first_pass_counts_each_cell_once_and_with_one_tile_it_is_exact(vae):
    x = uneven(2, 3, 21, 34)
    one, many = (TiledNetwork(encoder_steps(vae), tile, TileStore("none", CPU), torch.float64) for tile in (34, 6))
    assert difference(one(x, own_statistics=True), encoded(vae, x)) < 1e-11
    many(x, own_statistics=True)
    counts = [{norm: moments.count for norm, moments in network.measured.items()} for network in (one, many)]
    assert counts[0] == counts[1] and len(counts[0]) == sum(
        isinstance(m, torch.nn.GroupNorm) for m in vae.encoder.modules()
    )


def scene(height, width):
    """Flat areas, stripes and a soft light: an image whose parts differ."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    stripes = torch.sign(torch.sin(40 * x + 9 * y)) * (y > 0.5)
    disc = ((x - 0.3) ** 2 + (y - 0.3) ** 2 < 0.03).float()
    return torch.stack([0.8 * stripes, 1.6 * disc - 0.8 * y, x - 0.6])[None].clamp(-1, 1)


@pytest.mark.gate
def test_fast_and_two_pass_beat_blend_and_color_fix_mends_the_fast_encoder(tiny):
    x = scene(200, 264)
    truth = encoded(tiny, x)[:, :4]
    picture = decoded(tiny, truth)

    def errors(mode, **options):
        with tiled_vae(tiny, mode, encoder_tile_size=96, decoder_tile_size=12, **options):
            return rms(encoded(tiny, x)[:, :4], truth), rms(decoded(tiny, truth), picture)

    exact, fast, two_pass, blend = (errors(mode) for mode in ("exact", "fast", "two_pass", "blend"))
    assert max(exact) < 1e-5 < 1e-3 < min(fast)
    assert two_pass[0] < blend[0] and two_pass[1] < blend[1] and fast[1] < blend[1]
    assert errors("fast", color_fix=True)[0] < 0.5 * fast[0]


def test_fast_goes_back_to_exact_where_its_estimate_is_not_finite(vae, monkeypatch):
    z, estimate = uneven(1, 4, 9, 14), tiled_vae_module._estimate

    def broken(*arguments):
        network = estimate(*arguments)
        next(iter(network.measured.values())).mean[0, 0] = torch.nan
        return network

    with tiled_vae(vae, decoder_tile_size=5):
        exact = decoded(vae, z)
    with tiled_vae(vae, "fast", decoder_tile_size=5):
        assert difference(decoded(vae, z), exact) > 1e-3
        monkeypatch.setattr(tiled_vae_module, "_estimate", broken)
        assert torch.equal(decoded(vae, z), exact)


def test_the_estimate_sees_an_image_of_the_same_means_deviations_and_range(vae):
    z, seen = uneven(2, 4, 40, 60), []
    z[..., 1::3] += 3  # the columns that a third of the width samples
    network = TiledNetwork(decoder_steps(vae), 20, TileStore("none", CPU))
    hook = vae.post_quant_conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tiled_vae_module._estimate(network, z, 2)
    hook.remove()
    (small,) = seen
    assert small.shape[2:] == (13, 20)
    assert (small.amax((2, 3)) <= z.amax((2, 3))).all() and (small.amin((2, 3)) >= z.amin((2, 3))).all()
    torch.testing.assert_close(small.mean((2, 3)), z.mean((2, 3)), rtol=0, atol=0.1)
    torch.testing.assert_close(small.std((2, 3)), z.std((2, 3)), rtol=0.05, atol=0)


def test_tiles_smaller_than_a_latent_cell_are_as_large_as_one(vae):
    x, z = uneven(1, 3, 6, 10), uneven(1, 4, 3, 5)
    want = encoded(vae, x), decoded(vae, z)
    with tiled_vae(vae, encoder_tile_size=1, decoder_tile_size=1, stats_dtype=torch.float64):
        assert difference(encoded(vae, x), want[0]) < 1e-11 and difference(decoded(vae, z), want[1]) < 1e-11


@pytest.mark.parametrize("height, width", [(1, 40), (40, 1)])
def test_every_mode_serves_the_narrowest_image(vae, height, width):
    z, x = uneven(1, 4, height, width), uneven(1, 3, 2 * height, 2 * width)
    for mode in ("exact", "fast", "two_pass", "classic"):
        with tiled_vae(vae, mode, encoder_tile_size=16, decoder_tile_size=8):
            assert decoded(vae, z).shape == (1, 3, 2 * height, 2 * width)
            assert encoded(vae, x).shape == (1, 8, height, width)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_classic_with_endless_pads_is_the_whole_image_with_the_estimated_statistics(vae, side, monkeypatch):
    monkeypatch.setattr(tiled_vae_module, "PADS", {"encoder": 998, "decoder": 999})
    x = uneven(1, 3, 46, 34) if side == "encoder" else uneven(1, 4, 23, 17)
    steps = encoder_steps(vae) if side == "encoder" else decoder_steps(vae)
    network = TiledNetwork(steps, 10, TileStore("none", CPU))
    known = tiled_vae_module._estimate(network, x, 2).measured
    want = TiledNetwork(steps, 99, TileStore("none", CPU))(x, known)
    with tiled_vae(vae, "classic", encoder_tile_size=10, decoder_tile_size=10):
        got = encoded(vae, x) if side == "encoder" else decoded(vae, x)
    assert difference(got, want) < 1e-11


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_pads_of_classic_are_32_px_and_11_latents(tiny, side):
    """A tile sees what lies within its pad, and nothing beyond it."""
    steps, one, pad = (encoder_steps(tiny), 8, 32) if side == "encoder" else (decoder_steps(tiny), 1, 11)
    x = uneven(1, 3 if one == 8 else 4, 8 * one, 42 * one, dtype=torch.float32)
    network = TiledNetwork(steps, 14 * one, TileStore("none", CPU))
    network(x)

    def first_tile(x):
        return tiled_vae_module._classic(network, x, known, side, 8)[..., : 14 * 8 // one]

    known = dict(network.measured)
    for changed, seen in ((14 * one + pad, False), (14 * one + pad - 1, True)):
        other = x.clone()
        other[..., changed:] += 1
        assert torch.equal(first_tile(x), first_tile(other)) != seen


def test_blend_is_diffusers_own_tiling(tiny):
    x, z = uneven(1, 3, 72, 120, dtype=torch.float32), uneven(1, 4, 9, 15, dtype=torch.float32)
    own = copy.deepcopy(tiny)
    own.enable_tiling()
    own.tile_sample_min_size, own.tile_latent_min_size = 64, 8
    with tiled_vae(tiny, "blend", encoder_tile_size=64, decoder_tile_size=8):
        assert torch.equal(encoded(tiny, x), encoded(own, x)) and torch.equal(decoded(tiny, z), decoded(own, z))
    assert not tiny.use_tiling and tiny.tile_latent_min_size == 32


def test_slicing_still_works_and_the_vaes_own_modules_are_called(vae):
    z, calls = uneven(3, 4, 9, 14), []
    want = decoded(vae, z)
    hook = vae.decoder.conv_out.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    with tiled_vae(vae, decoder_tile_size=7, stats_dtype=torch.float64):
        vae.enable_slicing()
        assert difference(decoded(vae, z), want) < 1e-11
        vae.disable_slicing()
    hook.remove()
    assert calls == [1] * 3 * 2 * 2


def state(vae):
    plain = {k: v for k, v in vae.__dict__.items() if not k.startswith("_") or k in tiled_vae_module.REPLACED}
    return plain, {k: (v.data_ptr(), v.clone()) for k, v in vae.state_dict().items()}


def same(a, b):
    (plain, tensors), (plain_, tensors_) = a, b
    alike = all(tensors[k][0] == tensors_[k][0] and torch.equal(tensors[k][1], tensors_[k][1]) for k in tensors)
    return plain == plain_ and tensors.keys() == tensors_.keys() and alike


def test_blocks_nest_and_restore_also_after_exceptions_and_touch_no_random_state(vae):
    z, before, random = uneven(1, 4, 9, 14), state(vae), torch.get_rng_state()
    plain = decoded(vae, z)
    with pytest.raises(RuntimeError, match="on purpose"), tiled_vae(vae, decoder_tile_size=5) as same_vae:
        exact, inside = decoded(vae, z), state(vae)
        assert same_vae is vae and not same(inside, before)
        with pytest.raises(KeyError), tiled_vae(vae, "fast", decoder_tile_size=5):
            assert not torch.equal(decoded(vae, z), exact)
            raise KeyError("inner")
        assert same(state(vae), inside) and torch.equal(decoded(vae, z), exact)
        raise RuntimeError("on purpose")
    assert same(state(vae), before) and torch.equal(decoded(vae, z), plain)
    enable_tiled_vae(vae, decoder_tile_size=5)
    assert torch.equal(decoded(vae, z), exact)
    with tiled_vae(vae, "blend", decoder_tile_size=8):
        pass
    assert torch.equal(decoded(vae, z), exact)
    for _ in range(2):
        disable_tiled_vae(vae)
        assert same(state(vae), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_copy_of_a_tiled_vae_is_tiled_itself_and_apart(vae):
    z = uneven(1, 4, 9, 14)
    with tiled_vae(vae, decoder_tile_size=5):
        exact, other = decoded(vae, z), copy.deepcopy(vae)
    assert torch.equal(decoded(other, z), exact)
    other.decoder.conv_out.bias.data += 1
    assert difference(decoded(other, z), exact + 1) < 1e-12


def open_files(folder):
    """Those of this process that lie in a folder, without a name too."""
    files = Path("/proc/self/fd")
    return [name for name in os.listdir(files) if _target(files / name).startswith(str(folder))]


def _target(link):
    try:
        return os.readlink(link)
    except OSError:  # the listing's own
        return ""


@pytest.mark.parametrize("reserving", ["by the system", "by zeros"])
def test_a_full_disk_is_one_line_and_leaves_the_vae_usable(vae, tmp_path, monkeypatch, reserving):
    """The limit on a file's size lets the small maps pass and stops the first large one."""
    if reserving == "by zeros":
        monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    z, before = uneven(1, 4, 24, 24), state(vae)
    with tiled_vae(vae, decoder_tile_size=9):
        want = decoded(vae, z)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tiled_vae(vae, decoder_tile_size=9, offload="disk"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 24 * 24 * 32 * 8, hard))
        try:
            with pytest.raises(BadInput, match=r"offload='disk' needs .* GiB more in .*TMPDIR") as caught:
                decoded(vae, z)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        del caught
        gc.collect()
        assert not list(tmp_path.iterdir()) and not open_files(tmp_path)
        assert torch.equal(decoded(vae, z), want)
    assert same(state(vae), before)


def test_an_interrupt_leaves_the_vae_usable_and_no_file_open(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    z, before, plain, calls = uneven(1, 4, 9, 14), state(vae), decoded(vae, uneven(1, 4, 9, 14)), []

    def interrupt(module, args):
        calls.append(len(open_files(tmp_path)))
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = vae.decoder.up_blocks[1].resnets[1].conv2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt) as caught, tiled_vae(vae, decoder_tile_size=5, offload="disk"):
        decoded(vae, z)
    hook.remove()
    del caught
    gc.collect()
    assert calls[-1] > 1 and not open_files(tmp_path) and not list(tmp_path.iterdir())
    assert same(state(vae), before) and torch.equal(decoded(vae, z), plain)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_a_map_on_disk_leaves_resident_memory_when_settled_and_keeps_its_content():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    store, n = TileStore("disk", CPU), 64 * 2**20
    before, cells = resident(), store.empty((1, 4096, 4096, 1), torch.float32)
    cells.copy_(torch.arange(4096, dtype=torch.float32)[:, None])
    assert resident() - before > 0.9 * n
    store.settle()
    assert resident() - before < 0.1 * n
    assert cells[0, 4000, 77, 0] == 77 or torch.equal(cells[0, 4000, :, 0], torch.full((4096,), 4000.0))


@pytest.mark.gate
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_offload_to_disk_keeps_no_more_than_a_few_tiles_of_the_maps_resident():
    def mapped():
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssFile", "RssShmem")))

    vae, levels = a_vae((8, 8), groups=2, mid_block_add_attention=False), []
    one_map = 1024 * 1024 * 8 * 4
    hook = vae.decoder.conv_out.register_forward_pre_hook(lambda module, args: levels.append(mapped()))
    with tiled_vae(vae, decoder_tile_size=64, offload="disk"):
        decoded(vae, torch.zeros(1, 4, 128, 128))  # the code that is loaded at first use is mapped as well
        levels.clear()
        before = mapped()
        decoded(vae, torch.randn(1, 4, 512, 512, generator=torch.Generator().manual_seed(0)))
    hook.remove()
    assert len(levels) == 64 and max(levels) - before < one_map / 4


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("mode", ["exact", "blend"])
def test_what_overflows_in_half_precision_is_computed_again_in_float32(mode, offload):
    vae = a_vae()
    vae.decoder.up_blocks[0].resnets[0].conv1.weight.data *= 1e5
    want = decoded(vae, uneven(1, 4, 9, 14, dtype=torch.float32))
    half = vae.half()
    z, before = uneven(1, 4, 9, 14, dtype=torch.float16), state(half)
    assert not decoded(half, z).isfinite().all()
    ends = []
    watch = half.decoder.conv_out.register_forward_pre_hook(lambda module, args: ends.append(args[0].dtype))
    with tiled_vae(half, mode, decoder_tile_size=8, offload=offload):
        with pytest.warns(UserWarning, match="decoder overflows in torch.float16"):
            got = decoded(half, z)
        watch.remove()
        assert mode == "blend" or set(ends) == {torch.float32}  # the first attempt ended early
        hook = half.decoder.conv_out.register_forward_pre_hook(
            lambda module, args: 1 / 0 if args[0].dtype == torch.float32 else None
        )
        with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning):
            decoded(half, z)
        hook.remove()
    assert same(state(half), before) and got.dtype == torch.float16
    if mode == "exact":
        assert rms(got.float(), want) < 0.02 * want.std()


def test_half_precision_that_fits_is_half_precision_and_near_float32():
    vae = a_vae()
    z = uneven(1, 4, 9, 14, dtype=torch.float32)
    want = decoded(vae, z)
    half = vae.bfloat16()
    with tiled_vae(half, decoder_tile_size=5):
        got = decoded(half, z.bfloat16())
    error = rms(got.float(), want)
    assert got.dtype == torch.bfloat16 and error < 1.5 * rms(decoded(half, z.bfloat16()).float(), want)


def test_the_progress_ends_at_its_total(vae, monkeypatch):
    shown = []

    @contextmanager
    def work(what, total, announced):
        shown.append(Work(what, total))
        yield shown[-1]

    monkeypatch.setattr(progress, "work", work)
    for mode in ("exact", "fast", "two_pass", "classic"):
        with tiled_vae(vae, mode, decoder_tile_size=5):
            decoded(vae, uneven(1, 4, 9, 14))
    assert len(shown) > 4 and all(piece.done == piece.total > 2 for piece in shown)


def test_progress_is_told_after_each_tile_and_ends_at_its_total(vae):
    told = []
    network = TiledNetwork(decoder_steps(vae), 5, TileStore("none", CPU), progress=lambda *of: told.append(of))
    network(uneven(1, 4, 9, 14))
    total = told[0][1]
    assert told == [(n, total) for n in range(1, total + 1)] and total > 20


def test_default_tile_sizes_follow_the_free_memory(monkeypatch):
    tiling, gpu = VAETiling(), torch.device("cuda")
    assert [tiling.tile_size(side, CPU) for side in ("encoder", "decoder")] == [512, 64]
    for free, sizes in ((80, [3072, 256]), (20, [3072, 192]), (13, [2048, 128]), (9, [1536, 96]), (3, [960, 64])):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * 2**30, 99 * 2**30))
        assert [tiling.tile_size(side, gpu) for side in ("encoder", "decoder")] == sizes
    assert VAETiling(decoder_tile_size=40).tile_size("decoder", gpu) == 40


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(mode="exacty"), "mode='exacty' is none of exact, fast"),
        (dict(offload="ram"), "offload='ram' is none of none, cpu, disk"),
        (dict(padding_mode="mirror"), "padding_mode='mirror'"),
        (dict(decoder_tile_size=0), "decoder_tile_size=0 is no positive"),
        (dict(encoder_tile_size=-8), "encoder_tile_size=-8"),
        (dict(decoder_tile_size=6.5), "decoder_tile_size=6.5"),
        (dict(decoder_tile_size=True), "decoder_tile_size=True"),
        (dict(mode="blend", decoder_tile_size=10), "multiple of 4"),
        (dict(mode="blend", encoder_tile_size=100), "multiple of 32"),
        (dict(stats_dtype=torch.float16), "stats_dtype=torch.float16"),
        (dict(color_fix=True), "color_fix=True"),
        (dict(mode="blend", padding_mode="circular"), "padding_mode='circular'"),
        (dict(mode="classic", padding_mode="circular"), "padding_mode='circular'"),
    ],
)
def test_bad_options_are_one_clear_line_and_change_nothing(vae, options, said):
    before = state(vae)
    with pytest.raises(BadInput) as caught, tiled_vae(vae, **options):
        pass
    assert said in str(caught.value) and "\n" not in str(caught.value) and same(state(vae), before)


def test_another_kind_of_vae_and_gradients_are_refused(vae):
    with pytest.raises(BadInput, match="Linear is no AutoencoderKL"), tiled_vae(torch.nn.Linear(1, 1)):
        pass
    other = copy.deepcopy(vae)
    other.decoder.mid_block = torch.nn.Identity()
    with pytest.raises(BadInput, match="Identity"), tiled_vae(other):
        pass
    with tiled_vae(other, "blend"):
        pass
    z = uneven(1, 4, 9, 8).requires_grad_()
    with tiled_vae(vae, decoder_tile_size=5):
        with pytest.raises(BadInput, match="no gradients"):
            vae.decode(z)
        with torch.no_grad():
            assert not decoded(vae, z).requires_grad


QUARTER_OF_SD15 = dict(channels=(32, 64, 128, 128), layers=2, groups=8)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tiny_sd", "a quarter of SD 1.5"])
@pytest.mark.parametrize("height, width, tile", [(520, 776, 24), (1000, 1016, 64), (64, 2048, 32)])
def test_exact_at_the_sizes_of_real_images(tiny, which, height, width, tile):
    vae = tiny if which == "tiny_sd" else a_vae(**QUARTER_OF_SD15)
    x = F.interpolate(scene(height // 4, width // 4), size=(height, width), mode="bicubic").clamp(-1, 1)
    x = torch.cat([x, x.flip(-1) * 0.5])
    untiled = [encoded(vae, one) for one in x.split(1)]
    z = torch.cat(untiled)[:, :4]
    z = z / z.std() * (1 if which != "tiny_sd" else z.std())
    picture = torch.cat([decoded(vae, one) for one in z.split(1)])
    with tiled_vae(vae, encoder_tile_size=8 * tile, decoder_tile_size=tile):
        assert difference(encoded(vae, x), torch.cat(untiled)) < 1e-4
        assert difference(decoded(vae, z), picture) < 1e-4


@pytest.mark.slow
def test_exact_at_the_width_of_sd15():
    vae = a_vae((128, 256, 512, 512), layers=2, groups=32)
    x = scene(264, 392)
    moments = encoded(vae, x)
    z = moments[:, :4] / moments[:, :4].std()
    picture = decoded(vae, z)
    with tiled_vae(vae, encoder_tile_size=192, decoder_tile_size=24):
        assert difference(encoded(vae, x), moments) < 1e-4
        assert difference(decoded(vae, z), picture) < 1e-4
