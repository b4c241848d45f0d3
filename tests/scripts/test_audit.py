"""scripts/audit.py: folders that hold no run. Its audits are tested beside each trainer."""

import pytest

from audit import main


def fails(capsys, *argv):
    """The one line that a call with bad input prints."""
    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_folders_that_hold_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "gone"):
        line = fails(capsys, folder)
        assert line.startswith(f"audit.py: {folder} holds no run: expected")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("settings.json", "{", "is not readable JSON"),
        ("config.yaml", "{", "is not a YAML file"),
        ("config.yaml", "DATASET: {DATASET: digits}", "has no MODEL.EXTRA.FULL_STAGE"),
    ],
)
def test_a_damaged_run(tmp_path, capsys, name, content, said):
    (tmp_path / name).write_text(content)
    assert said in fails(capsys, tmp_path)


def test_bad_flags(tmp_path, capsys):
    assert "--samples is 0, but must be an integer of at least 1" in fails(
        capsys, tmp_path, "--samples", 0
    )
    assert "unknown flag --sample: did you mean --samples?" in fails(capsys, tmp_path, "--sample")
