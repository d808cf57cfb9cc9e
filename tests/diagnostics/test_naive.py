"""What a run of the lab logged, computed again in plain Python from the arrays that it stored: equal, exactly."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from opd_lab.bins import edges
from opd_lab.tracking import read
from tests.lab_run import run

STEPS, ROLLOUTS, WINDOW, QUANTILE = 4, 8, 2, 0.95

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every rollout of every step is stored; two steps are a window of the persistence."""
    every = ["diagnostics.every=1", f"diagnostics.sample_rollouts={ROLLOUTS}", f"diagnostics.high_loss_window={WINDOW}"]
    return run(tmp_path_factory.mktemp("naive"), *every).folder


def by_step(folder: Path, table: str) -> dict[int, list[Row]]:
    rows: dict[int, list[Row]] = defaultdict(list)
    for row in read.table(folder, table).to_dict("records"):
        rows[row["step"]].append({str(name): value for name, value in row.items()})
    return rows


def naive_counts(values: list[float], bins: str) -> list[int]:
    inner = edges(bins)
    counts = [0] * (len(inner) + 1)
    for value in values:
        if not math.isnan(value):
            counts[sum(value > edge for edge in inner)] += 1
    return counts


def test_histograms(folder: Path) -> None:
    stored = by_step(folder, "rollouts")
    logged = {(row["step"], row["name"]): row for rows in by_step(folder, "histograms").values() for row in rows}
    for step in range(1, STEPS + 1):
        rows = stored[step]
        assert len(rows) == ROLLOUTS
        tokens = {name: [float(v) for row in rows for v in row[name]] for name in rows[0] if name in _PER_TOKEN}
        assert tokens.keys() == _PER_TOKEN
        values = {
            "kl/reverse_nats": tokens["reverse_kl"],
            "kl/forward_nats": tokens["forward_kl"],
            "entropy/student_nats": tokens["entropy_student"],
            "entropy/teacher_nats": tokens["entropy_teacher"],
            "rank/teacher_tokens": tokens["rank_teacher"],
            "weight/total_ratio": tokens["weight"],
            "loss/opd": tokens["loss"],
            "rollout/length_tokens": [float(len(row["ids"])) for row in rows],
            "gap/sampled_nats": [p - q for p, q in zip(tokens["logp_student"], tokens["logp_teacher"])],
        }
        for name, many in values.items():
            row = logged.pop((step, name))
            assert list(row["counts"]) == naive_counts(many, row["bins"]), (step, name)
        ratio = logged.pop((step, "importance/sampled_ratio"))
        middle = naive_counts([1.0], "importance_ratio").index(1)
        assert list(ratio["counts"])[middle] == len(tokens["loss"])  # the student's own tokens, before it has moved
    assert {name for _, name in logged} == {"probe/reverse_nats"}


_PER_TOKEN = {
    *("logp_student", "logp_teacher", "reverse_kl", "forward_kl", "rank_teacher", "entropy_student"),
    *("entropy_teacher", "behavior_logp", "weight", "loss"),
}


def test_profiles(folder: Path) -> None:
    stored = by_step(folder, "rollouts")
    for table, bin_of in (
        ("positions", lambda t, n: 10 * t // n),
        ("positions_absolute", lambda t, n: 0 if t == 0 else 2 ** (t.bit_length() - 1)),
    ):
        logged = by_step(folder, table)
        for step in range(1, STEPS + 1):
            kl: dict[int, list[float]] = defaultdict(list)
            for row in stored[step]:
                for t, value in enumerate(row["reverse_kl"]):
                    kl[bin_of(t, len(row["ids"]))].append(value)
            key = "decile" if table == "positions" else "begin_tokens"
            found = {row[key]: (row["tokens"], row["kl_reverse_mean_nats"]) for row in logged[step]}
            assert found == {place: (len(many), sum(many, 0.0) / len(many)) for place, many in kl.items()}


def test_rollout_records(folder: Path) -> None:
    stored, logged = by_step(folder, "rollouts"), by_step(folder, "rollout_records")
    for step in range(1, STEPS + 1):
        assert len(logged[step]) == ROLLOUTS
        for row, record in zip(stored[step], logged[step]):
            grams = [tuple(row["ids"][t : t + 4]) for t in range(len(row["ids"]) - 3)]
            assert record["uid"] == row["uid"] and record["reward"] == row["reward"]
            assert record["length_tokens"] == len(row["ids"]) and record["truncated"] == (not row["stopped"])
            assert record["kl_mean_nats"] == pytest.approx(math.fsum(row["reverse_kl"]) / len(row["ids"]), rel=1e-14)
            assert record["repetition_fraction"] == (len(grams) - len(set(grams))) / len(grams)
            assert record["source"] == "student"


def test_token_types(folder: Path) -> None:
    """Sums in the order in which the run made them: over the tokens of a step, then over steps."""
    stored, logged = by_step(folder, "rollouts"), by_step(folder, "high_loss_tokens")
    total: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    kl_max: dict[int, float] = defaultdict(lambda: -math.inf)
    window: dict[int, list[float]] = {}
    high: dict[int, int] = defaultdict(int)
    for step in range(1, STEPS + 1):
        of_step: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for row in stored[step]:
            for t, v in enumerate(row["ids"]):
                kl = row["reverse_kl"][t]
                seen = of_step[v]
                seen["count"] += 1
                seen["kl"] += kl
                seen["square"] += kl * kl
                seen["entropy"] += row["entropy_teacher"][t]
                seen["position"] += t / len(row["ids"])
                kl_max[v] = max(kl_max[v], kl)
        for v, seen in of_step.items():
            for name, value in seen.items():
                total[v][name] += value
            window.setdefault(v, [0.0, 0.0])
            window[v][0] += seen["count"]
            window[v][1] += seen["kl"]
        if step % WINDOW == 0:
            for v in naive_high(window):
                high[v] += 1
            window = {}
        all_kl, all_tokens = (math.fsum(total[v][name] for v in total) for name in ("kl", "count"))
        for row in logged[step]:
            mine = total[row["id"]]
            n, mean = mine["count"], mine["kl"] / mine["count"]
            assert (row["count"], row["kl_mean_nats"], row["kl_max_nats"]) == (n, mean, kl_max[row["id"]])
            assert row["kl_std_nats"] == max(mine["square"] / n - mean * mean, 0.0) ** 0.5
            assert row["entropy_teacher_mean_nats"] == mine["entropy"] / n
            assert row["position_mean_fraction"] == mine["position"] / n
            assert row["token_share_fraction"] == n / all_tokens
            assert row["kl_share_fraction"] == pytest.approx(mine["kl"] / all_kl, rel=1e-14)  # order of summation
            assert (row["persistence_windows"], row["windows"]) == (high[row["id"]], step // WINDOW)
        order = sorted(total, key=lambda v: -total[v]["kl"])
        assert [row["id"] for row in logged[step]] == order[: len(logged[step])]
    assert sum(high.values()) > 0


def naive_high(window: dict[int, list[float]]) -> list[int]:
    """The types with the largest mean that together hold a share 1 - quantile of the tokens, the one on the border
    included, as far as they lie above the mean of all."""
    tokens = sum(count for count, _ in window.values())
    middle = sum(kl for _, kl in window.values()) / tokens
    reached, border = 0.0, None
    for v in sorted(window, key=lambda v: window[v][1] / window[v][0]):
        reached += window[v][0]
        if border is None and reached > QUANTILE * tokens:
            border = window[v][1] / window[v][0]
    assert border is not None
    return [v for v, (count, kl) in window.items() if kl / count >= border and kl / count > middle]
