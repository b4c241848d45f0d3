"""Odd settings are refused in one line, or taken as they are written."""

import pytest

import odd_settings
from lib.errors import InputError
from mdeq_vision import config, yaml_files
from odd_settings import ALLOWED, KINDS, Odd, outcome


@pytest.mark.parametrize("kind", KINDS)
def test_odd_settings(tmp_path, kind):
    found = [outcome(Odd(kind, seed), tmp_path) for seed in range(6)]
    assert [words for what, words in found if what not in ALLOWED] == []
    assert any(what == "refused" for what, _ in found)


def test_same_seed_same_inputs(tmp_path):
    def one():
        return [(odd, outcome(odd, tmp_path)) for odd in odd_settings.odd_settings(6, seed=3)]

    assert one() == one()


@pytest.mark.parametrize(
    ("check", "text", "expected"),
    [
        ("_check_tree", "TRAIN: {LR: 1.0}\nTRAIN: {WD: 1.0}", "silent change"),
        ("_check_plain", f"TRAIN: {{LR: {'9' * 400}}}", "traceback"),
        ("_check_plain", "MODEL: {EXTRA: {X: 2020-01-01}}", "traceback"),
        ("check_keys", "MODEL: {EXTRA: {FULL_STAGES: {}}}", "accepted"),
    ],
)
def test_the_instrument_notices_what_gets_by(tmp_path, monkeypatch, check, text, expected):
    """Without a check of the settings, files that it refuses fail in their own way."""
    monkeypatch.setattr(odd_settings, "_damaged", lambda rng, settings, write: text.encode())
    odd = Odd("yaml files of images", 0)
    assert outcome(odd, tmp_path)[0] == "refused"
    module = yaml_files if check == "_check_tree" else config
    monkeypatch.setattr(module, check, lambda *arguments: None)
    assert outcome(odd, tmp_path)[0] == expected


def test_messages_have_one_line(tmp_path, monkeypatch):
    def two_lines(rng, folder):
        raise InputError("a\nb")

    monkeypatch.setitem(KINDS, "two lines", two_lines)
    assert outcome(Odd("two lines", 0), tmp_path) == ("traceback", "a\nb")
