"""The straight line from a TrainConfig to trained students on disk."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader

from sd_hyena import ranks
from sd_hyena.checkpoint import load_students
from sd_hyena.command import Interrupted, Terminated
from sd_hyena.config import TrainConfig
from sd_hyena.cost import attention_flops, student_flops, unet_flops
from sd_hyena.crossover import speedup
from sd_hyena.data import Lessons, make_bank
from sd_hyena.distill import Distillation
from sd_hyena.errors import BadInput
from sd_hyena.file_names import writable_folder
from sd_hyena.memory import is_out_of_memory, peak_gib, release
from sd_hyena.options import check_paths
from sd_hyena.pipeline import (
    load_pipeline,
    model_path,
    model_sha256,
    noiser,
    pick_device,
    pick_dtype,
    prompts_of,
)
from sd_hyena.previews import Previews
from sd_hyena.ranks import say
from sd_hyena.rules import drawn_seed
from sd_hyena.run_folder import (
    AtomicCheckpointIO,
    Checkpoints,
    Stopped,
    check_resumable,
    find_resumable,
    new_run_folder,
    set_aside_later,
    write_config,
)
from sd_hyena.sampler import set_scheduler
from sd_hyena.selection import Candidate, choose, table, useful
from sd_hyena.sites import find_sites, select
from sd_hyena.stages import EndToEnd, Joint, Layerwise, Stage
from sd_hyena.student import build_student, cast, spec_for
from sd_hyena.teacher import Teacher
from sd_hyena.timing import block_seconds, wait_for
from sd_hyena.vae_file import check_vae

T = TypeVar("T")
PILOT_STEPS = 50


@dataclass
class Outcome:
    """What a run left: its folder, the exported file, its last validation, and block times in seconds."""

    folder: Path
    exported: Path | None
    metrics: dict[str, float]
    block_seconds: dict[str, tuple[float, float]]  # site -> attention, student


def train(config: TrainConfig) -> Outcome:
    """Run it: config -> teacher -> sites -> activations -> students -> .ckpt and .safetensors. Raises BadInput."""
    quiet_libraries()
    check_paths(config)
    if config.target == "auto":
        config = _with_chosen_sites(config)
    ranks.check_launched_by_us()
    path = model_path(config.teacher_model)
    if config.vae:
        check_vae(config.vae)
    if config.processes > 1:
        ranks.meet(config.num_nodes)
    if ranks.rank():
        config = dataclasses.replace(config, **ranks.told()["options"])
    writable_folder(config.out_dir)
    writable_folder(config.log_dir, "log_dir")
    resumed = find_resumable(config) if config.resume else None
    if config.resume and not resumed:
        say(f"nothing to resume in {config.out_dir}; starting anew")
    seed = config.seed
    if resumed:
        seed = resumed[1]["sd_hyena"]["config"]["seed"]
        if config.seed not in (-1, seed):
            raise BadInput(f"seed={config.seed} differs from the run's own, {seed}; leave --seed away to resume it")
    seed = drawn_seed(seed)
    config = dataclasses.replace(config, seed=seed)
    device = _own_device(config)
    prompts = prompts_of(path, config.prompts)

    pipe = load_pipeline(path, device, _teacher_dtype(config, device), config.vae)
    set_scheduler(pipe, "ddim")
    sites = select(find_sites(pipe.unet), config.target)
    teacher = Teacher(pipe.unet, sites)
    latent_size = (config.height // 8, config.width // 8)
    specs = [spec_for(site, config.operator, config.operator_options(), latent_size) for site in sites]
    L.seed_everything(seed, verbose=False)
    students = {spec.site: build_student(spec) for spec in specs}
    facts = {"teacher": path.name, "teacher_sha256": model_sha256(path), "sites": [site.name for site in sites]}
    if resumed:
        check_resumable(config, facts, resumed[1], resumed[0])
        if resumed[1]["global_step"] >= config.n_steps:
            say(f"nothing to do: {resumed[0]} has {resumed[1]['global_step']} of {config.n_steps} steps")
            folder = resumed[0].parent.parent
            exported = max(folder.glob("**/*.safetensors"), key=lambda file: file.stat().st_mtime_ns, default=None)
            return Outcome(folder, exported, {}, {})
    folder = _run_folder(config, resumed)
    if config.pretrained_weight:
        _start_from(config.pretrained_weight, students, pipe.unet)
    say(f"teacher {path.name}, sites {' '.join(s.short for s in sites)}, seed {seed}, run {folder}")

    bank = make_bank(
        pipe, config, prompts, facts["teacher_sha256"], Path(config.cache_dir or Path(config.out_dir) / "cache")
    )
    scheduler = noiser(pipe)
    stage = _stage(config, teacher, scheduler)
    data = Lessons(stage, scheduler, bank, config)
    previews = Previews(pipe, prompts[-1], config.width, config.height)
    checkpoints = Checkpoints(folder, config, facts)
    module = Distillation(
        students,
        stage,
        lr=config.lr,
        lr_projections=config.lr_projections,
        n_steps=config.n_steps,
        schedule=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
    )
    if ranks.rank() == 0:
        _with_smaller_batches(data, lambda: _print_estimate(module, data, config, device))
        print(f"watch it: tensorboard --logdir {config.log_dir}")
        if config.processes > 1:
            resume = str(resumed[0]) if resumed else ""
            options = {"seed": seed, "micro_batch_size": data.micro_batch_size, "resume": resume}
            ranks.tell(folder=str(folder), options=options)
    if config.dry_run:
        config = dataclasses.replace(config, n_steps=1)
    try:
        trainer = _fit(module, data, config, checkpoints, previews, resumed)
    except Stopped as step:
        if ranks.rank():
            raise SystemExit(0) from None
        print(f"saved at step {step}; go on with --resume {folder}")
        raise _signalled(checkpoints) from None
    if checkpoints.validated_step != trainer.global_step:
        trainer.validate(module, data, verbose=False)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    if ranks.rank():
        return Outcome(folder, None, metrics, {})
    checkpoints.export(trainer, module, module.state_dict())  # once more: now with the final metrics inside
    load_students(checkpoints.exported, pipe.unet)
    outcome = Outcome(folder, checkpoints.exported, metrics, block_times(teacher, module, data, device))
    _print_card(outcome, config)
    if checkpoints.signal is not None:  # it came too late to stop a step, but not to stop what follows this run
        raise _signalled(checkpoints)
    return outcome


def _signalled(checkpoints: Checkpoints) -> BaseException:
    return Terminated() if checkpoints.signal == signal.SIGTERM else Interrupted()


def _with_chosen_sites(config: TrainConfig) -> TrainConfig:
    """Run the pilot of `-t auto` and name the sites it chooses; they start from its students."""
    path = model_path(config.teacher_model)
    device = _own_device(config)
    unet = load_pipeline(path, torch.device("cpu"), torch.float32, config.vae).unet
    latent_size = (config.height // 8, config.width // 8)
    total, candidates = unet_flops(unet, latent_size), []
    for site in find_sites(unet):
        size = site.size(*latent_size)
        spec = spec_for(site, config.operator, config.operator_options(), latent_size)
        candidate = Candidate(site.short, attention_flops(site, size), student_flops(spec, size), error=math.inf)
        if candidate.saved > 0:
            attention = unet.get_submodule(site.name).to(device, _teacher_dtype(config, device))
            student = cast(build_student(spec), attention.to_q.weight).eval()
            faster = speedup(site, attention, student, size, batch=2)  # one image with guidance
            candidate = dataclasses.replace(candidate, speedup=faster)
        candidates.append(candidate)
    del unet
    budget = float(config.budget.rstrip("x") or 0)
    tried = useful(candidates, total, budget)
    steps = max(PILOT_STEPS, config.n_steps // 5)
    print(f"pilot: every site that a student makes cheaper, {steps} steps")
    own = dict(target=",".join(c.short for c in tried), stage="layerwise", max_error=0.0, budget="", n_steps=steps)
    pilot = train(dataclasses.replace(config, **own, save_every_n_steps=0, validate_every_n_steps=0))
    candidates = [
        dataclasses.replace(c, error=pilot.metrics.get(f"val/relative_mse/{c.short}", math.inf)) for c in candidates
    ]
    chosen = choose(candidates, total, config.max_error, budget)
    print(f"\n{table(candidates, chosen, total)}\n")
    names = ",".join(candidate.short for candidate in chosen)
    return dataclasses.replace(config, target=names, max_error=0.0, budget="", pretrained_weight=str(pilot.exported))


def _stage(config: TrainConfig, teacher: Teacher, scheduler: Any) -> Stage:
    if config.stage == "end_to_end":
        return EndToEnd(teacher, scheduler, config.feature_weight, config.guidance_weight)
    return Joint(teacher) if config.stage == "joint" else Layerwise(teacher)


def _own_device(config: TrainConfig) -> torch.device:
    """The device of this process. Raises BadInput if there are too few."""
    device = pick_device(config.device)
    if config.devices > 1 and device.type == "cuda":
        if config.devices > torch.cuda.device_count():
            raise BadInput(f"devices={config.devices}, but this machine has {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", ranks.local_rank())
    if config.processes > 1 and device.type not in ("cpu", "cuda"):
        raise BadInput(f"devices={config.devices} needs GPUs or --device cpu, not {device}")
    return device


def _precision(config: TrainConfig, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    if device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def _teacher_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Gradients pass through the teacher's dtype; in float16 they vanish unless the loss is scaled. Raises BadInput."""
    precision = _precision(config, device)
    if config.dtype == "auto" and precision == "bf16-mixed":
        return torch.bfloat16
    dtype = pick_dtype(config.dtype, device)
    if dtype == torch.float16 and precision != "16-mixed":
        raise BadInput(
            f"dtype=float16 with precision={precision}: gradients would vanish in float16; "
            f"use --dtype bfloat16 or float32, or --precision 16-mixed"
        )
    return dtype


