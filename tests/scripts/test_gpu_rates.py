"""gpu_rates.py on the CPU, in tiny sizes."""

import json
from pathlib import Path

import gpu_rates
import pytest
import torch
from helpers.rates import published_share
from helpers.settings import SIZES, Options, chosen_settings

DOCS = Path(__file__).resolve().parents[2] / "docs"


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
    assert "| wt103_deq_transformer_reg | bf16 | with Jacobian loss | " in capsys.readouterr().out
    (row,) = gpu_rates.rows(found)
    assert len(row) == len(gpu_rates.HEAD)
    notes = gpu_rates.notes(found)
    assert "median of 1 steps" in notes
    assert "Not measured in f32: wt103_deq_transformer_reg." in notes


def test_a_row_has_the_peak_of_each_phase():
    one = {"seconds": 0.1, "steps": 3, "f_evaluations": 12, "b_evaluations": 13}
    phases = {
        "stacked": {"error": "does not fit in memory"},
        "equilibrium": one | {"peak_bytes": 3 * 2**29},
    }
    settings = {"cifar/cls_mdeq_TINY": {"batch": 32, "formats": {"f32": phases}}}
    (row,) = gpu_rates.rows({"settings": settings})
    found = dict(zip(gpu_rates.HEAD, row, strict=True))
    assert found["stacked ms"] == found["stacked GiB"] == "does not fit"
    assert (found["equilibrium ms"], found["equilibrium GiB"]) == ("100", "1.5")
    assert found["with Jacobian loss ms"] == found["with Jacobian loss GiB"] == ""


def test_the_notes_name_what_is_missing_and_what_bf16_slows_down():
    figures = json.loads((DOCS / "data/gpu_rates.json").read_text(encoding="utf-8"))
    lines = gpu_rates.notes(figures).splitlines()
    (missing,) = [line for line in lines if line.startswith("- Not measured: ")]
    shown = {row[0] for row in gpu_rates.rows(figures)}
    assert set(missing[len("- Not measured: ") : -1].split(", ")) == {*gpu_rates.ORDER} - shown
    kinds = figures["settings"][gpu_rates.PAIR[0]]["formats"]
    slower = [line for line in lines if line.startswith("- Equilibrium: ")]
    longer = kinds["bf16"]["equilibrium"]["seconds"] > kinds["f32"]["equilibrium"]["seconds"]
    assert longer == (gpu_rates.PAIR[0] in "".join(slower))
    # What the page concludes from: a larger model takes about the same time.
    small, large = (figures["settings"][name]["formats"] for name in gpu_rates.PAIR)
    ratios = [large[k]["equilibrium"]["seconds"] / small[k]["equilibrium"]["seconds"]
              for k in ("f32", "bf16")]  # fmt: skip
    assert ratios[0] > 1.5
    assert ratios[1] < 1.1
    assert f"{ratios[0]:.2f} times" in lines[-1]
    assert f"{ratios[1]:.2f} times" in lines[-1]


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
