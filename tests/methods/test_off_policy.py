"""SFT, sequence-level distillation, GKD and starts: golden numbers, whose tokens are trained, coins, error texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.methods.base import TRAINED
from opd_lab.methods.off_policy import GKD, SFT, START, TeacherStart
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.types import ENDLESS, Batch, Behavior, Rollouts, Source
from tests.methods.by_hand import token_losses
from tests.pair import LOGP, LOGQ, P, Q, near, with_gradient
from tests.tiny import make, rollouts

EVERY = range(5)
FORWARD = ((0.4, -0.2, 0.0, 0.05, -0.25), 0.619186)  # p - q, KL(q || p)


def expected(method: Any, term: str) -> tuple[Tensor, Tensor]:
    """The loss when the teacher drew the token, on average, and its gradient."""
    return with_gradient(lambda logp_NV: Q @ token_losses(method, logp_NV, LOGQ[None], [*EVERY])[term])


def test_sft_is_forward_kl_on_average() -> None:
    value, gradient_V = expected(SFT(), TRAINED)
    near(value, 2.011507)
    near(value + (Q * LOGQ).sum(), FORWARD[1])  # minus H(q)
    near(gradient_V, *FORWARD[0])


def test_sft_on_a_solution_is_minus_log_p_of_its_tokens() -> None:
    """Solution 1, 0, 4 under p = .50 .20 .15 .10 .05: -log .2, -log .5, -log .05; the teacher has no say."""
    method = SFT(source="dataset", refresh="never")
    for logq_V in (LOGQ, LOGP):
        loss_N = token_losses(method, LOGP[None], logq_V[None], [1, 0, 4])[TRAINED]
        near(loss_N, 1.609438, 0.693147, 2.995732)
    near(loss_N.mean(), 1.766106)
    one = with_gradient(lambda logp_NV: token_losses(method, logp_NV, LOGQ[None], [1])[TRAINED])
    near(one[1], 0.5, -0.8, 0.15, 0.1, 0.05)  # p - 1[y]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_start_mixes_the_token_and_forward_kl(ratio: float) -> None:
    value, gradient_V = expected(TeacherStart(kd_ratio=ratio), START)
    near(value, (1 - ratio) * 2.011507 + ratio * FORWARD[1])
    near(gradient_V, *FORWARD[0])  # on average either is the same gradient
    one = with_gradient(lambda logp_NV: token_losses(TeacherStart(kd_ratio=ratio), logp_NV, LOGQ[None], [0])[START])
    wrong_V = P - torch.tensor([1.0, 0, 0, 0, 0])
    near(one[1], *((1 - ratio) * wrong_V + ratio * (P - Q)).tolist())
    near(token_losses(TeacherStart(), LOGP[None], LOGQ[None])[TRAINED], 0.645816)


def test_a_start_trains_each_author_by_its_own_loss() -> None:
    some = rollouts([[3], [3]], [[4, 5, 1], [6]])
    source_BT = torch.tensor([[3, 3, 2], [2, 0, 0]], dtype=torch.int8)
    weights = TeacherStart().weights(Batch(replace(some, source_BT=source_BT), {}))
    assert weights[START].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert weights[TRAINED].tolist() == [[0, 0, 1], [1, 0, 0]]


JSDS = {0.0: 0.61918556, 0.1: 0.05376884, 0.25: 0.10872227, 0.5: 0.14354357, 0.75: 0.11109767, 1.0: 0.64581626}


@pytest.mark.parametrize("beta", JSDS)
def test_gkd_has_the_generalised_divergence(beta: float) -> None:
    near(token_losses(GKD(beta=beta), LOGP[None], LOGQ[None])[TRAINED], JSDS[beta])


def test_who_writes_when() -> None:
    plain = Behavior(top_k=7)
    assert SFT().behavior(plain, 9, {}) == replace(plain, teacher_first=ENDLESS)
    given = SFT(source="dataset", refresh="never")
    assert given.behavior(plain, 9, {}) == replace(plain, dataset=ENDLESS) and given.asks().keys() == {"dataset"}
    start = TeacherStart(warmup_steps=25)
    assert [start.behavior(plain, step, {}) == plain for step in (0, 24, 25, 99)] == [False, False, True, True]
    assert TeacherStart(warmup_steps=0).behavior(plain, 0, {}) == plain and not TeacherStart(warmup_steps=0).asks()
    assert GKD(lambda_=1.0).behavior(plain, 0, {}) == plain and not GKD(lambda_=1.0).asks()


def written_by_teacher(method: GKD, step: int, groups: int = 2000, seed: int = 0) -> Tensor:
    """Or taken from the data."""
    behavior = method.behavior(Behavior(), step, {})
    assert behavior.asks == method.asks().keys()
    first = behavior.teacher_first or behavior.dataset
    assert callable(first)
    group_B = torch.arange(groups).repeat_interleave(2)
    tokens_B = first(seed, torch.arange(2 * groups) + 7, group_B)
    assert set(tokens_B.tolist()) <= {0, ENDLESS}
    return tokens_B > 0


def test_gkd_flips_one_coin_per_prompt() -> None:
    for share in (0.25, 0.5, 0.9):
        teacher_B = written_by_teacher(GKD(lambda_=share), step=3)
        assert torch.equal(teacher_B[::2], teacher_B[1::2])
        assert float(teacher_B.double().mean()) == pytest.approx(1 - share, abs=5 * 0.5 / 2000**0.5)
    same = [written_by_teacher(GKD(), step=3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    assert not torch.equal(same[0], written_by_teacher(GKD(), step=4))
    assert written_by_teacher(GKD(lambda_=0.0), step=0).all()
    assert torch.equal(same[0], written_by_teacher(GKD(source="dataset"), step=3))


def test_gkd_flips_one_coin_per_step() -> None:
    steps = torch.stack([written_by_teacher(GKD(lambda_=0.25, mix="step"), step, groups=3) for step in range(400)])
    assert (steps.all(1) | ~steps.any(1)).all()
    assert float(steps[:, 0].double().mean()) == pytest.approx(0.75, abs=0.1)


def test_gkd_reports_the_share_of_the_student() -> None:
    some = rollouts([[3]] * 4, [[4, 1], [5], [6, 1], [7]])
    source_BT = some.source_BT.clone()
    for writer, left in ((Source.TEACHER, 0.75), (Source.DATASET, 0.5)):
        row = 2 if writer == Source.TEACHER else 1
        source_BT[row][some.mask_BT[row]] = int(writer)
        found = GKD().metrics(Batch(replace(some, source_BT=source_BT), {}), {})
        assert found == {"gkd/on_policy_fraction": left}


def test_refresh_never_answers_a_prompt_as_before() -> None:
    student, teacher = make(seed=0), make(seed=1)

    def write(refresh: str, prompts: list[list[int]], generator: int, seed: int = 0) -> Rollouts:
        rows_B = torch.arange(len(prompts))
        return TorchEngine(8, 2, seed=seed).sample(
            student, prompts, behavior=SFT(refresh=refresh).behavior(Behavior(), 0, {}), group_B=rows_B // 2,
            uid_B=rows_B, generator=torch.Generator().manual_seed(generator), teacher=teacher,
        )  # fmt: skip

    def ids(some: Rollouts) -> list[list[int]]:
        return [ids_T[on_T].tolist() for ids_T, on_T in zip(some.response_BT, some.mask_BT)]

    a, b = [3, 4, 5], [6, 7]
    first, later = ids(write("never", [a, a, b, b], 0)), ids(write("never", [b, b, a, a], 1))
    assert first == later[2:] + later[:2] and first[0] != first[1]
    assert ids(write("never", [a, a, b, b], 0, seed=1)) != first
    assert ids(write("every_step", [a, a, b, b], 0)) != ids(write("every_step", [a, a, b, b], 1))


@pytest.mark.parametrize(
    ("cls", "keys", "words"),
    [
        (SFT, {"refresh": "daily"}, "method.refresh must be one of every_step, never, got daily"),
        (SFT, {"source": "web"}, "method.source must be one of teacher, dataset, got web"),
        (SFT, {"source": "dataset"}, "method.refresh must be never with method.source=dataset, got every_step: .*"),
        (GKD, {"source": "student"}, "method.source must be one of teacher, dataset, got student"),
        (GKD, {"lambda_": 1.5}, r"method.lambda_ must be in \[0, 1\], the share .* student writes, got 1.5"),
        (GKD, {"mix": "token"}, "method.mix must be one of prompt, step, got token"),
        (GKD, {"beta": -0.1}, r"GKD convention: 0 = forward KL, 1 = reverse KL\), got -0.1"),
        (TeacherStart, {"warmup_steps": -1}, "method.warmup_steps must be >= 0, got -1; 0 is plain OPD"),
        (TeacherStart, {"kd_ratio": 2.0}, r"method.kd_ratio must be in \[0, 1\], got 2; 0 is SFT, 1 forward KL"),
    ],
)
def test_values_that_are_refused(cls: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(**keys)
