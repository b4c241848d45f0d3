"""The commands of tools/: read the configuration, set up, then train or evaluate."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from yacs.config import CfgNode

from lib.errors import InputError, naming
from lib.gradients import unused_settings
from lib.runs.checkpoint import load_weights
from lib.runs.command_line import Parser, exit_code
from lib.runs.determinism import deterministic
from lib.runs.interrupts import Stopping, memory_for
from lib.runs.processes import Processes
from lib.runs.retention import versions
from lib.runs.run_folder import CHECKPOINT, WEIGHTS, Run, check_unused
from lib.runs.run_training import Job, Plan, Settings, run_training
from lib.solvers.precision import allow_tf32
from mdeq_vision.class_predictions import Prediction, class_table, write_predictions
from mdeq_vision.classes_file import CLASSES, as_text, classes_of
from mdeq_vision.config import CONFIG, config, flat, merge_file, update_config
from mdeq_vision.datasets import (
    NAMED_BY_FILES,
    WITH_VALIDATION,
    class_names,
    get_cls_dataset,
    get_seg_dataset,
)
from mdeq_vision.datasets.cityscapes_lists import write_lists
from mdeq_vision.evaluation import (
    LESS_MEMORY,
    Evaluation,
    evaluate_classification,
    evaluate_segmentation,
)
from mdeq_vision.image_trainer import RESUME, ImageTrainer
from mdeq_vision.model import MDEQNet, MDEQSegNet, get_cls_net
from mdeq_vision.options import experiment_parser
from mdeq_vision.own_settings import evaluation_config
from mdeq_vision.pictures import save_prediction
from mdeq_vision.stage import unused_keys
from mdeq_vision.summary import model_summary
from mdeq_vision.tasks import ClassificationTrainer, SegmentationTrainer
from mdeq_vision.transfer import extract_pretrained, get_seg_net, load_pretrained

PREDICTIONS = "predictions"  # of seg_test and cls_valid, in the run's folder
_MOST_CLASSES = 100  # that cls_valid prints one by one
_MOST_SAVED = 5_000  # whose names a run saves: a file of settings must stay readable
_Log = Callable[[str], None]


def extract(argv: list[str] | None = None) -> int:
    """Run tools/extract_pretrained.py; return its exit code."""

    def action():
        parser = Parser(
            prog="extract_pretrained.py",
            description="Write the backbone of a classification checkpoint for MODEL.PRETRAINED.",
        )
        parser.add_argument("checkpoint", help="checkpoint.pt or model.pt of a classification run")
        parser.add_argument(
            "output", help="file to write, such as pretrained_models/mdeq_SMALL.pth"
        )
        args = parser.parse_args(argv)
        names = extract_pretrained(args.checkpoint, args.output)
        print(f"{args.output}: {len(names)} tensors of {args.checkpoint}, without its head")

    return exit_code("extract_pretrained.py", action)


def make_cityscapes_lists(argv: list[str] | None = None) -> int:
    """Run tools/make_cityscapes_lists.py; return its exit code."""

    def action():
        parser = Parser(
            prog="make_cityscapes_lists.py",
            description="Write ROOT/list/cityscapes/{train,val,trainval,test}.lst for the images "
            "in ROOT/cityscapes/leftImg8bit and the labels in ROOT/cityscapes/gtFine.",
        )
        parser.add_argument("root", nargs="?", default="data/", help="DATASET.ROOT (data/)")
        for path, count in write_lists(parser.parse_args(argv).root).items():
            print(f"{path}: {count} images")

    return exit_code("make_cityscapes_lists.py", action)


def run_folder(cfg: CfgNode, cfg_file: str | Path) -> Path:
    """The folder of a run: OUTPUT_DIR/DATASET.DATASET/<name of the yaml file>."""
    return Path(cfg.OUTPUT_DIR or "output") / cfg.DATASET.DATASET / Path(cfg_file).stem


def load_config(args: argparse.Namespace) -> CfgNode:
    """Return the configuration that a command line describes."""
    cfg = config.clone()
    update_config(cfg, args)
    return cfg


def _devices(cfg: CfgNode, processes: Processes) -> tuple[torch.device, list[int]]:
    """Apply SEED, CUDNN and TF32; return the first device of this process, and its GPUs.

    A single process has all available GPUs of the setting GPUS; one of several processes has one.
    """
    torch.manual_seed(cfg.SEED)  # the same initial weights in all processes
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.enabled = cfg.CUDNN.BENCHMARK, cfg.CUDNN.ENABLED
    deterministic(cfg.CUDNN.DETERMINISTIC)
    allow_tf32(cfg.TF32)
    if not torch.cuda.is_available():
        return torch.device("cpu"), []
    count = torch.cuda.device_count()
    if processes.world_size > 1:
        gpus = [processes.gpu().index]
    else:
        gpus = [gpu for gpu in cfg.GPUS if 0 <= gpu < count] or [0]
    torch.cuda.set_device(gpus[0])
    return torch.device("cuda", gpus[0]), gpus


# ---- training ----------------------------------------------------------------------------------


def train_classifier(
    cfg: CfgNode, cfg_file: Path, processes: Processes, resume: str = RESUME
) -> Path | None:
    """Train a classification model as the configuration says; arguments as for :func:`_train`."""
    _refuse_other_task(cfg, "classification")

    def build(anew: bool, log: _Log):
        splits = ("train", "valid")
        data = processes.in_turn(lambda: [get_cls_dataset(cfg, split) for split in splits])
        for line in _class_lines(cfg, data[1]):
            log(line)
        model = get_cls_net(cfg)
        if anew and cfg.MODEL.PRETRAINED:
            with naming("MODEL.PRETRAINED"):
                load_pretrained(model, cfg.MODEL.PRETRAINED, log)
        return model, *data

    task = ClassificationTrainer
    return _train(cfg, cfg_file, processes, task, build, cfg.MODEL.IMAGE_SIZE, resume)


def train_segmenter(
    cfg: CfgNode, cfg_file: Path, processes: Processes, resume: str = RESUME
) -> Path | None:
    """Train a segmentation model as the configuration says; arguments as for :func:`_train`."""
    _refuse_other_task(cfg, "segmentation")

    def build(anew: bool, log: _Log):
        splits = ("train", "valid", *(["extra"] if cfg.TRAIN.EXTRA_EPOCH else []))
        data = processes.in_turn(lambda: [get_seg_dataset(cfg, split) for split in splits])
        if not data[1].has_labels:
            raise InputError(f"DATASET.TEST_SET {cfg.DATASET.TEST_SET} names images without labels")
        for line in dict.fromkeys(note for dataset in data for note in dataset.notes):
            log(line)
        return (get_seg_net(cfg, log) if anew else MDEQSegNet(cfg)), *data

    task = SegmentationTrainer
    return _train(cfg, cfg_file, processes, task, build, cfg.TRAIN.IMAGE_SIZE, resume)


def _train(
    cfg: CfgNode,
    cfg_file: Path,
    processes: Processes,
    task: type[ImageTrainer],
    build: Callable[[bool, _Log], tuple],
    image_size: list[int],
    resume: str,
) -> Path | None:
    """Build a trainer, start or resume the run, and train.

    Args:
        task: the trainer's class.
        build: ``build(anew, log)`` returns the model, the training set, the validation set, and
            with a second stage its data set. ``anew`` is False when a checkpoint is resumed.
        image_size: (width, height) for the summary of the model.
        resume: what a user adds to continue a run, for messages.

    Returns:
        The run's folder; None if this process writes none.
    """
    stopping = Stopping(cfg.MAX_TIME)
    folder = run_folder(cfg, cfg_file)
    file = processes.lead(lambda: _checkpoint_to_resume(cfg, folder, resume))

    def job(anew: bool) -> Job:
        device, gpus = _devices(cfg, processes)
        notes: list[str] = []
        model, train_set, valid_set, *extra = build(anew, notes.append)
        processes.vary_seed(cfg.SEED)
        model = model.to(device)
        if task.one_gpu and len(gpus) > 1:
            notes.append(
                f"note: segmentation runs one process per GPU; for the {len(gpus)} of GPUS, start "
                f"it with torchrun --nproc_per_node={len(gpus)}"
            )
            gpus = gpus[:1]
        data = train_set, valid_set
        options = {"extra_set": extra[0] if extra else None, "resume": resume, "stopping": stopping}
        trainer = task(cfg, model, *data, device, gpus, processes, **options)
        if anew and cfg.TRAIN.MODEL_FILE:
            with naming("TRAIN.MODEL_FILE"):
                load_weights(model, cfg.TRAIN.MODEL_FILE)
        notes = [
            *(_extra_line(cfg, dataset) for dataset in extra),
            *notes,
            *_batch_size_lines(cfg_file, trainer.batch_size),
            *_idle_settings(cfg, model),
        ]
        title = (
            f"{model_summary(cfg, model, (image_size[1], image_size[0]))}\n{cfg.DATASET.DATASET}: "
            f"{len(train_set)} training and {len(valid_set)} validation images"
        )
        kept = _with_classes(cfg, class_names(train_set))
        beside = ((CLASSES, as_text(classes_of(train_set))),)
        content = kept.dump(), _read_settings, _FREE, _FIRST, beside
        settings = Settings(flat(kept), CONFIG, *content)
        return Job(trainer, settings, title, notes, lambda run: _finish(cfg, trainer, run))

    inner = folder.relative_to(folder.parents[1])
    plan = Plan(
        task,
        folder,
        file,
        named_by="TRAIN.CHECKPOINT" if file == Path(cfg.TRAIN.CHECKPOINT) else resume,
        used=_used(resume),
        anew=cfg.TRAIN.RESUME or cfg.AUTO_RESUME,
        debug=cfg.DEBUG.DEBUG,
        events=Path(cfg.LOG_DIR) / inner if cfg.LOG_DIR else None,
    )
    return run_training(plan, job, processes)


def _with_classes(cfg: CfgNode, names: list[str]) -> CfgNode:
    """The settings that a run saves: its evaluations refuse data with other classes."""
    kept = cfg.clone()
    if cfg.DATASET.DATASET in NAMED_BY_FILES and len(names) <= _MOST_SAVED:
        kept.defrost()
        kept.DATASET.CLASSES = names
        kept.freeze()
    return kept


def _idle_settings(cfg: CfgNode, model: MDEQNet) -> list[str]:
    """Lines of the log on settings that have no effect."""
    lines = [
        f"note: LOSS.{key} has no effect while LOSS.JAC_LOSS_FREQ is 0"
        for key in ("JAC_LOSS_WEIGHT", "PRETRAIN_JAC_LOSS_WEIGHT")
        if cfg.LOSS[key] > 0 and cfg.LOSS.JAC_LOSS_FREQ == 0
    ]
    lines += unused_keys(cfg)
    if unused := unused_settings(model.grad):
        names = ", ".join(f"DEQ.{name.upper()}" for name in unused)
        lines.append(f"note: DEQ.GRAD {cfg.DEQ.GRAD} makes no use of {names}")
    return lines


def _finish(cfg: CfgNode, trainer: ImageTrainer, run: Run) -> None:
    """Log the best validation; test the last and the best weights on images that chose none."""
    best, processes = trainer.best, trainer.processes
    if not best:
        return
    score = f"{best['name']} {100 * best['score']:.2f}%"
    run.log(f"best {score} at step {best['step']} ({best['phase']})")
    if cfg.DATASET.DATASET not in WITH_VALIDATION:
        return
    test_set = trainer.get_dataset(cfg, "test")
    found = {"last": (trainer.step, trainer.evaluate(test_set))}
    weights = processes.lead(lambda: run.folder and run.folder / WEIGHTS)  # None in a debug run
    if weights:
        if best["step"] == trainer.step:
            found["best"] = found["last"]
        else:
            load_weights(trainer.model, weights)
            found["best"] = best["step"], trainer.evaluate(test_set)
    for which, (step, evaluation) in found.items():
        run.log(f"end of training | test, {which} weights (step {step}) | {evaluation.text()}")
        values = {"weights": which, "of_step": step, **evaluation.figures}
        run.record("final_test", trainer.step, **values)


def _class_lines(cfg: CfgNode, dataset) -> list[str]:
    """The user's own classes; and a note if the network has more outputs than there are classes."""
    n_classes = len(dataset.classes)
    shown = cfg.DATASET.DATASET == "own_pictures" and n_classes <= _MOST_CLASSES
    lines = [f"classes: {', '.join(dataset.classes)}"] if shown else []
    if n_classes == cfg.MODEL.NUM_CLASSES:
        return lines
    return [
        *lines,
        f"note: the {n_classes} classes of {cfg.DATASET.DATASET} are outputs 0 to {n_classes - 1} "
        f"of {cfg.MODEL.NUM_CLASSES}: weights that were trained on more classes number them "
        "otherwise",
    ]


