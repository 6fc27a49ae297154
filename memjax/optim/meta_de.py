"""Differential evolution, and MetaDE: differential evolution of its own parameters. No gradients.

Sources: Storn and Price, "Differential Evolution", 1997; Chen et al., "MetaDE: Evolving Differential Evolution by
Differential Evolution", 2025. All functions are pure: ask for candidates, evaluate them anywhere, tell the results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

Objective = Callable[[jax.Array], jax.Array]  # a point [D] -> scalar, to be minimised
GENES = ("F", "CR", "base", "second_base", "differences", "crossover")
GENOME_LOWER = np.array([0, 0, 0, 0, 1, 0], np.float32)
GENOME_UPPER = np.array([1, 1, 4, 4, 5, 3], np.float32)
RAND_1_BIN = np.array([0.5, 0.9, 0, 0, 1, 0], np.float32)


class DEState(NamedTuple):
    """A population; the next candidates are a function of it."""

    key: jax.Array  # random key
    step: jax.Array  # int32 scalar, generations told
    population: jax.Array  # float32 [P, D]
    fitness: jax.Array  # float32 [P], infinite before the first tell


class DE(NamedTuple):
    """The functions of differential evolution.

    Attributes:
      init: key -> `DEState`, a population that is uniform within the bounds.
      ask: state -> candidates ``[P, D]``; the first are the population itself.
      tell: (state, candidates, fitness ``[P]``) -> state; a candidate replaces its parent where it is not worse.
    """

    init: Callable[[jax.Array], DEState]
    ask: Callable[[DEState], jax.Array]
    tell: Callable[[DEState, jax.Array, jax.Array], DEState]


class MetaState(NamedTuple):
    """A population of genomes, and the best point that any executor found."""

    genomes: DEState
    point: jax.Array  # float32 [D]
    fitness: jax.Array  # float32 scalar


class MetaDE(NamedTuple):
    """The functions of MetaDE.

    Attributes:
      init: key -> `MetaState`.
      ask: state -> genomes ``[G, 6]``.
      execute: (state, genomes, steps=None) -> (fitness ``[G]``, points ``[G, D]``): runs an executor for each genome,
        all from the same random numbers; more ``steps`` in the last generation are the paper's "power up".
      tell: (state, genomes, fitness, points) -> state.
    """

    init: Callable[[jax.Array], MetaState]
    ask: Callable[[MetaState], jax.Array]
    execute: Callable[..., tuple[jax.Array, jax.Array]]
    tell: Callable[[MetaState, jax.Array, jax.Array, jax.Array], MetaState]


def best_of(state: DEState) -> tuple[jax.Array, jax.Array]:
    """Returns the best point ``[D]`` of a population and its fitness."""
    i = jnp.argmin(state.fitness)
    return state.population[i], state.fitness[i]


def differential_evolution(
    lower: Any, upper: Any, population: int, *, F: float = 0.5, CR: float = 0.9, genome: Any = None
) -> DE:
    """Builds differential evolution, DE/rand/1/bin unless a genome says otherwise.

    A trial is ``base + F * (second_base - base) + F * sum of differences of random individuals``, crossed with its
    parent and clipped to the bounds. A genome has floats, of which the last four are rounded down:

    - F in [0, 1] and CR in [0, 1];
    - base and second_base in [0, 4): a random individual, the best, one of the best 5 %, the parent;
    - differences in [1, 5): how many;
    - crossover in [0, 3): binomial; exponential (a run from a random place, as long as draws are below CR);
      arithmetic.

    Args:
      lower, upper: bounds ``[D]``.
      population: P, at least 10: a trial draws nine individuals other than its parent.
      F, CR: of DE/rand/1/bin.
      genome: ``[6]`` in the order of `GENES`, traced or not; replaces F and CR.

    Returns:
      `DE`. NaN counts as the worst fitness.

    Raises:
      ValueError: bounds of different shapes or in the wrong order, or a population that is too small.
    """
    lower, upper = _bounds(lower, upper)
    if population < 10:
        raise ValueError(f"population={population} must be at least 10")
    genes = jnp.asarray([F, CR, *RAND_1_BIN[2:]] if genome is None else genome, jnp.float32)
    if genes.shape != (6,):
        raise ValueError(f"expected a genome [6], got shape {genes.shape}")

    def init(key: jax.Array) -> DEState:
        start, key = jax.random.split(key)
        points = jax.random.uniform(start, (population, len(lower)), minval=lower, maxval=upper)
        return DEState(key, jnp.zeros((), jnp.int32), points, jnp.full(population, jnp.inf))

    def ask(state: DEState) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), population)
        order = jnp.argsort(state.fitness)
        trials = jax.vmap(lambda key, i: _trial(key, i, state.population, order, genes))(keys, jnp.arange(population))
        return jnp.where(state.step == 0, state.population, jnp.clip(trials, lower, upper))

    def tell(state: DEState, candidates: jax.Array, fitness: jax.Array) -> DEState:
        fitness = jnp.where(jnp.isnan(fitness), jnp.inf, fitness.astype(jnp.float32))
        better = fitness <= state.fitness
        return DEState(
            state.key,
            state.step + 1,
            jnp.where(better[:, None], candidates, state.population),
            jnp.where(better, fitness, state.fitness),
        )

    return DE(init, ask, tell)


def _trial(key: jax.Array, i: jax.Array, points: jax.Array, order: jax.Array, genes: jax.Array) -> jax.Array:
    """Returns the trial ``[D]`` of individual ``i``, not clipped; ``order`` sorts the population by fitness."""
    F, CR = genes[0], genes[1]
    base, second, count, crossover = (jnp.floor(gene).astype(jnp.int32) for gene in genes[2:])
    size, dim = points.shape
    draw, chosen, cross = jax.random.split(key, 3)
    others = jax.random.choice(draw, size - 1, (9,), replace=False)
    others = others + (others >= i)  # all but i
    elite = order[jax.random.randint(chosen, (), 0, max(size // 20, 1))]
    bases = points[jnp.stack([others[0], order[0], elite, i])]
    used = (jnp.arange(4) < count)[:, None]
    difference = jnp.sum(jnp.where(used, points[others[1::2]] - points[others[2::2]], 0), axis=0)
    start = bases[jnp.clip(base, 0, 3)]
    mutant = start + F * (bases[jnp.clip(second, 0, 3)] - start) + F * difference
    return _cross(cross, points[i], mutant, CR, crossover, dim)


def _cross(key: jax.Array, x: jax.Array, mutant: jax.Array, CR: jax.Array, crossover: jax.Array, dim: int) -> jax.Array:
    place, chance = jax.random.split(key)
    first = jax.random.randint(place, (), 0, dim)
    numbers = jnp.arange(dim)
    u = jax.random.uniform(chance, (dim,))
    binomial = (u < CR) | (numbers == first)
    # Exponential: from a random place on, circularly, as long as draws stay below CR.
    run = jnp.cumprod(jnp.concatenate([jnp.ones(1, jnp.int32), (u[1:] < CR).astype(jnp.int32)]))
    exponential = run[(numbers - first) % dim] == 1
    return jnp.select(
        [crossover <= 0, crossover == 1],
        [jnp.where(binomial, mutant, x), jnp.where(exponential, mutant, x)],
        x + CR * (mutant - x),
    )


def evaluate(
    fn: Callable[[Any], Any], candidates: Any, *, chunk: int | None = None, mesh: Mesh | None = None, axis: str = ""
) -> Any:
    """Applies ``fn`` to every candidate, over the devices of a mesh axis, and in chunks on each.

    Args:
      fn: one candidate -> pytree of arrays.
      candidates: pytree of arrays ``[P, ...]``.
      chunk: how many are evaluated at once on a device, which bounds the memory; None for all.
      mesh: devices; None evaluates where it is called.
      axis: the name of the mesh axis over which the population is divided; its size divides P.

    Returns:
      ``fn``'s pytree with axis P in front.

    Raises:
      ValueError: a mesh without the axis, or one that does not divide the population.
    """

    def local(candidates: Any) -> Any:
        return jax.vmap(fn)(candidates) if chunk is None else lax.map(fn, candidates, batch_size=chunk)

    if mesh is None:
        return local(candidates)
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has no axis {axis!r}; its axes are {', '.join(map(str, mesh.shape))}")
    count = jax.tree.leaves(candidates)[0].shape[0]
    if count % mesh.shape[axis]:
        raise ValueError(f"the mesh axis {axis!r} of size {mesh.shape[axis]} does not divide {count} candidates")
    spec = PartitionSpec(axis)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(candidates)


def evolve(method: DE, state: DEState, objective: Objective, steps: Any, **options: Any) -> DEState:
    """Asks, evaluates and tells ``steps`` times.

    Args:
      method: the functions.
      state: where to start.
      objective: a point ``[D]`` -> scalar.
      steps: a number, traced or not.
      **options: of `evaluate`.
    """

    def generation(_: Any, state: DEState) -> DEState:
        candidates = method.ask(state)
        return method.tell(state, candidates, evaluate(objective, candidates, **options))

    return lax.fori_loop(0, steps, generation, state)


def meta_de(
    objective: Objective,
    lower: Any,
    upper: Any,
    *,
    genomes: int = 100,
    population: int = 100,
    steps: int = 1000,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "",
) -> MetaDE:
    """Builds MetaDE: DE/rand/1/bin over genomes, whose fitness is what their executors reach.

    An executor is a `differential_evolution` with the genome, run for ``steps`` generations. Executors hold
    ``2 * population * D`` numbers each; ``chunk`` of them run at once on a device.

    Args:
      objective: a point ``[D]`` -> scalar, to be minimised.
      lower, upper: bounds ``[D]``.
      genomes: outer population.
      population: of each executor.
      steps: generations of each executor.
      chunk, mesh, axis: of `evaluate`, over genomes.

    Raises:
      ValueError: as `differential_evolution` and `evaluate`.
    """
    lower, upper = _bounds(lower, upper)
    outer = differential_evolution(GENOME_LOWER, GENOME_UPPER, genomes)
    differential_evolution(lower, upper, population)

    def init(key: jax.Array) -> MetaState:
        return MetaState(outer.init(key), jnp.zeros_like(lower), jnp.float32(jnp.inf))

    def execute(state: MetaState, genomes: jax.Array, steps: Any = steps) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(state.genomes.key, state.genomes.step), 1)

        impl = jax.random.key_impl(key)

        def executor(arguments: Any) -> tuple[jax.Array, jax.Array]:
            genome, words = arguments
            method = differential_evolution(lower, upper, population, genome=genome)
            start = method.init(jax.random.wrap_key_data(words, impl=impl))
            point, fitness = best_of(evolve(method, start, objective, steps))
            return fitness, point

        words = jax.random.key_data(key)
        arguments = (genomes, jnp.broadcast_to(words, (len(genomes), *words.shape)))
        return evaluate(executor, arguments, chunk=chunk, mesh=mesh, axis=axis)

    def tell(state: MetaState, genomes: jax.Array, fitness: jax.Array, points: jax.Array) -> MetaState:
        i = jnp.argmin(fitness)
        better = fitness[i] < state.fitness
        return MetaState(
            outer.tell(state.genomes, genomes, fitness),
            jnp.where(better, points[i], state.point),
            jnp.where(better, fitness[i], state.fitness),
        )

    return MetaDE(init, lambda state: outer.ask(state.genomes), execute, tell)


def _bounds(lower: Any, upper: Any) -> tuple[jax.Array, jax.Array]:
    low, high = (np.asarray(x, np.float32) for x in (lower, upper))
    if low.ndim != 1 or low.shape != high.shape or not (low < high).all():
        raise ValueError(f"expected bounds [D] with lower < upper, got shapes {low.shape} and {high.shape}")
    return jnp.asarray(low), jnp.asarray(high)
