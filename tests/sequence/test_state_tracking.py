"""State tracking: groups, strings, the curriculum, and runs of ``--dataset state:GROUP``."""

import itertools
import json
import random

import pytest
import torch

from deq_sequence.command import build_model, main
from deq_sequence.options import parse
from deq_sequence.state.curriculum import Curriculum
from deq_sequence.state.groups import get_group
from deq_sequence.state.strings import START, get_state_strings
from deq_sequence.state.trainer import StateTrainer
from lib.errors import InputError
from lib.runs.checkpoint import load
from lib.runs.run_folder import CHECKPOINT, LOG, WEIGHTS, read_metrics

# ---- groups ----------------------------------------------------------------------------------

SIZES = {"Z2": 2, "Z12": 12, "S2": 2, "S3": 6, "S4": 24, "S5": 120, "A3": 3, "A4": 12, "A5": 60}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_group_axioms(name, size):
    group = get_group(name)
    table, numbers = group.table, torch.arange(size)
    assert len(group) == len(set(group.symbols)) == size
    assert table.shape == (size, size)
    assert torch.equal(table[0], numbers)  # element 0 is the identity
    assert torch.equal(table[:, 0], numbers)
    for lines in (table, table.t()):  # each element once in each row and column: inverses exist
        assert torch.equal(lines.sort(1).values, numbers.expand(size, size))
    assert torch.equal(table[table], table[:, table])  # (ab)c = a(bc)


@pytest.mark.parametrize("name", ["S3", "S4", "A4", "A5"])
def test_products_compose_permutations(name):
    group = get_group(name)
    for a, b in itertools.product(range(len(group)), repeat=2):
        first, second = group.symbols[a], group.symbols[b]
        then = "".join(second[int(point) - 1] for point in first)
        assert group.symbols[int(group.table[a, b])] == then


def commutators(group) -> set[int]:
    """The subgroup that all a b a^-1 b^-1 generate."""
    table = group.table
    inverse = (table == 0).int().argmax(1)
    found = set(table[table, table[inverse][:, inverse]].flatten().tolist())
    while True:
        more = set(table[list(found)][:, list(found)].flatten().tolist())
        if more == found:
            return found
        found = more


def test_only_a5_is_perfect():
    sizes = {name: len(commutators(get_group(name))) for name in ("Z2", "S3", "A4", "S4", "A5")}
    assert sizes == {"Z2": 1, "S3": 3, "A4": 4, "S4": 12, "A5": 60}


@pytest.mark.parametrize(
    "name", ["", "S", "S1", "S7", "A2", "A7", "Z1", "Z1001", "s3", "S-3", "Q8"]
)
def test_unknown_group(name):
    with pytest.raises(InputError, match="unknown group"):
        get_group(name)


# ---- strings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Z5", "S3", "A5"])
def test_answers_are_running_products(name):
    strings = get_state_strings(f"state:{name}", 3)
    words, answers = strings.draw("train", 7, 5, 12)
    assert words.shape == (13, 5)
    assert answers.shape == (12, 5)
    assert strings.vocab.decode(words[0]) == [START] * 5
    assert len(strings.vocab) == len(strings.group) + 1
    for column in range(5):
        state = 0
        for word, answer in zip(words[1:, column], answers[:, column], strict=True):
            state = int(strings.group.table[state, word])
            assert state == answer


def test_strings_depend_on_seed_split_and_index_alone():
    draw = get_state_strings("state:S3", 1).draw
    one = draw("train", 4, 8, 20)[0]
    assert torch.equal(one, get_state_strings("state:S3", 1).draw("train", 4, 8, 20)[0])
    others = [draw("train", 5, 8, 20), draw("valid", 4, 8, 20), draw("test", 4, 8, 20)]
    others.append(get_state_strings("state:S3", 2).draw("train", 4, 8, 20))
    for other, _ in others:
        assert not (one[:, :, None] == other[:, None]).all(0).any()  # no string in common


def test_elements_are_uniform():
    words, _ = get_state_strings("state:S3", 0).draw("train", 0, 600, 20)
    counts = words[1:].flatten().bincount(minlength=6)
    expected = 600 * 20 / 6
    assert (counts - expected).square().sum() / expected < 30  # chi-squared, 5 degrees of freedom


# ---- the curriculum --------------------------------------------------------------------------


def test_the_curriculum_grows_with_a_low_loss():
    lengths = Curriculum(32, 0.1)
    seen = [lengths.longest]
    for _ in range(300):
        lengths.observe(lengths.longest, 0.05)
        if lengths.longest != seen[-1]:
            seen.append(lengths.longest)
    assert seen == [2, 3, 4, 5, 6, 7, 9, 11, 14, 18, 23, 29, 32]


def test_the_curriculum_waits_for_the_longest_strings():
    lengths = Curriculum(32, 0.1)
    for _ in range(50):
        lengths.observe(2, 0.5)  # too high
        lengths.observe(1, 0.0)  # of shorter strings
        lengths.observe(2, float("nan"))  # a skipped step
    assert lengths.longest == 2


def test_lengths_are_drawn_up_to_the_longest():
    lengths, rng = Curriculum(9, 0.0), random.Random(0)
    drawn = [lengths.draw(rng) for _ in range(400)]
    assert set(drawn) == set(range(2, 10))
    assert drawn.count(9) > 180


# ---- runs ------------------------------------------------------------------------------------