# Settings that only one task reads; the other task would silently ignore them.
_OF_ONE_TASK = {
    "segmentation": (
        *("DATASET.EXTRA_TRAIN_SET", "LOSS.USE_OHEM", "TRAIN.FLIP", "TRAIN.MULTI_SCALE"),
        *("TEST.CENTER_CROP_TEST", "TEST.FLIP_TEST", "TEST.MULTI_SCALE"),
    ),
    "classification": ("DATASET.AUGMENT",),
}


def _refuse_other_task(cfg: CfgNode, task: str) -> None:
    """Refuse settings of the other task that differ from their defaults."""
    own, default = flat(cfg), flat(config)
    for other, keys in _OF_ONE_TASK.items():
        for key in keys if other != task else ():
            if own[key] != default[key]:
                raise InputError(
                    f"{key} {own[key]!r} is a setting of {other}: {task} makes no use of it"
                )


def _checkpoint_to_resume(cfg: CfgNode, folder: Path, resume: str) -> Path | None:
    """Return the checkpoint to continue from; None starts a new run."""
    own, anew = folder / CHECKPOINT, cfg.TRAIN.RESUME or cfg.AUTO_RESUME
    if anew and versions(own):
        return own
    if not cfg.DEBUG.DEBUG:
        check_unused(folder, _used(resume), anew=anew)
    return Path(cfg.TRAIN.CHECKPOINT) if cfg.TRAIN.CHECKPOINT else None


