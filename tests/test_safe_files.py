"""Damaged and hostile files are refused with one line; files are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import full_disk, one_line

from darkroom import safe_json
from darkroom.errors import DarkroomError
from darkroom.interop.compvis_model import _noted
from darkroom.interop.found_model import MODEL_NOTE
from darkroom.interop.kept_tensors import kept_notes
from darkroom.interop.tensor_file import TensorFile, open_tensor_file
from darkroom.safe_files import (
    iter_safetensors,
    new_folder,
    read_json,
    read_safetensors,
    read_safetensors_header,
    write_file,
    write_safetensors,
)
from darkroom.safe_json import MAX_VALUES, parse_json
from darkroom.safe_pickle import iter_stored, read_checkpoint, read_structure, stored_table


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(4, 3, 3, 3, generator=g).to(memory_format=torch.channels_last),
        "half": torch.randn(5, generator=g).half(),
        "brain": torch.randn(2, 3, generator=g).bfloat16(),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 5, generator=g).t(),
        "unicode-é": torch.arange(3, dtype=torch.uint8),
    }


# --- safetensors


def test_safetensors_round_trip_and_reference_library(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, tensors(), {"note": "ü"})
    save_file({k: v.contiguous() for k, v in tensors().items()}, theirs)
    for read in (read_safetensors(ours), load_file(ours), read_safetensors(theirs)):
        assert read.keys() == tensors().keys()
        for name, value in tensors().items():
            assert read[name].dtype == value.dtype and torch.equal(read[name], value), name
    assert read_safetensors_header(ours).metadata == {"note": "ü"}
    assert read_safetensors_header(ours).numel == sum(t.numel() for t in tensors().values())


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    digests = [write_safetensors(tmp_path / f"{i}", dict(order)) for i, order in enumerate(_two_orders())]
    assert digests[0] == digests[1]


def _two_orders() -> list[list[tuple[str, torch.Tensor]]]:
    items = list(tensors().items())
    return [items, items[::-1]]


@pytest.mark.parametrize("keep", [0, 5, 9, 60, -1])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DarkroomError) as error:
        read_safetensors(path)
    assert "m.safetensors" in one_line(error) and "download it again" in one_line(error)


def header_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"not json", b""),
        ([1], b""),
        (b"[" * 100_000, b""),
        ({"a": entry("F32", [2**40], 0, 2**42)}, b"\0" * 8),  # promises terabytes
        ({"a": entry("F32", [2], 0, 4)}, b"\0" * 4),  # shape and bytes disagree
        ({"a": entry("F32", [-2], 0, 8)}, b"\0" * 8),
        ({"a": entry("F32", [1] * 9, 0, 4)}, b"\0" * 4),  # more dimensions than any layer has
        ({"a": entry("F32", [True], 0, 4)}, b"\0" * 4),
        ({"a": entry("F32", [1.0], 0, 4)}, b"\0" * 4),
        ({"a": entry("F99", [1], 0, 4)}, b"\0" * 4),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"\0" * 6),  # overlap
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)}, b"\0" * 9),  # gap
        ({"a": entry("U8", [4], 0, 4)}, b"\0" * 9),  # something hidden behind
        ({"a": {"dtype": "U8"}}, b""),
        ({"__metadata__": {"a": 1}}, b""),
        (
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
            b"",
        ),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes) -> None:
    path = header_file(tmp_path / "m.safetensors", header, data)
    with pytest.raises(DarkroomError) as error:
        read_safetensors(path)
    one_line(error)


@pytest.mark.parametrize("end", [b"", b"\\"])
def test_a_string_without_end_takes_one_pass(end: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError, match="Unterminated"):
        parse_json(b'"' + b'\\"' * 40_000 + end)
    assert time.process_time() - begin < 1  # quadratic: 46 s


def test_notes_of_kept_tensors_are_bounded(tmp_path: Path) -> None:
    note = json.dumps({str(i): "kept" for i in range(MAX_VALUES + 2)})
    with pytest.raises(DarkroomError, match="its tables of names cannot be read"):
        kept_notes(TensorFile(tmp_path / "kept.safetensors", {}, {}, {"what": note}, None))


def test_notes_about_a_model_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_json, "MAX_VALUES", 3)
    file = TensorFile(tmp_path / "m.safetensors", {}, {}, {MODEL_NOTE: '{"configs": [1, 2, 3, 4]}'}, None)
    with pytest.raises(DarkroomError, match="its note about the model cannot be read") as error:
        _noted(file, "", None)
    assert isinstance(error.value.__context__, ValueError) and "too many values" in str(error.value.__context__)


def test_header_length_is_checked_before_memory_is_taken(tmp_path: Path) -> None:
    for length in (2**63, 99_000_000):
        with pytest.raises(DarkroomError):
            read_safetensors_header(header_file(tmp_path / "m.safetensors", {}, length=length))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match="does not exist"):
        read_safetensors(tmp_path / "no.safetensors")
    with pytest.raises(DarkroomError, match="is a folder"):
        read_safetensors(tmp_path)


# --- pickled checkpoints


def test_checkpoint_equals_torch_load(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    content = {
        "state_dict": OrderedDict(tensors() | {"view": shared[2:8].view(2, 3), "same": shared}),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "global_step": 7,
        "big": 2**80,
        "rate": 0.5,
        "names": ["a", ("b", None, True)],
        "raw": b"x",
    }
    path = tmp_path / "m.ckpt"
    torch.save(content, path)
    ours, theirs = read_checkpoint(path), torch.load(path, weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value) and ours["state_dict"][name].dtype == value.dtype, name
    assert torch.equal(ours["parameter"], torch.ones(2))
    assert [ours[k] for k in ("global_step", "big", "rate", "names", "raw")] == [7, 2**80, 0.5, content["names"], b"x"]
    assert (
        ours["state_dict"]["view"].untyped_storage().data_ptr()
        == ours["state_dict"]["same"].untyped_storage().data_ptr()
    )


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    torch.save(module.state_dict(), tmp_path / "m.pt")  # an OrderedDict with `_metadata`
    read = read_checkpoint(tmp_path / "m.pt")
    assert all(torch.equal(read[name], value) for name, value in module.state_dict().items())


class Evil:
    """Unpickling it would create the file that `mark` names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    ("container", "protocol"),
    [("bare", 0), ("bare", 1), *((c, p) for c in ("bare", "zip", "legacy") for p in (2, 4, 5))],  # torch begins with 2
)
def test_pickle_with_code_is_refused_by_name_and_not_run(tmp_path: Path, container: str, protocol: int) -> None:
    path, mark = tmp_path / "evil.ckpt", tmp_path / "mark"
    content = {"state_dict": {"w": torch.ones(2)}, "extra": Evil(mark)}
    if container == "bare":
        path.write_bytes(pickle.dumps(Evil(mark), protocol=protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(DarkroomError) as error:
        read_checkpoint(path)
    assert "posix.system" in one_line(error) and "nothing was run" in one_line(error)
    assert not mark.exists()


def zip_with_pickle(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("m/data.pkl", program)
        archive.writestr("m/data/0", b"\0" * 16)
    return path


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"


def tensor_program(offset: bytes, shape: bytes, stride: bytes) -> bytes:
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + shape + stride + b"\x89}tR."


def test_the_hand_written_tensor_program_is_valid(tmp_path: Path) -> None:
    path = zip_with_pickle(tmp_path / "m.pt", tensor_program(b"K\0", b"K\x04\x85", b"K\x01\x85"))
    assert torch.equal(read_checkpoint(path), torch.zeros(4))


@pytest.mark.parametrize(
    "program",
    [
        tensor_program(b"K\x01", b"K\x04\x85", b"K\x01\x85"),  # one element beyond the storage
        tensor_program(b"K\0", b"K\x02\x85", b"K\x09\x85"),  # stride beyond
        tensor_program(b"J\xff\xff\xff\xff", b"K\x04\x85", b"K\x01\x85"),  # negative offset
        tensor_program(b"K\0", b"J\0\0\0\x40\x85", b"K\0\x85"),  # a billion copies of one element
        tensor_program(b"K\0", b"K\x04\x85", b"K\x01K\x01\x86"),  # ranks differ
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ccollections\nOrderedDict\n}}b.",  # state for a name
        b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",  # a dictionary key whose hash overflows the C stack
        b"\x80\x02}\x8a\x09" + b"\1" * 9 + b"K\x01s.",  # a dictionary key of nine bytes
        b"\x80\x04)" + b"\x85" * 5_000 + b"\x8c\x01a\x93.",  # a name that is a nest of tuples
        b"\x80\x04\x8c\x01a)" + b"\x85" * 5_000 + b"\x93.",
        b"\x80\x02r\xff\xff\xff\x7f.",  # memo of two billion entries, empty stack
        b"\x80\x02K\x01r\xff\xff\xff\x7f",  # no end
        b"\x80\x02B\xff\xff\xff\x7fabc.",  # two gigabytes promised
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x02(ios\nsystem\n.",  # INST
        b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93.",  # STACK_GLOBAL
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02cbuiltins\neval\n.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02K\x00Q.",  # a persistent id that is no storage
        b"\x80\x02(lK\x01sK\x02.",
        b"",
        b".",
        b"\x80\x02t.",
        b"\xff\xff",
    ],
)
def test_hostile_pickles(tmp_path: Path, program: bytes) -> None:
    with pytest.raises(DarkroomError) as error:
        read_checkpoint(zip_with_pickle(tmp_path / "m.pt", program))
    one_line(error)


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(8)}, tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for keep in range(0, len(whole), 37):
        (tmp_path / "cut.pt").write_bytes(whole[:keep])
        with pytest.raises(DarkroomError):
            read_checkpoint(tmp_path / "cut.pt")


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_flipped_bytes_never_escape_the_reader(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(8), "names": ["a", {"b": (1, 2.0)}]}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        program = archive.read("m/data.pkl")
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        changed = bytearray(program)
        for position in torch.randint(0, len(program), (3,), generator=g).tolist():
            changed[position] = int(torch.randint(0, 256, (1,), generator=g))
        with contextlib.suppress(DarkroomError):
            read_checkpoint(zip_with_pickle(tmp_path / "changed.pt", bytes(changed)))


def test_other_files_are_named(tmp_path: Path) -> None:
    zip_with_pickle(tmp_path / "bomb.pt", b"\x80\x02N." + b"\0" * 10_000, zipfile.ZIP_DEFLATED)
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "none.pt").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme", "x")
    with zipfile.ZipFile(zip_with_pickle(tmp_path / "script.pt", b"\x80\x02N."), "a") as archive:
        archive.writestr("m/constants.pkl", b"\x80\x02).")
    torch.save({"w": torch.ones(1)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    expected = {
        "bomb": "compressed",
        "text": "not a checkpoint",
        "none": "empty",
        "other": "not a torch checkpoint",
        "script": "TorchScript",
        "legacy": "before 1.6",
    }
    for name, words in expected.items():
        with pytest.raises(DarkroomError, match=words):
            read_checkpoint(tmp_path / f"{name}.pt")


def test_what_small_files_would_become_in_memory_is_bounded(tmp_path: Path) -> None:
    for header in (b'{"a":[' + b"[]," * 2_000_000 + b"1]}", b"{" + b'"":0,' * 1_500_000 + b'"a":0}', b'"' * 5_000_000):
        with pytest.raises(DarkroomError, match="not JSON, or of an impossible size"):
            read_safetensors_header(header_file(tmp_path / "m.safetensors", header))
    with pytest.raises(DarkroomError, match="instructions"):
        read_checkpoint(zip_with_pickle(tmp_path / "m.pt", b"\x80\x02" + b"]" * 1_100_000 + b"."))
    with zipfile.ZipFile(tmp_path / "many.pt", "w") as archive:
        for i in range(80):
            archive.writestr(f"{i}" + "x" * 60_000, b"")
        archive.comment = b"PK\5\6" + b"\0" * 40  # a false end
    with pytest.raises(DarkroomError, match="too many entries"):
        read_checkpoint(tmp_path / "many.pt")
    (tmp_path / "config.json").write_bytes(b"[" + b"1," * 2_000_000 + b"1]")
    with pytest.raises(DarkroomError, match="too many values"):
        read_json(tmp_path / "config.json")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(DarkroomError, match="is a pipe or a device"):
        read_safetensors(tmp_path / "m.safetensors")
    with pytest.raises(DarkroomError, match="is a pipe or a device"):
        read_json(Path("/dev/zero"))


def test_errors_are_one_line_whatever_names_a_file_holds(tmp_path: Path) -> None:
    name = "first\nsecond\x1b[2J\ud800" + "x" * 100_000
    path = header_file(tmp_path / "m.safetensors", {name: entry("F99", [1], 0, 4)})
    with pytest.raises(DarkroomError) as error:
        read_safetensors(path)
    text = one_line(error)
    assert text.isprintable() and len(text) < 3000 and "first\\nsecond" in text


def test_one_tensor_at_a_time_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Of a storage that many share only the part of the tensor that is asked for is read."""
    shared = torch.arange(4000.0)
    content = {"tail": shared[3990:], "middle": shared[10:20].view(2, 5).t(), "own": torch.ones(3), "none": shared[:0]}
    torch.save(content, tmp_path / "m.pt")
    stored = stored_table(read_structure(tmp_path / "m.pt"))
    read = list(iter_stored(tmp_path / "m.pt", stored))
    assert [name for name, _ in read] == ["none", "middle", "tail", "own"]
    for name, tensor in read:
        assert torch.equal(tensor, content[name]) and tensor.dtype == content[name].dtype
        assert tensor.untyped_storage().nbytes() <= 40
    write_safetensors(tmp_path / "m.safetensors", {"b": torch.ones(2), "a": torch.zeros(3), "c": torch.ones(1).half()})
    assert [name for name, _ in iter_safetensors(tmp_path / "m.safetensors", ["c", "b"])] == ["b", "c"]


def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})
    file = open_tensor_file(path)
    assert torch.equal(file.read(["a"])["a"], torch.ones(3))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DarkroomError, match="changed while it was read"):
        file.read(["a"])


@pytest.mark.parametrize("place", ["numbers", "local header", "table"])
def test_damage_between_the_entries_of_a_checkpoint(tmp_path: Path, place: str) -> None:
    torch.save({"w": torch.full((64,), 1.5)}, tmp_path / "m.pt")
    data = bytearray((tmp_path / "m.pt").read_bytes())
    numbers = data.index(torch.full((64,), 1.5).numpy().tobytes())
    table = data.rindex(b"m/data/0") - 46
    assert data[table : table + 4] == b"PK\1\2"
    at = {"numbers": numbers + 9, "local header": data.rindex(b"PK\3\4", 0, numbers), "table": table + 24}
    data[at[place]] ^= 0x40
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(DarkroomError, match=r"damaged|compressed"):
        read_checkpoint(tmp_path / "m.pt")


# --- writing


def test_write_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.bin"
    write_file(path, b"old")
    full_disk(monkeypatch, "a.bin")
    with pytest.raises(DarkroomError, match="No space left on device"):
        write_file(path, b"new" * 10_000)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["a.bin"]


def test_new_folder_replaces_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "m"
    for content in ("one", "two"):
        with new_folder(target, replaces=lambda old: (old / "f").exists()) as temporary:
            (temporary / "f").write_text(content)
            assert not target.exists() or (target / "f").read_text() != content
        assert (target / "f").read_text() == content
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_new_folder_leaves_nothing_after_a_failure(tmp_path: Path, failure: type[BaseException]) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(failure), new_folder(tmp_path / "m") as temporary:
        (temporary / "f").write_text("half")
        raise failure
    assert os.listdir(tmp_path) == ["m"] and os.listdir(tmp_path / "m") == []


def test_new_folder_spares_folders_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(DarkroomError, match="holds other files"), new_folder(tmp_path):
        pass
    with pytest.raises(DarkroomError, match="is a file"), new_folder(tmp_path / "photo.jpg"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link") as temporary:
        (temporary / "f").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "f").exists()


def test_without_the_atomic_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.safe_files.ctypes.CDLL", lambda *args, **kwargs: object())
    test_new_folder_replaces_in_one_step(tmp_path)
