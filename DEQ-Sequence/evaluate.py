"""The perplexity of a text by a trained language model.

python evaluate.py LM-TFM-demo/quickstart data/demo/test.txt
python evaluate.py --help                                 # all flags
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("words", "evaluate.py"):
        from deq_sequence.evaluate_command import main
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
