"""Write the list files of a Cityscapes download.

python tools/make_cityscapes_lists.py             # for data/cityscapes, into data/list/cityscapes
python tools/make_cityscapes_lists.py /elsewhere  # for /elsewhere/cityscapes
"""

import sys

try:
    from lib.errors import command_needs

    with command_needs("images", "make_cityscapes_lists.py"):
        from mdeq_vision.command import make_cityscapes_lists
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(make_cityscapes_lists())
