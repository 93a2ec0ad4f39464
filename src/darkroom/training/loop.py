"""The training loop: one for the first stage and the denoiser.

A stage is a `TrainStep`: a list of phases, each one forward of one module (so that DDP can wrap it) with an optimiser
of its own. A step without several phases is simply one phase. The loop owns everything else: micro-batches, clipping,
averages, learning rate, non-finite values, checkpoints, metrics and the progress bar.

Every draw comes from a generator seeded by (seed, stage, train_step, phase, micro-batch), and batches are a function of
the step, so that a resumed run continues bit for bit without any stored random state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.training import checkpoint as ckpt
from darkroom.training.distributed import World, any_rank, mean_over_ranks, wrap
from darkroom.training.ema import EMA
from darkroom.training.freed_memory import keep_freed_memory
from darkroom.training.optim import OptimizerConfig, learning_rate, make_optimizer
from darkroom.training.progress import Progress

Batch = dict[str, Any]
SCORE_PREFIX = "score_"  # of names of scores in metrics.jsonl
RECORD_KEYS = ("stage", "train_step", "images_seen", "seconds", "images_per_second")  # of metrics.jsonl besides metrics


@dataclass
class Phase:
    """One optimisation inside a train step: `module(batch, generator, train_step) -> (loss, metrics)`.

    `parameters` are what this phase's optimiser changes; the phase is skipped before train step `starts_at`.
    `optimizer`: the loop's if None. Its rate counts from `starts_at` on; averages are the loop's business.
    """

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    starts_at: int = 0
    optimizer: OptimizerConfig | None = None


class TrainStep(Protocol):
    phases: list[Phase]
    modules: dict[str, nn.Module]  # what a checkpoint saves
    ema_modules: dict[str, nn.Module]  # what is averaged


class BatchSource(Protocol):
    def batch_at(self, train_step: int, micro: int = 0) -> Batch: ...


@dataclass(frozen=True)
class LoopConfig:
    """How long and in what portions. `steps`: optimiser steps; `batch_size`: images per micro-batch and process."""

    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    log_every: int = 10
    checkpoint_every: int = 500
    validate_every: int = 250
    sample_every: int = 500
    keep_checkpoints: int = 2
    seed: int = 0
    skips_before_rollback: int = 5
    rollbacks_before_stop: int = 3
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        least = {"steps": 0, "seed": 0, "rollbacks_before_stop": 0}
        intervals = ("log_every", "checkpoint_every", "validate_every", "sample_every")
        for name in ("batch_size", "accumulation", "keep_checkpoints", "skips_before_rollback", *intervals):
            least[name] = 1
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                hint = ' (more than "steps" means: only at the end)' if name in intervals else ""
                raise DarkroomError(f'"{name}" is {value}: it must be at least {low}{hint}')


@dataclass
class LoopResult:
    steps: int
    seconds: float
    skipped_steps: int
    rollbacks: int
    interrupted: bool
    last: dict[str, float]


def step_generator(seed: int, *path: str | int) -> torch.Generator:
    """A CPU generator that depends on (seed, path) only."""
    digest = hashlib.sha256(json.dumps([seed, *path]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype networks run in, None for float32. "auto" takes bfloat16 where the device computes it natively."""
    if precision == "float32":
        return None
    if precision == "bfloat16" or has_native_bfloat16(device):
        return torch.bfloat16
    return None


def has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.backends.cpu.get_capabilities() if hasattr(torch.backends.cpu, "get_capabilities") else {}
        if capabilities:
            return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile"))
        with contextlib.suppress(OSError):
            flags = Path("/proc/cpuinfo").read_text()
            return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


Hook = Callable[[int], Mapping[str, float] | None]


class Scorer(Protocol):
    """Makes scores every so many steps, beside the training or in its pauses.

    `start` is called by every process under the averaged weights; `finished` gives (train step, scores) of what has
    been finished since, each once, and with `wait` waits for it; `close` ends what is still being made.
    """

    every: int

    def start(self, train_step: int, final: bool = False) -> None: ...
    def finished(self, wait: bool = False) -> list[tuple[int, Mapping[str, float]]]: ...
    def close(self) -> None: ...


