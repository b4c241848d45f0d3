"""Train the segmentation model that a yaml file in experiments/ describes.

python tools/seg_train.py --cfg experiments/digit_scenes/seg_mdeq_TINY.yaml
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("images", "seg_train.py"):
        from mdeq_vision.command import seg_train
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(seg_train())
