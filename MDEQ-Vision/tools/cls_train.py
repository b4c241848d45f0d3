"""Train the image classification model that a yaml file in experiments/ describes.

python tools/cls_train.py --cfg experiments/digits/cls_mdeq_TINY.yaml
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("images", "cls_train.py"):
        from mdeq_vision.command import cls_train
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(cls_train())
