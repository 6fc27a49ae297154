"""Scale-DiT, S2AFormer and EScAIP."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import (
    anchor_positions,
    attend,
    frequency_embedding,
    hilbert_order,
    make_block_mask,
    neighbour_attention,
    scale_dit_mask,
    spherical_harmonics,
    strip_attention,
    strip_init,
)
from tests.attention.naive import naive, operands, same
from tests.random_views import array


@pytest.mark.parametrize("side", [1, 2, 8, 16])
def test_the_hilbert_curve_walks_to_neighbours_and_windows_are_runs(side):
    order, inverse = hilbert_order(side, side)
    assert (np.sort(order) == np.arange(side * side)).all() and (order[inverse] == np.arange(side * side)).all()
    y, x = order // side, order % side
    assert (abs(np.diff(y)) + abs(np.diff(x)) == 1).all()
    for size in (2**i for i in range(side.bit_length())):
        window = (y // size) * (side // size) + x // size
        assert len(set(window)) == 1 + (np.diff(window) != 0).sum()


def test_the_hilbert_curve_of_a_rectangle_keeps_windows_whole():
    order, inverse = hilbert_order(12, 20)
    assert (order[inverse] == np.arange(240)).all() and sorted(order) == list(range(240))
    window = (order // 20 // 4) * 5 + order % 20 // 4
    assert (window.reshape(-1, 16) == window.reshape(-1, 16)[:, :1]).all()


def test_windows_in_hilbert_order_are_windows_in_raster_order():
    side, window, context = 8, 16, 32
    order, inverse = hilbert_order(side, side)
    q, k, v = operands(context + side * side, b=1, h=2, hk=1)
    permuted = np.concatenate([np.arange(context), context + order])
    back = np.concatenate([np.arange(context), context + inverse])
    mask = scale_dit_mask(context, window)
    made = make_block_mask(mask, 96, 96, blocks=(16, 16))
    assert (made.by_query.full == made.by_query.total).all() and made.by_query.total[0, 0].tolist() == [2] * 2 + [3] * 4

    fn = lambda *a: attend(*(x[:, permuted] for x in a), block_mask=made)[:, back]  # noqa: E731
    cell = np.arange(side * side)
    number = (cell // side // 4) * 2 + cell % side // 4
    table = np.zeros((96, 96), bool)
    table[:, :context] = True
    table[context:, context:] = number[:, None] == number
    same(fn, lambda *a: naive(*a, table), q, k, v)
    assert np.asarray(scale_dit_mask(0, 64).table(64, 64)).all()


def test_anchors_lie_in_the_middle_of_what_they_stand_for():
    grid = np.stack(np.meshgrid(np.arange(8.0), np.arange(12.0), indexing="ij"), -1)
    middle = grid.reshape(2, 4, 4, 3, 2).mean((1, 3)).reshape(-1, 2)
    np.testing.assert_allclose(anchor_positions(2, 4, 8, 12), middle)


def test_strip_attention():
    x = array(0, 2, 4, 6, 12)
    params = strip_init(jax.random.key(0), 12, heads=3, d_qk=2, stride=2)
    params = params._replace(conv=array(1, 2, 2, 12), scale=array(2, 12), bias=array(3, 12))

    def expected(params, x):
        kernel = params.conv[:, :, None]
        few = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=12
        )
        few = (few - few.mean(-1, keepdims=True)) / jnp.sqrt(few.var(-1, keepdims=True) + 1e-5)
        few = (few * params.scale + params.bias).reshape(2, 6, 12)
        q, k, v = (
            jnp.tensordot(a, w, 1)
            for a, w in ((x.reshape(2, 24, 12), params.query), (few, params.key), (few, params.value))
        )
        return jnp.einsum("bnhd,hdc->bnc", naive(q, k, v, np.ones((24, 6), bool)), params.out).reshape(x.shape)

    same(strip_attention, expected, params, x, tolerance=1e-4)
    with pytest.raises(ValueError, match="does not divide"):
        strip_attention(params, x[:, :3])
    with pytest.raises(ValueError, match="do not divide"):
        strip_init(jax.random.key(0), 12, heads=5, d_qk=2, stride=2)


def test_strip_attention_without_stride_is_multi_head_attention():
    x = array(0, 2, 3, 3, 8)
    params = strip_init(jax.random.key(0), 8, heads=2, d_qk=4, stride=1)
    tokens = x.reshape(2, 9, 8)

    @jax.jit
    def both(params, x):
        q, k, v = (jnp.tensordot(tokens, w, 1) for w in params[:3])
        heads = jax.nn.dot_product_attention(q, k, v)
        return strip_attention(params, x), jnp.einsum("bnhd,hdc->bnc", heads, params.out).reshape(x.shape)

    np.testing.assert_allclose(*both(params, x), 1e-5, 1e-6)


N, M, HEADS, DEGREES = 3, 5, 2, (3, 2, 1)
VALID = np.arange(M) < np.asarray([5, 3, 0])[:, None]


def atoms(dtype=jnp.float32):
    q, k, v = (array(i, N, M, HEADS, d, dtype=dtype) for i, d in enumerate((6, 6, 4)))
    return q, k, v, array(3, N, M, 3, dtype=dtype), array(4, HEADS, dtype=dtype)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def neighbours(q, k, v, positions, angle, valid=VALID):
    towards = unit(positions)
    q, k = (frequency_embedding(x, towards, DEGREES) for x in (q, k))
    return neighbour_attention(q, k, v, jnp.asarray(valid), directions=towards, angle=angle, scale=0.5)


def written_out(q, k, v, positions, angle):
    """Returns the same by Legendre polynomials of the angles between neighbours, an atom at a time."""
    out = []
    for n, count in enumerate(VALID.sum(1)):
        towards = unit(positions[n, :count])
        cos = towards @ towards.T
        legendre = [jnp.ones_like(cos), cos, (3 * cos**2 - 1) / 2]
        scores = angle[:, None, None] * cos
        for c, degree in enumerate(np.repeat(np.arange(3), DEGREES)):
            scores += 0.5 * jnp.einsum("qh,kh->hqk", q[n, :count, :, c], k[n, :count, :, c]) * legendre[degree]
        found = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v[n, :count])
        out.append(jnp.pad(found, ((0, M - count), (0, 0), (0, 0))))
    return jnp.stack(out)


def test_neighbours_and_angles_with_padding():
    y, gradients = same(neighbours, written_out, *atoms())
    assert (y[~VALID] == 0).all() and (y[VALID] != 0).all()
    assert all((g[~VALID] == 0).all() for g in gradients[:4])


def test_forces_can_be_trained():
    def loss(fn, q, k, v, positions, angle):
        energy = lambda p: jnp.sum(jnp.sin(fn(q, k, v, p, angle)))  # noqa: E731
        return jnp.sum(jnp.square(jax.grad(energy)(positions)))

    twice = lambda fn: jax.jit(jax.grad(lambda *a: loss(fn, *a), tuple(range(5))))  # noqa: E731
    found = twice(neighbours)(*atoms())
    with jax.enable_x64(True):
        expected = twice(written_out)(*atoms(jnp.float64))
    for a, b in zip(found, expected):
        a, b = np.asarray(a), np.asarray(b)
        assert abs(b).max() > 0
        np.testing.assert_allclose(a, b, 2e-3, 2e-4 * abs(b).max())


def test_neighbours_have_no_order_and_rotations_no_effect():
    q, k, v, positions, angle = atoms()
    fn = jax.jit(neighbours)
    y = fn(q, k, v, positions, angle)
    order = np.asarray([3, 1, 4, 0, 2])
    moved = fn(*(np.asarray(x)[:, order] for x in (q, k, v, positions)), angle, VALID[:, order])
    np.testing.assert_allclose(moved, y[:, order], 1e-5, 1e-6)
    rotation = jnp.linalg.qr(array(9, 3, 3))[0]
    np.testing.assert_allclose(fn(q, k, v, positions @ rotation, angle), y, 1e-4, 1e-5)
    with pytest.raises(ValueError, match="come together"):
        neighbour_attention(q, k, v, jnp.asarray(VALID), angle=angle)


def test_harmonics_of_degree_4_add_up_to_legendre_polynomials():
    a, b = unit(array(0, 7, 3)), unit(array(1, 7, 3))
    cos = np.sum(np.asarray(a * b), -1)
    harmonics = jax.jit(functools.partial(spherical_harmonics, degree=4))
    for degree, (ya, yb) in enumerate(zip(harmonics(a), harmonics(b))):
        assert ya.shape == (7, 2 * degree + 1)
        expected = np.polynomial.legendre.Legendre.basis(degree)(cos)
        np.testing.assert_allclose(np.sum(np.asarray(ya * yb), -1), expected, 1e-4, 1e-5)
    assert jax.eval_shape(frequency_embedding, jnp.ones((7, 1, 1, 64)), a[:, None]).shape == (7, 1, 1, 320)
    with pytest.raises(ValueError, match="64 channels"):
        frequency_embedding(jnp.ones((7, 1, 1, 63)), a[:, None])
