"""The training loop. Kill it at any step: the next call goes on from the last checkpoint as if nothing had happened.

Exactness rests on three things: chance is keyed (`schedule`), the position in the data is a function of the step, and a
checkpoint holds every number that the next step reads (weights, average, optimizer, the guard's memory). What is logged
after the checkpoint is logged again, so `metrics.jsonl` has each step once.
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
from diptych.train import checkpoint, parts, preference, processes, validate
from diptych.train.export import as_loaded
from diptych.train.metrics import METRICS, LossGuard, Metrics, Progress, Trackers, report
from diptych.train.objective import Batch, image_ids, panel_losses, token_style
from diptych.train.parts import Trained
from diptych.train.prepare import Job
from diptych.train.processes import Interrupts
from diptych.train.schedule import Schedule, ahead, draw
from diptych.utils.io import write_atomic
from diptych.utils.machine import attending, computing

SAMPLES = "samples"
TRACKED = "trackers"
STOPPED = "stopped.json"
log = logging.getLogger(__name__)


class Trainer:
    """A job in progress: `step` steps are done."""

    def __init__(self, job: Job) -> None:
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
        self.img_ids = {bucket.canvas: image_ids(bucket.canvas).to(job.device) for bucket in job.buckets}
        self.tokens = token_style(job.options)
        if self.tokens is not None and self.tokens.attention == "self":
            attention.install(self.transformer)
        self.guidance = job.options.guidance if self.transformer.config.guidance_embeds else None
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None  # {"step", "loss"} of the best validation
        self.line: dict[str, Any] | None = None  # metrics of the last step, as its checkpoint has them
        self.exported: int | None = None  # the step whose weights are there, if it is not the last
        self.guard = LossGuard([])
        self.anchor = preference.Anchor(self.trained.local) if job.negatives is not None else None
        self._resume()
        if job.options.compile:
            self.transformer.compile()
        # What training calls: DDP averages the gradients of whole copies, and spread weights do so by themselves.
        copied = several and not self.spread
        self.model = processes.replicate(self.transformer, job.device) if copied else self.transformer
        self._unproven = job.options.compile  # torch.compile was asked for, and no step has run with it yet

    def select(self) -> Trained:
        """What is trained of the transformer, which is put where it is trained."""
        job, precision = self.job, self.options.precision
        return parts.select(self.transformer, self.options, precision, job.device, self.spread, job.columns)

    @property
    def rows(self) -> int:
        """Pairs in one forward pass of this process, with gradients or without."""
        return self.options.micro_batch or self.options.batch_size // self.processes.count

    # What is due after a step; all of it after the last one.

    @property
    def validates(self) -> bool:
        return bool(self.job.validation_rows) and self._is_due(self.options.validate_every)

    @property
    def samples(self) -> bool:
        return self._is_due(self.options.sample_every)

    @property
    def saves(self) -> bool:
        """A checkpoint comes before anything that may fail for want of memory."""
        return self.validates or self.samples or self._is_due(self.options.checkpoint_every)

    def _is_due(self, every: int) -> bool:
        return self.step == self.options.steps or bool(every and self.step % every == 0)

    # One step -----------------------------------------------------------------------------------------------------

    def assemble(self, step: int) -> Batch:
        """This process's share of a step's batch, on the CPU: nothing but (seed, step) decides the batch."""
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
        text, bare = job.text.gather(captions), None if self.tokens is None else dropped
        return Batch(clean, condition, noise, sigma, *text, negative, bare, canvas=bucket.canvas)

    def losses(self, batch: Batch, model: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Left and right loss of each sample, (B,) each, in the job's precision."""
        with computing(self.options.precision, self.job.device):
            model, ids = model or self.transformer, self.img_ids[batch.canvas]
            return panel_losses(model, batch, ids, self.guidance, self.tokens, together=self.spread)

    def advance(self, batch: Batch) -> dict[str, Any]:
        """One optimizer step; its line for the metrics. UserError from the guard leaves the weights as they were."""
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
        """Means over a batch: `loss`, which is descended, and what it is made of."""
        options, wish = self.options, self.options.preference
        if wish is None or self.anchor is None:
            left, right = (side.mean() for side in self.losses(batch, self.model))
            return {"loss": options.left_weight * left + options.right_weight * right, "left": left, "right": right}
        terms = preference.terms(batch, wish, self.anchor, self.losses, self.model)
        loss = options.left_weight * terms["left"] + options.right_weight * terms["right"]
        return {"loss": loss + wish.weight * terms["preference"], **terms}

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Gradients of the weighted loss; the means of its terms over this process's share."""
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
            # No compiler, a graph break that cannot be: training goes on uncompiled, once. Anything else is a fault.
            if not self._unproven or isinstance(error, torch.OutOfMemoryError):
                raise
            log.warning("distill.compile: torch.compile failed here (%s); going on without", str(error).split("\n")[0])
            self._unproven = False
            self.transformer._compiled_call_impl = None
            self.optimizer.zero_grad(set_to_none=True)
            return self._backward(batch)
        self._unproven = False
        return sums

    def _report(self, step: int, numbers: dict[str, float]) -> None:
        """Writes what the guard stopped: the step, its numbers, what was usual, and the samples of its batch."""
        rows = self.order.at(step)
        batch = [{"id": self.job.latents.samples[row].id, "turn": turn} for row, turn in rows]
        # JSON has no word for a number that is none.
        said = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        report = {"step": step, **said, "before": list(self.guard.recent), "batch": batch}
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

    # Judging ------------------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, Any]:
        """Validation loss of the averaged weights; each process computes a part of it."""
        job = self.job
        pairs = validate.HeldOut(job.buckets, job.latents, job.text, job.validation_rows)
        with parts.averaged(self.ema, self.trained), _eager():
            return validate.validation_loss(self.losses, pairs, self.options, self.rows, job.device, self.processes)

    def consider(self, loss: float, marked: bool) -> None:
        """Makes the checkpoint of this step the best one if its validation loss is the lowest so far. `marked`: its
        folder says so already."""
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

    def draw_samples(self) -> None:
        """The sample sheet of this step, drawn with the averaged weights (by all processes: one has only a part)."""
        job = self.job
        rows = (job.validation_rows or job.train_rows)[: self.options.sample_pairs]
        # Spread weights are not swapped: there, adapters in bfloat16 are drawn with up to rounding.
        loaded = nullcontext() if self.spread else as_loaded(self.transformer, self.trained)
        with parts.averaged(self.ema, self.trained), loaded, _eager():
            sheet = validate.sample_sheet(job.pipe, job.buckets, job.latents, job.text, rows, self.options)
        pairs = [job.latents.samples[row].id for row in rows]
        if self.processes.first:
            told = {"step": self.step, "pairs": pairs, "made_from": job.made_from}
            save_image(sheet, self.sheet, told)

    def averages(self) -> dict[str, torch.Tensor]:
        """What is saved in the end: the moving average, or the weights where there is none. All processes call it."""
        return self.trained.tensors() if self.ema is None else self.trained.averages(self.ema)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step, not yet validated: a training that resumes from here validates first."""
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
        made = checkpoint.Checkpoint(self.step, state, tensors)
        with self.processes.together() as first:
            if first:
                checkpoint.save(self.job.folder, made, self.options.keep)

    def _resume(self) -> None:
        found = checkpoint.resume(self.job.folder, self.job.identity(), self.options.steps)
        if found is None:
            return
        self._put(found)
        parts.put_optimizer(self.optimizer, dict(found.tensors["optimizer"]))
        self.step = found.step
        self.seconds = found.state["seconds"]
        self.best = found.state["best"]
        self.line = found.state["line"]
        self.guard = LossGuard(found.state["guard"], found.state["spikes"])
        log.info("going on from step %d of %d", self.step, self.options.steps)

    def take_best(self) -> None:
        """The weights with the best validation loss come in the place of the last ones, to be saved as the student."""
        name = checkpoint.pointer(self.job.folder, checkpoint.BEST)
        if name is not None:
            found = checkpoint.read(self.job.folder / name)
            self._put(found)
            self.exported = found.step

    def _put(self, found: checkpoint.Checkpoint) -> None:
        """A checkpoint's weights and their average."""
        self.trained.put(dict(found.tensors["weights"]))
        if self.ema is not None:
            for shadow, name, parameter in zip(
                self.ema.shadow_params, self.trained.names, self.trained.parameters, strict=True
            ):
                shadow.copy_(processes.local(processes.like(found.tensors["ema"][name], parameter)))
            self.ema.optimization_step = found.state["average_steps"]


