"""Every golden output is compared by some test, or is listed here with the reason why not."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from parity_data import USED, case_names, load_case, topics

# "topic/case/output" with wildcards: why nothing is compared with it.
LEFT_OUT = {
    "autoencoder_vq/*/smallest_margin": "says how near the two best codes lie, for who finds another one",
    "schedules_ldm/*/max_abs_diff_of_recipe": "is about the reference's own recipe",
    "schedules_ldm/lr_multipliers/LambdaLinearScheduler": "there is no linear decay: published configs use its warm-up",
    "solvers_*/*/noise_draws": "counts calls of the reference; ours draw one number per step, whatever its factor",
    "solvers_*/*/max_*": "says how far the reference is from the exact solution or from another one",
    "solvers_k_diffusion/*_churn_*/x_before_step": "ours report x with the churn already added; the end is compared",
    "solvers_k_diffusion/sigmas/polyexponential_10": "such a grid is not offered",
    "solvers_k_diffusion/sigmas/vp_10": "such a grid is not offered",
    "solvers_k_diffusion/discrete_schedule_sd/sigma_to_t_quantised": "times are never rounded to the table",
}


def reason(place: tuple[str, str, str]) -> str | None:
    return next((why for pattern, why in LEFT_OUT.items() if fnmatchcase("/".join(place), pattern)), None)


ALL = {(t, name, output) for t in topics() for name in case_names(t) for output in load_case(t, name).spec["outputs"]}


def test_every_golden_is_read(whole_suite: bool) -> None:
    if not whole_suite:
        pytest.skip("only the whole suite reads them all")
    forgotten = sorted("/".join(place) for place in ALL - USED if reason(place) is None)
    assert not forgotten, f"{len(forgotten)} goldens that no test compares with: {forgotten[:20]}"


def test_what_is_left_out_exists() -> None:
    for pattern in LEFT_OUT:
        assert any(fnmatchcase("/".join(place), pattern) for place in ALL), pattern
    assert len(ALL) > 1000
