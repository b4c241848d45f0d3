"""Wrong files by the thousand: checkpoints, caches of texts, lists of images, records of runs.

The suite tries a few. More, from another seed:

    FUZZ_COUNT=1000 FUZZ_SEED=1 python -m pytest -s tests/faults/test_wrong_files.py
"""

import os
from collections import Counter

import pytest

from wrong_contents import ALLOWED
from wrong_files import SUBJECTS

COUNT, SEED = (int(os.environ.get(f"FUZZ_{name}", n)) for name, n in [("COUNT", 20), ("SEED", 0)])
# Of COUNT: some take longer. A checkpoint is trained on for two steps.
SHARE = {"checkpoints of words": 0.3, "checkpoints of images": 0.15, "records of runs": 0.5}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_wrong_files(subject, tmp_path):
    outcomes, bad = Counter(), []
    for what, outcome in SUBJECTS[subject](tmp_path, int(COUNT * SHARE.get(subject, 1)), SEED):
        outcomes[outcome.split(":")[0]] += 1
        if outcome not in ALLOWED:
            bad.append(f"{what}: {outcome}")
    print(f"{subject}: {outcomes.total()} files, {dict(outcomes)}")
    assert not bad, "\n".join(bad)
    assert outcomes["refused"] or subject in ("caches of texts", "records of runs")
