"""What the diagnostics and the tracking cost, side by side in one process.

    python benchmarks/diagnostics.py [lab | large | tracking | memory | real ...]

lab       steps of plain OPD on the embedded lab, with all diagnostics and with none, in turn; both train alike, so each
          pair of steps has the same tokens
large     the signals pass and the observation of 2,048 tokens at a vocabulary of 151,936 and a width of 1,024, random
          weights, recording everything against recording nothing, in turn
tracking  steps of the lab with run folder and MLflow and without any tracker, in turn; beginning and end are apart
memory    bytes of all that the diagnostics remember, over 10,000 made-up steps
real      steps of plain OPD of two models with the shapes of Qwen3 of 0.6 and 1.7 billion parameters in bf16, random
          weights, with all diagnostics and with none, in turn; wants a CUDA device

Without a word the first four. Printed are medians and ratios. Where there is a CUDA device, it does the work.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_lab import checkpoint, config, models
from opd_lab.chunk import Head, States
from opd_lab.diagnostics import RECORD, RECORD_DUE, due
from opd_lab.diagnostics.watch import Watch
from opd_lab.lab_models import lab_tokenizer
from opd_lab.models import LM
from opd_lab.run import identity, load_parts, trackers
from opd_lab.settings import RunSettings
from opd_lab.signals import objective
from opd_lab.teacher.local import LocalTeacher
from opd_lab.tracking.tracker import FanOut, Tracker
from opd_lab.train import Trainer
from opd_lab.types import REVERSE_KL, Batch, Report, Rollouts, Source, Tokens, scatter

VOCABULARY, WIDTH, TOKENS, CHUNK = 151_936, 1_024, 2_048, 512
REAL = ["rollout.max_tokens=64", "evaluate.max_tokens=64", "optim.micro_batch=16", "optim.chunk_tokens=1024"]
REAL += ["optim.lr=1e-6", "diagnostics.every=2"]
SHAPES = {"student": (1_024, 3_072), "teacher": (2_048, 6_144)}  # width and inner width, 28 layers each
LAB_STEPS, FIRST_STEPS, TRACKED_STEPS, TRACKED_ROUNDS = 110, 5, 100, 10


class Unwatched(Watch):
    """None of it."""

    def observe(self, batch: Batch, weights: Any, losses: Any, metrics: Any) -> Report:
        return Report(batch.step)


def lab_settings(folder: Path, *more: str) -> RunSettings:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config.settings_of(compose("config", ["steps=1000", f"tracking.folder={folder}", *more]))


def trainer(folder: Path, tracker: Tracker) -> Trainer:
    settings = lab_settings(folder)
    return Trainer(settings, load_parts(settings, lambda note: None), tracker, folder, say=lambda line: None)


def blind(made: Trainer) -> Trainer:
    """A trainer that records nothing and looks at nothing."""
    made.record = made.record_due = frozenset()
    made.watch = Unwatched(made.settings, [], made.parts.student.vocabulary, str)
    return made


def timed(work: Any, *arguments: Any) -> float:
    begin = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def show(name: str, with_s: list[float], without_s: list[float]) -> None:
    """Medians, and the ratio of the sums: steps that draw tables weigh as often as they come."""
    middle = [1000 * statistics.median(seconds) for seconds in (with_s, without_s)]
    ratio = sum(with_s) / sum(without_s)
    paired = statistics.median(a / b for a, b in zip(with_s, without_s))
    print(
        f"{name}: {middle[0]:.1f} ms with, {middle[1]:.1f} ms without; ratio {paired:.3f} (median of pairs), "
        f"{ratio:.3f} (all together)",
        flush=True,
    )


def lab(folder: Path) -> None:
    watched, plain = trainer(folder, FanOut([])), blind(trainer(folder, FanOut([])))
    pairs = [(timed(watched.advance), timed(plain.advance)) for _ in range(LAB_STEPS)]
    tables = watched.settings.diagnostics.every
    kinds = {
        "lab, one step": pairs[tables:],  # the first ones warm up
        "lab, a step with tables": pairs[2 * tables - 1 :: tables],
        "lab, a step without": [pair for i, pair in enumerate(pairs) if i >= tables and (i + 1) % tables],
    }
    for name, some in kinds.items():
        show(name, *([pair[i] for pair in some] for i in range(2)))


@torch.no_grad()
def made_model(name: str, place: torch.device) -> LM:
    """Random weights; its tokenizer is the lab's, which knows the first ids only."""
    width, inner = SHAPES[name]
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=1_024,
        tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with place:
        module = Qwen3ForCausalLM(config).to(torch.bfloat16)
    return models.wrap(module, lab_tokenizer(), name=name, path=name)


