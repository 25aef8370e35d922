"""Made-up studies for the tests of the report: losses in, a judged Standing out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from muonlab.registry.record import RunRecord
from muonlab.registry.settings import WorkloadSettings
from muonlab.registry.snapshot import DeclaredCell, Registration, Snapshot
from muonlab.registry.study import Study
from muonlab.reporting.standing import Evaluation, Standing, judge

Outcome = float | str | None
"""A final loss, "diverged", "failed", "abandoned", or None for a run that was never made."""

STEPS = 300
BASELINE = [4.28, 4.31, 4.25, 4.30, 4.27]


def shifted(by: Sequence[float], of: Sequence[float] = BASELINE) -> list[Outcome]:
    """The challenger's losses that are better than `of` by these amounts."""
    return [base - gain for base, gain in zip(of, by, strict=False)]


NOLAH = shifted([-0.0245, -0.0035, -0.0193, -0.0023, -0.0202])
TRIVIAL = shifted([0.0009, -0.0008, 0.0008, 0.0002, -0.0008])
STRONG = shifted([0.051, 0.047, 0.055, 0.049, 0.053])
NOISY = shifted([0.06, -0.05, 0.04, -0.02, 0.03])


REPORTED = {
    "source": "a made-up paper",
    "workloads": {"large": {"model": "made-up-1b", "data": "made-up", "steps": STEPS, "eval_every": 30}},
}


def digest(arm: str, seed: int) -> str:
    return hashlib.sha256(f"{arm}-{seed}".encode()).hexdigest()


def curve(final: float, seed: int, early: float = 0.0) -> list[dict[str, float | int | None]]:
    """A loss curve from ln 2048 down to `final`; `early` is added in the first third."""
    points: list[dict[str, float | int | None]] = []
    for step in range(0, STEPS + 1, 30):
        fade = math.exp(-step / 70) - math.exp(-STEPS / 70)
        bump = early * math.sin(math.pi * step / 90) if 0 < step < 90 else 0.0
        wiggle = 0.002 * math.sin(seed + step) if 0 < step < STEPS else 0.0
        points.append({"step": step, "val_loss": final + (7.6 - final) * fade + bump + wiggle})
    return points


def record(
    arm: str, seed: int, outcome: Outcome, *, price: float = 0.0, early: float = 0.0, **changes: object
) -> RunRecord:
    loss = outcome if isinstance(outcome, float) else None
    status = "completed" if loss is not None else str(outcome)
    points = curve(loss if loss is not None else 4.3, seed, early)
    if status == "diverged":
        points = [*points[:3], {"step": 90, "val_loss": 30.0}, {"step": 120, "val_loss": None}]
    fields: dict[str, object] = {
        "study": "001-made-up",
        "workload": "tiny",
        "arm": arm,
        "seed": seed,
        "cell_digest": digest(arm, seed),
        "registration": "ab" * 32,
        "status": status,
        "attempt": 1,
        "attempt_id": f"{arm}-{seed}-{changes.get('attempt', 1)}",
        "started_at": f"2025-01-02T03:{seed:02d}:00Z",
        "resumed_from_step": 0,
        "val_loss": loss,
        "perplexity": math.exp(loss) if loss is not None and loss < 700 else (None if loss is None else 1e300),
        "final_step": STEPS if loss is not None else 120,
        "tokens": STEPS * 512,
        "wall_seconds": 22.5 + seed,
        "device_count": 1,
        "cost_usd": (22.5 + seed) / 3600 * price,
        "curve": points if status in ("completed", "diverged") else [],
        "hashes": {
            "data": "d" * 64,
            "tokenizer": "e" * 64,
            "init": f"{seed:064d}",
            "order": f"{seed:064d}",
            "weights": None,
            "code": "c" * 64,
            "environment": "f" * 64,
        },
        "provenance": {
            "commit": "8346aac",
            "dirty": False,
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.1.0",
            "device": "cpu",
            "host_os": "Linux x86_64",
        },
        "error": None if status in ("completed", "diverged") else "OutOfMemory: the process was killed",
    }
    return RunRecord.model_validate({**fields, **changes})


