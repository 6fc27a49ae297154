"""Every constructor of a mask, and composites, in the Hopper kernels: lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import attend, masks

B, S, H, Hk, D = 2, 512, 4, 2, 64


def chosen(shape, seed):
    return np.random.default_rng(seed).random(shape) < 0.5


IDS = np.repeat(np.arange(4, dtype=np.int32), S // 4)[None].repeat(B, 0)
MASKS = {
    "window, sinks": lambda: masks.causal() & (masks.window(100, 0) | masks.sink(4)),
    "prefix": lambda: masks.prefix(np.array([30, 200])) | masks.causal(),
    "documents": lambda: masks.segments(jnp.asarray(IDS)) & masks.causal(),
    "lengths": lambda: masks.lengths(np.array([300, 512]), np.array([300, 500])),
    "neighborhood": lambda: masks.neighborhood_nd((16, 32), (5, 5)) | masks.chunked(100),
    "strides": lambda: ~(masks.dilated(3, 60) ^ masks.strided_global(7)),
    "blocks": lambda: masks.blocks(chosen((1, H, 4, 4), 0), 128) & masks.causal(),
    "small blocks": lambda: masks.blocks(chosen((1, Hk, 8, 8), 1), 64) & masks.causal(),
    "table": lambda: masks.array(chosen((1, 1, S, S), 2)),
    "tree": lambda: masks.tree(np.maximum(np.arange(S) // 2 - 1, -1).astype(np.int32)) | masks.columns([3, 77]),
    "heads": lambda: masks.heads([masks.causal(), masks.window(50, 0)], [0, 1, 0, 1]),
}
SLOW = ("lengths", "neighborhood", "strides", "small blocks", "tree", "heads")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MASKS])
def test_every_mask_lowers_for_cuda(name):
    mask = MASKS[name]()
    shapes = (B, S, H, D), (B, S, Hk, D), (B, S, Hk, D)

    def run(q, k, v):
        return attend(q, k, v, mask=mask, implementation="mosaic_gpu", return_column_sums=True)

    traced = jax.jit(run).trace(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_on_a_device(name):
    mask = MASKS[name]()
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, S, h, D)), jnp.bfloat16) for h in (H, Hk, Hk))
    options = {"mask": mask, "return_lse": True, "return_column_sums": True}
    made, wanted = (attend(q, k, v, implementation=i, **options) for i in ("mosaic_gpu", "reference"))
    for actual, expected, tolerance in zip(made, wanted, (2e-2, 1e-3, 2e-3)):
        np.testing.assert_allclose(
            np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=tolerance, rtol=tolerance
        )
