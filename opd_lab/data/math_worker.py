"""Grades with math-verify, one JSON line `[response, answer]` in, one line `1` or `0` out; started by `grading.py`.

It limits its own CPU time per response and its memory. Past the first it is killed, past the second it answers 0.
"""

import json
import logging
import resource
import sys

from math_verify import parse, verify

GIBIBYTE = 2**30
MEMORY = 4 * GIBIBYTE


def correct(response: str, answer: str) -> bool:
    """Whether the last (boxed) expression of the response equals the answer."""
    expected = parse(f"\\boxed{{{answer}}}", parsing_timeout=0)
    return verify(expected, parse(response, parsing_timeout=0), timeout_seconds=0)


def main(cpu_seconds: int) -> None:
    logging.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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
