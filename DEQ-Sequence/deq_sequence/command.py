"""The command train_transformer.py: set up, then train or evaluate."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from deq_sequence.evaluation import evaluate, settings_from
from deq_sequence.initialization import initialize
from deq_sequence.model import DEQTransformerLM
from deq_sequence.options import cutoffs_for, flag_of, own_b_solver, parse
from deq_sequence.text.corpus import Corpus, get_lm_corpus
from deq_sequence.text_trainer import LMTrainer
from deq_sequence.ties import TIE_PROJ_MODES
from lib.errors import InputError
from lib.gradients import unused_settings
from lib.runs.checkpoint import load_weights
from lib.runs.command_line import exit_code
from lib.runs.determinism import deterministic
from lib.runs.interrupts import Stopping
from lib.runs.processes import Processes
from lib.runs.retention import versions
from lib.runs.run_folder import (
    CHECKPOINT,
    SETTINGS,
    WEIGHTS,
    Run,
    check_unused,
    run_folder,
)
from lib.runs.run_training import Job, Plan, Settings, run_training
from lib.solvers.precision import allow_tf32

# A resumed run may change the settings that begin so, without a note in the log.
_FREE = (
    "--restart", "--auto_restart", "--max_step", "--max_time", "--max_skipped", "--log-interval",
    "--eval-interval", "--save-interval", "--keep_checkpoints", "--work_dir", "--name", "--load",
    "--num_threads", "--eval_batch_size", "--max_eval_steps",
)  # fmt: skip

# Flags of the same name and meaning as an argument of DEQTransformerLM, and of initialize().
_OF_MODEL = (
    "n_layer", "eval_n_layer", "n_head", "d_model", "d_head", "d_inner", "dropout", "dropatt",
    "d_embed", "div_val", "pre_lnorm", "wnorm", "tgt_len", "mem_len", "local_size",
    "pretrain_steps", "f_solver", "stop_mode", "grad", "tie_proj_mode",
)  # fmt: skip
_OF_INITIALIZATION = (
    "init", "init_std", "init_range", "emb_init", "emb_init_range", "proj_init_std",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run train_transformer.py and return its exit code."""
    return exit_code("train_transformer.py", lambda: run_command(parse(argv)), "--restart")


def run_command(args: argparse.Namespace) -> Path | None:
    """Train or evaluate as the arguments say; return the run's folder, or None."""
    stopping = Stopping(args.max_time)  # the time limit counts from here
    with Processes.joined() as processes:
        device = _set_up(args, processes)
        if args.eval:
            return evaluate_command(args, device, processes)
        return train_command(args, device, processes, stopping)


def build_model(args: argparse.Namespace, corpus: Corpus, device: torch.device):
    """Build and initialise the model that the arguments describe."""
    n_token = len(corpus.vocab)
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
    model.to(device)
    if args.compile:
        model.func.compile_evaluations()
    return model


def train_command(
    args: argparse.Namespace, device: torch.device, processes: Processes, stopping: Stopping
) -> Path | None:
    """Train, then evaluate the best weights on the validation and test text.

    Returns:
        The run's folder, or None in a debug run and in all processes except the first.
    """
    folder = _folder(args)
    file = folder / CHECKPOINT
    restart = args.restart or (args.auto_restart and processes.lead(lambda: bool(versions(file))))
    if not restart and not args.debug:
        check_unused(folder, "add --restart to continue it, or choose another --name")

    def build(anew: bool) -> Job:
        corpus = processes.in_turn(lambda: get_lm_corpus(args.data, args.dataset))
        model = build_model(args, corpus, device)
        processes.vary_seed(args.seed)
        trainer = LMTrainer(args, model, corpus, device, processes, stopping)
        if anew and args.load:
            load_weights(model, args.load)
        n_token = len(corpus.vocab)
        return Job(
            trainer,
            _settings(vars(args) | {"cutoffs": cutoffs_for(args, n_token)}),
            f"{args.dataset}: {len(corpus.train)} training tokens, {n_token} types",
            _notes(args, model),
            lambda run: _final_evaluation(trainer, run, folder),
        )

    plan = Plan(LMTrainer, folder, file if restart else None, "--restart", debug=args.debug)
    return run_training(plan, build, processes)


def _settings(values: dict) -> Settings:
    def read(path: Path) -> dict:
        try:
            return {flag_of(name): value for name, value in json.loads(path.read_text()).items()}
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} is not readable JSON ({error}): restore or delete it"
            ) from error

    flags = {flag_of(name): value for name, value in values.items()}
    return Settings(flags, SETTINGS, json.dumps(values, indent=1) + "\n", read, _FREE)


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


def _final_evaluation(trainer: LMTrainer, run: Run, folder: Path) -> None:
    """Evaluate the last phase's best weights (in a debug run the current ones) on both texts."""
    if trainer.processes.lead(lambda: run.folder is not None and (folder / WEIGHTS).exists()):
        load_weights(trainer.model, folder / WEIGHTS)
    for split in ("valid", "test"):
        found = trainer.evaluate_text(getattr(trainer.corpus, split))
        run.log(f"end of training | {split} | {found.text(trainer.corpus.characters)}")
        values = {k: v for k, v in dataclasses.asdict(found).items() if v is not None}
        run.record(f"final_{split}", trainer.step, **values)


def evaluate_command(args: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    """Print the loss and perplexity of saved weights at equilibrium."""
    corpus = processes.in_turn(lambda: get_lm_corpus(args.data, args.dataset))
    model = build_model(args, corpus, device)
    path = Path(args.load) if args.load else _folder(args) / WEIGHTS
    load_weights(model, path)
    for split in ("valid", "test"):
        data = getattr(corpus, split)
        found = evaluate(model, data, processes=processes, **settings_from(args))
        if processes.leads:
            print(f"{path} | {split} | {found.text(corpus.characters)}", flush=True)


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


def _folder(args: argparse.Namespace) -> Path:
    if args.restart_dir:
        return Path(args.restart_dir)
    return run_folder(args.work_dir, args.dataset, args.name)
