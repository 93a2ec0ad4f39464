"""Families of published models: how each is recognised, and the facts that no tensor's shape tells.

The first row whose test holds wins, so the more special come first. What shapes do tell is read from the file
(`compvis_networks.py`, `compvis_conditions.py`). The recipes in `recipes/paper` hold the same facts, and a test
compares both. torch is not needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from darkroom.config import nearest
from darkroom.errors import DarkroomError
from darkroom.interop.compvis_first_stage import SD1_SCALE, SD3_SCALE, SD3_SHIFT, SDXL_SCALE, UPSCALER_SCALE

# Betas of the schedules, linear in sqrt(beta) unless a kind is named.
PAPER_UNCONDITIONAL = {"beta_start": 0.0015, "beta_end": 0.0195}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Look:
    """What a file shows at a glance.

    network:      "unet", "mmdit" or "dit"
    extra:        channels that the network takes besides the latent's
    conditions:   what the condition's tensors are: "clip", "open_clip", "sdxl", "sd3", "text", "boxes", "class", "map",
                  "first_stage" (listed once more) or None
    quantised, f: of the first stage; None where there is none
    traits:       "updown" (residual blocks change the resolution), "labels", "dual" (a second attention), "qk_norm"
    name:         of the file, in small letters; read only where nothing else tells two families apart
    context:      width of what a U-Net attends to; None where it attends to nothing
    vector:       whether a U-Net reads a label or a vector
    """

    network: str
    extra: int
    conditions: str | None
    quantised: bool | None
    f: int | None
    traits: frozenset[str]
    name: str
    context: int | None = None
    vector: bool = False


@dataclass(frozen=True)
class Family:
    """network:  options of the network's config that shapes do not tell
    shift, scale: of the latents
    averaged: whether the official configuration keeps averaged weights
    size:     of its images, (width, height)
    """

    name: str
    title: str
    recipe: str
    is_it: Callable[[Look], bool]
    network: Mapping[str, Any] = field(default_factory=dict)
    prediction: str = "epsilon"
    schedule: Mapping[str, Any] = field(default_factory=dict)
    learned_variance: bool = False
    scale: float = 1.0
    shift: float = 0.0
    averaged: bool = False
    steps: int = 50
    guidance_scale: float = 1.0
    solver: str = "ddim"
    size: tuple[int, int] = (256, 256)

    @property
    def defaults(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "solver": self.solver,
            "size": list(self.size),
        }


def _paper(name: str, title: str, recipe: str, is_it: Callable[[Look], bool], end: float, **more: Any) -> Family:
    schedule = {"beta_start": 0.0015, "beta_end": end}
    return Family(name, title, recipe, is_it, schedule=schedule, averaged=True, **more)


def _sd2(name: str, title: str, is_it: Callable[[Look], bool], **more: Any) -> Family:
    facts: dict[str, Any] = {"network": {"num_head_channels": 64, "legacy": False}, "schedule": STABLE_DIFFUSION}
    facts |= {"scale": SD1_SCALE, "guidance_scale": 9.0, "size": (512, 512)}
    return Family(name, title, name, is_it, **(facts | more))


def _sd3(name: str, title: str, is_it: Callable[[Look], bool]) -> Family:
    return Family(
        name,
        title,
        name,
        is_it,
        network={"pos_embed_base_size": 64},
        prediction="velocity",
        schedule={"kind": "flow", "shift": 3.0},
        scale=SD3_SCALE,
        shift=SD3_SHIFT,
        steps=28,
        guidance_scale=5.0,
        solver="euler",
        size=(1024, 1024),
    )


WIDTH_32 = {"num_head_channels": 32}
HEADS_8 = {"num_heads": 8}

FAMILIES: tuple[Family, ...] = (
    _sd3(
        "sd3.5-medium",
        "Stable Diffusion 3.5 medium",
        lambda k: k.network == "mmdit" and not k.extra and "dual" in k.traits,
    ),
    _sd3(
        "sd3.5-large",
        "Stable Diffusion 3.5 large",
        lambda k: k.network == "mmdit" and not k.extra and "qk_norm" in k.traits,
    ),
    _sd3("sd3-medium", "Stable Diffusion 3 medium", lambda k: k.network == "mmdit" and not k.extra),
    Family(
        "dit",
        "DiT on ImageNet",
        "dit-xl-2",
        lambda k: k.network == "dit",
        schedule={"kind": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        learned_variance=True,
        scale=SD1_SCALE,
        steps=250,
        guidance_scale=4.0,
        solver="ddpm",
    ),
    Family(
        "sdxl-base",
        "Stable Diffusion XL base",
        "sdxl-base",
        lambda k: k.conditions == "sdxl" and not k.extra,
        network={"num_head_channels": 64, "legacy": False},
        schedule=STABLE_DIFFUSION,
        scale=SDXL_SCALE,
        steps=40,
        guidance_scale=7.0,
        solver="euler",
        size=(1024, 1024),
    ),
    _sd2(
        "sd-v2-x4-upscaler",
        "Stable Diffusion x4 upscaler",
        lambda k: k.conditions == "open_clip" and k.extra == 3 and "labels" in k.traits,
        network={**HEADS_8, "legacy": False, "disable_self_attentions": [True, True, True, False]},
        prediction="v",
        schedule={"beta_start": 0.0001, "beta_end": 0.02},
        scale=UPSCALER_SCALE,
    ),
    _sd2("sd-v2-inpainting", "Stable Diffusion 2 inpainting", lambda k: k.conditions == "open_clip" and k.extra == 5),
    _sd2("sd-v2-depth", "Stable Diffusion 2 depth", lambda k: k.conditions == "open_clip" and k.extra == 1),
    # Both have the same tensors; the epsilon model is told by its file's name.
    _sd2(
        "sd-v2-base",
        "Stable Diffusion 2 base",
        lambda k: k.conditions == "open_clip" and not k.extra and _says(k, "base", "512"),
    ),
    _sd2(
        "sd-v2-v768",
        "Stable Diffusion 2 at 768 pixels",
        lambda k: k.conditions == "open_clip" and not k.extra,
        prediction="v",
        size=(768, 768),
    ),
    Family(
        "sd-v1-inpainting",
        "Stable Diffusion 1 inpainting",
        "sd-v1-inpainting",
        lambda k: k.conditions == "clip" and k.extra == 5,
        network={**HEADS_8, "legacy": False},
        schedule=STABLE_DIFFUSION,
        scale=SD1_SCALE,
        guidance_scale=7.5,
        size=(512, 512),
    ),
    Family(
        "sd-v1",
        "Stable Diffusion 1",
        "sd-v1",
        lambda k: k.conditions == "clip" and not k.extra,
        network={**HEADS_8, "legacy": False},
        schedule=STABLE_DIFFUSION,
        scale=SD1_SCALE,
        guidance_scale=7.5,
        solver="plms",
        size=(512, 512),
    ),
    _paper(
        "layout2img-openimages256",
        "the paper's LDM-4 from layouts (layout2img-openimages256)",
        "ldm-layout2img-openimages256",
        lambda k: k.conditions == "boxes" and not k.extra,
        0.0205,
        network=WIDTH_32,
    ),
    Family(
        "text2img-large",
        "the paper's text2img-large",
        "ldm-text2img-large",
        lambda k: k.conditions == "text" and not k.extra and not k.quantised,
        network={**HEADS_8, "legacy": False},
        schedule=STABLE_DIFFUSION,
        scale=SD1_SCALE,
        guidance_scale=5.0,
        solver="plms",
    ),
    _paper(
        "text2img256",
        "the paper's text2img256",
        "ldm-text2img256",
        lambda k: k.conditions == "text" and not k.extra,
        0.0195,
        network=WIDTH_32,
        guidance_scale=5.0,
    ),
    _paper(
        "cin256",
        "the paper's LDM-8 on ImageNet (cin256)",
        "ldm-cin256-f8",
        lambda k: k.conditions == "class" and not k.extra and k.f == 8,
        0.0195,
        network=WIDTH_32,
    ),
    _paper(
        "cin256-v2",
        "the paper's LDM-4 on ImageNet with guidance (cin256-v2)",
        "ldm-cin256",
        lambda k: k.conditions == "class" and not k.extra,
        0.0195,
        network={"num_heads": 1},
        guidance_scale=3.0,
    ),
    _paper(
        "semantic_synthesis512",
        "the paper's LDM-4 from label maps at 512 pixels (semantic_synthesis512)",
        "ldm-semantic512",
        lambda k: k.conditions == "map" and _says(k, "512"),
        0.0205,
        network=HEADS_8,
        size=(512, 512),
    ),
    _paper(
        "semantic_synthesis256",
        "the paper's LDM-4 from label maps (semantic_synthesis256)",
        "ldm-semantic256",
        lambda k: k.conditions == "map",
        0.0205,
        network=HEADS_8,
    ),
    _paper(
        "inpainting_big",
        "the paper's inpainting model (inpainting_big)",
        "ldm-inpainting-big",
        lambda k: k.conditions == "first_stage" or _is_masked(k),
        0.0205,
        network=HEADS_8,
        size=(512, 512),
    ),
    _paper(
        "bsr_sr",
        "the paper's x4 super-resolution (bsr_sr)",
        "ldm-sr",
        lambda k: _is_bare(k) and k.extra == 3,
        0.0155,
        network=WIDTH_32,
    ),
    _paper(
        "lsun_churches256",
        "the paper's LDM-8 on LSUN churches (lsun_churches256)",
        "ldm-lsun-churches256",
        lambda k: _is_bare(k) and not k.extra and "updown" in k.traits,
        0.0155,
        network=HEADS_8,
    ),
    _paper(
        "celeba256",
        "an unconditional LDM-4 of the paper (celeba256, ffhq256, lsun_beds256)",
        "ldm-celeba256",
        lambda k: _is_bare(k) and not k.extra,
        0.0195,
        network=WIDTH_32,
    ),
)


def _says(look: Look, *words: str) -> bool:
    return any(word in look.name for word in words)


def _is_bare(look: Look) -> bool:
    """The file holds no encoder of a condition, and the network reads none."""
    return look.conditions is None and look.context is None and not look.vector


def _is_masked(look: Look) -> bool:
    """A masked picture's latent and its mask are joined; files may list the condition's tensors or not."""
    return _is_bare(look) and look.extra == 4 and "updown" in look.traits


def recognise(look: Look, where: str) -> Family:
    found = next((family for family in FAMILIES if family.is_it(look)), None)
    if found is None:
        read = [f"a context of width {look.context}"] * (look.context is not None) + ["a vector"] * look.vector
        if look.conditions is None and read:
            raise DarkroomError(
                f"{where} lacks the encoder of its condition: its network reads {' and '.join(read)}, and no tensor of "
                "the file makes it; take a file that holds the text tower too, or its first stage alone with "
                "--first-stage or darkroom.load_first_stage"
            )
        said = {"its network": look.network, "channels of its condition": look.extra, "condition": look.conditions}
        raise DarkroomError(
            f"{where} is a whole model of no known family ({', '.join(f'{k} {v}' for k, v in said.items())}); its "
            "first stage alone can be taken with --first-stage or darkroom.load_first_stage"
        )
    return found


def family_named(name: str) -> Family:
    found = next((family for family in FAMILIES if family.name == name), None)
    if found is None:
        known = nearest(name, [family.name for family in FAMILIES])
        raise DarkroomError(f'"{name}" is no family of models{known}; correct "family" in the model\'s index')
    return found
