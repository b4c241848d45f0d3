"""Every command and every code block of the README and of the pages, on tiny data."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from attempts import Attempt

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

TINY_WORDS = """
    --d_model 16 --n_head 2 --d_head 8 --d_inner 16 --n_layer 2 --eval_n_layer 2 --f_thres 3
    --b_thres 3 --pretrain_steps 2 --max_step 4 --batch_size 4 --tgt_len 8 --mem_len 8
    --eval_tgt_len 8 --max_eval_steps 2 --log-interval 1 --num_threads 1
""".split()
STAGE = "MODEL.EXTRA.FULL_STAGE"
TINY_IMAGES = f"""
    MODEL.NUM_LAYERS 2 DEQ.F_THRES 3 DEQ.B_THRES 3 TRAIN.PRETRAIN_STEPS 2 TRAIN.END_EPOCH 1
    TRAIN.BATCH_SIZE_PER_GPU 4 PERCENT 0.02 TEST.NUM_SAMPLES 4
    MODEL.IMAGE_SIZE [8,8] TRAIN.IMAGE_SIZE [32,32] TEST.IMAGE_SIZE [32,32] TEST.BASE_SIZE 32
    {STAGE}.NUM_BRANCHES 2 {STAGE}.NUM_CHANNELS [8,8] {STAGE}.HEAD_CHANNELS [4,4]
    {STAGE}.NUM_BLOCKS [1,1] {STAGE}.BIG_KERNELS [0,0]
