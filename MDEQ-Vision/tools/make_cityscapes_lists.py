"""Write the list files of a Cityscapes download.

python tools/make_cityscapes_lists.py             # for data/cityscapes, into data/list/cityscapes
python tools/make_cityscapes_lists.py /elsewhere  # for /elsewhere/cityscapes
"""

import argparse
import sys

from lib.errors import InputError
from mdeq_vision.datasets.cityscapes_lists import write_lists


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one line on bad input."""
    parser = argparse.ArgumentParser(
        description="Write ROOT/list/cityscapes/{train,val,trainval,test}.lst for the images in "
        "ROOT/cityscapes/leftImg8bit and the labels in ROOT/cityscapes/gtFine."
    )
    parser.add_argument("root", nargs="?", default="data/", help="DATASET.ROOT (data/)")
    arguments = parser.parse_args(argv)
    try:
        counts = write_lists(arguments.root)
    except (InputError, OSError) as error:
        print(f"make_cityscapes_lists.py: {error}", file=sys.stderr)
        return 2
    for path, count in counts.items():
        print(f"{path}: {count} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
