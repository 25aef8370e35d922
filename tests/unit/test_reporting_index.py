"""The index says of every study what its verdict.json says, and of any other file what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reporting_studies import BASELINE, NOLAH, STRONG, TRIVIAL, Outcome, made_up

from muonlab.pipeline.conclude import index_entries, write_index
from muonlab.pipeline.layout import Layout
from muonlab.registry.errors import UsageError
from muonlab.reporting.index import read_judged, summarize
from muonlab.reporting.standing import Standing, verdict_json
from muonlab.reporting.wording import decision_sentence


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "reports").mkdir()
    return Layout(root=tmp_path, main=tmp_path)


def declare(layout: Layout, slug: str, standing: Standing, **changes: object) -> None:
    layout.study(slug).mkdir(parents=True)
    study = standing.snapshot.study.model_dump(mode="json", exclude_defaults=True)
    content = {"study": {**study, "slug": slug, **changes}}
    (layout.study(slug) / "study.yaml").write_text(json.dumps(content))


def conclude(layout: Layout, slug: str, standing: Standing, **changes: object) -> None:
    """Write verdict.json as the stats stage does, in the name of this study."""
    content: dict[str, Any] = {
        **verdict_json(standing, decision_sentence(standing)),
        "summary": summarize(standing).model_dump(mode="json"),
        "study": slug,
        **changes,
    }
    layout.reports(slug).mkdir(parents=True)
    (layout.reports(slug) / "verdict.json").write_text(json.dumps(content))


def index(layout: Layout) -> str:
    write_index(layout)
    return (layout.root / "reports" / "README.md").read_text(encoding="utf-8")


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def rows(text: str) -> list[list[str]]:
    """The table's rows, head and rule left out."""
    return [cells(line) for line in text.splitlines() if line.startswith("|")][2:]


def test_without_a_study(layout: Layout) -> None:
    text = index(layout)
    assert text.startswith("# Studies\n")
    assert "No study has a verdict yet." in text
    assert "|" not in text


def test_one_study_shows_each_challengers_numbers(layout: Layout) -> None:
    standing = made_up({"muon": BASELINE, "nolah": NOLAH, "good": STRONG}, control=[])
    declare(layout, "001-one", standing)
    conclude(layout, "001-one", standing)
    first, second = rows(index(layout))
    by_arm = {c.arm: c.estimates for c in standing.decided}
    for row, arm, verdict in ((first, "nolah", "NO_GO"), (second, "good", "GO")):
        assert row[1:3] == [arm, verdict]
        e = by_arm[arm]
        assert e.rel_diff_pct is not None
        assert e.rel_ci95_pct is not None
        assert float(row[3].rstrip("%")) == pytest.approx(e.rel_diff_pct, rel=0.05)
        shown = [float(end.rstrip("%")) for end in row[4].strip("[]").split(", ")]
        assert shown == pytest.approx(e.rel_ci95_pct, rel=0.05)
        assert row[5] == "5"
    # The whole study's cost and date stand once: 10 of the 15 runs take 22.5 s + seed each, 15 in all.
    assert first[0] == "[001-one]"
    assert first[6] == "6.1 min"
    assert first[7] == "2025-01-02"
    assert (second[0], second[6], second[7]) == ("", "", "")
    assert "[001-one]: 001-one/report.md" in index(layout)


def test_the_cost_is_in_dollars_where_a_price_was_declared(layout: Layout) -> None:
    standing = made_up({"muon": BASELINE, "nolah": NOLAH}, price=3600.0)
    conclude(layout, "001-one", standing)
    assert rows(index(layout))[0][6] == "\\$245.00"


def test_the_last_result_is_the_day_on_which_it_ended(layout: Layout) -> None:
    standing = made_up({"muon": BASELINE, "nolah": NOLAH})
    late = [
        r.model_copy(update={"started_at": "2025-03-31T23:59:50Z", "wall_seconds": 30.0})
        if (r.arm, r.seed) == ("nolah", 2)
        else r
        for r in standing.snapshot.records
    ]
    snapshot = standing.snapshot.model_copy(update={"records": late})
    assert summarize(standing.model_copy(update={"snapshot": snapshot})).last_result == "2025-04-01"


def test_invalid_partial_and_guardrail_are_said(layout: Layout) -> None:
    runs: dict[str, list[Outcome]] = {"muon": list(BASELINE), "nolah": list(NOLAH)}
    conclude(layout, "001-invalid", made_up(runs, findings=["a ledger line was edited"], early={"nolah": 0.9}))
    conclude(layout, "002-partial", made_up({"muon": list(BASELINE), "nolah": [*NOLAH[:4], None]}))
    conclude(layout, "003-early", made_up(runs, early={"nolah": 0.9}))
    conclude(layout, "004-none", made_up({"muon": [None], "nolah": [None]}))
    invalid, partial, early, none = rows(index(layout))
    assert invalid[2] == "INVALID"
    assert partial[2] == "INCOMPLETE, partial"
    assert early[2] == "NO_GO, guardrail failed"
    assert none[2:] == ["INCOMPLETE, partial", "–", "none: no pairs", "0", "0 s", "–"]


