"""What MLflow shows of attempts, records and reports: names, tags, parameters, metrics, and the view by arm.

    start.json   -> name, parameters, tags, dataset
    curve.jsonl  -> curve/<column>, optimizer/<diagnostic>   at (step, started_at + seconds)
    system.jsonl -> system/<reading>                         at (seconds, started_at + seconds)
    record.json  -> val_loss, perplexity, cost_usd, wall_seconds, final_step
                    and, of a result, the files train.json and curve.csv, as DVC keeps them beside the weights

A point's timestamp is computed from the attempt and not taken from the clock: the store holds a (key, timestamp,
step, value) once, so a replay adds nothing. The curve has names of its own because its losses are measured on the
validation subset, and the final `val_loss` on the whole split: in one series the last step would have two values.
`seconds` and `tokens` are not series: the first is the timestamp, the second the step times a constant. A `/` in a
name makes a section of MLflow's page of charts; `system/` fills its page of system metrics.

Charts by arm: MLflow draws the mean and the range of the runs that agree in a tag, but the choice is the browser's.
`views` has that choice as a saved view, which MLflow keeps in a tag of the experiment (checked with 3.17).
Source: the state that its own pages save under "Views".
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonlab.registry.canonical import canonical_json
from muonlab.registry.record import RunRecord

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param

EXPLORATION = "exploration"
RECORD_FILE, CURVE_FILE = "train.json", "curve.csv"
RUN_STATUS = {"completed": "FINISHED", "diverged": "FINISHED", "failed": "FAILED", "abandoned": "KILLED"}
NOT_SERIES = ("step", "seconds", "tokens")
DIAGNOSTIC_PREFIX = "opt_"
BASELINE_COLOUR = "#1b1e23"
ARM_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#b3508f", "#b07d00", "#2f93cc", "#7a5230", "#6b6fd0")
"""The report's colours (Okabe and Ito), so that an arm looks the same on both pages."""
VIEW_TAG = "mlflow.sharedViewState."
COLUMNS = ("tags.`status`", "metrics.`val_loss`", "metrics.`cost_usd`", "attributes.`Duration`")
VERDICT_TAGS = ("verdict.", "effect.", "e_value.")


def experiment_name(base: dict[str, Any]) -> str:
    """Experiment of a record: its study, or `exploration`."""
    return base["study"] or EXPLORATION


def run_name(base: dict[str, Any]) -> str:
    """Name of an attempt's run: `<arm>/seed-<n>`, from the second attempt on with its number."""
    again = f" (attempt {base['attempt']})" if base["attempt"] > 1 else ""
    return f"{base['arm']}/seed-{base['seed']}{again}"


def attempt_tags(base: dict[str, Any], parent: str | None, colour: str | None) -> dict[str, str]:
    """Tags of an attempt's run but for its status; `base` is its record, or what is known of it at its start."""
    tags = {
        **{key: str(base[key]) for key in ("arm", "seed", "workload", "cell_digest", "attempt", "attempt_id")},
        "kind": "attempt",
        "study": experiment_name(base),
        "device": base["provenance"]["device"],
        "mlflow.source.name": "stages.train",
        "mlflow.source.type": "LOCAL",
    }
    if base["provenance"]["commit"]:
        tags["mlflow.source.git.commit"] = base["provenance"]["commit"]
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    if colour is not None:
        tags["mlflow.runColor"] = colour
    return tags


def study_tags(study: str) -> dict[str, str]:
    """Tags of a study's own run until there is a report."""
    return {"kind": "report", "study": study, "status": "incomplete"}


def colours(arms: list[str]) -> dict[str, str]:
    """Colour of each arm of a study, the baseline first."""
    return {arm: ARM_COLOURS[(i - 1) % len(ARM_COLOURS)] if i else BASELINE_COLOUR for i, arm in enumerate(arms)}


