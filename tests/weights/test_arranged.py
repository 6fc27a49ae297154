"""The algebra of arrangements: whatever a program does to a weight's shape, the view stands for the same array."""

import numpy as np
import pytest

from memjax.core.views import Axes
from memjax.weights.arranged import UnsupportedError, arrange
from memjax.weights.dense import Dense


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def random_shape(rng: np.random.Generator, size: int) -> list[int]:
    shape = []
    while size > 1:
        factor = rng.choice([d for d in range(2, size + 1) if size % d == 0])
        shape.append(int(factor))
        size //= factor
    for _ in range(rng.integers(3)):
        shape.insert(rng.integers(len(shape) + 1), 1)
    return shape


@pytest.mark.smoke
def test_random_programs_of_transposes_reshapes_and_slices_match_numpy():
    refused = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shape = rng.choice([1, 2, 3, 4, 6, 8], size=rng.integers(2, 5))
        dense = numbers(*shape)
        w = arrange(Dense(dense, Axes()), "w")
        for _ in range(6):
            kind = rng.integers(3)
            if kind == 0:
                permutation = rng.permutation(dense.ndim)
                dense, w = dense.transpose(permutation), w.transpose(permutation)
            elif kind == 1:
                new = random_shape(rng, dense.size)
                try:
                    w = w.reshape(new)
                except UnsupportedError:
                    refused += 1
                    continue
                dense = dense.reshape(new)
            else:
                dim = rng.integers(dense.ndim) if dense.ndim else 0
                try:
                    w.batch_axis(dim)
                except (UnsupportedError, IndexError):
                    continue
                keep, i = bool(rng.integers(2)), rng.integers(dense.shape[dim])
                if keep:
                    w = w.map_batch(
                        dim, lambda leaf, axis, i=i: np.take(leaf, np.arange(i, leaf.shape[axis]), axis), True
                    )
                    dense = dense.take(range(i, dense.shape[dim]), dim)
                else:
                    w = w.map_batch(dim, lambda leaf, axis, i=i: np.take(leaf, i, axis), False)
                    dense = dense.take(i, dim)
            assert w.shape == dense.shape
            np.testing.assert_array_equal(w.materialize(), dense, err_msg=f"seed {seed}")
    assert refused < 300  # uneven splits of a transposed weight are refused, the rest is followed


def test_a_reshape_that_mixes_axes_unevenly_is_refused():
    w = arrange(Dense(numbers(4, 6), Axes()), "w").transpose((1, 0))
    with pytest.raises(UnsupportedError, match="mixes axes unevenly"):
        w.reshape((4, 6))


def test_only_whole_batch_axes_are_sliced():
    w = arrange(Dense(numbers(4, 2, 3), Axes()), "w")
    assert w.batch_axis(0) == -3
    assert w.transpose((1, 0, 2)).batch_axis(1) == -3
    for other, dim in ((w, 1), (w, 2), (w.reshape((2, 2, 2, 3)), 0), (w.reshape((8, 3)), 0)):
        with pytest.raises(UnsupportedError, match="not a batch axis"):
            other.batch_axis(dim)


def test_a_reshape_that_hides_a_batch_axis_of_one_drops_it_from_the_view():
    w = arrange(Dense(numbers(1, 2, 3), Axes()), "w").reshape((2, 3))
    assert w.view.shape == (2, 3)
    assert w.permutation() == (-2, -1)