def real(folder: Path) -> None:
    place = models.resolve("auto")
    if place.type != "cuda":
        raise SystemExit("`real` wants a CUDA device: on a CPU a step of it takes minutes")
    settings = lab_settings(folder, *REAL)
    parts = load_parts(settings, lambda note: None)
    teacher = LocalTeacher(made_model("teacher", place).freeze())
    made = [
        Trainer(settings, replace(parts, student=student, teacher=teacher), FanOut([]), folder, say=lambda line: None)
        for student in (made_model("student", place) for _ in range(2))
    ]
    watched, plain = made[0], blind(made[1])
    pairs = [(timed(watched.advance), timed(plain.advance)) for _ in range(2 * settings.diagnostics.every + 1)]
    show("real, one step", *([pair[i] for pair in pairs[1:]] for i in range(2)))
    report = watched.advance()
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in watched.clock.items())
    print(
        f"real, {torch.cuda.get_device_name()}: {phases}; {report.scalars['time/tokens_per_second']:,.0f} tokens/s; "
        f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB",
        flush=True,
    )


def large(folder: Path) -> None:
    """Forward and backward of plain OPD on given hidden states, then what the trainer makes of the record."""
    generator, place = torch.Generator().manual_seed(0), models.resolve("auto")

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(place)

    rollouts = made_up(16, TOKENS // 16, VOCABULARY, generator).to(place)
    mask_BT = rollouts.mask_BT
    hidden_NH, weight_VH = normal(TOKENS, WIDTH), normal(VOCABULARY, WIDTH, scale=0.05)
    teacher = States(hidden_NH + normal(TOKENS, WIDTH, scale=0.3), Head(weight_VH))
    head = Head(weight_VH.clone().requires_grad_())
    tokens = Tokens(
        ids_N=rollouts.response_BT[mask_BT],
        row_N=torch.arange(len(rollouts), device=place).repeat_interleave(TOKENS // 16),
        position_N=torch.arange(TOKENS // 16, device=place).repeat(16),
        source_N=rollouts.source_BT[mask_BT],
        behavior_logp_N=rollouts.behavior_logp_BT[mask_BT],
        signals={},
    )
    settings = lab_settings(folder)
    every = settings.diagnostics.every
    watch = Watch(settings, [], VOCABULARY, lambda ids: " ".join(map(str, ids)))
    step = 0

    def one(watched: bool) -> None:
        nonlocal step
        value, seen = objective(
            lambda tokens: {"opd": tokens[REVERSE_KL]},
            tokens,
            frozenset({REVERSE_KL}),
            {"opd": torch.ones(TOKENS, device=place)},
            {"opd": TOKENS},
            States(hidden_NH.clone().requires_grad_(), head),
            teacher,
            chunk=CHUNK,
            record=(RECORD_DUE if due(step + 1, every) else RECORD) if watched else frozenset(),
        )
        value.backward()
        head.weight_VH.grad = None
        if watched:
            step += 1
            signals = {signal: scatter(value_N, mask_BT) for signal, value_N in seen.signals.items()}
            losses = {term: scatter(loss_N, mask_BT) for term, loss_N in seen.losses.items()}
            watch.observe(Batch(rollouts, signals, step=step), {"opd": mask_BT.float()}, losses, {})

    one(True)
    one(False)
    pairs = [(timed(lambda: one(True)), timed(lambda: one(False))) for _ in range(every)]  # one of them shows tables
    show(
        f"large ({TOKENS:,} tokens, vocabulary {VOCABULARY:,}, width {WIDTH:,}, {place.type}, "
        f"{torch.get_num_threads()} threads)",
        *([pair[i] for pair in pairs] for i in range(2)),
    )


def tracking(folder: Path) -> None:
    """Per step: what the loop loses, first with one core left for the process that delivers to the store, then with
    none. One trainer takes turns, for two differ by more than what is asked. That process is a fork: until the loop has
    written to its pages once, each costs a copy; so beginning and end of a run are apart."""
    cores = torch.get_num_threads()
    for threads in sorted({max(cores - 1, 1), cores}):
        torch.set_num_threads(threads)
        made = trainer(folder, FanOut([]))

        def steps(number: int, made: Trainer = made) -> None:
            for _ in range(number):
                made.deliver(made.advance())

        def begin(place: Path, made: Trainer = made) -> None:
            made.tracker = trackers(made.settings, place)
            made.tracker.start(identity(made.settings, made.parts, "opd", place, "", step=0))
            steps(FIRST_STEPS)

        seconds: dict[bool, list[float]] = {True: [], False: []}
        begins, ends = [], []
        steps(FIRST_STEPS)
        for turn in range(TRACKED_ROUNDS):
            begins.append(timed(begin, folder / f"{threads}_{turn}"))
            seconds[True].append(timed(steps, TRACKED_STEPS) / TRACKED_STEPS)
            ends.append(timed(made.tracker.finish, "FINISHED"))
            made.tracker = FanOut([])
            begins[-1] -= timed(steps, FIRST_STEPS)
            seconds[False].append(timed(steps, TRACKED_STEPS) / TRACKED_STEPS)
        show(f"tracking, one step of the lab, {threads} of {cores} cores for torch", seconds[True], seconds[False])
        print(
            f"tracking, a run of {FIRST_STEPS + TRACKED_STEPS} steps: {statistics.median(begins):.2f} s more to begin "
            f"with its first {FIRST_STEPS} steps, {statistics.median(ends):.2f} s more to end",
            flush=True,
        )
    torch.set_num_threads(cores)


def memory(folder: Path) -> None:
    """The state grows to its bounds in the first windows, and stays there."""
    generator = torch.Generator().manual_seed(0)
    watch, vocabulary = Watch(lab_settings(folder), [], 121, lambda ids: " ".join(map(str, ids))), 121
    for step in range(1, 10_001):
        rollouts = made_up(4, 8, vocabulary, generator)
        mask_BT = rollouts.mask_BT
        signals = {signal: torch.rand(mask_BT.shape, generator=generator) for signal in RECORD_DUE}
        report = watch.observe(Batch(rollouts, signals, step=step), {"opd": mask_BT.float()}, {}, {})
        watch.alarms.check(report)
        if step in (10, 100, 1_000, 10_000):
            print(f"memory after {step:,} steps: {size(watch.state_dict()):,} bytes of state", flush=True)


def size(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors and of everything else as a checkpoint writes it."""
    tensors: dict[str, Tensor] = {}
    tree = checkpoint.pack(state, "state", tensors)
    return len(str(tree)) + sum(value.nbytes for value in tensors.values())


def made_up(rows: int, columns: int, vocabulary: int, generator: torch.Generator) -> Rollouts:
    ids_BL = torch.randint(0, vocabulary, (rows, 4 + columns), generator=generator)
    value_BT, number_B = torch.full((rows, columns), -1.0), torch.arange(rows)
    return Rollouts(
        ids_BL=ids_BL,
        attention_BL=torch.ones_like(ids_BL, dtype=torch.bool),
        source_BT=torch.full((rows, columns), int(Source.STUDENT), dtype=torch.int8),
        behavior_logp_BT=value_BT,
        logp_BT=value_BT,
        entropy_BT=-value_BT,
        stopped_B=torch.ones(rows, dtype=torch.bool),
        uid_B=number_B,
        group_B=number_B // 2,
        reward_B=(number_B % 2).float(),
    )


PARTS = {"lab": lab, "large": large, "tracking": tracking, "memory": memory}
ASKED = PARTS | {"real": real}

if __name__ == "__main__":
    config.register()
    with tempfile.TemporaryDirectory() as scratch:
        for word in sys.argv[1:] or PARTS:
            ASKED[word](Path(scratch))
