"""bench_film.py on two short films: the table and its figures."""

import json

from bench_film import WHOLE, main


def test_the_command(tmp_path, capsys):
    out = tmp_path / "found.json"
    flags = ["--films", "2", "--frames", "4", "--speed", "0.5", "--f_thres", "2"]
    assert main([*flags, "--device", "cpu", "--json", str(out)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + 3  # machine, head, three ways
    found = json.loads(out.read_text())
    whole, short, film = found["ways"]
    assert [way["way"] for way in found["ways"]] == [
        WHOLE,
        "from zeros, threshold 2",
        "film, threshold 2",
    ]
    assert {way["speed"] for way in found["ways"]} == {0.5}
    assert whole["changed"] == 0
    assert whole["residual"] < 1e-3
    assert short["evaluations"] == 3
    # Six frames that follow; two films, each with a first frame that is solved to the end.
    assert 3 < film["evaluations"] < whole["evaluations"]
    assert film["changed"] < 0.02 < short["changed"]
    assert short["mIoU"] < 0.8 * film["mIoU"]
