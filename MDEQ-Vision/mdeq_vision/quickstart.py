"""The quickstart: train a small model on handwritten digits, and report the run."""

from argparse import Namespace
from pathlib import Path

from lib.runs.command_line import Parser, exit_code
from lib.runs.processes import Processes
from mdeq_vision.command import load_config, train_classifier, train_segmenter
from mdeq_vision.image_report import report_classification, report_segmentation

# name -> (yaml file, how to train, how to report)
TASKS = {
    "digits": ("digits/cls_mdeq_TINY.yaml", train_classifier, report_classification),
    "scenes": ("digit_scenes/seg_mdeq_TINY.yaml", train_segmenter, report_segmentation),
}


def main(argv: list[str] | None, room: Path) -> int:
    """Train and report one task; its run lies below ``room``/output. Return the exit code."""
    parser = Parser(prog="quickstart.py", description="Small models on handwritten digits.")
    parser.add_argument("task", choices=TASKS, help="digits: classify; scenes: segment")
    parser.add_argument("--restart", action="store_true", help="continue a run that was cut off")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the settings")

    def action():
        args = parser.parse_intermixed_args(argv)
        file, train, report = TASKS[args.task]
        cfg_file = room / "experiments" / file
        opts = ["OUTPUT_DIR", str(room / "output"), "TRAIN.RESUME", str(args.restart), *args.opts]
        cfg = load_config(Namespace(cfg=cfg_file, opts=opts))
        folder = train(cfg, cfg_file, Processes(), "--restart")
        if folder is not None:
            text = report(cfg, folder)
            (folder / "report.txt").write_text(text + "\n")
            print(f"\n{text}")

    return exit_code("quickstart.py", action)
