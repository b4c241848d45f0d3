"""The example of mazes: its mazes, its module against weights set by hand, its command."""

import json
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import maze_ablations
import maze_pictures
import mazes
from mazes import SIDES, PathFinder, heard, solve


def neighbours(sides, cell):
    y, x = cell
    return [(y + dy, x + dx) for d, (dy, dx) in enumerate(SIDES) if sides[d][y][x]]


def searched(sides, start, goal):
    """All cells that can be reached from the start, and those of a shortest path (BFS)."""
    came, front = {start: None}, [start]
    while front:
        cell = front.pop(0)
        for to in neighbours(sides, cell):
            if to not in came:
                came[to] = cell
                front.append(to)
    path = [goal]
    while path[-1] != start:
        path.append(came[path[-1]])
    return set(came), path


@settings(max_examples=60)
@given(st.integers(2, 9), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 10**6))
def test_a_maze_is_a_tree_and_its_path_the_one_between_the_ends(n, branching, seed):
    sides, ends, path = mazes.maze(n, random.Random(seed), branching)
    cells = {(y, x) for y in range(n) for x in range(n)}
    assert sides.sum() == 2 * (n * n - 1)  # a tree has one passage less than cells
    for cell in cells:
        for to in neighbours(sides, cell):
            assert to in cells
            assert cell in neighbours(sides, to)
    assert ends.sum((0, 1)).tolist() == [1, 1]
    start, goal = ([c for c in cells if ends[c][k]] for k in (0, 1))
    reached, way = searched(sides.tolist(), *start, *goal)
    assert reached == cells
    assert start != goal
    assert {cell for cell in cells if path[cell]} == set(way)


def test_branching_makes_junctions():
    def junctions(branching):
        sides = mazes.mazes(10, 9, random.Random(0), branching)[0]
        return (sides.sum((1, -1)) > 2).sum().item()

    assert junctions(0.5) > 1.5 * junctions(0.0)


def by_hand() -> PathFinder:
    """Messages of two numbers: (1, 1) if an end lies behind, (0, sqrt 2) if not.

    A cell is on the path if ends lie behind two of its sides, or behind one, and it is an end.
    """
    model = PathFinder(2).eval()
    values = {
        "f.ends.weight": [[1, 1], [1, 1]],
        "f.ends.bias": [0, -1],
        "f.mix.weight": [[1, 0], [1, 0]],
        "f.out.weight": [[1, -1], [0, 0]],  # min(1, number of ends behind)
        "f.out.bias": [0, 1],
    }
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state |= {name: torch.tensor(value).float() for name, value in values.items()}
    state["read.net.0.weight"][0] = torch.tensor([1, 0, 1, 1])
    state["read.net.2.weight"][0, 0] = 10
    state["read.net.2.bias"][0] = -15
    model.load_state_dict(state)
    return model


def test_weights_set_by_hand_fill_dead_ends():
    found = solve(by_hand(), *mazes.mazes(20, 12, random.Random(0), 0.2))
    assert found["exact"].all()
    # News travels one cell per evaluation, and the last to hear of both ends is an end.
    assert torch.equal(found["right_from"], found["path"] - 1)
    assert found["residual"].max() <= 1e-3
    assert (found["evaluations"] >= found["right_from"]).all()


def test_what_never_is_right_is_counted_so():
    model = by_hand()
    with torch.no_grad():
        model.read.net[2].bias += 20  # "every cell is on the path"
    found = solve(model, *mazes.mazes(4, 5, random.Random(0)))
    assert not found["exact"].any()
    assert (found["right_from"] > found["evaluations"].max()).all()


@pytest.mark.parametrize("seed", range(3))
def test_any_weights_settle_at_one_point(seed):
    torch.manual_seed(seed)
    model = PathFinder().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    sides, ends, _ = (t.double() for t in mazes.mazes(4, 6, random.Random(seed), 0.3))
    f, ends_of_solves = model.layer(sides, ends), []
    for z in (model.start(sides), 10 * torch.randn_like(model.start(sides))):
        for _ in range(model.limit(sides) - 1):
            z = f(z)
        torch.testing.assert_close(f(z), z)
        ends_of_solves.append(z)
    torch.testing.assert_close(*ends_of_solves)


def turned(sides, plane):
    """A maze turned by 90 degrees: what was east is now north."""
    return sides.rot90(1, (2, 3)).roll(-1, 1), plane.rot90(1, (1, 2))


def mirrored(sides, plane):
    """A maze whose east is now west."""
    return sides.flip(3)[:, [0, 3, 2, 1]], plane.flip(2)


@pytest.mark.parametrize("move", [turned, mirrored])
def test_a_moved_maze_has_the_moved_answer(move):
    torch.manual_seed(0)
    model = PathFinder().double().eval()
    sides, ends, path = (t.double() for t in mazes.mazes(3, 5, random.Random(0), 0.5))
    new_sides, new_ends = move(sides, ends)
    new_path = move(sides, path)[1]
    assert torch.equal(new_ends.sum(-1) * new_path, new_ends.sum(-1))  # ends stay on the path
    inside = heard(torch.ones_like(model.start(sides)), new_sides)
    assert torch.equal(inside, new_sides.expand_as(inside))
    answer = move(sides, model(sides, ends))[1]
    torch.testing.assert_close(model(new_sides, new_ends), answer)


def test_selected_mazes_are_evaluated_alone():
    model, rows = PathFinder(), torch.tensor([3, 1])
    sides, ends, _ = mazes.mazes(4, 4, random.Random(0))
    f, z = model.layer(sides, ends), torch.randn(4, 4, 4, 4, 16)
    torch.testing.assert_close(f.select(rows)(z[rows]), f(z)[rows])


