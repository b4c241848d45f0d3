"""The command train_transformer.py: set up, then train or evaluate."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from deq_sequence.evaluation import LESS_MEMORY, evaluate, settings_from
from deq_sequence.generation import continuation
from deq_sequence.half_precision import amp_notes
from deq_sequence.initialization import initialize
from deq_sequence.model import DEQTransformerLM
from deq_sequence.options import (
    build_parser,
    cutoffs_for,
    data_name,
    flag_of,
    folder_of,
    own_b_solver,
    parse,
    text_rules,
)
from deq_sequence.own_settings import (
    VOCABULARY,
    WORDS,
    check_vocabulary,
    evaluation_settings,
    read_saved,
)
from deq_sequence.sequence_trainer import SequenceTrainer
from deq_sequence.state.evaluation import FACTORS, evaluate_states
from deq_sequence.state.strings import StateStrings, get_state_strings, is_state
from deq_sequence.state.trainer import StateTrainer
from deq_sequence.text.corpus import Corpus, get_lm_corpus
from deq_sequence.text.vocabulary import Vocab
from deq_sequence.text_trainer import LMTrainer
from deq_sequence.ties import TIE_PROJ_MODES
from lib.errors import InputError, naming
from lib.gradients import unused_settings
from lib.graphs import Graphs
from lib.runs.checkpoint import load_weights
from lib.runs.command_line import exit_code
from lib.runs.determinism import deterministic
from lib.runs.interrupts import Stopping, memory_for
from lib.runs.processes import Processes
from lib.runs.retention import versions
from lib.runs.run_folder import (
    CHECKPOINT,
    SETTINGS,
    WEIGHTS,
    Run,
    check_unused,
    is_used,
)
from lib.runs.run_training import Job, Plan, Settings, run_training
from lib.solvers.precision import allow_tf32

# A resumed run may change the settings that begin so, without a note in the log.
_FREE = (
    "--restart", "--auto_restart", "--max_step", "--max_time", "--max_skipped", "--log-interval",
    "--eval-interval", "--save-interval", "--keep_checkpoints", "--work_dir", "--name", "--load",
    "--num_threads",
)  # fmt: skip

# These have an effect on a new run only.
_FIRST = ("--init", "--emb_init", "--proj_init_std", "--start_train_steps")
_USED = "add --restart to continue it, or choose another --name"

# Flags of the same name and meaning as an argument of DEQTransformerLM, and of initialize().
_OF_MODEL = (
    "n_layer", "eval_n_layer", "n_head", "d_model", "d_head", "d_inner", "dropout", "dropatt",
    "d_embed", "div_val", "pre_lnorm", "wnorm", "tgt_len", "mem_len", "local_size",
    "pretrain_steps", "f_solver", "stop_mode", "grad", "tie_proj_mode", "inject", "f_start",
    "eval_state",
)  # fmt: skip
_OF_INITIALIZATION = (
    "init", "init_std", "init_range", "emb_init", "emb_init_range", "proj_init_std",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run train_transformer.py and return its exit code."""
    return exit_code("train_transformer.py", lambda: _run(argv))


def _run(argv: list[str] | None) -> Path | None:
    asked = build_parser().parse_args(argv)
    if not asked.eval:
        return run_command(parse(argv))
    notes: list[str] = []
    return run_command(evaluation_settings(argv, _weights(asked).parent, notes.append), notes)


def run_command(args: argparse.Namespace, notes: Sequence[str] = ()) -> Path | None:
    """Train or evaluate as the arguments say; return the run's folder, or None.

    ``notes`` are lines on the settings of an evaluation, to print before its figures.
    """
    stopping = Stopping(args.max_time)  # the time limit counts from here
    with Processes.joined() as processes:
        device = _set_up(args, processes)
        if args.eval:
            return evaluate_command(args, device, processes, notes)
        return train_command(args, device, processes, stopping)


def build_model(args: argparse.Namespace, corpus: Corpus | StateStrings, device: torch.device):
    """Build and initialise the model that the arguments describe."""
    model = model_for(args, len(corpus.vocab)).to(device)
    if args.compile:
        model.func.compile_evaluations()
    if args.graph:
        model.deq.graphs = Graphs()
    return model


def model_for(args: argparse.Namespace, n_token: int) -> DEQTransformerLM:
    """The model of the arguments for a vocabulary of this size, on the CPU, initialised."""
    cutoffs = cutoffs_for(args, n_token)
    # With --adaptive all projections except the first are tied, as published.
    tie_projs = [args.adaptive and i > 0 for i in range(len(cutoffs) + 1)]
    model = DEQTransformerLM(
        n_token,
        tie_weights=not args.not_tied,
        tie_projs=tie_projs,
        cutoffs=cutoffs,
        b_solver=own_b_solver(args),
        **{name: getattr(args, name) for name in _OF_MODEL},
    )
    initialize(model, **{name: getattr(args, name) for name in _OF_INITIALIZATION})
    return model


