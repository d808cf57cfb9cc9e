"""`opd-lab analyze rock persistence RUN`: do the selected types stay hard on prompts they were not selected on?

persistence.parquet   a row per type of the testing half: id, text, group, count, kl_before, kl_after (means, nats)

The measure is `excess`: the mean KL of a group's occurrences after training over that of all others, minus 1, on the
half of the prompts that `select` did not see. A group that was only lucky there has an excess of 0 here.
"""

from __future__ import annotations

from pathlib import Path

from scipy.stats import wilcoxon

from opd_lab.analyze.outcome import Frame, Outcome, frame
from opd_lab.analyze.rock import figures
from opd_lab.analyze.rock.corpus import SELECT, TEST, paired
from opd_lab.analyze.rock.select import grouped
from opd_lab.analyze.subject import open_run
from opd_lab.analyze.verdicts import p_of

GROUPS = ("rock", "high_kl", "random", "control")


def answer(run: Path, *, before: int | None, after: int | None) -> Outcome:
    groups = grouped(run)
    rows, first, last = paired(run, half=TEST, before=before, after=after)
    seen = paired(run, half=SELECT, before=before, after=after)[0]
    types = rows.groupby("token_id").agg(
        count=("t", "size"), kl_before=("kl_reverse_before", "mean"), kl_after=("kl_reverse", "mean")
    )
    subject = open_run(run)
    group = {i: name for name in GROUPS[:3] for i in groups[name]}
    types.insert(0, "group", [group.get(int(i), "") for i in types.index])
    types.insert(0, "text", [subject.decode([int(i)]) for i in types.index])
    types = types.rename_axis("id").reset_index()
    shown = frame(
        [
            {"group": name, **_medians(types[types["id"].isin(groups[name])])}
            | {
                "excess where selected": excess(seen, groups[name]),
                "excess held out": excess(rows, groups[name]),
            }
            for name in GROUPS
        ]
    )
    rank = types["kl_before"].corr(types["kl_after"], method="spearman")
    rock = shown.iloc[0]
    return Outcome(
        f"Do the rocks of {run.name}, chosen on one half of the prompts, stay hard on the other, from step {first} to "
        f"{last}?",
        f"Held out, the rocks' KL is {1 + rock['excess held out']:.2f} times that of the other tokens after training "
        f"({1 + rock['excess where selected']:.2f} where they were selected). Over all types, the rank correlation of "
        f"the KL before and after is {rank:.2f}. p: Wilcoxon signed-rank, before against after, over types.",
        shown,
        {"persistence": types},
        {"persistence": figures.persistence(types)},
    )


def excess(rows: Frame, ids: list[int]) -> float:
    """Mean KL of these types' occurrences over that of all others, minus 1."""
    mine = rows["token_id"].isin(ids)
    return float(rows.loc[mine, "kl_reverse"].mean() / rows.loc[~mine, "kl_reverse"].mean() - 1)


def _medians(types: Frame) -> dict[str, float]:
    change = types["kl_after"] - types["kl_before"]
    p = p_of(wilcoxon(change)) if (change != 0).any() else 1.0
    medians = {"median KL before": types["kl_before"].median(), "median KL after": types["kl_after"].median()}
    return {"types": len(types), **medians, "p": p}