def _used(resume: str) -> str:
    return f"add {resume} to continue it, or choose another OUTPUT_DIR"


# Settings (or their prefixes) that a continued run may change without a note in the log.
_FREE = ("OUTPUT_DIR", "LOG_DIR", "DATA_DIR", "GPUS", "WORKERS", "PRINT_FREQ", "SAVE_FREQ",
         "KEEP_CHECKPOINTS", "MAX_TIME", "AUTO_RESUME", "PIN_MEMORY", "DEBUG", "TEST.MODEL_FILE",
         "TRAIN.RESUME", "TRAIN.CHECKPOINT", "TRAIN.MODEL_FILE", "TRAIN.MAX_SKIPPED",
         "MODEL.PRETRAINED", "DATASET.CLASSES")  # fmt: skip

_FIRST = ("MODEL.INIT_WEIGHTS", "TRAIN.BEGIN_EPOCH")  # have an effect on a new run only


def _read_settings(path: Path) -> dict:
    cfg = config.clone()
    merge_file(cfg, path)
    return flat(cfg)


def _extra_line(cfg: CfgNode, dataset: Dataset) -> str:
    return (
        f"after epoch {cfg.TRAIN.END_EPOCH}: {cfg.TRAIN.EXTRA_EPOCH} epochs over "
        f"{len(dataset)} images of {cfg.DATASET.EXTRA_TRAIN_SET}, from a rate of "
        f"{cfg.TRAIN.EXTRA_LR:g}"
    )


