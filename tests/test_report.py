"""The report and the model card: complete runs, broken runs, and the arithmetic of the charts."""

from __future__ import annotations

import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from subprocess import run

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from darkroom.errors import DarkroomError
from darkroom.model_card import model_card
from darkroom.report import data_uri, evenly, write_report
from darkroom.report_charts import Series, line_chart, linear_ticks, log_ticks, number, smooth, thin
from darkroom.report_tables import flatten, show

PLAN = {
    "recipe": "shapes",
    "images": 120,
    "image_size": [64, 32],
    "downsampling": 8,
    "conditioning": ["text"],
    "first_stage": None,
    "denoiser": {"steps": 200},
}
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects ids, links, text and what the page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids.add(given.get("id") or "")
        self.links += [given["href"] or ""] if "href" in given else []
        self.sources += [given["src"] or ""] if "src" in given else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    folder = tmp_path / "run <1>"
    (folder / "samples").mkdir(parents=True)
    lines = []
    for n in range(1, 201):
        lines.append({"stage": "first_stage", "train_step": n, "loss": 50 * math.exp(-n / 20) + 1, "kl": 3.0})
        lines.append({"stage": "denoiser", "train_step": n, "loss": 1 / n, "learning_rate": 1e-4, "seconds": n / 2})
    lines[100] |= {"psnr": 25.5, "validation_loss": 1.5}
    lines[121]["loss"] = math.nan
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"stage": "denoiser", "train_st')  # as a kill leaves it
    captions = PngInfo()
    captions.add_text("captions", json.dumps(["a <red> circle"]))
    for n in range(10, 210, 10):
        Image.new("RGB", (64, 32), (n, 0, 0)).save(folder / "samples" / f"denoiser-{n:06d}.png", pnginfo=captions)
    Image.new("I;16", (16, 16), 40000).save(folder / "samples" / "first_stage-000100.png")
    Image.new("RGB", (900, 40)).save(folder / "samples" / "contact-sheet.png")
    (folder / "config.yaml").write_text("steps: 200  # <all>\n")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "data.json").write_text(
        json.dumps({"examples": 120, "warnings": ["few pictures"], "problems": [["bad.png", "truncated"]]})
    )
    summary = {
        "scores": {"psnr": {"value": 25.5, "protocol": "held out"}},
        "minutes": 2.5,
        "first_stage_skipped_steps": 0,
        "denoiser_skipped_steps": 2,
        "denoiser_rollbacks": 1,
        "threads": 2,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_report_of_a_complete_run(finished_run: Path) -> None:
    path = write_report(finished_run)
    assert path == finished_run / "report.html"
    page = Page(path.read_text())
    assert {"warnings", "first_stage", "denoiser", "data", "settings", "environment", "problems"} <= page.ids
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    for words in (
        "run <1>",
        "few pictures",
        "1 file could not be read and was left out",
        "2 steps in the denoiser skipped",
        "1 return to a checkpoint in the denoiser",
        "Recipe shapes · 120 images of 64×32 · f = 8 · conditioned on text",
        "a <red> circle",
        "steps: 200  # <all>",
        "25.5",
        "held out",
        "2.5",
        "bad.png",
    ):
        assert words in page.words, words
    frames = path.read_text().count("<figure data-step=")
    assert frames == 16 + 1  # 20 sample grids are thinned, the one reconstruction stays
    assert not list(finished_run.glob("*.part"))


def test_report_fetches_nothing(finished_run: Path) -> None:
    text = re.sub(r"data:image/\w+;base64,[^\"]+", "", write_report(finished_run).read_text())
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", text)


def test_report_of_an_empty_folder(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text())
    assert tmp_path.name in page.words and "No metrics were recorded" in page.words


def test_report_survives_damaged_files(finished_run: Path) -> None:
    (finished_run / "samples" / "denoiser-000200.png").write_bytes(b"not a picture")
    for name in ("plan.json", "data.json", "summary.json"):
        (finished_run / name).write_text("[1, 2")
    (finished_run / "metrics.jsonl").write_bytes(b'\xff\n[1]\n{"train_step": "x"}\n{"train_step": 3, "loss": null}\n')
    page = Page(write_report(finished_run).read_text())
    assert "denoiser-000200.png cannot be read" in page.words


def test_report_of_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DarkroomError, match="no run folder"):
        write_report(tmp_path / "nowhere")


