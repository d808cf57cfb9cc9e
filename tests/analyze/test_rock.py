"""Questions about rock tokens, asked of a short run of the lab; GV6 of the specification, its traps and its laws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lab_run import run, settings

from opd_lab import cli
from opd_lab.analyze.rock.context import multiset_overlap, windows
from opd_lab.analyze.rock.corpus import halves, occurrences, paired
from opd_lab.analyze.rock.gradients import TypeGradients, logit_gradient
from opd_lab.analyze.rock.knockout import Trial, beside
from opd_lab.analyze.rock.persistence import excess
from opd_lab.analyze.rock.select import covering, table_of
from opd_lab.analyze.subject import Subject, open_run
from opd_lab.evaluate import evaluate
from opd_lab.methods.rock_scores import rock_score, tabulate, top
from opd_lab.types import REVERSE_KL, Behavior

F64 = torch.float64
PARTS = ("corpus", "select", "context", "quadrants", "gradients", "persistence", "stability", "knockout")


def ask(*words: object) -> None:
    assert cli.main(["analyze", *map(str, words)]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of four steps, with a corpus and a selection."""
    made = run(tmp_path_factory.mktemp("rock"), "evaluate.max_tokens=32", "optim.lr=1e-3").folder
    ask("rock", "corpus", made, "--problems", 64)
    ask("rock", "select", made, "--k", 6)
    return made


@pytest.fixture(scope="module")
def subject(folder) -> Subject:
    return open_run(folder)


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / "analysis" / "rock" / f"{name}.parquet")


def near(got: torch.Tensor, *wanted: float, atol: float = 6e-9) -> None:
    torch.testing.assert_close(got.flatten(), torch.tensor(wanted, dtype=F64), atol=atol, rtol=0)


# the corpus


def test_the_corpus_holds_what_the_models_say(folder, subject):
    """One response, computed anew from logits of the whole sequence."""
    rows, texts = table(folder, "occurrences"), table(folder, "responses")
    text = texts.iloc[5]
    mine = rows[(rows["rollout"] == text["rollout"]) & (rows["checkpoint"] == 4)].sort_values("t")
    assert mine["token_id"].tolist() == list(text["ids"])
    assert mine["prev_token_id"].tolist() == [text["prompt_ids"][-1], *text["ids"][:-1]]
    subject.at("final")
    ids_1L = torch.tensor([[*text["prompt_ids"], *text["ids"]]])
    with torch.no_grad():
        logp_LV, logq_LV = (
            lm.module(ids_1L).logits[0].double().log_softmax(-1) for lm in (subject.student, subject.parts.teacher.lm)
        )
    before = len(text["prompt_ids"]) - 1
    kl_L = (logp_LV.exp() * (logp_LV - logq_LV)).sum(-1)[before:-1]
    assert mine["kl_reverse"].to_numpy() == pytest.approx(kl_L.numpy(), abs=1e-5)
    at_T = torch.arange(before, len(ids_1L[0]) - 1), ids_1L[0, before + 1 :]
    assert mine["gap"].to_numpy() == pytest.approx((logp_LV[at_T] - logq_LV[at_T]).numpy(), abs=1e-4)


def test_both_checkpoints_score_the_same_tokens_and_differ(folder):
    both, first, last = paired(folder, half="both", before=None, after=None)
    assert (first, last) == (0, 4)
    assert 2 * len(both) == len(table(folder, "occurrences"))
    assert (both["kl_reverse"] != both["kl_reverse_before"]).mean() > 0.9
    assert both["entropy_teacher"].to_numpy() == pytest.approx(both["entropy_teacher_before"].to_numpy())


def test_the_initial_student_comes_back(subject):
    fresh = open_run(subject.folder)
    subject.at("final")
    assert subject.student.digest() != fresh.student.digest()
    assert subject.at("0") == 0
    assert subject.student.digest() == fresh.student.digest()


