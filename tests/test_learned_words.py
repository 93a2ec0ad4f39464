"""Textual inversion: a word with vectors of its own, in every form that files have, read as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import small_stable_diffusion
from text_tower_files import CLIP_G, CLIP_L, OPEN_G, T5, clip_model, clip_tokenizer
from tiny_models import one_line, tiny_model
from torch import Tensor

from darkroom.adapters import Adapter, apply_adapters, remove_adapters
from darkroom.conditioning.tokens import split_words
from darkroom.errors import DarkroomError
from darkroom.exchange import export
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.safe_files import write_safetensors

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model(tmp_path: Path) -> LatentDiffusion:
    return small_stable_diffusion(tmp_path)


def tower(model: LatentDiffusion, name: str = "tower") -> Any:
    return model.conditioner.encoders["text"].towers[name]


def context(model: LatentDiffusion, text: str) -> Tensor:
    return model.conditioner({"text": [text]}).context


def files(place: Path) -> dict[str, tuple[Path, str]]:
    """name: (file, the word it teaches)."""
    torch.save({"<cat>": VECTORS[0]}, place / "learned_embeds.bin")
    torch.save(
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": VECTORS.requires_grad_(False)},
            "name": "cat",
            "step": 9,
        },
        place / "a1111.pt",
    )
    write_safetensors(place / "sketch.safetensors", {"emb_params": VECTORS})
    write_safetensors(place / "own.safetensors", {"<cat>": VECTORS.half()})
    write_safetensors(place / "tower.safetensors", {"clip_l": VECTORS})
    return {
        "diffusers": (place / "learned_embeds.bin", "<cat>"),
        "a1111": (place / "a1111.pt", "cat"),
        "parameters": (place / "sketch.safetensors", "sketch"),
        "half": (place / "own.safetensors", "<cat>"),
        "tower": (place / "tower.safetensors", "tower"),
    }


@pytest.mark.parametrize("form", ["diffusers", "a1111", "parameters", "half", "tower"])
def test_words_are_read_as_transformers_reads_them(model: LatentDiffusion, tmp_path: Path, form: str) -> None:
    file, word = files(tmp_path)[form]
    vectors = {"diffusers": VECTORS[:1], "half": VECTORS.half().float()}.get(form, VECTORS)
    network = tower(model).network
    theirs = clip_model(CLIP_L, projection=False)
    level = "" if any(name.startswith("text_model.") for name in theirs.state_dict()) else "text_model."
    theirs.load_state_dict({name.removeprefix(level): tensor for name, tensor in network.state_dict().items()})
    tokenizer = clip_tokenizer()
    names = [f"<new{i}>" for i in range(len(vectors))]
    tokenizer.add_tokens(names)
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[-len(vectors) :] = vectors
        ids = tokenizer(f"the {''.join(names)} red fox", padding="max_length", max_length=12, return_tensors="pt")
        expected = theirs(ids.input_ids).last_hidden_state
    before = context(model, f"the {word} red fox")
    apply_adapters(model, [file])
    assert torch.allclose(context(model, f"the {word} red fox"), expected, atol=2e-5)
    assert not torch.allclose(before, expected, atol=1e-2)
    remove_adapters(model)
    assert torch.equal(context(model, f"the {word} red fox"), before)


def test_several_words_their_weights_and_their_removal(model: LatentDiffusion, tmp_path: Path) -> None:
    given = files(tmp_path)
    before = {name: (t.clone(), t.data_ptr()) for name, t in model.state_dict().items()}
    size = tower(model).size
    apply_adapters(model, [given["half"][0], (given["parameters"][0], 0.5), Adapter(given["a1111"][0], word="dog")])
    assert tower(model).learned == {
        "<cat>": [size, size + 1, size + 2],
        "sketch": [size + 3, size + 4, size + 5],
        "dog": [size + 6, size + 7, size + 8],
    }
    rows = tower(model).network.state_dict()["text_model.embeddings.token_embedding.weight"]
    assert torch.equal(rows[size + 3 : size + 6], 0.5 * VECTORS) and torch.equal(rows[size + 6 :], VECTORS)
    assert [entry["word"] for entry in model.info["adapters"]] == ["<cat>", "sketch", "dog"]
    remove_adapters(model)
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], t) and now[name].data_ptr() == place for name, (t, place) in before.items())
    assert tower(model).size == size and tower(model).learned == {}


def test_a_text_is_pooled_at_its_end_and_not_at_a_learned_word(tmp_path: Path) -> None:
    """OpenCLIP's end is the largest id of a text, and ids of learned words are larger."""
    from darkroom.conditioning.vocabularies import read_vocabulary

    towers = {"clip_l": {"network": CLIP_L, "length": 12}, "clip_g": {"network": OPEN_G, "length": 12}}
    sizes = {"num_classes": "sequential", "adm_in_channels": 48}
    model = small_stable_diffusion(tmp_path, {"kind": "sdxl_text", **towers}, **sizes)
    for name in towers:
        tower(model, name).config.tokenizer = read_vocabulary(tmp_path / "vocabulary", "clip").to_str()
    vectors = {
        "clip_l": VECTORS[:1],
        "clip_g": tower(model, "clip_g").network.token_embedding.weight[5:6].detach().clone(),
    }
    write_safetensors(tmp_path / "xl.safetensors", vectors)
    apply_adapters(model, [tmp_path / "xl.safetensors"])
    # A word whose vector is that of token 5 reads like token 5.
    learned = model.conditioner({"text": ["the xl fox"]}).vector
    ids = tower(model, "clip_g").tokenizer.encode("the", add_special_tokens=False).ids
    fox = tower(model, "clip_g").tokenizer.encode("fox", add_special_tokens=False).ids
    start, end, pad = (getattr(tower(model, "clip_g").special, name) for name in ("start", "end", "pad"))
    row = [start, *ids, 5, *fox, end]
    row += [pad] * (12 - len(row))
    direct = tower(model, "clip_g").network(torch.tensor([row]), **tower(model, "clip_g").options).pooled
    assert torch.allclose(learned, direct, atol=1e-6)
    write_safetensors(tmp_path / "one.safetensors", {"clip_l": VECTORS})
    with pytest.raises(DarkroomError, match="needs some for clip_g"):
        apply_adapters(model, [tmp_path / "one.safetensors"])
    write_safetensors(tmp_path / "bare.safetensors", {"emb_params": VECTORS})
    with pytest.raises(DarkroomError, match="clip_l and clip_g"):
        apply_adapters(model, [tmp_path / "bare.safetensors"])


