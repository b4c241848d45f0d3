"""Texts that name a solver and its options: what they mean, and how bad ones are refused."""

import inspect
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from lib.errors import InputError
from lib.solvers import (
    ADJOINT_SOLVERS,
    SOLVERS,
    anderson,
    bicgstab,
    broyden,
    fixed_point_iteration,
    get_solver,
    gmres,
    newton_krylov,
)
from lib.solvers.arguments import Names, accepts, choice, parse
from lib.solvers.maps import Affine, plain, transformed
from lib.solvers.solve import Control

EVERY = SOLVERS | ADJOINT_SOLVERS
by_name = pytest.mark.parametrize("name", EVERY)


def message(function, *args, **options) -> str:
    """The one line by which it refuses."""
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


# --- Texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("anderson", ("anderson", {})),
        ("anderson:m=4", ("anderson", {"m": 4})),
        ("anderson:m=4,stop=sample", ("anderson", {"m": 4, "stop": "sample"})),
        (" broyden : ls = true , eps = 1e-4 ", ("broyden", {"ls": True, "eps": 1e-4})),
        ("f:a=True,b=False,c=None", ("f", {"a": True, "b": False, "c": None})),
        ("f:a=TRUE,b=false,c=none", ("f", {"a": True, "b": False, "c": None})),
        ("f:a=-1,b=+2.5,c=1e6,d=.5", ("f", {"a": -1, "b": 2.5, "c": 1e6, "d": 0.5})),
        ("f:a=word,b=two words", ("f", {"a": "word", "b": "two words"})),
        ("f:a='4',b=\"none\"", ("f", {"a": "4", "b": "none"})),
        ("f:a=nan,b=1e", ("f", {"a": "nan", "b": "1e"})),
        ("f:a=x=y", ("f", {"a": "x=y"})),
        ("f:a=x:y", ("f", {"a": "x:y"})),
        ("f:a={[]:1}", ("f", {"a": "{[]:1}"})),  # Python, but of no value
        ("f:a=" + "(" * 500, ("f", {"a": "(" * 500})),
        ("f:a=(1", ("f", {"a": "(1"})),
        ("", ("", {})),
    ],
)
def test_parse(text, expected):
    name, options = parse(text)
    assert (name, options) == expected
    assert [type(v) for v in options.values()] == [type(v) for v in expected[1].values()]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("anderson:", "'' in 'anderson:' is not option=value"),
        ("anderson:m", "'m' in 'anderson:m' is not option=value"),
        ("anderson:m=", "'m=' in 'anderson:m=' is not option=value"),
        ("anderson:m= ", "'m= ' in 'anderson:m= ' is not option=value"),
        ("anderson:=4", "'=4' in 'anderson:=4' is not option=value"),
        ("anderson:m=4,", "'' in 'anderson:m=4,' is not option=value"),
        ("anderson:m=4,,eps=1", "'' in 'anderson:m=4,,eps=1' is not option=value"),
        ("anderson:m=4,m=5", "m stands twice in 'anderson:m=4,m=5'"),
        ("anderson:m=4, m =4", "m stands twice in 'anderson:m=4, m =4'"),
    ],
)
def test_parse_refuses(text, part):
    assert message(parse, text) == part
    assert message(get_solver, text) == part


def test_names_are_choices_with_options():
    names = Names(["anderson", "broyden"])
    assert "anderson" in names
    assert "anderson:m=4" in names
    assert "broyden:whatever" in names  # refused later, by name
    assert "andersen:m=4" not in names
    assert "" not in names
    assert None not in names
    assert list(names) == ["anderson", "broyden"]


def test_accepts():
    def plain(a, /, b, *args, c=1):
        pass

    assert accepts(plain, "b")
    assert accepts(plain, "c")
    assert not accepts(plain, "a")  # by position only
    assert not accepts(plain, "args")
    assert not accepts(plain, "d")
    assert accepts(lambda **rest: None, "anything")
    assert accepts(partial(plain, c=2), "c")
    assert all(accepts(solver, "floor") for solver in EVERY.values())


def test_named_of_any_kind():
    @dataclass
    class Thing:
        size: int = 1

    assert choice("thing", "a", {"a": Thing}) is Thing
    assert choice("thing", "a:size=3", {"a": Thing})() == Thing(3)
    assert message(choice, "thing", "b", {"a": Thing}) == "unknown thing 'b': choose from a"
    assert message(choice, "thing", "a:sise=3", {"a": Thing}) == (
        "thing a has no option sise: did you mean size?"
    )
    bare = {"a": lambda: None}
    assert message(choice, "thing", "a:x=3", bare) == "thing a has no option x (it has: none)"
    for bad in (None, 3, ["a"], b"a"):
        assert message(choice, "thing", bad, bare).endswith("must be a name or a callable")


