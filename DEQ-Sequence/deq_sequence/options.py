"""The command line of train_transformer.py."""

import argparse
import math
from datetime import datetime
from pathlib import Path

from deq_sequence.layer import INJECTIONS
from deq_sequence.model import EVAL_STATES
from deq_sequence.start import STARTS
from deq_sequence.state.groups import KINDS, get_group
from deq_sequence.state.strings import PREFIX, is_state
from deq_sequence.text.corpus import DATASETS, OWN, Dataset
from deq_sequence.text.demo_corpus import SPLITS
from deq_sequence.ties import TIE_PROJ_MODES
from lib.deq import DEQ
from lib.errors import InputError, check, naming
from lib.gradients import GRADIENTS
from lib.runs.command_line import Parser
from lib.solvers import ADJOINT_SOLVERS, SOLVERS
from lib.solvers.arguments import Names
from lib.solvers.precision import AMP

DEFAULT_DATA = "../data/wikitext-103"
# Folder of each data set, relative to DEQ-Sequence. get_data.sh fills them (demo: get_lm_corpus()).
FOLDERS = {
    "wt103": "data/wikitext-103",
    "wt2": "data/wikitext-2",
    "ptb": "data/penn",
    "enwik8": "data/enwik8",
    "text8": "data/text8",
    "demo": "data/demo",
}
EVAL_STATE = "state in evaluation: the solver's last point z, or (value) f(z), as in training"
# The flags of --dataset text alone, with their defaults.
_OF_OWN_TEXT = {
    "characters": False,
    "lower_case": False,
    "min_count": DATASETS[OWN].min_count,
    "held_out": DATASETS[OWN].held_out,
}