@dataclass
class Hooks:
    """What a stage adds to the loop. `validate` and `sample` run under the averaged weights."""

    validate: Hook | None = None
    sample: Hook | None = None
    scorer: Scorer | None = None


class Trainer:
    """Runs one stage in `folder`: checkpoints below `checkpoints/{stage}`, metrics in `metrics.jsonl`."""

    def __init__(
        self,
        stage: str,
        step: TrainStep,
        batches: BatchSource,
        config: LoopConfig,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        world: World | None = None,
        hooks: Hooks | None = None,
        quiet: bool = False,
    ) -> None:
        self.stage, self.step, self.batches, self.config, self.folder = stage, step, batches, config, Path(folder)
        self.device = torch.device(device)
        self.world = world or World()
        self.hooks = hooks or Hooks()
        self.quiet = quiet or not self.world.is_main
        if self.device.type == "cpu":
            keep_freed_memory()
        self.modules = {name: m.to(self.device) for name, m in step.modules.items()}
        self.optimizers = {p.name: make_optimizer(p.parameters, self._optimizer_config(p)) for p in step.phases}
        self.wrapped = {p.name: wrap(p.module, self.world) for p in step.phases}
        decay = config.optimizer.ema_decay
        self.ema = EMA(step.ema_modules, decay) if decay is not None and step.ema_modules else None
        self.autocast = autocast_dtype(config.precision, self.device)
        self.train_step = 0
        self.rate_scale = 1.0
        self.skipped_steps = 0
        self.rollbacks = 0
        self.seconds = 0.0
        self.checkpoints = self.folder / "checkpoints" / stage
        self.metrics_file = self.folder / "metrics.jsonl"
        self._stop = False
        self._skips_in_row = 0
        self._running_since: float | None = None

    # --- one step -----------------------------------------------------------------------------------------------

    def run_step(self) -> dict[str, float]:
        """All phases of the current train step. Returns scalar metrics; {"skipped": 1} when a value was not finite.

        Every phase computes its gradients before any of them steps, so that a skipped step changes nothing at all.
        """
        metrics: dict[str, float] = {}
        config = self.config
        micro_batches = [self.batches.batch_at(self.train_step, m) for m in range(config.accumulation)]
        phases = [p for p in self.step.phases if self.train_step >= p.starts_at]
        finite = True
        for phase in phases:
            self.optimizers[phase.name].zero_grad(set_to_none=True)
            prefix = "" if phase is phases[0] else f"{phase.name}_"
            for m, batch in enumerate(micro_batches):
                loss, logs = self._backward(phase, m, batch)
                finite = finite and math.isfinite(loss)
                for name, log in [("loss", loss), *((k, float(v)) for k, v in logs.items())]:
                    metrics[prefix + name] = metrics.get(prefix + name, 0.0) + log / len(micro_batches)
            clip = self._optimizer_config(phase).gradient_clip
            norm = float(nn.utils.clip_grad_norm_(phase.parameters, math.inf if clip is None else clip, foreach=True))
            finite = finite and math.isfinite(norm)
            metrics[prefix + "gradient_norm"] = norm
        skip = any_rank(not finite, self.world, self.device)
        for phase in phases:
            optimizer = self.optimizers[phase.name]
            rate = self._rate(phase)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if skip:
            return {"skipped": 1.0, "loss": metrics["loss"]}
        if self.ema is not None:
            self.ema.update()
        metrics["learning_rate"] = self._rate(phases[0])
        return metrics

    def _optimizer_config(self, phase: Phase) -> OptimizerConfig:
        return phase.optimizer or self.config.optimizer

    def _rate(self, phase: Phase) -> float:
        start = phase.starts_at if phase.optimizer else 0
        config = self._optimizer_config(phase)
        return learning_rate(config, self.train_step - start, self.config.steps - start) * self.rate_scale

    def _backward(self, phase: Phase, micro: int, batch: Batch) -> tuple[float, Mapping[str, Tensor]]:
        """Add one micro-batch's share to the phase's gradients; gives its loss (mean over processes) and metrics."""
        module, count = self.wrapped[phase.name], self.config.accumulation
        alone = self.world.size == 1 or micro + 1 == count  # gradients travel with the last micro-batch only
        with contextlib.nullcontext() if alone else module.no_sync():  # type: ignore[operator]
            with self._autocast():
                self._seed_dropout(phase.name, micro)
                path = (self.stage, self.train_step, phase.name, micro, self.world.rank)
                generator = step_generator(self.config.seed, *path)
                loss, logs = module(batch, generator, self.train_step)
            (loss / count).backward()
        return float(mean_over_ranks(loss.detach(), self.world)), logs

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _seed_dropout(self, phase: str, micro: int) -> None:
        """nn.Dropout draws from torch's global generator; seeding it per step keeps resumed runs equal."""
        generator = step_generator(self.config.seed, self.stage, self.train_step, phase, micro, self.world.rank, "d")
        torch.manual_seed(generator.initial_seed())

    # --- the whole stage ----------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> LoopResult:
        """Train to `config.steps`, or until SIGINT/SIGTERM, which saves first. Bit-equal under `resume`."""
        last: dict[str, float] = {}
        if resume:
            self.resume()
            last = last_metrics(self.metrics_file, self.stage, self.train_step)
        self._trim_metrics()
        for module in self.modules.values():
            module.train()
        if self.world.is_main and ckpt.latest_checkpoint(self.checkpoints) is None:
            self.save()  # a roll-back in the first interval needs something to return to
        writer = self._event_writer()
        started, images = time.perf_counter(), 0
        self._running_since = started
        images_per_step = self.config.batch_size * self.config.accumulation * self.world.size
        with self._signals(), Progress(self.stage, self.config.steps, self.train_step, quiet=self.quiet) as bar:
            while self.train_step < self.config.steps and not self._stopped():
                metrics = self.run_step()
                if metrics.pop("skipped", 0):
                    self._on_non_finite(metrics["loss"])
                    if self._skips_in_row == 0:  # rolled back: train_step has moved
                        continue
                else:
                    self._skips_in_row = 0
                self.train_step += 1
                images += images_per_step
                speed = images / max(time.perf_counter() - started, 1e-9)
                last = metrics | last_only(last)
                bar.update(self.train_step, speed, metrics.get("loss", math.nan))
                self._between_steps(metrics, last, speed, writer)
            self.seconds, self._running_since = self._elapsed(), None
            self._stopped()
            if self.world.is_main and self.train_step > self._saved_step():
                self.save()
        if writer is not None:
            writer.close()
        return LoopResult(self.train_step, self.seconds, self.skipped_steps, self.rollbacks, self._stop, last)

    def _elapsed(self) -> float:
        """Seconds of training so far, those of earlier parts of the run included."""
        return self.seconds + (0.0 if self._running_since is None else time.perf_counter() - self._running_since)

    def _stopped(self) -> bool:
        """Whether any process was told to stop: all must leave after the same step, or the others wait for ever."""
        self._stop = any_rank(self._stop, self.world, self.device)
        return self._stop

    def _between_steps(self, metrics: dict[str, float], last: dict[str, float], speed: float, writer: Any) -> None:
        """Validation, samples, logs and checkpoints that are due after the step that just ended."""
        n, config = self.train_step, self.config
        final = n == config.steps
        record = dict(metrics)
        if self.hooks.validate and (n % config.validate_every == 0 or final):
            extra = dict(self._under_averages(self.hooks.validate) or {})
            record |= extra
            last |= extra
        if self.hooks.sample and (n % config.sample_every == 0 or final):
            self._under_averages(self.hooks.sample)
        last |= self._score(n, final)
        if self.world.is_main and (n % config.log_every == 0 or n == 1 or final or len(record) > len(metrics)):
            images_seen = n * config.batch_size * config.accumulation * self.world.size
            head = {"stage": self.stage, "train_step": n, "images_seen": images_seen}
            tail = {"seconds": round(self._elapsed(), 3), "images_per_second": round(speed, 2)}
            with open(self.metrics_file, "a") as file:
                file.write(json.dumps(head | record | tail) + "\n")
            if writer is not None:
                for name, value in record.items():
                    writer.add_scalar(f"{self.stage}/{name}", value, n)
        # Not amid skipped steps: a roll-back must find the state before the trouble began.
        if self.world.is_main and n % config.checkpoint_every == 0 and self._skips_in_row == 0:
            self.save()

    def _score(self, train_step: int, final: bool) -> dict[str, float]:
        """Begin scores that are due and log those that have been finished, under the step whose weights they are of."""
        scorer = self.hooks.scorer
        if scorer is None:
            return {}
        if train_step % scorer.every == 0 or final:
            self._under_averages(lambda step: scorer.start(step, final))
        latest: dict[str, float] = {}
        for step, scores in scorer.finished(wait=final):
            latest = {SCORE_PREFIX + name: value for name, value in scores.items()}
            if self.world.is_main:
                images_seen = step * self.config.batch_size * self.config.accumulation * self.world.size
                head = {"stage": self.stage, "train_step": step, "images_seen": images_seen}
                with open(self.metrics_file, "a") as file:
                    file.write(json.dumps(head | latest) + "\n")
        return latest

    def _under_averages(self, hook: Hook) -> Mapping[str, float] | None:
        for module in self.modules.values():
            module.eval()
        try:
            with self.ema or contextlib.nullcontext(), torch.no_grad(), self._autocast():
                return hook(self.train_step)
        finally:
            for module in self.modules.values():
                module.train()

    # --- trouble ------------------------------------------------------------------------------------------------

    def _on_non_finite(self, loss: float) -> None:
        """Skip; after several in a row go back to the last checkpoint at half the rate; then give up.

        A checkpoint that was returned to before, with no newer one since, did not help: then the one before it is
        taken, which may lie before the weights went astray.
        """
        self.skipped_steps += 1
        self._skips_in_row += 1
        if self._skips_in_row < self.config.skips_before_rollback:
            return
        self.rollbacks += 1
        found = ckpt.all_checkpoints(self.checkpoints)
        if self.rollbacks > self.config.rollbacks_before_stop or not found:
            raise DarkroomError(
                f"{self.stage}: the loss is not finite at step {self.train_step} (loss {loss}) even after "
                f"{self.rollbacks - 1} returns to a checkpoint; lower optimizer.learning_rate or use precision float32"
            )
        useless = found.pop() if len(found) > 1 and ckpt.read_counters(found[-1]).get("returned_to") else None
        any_rank(False, self.world, self.device)  # all have chosen, before one changes what is there
        if self.world.is_main and useless is not None:
            useless.unlink(missing_ok=True)
        kept = {"skipped_steps": self.skipped_steps, "rollbacks": self.rollbacks, "seconds": self.seconds}
        scale = self.rate_scale * 0.5
        self.resume(found[-1])
        for name, value in kept.items():
            setattr(self, name, value)
        self.rate_scale, self._skips_in_row = scale, 0
        self._trim_metrics()
        if self.world.is_main:
            self.save(returned_to=True)  # so that a later resume keeps the lowered rate and the counts

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) ends the run after its step, with a checkpoint; a second one at once."""

        def stop(signum: int, _: object) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        try:
            before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller handles interruption
            before = {}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    # --- checkpoints and metrics --------------------------------------------------------------------------------

    def save(self, returned_to: bool = False) -> None:
        path = self.checkpoints / f"step-{self.train_step:08d}.safetensors"
        counters = {
            "stage": self.stage,
            "train_step": self.train_step,
            "rate_scale": self.rate_scale,
            "skipped_steps": self.skipped_steps,
            "rollbacks": self.rollbacks,
            "skips_in_row": self._skips_in_row,
            "returned_to": returned_to,  # written by a roll-back, not by progress
            "seconds": self._elapsed(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "autocast": str(self.autocast),
        }
        ckpt.save_checkpoint(path, self.modules, self.optimizers, self.ema, counters)
        ckpt.prune(self.checkpoints, self.config.keep_checkpoints)

    def resume(self, path: Path | None = None) -> None:
        """Continue from `path` or the newest checkpoint; without one, start at step 0."""
        path = path or ckpt.latest_checkpoint(self.checkpoints)
        if path is None:
            return
        counters = ckpt.load_checkpoint(path, self.modules, self.optimizers, self.ema)
        if counters["threads"] != torch.get_num_threads() and not self.quiet:
            print(
                f"note: the checkpoint was made with {counters['threads']} threads, this run has "
                f"{torch.get_num_threads()}: it continues correctly, but not bit for bit",
                flush=True,
            )
        self.train_step = counters["train_step"]
        self.rate_scale = counters["rate_scale"]
        self.skipped_steps = counters["skipped_steps"]
        self.rollbacks = counters["rollbacks"]
        self.seconds = counters["seconds"]
        self._skips_in_row = counters.get("skips_in_row", 0)  # absent in checkpoints of early 0.1 versions

    def _saved_step(self) -> int:
        path = ckpt.latest_checkpoint(self.checkpoints)
        return -1 if path is None else int(path.stem.split("-")[1])

    def _trim_metrics(self) -> None:
        """Drop this stage's lines after the current step: a killed run wrote them and they come again."""
        if not self.world.is_main or not self.metrics_file.exists():
            return
        keep = []
        for line in self.metrics_file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill can leave half a line
                record = json.loads(line)
                if record["stage"] != self.stage or record["train_step"] <= self.train_step:
                    keep.append(line)
        temporary = self.metrics_file.with_suffix(".part")
        temporary.write_text("".join(line + "\n" for line in keep))
        temporary.replace(self.metrics_file)

    def _event_writer(self) -> Any:
        """TensorBoard events when the extra is installed."""
        if not self.world.is_main:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.folder / "events"), purge_step=self.train_step + 1)


