"""python -m benchmarks.studies.training_memory: peak memory of one training step above the loaded models.

Each case runs in a process of its own: teacher forward, student forward and backward, AdamW. Gate: the step lowers the
loss on its own batch. `attention` is the site's own softmax attention trained alike, for comparison.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from benchmarks.harness.peak import in_its_own_process
from benchmarks.harness.record import write
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.memory import peak_gib
from sd_hyena.sites import find_sites, select
from sd_hyena.students.losses import relative_mse
from sd_hyena.students.student import build_student, spec_for
from sd_hyena.students.teacher import Teacher

CASES = (("tiny_sd", 512, 4), ("tiny_sd", 512, 16), ("SD 1.5 layout", 512, 4))
STANDS_IN = ("attention", "causal", "bidirectional", "pointwise")


def measure(model: str, pixels: int, batch: int, operator: str, answer) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if model == "tiny_sd":
        unet, text = UNet2DConditionModel.from_pretrained(SHIPPED_MODEL / "unet").float(), (32, 96)
    else:  # only what IN01 needs is ever run, so the deep levels may be empty
        with torch.device("meta"):
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        for part in (unet.conv_in, unet.time_embedding, unet.down_blocks[0]):
            part.to_empty(device="cpu")
            for p in part.parameters():
                torch.nn.init.normal_(p, std=0.02)
        text = (77, 768)
    sites = select(find_sites(unet), "IN01")
    latent = (pixels // 8, pixels // 8)
    if operator == "attention":
        import copy

        trained = copy.deepcopy(unet.get_submodule(sites[0].name)).requires_grad_(True)
        call = lambda a: trained(a.input)
    else:
        options = TrainConfig(operator=operator).options_of_operator()
        trained = build_student(spec_for(sites[0], operator, options, latent))
        call = lambda a: trained(a.input, a.projections, a.size)
    teacher = Teacher(unet, sites)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-5)  # small, so that one step must lower the loss
    loaded = peak_gib(torch.device("cpu"))
    activation = teacher.activations(
        torch.randn(batch, 4, *latent), torch.full((batch,), 500), {"encoder_hidden_states": torch.randn(batch, *text)}
    )
    activation = activation[sites[0].name]
    if operator == "attention":  # something to learn: its own answer, shifted
        activation.target.add_(0.1)
    losses = []
    for _ in range(2):
        loss = relative_mse(call(activation), activation.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    answer.put((losses[1] < losses[0], peak_gib(torch.device("cpu")) - loaded))


def main() -> None:
    """Measure every case and operator."""
    rows = []
    for model, pixels, batch in CASES:
        for operator in STANDS_IN:
            learnt, gib = in_its_own_process(measure, model, pixels, batch, operator)
            tokens, peak = (pixels // 8) ** 2, round(gib, 2) if learnt else "failed its gate"
            rows.append(
                {
                    "model": model,
                    "pixels": pixels,
                    "tokens": tokens,
                    "batch": batch,
                    "trained": operator,
                    "peak_GiB": peak,
                }
            )
    write("training_memory", rows)


if __name__ == "__main__":
    main()