class _Datasets(list):
    """The data sets as choices of a flag; state:GROUP is one, too."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or is_state(str(name))


def build_parser() -> Parser:
    """The parser of all flags, with the published defaults."""
    parser = Parser(
        prog="train_transformer.py",
        description="Train or evaluate a DEQ-Transformer language model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _data_flags(parser.add_argument_group("data"))
    _model_flags(parser.add_argument_group("model"))
    _solver_flags(parser.add_argument_group("equilibrium"))
    _training_flags(parser.add_argument_group("training"))
    _run_flags(parser.add_argument_group("run"))
    return parser


def _data_flags(group) -> None:
    add = group.add_argument
    add(
        "--data",
        default=DEFAULT_DATA,
        help="data folder (if absent, and for other sets: data/<set>); text: or one text file",
    )
    add(
        "--dataset",
        default="wt103",
        choices=_Datasets(DATASETS),
        help="demo: without a download; text: your own --data, a folder with train.txt, valid.txt "
        f"and test.txt or one file; {PREFIX}GROUP: running products in {KINDS}",
    )
    own = _OF_OWN_TEXT
    add("--characters", action="store_true", help="text: a symbol is a byte, not a word")
    add("--lower_case", action="store_true", help="text: in lower case")
    add("--min_count", type=int, default=own["min_count"], help="text: rarer words become <unk>")
    add(
        "--held_out",
        type=float,
        default=own["held_out"],
        help="text, one file: the share of validation text, and of test text, at its end",
    )
    add("--batch_size", type=int, default=60, help="sequences per step")
    add("--batch_chunk", type=int, default=1, help="parts of a batch, for less memory")
    add("--eval_batch_size", type=int, default=10, help="sequences in evaluation")
    add("--tgt_len", type=int, default=150, help="segment length in training")
    add("--eval_tgt_len", type=int, default=150, help="segment length in evaluation")
    add("--mem_len", type=int, default=150, help="positions of memory")
    add("--varlen", action="store_true", help="vary the segment length in training")
    add(
        "--grow_below",
        type=float,
        default=0.0,
        help=f"{PREFIX}GROUP: begin with 2 elements; a loss below this on the longest strings "
        "makes them longer, up to --tgt_len; 0: full length from the start",
    )


def _model_flags(group) -> None:
    add = group.add_argument
    add("--n_layer", type=int, default=12, help="stacked applications of f in pre-training")
    add("--eval_n_layer", type=int, default=12, help="stacked applications of f in evaluation")
    add("--n_head", type=int, default=10, help="attention heads")
    add("--d_head", type=int, default=50, help="channels per head")
    add("--d_embed", type=int, default=-1, help="embedding width; -1 is d_model")
    add("--d_model", type=int, default=500, help="n_head * d_head")
    add("--d_inner", type=int, default=8000, help="feed-forward width")
    add("--dropout", type=float, default=0.0, help="variational dropout")
    add("--dropatt", type=float, default=0.0, help="dropout of attention weights")
    add("--init", default="normal", choices=("normal", "uniform"), help="initial weights")
    add("--emb_init", default="normal", choices=("normal", "uniform"), help="initial embeddings")
    add("--init_range", type=float, default=0.05, help="U(-init_range, init_range)")
    add("--emb_init_range", type=float, default=0.01, help="U(-., .) of embeddings")
    add("--init_std", type=float, default=0.01, help="N(0, init_std)")
    add("--proj_init_std", type=float, default=0.01, help="N(0, .) for projections")
    add("--local_size", type=int, default=0, help="positions that a query sees; 0: all")
    add("--same_length", action="store_true", help="every query sees mem_len keys")
    add("--attn_type", type=int, default=0, choices=(0,), help="relative, as published")
    add("--not_tied", action="store_true", help="separate tables for embedding and output")
    add(
        "--tie_proj_mode",
        default="apart",
        choices=list(TIE_PROJ_MODES),
        help="tied projections: " + "; ".join(f"{k}: {v}" for k, v in TIE_PROJ_MODES.items()),
    )
    add("--adaptive", action="store_true", help="adaptive embedding and softmax")
    add("--cutoffs", type=int, nargs="+", help="with --adaptive: first id of each cluster")
    add("--div_val", type=int, default=1, help="narrowing from cluster to cluster")
    add("--pre_lnorm", action="store_true", help="layer norm before the blocks")
    add("--wnorm", action="store_true", help="weight normalisation")
    add("--inject", default="all", choices=INJECTIONS, help="own: see others' states alone")


def _solver_flags(group) -> None:
    add = group.add_argument
    forward, backward, grads = (Names(sorted(d)) for d in (SOLVERS, ADJOINT_SOLVERS, GRADIENTS))
    add("--f_solver", default="anderson", choices=forward, help="name, or name:option=value,...")
    add("--b_solver", default="broyden", choices=Names([*backward, "None"]), help="None: f_solver")
    add("--grad", default="ift", choices=grads, help="gradient: name, or name:option=value,...")
    add("--stop_mode", default="rel", choices=("abs", "rel"), help="residual that stops f_solver")
    add("--f_thres", type=int, default=40, help="forward threshold")
    add("--f_thres_per_word", type=float, default=0.0, help=f"{PREFIX}GROUP: f_thres grows by this")
    add("--b_thres", type=int, default=40, help="backward threshold")
    add(
        "--f_start",
        default="zero",
        choices=STARTS,
        help="z0; learned: a guess from the words so far",
    )
    add("--eval_state", default="point", choices=EVAL_STATES, help=EVAL_STATE)
    add("--rand_f_thres_delta", type=int, default=0, help="f_thres varies by [-delta, 0]")
    add("--pretrain_steps", type=int, default=0, help="stacked steps before equilibrium")
    add("--jac_loss_weight", type=float, default=0.0, help="weight of the Jacobian loss")
    add("--jac_loss_freq", type=float, default=0.0, help="share of steps with Jacobian loss")
    add("--jac_incremental", type=int, default=0, help="steps per weight increase of 0.1; 0: never")
    add("--spectral_radius_mode", action="store_true", help="evaluation: spectral radius")


def _training_flags(group) -> None:
    add = group.add_argument
    optimisers = ("Adam", "SGD", "Adagrad", "RMSprop", "RAdam", "Muon")
    schedules = ("cosine", "inv_sqrt", "dev_perf", "constant")
    add("--optim", default="Adam", choices=optimisers, help="optimiser; Muon: for matrices")
    add("--lr", type=float, default=0.00025, help="peak learning rate")
    add("--scheduler", default="cosine", choices=schedules, help="after the warm-up")
    add("--warmup_step", type=int, default=0, help="steps of linear warm-up")
    add("--decay_rate", type=float, default=0.5, help="dev_perf: factor")
    add("--lr_min", type=float, default=0.0, help="dev_perf: lower bound")
    add("--patience", type=int, default=0, help="dev_perf: evaluations without gain")
    add("--eta_min", type=float, default=0.0, help="cosine: last learning rate")
    add("--weight_decay", type=float, default=0.0, help="weight decay")
    add("--clip", type=float, default=0.25, help="gradient norm; 0 does not clip")
    add("--clip_nonemb", action="store_true", help="clip all but the embeddings")
    add("--max_step", type=int, default=200000, help="updates in all")
    add("--max_skipped", type=int, default=10, help="end after this many non-finite steps in a row")
    add("--start_train_steps", type=int, default=0, help="first step's number, with --load")
    add("--amp", default="none", choices=AMP, help="mixed precision: matrix products in bf16")
    add("--tf32", action="store_true", help="GPU: round the factors of float32 products to TF32")
    add("--deterministic", action="store_true", help="GPU: a run repeats bit for bit, but slower")
    add("--compile", action="store_true", help="let torch.compile compute f within the solvers")
    add("--graph", action="store_true", help="GPU: take f and its products from CUDA graphs")


def _run_flags(group) -> None:
    add = group.add_argument
    add("--seed", type=int, default=1111, help="seed of all random choices")
    add("--cuda", action="store_true", help="use the GPU (without one: the CPU, and a warning)")
    add("--multi_gpu", action="store_true", help="DataParallel over all GPUs")
    add("--gpu0_bsz", type=int, default=-1, help="sequences on GPU 0; -1 is an even share")
    add("--num_threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    add("--eval", action="store_true", help="evaluate --load, or the best weights of the run")
    add("--prompt", default="", help="with --eval: let the model continue this text")
    add("--load", default="", help="weights to start from (not by a restart) or to evaluate")
    add("--log-interval", type=int, default=200, help="steps between log lines")
    add("--eval-interval", type=int, default=4000, help="steps between evaluations")
    add("--save-interval", type=int, default=0, help="steps between checkpoints; 0: evaluations")
    add("--max_eval_steps", type=int, default=-1, help="batches per evaluation; -1 is all")
    add("--work_dir", default="LM-TFM", help="runs lie in <work_dir>-<dataset>/<name>")
    add("--name", default="N/A", help="name of the run; N/A: a time stamp")
    add("--keep_checkpoints", type=int, default=2, help="number of checkpoints to keep")
    add("--restart", action="store_true", help="continue the run")
    add("--auto_restart", action="store_true", help="--restart if there is a run, else begin it")
    add("--restart_dir", default="", help="the run to continue (default: that of --name)")
    add("--max_time", type=float, default=0, help="limit in minutes, with the save; 0: none")
    add("--debug", action="store_true", help="write no files")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags, fill in derived values, and refuse combinations that cannot work.

    Raises:
        InputError: a flag is bad; the message names the flag, its value, and the accepted values.
    """
    args = build_parser().parse_args(argv)
    if args.data == DEFAULT_DATA:
        # By default WikiText-103 is beside the folder DEQ-Sequence, as published; get_data.sh puts
        # it inside.
        own = FOLDERS.get(args.dataset, DEFAULT_DATA)
        if args.dataset != "wt103" or (Path(own).is_dir() and not Path(DEFAULT_DATA).is_dir()):
            args.data = own
    name = Path(args.name)
    inside = args.name == "" or (name.parts and ".." not in name.parts and not name.is_absolute())
    check(inside, "--name", args.name, "a name within --work_dir, which chooses the place")
    if args.d_embed == -1:
        args.d_embed = args.d_model
    if args.same_length:
        if args.mem_len < 1 or args.local_size not in (0, args.mem_len):
            raise InputError("--same_length needs --mem_len above 0 and no other --local_size")
        args.local_size = args.mem_len  # equivalent: every query sees its last mem_len keys
    if args.cutoffs is not None and not args.adaptive:
        raise InputError("--cutoffs has no effect without --adaptive: add it")
    projected = args.div_val > 1 or args.d_embed != args.d_model
    if args.tie_proj_mode != "apart" and not (args.adaptive and projected):
        raise InputError(
            f"--tie_proj_mode {args.tie_proj_mode} has no effect: projections are tied with "
            "--adaptive, and there are some with --div_val above 1 or another --d_embed"
        )
    restart = args.restart or args.auto_restart
    if restart and args.name == "N/A" and not args.restart_dir:
        raise InputError("--restart needs --restart_dir, or the --name of the run to continue")
    if args.restart_dir and not restart:
        raise InputError("--restart_dir has no effect without --restart: add it")
    if args.gpu0_bsz >= 0 and not args.multi_gpu:
        raise InputError("--gpu0_bsz has no effect without --multi_gpu: add it")
    starts_late = 0 < args.start_train_steps >= args.max_step
    if starts_late and not (args.restart or args.eval):
        raise InputError(
            f"--start_train_steps {args.start_train_steps} leaves no step up to --max_step "
            f"{args.max_step}: raise the latter"
        )
    if args.eval and not args.load and args.name == "N/A":
        raise InputError("--eval needs --load WEIGHTS, or the --name of a run with weights")
    if args.prompt and not args.eval:
        raise InputError("--prompt has no effect without --eval: add it")
    _check_own_text(args)
    _check_state_tracking(args)
    _check_ranges(args)
    with naming("--f_solver, --b_solver and --grad"):
        deq = DEQ(args.f_solver, own_b_solver(args), grad=args.grad)
    deq.grad.refuse_threshold(args.f_thres, "--f_thres")
    return args


