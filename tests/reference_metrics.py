"""The libraries that our scores are compared with, imported for their arithmetic alone.

torch-fidelity and clean-fid import torchvision for the sake of their data loaders; it has no CPU build of every version
of torch. Empty classes of its names let the rest of both be imported, and are gone afterwards, so that no other library
believes in them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

NAMES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class _AnyName(type):
    """A class whose attributes are classes of the same kind, to inherit from or to name in an annotation."""

    def __getattr__(cls, name: str) -> Any:
        return _any_name(name)


def _any_name(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyName(name, (), {})


@contextmanager
def _stand_in() -> Iterator[None]:
    modules = {}
    for name in NAMES:
        modules[name] = ModuleType(name)
        modules[name].__path__ = []  # a package
        modules[name].__getattr__ = _any_name  # type: ignore[method-assign]
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, modules[name])
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in NAMES:
            del sys.modules[name]


with _stand_in():
    fidelity = import_module("torch_fidelity")
    fidelity_inception = import_module("torch_fidelity.feature_extractor_inceptionv3")
    fidelity_clip = import_module("torch_fidelity.feature_extractor_clip")
    fidelity_fid = import_module("torch_fidelity.metric_fid")
    fidelity_isc = import_module("torch_fidelity.metric_isc")
    fidelity_kid = import_module("torch_fidelity.metric_kid")
    fidelity_prc = import_module("torch_fidelity.metric_prc")
    fidelity_resize = import_module("torch_fidelity.interpolate_compat_tensorflow")
    clean = import_module("cleanfid.fid")
    clean_inception = import_module("cleanfid.inception_torchscript")
    clean_resize = import_module("cleanfid.resize")

# This one asks whether torchvision is there, and does without; torch-fidelity it finds as imported above.
metrics_fid = import_module("torchmetrics.image.fid")
metrics_kid = import_module("torchmetrics.image.kid")
metrics_accuracy = import_module("torchmetrics.functional.classification")
metrics_clip = import_module("torchmetrics.functional.multimodal.clip_score")
metrics_lpips = import_module("torchmetrics.functional.image.lpips")