def parameters(cell: dict[str, Any]) -> list[Param]:
    """Parameters of a cell's run: `optimizer` and its options, the workload's settings, the seed."""
    from mlflow.entities import Param

    flat = {"seed": cell["seed"], "optimizer": cell["optimizer"]["kind"]}
    flat |= _flattened(cell["optimizer"]["options"], "optimizer")
    flat |= _flattened(cell["settings"], "settings")
    return [Param(key, value if isinstance(value, str) else canonical_json(value)) for key, value in flat.items()]


def dataset(base: dict[str, Any]) -> DatasetInput:
    """The data that an attempt was trained on: the workload's, by the digest of its prepared tokens."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(
        name=base["workload"],
        digest=base["hashes"]["data"][:16],
        source_type="local",
        source=json.dumps({"uri": f"data/{base['workload']}"}),
    )
    return DatasetInput(data, [InputTag("mlflow.data.context", "training")])


def curve_metrics(rows: Iterable[dict[str, Any]], started: int) -> Iterator[Metric]:
    """Metrics of a curve's rows; `started` in ms since 1970. A validation loss that was not finite is nan."""
    from mlflow.entities import Metric

    for row in rows:
        at = started + round(1000 * (row.get("seconds") or 0.0))
        for key, value in row.items():
            if key == "val_loss" and value is None:
                value = math.nan
            if key in NOT_SERIES or not isinstance(value, int | float):
                continue
            name = (
                f"optimizer/{key.removeprefix(DIAGNOSTIC_PREFIX)}"
                if key.startswith(DIAGNOSTIC_PREFIX)
                else f"curve/{key}"
            )
            yield Metric(name, float(value), at, row["step"])


def system_metrics(rows: Iterable[dict[str, Any]], started: int) -> Iterator[Metric]:
    """Metrics of what was read of the training process, at the second of the attempt as the step."""
    from mlflow.entities import Metric

    for row in rows:
        for key, value in row.items():
            if key != "seconds":
                yield Metric(
                    f"system/{key}", float(value), started + round(1000 * row["seconds"]), round(row["seconds"])
                )


def final_metrics(record: RunRecord) -> list[Metric]:
    """What an attempt ended with, where it is defined, at its end."""
    from mlflow.entities import Metric

    values = record.model_dump(include={"val_loss", "perplexity", "cost_usd", "wall_seconds", "final_step"})
    return [Metric(key, value, ended(record), record.final_step) for key, value in values.items() if value is not None]


def final_tags(record: RunRecord) -> dict[str, str]:
    """How an attempt ended."""
    return {"status": record.status} | ({"error": record.error} if record.error else {})


def ended(record: RunRecord) -> int:
    """When an attempt ended, in ms since 1970."""
    return milliseconds(record.started_at) + round(1000 * record.wall_seconds)


def curve_of_record(record: RunRecord, file: Path | None) -> list[dict[str, Any]]:
    """Rows of an attempt's curve: those of its curve.csv, else the validation losses that the record itself holds.

    The record says at which step a loss was measured but not when: then the attempt's wall time is shared out over
    its steps.
    """
    if file is None:
        pace = record.wall_seconds / max(1, record.final_step)
        return [{"step": p.step, "val_loss": p.val_loss, "seconds": pace * p.step} for p in record.curve]
    with file.open(newline="", encoding="utf-8") as opened:
        return [
            {key: int(value) if key == "step" else _finite(value) for key, value in row.items() if value}
            for row in csv.DictReader(opened)
        ]


