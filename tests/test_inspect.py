"""Looking inside: what is printed, written and drawn of statistics, plans and slim checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from test_cli import QUICK, run
from test_report import Checker, make_report

from slimdiff.plan import Entry, Plan
from slimdiff.report import page, svg, unet
from slimdiff.report.of_plan import PlanView

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def made(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with statistics, what probing found on them, and a slim checkpoint."""
    folder = tmp_path_factory.mktemp("inspect")
    statistics = folder / "statistics.safetensors"
    run("calibrate", model_folder, *QUICK, "-o", statistics)
    probing = ["--probe-prompts", 1, "--probe-steps", 1, "--device", "cpu"]
    run("compress", statistics, *probing, "--independent-ranks", "-o", folder / "slim")
    return folder


def test_statistics_on_the_terminal_and_as_json(made):
    out = run("inspect", made / "statistics.safetensors")
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.qk:q" in out and "effective rank" in out
    assert "influence: sampler slimdiff, 1 prompts, float32, 1 steps of " in out and "energy by tenth" in out
    data = json.loads(run("inspect", made / "statistics.safetensors", "--json"))
    assert data["what"] == "statistics" and data["done"] == 2
    for key, found in data["statistics"].items():
        assert len(found["spectrum"]) == found["width"] and sum(found["spectrum"]) == pytest.approx(1), key
        assert 1 <= found["effective_rank"] <= found["width"] and found["condition"] >= 1
        assert sum(found["energy_by_tenth"]) == pytest.approx(1)
    (points,) = data["influence"].values()
    plan = Plan.from_json((made / "slim/slimdiff/plan.json").read_text())
    assert set(points) == {entry.group for entry in plan.entries}


def test_statistics_without_probing(made, tmp_path):
    shutil.copy(made / "statistics.safetensors", tmp_path / "alone.safetensors")
    assert "not probed yet" in run("inspect", tmp_path / "alone.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "alone.safetensors"]


def test_a_checkpoint_and_its_plan_are_the_same(made):
    out = run("inspect", made / "slim")
    assert out == run("inspect", made / "slim/slimdiff/plan.json")
    assert "of widths kept" in out and "conv_out" in out and "predicted drift" in out
    data = json.loads(run("inspect", made / "slim", "--json"))
    assert data.pop("what") == "plan" and data == json.loads((made / "slim/slimdiff/plan.json").read_text())


def test_pages_are_whole(made, tmp_path):
    for what, plots in (("statistics.safetensors", 4 * 3 + 1), ("slim", 1)):
        run("inspect", made / what, "-o", tmp_path / what)
        assert sorted(p.name for p in (tmp_path / what).iterdir()) == ["inspect.html", "inspect.json"]
        text = (tmp_path / what / "inspect.html").read_text(encoding="utf-8")
        found = Checker(text)
        assert len(found.all("svg")) == plots and not found.all("script")
        assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)


@pytest.mark.parametrize("what", ["folder", "text.json", "none.safetensors", "report.json"])
def test_what_is_none_of_them_is_refused(tmp_path, what):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "report.json").write_text('{"format": 1, "headline": "x"}')
    out = run("inspect", tmp_path / what, "-o", tmp_path / "out", code=1)
    assert "Error:" in out and not (tmp_path / "out").exists()


def test_the_unet_stands_as_a_u():
    """Down blocks left from the top, up blocks right with the last on top, the middle below both."""
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.2"]
    layer = "attentions.0.transformer_blocks.1.attn1.qk"
    entries = [Entry(f"{n}.{layer}", "qk", 8, 8 - i, (1, 1), (1, 1), 0.1, None) for i, n in enumerate(names)]
    text = unet.picture(entries)
    Checker(text)
    blocks = re.findall(r'--area:([^"]+)"><h4>(?:[↓↑] )?([^<]+)', text)
    assert dict((name, area) for area, name in blocks) == {
        "down_blocks.0": "1 / 1", "down_blocks.1": "2 / 1", "mid_block": "3 / 1 / auto / 3",
        "up_blocks.1": "2 / 2", "up_blocks.2": "1 / 2",
    }  # fmt: skip
    assert re.findall(r'<i style="width:([\d.]+)%', text) == ["100.0", "87.5", "75.0", "62.5", "50.0"]
    assert "<s>8 → </s>4" in text and "75% of widths kept" in text and text.count(">0.1<") == 5


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("up_blocks.1.attentions.0.transformer_blocks.2.attn1.qk",
         ("up_blocks.1", "attentions.0.transformer_blocks.2.", "attn1.qk")),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.linear",
         ("mid_block", "attentions.0.transformer_blocks.0.", "ff.net.0.proj.linear")),
        ("down_blocks.0.attn1.qk", ("down_blocks.0", "", "attn1.qk")),
        ("strange", ("", "", "strange")),
    ],
)  # fmt: skip
def test_where_a_group_is(group, expected):
    assert unet.place(group) == expected