def train(job: Job, progress: Progress | None = None, kind: type[Trainer] = Trainer) -> Trainer:
    """Trains until `job.options.steps` steps are done, and returns the trainer with its last weights.

    `kind` is another trainer for something else than a student.

    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt (a second one leaves at once).
    Raises UserError (a step that went wrong, a full disk) and UsageError (a checkpoint of another training).
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
                _judge(trainer, written or trainer.line, metrics, trackers, written is not None)
            steps = range(trainer.step + 1, options.steps + 1)
            for batch in ahead(trainer.assemble, steps, job.device):
                line = trainer.advance(batch)
                if saved := trainer.saves:
                    if metrics is not None:
                        metrics.sync()
                    trainer.save()
                _judge(trainer, line, metrics, trackers)
                text = f"loss {line['loss']:.4f} (left {line['left']:.4f}, right {line['right']:.4f})"
                report(progress, trainer.step, options.steps, text)
                # Read once: what is asked from here on is answered after the next step.
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


def _judge(
    trainer: Trainer, line: dict[str, Any], metrics: Metrics | None, trackers: Trackers, written: bool = False
) -> None:
    """Validates and samples if it is time, and writes the step's line. `written`: a training that was stopped here had
    got as far as that."""
    if trainer.validates and not written:
        line["validation"] = trainer.validate()
    if "validation" in line:
        trainer.consider(line["validation"]["loss"], marked=written)
    if metrics is not None and not written:
        metrics.write(line)
        trackers.log(line)
    drawn = written and trainer.job.processes.shared(trainer.sheet.exists())
    if trainer.samples and not drawn:
        trainer.draw_samples()


def _eager() -> Any:
    """Validation and sampling run uncompiled: another graph for a few forward passes costs more than it saves."""
    return torch.compiler.set_stance("force_eager")
