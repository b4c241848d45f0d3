"""Write a segmentation model's predictions; if there are labels, print the figures.

python tools/seg_test.py --cfg experiments/digit_scenes/seg_mdeq_TINY.yaml
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("images", "seg_test.py"):
        from mdeq_vision.command import seg_test
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(seg_test())
