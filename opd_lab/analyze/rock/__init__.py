"""Rock tokens (arXiv 2605.09253) of any finished run: a corpus once, then questions to it."""