def test_t5_may_learn_a_word_too(tmp_path: Path) -> None:
    towers = {"clip_l": {"network": CLIP_L, "length": 12}, "clip_g": {"network": CLIP_G, "length": 12}}
    encoder = {"kind": "sd3_text", **towers, "t5": {"network": T5, "length": 12}}
    model = small_stable_diffusion(tmp_path, encoder, num_classes="sequential", adm_in_channels=80)
    vectors = {"clip_l": VECTORS, "clip_g": torch.ones(1, 48), "t5xxl": torch.ones(2, 96)}
    write_safetensors(tmp_path / "three.safetensors", vectors)
    apply_adapters(model, [tmp_path / "three.safetensors"])
    assert len(tower(model, "t5").network.shared.weight) == T5["vocab_size"] + 2


def test_words_stand_alone() -> None:
    learned = {"cat": [9], "<cat>": [7, 8], "cat-toy": [5]}
    assert split_words("a cat, concatenate cats", learned) == [("a ", [9]), (", concatenate cats", [])]
    assert split_words("x<cat>y cat-toy", learned) == [("x", [7, 8]), ("y ", [5]), ("", [])]
    assert split_words("nothing", {}) == [("nothing", [])]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"<cat>": torch.ones(3, 31)}, "width 31, and tower of this model is 32 wide"),
        ({"<cat>": torch.ones(2, 2, 32)}, "vectors of shape"),
        ({"<cat>": torch.full((1, 32), torch.inf)}, "finite vectors"),
        ({"<cat>": torch.ones(0, 32)}, "finite vectors"),
        ({"a": torch.ones(32), "b": torch.ones(32)}, "that is not a learned embedding"),
        ({"string_to_param": {"a": torch.ones(32), "b": torch.ones(32)}}, "holds 2 learned embeddings"),
        ([torch.ones(32)], "holds no table"),
        ({"bad\nword": torch.ones(32)}, "cannot be a word"),
        ({"<cat>": "text"}, "vectors of shape"),
        ({"clip_l": VECTORS, "clip_g": VECTORS}, "has no clip_g"),
    ],
)
def test_bad_files(model: LatentDiffusion, tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(DarkroomError, match=words) as error:
        apply_adapters(model, [tmp_path / "bad.pt"])
    one_line(error)
    assert model.adapters is None


def test_other_refusals(model: LatentDiffusion, tmp_path: Path) -> None:
    file, _ = files(tmp_path)["half"]
    with pytest.raises(DarkroomError, match="no text tower"):
        apply_adapters(tiny_model("class"), [file])
    with pytest.raises(DarkroomError, match="two files teach the word '<cat>'"):
        apply_adapters(model, [file, file])
    apply_adapters(model, [file])
    for write in (
        lambda: model.save(tmp_path / "saved"),
        lambda: export(model, tmp_path / "out.safetensors", "compvis"),
    ):
        with pytest.raises(DarkroomError, match="carries the learned word '<cat>'"):
            write()
