"""Train an image classification model, as a yaml file of experiments/ describes it.

python tools/cls_train.py --cfg experiments/digits/cls_mdeq_TINY.yaml
"""

import sys

from mdeq_vision.command import cls_train

if __name__ == "__main__":
    sys.exit(cls_train())