def test_a_quiet_run_says_so(finished_run: Path) -> None:
    for name in ("plan.json", "data.json", "summary.json"):
        (finished_run / name).unlink()
    assert "no warnings" in Page(write_report(finished_run).read_text()).words


def test_the_report_does_not_need_torch(tmp_path: Path) -> None:
    code = f"import sys; from darkroom.report import write_report; write_report({str(tmp_path)!r}); "
    run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


def test_sixteen_bit_pictures_are_shown_in_their_full_range(tmp_path: Path) -> None:
    import base64
    from io import BytesIO

    file = tmp_path / "deep.png"
    Image.new("I;16", (8, 8), 32896).save(file)  # 32896 / 257 = 128
    uri, size = data_uri(file)
    shown = Image.open(BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L")
    assert size == (8, 8) and abs(shown.getpixel((4, 4)) - 128) <= 2


# --- charts ----------------------------------------------------------------------------------------------------------


def chart_svg(chart: str) -> ElementTree.Element:
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", chart, re.S)[0])  # type: ignore[index]
    return svg


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0, 1000) == [0, 200, 400, 600, 800, 1000]
    assert linear_ticks(0.0312, 0.0388) == pytest.approx([0.032, 0.034, 0.036, 0.038])
    assert linear_ticks(-1.2, 1.2) == [-1, -0.5, 0, 0.5, 1]
    assert linear_ticks(3, 3) == [3]
    assert log_ticks(0.009, 1.2) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    assert log_ticks(1e-6, 1.0)[0] == 1e-6
    for low, high in ((1e-9, 1e9), (0.11, 0.9), (3.0, 30.0)):
        ticks = log_ticks(low, high)
        assert 2 <= len(ticks) <= 7 and all(low * 0.99 <= t <= high * 1.01 for t in ticks)


def test_numbers_are_short() -> None:
    values = (0, 0.01234, 1.5, 12000, 20000, 2.5e6, 2e-5, -0.00012, math.nan)
    shown = ["0", "0.01234", "1.5", "12k", "20k", "2.5M", "2e-5", "-1.2e-4", "not finite"]
    assert [number(v) for v in values] == shown


def test_running_mean_of_a_constant_is_the_constant_and_follows_a_step() -> None:
    flat = smooth([(n, 2.0) for n in range(100)], 20)
    assert all(y == pytest.approx(2.0) for _, y in flat)
    step = smooth([(n, float(n >= 200)) for n in range(400)], 20)
    # 1 - (1 - 1/20)^n after n steps at the new value
    assert step[219][1] == pytest.approx(1 - 0.95**20)
    assert smooth([(1, 5.0), (2, math.nan), (3, 5.0)], 20) == [(1, 5.0), (3, 5.0)]


def test_thinning_keeps_ends_spikes_and_gaps() -> None:
    points = [(n, 0.0) for n in range(10_000)]
    points[4321] = (4321, 9.0)
    points[7777] = (7777, math.nan)
    thinned = thin(points)
    assert len(thinned) < 400 and thinned[-1] == points[-1] and (4321, 9.0) in thinned
    assert any(math.isnan(y) for _, y in thinned)
    assert [x for x, _ in thinned if x != 7777] == sorted(x for x, _ in thinned if x != 7777)


def test_chart_draws_what_it_is_given() -> None:
    train = Series("training", [(n, 1.0 + n / 100) for n in range(0, 101, 1)])
    validation = Series("validation", [(50, 1.6), (100, 2.1)], "validation")
    svg = chart_svg(line_chart("Loss", [train, validation]))
    probes = json.loads(svg.attrib["data-probe"])
    assert [[p[0], p[1]] for p in probes[1]] == [[50, 1.6], [100, 2.1]]
    assert probes[0][-1][2] > probes[0][0][2] and probes[0][-1][3] < probes[0][0][3]  # right and up
    assert len(svg.findall(".//circle")) == 2


