"""`opd-lab analyze ...`: which questions there are, and their options. What answers one is loaded when it is asked."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

FIGURES = {
    "kl-map": ("the KL of every token of a hundred rollouts, early and late", "a run folder"),
    "support": ("does the teacher's support tell right from wrong rollouts?", "a folder of runs"),
}
SCORES = (
    *("rock_score", "mean_kl", "frequency", "lower_bound", "lower_bound_sum", "shrunk_lower"),
    *("context", "recalcitrance", "gradient_norm", "gradient_alignment"),  # what other questions left
)
ROCK = "questions about rock tokens, arXiv 2605.09253; begin with corpus, then select"


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the questions to the parser of `analyze`."""
    questions = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    for name, (about, where) in FIGURES.items():
        questions.add_parser(name, help=about).add_argument("folder", type=Path, help=where)
    rock = questions.add_parser("rock", help=ROCK).add_subparsers(dest="part", required=True, metavar="PART")
    _corpus(_question(rock, "corpus", "held-out rollouts, scored by checkpoints and teacher: what the others read"))
    _select(_question(rock, "select", "which token types are rocks, and a method that freezes them"))
    _context(_question(rock, "context", "which types stay hard in like contexts?"))
    _quadrants(_question(rock, "quadrants", "which types were hard and have hardly improved?"))
    _gradients(_question(rock, "gradients", "do rocks push the student, and in which direction?"))
    _ends(_question(rock, "persistence", "do rocks stay hard on prompts they were not selected on?"))
    _stability(_question(rock, "stability", "how many prompts does the list need, and do other seeds find the same?"))
    _knockout(_question(rock, "knockout", "does the student need its rocks? Accuracy without each of them"))
    _question(rock, "figures", "draw every picture again from the tables that the others left")
    _recovery(_question(questions, "recovery", "can the teacher still rescue a wrong response? (SCOPE, figure 1b)"))
    _continuation(_question(questions, "continuation", "are a blend's prefixes better to go on from? (TRB, figure 4)"))
    _phases(_question(questions, "phases", "what happens before, in and after a stretch of low divergence? (KAT)"))


def answer(given: argparse.Namespace) -> int:
    """Ask, print, and keep what was found."""
    if given.question in FIGURES:
        return _draw(given.question, given.folder)
    from opd_lab.analyze.outcome import keep

    options = dict(vars(given))
    for name in ("command", "question", "part", "overrides"):
        options.pop(name, None)
    part = getattr(given, "part", given.question)
    module = import_module(f"opd_lab.analyze.{'rock.' if given.question == 'rock' else ''}{part}")
    found = module.answer(**options)
    print(found)
    print(keep(given.run, given.question, part, found))
    return 0


def _draw(name: str, folder: Path) -> int:
    from opd_lab.analyze.figures import AXES, draw, labels, support_points

    path = draw(name, folder)
    if name == "support":
        names = labels(folder)
        print(f"{'':32}{'  '.join(AXES)}")
        for run, point in support_points(folder).items():
            print(f"{names[run]:32}" + "  ".join(f"{value:.3f}" for value in point))
    print(path)
    return 0


