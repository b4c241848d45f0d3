"""Write the backbone of a classification checkpoint for MODEL.PRETRAINED.

python tools/extract_pretrained.py CHECKPOINT pretrained_models/mdeq_SMALL.pth
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("images", "extract_pretrained.py"):
        from mdeq_vision.command import extract
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(extract())