def last_metrics(file: Path, stage: str, train_step: int) -> dict[str, float]:
    """What `LoopResult.last` was when `stage` stood at `train_step`, from the lines of metrics.jsonl."""
    last: dict[str, float] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill can leave half a line
                record = json.loads(line)
                if record["stage"] == stage and record["train_step"] <= train_step:
                    # Scores have lines of their own, which say nothing of the step.
                    last = (last_only(last) if "loss" in record else last) | record
    return {k: v for k, v in last.items() if k not in RECORD_KEYS}


def finished_result(folder: Path, stage: str) -> LoopResult | None:
    """How the training of a stage that an earlier process finished went; None when its checkpoints are gone."""
    path = ckpt.latest_checkpoint(folder / "checkpoints" / stage)
    if path is None:
        return None
    counters = ckpt.read_counters(path)
    n = counters["train_step"]
    last = last_metrics(folder / "metrics.jsonl", stage, n)
    return LoopResult(n, counters["seconds"], counters["skipped_steps"], counters["rollbacks"], False, last)


def last_only(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics that are not computed every step keep their latest value in the summary."""
    return {k: v for k, v in metrics.items() if k.startswith(("validation_", SCORE_PREFIX)) or k == "psnr"}


def all_parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Each trainable parameter of the modules once."""
    seen: dict[int, nn.Parameter] = {}
    for module in modules:
        for p in module.parameters():
            if p.requires_grad:
                seen[id(p)] = p
    return list(seen.values())


def fixed_times(low: float, high: float, count: int) -> Tensor:
    """(count,) midpoints of equal strata of [low, high]: validation loss on the same times at every call."""
    return low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
