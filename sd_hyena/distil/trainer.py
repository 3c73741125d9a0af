"""Lightning's trainer as a run needs it: loggers, one progress bar, no hints."""

from __future__ import annotations

import logging
import sys
import warnings
from datetime import datetime

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from sd_hyena.distil.lessons import Lessons
from sd_hyena.distil.placement import precision_of
from sd_hyena.distil.previews import Previews
from sd_hyena.distil.run_folder import AtomicCheckpointIO, Checkpoints
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.device import pick_device
from sd_hyena.processes.ranks import say


def new_trainer(
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
    ):
        warnings.filterwarnings("ignore", message)
