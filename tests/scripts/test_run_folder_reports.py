"""What audit.py and evaluations.py share."""

import pytest

import audit
import evaluations


@pytest.mark.parametrize("command", [audit, evaluations])
def test_a_file_is_not_overwritten(tmp_path, capsys, command):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    assert command.main([str(tmp_path), "--out", str(weights)]) == 2
    assert f"--out: {weights} exists: give another name" in capsys.readouterr().err
    assert weights.read_bytes() == b"weights"