def _batch_size_lines(cfg_file: Path, batch_size: int) -> list[str]:
    """State the effective batch size, and warn if the yaml file is meant for another one."""
    own = config.clone()
    merge_file(own, cfg_file)
    published = own.TRAIN.BATCH_SIZE or own.TRAIN.BATCH_SIZE_PER_GPU * len(own.GPUS)
    lines = [f"effective batch size {batch_size}"]
    if batch_size != published:
        lines.append(
            f"warning: {cfg_file} is meant for an effective batch size of {published} "
            f"({own.TRAIN.BATCH_SIZE_PER_GPU} on each of {len(own.GPUS)} GPU(s)): results and "
            f"schedule will differ; TRAIN.BATCH_SIZE {published} (with TRAIN.BATCH_CHUNK, if it "
            "does not fit the memory) keeps to it"
        )
    return lines


# ---- evaluation --------------------------------------------------------------------------------


@memory_for(LESS_MEMORY)
def validate_classifier(
    cfg: CfgNode, cfg_file: Path, processes: Processes, notes: Sequence[str] = ()
) -> Evaluation:
    """Evaluate a classification model at the fixed point and print the figures, after ``notes``."""
    _refuse_other_task(cfg, "classification")
    device, _ = _devices(cfg, processes)
    dataset = get_cls_dataset(cfg, "test")
    model, path = _trained(cfg, cfg_file, get_cls_net, device)
    own: list[Prediction] = []
    found = evaluate_classification(
        cfg, model, dataset, device=device, processes=processes, on_prediction=own.append
    )
    predictions = [p for part in processes.gather(own) for p in part]
    if processes.leads:
        lines = [*notes, *_class_lines(cfg, dataset)]
        if len(dataset.classes) <= _MOST_CLASSES:
            lines.append(class_table(predictions, dataset.classes))
        print(*lines, f"{path} | {found.text()}", sep="\n", flush=True)
        if hasattr(dataset, "names") and not cfg.DEBUG.DEBUG:
            file = run_folder(cfg, cfg_file) / PREDICTIONS / "classes.csv"
            write_predictions(file, predictions, dataset.classes, dataset.names)
            print(f"predictions in {file}")
    return found