def files(record: RunRecord, curve: Path | None, rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Name -> text of the files of a finished run; its curve is made of `rows` where its own file is not here."""
    text = curve.read_text(encoding="utf-8") if curve is not None else _curve_csv(rows)
    return {RECORD_FILE: record.model_dump_json(indent=2) + "\n", CURVE_FILE: text}


def _curve_csv(rows: Iterable[dict[str, Any]]) -> str:
    table = list(rows)
    columns = list(dict.fromkeys(key for row in table for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def standing_metrics(standing: dict[str, Any], at: int) -> Iterator[Metric]:
    """Effect [nats/token, positive: better than the baseline] and E-value of each challenger; `at` in ms since 1970.

    What is undefined is nan, since MLflow would go on showing the value of an earlier version of the report.
    """
    from mlflow.entities import Metric

    for comparison in _decided(standing):
        for name, key in (("effect", "mean_diff"), ("e_value", "e_value")):
            value = comparison["estimates"][key]
            yield Metric(f"{name}/{comparison['arm']}", math.nan if value is None else value, at, 0)


def verdict_tags(verdict: dict[str, Any], standing: dict[str, Any]) -> dict[str, str]:
    """Tags of a study's run, fit for the columns of a list: the verdicts, and what each rests on.

    An effect is in nats/token and positive where the challenger is better, with its 95% interval and the number of
    pairs; what is undefined is a dash.
    """
    verdicts = {arm: found["verdict"] for arm, found in verdict["verdicts"].items()}
    rehearsal = ", rehearsal" if "twin_of" in verdict else ""
    tags = {"verdict": (", ".join(f"{arm}: {found}" for arm, found in verdicts.items()) or "none") + rehearsal}
    tags |= {f"verdict.{arm}": found for arm, found in verdicts.items()}
    for comparison in _decided(standing):
        found = comparison["estimates"]
        low, high = (_signed(end) for end in found["ci95"] or (None, None))
        effect = f"{_signed(found['mean_diff'])} nats/token, 95% interval [{low}, {high}], n = {found['n']}"
        tags[f"effect.{comparison['arm']}"] = effect
        e_value = found["e_value"]
        tags[f"e_value.{comparison['arm']}"] = "-" if e_value is None else f"{e_value:.4g}"
    return tags


def views() -> dict[str, str]:
    """The saved views of an experiment, as tag and value.

    `Curves by arm`: one group an arm, the losses first, all runs shown. An abandoned attempt belongs to its group: the
    one that goes on after it has only the rest of the curve.
    `Verdict and losses`: the study's run with its attempts under it, and the columns that speak.
    """
    losses = [
        {
            "type": "LINE",
            "uuid": f"loss-{name}",
            "metricSectionId": "loss",
            "deleted": False,
            "isGenerated": True,
            "metricKey": f"curve/{name}",
            "runsCountToCompare": 10,
            "lineSmoothness": 0,
            "scaleType": "linear",
            "xAxisKey": "step",
            "xAxisScaleType": "linear",
            "selectedXAxisMetricKey": "",
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
        }
        for name in ("val_loss", "train_loss")
    ]
    by_arm = {
        "searchFilter": "tags.kind = 'attempt'",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "arm"}]},
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [*COLUMNS],
        "compareRunCharts": losses,
        "compareRunSections": [
            {"uuid": "loss", "name": "loss", "display": True, "isReordered": False, "deleted": False, "columns": 2}
        ],
        "isAccordionReordered": True,
    }
    table = {"selectedColumns": ["tags.`verdict`", *COLUMNS]}
    return {
        f"{VIEW_TAG}{key}": canonical_json(
            {"name": name, "createdAt": at, "updatedAt": at, "state": canonical_json(state)}
        )
        # The times are only the order in which they are listed.
        for at, (key, name, state) in enumerate(
            [("by-arm", "Curves by arm", by_arm), ("table", "Verdict and losses", table)], start=1
        )
    }


def milliseconds(iso: str) -> int:
    """Milliseconds since 1970 of an ISO 8601 time."""
    return round(1000 * datetime.fromisoformat(iso).timestamp())


def _decided(standing: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The comparisons on which something is decided, not those that are only described."""
    return (found for found in standing.get("comparisons", ()) if found["decision"] is not None)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4g}"


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _flattened(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {path: leaf for key, inner in value.items() for path, leaf in _flattened(inner, f"{name}.{key}").items()}
