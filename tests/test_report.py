"""The report: whole, self-contained, escaped, the worst first, and never a speed-up without its drift."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slimdiff.macs import Macs
from slimdiff.measured import Fidelity, Picture, Settings, Size, Spread, Timing, quantile
from slimdiff.plan import Entry, Plan
from slimdiff.report import document, page, sheet, svg, wording
from slimdiff.report.results import Report

VOID = {"meta", "img", "br", "path", "rect", "link", "hr"}


class Checker(HTMLParser):
    """Collects tags; raises AssertionError where they are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def picture(label: str, drift: float, prompt: str = "a cat") -> Picture:
    dense = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    return Picture(label, prompt, "blur", 10_001, drift, 21.5, 0.8, dense, dense[::-1].copy())


def pixels(image: dict[str, str | None]) -> np.ndarray:
    data = (image["src"] or "").removeprefix("data:image/png;base64,")
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def make_report(**changes: object) -> Report:
    names = ["down_blocks.0.attn1", "up_blocks.0.attn1", "mid_block.attn1"]
    entries = [Entry(f"{n}.qk", "qk", 8, 6 - i, (10, 8), (4, 2), 0.1, 0.0123) for i, n in enumerate(names)]
    entries += [Entry(f"{n}.ffn", "ffn", 64, 64, (10, 10), (4, 4), 0.0, 0.0) for n in names]
    made_from = {"model": "owner/<tiny>", "options": {"budget": 0.3, "kinds": ["qk", "ffn"]}}
    plan = Plan(0.3, "groups", 0.3, tuple(entries), (100, 80), (10, 9), 0.031, 0.03, made_from)
    speed = tuple(
        Timing(what, Spread(0.12, 0.11, 0.13), Spread(0.1, 0.09, 0.11), Spread(1.23, 1.2, 1.26), 5, 1)
        for what in ("UNet, 1 prompt (2 rows)", "1 picture, 3 steps")
    )
    noise = ((1e-4, 1e-3), (1e-3, 2e-2), (1e-2, 5e-2))
    fidelity = Fidelity((0.02, 0.4), noise, (700, 400, 100), (460, 900), (0.8, 0.7), None)
    report = Report(
        Settings(("a cat", "<script>alert(1)</script>"), ("", ""), 3, 7.5, 48, 48),
        plan,
        Size((100, 80), (Macs(1000, 100), Macs(800, 90)), (400, 320), (500, 420), (900, 800)),
        speed,
        fidelity,
        (picture("worst", 0.4, "<script>alert(1)</script>"), picture("typical", 0.02)),
        {"command": "slimdiff bench", "device": "a CPU", "versions": {"torch": "2"}},
    )
    return replace(report, **changes)


def test_page_is_whole_and_refers_to_nothing_outside() -> None:
    text = page.html(make_report())
    found = Checker(text)
    assert len(found.all("img")) == 3 * 2  # two pairs, each with its difference
    assert len(found.all("svg")) == 1  # the error's curve
    assert sum(attrs.get("class") == "cell" for attrs in found.all("span")) == 6  # every group of the plan
    assert not found.all("script") and not found.all("link") and not found.all("iframe")
    for _, attrs in found.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "$" not in text.replace("$1", "")


def test_what_users_wrote_is_escaped() -> None:
    text = page.html(make_report())
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert "&lt;tiny&gt;" in text


def test_pictures_are_png_and_the_difference_is_amplified() -> None:
    report = make_report()
    dense, slim, difference = map(pixels, Checker(page.html(report)).all("img")[:3])
    assert (dense == report.pictures[0].dense).all() and (slim == report.pictures[0].slim).all()
    assert (difference == np.minimum(255, page.GAIN * np.abs(dense.astype(int) - slim))).all()


