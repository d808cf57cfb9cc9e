"""The files of sweeps/ and the page about them."""

import optuna
import pytest
import yaml
from lab_sweep import asked

from opd_lab import config

FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(config.SWEEPS.glob("*.yaml"))}
DRAWS = 4


def test_the_page_has_a_row_for_every_file_and_says_what_the_file_says():
    rows = {}
    for line in (config.SWEEPS / "README.md").read_text().splitlines():
        if line.startswith("|") and "`opd-lab sweep " in line and line.count("|") == 5:
            question, command, cost, answer = (cell.strip() for cell in line.strip("|").split("|"))
            rows[command.strip("`").removeprefix("opd-lab sweep ")] = (question, cost, answer)
    assert rows.keys() == FILES.keys()
    log = (config.ROOT / "LOG.md").read_text()
    for name, (question, cost, answer) in rows.items():
        assert question == FILES[name]["question"].strip()
        assert cost == FILES[name]["cost"].removesuffix("; answer in LOG.md")
        assert answer == "not run yet" or name == "smoke" or ("LOG.md" in answer and f"opd-lab sweep {name}" in log)


def test_each_paper_has_a_search_of_its_own_method():
    papers = ("rock_tokens", "fire_opd", "scope", "oprd", "oprd_bridge", "trb", "tropd", "kat", "omniopd")
    for paper in papers:
        method = FILES[f"search_{paper}"]["fixed"]["method"]
        assert method in (paper, f"{paper}_lab")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if "sampler" in FILES[name]])
def test_what_a_search_draws_can_be_run(tmp_path, name):
    question = asked(tmp_path, f"sweeps={name}", short=[])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(DRAWS):
        params = question.space.suggest(study.ask())
        (order,) = question.orders(params)
        drawn = config.flat(yaml.safe_load(order.config))
        plain = {key: value for key, value in params.items() if key != "method"}
        assert {key: drawn[key] for key in plain} == plain
