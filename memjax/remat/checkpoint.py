"""One entry for what backward finds kept and what it computes again.

Sources: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (keep inputs only); Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models", 2022 (keep what is dear to compute).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.extend.core import subjaxprs

from memjax.core import jaxpr_compat
from memjax.core.jaxpr_compat import Jaxpr
from memjax.remat.compress import Seed, compress_residuals
from memjax.remat.offload import Offload, offload
from memjax.remat.policy import Bits, ResidualPolicy
from memjax.remat.residuals import Residual


@dataclass(frozen=True)
class Names:
    """What `checkpoint` keeps; all else is computed again. Made by `names`."""

    names: tuple[str, ...]
    optional: tuple[str, ...] = ()


def names(*names: str, optional: tuple[str, ...] = ()) -> Names:
    """Returns the policy for `checkpoint` that keeps tensors named by `jax.ad_checkpoint.checkpoint_name` only.

    Args:
      names: the function must give each to a tensor.
      optional: names of others that are kept where there are any.

    Raises:
      ValueError: no names.
    """
    if not names:
        raise ValueError('names() keeps nothing: use "full" to compute everything again')
    return Names(names, optional)


@dataclass(frozen=True)
class Remat:
    """A way of keeping little: what is computed again in backward, and how what is kept is stored.

    Attributes:
      again: "none" computes nothing again, "full" everything from the inputs, "dots" all but products of matrices;
        `names` and `offload` say which tensors are kept, and where. Products with packed weights are operations of
        their own, which "dots" does not see, and of an adapted weight it keeps every product: name their results.
      store: packs what is kept, None keeps it as it is.

    Raises:
      ValueError: a choice that is unknown, or offloaded tensors that are packed too.
    """

    again: Literal["none", "full", "dots"] | Names | Offload = "none"
    store: ResidualPolicy | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.again, Names | Offload) and self.again not in ("none", "full", "dots"):
            raise ValueError(f"again must be 'none', 'full', 'dots', names(...) or offload(...), got {self.again!r}")
        if isinstance(self.again, Offload) and self.store is not None:
            raise ValueError(
                "offload(...) moves tensors as they are; for packed codes there is ResidualPolicy(offload=...)"
            )


# The names that `parse` knows; `NAMED` says what each keeps.
Name = Literal[
    "none",
    "full",
    "dots",
    "linear",
    "8bit",
    "4bit",
    "2bit",
    "linear-8bit",
    "linear-4bit",
    "full-8bit",
    "full-4bit",
    "offload",
    "offload-linear",
    "offload-4bit",
]
Policy = str | Remat | ResidualPolicy | Names | Offload


def quantized(bits: Bits = 8, *, group: int = 128, rounding: Literal["nearest", "stochastic"] = "nearest") -> Remat:
    """Returns the policy for `checkpoint` that keeps a function's packed inputs and computes all else again.

    Per element of the inputs it keeps ``bits / 8 + 4 / group`` bytes. Backward starts from the decoded inputs, so
    gradients are those at inputs that are off by rounding.

    Args:
      bits, group, rounding: as in `ResidualPolicy`.
    """
    return Remat("full", ResidualPolicy(bits, group, rounding, inputs="**", input_bits=bits))


def softmax_and_norms_in_8_bits(residual: Residual) -> int | None:
    """Returns the bits of tensors whose errors are amplified: queries, keys, and the input of a block's second norm.

    For ``per_leaf`` of a `ResidualPolicy`: it goes by the names that memjax's models give these tensors.
    """
    return 8 if residual.name.partition("#")[0] in ("q", "k", "block_middle") else None


_LINEAR = names("linear_out", optional=("q", "k"))


def _packed(bits: Bits, again: Any = "none", **options: Any) -> Remat:
    return Remat(again, ResidualPolicy(bits, inputs="**", per_leaf=softmax_and_norms_in_8_bits, **options))


NAMED: dict[str, tuple[Remat, str]] = {
    "none": (Remat(), "all that reverse mode asks for"),
    "full": (Remat("full"), "the block's input; all else is computed again"),
    "dots": (Remat("dots"), "the input and products of dense matrices; all else is computed again"),
    "linear": (Remat(names("linear_out")), "the input and what linear layers give; all else is computed again"),
    "8bit": (_packed(8), "all residuals, in 8 bits"),
    "4bit": (_packed(4), "all residuals in 4 bits; q, k and what norms take in 8"),
    "2bit": (_packed(2), "all residuals in 2 bits; q, k and what norms take in 8"),
    "linear-8bit": (_packed(8, _LINEAR), "the input and what linear layers give, in 8 bits"),
    "linear-4bit": (_packed(4, _LINEAR), "what linear layers give in 4 bits; q, k and the input in 8"),
    "full-8bit": (quantized(8), "the block's input, in 8 bits"),
    "full-4bit": (quantized(4), "the block's input, in 4 bits"),
    "offload": (Remat(offload("block_input")), "the block's input, in pinned host memory"),
    "offload-linear": (Remat(offload("block_input", "linear_out")), "as linear, in pinned host memory"),
    "offload-4bit": (_packed(4, offload="pinned_host"), "all residuals in 4 bits, in pinned host memory"),
}


def parse(policy: Policy) -> Remat:
    """Returns the `Remat` that a policy, or its short name, stands for.

    Args:
      policy: a name of `NAMED`, a `Remat`, a `ResidualPolicy`, or what `names` and `offload` return.

    Raises:
      ValueError: an unknown name.
      TypeError: anything else.
    """
    if isinstance(policy, str):
        if policy not in NAMED:
            raise ValueError(f"remat={policy!r} is not one of {', '.join(NAMED)}")
        return NAMED[policy][0]
    if isinstance(policy, Remat):
        return policy
    if isinstance(policy, ResidualPolicy):
        return Remat("none", policy)
    if isinstance(policy, Names | Offload):
        return Remat(policy)
    raise TypeError(f"expected the name of a policy, or one made by memjax.remat, got {policy!r}")


def checkpoint(
    f: Callable[..., Any],
    policy: Policy = "full",
    *,
    params: Sequence[int | str] = (0,),
    prevent_cse: bool = True,
    seed: Seed = 0,
) -> Callable[..., Any]:
    """Returns ``f`` such that reverse mode keeps what a policy says, and computes the rest again.

    Args:
      f: a pure function of pytrees of arrays.
      policy: "full", "dots", "8bit" and the other names of `parse`; `names`, `offload` or `quantized`; a
        `ResidualPolicy`; or a `Remat`, which combines them.
      params: which arguments hold weights, which are kept by reference and never packed; as in `compress_residuals`.
      prevent_cse: as in `jax.checkpoint`; False is right, and faster, for the body of a scan.
      seed: for stochastic rounding, as in `compress_residuals`.

    Returns:
      A function of the same positional arguments.

    Raises:
      ValueError: an unknown policy, or (when called) a name that ``f`` gives to no tensor.
    """
    remat = parse(policy)
    kept = f if remat.again == "none" else jax.checkpoint(f, policy=_jax_policy(remat.again), prevent_cse=prevent_cse)
    if wanted := getattr(remat.again, "names", ()):
        kept = _checked(f, kept, wanted)
    return (
        kept
        if remat.store is None
        else compress_residuals(kept, remat.store, params=params, prevent_cse=prevent_cse, seed=seed)
    )


def _jax_policy(again: Any) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    if isinstance(again, Names):
        return policies.save_only_these_names(*again.names, *again.optional)
    if isinstance(again, Offload):
        return again.policy()
    return policies.nothing_saveable if again == "full" else policies.dots_with_no_batch_dims_saveable


def _checked(f: Callable[..., Any], kept: Callable[..., Any], wanted: tuple[str, ...]) -> Callable[..., Any]:
    @functools.wraps(f)
    def run(*args: Any) -> Any:
        known = sorted(set(_names_in(jaxpr_compat.trace(f, *args)[0])))
        for name in wanted:
            if name not in known:
                found = f"it names {', '.join(known)}" if known else "it names none"
                raise ValueError(
                    f"the function names no tensor {name!r}; {found}. Inside, jax.ad_checkpoint.checkpoint_name(x, "
                    f"{name!r}) names x so"
                )
        return kept(*args)

    return run


def _names_in(jaxpr: Jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            yield eqn.params["name"]
    for inner in subjaxprs(jaxpr):
        yield from _names_in(inner)
