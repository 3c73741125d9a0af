"""A Stable Diffusion pipeline from a folder or file, offline; its sampler, prompts, hash; pictures into latents."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import check_weights, sha256
from sd_hyena.large.tiled_vae import tiled_vae
from sd_hyena.models.inpainting import complete_inputs, is_inpainting
from sd_hyena.models.single_file import check_single_file, has_own_config, load_single_file
from sd_hyena.models.vae import load_vae
from sd_hyena.options import given_path
from sd_hyena.options.shipped import SHIPPED_MODEL

NATURAL_PROMPTS = Path(__file__).with_name("prompts.txt")
UNET_FILES = (  # which diffusers looks for, with the variant that it has to be told of
    (None, "diffusion_pytorch_model.safetensors"),
    (None, "diffusion_pytorch_model-*-of-*.safetensors"),
    (None, "diffusion_pytorch_model.bin"),
    (None, "diffusion_pytorch_model-*-of-*.bin"),
    ("fp16", "diffusion_pytorch_model.fp16.safetensors"),
    ("fp16", "diffusion_pytorch_model.fp16-*-of-*.safetensors"),
    ("fp16", "diffusion_pytorch_model-*-of-*.fp16.safetensors"),
    ("fp16", "diffusion_pytorch_model.fp16.bin"),
)
ALIGNMENT = 64  # bytes, of PyTorch's own memory
TILED_VAE_FROM = 1024  # pixels a side from which the VAE works in tiles


def model_path(given: str) -> Path:
    """The folder or file of a model, checked without building it. Raises BadInput."""
    path = given_path.model(given or str(SHIPPED_MODEL))
    if path.is_file():
        check_single_file(path)
        return path
    for weights in (*path.glob("*/*.safetensors"), *path.glob("*/*.bin")):
        check_weights(weights)
    return path


def load_pipeline(path: Path, device: torch.device, dtype: torch.dtype, vae: str = "") -> Any:
    """A diffusers pipeline without safety checker or progress bar, from local files alone, with another VAE if given.

    Raises BadInput.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    pipe = load_single_file(path, dtype, vae) if path.is_file() else _load_folder(path, dtype, vae)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(device)
    _align(pipe)
    if is_inpainting(pipe.unet):
        complete_inputs(pipe)
    if path.is_file() and not has_own_config(path):
        _tell_prediction(pipe)
    return pipe


@torch.no_grad()
def _align(pipe: Any) -> None:
    """Move weights that lie as they do in a file, mapped into memory: on a CPU sums depend on it in the last bit."""
    for part in pipe.components.values():
        for weight in part.parameters() if isinstance(part, nn.Module) else ():
            if weight.data_ptr() % ALIGNMENT:
                weight.data = weight.data.clone()


def _load_folder(path: Path, dtype: torch.dtype, vae: str) -> Any:
    import diffusers

    kind = given_path.PIPELINES[given_path.class_name(path / "model_index.json")]
    given = dict(safety_checker=None, requires_safety_checker=False) if kind == "StableDiffusionPipeline" else {}
    if vae:
        given["vae"] = load_vae(vae, path / "vae", dtype)
    variant, _ = _unet_files(path)
    kind = getattr(diffusers, kind)
    try:
        return kind.from_pretrained(path, dtype=dtype, variant=variant, local_files_only=True, **given)
    except (OSError, ValueError) as error:
        raise BadInput(f"model {str(path)!r} is no whole pipeline ({' '.join(str(error).split())[:200]})") from None


def _unet_files(path: Path) -> tuple[str | None, list[Path]]:
    """The files of a folder's UNet, and the variant that they are. Raises BadInput."""
    for variant, pattern in UNET_FILES:
        if files := sorted((path / "unet").glob(pattern)):
            return variant, files
    raise BadInput(f"model {str(path)!r} has no weights in unet/")


def text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """The pipeline's tokenizers and text encoders: one pair, two in SDXL."""
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    return [*pairs, (pipe.tokenizer_2, pipe.text_encoder_2)] if hasattr(pipe, "text_encoder_2") else pairs