def test_chart_axes() -> None:
    wide = line_chart("Loss", [Series("training", [(n, 100 / (n + 1)) for n in range(100)])])
    assert "logarithmic" in wide
    spike = [(n, -1.0 + 0.1 * math.sin(n)) for n in range(100)]
    spike[0] = (0, 500.0)
    chart = line_chart("Loss", [Series("training", spike)])
    assert "outside the frame" in chart and "logarithmic" not in chart
    broken = line_chart("Loss", [Series("training", [(1, 1.0), (2, math.nan), (3, 1.0)])])
    assert "not finite" in broken and 'class="broken"' in broken
    single = line_chart("PSNR", [Series("held out", [(7, 20.0)], "validation")])
    assert len(chart_svg(single).findall(".//circle")) == 1
    assert line_chart("Loss", [Series("training", [(1, math.nan)])]) == ""


def test_evenly_keeps_first_and_last() -> None:
    items = [(n, Path(str(n))) for n in range(100)]
    chosen = evenly(items, 16)
    assert len(chosen) == 16 and chosen[0] == items[0] and chosen[-1] == items[-1]
    assert evenly(items[:3], 16) == items[:3]


# --- tables and model card -------------------------------------------------------------------------------------------


def test_flatten_and_show() -> None:
    value = {"a": {"b": 1, "c": [1, 2]}, "s": [{"name": "psnr", "value": 2.5, "protocol": "p"}], "n": None}
    rows = [("a: b", 1), ("a: c", "1, 2"), ("s: psnr", 2.5), ("s: psnr: protocol", "p"), ("n", None)]
    assert flatten(value) == rows
    assert flatten(None) == []
    assert [show(v) for v in (None, True, 12345, 2.0, 0.123456, "x")] == ["none", "yes", "12,345", "2", "0.12346", "x"]


def test_model_card_of_a_text_model() -> None:
    card = model_card(
        {
            "name": "emoji",
            "conditioning": ["text"],
            "image_size": (64, 48),
            "prompts": ["red apple"],
            "parameters": {"denoiser": 9_000_000},
            "data": {"name": "emoji-128", "count": 1620, "licence": "Apache-2.0"},
            "recipe": "emoji",
            "steps": {"denoiser": 20000},
            "scores": [{"name": "PSNR", "value": 26.5, "protocol": "94 held-out | mode"}],
            "warnings": ["few pictures"],
            "licence": "Apache-2.0",
        }
    )
    for line in (
        "# emoji",
        "| picture size in training | 64 x 48 |",
        "| parameters: denoiser | 9,000,000 |",
        'darkroom generate -m FOLDER "red apple" --seed 0 -o picture.png',
        'result = model.generate("red apple", seed=[0, 1, 2, 3])  # result.images: (4, H, W, C) uint8',
        "- licence: Apache-2.0",
        "- steps: denoiser: 20,000",
        "| PSNR | 26.5 | 94 held-out \\| mode |",
        "- few pictures",
    ):
        assert line in card.splitlines(), line
    assert "not stated" not in card


def test_model_card_of_class_and_unconditional_models() -> None:
    card = model_card({"classes": ["Dress", "Hat"], "scores": {"validation_loss": 0.07}})
    assert 'darkroom generate -m FOLDER --class "Dress" --seed 0 -o picture.png' in card
    assert "| validation_loss | 0.07 | not stated |" in card
    empty = model_card({})
    assert "darkroom generate -m FOLDER --seed 0 -o picture.png" in empty
    assert "Not recorded." in empty and "None measured." in empty and "Not stated." in empty


@pytest.mark.parametrize(
    ("field", "command", "call"),
    [
        ("low_resolution", "darkroom upscale -m sr photo.png", 'darkroom.upscale(image, "sr", seed=0)'),
        ("repaint_mask", "darkroom edit -m sr photo.png --mask mask.png", 'darkroom.edit(image, mask, "sr")'),
    ],
)
def test_model_card_of_a_model_that_works_on_photos(field: str, command: str, call: str) -> None:
    card = model_card({"load": "sr", "conditioning": ["image", field]})
    assert command in card.splitlines() and call in card and "generate" not in card


def test_model_card_of_a_first_stage() -> None:
    card = model_card({"kind": "FirstStage", "load": "first-stage-f4", "name": "x", "downsampling": 4})
    assert "A first stage made with Darkroom." in card and "| downsampling f | 4 |" in card
    assert 'darkroom.load("first-stage-f4")' in card and "darkroom train FOLDER --first-stage first-stage-f4" in card
    assert "generate" not in card and "It draws" not in card and "What it loses is lost" in card
