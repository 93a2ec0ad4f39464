"""Our schedule, prediction type and default solver <-> scheduler_config.json of the diffusers library.

A scheduler of theirs is two things in one: the noise that a model was trained with, which must be kept, and a numerical
method, which is a default that anyone may replace. torch is not needed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from darkroom.errors import DarkroomError

PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
BETAS = {"ldm": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
# Our solvers and their schedulers; of those without a row DDIM takes the place, the method of the paper.
SOLVERS = {
    "ddim": "DDIMScheduler",
    "plms": "PNDMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
# Schedulers that are read besides, and the solver that comes next to them.
READ_AS = {
    "DPMSolverMultistepScheduler": "dpm++2m",
    "DPMSolverSinglestepScheduler": "dpm++2m",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2_ancestral",
    "DPMSolverSDEScheduler": "dpm++sde",
    "LCMScheduler": "lcm",
}
FLOW_CLASSES = (FLOW_CLASS, "FlowMatchHeunDiscreteScheduler")
COSINE_OFFSET = 0.008  # built into their cosine schedule


def to_scheduler(
    denoiser: Mapping[str, Any], solver: str = "ddim", patch: int = 1, offset: int = 1
) -> tuple[str, dict[str, Any]]:
    """(class, its config) for a denoiser's config.

    patch: side of a token in latent pixels, which their shift by size counts in.
    offset: the first time of "leading" spacing: 1 in the paper's code and in Stable Diffusion, 0 in DiT's.
    """
    schedule: dict[str, Any] = {"kind": "ldm", "timesteps": 1000, **denoiser.get("schedule", {})}
    prediction = denoiser.get("prediction_type", "epsilon")
    if schedule["kind"] == "flow":
        if prediction != "velocity":
            raise DarkroomError(f"diffusers' flow schedulers know velocities only, this model predicts {prediction!r}")
        return FLOW_CLASS, {
            "_class_name": FLOW_CLASS,
            "num_train_timesteps": schedule["timesteps"],
            **_shift(schedule, patch),
        }
    if schedule["kind"] == "edm" or prediction not in PREDICTIONS:
        raise DarkroomError(
            f"diffusers has no scheduler for predictions of the type {prediction!r} on a schedule of the kind "
            f"{schedule['kind']!r}; this model cannot be written for it"
        )
    zero = bool(schedule.get("zero_terminal_snr"))
    name = SOLVERS.get(solver, "DDIMScheduler")
    if name == "PNDMScheduler" and (prediction == "x0" or zero):
        name = "DDIMScheduler"  # theirs has no such options
    config: dict[str, Any] = {
        "_class_name": name,
        "num_train_timesteps": schedule["timesteps"],
        **_betas(schedule),
        "prediction_type": PREDICTIONS[prediction],
        # Times from the end where the last of them is pure noise (Lin et al. 2024, sec. 3.3).
        "timestep_spacing": "trailing" if zero else "leading",
        "steps_offset": offset,
    }
    if name in ("DDIMScheduler", "DDPMScheduler"):
        config["clip_sample"] = False  # latents are not within [-1, 1]
    if name in ("DDIMScheduler", "PNDMScheduler"):
        config["set_alpha_to_one"] = offset == 0  # their first time is then the table's first, not the data
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    if name in ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        config["rescale_betas_zero_snr"] = zero
    elif zero:
        return to_scheduler(denoiser, "ddim", patch, offset)
    if denoiser.get("learned_variance") and name == "DDPMScheduler":
        config["variance_type"] = "learned_range"
    return name, config


def _betas(schedule: Mapping[str, Any]) -> dict[str, Any]:
    kind = schedule["kind"]
    ends = {"beta_start": schedule.get("beta_start", 0.00085), "beta_end": schedule.get("beta_end", 0.012)}
    if kind == "sqrt":  # they have no name for it
        start, end, count = ends["beta_start"], ends["beta_end"], schedule["timesteps"]
        line = [start + (end - start) * i / max(count - 1, 1) for i in range(count)]
        return {**ends, "beta_schedule": "linear", "trained_betas": [math.sqrt(beta) for beta in line]}
    if kind == "cosine" and schedule.get("cosine_offset", COSINE_OFFSET) != COSINE_OFFSET:
        raise DarkroomError(
            f"diffusers' cosine schedule has the offset {COSINE_OFFSET}, this model's is {schedule['cosine_offset']}"
        )
    return {**ends, "beta_schedule": BETAS[kind]}


def _shift(schedule: Mapping[str, Any], patch: int) -> dict[str, Any]:
    """`linear` is FLUX's rule: mu = log(shift) on a line over the number of tokens."""
    shift, rule = float(schedule.get("shift", 1.0)), schedule.get("shift_rule", "constant")
    if rule == "constant":
        return {"shift": shift}
    if rule != "linear":
        raise DarkroomError(
            f'diffusers has no shift that follows the size of latents by the rule "{rule}": set '
            "denoiser.schedule.shift_rule=constant and the shift for one size"
        )
    least, most = schedule.get("shift_places", (1024, 16384))
    return {
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": math.log(shift),
        "max_shift": math.log(float(schedule.get("shift_end", 1.0))),
        "base_image_seq_len": least // patch**2,
        "max_image_seq_len": most // patch**2,
    }


