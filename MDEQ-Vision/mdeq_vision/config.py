"""Configuration: the defaults of all settings; merging a yaml file and the command line.

    cfg = config.clone()
    update_config(cfg, args)     # args.cfg, args.opts and the folder flags

A key that has no default here raises an InputError that names the nearest known key. Only
MODEL.EXTRA takes new keys; its section FULL_STAGE does not.
"""

import ast
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from yacs.config import CfgNode

from lib.deq import DEQ, SAME
from lib.errors import InputError, check, did_you_mean, is_number, naming
from lib.graphs import Graphs
from lib.solvers.precision import AMP
from mdeq_vision.schedules import OPTIMIZERS
from mdeq_vision.stage import check_keys
from mdeq_vision.start import STARTS
from mdeq_vision.yaml_files import read_yaml

CONFIG = "config.yaml"  # the resolved settings, in the run's folder
_NEVER = 100_000_000
_MOST, _DEEPEST = 10_000, 20  # values of a file of settings, and parts of a key


def _defaults() -> CfgNode:
    cfg = CfgNode()
    cfg.OUTPUT_DIR = ""  # a run's folder is OUTPUT_DIR/DATASET.DATASET/<name of the yaml file>
    cfg.LOG_DIR = ""  # TensorBoard events, in the same subfolders; "": in the run's folder
    cfg.DATA_DIR = ""  # put before DATASET.ROOT
    cfg.GPUS = [0]  # GPUs of one process; absent ones are ignored
    cfg.WORKERS = 4  # processes that load data
    cfg.PERCENT = 1.0  # fraction of the training batches used per epoch
    cfg.PRINT_FREQ = 20  # steps between two lines of the log
    cfg.SAVE_FREQ = 0  # steps between two checkpoints; 0: save at the end of an epoch only
    cfg.KEEP_CHECKPOINTS = 2  # number of newest checkpoints to keep
    cfg.MAX_TIME = 0.0  # minutes within which the run saves and stops; 0: no limit
    cfg.SEED = 1111
    cfg.AUTO_RESUME = False  # the same as TRAIN.RESUME
    cfg.PIN_MEMORY = True  # takes effect with a GPU

    # DETERMINISTIC: a run on a GPU repeats bit for bit, but slower; BENCHMARK then has no effect.
    cfg.CUDNN = CfgNode({"BENCHMARK": True, "DETERMINISTIC": False, "ENABLED": True})
    cfg.AMP = "none"  # bf16: f in bfloat16, solver states and losses in float32
    cfg.TF32 = False  # round the factors of float32 products on the GPU to TF32
    cfg.COMPILE = False  # compile f with torch.compile for the solvers' evaluations
    cfg.GRAPH = False  # on a GPU, take f and its products from CUDA graphs

    cfg.MODEL = CfgNode()
    cfg.MODEL.NAME = "mdeq"
    cfg.MODEL.INIT_WEIGHTS = True  # False leaves PyTorch's default initialisation
    cfg.MODEL.WNORM = False
    cfg.MODEL.PRETRAINED = ""  # weights to start from, without the last layers (transfer.py)
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
    cfg.DEQ.B_SOLVER = "broyden"  # "None": the forward solver
    cfg.DEQ.GRAD = "ift"  # gradient: name, or name:option=value,... as for solvers
    cfg.DEQ.F_START = "zero"  # where the solver begins: zero, or a learned guess of z* (start.py)
    cfg.DEQ.STOP_MODE = "abs"
    cfg.DEQ.RAND_F_THRES_DELTA = 2
    cfg.DEQ.F_THRES = 30
    cfg.DEQ.B_THRES = 40
    cfg.DEQ.SPECTRAL_RADIUS_MODE = False  # compute and print the spectral radius in evaluation

    cfg.LOSS = CfgNode()
    cfg.LOSS.JAC_LOSS_FREQ = 0.0
    cfg.LOSS.JAC_LOSS_WEIGHT = 0.0
    cfg.LOSS.JAC_INCREMENTAL = _NEVER  # steps per increase of the weight by 0.1; 0: no increase
    cfg.LOSS.JAC_STOP_EPOCH = _NEVER
    cfg.LOSS.PRETRAIN_JAC_LOSS_WEIGHT = 0.0
    cfg.LOSS.USE_OHEM = False
    cfg.LOSS.OHEMTHRES = 0.9
    cfg.LOSS.OHEMKEEP = 100_000  # least pixels kept, per process and part of its share of a batch

    cfg.DATASET = CfgNode()
    cfg.DATASET.ROOT = ""
    cfg.DATASET.DATASET = "imagenet"
    cfg.DATASET.TRAIN_SET = "train"
    cfg.DATASET.TEST_SET = "valid"
    cfg.DATASET.EXTRA_TRAIN_SET = ""  # list file for a second stage of segmentation training
    cfg.DATASET.NUM_CLASSES = 1000  # segmentation; classification uses MODEL.NUM_CLASSES
    cfg.DATASET.CLASSES = []  # their names in order, as the data must have them; [] accepts any
    cfg.DATASET.DATA_FORMAT = "jpg"  # unused; the published files set it
    cfg.DATASET.AUGMENT = True  # classification: random changes of training images

    cfg.TRAIN = CfgNode()
    cfg.TRAIN.IMAGE_SIZE = [1024, 512]  # (width, height) of a training crop
    cfg.TRAIN.BASE_SIZE = 2048  # long side of an image at scale 1, in pixels
    cfg.TRAIN.DOWNSAMPLERATE = 1  # crop size / label size
    cfg.TRAIN.FLIP = True  # segmentation only, like IMAGE_SIZE to SCALE_FACTOR
    cfg.TRAIN.MULTI_SCALE = True
    cfg.TRAIN.SCALE_FACTOR = 16
    cfg.TRAIN.CLIP = -1.0  # largest gradient norm; 0 or less does not clip
    cfg.TRAIN.LR_FACTOR = 0.1
    cfg.TRAIN.LR_STEP = [90, 110]
    cfg.TRAIN.LR = 0.001
    cfg.TRAIN.LR_SCHEDULER = "step"  # step, cosine, poly
    cfg.TRAIN.OPTIMIZER = "adam"  # adam, muon, sgd, rmsprop
    cfg.TRAIN.MOMENTUM = 0.9
    cfg.TRAIN.WD = 0.0001
    cfg.TRAIN.NESTEROV = False
    cfg.TRAIN.PRETRAIN_STEPS = 100_000
    cfg.TRAIN.IGNORE_LABEL = -1
    cfg.TRAIN.BEGIN_EPOCH = 0
    cfg.TRAIN.END_EPOCH = 140
    cfg.TRAIN.EXTRA_EPOCH = 0  # epochs over EXTRA_TRAIN_SET, after END_EPOCH
    cfg.TRAIN.EXTRA_LR = 0.001  # initial learning rate of these epochs
    cfg.TRAIN.RESUME = False  # continue the run in the run's folder, if there is one
    cfg.TRAIN.CHECKPOINT = ""  # a checkpoint of another folder to continue from
    cfg.TRAIN.MODEL_FILE = ""  # weights to start from
    cfg.TRAIN.BATCH_SIZE = 0  # over all devices; 0: BATCH_SIZE_PER_GPU on each device
    cfg.TRAIN.BATCH_SIZE_PER_GPU = 32
    cfg.TRAIN.BATCH_CHUNK = 1  # parts of a process's share of a batch, to save memory
    cfg.TRAIN.MAX_SKIPPED = 10  # this many non-finite steps in a row end the run
    cfg.TRAIN.SHUFFLE = True

    cfg.TEST = CfgNode()
    cfg.TEST.BATCH_SIZE_PER_GPU = 32
    cfg.TEST.IMAGE_SIZE = [2048, 1024]  # (width, height) of a window in sliding-window inference
    cfg.TEST.BASE_SIZE = 2048
    cfg.TEST.CENTER_CROP_TEST = False  # test only the central IMAGE_SIZE pixels of an image
    cfg.TEST.NUM_SAMPLES = 0  # at most this many images; 0: all
    cfg.TEST.FLIP_TEST = False
    cfg.TEST.MULTI_SCALE = False
    cfg.TEST.SCALE_LIST = [1]  # used with MULTI_SCALE
    cfg.TEST.MODEL_FILE = ""  # weights to evaluate; "": the best weights of the run

    cfg.DEBUG = CfgNode({"DEBUG": False})  # write nothing
    return cfg


