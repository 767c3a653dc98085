"""`train`: compile, step, log, evaluate, save; run it again and it goes on where it was."""

import collections
import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable

import grain
import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from fusedkv_jax import costs, data, processes
from fusedkv_jax.data import sources, tokenizers
from fusedkv_jax.model import Decoder
from fusedkv_jax.sharding import make_mesh, process_rows, put_batch, spread
from fusedkv_jax.training.checkpointing.checkpoints import Checkpoints
from fusedkv_jax.training.checkpointing.lock import lock_workdir
from fusedkv_jax.training.checkpointing.manifest import CheckpointError
from fusedkv_jax.training.checkpointing.tokenizer_files import keep_tokenizer, kept_tokenizer
from fusedkv_jax.training.config import ExperimentConfig, first_difference
from fusedkv_jax.training.divergence import LIMIT_AT_END, DivergenceCheck
from fusedkv_jax.training.evaluation import evaluate, make_eval_step
from fusedkv_jax.training.interrupts import Alarm, Interrupts
from fusedkv_jax.training.memory import check_memory, step_bytes
from fusedkv_jax.training.monitoring.goodput import PRODUCTIVE, Goodput
from fusedkv_jax.training.monitoring.metrics import (
    JsonLinesWriter,
    LineWriter,
    MetricWriter,
    MultiWriter,
    StepTimer,
    TensorBoardWriter,
    WandbWriter,
    last_step,
)
from fusedkv_jax.training.monitoring.profiling import ProfileWindow
from fusedkv_jax.training.monitoring.progress import Progress
from fusedkv_jax.training.program import TrainProgram
from fusedkv_jax.training.state import TrainState
from fusedkv_jax.training.step import BATCH_KEYS, Batch, Metrics
from fusedkv_jax.validation import check_kind
from pallas_kernels.devices import peak_flops

