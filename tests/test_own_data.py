"""The page on your own data: its commands in their order, on less data and in small sizes."""

import csv
import re
import shlex

import numpy as np
import pytest
from PIL import Image

import own_data
from attempts import Attempt
from test_readme import ROOT, TINY_IMAGES, TINY_WORDS

PAGE = (ROOT / "docs/own-data.md").read_text("utf-8")
N_VAL = 4


def commands():
    """(folder, command line) of each command, in order."""
    found, folder = [], "."
    for named, block in re.findall(r"[Ii]n the folder `(.+?)`|```bash\n(.*?)```", PAGE, re.S):
        folder = named or folder
        found += [(folder, line) for line in block.splitlines()]
    return found


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, server):
    """What each command printed, by its first words; and the folder of data and runs."""
    place = tmp_path_factory.mktemp("own")
    small = [*TINY_IMAGES, *"PERCENT 1 TEST.NUM_SAMPLES 0 TRAIN.PRETRAIN_STEPS 1".split()]
    small += ["OUTPUT_DIR", str(place / "out")]
    printed = {}
    for room, line in commands():
        line = line.replace("../data/own", f"{place}/data/own").replace("Dir ..", f"Dir {place}")
        python, script, *flags = shlex.split(line)
        assert python == "python"
        if script == "examples/own_data.py":
            with pytest.MonkeyPatch.context() as patch:
                few = dict(list(own_data.topics.items())[:10])
                patch.setattr(own_data, "topics", few)
                patch.setattr(own_data, "N_PICTURES", {"train": 4, "val": N_VAL})
                patch.setattr(own_data, "N_SCENES", {"train": 8, "val": N_VAL})
                own_data.main([str(place / flags[0])])
            continue
        flags += small if "--cfg" in flags else [*TINY_WORDS, "--work_dir", str(place / "LM-TFM")]
        with Attempt([script, *flags], server=server, folder=ROOT / room) as attempt:
            assert attempt.wait() == 0, f"{line}: {attempt.errors()}"
        printed[f"{script} --eval" if "--eval" in flags else script] = attempt.lines
    return printed, place


def test_text(outputs):
    printed, place = outputs
    assert any(line.startswith("test / unigram") for line in printed["quickstart.py"])
    assert printed["quickstart.py"][-1].startswith("[")
    *figures, sample = printed["quickstart.py --eval"]
    assert len([line for line in figures if re.search(r"\| (valid|test) \| .* ppl \d", line)]) == 2
    assert sample.startswith("[The value of] ")
    assert (place / "LM-TFM-text-text/own/model.pt").is_file()


def test_pictures(outputs):
    printed, place = outputs
    for shape in own_data.SHAPES:
        pattern = rf"{shape} +\d+\.\d\d  of {N_VAL}"
        assert any(re.fullmatch(pattern, line) for line in printed["tools/cls_valid.py"])
    file = place / "out/own_pictures/cls_mdeq_TINY/predictions/classes.csv"
    assert printed["tools/cls_valid.py"][-1] == f"predictions in {file}"
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == N_VAL * len(own_data.SHAPES)
    assert {row["predicted"] for row in rows} <= set(own_data.SHAPES)


def test_scenes(outputs):
    printed, place = outputs
    for name in ("background", *own_data.SHAPES):
        assert any(re.fullmatch(rf"{name} +[\d.-]+", x) for x in printed["tools/seg_test.py"])
    assert any(re.search(r"mIoU \d", line) for line in printed["tools/seg_test.py"])
    predictions = place / "out/own_scenes/seg_mdeq_TINY/predictions"
    with Image.open(predictions / "labels/images/val_000.png") as image:
        labels = np.array(image)
    assert set(labels.ravel().tolist()) <= {0, 10, 20, 30}
    palette = {0: [40, 40, 40], 10: [230, 25, 75], 20: [60, 180, 75], 30: [0, 110, 230]}
    with Image.open(predictions / "colours/images/val_000.png") as image:
        assert np.array(image)[0, 0].tolist() == palette[labels[0, 0]]
    assert len(list((predictions / "overlays/images").iterdir())) == N_VAL