def _run_folder(config: TrainConfig, resumed: tuple[Path, dict] | None) -> Path:
    """Rank 0 takes up or makes the run's folder; the others are told."""
    if ranks.rank():
        return Path(ranks.told()["folder"])
    if resumed:
        set_aside_later(resumed[0])
        folder = resumed[0].parent.parent
    else:
        folder = new_run_folder(config, datetime.now().strftime("%Y%m%d-%H%M%S"))
    write_config(folder, config)
    return folder


def _start_from(path: str, students: dict[str, torch.nn.Module], unet: torch.nn.Module) -> None:
    stored = load_students(path, unet).students
    for site, student in students.items():
        if site not in stored or stored[site].spec != student.spec:
            found = [s.spec for s in stored.values()]
            raise BadInput(f"pretrained_weight={path!r} holds {found}, but this run needs {student.spec}")
        student.load_state_dict(stored[site].state_dict())


def _fit(
    module, data, config: TrainConfig, checkpoints: Checkpoints, previews: Previews, resumed: tuple[Path, dict] | None
) -> L.Trainer:
    """Fit, with smaller micro-batches after an out-of-memory; the effective batch and the stream of samples stay."""
    resume, start = (resumed[0], resumed[1]["global_step"]) if resumed else (None, None)

    def fit() -> L.Trainer:
        nonlocal resume
        resume = checkpoints.out_of_memory or resume
        trainer = _trainer(config, data, checkpoints, previews, start)
        if resume is None:
            trainer.validate(module, data, verbose=False)
        trainer.fit(module, data, ckpt_path=resume)
        return trainer

    def may_repeat() -> bool:
        alone = config.processes == 1  # of several ranks one cannot go back by itself
        return alone and (checkpoints.step is None or checkpoints.out_of_memory is not None)

    return _with_smaller_batches(data, fit, may_repeat)


