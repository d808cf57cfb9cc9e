"""A sweep in a terminal of its own, as a process: its first trial does not stop when asked."""

import fcntl
import sys
import termios
from pathlib import Path

from bench import launcher
from lab_sweep import asked

from opd_lab.sweep import run

if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C goes to this process and all in its group
    question = asked(Path(sys.argv[1]), "seed=5,6", "sweep.name=stubborn")
    sys.exit(run.run(question, launcher(grace_seconds=600), task="fated:train"))
