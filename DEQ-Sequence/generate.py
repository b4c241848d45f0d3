"""Let a trained language model continue a text.

python generate.py LM-TFM-demo/quickstart --prompt "this function returns"
python generate.py --help                                 # all flags
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("words", "generate.py"):
        from deq_sequence.generate_command import main
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
