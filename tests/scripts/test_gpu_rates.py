"""gpu_rates.py on the CPU, in tiny sizes."""

import json

import gpu_rates
import pytest
import torch
from helpers.rates import published_share
from helpers.settings import SIZES, Options, chosen_settings


def test_command(tmp_path, capsys):
    out = tmp_path / "rates.json"
    flags = ["--tiny", "--settings", "wt103_deq_transformer_reg", "--formats", "bf16"]
    assert gpu_rates.main([*flags, "--steps", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    record = found["settings"]["wt103_deq_transformer_reg"]
    phases = record["formats"]["bf16"]
    assert list(phases) == ["stacked", "equilibrium", "jacobian"]
    for phase in ("equilibrium", "jacobian"):
        one = phases[phase]
        # To the published thresholds; J'0 is known.
        assert (one["f_evaluations"], one["b_evaluations"]) == (12, 13)
        assert 0 < one["forward_solve"] + one["backward_solve"] < one["seconds"]
    assert phases["stacked"]["forward_solve"] == 0
    assert "| wt103_deq_transformer_reg | bf16 | jacobian | " in capsys.readouterr().out
    (row,) = gpu_rates.rows(found)
    assert len(row) == len(gpu_rates.HEAD)


def test_without_time_it_says_so(tmp_path, capsys):
    out = tmp_path / "rates.json"
    assert gpu_rates.main(["--tiny", "--minutes", "0", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["settings"] == {}
    assert capsys.readouterr().out.count("left out") == len(gpu_rates.ORDER)


def test_all_settings_have_a_place_in_the_order():
    assert sorted(gpu_rates.ORDER) == sorted(chosen_settings("all"))


@pytest.mark.parametrize(
    ("name", "gpus", "share"),
    [
        ("wt103_deq_transformer", 4, 14),
        ("imagenet/cls_mdeq_XL", 4, 64),
        ("cifar/cls_mdeq_TINY", 2, 64),
    ],
)
def test_the_published_batch_is_shared(name, gpus, share):
    options = Options(size=SIZES["full"], device=torch.device("cpu"))
    assert published_share(name, options, gpus) == share
