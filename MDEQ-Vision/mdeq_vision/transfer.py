"""From a classification model to a segmentation model: extracting and taking over weights."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from yacs.config import CfgNode

from lib.checkpoint import not_finite, read_state, save_atomic, strip_wrappers
from lib.errors import InputError, naming
from mdeq_vision.model import MDEQSegNet

# The parts that both kinds of model have; the heads are their own.
BACKBONE = ("downsample.", "stage0.", "fullstage.")


def extract_pretrained(checkpoint: str | Path, output: str | Path) -> list[str]:
    """Write the backbone's weights of a classification checkpoint, for MODEL.PRETRAINED.

    Args:
        checkpoint: a state dict file or checkpoint, ours or a published one.
        output: the file to write: a plain state dict.

    Returns:
        The names that were written.

    Raises:
        InputError: an unreadable file, one without a backbone, or weights that are not finite.
    """
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
    """Start ``model`` from the backbone weights in a file, where names and shapes agree.

    The head is the model's own and keeps its initial weights. ``log`` is given the lists of what
    was and what was not taken over.

    Raises:
        InputError: an unreadable file, nothing in it that fits, or weights that are not finite.
    """
    state = strip_wrappers(read_state(path), model)
    own = model.state_dict()
    taken = {
        key: value
        for key, value in state.items()
        if key.startswith(BACKBONE) and key in own and value.shape == own[key].shape
    }
    if not any(key.startswith("fullstage.") for key in taken):
        example = next((k for k in own if k.startswith("fullstage.")), "")
        raise InputError(
            f"no weight of f in {path} fits this model by name and shape (it needs, for one, "
            f"{example} {tuple(own[example].shape)}{_found(state, example)}): extract it from a "
            "classification run of the same MODEL settings with tools/extract_pretrained.py"
        )
    if bad := not_finite(taken):
        raise InputError(f"the weights in {path} are not finite: {', '.join(bad)}")
    model.load_state_dict(taken, strict=False)
    if log is not None:
        _report(log, path, taken, state, own)


def _found(state: dict[str, Tensor], key: str) -> str:
    return f", and finds {tuple(state[key].shape)}" if key in state else ""


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
    """The segmentation model of a configuration, started from MODEL.PRETRAINED if that is set.

    Raises:
        InputError: a missing or unfit MODEL.PRETRAINED file.
    """
    model = MDEQSegNet(cfg)
    if cfg.MODEL.PRETRAINED:
        with naming("MODEL.PRETRAINED"):
            load_pretrained(model, cfg.MODEL.PRETRAINED, log)
    return model