""".split()

# Commands that run here, in this order, each in the folder that the page names.
RUN = {
    "python train_transformer.py --dataset demo --name try": "DEQ-Sequence",
    "python train_transformer.py --dataset demo --name try --restart": "DEQ-Sequence",
    "python train_transformer.py --dataset demo --name try --eval --spectral_radius_mode": (
        "DEQ-Sequence"
    ),
    "python tools/cls_train.py --cfg experiments/digits/cls_mdeq_TINY.yaml": "MDEQ-Vision",
    "python tools/cls_valid.py --cfg experiments/digits/cls_mdeq_TINY.yaml "
    "DEQ.SPECTRAL_RADIUS_MODE True": "MDEQ-Vision",
    "python tools/seg_train.py --cfg experiments/digit_scenes/seg_mdeq_TINY.yaml": "MDEQ-Vision",
    "python tools/seg_test.py --cfg experiments/digit_scenes/seg_mdeq_TINY.yaml": "MDEQ-Vision",
    "bash scripts/quickstart.sh": ".",
    'python DEQ-Sequence/generate.py docs/models/words.safetensors --prompt "this function returns"'
    "": ".",
    "python MDEQ-Vision/tools/segment.py docs/models/scenes.safetensors docs/figures/scene.png": (
        "."
    ),
}
# Commands that other tests run, by the file that does.
ELSEWHERE = {
    "bash get_data.sh wt103": "sequence/test_get_data.py",
    "bash wt103_deq_transformer.sh train": "sequence/test_launch_scripts.py",
    "bash wt103_deq_transformer_reg.sh train": "sequence/test_launch_scripts.py",
    "bash wt103_deq_transformer_preln_reg.sh train": "sequence/test_launch_scripts.py",
    "bash wt103_deq_transformer_reg.sh eval": "sequence/test_launch_scripts.py",
    "python train_transformer.py --dataset demo --name steps "
    "--grad phantom:steps=3,damping=0.8 --f_thres 6": "sequence/test_gradients_training.py",
    "python train_transformer.py --dataset demo --name solvers "
    "--f_solver broyden:memory=8,stop=sample --b_solver gmres": (
        "sequence/test_gradients_training.py"
    ),
    "bash get_data.sh cifar10": "vision/test_get_images.py",
    "bash get_data.sh imagenet ~/Downloads": "vision/test_get_images.py",
    "bash get_data.sh cityscapes ~/Downloads": "vision/test_get_images.py",
    "python tools/make_cityscapes_lists.py data": "vision/test_datasets_segmentation.py",
    "python tools/cls_train.py --cfg experiments/cifar/cls_mdeq_LARGE_reg.yaml": (
        "vision/test_experiments.py"
    ),
    "python tools/cls_train.py --cfg experiments/imagenet/cls_mdeq_SMALL_reg.yaml": (
        "vision/test_experiments.py"
    ),
    "python tools/extract_pretrained.py output/imagenet/cls_mdeq_SMALL/model.pt "
    "pretrained_models/mdeq_SMALL.pth": "vision/test_transfer_runs.py",
    "torchrun --nproc_per_node=4 tools/seg_train.py "
    "--cfg experiments/cityscapes/seg_mdeq_SMALL.yaml": "vision/test_ddp_vision.py",
    "python tools/seg_test.py --cfg experiments/cityscapes/seg_mdeq_SMALL.yaml "
    "TEST.FLIP_TEST True": "vision/test_seg_test.py",
    "NPROC=4 bash wt103_deq_transformer_reg.sh train": "sequence/test_launch_scripts.py",
    "MASTER=host0 NODES=2 GPUS=4 RESTARTS=3 bash scripts/cluster/multinode.sh "
    "bash wt103_deq_transformer_reg.sh train": "scripts/test_cluster_scripts.py",
    "sbatch --nodes=2 scripts/cluster/slurm.sh bash wt103_deq_transformer_reg.sh train": (
        "scripts/test_cluster_scripts.py"
    ),
    "sbatch --time=8:00:00 scripts/cluster/slurm.sh python tools/seg_train.py "
    "--cfg experiments/cityscapes/seg_mdeq_SMALL.yaml": "scripts/test_cluster_scripts.py",
    "python scripts/export_weights.py DEQ-Sequence/LM-TFM-demo/try/model.pt words.safetensors": (
        "scripts/test_export_weights.py"
    ),
    'python generate.py ../docs/models/words.safetensors --prompt "this function returns" '
    "--seed 1": "sequence/test_evaluate_text.py",
    **{
        f"python evaluate.py ../docs/models/words.safetensors data/demo/{flags}": (
            "sequence/test_evaluate_text.py"
        )
        for flags in (
            "test.txt --batch_size 10",
            "test.txt --batch_size 10 --mem_len 0 32 64 --f_thres 1 2 4 6 12 --figure sweep.png",
            "valid.txt --tokens tokens.csv",
        )
    },
    "python ../scripts/export_weights.py LM-TFM-demo/try try.safetensors": (
        "sequence/test_load.py"
    ),
    **{
        f"python scripts/report.py {words}": "scripts/test_report.py"
        for words in (
            "DEQ-Sequence/LM-TFM-demo/quickstart",
            "DEQ-Sequence/LM-TFM-demo/quickstart DEQ-Sequence/LM-TFM-demo/jfb --out both.html",
            "DEQ-Sequence/LM-TFM-demo/quickstart --png figures",
        )
    },
    "python DEQ-Sequence/quickstart.py --name jfb --grad jfb": "sequence/test_quickstart.py",
    "python scripts/audit.py DEQ-Sequence/LM-TFM-demo/quickstart": "sequence/test_audits.py",
    "python scripts/evaluations.py DEQ-Sequence/LM-TFM-demo/quickstart": (
        "sequence/test_finished_run.py"
    ),
    "python scripts/benchmarks/bench_audits.py": "scripts/test_bench_audits.py",
    **{
        f"bash state_tracking.sh train --dataset state:{flags}": "sequence/test_launch_scripts.py"
        for flags in ("Z2", "S3", "A5 --max_step 3500")
    },
    "python examples/own_layer.py": "scripts/test_own_layer.py",
    "python scripts/benchmarks/bench_own_layer.py": "scripts/test_own_layer.py",
    "python examples/prefix_sums.py": "scripts/test_prefix_sums.py",
    "python examples/prefix_sums_compared.py --seeds 5 --stacked 1 --grads 1 "
    "--out docs/data/prefix_sums.json": "scripts/test_prefix_sums.py",
    "python examples/prefix_sums_compared.py --from docs/data/prefix_sums.json "
    "--figure docs/figures/prefix_sums.png": "scripts/test_prefix_sums.py",
    "python examples/mazes.py": "scripts/test_mazes.py",
    "python examples/own_data.py data/own": "test_own_data.py",
    "python quickstart.py --dataset text --data ../data/own/text.txt --name own": (
        "test_own_data.py"
    ),
    "python quickstart.py --dataset text --data ../data/own/text.txt --name own --eval "
    '--prompt "The value of"': "test_own_data.py",
    **{
        f"python tools/{tool}.py --cfg experiments/own/{file}_mdeq_TINY.yaml --dataDir ..": (
            "test_own_data.py"
        )
        for tool, file in (
            *(("cls_train", "cls"), ("cls_valid", "cls")),
            *(("seg_train", "seg"), ("seg_test", "seg")),
        )
    },
    "python tools/classify.py ../docs/models/digits.safetensors ../docs/figures/digit.png": (
        "vision/test_classify.py"
    ),
    "python tools/segment.py ../docs/models/scenes.safetensors ../docs/figures/scene.png": (
        "vision/test_segment.py"
    ),
    "python tools/segment.py ../docs/models/scenes.safetensors FOLDER_OF_FRAMES --sequence": (
        "vision/test_film.py"
    ),
    # What made the environment that these tests run in: its result is tested.
    "pip install -r requirements.txt": "test_house.py",
    "source .venv/bin/activate": "test_house.py",
    "bash scripts/test.sh": "test_house.py",
    "bash scripts/notebooks.sh": "test_notebooks.py",
    "bash scripts/gpu_check.sh": "scripts/test_gpu_check.py",
    "pip install --no-deps torchdeq==0.1.0": "scripts/test_bench_solvers.py",
    "python scripts/benchmarks/bench_solvers.py": "scripts/test_bench_solvers.py",
    "python scripts/benchmarks/bench_steps.py": "scripts/test_bench_steps.py",
    "python scripts/benchmarks/bench_train.py": "scripts/test_bench_train.py",
    "python scripts/benchmarks/bench_gradients.py": "scripts/test_bench_gradients.py",
    "python scripts/benchmarks/compare_gradients.py": "scripts/test_compare_gradients.py",
    "python scripts/plan_training.py --run wt103_reg --gpus 4 --gpu h100": (
        "scripts/test_plan_training.py"
    ),
}


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def test_no_command_is_untested():
    shown = [line for p in PAGES for block in blocks("bash", p) for line in block.splitlines()]
    assert {line for line in shown if line} == {*RUN, *ELSEWHERE}
    for file in ELSEWHERE.values():
        assert (ROOT / "tests" / file).is_file()


def test_the_readme_is_short():
    assert len(PAGES[0].read_text("utf-8").split()) <= 900


def with_tiny_sizes(command, data, folder):
    """The command, or all that it starts, on little data and with its runs in ``folder``."""
    words = [*TINY_WORDS, "--data", str(data), "--work_dir", str(folder / "runs")]
    if "quickstart.sh" in command:
        images = [*TINY_IMAGES, "OUTPUT_DIR", str(folder / "quickstart")]
        copy = folder / "copy"
        bits = ["--steps", "1", "--longest", "32"]
        parts = {"--bits": bits, "--words": words, "--images": images}
        return [line for part, flags in parts.items() for line in started(copy, part, *flags)]
    if "generate.py" in command:
        return [[*shlex.split(command), "--words", "3"]]
    if "segment.py" in command:
        return [[*command.split(), "--out", str(folder / "segmented")]]
    if "--cfg" in command:
        return [[*command.split(), *TINY_IMAGES, "OUTPUT_DIR", str(folder / "output")]]
    return [[*command.split(), *words]]


def started(folder, *arguments):
    """The commands that quickstart.sh starts: those of a copy whose Python only prints them."""
    python, setup = folder / ".venv/bin/python", folder / "scripts/setup_env.sh"
    for file, text in ((python, '#!/bin/sh\necho "$@"\n'), (setup, "[ $1 = requirements.txt ]\n")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    python.chmod(0o755)
    script = shutil.copy(ROOT / "scripts/quickstart.sh", folder / "scripts")
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace(str(folder), str(ROOT)).splitlines()
    assert lines
    return [["python", *line.split()] for line in lines]


def test_the_quickstart_begins_with_bits(tmp_path):
    names = [Path(line[1]).name for line in started(tmp_path)]
    assert names == ["prefix_sums.py", *["quickstart.py"] * 3]
    assert [Path(line[1]).name for line in started(tmp_path, "--restart")] == names[1:]


@pytest.mark.parametrize("room", ["DEQ-Sequence", "MDEQ-Vision", "."])
def test_commands_run(room, demo_folder, server, tmp_path):
    for command in (command for command, folder in RUN.items() if folder == room):
        for words in with_tiny_sizes(command, demo_folder, tmp_path):
            assert words[0] == "python"
            with Attempt(words[1:], server=server, folder=ROOT / room) as attempt:
                assert attempt.wait() == 0, f"{command}: {attempt.errors()}"
            assert re.search(
                r"test .* ppl \d|test / unigram|top1 \d|mIoU \d|test accuracy|plain iteration +\d"
                r"|^.this function returns.( \S+){3}$|residual \d",
                "\n".join(attempt.lines),
                flags=re.MULTILINE,
            ), attempt.lines


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks("python", page))
    ],
)
def test_code_blocks_run(page, block, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(block.replace("range(300)", "range(3)"), page.name, "exec"), {})


def test_the_layer_shown_is_the_example():
    """Each line of the README's layer, but for imports, stands in the example in this order."""
    example = (ROOT / "examples/own_layer.py").read_text("utf-8").replace("args.steps", "300")
    lines = iter([line.strip() for line in example.splitlines()])
    (block,) = blocks("python", PAGES[0])
    for line in block[block.index("class") :].splitlines():
        assert line.strip() in lines, line  # an iterator: the search goes on behind the last line