def test_what_was_not_run_and_what_tunes_is_listed_apart(layout: Layout) -> None:
    standing = made_up({"muon": BASELINE, "nolah": NOLAH})
    declare(layout, "001-waiting", standing)
    declare(layout, "900-tune", standing, kind="tuning", grid={"lr": [0.1]}, decision=None)
    text = index(layout)
    assert "- 001-waiting: Does a made-up arm beat the made-up baseline? (`muon study run 001-waiting`)" in text
    assert "[900-tune](../experiments/900-tune/study.yaml)" in text
    assert "|" not in text


@pytest.mark.parametrize(
    "content",
    ["", "not json", "[]", '{"study": "001-one", "decision": "Adopt."}', '{"study": "001-one", "summary": {}}', "\x00"],
)
def test_a_file_of_another_version_is_named_with_what_to_do(layout: Layout, content: str) -> None:
    standing = made_up({"muon": BASELINE, "nolah": NOLAH})
    declare(layout, "001-one", standing)
    conclude(layout, "001-one", standing)
    conclude(layout, "002-other", standing)
    (layout.reports("001-one") / "verdict.json").write_text(content)
    text = index(layout)
    assert (
        "- 001-one: reports/001-one/verdict.json: another version wrote it, or it was edited; "
        "`muon study run 001-one` makes it anew." in text
    )
    assert [row[0] for row in rows(text)] == ["[002-other]"]


def test_another_studys_verdict_and_another_schema_are_foreign(layout: Layout) -> None:
    standing = made_up({"muon": BASELINE, "nolah": NOLAH})
    newer = {**summarize(standing).model_dump(mode="json"), "schema_version": 2}
    conclude(layout, "001-copied", standing, study="009-original")
    conclude(layout, "002-newer", standing, summary=newer)
    with pytest.raises(UsageError, match="the verdict of '009-original'"):
        read_judged(layout.reports("001-copied"))
    assert [entry.state for entry in index_entries(layout)] == ["foreign", "foreign"]


def test_an_unreadable_declaration_does_not_hide_the_others(layout: Layout) -> None:
    standing = made_up({"muon": BASELINE, "nolah": TRIVIAL})
    declare(layout, "001-broken", standing, seeds=[1])
    declare(layout, "002-renamed", standing)
    (layout.study("002-renamed")).rename(layout.study("003-moved"))
    conclude(layout, "004-fine", standing)
    text = index(layout)
    assert "- 001-broken: experiments/001-broken/study.yaml: study: seeds are [1]" in text
    assert "- 003-moved: experiments/003-moved/study.yaml: slug is '002-renamed' but the folder is '003-moved'" in text
    assert len(rows(text)) == 1


def test_markup_in_a_question_stays_text(layout: Layout) -> None:
    question = "Is <b>x</b> | better\nthan [this](http://e.org)? \u202e"
    conclude(layout, "001-one", made_up({"muon": BASELINE, "nolah": NOLAH}, question=question))
    text = index(layout)
    assert "\\<b>x\\</b> \\| better than [this\\](" in text
    assert "\u202e" not in text


def test_it_reads_neither_ledger_nor_reports_and_writes_only_news(layout: Layout) -> None:
    """Studies with thousands of runs cost a small file each; an unchanged index keeps its time stamp."""
    standing = made_up({"muon": BASELINE, "nolah": NOLAH})
    conclude(layout, "001-one", standing)
    before = index(layout)
    path = layout.root / "reports" / "README.md"
    written = path.stat().st_mtime_ns
    for other in ("stats.json", "registry.json", "report.md", "evaluations.jsonl"):
        (layout.reports("001-one") / other).write_text("not what it should be")
    (layout.root / "experiments").mkdir()
    layout.ledger.write_text("not a ledger")
    assert index(layout) == before
    assert path.stat().st_mtime_ns == written


def test_a_temporary_copy_has_no_index(layout: Layout, tmp_path: Path) -> None:
    write_index(Layout(root=layout.root, main=tmp_path / "main"))
    assert not (layout.root / "reports" / "README.md").exists()


def test_the_cell_of_an_experiment_is_no_study(layout: Layout) -> None:
    conclude(layout, "exp", made_up({"muon": BASELINE, "nolah": NOLAH}))
    assert index_entries(layout) == []
