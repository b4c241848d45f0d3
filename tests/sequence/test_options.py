"""The command line: the published flags with their defaults, and every rule that resolves them."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from deq_sequence.options import build_parser, cutoffs_for, parse, run_folder
from lib.errors import InputError

CONTRACT = json.loads((Path(__file__).parents[1] / "data" / "lm_flags.json").read_text())["flags"]
ADDED = {
    *("--help", "--cutoffs", "--num_threads", "--amp", "--eval_batch_size"),
    *(
        "--batch_chunk",
        "--save-interval",
        "--compile",
        "--graph",
        "--tf32",
        "--max_time",
        "--max_skipped",
    ),
    *("--auto_restart", "--keep_checkpoints", "--grad", "--tie_proj_mode", "--deterministic"),
    *("--inject", "--f_start", "--eval_state", "--f_thres_per_word", "--grow_below"),
    *("--characters", "--lower_case", "--min_count", "--held_out", "--prompt"),
}
ACTIONS = {flag: action for action in build_parser()._actions for flag in action.option_strings}


def refusal(*argv) -> str:
    with pytest.raises(InputError) as caught:
        parse(list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- the contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("entry", CONTRACT, ids=lambda entry: entry["flag"])
def test_published_flag(entry):
    action = ACTIONS[entry["flag"]]
    if entry.get("action") == "store_true":
        assert action.nargs == 0
        assert action.const is True
        assert action.default is False
        return
    assert (action.type or str).__name__ == entry["type"]
    assert action.default == entry["default"]
    assert type(action.default) is type(entry["default"])
    assert action.nargs is None
    assert set(entry.get("choices", ())) <= set(action.choices or ())


def test_no_other_flags():
    assert set(ACTIONS) - {"-h"} == {entry["flag"] for entry in CONTRACT} | ADDED


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag, action in ACTIONS.items():
        assert flag in text
        assert action.help


def test_torchrun_leaves_the_flags_alone():
    """Its parser takes an abbreviation of its own flags for itself, also after the script."""
    for flag in ACTIONS:
        assert get_args_parser().parse_args(["train_transformer.py", flag]).training_script_args


# ---- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "flag", "nearest"),
    [
        (["--d_modle", "8"], "--d_modle", "--d_model"),
        (["--log_interval", "8"], "--log_interval", "--log-interval"),
        (["--batchsize=8"], "--batchsize=8", "--batch_size"),
        (["--drop", "0.1"], "--drop", "--dropout"),  # no abbreviations: they change with time
        (["--eval-tgt-len", "1"], "--eval-tgt-len", "--eval_tgt_len"),
    ],
)
def test_unknown_flag_names_the_nearest(argv, flag, nearest):
    message = refusal(*argv)
    assert flag in message
    assert f"did you mean {nearest}?" in message


def test_unknown_flag_that_is_near_nothing():
    message = refusal("--zzzzzz")
    assert "--zzzzzz" in message
    assert "--help" in message


@pytest.mark.parametrize(("flag", "value"), [("--lr", "fast"), ("--n_layer", "2.5")])
def test_value_of_another_type_names_flag_and_value(flag, value):
    message = refusal(flag, value)
    assert flag in message
    assert value in message


@pytest.mark.parametrize("name", [".", "..", "../other", "a/../..", "/elsewhere"])
def test_a_name_stays_within_the_work_dir(name):
    assert "--name" in refusal("--name", name)
    assert parse(["--name", "a/b.c"]).name == "a/b.c"


@pytest.mark.parametrize("flag", sorted(flag for flag, a in ACTIONS.items() if a.choices))
def test_unknown_value_lists_the_choices(flag):
    message = refusal(flag, "815")
    assert flag in message
    assert "815" in message
    assert all(str(choice) in message for choice in ACTIONS[flag].choices)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((flag, "-1") for flag in ("--warmup_step", "--max_step", "--start_train_steps")),
        *((flag, "-1") for flag in ("--pretrain_steps", "--jac_incremental", "--mem_len")),
        *((flag, "-1") for flag in ("--rand_f_thres_delta", "--local_size", "--num_threads")),
        *((flag, "-1") for flag in ("--save-interval", "--patience", "--lr", "--weight_decay")),
        *((flag, "-1") for flag in ("--lr_min", "--eta_min", "--jac_loss_weight")),
        *((flag, "-1") for flag in ("--init_std", "--proj_init_std", "--init_range")),
        ("--emb_init_range", "-1"),
        *((flag, "0") for flag in ("--n_layer", "--eval_n_layer", "--n_head", "--d_head")),
        *((flag, "0") for flag in ("--d_embed", "--d_inner", "--div_val")),
        ("--d_model", "0"),
        *((flag, "0") for flag in ("--batch_size", "--batch_chunk", "--eval_batch_size")),
        *((flag, "0") for flag in ("--tgt_len", "--eval_tgt_len", "--f_thres", "--b_thres")),
        *((flag, "0") for flag in ("--log-interval", "--eval-interval")),
        *(("--clip", "-0.1"), ("--dropout", "1"), ("--dropout", "-0.1"), ("--dropatt", "1")),
        *(("--dropout", "nan"), ("--jac_loss_freq", "1.1"), ("--jac_loss_freq", "-0.1")),
        *(("--decay_rate", "0"), ("--decay_rate", "1")),
        ("--batch_chunk", "7"),
    ],
)
def test_value_out_of_range(flag, value):
    message = refusal(flag, value)
    assert flag in message
    assert value in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max_eval_steps", "0"),
        ("--lr", "nan"),
        ("--jac_loss_weight", "nan"),
    ],
)
def test_value_that_cannot_work(flag, value):
    assert flag in refusal(flag, value)


# ---- derived values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "data"),
    [
        ("wt103", "../data/wikitext-103"),
        ("wt2", "data/wikitext-2"),
        ("ptb", "data/penn"),
        ("enwik8", "data/enwik8"),
        ("text8", "data/text8"),
        ("demo", "data/demo"),
    ],
)
def test_data_folder(dataset, data):
    assert parse(["--dataset", dataset]).data == data
    assert parse(["--dataset", dataset, "--data", "elsewhere"]).data == "elsewhere"


def test_wikitext_103_is_found_where_get_data_puts_it(tmp_path, monkeypatch):
    (tmp_path / "room" / "data" / "wikitext-103").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "room")
    assert parse([]).data == "data/wikitext-103"
    (tmp_path / "data" / "wikitext-103").mkdir(parents=True)
    assert parse([]).data == "../data/wikitext-103"


def test_get_data_puts_each_set_where_it_is_looked_for():
    script = (Path(__file__).parents[2] / "DEQ-Sequence" / "get_data.sh").read_text()
    function = re.search(r"^folder\(\) \{.*?^\}", script, re.MULTILINE | re.DOTALL)[0]
    for dataset in ("wt2", "ptb", "enwik8", "text8"):
        command = f"{function}\nfolder {dataset}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert parse(["--dataset", dataset]).data == f"data/{done.stdout.strip()}"


def test_d_embed_is_d_model_unless_given():
    assert parse(["--d_model", "64"]).d_embed == 64
    assert parse(["--d_model", "64", "--d_embed", "32"]).d_embed == 32


def test_same_length_is_a_local_size():
    assert parse(["--same_length", "--mem_len", "7"]).local_size == 7
    assert parse(["--same_length", "--mem_len", "7", "--local_size", "7"]).local_size == 7
    assert parse(["--mem_len", "7"]).local_size == 0
    assert "--same_length" in refusal("--same_length", "--mem_len", "0")
    assert "--same_length" in refusal("--same_length", "--mem_len", "7", "--local_size", "6")


def test_cutoffs_need_adaptive():
    assert "--adaptive" in refusal("--cutoffs", "10")
    assert parse(["--adaptive", "--cutoffs", "10", "20"]).cutoffs == [10, 20]


def test_restart_needs_a_run():
    assert "--restart" in refusal("--restart")
    assert parse(["--restart", "--name", "a"]).restart
    assert parse(["--restart", "--restart_dir", "a"]).restart


def test_restart_dir_needs_restart():
    assert "--restart_dir" in refusal("--restart_dir", "a")


def test_share_of_the_first_gpu():
    assert "--multi_gpu" in refusal("--gpu0_bsz", "4")
    assert parse(["--gpu0_bsz", "4", "--multi_gpu"]).gpu0_bsz == 4
    assert "--gpu0_bsz 61 exceeds --batch_size 60" in refusal("--gpu0_bsz", "61", "--multi_gpu")


def test_eval_needs_weights():
    assert "--eval" in refusal("--eval")
    assert parse(["--eval", "--name", "a"]).eval
    assert parse(["--eval", "--load", "a"]).eval


# ---- the folder of a run ---------------------------------------------------------------------


def test_run_folder():
    assert str(run_folder("LM-TFM", "wt103", "a")) == "LM-TFM-wt103/a"
    assert str(run_folder("/tmp/x", "demo", "b")) == "/tmp/x-demo/b"


@pytest.mark.parametrize("name", ["", "N/A"])
def test_run_without_a_name_has_a_time_stamp(name):
    assert re.fullmatch(r"\d{8}-\d{6}", run_folder("x", "demo", name).name)


# ---- clusters of the vocabulary --------------------------------------------------------------


def test_published_cutoffs():
    args = parse(["--adaptive"])
    assert cutoffs_for(args, 267_735) == [20_000, 40_000, 200_000]
    assert cutoffs_for(parse([]), 267_735) == []


@pytest.mark.parametrize("n_token", [1, 2, 3, 5, 13, 14, 100, 6_000, 33_278, 200_000, 200_001])
@pytest.mark.parametrize("dataset", ["wt103", "wt2", "demo"])
def test_cutoffs_of_smaller_vocabularies_lie_inside(n_token, dataset):
    cutoffs = cutoffs_for(parse(["--adaptive", "--dataset", dataset]), n_token)
    assert cutoffs == sorted(set(cutoffs))
    assert all(0 < cutoff < n_token for cutoff in cutoffs)
    if n_token >= 100:
        shares = [cutoff / n_token for cutoff in cutoffs]
        published = [cutoff / 267_735 for cutoff in (20_000, 40_000, 200_000)]
        tolerance = 0.26 if n_token > 200_000 else 1 / n_token  # the published ids, or shares
        assert shares == pytest.approx(published, abs=tolerance)


def test_given_cutoffs_are_taken():
    args = parse(["--adaptive", "--cutoffs", "3", "9"])
    assert cutoffs_for(args, 267_735) == [3, 9]
    assert cutoffs_for(args, 5) == [3, 9]  # for the model to refuse
