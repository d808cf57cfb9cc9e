"""`opd-lab analyze rock quadrants RUN`: which types were hard and have hardly improved (recalcitrance, C)?

quadrants.parquet     a row per type: id, text, count, rock, learned, regressed, easy (occurrences), rock_rate,
                      kl_before, kl_after, gain (means, nats), entropy_student, entropy_teacher (nats), chosen (among
                      the pool), rank_score (what `select --score recalcitrance` ranks by)

With the KL before (a) and after (b) OPD on the same tokens, tau = the `tau-high` quantile of a, delta = the `delta`
quantile of a - b: rock a >= tau and a - b < delta; learned a >= tau and a - b >= delta; regressed a < tau and b > a;
easy otherwise. Where delta < 0, every rock has become worse.
"""

from __future__ import annotations

from pathlib import Path

import torch

from opd_lab.analyze.outcome import Outcome, frame
from opd_lab.analyze.rock import figures
from opd_lab.analyze.rock.corpus import SELECT, paired
from opd_lab.analyze.selectors import QUADRANTS, quadrants, recalcitrant
from opd_lab.analyze.subject import open_run
from opd_lab.methods.base import quantile

SHOWN = 20  # types printed


def answer(
    run: Path,
    *,
    tau_high: float,
    delta: float,
    min_count: int,
    pool: int,
    kl: str,
    before: int | None,
    after: int | None,
) -> Outcome:
    subject = open_run(run)
    rows, first, last = paired(run, half=SELECT, before=before, after=after)
    a_N, b_N = (torch.tensor(rows[f"kl_{kl}{when}"].to_numpy()) for when in ("_before", ""))
    quadrant_N = quadrants(a_N, b_N, high=tau_high, delta=delta)
    rows = rows.assign(quadrant=[QUADRANTS[i] for i in quadrant_N.tolist()], gain=(a_N - b_N).numpy())
    chosen = recalcitrant(torch.tensor(rows["token_id"].to_numpy()), quadrant_N, min_count=min_count, pool=pool)
    by_type = rows.groupby("token_id")
    types = frame({"count": by_type.size()})
    for name in QUADRANTS:
        types[name] = (rows["quadrant"] == name).groupby(rows["token_id"]).sum()
    types["rock_rate"] = types["rock"] / types["count"]
    for name, column in (("kl_before", f"kl_{kl}_before"), ("kl_after", f"kl_{kl}"), ("gain", "gain")):
        types[name] = by_type[column].mean()
    types = types.join(by_type[["entropy_student", "entropy_teacher"]].mean())
    types["chosen"] = types.index.isin(chosen.tolist())
    types["rank_score"] = types["rock_rate"].where(types["count"] >= min_count)
    types.insert(0, "text", [subject.decode([int(i)]) for i in types.index])
    types = types.rename_axis("id").reset_index()
    size = rows["quadrant"].value_counts().reindex(QUADRANTS, fill_value=0)
    with_rocks = types[types["chosen"] & (types["rock"] > 0)]
    shown = types[types["rock"] > 0].nlargest(SHOWN, "rock")
    return Outcome(
        f"Which types of {run.name} were hard at step {first} and have hardly improved by step {last}?",
        "; ".join(f"{name} {n} ({n / len(rows):.1%})" for name, n in size.items())
        + f" of {len(rows)} occurrences. tau {quantile(a_N, 100 * tau_high):.4f}, delta "
        f"{quantile(a_N - b_N, 100 * delta):.4f} nats of {kl} KL. Independence of high and stuck would give "
        f"{(1 - tau_high) * delta:.1%} rocks. {int((with_rocks['gain'] < 0).sum())} of the {len(with_rocks)} chosen "
        "types with rocks are worse on average than before.",
        shown.drop(columns=["entropy_student", "entropy_teacher", "rank_score"]).reset_index(drop=True),
        {"quadrants": types},
        {"quadrants": figures.quadrant_map(rows, f"kl_{kl}_before", f"kl_{kl}")},
    )
