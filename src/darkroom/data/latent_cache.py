"""Latents of a whole data set, computed once: the autoencoder's posterior moments, before normalisation.

The cache is keyed by everything that decides them (autoencoder weights, transform rule, data, flip), so it is never
stale: with another key it is computed again. A fresh latent is sampled from the moments in every step.

Shapes: N examples, 2C mean and log-variance channels, H W latent size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darkroom.data.batches import collate
from darkroom.data.sources import ImageDataset
from darkroom.data.transforms import RULE_VERSION, flip_example
from darkroom.errors import DarkroomError
from darkroom.safe_files import save_error, write_file

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SYNC_EXAMPLES = 2048  # at most this much work is lost when the machine stops

_DATA, _PARTIAL, _META, _STATE = "moments.bin", "moments.partial", "cache.json", "partial.json"


def module_hash(module: nn.Module) -> str:
    """SHA-256 of a module's state: names, types, shapes and values."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


class LatentCache:
    """Examples like those of the data set it was built from, with `moments` float32 (2C, H, W) instead of `image`.

    The image is there too where it is wanted: a condition that hides a part of it cannot be cached, because its masks
    change from batch to batch.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        moments: np.ndarray,
        dtype: torch.dtype,
        wanted: Collection[str] | None = None,
    ) -> None:
        """moments: integers of the dtype's width, (N, 1 or 2, 2C, H, W); the second of two is the mirrored picture.
        wanted: the other fields that examples have; None means all but the image."""
        self.dataset, self._moments, self._dtype, self._wanted = dataset, moments, dtype, wanted
        self.config, self.digest, self.problems = dataset.config, dataset.digest, dataset.problems
        self.class_names, self.box_names = dataset.class_names, dataset.box_names
        self.mask_rule = dataset.mask_rule
        self.redraws = dataset.redraws and (wanted is None or "low_resolution" in wanted)
        others = (f for f in dataset.fields if (f != "image" if wanted is None else f in wanted))
        self.fields = ("moments", *others)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(index)

    def example(self, index: int, flip: bool = False) -> dict[str, Any]:
        if self._wanted is not None and "image" in self._wanted:
            others = {name: value for name, value in self.dataset[index].items() if name in self._wanted}
        else:
            others = self.dataset.without_image(index, self._wanted)
        return self._with_moments(index, others, flip)

    def redrawn(self, index: int, rng: np.random.Generator, flip: bool = False) -> dict[str, Any]:
        """`example`, its random fields drawn from `rng` instead of being its own."""
        wanted = set(self.fields)
        others = {name: value for name, value in self.dataset.redrawn(index, rng).items() if name in wanted}
        return self._with_moments(index, others, flip)

    def _with_moments(self, index: int, others: dict[str, Any], flip: bool) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        stored = torch.from_numpy(np.array(self._moments[index, int(flip)])).view(self._dtype)
        return {"moments": stored.float(), **(flip_example(others) if flip else others)}

    def captions(self) -> list[str]:
        return self.dataset.captions()

    @classmethod
    def build(
        cls,
        dataset: ImageDataset,
        encode: Callable[[Tensor], Tensor],
        folder: str | Path,
        *,
        autoencoder: nn.Module | str,
        batch_size: int = 32,
        dtype: str = "float32",
        wanted: Collection[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> LatentCache:
        """The cache in `folder`: opened when its key fits, continued when it was interrupted, otherwise computed.

        encode: images (B, C, height, width) in [-1, 1] -> unnormalised moments (B, 2C, H, W).
        autoencoder: the module that `encode` uses, or a string that identifies it (`encoder_fingerprint` of a first
            stage: shift, scale and decoder then may change without a new cache).
        wanted: the fields besides the latents that examples shall have; None means all but the image.
        progress: called with (examples done, examples in all).
        say: told when what is there belongs to another autoencoder, and so is computed again.
        """
        config = dataset.config
        if config.random_crop is not None:
            raise DarkroomError(
                "latents of random crops cannot be cached, every crop has its own; set random_crop to null for the "
                "denoiser, or train it without a latent cache"
            )
        if dtype not in DTYPES:
            raise DarkroomError(f"latent cache dtype {dtype!r} does not exist; use {', '.join(DTYPES)}")
        identity = autoencoder if isinstance(autoencoder, str) else module_hash(autoencoder)
        facts = [FORMAT, RULE_VERSION, identity, dataset.digest, bool(config.flip), dtype, len(dataset)]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / ".lock"):  # ranks that share the folder: the first computes, the others find it done
                meta = _finished(folder, key)
                if meta is None:
                    other = _facts(folder).get("autoencoder", identity)
                    if other != identity and say is not None:
                        say(f"{folder}: latents of autoencoder {other[:12]}, now it is {identity[:12]}: encoding again")
                    about = {"autoencoder": identity, "dtype": dtype}
                    meta = _compute(dataset, encode, folder, key, batch_size, DTYPES[dtype], progress, about)
        except OSError as error:
            for name in (_PARTIAL, _STATE):
                (folder / name).unlink(missing_ok=True)
            raise save_error(folder, error) from None
        dataset.replaced.update({int(k): v for k, v in meta["replaced"].items()})
        return cls(dataset, _open(folder / _DATA, meta["shape"], DTYPES[dtype]), DTYPES[dtype], wanted)


def is_cache(folder: str | Path) -> bool:
    """Whether a folder holds a finished cache, of whatever autoencoder."""
    return (Path(folder) / _META).is_file() and (Path(folder) / _DATA).is_file()


def cached_moments(folder: str | Path, autoencoder: str) -> Iterator[Tensor]:
    """The unnormalised moments (B, 2E or E, h, w) of a finished cache, in order, without its data set.

    Raises DarkroomError if it belongs to another autoencoder than the one with this fingerprint.
    """
    folder = Path(folder)
    meta = _facts(folder)
    try:
        shape, owner, dtype = [int(n) for n in meta["shape"]], str(meta["autoencoder"]), DTYPES[meta["dtype"]]
        whole = (folder / _DATA).stat().st_size == meta["bytes"] and len(shape) == 5
    except (OSError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise DarkroomError(f"{folder} holds no complete latent cache; a run's are in its latents/train and validation")
    if owner != autoencoder:
        raise DarkroomError(
            f"{folder} holds latents of another autoencoder (encoder {owner[:12]}, this one has {autoencoder[:12]}); "
            "encode the images with this one"
        )
    stored = _open(folder / _DATA, shape, dtype)
    at_once = max(1, 2**22 // max(1, int(np.prod(shape[1:]))))
    for first in range(0, shape[0], at_once):
        yield torch.from_numpy(np.array(stored[first : first + at_once])).view(dtype).float().flatten(0, 1)


def _facts(folder: Path) -> dict[str, Any]:
    """What a folder says about the cache in it; {} where there is none."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _integers(dtype: torch.dtype) -> np.dtype[Any]:
    """NumPy has no bfloat16, so moments are stored as integers of the same width."""
    return np.dtype(np.int32 if dtype.itemsize == 4 else np.int16)


