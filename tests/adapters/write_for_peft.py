"""Writes adapters as peft's folders, with the logits that memjax computes, for ``make_peft_fixtures.py --check``.

Run from the repository root: ``python -m tests.adapters.write_for_peft DIR``.
"""

import pathlib
import sys

import jax
from safetensors.numpy import save_file

import memjax as mj
from memjax.recipes.convert import merge_model
from tests.adapters.peft_fixtures import FOLDER, base, load, logits, reference
from tests.models.checkpoints import FOLDER as CHECKPOINTS

ALL = "layers/**/{q,k,v,o,gate,up,down}_proj/kernel"
ADAPTERS = {
    "lora": mj.adapters.lora(rank=4, alpha=6, targets="layers/**/{q,v}_proj/kernel"),
    "lora_tables": mj.adapters.lora(
        rank={"**/q_proj/kernel": 7, "**": 3}, alpha={"**/down_proj/kernel": 1.5, "**": 5}, targets=ALL
    ),
    "lora_embedding": mj.adapters.lora(rank=3, alpha=2, targets=["embed_tokens/embedding", "lm_head/kernel"]),
    "dora": mj.adapters.dora(rank={"**/v_proj/kernel": 2, "**": 4}, alpha=6, targets=ALL),
    "vera": mj.adapters.vera(rank=6, targets=ALL, seed=3),
    "ia3": mj.adapters.ia3(targets=["**/{k,v,down}_proj/kernel"]),
    "pissa_as_lora": mj.adapters.pissa(rank=3, alpha=4, targets=ALL),
    "olora_as_lora": mj.adapters.olora(rank=3, alpha=4, targets="**/q_proj/kernel"),
    "lora_fa_as_lora": mj.adapters.lora_fa(rank=3, alpha=4, targets=ALL),
    "rslora": mj.adapters.lora(rank={"**/up_proj/kernel": 2, "**": 4}, alpha=3, targets=ALL, scaling="rslora"),
}


def main(folder: pathlib.Path) -> None:
    model = base()
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, adapter, frozen, theta) -> None:
        mj.models.save_peft(folder / name, model, adapter, theta, frozen)
        values = logits(model, adapter.attach(frozen, theta))
        save_file({"logits": jax.device_get(values)}, folder / f"{name}.safetensors")

    for i, (name, adapter) in enumerate(ADAPTERS.items()):
        frozen, theta = adapter.prepare(jax.random.key(i), model.params)
        leaves, tree = jax.tree.flatten(theta)
        keys = jax.random.split(jax.random.key(100 + i), len(leaves))
        moved = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
        write(name, adapter, frozen, jax.tree.unflatten(tree, moved))
    for name in sorted(path.name for path in FOLDER.iterdir() if path.is_dir()):
        write(f"read_{name}", *load(name))
        assert abs(logits(model, load(name)[0].attach(*load(name)[1:])) - reference(name)).max() < 1e-4
    for dtype in ("float32", "bfloat16"):
        name = f"merged_{dtype}"
        merge_model(str(CHECKPOINTS / "llama_bytes"), FOLDER / "lora_patterns", folder / name, dtype=dtype)
        values = logits(model, mj.models.load(folder / name, dtype="float32").params)
        save_file({"logits": jax.device_get(values)}, folder / f"{name}.safetensors")
    print(f"wrote {folder}; now: python tests/adapters/make_peft_fixtures.py --check {folder}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