config = _defaults()


def update_config(cfg: CfgNode, args) -> None:
    """Merge a yaml file, then ``KEY VALUE`` overrides, then the folder flags, into ``cfg``.

    Args:
        cfg: the defaults, changed in place and frozen.
        args: any object with some of the attributes ``cfg`` (path of the yaml file), ``opts``
            ([key, value, ...]), ``modelDir`` (OUTPUT_DIR), ``logDir`` (LOG_DIR), ``dataDir``
            (DATA_DIR), ``testModel`` (TEST.MODEL_FILE), ``percent`` (PERCENT) and ``max_time``
            (MAX_TIME).

    Raises:
        InputError: a missing file, a file that is not YAML, an override without a value, an
            unknown key, or a value of the wrong type or out of range.
    """
    merged = cfg.clone()  # an error leaves cfg as it was
    merged.defrost()
    if getattr(args, "cfg", None):
        merge_file(merged, args.cfg)
    # In the settings that a run saves, ROOT has DATA_DIR in front: another one may take its place.
    root, data_dir = Path(merged.DATASET.ROOT), merged.DATA_DIR
    if data_dir and root.is_relative_to(data_dir):
        merged.DATASET.ROOT = str(root.relative_to(data_dir))
    opts = list(getattr(args, "opts", None) or [])
    if len(opts) % 2:
        raise InputError(f"overrides are pairs KEY VALUE, but {opts[-1]!r} has no value")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        check(
            key.count(".") < _DEEPEST, "the key", f"{key[:40]}...", f"of at most {_DEEPEST} parts"
        )
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(merged, nested, "the command line")
    for flag, key in (("modelDir", "OUTPUT_DIR"), ("logDir", "LOG_DIR"), ("dataDir", "DATA_DIR")):
        if getattr(args, flag, None):
            merged[key] = str(getattr(args, flag))
    if getattr(args, "testModel", None):
        merged.TEST.MODEL_FILE = str(args.testModel)
    for flag, key in (("percent", "PERCENT"), ("max_time", "MAX_TIME")):
        if getattr(args, flag, None) is not None:
            merged[key] = float(getattr(args, flag))
    root, data_dir = Path(merged.DATASET.ROOT), merged.DATA_DIR
    if data_dir and not root.is_relative_to(data_dir):
        merged.DATASET.ROOT = str(data_dir / root)
    _check_values(merged)
    cfg.defrost()
    cfg.update(merged)
    cfg.freeze()