def test_held_out_kl_equals_the_evaluations(subject):
    """The same rollouts, scored by `evaluate`."""
    subject.at("final")
    examples, e = subject.held_out("test", 8), subject.settings.evaluate
    rollouts = subject.sample(examples, 2, Behavior(), seed=3)
    kl_BT = subject.measured(rollouts, frozenset({REVERSE_KL}))[REVERSE_KL]
    p = subject.parts
    engine = type(p.engine)(e.max_tokens, subject.settings.rollout.decode_rows)
    found = evaluate(
        p.student,
        p.teacher,
        engine,
        examples,
        p.data.grade,
        samples=2,
        behavior=Behavior(),
        seed=3,
        chunk=64,
        micro_batch=4,
    )
    assert kl_BT[rollouts.mask_BT].mean().item() == pytest.approx(found.reverse_kl_mean_nats, rel=1e-4)
    assert int(rollouts.reward_B.sum()) == sum(found.c)


def test_halves_are_halves_and_blind_to_order_and_length(subject):
    examples = subject.held_out("test", 100)
    half = dict(zip((e.id for e in examples), halves(examples)))
    assert list(half.values()).count("select") == 50
    assert dict(zip((e.id for e in examples[::-1]), halves(examples[::-1]))) == half
    lengths = {name: [len(e.ids) for e in examples if half[e.id] == name] for name in ("select", "test")}
    assert set(lengths["select"]) == set(lengths["test"])  # the lab alternates two lengths of chains


def test_own_rollouts_cannot_be_compared_token_by_token(tmp_path, folder):
    import shutil

    mine = tmp_path / folder.parent.name / folder.name
    shutil.copytree(folder, mine, ignore=shutil.ignore_patterns("analysis"))
    ask("rock", "corpus", mine, "--problems", 8, "--on", "own")
    with pytest.raises(ValueError, match=r"scored different tokens.*--on fixed"):
        paired(mine, half="both", before=None, after=None)


# select


def test_the_selection_is_a_method_that_runs(folder, tmp_path):
    chosen = yaml.safe_load((folder / "analysis/rock/method/rock_selected.yaml").read_text())
    types = table(folder, "token_table")
    assert set(chosen["token_ids"]) == set(types.loc[types["group"] == "rock", "id"])
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins

    from opd_lab import config

    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        paths = [f"hydra.searchpath=[file://{folder}/analysis/rock]"]
        composed = config.settings_of(
            compose("config", ["method=rock_selected", f"tracking.folder={tmp_path}", *paths])
        )
    GlobalHydra.instance().clear()
    del Plugins
    method = config.method_of(composed.method, [])
    assert list(method.token_ids) == chosen["token_ids"]
    assert method.tokenizer_digest == settings(tmp_path, "method=rock_tokens").method["tokenizer_digest"]


def test_special_tokens_are_no_rocks_and_all_types_are_as_hard_as_the_corpus(folder, subject):
    types = table(folder, "token_table")
    stop = types[types["id"].isin(subject.student.stop_ids)]
    assert len(stop) == 1 and stop["special"].all() and not stop["control"].any() and (stop["group"] == "").all()
    assert types["kl_share"].sum() == pytest.approx(1)
    rows = occurrences(folder, half="select", checkpoint=4)
    assert types["kl_sum_nats"].sum() == pytest.approx(rows["kl_reverse"].sum())
    assert (types["kl_share"] / types["token_share"]).to_numpy() == pytest.approx(types["enrichment"].to_numpy())


def test_coverage_counts_types_from_the_top():
    corpus = tabulate(torch.tensor([1, 2, 2, 3]), torch.tensor([5.0, 2.0, 1.0, 2.0]))  # sums 5, 3, 2 of 10
    ranked = top(rock_score(corpus), corpus, 3)
    assert [covering(corpus, ranked, share) for share in (0.5, 0.51, 0.8, 0.81, 1)] == [1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("words", "message"), [(["--k", 500], "leaves no comparison"), (["--score", "context"], "rock context")]
)
def test_select_refuses(folder, capsys, words, message):
    assert cli.main(["analyze", "rock", "select", str(folder), *map(str, words)]) == 2
    assert message in capsys.readouterr().err