def test_training_lowers_the_loss():
    model, losses = mazes.train(seed=0, steps=60, draw=partial(mazes.lesson, largest=3))
    assert not model.training
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_lessons_without_an_end_have_no_path():
    torch.manual_seed(0)
    sides, ends, path = mazes.lesson(random.Random(0), hide=0.5)
    both = ends.sum((1, 2, 3)) == 2
    assert both.any()
    assert not both.all()
    assert path[both].sum((1, 2)).min() >= 2
    assert path[~both].sum() == 0
    assert 3 <= sides.shape[-2] <= mazes.LARGEST


@pytest.mark.parametrize(("depth", "sets"), mazes.STACKS.values(), ids=mazes.STACKS)
def test_a_stack_learns_all_its_layers(depth, sets):
    model = mazes.Stack(depth, sets)
    sides, ends, _ = mazes.mazes(2, 6, random.Random(0))
    model(sides, ends).sum().backward()
    assert len(model.layers) == sets
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_tied_stack_is_the_unfinished_solve():
    model, stack = PathFinder(), mazes.Stack(5, 1)
    stack.layers[0].load_state_dict(model.f.state_dict())
    stack.read.load_state_dict(model.read.state_dict())
    sides, ends, _ = mazes.mazes(2, 4, random.Random(0))
    f, z = model.layer(sides, ends), model.start(sides)
    for _ in range(5):
        z = f(z)
    torch.testing.assert_close(stack(sides, ends), model.read(z, sides, ends))


def test_the_command(tmp_path, capsys):
    names = {"--out": "all.json", "--save": "weights.pt", "--picture": "maze"}
    files = [word for flag, name in names.items() for word in (flag, str(tmp_path / name))]
    few = ["--steps", "1", "--sizes", "3", "4", "--mazes", "12", "--seeds", "2", "--stacked"]
    assert mazes.main([*few, *files]) == 0
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "all.json").read_text())
    assert [run["seed"] for run in figures["equilibria"]] == [0, 1]
    assert [stack["name"] for stack in figures["stacks"]] == list(mazes.STACKS)
    tests = figures["equilibria"][1]["tests"]
    assert [(t["size"], t["branching"]) for t in tests] == [(3, 0), (3, 0.5), (4, 0), (4, 0.5)]
    for test in tests:
        assert {len(test[key]) for key in ("exact", "path", "evaluations", "right_from")} == {12}
    assert said.count("trained for") == 2 + len(mazes.STACKS)
    PathFinder().load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert Image.open(tmp_path / "maze.gif").n_frames > 2


def test_the_pictures(tmp_path):
    model = by_hand()
    sides, ends, path = mazes.mazes(1, 24, random.Random(0))
    found = maze_pictures.moments(model, sides, ends)
    assert [moment.evaluations for moment in found] == list(range(len(found)))
    assert not found[0].reached.any()
    assert found[-1].reached.all()
    assert torch.equal(found[-1].chance > 0.5, path[0] > 0)
    assert found[-1].residual <= 1e-3 < found[-2].residual
    maze_pictures.draw(model, sides, ends, tmp_path / "maze")
    film = Image.open(tmp_path / "maze.gif")
    assert film.n_frames == maze_pictures.FRAMES < len(found)
    shown = [i for i in maze_pictures.STRIP if i < len(found) - 1]
    strip, one = Image.open(tmp_path / "maze.png"), 7 * (24 + 2)
    assert strip.width == one * (len(shown) + 1)
    orange = tuple(maze_pictures.ON_PATH)
    parts = [strip.convert("RGB").crop((one * i, 0, one * (i + 1), one)) for i in (0, len(shown))]
    counts = [sum(n for n, c in part.getcolors() if c == orange) for part in parts]
    assert counts[0] == 0
    assert counts[1] > 20 * path.sum()  # pixels


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "0"],
        ["--steps", "0"],
        ["--mazes", "0"],
        ["--stacked", "-1"],
        ["--sizes", "1"],
        ["--sizes", "nine"],
        ["--out", "nowhere/all.json"],
        ["--save", "nowhere/weights.pt"],
        ["--picture", "nowhere/maze"],
        ["--seed", "1"],
    ],
    ids=" ".join,
)
def test_bad_flags(arguments, capsys):
    assert mazes.main(arguments) == 2
    said = capsys.readouterr().err
    assert arguments[0] in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", maze_ablations.VARIANTS)
def test_each_ablation_trains(name):
    make, lessons = maze_ablations.VARIANTS[name]
    torch.manual_seed(0)
    before = {key: value.clone() for key, value in make().state_dict().items()}
    model, _ = mazes.train(0, 2, make, lessons(2))
    after = model.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before if "weight" in key)


def test_ablations(monkeypatch, tmp_path):
    monkeypatch.setattr(maze_ablations, "TESTS", {"4": (4, 0.0, 12)})
    out = tmp_path / "ablations.json"
    few = ["--only", "echoes", "jfb", "--steps", "1", "--out", str(out)]
    assert maze_ablations.main(few) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["echoes", "jfb"]
    assert all(set(row["exact"]) == {"4"} for row in rows)


@pytest.mark.parametrize(
    "arguments", [["--only", "nothing"], ["--steps", "0"], ["--out", "nowhere/x"]], ids=" ".join
)
def test_bad_flags_of_the_ablations(arguments, capsys):
    assert maze_ablations.main(arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_jacobian_loss_joins_the_gradient():
    logit, loss = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    shown = maze_ablations.Plus.apply(logit, 2 * loss)
    assert torch.equal(shown, logit)
    shown.sum().backward()
    assert loss.grad.item() == 2
    assert logit.grad.tolist() == [1, 1]
