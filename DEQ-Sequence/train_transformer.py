"""Train or evaluate a DEQ-Transformer language model.

python train_transformer.py --dataset demo --name try     # embedded corpus, no download
python train_transformer.py --help                        # all flags
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("words", "train_transformer.py"):
        from deq_sequence.command import main
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
