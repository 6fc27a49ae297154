"""ConvBN Tune against a convolution followed by BatchNorm with frozen statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from memjax import adapters
from tests.random_views import array, assert_close

EPS = 1e-3
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")
CASES = {
    "plain": ((3, 3, 4, 6), (2, 7, 8, 4), {}, {}),
    "strides and dilation": ((3, 2, 4, 6), (2, 7, 8, 4), {"window_strides": (2, 1)}, {"rhs_dilation": (1, 2)}),
    "channels first": (
        (6, 4, 3, 3),
        (2, 4, 7, 8),
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW"), "padding": "VALID"},
        {},
    ),
    "numbers": (
        (4, 3, 6),
        (2, 4, 9),
        {"dimension_numbers": lax.conv_dimension_numbers((2, 4, 9), (4, 3, 6), ("NCW", "IWO", "NWC"))},
        {},
    ),
    "depthwise": ((3, 3, 1, 8), (2, 7, 8, 4), {}, {"feature_group_count": 4}),
    "transposed": ((3, 3, 4, 6), (2, 5, 5, 4), {"convolve": lax.conv_transpose, "window_strides": (2, 2)}, {}),
    "transposed kernel": (
        (3, 3, 6, 4),
        (2, 5, 5, 4),
        {"convolve": lax.conv_transpose, "window_strides": (2, 2), "dimension_numbers": CHANNELS_LAST},
        {"transpose_kernel": True},
    ),
}
AXES = {"channels first": (0, 1), "transposed kernel": (2, 3)}


def eval_mode(x, conv, bn, stats, kernel_ndim, channel, settings, extra):
    settings = dict(settings)
    convolve = settings.pop("convolve", lax.conv_general_dilated)
    strides = settings.pop("window_strides", (1,) * (kernel_ndim - 2))
    settings.setdefault("dimension_numbers", CHANNELS_LAST)
    y = convolve(x, conv["kernel"], strides, settings.pop("padding", "SAME"), **settings, **extra)
    vector = lambda v: jnp.reshape(v, [-1 if i == channel else 1 for i in range(y.ndim)])  # noqa: E731
    y = (y + vector(conv.get("bias", jnp.zeros(1))) - vector(stats["mean"])) * vector(lax.rsqrt(stats["var"] + EPS))
    return y * vector(bn.get("scale", jnp.ones(1))) + vector(bn.get("bias", jnp.zeros(1)))


def arguments(shape, image, axis, dtype, lacking=()):
    c = shape[axis]
    vectors = {name: array(10 + i, c, dtype=dtype) for i, name in enumerate(("conv", "scale", "bias", "mean", "var"))}
    conv = {"kernel": array(0, *shape, dtype=dtype), "bias": vectors["conv"]}
    bn = {"scale": vectors["scale"], "bias": vectors["bias"]}
    for group, name in lacking:
        (conv if group == "conv" else bn).pop(name)
    return array(1, *image, dtype=dtype), conv, bn, {"mean": vectors["mean"], "var": jnp.exp(vectors["var"])}


FAST = ("strides and dilation", "channels first", "depthwise", "transposed kernel")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_values_and_gradients_equal_eval_mode_in_float64(name):
    shape, image, settings, extra = CASES[name]
    axis, channel = AXES.get(name, (len(shape) - 1, len(image) - 1))
    with jax.enable_x64(True):
        x, conv, bn, stats = arguments(shape, image, axis, jnp.float64)

        def tune(x, conv, bn):
            return adapters.conv_bn_tune(x, conv, bn, stats, EPS, **settings, **extra)

        def plain(x, conv, bn):
            return eval_mode(x, conv, bn, stats, len(shape), channel, settings, extra)

        def both(*primals):
            return tuple((y, back(jnp.cos(y))) for y, back in (jax.vjp(fn, *primals) for fn in (tune, plain)))

        actual, expected = jax.jit(both)(x, conv, bn)
        assert actual[0].dtype == jnp.float64
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("lacking", [(("conv", "bias"),), (("bn", "scale"), ("bn", "bias"))])
def test_missing_bias_and_affine(lacking):
    x, conv, bn, stats = arguments((3, 3, 4, 6), (2, 7, 8, 4), 3, jnp.float32, lacking)
    actual = jax.jit(functools.partial(adapters.conv_bn_tune, eps=EPS))(x, conv, bn, stats)
    assert_close(
        actual,
        jax.jit(functools.partial(eval_mode, kernel_ndim=4, channel=3, settings={}, extra={}))(x, conv, bn, stats),
        1e-5,
    )


def test_statistics_get_no_gradient_and_a_flax_module_takes_the_folded_kernel():
    module, norm = nn.Conv(6, (3, 3)), nn.BatchNorm(use_running_average=True, epsilon=EPS)
    x, conv, bn, stats = arguments((3, 3, 4, 6), (2, 7, 8, 4), 3, jnp.float32)
    y = norm.apply({"params": bn, "batch_stats": stats}, module.apply({"params": conv}, x))
    assert_close(module.apply({"params": adapters.fold_bn(conv, bn, stats, EPS)}, x), y, 1e-5)
    grads = jax.grad(lambda stats: adapters.conv_bn_tune(x, conv, bn, stats).sum())(stats)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_neither_the_output_of_the_convolution_nor_the_folded_kernel_is_kept():
    x, conv, bn, stats = arguments((3, 3, 4, 6), (2, 7, 8, 4), 3, jnp.float32)

    def kept(fn, shape=(2, 7, 8, 6)):
        leaves = jax.tree.leaves(jax.eval_shape(lambda *primals: jax.vjp(fn, *primals)[1], x, conv, bn))
        return [leaf.shape for leaf in leaves if leaf.shape == shape]

    plain = functools.partial(eval_mode, stats=stats, kernel_ndim=4, channel=3, settings={}, extra={})
    assert kept(lambda *primals: jnp.sum(plain(*primals)))
    tune = lambda *primals: jnp.sum(adapters.conv_bn_tune(*primals, stats))  # noqa: E731
    assert not kept(tune)
    assert len(kept(tune, conv["kernel"].shape)) == 1  # the kernel itself, not the folded one


def test_refusals():
    x, conv, bn, stats = arguments((3, 3, 4, 6), (2, 7, 8, 4), 3, jnp.float32)
    with pytest.raises(ValueError, match=r"stats has \['mean'\]"):
        adapters.conv_bn_tune(x, conv, bn, {"mean": stats["mean"]})
    with pytest.raises(ValueError, match=r"bn\['scale'\]: expected \[6\]"):
        adapters.conv_bn_tune(x, conv, {"scale": jnp.ones(4)}, stats)


def test_a_stack_of_bottlenecks_needs_a_fifth_less_memory():
    """The residual blocks of a ResNet-50, scanned: per block the temporaries fall by a fifth or more."""
    width, narrow, image = 32, 8, (2, 16, 16, 32)
    kernels = {"reduce": (1, 1, width, narrow), "mix": (3, 3, narrow, narrow), "expand": (1, 1, narrow, width)}

    def block_bytes(norm):
        def block(x, layer):
            h = x
            for name in kernels:
                h = norm(h, *layer[name])
                h = nn.relu(h if name != "expand" else x + h)
            return h, None

        def temporaries(depth):
            S = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
            stats = ({"mean": S((depth, c)), "var": S((depth, c))} for *_, c in kernels.values())
            layers = {
                name: (
                    {"kernel": S((depth, *shape))},
                    {"scale": S((depth, shape[-1])), "bias": S((depth, shape[-1]))},
                    s,
                )
                for (name, shape), s in zip(kernels.items(), stats)
            }
            step = jax.jit(jax.grad(lambda layers, x: jnp.sum(lax.scan(block, x, layers)[0] ** 2)))
            return step.lower(layers, S(image)).compile().memory_analysis().temp_size_in_bytes

        return (temporaries(9) - temporaries(3)) / 6

    plain = block_bytes(functools.partial(eval_mode, kernel_ndim=4, channel=3, settings={}, extra={}))
    tune = block_bytes(functools.partial(adapters.conv_bn_tune, eps=EPS))
    assert tune <= 0.8 * plain, (tune, plain)