def merge_file(cfg: CfgNode, path: str | Path) -> None:
    """Merge a yaml file into ``cfg``; error messages name the file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no configuration file {path}: the published ones lie in experiments/")
    content = read_yaml(path, most=_MOST)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds no settings: expected lines KEY: value")
    _merge(cfg, content, str(path))


def config_of(settings: Mapping, source: str) -> CfgNode:
    """The defaults, changed by the sections of settings that an exported model holds; frozen.

    Raises:
        InputError: a key is unknown, or a value is wrong; the message names ``source``.
    """
    cfg = config.clone()
    cfg.defrost()
    _merge(cfg, settings, source)
    with naming(source):
        _check_values(cfg)
    cfg.freeze()
    return cfg


def flat(cfg: CfgNode, prefix: str = "") -> dict:
    """Return all settings by their full names, such as TRAIN.LR."""
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
        is_open = cfg.is_new_allowed()
        if not isinstance(key, str) or (key not in cfg and not is_open):
            raise InputError(_unknown(name, value, source, root))
        old = cfg.get(key)
        if is_open:
            value = _literal(value)
            _check_plain(name, value, source)
        if isinstance(old, CfgNode) or (old is None and isinstance(value, Mapping)):
            if not isinstance(value, Mapping):
                raise InputError(f"{name} in {source} is {value!r}, but it is a section of keys")
            if old is None:
                cfg[key] = CfgNode(new_allowed=True)
            _merge(cfg[key], value, source, f"{name}.", root)
        elif isinstance(value, Mapping):
            raise InputError(f"{name} in {source} is not a section of keys")
        elif is_open:
            cfg[key] = value
        else:
            cfg[key] = _coerce(name, value, old, source)


def _unknown(name: str, value, source: str, root: CfgNode) -> str:
    while isinstance(value, Mapping) and len(value) == 1:  # override in an unknown section
        ((key, value),) = value.items()
        name += f".{key}"
    return f"unknown key {name} in {source}{did_you_mean(name.upper(), flat(root))}"


def _literal(value):
    """Parse text as a Python literal if possible, also true and false in any case.

    A tuple becomes a list.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = {"true": True, "false": False}.get(value.lower(), value)
    return list(value) if isinstance(value, tuple) else value


