"""Configuration: the defaults of all settings, and how a yaml file and the command line merge.

    cfg = config.clone()
    update_config(cfg, args)     # args.cfg, args.opts and the folder flags

Every key that is not here is refused, with the nearest one that is. Only MODEL.EXTRA is open.
"""

import ast
import difflib
from collections.abc import Mapping
from pathlib import Path

import yaml
from yacs.config import CfgNode

from lib.errors import InputError

_NEVER = 100_000_000


def _defaults() -> CfgNode:
    cfg = CfgNode()
    cfg.OUTPUT_DIR = ""  # runs lie in OUTPUT_DIR/DATASET.DATASET/<name of the yaml file>
    cfg.LOG_DIR = ""  # TensorBoard events, in the same subfolders; "" puts them beside the run
    cfg.DATA_DIR = ""  # put before DATASET.ROOT
    cfg.GPUS = [0]  # devices of one process, where there are any
    cfg.WORKERS = 4  # processes that load data
    cfg.PERCENT = 1.0  # share of the training batches used per epoch
    cfg.PRINT_FREQ = 20  # steps between two lines of the log
    cfg.SAVE_FREQ = 0  # steps between two checkpoints; 0 saves at the end of an epoch only
    cfg.SEED = 1111
    cfg.AUTO_RESUME = False  # the same as TRAIN.RESUME
    cfg.PIN_MEMORY = True  # takes effect with a GPU

    cfg.CUDNN = CfgNode({"BENCHMARK": True, "DETERMINISTIC": False, "ENABLED": True})

    cfg.MODEL = CfgNode()
    cfg.MODEL.NAME = "mdeq"
    cfg.MODEL.INIT_WEIGHTS = True  # False leaves PyTorch's default initialisation
    cfg.MODEL.WNORM = False
    cfg.MODEL.PRETRAINED = ""  # weights that segmentation starts from (extract_pretrained.py)
    cfg.MODEL.NUM_LAYERS = 5  # applications of f in the stacked phase
    cfg.MODEL.NUM_GROUPS = 4
    cfg.MODEL.DROPOUT = 0.0
    cfg.MODEL.NUM_CLASSES = 1000
    cfg.MODEL.DOWNSAMPLE_TIMES = 2
    cfg.MODEL.EXPANSION_FACTOR = 5  # an integer or a fraction
    cfg.MODEL.BLOCK_GN_AFFINE = True
    cfg.MODEL.FUSE_GN_AFFINE = True
    cfg.MODEL.POST_GN_AFFINE = True
    cfg.MODEL.IMAGE_SIZE = [256, 256]
    cfg.MODEL.EXTRA = CfgNode(new_allowed=True)

    cfg.DEQ = CfgNode()
    cfg.DEQ.F_SOLVER = "broyden"
    cfg.DEQ.B_SOLVER = "broyden"
    cfg.DEQ.STOP_MODE = "abs"
    cfg.DEQ.RAND_F_THRES_DELTA = 2
    cfg.DEQ.F_THRES = 30
    cfg.DEQ.B_THRES = 40
    cfg.DEQ.SPECTRAL_RADIUS_MODE = False  # print it in validation

    cfg.LOSS = CfgNode()
    cfg.LOSS.JAC_LOSS_FREQ = 0.0
    cfg.LOSS.JAC_LOSS_WEIGHT = 0.0
    cfg.LOSS.JAC_INCREMENTAL = _NEVER  # steps after which the weight grows by 0.1; 0: never
    cfg.LOSS.JAC_STOP_EPOCH = _NEVER
    cfg.LOSS.PRETRAIN_JAC_LOSS_WEIGHT = 0.0
    cfg.LOSS.USE_OHEM = False
    cfg.LOSS.OHEMTHRES = 0.9
    cfg.LOSS.OHEMKEEP = 100_000

    cfg.DATASET = CfgNode()
    cfg.DATASET.ROOT = ""
    cfg.DATASET.DATASET = "imagenet"
    cfg.DATASET.TRAIN_SET = "train"
    cfg.DATASET.TEST_SET = "val"
    cfg.DATASET.NUM_CLASSES = 1000  # of segmentation
    cfg.DATASET.DATA_FORMAT = "jpg"
    cfg.DATASET.AUGMENT = True

    cfg.TRAIN = CfgNode()
    cfg.TRAIN.IMAGE_SIZE = [1024, 512]  # (width, height) of a training crop
    cfg.TRAIN.BASE_SIZE = 2048  # long side of an image at scale 1
    cfg.TRAIN.DOWNSAMPLERATE = 1
    cfg.TRAIN.FLIP = True
    cfg.TRAIN.MULTI_SCALE = True
    cfg.TRAIN.SCALE_FACTOR = 16
    cfg.TRAIN.CLIP = -1.0  # largest gradient norm; 0 or less does not clip
    cfg.TRAIN.LR_FACTOR = 0.1
    cfg.TRAIN.LR_STEP = [90, 110]
    cfg.TRAIN.LR = 0.001
    cfg.TRAIN.LR_SCHEDULER = "step"  # step, cosine, poly
    cfg.TRAIN.OPTIMIZER = "adam"  # adam, sgd, rmsprop
    cfg.TRAIN.MOMENTUM = 0.9
    cfg.TRAIN.WD = 0.0001
    cfg.TRAIN.NESTEROV = False
    cfg.TRAIN.PRETRAIN_STEPS = 100_000
    cfg.TRAIN.IGNORE_LABEL = -1
    cfg.TRAIN.BEGIN_EPOCH = 0
    cfg.TRAIN.END_EPOCH = 140
    cfg.TRAIN.RESUME = False  # continue the run in the folder, if it holds one
    cfg.TRAIN.CHECKPOINT = ""  # a checkpoint to continue from, wherever it lies
    cfg.TRAIN.MODEL_FILE = ""  # weights to start from
    cfg.TRAIN.BATCH_SIZE_PER_GPU = 32
    cfg.TRAIN.SHUFFLE = True

    cfg.TEST = CfgNode()
    cfg.TEST.BATCH_SIZE_PER_GPU = 32
    cfg.TEST.IMAGE_SIZE = [2048, 1024]  # (width, height) of a window in sliding-window inference
    cfg.TEST.BASE_SIZE = 2048
    cfg.TEST.NUM_SAMPLES = 0  # images at most; 0 is all
    cfg.TEST.FLIP_TEST = False
    cfg.TEST.MULTI_SCALE = False
    cfg.TEST.SCALE_LIST = [1]  # with MULTI_SCALE
    cfg.TEST.MODEL_FILE = ""  # weights to evaluate; "" takes the best of the run

    cfg.DEBUG = CfgNode({"DEBUG": False})  # write nothing
    return cfg