LOGGED = ("grad_norm", "learning_rate", "skipped")  # of the last step; the loss is a mean
METRICS_FILE = "metrics.jsonl"
# Steps that may be queued on the device. Two keep it busy; more would only delay the reaction
# to a signal and hold more batches in memory.
QUEUED_STEPS = 2


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended, the same on all processes.

    Attributes:
      step: the last finished step.
      interrupted: name of the signal that ended it early, or None.
      metrics: the last values of every metric, such as "train/loss" and "eval/bits_per_byte".
      workdir: where checkpoints and metrics are.
      seconds: where the call's time went: "steps", "compilation", "evaluation" and so on.
    """

    step: int
    interrupted: str | None
    metrics: dict[str, float]
    workdir: pathlib.Path
    seconds: dict[str, float]


def train(
    config: ExperimentConfig,
    workdir: pathlib.Path | str,
    *,
    profile_steps: tuple[int, int] | None = None,
    wandb_project: str | None = None,
    initial: Callable[[], Decoder] | None = None,
    teacher: Decoder | None = None,
) -> TrainResult:
    """Train until `config.train.steps`, or until SIGTERM, SIGINT or SIGHUP.

    The work directory holds `checkpoints/`, `metrics.jsonl`, `tensorboard/` and a copy of the
    tokenizer, unless that is bytes. A run that finds checkpoints there goes on from the newest
    one, bit for bit as if it had not stopped.
    On the first SIGTERM, SIGINT or SIGHUP it saves after the current step and returns.

    With several processes (after `processes.initialize`) all call it with the same arguments and
    on one shared file system. Process 0 prints, writes the metrics and commits the checkpoints; a
    signal to any of them makes all save at the same step.

    Args:
      config: the experiment.
      workdir: created if it does not exist; one run at a time may use it.
      profile_steps: first and last step whose trace (of process 0) is written to
        `workdir/profile`, for TensorBoard or Perfetto.
      wandb_project: project of Weights & Biases that gets the metrics too.
      initial: gives the model to start from, of `config.model`; not called where a run goes on.
      teacher: what `config.distillation` compares the model with; it is spread as the model is.

    Raises:
      ValueError: `profile_steps` is no range of steps, a teacher is missing or unused or does not
        fit the model, the vocabulary is too small for the
        tokenizer, there is no text, the directory is in use (`WorkdirLockedError`), or holds the
        checkpoint of another configuration (`CheckpointError`), the package wandb is asked for
        and missing, or the processes differ (`ProcessesError`).
      CheckpointError: the last step could not be saved.
      DivergedError: the loss is not finite, and will not be again.
      InsufficientMemoryError: the machine cannot hold the run; the message says what to lower.
    """
    check_kind("config", config, ExperimentConfig, "an ExperimentConfig")
    workdir = pathlib.Path(workdir).expanduser()
    for place in (workdir, *workdir.parents):
        if place.is_symlink() and not place.exists():  # of a disk that is not mounted, say
            raise ValueError(f"{place} is a link to what does not exist; name another workdir")
    workdir = workdir.resolve()
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir {workdir} is a file; name a directory")
    source = sources.absolute(config.data.source)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    profile = ProfileWindow(workdir / "profile", profile_steps, config.train.steps)
    arguments = config.to_dict() | {"workdir": str(workdir), "profile_steps": profile_steps}
    processes.check_same("configuration", arguments, first_difference)
    teaching = None if teacher is None else teacher.config
    program = TrainProgram(config, make_mesh(config.mesh), teaching)
    process_rows(program.mesh)  # refuses a mesh that cuts across the processes
    name = config.data.tokenizer
    tokenizer = processes.together(lambda: tokenizers.load(kept_tokenizer(name, workdir)))
    tokenizers.check_vocab_size(tokenizer, config.model.vocab_size)
    with (
        jax.set_mesh(program.mesh),
        lock_workdir(workdir),
        Interrupts() as interrupts,
        Checkpoints(
            workdir, config.train.keep_checkpoints, keep_best=config.train.keep_best
        ) as checkpoints,
    ):
        processes.on_first(lambda: keep_tokenizer(name, workdir))
        options = _RunOptions(profile, wandb_project, initial, teacher)
        return _Run(workdir, program, checkpoints, interrupts, options).finish()


@dataclasses.dataclass(frozen=True)
class _RunOptions:
    """What a call of `train` asks for beside the experiment; see its arguments."""

    profile: ProfileWindow
    wandb_project: str | None
    initial: Callable[[], Decoder] | None
    teacher: Decoder | None


class _Run:
    """One call of `train`: what it needs, and the loop."""

    def __init__(
        self,
        workdir: pathlib.Path,
        program: TrainProgram,
        checkpoints: Checkpoints,
        interrupts: Interrupts,
        options: _RunOptions,
    ) -> None:
        self.goodput = Goodput("start")
        self.options = options
        self.config = config = program.config
        self.workdir = workdir
        self.program = program
        self.checkpoints = checkpoints
        self.interrupts = interrupts
        self.alarm = Alarm(60 * config.train.checkpoint_minutes)
        self.divergence = DivergenceCheck(config, lambda: checkpoints.latest_step)
        # Of the steps that may still be on the device: number, loss and gradient norm.
        self.queued: collections.deque[tuple[int, jax.Array, jax.Array]] = collections.deque()
        self.eval_batches = None
        processes.together(self._load_data)
        processes.check_same("corpus", {"data": self.data.corpus}, first_difference)
        parts, logits_mib = config.train.grad_accumulation, config.train.logits_mib
        self.eval_step = make_eval_step(
            program.graphdef, parts, logits_mib, program.model_parameters
        )
        self.eval_compiled = False
        self.latest: dict[str, float] = {}
        self.seen = last_step(self.workdir / METRICS_FILE)

    def _load_data(self) -> None:
        config, steps = self.config.data, self.config.train.eval_batches
        kept = kept_tokenizer(config.tokenizer, self.workdir)
        config = dataclasses.replace(config, tokenizer=kept)
        corpus = data.load_corpus(config)
        shard = grain.sharding.ShardOptions(*process_rows(self.program.mesh))
        self.data = data.make_train_iterator(config, corpus=corpus, shard=shard)
        if steps:
            self.eval_batches = data.make_eval_batches(config, steps, corpus=corpus, shard=shard)

    def finish(self) -> TrainResult:
        """Run to the end; returns what `train` returns."""
        steps = self.config.train.steps
        state, step = self._start()
        silent = not processes.is_first()
        with Progress(steps, done=step, label=self.config.name, silent=silent) as progress:
            if step >= steps:
                progress.print(
                    f"{self.workdir} is already at step {step} of {steps}; raise "
                    "--config.train.steps to go on"
                )
                return TrainResult(step, None, {}, self.workdir, self.goodput.seconds())
            self._announce(progress, state, step)
            writer = processes.together(lambda: self._writers(progress, step))
            try:
                step = self._loop(state, step, progress, writer)
            finally:
                self.options.profile.end()
                writer.close()
            progress.print(self.goodput.summary())
        processes.on_first(lambda: None)  # the others must not end while process 0 closes writers
        seconds = self.goodput.seconds()
        return TrainResult(step, self.interrupts.agreed, self.latest, self.workdir, seconds)

    def _start(self) -> tuple[TrainState, int]:
        check_memory("the state of the model and its optimizer", _nbytes(self.program.state))
        restored = self.checkpoints.restore(self.program.state, self.data, self.config)
        if restored is not None:
            return restored
        params = None
        if self.options.initial is not None:
            params = _parameters("initial model", processes.together(self.options.initial))
        return self.program.create(params), 0

    def _announce(self, progress: Progress, state: TrainState, step: int) -> None:
        model, devices = self.config.model, state.step.devices()
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        origin = f"resuming at step {step}" if step else "starting"
        progress.print(
            f"{self.config.name}: {count / 1e6:.2f}M parameters, layout "
            f"{model.kv_layout.spec or 'of its own'}, {len(devices)} x "
            f"{min(devices, key=str).device_kind}, {origin} in {self.workdir}"
        )
        train = self.config.train
        if train.keep_best and not train.eval_batches:
            progress.print(
                f"warning: train.keep_best={train.keep_best} keeps nothing, as "
                "train.eval_batches=0 leaves no held-out loss to compare; set eval_batches"
            )

    def _writers(self, progress: Progress, step: int) -> MetricWriter:
        if not processes.is_first():
            return MultiWriter([])
        writers: list[MetricWriter] = []
        if self.options.wandb_project is not None:
            settings = self.config.to_dict()
            writers = [
                WandbWriter(self.options.wandb_project, self.config.name, settings, self.workdir)
            ]
        writers += [
            LineWriter(progress.print, self.config.train.steps, progress.time_left),
            JsonLinesWriter(self.workdir / METRICS_FILE, step, progress.print),
            TensorBoardWriter(self.workdir / "tensorboard"),
        ]
        return MultiWriter(writers, report=progress.print)

    def _compile(self, progress: Progress) -> jax.stages.Compiled:
        progress.print("compiling the training step ...")
        self.goodput.switch("compilation")
        start = time.perf_counter()
        compiled = self.program.lower().compile()
        check_memory("a training step", step_bytes(compiled, self.program.mesh))
        progress.print(f"compiled in {time.perf_counter() - start:.1f} s")
        progress.restart_clock()
        return compiled

    def _loop(self, state: TrainState, step: int, progress: Progress, writer: MetricWriter) -> int:
        train = self.config.train
        batch = self._next_batch()
        train_step = self._compile(progress)
        constants = self._constants()
        timer = self._timer(state)
        losses, waited, to_save = [], 0.0, False
        self.alarm.restart()
        while True:
            self.goodput.switch("repeated steps" if step < self.seen else PRODUCTIVE)
            self.options.profile.move(step, state.step)
            state, metrics = train_step(state, batch, *constants)
            step += 1
            progress.advance()
            timer.count(waited)
            losses.append(metrics["loss"])
            self.queued.append((step, metrics["loss"], metrics["grad_norm"]))
            self._settle(QUEUED_STEPS)
            last = self.interrupts.poll() is not None or step >= train.steps
            if last or step % train.log_every == 0:
                self._log(writer, step, metrics, losses, timer)
                losses.clear()
            evaluated = {}
            if self._due(step, train.eval_every):
                self.goodput.switch("evaluation")
                evaluated = self._evaluate(writer, step, state.params)
                timer.restart()
            to_save |= self.alarm.poll() | last | _is_multiple(step, train.checkpoint_every)
            if to_save and self._worth_saving(step, evaluated, last):
                # After a save the iterator must be at the next batch, so it is saved before
                # that batch is drawn.
                self.goodput.switch("saving")
                self.checkpoints.save(step, state, self.data, self.config, evaluated)
                self.alarm.restart()
                timer.restart()
                to_save = False
            if last:
                self._confirm_last_checkpoint(progress, step)
                return step
            self.goodput.switch("waiting for data")
            before = time.perf_counter()
            batch = self._next_batch()
            waited = time.perf_counter() - before

    def _constants(self) -> tuple[nnx.State, ...]:
        """What each step is given besides state and batch: the teacher, placed as compiled."""
        if self.options.teacher is None:
            return ()
        params = (_parameters("teacher", self.options.teacher),)
        return jax.tree.map(
            lambda leaf, like: spread(leaf, like.sharding), params, self.program.constants
        )

    def _settle(self, running: int) -> None:
        """Wait until at most so many steps are on the device, and look at those that are done."""
        while len(self.queued) > running:
            step, *figures = self.queued.popleft()
            loss, grad_norm = map(float, jax.device_get(figures))
            self.divergence.count(step, loss, grad_norm)

    def _worth_saving(self, step: int, evaluated: dict[str, float], last: bool) -> bool:
        """Whether the parameters may be good: keep no diverged state in place of one that is."""
        self._settle(0)
        if step >= self.config.train.steps:
            self.divergence.finish(step, evaluated)
            return True
        # An interrupted run goes on, and learns then whether it has diverged.
        return self.divergence.in_a_row < (LIMIT_AT_END if last else 1)

    def _due(self, step: int, every: int) -> bool:
        return step == self.config.train.steps or _is_multiple(step, every)

    def _next_batch(self) -> Batch:
        batch = next(self.data)
        return put_batch({name: batch[name] for name in BATCH_KEYS}, self.program.mesh)

    def _timer(self, state: TrainState) -> StepTimer:
        settings = self.config.data
        devices = list(state.step.devices())
        peak = peak_flops(devices[0].device_kind)
        return StepTimer(
            settings.batch_size * settings.seq_len,
            costs.train_flops_per_token(self.config.model, settings.seq_len),
            self.config.train.peak_flops or (peak and peak * len(devices)),
        )

    def _log(
        self,
        writer: MetricWriter,
        step: int,
        metrics: Metrics,
        losses: list[jax.Array],
        timer: StepTimer,
    ) -> None:
        metrics, losses = jax.device_get((metrics, losses))  # waits for this step to finish
        values = {"loss": float(sum(losses) / len(losses))}  # mean since the last line
        values |= {name: float(metrics[name]) for name in LOGGED} | timer.report()
        timer.restart()
        self._write(writer, step, {f"train/{name}": value for name, value in values.items()})

    def _evaluate(self, writer: MetricWriter, step: int, params: nnx.State) -> dict[str, float]:
        if self.eval_batches is None:
            return {}
        if not self.eval_compiled:
            self.goodput.switch("compilation")
            self.eval_step = self.eval_step.lower(params, self.program.batch).compile()
            self.eval_compiled = True
            self.goodput.switch("evaluation")
        result = evaluate(self.eval_step, params, self.eval_batches, self.program.mesh)
        values = {f"eval/{name}": value for name, value in result.metrics.items()}
        self._write(writer, step, values)
        return values

    def _write(self, writer: MetricWriter, step: int, values: dict[str, float]) -> None:
        self.latest |= values
        writer.write(step, values)

    def _confirm_last_checkpoint(self, progress: Progress, step: int) -> None:
        self.checkpoints.wait()
        saved = self.checkpoints.latest_step
        if self.divergence.in_a_row >= LIMIT_AT_END and step < self.config.train.steps:
            progress.print(
                f"{self.interrupts.agreed}: step {step} is not saved, as the last "
                f"{self.divergence.in_a_row} losses or gradients are not finite; run the same "
                f"command again to go on from {'the start' if saved is None else f'step {saved}'}"
            )
            return
        if saved != step:
            raise CheckpointError(
                f"step {step} could not be saved in {self.workdir}, whose newest checkpoint is "
                f"{'missing' if saved is None else f'step {saved}'}; see the warning above, make "
                "room or give write permission, and run the same command again"
            )
        if self.interrupts.agreed and step < self.config.train.steps:
            progress.print(
                f"{self.interrupts.agreed}: saved step {step} in {self.workdir}; run the same "
                "command again to go on"
            )
        else:
            progress.print(f"saved step {step} in {self.workdir}")


def _parameters(what: str, model: Decoder) -> nnx.State:
    """Those of a model that every process has; refuses one that is not the same on all."""
    params = nnx.state(model, nnx.Param)
    if jax.process_count() > 1:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(params):
            digest.update(np.asarray(leaf).tobytes())
        processes.check_same(what, {"sha256": digest.hexdigest()}, first_difference)
    return params


def _nbytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