def made_up(
    outcomes: Mapping[str, Sequence[Outcome]],
    *,
    control: Sequence[str] = (),
    reference: Sequence[str] = (),
    price: float = 0.0,
    early: Mapping[str, float] | None = None,
    samples: Mapping[str, str] | None = None,
    series: Mapping[str, Callable[[int], dict[str, list[tuple[int, float]]]]] | None = None,
    decision: Mapping[str, object] | None = None,
    extra_records: Sequence[RunRecord] = (),
    findings: Sequence[str] = (),
    unlike: Sequence[str] = (),
    amended: bool = False,
    **study_changes: object,
) -> Standing:
    """A standing of arms with these outcomes by seed; the first arm is the baseline, `unlike` arms had other data.

    `series`: arm -> what its curve.csv holds on a seed. Reported by others, there is one seed and a model of theirs.
    """
    arms = list(outcomes)
    described = {*control, *reference}
    seeds = list(range(max(len(runs) for runs in outcomes.values())))
    study = Study.model_validate(
        {
            "slug": "001-made-up",
            "question": "Does a made-up arm beat the made-up baseline?",
            "workload": "tiny",
            "baseline": arms[0],
            "challengers": [arm for arm in arms[1:] if arm not in described],
            "control": list(control),
            "reference": list(reference),
            "seeds": seeds,
            "decision": {"min_effect": "0.5%", **(decision or {})},
            "price_usd_per_gpu_hour": price,
            "budget_usd": 100 * price,
            "tuning": "900-tune",
            **({"reported": REPORTED, "workload": "large"} if study_changes.get("provenance") == "reported" else {}),
            **study_changes,
        }
    )
    names: dict[str, dict[str, object]] = {"arms": {}, "settings": {}}
    registered = study.registration(names)
    records = [
        record(
            arm,
            seed,
            outcome,
            price=price,
            registration=registered,
            early=(early or {}).get(arm, 0.0),
            **({"hashes": {**record(arm, seed, 4.0).hashes.model_dump(), "data": "0" * 64}} if arm in unlike else {}),
        )
        for arm, runs in outcomes.items()
        for seed, outcome in enumerate(runs)
        if outcome is not None
    ]
    evaluations = [
        Evaluation(
            arm=arm,
            seed=0,
            cell_digest=digest(arm, 0),
            weights_sha256=None,
            val_loss=next((r.val_loss for r in records if (r.arm, r.seed) == (arm, 0)), None),
            perplexity=None,
            prompt="The history of",
            sample=text,
        )
        for arm, text in (samples or {}).items()
    ]
    evaluations += [
        Evaluation(
            arm=arm,
            seed=run.seed,
            cell_digest=run.cell_digest,
            weights_sha256=None,
            val_loss=run.val_loss,
            perplexity=None,
            prompt="",
            sample="",
            series=of_seed(run.seed),
        )
        for arm, of_seed in (series or {}).items()
        for run in records
        if run.arm == arm and run.is_result
    ]
    snapshot = Snapshot(
        study=study,
        settings=study.reported.workloads["large"] if study.reported else WorkloadSettings(steps=STEPS),
        optimizers={arm: {"kind": "muon", "options": {"lr": 0.01, "scale": 0.9}} for arm in arms},
        cells=[DeclaredCell(arm=arm, seed=seed, digest=digest(arm, seed)) for seed in seeds for arm in arms],
        records=[*records, *extra_records],
        registration=Registration(
            registration=registered,
            registered_at="2025-01-02T03:00:00Z",
            commit="8346aac",
            declaration={"study": study.declaration(), **names},
        ),
        current_registration="cd" * 32 if amended else registered,
        findings=list(findings),
        notes=[],
        ledger_sha256="9" * 64,
        judged_by="8" * 64,
    )
    return judge(snapshot, evaluations)


def at_prices(standing: Standing, times: Mapping[str, float]) -> Standing:
    """The study judged again, an arm's runs this many times as long and as dear, more so on later seeds."""

    def scaled(run: RunRecord) -> RunRecord:
        by = times.get(run.arm, 1.0) * (1 + 0.1 * run.seed * (run.arm in times))
        return run.model_copy(update={"wall_seconds": by * run.wall_seconds, "cost_usd": by * run.cost_usd})

    records = [scaled(run) for run in standing.snapshot.records]
    return judge(standing.snapshot.model_copy(update={"records": records}), [])


def as_repository(standing: Standing, folder: Path) -> str:
    """Write what the commands read of a judged study into an empty repository; returns the study's name."""
    study = standing.snapshot.study
    (folder / "params.yaml").touch()
    (folder / "dvc.yaml").touch()
    declared = folder / "experiments" / study.slug
    declared.mkdir(parents=True)
    content = study.model_dump(mode="json", exclude_defaults=True)
    (declared / "study.yaml").write_text(json.dumps({"study": content}))
    reports = folder / "reports" / study.slug
    reports.mkdir(parents=True)
    (reports / "stats.json").write_text(standing.model_dump_json())
    return study.slug
