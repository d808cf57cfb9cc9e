"""The papers' own settings compose into runs that would start, without their weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from opd_lab.config import CONF, method_of, settings_of
from opd_lab.parts import facts_of, tokenizer_digest

MODEL: Any = SimpleNamespace(vocabulary=151936, shape=(28, 1536), tokenizer=SimpleNamespace(get_vocab=dict))
PAPERS = sorted((CONF / "experiment").glob("paper_*.yaml"))
MISSING = {  # what a person must give
    "data.path": "problems.jsonl",
    "model.student.path": "models/student",
    "model.teacher.path": "models/teacher",
}
ALSO = {"paper_rock_tokens": ("method.token_ids=[7]", f"method.tokenizer_digest={tokenizer_digest(MODEL)}")}
THE_NINE = ["rock_tokens", "fire_opd", "scope", "oprd", "oprd_bridge", "trb", "tropd", "kat", "omniopd"]


def composed(name: str, *overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"experiment={name}", *overrides])


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_paper_s_setting_would_start(path: Path):
    asked = OmegaConf.missing_keys(composed(path.stem))
    assert asked <= MISSING.keys()
    given = [f"{key}={MISSING[key]}" for key in asked]
    settings = settings_of(composed(path.stem, *given, *ALSO.get(path.stem, ())))
    method = method_of(settings.method, settings.allow)
    parts: Any = SimpleNamespace(
        student=MODEL,
        teacher=SimpleNamespace(name="local", shape=MODEL.shape),
        engine=SimpleNamespace(name="torch"),
        data=SimpleNamespace(grade=None if settings.data.grader == "none" else min),
    )
    method.check(facts_of(settings, parts))


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_what_a_sweep_reads_is_measured(path: Path):
    settings = composed(path.stem)
    graded = settings.data.grader != "none"
    assert settings.objective == (
        f"eval/validation/avg_at_{settings.evaluate.samples}" if graded else "eval/validation/reverse_kl_mean_nats"
    )


@pytest.mark.parametrize("name", THE_NINE)
def test_every_paper_is_here(name: str):
    assert f"paper_{name}" in [path.stem for path in PAPERS]