def _with_smaller_batches(data: Lessons, work: Callable[[], T], may_repeat=lambda: True) -> T:
    """Do the work; after an out-of-memory again with half the micro-batch, down to single samples."""
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not may_repeat() or not data.halve():
                raise
        print(f"out of memory: going on with {data.accumulate} micro-batches of {data.micro_batch_size}")
        release()


class Progress(TQDMProgressBar):
    """One bar, of training; steps that are not shown on a terminal are shown seldom."""

    def __init__(self):
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 50)

    def init_validation_tqdm(self):
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar

    def get_metrics(self, trainer, module) -> dict:
        return {name: value for name, value in super().get_metrics(trainer, module).items() if name != "v_num"}


def _trainer(
    config: TrainConfig, data: Lessons, checkpoints: Checkpoints, previews: Previews, start: int | None
) -> L.Trainer:
    run, device = checkpoints.folder.name, pick_device(config.device)
    averaging = [EMAWeightAveraging(decay=config.ema)] if config.ema else []
    return L.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=config.devices if device.index is None else [device.index],
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        use_distributed_sampler=False,  # every rank validates on the same few states
        precision=_precision(config, device),
        max_steps=config.n_steps,
        max_epochs=-1,
        accumulate_grad_batches=data.accumulate,
        gradient_clip_val=config.clip or None,
        val_check_interval=config.validate_every_n_steps * data.accumulate or 10**9,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=_loggers(config, run, start),
        callbacks=[previews, *averaging, checkpoints, Progress()],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=config.log_dir,
    )


