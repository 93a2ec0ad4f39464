"""The direction of imports inside the package, which keeps each part readable and replaceable alone.

A layer is a top-level module or sub-package of `darkroom`. All imports count, also those inside functions; those under
`if TYPE_CHECKING` do not, because they do not exist when the program runs.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "darkroom"

# Helpers that any layer may use; among themselves they only go downwards in this order.
FOUNDATION = (
    "errors",
    "pixel_format",
    "config",
    "generation_defaults",
    "blueprint",
    "safe_json",
    "safe_files",
    "pickle_program",
    "safe_pickle",
    "kernels",
)

# layer: the layers it may import besides itself and the foundation.
ALLOWED: dict[str, set[str]] = {
    # pure tensors
    "diffusion": set(),
    "networks": set(),
    "features": set(),
    "conditioning": {"diffusion"},
    "first_stage": {"features"},
    "solvers": {"diffusion"},
    # the denoiser knows its network's configuration, never how to build it
    "denoiser": {"diffusion", "conditioning", "networks"},
    "objective": {"denoiser", "diffusion", "conditioning"},
    "guidance": {"denoiser", "diffusion", "conditioning"},
    "classifier_guidance": {"denoiser", "diffusion"},
    "inpaint": {"diffusion"},
    "data": set(),
    # configs of parts, dicts of tensors, and the tables of a schedule, which files hold
    "interop": {"networks", "first_stage", "conditioning", "diffusion"},
    # what is asked of a model; the model itself it knows by its type alone
    "generation_request": {"solvers", "inpaint", "conditioning"},
    # the only place where conditioning, denoiser and first stage meet
    "latent_diffusion": {
        "generation_request",
        "solvers",
        "guidance",
        "classifier_guidance",
        "inpaint",
        "denoiser",
        "conditioning",
        "first_stage",
        "diffusion",
    },
    # previews and metrics come in as hooks: never latent_diffusion, never evaluation
    "training": {"objective", "denoiser", "conditioning", "first_stage", "features", "diffusion", "data"},
    # conditions as requests, and bits per dimension, which are the objective's
    "evaluation": {
        "generation_request",
        "latent_diffusion",
        "conditioning",
        "objective",
        "diffusion",
        "first_stage",
        "features",
        "data",
    },
    # words and files about runs and models; no tensors
    "reconstruction": {"first_stage"},
    "png_settings": {"data"},
    "hub": set(),
    "model_folder": {"hub"},
    "report_charts": set(),
    "report_tables": set(),
    "model_card": {"report_tables"},
    "report": {"report_charts", "report_tables", "model_card"},
    "report_evaluation": {"report", "report_charts", "report_tables"},
    "report_scores": {"evaluation", "report", "report_charts", "report_tables"},
    "study_picture": {"report_evaluation", "report_charts", "report_tables"},
}
# What puts the parts together may import everything that does not stand above it.
COMPOSE = (
    "build",
    "assemble",
    "adapters",
    "model_io",
    "whole_models",
    "exchange",
    "model_pictures",
    "upscaling",
    "editing",
    "plan",
    "recipe_source",
    "perceptual_job",
    "remeasure",
    "clip_reader",
    "eval_places",
    "scoring_result",
    "scoring",
    "score_hook",
    "first_stage_job",
    "denoiser_job",
    "preview_job",
    "train_job",
    "eval_job",
    "repeat",
    "blind",
    "study",
    "serving",
    "cli",
    "__main__",
)
# Third-party packages of the pure layers.
ONLY_TORCH = (
    "kernels", "diffusion", "features", "networks", "solvers", "first_stage", "denoiser", "objective", "guidance",
    "classifier_guidance",
)  # fmt: skip

# (importer, imported): why. Only inside a function, so that importing the lower layer does not load the upper one.
EXCEPTIONS = {("latent_diffusion", "model_io"): "model.save(folder) is a method of the public contract"}


class Import:
    """One imported module: its dotted name, and whether the import runs inside a function."""

    def __init__(self, name: str, in_function: bool) -> None:
        self.name, self.in_function = name, in_function


def imports(source: str, module: str) -> Iterator[Import]:
    """Every module that `source` (the text of `module`, dotted) imports, relative imports resolved."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child, in_function)
            return
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from package import name` may import a module or take an attribute; both are the layer `name` or `base`.
            yield from (Import(f"{base}.{alias.name}", in_function) for alias in node.names)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def layer_of(module: str) -> str | None:
    """darkroom.data.io -> data; darkroom.errors.DarkroomError -> errors; darkroom.__version__ -> None."""
    parts = module.split(".")
    if parts[0] != "darkroom" or len(parts) == 1:
        return None
    known = {*ALLOWED, *FOUNDATION, *COMPOSE}
    name = parts[1]
    is_layer = name in known or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    return name if is_layer else None  # otherwise an attribute of the package itself


def may_import(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if imported in FOUNDATION:
        return importer not in FOUNDATION or FOUNDATION.index(imported) < FOUNDATION.index(importer)
    if importer in COMPOSE:
        return imported not in COMPOSE or COMPOSE.index(imported) < COMPOSE.index(importer)
    return imported in ALLOWED.get(importer, set())


def violations(source: str, module: str) -> list[str]:
    """Sentences about imports of `module` that go the wrong way."""
    importer = layer_of(module)
    if importer is None:  # darkroom/__init__.py: names resolved on use, for users
        return []
    found = []
    for item in imports(source, module):
        imported = layer_of(item.name)
        if imported is None:
            package = item.name.split(".")[0]
            if importer in ONLY_TORCH and package not in {"torch", "darkroom", *sys.stdlib_module_names}:
                found.append(f"{module} imports {package}: this layer needs torch only")
        elif not may_import(importer, imported) and not (item.in_function and (importer, imported) in EXCEPTIONS):
            found.append(f"{module} imports {item.name}: {importer} must not know {imported}")
    return found


def modules() -> list[tuple[str, str]]:
    """(dotted name, source) of the package's files."""
    return [
        (".".join(("darkroom", *path.relative_to(PACKAGE).with_suffix("").parts)), path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def test_imports_go_one_way() -> None:
    found = [violation for name, source in modules() for violation in violations(source, name)]
    assert not found, "\n".join(found)


def test_every_layer_is_in_the_table() -> None:
    known = {*ALLOWED, *FOUNDATION, *COMPOSE, "__init__"}
    layers = {name.split(".")[1] for name, _ in modules()} - {"recipes", "bundled"}  # data files, no code
    assert layers <= known, f"say in ALLOWED what these may import: {sorted(layers - known)}"


def test_exceptions_are_needed() -> None:
    used = {(layer_of(name), layer_of(item.name)) for name, source in modules() for item in imports(source, name)}
    assert set(EXCEPTIONS) <= used


def test_third_party_packages_are_declared() -> None:
    """What the package imports at run time is a dependency; development tools never are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"pyyaml": "yaml", "pillow": "PIL"}
    declared = {names.get(d, d) for d in (d.split(">")[0].lower() for d in project["dependencies"])}
    for name, source in modules():
        for item in imports(source, name):
            package = item.name.split(".")[0]
            assert package in {"darkroom", *declared, *sys.stdlib_module_names}, f"{name} imports {package}"


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("darkroom.networks.dit", "from darkroom.first_stage.autoencoder import Autoencoder", "first_stage"),
        ("darkroom.first_stage.vq", "import darkroom.networks.unet", "networks"),
        ("darkroom.first_stage.vq", "from ..conditioning import types", "conditioning"),
        ("darkroom.training.loop", "def f():\n    from darkroom.latent_diffusion import Request", "latent_diffusion"),
        (
            "darkroom.training.loop",
            "try:\n    from darkroom import evaluation\nexcept ImportError:\n    pass",
            "evaluation",
        ),
        ("darkroom.diffusion.levels", "import numpy", "numpy"),
        ("darkroom.solvers.ddim", "from darkroom.denoiser import Denoiser", "denoiser"),
        ("darkroom.data.io", "import darkroom.cli.main", "cli"),
        ("darkroom.model_io", "from darkroom.cli import main", "cli"),
        ("darkroom.build", "from darkroom.model_io import load", "model_io"),
        ("darkroom.errors", "from darkroom.config import nearest", "config"),
        ("darkroom.latent_diffusion", "from darkroom.model_io import save", "model_io"),  # at the top: no exception
    ],
)
def test_the_checker_sees_a_violation(module: str, source: str, wrong: str) -> None:
    assert any(wrong in violation for violation in violations(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("darkroom.first_stage.losses", "from darkroom.features.lpips import LPIPS\nimport torch, math"),
        ("darkroom.networks.dit", "if TYPE_CHECKING:\n    from darkroom.first_stage.autoencoder import Autoencoder"),
        ("darkroom.latent_diffusion", "def save(self):\n    from darkroom.model_io import save"),
        ("darkroom.cli.train", "def run():\n    from darkroom.train_job import train"),
        ("darkroom.training.loop", "from .progress import Progress\nfrom darkroom import __version__"),
    ],
)
def test_the_checker_lets_good_imports_pass(module: str, source: str) -> None:
    assert violations(source, module) == []
