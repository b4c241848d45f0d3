"""Train a small DEQ-Transformer on English text that every Python brings along, and report.

    python DEQ-Sequence/quickstart.py             # a few minutes on two cores
    python DEQ-Sequence/quickstart.py --restart   # continue a run that was cut off

Flags of train_transformer.py override the settings, --max_step 200 for instance.
"""

import sys
from pathlib import Path

try:
    from lib.errors import command_needs

    with command_needs("words", "quickstart.py"):
        from deq_sequence.quickstart import main
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parent))