# persistence, a trap: noise is not persistent


def test_noise_is_not_persistent_on_held_out_prompts():
    """KL that is pure noise: the types chosen on one half look hard there, and nowhere else."""
    rng = np.random.default_rng(0)
    noise = pd.DataFrame({"token_id": rng.integers(400, size=8000), "kl_reverse": rng.exponential(size=8000)})
    halves_ = noise.iloc[:4000], noise.iloc[4000:]
    corpus = table_of(halves_[0], 400)
    rocks = top(corpus.mean_V, corpus, 40, min_count=2).tolist()
    here, there = (excess(half, rocks) for half in halves_)
    assert here > 0.5
    n = halves_[1]["token_id"].isin(rocks).sum()
    assert abs(there) < 4 / n**0.5  # an exponential's deviation is its mean


# gradients


def test_gv6_gradients():
    logits_S = torch.tensor([[1, 0, -1], [0.5, 0.5, 0], [0, 1, 2]], dtype=F64)
    logits_T = torch.tensor([[0, 1, -1], [1, 0, 0], [0, 2, 0]], dtype=F64)
    logp_NV, logq_NV = logits_S.log_softmax(-1), logits_T.log_softmax(-1)
    near((logp_NV.exp() * (logp_NV - logq_NV)).sum(-1), 0.42051248, 0.09342463, 0.91769224)
    ids_N, types = torch.tensor([0, 0, 1]), TypeGradients(torch.tensor([2.0, 1.0, 0.0], dtype=F64), [0, 1])
    g_NV = logit_gradient(logp_NV, logq_NV)
    types.add(ids_N[:1], g_NV[:1])
    types.add(ids_N[1:], g_NV[1:])
    near(types.mean_SV[0], 0.09683648, -0.07790699, -0.01892949)
    near(types.mean_SV[1], -0.09775100, -0.51044325, 0.60819426)
    near(types.balanced_V, -0.00091452, -0.58835024, 0.58926477)
    found = types.table()
    assert found["norm"].tolist() == pytest.approx([0.125718452, 0.800004889], abs=6e-10)
    assert found["cosine"].tolist() == pytest.approx([0.330451300, 0.988939562], abs=6e-10)
    assert found["contribution"].tolist() == pytest.approx([0.083087651, 0.791156485], abs=6e-10)
    projected = types.global_V @ types.balanced_V / types.balanced_V.norm()
    assert found["contribution"].sum() == pytest.approx(projected.item(), abs=1e-12)
    near(g_NV.sum(-1), 0, 0, 0, atol=1e-15)


def test_the_gradient_is_that_of_autograd_and_0_without_mass():
    generator = torch.Generator().manual_seed(0)
    logits_S, logits_T = torch.randn(2, 5, 7, dtype=F64, generator=generator)
    logits_S = logits_S.requires_grad_()
    logp_NV, logq_NV = logits_S.log_softmax(-1), logits_T.log_softmax(-1)
    (g_NV,) = torch.autograd.grad((logp_NV.exp() * (logp_NV - logq_NV)).sum(), logits_S)
    torch.testing.assert_close(logit_gradient(logp_NV.detach(), logq_NV), g_NV, atol=1e-14, rtol=0)
    gone_NV = torch.tensor([[0.0, -torch.inf]], dtype=F64)
    assert logit_gradient(gone_NV, gone_NV).tolist() == [[0, 0]]


# context


