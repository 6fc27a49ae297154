"""A mark on what an operation stores in a form that has no derivative."""

from __future__ import annotations

from memjax.core.first_order import first_order

once = first_order(
    "second-order differentiation through an operation whose backward pass reads codes or a fit, which have no "
    "derivative: use the residual of that operation that is exact ('input', or 'output' of norms and softmax)"
)
