"""How often a model trained on `shapes` draws what the prompt says, by the exact pixel rules of `check_caption`.

    python benchmarks/shapes_agreement.py MODEL [--count 500] [--steps 20] [--solver dpm++2m] [--cfg-scale 3]
    python benchmarks/shapes_agreement.py MODEL --solvers     DDIM 50 steps against DPM++ 2M 15 steps

The prompts are drawn with a fixed seed from the language of the set, without the combinations that the training split
never contains: those are counted apart. Image k has seed k. The 95 % intervals are Wilson's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import darkroom
from darkroom.data.shapes import check_caption, prompts

PROMPT_SEED = 2022


def interval(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return centre - half, centre + half


def measure(model: Any, kind: str, held_out: bool, count: int, **settings: Any) -> dict[str, Any]:
    """Generate `count` images and check each against its own prompt."""
    texts = prompts(count, seed=PROMPT_SEED, kind=kind, held_out=held_out)
    started = time.perf_counter()
    result = model.generate(texts, seed=list(range(count)), batch_size=50, **settings)
    seconds = time.perf_counter() - started
    verdicts = [check_caption(image, text) for image, text in zip(result.images, texts, strict=True)]
    ok = sum(v.ok for v in verdicts)
    low, high = interval(ok, count)
    return {
        "prompts": kind + (", combination never trained" if held_out else ""),
        "count": count,
        "ok": round(ok / count, 4),
        "interval": [round(low, 4), round(high, 4)],
        "colour": round(sum(v.colour_ok for v in verdicts) / count, 4),
        "shape": round(sum(v.shape_ok for v in verdicts) / count, 4),
        "position": round(sum(v.position_ok for v in verdicts) / count, 4),
        "nfe": result.nfe,
        "seconds_per_image": round(seconds / count, 4),
        **settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model or run folder trained on shapes")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--solver")
    parser.add_argument("--cfg-scale", type=float)
    parser.add_argument("--solvers", action="store_true", help="compare DDIM 50 with DPM++ 2M 15")
    parser.add_argument("--json", type=Path, help="also write the records here")
    args = parser.parse_args()
    if args.model is None:
        print("give a model trained on shapes: darkroom train shapes -o runs/shapes; then runs/shapes/model")
        return
    model = darkroom.load(args.model)
    settings = {"steps": args.steps, "solver": args.solver, "guidance_scale": args.cfg_scale}
    settings = {k: v for k, v in settings.items() if v is not None}
    rows = []
    if args.solvers:
        for _ in range(2):  # interleaved, the second round is reported: the first warms the caches
            pair = [
                measure(model, kind, False, args.count, **(settings | {"solver": solver, "steps": steps}))
                for kind in ("single", "pair")
                for solver, steps in (("ddim", 50), ("dpm++2m", 15))
            ]
        rows = pair
    else:
        for kind in ("single", "pair"):
            rows.append(measure(model, kind, False, args.count, **settings))
            rows.append(measure(model, kind, True, min(args.count, 250), **settings))
    for row in rows:
        low, high = row["interval"]
        what = f"{row.get('solver', model.defaults['solver'])} {row.get('steps', model.defaults['steps'])} steps"
        print(
            f"{row['prompts']:<38} {what:<20} {row['ok']:6.1%} [{low:.1%}, {high:.1%}] of {row['count']}   "
            f"colour {row['colour']:.1%}  shape {row['shape']:.1%}  position {row['position']:.1%}   "
            f"{row['nfe']} calls, {row['seconds_per_image'] * 1000:.0f} ms an image"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