def _loggers(config: TrainConfig, run: str, start: int | None) -> list[Logger]:
    """A CSV file, and TensorBoard unless it is missing."""
    csv = CSVLogger(config.log_dir, name=run, version=datetime.now().strftime("csv-%Y%m%d-%H%M%S-%f"))
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        say(
            f"note: TensorBoard is not installed; the curves are in {config.log_dir}/{run}/{csv.version}/metrics.csv only"
        )
        return [csv]
    step = None if start is None else start + 1
    return [TensorBoardLogger(config.log_dir, name="", version=run, purge_step=step), csv]


def _print_estimate(module: Distillation, data: Lessons, config: TrainConfig, device: torch.device) -> None:
    """Measure one micro-batch, forward and backward, and say what the run will take."""
    module.to(device)
    data.teacher.to(device)
    states = next(iter(DataLoader(data.stream(), batch_size=data.micro_batch_size)))
    started = time.perf_counter()
    batch = data.on_after_batch_transfer(data.transfer_batch_to_device(states, device, 0), 0)
    wait_for(device)
    taught = time.perf_counter() - started
    sum(module.stage.errors(module.by_site(), batch).values()).backward()
    wait_for(device)
    module.zero_grad(set_to_none=True)
    seconds = (time.perf_counter() - started) * data.accumulate * config.n_steps
    print(
        f"estimate: {seconds / 60:.1f} min for {config.n_steps} steps of batch {config.batch_size} at "
        f"{config.width}x{config.height} on {device.type} (teacher {taught * data.accumulate:.2f} s a step), "
        f"peak memory {peak_gib(device):.1f} GiB, {sum(p.numel() for p in module.parameters()):,} parameters"
    )


def block_times(
    teacher: Teacher, module: Distillation, data: Lessons, device, rounds: int = 5
) -> dict[str, tuple[float, float]]:
    """Median seconds of each site's attention and of its student at the training size, one image with guidance."""
    result = {}
    module.to(device)
    for site in teacher.sites:
        attention = teacher.unet.get_submodule(site.name)
        student = cast(copy.deepcopy(module.by_site()[site.name]), next(attention.parameters())).eval()
        result[site.short] = block_seconds(attention, student, site.size(*data.latent_size), 2, rounds)
    return result


def _print_card(outcome: Outcome, config: TrainConfig) -> None:
    print()
    for short, (attention, student) in outcome.block_seconds.items():
        error = outcome.metrics.get(f"val/relative_mse/{short}", float("nan"))
        print(
            f"{short}: relative error {error:.4f}; block {attention * 1e3:.1f} ms -> {student * 1e3:.1f} ms "
            f"at {config.width}x{config.height}"
        )
    if "val/image_psnr" in outcome.metrics:
        print(f"image against the teacher's: PSNR {outcome.metrics['val/image_psnr']:.1f} dB")
    model = f" -m {config.teacher_model}" if config.teacher_model else ""
    size = f"-W {config.width}" + (f" -H {config.height}" if config.height != config.width else "")
    newest = outcome.exported if config.dry_run else Path(config.out_dir) / "hyena.pt"
    print(f"student: {outcome.exported}, newest: {newest}")
    print(f"next: python generate.py{model} -y {newest} {size} --compare")


def quiet_libraries() -> None:
    """Lightning's hints (advertisements, worker counts) are noise here: the loader only draws random numbers."""
    import logging

    for name in (
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*will not be displayed.*",
        ".*lr_scheduler.step.*",
        ".*treespec.*",
        ".*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", message)
