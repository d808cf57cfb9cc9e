"""`python -m opd_lab`: `opd-lab`, and from overrides alone plain Hydra: one run, or with `-m` a sweep."""

from __future__ import annotations

import re
import sys

from opd_lab import app, cli

if __name__ == "__main__":
    if re.fullmatch(r"\w[\w-]*", sys.argv[1] if len(sys.argv) > 1 else ""):  # a word that is nothing to Hydra
        raise SystemExit(cli.main())
    app.app(app.run)
