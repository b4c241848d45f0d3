"""Find the class of each pixel of pictures, by a trained model.

python tools/segment.py ../docs/models/scenes.safetensors picture.png
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("images", "segment.py"):
        from mdeq_vision.prediction.command import segment
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(segment())
