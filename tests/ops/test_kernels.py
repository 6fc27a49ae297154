"""Norms and SwiGLU with a codec take the kernels where a Hopper GPU is: seen by lowering for CUDA."""

import jax
import jax.numpy as jnp
import pytest

from memjax import codecs, ops
from memjax.codecs import fused


@pytest.mark.parametrize("group, calls", [(128, 4), ("channel", 0)])
def test_packed_residuals_are_made_and_read_by_kernels(monkeypatch, group, calls):
    monkeypatch.setattr(fused, "on_hopper", lambda: True)
    monkeypatch.setattr("pallas_kernels.codec.api.on_hopper", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    codec = codecs.int4(group=group, symmetric=False)
    x, gain = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024,), jnp.bfloat16)

    def gradients(x, gain):
        def loss(x, gain):
            y = ops.rms_norm(x, gain, residual=codec)
            return ops.swiglu(y, x, residual=codec).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(x, gain)

    text = jax.jit(gradients).trace(x, gain).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic") == calls
