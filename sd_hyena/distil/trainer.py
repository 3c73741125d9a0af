"""Lightning's trainer as a run needs it: loggers, callbacks, no hints."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from datetime import datetime

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from sd_hyena.distil.curves import describe
from sd_hyena.distil.lessons import Lessons
from sd_hyena.distil.placement import precision_of
from sd_hyena.distil.previews import Previews
from sd_hyena.distil.run_folder import AtomicCheckpointIO, Checkpoints
from sd_hyena.options.command_line import to_dict
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.device import pick_device
from sd_hyena.processes.progress import work
from sd_hyena.processes.ranks import say


def new_trainer(
    config: TrainConfig, data: Lessons, checkpoints: Checkpoints, previews: Previews | None, start: int | None
) -> L.Trainer:
    run, device = checkpoints.folder.name, pick_device(config.device)
    averaging = [Averaging(decay=config.ema)] if config.ema else []
    return L.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=config.devices if device.index is None else [device.index],
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        use_distributed_sampler=False,  # every rank validates on the same few states
        precision=precision_of(config, device),
        max_steps=config.n_steps,
        max_epochs=-1,
        accumulate_grad_batches=data.accumulate,
        gradient_clip_val=config.clip or None,
        val_check_interval=config.validate_every_n_steps * data.accumulate or 10**9,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=_loggers(config, run, start),
        callbacks=[*([previews] if previews else []), *averaging, checkpoints, Curves(), Progress()],
        enable_progress_bar=False,
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
    return [TensorBoardLogger(config.log_dir, "", run, purge_step=step, default_hp_metric=False), csv]


class Averaging(EMAWeightAveraging):
    """Gives the trained weights back also where a validation, for which averaged ones are swapped in, does not end."""

    swapped = False

    def on_validation_epoch_start(self, trainer, module) -> None:
        super().on_validation_epoch_start(trainer, module)
        self.swapped = True

    def on_validation_epoch_end(self, trainer, module) -> None:
        super().on_validation_epoch_end(trainer, module)
        self.swapped = False

    def on_exception(self, trainer, module, exception) -> None:
        if self.swapped:
            self.on_validation_epoch_end(trainer, module)
        super().on_exception(trainer, module, exception)


class Curves(L.Callback):
    """Describes a run to TensorBoard when it begins."""

    def on_fit_start(self, trainer, module) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                describe(logger.experiment, to_dict(trainer.datamodule.config), trainer.datamodule.teacher.sites)


class Progress(L.Callback):
    """Shows how far a training is, in the one way in which everything is shown."""

    def on_train_start(self, trainer, module) -> None:
        what = f"training at {trainer.datamodule.config.width}x{trainer.datamodule.config.height}"
        self.open = ExitStack()
        self.shown = self.open.enter_context(work(what, trainer.max_steps, before=trainer.global_step))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        several = trainer.accumulate_grad_batches
        share = (batch_idx + 1) % several / several
        named = {name.rpartition("/")[-1]: value for name, value in trainer.progress_bar_metrics.items()}
        self.shown.to(trainer.global_step + share, " ".join(f"{name} {float(v):.4f}" for name, v in named.items()))

    def on_train_end(self, trainer, module) -> None:
        self.open.close()

    def on_exception(self, trainer, module, exception) -> None:
        if hasattr(self, "open"):
            self.open.__exit__(type(exception), exception, exception.__traceback__)


def quiet_libraries() -> None:
    """Lightning's hints (advertisements, worker counts) are noise here: the loader only draws random numbers."""
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
        ".*in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", message)
