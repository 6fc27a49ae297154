"""One device beside several: rank-16 LoRA steps of Llama shapes on random weights, with the same code on every mesh.

A mesh that splits the batch gets as many sequences for each of its devices as one device has, `model` those of one.
Bytes are those of the last device of the mesh, for the weights are made on the first.

    python -m benchmarks.scaling                                    # needs two devices
    python -m benchmarks.scaling --case 'tiny-b2-s32/memjax fsdp=2'
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from benchmarks import finetune, harness
from benchmarks.shapes import LLAMAS

LORA = finetune.Shape("llama-3.1-8b", 2, 2048)
MESHES = ("data=1", "data=2", "fsdp=2", "model=2")
CASES = {
    f"{shape.name}/{stack} {mesh}": (shape, stack, mesh)
    for shape in (LORA, finetune.TINY)
    for stack in ("memjax", "memjax_nf4")
    for mesh in MESHES
}


def build(shape: finetune.Shape, stack: str, mesh: Any, attention: str) -> tuple[harness.Workload, dict[str, float]]:
    """Returns the training step on a mesh, and a table to which its ``init`` adds the bytes of a device.

    Args:
      shape: sizes; every device gets ``shape.batch`` sequences.
      stack: of `finetune.BASES`.
      mesh: of `memjax.parallel.make_mesh`.
      attention: "cudnn" or "xla".
    """
    import jax
    import jax.numpy as jnp
    import optax

    import memjax as mj
    from memjax import models, optim, parallel, remat
    from memjax.ops import linear_cross_entropy
    from memjax.recipes.train import Training, init_on_mesh, make_step

    config = LLAMAS[shape.model]
    model = models.Model(finetune.memjax_config(config))
    layers, rest = finetune.BASES[stack]
    on_one = finetune.build_memjax(config, attention, layers=layers, rest=rest)
    adapter = mj.adapters.lora(rank=finetune.RANK, alpha=finetune.ALPHA, targets="**/*_proj/kernel")

    def head(params: Any, hidden: Any, tokens: Any) -> Any:
        weight, axis = model.head(params)
        options = {"w_axis": axis, "reduction": "sum", "chunk": finetune.CHUNK}
        loss = linear_cross_entropy(hidden, weight, tokens[:, 1:], **options)
        return loss, jnp.float32(tokens[:, 1:].size)

    parts = optim.parts_of_stages(lambda tokens: model.stages(tokens[:, :-1], attention=attention), head)
    checkpoint = functools.partial(remat.checkpoint, params=(1,), prevent_cse=False)
    sums = parallel.on_mesh(parts, mesh, checkpoint=checkpoint)
    tx = optax.adamw(finetune.LEARNING_RATE)
    train = make_step(lambda theta, frozen, tokens, key: sums(adapter.attach(frozen, theta), tokens), tx)
    training, held = Training(tx.init, train), {}

    def init(key: Any) -> tuple[Any, Any]:
        nonlocal training
        state, frozen = on_one.init(key)
        places = parallel.shardings((frozen, state.theta), mesh, attach=adapter.attach)
        frozen, theta = jax.device_put((frozen, state.theta), places)
        state, training = init_on_mesh(theta, training)
        trees = {"weights": frozen, "trained": theta, "optimizer": state.opt_state}
        held.update({f"{name}_gib": parallel.device_bytes(tree) / harness.GIB for name, tree in trees.items()})
        return state, frozen

    def step(state: Any, frozen: Any, tokens: Any) -> tuple[Any, Any]:
        state, metrics = training.step(state, frozen, tokens)
        return state, metrics.loss

    return harness.Workload(init, step), held


def run_case(name: str) -> dict[str, Any]:
    """Runs one case and returns what it measured."""
    import jax

    from memjax import parallel

    shape, stack, sizes = CASES[name]
    mesh = parallel.make_mesh(sizes)
    batch = shape.batch * parallel.batch_parts(mesh)
    tokens = np.random.default_rng(finetune.SEED).integers(0, LLAMAS[shape.model].vocab, (batch, shape.length + 1))
    attention = "cudnn" if jax.default_backend() == "gpu" else "xla"
    workload, held = build(shape, stack, mesh, attention)
    row = harness.measure_training(
        workload, tokens.astype(np.int32), seed=finetune.SEED, warmup=finetune.WARMUP, repeats=finetune.REPEATS
    )
    stats = mesh.devices.flat[-1].memory_stats()
    return (
        row
        | held
        | {
            "peak_gib": stats["peak_bytes_in_use"] / harness.GIB if stats else None,
            "attention": attention,
            "shape": shape.name,
            "stack": stack,
            "mesh": sizes,
            "devices": math.prod(mesh.devices.shape),
            "batch": batch,
            "seed": finetune.SEED,
            "tokens_per_s": batch * shape.length / row["median_ms"] * 1e3,
            "flops_per_token": finetune.flops_per_token(shape),
        }
    )


if __name__ == "__main__":
    harness.main("scaling", "benchmarks.scaling", list(CASES), run_case, default="llama*")
