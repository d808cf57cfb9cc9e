"""Grades with math-verify, one JSON line `[response, answer]` in, one line `1` or `0` out; started by `grading.py`.

It limits its own CPU time per response and its memory. Past the first it is killed, past the second it answers 0.
"""

import contextlib
import json
import logging
import resource
import sys

from math_verify import parse, verify

GIBIBYTE = 2**30
MEMORY = 4 * GIBIBYTE


def correct(response: str, answer: str) -> bool:
    """Whether the response's last box, or without one its last expression, equals the answer."""
    given = parse(last_box(response) or response, parsing_timeout=0)
    return verify(parse(f"\\boxed{{{answer}}}", parsing_timeout=0), given, timeout_seconds=0)


def last_box(text: str) -> str | None:
    """The last `\\boxed{...}` with its braces in balance. The library itself would join several boxes into a set."""
    start = text.rfind("\\boxed{")
    depth = 0
    for position in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0 and text[position] == "}":
            return text[start : position + 1]
    return None


def main(cpu_seconds: int) -> None:
    logging.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    verdicts, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + cpu_seconds, resource.RLIM_INFINITY))
        response, answer = json.loads(line)
        try:
            verdict = correct(response, answer)
        except Exception:
            verdict = False
        print(int(verdict), file=verdicts, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