TINY = """
    --dataset state:S3 --d_model 16 --n_head 2 --d_head 8 --d_inner 32 --init_std 0.1
    --local_size 2 --inject own --mem_len 0 --tgt_len 4 --batch_size 8 --grow_below 9
    --f_solver fixed_point_iteration --grad phantom:steps=2,damping=1 --f_thres 6
    --f_thres_per_word 1 --rand_f_thres_delta 3 --lr 0.01 --max_step 24
    --log-interval 1 --save-interval 7 --eval_batch_size 5 --max_eval_steps 2 --num_threads 1
""".split()


@pytest.fixture
def state_flags(tmp_path):
    return [*TINY, "--work_dir", str(tmp_path / "runs"), "--name", "run"]


@pytest.fixture
def state_folder(tmp_path):
    return tmp_path / "runs-state-S3" / "run"


def test_a_run_and_its_evaluation(state_flags, state_folder, capsys):
    assert main(state_flags) == 0
    records = read_metrics(state_folder)
    final = [r for r in records if r["kind"].startswith("final_")]
    assert [r["kind"] for r in final] == [
        "final_test_4",
        "final_test_8",
        "final_test_16",
        "final_test_32",
    ]
    for record in final:
        assert record["strings"] == 10
        assert 0 <= record["exact"] <= record["accuracy"] <= 1
        assert record["nfe"] <= 2 * (6 + record["length"])
    assert "length 4" in (state_folder / LOG).read_text()
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert len(losses) == 24
    lines = [line for line in capsys.readouterr().out.splitlines() if "end of training" in line]
    assert main([*state_flags, "--eval"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert [x.split(" | ")[1:] for x in again] == [x.split(" | ")[1:] for x in lines]


def test_a_step_takes_the_same_number_of_elements_at_each_length(make_state_trainer):
    trainer = make_state_trainer("--grow_below", "0")
    sizes = {}
    for words, answers in trainer.batches():
        assert len(words) == len(answers) + 1
        sizes[len(answers)] = answers.shape[1]
        trainer.step += 1
    assert sizes == {2: 16, 3: 10, 4: 8}


def test_the_threshold_grows_with_the_length(make_state_trainer):
    trainer = make_state_trainer("--rand_f_thres_delta", "0", "--f_thres_per_word", "1.5")
    found = []
    for trainer.length in (2, 3, 4):
        found.append(trainer.draw().f_thres)
    assert found == [9, 10, 12]


@pytest.fixture
def make_state_trainer(state_flags):
    def make(*more):
        args = parse([*state_flags, *more])
        strings = get_state_strings(args.dataset, args.seed)
        device = torch.device("cpu")
        return StateTrainer(args, build_model(args, strings, device), strings, device)

    return make


@pytest.mark.parametrize("stop", [9, 15])
def test_stopped_and_restarted(state_flags, state_folder, stop_at, stop):
    """Bit for bit the run that was not stopped, with the length that the curriculum had reached."""
    assert main([*state_flags, "--name", "whole"]) == 0
    whole = state_folder.parent / "whole"
    stop_at(stop)
    assert main(state_flags) == 130
    before = load(state_folder / CHECKPOINT)
    assert 0 < before["step"] < stop
    assert main([*state_flags, "--restart"]) == 0
    one, two = (
        [
            {k: v for k, v in r.items() if not k.endswith(("_per_s", "_mib"))}
            for r in read_metrics(folder)
        ]
        for folder in (state_folder, whole)
    )
    assert one == two
    weights, expected = load(state_folder / WEIGHTS), load(whole / WEIGHTS)
    assert [key for key in weights if not torch.equal(weights[key], expected[key])] == []
    one, two = load(state_folder / CHECKPOINT), load(whole / CHECKPOINT)
    assert one["curriculum"] == two["curriculum"]
    assert one["curriculum"]["longest"] > 2
    assert one["curriculum"] != before["curriculum"]


def test_a_stacked_network(state_flags, state_folder):
    """As many steps of the stacked phase as there are steps: a baseline of fixed depth."""
    stack = "--n_layer 3 --eval_n_layer 3 --pretrain_steps 24".split()
    assert main([*state_flags, *stack]) == 0
    final = [r for r in read_metrics(state_folder) if r["kind"].startswith("final_")]
    assert [r["nfe"] for r in final] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--dataset", "state:Q8"], "unknown group 'Q8'"),
        (["--dataset", "state:"], "unknown group ''"),
        (["--dataset", "states"], "states"),
        (["--mem_len", "4"], "--mem_len 0"),
        (["--varlen"], "--varlen"),
        (["--spectral_radius_mode"], "--spectral_radius_mode"),
        (["--grow_below", "-1"], "--grow_below"),
        (["--f_thres_per_word", "-1"], "--f_thres_per_word"),
        (["--inject", "most"], "--inject"),
        (["--dataset", "demo", "--grow_below", "0"], "--f_thres_per_word"),
        (["--dataset", "demo", "--f_thres_per_word", "0"], "--grow_below"),
    ],
)
def test_bad_input(state_flags, state_folder, capsys, more, named):
    assert main([*state_flags, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not state_folder.exists()


def test_another_curriculum_cannot_continue_the_run(state_flags, capsys):
    assert main([*state_flags, "--max_step", "7"]) == 0
    assert main([*state_flags, "--restart", "--grow_below", "1"]) == 2
    assert "--grow_below" in capsys.readouterr().err


def test_settings_are_kept(state_flags, state_folder):
    assert main([*state_flags, "--max_step", "2"]) == 0
    kept = json.loads((state_folder / "settings.json").read_text())
    assert kept["dataset"] == "state:S3"
    assert kept["inject"] == "own"
