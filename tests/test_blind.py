"""The page that asks people: what is on it, and what becomes of the answers."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_model

from darkroom.blind import BlindRequest, Pair, blind_page, make_pairs, result_lines, write_blind_page
from darkroom.cli.main import main
from darkroom.errors import DarkroomError


def study_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r"const study = (\{.*\});", page)[1])  # type: ignore[index]


def flat(folder: Path, names: list[str], blue: int) -> Path:
    folder.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (16, 16), (20 * i, 0, blue)).save(folder / f"{name}.png")
    return folder


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


def test_pictures_of_one_name_are_pairs(tmp_path: Path) -> None:
    one = flat(tmp_path / "one", ["a", "b", "c", "d"], 0)
    other = flat(tmp_path / "other", ["d", "b", "x", "a"], 255)
    pairs = make_pairs(BlindRequest(str(one), str(other)))
    assert [(int(p.one[0, 0, 0]), int(p.other[0, 0, 0])) for p in pairs] == [(0, 60), (20, 20), (60, 0)]  # a, b, d
    strangers = flat(tmp_path / "strangers", ["p", "q"], 9)
    assert len(make_pairs(BlindRequest(str(one), str(strangers)))) == 2  # by number


def test_models_are_asked_for_the_same(tmp_path: Path) -> None:
    model = tiny_model("class").save(tmp_path / "model")
    data = tmp_path / "data"
    for name in ("boot", "coat"):
        (data / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(data / name / "0.png")
    request = BlindRequest(str(model), str(data), data=[str(data)], pairs=2, steps=1)
    pairs = make_pairs(request)
    assert [p.caption for p in pairs] == ["boot", "coat"] and (pairs[0].other[..., 0] == 255).all()
    with pytest.raises(DarkroomError, match="told class_label"):
        make_pairs(BlindRequest(str(model), str(data), steps=1))


def test_a_model_without_conditions_needs_no_data(tmp_path: Path) -> None:
    model = tiny_model(None).save(tmp_path / "model")
    images = flat(tmp_path / "images", ["a", "b", "c"], 3)
    assert len(make_pairs(BlindRequest(str(images), str(model), pairs=2, steps=1))) == 2


def test_the_page_holds_everything_and_shows_no_name(tmp_path: Path) -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    page = blind_page([Pair(image, 255 - image, "</script><!-- a caption", image)], ["secret-a", "secret-b"])
    study = study_of(page)
    assert study["names"] == ["secret-a", "secret-b"] and study["pairs"][0]["caption"] == "</script><!-- a caption"
    assert np.array_equal(pixels(study["pairs"][0]["one"]), image) and "fits" not in study["question"]
    assert page.count("</script>") == 1 and "http" not in page.replace("http-equiv", "")
    assert "secret" not in page.replace(re.search(r"const study = .*", page)[0], "")  # type: ignore[index]
    assert blind_page([Pair(image, image)], ["a", "b"]) != page


def answers(page: str, chosen: str) -> dict[str, Any]:
    choices = [{"pair": i, "chosen": {"1": "one", "2": "other"}[c], "left": "one"} for i, c in enumerate(chosen)]
    return {"kind": "darkroom blind answers", "version": 1, "page": page, "names": ["A", "B"], "answers": choices}


def test_answers_are_put_together(tmp_path: Path) -> None:
    for name, content in (("x", answers("p", "1112")), ("y", answers("p", "112")), ("z", answers("q", "1"))):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    lines = result_lines([tmp_path / "x.json", tmp_path / "y.json"])
    assert lines[0].startswith("x.json: A was preferred to B in 3 of 4 pairs: 75.0%")
    assert lines[2].startswith("together: A was preferred to B in 5 of 7 pairs: 71.4%, 95 % interval 29.0% to 96.3%")
    with pytest.raises(DarkroomError, match="different pages"):
        result_lines([tmp_path / "x.json", tmp_path / "z.json"])
    (tmp_path / "bad.json").write_text(json.dumps(answers("p", "1") | {"answers": [{"chosen": "left"}]}))
    with pytest.raises(DarkroomError, match="neither the one"):
        result_lines([tmp_path / "bad.json"])
    with pytest.raises(DarkroomError, match="no such file"):
        result_lines([tmp_path / "absent.json"])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    flat(tmp_path / "one", ["a", "b"], 0)
    flat(tmp_path / "other", ["a", "b"], 255)
    assert main(["eval", "--ab", "one", "other", "--count", "1"]) == 0
    assert len(study_of((tmp_path / "runs" / "blind-one-other.html").read_text())["pairs"]) == 1
    (tmp_path / "answers.json").write_text(json.dumps(answers("p", "12")))
    assert main(["eval", "--ab-results", "answers.json"]) == 0 and "1 of 2 pairs" in capsys.readouterr().out
    assert main(["eval", "--ab", "one"]) == 2 and "needs two" in capsys.readouterr().err
    assert main(["eval", "--ab", "one", "one"]) == 2 and "against itself" in capsys.readouterr().err
    flat(tmp_path / "large", ["a"], 1)
    Image.new("RGB", (32, 32)).save(tmp_path / "large" / "a.png")
    assert main(["eval", "--ab", "one", "large"]) == 2 and "tell them apart" in capsys.readouterr().err
    with pytest.raises(DarkroomError, match=r"ends in \.html"):
        write_blind_page(BlindRequest("one", "other"), Path("page.txt"))