def test_large_pictures_are_scaled_down_and_not_pixelated() -> None:
    black = np.zeros((600, 900, 3), np.uint8)
    images = Checker(page.pair(replace(picture("worst", 0.1), dense=black, slim=black))).all("img")
    assert pixels(images[0]).shape == (256, 384, 3) and "class" not in images[0]
    assert Checker(page.pair(picture("worst", 0.1))).all("img")[0]["class"] == "pixels"


def test_no_speed_up_without_its_drift() -> None:
    """Whatever element shows the speed-up, the headline, a card or a row, shows the drift too."""
    text = page.html(make_report())
    assert text.count("1.23&times;") == 4  # the headline, the card, two rows
    for tag, times in (("h1", 1), ("tr", 2)):
        shown = [e for e in re.findall(f"<{tag}>.+?</{tag}>", text, re.S) if "1.23&times;" in e]
        assert len(shown) == times and all("21%" in element and "40%" in element for element in shown)
    (pair,) = re.findall(r'<div class="card pair">.+?</header>', text, re.S)
    assert "1.23&times;" in pair and "<strong>21%</strong>" in pair and "1.25&times;" in pair  # the ideal, too


def test_worst_comes_first() -> None:
    labels = re.findall(r'<p class="tags"><b class="\w+">(.+?)</b>', page.html(make_report()))
    assert labels == ["worst", "typical"]


def test_error_plot_is_logarithmic_and_survives_zero_and_infinite_errors() -> None:
    text = svg.error_plot([3, 2, 1], [1e-3, 1e-2, 1e-1], [1e-2, 1e-1, 1])
    heights = [float(y) for y in re.search(r'd="M([^"]+)" class="median"', text)[1].replace("L", " ").split()[1::2]]  # type: ignore[index]
    assert heights == pytest.approx([100, 200 / 3, 100 / 3], abs=0.01)
    assert "No error" in svg.error_plot([2, 1], [0, 0], [0, 0])
    for odd in ([0.0, 0.1], [0.1, math.inf]):
        assert "nan" not in svg.error_plot([2, 1], odd, odd)
    assert "0.1%" in text and "100%" in text


