"""Solvers and gradients by name, as the tests of both trainers use them, and what is said of each.

The trainers spell settings their own way: ``spelling`` is ``"--{}"`` for flags, and ``"DEQ.{}"``
for a configuration.
"""

import math
import re
from itertools import product

FORWARD = """
    anderson broyden fixed_point_iteration:damping=0.5 newton_krylov
    anderson:stop=sample anderson:m=3,restart=true
    broyden:memory=4 broyden:stop=sample broyden:damping=0.8
""".split()
BACKWARD = "anderson broyden fixed_point_iteration gmres bicgstab gmres:restart=4".split()
_BACK, _BOTH = ("b_solver", "b_thres"), ("f_solver", "stop_mode", "b_solver", "b_thres")
# Settings that a gradient makes no use of.
UNUSED = {
    "ift": (),
    "jfb": _BACK,
    "phantom": _BACK,
    "phantom:form=neumann": _BACK,
    "phantom:steps=3,damping=0.8": _BACK,
    "reversible": _BOTH,
    "shine": _BACK,
    "shine:refine=2": ("b_thres",),
    "unroll": _BOTH,
    "unroll:checkpointing=true": _BOTH,
}
GRADS = list(UNUSED)
SOLVES_BACK = {"ift", "shine:refine=2"}
# Two names of one gradient. With that limit shine falls back at every sample.
SAME = [
    ("unroll:checkpointing=true", "unroll"),
    ("phantom:steps=1,damping=1", "jfb"),
    ("shine:limit=1e-9", "jfb"),
]
# Each with each, as far as they go together: forward solver, backward solver, gradient.
COMBINATIONS = [
    *product(FORWARD, BACKWARD, ["ift"]),
    *product(FORWARD, ["broyden"], [g for g in GRADS if not g.startswith("shine")]),
    *product(["broyden", "broyden:memory=4", "broyden:damping=0.8"], BACKWARD, ["shine:refine=2"]),
]


def spelled(spelling: str, name: str) -> str:
    """A setting as one trainer spells it."""
    return spelling.format(name.upper() if spelling.startswith("DEQ") else name)


def check_steps(steps: list[dict], log: str, grad: str, spelling: str, f_thres: int) -> None:
    """What records and log say of two stacked steps, then four at equilibrium."""
    assert [r["step"] for r in steps] == list(range(1, 7))
    assert all(math.isfinite(v) for r in steps for k, v in r.items() if k != "kind")
    assert "6 steps | skipped 0 | diverged solves: forward 0, " in log

    solves = grad in SOLVES_BACK
    assert ["forward_nfe" in r for r in steps] == [False] * 2 + [True] * 4
    assert ["backward_nfe" in r for r in steps] == [False] * 2 + [solves] * 4
    assert (" | b res " in log) == solves
    assert log.count(" | f res ") >= 4
    for record in steps[2:]:
        assert 0 < record["forward_nfe"] <= f_thres + 1  # Broyden counts updates
        assert record["forward_rel_residual"] > 0
        if solves:
            assert record["backward_nfe"] > 0
            assert record["backward_rel_residual"] > 0

    own = spelled(spelling, "grad")
    notes = re.findall(rf"^note: {own} (\S+) makes no use of (.*)$", log, re.MULTILINE)
    unused = ", ".join(spelled(spelling, name) for name in UNUSED[grad])
    assert notes == ([(grad, unused)] if unused else [])


# ---- refusals --------------------------------------------------------------------------------

_FORWARD_NAMES = ("anderson", "broyden", "fixed_point_iteration", "newton_krylov")
_BACKWARD_NAMES = ("anderson", "bicgstab", "broyden", "fixed_point_iteration", "gmres")
_GRAD_NAMES = ("ift", "jfb", "phantom", "reversible", "shine", "unroll")
_REFUSED = {  # settings: what the line has to name, after the first setting of them
    "grad=shine f_solver=anderson": ("f_solver is anderson", "broyden", "ift, jfb or phantom"),
    "grad=shine f_solver=newton_krylov": ("newton_krylov", "f_solver broyden"),
    "grad=shine f_solver=broyden:stop=sample": ("per sample", "f_solver broyden"),
    "f_solver=gmres": ("gmres", *_FORWARD_NAMES),
    "f_solver=bicgstab": ("bicgstab", *_FORWARD_NAMES),
    "b_solver=newton_krylov": ("newton_krylov", *_BACKWARD_NAMES),
    "f_solver=newton": ("'newton'", *_FORWARD_NAMES),
    "b_solver=cg:m=3": ("cg", *_BACKWARD_NAMES),
    "grad=implicit": ("'implicit'", *_GRAD_NAMES),
    "f_thres=40 grad=reversible": ("{} is 40", "lower {} to"),
    "grad=reversible:damping=1": ("damping is 1", "between 0 and 1"),
    "f_solver=anderson:memory=3": ("anderson has no option memory", "beta", "m,"),
    "f_solver=broyden:memry=3": ("did you mean memory",),
    "f_solver=anderson:m": ("'m' in 'anderson:m' is not option=value",),
    "b_solver=gmres:restart=": ("'restart=' in", "is not option=value"),
    "grad=phantom:steps": ("'steps' in 'phantom:steps' is not option=value",),
    "f_solver=anderson:m=0": ("m is 0", "at least 1"),
    "f_solver=anderson:eps=small": ("eps is 'small'", "a number of at least 0"),
    "f_solver=broyden:damping=1.5": ("damping is 1.5", "in (0, 1]"),
    "f_solver=anderson:stop=each": ("stop is 'each'", "'batch' or 'sample'"),
    "b_solver=gmres:restart=x": ("restart is 'x'", "at least 1"),
    "grad=phantom:steps=0": ("steps is 0", "at least 1"),
    "grad=phantom:form=neuman": ("form is 'neuman'", "'unrolled' or 'neumann'"),
    "grad=jfb:steps=2": ("jfb has no option steps", "none"),
    "grad=unroll:checkpointing=yes": ("checkpointing is 'yes'", "True or False"),
    "grad=shine:limit=big f_solver=broyden": ("limit is 'big'", "above 0"),
}
REFUSED = list(_REFUSED)


def refusal(settings: str, spelling: str) -> tuple[list[str], list[str]]:
    """Arguments that one trainer refuses, and the parts that its line must have."""
    pairs = [setting.split("=", 1) for setting in settings.split()]
    argv = [text for name, value in pairs for text in (spelled(spelling, name), value)]
    return argv, [argv[0], *(part.format(argv[0]) for part in _REFUSED[settings])]