def _check_own_text(args: argparse.Namespace) -> None:
    given = [f"--{name}" for name, default in _OF_OWN_TEXT.items() if vars(args)[name] != default]
    if args.dataset != OWN:
        if given:
            raise InputError(f"{given[0]} has no effect without --dataset {OWN}")
        return
    if args.data == DEFAULT_DATA and not Path(args.data).exists():
        raise InputError(
            f"--dataset {OWN} needs --data: a folder with train.txt, valid.txt and test.txt, or "
            "one text file"
        )
    if args.characters and "--min_count" in given:
        raise InputError("--min_count has no effect with --characters: leave it out")
    if "--held_out" in given and Path(args.data).is_dir():
        raise InputError(f"--held_out has no effect on --data {args.data}, a folder: leave it out")


def _check_state_tracking(args: argparse.Namespace) -> None:
    if not is_state(args.dataset):
        for flag in ("--grow_below", "--f_thres_per_word"):
            if getattr(args, flag[2:]):
                raise InputError(f"{flag} has no effect without --dataset {PREFIX}GROUP")
        return
    with naming("--dataset"):
        get_group(args.dataset.removeprefix(PREFIX))
    if args.mem_len:
        raise InputError(f"--dataset {args.dataset} has no memory: add --mem_len 0")
    for flag in ("--varlen", "--spectral_radius_mode", "--prompt"):
        if getattr(args, flag[2:]):
            raise InputError(f"--dataset {args.dataset} makes no use of {flag}: leave it out")