def test_plans_that_cut_nothing_or_were_not_probed_are_pages_too():
    plan = make_report().plan
    whole = replace(plan, entries=tuple(replace(e, rank=e.width) for e in plan.entries), predicted_error=None)
    assert "Nothing is cut" in PlanView(whole).html() and "not cut" in PlanView(whole).table()
    local = replace(plan, entries=tuple(replace(e, final_error=None) for e in plan.entries), refits={"conv_out": 0.9})
    text = PlanView(local).html()
    assert "without probing" in text and "&minus;10.0%" in text
    Checker(text)
    Checker(PlanView(replace(plan, entries=())).html())


def test_axes_hold_their_values_between_round_marks():
    axis = svg.Axis.even("", 0.93, 1.34, lambda x: f"{x:g}")
    assert [text for _, text in axis.marks] == ["0.9", "1", "1.1", "1.2", "1.3", "1.4"]
    assert axis.place(0.1) == 0 and axis.place(1.15) == pytest.approx(0.5) and axis.place(9) == 1
    axis = svg.Axis.decades("", [3e-7, 2e-2, 0, float("inf")], svg.percent_power)
    assert (axis.low, axis.high) == (1e-7, 0.1) and axis.place(1e-4) == pytest.approx(0.5)
    assert axis.marks[0][1] == "10⁻⁵%" and axis.place(0) == 0
    for one in (svg.Axis.even("", 1, 1, str), svg.Axis.decades("", [], str)):
        assert one.low < one.high


HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body>%s<pre></pre><script>
onload = () => {
  document.querySelector("pre").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, style = frame.contentWindow.getComputedStyle(page.body);
    const boxes = [...page.querySelectorAll("h1, h2, h3, p, .card, .figure *, .cell b, .block, .marks, dd")];
    return {
      width: frame.clientWidth, page: page.documentElement.scrollWidth, paper: style.backgroundColor, ink: style.color,
      heights: [...page.querySelectorAll("section")].map(one => one.offsetHeight),
      over: boxes.filter(one => one.scrollWidth > one.clientWidth + 1 && one.clientWidth).map(one => one.outerHTML),
    };
  }));
};
</script>"""


def laid_out(folder: Path, pages: list[str], *flags: str) -> list[dict]:
    """What a real browser makes of pages, each on a phone, on a tablet and on a desk."""
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{escape(one)}"></iframe>'
        for one in pages
        for width in (360, 768, 1280)
    )
    (folder / "harness.html").write_text(HARNESS % frames, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *flags]
    done = subprocess.run(
        [*command, "--dump-dom", (folder / "harness.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r"<pre>(\[.+?)</pre>", done.stdout, re.S)
    assert found, done.stderr
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def contrast(first: str, second: str) -> float:
    """The ratio of WCAG 2.1 of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted(map(luminance, (first, second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome to open the pages in")
def test_a_browser_lays_the_pages_out_without_overflow_in_light_and_dark(made, tmp_path):
    from slimdiff.inspection import look

    views = [look(made / "statistics.safetensors"), look(made / "slim")]
    columns = [
        ("attn1.qk", 64, 56),
        ("attn1.vo", 64, 56),
        ("attn2.qk", 64, 8),
        ("attn2.vo", 64, 64),
        ("ff.ffn", 5120, 4848),
    ]
    wide = [
        Entry(f"{block}.attentions.0.transformer_blocks.0.{name}", name[-3:], width, rank, (1, 1), (1, 1), 0.1, 0.1)
        for block in ("down_blocks.1", "mid_block", "up_blocks.0")
        for name, width, rank in columns
    ]
    views.append(PlanView(replace(make_report().plan, entries=tuple(wide))))
    pages = [page.html(make_report()), *(view.html() for view in views)]
    papers = set()
    for flags in ([], ["--force-dark-mode"]):
        for found in laid_out(tmp_path, pages, *flags):
            assert found["page"] <= found["width"] and found["over"] == []
            assert min(found["heights"]) > 40
            assert contrast(found["paper"], found["ink"]) > 7
            papers.add(found["paper"])
    assert len(papers) == 2  # one light, one dark
