"""Facts about each segmentation data set: classes, colours, statistics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentationFacts:
    """Facts about a segmentation data set with n classes. Train ids are 0..n-1.

    Attributes:
        class_names: a name per train id.
        palette: an (R, G, B) colour per train id, 0..255;
            ``np.asarray(palette, np.uint8)`` is the (n, 3) table.
        mean, std: one number per channel, for images in [0, 1]; they normalise the input.
        class_weights: weight of each class in the loss, or None for equal weights.
        label_ids: the official label id per train id, for submission files.
    """

    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_weights: tuple[float, ...] | None
    label_ids: tuple[int, ...]


CITYSCAPES = SegmentationFacts(
    class_names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic_light",
        "traffic_sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    palette=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    class_weights=(
        *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
        *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
    ),
    label_ids=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
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
