"""The tab in which students are trained: what it would buy and take, the run while it goes on, its students in Draw."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sd_hyena.errors import BadInput
from sd_hyena.files.names import for_a_shell
from sd_hyena.files.yaml_file import read_documents
from sd_hyena.options.command_line import from_dict, to_dict, with_paths
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import CONFIGS
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.ui.curves import charts, pictures_of
from sd_hyena.ui.draw_tab import QUICK
from sd_hyena.ui.fault import fault, line_of
from sd_hyena.ui.folders import SHIPPED
from sd_hyena.ui.form import Form
from sd_hyena.ui.job import Job
from sd_hyena.ui.looking import go_on_looking
from sd_hyena.ui.session import Session
from sd_hyena.ui.trainings import OF_A_RECIPE, Training, Trainings, stages_of

SINGLE = "a single stage, as below"
HIDDEN = ("cache_dir", "debug", "dry_run", "devices", "num_nodes", "strategy", "name_format")
RECIPES = [SINGLE, *sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))]
FIRST = ("target", "width", "n_steps", "batch_size", "num_samples", "operator", "stage")
OFTEN = 1.5  # seconds between two looks at a run
LINES = 14  # of its log
WORDS = {
    "cancelled": "cancelled, with a checkpoint if it had begun its steps",
    "failed": "failed; its last lines say why, if it came to that",
}


@dataclass
class DistilTab:
    """Its components; `followed` is the name of the training that this page shows."""

    session: Session
    form: Form
    recipe: gr.Dropdown
    stages: gr.HTML
    single: gr.Column
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
        stages = gr.HTML("", elem_id="stages", label="the stages of the recipe")
        form.add("teacher_model")
        form.add_in_pairs("vae", "device")
        with gr.Column(elem_id="single-stage") as single:
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
        tab = cls(session, form, recipe, stages, single, buys, estimate, start, cancel, resume, runs, try_it, *shown)
        tab._wire()
        return tab

    @property
    def trainings(self) -> Trainings:
        return Trainings(self.session.state / "trainings")

    @property
    def followed(self) -> list[Any]:
        """The outputs of `follow`."""
        return [self.runs, self.timer, self.progress, self.pictures, self.seen]

    @property
    def settings(self) -> list[Any]:
        """All components that say how is trained."""
        return [*self.form.components.values(), self.recipe]

    def order(self, given: dict[Any, Any]) -> tuple[TrainConfig, Path | None]:
        """What the form asks for, of a recipe what that does not decide itself; and the recipe. Raises BadInput."""
        recipe = _recipe(given[self.recipe])
        values = {name: self.form.value(name, given) for name in (OF_A_RECIPE if recipe else self.form.components)}
        own = {name: getattr(self.session.config, name) for name in ("log_dir", "device")}
        own |= {"out_dir": self.session.config.train_dir}
        if values["device"] != "auto":
            own.pop("device")
        config = with_paths(from_dict(TrainConfig, values | own))
        self.session.folders.check(config, [self.session.uploads, CONFIGS])
        return config, recipe

    def stages_asked(self, given: dict[Any, Any]) -> list[TrainConfig]:
        """The stages that the form asks for: those of the recipe, or the single one. Raises BadInput."""
        config, recipe = self.order(given)
        return stages_of(recipe, config) if recipe else [config]

    def keep(self, given: dict[Any, Any]) -> None:
        """Remember the settings, whatever is wrong with them."""
        self.session.remember_tab("training", self.form.legible(given) | {"page_recipe": given[self.recipe]})

    def open(self) -> dict[Any, Any]:
        """What a page that is opened shows: the settings of last time."""
        stored = self.session.last_of("training")
        updates = self.form.with_choices() | self.form.shown(stored, self.session.uploads)[0]
        if (recipe := stored.get("page_recipe")) in RECIPES:
            updates |= {self.recipe: gr.update(value=recipe)} | self.chosen(recipe)
        return updates

    def settle(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """Once more what of them the page does not show yet."""
        stored, legible = self.session.last_of("training"), self.form.legible(given)
        lost = {name: value for name, value in stored.items() if name in legible and legible[name] != value}
        updates, _ = self.form.shown(lost, self.session.uploads)
        if (recipe := stored.get("page_recipe")) in RECIPES and given[self.recipe] != recipe:
            updates |= {self.recipe: gr.update(value=recipe)} | self.chosen(recipe)
        return updates

    def chosen(self, recipe: str | None) -> dict[Any, Any]:
        """A recipe's stages in place of the options that it decides."""
        path = _recipe(recipe)
        return {self.stages: said_of(path) if path else "", self.single: gr.Column(visible="hidden" if path else True)}

    def follow_newest(self) -> list[Any]:
        """The training that is running, wherever it was started, or the newest that has ended."""
        training = self.trainings.running() or next(iter(self.trainings.all().values()), None)
        return self.follow(training.name if training else None)

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
        self.keep(given)
        try:
            config, recipe = self.order(given)
            if recipe:
                stages_of(recipe, config)  # what is wrong with them is said here, not in a log
                training = self.trainings.start_recipe(recipe, config)
            else:
                training = self.trainings.start(config)
        except BadInput as error:
            return self._refused(error)
        followed = dict(zip(self.followed, self.follow(training.name), strict=True))
        return followed | {self.answer: "", self.faults: "{}"}

    def go_on(self, name: str | None, given_steps: float | None) -> dict[Any, Any]:
        """Resume the chosen training."""
        try:
            training = self.trainings.resume(name, int(given_steps or 0))
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
        """Have the worker, which has the model, say what a run would take, or each stage of it."""
        try:
            stages = self.stages_asked(given)
        except BadInput as error:
            return self._refused(error) | {self.job: self.session.worker.going(given.get(self.job))}

        def work(engine: Any, job: Job) -> str:
            from sd_hyena.distil.foretold import foretold

            lines = []
            for i, config in enumerate(stages, 1):
                given = dict(vae=config.vae, device=config.device, dtype=config.dtype)
                teacher = engine.load(GenerateConfig(model=config.teacher_model, **given)).pipe
                lines += [_stage_said(i, to_dict(config))] if len(stages) > 1 else []
                lines += foretold(teacher, config)
            return "".join(f"<p class='quiet'>{escape(line)}</p>" for line in lines)

        job = self.session.worker.submit(Job(work=work, name="estimate"))
        return self._asked(job)

    def ask_buys(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """What a student at each site would make cheaper, counted; of a recipe at each of its sizes."""
        try:
            stages = self.stages_asked(given)
        except BadInput as error:
            return self._refused(error) | {self.job: self.session.worker.going(given.get(self.job))}
        sizes = {(one.width, one.height, one.operator, one.operator_options): one for one in stages}
        work = lambda engine, job: "".join(table(config) for config in sizes.values())
        return self._asked(self.session.worker.submit(Job(work=work, name="counting")))

    def answered(self, number: int) -> list[Any]:
        """What the worker has found."""
        job = self.session.worker.find(number)
        if job is not None and not job.over.is_set():
            return [gr.skip(), gr.skip(), gr.skip()]
        ended = gr.Timer(active=False)
        if not number:
            return [gr.skip(), ended, gr.skip()]
        if job is not None and job.bad_input:
            refused = self._refused(BadInput(job.fault))
            return [refused[self.answer], ended, refused[self.faults]]
        if job is not None and job.state == "done":
            return [job.result, ended, gr.skip()]
        return [f"<p class='fault'>{escape(job.fault if job and job.fault else 'ended')}</p>", ended, gr.skip()]

    def _asked(self, job: Job) -> dict[Any, Any]:
        waiting = "<p class='quiet'>counting ...</p>"
        return {self.job: job.number, self.asking: gr.Timer(active=True), self.answer: waiting, self.faults: "{}"}

    def newest(self, name: str | None) -> tuple[str, str]:
        """The name in the folders of the newest students of a training, and of its teacher. Raises BadInput."""
        training = self.trainings.all().get(name or "") or next(iter(self.trainings.all().values()), None)
        if training is None or training.students is None:
            raise BadInput("this training has no students yet" if training else "there is no training yet")
        folders = self.session.folders
        students, strange = folders.names("students", str(training.students))
        if strange:
            raise BadInput(f"{strange[0]!r} is in none of the page's folders; start the page with --student_dir")
        models, strange = folders.names("models", training.teacher)
        if strange:
            raise BadInput(
                f"the teacher {strange[0]!r} is in none of the page's folders; start the page with --model_dir where it lies"
            )
        return students[0], models[0] if models else SHIPPED

    def _refused(self, error: BadInput) -> dict[Any, Any]:
        line, name = line_of(error), self.form.faulty(str(error))
        faults = json.dumps({self.form.element(name): line} if name else {})
        return {self.answer: fault(line), self.faults: faults}

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
        given = set(self.settings)
        self.recipe.change(self.chosen, [self.recipe], [self.stages, self.single], trigger_mode="multiple", **QUICK)
        begun = [*self.followed, self.answer, self.faults]
        go_on_looking(self.start.click(self.begin, given, begun, **QUICK), self.timer)
        asked = [self.job, self.asking, self.answer, self.faults]
        for button, ask in ((self.estimate, self.ask_estimate), (self.buys, self.ask_buys)):
            go_on_looking(button.click(ask, {*given, self.job}, asked, **QUICK), self.asking)
        self.timer.tick(
            self.look, [self.runs, self.seen], [self.timer, self.progress, self.pictures, self.seen], **QUICK
        )
        self.asking.tick(self.answered, [self.job], [self.answer, self.asking, self.faults], **QUICK)
        self.cancel.click(self.stop, [self.runs], [self.answer], **QUICK)
        steps = self.form.components["n_steps"]
        go_on_looking(self.resume.click(self.go_on, [self.runs, steps], begun, **QUICK), self.timer)
        self.runs.input(self.follow, [self.runs], self.followed, **QUICK)


def _recipe(name: str | None) -> Path | None:
    return CONFIGS / "recipes" / f"{name}.yaml" if name in RECIPES and name != SINGLE else None


def _stage_said(number: int, options: Mapping[str, Any]) -> str:
    defaults = to_dict(TrainConfig())
    stage, width, height, n_steps = ({**defaults, **options}[name] for name in ("stage", "width", "height", "n_steps"))
    return f"stage {number}: {stage}, {width}x{height or width}, {n_steps} steps"


def said_of(recipe: Path) -> str:
    """The stages of a recipe, as HTML."""
    shared, *stages = read_documents(str(recipe))
    items = "".join(f"<li>{escape(_stage_said(i, shared | stage))}</li>" for i, stage in enumerate(stages, 1))
    line = "The recipe decides all but the teacher, its VAE and the device; it writes into a folder of its own."
    return f"<ol class='quiet' style='list-style: none'>{items}</ol><p class='quiet'>{line}</p>"


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
    state, lines = training.state, [line for line in training.lines if line.strip()]
    run = training.run
    drawn = charts(Path(training.log_dir) / run.name) if run else ""
    watch = f"tensorboard --logdir {for_a_shell(os.path.abspath(training.log_dir))}"
    return (
        f"<p class='quiet' data-state='{'running' if state == 'running' else 'ended'}'>{escape(training.name)}: "
        f"<b>{WORDS.get(state, state)}</b>{f', {escape(str(run))}' if run else ''}</p>"
        f"{drawn}<pre class='log' tabindex='0' aria-label='its last lines'>{escape(chr(10).join(lines[-LINES:]))}</pre>"
        f"<p class='quiet'>watch it elsewhere: <code>{escape(watch)}</code></p>"
    )
