"""SquareHead: a student imitates what every block of its teacher computes, and the teacher's output.

loss = c_ce CE + c_kl T^2 KL(teacher || student) + c_sq sum_i mean((S_i - T_i)^2) / (mean(T_i^2) + eps), where S_i and
T_i are the hidden states after block i and the means run over the tokens that are not padding.
Source: Sparse Fine-tuning for Inference Acceleration of Large Language Models, 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

EPS = 2.0**-7


def squarehead(
    student: jax.Array | Sequence[jax.Array],
    teacher: jax.Array | Sequence[jax.Array],
    token_mask: jax.Array | None = None,
    eps: float = EPS,
) -> jax.Array:
    """Returns the sum over blocks of the student's squared error, relative to the teacher's mean square.

    Args:
      student: hidden states after every block, ``[L, B, S, D]`` or L arrays ``[B, S, D]``; `Model.hiddens` gives them.
      teacher: the same of the teacher; gets no gradient.
      token_mask: ``[B, S]``, nonzero where a token counts; None counts all.
      eps: added to the teacher's mean square.

    Returns:
      float32 scalar (float64 for float64 states).

    Raises:
      ValueError: shapes that differ.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"expected as many blocks of the teacher as of the student, got {len(teacher)}, {len(student)}"
        )
    if isinstance(student, jax.Array) and isinstance(teacher, jax.Array):
        return jax.lax.map(lambda pair: block_loss(pair[0], pair[1], token_mask, eps), (student, teacher)).sum()
    return jnp.sum(jnp.stack([block_loss(s, t, token_mask, eps) for s, t in zip(student, teacher)]))


def block_loss(
    student: jax.Array, teacher: jax.Array, token_mask: jax.Array | None = None, eps: float = EPS
) -> jax.Array:
    """Returns the term of one block; arguments are those of `squarehead` for one block.

    Reverse mode keeps one array: the difference, in the dtype of the states.
    """
    if student.shape != teacher.shape or (token_mask is not None and token_mask.shape != student.shape[:-1]):
        mask = "" if token_mask is None else f", token_mask {token_mask.shape}"
        raise ValueError(
            f"expected states [B, S, D] of one shape and a mask [B, S], got {student.shape}, {teacher.shape}{mask}"
        )
    teacher = jax.lax.stop_gradient(teacher)
    weights = jnp.ones(student.shape[:-1], bool) if token_mask is None else token_mask != 0

    def sum_of_squares(x: jax.Array, weights: jax.Array) -> jax.Array:
        x = jnp.where(weights[..., None], x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.sum(x * x)

    size = jnp.maximum(jnp.sum(weights), 1) * student.shape[-1]
    error = jax.checkpoint(sum_of_squares)(student - teacher, weights)
    return (error / size) / (sum_of_squares(teacher, weights) / size + eps)


def distillation_kl(
    student: jax.Array, teacher: jax.Array, weights: jax.Array | None = None, temperature: float = 1.0
) -> jax.Array:
    """Returns T^2 KL(teacher || student) at temperature T, averaged over tokens.

    Args:
      student, teacher: logits ``[..., V]``; the teacher's get no gradient.
      weights: ``[...]``, 0 where a token does not count; None counts all.
      temperature: T, divides both logits.

    Returns:
      float32 scalar in nats.

    Raises:
      ValueError: shapes that differ, or a temperature that is not positive.
    """
    check_temperature(temperature)
    if student.shape != teacher.shape:
        raise ValueError(f"expected logits of one shape, got student {student.shape} and teacher {teacher.shape}")
    dtype = jnp.promote_types(student.dtype, jnp.float32)
    log_q = jax.nn.log_softmax(student.astype(dtype) / temperature)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(dtype) / temperature)
    return temperature**2 * weighted_mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), weights)


