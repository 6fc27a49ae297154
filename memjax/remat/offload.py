"""Residuals in pinned host memory until backward wants them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Offload:
    """What `checkpoint` keeps in pinned host memory; all else is computed again. Made by `offload`."""

    names: tuple[str, ...] = ()
    dots: bool = False

    def policy(self) -> Callable[..., Any]:
        """Returns the `jax.checkpoint` policy."""
        if self.dots:
            return jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(self.names),
            offload_src="device",
            offload_dst="pinned_host",
        )


def offload(*names: str, dots: bool = False) -> Offload:
    """Returns the policy for `checkpoint` that keeps residuals in pinned host memory, in their own dtype.

    A link of 50 GB/s moves about 30 times less than device memory, so check the step time: whole 16-bit activations
    rarely hide behind a layer, packed codes do (``ResidualPolicy(bits=4, offload="pinned_host")``). On a CPU the
    memory is the same and nothing changes.

    Args:
      *names: of tensors inside the function, given by `jax.ad_checkpoint.checkpoint_name`. Under a scan name what
        the body computes; its carry is offloaded only if the body names it before any other use (blocks of
        `memjax.models` do, as ``"block_input"``).
      dots: instead of named tensors, results of products with weights.

    Raises:
      ValueError: neither names nor dots, or both.
    """
    if bool(names) == dots:
        raise ValueError("offload takes the names of tensors, or dots=True, and not both")
    return Offload(names, dots)
