"""The tiny official checkpoints of the goldens, built from our parts: U-Net, schedule, conditioning."""

from __future__ import annotations

from typing import Any

from parity_data import load_case, weights
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.networks.text import TextTransformer, TextTransformerConfig
from darkroom.networks.unet import UNet, UNetConfig


class TinyModel:
    """One of the topic latent_diffusion_tiny; weights "EMA" or "live"."""

    def __init__(self, name: str, which: str = "live") -> None:
        self.case = case = load_case("latent_diffusion_tiny", name)
        args = case.args
        state = weights().make_state_dict(case.spec["layout"], case.spec["derived"])
        options: dict[str, Any] = dict(args["unet_config"]["args"])
        del options["image_size"]
        self.network = UNet(UNetConfig(**options))
        live = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.diffusion_model.")}
        if which == "EMA":
            # Averages are stored under the path inside the wrapper with all dots removed.
            live = {k: state["model_ema." + k.replace(".", "")] for k in live}
        self.network.load_state_dict({k.removeprefix("diffusion_model."): v for k, v in live.items()}, strict=True)
        config = ScheduleConfig(
            timesteps=args["timesteps"], beta_start=args["linear_start"], beta_end=args["linear_end"]
        )
        prediction_type = "x0" if args.get("parameterization") == "x0" else "epsilon"
        self.denoiser = Denoiser(self.network, make_schedule(config), prediction_type).eval()
        self.embedding: Tensor | None = state.get("cond_stage_model.embedding.weight")
        self.tower: TextTransformer | None = None
        if args["cond_stage_key"] == "caption":
            text = args["cond_stage_config"]["args"]
            self.tower = TextTransformer(
                TextTransformerConfig(
                    vocabulary_size=text["vocab_size"],
                    width=text["n_embed"],
                    depth=text["n_layer"],
                    length=text["max_seq_len"],
                    logits_head=True,
                )
            ).eval()
            prefix = "cond_stage_model."
            self.tower.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, strict=True
            )

    def condition(self, ids: Tensor) -> Conditioning:
        """Class labels (B,) or token ids (B, L) -> context."""
        if self.embedding is not None:
            return Conditioning(context=self.embedding[ids][:, None])
        assert self.tower is not None
        return Conditioning(context=self.tower(ids))

    def own_condition(self) -> Conditioning:
        """That of the golden: from its labels or tokens, the stored concat map, or nothing."""
        if "concat_condition" in self.case.spec["outputs"]:
            return Conditioning(concat=self.case.output("concat_condition"))
        ids = [name for name in ("class_label", "tokens") if name in self.case.spec["inputs"]]
        return self.condition(self.case.input(ids[0])) if ids else Conditioning()