def own_b_solver(args: argparse.Namespace) -> str | None:
    """The backward solver; None means the forward solver."""
    return None if args.b_solver == "None" else args.b_solver


def _check_ranges(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        for part in value if isinstance(value, list) else [value]:
            finite = not isinstance(part, float) or math.isfinite(part)
            check(finite, flag_of(name), part, "a finite number")
            small = name == "seed" or not isinstance(part, int) or abs(part) < 2**31
            check(small, flag_of(name), part, "below 2^31")
            check("\0" not in str(part), flag_of(name), part, "text without a zero byte")
    at_least = {
        0: "warmup_step max_step start_train_steps pretrain_steps jac_incremental mem_len "
        "rand_f_thres_delta local_size num_threads save_interval patience lr weight_decay clip "
        "lr_min eta_min init_range emb_init_range init_std proj_init_std jac_loss_weight max_time "
        "grow_below f_thres_per_word",
        1: "n_layer eval_n_layer n_head d_head d_model d_embed d_inner div_val batch_size "
        "batch_chunk eval_batch_size tgt_len eval_tgt_len f_thres b_thres log_interval "
        "eval_interval max_skipped keep_checkpoints min_count",
    }
    for low, names in at_least.items():
        for name in names.split():
            value = getattr(args, name)
            check(value >= low, flag_of(name), value, f"{low} or more")
    for name, fits, accepted in (
        ("seed", lambda v: 0 <= v < 2**63, "from 0 to 2^63 - 1"),
        ("num_threads", lambda v: v <= 1024, "at most 1024"),
        ("max_eval_steps", lambda v: v >= 1 or v == -1, "-1 or 1 or more"),
        ("dropout", lambda v: 0 <= v < 1, "in [0, 1)"),
        ("dropatt", lambda v: 0 <= v < 1, "in [0, 1)"),
        ("jac_loss_freq", lambda v: 0 <= v <= 1, "in [0, 1]"),
        ("decay_rate", lambda v: 0 < v < 1, "in (0, 1)"),
        ("held_out", lambda v: 0 < v < 0.5, "in (0, 0.5)"),
    ):
        check(fits(getattr(args, name)), f"--{name}", getattr(args, name), accepted)
    if args.batch_size % args.batch_chunk:
        raise InputError(
            f"--batch_chunk {args.batch_chunk} does not divide --batch_size {args.batch_size}"
        )
    if args.gpu0_bsz >= 0 and args.gpu0_bsz > args.batch_size:
        raise InputError(f"--gpu0_bsz {args.gpu0_bsz} exceeds --batch_size {args.batch_size}")


def flag_of(name: str) -> str:
    """The flag of a setting: the published names of intervals have a dash."""
    return "--" + (name.replace("_", "-") if name.endswith("_interval") else name)


def text_rules(args: argparse.Namespace) -> Dataset | None:
    """How the symbols of --dataset text get ids; None for other data."""
    if args.dataset != OWN:
        return None
    own = {name: getattr(args, name) for name in _OF_OWN_TEXT}
    # Bytes are few, and all must be known; words of validation and test must not be counted.
    return Dataset(counted=SPLITS if args.characters else ("train",), **own)


def data_name(args: argparse.Namespace) -> str:
    """The data's name in the log and in the run's folder; own text has that of its --data."""
    if args.dataset != OWN:
        return args.dataset
    path = Path(args.data).resolve()
    return f"{OWN}-{path.stem if path.is_file() else path.name}"


def run_folder(work_dir: str, dataset: str, name: str) -> Path:
    """``<work_dir>-<dataset>/<name>``; without a name ('' or 'N/A') a time stamp is the name."""
    if name in ("", "N/A"):
        name = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(f"{work_dir}-{dataset}") / name


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of the run: that of --restart_dir, or the one of its data and its --name."""
    if args.restart_dir:
        return Path(args.restart_dir)
    return run_folder(args.work_dir, data_name(args).replace(":", "-"), args.name)


def cutoffs_for(args: argparse.Namespace, n_token: int) -> list[int]:
    """First word ids of the vocabulary's clusters: the given cutoffs, else the published ones.

    The published cutoffs are for WikiText-103. A smaller vocabulary is cut at the same fractions
    of its size.
    """
    if not args.adaptive:
        return []
    if args.cutoffs is not None:
        return args.cutoffs  # the model refuses cutoffs beyond the vocabulary
    published, size = [20000, 40000, 200000], 267735
    if args.dataset == "wt103" and n_token > published[-1]:
        return published
    return sorted({c * n_token // size for c in published} - {0, n_token})