def model_sha256(path: Path) -> str:
    """The hash of a single file, or of a folder's UNet, as diffusers loads it: what a student depends on."""
    if path.is_file():
        return sha256(path)
    hashes = [sha256(file) for file in _unet_files(path)[1]]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def split_prompts(prompts: list[str]) -> tuple[list[str], list[str]]:
    """Those to train on, and the last quarter, for validation and evaluation; one prompt serves as both."""
    prompts = list(dict.fromkeys(prompts))
    n = max(1, len(prompts) - max(1, len(prompts) // 4))
    return prompts[:n], prompts[n:] or prompts


def prompts_of(path: Path, file: str = "") -> list[str]:
    """The prompts of `file`, else the model's own `prompts.txt`, else a list for natural images. Raises BadInput."""
    source = Path(file) if file else path / "prompts.txt"
    source = source if file or source.is_file() else NATURAL_PROMPTS
    try:
        prompts = [line.strip() for line in source.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts={str(source)!r} cannot be read as UTF-8 text: {error}") from None
    if not prompts:
        raise BadInput(f"prompts={str(source)!r} holds no prompt; write one a line")
    return prompts


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises BadInput for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0][:120]}); try auto or cpu"
        ) from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is half precision on a GPU and float32 elsewhere."""
    return getattr(torch, name if name != "auto" else "float16" if device.type == "cuda" else "float32")


@torch.no_grad()
def condition(pipe: Any, prompt: str, width: int, height: int) -> dict[str, Tensor]:
    """What the UNet is told of a prompt for an image of this size, each of one row; SDXL is told sizes and crop too."""
    given = dict(prompt=prompt, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    text, _, *pooled = pipe.encode_prompt(**given)
    if not pooled:
        return {"encoder_hidden_states": text}
    pooled = pooled[0]
    if not prompt and pipe.config.force_zeros_for_empty_prompt:
        text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=text.dtype, device=text.device)
    return {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": sizes}


@torch.no_grad()
def predicts_velocity(pipe: Any) -> bool:
    """Whether the UNet answers pure noise with something else than that noise.

    At the last timestep a model of epsilon gives its input back; a velocity is nearly the picture there, its sign
    turned. A single file does not say which it is.
    """
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(pipe.device, pipe.unet.dtype)
    told = condition(pipe, "", 8 * 32, 8 * 32)
    text = told.pop("encoder_hidden_states")
    last = torch.tensor([pipe.scheduler.config.num_train_timesteps - 1], device=pipe.device)
    prediction = pipe.unet(noise, last, text, added_cond_kwargs=told).sample
    return bool(F.cosine_similarity(prediction.float().flatten(), noise.float().flatten(), dim=0) < 0.5)


def _tell_prediction(pipe: Any) -> None:
    velocity = predicts_velocity(pipe)
    pipe.scheduler.register_to_config(prediction_type="v_prediction" if velocity else "epsilon")
    if pipe.unet.config.cross_attention_dim == 1024 and not velocity:  # Stable Diffusion 2's base, of 512 px
        pipe.unet.register_to_config(sample_size=64)


def noiser(pipe: Any) -> Any:
    """A scheduler that adds noise as the model was trained with, whatever samples."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config)


def as_noise(scheduler: Any, prediction: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
    """The noise that a prediction (B, h w, C) foresees in latents (1, C, h, w) at a timestep (1,)."""
    if scheduler.config.prediction_type != "v_prediction":
        return prediction
    alpha = scheduler.alphas_cumprod[timestep.cpu()].to(prediction)
    return alpha.sqrt() * prediction + (1 - alpha).sqrt() * latents.to(prediction).flatten(2).mT


def vae_for(pipe: Any, side: int) -> AbstractContextManager:
    """Within the block the VAE works in tiles, exactly, if the longer side, in pixels, asks for it."""
    return tiled_vae(pipe.vae) if side > TILED_VAE_FROM else nullcontext()


@torch.no_grad()
def resized(pipe: Any, latents: Tensor, width: int, height: int) -> Tensor:
    """Latents (1, 4, h, w) of the same picture at another size in pixels."""
    if latents.shape[-2:] == (height // 8, width // 8):
        return latents
    with vae_for(pipe, 8 * max(latents.shape[-2:])):
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    image = F.interpolate(image.float(), (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    return encoded(pipe, image)


@torch.no_grad()
def encoded(pipe: Any, image: Tensor) -> Tensor:
    """Scaled latents of an image (1, 3, H, W) in -1 ... 1."""
    with vae_for(pipe, max(image.shape[-2:])):
        latents = pipe.vae.encode(image.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mean
    return latents * pipe.vae.config.scaling_factor
