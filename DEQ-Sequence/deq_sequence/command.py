"""What train_transformer.py does: set up, then train or evaluate."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from deq_sequence.corpus import Corpus, get_lm_corpus
from deq_sequence.evaluation import evaluate, settings_from
from deq_sequence.initialization import initialize
from deq_sequence.model import DEQTransformerLM
from deq_sequence.options import cutoffs_for, parse
from deq_sequence.training import Trainer
from lib.checkpoint import load, load_state, load_weights
from lib.errors import InputError
from lib.experiment import (
    CHECKPOINT,
    SETTINGS,
    WEIGHTS,
    Run,
    check_unused,
    peak_memory_mib,
    run_folder,
)
from lib.precision import allow_tf32
from lib.training import exit_code

# Settings that may differ between a run and its continuation without a word.
_FREE = {
    "restart", "restart_dir", "max_step", "log_interval", "eval_interval", "save_interval",
    "work_dir", "name", "load", "num_threads", "eval_batch_size", "max_eval_steps",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run train_transformer.py; its exit code."""
    return exit_code("train_transformer.py", lambda: run_command(parse(argv)), "--restart")


def run_command(args: argparse.Namespace) -> Path | None:
    """Train or evaluate as the arguments say; the run's folder, if it has one."""
    device = _set_up(args)
    if args.eval:
        return evaluate_command(args, device)
    return train_command(args, device)


def build_model(args: argparse.Namespace, corpus: Corpus, device: torch.device):
    """The model that the arguments describe, initialised as they say."""
    n_token = len(corpus.vocab)
    cutoffs = cutoffs_for(args, n_token)
    # With --adaptive all projections but the first are tied, as published.
    tie_projs = [args.adaptive and i > 0 for i in range(len(cutoffs) + 1)]
    model = DEQTransformerLM(
        n_token,
        args.n_layer,
        args.eval_n_layer,
        args.n_head,
        args.d_model,
        args.d_head,
        args.d_inner,
        args.dropout,
        args.dropatt,
        tie_weights=not args.not_tied,
        d_embed=args.d_embed,
        div_val=args.div_val,
        tie_projs=tie_projs,
        pre_lnorm=args.pre_lnorm,
        wnorm=args.wnorm,
        tgt_len=args.tgt_len,
        mem_len=args.mem_len,
        local_size=args.local_size,
        pretrain_steps=args.pretrain_steps,
        cutoffs=cutoffs,
        f_solver=args.f_solver,
        b_solver=None if args.b_solver == "None" else args.b_solver,
        stop_mode=args.stop_mode,
    )
    initialize(
        model,
        init=args.init,
        init_std=args.init_std,
        init_range=args.init_range,
        emb_init=args.emb_init,
        emb_init_range=args.emb_init_range,
        proj_init_std=args.proj_init_std,
    )
    model.to(device)
    if args.compile:
        model.func.compile_evaluations()
    return model


def train_command(args: argparse.Namespace, device: torch.device) -> Path | None:
    """Train, then evaluate the best weights on validation and test text."""
    folder = _folder(args)
    checkpoint = None
    if args.restart:
        checkpoint = load(folder / CHECKPOINT)
    elif not args.debug:
        check_unused(folder, "add --restart to continue it, or choose another --name")
    corpus = get_lm_corpus(args.data, args.dataset)
    model = build_model(args, corpus, device)
    trainer = Trainer(args, model, corpus, device)
    settings = vars(args) | {"cutoffs": cutoffs_for(args, len(corpus.vocab))}
    changes = _changes(folder, settings) if args.restart else []
    if checkpoint is not None:
        state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
        if not isinstance(state, dict):
            raise InputError(f"{folder / CHECKPOINT} is not a checkpoint of this trainer")
        load_state(model, state, str(folder / CHECKPOINT))
        trainer.load_state_dict(checkpoint, folder / CHECKPOINT)
    elif args.load:
        load_weights(model, args.load)

    run = Run(
        None if args.debug else folder,
        (SETTINGS, json.dumps(settings, indent=1) + "\n"),
        trainer.step if args.restart else None,
    )
    try:
        n_params = sum(p.numel() for p in model.parameters())
        run.log(f"{args.dataset}: {len(corpus.train)} training tokens, {len(corpus.vocab)} types")
        run.log(f"{n_params} parameters | {device} | {torch.get_num_threads()} threads")
        run.log(f"run folder {folder}" if run.folder else "debug: nothing is written")
        if args.jac_loss_weight > 0 and args.jac_loss_freq == 0:
            run.log("note: --jac_loss_weight has no effect while --jac_loss_freq is 0")
        for line in changes:
            run.log(f"changed since the checkpoint: {line}")
        if args.restart:
            run.log(f"continuing at step {trainer.step}")
        trainer.train(run)
        _final_evaluation(trainer, run)
        run.log(f"peak memory {peak_memory_mib(device):.0f} MiB")
    finally:
        run.close()
    return run.folder


def _final_evaluation(trainer: Trainer, run: Run) -> None:
    """The best weights of the last phase on both texts (the current ones in a debug run)."""
    if run.folder is not None and (run.folder / WEIGHTS).exists():
        load_weights(trainer.model, run.folder / WEIGHTS)
    for split in ("valid", "test"):
        found = trainer.evaluate(getattr(trainer.corpus, split))
        run.log(f"end of training | {split} | {found.text(trainer.corpus.characters)}")
        values = {k: v for k, v in dataclasses.asdict(found).items() if v is not None}
        run.record(f"final_{split}", trainer.step, **values)


def evaluate_command(args: argparse.Namespace, device: torch.device) -> None:
    """Print the loss and perplexity of saved weights at equilibrium."""
    corpus = get_lm_corpus(args.data, args.dataset)
    model = build_model(args, corpus, device)
    path = Path(args.load) if args.load else _folder(args) / WEIGHTS
    load_weights(model, path)
    for split in ("valid", "test"):
        found = evaluate(model, getattr(corpus, split), **settings_from(args))
        print(f"{path} | {split} | {found.text(corpus.characters)}", flush=True)


def _set_up(args: argparse.Namespace) -> torch.device:
    """Threads, number format, seeds and device."""
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    allow_tf32(args.tf32)
    torch.manual_seed(args.seed)
    if not args.cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print("no GPU is available: --cuda and --multi_gpu have no effect", file=sys.stderr)
        return torch.device("cpu")
    return torch.device("cuda")


def _folder(args: argparse.Namespace) -> Path:
    if args.restart and args.restart_dir:
        return Path(args.restart_dir)
    return run_folder(args.work_dir, args.dataset, args.name)


def _changes(folder: Path, settings: dict) -> list[str]:
    """Settings of a continuation that differ from those the run was started with."""
    path = folder / SETTINGS
    if not path.is_file():
        return [f"{path} is missing, so the settings could not be compared"]
    try:
        before = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not readable JSON ({error}): restore or delete it") from error
    return [
        f"--{name} from {before[name]!r} to {value!r}"
        for name, value in settings.items()
        if name in before and name not in _FREE and before[name] != value
    ]
