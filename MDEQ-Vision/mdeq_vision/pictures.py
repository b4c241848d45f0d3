"""Label maps as pictures: colours, overlays, files for submission, and a panel of scenes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from lib.errors import InputError, check, needs
from lib.runs.atomic_files import atomic_write

# The longer side of a scene in a panel, in pixels: small scenes grow up to the first number,
# scenes above the second shrink to it.
_PANEL_GROWN, _PANEL_LARGEST = 256, 512


def colour(train_ids: ArrayLike, palette: ArrayLike, ignore_label: int | None) -> np.ndarray:
    """Colours of a label map, uint8 (H, W, 3); ignored pixels are black.

    Args:
        train_ids: classes, (H, W), integers in [0, n) or ``ignore_label``.
        palette: RGB of every class, (n, 3), 0 to 255.
        ignore_label: label of pixels without a class; None if there are none.
    """
    palette = np.asarray(palette)
    if palette.ndim != 2 or palette.shape[1] != 3 or palette.min() < 0 or palette.max() > 255:
        raise InputError(f"palette must be (n, 3) numbers of 0 to 255, but is {palette.shape}")
    table = np.zeros((len(palette) + 1, 3), np.uint8)
    table[:-1] = palette
    return table[_index(train_ids, len(palette), ignore_label)]


def overlay(
    picture: ArrayLike,
    train_ids: ArrayLike,
    palette: ArrayLike,
    ignore_label: int | None,
    alpha: float = 0.5,
) -> np.ndarray:
    """Blend a picture with the colours of its classes: (1 - alpha) picture + alpha colour.

    Args:
        picture: RGB, uint8 (H, W, 3).
        train_ids: classes, (H, W); pixels with ``ignore_label`` keep the picture's colour.
        palette: RGB of every class, (n, 3), 0 to 255.
        ignore_label: label of pixels without a class; None if there are none.
        alpha: weight of the colours, from 0 to 1.

    Returns:
        uint8 (H, W, 3).
    """
    picture = _picture(picture)
    check(0 <= alpha <= 1, "alpha", alpha, "from 0 to 1")
    colours = colour(train_ids, palette, ignore_label)
    if colours.shape != picture.shape:
        raise InputError(
            f"a label map of {colours.shape[:2]} pixels does not fit a picture of "
            f"{picture.shape[:2]} (height, width)"
        )
    mixed = np.rint((1 - alpha) * picture + alpha * colours).astype(np.uint8)
    ignored = np.asarray(train_ids)[..., None] == ignore_label
    return np.where(ignored, picture, mixed)


def to_label_ids(train_ids: ArrayLike, label_ids: Sequence[int]) -> np.ndarray:
    """Official label ids of predicted classes, (H, W), for submission files.

    Args:
        train_ids: classes, (H, W), integers in [0, n).
        label_ids: official id of every class, n numbers of 0 to 65535.

    Returns:
        uint8, or uint16 if an id is above 255.
    """
    table = np.asarray(label_ids)
    if table.ndim != 1 or table.min() < 0 or table.max() > 65535:
        raise InputError(f"label_ids must be numbers of 0 to 65535, one per class: {label_ids}")
    kind = np.uint8 if table.max() <= 255 else np.uint16
    return table.astype(kind)[_index(train_ids, len(table), None)]


def save_png(array: ArrayLike, path: Path) -> None:
    """Write uint8 (H, W) or (H, W, 3), or uint16 (H, W), as a PNG, whole or not at all.

    The folder is created if absent.
    """
    array = np.asarray(array)
    fits = {2: (np.uint8, np.uint16), 3: (np.uint8,)}.get(array.ndim, ())
    if array.dtype not in fits or array.shape[2:] not in ((), (3,)):
        raise InputError(
            f"a PNG is written of uint8 (H, W) or (H, W, 3), not of {array.dtype} {array.shape}"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        Image.fromarray(array).save(file, format="png")


def save_prediction(
    folder: Path, name: str, picture: ArrayLike, prediction: ArrayLike, facts
) -> None:
    """Write the prediction for an image as three PNGs.

    ``labels/<name>.png`` has the official label ids, ``colours/<name>.png`` the class colours,
    and ``overlays/<name>.png`` the input and its overlay side by side.

    Args:
        folder: parent of these three folders, which are created if absent.
        name: the image's name without extension; it may contain folders.
        picture, prediction: uint8 (H, W, 3), and classes (H, W), integers in [0, n).
        facts: the SegmentationFacts of the data set.

    Raises:
        InputError: ``name`` leads out of ``folder``, or the arrays do not fit together.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"image name {name!r} leads out of the folder {folder}")
    folder = Path(folder)
    mixed = overlay(picture, prediction, facts.palette, None)
    files = {
        "labels": to_label_ids(prediction, facts.label_ids),
        "colours": colour(prediction, facts.palette, None),
        "overlays": np.concatenate([np.asarray(picture), mixed], axis=1),
    }
    for kind, array in files.items():
        save_png(array, folder / kind / f"{name}.png")