def _open(path: Path, shape: list[int], dtype: torch.dtype) -> np.ndarray:
    if not shape[0]:
        return np.zeros(shape, _integers(dtype))  # an empty file cannot be mapped
    return np.memmap(path, _integers(dtype), "r", shape=tuple(shape))


def _finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The facts of a complete cache with this key."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        whole = meta["key"] == key and (folder / _DATA).stat().st_size == meta["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if whole else None


def _compute(
    dataset: ImageDataset,
    encode: Callable[[Tensor], Tensor],
    folder: Path,
    key: str,
    batch_size: int,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
    about: dict[str, str],
) -> dict[str, Any]:
    """Encode everything, appending to a partial file; whole batches that are already there are kept."""
    count, flip = len(dataset), bool(dataset.config.flip)
    state = _unfinished(folder, key)
    done, shape = state["done"], state["shape"]
    dataset.replaced.update({int(k): v for k, v in state["replaced"].items()})
    for stale in (_META, _DATA):
        (folder / stale).unlink(missing_ok=True)
    saved = done
    with open(folder / _PARTIAL, "r+b" if done else "wb") as file:
        file.truncate(state["bytes"])
        file.seek(state["bytes"])
        while done < count:
            images = [dataset[i]["image"] for i in range(done, min(done + batch_size, count))]
            moments = _encode(encode, collate([{"image": i} for i in images], dataset.pixels)["image"], flip, done)
            shape = list(moments.shape[1:])
            stored = moments.to(dtype)
            file.write(stored.contiguous().view(torch.int32 if dtype.itemsize == 4 else torch.int16).numpy().tobytes())
            done += len(images)
            if done - saved >= SYNC_EXAMPLES or done == count:
                file.flush()
                os.fsync(file.fileno())
                state = {"key": key, "done": done, "shape": shape, "bytes": file.tell(), "replaced": dataset.replaced}
                write_file(folder / _STATE, json.dumps(state).encode())
                saved = done
            if progress is not None:
                progress(done, count)
    os.replace(folder / _PARTIAL, folder / _DATA)
    meta = {**about, "key": key, "shape": [count, *(shape or [1, 0, 0, 0])], "bytes": (folder / _DATA).stat().st_size}
    meta["replaced"] = dict(dataset.replaced)
    write_file(folder / _META, json.dumps(meta).encode())
    (folder / _STATE).unlink(missing_ok=True)
    return meta


def _unfinished(folder: Path, key: str) -> dict[str, Any]:
    """How far an interrupted computation with this key got; the beginning otherwise."""
    try:
        state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if state["key"] == key and (folder / _PARTIAL).stat().st_size >= state["bytes"]:
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"done": 0, "shape": None, "bytes": 0, "replaced": {}}


def _encode(encode: Callable[[Tensor], Tensor], images: Tensor, flip: bool, first: int) -> Tensor:
    """(B, 1 or 2, 2C, H, W) float32 moments of images and, with flip, of their mirror images."""
    with torch.inference_mode():
        parts = [encode(images)] + ([encode(images.flip(-1))] if flip else [])
    moments = torch.stack([p.detach().float().cpu() for p in parts], 1)
    if not torch.isfinite(moments).all():
        raise DarkroomError(
            f"the first stage gives latents that are not finite (examples {first}..{first + len(images) - 1}); "
            "train it again with a lower rate, or in float32"
        )
    return moments


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder against other processes, where the system can."""
    try:
        import fcntl
    except ImportError:  # not on Windows; there only one process at a time may build
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
