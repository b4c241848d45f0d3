"""A run's own settings, for its evaluation: what was trained is what is evaluated."""

import argparse
from collections.abc import Callable
from pathlib import Path

from yacs.config import CfgNode

from lib.errors import naming
from mdeq_vision.config import config, flat, update_config

# Where the command line and the run differ, an evaluation follows the command line in the settings
# that begin so.
CHOSEN = (
    *("DATA_DIR", "DATASET.DATASET", "DATASET.ROOT", "DATASET.TEST_SET", "MODEL.IMAGE_SIZE"),
    "DATASET.CLASSES",
    *("DEQ.", "TEST.", "AMP", "TF32", "COMPILE", "CUDNN.", "GPUS", "WORKERS", "PIN_MEMORY", "SEED"),
)
# These belong to a process, not to a run: only the yaml file and the command line set them.
_OF_THE_PROCESS = ("OUTPUT_DIR", "LOG_DIR", "DEBUG.DEBUG", "TEST.MODEL_FILE")
# No evaluation depends on the settings that begin so, so that none of their differences counts.
_IDLE = (
    *("TRAIN.", "LOSS.", "PERCENT", "PRINT_FREQ", "SAVE_FREQ", "KEEP_CHECKPOINTS", "MAX_TIME"),
    *("AUTO_RESUME", "DATASET.TRAIN_SET", "DATASET.EXTRA_TRAIN_SET", "DATASET.AUGMENT"),
    *("MODEL.PRETRAINED", "MODEL.INIT_WEIGHTS", "MODEL.NUM_LAYERS", "MODEL.DROPOUT"),
)
_COUNTS = ("TRAIN.IGNORE_LABEL",)  # although it begins as idle ones do


def evaluation_config(
    args: argparse.Namespace, asked: CfgNode, own: Path, log: Callable[[str], None]
) -> CfgNode:
    """The settings of an evaluation: those that the run saved, where it has any.

    The command line overrides the settings in :data:`CHOSEN`; the yaml file that it names only
    finds the run. ``log`` gets a line on every difference that is left between the run, what
    ``asked`` says, and what is evaluated.

    Args:
        args: the command line, as for :func:`~mdeq_vision.config.update_config`.
        asked: the configuration that it describes.
        own: the file of the run's settings, beside the weights to evaluate.

    Raises:
        InputError: the saved settings cannot be used.
    """
    if not own.is_file():
        if not asked.TEST.MODEL_FILE:
            log(f"note: {own} is missing, so the settings are those of {args.cfg}")
        return asked
    cfg, of_run = config.clone(), config.clone()
    with naming(str(own)):
        update_config(of_run, argparse.Namespace(cfg=own))
    pairs = zip(args.opts[::2], args.opts[1::2], strict=True)
    opts = [word for key, value in pairs if key.startswith(CHOSEN) for word in (key, value)]
    update_config(cfg, argparse.Namespace(cfg=own, opts=opts, dataDir=args.dataDir))
    cfg.defrost()
    for name in _OF_THE_PROCESS:
        *sections, key = name.split(".")
        target, source = cfg, asked
        for section in sections:
            target, source = target[section], source[section]
        target[key] = source[key]
    cfg.freeze()
    ran, wanted = flat(of_run), flat(asked)
    for key, now in flat(cfg).items():
        if key in _OF_THE_PROCESS or (key.startswith(_IDLE) and key not in _COUNTS):
            continue
        if now != ran.get(key):
            log(f"note: {key} is {now!r} in this evaluation, and {ran.get(key)!r} in the run")
        elif now != wanted.get(key) and key != "DATASET.CLASSES":  # which no yaml file needs
            log(f"note: {key} is {now!r}, as in the run, and not {wanted.get(key)!r}")
    return cfg
