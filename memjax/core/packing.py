"""Whether what reverse mode keeps of the code being traced is going to be stored as codes."""

import jax

packing = jax.make_user_context(default_value=False)
"""True while `memjax.remat` traces a function whose residuals it packs: ``packing.value``, ``with packing(True)``.

An operation that may choose what it keeps then keeps what bears rounding: not a result from which another value is
recovered by a division, nor a statistic that has to fit what is decoded.
"""