def _check_plain(name: str, value, source: str) -> None:
    """Refuse a number that no program here can hold, a text that no file name can be, an object."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, Mapping):
            parts += [*part, *part.values()]
        elif isinstance(part, float):
            check(math.isfinite(part), f"{name} in {source}", part, "finite")
        elif is_number(part):
            limit = 63 if name == "SEED" else 31
            if abs(part) >= 2**limit:  # and perhaps too long to be shown
                raise InputError(f"{name} in {source} is a number beyond 2^{limit}: lower it")
        elif isinstance(part, str):
            check("\0" not in part, f"{name} in {source}", part, "text without a zero byte")
        else:
            fits = part is None or isinstance(part, bool)
            check(fits, f"{name} in {source}", part, "a number, a text or a list of them")


def _coerce(name: str, value, old, source: str):
    """Convert ``value`` to the type of the default ``old``; text is parsed by ``_literal``."""
    literal = _literal(value)
    # Keep "2024" as text (it may name a folder), but unquote '""' to the empty text.
    as_written = isinstance(old, str) and isinstance(value, str) and not isinstance(literal, str)
    value = value if as_written else literal
    number = is_number(value)
    if number or isinstance(value, (str, list)):
        _check_plain(name, value, source)
    if isinstance(old, float) and number:
        return float(value)
    if name == "MODEL.EXPANSION_FACTOR" and number:
        return value
    if isinstance(old, list) and number:
        return [value]
    if type(value) is type(old):
        return value
    wanted = {bool: "True or False", int: "an integer", float: "a number", list: "a list"}
    accepted = wanted.get(type(old), "text")
    raise InputError(f"{name} in {source} is {value!r}, but must be {accepted}")


def make_deq(cfg: CfgNode) -> DEQ:
    """The solver and the gradient that the section DEQ describes.

    Raises:
        InputError: a name, an option or a threshold cannot be used.
    """
    own = cfg.DEQ
    b_solver = SAME if own.B_SOLVER == "None" else own.B_SOLVER
    with naming("DEQ.F_SOLVER, DEQ.B_SOLVER, DEQ.GRAD and DEQ.STOP_MODE"):
        deq = DEQ(own.F_SOLVER, b_solver, stop_mode=own.STOP_MODE, grad=own.GRAD)
    deq.graphs = Graphs() if cfg.GRAPH else None
    # Training draws thresholds of at most F_THRES + 1.
    deq.grad.refuse_threshold(own.F_THRES, "DEQ.F_THRES", more=1)
    return deq


def _integers(values: list, least: int) -> bool:
    return all(type(v) is int and v >= least for v in values)


# The accepted values in words, their test, and the keys. Models and data sets check more.
_RANGES: list[tuple[str, Callable, str]] = [
    (
        "at least 1",
        lambda v: v >= 1,
        "PRINT_FREQ KEEP_CHECKPOINTS DEQ.F_THRES DEQ.B_THRES TRAIN.BATCH_SIZE_PER_GPU "
        "TRAIN.BATCH_CHUNK TRAIN.MAX_SKIPPED TEST.BATCH_SIZE_PER_GPU TEST.BASE_SIZE",
    ),
    (
        "0 or more",
        lambda v: v >= 0,
        "SAVE_FREQ MAX_TIME WORKERS DEQ.RAND_F_THRES_DELTA LOSS.JAC_LOSS_WEIGHT "
        "LOSS.PRETRAIN_JAC_LOSS_WEIGHT LOSS.OHEMKEEP TRAIN.WD TRAIN.BEGIN_EPOCH TRAIN.END_EPOCH "
        "TRAIN.EXTRA_EPOCH TRAIN.BATCH_SIZE TRAIN.PRETRAIN_STEPS TRAIN.SCALE_FACTOR "
        "TEST.NUM_SAMPLES",
    ),
    ("above 0", lambda v: v > 0, "MODEL.EXPANSION_FACTOR TRAIN.LR_FACTOR TRAIN.LR TRAIN.EXTRA_LR"),
    ("above 0 and at most 1", lambda v: 0 < v <= 1, "PERCENT LOSS.OHEMTHRES"),
    ("between 0 and 1", lambda v: 0 <= v <= 1, "LOSS.JAC_LOSS_FREQ"),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, "MODEL.DROPOUT TRAIN.MOMENTUM"),
    ("between 0 and 2**63 - 1", lambda v: 0 <= v < 2**63, "SEED"),
    ("at most 1024", lambda v: v <= 1024, "WORKERS"),
    ("numbers of GPUs, such as (0,1)", lambda v: v and _integers(v, 0), "GPUS"),
    ("a list of names", lambda v: all(isinstance(name, str) for name in v), "DATASET.CLASSES"),
    ("a list of epochs", lambda v: _integers(v, 0), "TRAIN.LR_STEP"),
    ("numbers above 0", lambda v: v and all(0 < s < math.inf for s in v), "TEST.SCALE_LIST"),
    (
        "two sizes, such as [1024, 512]",
        lambda v: len(v) == 2 and _integers(v, 1),
        "MODEL.IMAGE_SIZE TRAIN.IMAGE_SIZE TEST.IMAGE_SIZE",
    ),
    (" or ".join(AMP), lambda v: v in AMP, "AMP"),
    (" or ".join(STARTS), lambda v: v in STARTS, "DEQ.F_START"),
    ("mdeq", lambda v: v == "mdeq", "MODEL.NAME"),
    (" or ".join(OPTIMIZERS), lambda v: v in OPTIMIZERS, "TRAIN.OPTIMIZER"),
    ("step, cosine or poly", lambda v: v in ("step", "cosine", "poly"), "TRAIN.LR_SCHEDULER"),
]


def _check_values(cfg: CfgNode) -> None:
    values = flat(cfg)
    for what, accepts, keys in _RANGES:
        for key in keys.split():
            try:
                good = accepts(values[key])
            except TypeError:
                good = False
            check(good, key, values[key], what)
    for key, value in values.items():
        check(not isinstance(value, float) or math.isfinite(value), key, value, "finite")
    make_deq(cfg)
    check_keys(cfg)
    train = cfg.TRAIN
    end = train.END_EPOCH + train.EXTRA_EPOCH
    if 0 < train.BEGIN_EPOCH >= end:
        raise InputError(
            f"TRAIN.BEGIN_EPOCH {train.BEGIN_EPOCH} leaves no epoch: the last one ends at {end}"
        )
    if train.OPTIMIZER == "sgd" and train.NESTEROV and train.MOMENTUM == 0:
        raise InputError("TRAIN.NESTEROV needs a TRAIN.MOMENTUM above 0")
    extra_set = cfg.DATASET.EXTRA_TRAIN_SET
    if extra_set and not train.EXTRA_EPOCH:
        raise InputError(
            f"DATASET.EXTRA_TRAIN_SET {extra_set} is never used while TRAIN.EXTRA_EPOCH is 0"
        )
    if train.EXTRA_EPOCH and not extra_set:
        raise InputError(
            f"TRAIN.EXTRA_EPOCH {train.EXTRA_EPOCH} needs a list in DATASET.EXTRA_TRAIN_SET"
        )
