"""Every command and every code block of the README, on tiny data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

TINY = """
    --d_model 16 --n_head 2 --d_head 8 --d_inner 16 --n_layer 2 --eval_n_layer 2 --f_thres 3
    --b_thres 3 --pretrain_steps 2 --max_step 4 --batch_size 4 --tgt_len 8 --mem_len 8
    --eval_tgt_len 8 --max_eval_steps 2 --log-interval 1 --num_threads 1
""".split()

# Commands that run here, in this order, each in the folder that the README names.
RUN = {
    "python train_transformer.py --dataset demo --name try": "DEQ-Sequence",
    "python train_transformer.py --dataset demo --name try --restart": "DEQ-Sequence",
    "python train_transformer.py --dataset demo --name try --eval --spectral_radius_mode": (
        "DEQ-Sequence"
    ),
    "bash scripts/quickstart.sh": ".",
}
# Commands that other tests run, by the file that does.
ELSEWHERE = {
    "bash get_data.sh wt103": "sequence/test_get_data.py",
    "bash wt103_deq_transformer.sh train": "sequence/test_launch_scripts.py",
    "bash wt103_deq_transformer_reg.sh train": "sequence/test_launch_scripts.py",
    "bash wt103_deq_transformer_preln_reg.sh train": "sequence/test_launch_scripts.py",
    "bash wt103_deq_transformer_reg.sh eval": "sequence/test_launch_scripts.py",
    # What made the environment that these tests run in: its result is tested.
    "pip install -r requirements.txt": "test_house.py",
    "bash scripts/test.sh": "test_house.py",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_no_command_of_the_readme_is_untested():
    shown = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert sorted(shown) == sorted([*RUN, *ELSEWHERE])
    for file in ELSEWHERE.values():
        assert (ROOT / "tests" / file).is_file()


def test_commands_run(demo_folder, tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    places = ["--data", str(demo_folder), "--work_dir", str(tmp_path / "runs")]
    for command, folder in RUN.items():
        if "quickstart.sh" in command and Path(sys.prefix) != ROOT / ".venv":
            continue  # it would install another environment: run the tests by scripts/test.sh
        result = subprocess.run(
            [*command.split(), *TINY, *places],
            cwd=ROOT / folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{command}: {result.stderr}"
        assert re.search(r"test .* ppl \d|test / unigram", result.stdout), result.stdout


@pytest.mark.parametrize("block", blocks("python"))
def test_code_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})
