"""The table of methods, made from their cards: `python -m opd_lab.catalogue` writes `methods/README.md` anew.

What is read off a card (the docstring of a method's file):

    title      its first line, `Name, what changes against plain OPD: `method=x`.`  A class with a docstring of its own
               says it there, which is what the classes of one file do
    prose      the paragraphs from the title to the first equation
    Code:      where the released code is;  Differs: one departure from it, the lines that go on being indented

Hooks, costs and what the teacher must say come from the classes, settings from `conf/method`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from opd_lab.chunk import reads, teacher_must
from opd_lab.config import CONF, PACKAGE, ROOT, method_of
from opd_lab.methods.base import Method
from opd_lab.step import FREE
from opd_lab.types import Behavior, Facts

PAGE = PACKAGE / "methods" / "README.md"
BEGIN, END = "<!-- methods -->", "<!-- /methods -->"
A_RUN = Facts(
    steps=50, behavior=Behavior(), max_tokens=48, per_prompt=4, updates_per_rollout=1, vocabulary=64, graded=True,
    tokenizer="", data="lab", teacher="local", engine="torch", student_shape=(2, 64), teacher_shape=(2, 64),
)  # fmt: skip
INTRO = """# Methods

Made from the cards by `python -m opd_lab.catalogue`; a test compares. The contract is in [base.py](base.py).
In plain OPD the student writes each token once and is trained on it once, and the teacher scores it once.
"""
TOO_COMMON = ("check", "metrics", "conventions")  # to tell methods apart
HOOKS = [n for n, f in vars(Method).items() if inspect.isfunction(f) and n[0] != "_" and n not in TOO_COMMON]
SAYS = {"sampled": "log-probs", "topk": "top-k", "full": "distributions", "hidden": "hidden states", "text": "texts"}


@dataclass(frozen=True)
class Variant:
    """A file of `conf/method`: its name, what its first comment says, and the method it makes."""

    name: str
    says: str
    method: Method

    @property
    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self.method, f.name) for f in fields(self.method)}

    @property
    def bound(self) -> Method:
        """The method as a run has it."""
        return self.method.bind(A_RUN)


@dataclass(frozen=True)
class Entry:
    """A method class with its variants, the plainest one first."""

    cls: type[Method]
    variants: list[Variant]

    @property
    def card(self) -> str:
        return inspect.getdoc(sys.modules[self.cls.__module__]) or ""

    @property
    def title(self) -> str:
        """What it changes against plain OPD."""
        own = next(c for c in ast.walk(ast.parse(inspect.getsource(self.cls))) if isinstance(c, ast.ClassDef))
        said = ast.get_docstring(own)
        return said.splitlines()[0].rstrip(".") if said else title(self.card)

    @property
    def main(self) -> Variant:
        return self.variants[0]


def title(card: str) -> str:
    """The first line of a card without the command."""
    return re.split(r":\s+`method=", card.splitlines()[0])[0].rstrip(".")


def prose(card: str) -> str:
    """The paragraphs of a card between its title and its first equation."""
    paragraphs = card.split("\n\n")[1:]
    end = next((i for i, p in enumerate(paragraphs) if p.startswith(("    ", "Neutral:", "Status:"))), len(paragraphs))
    return "\n\n".join(re.sub(r":$", ".", " ".join(p.split())) for p in paragraphs[:end])


def lines(card: str, label: str) -> list[str]:
    """What stands behind `Label:` at the begin of a line, once per label."""
    found = re.findall(rf"^{label}:(.*(?:\n[ ]+\S.*)*)", card, re.MULTILINE)
    return [" ".join(text.split()) for text in found]


def says(path: Path) -> str:
    """The comment at the head of a YAML file, without its list of differences, which the table shows itself."""
    head = re.match(r"(?:#.*\n)*", path.read_text())
    text = " ".join(line.lstrip("# ") for line in head.group().splitlines()) if head else ""
    return re.sub(r"\s*Differs from .*", "", text)


def entries() -> list[Entry]:
    """Every method class that a YAML names: plain OPD, then by file and place in the file."""
    config = OmegaConf.load(CONF / "config.yaml")
    group = {name: OmegaConf.load(CONF / name / f"{which}.yaml") for name, which in _defaults(config)}
    by_class: dict[type[Method], list[Variant]] = {}
    for path in sorted((CONF / "method").glob("*.yaml")):
        run = OmegaConf.create({"steps": config.steps, **group, "method": OmegaConf.load(path)})
        values = cast(dict[str, Any], OmegaConf.to_container(run.method, resolve=True))
        method = method_of(values, [])
        by_class.setdefault(type(method), []).append(Variant(path.stem, says(path), method))

    def place(entry: Entry) -> tuple[bool, str, int]:
        return entry.main.name != "opd", entry.cls.__module__, inspect.getsourcelines(entry.cls)[1]

    found = [Entry(cls, variants) for cls, variants in by_class.items()]
    for entry in found:
        entry.variants.sort(key=lambda v: (_place(entry.card, v.name), v.name))
    return sorted(found, key=place)


def _place(card: str, name: str) -> int:
    """Where a card names a variant; its end where it does not."""
    command = f"`method={name}`"
    return (card + command).find(command)


def _defaults(config: Any) -> Iterator[tuple[str, str]]:
    """The groups that a method's settings may refer to."""
    for item in config.defaults:
        for name, which in () if isinstance(item, str) else item.items():
            if which and name != "method" and not name.startswith("override "):
                yield name, which


