"""Report training runs on one HTML page: curves, residuals, figures, settings, environment.

    python scripts/report.py RUN                         # writes RUN/report.html
    python scripts/report.py RUN RUN --out both.html     # compares runs
    python scripts/report.py RUN --png FOLDER            # each figure as a PNG, too

RUN is the folder that a training command names as its run folder, of words, state tracking or
images; the run may still be going on. The page needs no network and no other file.
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("runs", "report.py"):
        from run_report.command import main
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main(None, __doc__.split("\n\n")[0]))
