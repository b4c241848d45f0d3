"""What every equilibrium model shares: solvers, implicit gradients, regularisation, run keeping.

Knows nothing of words or images.
"""
