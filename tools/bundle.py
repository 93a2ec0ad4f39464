"""Turn a finished run into a bundled model: `python tools/bundle.py runs/emoji emoji --licence FILE... --note TEXT`.

A run that trained a first stage alone becomes a bundled first stage; `--scores` takes what
`darkroom eval --first-stage MODEL DATA... -o FOLDER` wrote. Writes src/darkroom/bundled/NAME: weights in float16, the
model card, the resolved recipe (paths of the data made relative), the training log and the licences of the data.
Refuses more than the repository allows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

import darkroom
from darkroom.first_stage.first_stage import FirstStage
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import save
from darkroom.report import model_card
from darkroom.train_job import SCORES

BUNDLED = Path(darkroom.__file__).parent / "bundled"
MOST_BYTES = {"first_stage": 8 * 2**20, "rest": 6 * 2**20}


def relative(value: Any) -> Any:
    """The last two parts of absolute paths: where the data lies on the machine that trained is nobody's business."""
    if isinstance(value, dict):
        return {k: relative(v) for k, v in value.items()}
    if isinstance(value, list):
        return [relative(v) for v in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return "/".join(Path(value).parts[-2:])
    return value


def thin(lines: list[str], every: int = 100) -> list[str]:
    """The log lines with validation values, and one in `every` steps of the others."""
    records = [json.loads(line) for line in lines]
    return [json.dumps(r) for r in records if "validation_loss" in r or r["train_step"] % every == 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--licence", type=Path, nargs="*", default=[], help="licence texts of the data, copied beside")
    parser.add_argument("--data-licence", default="", help="one line for the model card")
    parser.add_argument("--description", help="for the model card, instead of the recipe's")
    parser.add_argument("--command", default="", help="the command that makes this model again")
    parser.add_argument("--log", type=Path, nargs="*", default=[], help="earlier runs whose logs go before, in order")
    parser.add_argument("--scores", type=Path, help="scores.json of `darkroom eval --first-stage`")
    parser.add_argument("--note", nargs="*", default=[], help="limits, for the model card")
    args = parser.parse_args()
    model = darkroom.load(args.run / "model")
    place = BUNDLED / args.name
    if isinstance(model, FirstStage):
        first_stage(model, place, args)
    else:
        whole_model(model, place, args)
    config = yaml.safe_load((args.run / "config.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump(relative(config), sort_keys=False, allow_unicode=True))
    logs = [run / "metrics.jsonl" for run in (*args.log, args.run)]
    if not logs[-1].exists():  # a run of 0 steps, which only measured something
        logs.pop()
    log = [line for path in logs for line in thin(path.read_text().splitlines())]
    (place / "training.jsonl").write_text("\n".join(log) + "\n")
    for licence in args.licence:
        shutil.copyfile(licence, place / f"LICENSE-{licence.name.removeprefix('LICENSE-')}")
    sizes = {p: p.stat().st_size for p in place.rglob("*.safetensors")}
    first = sum(v for p, v in sizes.items() if p.parent.name == "first_stage")
    rest = sum(sizes.values()) - first
    print(f"{place}: first stage {first / 2**20:.2f} MiB, the rest {rest / 2**20:.2f} MiB")
    if first > MOST_BYTES["first_stage"] or rest > MOST_BYTES["rest"]:
        print("too large to ship: remove it, and make the model smaller", file=sys.stderr)
        return 1
    return 0


def first_stage(model: FirstStage, place: Path, args: argparse.Namespace) -> None:
    """Weights and card of a first stage alone."""
    summary = json.loads((args.run / "summary.json").read_text())
    data = relative(json.loads((args.run / "data.json").read_text())) | {"licence": args.data_licence}
    description = args.description or yaml.safe_load((args.run / "config.yaml").read_text())["description"]
    info = {"name": args.name, "description": description, "training": summary, "data": data}
    card = model_card(
        info
        | summary
        | {
            "kind": "FirstStage",
            "load": args.name,
            "image_size": data["size"],
            "channels": data["channels"],
            "downsampling": model.downsampling,
            "latent_channels": model.latent_channels,
            "parameters": {"first_stage": sum(p.numel() for p in model.parameters())},
            "recipe": f"{args.name} (config.yaml beside this file is its resolved form); made by `{args.command}`",
            "steps": summary["first_stage_steps"],
            "minutes": round(summary["first_stage_seconds"] / 60, 1),
            "scores": evaluated(json.loads(args.scores.read_text())) if args.scores else [],
            "limits": args.note,
            "licence": "Apache-2.0",
        }
    )
    save(model, place, card=card, dtype="float16", info=info)


def evaluated(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the card: the scores of every set."""
    return [
        {"name": f"{name}, {source}", "value": value, "protocol": f"{part['images']} held-out images, posterior mode"}
        for source, part in scores["sources"].items()
        for name, value in part.items()
        if name != "images"
    ]


def whole_model(model: LatentDiffusion, place: Path, args: argparse.Namespace) -> None:
    """Weights and card of a denoiser with its first stage and conditioner."""
    summary = json.loads((args.run / "summary.json").read_text())
    info = relative(model.info) | {"name": args.name}
    data = dict(info.get("data", {})) | {"licence": args.data_licence}
    info["data"] = data
    card = model_card(
        info
        | summary
        | {
            "load": args.name,
            "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()},
            "image_size": info["defaults"]["size"],
            "downsampling": model.downsampling,
            "latent_channels": model.latent_channels,
            "conditioning": list(model.conditioner.fields),
            "recipe": f"{args.name} (config.yaml beside this file is its resolved form); made by `{args.command}`",
            "steps": {
                k.removesuffix("_steps"): v for k, v in summary.items() if k in ("first_stage_steps", "denoiser_steps")
            },
            "scores": [
                {"name": name, "value": summary[key], "protocol": protocol}
                for key, (name, protocol) in SCORES.items()
                if key in summary
            ],
            "limits": args.note,
            "licence": "Apache-2.0",
        }
    )
    model.info = info
    save(model, place, card=card, dtype="float16", refer=True)


if __name__ == "__main__":
    sys.exit(main())