# --- Solvers ------------------------------------------------------------------------------------


def test_a_bare_name_is_the_function_itself():
    for name, solver in SOLVERS.items():
        assert get_solver(name) is get_solver(f" {name} ") is solver
    for name, solver in ADJOINT_SOLVERS.items():
        assert get_solver(name, adjoint=True) is solver


@pytest.mark.parametrize(
    ("text", "solver", "options"),
    [
        ("anderson:m=4,stop=sample", anderson, {"m": 4, "stop": "sample"}),
        ("anderson:lam=none,beta=0.5,restart=true", anderson, None),
        ("anderson:lam=1e-4", anderson, {"lam": 1e-4}),
        ("broyden:memory=8,damping=0.8,eps=1e-9", broyden, None),
        ("broyden:memory=none,ls=true,check_every=4", broyden, None),
        ("fixed_point_iteration:damping=1,max_nfe=5,max_seconds=0.5", fixed_point_iteration, None),
        ("newton_krylov:inner=3,inner_eps=0.5,jvp=forward,floor=1e-8", newton_krylov, None),
        ("gmres:restart=5,stop=sample", gmres, {"restart": 5, "stop": "sample"}),
        ("bicgstab:eps=0", bicgstab, {"eps": 0}),
    ],
)
def test_good_texts(text, solver, options):
    found = get_solver(text, adjoint=solver in (gmres, bicgstab))
    assert found.func is solver
    assert options is None or found.keywords == options
    solution = found(lambda z: z / 2 + 1, torch.zeros(2, 3, dtype=torch.float64), threshold=40)
    if "max_nfe" not in text:
        assert solution["rel_lowest"] < 1e-3


def test_every_option_of_every_solver():
    """All parameters but those of the caller, and the fields of Control, with their defaults."""
    callers = {"f", "x0", "threshold", "stop_mode", "name", "keep_inverse", "control"}
    for name, solver in EVERY.items():
        parameters = inspect.signature(solver).parameters.values()
        own = {p.name: p.default for p in parameters if p.name not in callers}
        for option, default in (own | vars(Control())).items():
            found = get_solver(f"{name}:{option}={default}", adjoint=name in ADJOINT_SOLVERS)
            assert found.keywords == {option: default}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "andersen",
            "unknown solver 'andersen': choose from anderson, broyden, fixed_point_iteration, "
            "newton_krylov",
        ),
        ("Anderson:m=4", "unknown solver 'Anderson': choose from anderson, "),
        ("", "unknown solver '': choose from anderson, "),
        (":m=4", "unknown solver '': choose from "),
        ("anderson:mm=4", "solver anderson has no option mm: did you mean m?"),
        (
            "anderson:memory=4",
            "solver anderson has no option memory (it has: best, beta, check_every, ",
        ),
        ("broyden:memry=4", "solver broyden has no option memry: did you mean memory?"),
        ("broyden:m=4", "solver broyden has no option m"),
        ("anderson:threshold=5", "solver anderson has no option threshold"),
        ("anderson:stop_mode=abs", "solver anderson has no option stop_mode"),
        ("broyden:name=x", "solver broyden has no option name"),
        ("broyden:keep_inverse=true", "solver broyden has no option keep_inverse"),
        ("anderson:x0=1", "solver anderson has no option x0"),
        ("anderson:f=1", "solver anderson has no option f"),
        ("anderson:control=1", "solver anderson has no option control"),
        ("anderson:m=abc", "m is 'abc', but must be an integer of at least 1"),
        ("anderson:m=2.5", "m is 2.5, but must be an integer of at least 1"),
        ("anderson:m=0", "m is 0, but must be an integer of at least 1"),
        ("anderson:m=true", "m is True, but must be an integer of at least 1"),
        ("anderson:m=none", "m is None, but must be an integer of at least 1"),
        ("anderson:eps=abc", "eps is 'abc', but must be a number of at least 0"),
        ("anderson:eps=-1", "eps is -1, but must be a number of at least 0"),
        ("anderson:eps=nan", "eps is 'nan', but must be a number of at least 0"),
        ("anderson:lam=big", "lam is 'big', but must be a number of at least 0"),
        ("anderson:beta=0", "beta is 0, but must be a number above 0"),
        ("anderson:restart=yes", "restart is 'yes', but must be True or False"),
        ("anderson:stop=each", "stop is 'each', but must be 'batch' or 'sample'"),
        ("anderson:check_every=0", "check_every is 0, but must be an integer of at least 1"),
        ("anderson:stop=sample,check_every=2", "stop='sample' looks at every residual: "),
        ("anderson:floor=low", "floor is 'low', but must be a number of at least 0"),
        ("anderson:max_nfe=1.5", "max_nfe is 1.5, but must be an integer of at least 1"),
        ("anderson:max_seconds=soon", "max_seconds is 'soon', but must be a number above 0"),
        ("broyden:ls=abc", "ls is 'abc', but must be True or False"),
        ("broyden:ls=true,stop=sample", "ls is True, but must be False with stop='sample'"),
        ("broyden:ls=true,damping=0.5", "ls is True, but must be False with a damping"),
        ("broyden:memory=0", "memory is 0, but must be an integer of at least 1"),
        ("broyden:damping=2", "damping is 2, but must be in (0, 1]"),
        ("broyden:damping={[]:1}", "damping is '{[]:1}', but must be in (0, 1]"),
        ("newton_krylov:jvp=both", "jvp is 'both', but must be 'reverse' or 'forward'"),
        ("newton_krylov:inner_eps=abc", "inner_eps is 'abc', but must be a number between 0 and 1"),
        ("newton_krylov:inner=0", "inner is 0, but must be an integer of at least 1"),
    ],
)
def test_bad_texts(text, expected):
    assert message(get_solver, text).startswith(expected)