def distillation_loss(
    student_logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    *,
    teacher_logits: jax.Array | None = None,
    student_hiddens: Any = None,
    teacher_hiddens: Any = None,
    token_mask: jax.Array | None = None,
    ce: float = 1.0,
    kl: float = 0.0,
    square: float = 1.0,
    temperature: float = 1.0,
) -> jax.Array:
    """Returns the weighted sum of cross-entropy, divergence from the teacher and SquareHead.

    Args:
      student_logits: ``[..., V]``.
      labels: int32 ``[...]``.
      weights: ``[...]``, 0 where a label does not count; for cross-entropy and divergence.
      teacher_logits: ``[..., V]``, needed where ``kl`` is not 0.
      student_hiddens, teacher_hiddens: as in `squarehead`, needed where ``square`` is not 0.
      token_mask: ``[B, S]``, for SquareHead.
      ce, kl, square: coefficients; the defaults are the paper's.
      temperature: of the divergence.

    Raises:
      ValueError: a coefficient that is not 0 without what its term needs, and the reverse.
    """
    for name, value, given in (("kl", kl, (teacher_logits,)), ("square", square, (student_hiddens, teacher_hiddens))):
        if any((part is not None) != (value != 0) for part in given):
            what = "teacher_logits" if name == "kl" else "student_hiddens and teacher_hiddens"
            raise ValueError(f"{name}={value} {'needs' if value else 'makes no use of'} {what}")
    total = jnp.zeros((), jnp.promote_types(student_logits.dtype, jnp.float32))
    if ce:
        log_q = jax.nn.log_softmax(student_logits.astype(total.dtype))
        nll = -jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]
        total += ce * weighted_mean(nll, weights)
    if teacher_logits is not None:
        total += kl * distillation_kl(student_logits, teacher_logits, weights, temperature)
    if student_hiddens is not None:
        total += square * squarehead(student_hiddens, teacher_hiddens, token_mask)
    return total


def paired_blocks(
    block: Callable[[Any, jax.Array], jax.Array],
    student: Any,
    teacher: Any,
    x: jax.Array,
    teacher_x: jax.Array | None = None,
    *,
    token_mask: jax.Array | None = None,
    eps: float = EPS,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs every block of the teacher right before the student's and sums `squarehead` along the way.

    Two hidden states are alive at a time, where two passes keep those of every block. Reverse mode keeps what the
    student's blocks ask for and one difference ``[B, S, D]`` per block; nothing of the teacher.

    Args:
      block: (slice of a stack, hidden state) -> hidden state, such as `memjax.models.Stages.block`.
      student, teacher: pytrees of arrays ``[L, ...]``, such as `memjax.models.Stages.layers` gives; under
        `memjax.lift` their weights may be views, the teacher's packed for instance.
      x: ``[B, S, D]``, what the student's first block takes.
      teacher_x: what the teacher's takes; None: the same.
      token_mask, eps: as in `squarehead`.
      remat: keep only the hidden state between the student's blocks, and run each again in the backward pass.

    Returns:
      (student's last hidden state, teacher's last hidden state, loss).
    """
    student_block = jax.checkpoint(block, prevent_cse=False) if remat else block

    def step(carry: Any, layers: Any) -> tuple[Any, jax.Array]:
        x, teacher_x = carry
        teacher_x = jax.lax.stop_gradient(block(layers[1], teacher_x))
        x = student_block(layers[0], x)
        return (x, teacher_x), block_loss(x, teacher_x, token_mask, eps)

    start = (x, jax.lax.stop_gradient(x if teacher_x is None else teacher_x))
    (x, last), losses = jax.lax.scan(step, start, (student, teacher))
    return x, last, losses.sum()


def weighted_mean(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Returns the mean of ``x``, weighted where there are weights; 0 where these are all 0."""
    if weights is None:
        return jnp.mean(x)
    weights = weights.astype(x.dtype)
    total = jnp.sum(weights)
    return jnp.sum(jnp.where(weights != 0, x * weights, 0)) / jnp.where(total == 0, 1, total)


def check_temperature(temperature: float) -> None:
    """Raises a ValueError unless ``temperature`` is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
