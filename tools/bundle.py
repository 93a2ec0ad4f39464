"""Turn a finished run into a bundled model: `python tools/bundle.py runs/emoji emoji --licence FILE... --note TEXT`.

Writes src/darkroom/bundled/NAME: weights in float16, the model card, the resolved recipe (paths of the data made
relative), the training log and the licences of the data. Refuses more than the repository allows.
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
    parser.add_argument("--command", default="", help="the command that makes this model again")
    parser.add_argument("--note", nargs="*", default=[], help="limits, for the model card")
    args = parser.parse_args()
    model = darkroom.load(args.run / "model")
    summary = json.loads((args.run / "summary.json").read_text())
    place = BUNDLED / args.name
    info = relative(model.info) | {"name": args.name}
    data = dict(info.get("data", {})) | {"licence": args.data_licence}
    info["data"] = data
    card = model_card(
        info
        | summary
        | {
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
    save(model, place, card=card, dtype="float16")
    config = yaml.safe_load((args.run / "config.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump(relative(config), sort_keys=False, allow_unicode=True))
    log = thin((args.run / "metrics.jsonl").read_text().splitlines())
    (place / "training.jsonl").write_text("\n".join(log) + "\n")
    for licence in args.licence:
        shutil.copyfile(licence, place / f"LICENSE-{licence.name}")
    sizes = {p: p.stat().st_size for p in place.rglob("*.safetensors")}
    first = sum(v for p, v in sizes.items() if p.parent.name == "first_stage")
    rest = sum(sizes.values()) - first
    print(f"{place}: first stage {first / 2**20:.2f} MiB, the rest {rest / 2**20:.2f} MiB")
    if first > MOST_BYTES["first_stage"] or rest > MOST_BYTES["rest"]:
        print("too large to ship: remove it, and make the model smaller", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
