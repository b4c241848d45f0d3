"""Facts about each segmentation data set: classes, colours, statistics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentationFacts:
    """Facts about a segmentation data set with n classes. Train ids are 0..n-1."""

    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # (R, G, B) of each class, 0..255
    mean: tuple[float, float, float]  # per channel, of images in [0, 1], like std
    std: tuple[float, float, float]
    class_weights: tuple[float, ...] | None  # in the loss; None for equal weights
    label_ids: tuple[int, ...]  # the official label id per train id, for submission files


# By train id: name, colour, official label id, weight in the loss.
_CITYSCAPES = (
    ("road", (128, 64, 128), 7, 0.8373),
    ("sidewalk", (244, 35, 232), 8, 0.918),
    ("building", (70, 70, 70), 11, 0.866),
    ("wall", (102, 102, 156), 12, 1.0345),
    ("fence", (190, 153, 153), 13, 1.0166),
    ("pole", (153, 153, 153), 17, 0.9969),
    ("traffic_light", (250, 170, 30), 19, 0.9754),
    ("traffic_sign", (220, 220, 0), 20, 1.0489),
    ("vegetation", (107, 142, 35), 21, 0.8786),
    ("terrain", (152, 251, 152), 22, 1.0023),
    ("sky", (70, 130, 180), 23, 0.9539),
    ("person", (220, 20, 60), 24, 0.9843),
    ("rider", (255, 0, 0), 25, 1.1116),
    ("car", (0, 0, 142), 26, 0.9037),
    ("truck", (0, 0, 70), 27, 1.0865),
    ("bus", (0, 60, 100), 28, 1.0955),
    ("train", (0, 80, 100), 31, 1.0865),
    ("motorcycle", (0, 0, 230), 32, 1.1529),
    ("bicycle", (119, 11, 32), 33, 1.0507),
)
_NAMES, _PALETTE, _LABEL_IDS, _WEIGHTS = zip(*_CITYSCAPES, strict=True)
CITYSCAPES = SegmentationFacts(
    class_names=_NAMES,
    palette=_PALETTE,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    class_weights=_WEIGHTS,
    label_ids=_LABEL_IDS,
)

# Background is train id 0, as in most data sets with a background; digit d is train id d + 1.
DIGIT_SCENES = SegmentationFacts(
    class_names=("background", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    palette=(
        (32, 32, 32),  # background
        (255, 255, 255),  # 0
        (230, 25, 75),  # 1
        (60, 180, 75),  # 2
        (255, 225, 25),  # 3
        (0, 110, 230),  # 4
        (245, 130, 48),  # 5
        (170, 70, 210),  # 6
        (70, 240, 240),  # 7
        (250, 160, 200),  # 8
        (150, 100, 40),  # 9
    ),
    mean=(0.25, 0.25, 0.25),
    std=(0.2, 0.2, 0.2),
    class_weights=None,
    label_ids=tuple(range(11)),
)
