"""The mechanics of a training run, the same in all scripts: start, resume, log, save, stop, end."""

import argparse
import contextlib
import copy
import math
import shlex
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from training.checkpoint import (
    claim_run_folder,
    compare_with_run,
    load_training,
    note_start,
    save_training,
    saved_flags,
)
from training.files import write_json
from training.launch import InputError, Stopped, check, fail
from training.memory import check_device, fit_micro_batch
from training.plan import (
    BatchPlan,
    LengthPlan,
    Plan,
    compare_batch,
    describe_images,
    describe_run,
    plan_batch,
    plan_learning_rate,
    plan_length,
)
from training.processes import Crew, start_accelerator
from training.progress import BAR, DamagedImages, Progress, Rehearsal, best_of, truncate_log
from training.resolve import ImageFormat
from training.run_folder import RunFolder
from training.schedule import is_due
from training.sharding import configure_sharding, wrap
from training.trackers import finish_trackers, start_trackers
from training.upload import Uploader, check_token
from training.wording import as_flags


class Run:
    """One training run: start, resume, log, save and stop. The forward pass and the loss stay in the script.

    A script uses it in this order: `refusing` and `gate` while data and weights are opened, `fill_in`,
    `plan_steps`, `compare`, `prepare`, `resume`; in the loop `steps`, `is_due`, `paused`, `record`, `completed`; then
    `end`. Every process must make the same calls. If the run is asked to stop, see `training.processes.Crew`,
    `completed` and `watch` save and raise Stopped on all processes, which ends the script with exit code 0.

    Args:
        flags: the parsed flags of the script, which are never modified.
        errors: error messages for the flags. If there are any, the constructor exits; those of the batch come later.
        default_batch_size: the global batch if no flag gives one; None for 256 images per process.
    """

    def __init__(self, flags: argparse.Namespace, errors: list[str], *, default_batch_size: int | None = None):
        self.given, self.errors = flags, list(errors)
        speed = dict(tf32=flags.tf32, compiled=flags.compile, deterministic=flags.deterministic)
        self.accelerator, problems = start_accelerator(flags.mixed_precision, **speed)
        self.errors += problems
        self.device, self.is_main_process = self.accelerator.device, self.accelerator.is_main_process
        self.process_index, self.num_processes = self.accelerator.process_index, self.accelerator.num_processes
        pin_memory = self.device.type == "cuda" if flags.pin_memory is None else flags.pin_memory
        self.loading = dict(num_workers=flags.num_workers, pin_memory=pin_memory)  # the options of `training_batches`
        trains = not getattr(flags, "eval_only", False)
        automatic = trains and flags.micro_batch_size == "auto"
        options = dict(compiled=flags.compile, auto_micro_batch=automatic, optimizer=getattr(flags, "optimizer", None))
        checkpointing, problems = configure_sharding(self.accelerator, **options)
        self.gradient_checkpointing = flags.gradient_checkpointing or checkpointing
        self.errors += problems + (check_device(self.device) if automatic else [])
        self.crew = Crew(flags.time_limit)
        self.claim = RunFolder(Path(flags.working_directory) / flags.experiment_name)
        self.folder = self.claim.path
        self.checkpoint, self.state, problems = claim_run_folder(
            self.claim, flags.resume_from_checkpoint, write=not flags.dry_run, resumable=trains
        )
        self.errors += problems + (check_token() if flags.push_to_hub else [])
        self.start_step = self.step = self.state.get("step", 0)
        with self.refusing(InputError):
            self.previous = saved_flags(self.checkpoint)  # the flags of the run to resume, or {}
        self.gate()
        self.batch: BatchPlan | None = None
        with self.refusing(InputError):
            self._plan_batch(default_batch_size)

    # Gates: errors in the input are collected, and printed together

    @contextlib.contextmanager
    def refusing(self, *kinds: type[Exception], flag: str = "") -> Iterator[None]:
        """Collect exceptions of these kinds as error messages for the next gate; `flag` is put before each line.

        A block that needs a variable of a refused block is skipped. After the gate, all variables exist.
        """
        try:
            yield
        except UnboundLocalError:  # a refused block did not assign the variable; a misspelt one is a plain NameError
            if not self.errors:
                raise
        except kinds as error:
            remedy = f"; give {as_flags(error.settings)}" if getattr(error, "settings", None) else ""
            lines = (error.message + remedy if remedy else str(error)).splitlines()
            self.errors += [f"{flag} {line}" if flag else line for line in lines]

    def gate(self, differences: Callable[[], list[str]] = list) -> None:
        """Exit with code 2 if any process has collected errors or, if none has, if `differences()` returns some."""
        errors = self.crew.gather(self.errors) or differences()
        if errors:
            self.claim.release()
            fail(errors, show=self.is_main_process)

    def _plan_batch(self, default: int | None) -> None:
        flags, names = self.given, ("global_batch_size", "per_gpu_batch_size", "micro_batch_size")
        if getattr(flags, "eval_only", False):  # nothing trains: the flags for training are not read
            size = flags.micro_batch_size if isinstance(flags.micro_batch_size, int) else default or 256
            self.batch = BatchPlan(size * self.num_processes, size, size)
            return
        self.batch = plan_batch(
            **{name: getattr(flags, name) for name in (*names, "gradient_accumulation_steps")},
            num_processes=self.num_processes,
            checkpoint_size=self.state.get("global_batch_size"),
            default=default,
        )

    def fill_in(self, recipe: dict) -> argparse.Namespace:
        """Return the flags; those left out, except the warmup, come from the run to resume or else the `recipe`."""
        known = {name: self.previous.get(name, recipe[name]) for name in recipe.keys() - {"warmup_epochs"}}
        given = {name: value for name, value in vars(self.given).items() if value is not None}
        self.given = argparse.Namespace(**{**vars(self.given), **known, **given})
        return self.given

    def plan_steps(self, num_samples: int, check_micro_batch: Callable[[int], list[str]], **defaults) -> None:
        """Plan the number of steps from the samples of an epoch, all views counted.

        Args:
            check_micro_batch: returns error messages for a size of micro-batches.
            defaults: the recipe's options of `plan_length`.

        Raises:
            InputError: for a length or learning rate that does not fit, or a micro-batch that is refused.
        """
        if self.batch is None:
            raise InputError  # without a line: the next gate prints those of the batch
        flags, self.check_micro_batch = self.given, check_micro_batch
        check(check_micro_batch(self.batch.micro))
        base, low = getattr(flags, "base_learning_rate", None), flags.min_learning_rate
        peak = plan_learning_rate(flags.learning_rate, base, low, self.batch.global_size)
        keeps_warmup = flags.warmup_steps is None and flags.warmup_epochs is None
        length = plan_length(
            epochs=flags.epochs,
            max_steps=flags.max_steps,
            warmup_epochs=flags.warmup_epochs,
            warmup_steps=self.previous.get("warmup_steps") if keeps_warmup else flags.warmup_steps,
            num_samples=num_samples,
            global_batch_size=self.batch.global_size,
            **defaults,
        )
        self.plan = Plan(self.batch, length, peak, low)

    def compare(self, resolved: dict, train_source, validation_source, *, defaults: dict) -> None:
        """Compare flags and data with the run to resume and between the processes; end the run if they differ.

        Args:
            resolved: flags whose values follow from data and weights.
            defaults: default flags, for those that did not exist when an older run was saved.
        """
        flags = {**vars(self.given), **self.plan.flags, **resolved}
        flags["mixed_precision"] = self.accelerator.mixed_precision
        flags |= dict(self.loading, gradient_checkpointing=self.gradient_checkpointing)
        self.flags, self.sources = flags, (train_source, validation_source)
        self.fingerprints = [source.fingerprint() if source else None for source in self.sources]
        if self.checkpoint:
            derived = {name for name in self.plan.flags if getattr(self.given, name, None) is None}
            options = dict(before={**defaults, **self.previous}, derived=derived)
            self.errors += compare_with_run(self.checkpoint, flags, self.fingerprints[0], **options)
            sizes = self.given.global_batch_size, self.given.per_gpu_batch_size
            self.errors += compare_batch(*sizes, self.batch.global_size, self.num_processes)
        self.gate(lambda: self.crew.differences(flags, self.fingerprints))

    # Start

    def fit_micro_batch(self, step: Callable, model, optimizer) -> None:
        """Choose the largest micro-batch that fits on the GPUs, for --micro_batch_size auto.

        A resumed run keeps its size, because others round differently, unless that is too large.

        Args:
            step: takes one optimizer step, given copies of model and optimizer, and a micro-batch size.
        """
        model.to(self.device)
        per_process, before = self.batch.per_process, self.state.get("micro_batch_size")
        sizes = [n for n in range(1, per_process + 1) if per_process % n == 0 and not self.check_micro_batch(n)]
        sizes = [size for size in sizes if size <= before] if before in sizes else sizes
        micro = fit_micro_batch(
            sizes,
            lambda size: step(*copy.deepcopy((model, optimizer)), size),
            device=self.device,
            any_process=self.crew.any,
        )
        self.accelerator.step = 0  # the micro-batches of the trials are not counted
        self.batch = self.batch._replace(micro=micro)
        self.plan = self.plan._replace(batch=self.batch)
        self.flags |= dict(micro_batch_size=micro, gradient_accumulation_steps=self.batch.accumulation)

    def print_plan(self, model: list[str], images: ImageFormat, *, decay: str | None = None, **data) -> None:
        """Print the plan.

        Args:
            model: the script's lines, about its model and recipe.
            decay: see `describe_run`.
            data: options of `describe_images`.
        """
        tf32 = self.given.tf32 and self.accelerator.mixed_precision == "no" and self.device.type != "cpu"
        speed = ["TF32"] * tf32 + ["deterministic"] * self.given.deterministic + ["compile"] * self.given.compile
        speed += ["gradient checkpointing"] * self.gradient_checkpointing + ["FSDP2"] * self.accelerator.is_fsdp2
        lines = describe_images(self.given.path_to_data, *self.sources, **data) + model
        self.accelerator.print("\n".join(lines + describe_run(self.plan, images, self.accelerator, speed, decay=decay)))

    def prepare(self, model, optimizer, *, average=None) -> tuple:
        """Prepare model and optimizer with Accelerate, and return both.

        Args:
            average: a module whose weights are the moving average of the model's, to be kept in checkpoints.
        """
        self.accelerator.gradient_accumulation_steps = self.batch.accumulation
        self.model, self.optimizer, self.plain_model = wrap(self.accelerator, model, optimizer)
        self.average = average
        return self.model, self.optimizer

    def prepare_sources(self) -> None:
        """Prepare the data sources: render or open their files."""
        for source in dict.fromkeys(self.sources):
            if source:
                source.prepare(processes=self.given.num_workers or 1, progress=self.is_main_process)

    def start_evaluation(self, resolved: dict, source, content: dict) -> None:
        """Start a run that trains nothing and measures a trained model on one source, see `compare` and `resume`."""
        self.plan = Plan(self.batch, LengthPlan(1, 0, 0), 0.0, 0.0)
        self.compare(resolved, source, source, defaults={})
        self.model = self.optimizer = self.average = None
        self.prepare_sources()
        self.resume(content)

    @property
    def needs_warm_up(self) -> bool:
        """True if a step must precede loading a checkpoint: DDP sums gradients in another order in its first step."""
        return self.checkpoint is not None and self.num_processes > 2

    @property
    def sampling(self) -> dict:
        """The options of `StepSampler` for this process; a dry run may take more steps than the run has."""
        return dict(
            global_batch_size=self.batch.global_size,
            micro_batch_size=self.batch.micro,
            steps=range(self.start_step, 2**40 if self.given.dry_run else self.plan.length.total_steps),
            seed=self.given.seed,
            process_index=self.process_index,
            num_processes=self.num_processes,
        )

    def resume(self, content: dict) -> None:
        """Write args.json, load the checkpoint, and start trackers, bar and log.

        Args:
            content: the content of args.json beside flags and environment.
        """
        flags, writes, measured = self.given, not self.given.dry_run, [{}]
        if self.is_main_process and writes:
            if self.model is not None:  # an evaluation removes nothing
                self.claim.clear_beyond(self.start_step)
            content = {"flags": self.flags, **content}
            note_start(self.folder, content, self.start_step, self.num_processes, fresh=not self.checkpoint)
            measured = [truncate_log(self.folder, self.start_step)]
        (self.metrics,) = broadcast_object_list(measured)  # of the validation after `start_step`, if it was finished
        if self.checkpoint:
            load_training(self.checkpoint, self.accelerator, self.model, self.optimizer, ema=self.average)
            self.accelerator.print(f"resuming from {self.checkpoint}, after step {self.start_step}")
        if writes:
            options = dict(flags=self.flags, start_step=self.start_step, project=flags.experiment_name)
            start_trackers(self.accelerator, self.folder, flags.report_to, run_name=flags.wandb_run_name, **options)
        self.accelerator.wait_for_everyone()
        options = dict(log_every=flags.log_every, start_step=self.start_step, seconds=self.state.get("seconds", 0.0))
        self.progress = Progress(self.accelerator, self.folder, self.plan, **options)
        self.timed = lambda batches: self.progress.timed(self.crew.watch(batches))
        self.paused, self.say = self.progress.paused, self.progress.say
        num_images = sum(len(source) for source in {*self.sources} if source)
        replace = flags.on_damaged == "replace"
        options = dict(is_main_process=self.is_main_process and writes, replace=replace)
        self.damaged_images, self.new_damage = DamagedImages(self.folder, num_images, **options), []
        steps_per_epoch = self.plan.length.steps_per_epoch
        repository = flags.hub_model_id if self.is_main_process else None
        options = dict(every=flags.hub_every * steps_per_epoch, private=flags.hub_private)
        self.uploader = Uploader(self.folder, repository, **options)
        self.save_every = flags.save_checkpoint_steps or math.ceil(flags.save_checkpoint_interval * steps_per_epoch)
        read_ahead = math.ceil(2 * flags.num_workers / self.batch.accumulation)
        self.rehearsal = Rehearsal(self.progress, self.crew, read_ahead=read_ahead) if flags.dry_run else None

    # The loop

    @property
    def steps(self) -> Iterator[int]:
        """Yield the number of completed steps, without end: the script breaks at the last, a dry run raises Stopped."""
        self.crew.begin()
        for step in count(self.start_step):
            if step > self.start_step:
                self.metrics = {}
            self.step = min(step, self.plan.length.total_steps - 1) if self.rehearsal else step
            yield self.step

    def is_due(self, step: int, every: float, metric: str) -> bool:
        """Return True if the validation that logs `metric` is due after a step: every so many steps and at the end.

        A resumed run whose log has the metric for this step skips it. `every` is 0 for only at the end.
        """
        if self.rehearsal or metric in self.metrics:
            return False
        return step == self.plan.length.total_steps or is_due(step, every)

    def completed(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, damaged: list[tuple[int, str]]) -> None:
        """Log and save a completed step if they are due; then stop if the run is asked to.

        Args:
            loss, grad_norm: of this process, on the device.
            damaged: index and reason of training images that could not be read.

        Raises:
            Stopped: on all processes, after a checkpoint was saved or a dry run has measured its steps.
            RunError: for losses that are not finite, too many damaged images, a checkpoint that cannot be written.
        """
        self.new_damage += [(self.sources[0].name(index), reason) for index, reason in damaged]
        if self.rehearsal:
            if self.rehearsal.completed(loss):
                if images := dict(self.crew.gather(self.new_damage)):
                    self.say(f"damaged    {len(images)} of {len(self.sources[0])} images so far, such as {min(images)}")
                self._leave()
                raise Stopped
            return
        self.uploader.after(self.step)  # whose checkpoint and validation are complete
        self.step = step
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)  # the head's
        logged = self.progress.step(step, loss, grad_norm, learning_rate)
        stopping = self.crew.stop_requested(after_step=True)
        if logged or (self.given.on_damaged == "error" and self.crew.any(bool(self.new_damage))):
            self.note_damage()
        is_last = step == self.plan.length.total_steps
        if stopping or is_last or is_due(step, self.save_every, self.uploader.every):
            self.save()
        if stopping:
            self._stop()

    @property
    def checking(self) -> dict:
        """The options of `check_annotations` for this process."""
        workers = dict(processes=self.given.num_workers or 1, progress=self.is_main_process, say=self.accelerator.print)
        return dict(share=slice(self.process_index, None, self.num_processes), gather=self.crew.gather, **workers)

    @property
    def reading(self) -> dict:
        """The options of `own_batches` for this process."""
        return dict(self.loading, process_index=self.process_index, num_processes=self.num_processes, watch=self.watch)

    def watch(self, batches: range, title: str = "validation") -> Iterator[int]:
        """Yield the numbers of the batches of a validation, with a bar in a terminal, until the run is asked to stop.

        Raises:
            Stopped: at the end, on all processes, after a checkpoint was saved (none in an evaluation or a dry run).
        """
        for batch in tqdm(batches, desc=title, unit="batch", disable=not self.is_main_process or None, **BAR):
            if self.crew.stop_requested():
                break
            yield batch
        if self.crew.stop_requested():
            if saves := self.model is not None and not self.rehearsal:
                self.save()
            self._stop(saves)

    def record(self, metrics: dict, text: str) -> None:
        """Log metrics of a validation after the current step, and print `text` above the bar.

        Call this last: a resumed run skips validations whose metrics are in the log.
        """
        self.metrics = {**self.metrics, **metrics}
        self.say(text)
        self.progress.write({"step": self.step, "epoch": self.epoch, **metrics})

    @property
    def epoch(self) -> float:
        """The number of passes over the data after the current step."""
        return self.step / self.plan.length.steps_per_epoch

    def is_best(self, metric: str, metrics: dict) -> bool:
        """Return True on the main process if a metric is better than all in the log."""
        value = metrics[metric]
        return self.is_main_process and value is not None and value > best_of(self.folder, metric)[0]

    def note_damage(self, images: Iterable[tuple[str, str]] = ()) -> None:
        """Write damaged images, (path, reason) each, and those found in training, to damaged.jsonl."""
        self.damaged_images.add(self.crew.gather([*self.new_damage, *images]))
        self.new_damage.clear()

    def save(self) -> None:
        """Write the checkpoint of the current step."""
        with self.progress.paused(), self.crew.saving():
            self.note_damage()
            self.progress.check_finite()
            state = dict(step=self.step, epoch=self.epoch, global_batch_size=self.batch.global_size)
            state |= dict(data=self.fingerprints[0], seconds=self.progress.seconds, micro_batch_size=self.batch.micro)
            options = dict(keep=self.given.keep_checkpoints, ema=self.average)
            save_training(self.claim, self.accelerator, self.crew, self.model, self.optimizer, state, **options)

    def _stop(self, saved: bool = True) -> None:
        nothing = "stopped before the end; nothing was measured"
        self.say(self.crew.describe_stop(self.step, start_step=self.start_step) if saved else nothing)
        self._leave()
        raise Stopped

    def _leave(self) -> None:
        self.progress.bar.close()
        finish_trackers(self.accelerator)
        self.accelerator.end_training()

    def end(self, text: str, *, best: str | None = None, **metrics) -> None:
        """Write metrics.json, print where the results are, and push the run to the Hub if asked to.

        Args:
            text: where the results are.
            best: a metric whose best value and step are reported as `best_METRIC` and `best_step`.
            metrics: further content of metrics.json, beside step, speed of the whole run and last validation.
        """
        self.note_damage()
        self.progress.bar.close()
        if self.is_main_process:
            seconds = self.progress.seconds
            num_images = len(self.sources[1]) if self.model is None else self.step * self.batch.global_size
            speed = dict(seconds=round(seconds, 1), images_per_second=round(num_images / seconds, 2))
            if best:
                metrics[f"best_{best}"], metrics["best_step"] = best_of(self.folder, best)
            metrics = {"step": self.step, "epoch": self.epoch, **speed, **self.metrics, **metrics}
            write_json(self.folder / "metrics.json", metrics)
            if best and (trained := self.folder / "best").is_dir():
                text += f". Use the model:\n  python predict.py {shlex.quote(str(trained))} PHOTOS"
            print(f"finished: {text}")
        self._leave()
        self.uploader.finish(stop=lambda: bool(self.crew.signal_name))  # last: no other process waits for it
