"""The tab in which students are trained: what it would buy and take, the run while it goes on, its students in Draw."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sd_hyena.errors import BadInput
from sd_hyena.files.names import for_a_shell
from sd_hyena.options.command_line import from_dict, with_paths
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import CONFIGS
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.ui.curves import charts, pictures_of
from sd_hyena.ui.draw_tab import QUICK
from sd_hyena.ui.folders import SHIPPED
from sd_hyena.ui.form import Form
from sd_hyena.ui.job import Job
from sd_hyena.ui.session import Session
from sd_hyena.ui.trainings import Training, Trainings

SINGLE = "a single stage, as below"
HIDDEN = ("cache_dir", "debug", "dry_run", "devices", "num_nodes", "strategy", "name_format")
RECIPES = [SINGLE, *sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))]
FIRST = ("target", "width", "n_steps", "batch_size", "num_samples", "operator", "stage")
OFTEN = 1.5  # seconds between two looks at a run
LINES = 14  # of its log


@dataclass
class DistilTab:
    """Its components; `followed` is the name of the training that this page shows."""

    session: Session
    form: Form
    recipe: gr.Dropdown
    buys: gr.Button
    estimate: gr.Button
    start: gr.Button
    cancel: gr.Button
    resume: gr.Button
    runs: gr.Dropdown
    try_it: gr.Button
    answer: gr.HTML
    progress: gr.HTML
    pictures: gr.HTML
    timer: gr.Timer
    asking: gr.Timer
    job: gr.State
    seen: gr.State
    faults: gr.HTML

    @classmethod
    def build(cls, session: Session, faults: gr.HTML) -> DistilTab:
        form = Form(TrainConfig, session.folders, "train", HIDDEN)
        recipe = gr.Dropdown(RECIPES, value=SINGLE, label="recipe", info="stages in turn, or one", elem_id="recipe")
        form.add("teacher_model")
        form.add_in_pairs(*FIRST)
        form.add_groups()
        with gr.Row():
            buys = gr.Button("what each site buys", size="sm", elem_id="buys")
            estimate = gr.Button("what it will take", size="sm", elem_id="estimate")
            start = gr.Button("Start", variant="primary", size="sm", elem_id="train-start")
        answer = gr.HTML("", elem_id="answer")
        with gr.Row():
            runs = gr.Dropdown(
                list(Trainings(session.state / "trainings").all()), value=None, label="training", elem_id="runs"
            )
            with gr.Column(min_width=160):
                cancel = gr.Button("cancel, with a checkpoint", size="sm", variant="stop", elem_id="train-cancel")
                resume = gr.Button("go on with it", size="sm", elem_id="train-resume")
                try_it = gr.Button("try it in Draw", size="sm", elem_id="try-it")
        progress = gr.HTML("", elem_id="training", label="the training")
        pictures = gr.HTML("", elem_id="training-pictures", label="pictures of the training")
        timers = gr.Timer(OFTEN, active=False), gr.Timer(OFTEN, active=False)
        shown = (answer, progress, pictures, *timers, gr.State(0), gr.State(""), faults)
        tab = cls(session, form, recipe, buys, estimate, start, cancel, resume, runs, try_it, *shown)
        tab._wire()
        return tab

    @property
    def trainings(self) -> Trainings:
        return Trainings(self.session.state / "trainings")

    @property
    def followed(self) -> list[Any]:
        """The outputs of `follow`."""
        return [self.runs, self.timer, self.progress, self.pictures, self.seen]

    def order(self, given: dict[Any, Any]) -> TrainConfig:
        """What the form asks for. Raises BadInput."""
        own = {name: getattr(self.session.config, name) for name in ("log_dir", "device")}
        values = self.form.values(given)
        own |= {"out_dir": self.session.config.train_dir}
        if values["device"] != "auto":
            own.pop("device")
        config = with_paths(from_dict(TrainConfig, values | own))
        self.session.folders.check(config, [self.session.uploads, CONFIGS])
        self.session.remember_training(values | {"page_recipe": given[self.recipe]})
        return config

    def open(self) -> dict[Any, Any]:
        """For a page that is opened: the training that is running, wherever it was started."""
        stored = self.session.last_training()
        updates = self.form.with_choices() | self.form.shown(stored, self.session.uploads)[0]
        if (recipe := stored.get("page_recipe")) in RECIPES:
            updates[self.recipe] = gr.update(value=recipe)
        names = list(self.trainings.all())
        if running := self.trainings.running():
            return updates | dict(zip(self.followed, self.follow(running.name), strict=True))
        return updates | {self.runs: gr.Dropdown(choices=names)}

    def follow(self, name: str | None) -> list[Any]:
        """Show a training, and look again while it runs."""
        training = self.trainings.all().get(name or "")
        runs = gr.Dropdown(choices=list(self.trainings.all()), value=name)
        if training is None:
            return [runs, gr.Timer(active=False), "", "", ""]
        pictures, seen = self._pictures(training, "")
        return [runs, gr.Timer(active=True), shown(training), pictures, seen]

    def look(self, name: str | None, seen: str) -> list[Any]:
        """How a training is."""
        training = self.trainings.all().get(name or "")
        if training is None:
            return [gr.Timer(active=False), gr.skip(), gr.skip(), gr.skip()]
        alive = training.alive
        pictures, seen = self._pictures(training, seen)
        return [gr.skip() if alive else gr.Timer(active=False), shown(training), pictures, seen]

    def begin(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """Start what the form asks for."""
        try:
            config = self.order(given)
            if given[self.recipe] in (None, SINGLE):
                training = self.trainings.start(config)
            else:
                path = CONFIGS / "recipes" / f"{Path(given[self.recipe]).name}.yaml"
                training = self.trainings.start_recipe(path, config)
        except BadInput as error:
            return self._refused(error)
        followed = dict(zip(self.followed, self.follow(training.name), strict=True))
        return followed | {self.answer: "", self.faults: "{}"}

    def go_on(self, name: str | None, given_steps: float | None) -> dict[Any, Any]:
        """Resume the chosen training."""
        try:
            training = self.trainings.resume(name)
        except BadInput as error:
            return self._refused(error)
        return dict(zip(self.followed, self.follow(training.name), strict=True)) | {self.answer: ""}

    def stop(self, name: str | None) -> str:
        """Cancel the chosen training, or the one that runs."""
        training = self.trainings.all().get(name or "") or self.trainings.running()
        if training is None or not training.alive:
            return "<p class='quiet'>no training is running</p>"
        training.cancel()
        return "<p class='quiet'>it ends after the step in progress, with a checkpoint; go on with it when you like</p>"

    def ask_estimate(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """Have the worker, which has the model, say what a run would take."""
        try:
            config = self.order(given)
        except BadInput as error:
            return self._refused(error)

        def work(engine: Any, job: Job) -> str:
            from sd_hyena.distil.foretold import foretold

            teacher = GenerateConfig(
                model=config.teacher_model, vae=config.vae, device=config.device, dtype=config.dtype
            )
            lines = foretold(engine.load(teacher).pipe, config)
            return "".join(f"<p class='quiet'>{escape(line)}</p>" for line in lines)

        job = self.session.worker.submit(Job(work=work, name="estimate"))
        return self._asked(job)

    def ask_buys(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """What a student at each site would make cheaper, counted."""
        try:
            config = self.order(given)
        except BadInput as error:
            return self._refused(error)
        job = self.session.worker.submit(Job(work=lambda engine, job: table(config), name="counting"))
        return self._asked(job)

    def answered(self, number: int) -> list[Any]:
        """What the worker has found."""
        job = self.session.worker.find(number)
        if job is None or not job.over.is_set():
            return [gr.skip(), gr.skip()]
        found = job.result if job.state == "done" else f"<p class='fault'>{escape(job.fault or 'ended')}</p>"
        return [found, gr.Timer(active=False)]

    def _asked(self, job: Job) -> dict[Any, Any]:
        waiting = "<p class='quiet'>counting ...</p>"
        return {self.job: job.number, self.asking: gr.Timer(active=True), self.answer: waiting, self.faults: "{}"}

    def newest(self, name: str | None) -> tuple[str, str] | None:
        """The name in the folders of the newest students of a training, and of its model; None if there are none."""
        training = self.trainings.all().get(name or "") or next(iter(self.trainings.all().values()), None)
        if training is None or training.students is None:
            return None
        folders = self.session.folders
        students, _ = folders.names("students", str(training.students))
        models, _ = folders.names("models", training.model)
        return (students[0], models[0] if models else SHIPPED) if students else None

    def _refused(self, error: BadInput) -> dict[Any, Any]:
        line, name = " ".join(str(error).split()), self.form.faulty(str(error))
        faults = json.dumps({self.form.element(name): line} if name else {})
        return {self.answer: f"<p class='fault' role='alert'>{escape(line)}</p>", self.faults: faults}

    def _pictures(self, training: Training, seen: str) -> tuple[Any, Any]:
        """The run's pictures if there are new ones, by the size of its event files."""
        if training.run is None:
            return gr.skip(), seen
        folder = Path(training.log_dir) / training.run.name
        files = sorted(folder.glob("events.*"))
        stamp = f"{folder.name} {sum(file.stat().st_size for file in files)}"
        if not files or stamp == seen:
            return gr.skip(), seen
        try:
            found = pictures_of(folder)
        except Exception:  # of a file that is being written
            return gr.skip(), seen
        parts = [
            f"<figure><img src='{source}' alt='{escape(name, True)}' style='width:100%'><figcaption class='quiet'>"
            f"{escape(name)}</figcaption></figure>"
            for name, source in found.items()
        ]
        return "".join(parts), stamp

    def _wire(self) -> None:
        given = {*self.form.components.values(), self.recipe}
        self.start.click(self.begin, given, [*self.followed, self.answer, self.faults], **QUICK)
        asked = [self.job, self.asking, self.answer, self.faults]
        self.estimate.click(self.ask_estimate, given, asked, **QUICK)
        self.buys.click(self.ask_buys, given, asked, **QUICK)
        self.timer.tick(
            self.look, [self.runs, self.seen], [self.timer, self.progress, self.pictures, self.seen], **QUICK
        )
        self.asking.tick(self.answered, [self.job], [self.answer, self.asking], **QUICK)
        self.cancel.click(self.stop, [self.runs], [self.answer], **QUICK)
        steps = self.form.components["n_steps"]
        self.resume.click(self.go_on, [self.runs, steps], [*self.followed, self.answer, self.faults], **QUICK)
        self.runs.input(self.follow, [self.runs], self.followed, **QUICK)