config = _defaults()


def update_config(cfg: CfgNode, args) -> None:
    """Merge a yaml file, then ``KEY VALUE`` overrides, then the folder flags, into ``cfg``.

    Args:
        cfg: the defaults, changed in place and frozen.
        args: any object with some of the attributes ``cfg`` (path of the yaml file), ``opts``
            ([key, value, ...]), ``modelDir`` (OUTPUT_DIR), ``logDir`` (LOG_DIR), ``dataDir``
            (DATA_DIR), ``testModel`` (TEST.MODEL_FILE) and ``percent`` (PERCENT).

    Raises:
        InputError: no such file, not YAML, an unknown key, or a value of another type.
    """
    cfg.defrost()
    if getattr(args, "cfg", None):
        merge_file(cfg, args.cfg)
    opts = list(getattr(args, "opts", None) or [])
    if len(opts) % 2:
        raise InputError(f"overrides are pairs KEY VALUE, but {opts[-1]!r} has no value")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(cfg, nested, "the command line")
    for flag, key in (("modelDir", "OUTPUT_DIR"), ("logDir", "LOG_DIR"), ("dataDir", "DATA_DIR")):
        if getattr(args, flag, None):
            cfg[key] = str(getattr(args, flag))
    if getattr(args, "testModel", None):
        cfg.TEST.MODEL_FILE = str(args.testModel)
    if getattr(args, "percent", None) is not None:
        cfg.PERCENT = float(args.percent)
    if cfg.DATA_DIR:
        cfg.DATASET.ROOT = str(Path(cfg.DATA_DIR) / cfg.DATASET.ROOT)
    _check_values(cfg)
    cfg.freeze()