@memory_for(LESS_MEMORY)
def predict_segmentation(
    cfg: CfgNode, cfg_file: Path, processes: Processes, notes: Sequence[str] = ()
) -> Evaluation:
    """Write a model's predictions; print ``notes``, and the figures if there are labels."""
    _refuse_other_task(cfg, "segmentation")
    device, _ = _devices(cfg, processes)
    dataset = get_seg_dataset(cfg, "test")
    dataset.check_batches(cfg)
    model, path = _trained(cfg, cfg_file, MDEQSegNet, device)
    folder = run_folder(cfg, cfg_file) / PREDICTIONS

    def save(index: int, train_ids: torch.Tensor) -> None:
        name, picture = dataset.name(index), dataset.picture(index)
        save_prediction(folder, name, picture, train_ids.numpy(), dataset.facts)

    found = evaluate_segmentation(
        cfg,
        model,
        dataset,
        device=device,
        processes=processes,
        on_prediction=None if cfg.DEBUG.DEBUG else save,
    )
    if processes.leads:
        for line in (*notes, *dataset.notes):
            print(line)
        if dataset.has_labels:
            print(found.confusion.table(dataset.facts.class_names))
            print(f"{path} | {found.text()}")
        else:
            print(f"{path} | {found.images} images without labels")
        print("nothing written (debug)" if cfg.DEBUG.DEBUG else f"predictions in {folder}")
    return found


def _trained(
    cfg: CfgNode, cfg_file: Path, build: Callable[[CfgNode], MDEQNet], device: torch.device
) -> tuple[MDEQNet, Path]:
    """Return the model with the weights of TEST.MODEL_FILE or the run's best, and their path."""
    path = _weights(cfg, cfg_file)
    model = build(cfg)
    with naming("TEST.MODEL_FILE" if cfg.TEST.MODEL_FILE else "the best weights of the run"):
        load_weights(model, path)
    return model.to(device), path


def _weights(cfg: CfgNode, cfg_file: str | Path) -> Path:
    return Path(cfg.TEST.MODEL_FILE or run_folder(cfg, cfg_file) / WEIGHTS)


# ---- commands ----------------------------------------------------------------------------------


def _command(
    program: str, description: str, action: Callable, *, evaluates: bool = False
) -> Callable:
    """The function that runs a tool on the words of a command line and returns its exit code."""

    def run(argv: list[str] | None = None) -> int:
        def go():
            args = experiment_parser(program, description).parse_intermixed_args(argv)
            cfg, more = load_config(args), []
            if evaluates:
                own, notes = _weights(cfg, args.cfg).parent / CONFIG, []
                cfg, more = evaluation_config(args, cfg, own, notes.append), [notes]
            with Processes.joined() as processes:
                action(cfg, Path(args.cfg), processes, *more)

        return exit_code(program, go)

    return run


cls_train = _command("cls_train.py", "Train an image classification model.", train_classifier)
cls_valid = _command(
    "cls_valid.py",
    "Evaluate an image classification model.",
    validate_classifier,
    evaluates=True,
)
seg_train = _command("seg_train.py", "Train a segmentation model.", train_segmenter)
seg_test = _command(
    "seg_test.py",
    "Predict, and evaluate where there are labels.",
    predict_segmentation,
    evaluates=True,
)
