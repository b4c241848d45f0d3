"""Name the classes of pictures, by a trained model.

python tools/classify.py ../docs/models/digits.safetensors picture.png
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("images", "classify.py"):
        from mdeq_vision.prediction.command import classify
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(classify())
