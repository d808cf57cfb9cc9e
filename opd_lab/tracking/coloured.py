"""Rollouts to be read by eye: every token on a ground that tells its KL, and all that is known of it under the pointer.

The colours are one ramp from pale to dark (ColorBrewer's YlOrBr, safe for the colour-blind) with black text on all but
the darkest, so they read on white and on black; a line under the token grows with them, for printers without colour.
The page has no script and asks no network; text of models is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from itertools import pairwise
from typing import Any

LIMITS = (0.01, 0.1, 0.3, 1.0, 3.0)  # nats; a colour each from there on, none below
COLOURS = ("#fff3c4", "#fee391", "#fec44f", "#fe9929", "#993404")

STYLE = """
.rollout { margin: 1em 0; line-height: 1.9; font-family: ui-monospace, monospace; overflow-wrap: anywhere }
.rollout p { margin: .2em 0; font: .85em/1.4 system-ui, sans-serif; opacity: .8; white-space: pre-wrap }
.token { white-space: pre-wrap; border-radius: 3px; padding: .1em 0; -webkit-print-color-adjust: exact;
         print-color-adjust: exact; border-bottom: 0 solid CanvasText }
.token.given { font-style: italic; opacity: .65 }
.token.teacher, .token.blend, .token.dataset { text-decoration: overline }
""" + "".join(
    f".kl{k} {{ background: {ground}; color: {'white' if k == len(COLOURS) else 'black'}; "
    f"border-bottom-width: {k - 1}px }}\n"
    for k, ground in enumerate(COLOURS, 1)
)

PAGE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em;
       background: Canvas; color: CanvasText }
"""


def page(rows: Iterable[Mapping[str, Any]], title: str) -> str:
    """A whole page of rollouts, as `read.rollouts` has them."""
    body = "".join(rollout(row) for row in rows)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{PAGE}{STYLE}</style></head><body><h1>{escape(title)}</h1>{legend()}{body}</body></html>\n"
    )


def legend() -> str:
    ranges = [f"{low:g} to {high:g}" for low, high in pairwise(LIMITS)] + [f"above {LIMITS[-1]:g}"]
    shown = "".join(f'<span class="token kl{k}"> {text} </span> ' for k, text in enumerate(ranges, 1))
    return (
        f'<p class="legend">KL(student || teacher), nats: {shown}. '
        '<span class="token given">Given</span> tokens are trained by nobody; '
        '<span class="token teacher">overlined</span> ones the student did not write alone.</p>'
    )


def rollout(row: Mapping[str, Any]) -> str:
    """One rollout, without the page around it; `STYLE` belongs to it."""
    tokens = [str(token) for token in row["tokens"]]
    space = " " if " ".join(tokens) == row["text"] else ""  # a tokenizer of words leaves the spaces out
    body = space.join(_token(row, t, token) for t, token in enumerate(tokens))
    kl_mean = _mean(row.get("reverse_kl"))
    head = f"step {row['step']}, rollout {row['uid']}: reward {_number(row['reward'])}, {len(tokens)} tokens, "
    head += f"mean KL {_number(kl_mean)} nats" + ("" if row["stopped"] else ", not ended by itself")
    return f'<div class="rollout"><p>{escape(head)}</p><p>{escape(str(row["prompt"]))}</p>{body}</div>'


def _token(row: Mapping[str, Any], t: int, token: str) -> str:
    kl = _at(row, "reverse_kl", t)
    source = str(row["source"][t])
    said = {
        "token": repr(token),
        "KL": f"{_number(kl)} nats",
        "p student": _number(math.exp(_at(row, "logp_student", t))),
        "p teacher": _number(math.exp(_at(row, "logp_teacher", t))),
        "weight": _number(_at(row, "weight", t)),
        "source": source,
    }
    level = sum(kl >= limit for limit in LIMITS)  # NaN has none
    title = escape("\n".join(f"{name} {value}" for name, value in said.items()), quote=True)
    kinds = " ".join(["token", escape(source, quote=True), *([f"kl{level}"] if level else [])])
    return f'<span class="{kinds}" title="{title}">{escape(token).replace(chr(10), "↵" + chr(10))}</span>'


def _at(row: Mapping[str, Any], name: str, t: int) -> float:
    values = row.get(name)
    value = None if values is None or isinstance(values, float) else values[t]  # a run without this array has NaN
    return math.nan if value is None else float(value)


def _mean(values: Any) -> float:
    there = [] if values is None or isinstance(values, float) else [float(v) for v in values if v is not None]
    there = [value for value in there if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def _number(value: Any) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