def test_files_are_written_whole(tmp_path: Path) -> None:
    data, text = page.write(make_report(), tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["pictures.png", "report.html", "report.json"]
    assert json.loads(data.read_text(encoding="utf-8"))["picture"]["drift"]["worst"] == 0.4
    Checker(text.read_text(encoding="utf-8"))


def test_a_report_without_pictures_or_cuts_is_still_a_page() -> None:
    report = make_report()
    bare = replace(report, pictures=(), plan=replace(report.plan, entries=()), size=replace(report.size, memory=None))
    assert not Checker(page.html(bare)).all("img")
    assert "Peak memory" not in bare.table()


def test_a_plan_of_local_errors_predicts_no_drift() -> None:
    report = make_report()
    local = replace(report, plan=replace(report.plan, predicted_error=None))
    assert "plan predicted a drift of 3.1%" in report.table() and "plan predicted" not in local.table()
    assert local.to_json()["picture"]["predicted_drift"] is None


def test_the_plan_predicts_a_drift_in_percent_and_its_bound_where_it_is_worth_a_word() -> None:
    plan = replace(make_report().plan, predicted_error=4.91e-6, lower_bound=4.91e-6)
    assert plan.summary()[-1] == "predicted drift        0.00049% of the final latents"
    apart = replace(plan, lower_bound=1e-6).summary()[-1]
    assert apart.endswith("0.00049% of the final latents (no choice of widths below 0.00010%)")
    assert replace(plan, predicted_error=0.0, lower_bound=0.0).summary()[-1].endswith("0% of the final latents")
    assert " 10%  " in plan.table() and " 1.2%  " in plan.table() and "e-" not in plan.table()


def test_a_drift_far_above_the_predicted_one_is_said_at_once() -> None:
    report = make_report()
    typical = quantile(report.fidelity.drift, 0.5)
    for foreseen in (None, 0.0, typical / 9):
        trusted = replace(report, plan=replace(report.plan, predicted_error=foreseen))
        assert "far above" not in trusted.table() + page.html(trusted)
    doubted = replace(report, plan=replace(report.plan, predicted_error=typical / 11))
    assert doubted.table().splitlines()[1].startswith("That is far above what the plan predicted (1.9%): calibrate on")
    assert "far above what the plan predicted" in page.html(doubted)


def test_a_speed_up_of_few_timings_is_told_as_one() -> None:
    report = make_report()
    assert "(1.23x as fast, few timings)" in report.table()
    enough = tuple(replace(timing, pairs=10) for timing in report.speed)
    assert "(1.23x as fast)" in replace(report, speed=enough).table()


def test_terminal_table_is_aligned() -> None:
    text = make_report().table()
    speed = [line for line in text.splitlines() if line.startswith(("Speed ", "UNet, 1", "1 picture"))]
    assert len({len(line) for line in speed}) == 1 and "1.23x (1.20 - 1.26)" in speed[1]
    assert [s.split()[0] for s in text.split("\n\n")[1:5]] == ["Size", "Speed", "Fidelity", "Pictures"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.percent(0), "0%"), (wording.percent(0.0123), "1.2%"), (wording.percent(1.7), "170%"),
        (wording.percent(0.0996), "10%"), (wording.percent(math.inf), "not finite"),
        (wording.seconds(0.0999), "99.9 ms"), (wording.seconds(0.99996), "1.00 s"),
        (wording.seconds(0.0595, 0.059, 0.0619), "59.5 ms (59.0 - 61.9)"), (wording.percent(0.001), "0.10%"),
        (wording.seconds(1234.5), "1234 s"),
        (wording.seconds(2e-5), "20.0 us"), (wording.count(859_520_964), "859.52 M"), (wording.count(12), "12"),
        (wording.size(1_234_567), "1.23 MB"), (wording.size(12), "12 B"), (wording.decibels(math.inf), "identical"),
        (wording.ordinal(2), "2nd"), (wording.ordinal(11), "11th"), (wording.ordinal(23), "23rd"),
        (document.typeset("1.23x (1.20 - 1.26)"), "1.23&times; (1.20&#8201;&ndash;&#8201;1.26)"),
        (document.typeset("-19.5%"), "&minus;19.5%"), (document.typeset("603 ms to"), "603&nbsp;ms to"),
        (document.typeset("<x>"), "&lt;x&gt;"), (document.typeset("1.8e-05%"), "1.8&middot;10<sup>&minus;5</sup>%"),
    ],
)  # fmt: skip
def test_figures_in_words(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_sheet_shows_the_worst_and_typical_pairs_side_by_side(tmp_path):
    shown = [
        picture(label, 0.1, "a very " + "very " * 50 + "long caption") for label in ("worst", "2nd worst", "typical")
    ]
    pairs = [replace(one, dense=np.full((48, 48, 3), 40 + i, np.uint8)) for i, one in enumerate([*shown, shown[2]])]
    found = np.array(sheet.sheet([*pairs, *pairs], most=4))
    middle = sheet.MARGIN + sheet.SIDE // 4
    colours = [int(row[0]) for row in found[:, middle] if 40 <= row[0] < 44 and len(set(row)) == 1]
    assert list(dict.fromkeys(colours)) == [40, 41, 42, 43]
    page.write(make_report(pictures=tuple(pairs)), tmp_path)
    assert (tmp_path / "pictures.png").exists()
    assert Image.open(tmp_path / "pictures.png").width == found.shape[1]


def test_one_pair_of_another_shape_is_a_sheet_too():
    large = picture("worst", 0.1)
    large = replace(large, dense=np.zeros((600, 900, 3), np.uint8), slim=np.zeros((600, 900, 3), np.uint8))
    assert (np.array(sheet.sheet([large]))[:, 20] == 0).all(1).sum() >= 213  # 320 px wide, two thirds as high


def test_without_pictures_there_is_no_sheet(tmp_path):
    page.write(make_report(pictures=()), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}
