"""The run folder: the same run leaves the same bytes, whether or not it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_lab.tracking import read
from opd_lab.tracking.delivery import Reports
from opd_lab.tracking.run_folder import RunFolder, read_table
from tests.tracking.runs import info, report


def run(folder: Path, steps: range, *, finish: str | None = "FINISHED") -> Path:
    tracker = RunFolder()
    tracker.start(info(folder, step=steps.start))
    for step in steps:
        tracker.log(report(step))
    if finish:
        tracker.finish(finish)
    return folder


def test_two_runs_of_one_seed_have_the_same_metrics_byte_for_byte(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", range(3)), run(tmp_path / "b", range(3))
    for name in ("metrics", "histograms", "high_loss_tokens", "rollouts"):
        assert (one / f"{name}.parquet").read_bytes() == (other / f"{name}.parquet").read_bytes()
    assert (one / "timing.parquet").read_bytes() != (other / "timing.parquet").read_bytes()


@pytest.mark.parametrize("end", [None, "KILLED", "FINISHED"])
def test_a_resumed_run_leaves_what_the_whole_run_leaves(tmp_path: Path, end: str | None) -> None:
    whole = run(tmp_path / "a", range(6))
    run(tmp_path / "b", range(5), finish=end)  # two steps beyond its last checkpoint
    parts = run(tmp_path / "b", range(3, 6))
    assert (whole / "metrics.parquet").read_bytes() == (parts / "metrics.parquet").read_bytes()
    for name in ("histograms", "high_loss_tokens", "rollouts"):
        assert repr(read_table(whole, name).to_pylist()) == repr(read_table(parts, name).to_pylist())
        assert read.table(parts, name).step.to_list() == list(range(6))
    assert not list(parts.rglob("*.tmp")) and not (parts / "segments").exists()


def test_reports_that_come_close_together_are_written_together_and_before_a_checkpoint(tmp_path: Path) -> None:
    tracker = RunFolder(together_seconds=3600)
    tracker.start(info(tmp_path / "a"))
    for step in range(4):
        tracker.log(report(step))  # the first at once
    assert list(read.metrics(tmp_path / "a").step.unique()) == [0]
    tracker.flush()
    assert list(read.metrics(tmp_path / "a").step.unique()) == [0, 1, 2, 3]
    segments = tmp_path / "a" / "segments" / "rollouts"
    assert [path.name[:17] for path in sorted(segments.iterdir())] == ["00000000-00000000", "00000001-00000003"]
    assert [(r.step, r.tables["rollouts"][0]["uid"]) for r in Reports(tmp_path / "a").new()] == [
        (s, s) for s in range(4)
    ]


def test_a_run_that_resumes_inside_a_segment_leaves_what_the_whole_run_leaves(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", range(6))
    killed = RunFolder(together_seconds=3600)
    killed.start(info(tmp_path / "b"))
    for step in range(5):
        killed.log(report(step))
    killed.flush()
    parts = run(tmp_path / "b", range(3, 6))
    for name in ("metrics", "histograms", "high_loss_tokens", "rollouts"):
        assert repr(read_table(whole, name).to_pylist()) == repr(read_table(parts, name).to_pylist())


def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", range(3), finish=None)
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"step": 3, "scal')
    assert sorted(set(read.metrics(folder).step)) == [0, 1, 2]
    run(folder, range(3, 4))
    assert sorted(set(read.metrics(folder).step)) == [0, 1, 2, 3]


def test_a_finished_run_is_not_overwritten_and_a_failed_start_is(tmp_path: Path) -> None:
    run(tmp_path / "a", range(2), finish="FAILED")
    run(tmp_path / "a", range(1))
    assert sorted(set(read.metrics(tmp_path / "a").step)) == [0]
    with pytest.raises(ValueError, match="holds a finished run; choose another name"):
        run(tmp_path / "a", range(1))


def test_a_running_run_can_be_read(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", range(2), finish=None)
    values = read.metrics(folder).query("name == 'eval/pass_at_1'").value
    assert values.to_list() == [0, 1 / 7]
    assert len(read.histograms(folder)) == 2
    (row,) = read.runs(tmp_path).to_dict("records")
    assert (row["run"], row["status"], row["method"], row["seed"]) == ("a", "RUNNING", "opd", 0)


def test_a_resumed_run_keeps_its_start_and_tells_of_a_changed_config(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", range(2), finish=None)
    started = json.loads((folder / "status.json").read_text())["started"]
    RunFolder().start(info(folder, step=2, config_yaml="seed: 1\n"))
    assert json.loads((folder / "status.json").read_text())["started"] == started
    assert (folder / "config.yaml").read_text() == "seed: 0\n"
    assert (folder / "config.from_step_2.yaml").read_text() == "seed: 1\n"


def test_tags_and_files_are_kept(tmp_path: Path) -> None:
    tracker = RunFolder()
    tracker.start(info(tmp_path / "a"))
    tracker.tag("best", "3")
    (tmp_path / "note.txt").write_text("n")
    tracker.artifact(tmp_path / "note.txt", "notes")
    assert read.status(tmp_path / "a")["tags"] == {"method": "opd", "best": "3"}
    assert (tmp_path / "a" / "notes" / "note.txt").read_text() == "n"
    assert "torch==" in (tmp_path / "a" / "environment.txt").read_text()


def test_columns_may_appear_later_and_change_from_whole_numbers(tmp_path: Path) -> None:
    tracker = RunFolder()
    tracker.start(info(tmp_path / "a"))
    for step, rows in enumerate([[{"a": 1}], [{"a": 1.5, "b": "x"}], [{"a": None, "b": None}], []]):
        first = report(step)
        first.tables = {"mine": rows}
        tracker.log(first)
    tracker.finish("FINISHED")
    found = read_table(tmp_path / "a", "mine").to_pylist()
    assert [(row["step"], row["a"], row["b"]) for row in found] == [(0, 1, None), (1, 1.5, "x"), (2, None, None)]


def test_a_run_resumed_earlier_than_the_last_time_drops_what_it_had_kept(tmp_path: Path) -> None:
    """A damaged checkpoint makes it go back further than before."""
    folder = run(tmp_path / "a", range(6))
    run(folder, range(5, 6), finish=None)
    run(folder, range(2, 6))
    assert read.table(folder, "histograms")["step"].to_list() == list(range(6))


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folders that hold some \(status.json\), got .*; start one"):
        read.runs(tmp_path)
