"""Runs of the tools in this process, on data that is made in a moment."""

from pathlib import Path

from mdeq_vision import command

ROOM = Path(__file__).parents[2] / "MDEQ-Vision"
EXPERIMENTS = sorted(
    str(path.relative_to(ROOM / "experiments"))
    for kind in ("cifar", "imagenet", "cityscapes")
    for path in (ROOM / "experiments" / kind).glob("*.yaml")
)
DIGITS = ROOM / "experiments/digits/cls_mdeq_TINY.yaml"
SCENES = ROOM / "experiments/digit_scenes/seg_mdeq_TINY.yaml"

# A run of either kind in seconds: two epochs of three steps, the second mostly at equilibrium.
TINY = """
    MODEL.NUM_LAYERS 2 MODEL.DROPOUT 0.1 DEQ.F_THRES 4 DEQ.B_THRES 4 LOSS.JAC_LOSS_FREQ 0.5
    TRAIN.PRETRAIN_STEPS 4 TRAIN.END_EPOCH 2 TRAIN.BATCH_SIZE_PER_GPU 4
    PRINT_FREQ 1 SAVE_FREQ 1 TEST.NUM_SAMPLES 8
""".split()
TINY_DIGITS = [*TINY, "PERCENT", "0.0103", "MODEL.IMAGE_SIZE", "[8,8]"]
TINY_SCENES = [*TINY, "PERCENT", "0.0122", "TRAIN.IMAGE_SIZE", "[32,32]"]


def run_tool(name: str, *argv: str) -> int:
    """Run a tool as its command line would; its exit code."""
    return getattr(command, name)([str(a) for a in argv])
