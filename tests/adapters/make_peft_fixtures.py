"""Makes the adapters of ``tests/adapters/peft`` with peft, and checks with peft what memjax wrote.

Not run by the tests: it needs torch, transformers and peft, which memjax does not. Run from the repository root:

- ``python tests/adapters/make_peft_fixtures.py`` writes the fixtures: per adapter what ``save_pretrained`` writes and
  ``reference.safetensors`` with the logits that peft computes in float32 for the tokens in ``tokens.safetensors``.
- ``python -m tests.adapters.write_for_peft DIR`` (in memjax's environment) writes adapters and logits to ``DIR``, and
  ``python tests/adapters/make_peft_fixtures.py --check DIR`` loads them with peft and compares. The output of the last
  check is kept in ``tests/adapters/peft/written_by_memjax.txt``.
"""

import argparse
import pathlib
import shutil
import sys

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
BASE = HERE.parent / "models" / "checkpoints" / "llama_bytes"
OUT = HERE / "peft"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "lora_patterns": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=ALL,
        rank_pattern={"o_proj": 2, "layers.1.self_attn.q_proj": 7, r"layers\.[02]\.mlp\.up_proj": 3},
        alpha_pattern={"k_proj": 5, r".*\.2\.mlp\.down_proj": 1, "layers.0.self_attn.q_proj": 20},
    ),
    "lora_some_layers": peft.LoraConfig(
        r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], layers_pattern="layers"
    ),
    "lora_embedding": peft.LoraConfig(r=3, lora_alpha=4, target_modules=["embed_tokens", "lm_head", "v_proj"]),
    "rslora": peft.LoraConfig(
        r=4, lora_alpha=3, target_modules="all-linear", use_rslora=True, rank_pattern={"up_proj": 2}
    ),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL, use_dora=True, rank_pattern={"v_proj": 2}),
    "vera": peft.VeraConfig(r=6, target_modules=ALL, save_projection=True, projection_prng_key=7, d_initial=0.3),
    "vera_key": peft.VeraConfig(r=6, target_modules=ATTENTION[:3], save_projection=False, projection_prng_key=11),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}  # fmt: skip


def base_model() -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        BASE, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens.long(), use_cache=False).logits.float()


def make() -> None:
    OUT.mkdir(exist_ok=True)
    for folder in OUT.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    torch.manual_seed(0)
    tokens = torch.randint(0, 264, (2, 8), dtype=torch.int32)
    save_file({"tokens": tokens}, OUT / "tokens.safetensors")
    plain = logits(base_model(), tokens)
    for i, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(i)
        config.task_type = "CAUSAL_LM"
        model = peft.get_peft_model(base_model(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # zero, one, or the column norms of the weight before
                    parameter.add_(0.25 * torch.randn_like(parameter))
        model.eval().save_pretrained(OUT / name, save_embedding_layers=False)
        (OUT / name / "README.md").unlink(missing_ok=True)
        settings = OUT / name / "adapter_config.json"
        settings.write_text(settings.read_text().replace(str(BASE), BASE.name) + "\n")
        values = logits(model, tokens)
        moved = (values - plain).abs().max().item()
        assert moved > 0.1, (name, moved)
        save_file({"logits": values}, OUT / name / "reference.safetensors")
        print(f"{name}: moves logits by {moved:.2f}", sorted(file.name for file in (OUT / name).iterdir()))
    size = sum(file.stat().st_size for file in OUT.rglob("*") if file.is_file())
    print("bytes in all:", size)
    assert size < 2_000_000


def check(folder: pathlib.Path) -> None:
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    tokens = load_file(OUT / "tokens.safetensors")["tokens"]
    plain, worst = logits(base_model(), tokens), 0.0
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (part / "adapter_config.json").is_file():
            model = peft.PeftModel.from_pretrained(base_model(), part)
            kind = model.peft_config["default"].peft_type.value
            loaded = peft.load_peft_weights(str(part), device="cpu")
            result = peft.set_peft_model_state_dict(model, loaded)
            assert not result.unexpected_keys, result.unexpected_keys
            held = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
            assert held == set(loaded), held ^ set(loaded)
        else:
            model, kind = transformers.AutoModelForCausalLM.from_pretrained(part, dtype="auto"), "merged model"
            kind = f"{kind}, {str(model.dtype).removeprefix('torch.')}"
            assert transformers.AutoTokenizer.from_pretrained(part)("In the beginning").input_ids
            model = model.float()
        values = logits(model.eval(), tokens)
        written = load_file(folder / f"{part.name}.safetensors")["logits"]
        off, moved = (values - written).abs().max().item(), (values - plain).abs().max().item()
        print(f"{part.name} ({kind}): logits differ by {off:.2e}, moved by {moved:.2f} from the base model's")
        worst = max(worst, off)
        assert moved > 0.05
    print(f"largest difference: {worst:.2e}")
    if not worst < 1e-4:
        sys.exit("FAILED: expected less than 1e-4")
    print("all agree within 1e-4")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", metavar="DIR", type=pathlib.Path)
    arguments = parser.parse_args()
    check(arguments.check) if arguments.check else make()
