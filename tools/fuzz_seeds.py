"""Makes the seeds of `fuzz_checkpoints.py`: tests/fuzz_seeds.tar.xz, small files of every kind that is read.

    python tools/fuzz_seeds.py

All numbers are 0.25 in half precision, so that the archive is small too.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
SEEDS = ROOT / "tests" / "fuzz_seeds.tar.xz"
sys.path.insert(0, str(ROOT / "tests"))

KL = {"kind": "kl", "channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4}
VQ = {**KL, "kind": "vq", "z_channels": 3, "embed_dim": 3, "codebook_size": 16}
OURS = {**KL, "channels": 4, "norm_groups": 2, "z_channels": 2, "embed_dim": 2}
UNET = {
    "in_channels": 2,
    "out_channels": 2,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_heads": 2,
}


class CLIPNumbers:
    """Shapes of a CLIP text tower of one small layer, under the names of the transformers library."""

    width, inner, tokens, length = 8, 16, 300, 77

    def tensors(self, prefix: str = "text_model.") -> dict[str, torch.Tensor]:
        w, shapes = self.width, {}
        shapes["embeddings.token_embedding.weight"] = (self.tokens, w)
        shapes["embeddings.position_embedding.weight"] = (self.length, w)
        layer = "encoder.layers.0."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (w, w), f"{layer}self_attn.{name}.bias": (w,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (w,), f"{layer}{name}.bias": (w,)}
        shapes |= {f"{layer}mlp.fc1.weight": (self.inner, w), f"{layer}mlp.fc1.bias": (self.inner,)}
        shapes |= {f"{layer}mlp.fc2.weight": (w, self.inner), f"{layer}mlp.fc2.bias": (w,)}
        shapes |= {"final_layer_norm.weight": (w,), "final_layer_norm.bias": (w,)}
        return {prefix + name: number(*shape) for name, shape in shapes.items()}


def number(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0.25, dtype=torch.float16)


def even(module: Any) -> Any:
    """The same module with 0.25 everywhere, half precision in its parameters."""
    with torch.no_grad():
        for parameter in nn.Module.parameters(module):
            parameter.data = torch.full_like(parameter, 0.25, dtype=torch.float16)
    return module


def first_stages(place: Path) -> None:
    from darkroom.build import build_first_stage
    from darkroom.exchange import export
    from darkroom.model_io import save

    for name, config in (("kl", KL), ("vq", VQ)):
        first_stage = even(build_first_stage(config))
        export(first_stage, place / f"official-{name}.safetensors", "compvis", shift=0.0)
        export(first_stage, place / f"diffusers-{name}", "diffusers", shift=0.0)
        content = dict(first_stage.autoencoder.state_dict())
        noted = {"epoch": 3, "global_step": 10, "callbacks": {"a": [1, (2.5, None)]}, "lr": 1e-4, "names": ["x", b"y"]}
        torch.save({"state_dict": content, **noted}, place / f"official-{name}.ckpt")
    old = place / "diffusers-old"
    old.mkdir()
    (old / "config.json").write_bytes((place / "diffusers-kl" / "config.json").read_bytes())
    from darkroom.safe_files import read_safetensors

    torch.save(
        read_safetensors(place / "diffusers-kl" / "diffusion_pytorch_model.safetensors"),
        old / "diffusion_pytorch_model.bin",
    )
    save(even(build_first_stage(OURS)), place / "model-first-stage", dtype="float16")


def models(place: Path) -> None:
    from data_facts import Facts

    from darkroom.build import build_conditioner, build_denoiser, build_first_stage, conditioner_config
    from darkroom.conditioning.classes import ClassEncoderConfig
    from darkroom.conditioning.text import TextEncoderConfig
    from darkroom.latent_diffusion import LatentDiffusion

    text = TextEncoderConfig(width=8, depth=1, heads=1, head_width=8, length=8, vocabulary_size=40)
    facts = Facts(["boot", "coat"], ["a red fox", "a blue snail"])
    networks = {
        "unet": UNET,
        "dit": {
            "kind": "dit",
            "input_size": 4,
            "patch_size": 2,
            "in_channels": 2,
            "hidden_size": 12,
            "depth": 1,
            "num_heads": 2,
        },
    }
    for name, encoders in (("unet", {"text": text}), ("dit", {"class": ClassEncoderConfig(width=8)})):
        conditioner = build_conditioner(conditioner_config(encoders, facts))
        network = {**networks[name], "context_dim": conditioner.context_dim}
        if name == "unet":
            network["use_spatial_transformer"] = True
        denoiser = build_denoiser({"network": network})
        info = {"name": name, "defaults": {"size": [8, 8], "steps": 2}}
        model = LatentDiffusion(even(build_first_stage(OURS)), even(denoiser), even(conditioner), info)
        model.save(place / f"model-{name}", dtype="float16")


def whole_checkpoints(place: Path) -> None:
    """As the official code writes them: conditioned on classes, a pickle with averaged copies; unconditional, plain and
    with our note."""
    from data_facts import Facts

    from darkroom.build import build_conditioner, build_denoiser, build_first_stage, conditioner_config
    from darkroom.conditioning.classes import ClassEncoderConfig
    from darkroom.exchange import export
    from darkroom.latent_diffusion import LatentDiffusion
    from darkroom.safe_files import read_safetensors, write_safetensors

    for name, first_stage, encoders in (("class", VQ, {"class": ClassEncoderConfig(width=8)}), ("plain", KL, {})):
        conditioner = build_conditioner(conditioner_config(encoders, Facts(["boot", "coat"], [])))
        channels, context = first_stage["embed_dim"], conditioner.context_dim
        sizes = {"model_channels": 32, "channel_mult": [1, 1], "in_channels": channels, "out_channels": channels}
        network = {**UNET, **sizes, "use_spatial_transformer": context is not None, "context_dim": context}
        parts = build_first_stage(first_stage), build_denoiser({"network": network}), conditioner
        model = LatentDiffusion(*map(even, parts), {"name": name, "defaults": {"size": [16, 16]}})
        if not encoders:
            export(model, place / "pipeline-plain", "diffusers")
        noted = place / f"ours-{name}.safetensors"
        export(model, noted, "compvis")
        tensors = read_safetensors(noted)
        if not encoders:
            write_safetensors(place / "whole-plain.safetensors", tensors)
            continue
        noted.unlink()
        copies = {
            "model_ema." + key.removeprefix("model.").replace(".", ""): tensor
            for key, tensor in tensors.items()
            if key.startswith("model.diffusion_model.")
        }
        torch.save({"state_dict": tensors | copies, "global_step": 1}, place / "whole-class.ckpt")


def deep_configs(place: Path) -> None:
    """A diffusers folder of others, whose configs alone say what it is, and a folder of ours with notes about an
    official file."""
    from darkroom.build import build_conditioner, build_denoiser, build_first_stage
    from darkroom.exchange import convert, export
    from darkroom.latent_diffusion import LatentDiffusion

    classes = [str(i) for i in range(1000)]  # as many as the pipeline of diffusers knows
    conditioner = build_conditioner({"encoders": {"class": {"kind": "class", "slot": "label", "classes": classes}}})
    network = {"kind": "dit", "input_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 4, "hidden_size": 12,
               "depth": 2, "num_heads": 2, "num_classes": 1001}  # fmt: skip
    parts = build_first_stage(KL), build_denoiser({"network": network}), conditioner
    export(LatentDiffusion(*map(even, parts), {"name": "dit"}), place / "pipeline-dit", "diffusers")
    shutil.rmtree(place / "pipeline-dit" / "darkroom")
    convert(place / "whole-class.ckpt", place / "model-kept")


def text_towers(place: Path) -> None:
    from darkroom.safe_files import write_safetensors

    tower = place / "text-tower"
    tower.mkdir()
    table = CLIPNumbers().tensors()
    config = {
        "hidden_act": "quick_gelu",
        "num_attention_heads": 2,
        "hidden_size": 8,
        "architectures": ["CLIPTextModel"],
    }
    (tower / "config.json").write_text(json.dumps(config))
    names = sorted(table)
    parts = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in parts.items():
        write_safetensors(tower / file, {name: table[name] for name in own})
    places = {name: file for file, own in parts.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (tower / "model.safetensors.index.json").write_text(json.dumps(index))
    pipeline = place / "pipeline"
    (pipeline / "text_encoder").mkdir(parents=True)
    (pipeline / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]})
    )
    (pipeline / "vae").mkdir()
    for file in (place / "diffusers-kl").iterdir():
        (pipeline / "vae" / file.name).write_bytes(file.read_bytes())
    (pipeline / "text_encoder" / "config.json").write_text(json.dumps(config))
    write_safetensors(pipeline / "text_encoder" / "model.safetensors", table)


def adapters(place: Path) -> None:
    """Files that fit the model `model-clip`: LoRA in three layouts, learned words in three."""
    from adapter_files import kohya, low_rank, small_stable_diffusion, spelled
    from text_tower_files import CLIP_L

    from darkroom.safe_files import write_safetensors

    with tempfile.TemporaryDirectory() as folder:
        clip = {"network": {**CLIP_L, "num_hidden_layers": 1}, "length": 8}
        sizes = {"channel_mult": [1], "attention_resolutions": [1]}
        model = small_stable_diffusion(Path(folder), {"kind": "clip", **clip}, **sizes)
        even(model).save(place / "model-clip", dtype="float16")
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    unet = {
        f"{attention}.to_q": (32, 32),
        f"{attention}.to_out.0": (32, 32),
        "down_blocks.0.resnets.0.conv1": (32, 32, 3, 3),
    }
    text = {"text_model.encoder.layers.0.mlp.fc1": (40, 32)}
    ends = (".lora_A.weight", ".lora_B.weight")
    kohya(place / "adapter-kohya.safetensors", low_rank(unet), "lora_unet_", 1.0)
    spelled(place / "adapter-text.bin", low_rank(text), "text_encoder.", ends)
    peft = place / "adapter-peft"
    peft.mkdir()
    spelled(peft / "adapter_model.safetensors", low_rank(unet), "base_model.model.", ends)
    stated = {"r": 2, "lora_alpha": 4, "use_rslora": False, "alpha_pattern": {"to_q": 3}, "peft_type": "LORA"}
    (peft / "adapter_config.json").write_text(json.dumps(stated))
    note = {f"unet.{key}": value for key, value in stated.items()}
    tensors = {
        f"unet.{attention}.to_k{end}": number(*shape) for end, shape in zip(ends, ((2, 32), (32, 2)), strict=True)
    }
    write_safetensors(place / "adapter-noted.safetensors", tensors, {"lora_adapter_metadata": json.dumps(note)})
    torch.save({"<cat>": number(2, 32)}, place / "adapter-word.bin")
    old = {"string_to_token": {"*": 265}, "string_to_param": {"*": number(32)}, "name": "cat", "step": 9}
    torch.save(old, place / "adapter-a1111.pt")
    write_safetensors(place / "adapter-tower.safetensors", {"clip_l": number(2, 32)})


def others(place: Path) -> None:
    torch.save({"w": torch.ones(2)}, place / "before-1.6.pt", _use_new_zipfile_serialization=False)
    (place / "bare.pkl").write_bytes(pickle.dumps({"a": [1, 2.5, "x", b"y", None, (True,)]}, protocol=2))


def main() -> int:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for make in (first_stages, models, whole_checkpoints, deep_configs, text_towers, adapters, others):
            make(place)

        def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
            return info

        with tarfile.open(SEEDS, "w:xz", preset=9) as archive:
            for path in sorted(place.iterdir()):
                archive.add(path, path.name, filter=plain)
                size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
                print(f"{path.name}: {size / 1000:.0f} kB")
    print(f"{SEEDS}: {SEEDS.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