@pytest.mark.parametrize("bad", [None, 3, ["anderson"], {"anderson": {}}])
def test_neither_text_nor_callable(bad):
    assert message(get_solver, bad).endswith("but must be a name or a callable")


def test_forward_refuses_linear_solvers():
    for solver in (gmres, bicgstab):
        name = solver.__name__
        for given in (name, f"{name}:eps=1e-9", f" {name}", solver, partial(solver, eps=1e-9)):
            assert message(get_solver, given) == (
                f"{name} is no forward solver (it solves linear systems): choose from anderson, "
                "broyden, fixed_point_iteration, newton_krylov"
            )
        assert get_solver(solver, adjoint=True) is solver
        twice = partial(partial(solver, eps=1e-9), stop="sample")
        assert get_solver(twice, adjoint=True) is twice
        assert "no forward solver" in message(get_solver, twice)


def test_the_adjoint_refuses_newton():
    name = "newton_krylov"
    given = (name, f"{name}:inner=3", newton_krylov, partial(newton_krylov, inner=3))
    for solver in given:
        assert message(get_solver, solver, adjoint=True) == (
            f"{name} is no backward solver (it differentiates f, and the adjoint is linear "
            "already): choose from anderson, bicgstab, broyden, fixed_point_iteration, gmres"
        )
    assert get_solver(newton_krylov) is newton_krylov


def test_a_callable_of_the_users_is_itself():
    def mine(f, x0, **options):
        return {"result": x0}

    def gmres(f, x0, **options):  # of that name, but another
        return {"result": x0}

    class Object:
        def __call__(self, f, x0, **options):
            return {"result": x0}

    for own in (mine, gmres, partial(mine, a=1), Object(), partial(anderson, eps=1e-9)):
        assert get_solver(own) is own
        assert get_solver(own, adjoint=True) is own


# --- Misuse of solvers --------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_nfe": 0}, "max_nfe is 0, but must be an integer of at least 1"),
        ({"max_nfe": 2.0}, "max_nfe is 2.0, but must be an integer of at least 1"),
        ({"max_nfe": True}, "max_nfe is True, but must be an integer of at least 1"),
        ({"max_seconds": 0}, "max_seconds is 0, but must be a number above 0"),
        ({"max_seconds": "1"}, "max_seconds is '1', but must be a number above 0"),
        ({"max_seconds": math.nan}, "max_seconds is nan, but must be a number above 0"),
        ({"floor": "low"}, "floor is 'low', but must be a number of at least 0"),
        ({"eps": "abc"}, "eps is 'abc', but must be a number of at least 0"),
        ({"eps": None}, "eps is None, but must be a number of at least 0"),
        ({"eps": True}, "eps is True, but must be a number of at least 0"),
        ({"check_every": 1.5}, "check_every is 1.5, but must be an integer of at least 1"),
    ],
    ids=str,
)
def test_misuse_of_numbers(name, options, expected):
    assert message(EVERY[name], torch.cos, torch.zeros(1, 2), **options) == expected


