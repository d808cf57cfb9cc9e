"""Bad input stops before the first token, with a message that says what, got, allowed and next."""

import json
import os
import shutil
from pathlib import Path

import pytest
from lab_run import command, run, settings

from opd_lab import config

ZOO = config.PACKAGE / "zoo"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lr=abc"], "optim.lr must be float, got 'abc'"),
        (["steps=2.5"], "steps must be int, got 2.5"),
        (["rollout.temperature=0"], "rollout.temperature must be > 0, got 0"),
        (["checkpoint.keep_best=false"], "evaluate.test_best needs checkpoint.keep_best=true, got false"),
        (["optim.schedule=step"], "optim.schedule must be one of constant, linear, cosine, got step"),
        (["model.student.path=/nowhere"], "model.student.path = /nowhere is not a folder"),
        (["model=pair"], "model.student.path must be given"),
        (["method=fire_opd", "method.skip_percentile=100"], r"method.skip_percentile must be in \[0, 100\), got 100"),
        (["method=scope", "data.grader=none"], "method=scope needs graded prompts"),
        (["method=opd_sampled", "rollout.top_p=0.9"], "importance"),
        (["method._target_=os.system"], "method._target_ must lie in opd_lab.methods, got os.system"),
        (["+optim.lrr=1"], "optim.lrr is not a key of optim.*did you mean lr"),
    ],
)
def test_settings_that_cannot_work(tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, *overrides)
    assert not list(tmp_path.glob("*/*/journal.jsonl"))


def test_an_empty_prompt_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        run(tmp_path, "data=jsonl", f"data.path={tmp_path / 'empty.jsonl'}")


def test_a_teacher_with_another_tokenizer(tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(ZOO / "teacher", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizer"):
        run(tmp_path, f"model.teacher.path={other}")


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a place where nobody can write")
def test_a_store_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"tracking\.uri must be a store that can be written"):
        run(tmp_path, "tracking.uri=sqlite:////proc/nothing/mlflow.db", mlflow=True)


def test_mistyped_commands(tmp_path):
    done = command("run", "method=nope", cwd=tmp_path)
    assert done.returncode == 2
    assert "method=nope: there is no such method; it has" in done.stderr
    done = command("run", "method=fire_opd", "method.skip_percentil=1", cwd=tmp_path)
    assert "did you mean skip_percentile?" in done.stderr
    done = command("sweep", "nothing", cwd=tmp_path)
    assert (done.returncode, "sweeps/ has" in done.stderr) == (2, True)
    done = command("sweep", "nothing", cwd=tmp_path, module="opd_lab")
    assert (done.returncode, "sweeps/ has" in done.stderr) == (2, True)
    done = command("swep", "smoke", cwd=tmp_path, module="opd_lab")
    assert (done.returncode, "invalid choice: 'swep'" in done.stderr) == (2, True)
    done = command("confirm", "nothing", cwd=tmp_path)
    assert (done.returncode, "sweeps/ has" in done.stderr) == (2, True)
    assert not (tmp_path / "opd_runs").exists()


def test_a_method_from_elsewhere_needs_permission(tmp_path):
    values = {"_target_": "my_lab.methods.Mine"}
    with pytest.raises(ValueError, match=r"add allow=\[my_lab\]"):
        config.method_of(values, [])
    with pytest.raises(ValueError, match="cannot be imported"):
        config.method_of(values, ["my_lab"])


def test_the_settings_of_every_group_compose(tmp_path):
    assert settings(tmp_path, "model=lab_same_shape", "tracking=folder").tracking.mlflow is False
