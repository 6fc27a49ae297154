import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.optim.meta_de import best_of, differential_evolution, evaluate, evolve, meta_de

D, P = 4, 20
LOWER, UPPER = np.full(D, -5.0), np.full(D, 5.0)


@jax.jit
def ask(genome, state):
    return differential_evolution(LOWER, UPPER, P, genome=genome).ask(state)


def sphere(x):
    return jnp.sum((x - 1.0) ** 2)


def rastrigin(x):
    return jnp.sum(x * x - 10 * jnp.cos(2 * jnp.pi * x) + 10)


def numpy_trial(key, i, points, fitness, genome):
    """A trial by its definition, from the same draws."""
    F, CR, *rest = (float(gene) for gene in genome)
    base, second, count, crossover = (int(np.floor(gene)) for gene in rest)
    draw, chosen, cross = jax.random.split(key, 3)
    others = [int(o) for o in jax.random.choice(draw, P - 1, (9,), replace=False)]
    others = [o + 1 if o >= i else o for o in others]
    assert len({*others, i}) == 10
    elite = np.argsort(fitness, kind="stable")[int(jax.random.randint(chosen, (), 0, 1))]
    bases = [points[others[0]], points[np.argmin(fitness)], points[elite], points[i]]
    mutant = bases[base] + F * (bases[second] - bases[base])
    for d in range(count):
        mutant = mutant + F * (points[others[2 * d + 1]] - points[others[2 * d + 2]])
    place, chance = jax.random.split(cross)
    first, u = int(jax.random.randint(place, (), 0, D)), np.asarray(jax.random.uniform(chance, (D,)))
    trial = points[i].copy()
    if crossover == 0:
        for j in range(D):
            if u[j] < CR or j == first:
                trial[j] = mutant[j]
    elif crossover == 1:
        j = 0
        while j < D and (j == 0 or u[j] < CR):
            trial[(first + j) % D] = mutant[(first + j) % D]
            j += 1
    else:
        trial = trial + CR * (mutant - trial)
    return np.clip(trial, LOWER, UPPER)


@pytest.mark.parametrize(
    "genome", [(0.5, 0.9, 0, 0, 1, 0), (0.7, 0.6, 1.5, 2.2, 4.9, 1.1), (0.4, 0.3, 3.9, 1, 2, 2.5), (1, 1, 4, 4, 5, 3)]
)
def test_equals_the_numpy_transcription(genome):
    method = differential_evolution(LOWER, UPPER, P, genome=np.array(genome))
    state = method.init(jax.random.key(1))
    first = ask(jnp.array(genome, jnp.float32), state)
    np.testing.assert_array_equal(first, state.population)
    state = method.tell(state, first, jax.vmap(rastrigin)(first))
    clipped = [min(gene, top) for gene, top in zip(genome, (1, 1, 3, 3, 4, 2.5))]
    keys = jax.random.split(jax.random.fold_in(state.key, 1), P)
    points, fitness = np.asarray(state.population, np.float64), np.asarray(state.fitness)
    trials = ask(jnp.array(genome, jnp.float32), state)
    for i in (0, 7, P - 1):
        np.testing.assert_allclose(trials[i], numpy_trial(keys[i], i, points, fitness, clipped), rtol=1e-5, atol=1e-5)
    told = method.tell(state, trials, jax.vmap(rastrigin)(trials).at[0].set(jnp.nan))
    better = np.array(jax.vmap(rastrigin)(trials)) <= fitness
    better[0] = False
    np.testing.assert_array_equal(told.population, np.where(better[:, None], trials, state.population))
    assert (told.fitness <= state.fitness).all()


def test_finds_the_minimum_and_never_gets_worse():
    method = differential_evolution(LOWER, UPPER, P)
    state = method.init(jax.random.key(0))
    generations = jax.jit(functools.partial(evolve, method, objective=sphere, steps=50))
    found = []
    for _ in range(4):
        state = generations(state)
        found.append(float(best_of(state)[1]))
    assert found == sorted(found, reverse=True) and found[-1] < 1e-6
    np.testing.assert_allclose(best_of(state)[0], 1, atol=1e-3)


def test_meta_de_beats_plain_de_at_equal_evaluations():
    genomes, steps, generations = 16, 20, 4
    mesh = jax.make_mesh((8,), ("population",), axis_types=(jax.sharding.AxisType.Auto,))
    method = meta_de(
        rastrigin, LOWER, UPPER, genomes=genomes, population=P, steps=steps, chunk=1, mesh=mesh, axis="population"
    )
    state = method.init(jax.random.key(0))

    @jax.jit
    def generation(state):
        asked = method.ask(state)
        fitness, points = method.execute(state, asked)
        return method.tell(state, asked, fitness, points), fitness, points

    found = []
    for _ in range(generations):
        state, fitness, points = generation(state)
        found.append(float(state.fitness))
    assert found == sorted(found, reverse=True)
    np.testing.assert_allclose(jax.vmap(rastrigin)(points), fitness, rtol=1e-5, atol=1e-5)
    plain = differential_evolution(LOWER, UPPER, P)
    # One run of plain DE with the generations of one executor, the best of as many runs as there were executors.
    runs = jax.jit(jax.vmap(lambda key: best_of(evolve(plain, plain.init(key), rastrigin, steps))[1]))(
        jax.random.split(jax.random.key(1), genomes * generations)
    )
    assert found[-1] < 0.5 * runs.min()


def test_sharded_and_chunked_evaluation_is_the_same():
    points = jax.random.normal(jax.random.key(0), (16, D))
    mesh = jax.make_mesh((8,), ("population",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(x):
        return {"value": rastrigin(x), "twice": 2 * x}

    expected = jax.vmap(fn)(points)
    for options in (
        {"chunk": 3},
        {"mesh": mesh, "axis": "population"},
        {"chunk": 1, "mesh": mesh, "axis": "population"},
    ):
        got = jax.jit(lambda points, options=options: evaluate(fn, points, **options))(points)
        np.testing.assert_allclose(got["value"], expected["value"], rtol=1e-5)
        np.testing.assert_array_equal(got["twice"], expected["twice"])
    assert "all-gather" not in (
        jax.jit(lambda points: evaluate(fn, points, mesh=mesh, axis="population")).lower(points).compile().as_text()
    )


def test_bad_input():
    mesh = jax.make_mesh((8,), ("population",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="lower < upper"):
        differential_evolution(UPPER, LOWER, P)
    with pytest.raises(ValueError, match="at least 10"):
        differential_evolution(LOWER, UPPER, 9)
    with pytest.raises(ValueError, match=r"a genome \[6\]"):
        differential_evolution(LOWER, UPPER, P, genome=np.ones(5))
    with pytest.raises(ValueError, match="no axis 'data'; its axes are population"):
        evaluate(sphere, jnp.ones((8, D)), mesh=mesh, axis="data")
    with pytest.raises(ValueError, match="of size 8 does not divide 12 candidates"):
        evaluate(sphere, jnp.ones((12, D)), mesh=mesh, axis="population")
