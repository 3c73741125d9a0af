"""What the tests share: one thread, the shipped pipeline, small models, and what makes a hundred small runs cheap."""

from __future__ import annotations

import gc
import shutil

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from examples.tiny_sd.train import MAX_TOKENS
from sd_hyena.distil import counted as counted_operations
from sd_hyena.distil import estimate, previews, sources, training
from sd_hyena.distil.lessons import Lessons
from sd_hyena.generate import engine
from sd_hyena.models import pipeline
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.models.upscaler import load_upscaler
from sd_hyena.options.shipped import SHIPPED_MODEL
from tests import upscalers
from tests.copied import Copied
from tests.fetched import NotToBeHad

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def short_previews():
    """One picture of one step in place of four of many: they are drawn at every validation of some hundred small runs."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (previews, estimate):
            patch.setattr(module, "drawn_with", lambda _model: (1, 5.0))
        for module in (previews, training, estimate):
            patch.setattr(module, "PICTURES", 1)
        yield


DRAWS_PREVIEWS = previews.draws_previews


@pytest.fixture(scope="session", autouse=True)
def no_previews():
    """Nor are they drawn where nobody looks: they take half of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(previews, "draws_previews", lambda *_: False)
        yield


@pytest.fixture
def previews_drawn(monkeypatch):
    """They are drawn in this test."""
    monkeypatch.setattr(previews, "draws_previews", DRAWS_PREVIEWS)


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays():
    """Else each drawing walks through all that the session keeps when it gives its memory back."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def small_validations():
    """A validation is of six states in place of sixteen, of each of which the teacher is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lessons.__init__, "__defaults__", (6,))
        yield


@pytest.fixture(scope="session")
def shared_pipe(read_once):
    return load_pipeline(SHIPPED_MODEL, torch.device("cpu"), torch.float32)


@pytest.fixture
def pipe(shared_pipe):
    """The shipped pipeline, and proof that the test put it back as it was."""
    before = {name: id(module) for name, module in shared_pipe.unet.named_modules()}
    yield shared_pipe
    assert {name: id(module) for name, module in shared_pipe.unet.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in shared_pipe.unet.modules())


@pytest.fixture(scope="session", autouse=True)
def small_samples():
    """What a teacher draws to learn from is of 128 px where its own size is 256: a quarter of the time."""
    draw = sources._draw_images

    def drawn(pipe, *rest):
        own = pipe.unet.config.sample_size
        pipe.unet.register_to_config(sample_size=min(own, 16))
        try:
            return draw(pipe, *rest)
        finally:
            pipe.unet.register_to_config(sample_size=own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_draw_images", drawn)
        yield


RATE = estimate.Estimator._rate
COUNTS = {
    name: getattr(counted_operations, name) for name in ("unet_flops", "student_flops", "vae_flops", "saved_bytes")
}


@pytest.fixture(scope="session", autouse=True)
def guessed_counts():
    """What a run's estimate multiplies is guessed, and how fast the machine is: to find out takes seconds, and is tested elsewhere."""
    guess = lambda size: 10**7 * size[0] * size[1] + 1000 * (size[0] * size[1]) ** 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counted_operations, "unet_flops", lambda _unet, size, _last="": guess(size))
        patch.setattr(counted_operations, "vae_flops", lambda _vae, size: (guess(size), guess(size)))
        patch.setattr(counted_operations, "student_flops", lambda _spec, size: 10**5 * size[0] * size[1])
        patch.setattr(counted_operations, "saved_bytes", lambda _spec, size, _dtype: 1000 * size[0] * size[1])
        patch.setattr(estimate.Estimator, "_rate", lambda *_: 10**10)
        yield


@pytest.fixture
def counted(monkeypatch):
    """A run's estimate as it truly is."""
    monkeypatch.setattr(counted_operations, "_counted", {})
    monkeypatch.setattr(estimate.Estimator, "_rate", RATE)
    for name, count in COUNTS.items():
        monkeypatch.setattr(counted_operations, name, count)


