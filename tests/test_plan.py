"""The plan: everything that was decided, in JSON and in words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from slimdiff.errors import SlimdiffError
from slimdiff.plan import Entry, Plan, short

ENTRIES = (
    Entry("down.attn1.qk", "qk", 40, 32, (1000, 800), (4000, 3200), 0.01, 0.02),
    Entry("down.attn1.vo", "vo", 40, 40, (1000, 1000), (4000, 4000), 0.0, None),
    Entry("down.ff.ffn", "ffn", 1280, 64, (3000, 150), (9000, 450), 0.25, 0.25),
)
PLAN = Plan(
    budget=0.5, of="groups", achieved=0.61, entries=ENTRIES, unet_params=(859_500_000, 859_496_950),
    unet_macs=(401_600_000_000, 401_599_000_000), predicted_error=0.27, lower_bound=0.2,
    provenance={"model": "some/model", "recipe": {"steps": 50, "scheduler": None}, "options": {"kinds": ["qk", "vo"]}},
)  # fmt: skip


def test_json_holds_the_whole_plan():
    assert Plan.from_json(PLAN.to_json()) == PLAN
    text = json.loads(PLAN.to_json())
    assert text["format"] == 1
    assert len(text["entries"]) == 3


def test_a_plan_of_a_newer_format_asks_for_an_upgrade():
    newer = {**json.loads(PLAN.to_json()), "format": 2, "something": "new"}
    with pytest.raises(SlimdiffError, match=r"newer.*upgrade"):
        Plan.from_json(json.dumps(newer))


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", "3", "null", '"plan"', '{"format": 1}', '{"format": "one"}'])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(SlimdiffError, match="not a plan"):
        Plan.from_json(text)


def test_plans_with_parts_missing_or_too_many_are_refused():
    whole = json.loads(PLAN.to_json())
    broken = [{key: value for key, value in whole.items() if key != left_out} for left_out in ("entries", "budget")]
    broken += [{**whole, "more": 1}, {**whole, "entries": [{"group": "a"}]}, {**whole, "unet_params": None}]
    for data in broken:
        with pytest.raises(SlimdiffError, match="not a plan"):
            Plan.from_json(json.dumps(data))


def test_only_cut_groups_have_a_rank():
    assert PLAN.ranks() == {"down.attn1.qk": 32, "down.ff.ffn": 64}
    untouched = tuple(replace(entry, rank=entry.width) for entry in ENTRIES)
    assert replace(PLAN, entries=untouched).ranks() == {}


def test_the_table_has_a_line_for_each_group_and_the_totals():
    table = PLAN.table().splitlines()
    rows = {entry.group: next(line for line in table if line.startswith(entry.group + " ")) for entry in ENTRIES}
    assert "40 -> 32" in rows["down.attn1.qk"]
    assert "1,000 -> 800" in rows["down.attn1.qk"]
    assert "->" not in rows["down.attn1.vo"]
    assert rows["down.ff.ffn"].split()[-1] == "93.4%"  # 2850 of 3050
    assert rows["down.attn1.qk"].split()[-1] == "6.6%"
    assert table[-len(PLAN.summary()) :] == PLAN.summary()
    summary = "\n".join(PLAN.summary())
    assert "-61.0%" in summary  # 5000 -> 1950 parameters of the groups
    assert "859.5M" in summary
    assert "401.6G" in summary
    assert "achieved 61.00%" in summary
    assert "predicted drift        27% of the final latents (no choice of widths below 20%)" in summary


def test_a_plan_that_cuts_nothing_still_prints():
    entries = tuple(replace(entry, rank=entry.width, params=(9, 9), macs=(9, 9)) for entry in ENTRIES)
    table = replace(PLAN, entries=entries, budget=0.0, achieved=0.0).table()
    assert "+0.0%" in table or "-0.0%" in table


def test_counts_are_short_for_people():
    assert [short(n) for n in (0, 999, 1000, 859_520_964, 401.64e9, 2.5e12)] == [
        "0", "999", "1k", "859.5M", "401.6G", "2.5T",
    ]  # fmt: skip