@pytest.mark.parametrize(
    ("solver", "options", "start"),
    [
        (anderson, {"m": True}, "m is True"),
        (anderson, {"lam": "small"}, "lam is 'small'"),
        (anderson, {"beta": "x"}, "beta is 'x'"),
        (anderson, {"restart": 1}, "restart is 1, but must be True or False"),
        (broyden, {"ls": "no"}, "ls is 'no', but must be True or False"),
        (broyden, {"keep_inverse": "x"}, "keep_inverse is 'x', but must be True or False"),
        (broyden, {"memory": 0}, "memory is 0"),
        (broyden, {"damping": 1.5}, "damping is 1.5"),
        (broyden, {"damping": True}, "damping is True"),
        (broyden, {"ls": True, "damping": 0.5}, "ls is True"),
        (fixed_point_iteration, {"damping": 0}, "damping is 0"),
        (fixed_point_iteration, {"damping": "half"}, "damping is 'half'"),
        (gmres, {"restart": 0}, "restart is 0"),
        (gmres, {"restart": True}, "restart is True"),
        (anderson, {"lam": -1.0}, "lam is -1.0"),
        (newton_krylov, {"inner": 2.5}, "inner is 2.5"),
        (newton_krylov, {"inner_eps": 0.0}, "inner_eps is 0.0"),
        (newton_krylov, {"inner_eps": 1}, "inner_eps is 1"),
        (newton_krylov, {"damping": 0.0}, "damping is 0.0"),
        (newton_krylov, {"jvp": None}, "jvp is None"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_misuse_of_options(solver, options, start):
    assert message(solver, torch.cos, torch.zeros(1, 2), **options).startswith(start)


@by_name
def test_check_every_is_for_the_batch(name):
    x0 = torch.zeros(2, 3)
    text = message(EVERY[name], torch.cos, x0, stop="sample", check_every=2)
    assert text == "stop='sample' looks at every residual: leave check_every out"
    EVERY[name](lambda z: z / 2, x0, stop="sample", check_every=1)
    refused = message(EVERY[name], torch.cos, x0, stop="each")
    assert refused == "stop is 'each', but must be 'batch' or 'sample'"


# --- What maps offer ----------------------------------------------------------------------------


def test_zero_is_free_as_long_as_it_is_zero():
    calls = []

    def product(v):
        calls.append(v)
        return v / 2

    shift, zero = torch.ones(3, 4), torch.zeros(3, 4)
    f = Affine(product, shift, zero)
    assert torch.equal(f(zero), shift)
    assert torch.equal(f(zero.view(3, 4)), shift)
    assert not calls
    assert f(zero) is not shift  # a solver may write to it
    assert torch.equal(f(torch.zeros(3, 4)), shift)
    assert len(calls) == 1
    zero += 1
    assert torch.equal(f(zero), shift + 0.5)
    assert torch.equal(Affine(product, shift)(torch.zeros(3, 4)), shift)


def test_transformed_keeps_what_f_offers():
    def f(z):
        return z + 1

    f.plain, f.select = lambda z: z + 2, lambda rows: lambda z: z + rows[:, None]
    doubled = transformed(f, lambda g: lambda z: 2 * g(z))
    z = torch.zeros(2, 1)
    assert doubled(z).unique() == 2
    assert plain(doubled)(z).unique() == 4
    assert doubled.select(torch.tensor([5, 7]))(z).flatten().tolist() == [10, 14]
    bare = transformed(torch.cos, lambda g: lambda z: g(z))
    assert not hasattr(bare, "select")
    assert plain(bare) is bare

    zero = torch.zeros(2, 3)
    affine = Affine(lambda v: v / 2, torch.ones(2, 3), zero)
    changed = transformed(affine, lambda g: lambda z: -g(z))
    assert isinstance(changed, Affine)
    assert torch.equal(changed.product(torch.ones(2, 3)), torch.full((2, 3), -0.5))
    assert torch.equal(changed(zero), torch.ones(2, 3))
    zero += 1  # written to, before or after the change
    assert torch.equal(changed(zero), torch.full((2, 3), 0.5))
    assert torch.equal(transformed(affine, lambda g: g)(zero), torch.full((2, 3), 1.5))


@pytest.mark.parametrize("solver", [gmres, bicgstab, anderson])
def test_autocast_keeps_an_affine_map(solver):
    """Products, and the free start, are known under autocast as well."""
    weight, b, x0 = torch.linspace(-0.5, 0.5, 6).diag(), torch.ones(2, 6), torch.zeros(2, 6)
    dtypes = []

    def product(v):
        out = v @ weight
        dtypes.append(out.dtype)
        return out

    with torch.autocast("cpu", torch.bfloat16):
        solution = solver(Affine(product, b, x0), x0, threshold=40, eps=3e-2)
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == solution["products"] + solution["nfe"] - 1
    assert solution["converged"].all()
    assert solution["result"].dtype == torch.float32