@pytest.fixture(scope="session", autouse=True)
def read_once():
    """The shipped model's files are read once; each time that it is loaded after that is a copy."""
    load, kept = pipeline._load_folder, {}

    def loaded(path, dtype, vae):
        if path.resolve() != SHIPPED_MODEL.resolve() or vae:
            return load(path, dtype, vae)
        if dtype not in kept:
            kept[dtype] = Copied(load(path, dtype, vae))
        return kept[dtype].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_load_folder", loaded)
        yield


@pytest.fixture
def own_pipe(read_once):
    """A copy, for what diffusers or peft do not undo completely."""
    return load_pipeline(SHIPPED_MODEL, torch.device("cpu"), torch.float32)


@pytest.fixture
def loaded_once(monkeypatch, request):
    """Every generate() of the test draws with the same fresh copy, made when it is asked for; loading is tested elsewhere."""
    monkeypatch.setattr(engine, "load_pipeline", lambda *_: request.getfixturevalue("own_pipe"))


@pytest.fixture(scope="session")
def spandrel():
    """The package that knows upscaler models."""
    try:
        return upscalers.spandrel()
    except NotToBeHad as error:
        pytest.skip(f"no spandrel to test with: {error}")


@pytest.fixture(scope="session")
def dat(spandrel):
    """A real upscaler model, twice as large."""
    try:
        path = upscalers.real_dat()
    except NotToBeHad as error:
        pytest.skip(f"no real upscaler model to test with: {error}")
    return load_upscaler(path, torch.device("cpu"), torch.float32)


@pytest.fixture
def unet(pipe):
    return pipe.unet


@pytest.fixture
def states():
    """Noisy latents with H != W, timesteps and condition for the shipped UNet, two samples."""
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 10, 14, generator=source)
    return latents, torch.tensor([700, 40]), {"encoder_hidden_states": torch.randn(2, 32, 96, generator=source)}


@pytest.fixture(scope="session")
def sd15():
    """Stable Diffusion 1.5's UNet, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="session")
def sdxl():
    """SDXL's UNet, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.fixture(scope="session")
def tiny_sdxl(shared_pipe):
    """A small StableDiffusionXLPipeline of random weights, on the shipped tokenizer, VAE and scheduler."""
    tokenizer = shared_pipe.tokenizer

    def text_encoder(kind, width: int):
        shape = dict(hidden_size=width, intermediate_size=64, projection_dim=40, num_hidden_layers=2)
        shape |= dict(num_attention_heads=2, vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS)
        tokens = dict(pad_token_id=0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        return kind(CLIPTextConfig(**shape, **tokens)).eval()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2],
            attention_head_dim=[1, 2],
            cross_attention_dim=32 + 48,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
            norm_num_groups=16,
        )
        pipe = StableDiffusionXLPipeline(
            vae=shared_pipe.vae,
            text_encoder=text_encoder(CLIPTextModel, 32),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, 48),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet.eval(),
            scheduler=shared_pipe.scheduler,
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The bank that all these runs share."""
    from sd_hyena.distil.training import train
    from tests.distil.test_training import config

    folder = tmp_path_factory.mktemp("drawn")
    train(config(folder, n_steps=1))
    return folder / "out" / "cache"


@pytest.fixture
def folder(tmp_path, drawn):
    shutil.copytree(drawn, tmp_path / "out" / "cache")
    return tmp_path


def controlnet_of(unet, seed: int) -> ControlNetModel:
    """A ControlNet for this UNet whose hint matters: what is zero in a new one is random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16, 16, 16)).eval()
        zero = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
        for layer in (*zero, controlnet.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(layer.weight, std=0.2)
    return controlnet


def image_of(pipe, seed: int = 0, width: int = 64, height: int = 64, steps: int = 2) -> torch.Tensor:
    """A small latent image, deterministic."""
    with torch.no_grad():
        return pipe(
            "a red circle on blue",
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