def hooks(cls: type[Method]) -> list[str]:
    """The questions of the contract that a class answers differently from plain OPD."""
    return [name for name in HOOKS if getattr(cls, name) is not getattr(Method, name)]


def teacher(method: Method) -> str:
    """What a teacher must be able to say."""
    must = teacher_must(method.needs().all)
    must |= {"text"} if method.needs().text else set()
    return ", ".join(SAYS[what] for what in SAYS if what in must) or "nothing"


def cost(method: Method) -> str:
    """What a step costs beside plain OPD's: each token written once by the student and scored once by the teacher."""
    needs = method.needs()
    asked = needs.all
    extra = {
        "no teacher pass": "teacher" not in reads(asked),
        "a second student pass": "student" in reads(needs.batch - FREE.keys()),
        "a reference pass": "reference" in reads(asked),
        "the teacher writes texts": needs.text,
        "the teacher decodes along": "blend" in method.asks(),
        "the teacher writes first tokens": "teacher_tokens" in method.asks(),
        "the data's solutions in place of rollouts": "dataset" in method.asks(),
        "the teacher scores while decoding": "stop" in method.asks(),
        "a fit before the first step": method.preparation() is not None,
    }
    return ", ".join(words for words, so in extra.items() if so) or "none"


def paper(cls: type[Method]) -> str:
    name = cls.paper.removeprefix("https://").removeprefix("www.").rstrip("/")
    return f"[{name.replace('arxiv.org/abs/', 'arXiv ')}]({cls.paper})"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    line = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows))
    return "\n".join((next(line), "|" + "---|" * len(head), *line))


def short_table() -> str:
    """The methods in a line each, for the project's front page."""
    rows = [(f"`{e.main.name}`", e.title, str(len(e.variants)), paper(e.cls)) for e in entries()]
    return table(("`method=`", "against plain OPD", "variants", "paper"), rows)


def section(group: list[Entry]) -> str:
    """A card with the classes of its file."""
    card, path = group[0].card, Path(inspect.getfile(group[0].cls)).name
    facts = [
        f"- `{e.cls.__name__}` answers {', '.join(f'`{name}`' for name in hooks(e.cls)) or 'nothing'} anew"
        for e in group
    ]
    facts.append(
        f"- Paper: {', '.join(dict.fromkeys(paper(e.cls) for e in group))}; the equations are in [{path}]({path})"
    )
    facts += [f"- {label}: {text}" for label in ("Code", "Status", "Neutral", "Differs") for text in lines(card, label)]
    rows = [(f"`{v.name}`", v.says, beside(v, e.main)) for e in group for v in e.variants]
    settings = table(("`method=`", "what it is for", "other settings than the first of its class"), rows)
    return f"## {title(card)}\n\n{prose(card)}\n\n" + "\n".join(facts) + f"\n\n{settings}\n"


def beside(variant: Variant, main: Variant) -> str:
    """In what a variant differs from the main one."""
    new = [f"`{key}={value}`" for key, value in variant.settings.items() if value != main.settings[key]]
    return ", ".join(new + [variant.method.status] * (variant.method.status != main.method.status))


def anchor(entry: Entry) -> str:
    """A link to the section of an entry, by GitHub's rule."""
    place = re.sub(r"[^\w\- ]", "", title(entry.card).lower()).replace(" ", "-")
    return f"[`{entry.main.name}`](#{place})"


def page() -> str:
    """`methods/README.md`."""
    found = entries()
    rows = [
        (anchor(e), e.title, teacher(e.main.bound), cost(e.main.bound), e.main.method.status, paper(e.cls))
        for e in found
    ]
    head = ("`method=`", "against plain OPD", "the teacher gives", "cost beside plain OPD", "status", "paper")
    cards = [section(list(group)) for _, group in groupby(found, key=lambda e: e.cls.__module__)]
    return "\n".join((INTRO, table(head, rows), "", *cards))


def front(text: str) -> str:
    """The project's front page with the table between its two markers, if it has them."""
    return re.sub(f"({BEGIN}\n).*?({END})", lambda m: f"{m[1]}{short_table()}\n{m[2]}", text, flags=re.DOTALL)


def main() -> None:
    PAGE.write_text(page())
    readme = ROOT / "README.md"
    if readme.exists():
        readme.write_text(front(readme.read_text()))
    print(f"{len(entries())} methods, {sum(len(e.variants) for e in entries())} files of settings -> {PAGE}")


if __name__ == "__main__":
    main()
