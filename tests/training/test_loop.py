"""The loop on a problem small enough to check by hand: skipping, rolling back, averaging, rates, resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from parity_data import load_case
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.training.checkpoint import latest_checkpoint
from darkroom.training.distributed import World, join_world, of_first_rank
from darkroom.training.ema import EMA, ema_decay
from darkroom.training.loop import Hooks, LoopConfig, Phase, Trainer, finished_result, step_generator
from darkroom.training.optim import OptimizerConfig, learning_rate, make_optimizer


class Quadratic(nn.Module):
    """loss = mean((w - target - noise)^2); non-finite at the steps in `bad`."""

    def __init__(self, bad: set[int] | None = None, bad_above_rate: float | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 2))
        self.bad = bad or set()

    def forward(self, batch: dict[str, Any], generator: torch.Generator, train_step: int) -> tuple[Tensor, dict]:
        noise = torch.randn(3, 2, generator=generator) * 0.1
        loss = (self.w - batch["target"] - noise).square().mean()
        return (loss * math.nan if train_step in self.bad else loss), {"noise": noise.mean()}


class Step:
    def __init__(self, module: nn.Module) -> None:
        self.phases = [Phase("only", module, list(module.parameters()))]
        self.modules = {"net": module}
        self.ema_modules = {"net": module}


class Source:
    def batch_at(self, train_step: int, micro: int = 0) -> dict[str, Any]:
        return {"target": torch.full((3, 2), 1.0 + 0.01 * train_step + 0.1 * micro)}


def trainer(folder: Path, bad: set[int] | None = None, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "steps": 12,
        "batch_size": 1,
        "log_every": 1,
        "checkpoint_every": 4,
        "precision": "float32",
        "optimizer": OptimizerConfig(learning_rate=0.1, warmup_steps=2, ema_decay=0.9),
    }
    return Trainer("stage", Step(Quadratic(bad)), Source(), LoopConfig(**(settings | changes)), folder, quiet=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]


def test_a_run_in_two_parts_equals_one_run(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a")
    whole.run()
    first = trainer(tmp_path / "b")

    def stop_at_seven(n: int) -> None:
        if n == 7:
            raise RuntimeError("killed")

    first.hooks = Hooks(validate=stop_at_seven)
    object.__setattr__(first.config, "validate_every", 1)
    with pytest.raises(RuntimeError, match="killed"):
        first.run()
    second = trainer(tmp_path / "b")
    second.run(resume=True)
    assert torch.equal(whole.modules["net"].w, second.modules["net"].w)
    for key, value in whole.ema.averages.items():  # type: ignore[union-attr]
        assert torch.equal(value, second.ema.averages[key])  # type: ignore[union-attr]
    ours, theirs = (t.optimizers["only"].state_dict()["state"][0] for t in (whole, second))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_accumulation_averages_the_micro_batches(tmp_path: Path) -> None:
    """Two micro-batches: the gradient is the mean of both, computed here by hand."""
    t = trainer(tmp_path, accumulation=2)
    metrics = t.run_step()
    gradient = torch.zeros(3, 2)
    for micro in range(2):
        noise = torch.randn(3, 2, generator=step_generator(0, "stage", 0, "only", micro, 0)) * 0.1
        gradient += 2 * (0 - (1.0 + 0.1 * micro) - noise) / 6 / 2
    assert metrics["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_a_non_finite_step_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    t = trainer(tmp_path, bad={0})
    before = t.modules["net"].w.clone()
    assert t.run_step()["skipped"] == 1
    assert torch.equal(before, t.modules["net"].w)
    assert t.ema is not None and t.ema.updates == 0
    result = trainer(tmp_path / "run", bad={3, 5}).run()
    assert result.skipped_steps == 2 and result.rollbacks == 0 and result.steps == 12


def test_repeated_non_finite_steps_roll_back_lower_the_rate_and_stop(tmp_path: Path) -> None:
    t = trainer(tmp_path, bad=set(range(6, 100)), skips_before_rollback=2, rollbacks_before_stop=2)
    with pytest.raises(DarkroomError, match="not finite") as error:
        t.run()
    assert "learning_rate" in str(error.value) and "\n" not in str(error.value)
    assert t.rate_scale == 0.25
    assert t.train_step < 12
    assert torch.isfinite(t.modules["net"].w).all()


def test_a_rollback_returns_to_the_checkpoint(tmp_path: Path) -> None:
    t = trainer(tmp_path, bad={5, 6}, skips_before_rollback=2, steps=8)
    seen: list[float] = []
    original = t._on_non_finite

    def healed(loss: float) -> None:
        original(loss)
        if t.rollbacks:
            t.modules["net"].bad = set()
            seen.append(t.train_step)

    t._on_non_finite = healed  # type: ignore[method-assign]
    result = t.run()
    assert seen == [4] and result.rollbacks == 1 and result.steps == 8
    assert [r["train_step"] for r in lines(tmp_path)] == list(range(1, 9))
    assert lines(tmp_path)[-1]["learning_rate"] == pytest.approx(0.05)


def test_a_checkpoint_that_does_not_help_gives_way_to_the_one_before(tmp_path: Path) -> None:
    """The newest checkpoint holds weights from which every step fails: the first return is in vain, the second goes
    further back. No checkpoint is written amid the skipped steps, and time is not counted twice."""
    t = trainer(tmp_path, bad=set(range(9, 100)), skips_before_rollback=4, steps=30, keep_checkpoints=2)
    returns: list[int] = []
    original = t._on_non_finite

    def watched(loss: float) -> None:
        before = t.rollbacks
        original(loss)
        if t.rollbacks > before:
            returns.append(t.train_step)
            assert t._elapsed() < 60
            if len(returns) == 1:
                t.seconds -= 1000.0  # a return must not bring the seconds of the checkpoint back
        if len(returns) == 2:
            t.modules["net"].bad = set()

    t._on_non_finite = watched  # type: ignore[method-assign]
    result = t.run()
    assert returns == [8, 4]  # step 12 lies amid the skipped steps 9 to 12: nothing was saved there
    assert result.steps == 30 and result.skipped_steps == 8 and result.seconds < 0
    assert t.rate_scale == 0.25


def test_stopping_amid_skipped_steps_and_going_on_is_the_same_as_not_stopping(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", bad={5, 6, 7}, skips_before_rollback=4)
    whole.run()
    first = trainer(tmp_path / "b", bad={5, 6, 7}, skips_before_rollback=4)
    original = first._on_non_finite

    def stop(loss: float) -> None:
        original(loss)
        first._stop = first._skips_in_row == 2

    first._on_non_finite = stop  # type: ignore[method-assign]
    assert first.run().interrupted
    second = trainer(tmp_path / "b", bad={5, 6, 7}, skips_before_rollback=4)
    second.resume()
    assert second._skips_in_row == 2
    second.run(resume=True)
    assert torch.equal(whole.modules["net"].w, second.modules["net"].w)


def test_a_finished_stage_tells_its_result_again(tmp_path: Path) -> None:
    hooks = Hooks(validate=lambda n: {"validation_loss": n / 10, "psnr": 20.0 + n})
    one = trainer(tmp_path, validate_every=5)
    one.hooks = hooks
    result = one.run()
    assert result.last["psnr"] == 32.0 and result.last["loss"] > 0
    again = trainer(tmp_path).run(resume=True)
    assert again.steps == 12 and again.last == result.last
    finished = finished_result(tmp_path, "stage")
    assert finished is not None and replace(finished, seconds=0) == replace(result, seconds=0)
    assert finished_result(tmp_path, "other") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"log_every": 0}, '"log_every" is 0'),
        ({"batch_size": 0}, '"batch_size" is 0'),
        ({"steps": -1}, '"steps" is -1'),
        ({"sample_every": 0}, "only at the end"),
    ],
)
def test_impossible_loops_are_one_line(changes: dict[str, int], words: str) -> None:
    with pytest.raises(DarkroomError, match=words):
        LoopConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"betas": (0.9, 1.0)},
        {"ema_decay": 1.0},
        {"gradient_clip": 0.0},
        {"warmup_steps": -1},
    ],
)
def test_impossible_optimizers_are_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(DarkroomError, match=f"optimizer.{next(iter(changes))}"):
        OptimizerConfig(**changes)


def test_a_checkpoint_of_another_network_is_one_clear_line(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    other = trainer(tmp_path)
    other.modules["net"].w = nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(DarkroomError, match="does not fit the networks") as error:
        other.resume()
    assert "\n" not in str(error.value)


def test_rates(tmp_path: Path) -> None:
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(constant, i, 10) for i in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    cosine = OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay="cosine", final_fraction=0.1)
    assert learning_rate(cosine, 0, 10) == pytest.approx(1.0)
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.55)
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.1)


def test_weight_decay_spares_vectors_and_every_parameter_has_one_group() -> None:
    module = nn.Linear(3, 2)
    optimizer = make_optimizer(module.parameters(), OptimizerConfig(weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {id(module.weight): 0.1, id(module.bias): 0.0}


def test_ema_follows_the_official_warm_up() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    ema = EMA({"m": module}, 0.99)
    expected = 1.0
    for n in range(1, 5):
        nn.init.constant_(module.weight, float(n))
        ema.update()
        decay = min(0.99, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert float(ema.averages["m.weight"]) == pytest.approx(expected, rel=1e-6)
    assert ema_decay(10**6, 0.99) == 0.99
    with ema:
        assert float(module.weight.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(module.weight.detach()) == 4.0


def test_ema_is_the_official_one() -> None:
    """Weight (1, 2) and bias 0.5; before every update the weight grows by 0.1 and the bias falls by 0.2."""
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
        module.bias.fill_(0.5)
        ema = EMA({"m": module}, 0.9999)
        for count, first, second, bias in load_case("schedules_ldm", "ema").output("history"):
            module.weight.add_(0.1)
            module.bias.sub_(0.2)
            ema.update()
            assert ema.updates == count
            assert ema.averages["m.weight"].flatten().tolist() == pytest.approx([first, second], rel=1e-6)
            assert float(ema.averages["m.bias"]) == pytest.approx(bias, rel=1e-5)


@pytest.mark.parametrize("name", ["LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2"])
def test_cosine_decay_is_the_official_one(name: str) -> None:
    """After the warm-up, which the official code begins at a rate of its own and ours one step earlier."""
    case = load_case("schedules_ldm", "lr_multipliers")
    (warmup, steps, low, high) = {
        "LambdaWarmUpCosineScheduler": (100, 5000, 0.01, 0.1),
        "LambdaWarmUpCosineScheduler2": (100, 10_000, 0.1, 1.0),
    }[name]
    config = OptimizerConfig(learning_rate=high, warmup_steps=warmup, decay="cosine", final_fraction=low / high)
    official = dict(zip(case.input("steps").tolist(), case.output(name)["values"], strict=True))
    for step in (100, 101, 500, 1000, 4999, 5000, 6000):
        assert learning_rate(config, step, steps) == pytest.approx(official[step], rel=1e-6), step


def test_old_checkpoints_are_pruned_and_half_written_ones_removed(tmp_path: Path) -> None:
    t = trainer(tmp_path, keep_checkpoints=1)
    t.checkpoints.mkdir(parents=True)
    (t.checkpoints / ".step-00000004.safetensors.part").write_text("half")
    t.run()
    assert [p.name for p in t.checkpoints.iterdir()] == ["step-00000012.safetensors"]


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    newest = latest_checkpoint(tmp_path / "checkpoints" / "stage")
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(DarkroomError, match="not a readable checkpoint"):
        trainer(tmp_path).run(resume=True)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import darkroom.training.checkpoint as module

    t = trainer(tmp_path)
    t.run()
    before = sorted(p.name for p in t.checkpoints.iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    t.train_step = 13
    with pytest.raises(DarkroomError, match="No space left"):
        t.save()
    assert sorted(p.name for p in t.checkpoints.iterdir()) == before


class TwoPhases:
    """A second phase whose loss is not finite at one step."""

    def __init__(self, bad: set[int]) -> None:
        one, two = Quadratic(), Quadratic(bad)
        self.phases = [
            Phase("one", one, list(one.parameters())),
            Phase("two", two, list(two.parameters()), starts_at=1),
        ]
        self.modules = {"one": one, "two": two}
        self.ema_modules = {"one": one}


def test_a_skipped_step_changes_no_phase(tmp_path: Path) -> None:
    step = TwoPhases(bad={2})
    t = Trainer("stage", step, Source(), LoopConfig(steps=5, precision="float32"), tmp_path, quiet=True)
    for expected in (False, False, True, False):
        before = [p.clone() for phase in step.phases for p in phase.parameters]
        skipped = "skipped" in t.run_step()
        same = [torch.equal(a, b) for a, b in zip(before, (p for f in step.phases for p in f.parameters), strict=True)]
        assert skipped == expected
        # The second phase begins at step 1; apart from that every phase moves, or none does.
        assert same == ([True, True] if skipped else [False, t.train_step == 0])
        t.train_step += 1


# --- several processes ------------------------------------------------------------------------------------------------


class RankSource:
    """Each rank has a target of its own, so that weights without exchange would drift apart."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def batch_at(self, train_step: int, micro: int = 0) -> dict[str, Any]:
        return {"target": torch.full((3, 2), 1.0 if self.rank == 0 else -3.0)}


