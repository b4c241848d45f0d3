"""Tables, means and curves of finished runs."""

import pytest

from lib.runs.figures import draw_curves, solver_rows, table

RECORDS = [
    {"kind": "train", "step": 1, "loss": 3.0},
    {"kind": "valid", "step": 1, "phase": "stacked", "loss": 2.5},
    # The window of step 2 began before the border.
    *(
        {
            "kind": "train",
            "step": step,
            "loss": 2.0,
            "forward_rel_residual": residual,
            "forward_nfe": 10.0,
            "backward_rel_residual": 2 * residual,
            "backward_nfe": 12.0,
        }
        for step, residual in ((2, 9.0), (3, 0.1), (4, 0.3))
    ),
    {"kind": "valid", "step": 4, "phase": "equilibrium", "loss": 1.5},
]


def test_table_is_aligned():
    rows = [("name", "a", "b"), ("", "", ""), ("longer name", "1.5", "")]
    assert table(rows) == [
        "name                      a           b",
        "",
        "longer name             1.5",
    ]


def test_solver_rows_are_means_over_the_equilibrium_phase():
    rows = solver_rows(RECORDS, 2, {"rel_residual": 0.05, "nfe": 9.0})
    assert rows[1:] == [
        ("forward, training mean", "2.00e-01", "10.0"),
        ("backward, training mean", "4.00e-01", "12.0"),
        ("forward, evaluation mean", "5.00e-02", "9.0"),
    ]


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:2]], ids=["both phases", "stacked only"])
def test_curves_are_a_png(records, tmp_path):
    drawn = []

    def draw(axes):
        axes.plot([1, 2], [1, 2], label="loss")
        drawn.append(axes)

    draw_curves(records, 2, tmp_path / "curves.png", draw)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(drawn) == 1
