"""Put a trained perceptual network into the package:

    python tools/bundle_perceptual.py runs/perceptual --licence FILE... --table FILE

Writes src/darkroom/bundled/perceptual: float16 weights, the model card with the table of
`benchmarks/perceptual_validation.py`, the resolved recipe (paths of the data made relative), the training log and the
licences of the data.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import yaml
from bundle import relative, thin

from darkroom.features.perceptual import BUNDLED, load_perceptual
from darkroom.safe_files import read_json

MOST_BYTES = 5 * 2**20
CARD = """# perceptual

Darkroom's own perceptual network: a distance between pictures in the form of LPIPS, and an embedding for Frechet
distances. First stages are trained with it where the files of LPIPS are absent; scores made with it are called
`distance (darkroom)` and `FD-darkroom`, never LPIPS or FID.

| | |
|---|---|
| parameters | {parameters:,} |
| stages (channels) | {widths} |
| embedding | {embedding} numbers, float32 |
| pictures | any size, any number of channels, values in [-1, 1] |
| identity (`.sha256`) | `{sha256}` |

```python
from darkroom.features.perceptual import load_perceptual

network = load_perceptual()
network(image, other)  # (B, C, H, W) twice -> (B,) distances
network.embed(image)  # (B, {embedding})
```

## Data

- emoji-128, train split: 3,317 pictures of Noto Emoji (artwork Apache-2.0; the later licence OFL-1.1; flags
  public domain or exempt).
- clothing-128, train split: 4,314 photos of clothes (CC0-1.0) with 17 classes.

The licence texts lie beside this file. Nothing else was seen: no pretrained weights, no human judgements.

## Training

Made by `{command}` in {minutes} minutes on one core ({steps:,} steps, seed {seed}); `config.yaml` is the resolved
recipe, `training.jsonl` the log. Three tasks: find the other view of the same picture (NT-Xent); of one distortion at
two strengths rank the stronger further away, and a shift by one pixel nearer than a blur; name the class of the photos
that have one. Afterwards the distance was scaled so that its mean over all distortions at half strength is 0.1.

## Scores

`python benchmarks/perceptual_validation.py --data DIR`, on the validation splits (the kinds of distortion are those it
was trained to rank, the pictures are not):

```
{table}
```

## Limits

- No person judged these distances. That they rank distortions and forgive small shifts says nothing about finer
  preferences, for which LPIPS was fitted to human answers.
- It knows emoji and photos of clothes; its deep features mean less on other pictures. The photos of one sender share a
  background and can be on both sides of the split.
- Numbers are comparable only under the same identity.

## Licence

Apache-2.0
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--licence", type=Path, nargs="*", default=[], help="licence texts of the data, copied beside")
    parser.add_argument("--table", type=Path, required=True, help="output of benchmarks/perceptual_validation.py")
    parser.add_argument("--command", default="darkroom train perceptual --data DIR --threads 1")
    args = parser.parse_args()
    network = load_perceptual(args.run / "model")
    summary = read_json(args.run / "summary.json")
    BUNDLED.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(args.run / "model" / name, BUNDLED / name)
    card = CARD.format(
        parameters=summary["parameters"],
        widths=", ".join(map(str, network.config.widths)),
        embedding=network.embedding_width,
        sha256=network.sha256,
        command=args.command,
        minutes=summary["minutes"],
        steps=summary["steps"],
        seed=summary["seed"],
        table=args.table.read_text().strip(),
    )
    (BUNDLED / "README.md").write_text(card)
    config = yaml.safe_load((args.run / "config.yaml").read_text())
    kept = {key: config[key] for key in ("name", "description", "data", "perceptual")}
    kept["data"]["source"] = [Path(source).name for source in kept["data"]["source"]]
    (BUNDLED / "config.yaml").write_text(yaml.safe_dump(relative(kept), sort_keys=False, allow_unicode=True))
    log = thin((args.run / "metrics.jsonl").read_text().splitlines())
    (BUNDLED / "training.jsonl").write_text("\n".join(log) + "\n")
    for licence in args.licence:
        shutil.copyfile(licence, BUNDLED / f"LICENSE-{licence.name}")
    size = (BUNDLED / "model.safetensors").stat().st_size
    print(json.dumps({"place": str(BUNDLED), "MiB": round(size / 2**20, 2), "sha256": network.sha256}))
    return 1 if size > MOST_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
