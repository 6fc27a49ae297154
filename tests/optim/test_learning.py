"""At one rate FRUGAL learns faster with its state-free part, on real text; at their best rates that need not hold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import memjax as mj
from benchmarks import quality
from benchmarks.activation_quality import Task
from memjax import models
from memjax.recipes import data

CONFIG = dataclasses.replace(
    quality.TINY, hidden_size=64, intermediate_size=168, num_heads=2, num_kv_heads=2, head_dim=32
)


def losses(task, make, steps, seeds):
    """Returns the held-out losses after training with ``make(schedule)``."""
    loss = task.loss_fn("none")
    schedule = optax.warmup_cosine_decay_schedule(4e-4, 4e-3, steps // 10, steps, 4e-4)
    tx = optax.chain(optax.clip_by_global_norm(1.0), make(schedule))
    train = jax.jit(lambda theta, batches: quality.train(loss, tx, theta, {}, batches)[0])
    batches = {seed: quality.batches(task.train, task.batch, seed, steps) for seed in seeds}
    after = {seed: train(task.start(seed)[0], batches[seed]) for seed in seeds}
    evaluate = quality.compile_evaluate(loss, after[seeds[0]], {}, task.held_out, 64)
    return jnp.array([evaluate(theta, {}, task.held_out, 64).nll for theta in after.values()])


@pytest.mark.parametrize(
    "steps, gap, seeds", [(80, 10, (0,)), pytest.param(400, 25, (0, 1, 2), marks=pytest.mark.slow)]
)
def test_the_state_free_part_learns_at_an_equal_rate(steps, gap, seeds):
    texts = quality.load_text(quality.Bytes())
    train, held_out = (data.text_windows(text[:200_000], 32) for text in texts)
    model = models.Model(CONFIG, {}, quality.Bytes(), "bytes")
    task = Task(model, None, train, quality.head(held_out, 0, 256), 16, steps, 4e-3)
    frugal = functools.partial(mj.optim.frugal, density=0.25, update_gap=gap)
    whole = losses(task, frugal, steps, seeds)
    without = losses(task, functools.partial(frugal, state_free_scale=0.0), steps, seeds)
    assert (whole < without - 0.05).all()
