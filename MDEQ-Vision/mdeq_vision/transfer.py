"""Transfer of backbone weights from a classification to a segmentation model."""

from collections.abc import Callable
from pathlib import Path

from torch import nn
from yacs.config import CfgNode

from lib.errors import InputError, naming
from lib.runs.checkpoint import (
    check_target,
    not_finite,
    read_state,
    save_atomic,
    strip_wrappers,
)
from mdeq_vision.model import MDEQClsNet, MDEQSegNet

# Name prefixes of the parts that both kinds of model share; the heads differ.
BACKBONE = ("downsample.", "stage0.", "fullstage.")
# Of a classifier's head, what does not depend on the classes: all but the last layer.
_CLASSIFIER = ("incre_modules.", "downsamp_modules.", "final_layer.")


def extract_pretrained(checkpoint: str | Path, output: str | Path) -> list[str]:
    """Write the backbone's weights of a classification checkpoint, for MODEL.PRETRAINED.

    Returns:
        The names of the written tensors.

    Raises:
        InputError: the file is unreadable, has no backbone, or is the output; or weights are not
            finite.
    """
    check_target(checkpoint, output)
    state = strip_wrappers(read_state(checkpoint))
    backbone = {key: value for key, value in state.items() if key.startswith(BACKBONE)}
    if not any(key.startswith("fullstage.") for key in backbone):
        raise InputError(f"{checkpoint} holds no MDEQ model: none of its names begins 'fullstage.'")
    if bad := not_finite(backbone):
        raise InputError(f"the weights in {checkpoint} are not finite: {', '.join(bad)}")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    save_atomic(backbone, output)
    return list(backbone)


def load_pretrained(
    model: nn.Module, path: str | Path, log: Callable[[str], None] | None = None
) -> None:
    """Copy the weights in a file to ``model`` where name and shape agree, without its last layers.

    A segmentation model takes over the backbone alone. A classification model takes over all but
    ``classifier``: the file's classes may be others, even if there are as many. ``log`` gets lists
    of the names that were and were not taken over.

    Raises:
        InputError: the file is unreadable, no weight of f fits, or weights are not finite.
    """
    state = strip_wrappers(read_state(path), model)
    own = model.state_dict()
    parts = (*BACKBONE, *_CLASSIFIER) if isinstance(model, MDEQClsNet) else BACKBONE
    taken = {
        key: value
        for key, value in state.items()
        if key.startswith(parts) and key in own and value.shape == own[key].shape
    }
    if not any(key.startswith("fullstage.") for key in taken):
        example = next((k for k in own if k.startswith("fullstage.")), "")
        found = f", and finds {tuple(state[example].shape)}" if example in state else ""
        raise InputError(
            f"no weight of f in {path} fits this model by name and shape (it needs, for one, "
            f"{example} {tuple(own[example].shape)}{found}): extract it from a "
            "classification run of the same MODEL settings with tools/extract_pretrained.py"
        )
    if bad := not_finite(taken):
        raise InputError(f"the weights in {path} are not finite: {', '.join(bad)}")
    model.load_state_dict(taken, strict=False)
    if log is not None:
        _report(log, path, taken, state, own)


def _report(log, path, taken: dict, state: dict, own: dict) -> None:
    log(f"{path}: {len(taken)} of the model's {len(own)} tensors taken over")
    for title, keys in (
        ("taken over", taken),
        ("not taken over (left in the file)", [k for k in state if k not in taken]),
        ("not taken over (kept as initialised)", [k for k in own if k not in taken]),
    ):
        log(f"  {title}: {', '.join(keys) or 'none'}")
    if left := sum(key.startswith(BACKBONE) and key not in taken for key in own):
        log(
            f"warning: {left} tensors of the backbone keep their initial values: the MODEL "
            "settings differ from those of the file"
        )


def get_seg_net(cfg: CfgNode, log: Callable[[str], None] | None = None) -> MDEQSegNet:
    """Build the segmentation model of a configuration; load MODEL.PRETRAINED if it is set.

    Raises:
        InputError: the MODEL.PRETRAINED file is missing or does not fit.
    """
    model = MDEQSegNet(cfg)
    if cfg.MODEL.PRETRAINED:
        with naming("MODEL.PRETRAINED"):
            load_pretrained(model, cfg.MODEL.PRETRAINED, log)
    return model
