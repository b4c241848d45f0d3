"""The records that the report of a run is made from."""

import pytest

from deq_sequence.text_report import last_record
from lib.errors import InputError

RECORDS = [
    {"kind": "train", "step": 1, "loss": 3.0},
    {"kind": "valid", "step": 1, "phase": "stacked", "loss": 2.5},
    {"kind": "valid", "step": 4, "phase": "equilibrium", "loss": 1.5},
]


def test_last_record():
    assert last_record(RECORDS, "valid")["step"] == 4
    assert last_record(RECORDS, "valid", phase="stacked")["step"] == 1
    with pytest.raises(InputError, match="no final_test record"):
        last_record(RECORDS, "final_test")
