"""The report of training runs: read their files, draw figures, say the result, write one page."""
