"""Every setting of a run, typed. `conf/` holds the defaults and their units; `config.py` turns YAML into these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """One model: `lab:student`, `lab:teacher`, `lab:teacher_same_shape`, or a folder that transformers can load."""

    path: str
    dtype: str  # float32 | bfloat16 | float16
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    name: str | None  # None = made from the two paths
    student: ModelSettings
    teacher: ModelSettings
    reference: ModelSettings | None  # for methods with a frozen reference; None = the student's own beginning
    measure: ModelSettings | None  # compared with in evaluations only, for teachers that give no distributions
    device: str  # auto | cpu | cuda | cuda:0 ...
    stop_ids: list[int] | None  # token ids that end a response, for both models; None = each model's own
    teacher_floor_nats: (
        float | None
    )  # no log-prob of the teacher is lower; None = a token it rules out may stop the run
    stop_event: str  # merged | separate: ends that only one of the models has


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """`kind` arithmetic = the embedded lab; file = JSONL or parquet, read through a field mapping."""

    name: str
    kind: str  # arithmetic | file
    operations: list[int]  # arithmetic: lengths of the chains
    problems: int  # arithmetic: size of the training split
    path: str | None  # file: training problems
    test_path: str | None  # file: held-out problems; None = the last `held_out` of `path`
    held_out: int  # file without test_path: problems kept for validation and as many for test
    prompt_field: str  # dotted path inside a record; may hold a string or chat messages
    answer_field: str | None  # None = not graded
    answer_pattern: str | None  # regular expression; its first group is the answer
    solution_field: str | None  # dotted path to a worked solution; None = methods that train on it are refused
    system_prompt: str | None
    instruction: str | None  # appended to the question
    grader: str  # exact | math_verify | none
    max_prompt_tokens: int  # longer prompts are left out and counted


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    engine: str  # torch
    prompts: int  # prompts per step
    per_prompt: int  # rollouts of one prompt
    max_tokens: int  # response limit
    temperature: float
    top_p: float  # 1 = off
    top_k: int  # 0 = off
    suppressed: list[int]  # token ids never sampled
    decode_rows: int  # rollouts decoded together


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    clip_norm: float | None  # None = off
    schedule: str  # constant | linear | cosine
    warmup_steps: int
    micro_batch: int  # rollouts per forward and backward
    updates_per_rollout: int
    chunk_tokens: int  # tokens projected onto the vocabulary at a time


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    every: int  # steps; 0 = only before the first and after the last
    problems: int  # validation problems, at every evaluation
    samples: int  # rollouts per problem: k of avg@k and pass@k
    test_problems: int  # test problems, before the first and after the last step
    test_samples: int
    test_best: bool  # test the checkpoint with the best validation accuracy too
    max_tokens: int
    temperature: float
    top_p: float
    seed: int  # of problems and sampling: the same for every method and run


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    every: int  # steps; 0 = only at the end
    keep_last: int
    keep_best: bool  # by validation accuracy, where data are graded
    resume: str  # auto | never


@dataclass(frozen=True, kw_only=True)
class AlarmSettings:
    first_steps: int  # steps whose mean is what later steps are held against
    patience: int  # steps in a row after which an alarm begins, and ends
    gradient_ratio: float  # gradient norm, over that of the first steps and over optim.clip_norm
    inflation_ratio: float  # tokens per rollout, over those of the first steps
    collapse_ratio: float  # likewise, below
    repetition_fraction: float  # 4-grams that their rollout has seen before
    outside_fraction: float  # the student's mass outside the teacher's 16 likeliest tokens
    entropy_ratio: float  # the student's entropy, below that of the first steps and the teacher's
    zero_weight_fraction: float  # tokens without weight
    trap_fraction: float  # accuracy lost since the best evaluation, the held-out KL not having risen
    below_start_fraction: float  # accuracy lost against the initial student
    # With defaults, for there are runs from before these: a config without them is whole, and keeps its digest.
    drop_fraction: float = 0.05  # accuracy lost since the best evaluation,
    drop_errors: float = 4.0  # and this many standard errors of that loss, paired by problem


@dataclass(frozen=True, kw_only=True)
class DiagnosticsSettings:
    every: int  # steps between histograms, token tables and the dearest scalars; the others come at every step
    high_loss_quantile: float  # tokens above this quantile of a step's KL are high-loss tokens
    high_loss_window: int  # steps per window of the persistence: in how many of the last 16 was a token type high
    high_loss_rows: int  # token types shown in the high-loss table
    quadrant_windows: int  # first windows of a token type held against as many last ones
    quadrant_high_quantile: float  # of the types' first KL: from here on a type was hard
    quadrant_improvement_quantile: float  # of what the types improved: below, a hard type has stayed hard
    rollout_records: int  # rollouts of a step that get a row of numbers, at every step
    sample_rollouts: int  # rollouts kept with per-token arrays, at every `every`-th step
    probe_rollouts: int  # rollouts of the initial student on validation prompts, scored at every evaluation
    probe_shown: int  # of these kept with per-token arrays, each time
    estimator_rollouts: int  # rollouts on which estimators are held against the exact KL, at every evaluation
    estimator_topk: int  # tokens of the student's support in the top-k estimators
    gradient_every: int  # steps between the gradient norms of each term alone
    on_alarm: str  # warn | stop
    alarms: AlarmSettings


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    folder: str  # where run folders live
    mlflow: bool
    uri: str | None  # None = SQLite file in `folder`
    log_model_megabytes: float  # the final student becomes a logged model of MLflow if it is no larger; 0 = never
    picture_every: int  # steps between MLflow's pictures of histograms over training
    experiment: str
    name: str | None  # run name; None = made from method, model, data, seed


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    seed: int
    steps: int
    threads: int | None  # CPU threads of torch; None = torch's choice
    objective: str  # the metric a sweep reads: comparable across methods
    model: PairSettings
    data: DataSettings
    rollout: RolloutSettings
    optim: OptimSettings
    evaluate: EvaluateSettings
    checkpoint: CheckpointSettings
    diagnostics: DiagnosticsSettings
    tracking: TrackingSettings
    method: dict[str, Any] = field(default_factory=dict)  # `_target_` and the method's fields
    allow: list[str] = field(default_factory=list)  # packages from which `_target_` may come, beside opd_lab.methods
