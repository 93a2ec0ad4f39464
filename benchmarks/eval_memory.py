"""Memory of an evaluation from 1,000 to 50,000 images: it must not grow with their number.

    python benchmarks/eval_memory.py [--counts 1000 10000 50000] [--side 32] [--extractor darkroom]
    python benchmarks/eval_memory.py --extractor inception-tf --counts 500 2000

Each number of images runs in a process of its own: as many noise images are looked at by the bundled extractor against
as many others, the parts go to the disk as in `darkroom eval`, and every score is made of them that needs no model. The
peak of resident memory is that of the whole process, the libraries included. It fails where the largest is more than
5 % above the smallest. Inception has random weights in the published layout: memory does not depend on their values.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ALLOWED = 1.05
METRICS = ("fd", "kd", "pr", "dc")


def measure(count: int, side: int, name: str) -> dict[str, float]:
    """In this process: peak memory in MB, seconds, and the scores."""
    import torch

    from darkroom.evaluation.extractors import open_extractor
    from darkroom.evaluation.feature_files import FeatureFiles, Pictures, observe
    from darkroom.evaluation.measure import Seen, distance_scores, memorised, nearest_training

    class Noise:
        """Images by number, of a kind."""

        def __init__(self, kind: int) -> None:
            self.kind = kind

        def __len__(self) -> int:
            return count

        def read(self, numbers: Sequence[int]) -> Pictures:
            generator = torch.Generator().manual_seed(self.kind * 10**6 + numbers[0])
            coarse = torch.rand(len(numbers), 3, 4, 4, generator=generator) * 255
            images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
            return Pictures(images.to(torch.uint8).permute(0, 2, 3, 1).contiguous(), {})

    stay_in_memory()
    torch.set_num_threads(1)
    started = time.perf_counter()
    extractor = open_extractor(name)
    with tempfile.TemporaryDirectory() as folder:
        seen = []
        for kind in range(2):
            files = FeatureFiles(Path(folder) / str(kind), count, 64)
            observe(Noise(kind), files, extractor)
            seen.append(Seen(files, extractor))
        scores = distance_scores(seen[0], seen[1], METRICS).scores
        near = memorised(seen[0], nearest_training(seen[0], seen[1], seen[1]))
        assert near is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    values = {score.metric: round(score.value, 5) for score in (*scores, near)}
    return {"count": count, "peak_mb": round(peak, 1), "seconds": round(time.perf_counter() - started, 1), **values}


def stay_in_memory() -> None:
    """Where it is allowed: pages that were used stay, until they are freed. A system that takes back what it could read
    again from the files of the libraries would make a slow process look smaller than a quick one."""
    if sys.platform == "linux" and os.geteuid() == 0:
        current, future, when_touched = 1, 2, 4
        ctypes.CDLL(None).mlockall(current | future | when_touched)


def random_inception(folder: Path) -> None:
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from feature_weights import randomise

    from darkroom.features import inception

    torch.save(dict(randomise(inception.Inception()).state_dict()), folder / inception.FILES[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--extractor", choices=("darkroom", "inception-tf"), default="darkroom")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one, args.side, args.extractor)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if args.extractor != "darkroom":
            random_inception(Path(folder))
            environment["DARKROOM_WEIGHTS"] = folder
        for count in args.counts:
            command = [sys.executable, __file__, "--one", str(count), "--side", str(args.side)]
            command += ["--extractor", args.extractor]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{count:7,} images: peak {rows[-1]['peak_mb']:.1f} MB, {rows[-1]['seconds']:.1f} s", flush=True)
    ratio = max(row["peak_mb"] for row in rows) / min(row["peak_mb"] for row in rows)
    print(f"largest / smallest {ratio:.3f} ({'within' if ratio <= ALLOWED else 'BEYOND'} {ALLOWED})")
    sys.exit(ratio > ALLOWED)


if __name__ == "__main__":
    main()