def table(config: TrainConfig) -> str:
    """Each site's operations as attention and as a student, and what of the UNet a student there would save."""
    from sd_hyena.distil.candidates import counted
    from sd_hyena.models.hollow import COUNTING, hollow_network
    from sd_hyena.models.location import model_path

    with COUNTING:
        total, found = counted(hollow_network(model_path(config.teacher_model, config.vae), "unet"), config)
    rows = []
    for candidate, _ in sorted(found, key=lambda pair: -pair[0].saved):
        share = f"{100 * candidate.saved / total:.1f} %" if candidate.saved > 0 else "attention is cheaper"
        costs = f"<td>{candidate.attention / 1e9:.3f}</td><td>{candidate.student / 1e9:.3f}</td>"
        rows.append(f"<tr><td>{candidate.short}</td>{costs}<td>{share}</td></tr>")
    saved = sum(max(candidate.saved, 0) for candidate, _ in found)
    line = f"all of them: the UNet {total / (total - saved):.2f} times cheaper at {config.width}x{config.height}"
    return (
        "<div class='scroll-x'><table class='page-table'><thead><tr><th>site</th><th>attention GFLOP</th><th>student GFLOP</th>"
        f"<th>of the UNet</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div><p class='quiet'>{line}</p>"
    )


def shown(training: Training) -> str:
    """A training as HTML: how it is, its curves, its last lines, how else to watch it."""
    alive, lines = training.alive, [line for line in training.lines if line.strip()]
    state = "running" if alive else "ended"
    run = training.run
    drawn = charts(Path(training.log_dir) / run.name) if run else ""
    watch = f"tensorboard --logdir {for_a_shell(os.path.abspath(training.log_dir))}"
    return (
        f"<p class='quiet' data-state='{state}'>{escape(training.name)}: <b>{state}</b>{f', {escape(str(run))}' if run else ''}</p>"
        f"{drawn}<pre class='log' tabindex='0' aria-label='its last lines'>{escape(chr(10).join(lines[-LINES:]))}</pre>"
        f"<p class='quiet'>watch it elsewhere: <code>{escape(watch)}</code></p>"
    )
