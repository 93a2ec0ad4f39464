"""Models of the Hugging Face hub, for people who name one: "hf:owner/name", or "hf:owner/name/path/of/a/file".

The `huggingface_hub` package downloads and caches (the extra `hub`); nothing is looked up unless a source begins with
"hf:". Of a repository come configs, vocabularies and safetensors in the usual folders: no pickles, no code, none of the
single large files that often lie beside them (those are named with their path).
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from darkroom.errors import DarkroomError

HUB = "hf:"
_NAME = re.compile(r"hf:([\w][\w.-]*/[\w][\w.-]*)(?:@([\w][\w./-]*?))?(?:/(.+))?")
# Whole repositories: small texts, and weights inside of folders or under the names that libraries give them.
WANTED = (
    *("*.json", "*/*.safetensors", "*/merges.txt", "*/vocab.txt", "*/spiece.model", "merges.txt", "vocab.txt"),
    *("model*.safetensors", "diffusion_pytorch_model*.safetensors", "*lora*.safetensors", "learned_embeds.safetensors"),
)
UNWANTED = ("*.fp16.*", "*.fp16-*", "*non_ema*", "*/openvino*", "*/flax*", "safety_checker/*", "*onnx*")


def fetch(source: str) -> Path:
    """The local folder of a repository, or one file of it; downloaded if it is not in the cache."""
    match = _NAME.fullmatch(source)
    if match is None or ".." in source:
        raise DarkroomError(f"{source!r} is no name in the hub; give hf:owner/name or hf:owner/name/file")
    repository, revision, file = match[1], match[2], match[3]
    try:
        hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
    except ImportError:
        raise DarkroomError(f"{source} needs the hub's package: pip install 'darkroom-ldm[hub]'") from None
    # Its retries without a network would fill a page before our one line.
    import_module("huggingface_hub.utils.logging").set_verbosity_error()
    # Most special first: some of these are also of the others.
    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    try:
        if file is not None:
            return Path(hub.hf_hub_download(repository, file, revision=revision))
        return Path(
            hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
            )
        )
    except errors.GatedRepoError:
        raise DarkroomError(f"{source} asks to accept its conditions: do so on its page, then log in") from None
    except errors.LocalEntryNotFoundError:
        raise DarkroomError(
            f"{source} is not in the cache and the hub cannot be reached; check the network, or give a local path"
        ) from None
    except absent:
        raise DarkroomError(f"the hub has no {repository}, or it is private; check the name, or log in") from None
    except errors.EntryNotFoundError:
        raise DarkroomError(f"{repository} in the hub has no file {file}; check its path") from None
    except (OSError, errors.HfHubHTTPError, RuntimeError) as error:
        raise DarkroomError(f"{source} cannot be fetched: {error}") from None