def test_windows_leave_out_the_token_and_stop_at_the_ends(folder, subject):
    from opd_lab.analyze.rock.corpus import stored_rollouts

    rollouts = stored_rollouts(folder, subject)
    text = table(folder, "responses").iloc[0]
    whole = [*text["prompt_ids"], *text["ids"]]
    last = len(text["ids"]) - 1
    ids_OW, real_OW = windows(rollouts, torch.tensor([[0, 0], [0, last]]), 3)
    at = len(text["prompt_ids"])
    assert ids_OW[0].tolist() == [*whole[at - 3 : at], *whole[at + 1 : at + 4]]
    assert ids_OW[1][real_OW[1]].tolist() == whole[-4:-1]


def test_multisets_overlap_by_hand():
    """{1, 1, 2} and {1, 2, 3}: minima 1 + 1, maxima 2 + 1 + 1. Missing tokens do not count."""
    ids_OW = torch.tensor([[1, 1, 2], [1, 2, 3], [9, 2, 2]])
    real_OW = torch.tensor([[True] * 3, [True] * 3, [False, True, False]])
    near(multiset_overlap(ids_OW, real_OW), 1, 0.5, 1 / 3, 0.5, 1, 1 / 3, 1 / 3, 1 / 3, 1)


# knock-out


def test_a_token_that_is_never_written_changes_nothing(subject):
    """Law: without a token that the baseline does not have, every text is the same, decoded anew."""
    subject.at("0")
    trial = Trial(subject, subject.held_out("test", 24), None)
    used = {i for text in trial.texts for i in text}
    unused = next(i for i in range(subject.student.vocabulary) if i not in used)
    assert trial._decode(list(range(24)), [unused])[0] == trial.texts
    assert trial.change([unused]) == [0] * 24
    texts, correct = trial._decode(list(range(24)), [trial.texts[0][0]])
    assert all(trial.texts[0][0] not in text for text in texts)
    assert trial.without([trial.texts[0][0]]) == correct  # decoding only the touched problems gives the same


def test_company_of_a_token():
    texts = [[1, 2, 3], [4, 1, 3], [3, 9, 9, 9, 1]]
    assert beside(texts, 1, [1, 2, 3, 4], share=0.5, w=1) == []
    assert beside(texts, 1, [1, 2, 3, 4], share=0.5, w=2) == [3]  # in two of three windows
    assert beside(texts, 1, [1, 2, 3, 4], share=0.3, w=1) == [2, 3, 4]
    assert beside(texts, 7, [1, 2], share=0, w=2) == []


# all of them, as commands


@pytest.mark.slow
def test_every_question_leaves_its_tables_pictures_and_text(folder, capsys):
    for words in (
        ["context", "--k", 3, "--context", "token_overlap"],
        ["context"],
        ["quadrants", "--min-count", 2],
        ["gradients"],
        ["persistence"],
        ["stability", "--draws", 2, "--against", folder],
        ["knockout", "--problems", 8, "--repeat-baseline", 1, "--draws", 1],
        ["figures"],
        *(["select", "--score", score, "--k", 4] for score in ("context", "recalcitrance", "gradient_alignment")),
    ):
        ask("rock", words[0], folder, *words[1:])
        printed = capsys.readouterr().out
        assert printed.splitlines()[0].endswith("?") and max(map(len, printed.splitlines()[:-1])) <= 120
        assert (folder / f"analysis/rock/{words[0]}.txt").read_text() in printed
    assert table(folder, "against")["jaccard"].eq(1).all()
    kinds = table(folder, "quadrants")
    assert (kinds[["rock", "learned", "regressed", "easy"]].sum(axis=1) == kinds["count"]).all()
    part = table(folder, "knockout")
    assert (part["delta"] * 8).to_numpy() == pytest.approx((part["gained"] - part["lost"]).to_numpy())
    for name in (
        "corpus",
        "select",
        "context",
        "quadrants",
        "gradients",
        "persistence",
        "stability",
        "knockout",
        "cumulative",
    ):
        assert (folder / f"analysis/rock/{name}.png").stat().st_size > 10_000, name
