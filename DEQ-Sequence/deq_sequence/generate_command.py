"""The command generate.py: a trained language model continues a text."""

import argparse
import sys
import time
from collections.abc import Iterator

from deq_sequence.generation import generate
from deq_sequence.text.vocabulary import UNK
from deq_sequence.trained import TrainedModel
from deq_sequence.use_flags import add_model, check_thresholds, load_model
from lib.errors import InputError, check, check_count, naming
from lib.runs.command_line import Parser, exit_code


def main(argv: list[str] | None = None) -> int:
    """Run generate.py and return its exit code."""
    return exit_code("generate.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> None:
    """Print continuations of the prompt, or of each line that is typed or read."""
    args = _parser().parse_args(argv)
    for name in ("words", "number", "top_k"):
        check_count(f"--{name}", getattr(args, name))
    fits = 0 <= args.seed <= 2**63 - args.number
    check(fits, "--seed", args.seed, "from 0 to 2^63 minus --number")
    trained = load_model(args)
    model = trained.model
    args.f_thres = trained.settings.f_thres if args.f_thres is None else args.f_thres
    args.mem_len = trained.settings.mem_len if args.mem_len is None else args.mem_len
    check_thresholds(trained, [args.f_thres], [args.mem_len])
    model.reset_length(model.tgt_len, args.mem_len)
    prompts = 0
    for prompt in _prompts(args):
        prompts += 1
        _continue(trained, prompt, args)
    if not prompts and not sys.stdin.isatty():
        raise InputError("the standard input has no line to continue: give --prompt TEXT")


def _parser() -> Parser:
    parser = Parser(
        prog="generate.py",
        description="Let a trained language model continue a text. Without --prompt it asks for "
        "one, again and again until an empty line; or it reads one from each line of the standard "
        "input. The last line (on the standard error) says how fast it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model(parser)
    add = parser.add_argument
    add("--prompt", default=argparse.SUPPRESS, help="the text to continue")
    add("--words", type=int, default=50, help="number of words (or bytes) to add")
    add("--temperature", type=float, default=0.8, help="lower: more likely text; 0: the likeliest")
    add("--top_k", type=int, default=40, help="draw from this many likeliest words")
    add("--top_p", type=float, default=1.0, help="of these, from the likeliest with this share")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add("--number", type=int, default=1, help="texts per prompt, of seeds SEED, SEED+1, ...")
    add("--mem_len", type=int, help="number of earlier words that the model sees; None: the run's")
    add("--f_thres", type=int, help="most evaluations of f per word; None: the run's")
    return parser


def _prompts(args: argparse.Namespace) -> Iterator[str]:
    if hasattr(args, "prompt"):
        yield args.prompt
        return
    try:
        if sys.stdin.isatty():
            while line := _asked():
                yield line
        else:
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
    except UnicodeDecodeError as error:
        raise InputError(
            "the standard input is not UTF-8 text: convert it, for instance with iconv -t utf-8"
        ) from error


def _asked() -> str:
    """A line that the user types; "" at the end."""
    print("prompt (an empty line ends): ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _continue(trained: TrainedModel, prompt: str, args: argparse.Namespace) -> None:
    vocab = trained.vocabulary
    with naming("the prompt"):
        begin = trained.begin(prompt)
    unknown = [] if trained.is_of_bytes else trained.unknown(prompt)
    if unknown:
        names = ", ".join(map(repr, dict.fromkeys(unknown)))
        print(f"note: {UNK} stands for what the vocabulary lacks: {names}", file=sys.stderr)
    evaluations: list[int] = []
    start = time.perf_counter()
    for seed in range(args.seed, args.seed + args.number):
        drawn = generate(
            trained.model,
            vocab,
            begin,
            args.words,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            f_thres=args.f_thres,
            seed=seed,
            on_word=lambda symbol, nfe: evaluations.append(nfe),
        )
        print(f"[{vocab.join(begin)}] {vocab.join(drawn)}", flush=True)
    seconds, n = time.perf_counter() - start, len(evaluations)
    print(
        f"{n} tokens, {n / seconds:.1f} per second, {sum(evaluations) / n:.1f} evaluations of f "
        "per token",
        file=sys.stderr,
        flush=True,
    )