def merge_file(cfg: CfgNode, path: str | Path) -> None:
    """Merge a yaml file into ``cfg``; its errors name the file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no configuration file {path}: the published ones lie in experiments/")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds no settings: expected lines KEY: value")
    _merge(cfg, content, str(path))


def flat(cfg: CfgNode, prefix: str = "") -> dict:
    """All settings by their full names, such as TRAIN.LR."""
    found = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _merge(cfg: CfgNode, new: Mapping, source: str, section: str = "", root=None) -> None:
    root = cfg if root is None else root
    for key, value in new.items():
        name = f"{section}{key}"
        if key not in cfg and not cfg.is_new_allowed():
            near = difflib.get_close_matches(name, flat(root), n=1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown key {name} in {source}{hint}")
        old = cfg.get(key)
        if isinstance(old, CfgNode) or (key not in cfg and isinstance(value, Mapping)):
            if not isinstance(value, Mapping):
                raise InputError(f"{name} in {source} is {value!r}, but it is a section of keys")
            if key not in cfg:
                cfg[key] = CfgNode(new_allowed=True)
            _merge(cfg[key], value, source, f"{name}.", root)
        else:
            cfg[key] = _coerce(name, value, old, cfg.is_new_allowed(), source)


def _coerce(name: str, value, old, anything: bool, source: str):
    """``value`` in the type of the setting ``old``; text is read as a Python literal first."""
    if isinstance(value, str):
        try:
            literal = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            literal = {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(old, str) and not isinstance(literal, str):
            return value  # a folder may be named 2024
        value = literal
    if isinstance(value, tuple):
        value = list(value)
    if anything:
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(old, float) and is_number:
        return float(value)
    if name == "MODEL.EXPANSION_FACTOR" and is_number:
        return value
    if isinstance(old, list) and is_number:
        return [value]
    if type(value) is type(old):
        return value
    wanted = {bool: "True or False", int: "an integer", float: "a number", list: "a list"}
    raise InputError(
        f"{name} in {source} is {value!r}, but must be {wanted.get(type(old), 'text')}"
    )


# (key, test, what is accepted); what a model or data set needs beyond that, it checks itself.
_RANGES = [
    ("PERCENT", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("PRINT_FREQ", lambda v: v >= 1, "at least 1"),
    ("SAVE_FREQ", lambda v: v >= 0, "0 or more"),
    ("SEED", lambda v: 0 <= v < 2**63, "between 0 and 2**63 - 1"),
    ("WORKERS", lambda v: v >= 0, "0 or more"),
    ("DEQ.STOP_MODE", lambda v: v in ("abs", "rel"), "'abs' or 'rel'"),
    ("DEQ.F_THRES", lambda v: v >= 1, "at least 1"),
    ("DEQ.B_THRES", lambda v: v >= 1, "at least 1"),
    ("DEQ.RAND_F_THRES_DELTA", lambda v: v >= 0, "0 or more"),
    ("LOSS.JAC_LOSS_FREQ", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("TRAIN.OPTIMIZER", lambda v: v in ("adam", "sgd", "rmsprop"), "adam, sgd or rmsprop"),
    ("TRAIN.LR_SCHEDULER", lambda v: v in ("step", "cosine", "poly"), "step, cosine or poly"),
    ("TRAIN.LR", lambda v: v > 0, "above 0"),
    ("TRAIN.BATCH_SIZE_PER_GPU", lambda v: v >= 1, "at least 1"),
    ("TRAIN.PRETRAIN_STEPS", lambda v: v >= 0, "0 or more"),
    ("TRAIN.SCALE_FACTOR", lambda v: v >= 0, "0 or more"),
    ("TEST.BATCH_SIZE_PER_GPU", lambda v: v >= 1, "at least 1"),
    ("TEST.NUM_SAMPLES", lambda v: v >= 0, "0 or more"),
    ("TEST.SCALE_LIST", lambda v: v and all(s > 0 for s in v), "a list of numbers above 0"),
    *(
        (key, lambda v: len(v) == 2 and min(v) >= 1, "two sizes, such as [1024, 512]")
        for key in ("MODEL.IMAGE_SIZE", "TRAIN.IMAGE_SIZE", "TEST.IMAGE_SIZE")
    ),
]


def _check_values(cfg: CfgNode) -> None:
    values = flat(cfg)
    for key, accepts, what in _RANGES:
        value = values[key]
        try:
            good = accepts(value)
        except TypeError:
            good = False
        if not good:
            raise InputError(f"{key} is {value!r}, but must be {what}")
