"""The README's grid: sixteen training captions, seeds 0 to 15, none chosen by eye.

    python tools/caption_grid.py MODEL SHARD.tar -o docs/images/emoji-grid.png

The captions stand at equal distances in the shard (number i * count // 16); image k has seed k and the defaults of the
model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import darkroom
from darkroom.data.io import contact_sheet, write_png
from darkroom.data.sources import DataConfig, open_dataset

COUNT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("shard")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    data = open_dataset(DataConfig(args.shard, validation=0.0, exclude={"group": ["component"]}))
    captions = data.captions()
    chosen = [captions[i * len(captions) // COUNT] for i in range(COUNT)]
    model = darkroom.load(args.model)
    assert isinstance(model, darkroom.LatentDiffusion)
    result = model.generate(chosen, seed=list(range(COUNT)))
    sheet = contact_sheet(list(result.images), chosen, columns=8)
    write_png(args.output, sheet, {"captions": json.dumps(chosen, ensure_ascii=False)})
    print(f"{args.output}: {', '.join(chosen)}")


if __name__ == "__main__":
    main()