def from_scheduler(config: Mapping[str, Any], where: str, patch: int = 1) -> tuple[dict[str, Any], str, str]:
    """(our schedule, prediction type, solver) of a scheduler_config.json; entries that are left out have diffusers'
    defaults."""
    name = str(config.get("_class_name"))
    if name in FLOW_CLASSES or config.get("use_flow_sigmas"):
        return _flow(config, patch), "velocity", "euler" if name == FLOW_CLASS else "heun"
    solver = {theirs: ours for ours, theirs in SOLVERS.items()}.get(name) or READ_AS.get(name)
    if solver is None:
        raise DarkroomError(f"{where} is the config of a diffusers {name}, whose noise has no equivalent here")
    said = config.get("prediction_type", "epsilon")
    prediction = next((ours for ours, theirs in PREDICTIONS.items() if theirs == said), None)
    if prediction is None:
        raise DarkroomError(f'{where}: "prediction_type" {said!r} has no equivalent here')
    timesteps = config.get("num_train_timesteps", 1000)
    ends = {"beta_start": config.get("beta_start", 0.0001), "beta_end": config.get("beta_end", 0.02)}
    if config.get("trained_betas") is not None:
        schedule = _told_by_betas(config["trained_betas"], where)
    else:
        said = config.get("beta_schedule", "linear")
        kind = next((ours for ours, theirs in BETAS.items() if theirs == said), None)
        if kind is None:
            raise DarkroomError(f'{where}: "beta_schedule" {said!r} has no equivalent here')
        schedule = {"kind": kind, "timesteps": timesteps} | (ends if kind != "cosine" else {})
    if config.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
    return schedule, prediction, solver


def _flow(config: Mapping[str, Any], patch: int) -> dict[str, Any]:
    schedule: dict[str, Any] = {"kind": "flow", "timesteps": config.get("num_train_timesteps", 1000)}
    if not config.get("use_dynamic_shifting"):
        return schedule | {"shift": float(config.get("shift", config.get("flow_shift", 1.0)))}
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    return schedule | {
        "shift_rule": "linear",
        "shift": _short(math.exp(config.get("base_shift", 0.5))),
        "shift_end": _short(math.exp(config.get("max_shift", 1.15))),
        "shift_places": [least * patch**2, most * patch**2],
    }


def _short(value: float) -> float:
    """Undoes the rounding of exp(log(x))."""
    return float(f"{value:.12g}")


def _told_by_betas(betas: Any, where: str) -> dict[str, Any]:
    import torch

    from darkroom.interop.compvis_schedule import read_schedule

    return read_schedule(torch.tensor(betas, dtype=torch.float64).float(), {"kind": "flow"}, where)
