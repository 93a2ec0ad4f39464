"""The schema of recipes against an independent validator, and against the strict reader."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
import yaml

from darkroom.config import merge, to_dict
from darkroom.errors import DarkroomError
from darkroom.networks.unet import UNetConfig
from darkroom.training.recipe import read_recipe, recipe_names, resolve
from darkroom.training.recipe_schema import descriptions, recipe_schema

VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


def test_it_is_a_schema_and_the_command_prints_it() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    command = [sys.executable, "-m", "darkroom.training.recipe_schema"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == recipe_schema()


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_shipped_recipes_are_valid_as_written_and_as_resolved(name: str) -> None:
    path = recipe_names()[name]
    VALIDATOR.validate(yaml.safe_load(path.read_text()))
    VALIDATOR.validate(json.loads(json.dumps(to_dict(resolve(read_recipe(path))))))


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"steps": None}, True),
        ({"optimizer": {"learning_rate": "1e-4"}}, True),
        ({"optimizer": {"learning_rate": "0.001"}}, True),
        ({"optimizer": {"learning_rate": "1.2.3e4"}}, False),
        ({"optimizer": {"learning_rate": "fast"}}, False),
        ({"step": 5}, False),
        ({"steps": "many"}, False),
        ({"denoiser": {"network": {"num_res_blocks": [1, 2]}}}, True),
        ({"denoiser": {"network": {"modelchannels": 3}}}, False),
        ({"denoiser": {"network": {"kind": "unet", "dropout": 0.1}}}, True),
        ({"denoiser": {"network": {"kind": "dit"}}}, False),  # the base's options are the U-Net's
        ({"denoiser": {"network": {"kind": "dti"}}}, False),
        ({"denoiser": {"prediction_type": "velo"}}, False),
        ({"conditioner": {"text": {"kind": "tekst"}}}, False),
        ({"conditioner": {"text": {"kind": "text", "width": 64, "slot": "context"}}}, False),
        ({"conditioner": {"text": None, "class": {"kind": "class", "width": 64, "slot": "vector"}}}, True),
        ({"data": {"size": [64, 32]}}, True),
        ({"data": {"size": "large"}}, False),
    ],
)
def test_schema_and_reader_agree(change: dict[str, Any], valid: bool) -> None:
    recipe = merge(read_recipe(recipe_names()["shapes-tiny"]), change)
    assert VALIDATOR.is_valid(recipe) == valid
    if valid:
        resolve(recipe)
    else:
        with pytest.raises(DarkroomError):
            resolve(recipe)


def test_descriptions_come_from_docstrings() -> None:
    about = descriptions(UNetConfig)
    assert about["model_channels"].startswith("width of the first level; level i has")
    for definition in recipe_schema()["$defs"].values():
        for name, setting in definition["properties"].items():
            text = setting.get("description", "")
            assert not text.endswith((" or", ",")) and not any(
                f" {other}:" in text for other in definition["properties"]
            ), name
    assert "zero padding" in about["position_embedding"] and about["position_embedding"].endswith("left and right")
