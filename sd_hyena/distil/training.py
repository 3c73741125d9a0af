"""The straight line from a TrainConfig to trained students on disk."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch.utils.data import default_collate

from sd_hyena.distil.allotment import allotted, is_left_open
from sd_hyena.distil.foretold import cache_of, foretold
from sd_hyena.distil.larger_run import LargerRun
from sd_hyena.distil.lessons import Lessons
from sd_hyena.distil.module import Distillation
from sd_hyena.distil.pilot import with_chosen_sites
from sd_hyena.distil.placement import own_device, teacher_dtype
from sd_hyena.distil.previews import PICTURES, Previews, draws_previews
from sd_hyena.distil.resume import Resumable
from sd_hyena.distil.run_card import Outcome, block_times, print_card, print_estimate
from sd_hyena.distil.run_folder import Checkpoints, Stopped, discard, holds_something, new_run_folder, write_config
from sd_hyena.distil.sources import make_bank, pictures_of
from sd_hyena.distil.stages import EndToEnd, Joint, Layerwise, Stage
from sd_hyena.distil.start import start_from, with_counts_of
from sd_hyena.distil.trainer import new_trainer, quiet_libraries
from sd_hyena.files.names import for_a_shell, own_folder
from sd_hyena.models.example_prompts import prompts_of
from sd_hyena.models.location import model_path, model_sha256
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.models.prediction import noiser
from sd_hyena.models.vae import check_vae
from sd_hyena.options.command import Interrupted, Terminated
from sd_hyena.options.command_line import with_paths
from sd_hyena.options.rules import drawn_seed
from sd_hyena.options.sampler import set_scheduler
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes import ranks
from sd_hyena.processes.memory import is_out_of_memory, release
from sd_hyena.processes.progress import work
from sd_hyena.processes.ranks import say
from sd_hyena.sites import find_sites, select
from sd_hyena.students.checkpoint import load_students
from sd_hyena.students.student import StudentSpec, build_student, spec_for
from sd_hyena.students.teacher import Teacher

T = TypeVar("T")
OF_A_DRY_RUN = 2  # pictures


def train(config: TrainConfig, within: LargerRun | None = None) -> Outcome:
    """Run it: config -> teacher -> sites -> activations -> students -> .ckpt and .safetensors. Raises BadInput.

    A run that leaves nothing leaves no folder either.
    """
    quiet_libraries()
    config = with_paths(config)
    with own_folder(config.out_dir), own_folder(config.log_dir, "log_dir"):
        if config.target == "auto":
            config = with_chosen_sites(config, train)
        return _trained(config, within)


def _trained(config: TrainConfig, within: LargerRun | None) -> Outcome:
    ranks.check_launched_by_us()
    path = model_path(config.teacher_model, config.vae)
    if config.vae:
        check_vae(config.vae)
    if config.processes > 1:
        ranks.meet(config.num_nodes)
    if ranks.rank():
        config = dataclasses.replace(config, **ranks.told()["options"])
    resumed = Resumable.find(config) if config.resume else None
    if config.resume and not resumed and not within:
        say(f"nothing to resume in {config.out_dir}; starting anew")
    if resumed:
        resumed.check_seed(config.seed)
    seed = resumed.options["seed"] if resumed else drawn_seed(config.seed)
    config = dataclasses.replace(config, seed=seed)
    device = own_device(config)
    prompts = prompts_of(path, config.prompts)
    if config.data == "images":
        pictures_of(config.data_path)

    with work(f"loading {path.name}"):
        teacher_sha256 = model_sha256(path)
        pipe = load_pipeline(path, device, teacher_dtype(config, device), config.vae)
    set_scheduler(pipe, "ddim")
    sites = select(find_sites(pipe.unet), config.target)
    teacher = Teacher(pipe.unet, sites)
    latent_size = (config.height // 8, config.width // 8)
    specs = [spec_for(site, config.operator, config.options_of_operator(), latent_size) for site in sites]
    facts = {"teacher": path.name, "teacher_sha256": teacher_sha256, "sites": [site.name for site in sites]}
    if resumed:
        resumed.check(config, facts)
        if resumed.step >= config.n_steps:
            say(f"nothing to do: {resumed.path} has {resumed.step} of {config.n_steps} steps")
            return Outcome(resumed.run, resumed.exported, {}, {})
    if is_left_open(specs) and config.pretrained_weight:
        specs = with_counts_of(config.pretrained_weight, specs, pipe.unet)
    students = {} if is_left_open(specs) else _new_students(specs, config, pipe.unet)
    say(f"teacher {path.name}, sites {' '.join(s.short for s in sites)}, seed {seed}")
    cache = cache_of(config)
    n_steps = config.n_steps - (resumed.step if resumed else 0)
    if ranks.rank() == 0:
        _tell_estimate(pipe, config, n_steps, within.followed_by if within else ())
    if config.dry_run:
        config = dataclasses.replace(config, n_steps=1, num_samples=min(config.num_samples, OF_A_DRY_RUN))
    bank = make_bank(pipe, config, prompts, teacher_sha256, cache)
    scheduler = noiser(pipe)
    stage = _stage(config, teacher, scheduler)
    data = Lessons(stage, scheduler, bank, config)
    if not students:
        specs = allotted(specs, teacher, default_collate(data.held_out(range(0, data.validation_size, 4))), sites)
        say("landmarks: " + " ".join(f"{spec.short} {spec.options['landmarks']}" for spec in specs))
        students = _new_students(specs, config, pipe.unet)
    shown = prompts_of(path, config.sample_prompts) if config.sample_prompts else prompts[-PICTURES:]
    previews = None if config.dry_run else Previews(pipe, shown, config.width, config.height, config.teacher_model)
    if previews and not draws_previews(device, config.width, config.height):
        say(f"note: no previews and no image PSNR at {config.width}x{config.height} on a CPU, only up to 512x512")
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
        with work("a micro-batch is timed", announced=False):
            _with_smaller_batches(data, lambda: print_estimate(module, data, n_steps, device))
    folder = _run_folder(config, resumed)  # now that all that can be wrong has been looked at
    untrained = resumed.untrained if resumed else None
    checkpoints = Checkpoints(folder, config, facts, untrained, newest=not (config.dry_run or within))
    try:
        if ranks.rank() == 0:
            say(f"run {folder}\nwatch it: tensorboard --logdir {for_a_shell(config.log_dir)}")
            if config.processes > 1:
                resume = str(resumed.path) if resumed else ""
                options = {"seed": seed, "micro_batch_size": data.micro_batch_size, "resume": resume}
                ranks.tell(folder=str(folder), options=options)
        trainer = _fit(module, data, config, checkpoints, previews, resumed)
    except Stopped as step:
        if ranks.rank():
            raise SystemExit(0) from None
        say(f"saved at step {step}; {within.again if within else f'go on with --resume {for_a_shell(folder)}'}")
        raise _signalled(checkpoints) from None
    except BaseException as error:
        if not (resumed or ranks.rank() or holds_something(folder)):
            failed = checkpoints.step is not None and isinstance(error, Exception)
            discard(folder, None if failed else config)
        raise
    if checkpoints.validated_step != trainer.global_step:
        alone = lambda: config.processes == 1  # of several ranks one cannot repeat it by itself
        with work("the students are validated"):
            _with_smaller_batches(data, lambda: trainer.validate(module, data, verbose=False), alone)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    if ranks.rank():
        return Outcome(folder, None, metrics, {})
    checkpoints.export(trainer, module, module.state_dict())  # once more: now with the final metrics inside
    load_students(checkpoints.exported, pipe.unet)
    with work("attention and students are timed"):
        times = block_times(teacher, module, data, device)
    outcome = Outcome(folder, checkpoints.exported, metrics, times)
    print_card(outcome, config, checkpoints.untrained or {}, alone=within is None)
    if checkpoints.signal is not None:  # it came too late to stop a step, but not to stop what follows this run
        raise _signalled(checkpoints)
    return outcome


def _tell_estimate(pipe: Any, config: TrainConfig, n_steps: int, followed_by: Sequence[TrainConfig]) -> None:
    """Before anything is drawn: what the run will take with so many steps to go, and what follows it."""
    with work("counting operations, and timing one of the teacher's"):
        lines = foretold(pipe, config, n_steps, followed_by)
    say("\n".join(lines))


def _new_students(specs: list[StudentSpec], config: TrainConfig, unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """By site, as they start: at the seed, or from the given weights. Raises BadInput for weights of others."""
    L.seed_everything(config.seed, verbose=False)
    students = {spec.site: build_student(spec) for spec in specs}
    if config.pretrained_weight:
        start_from(config.pretrained_weight, students, unet)
    return students


def _signalled(checkpoints: Checkpoints) -> BaseException:
    return Interrupted() if checkpoints.signal == signal.SIGINT else Terminated()


def _stage(config: TrainConfig, teacher: Teacher, scheduler: Any) -> Stage:
    if config.stage == "end_to_end":
        return EndToEnd(teacher, scheduler, config.feature_weight, config.guidance_weight)
    return Joint(teacher) if config.stage == "joint" else Layerwise(teacher)


def _run_folder(config: TrainConfig, resumed: Resumable | None) -> Path:
    """Rank 0 takes up or makes the run's folder; the others are told."""
    if ranks.rank():
        return Path(ranks.told()["folder"])
    if resumed:
        resumed.set_aside_later()
        folder = resumed.run
    else:
        folder = new_run_folder(config, datetime.now().strftime("%Y%m%d-%H%M%S"))
    write_config(folder, config)
    return folder


def _fit(
    module, data, config: TrainConfig, checkpoints: Checkpoints, previews: Previews | None, resumed: Resumable | None
) -> L.Trainer:
    """Fit, with smaller micro-batches after an out-of-memory; the effective batch and the stream of samples stay."""
    resume, start = (resumed.path, resumed.step) if resumed else (None, None)

    def fit() -> L.Trainer:
        nonlocal resume
        resume = checkpoints.out_of_memory or resume
        trainer = new_trainer(config, data, checkpoints, previews, start)
        if resume is None:
            with work("the untrained students are validated"):
                trainer.validate(module, data, verbose=False)
            checkpoints.note_untrained(trainer)
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
        say(f"out of memory: going on with {data.accumulate} micro-batches of {data.micro_batch_size}")
        release()