def train_as_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    world = World(rank, 2)
    assert of_first_rank(f"from {rank}", world) == "from 0"
    config = LoopConfig(
        steps=40, batch_size=1, log_every=1, precision="float32", optimizer=OptimizerConfig(0.1, warmup_steps=0)
    )
    loop = Trainer("stage", Step(Quadratic()), RankSource(rank), config, Path(folder), world=world, quiet=True)
    loop.run()
    torch.save(loop.modules["net"].w.detach(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_their_gradients(tmp_path: Path) -> None:
    mp.spawn(train_as_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert (first + 1).abs().max() < 0.3  # the mean of the two targets is where both gradients cancel
    assert len([r for r in lines(tmp_path) if r["train_step"] == 40]) == 1  # one rank writes


def test_joining_without_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_world("cuda:3") == World()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(DarkroomError, match="each takes a GPU of its own"):
        join_world("cuda:0")
    with pytest.raises(DarkroomError, match="process 2 of this machine has no GPU"):
        join_world("cuda")


def test_a_phase_may_have_its_own_rate_and_curve(tmp_path: Path) -> None:
    """Counted from where the phase begins: its first step of Adam moves every weight by the warm-up's first rate."""
    one, two = Quadratic(), Quadratic()
    own = OptimizerConfig(learning_rate=0.04, warmup_steps=2, gradient_clip=1e-3)
    step = Step(one)
    step.phases.append(Phase("late", two, list(two.parameters()), starts_at=3, optimizer=own))
    step.modules = {"one": one, "two": two}
    loop = LoopConfig(steps=8, precision="float32", optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0))
    t = Trainer("stage", step, Source(), loop, tmp_path, quiet=True)
    for n in range(5):
        before = two.w.detach().clone()
        metrics = t.run_step()
        moved = (two.w.detach() - before).abs()
        expected = {3: 0.02, 4: 0.04}.get(n, 0.0)
        torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=0.05, atol=1e-7)
        assert metrics["learning_rate"] == 0.1
        t.train_step += 1
    assert t._rate(step.phases[1]) == pytest.approx(0.04)  # constant
    step.phases[1].optimizer = replace(own, decay="cosine", warmup_steps=0, final_fraction=0.0)
    assert t._rate(step.phases[1]) == pytest.approx(0.04 * 0.5 * (1 + math.cos(math.pi * 2 / 5)))  # 3 to 8, at 5
