"""Small pipelines of the diffusers library with random weights: one of each kind that is exchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from text_tower_files import CLIP_G, CLIP_L, T5, clip_model, clip_tokenizer, randomised, t5_model, t5_tokenizer

WIDTH = CLIP_L["hidden_size"]
OPEN_H = CLIP_L | {"hidden_act": "gelu", "pad_token_id": 0, "num_attention_heads": 4}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
FLOW_LATENTS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}


def vae(levels: int = 2, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return randomised(
        AutoencoderKL(
            block_out_channels=(32, 64, 64, 64)[:levels],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
            sample_size=32,
            **more,
        )
    )


def vqvae() -> Any:
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        scaling_factor=1.0,
    )
    return randomised(model)


def unet(in_channels: int = 4, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "sample_size": 16,
    }
    return randomised(UNet2DConditionModel(in_channels=in_channels, **(options | more)))


def unet2d(in_channels: int, out_channels: int, **more: Any) -> Any:
    from diffusers import UNet2DModel

    options: dict[str, Any] = {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "sample_size": 16,
    }
    return randomised(UNet2DModel(in_channels=in_channels, out_channels=out_channels, **(options | more)))


def _ddim(**more: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, **more)


def _stable(name: str, channels: int, tower: dict[str, Any], network: dict[str, Any], **more: Any) -> Any:
    import diffusers

    parts: dict[str, Any] = {
        "vae": vae(4 if "Inpaint" in name else 2),
        "text_encoder": clip_model(tower, projection=False, act=tower.get("hidden_act", "quick_gelu")),
        "tokenizer": clip_tokenizer("!" if tower is OPEN_H else "<|endoftext|>"),
        "unet": unet(channels, **network),
        "scheduler": _ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    parts |= more
    return getattr(diffusers, name)(**{key: value for key, value in parts.items() if value is not ...})


def sd1() -> Any:
    return _stable("StableDiffusionPipeline", 4, CLIP_L, {})


def sd2() -> Any:
    linear = {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True}
    scheduler = _ddim(prediction_type="v_prediction")
    return _stable("StableDiffusionPipeline", 4, OPEN_H, linear, scheduler=scheduler)


def inpaint() -> Any:
    return _stable("StableDiffusionInpaintPipeline", 9, CLIP_L, {})


def upscale() -> Any:
    from diffusers import DDPMScheduler

    low = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
    network = {"num_class_embeds": 1000, "only_cross_attention": (True, False), "use_linear_projection": True}
    more = {"scheduler": _ddim(prediction_type="v_prediction"), "low_res_scheduler": low, "max_noise_level": 350}
    gone: dict[str, Any] = {"requires_safety_checker": ...}
    network |= {"out_channels": 4}
    return _stable("StableDiffusionUpscalePipeline", 7, OPEN_H, network, vae=vae(3), **more, **gone)


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    network = unet(
        cross_attention_dim=WIDTH + CLIP_G["hidden_size"],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=CLIP_G["projection_dim"] + 6 * 8,
        transformer_layers_per_block=(2, 1),
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip_model(CLIP_L, projection=False),
        text_encoder_2=clip_model(CLIP_G, act="gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        unet=network,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        add_watermarker=False,
    )


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5["d_model"],
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH + CLIP_G["projection_dim"],
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=randomised(network),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, **FLOW_LATENTS),
        text_encoder=clip_model(CLIP_L),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_model(CLIP_G, act="gelu"),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5_model(),
        tokenizer_3=t5_tokenizer(),
    )


def dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    network = randomised(network)
    first = network.transformer_blocks[0].norm1.emb.state_dict()
    for block in network.transformer_blocks:  # one embedding, as the official model has it
        block.norm1.emb.load_state_dict(first)
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False)
    return DiTPipeline(transformer=network, vae=vae(), scheduler=scheduler)


def ldm() -> Any:
    from diffusers import LDMPipeline

    return LDMPipeline(vqvae=vqvae(), unet=unet2d(3, 3), scheduler=_ddim())


def ldm_updown() -> Any:
    from diffusers import LDMPipeline

    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    }
    resampling = {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
    }
    return LDMPipeline(vqvae=vqvae(), unet=unet2d(3, 3, **blocks, **resampling), scheduler=_ddim())


def ldm_upscale() -> Any:
    from diffusers import LDMSuperResolutionPipeline

    return LDMSuperResolutionPipeline(vqvae=vqvae(), unet=unet2d(6, 3), scheduler=_ddim())


def bert(**more: Any) -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    options: dict[str, Any] = {
        "vocab_size": 60,
        "d_model": WIDTH,
        "encoder_layers": 2,
        "encoder_ffn_dim": 4 * WIDTH,
        "encoder_attention_heads": 2,
        "head_dim": 8,
    }
    return randomised(LDMBertModel(LDMBertConfig(**(options | more))))


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "fox", "##es", *"abcdefghijklmnopqrstuvwxyz"]


def bert_tokenizer(folder: Path) -> Any:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = [*WORDS, *(f"[unused{i}]" for i in range(60 - len(WORDS)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return BertTokenizer.from_pretrained(folder)


def ldm_text(folder: Path) -> Any:
    from diffusers import LDMTextToImagePipeline

    return LDMTextToImagePipeline(
        vqvae=vae(4), bert=bert(), tokenizer=bert_tokenizer(folder), unet=unet(), scheduler=_ddim()
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd1": sd1,
    "sd2": sd2,
    "inpaint": inpaint,
    "upscale": upscale,
    "sdxl": sdxl,
    "sd3": sd3,
    "dit": dit,
    "ldm": ldm,
    "ldm_updown": ldm_updown,
    "ldm_upscale": ldm_upscale,
}


def write_pipeline(name: str, folder: Path) -> Path:
    """The pipeline's folder, as diffusers saves it."""
    torch.manual_seed(0)
    pipeline = ldm_text(folder.parent / "vocabulary") if name == "ldm_text" else PIPELINES[name]()
    pipeline.save_pretrained(folder)
    return folder


NAMES = (*PIPELINES, "ldm_text")
