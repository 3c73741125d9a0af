"""Which option was meant by a flag that is none: a slip of the finger, or another program's word for it."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

ELSEWHERE = {  # the words of A1111, ComfyUI, diffusers' and kohya's scripts -> ours, the first that the command has
    ("sampler", "sampler_name", "sampling_method", "sampling"): ("scheduler",),
    ("scheduler_type", "lr_scheduler"): ("schedule", "scheduler"),
    ("cfg", "guidance", "guidance_scale", "scale_guidance", "unconditional_guidance_scale"): ("cfg_scale", "guidance"),
    ("num_inference_steps", "sampling_steps", "ddim_steps", "inference_steps"): ("steps", "sample_steps"),
    ("max_train_steps", "max_steps", "train_steps", "training_steps", "iterations", "steps", "epochs"): ("n_steps", "steps"),
    ("ckpt", "checkpoint", "model", "model_path", "model_id", "base_model", "teacher", "unet",
     "pretrained_model_name_or_path", "pretrained_model"): ("model", "teacher_model"),
    ("negative", "neg", "neg_prompt", "uncond"): ("negative_prompt",),
    ("positive", "text", "caption"): ("prompt",),
    ("learning_rate", "rate"): ("lr",),
    ("w", "res_x"): ("width",),
    ("h", "res_y"): ("height",),
    ("resolution", "size", "image_size"): ("width", "sizes"),
    ("n", "n_samples", "num_images_per_prompt", "batch_count", "n_iter", "samples", "count"): ("num_images", "num_samples", "images"),
    ("train_batch_size", "bs"): ("batch_size",),
    ("gradient_accumulation_steps",): ("micro_batch_size",),
    ("mixed_precision",): ("precision", "dtype"),
    ("denoise", "denoising", "denoising_strength"): ("strength",),
    ("input_image", "image", "img", "init", "init_img", "input"): ("init_image", "data_path"),
    ("student", "students", "hyenas"): ("hyena", "students"),
    ("output", "output_dir", "out", "outdir", "outpath", "save_path"): ("out_dir",),
    ("logging_dir", "logdir"): ("log_dir",),
    ("loras", "lora_path", "lora_weights"): ("lora",),
    ("control", "control_net", "controlnet_model"): ("controlnet",),
    ("embedding", "textual_inversion"): ("embeddings",),
    ("use_karras_sigmas", "karras_sigmas"): ("karras",),
    ("site", "sites", "layers"): ("target",),
    ("train_data_dir", "dataset", "dataset_name", "instance_data_dir"): ("data_path",),
    ("resume_from_checkpoint", "resume_from"): ("resume",),
    ("half", "fp16", "bf16", "no_half", "precision"): ("dtype",),
    ("gpu", "cuda", "cpu"): ("device",),
    ("lowvram", "medvram", "enable_model_cpu_offload", "cpu_offload"): ("offload",),
    ("xformers", "opt_sdp_attention"): ("attention_backend",),
    ("tile_size",): ("tile_width", "decoder_tile_size"),
    ("tiled", "tiling"): ("tiled_diffusion",),
    ("sd_vae", "vae_path"): ("vae",),
}  # fmt: skip


def meant(flag: str, known: Collection[str]) -> str:
    """The name among `known` that comes nearest to what was typed, without dashes; empty if none is near."""
    word = flag.lstrip("-").partition("=")[0].replace("-", "_").lower()
    for words, ours in ELSEWHERE.items():
        if word in words and (name := next((name for name in ours if name in known), "")):
            return name
    near = get_close_matches(word, known, n=1, cutoff=0.7)
    part = [name for name in known if len(word) > 2 and name.startswith(word)]
    return (near or part or [""])[0]


def unrecognized(flags: list[str], known: Collection[str]) -> str:
    """One line of what is no option: flags as typed, or keys of a file."""
    said = []
    for flag in flags:
        name = meant(flag, known)
        name = f"--{name}" if name and flag.startswith("-") else name
        said.append(f"unrecognized {flag}" + (f": did you mean {name}?" if name else ""))
    return "; ".join(said) + ("" if any("?" in line for line in said) else "; see --help_all")
