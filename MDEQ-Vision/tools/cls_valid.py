"""Evaluate an image classification model at the fixed point.

python tools/cls_valid.py --cfg experiments/digits/cls_mdeq_TINY.yaml
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("images", "cls_valid.py"):
        from mdeq_vision.command import cls_valid
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(cls_valid())
