"""The training loop. It can be killed at any step; the next call resumes exactly from the last checkpoint.

Three properties make this exact: random values are keyed (`schedule`), the position in the data is a function of the
step, and a checkpoint has every value that the next step needs (weights, average, optimizer, the guard's losses). Lines
after the checkpoint are dropped and logged again, so `metrics.jsonl` has each step once.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from diptych.data.images import save_image
from diptych.errors import UsageError, UserError
from diptych.student import attention
from diptych.student.families.base import embedded
from diptych.train import checkpoint, parts, preference, processes, validate
from diptych.train.export import as_loaded
from diptych.train.metrics import METRICS, LossGuard, Metrics, Progress, Trackers, report
from diptych.train.objective import Batch, panel_losses, token_style
from diptych.train.parts import Trained
from diptych.train.prepare import TrainingJob
from diptych.train.processes import Interrupts
from diptych.train.schedule import Schedule, ahead, draw
from diptych.utils.io import write_atomic
from diptych.utils.machine import attending, computing

SAMPLES = "samples"
TRACKED = "trackers"
STOPPED = "stopped.json"
log = logging.getLogger(__name__)


class Trainer:
    """A training in progress, with `step` steps done."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.options = job.options
        self.transformer = job.pipe.transformer
        self.processes = job.processes
        several = self.processes.count > 1
        if several and job.options.offload != "none":
            raise UsageError(
                "recipe_conflict",
                "distill.offload: blocks works only on one card. For several cards, set distill.sharding=full.",
            )
        self.spread = several and job.options.sharding == "full"  # each process has a part of the weights
        self.trained = self.select()
        self.optimizer = parts.optimizer(self.trained, job.options)
        self.ema = parts.moving_average(self.trained, job.options)
        self.order = Schedule(
            job.train_rows, job.latents, job.material.weights, job.options.batch_size, job.options.seed or 0
        )
        self.tokens = token_style(job.options)
        if self.tokens is not None and self.tokens.attention == "self":
            attention.install(self.transformer)
        self.guidance = embedded(self.transformer, job.options.guidance)
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None  # {"step", "loss"} of the best validation
        self.line: dict[str, Any] | None = None  # metrics of the last step, as its checkpoint has them
        self.exported: int | None = None  # the step of the current weights, if it is not the last
        self.guard = LossGuard([])
        self.anchor = preference.Anchor(self.trained.local) if job.negatives is not None else None
        self._resume()
        if job.options.compile:
            self.transformer.compile()
        # The model of forward passes: DDP averages gradients of copies, while sharded weights average theirs.
        copied = several and not self.spread
        self.model = processes.replicate(self.transformer, job.device) if copied else self.transformer
        self._unproven = job.options.compile  # no step has run with torch.compile yet

    def select(self) -> Trained:
        """The trained parameters of the transformer, which moves to its device."""
        job, precision = self.job, self.options.precision
        return parts.select(self.transformer, self.options, precision, job.device, self.spread, job.columns)

    @property
    def rows(self) -> int:
        """Pairs in one forward pass of this process, with gradients or without."""
        return self.options.micro_batch or self.options.batch_size // self.processes.count

    # What is due after a step. After the last step, everything is.

    @property
    def validates(self) -> bool:
        return bool(self.job.validation_rows) and self._is_due(self.options.validate_every)

    @property
    def samples(self) -> bool:
        return self._is_due(self.options.sample_every)

    @property
    def saves(self) -> bool:
        """A checkpoint precedes validation and samples, which may run out of memory."""
        return self.validates or self.samples or self._is_due(self.options.checkpoint_every)

    def _is_due(self, every: int) -> bool:
        return self.step == self.options.steps or bool(every and self.step % every == 0)

    # One step -----------------------------------------------------------------------------------------------------

    def next_batch(self, step: int) -> Batch:
        """This process's share of a step's batch, on the CPU. The batch is a function of (seed, step)."""
        job = self.job
        places = self.processes.share(self.order.at(step))
        clean, condition = job.latents.gather([row for row, _ in places])
        samples = [job.latents.samples[row] for row, _ in places]
        bucket = job.buckets[samples[0].bucket]
        options = self.options.model_copy(update={"shift": bucket.shift})
        shape = job.latents.shape(places[0][0])
        draws = [draw(options, s.id, epoch, shape) for s, (_, epoch) in zip(samples, places, strict=True)]
        captions = ["" if d.drop_text else s.text(d.instruct) for s, d in zip(samples, draws, strict=True)]
        dropped = torch.tensor([chance.drop_reference for chance in draws])
        if self.tokens is None:
            condition[dropped] = 0
        sigma = torch.tensor([d.sigma for d in draws])
        negative = job.negatives.gather([row for row, _ in places]) if job.negatives is not None else None
        noise = torch.stack([d.noise for d in draws])
        text, bare = job.family.text(job.text.gather(captions)), None if self.tokens is None else dropped
        given = (noise, sigma, text.embeds, text.pooled, negative, bare, text.mask)
        return Batch(clean, condition, *given, canvas=bucket.canvas)

    def losses(self, batch: Batch, model: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Left and right loss of each sample, (B,) each, in the job's precision."""
        with computing(self.options.precision, self.job.device):
            given: dict[str, Any] = {"together": self.spread, "family": self.job.family}
            return panel_losses(model or self.transformer, batch, self.guidance, self.tokens, **given)

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """Takes one optimizer step and returns its line for the metrics. If the guard raises UserError, the weights are
        unchanged."""
        options, step = self.options, self.step + 1
        started = time.perf_counter()
        means = self._backward(batch)
        means = dict(zip(means, self.processes.mean(list(means.values())), strict=True))
        norm = processes.whole(torch.nn.utils.clip_grad_norm_(self.trained.parameters, options.grad_clip)).item()
        loss = means["loss"]
        with self.processes.together():
            try:
                self.guard.check(step, loss, norm, self._advice())
            except UserError:
                self._report(step, {**means, "grad_norm": norm})
                raise
        rate = parts.learning_rate(step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.ema is not None:
            self.ema.step(self.trained.local)
        self.optimizer.zero_grad(set_to_none=True)
        self.step = step
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.line = {
            "step": step,
            **means,
            "grad_norm": norm,
            "learning_rate": rate,
            "epoch": (step * options.batch_size - 1) // self.order.epoch_size,
            "seconds": round(seconds, 4),
        }
        return self.line

    def _terms(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Means over a batch: `loss`, which is minimized, and its terms."""
        options, settings = self.options, self.options.preference
        if settings is None or self.anchor is None:
            left, right = (side.mean() for side in self.losses(batch, self.model))
            return {"loss": options.left_weight * left + options.right_weight * right, "left": left, "right": right}
        terms = preference.terms(batch, settings, self.anchor, self.losses, self.model)
        loss = options.left_weight * terms["left"] + options.right_weight * terms["right"]
        return {"loss": loss + settings.weight * terms["preference"], **terms}

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Computes the gradients of the weighted loss. Returns the means of its terms over this process's share."""
        total = len(batch.sigma)
        micro = batch.split(self.rows)
        sums: dict[str, float] = {}
        try:
            for number, part in enumerate(micro, 1):
                share = len(part.sigma) / total
                part = part.map(lambda tensor: tensor.to(self.job.device, non_blocking=True))
                kernel = attending(self.options.precision, self.job.device)
                with kernel, processes.accumulating(self.model, more=number < len(micro)):
                    terms = {name: share * term for name, term in self._terms(part).items()}
                    terms["loss"].backward()
                sums = {name: sums.get(name, 0.0) + term.item() for name, term in terms.items()}
        except (RuntimeError, OSError) as error:
            # Without a compiler, or at an unsupported graph break, training continues uncompiled. Other errors are
            # faults.
            if not self._unproven or isinstance(error, torch.OutOfMemoryError):
                raise
            log.warning("distill.compile: torch.compile failed (%s). Training uncompiled.", str(error).split("\n")[0])
            self._unproven = False
            self.transformer._compiled_call_impl = None
            self.optimizer.zero_grad(set_to_none=True)
            return self._backward(batch)
        self._unproven = False
        return sums

    def _report(self, step: int, numbers: dict[str, float]) -> None:
        """Writes a report on a step that the guard stopped: its numbers, the losses before, and its batch's samples."""
        rows = self.order.at(step)
        batch = [{"id": self.job.latents.samples[row].id, "turn": turn} for row, turn in rows]
        # JSON has no NaN and no infinity.
        values = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        report = {"step": step, **values, "before": list(self.guard.recent), "batch": batch}
        if self.processes.first:
            write_atomic(self.job.folder / STOPPED, (json.dumps(report, indent=1) + "\n").encode())

    def _advice(self) -> str:
        last = checkpoint.pointer(self.job.folder, checkpoint.LATEST)
        state = f"The last good checkpoint is {last}" if last else "There is no checkpoint yet"
        remedy = "Lower distill.learning_rate, raise distill.warmup"
        if self.options.precision == "bfloat16":
            remedy += ", or set distill.precision=float32"
        return (
            f"Training stopped before this step changed the weights. {state}. {self.job.folder / STOPPED} lists the "
            f"batch. {remedy}, and train in a new --out."
        )

    # Validation and samples ---------------------------------------------------------------------------------------

    def validate(self) -> dict[str, Any]:
        """Validation loss of the averaged weights, of which each process computes a part."""
        job = self.job
        pairs = validate.HeldOut(job.buckets, job.latents, job.text, job.validation_rows, job.family)
        with parts.averaged(self.ema, self.trained), _eager():
            return validate.validation_loss(self.losses, pairs, self.options, self.rows, job.device, self.processes)

    def consider(self, loss: float, marked: bool) -> None:
        """Makes this step's checkpoint the best one if its validation loss is the lowest so far. With `marked`, the
        folder has that mark already."""
        if self.best is not None and loss >= self.best["loss"]:
            return
        self.best = {"step": self.step, "loss": loss}
        with self.processes.together() as first:
            if first and not marked:
                checkpoint.mark_best(self.job.folder, self.step)

    @property
    def sheet(self) -> Path:
        """The file of this step's sample sheet."""
        return self.job.folder / SAMPLES / f"step-{self.step:06d}.png"

    def generate_samples(self) -> None:
        """Writes this step's sample sheet, generated with the averaged weights, by all processes, because one may have
        only a part of them."""
        job = self.job
        rows = (job.validation_rows or job.train_rows)[: self.options.sample_pairs]
        # Sharded weights are not swapped, so their images differ from those of a bfloat16 LoRA file by rounding.
        loaded = nullcontext() if self.spread else as_loaded(self.transformer, self.trained)
        with parts.averaged(self.ema, self.trained), loaded, _eager():
            sheet = validate.sample_sheet(job.pipe, job.buckets, job.latents, job.text, rows, self.options)
        pairs = [job.latents.samples[row].id for row in rows]
        if self.processes.first:
            save_image(sheet, self.sheet, {"step": self.step, "pairs": pairs, "made_from": job.made_from})

    def averages(self) -> dict[str, torch.Tensor]:
        """The exported weights: the moving average, or the weights if there is none. All processes must call this."""
        return self.trained.tensors() if self.ema is None else self.trained.averages(self.ema)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of this step before its validation. A training that resumes from it validates first."""
        tensors = {"weights": self.trained.tensors(), "optimizer": parts.optimizer_tensors(self.optimizer)}
        average = 0
        if self.ema is not None:
            tensors["ema"] = self.averages()
            average = self.ema.optimization_step
        state = {
            "samples_seen": self.step * self.options.batch_size,
            "seconds": self.seconds,
            "average_steps": average,
            "guard": list(self.guard.recent),
            "spikes": self.guard.spikes,
            "best": self.best,
            "line": self.line,
            "identity": self.job.identity(),
            "torch": torch.__version__,
        }
        with self.processes.together() as first:
            if first:
                made = checkpoint.Checkpoint(self.step, state, tensors)
                checkpoint.save(self.job.folder, made, self.options.keep)

    def _resume(self) -> None:
        last = checkpoint.resume(self.job.folder, self.job.identity(), self.options.steps)
        if last is None:
            return
        self._load(last)
        parts.put_optimizer(self.optimizer, dict(last.tensors["optimizer"]))
        self.step = last.step
        self.seconds = last.state["seconds"]
        self.best = last.state["best"]
        self.line = last.state["line"]
        self.guard = LossGuard(last.state["guard"], last.state["spikes"])
        log.info("resuming from step %d of %d", self.step, self.options.steps)

    def take_best(self) -> None:
        """Replaces the last weights by those with the best validation loss, for the export."""
        name = checkpoint.pointer(self.job.folder, checkpoint.BEST)
        if name is not None:
            best = checkpoint.read(self.job.folder / name)
            self._load(best)
            self.exported = best.step

    def _load(self, stored: checkpoint.Checkpoint) -> None:
        """Loads a checkpoint's weights and their average."""
        self.trained.put(dict(stored.tensors["weights"]))
        if self.ema is not None:
            for shadow, name, parameter in zip(
                self.ema.shadow_params, self.trained.names, self.trained.parameters, strict=True
            ):
                shadow.copy_(processes.local(processes.like(stored.tensors["ema"][name], parameter)))
            self.ema.optimization_step = stored.state["average_steps"]


def train(job: TrainingJob, progress: Progress | None = None, kind: type[Trainer] = Trainer) -> Trainer:
    """Trains until `job.options.steps` steps are done, and returns the trainer with its last weights.

    `kind` is the trainer's class. Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt; a second
    one interrupts immediately.

    Raises:
        UserError: a diverged step, or a full disk.
        UsageError: a checkpoint of another training.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    trainer = kind(job)
    options = job.options
    first = job.processes.first
    trackers = Trackers(options.trackers if first else (), job.folder / TRACKED, job.name, job.identity())
    metrics = Metrics(job.folder / METRICS, trainer.step) if first else None
    try:
        with Interrupts() as interrupts:
            if trainer.line is not None:
                written = job.processes.shared(metrics.of(trainer.step) if metrics is not None else None)
                _after_step(trainer, written or trainer.line, metrics, trackers, written is not None)
            steps = range(trainer.step + 1, options.steps + 1)
            for batch in ahead(trainer.next_batch, steps, job.device):
                line = trainer.train_step(batch)
                if saved := trainer.saves:
                    if metrics is not None:
                        metrics.sync()
                    trainer.save()
                _after_step(trainer, line, metrics, trackers)
                text = f"loss {line['loss']:.4f} (left {line['left']:.4f}, right {line['right']:.4f})"
                report(progress, trainer.step, options.steps, text)
                # Read once, so that a later signal takes effect after the next step.
                stopping = job.processes.most(interrupts.received or 0)
                if stopping and trainer.step < options.steps:
                    if not saved:
                        trainer.save()
                    raise KeyboardInterrupt if stopping == signal.SIGINT else SystemExit(128 + stopping)
        if metrics is not None:
            metrics.sync()
    finally:
        if metrics is not None:
            metrics.close()
        trackers.close()
    return trainer


def _after_step(
    trainer: Trainer, line: dict[str, Any], metrics: Metrics | None, trackers: Trackers, written: bool = False
) -> None:
    """Validates and samples if they are due, and writes the step's line, unless it is already `written`, by a training
    that stopped after that."""
    if trainer.validates and not written:
        line["validation"] = trainer.validate()
    if "validation" in line:
        trainer.consider(line["validation"]["loss"], marked=written)
    if metrics is not None and not written:
        metrics.write(line)
        trackers.log(line)
    exists = written and trainer.job.processes.shared(trainer.sheet.exists())
    if trainer.samples and not exists:
        trainer.generate_samples()


def _eager() -> Any:
    """A context without compilation, for validation and samples: compiling costs more than a few forward passes."""
    return torch.compiler.set_stance("force_eager")
