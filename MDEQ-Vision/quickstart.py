"""Train a small MDEQ on handwritten digits that scikit-learn brings along, and report.

    python MDEQ-Vision/quickstart.py digits    # classification: a minute or two on two cores
    python MDEQ-Vision/quickstart.py scenes    # segmentation: some minutes

--restart continues a run that was cut off; KEY VALUE pairs override settings.
"""

import sys
from pathlib import Path

try:
    from lib.errors import command_needs

    with command_needs("images", "quickstart.py"):
        from mdeq_vision.quickstart import main
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main(None, Path(__file__).resolve().parent))
