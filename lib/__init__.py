"""Deep equilibrium models: the DEQ layer, its solvers and gradients, and Jacobian tools.

Most programs need only these names. :mod:`lib.solvers`, :mod:`lib.gradients`, :mod:`lib.jacobian`
and :mod:`lib.optimization` have more. :mod:`lib.runs` is about training runs: records, checkpoints,
processes. Nothing here depends on text or images.
"""

from lib.auditing import audit
from lib.deq import DEQ, Equilibrium
from lib.errors import DEQWarning, InputError
from lib.gradients import get_gradient
from lib.jacobian import jac_loss_estimate, leading_eigenvalues, power_method
from lib.layer_utils import list2vec, vec2list
from lib.optimization import (
    VariationalAttnDropout,
    VariationalDropout,
    VariationalHidDropout,
    VariationalHidDropout2d,
    weight_norm,
)
from lib.parametrizations import ContractiveLayer, spectral_norm, weight_norm_all
from lib.solvers import (
    anderson,
    bicgstab,
    broyden,
    fixed_point_iteration,
    get_solver,
    gmres,
    newton_krylov,
)

__all__ = [
    "DEQ",
    "ContractiveLayer",
    "DEQWarning",
    "Equilibrium",
    "InputError",
    "VariationalAttnDropout",
    "VariationalDropout",
    "VariationalHidDropout",
    "VariationalHidDropout2d",
    "anderson",
    "audit",
    "bicgstab",
    "broyden",
    "fixed_point_iteration",
    "get_gradient",
    "get_solver",
    "gmres",
    "jac_loss_estimate",
    "leading_eigenvalues",
    "list2vec",
    "newton_krylov",
    "power_method",
    "spectral_norm",
    "vec2list",
    "weight_norm",
    "weight_norm_all",
]
