"""A teacher that can write and nothing else: a whole run of the lab, and who is refused before it."""

import pytest
from lab_run import run, settings

from opd_lab.doctor import first_step
from opd_lab.run import load_parts
from opd_lab.teacher.local import LocalTeacher
from opd_lab.tracking import read
from opd_lab.tracking.run_folder import read_table


class TextOnly(LocalTeacher):
    provides = frozenset({"text"})

    def __init__(self, lm):
        super().__init__(lm, name="textonly", provides=frozenset({"text"}))

    @property
    def shape(self):
        return None

    def view(self, rollouts, signals=frozenset()):
        raise AssertionError("a teacher that only writes was asked for scores")


class ScoresOnly(LocalTeacher):
    def __init__(self, lm):
        super().__init__(lm, name="scores", provides=frozenset({"sampled", "topk", "full", "hidden"}))


def test_a_whole_run_on_texts_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_lab.run.LocalTeacher", TextOnly)
    folder = run(tmp_path, "method=omniopd_lab", "steps=2", name="omniopd_lab").folder
    metrics = read.metrics(folder)
    names = set(metrics["name"])
    assert {
        "omniopd/match_mean_fraction",
        "eval/test/avg_at_2",
        "entropy/student_mean_nats",
        "optim/gradient_norm",
    } <= names
    assert {"cost/teacher_queries_count", "cost/teacher_prefix_tokens", "cost/teacher_generated_tokens"} <= names
    assert not [n for n in names if n.startswith(("kl/", "gap/", "overlap/", "rank/")) or "reverse_kl" in n]
    last = metrics[metrics["step"] == 2].set_index("name")["value"]
    assert last["cost/teacher_scored_tokens"] == 0
    assert 0 < last["omniopd/match_mean_fraction"] < 1
    assert 0 < last["cost/teacher_cached_tokens"] < last["cost/teacher_prefix_tokens"]
    assert last["cost/teacher_generated_tokens"] <= 16 * last["cost/teacher_queries_count"]
    table = read_table(folder, "consulted").to_pylist()
    assert table and all(len(row["texts"]) == len(row["phi"]) == 4 for row in table)


def test_who_wants_scores_is_refused_before_the_first_token(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_lab.run.LocalTeacher", TextOnly)
    with pytest.raises(ValueError, match=r"OPD needs reverse_kl of the teacher, teacher=textonly can only give text"):
        load_parts(settings(tmp_path), print)


def test_who_wants_text_is_refused_before_the_first_token(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_lab.run.LocalTeacher", ScoresOnly)
    with pytest.raises(ValueError) as refused:
        load_parts(settings(tmp_path, "method=omniopd_lab"), print)
    assert str(refused.value) == (
        "method omniopd asks the teacher for text, teacher=scores can only score; use teacher=local or teacher=server"
    )


def test_the_first_step_asks_whether_the_texts_reach_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_lab.run.LocalTeacher", TextOnly)
    asked = settings(tmp_path, "method=omniopd_lab")
    seen = first_step(asked, load_parts(asked, print), {})
    assert "another teacher gives another gradient" in seen
    assert any(line.startswith("teacher := student not asked: its texts resemble") for line in seen)
    deaf = settings(tmp_path, "method=omniopd_lab", "method.prior_count=1e30")
    with pytest.raises(ValueError, match="the teacher never reaches the loss"):
        first_step(deaf, load_parts(deaf, print), {})


def test_two_runs_of_one_seed_are_the_same_and_another_seed_asks_anew(tmp_path):
    one, two, other = (
        (run(tmp_path / name, "method=omniopd_lab", "steps=2", seed, name="omniopd_lab").folder / "metrics.parquet")
        for name, seed in (("a", "seed=0"), ("b", "seed=0"), ("c", "seed=1"))
    )
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