def panel(
    rows: Sequence[tuple[ArrayLike, ArrayLike | None, ArrayLike]],
    titles: Sequence[str],
    class_names: Sequence[str],
    palette: ArrayLike,
    path: Path,
    zoom: float | None = None,
    *,
    ignore_label: int = 255,
) -> None:
    """Draw one row per scene, input | truth | prediction, and a legend, into one PNG.

    Args:
        rows: per scene the picture, uint8 (H, W, 3); the true classes, (H, W), or None; and the
            predicted classes, (H, W).
        titles: titles of the three columns.
        class_names: one per class, for the legend.
        palette: RGB of every class, (n, 3), 0 to 255.
        path: the PNG, written whole or not at all.
        zoom: drawn pixels per pixel of a scene. By default the largest integer, at least 1, that
            keeps the longest side of the scenes within 256 drawn pixels; scenes longer than 512
            shrink to 512.
        ignore_label: label of true pixels without a class, drawn black.
    """
    # Imported here: the import is slow, and most commands do not draw.
    with needs("images"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

    if not rows:
        raise InputError("a panel needs at least one scene")
    if len(titles) != 3 or len(class_names) != len(palette):
        raise InputError(
            f"a panel needs 3 titles and a name per colour, but has {len(titles)} titles, "
            f"{len(class_names)} names and {len(palette)} colours"
        )
    cells = [
        [
            _picture(picture),
            None if truth is None else colour(truth, palette, ignore_label),
            colour(prediction, palette, ignore_label),
        ]
        for picture, truth, prediction in rows
    ]
    height = max(row[0].shape[0] for row in cells)
    width = max(row[0].shape[1] for row in cells)
    if zoom is None:
        side = max(height, width)
        zoom = max(_PANEL_GROWN // side, 1) if side <= _PANEL_LARGEST else _PANEL_LARGEST / side
    check(zoom > 0, "zoom", zoom, "above 0")

    # Place the axes by hand, so that a pixel of a scene is `zoom` pixels of the file.
    dpi, gap = 100, 8
    cell = np.array([width * zoom, height * zoom])
    total = cell * [3, len(cells)] + gap * np.array([2, len(cells) - 1])
    figure = Figure(figsize=total / dpi, dpi=dpi)
    FigureCanvasAgg(figure)
    for i, row in enumerate(cells):
        for j, image in enumerate(row):
            corner = np.array([j, len(cells) - 1 - i]) * (cell + gap)  # from the lower left
            axes = figure.add_axes([*corner / total, *cell / total])
            axes.set_axis_off()
            if image is not None:
                axes.imshow(image, interpolation="nearest")
            else:
                axes.text(0.5, 0.5, "none", ha="center", va="center", color="grey")
            if i == 0:
                axes.set_title(titles[j])
    entries = [
        Patch(facecolor=np.asarray(rgb) / 255, edgecolor="grey", label=name)
        for rgb, name in zip(palette, class_names, strict=True)
    ]
    if any(truth is not None and np.any(np.asarray(truth) == ignore_label) for _, truth, _ in rows):
        entries.append(Patch(facecolor="black", edgecolor="grey", label="ignored"))
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "borderaxespad": 0.3}
    figure.legend(handles=entries, frameon=False, handlelength=1.2, handleheight=1.2, **place)
    with atomic_write(path) as file:
        # "tight" makes room for titles and legend, which lie outside of the figure.
        figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.1)


def _picture(picture: ArrayLike) -> np.ndarray:
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise InputError(
            f"a picture is uint8 (H, W, 3), but this is {picture.dtype} {picture.shape}"
        )
    return picture


def _index(train_ids: ArrayLike, n_classes: int, ignore_label: int | None) -> np.ndarray:
    """Classes (H, W) as row numbers of a table with n + 1 rows; row n is for ignored pixels."""
    train_ids = np.asarray(train_ids)
    if train_ids.ndim != 2 or not np.issubdtype(train_ids.dtype, np.integer):
        raise InputError(
            f"a label map is integers (H, W), but this is {train_ids.dtype} {train_ids.shape}"
        )
    ids = train_ids.astype(np.int64)  # n = 256 does not fit in uint8
    unknown = (ids < 0) | (ids >= n_classes)
    if ignore_label is not None:
        ignored = ids == ignore_label
        ids = np.where(ignored, n_classes, ids)
        unknown &= ~ignored
    if unknown.any():
        hint = "" if ignore_label is None else f" nor the ignore label {ignore_label}"
        raise InputError(f"label {ids[unknown][0]} is not a class in 0..{n_classes - 1}{hint}")
    return ids
