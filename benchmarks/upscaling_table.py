"""Super-resolution and deblurring against their baselines, each number with its protocol record: bicubic (where sizes
are equal the blurred picture as it is), for super-resolution the L1 regression network of equal size
(regression_baseline.py), and models, by plain bicubic also made consistent with the small picture.

    python benchmarks/upscaling_table.py --data HELD-OUT [--model [NAME=]MODEL ...] [--regression FOLDER]
                                         [--output runs/upscaling-table] [--size 128x128] [--count N] [--steps N]
                                         [--pictures 8] [--degradation-of NAME] [--speed] [--threads 1]

HELD-OUT: a tar or folder, such as clothing-128-val.tar (128x128) or camvid-256x192-test.tar (--size 256x192).
Every row has the same pictures, made smaller in the same way, and the same network looks at it; its record is
OUTPUT/ROW/scores.json, and what was interrupted goes on. `consistency`, where small pictures are made by bicubic alone,
is the root mean square difference, in levels of 255, between them and the row's picture made smaller again.
OUTPUT/pictures.png shows the first pictures: the small one, all rows, the truth. Minutes are those of the training,
where the model or network knows them. Models that were trained with different small pictures have no table in common,
unless --degradation-of says whose.

--speed adds what table 6 of the paper compares (f = 1 against f = 4 at equal parameters): training and sampling in
samples per second of processor time, measured here in turns.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from regression_baseline import load_regression
from restoration import (
    CONSISTENCY,
    Consistent,
    RestorationEvaluation,
    Restore,
    Restored,
    bicubic_by,
    is_plain,
    speeds,
    tile,
)

from darkroom.conditioning.requests import encoder_of
from darkroom.data.degradations import LowResolution
from darkroom.data.derived import DerivedDataset
from darkroom.data.io import image_grid, write_image
from darkroom.errors import DarkroomError
from darkroom.eval_places import open_reference, trained_degradation
from darkroom.evaluation.picture_sources import GeneratedPictures, GenerationSettings
from darkroom.evaluation.protocol import Record
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load
from darkroom.pixel_format import PixelFormat
from darkroom.safe_files import write_file
from darkroom.scoring import EvalRequest

COLUMNS = ("PSNR", "SSIM", "perceptual", "LPIPS", "F", "K", CONSISTENCY)
METRICS = ["fd", "kd", "pairs"]
TIMED = 4  # pictures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--model", action="append", default=[], metavar="[NAME=]MODEL")
    parser.add_argument("--regression", type=Path)
    parser.add_argument("--degradation-of", metavar="NAME", help="small pictures as in the training of this model")
    parser.add_argument("--output", type=Path, default=Path("runs/upscaling-table"))
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--count", type=int)
    parser.add_argument("--steps", type=int, help="of the models; default: their own")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not options.data:
        print("left out: give held-out pictures with --data")
        return 0
    torch.set_num_threads(options.threads)
    try:
        print(run(options))
    except DarkroomError as error:
        print(f"upscaling_table: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> str:
    models = named_models(options.model)
    table = Table(options, common_rule(models, options.degradation_of))
    # of equal size, bicubic leaves the blurred picture as it is
    table.restored("bicubic" if table.rule.factor > 1 else "as it is", bicubic_by(table.rule.factor))
    if options.regression is not None:
        regression, facts = load_regression(options.regression)
        if facts["factor"] != table.rule.factor:
            raise DarkroomError(
                f"{options.regression} enlarges by {facts['factor']}, and these small pictures are {table.rule.factor} "
                "times smaller; leave --regression out, or train one for them"
            )
        table.restored("L1 regression", regression.requires_grad_(False), regression, facts["minutes"])
    for name, model in models.items():
        table.generated(name, model, GeneratedPictures)
        if is_plain(table.rule):
            table.generated(f"{name}, consistent", model, Consistent)
    if options.pictures:
        write_image(table.pictures(options.pictures), options.output / "pictures.png")
    if options.speed:
        table.speed = speeds(models, [table.dataset[number] for number in table.numbers[:TIMED]], options.steps)
    text = table.markdown()
    write_file(options.output / "table.md", text.encode())
    write_file(options.output / "table.json", (json.dumps(table.plain(), indent=1) + "\n").encode())
    return text


def named_models(given: Sequence[str]) -> dict[str, LatentDiffusion]:
    """("f4=runs/a/model", "clothing-sr") -> by name."""
    models: dict[str, LatentDiffusion] = {}
    for word in given:
        name, _, place = word.rpartition("=")
        model = load(place, device="cpu")
        if not isinstance(model, LatentDiffusion):
            raise DarkroomError(f"{place} is a first stage only; give a model of super-resolution")
        models[name or str(model.info.get("name") or Path(place).name)] = model
    return models


def common_rule(models: dict[str, LatentDiffusion], chosen: str | None = None) -> LowResolution:
    """How small pictures are made: as for all models in training, or for the chosen one; bicubic by 4 without any."""
    configs = {
        name: getattr(encoder_of(model.conditioner, "low_resolution"), "config", None) for name, model in models.items()
    }
    if chosen is not None:
        if chosen not in models:
            known = f"give one of {', '.join(models)}" if models else "name a model with --model"
            raise DarkroomError(f"--degradation-of {chosen}: no such model; {known}")
        if len({getattr(config, "factor", None) for config in configs.values()}) > 1:
            raise DarkroomError("the models enlarge by different factors; give each a table of its own")
        return trained_degradation(models[chosen], configs[chosen])
    rules = {name: trained_degradation(model, configs[name]) for name, model in models.items()}
    if len(set(rules.values())) > 1:
        raise DarkroomError(
            "the models were trained with different small pictures; give each kind a table of its own, or say "
            "--degradation-of NAME"
        )
    return next(iter(rules.values()), LowResolution(4))


@dataclass(frozen=True)
class Row:
    name: str
    folder: str
    record: Record
    source: Restored | GeneratedPictures
    parameters: int
    minutes: float | None


class Table:
    """Rows of one protocol."""

    def __init__(self, options: argparse.Namespace, rule: LowResolution) -> None:
        self.options, self.rule = options, rule
        width, height = map(int, options.size.split("x"))
        plain = open_reference(options.data, (width, height), 3, PixelFormat())
        self.dataset = DerivedDataset(plain, replace(plain.config, low_resolution=rule))
        count = min(options.count or len(self.dataset), len(self.dataset))
        self.numbers = [n * len(self.dataset) // count for n in range(count)]
        self.rows: list[Row] = []
        self.speed: dict[str, tuple[float, float]] = {}

    def restored(
        self, name: str, restore: Restore, network: torch.nn.Module | None = None, minutes: float | None = None
    ) -> None:
        """A row of a function of the small picture."""
        source = Restored(self.dataset, self.numbers, restore)
        self._row(name, source, None, network, minutes)

    def generated(self, name: str, model: LatentDiffusion, kind: type[GeneratedPictures]) -> None:
        """A row of a model's images."""
        settings = GenerationSettings(steps=self.options.steps, size=self.dataset.size)
        source = kind(model, self.dataset, len(self.numbers), settings)
        self._row(name, source, model, model.denoiser, (model.info.get("training") or {}).get("minutes"))

    def _row(
        self,
        name: str,
        source: Restored | GeneratedPictures,
        model: LatentDiffusion | None,
        network: torch.nn.Module | None,
        minutes: float | None,
    ) -> None:
        options = self.options
        folder = re.sub(r"\W+", "-", name).strip("-").lower()
        request = EvalRequest(
            model=name if model is not None else options.data[0],  # what is no model stands as images of the data
            data=list(options.data),
            metrics=METRICS,
            size=self.dataset.size,
            count=len(self.numbers),
            steps=options.steps,
            batch_size=options.batch_size,
            device="cpu",
            threads=options.threads,
        )
        job = RestorationEvaluation(request, name, options.output / folder, model, self.dataset, source, network)
        evaluated = job.run()
        assert evaluated is not None
        parameters = 0 if network is None else sum(p.numel() for p in network.parameters())
        self.rows.append(Row(name, folder, evaluated.record, source, parameters, minutes))
        print(f"{name}: done", file=sys.stderr, flush=True)

    def pictures(self, count: int) -> Any:
        """A row for each of the first pictures: the small one in large pixels, all rows of the table, the truth."""
        tiles = []
        for place, number in enumerate(self.numbers[:count]):
            example = self.dataset[number]
            size = tuple(example["image"].shape[1:])
            tiles.append(tile(F.interpolate(example["low_resolution"][None].float(), size)[0]))
            tiles += [row.source.read([place]).images[0].numpy() for row in self.rows]
            tiles.append(tile(example["image"]))
        return image_grid(tiles, columns=len(self.rows) + 2)

    def plain(self) -> list[dict[str, Any]]:
        return [
            {
                "row": row.name,
                "record": f"{row.folder}/scores.json",
                "scores": row.record.values,
                "parameters": row.parameters,
                "minutes": row.minutes,
                "training and sampling samples/s": self.speed.get(row.name),
            }
            for row in self.rows
        ]

    def markdown(self) -> str:
        found = list(dict.fromkeys(name for row in self.rows for name in row.record.values))
        names = [name for column in COLUMNS for name in found if name.startswith(column)]
        speed = ["training samples/s", "sampling samples/s"] if self.speed else []
        lines = [["", *names, "parameters", "minutes", *speed]]
        lines.append(["---"] * len(lines[0]))
        for row in self.rows:
            values = [f"{row.record.values[name]:.4g}" for name in names]
            size = f"{row.parameters / 1e6:.2f} M" if row.parameters else "none"
            minutes = "" if row.minutes is None else f"{row.minutes:.0f}"
            fast = [f"{value:.3g}" for value in self.speed.get(row.name, ())] or [""] * len(speed)
            lines.append([row.name, *values, size, minutes, *fast])
        record = self.rows[0].record
        shown = f"{len(self.numbers)} held-out pictures of {' + '.join(record.reference.source)}"
        size = "x".join(map(str, self.dataset.size))
        factor = self.rule.factor
        rule = f"made {factor} times smaller by {self.rule.pipeline}" if factor > 1 else "of equal size"
        rule += f", damaged by {self.rule.pipeline}" if factor == 1 and self.rule.pipeline != "bicubic" else ""
        rule += f", blur {self.rule.blur}" if self.rule.blur else ""
        return f"{shown}, {size}, {rule}:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