def train_command(
    args: argparse.Namespace, device: torch.device, processes: Processes, stopping: Stopping
) -> Path | None:
    """Train, then evaluate the best weights on the validation and test text.

    Returns:
        The run's folder, or None in a debug run and in all processes except the first.
    """
    folder = folder_of(args)
    file = processes.lead(lambda: _checkpoint_to_continue(args, folder))
    kind = StateTrainer if is_state(args.dataset) else LMTrainer

    def build(anew: bool) -> Job:
        data = _data(args, processes)
        model = build_model(args, data, device)
        processes.vary_seed(args.seed)
        trainer = kind(args, model, data, device, processes, stopping)
        if anew and args.load:
            load_weights(model, args.load)
        return Job(
            trainer,
            _settings(
                vars(args)
                | {"cutoffs": cutoffs_for(args, len(data.vocab))}
                | {VOCABULARY: data.vocab.fingerprint()},
                data.vocab,
            ),
            f"{data_name(args)}: {data.description}",
            [*_notes(args, model), *amp_notes(args, model, device)],
            lambda run: _final_evaluation(trainer, run),
        )

    plan = Plan(
        kind,
        folder,
        file,
        "--restart",
        used=_USED,
        anew=args.restart or args.auto_restart,
        unnamed=args.name in ("", "N/A") and not args.restart_dir,
        debug=args.debug,
    )
    return run_training(plan, build, processes)


def _checkpoint_to_continue(args: argparse.Namespace, folder: Path) -> Path | None:
    """The checkpoint of the run to continue; None begins the run."""
    file, anew = folder / CHECKPOINT, args.restart or args.auto_restart
    if anew and versions(file):
        return file
    if args.restart and not is_used(folder):
        raise InputError(f"--restart: {folder} holds no run: check --name and --work_dir")
    if not args.debug:
        check_unused(folder, _USED, anew=anew)
    return None


def _data(args: argparse.Namespace, processes: Processes) -> Corpus | StateStrings:
    if is_state(args.dataset):
        return get_state_strings(args.dataset, args.seed)
    return processes.in_turn(lambda: read_corpus(args))


def read_corpus(args: argparse.Namespace) -> Corpus:
    """The text that the arguments name."""
    return get_lm_corpus(args.data, args.dataset, text_rules(args))


def _settings(values: dict, vocab: Vocab) -> Settings:
    def read(path: Path) -> dict:
        return {flag_of(name): value for name, value in read_saved(path).items()}

    flags = {flag_of(name): value for name, value in values.items()}
    words = (WORDS, json.dumps(vocab.idx2sym, indent=0) + "\n")
    content = json.dumps(values, indent=1) + "\n"
    return Settings(flags, SETTINGS, content, read, _FREE, _FIRST, (words,))


def _notes(args: argparse.Namespace, model: DEQTransformerLM) -> list[str]:
    """Lines of the log on settings with a special or without any effect."""
    notes = []
    if model.ties_projections:
        notes.append(f"tied projections {args.tie_proj_mode}: {TIE_PROJ_MODES[args.tie_proj_mode]}")
    if args.jac_loss_weight > 0 and args.jac_loss_freq == 0:
        notes.append("note: --jac_loss_weight has no effect while --jac_loss_freq is 0")
    if unused := unused_settings(model.grad):
        notes.append(f"note: --grad {args.grad} makes no use of --{', --'.join(unused)}")
    return notes


def _final_evaluation(trainer: SequenceTrainer, run: Run) -> None:
    """Evaluate the last phase's best weights (in a debug run the current ones)."""
    best = trainer.processes.lead(lambda: run.folder and run.folder / WEIGHTS)
    if trainer.processes.lead(lambda: best is not None and best.exists()):
        load_weights(trainer.model, best)
    for name, text, values in trainer.final_figures():
        run.log(f"end of training | {name} | {text}")
        run.record(f"final_{name}", trainer.step, **values)


@memory_for(LESS_MEMORY)
def evaluate_command(
    args: argparse.Namespace,
    device: torch.device,
    processes: Processes,
    notes: Sequence[str] = (),
) -> None:
    """Print what saved weights reach at equilibrium, on each part of the data."""
    data, path = _data(args, processes), _weights(args)
    check_vocabulary(path.parent, data.vocab)
    model = build_model(args, data, device)
    load_weights(model, path)
    notes = [*notes, *amp_notes(args, model, device)]
    for line in notes if processes.leads else ():
        print(line)
    for name, text in _evaluations(args, model, data, processes):
        if processes.leads:
            print(f"{path} | {name} | {text}", flush=True)
    if args.prompt and processes.leads:
        with naming("--prompt"):
            prompt = data.vocab.symbols(args.prompt)
        print(continuation(model, data.vocab, prompt, args.f_thres, args.seed), flush=True)


def _evaluations(
    args: argparse.Namespace,
    model: DEQTransformerLM,
    data: Corpus | StateStrings,
    processes: Processes,
) -> Iterator[tuple[str, str]]:
    """The name of each part of the data that an evaluation takes, and what is found there."""
    if isinstance(data, StateStrings):
        for length in (factor * args.tgt_len for factor in FACTORS):
            found = evaluate_states(model, data, args, "test", length, processes=processes)
            yield f"test_{length}", found.text()
        return
    for split in ("valid", "test"):
        text = getattr(data, split)
        found = evaluate(model, text, processes=processes, **settings_from(args))
        yield split, found.text(data.characters)


def _set_up(args: argparse.Namespace, processes: Processes) -> torch.device:
    """Set threads, TF32, determinism and the seed; return the device."""
    if processes.world_size > 1 and args.multi_gpu:
        raise InputError(
            "--multi_gpu splits a batch in one process, but torchrun started "
            f"{processes.world_size}, a GPU for each: leave it (and --gpu0_bsz) out"
        )
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    allow_tf32(args.tf32)
    deterministic(args.deterministic)
    torch.manual_seed(args.seed)  # the same initial weights in all processes
    if not args.cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if processes.leads:
            print("no GPU is available: --cuda and --multi_gpu have no effect", file=sys.stderr)
        return torch.device("cpu")
    return processes.gpu()


def _weights(args: argparse.Namespace) -> Path:
    """The weights to evaluate."""
    return Path(args.load) if args.load else folder_of(args) / WEIGHTS
