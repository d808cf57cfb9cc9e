"""OPRD through a bridge, for models of different depth or width: `method=oprd_bridge`. The card is in methods/oprd.py.

Before the first step, with both models frozen, the student writes `fit_prompts` rollouts and one pair of linear maps
per pair of blocks is fitted to the hidden states of their tokens (methods/bridge.py). They stay in the state, so in
every checkpoint. With `refit_every` P_S moves on: a ruler of rubber, a control that is meant to fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd_lab.methods import bridge
from opd_lab.methods.base import Frozen, Prepared, choice, within
from opd_lab.methods.oprd import Oprd, supervised, wide
from opd_lab.types import Batch, State, Tokens


@dataclass(frozen=True, kw_only=True)
class OprdBridge(Oprd):
    not_zero_at_teacher: ClassVar = "the maps were fitted to another teacher, and the student's has no intercept"
    name: ClassVar[str] = "oprd_bridge"
    cosine_name: ClassVar[str] = "subspace_cosine_mean_fraction"

    normalize: str = "l2"
    reduce: str = "sum"
    rank: int = 8
    fit_prompts: int = 2000
    fit_max_new_tokens: int = 4096
    fit_positions: str = "all"
    pca_rows: int = 16384
    fit_seed: int = 42
    solver: str = "adamw"
    fit_epochs: int = 20
    fit_lr: float = 1e-4
    fit_batch_rollouts: int = 4
    fit_validation_fraction: float = 0.1
    fit_select: str = "last"
    center_student: bool = False
    refit_every: int = 0
    refit_cosine_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        within("rank", self.rank, ">= 1", self.rank >= 1)
        for name in ("fit_prompts", "fit_max_new_tokens", "fit_epochs", "fit_lr", "fit_batch_rollouts"):
            within(name, getattr(self, name), "> 0", getattr(self, name) > 0)
        choice("fit_positions", self.fit_positions, ("all", "last_k"))
        if self.pca_rows <= self.rank:
            raise ValueError(f"method.pca_rows must exceed rank ({self.rank}), got {self.pca_rows}")
        choice("solver", self.solver, ("adamw", "least_squares"))
        share = self.fit_validation_fraction
        within("fit_validation_fraction", share, "in (0, 0.5]", 0 < share <= 0.5)
        choice("fit_select", self.fit_select, ("last", "best_cosine"))
        for name in ("refit_every", "refit_cosine_every"):
            within(name, getattr(self, name), ">= 0 steps", getattr(self, name) >= 0)

    def check_shapes(self, student: tuple[int, int], teacher: tuple[int, int]) -> None:
        most = min(student[1], teacher[1])
        within("rank", self.rank, f"in [1, min(d_S, d_T)] = [1, {most}]", 1 <= self.rank <= most)

    def preparation(self) -> dict[str, Any]:
        names = [name for name in OprdBridge.__annotations__ if name.startswith("fit_")]
        names += ["layers", "align", "rank", "pca_rows", "solver", "center_student"]
        names += ["k"] if self.fit_positions == "last_k" else []
        return {name: getattr(self, name) for name in names}

    def prepare(self, ask: Frozen, state: State) -> Prepared:
        try:
            rollouts = ask.rollouts(self.fit_prompts, self.fit_max_new_tokens)
        except ValueError as error:
            raise ValueError(f"method.fit_max_new_tokens={self.fit_max_new_tokens} cannot be had: {error}") from error
        on_BT = supervised(rollouts.mask_BT, self.fit_positions, self.k)
        generator = torch.Generator().manual_seed(self.fit_seed)
        order_B = torch.randperm(len(rollouts), generator=generator)
        held = max(1, round(self.fit_validation_fraction * len(rollouts)))
        held_out_B, training_B = order_B[:held], order_B[held:]
        rows = int(on_BT[training_B].sum())
        if rows < self.rank + 1:
            raise ValueError(f"method.fit_prompts gives fewer rows ({rows}) than rank + 1 ({self.rank + 1})")

        def batches(chosen_B: Tensor) -> Iterator[bridge.Rows]:
            for part_B in chosen_B.split(self.fit_batch_rollouts):
                part = rollouts.rows(part_B)
                seen = ask.states(part, self.both)
                on_N = on_BT[part_B][part.mask_BT]
                yield wide(seen[self.states("student")])[on_N], wide(seen[self.states("teacher")])[on_N]

        every = self.solver == "least_squares"
        keep_N = torch.randperm(rows, generator=generator) < (rows if every else self.pca_rows)
        m = bridge.gathered(batches(training_B), keep_N)
        axes, value_LE = self.beginning(m, generator)
        start = axes._replace(teacher_LRE=axes.teacher_LRE[:, : self.rank])
        if every:
            found, losses = start._replace(student_LRD=bridge.regress(m, start)), []
        else:
            found, losses = bridge.descend(
                start,
                lambda: batches(training_B[torch.randperm(len(training_B), generator=generator)]),
                lambda maps: float(bridge.cosines(maps, batches(held_out_B)).mean()),
                epochs=self.fit_epochs,
                lr=self.fit_lr,
                select=self.fit_select,
            )
        found = found.single()
        report = bridge.foretold(m, axes, value_LE, self.rank) | {
            "cosine_before": bridge.cosines(start, batches(held_out_B)),
            "cosine_after": bridge.cosines(found, batches(held_out_B)),
        }
        return Prepared(state | {"bridge": found._asdict()}, self.described(report, losses))

    def beginning(self, m: bridge.Moments, generator: torch.Generator) -> tuple[bridge.Maps, Tensor]:
        """A random map of the student, and all axes of the teacher with the variances along them."""
        basis_LEE, value_LE = bridge.principal(m)
        mean_LD, bound = m["s_LD"] / m["rows"], m["s_LD"].shape[-1] ** -0.5
        random_LRD = torch.empty(len(self.pairs), self.rank, mean_LD.shape[-1])
        random_LRD = random_LRD.uniform_(-bound, bound, generator=generator).to(mean_LD)
        mean_LD = mean_LD if self.center_student else torch.zeros_like(mean_LD)
        return bridge.Maps(self.pairs, random_LRD, mean_LD, basis_LEE, m["t_LE"] / m["rows"]), value_LE

    def described(self, report: dict[str, Tensor], losses: list[float]) -> dict[str, float]:
        """The metrics of step 0: means over pairs of blocks, and each pair."""
        found = {}
        for name, value_L in report.items():
            unit = "dimensions" if name == "best_rank" else "fraction"
            found[f"oprd/bridge_{name}_{unit}"] = float(value_L.double().mean())
            for (block, _), value in zip(self.pairs, value_L.tolist()):
                found[f"oprd/bridge_{name}_layer{block}_{unit}"] = float(value)
        return found | {f"oprd/bridge_fit_loss_epoch{i + 1}_raw": loss for i, loss in enumerate(losses)}

    # the steps ----------------------------------------------------------------------------------------------------

    def sides(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        maps = bridge.Maps(**tokens.state["bridge"])
        student_NLD, teacher_NLE = self.raw(tokens)
        return maps.student(student_NLD), maps.teacher(teacher_NLE)

    def tally(self, tokens: Tokens) -> dict[str, Tensor]:
        found = super().tally(tokens)
        on_N = tokens.consulted["supervised"]
        rows = [state_N[on_N] for state_N in self.raw(tokens)]
        if "refit" in tokens.state:
            cosine_L = bridge.cosines(bridge.Maps(**tokens.state["refit"]), [(rows[0], rows[1])])
            found["refit_cosine_L"] = cosine_L.nan_to_num() * len(rows[0])  # a mean over none of them
        refits = any(due(tokens.step, every) for every in (self.refit_every, self.refit_cosine_every))
        return found | (bridge.moments(rows[0], rows[1]) if refits else {})

    def update(self, state: State, batch: Batch) -> State:
        """A refit that is only measured is tried on the next step's rollouts, which it has not seen."""
        state = {name: value for name, value in state.items() if name != "refit"} if "refit" in state else state
        places = {"bridge": self.refit_every, "refit": self.refit_cosine_every}
        changed = [place for place, every in places.items() if due(batch.step, every)]
        if not changed or not batch.tallies or not batch.tallies["rows"]:
            return state
        maps = bridge.Maps(**state["bridge"])
        moved = maps._replace(student_LRD=bridge.regress(batch.tallies, maps)).single()._asdict()
        return state | dict.fromkeys(changed, moved)

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        found, tallies = super().metrics(batch, weights), batch.tallies
        if found and "refit_cosine_L" in tallies:
            cosine_L = tallies["refit_cosine_L"] / tallies["tokens"]
            found["oprd/bridge_refit_cosine_fraction"] = float(cosine_L.mean())
        return found

    def warning(self, cosine: float) -> str:
        return (
            f"cosine through the fitted bridge {cosine:.2f}, below method.warn_cosine={self.warn_cosine:g}; try "
            "solver: least_squares, more fit_prompts or another rank"
        )


def due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0


@dataclass(frozen=True, kw_only=True)
class OprdBridgeMoving(OprdBridge):
    """Maps that follow the student, run to show that they must not."""

    status: ClassVar[str] = "control"

    refit_every: int = 1