def _question(where: argparse._SubParsersAction, name: str, about: str) -> argparse.ArgumentParser:
    parser = where.add_parser(
        name, help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    return parser


def _corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", default=["0", "final"], help="steps, final, best; 0: untrained")
    parser.add_argument("--problems", type=int, default=500, help="held-out prompts, at most")
    parser.add_argument("--data-split", default="test", choices=("validation", "test"))
    parser.add_argument("--decode", default="sample", choices=("sample", "greedy"), help="sample: at temperature 1")
    parser.add_argument("--samples", type=int, default=1, help="rollouts per prompt")
    parser.add_argument("--max-tokens", type=int, help="response limit; the run's evaluate.max_tokens")
    parser.add_argument(
        "--on", default="fixed", choices=("fixed", "own"), help="all score the last one's rollouts | each its own"
    )
    parser.add_argument("--split", default="halves", choices=("halves", "none"), help="select on one half of them")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def _select(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--score", default="rock_score", choices=SCORES, help="what types are ranked by")
    parser.add_argument("--k", type=int, help="types; instead of --coverage")
    parser.add_argument("--coverage", type=float, default=0.6, help="as many types as hold this share of the KL")
    parser.add_argument("--min-count", type=int, default=2, help="occurrences")
    parser.add_argument("--exclude-most-frequent", type=int, default=0, help="so many types can be no rocks")
    parser.add_argument("--protect", type=int, nargs="+", default=[], metavar="ID", help="types that can be no rocks")
    parser.add_argument("--high-kl", type=int, help="types of the group high_kl; as many as rocks")
    parser.add_argument("--random", type=int, default=200, help="types of the group random, at most")
    parser.add_argument("--joint", type=Path, metavar="RUN", help="rank by the smaller score of two corpora")
    parser.add_argument("--after", type=int, help="checkpoint of the corpus; the last")
    parser.add_argument("--seed", type=int, default=0, help="of the random group")


def _ends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=int, metavar="STEP", help="checkpoint of the corpus; its first")
    parser.add_argument("--after", type=int, metavar="STEP", help="checkpoint of the corpus; its last")


def _context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--w", type=int, default=5, help="tokens of a context, on either side")
    parser.add_argument("--context", default="embedding_mean", choices=("embedding_mean", "token_overlap"))
    parser.add_argument("--gamma", type=float, default=0.5, help="likeness from which contexts are alike")
    parser.add_argument("--eta", type=float, default=0.1, help="share of the others that must be alike")
    parser.add_argument("--tau-pre", type=float, default=0.8, help="quantile from which a KL is high before")
    parser.add_argument("--tau-post", type=float, default=0.8, help="quantile from which a KL is high after")
    parser.add_argument("--k", type=int, default=10, help="types shown")
    parser.add_argument("--max-occurrences", type=int, default=2000, help="of a type, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    _ends(parser)


def _quadrants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tau-high", type=float, default=0.8, help="quantile from which a KL is high before")
    parser.add_argument("--delta", type=float, default=0.2, help="quantile below which an improvement is none")
    parser.add_argument("--min-count", type=int, default=30, help="occurrences of a type that can be chosen")
    parser.add_argument("--pool", type=int, default=200, help="types chosen, at most")
    parser.add_argument("--kl", default="forward", choices=("forward", "reverse"))
    _ends(parser)


def _gradients(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vectors", default="all", choices=("all", "compared"), help="a vector of vocabulary width for these types"
    )
    parser.add_argument("--after", type=int, metavar="STEP", help="checkpoint of the corpus; its last")


def _stability(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=int, default=20, help="draws of each number of problems")
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="RUN", help="runs with a corpus")
    parser.add_argument("--after", type=int, metavar="STEP", help="checkpoint of the corpora; their last")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def _knockout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", type=int, default=200, help="held-out problems, at most")
    parser.add_argument("--data-split", default="test", choices=("validation", "test"))
    parser.add_argument("--max-tokens", type=int, help="response limit; the run's evaluate.max_tokens")
    parser.add_argument("--eps", type=float, default=0.01, help="accuracy that a pillar costs at least")
    parser.add_argument("--repeat-baseline", type=int, default=5, help="times, in other orders")
    parser.add_argument("--window-share", type=float, default=0.25, help="of a token's windows that its company is in")
    parser.add_argument("--w", type=int, default=5, help="tokens of a window, on either side")
    parser.add_argument("--draws", type=int, default=5, help="random orders of the cumulative curve")
    parser.add_argument("--after", type=int, metavar="STEP", help="checkpoint of the corpus; its last")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")


def _sampled(parser: argparse.ArgumentParser, checkpoint: str, problems: int, rollouts: int) -> None:
    parser.add_argument("--checkpoint", default=checkpoint, help="a step, final, best; 0: untrained")
    parser.add_argument("--problems", type=int, default=problems, help="held-out problems, at most")
    parser.add_argument("--data-split", default="test", choices=("validation", "test"))
    parser.add_argument("--rollouts", type=int, default=rollouts, help="per problem")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def _recovery(parser: argparse.ArgumentParser) -> None:
    _sampled(parser, checkpoint="0", problems=200, rollouts=4)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8], help="of the characters")
    parser.add_argument("--continuations", type=int, default=4, help="per wrong response and fraction")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--top-k", type=int, default=20, help="tokens")
    parser.add_argument("--boundary", help="what ends a step; a comma in the lab, else the end of a line")


def _continuation(parser: argparse.ArgumentParser) -> None:
    _sampled(parser, checkpoint="0", problems=200, rollouts=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 8, 12, 16, 20], help="of the prefixes, tokens")
    parser.add_argument("--continuations", type=int, default=2, help="per prefix and writer")
    parser.add_argument("--budget", type=float, help="nats per token; the run's own blend at its first step")


def _phases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", default=["0", "final"], help="steps, final, best; 0: untrained")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems, a rollout each")
    parser.add_argument("--data-split", default="test", choices=("validation", "test"))
    parser.add_argument("--window", type=int, help="tokens; the run's own where its method is KAT, else 6")
    parser.add_argument("--consecutive", type=int, help="windows; likewise, else 2")
    parser.add_argument("--exempt", type=int, help="first tokens that no window touches; likewise, else 4")
    parser.add_argument("--eta", type=float, help="the threshold is the 1 - eta quantile of minima; likewise, else 0.3")
    parser.add_argument("--threshold", type=float, help="nats, in place of that quantile")
    parser.add_argument("--rank", type=int, default=4, help="directions of the change of a weight matrix")
    parser.add_argument("--top", type=int, default=5, help="tokens that the teacher wants, per phase")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
