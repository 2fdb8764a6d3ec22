#!/usr/bin/env python3
"""Makes the tiny Hugging Face folders in tests/golden/hf and what transformers computes for them.

  tests/golden/make_hf.py [CASE …]        needs torch, transformers and safetensors

Random weights; float32 on a CPU, eager attention. Each case is CASE/checkpoint (config.json as transformers writes it, or as older
versions did, and safetensors), CASE/expected.json and CASE/expected.safetensors. The sequences are longer than the context that
the scaled cases give as their original one, and than the sliding windows. Logits are those of the last KEPT positions.
"""

import json
import pathlib
import shutil
import sys

import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent / "hf"
LENGTHS = {"short": 9, "long": 150}
KEPT = 30  # last positions whose logits are kept
GREEDY = 64

BASE = dict(vocab_size=96, hidden_size=36, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
            max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=None, initializer_range=0.2)

# The rotary settings as config.json spells them: rope_scaling in folders of transformers 4, rope_parameters in those of 5.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0}

CASES = {
    "llama": dict(type="llama", dtype=torch.float32),
    "llama_linear": dict(type="llama", old_rope={"type": "linear", "factor": 4.0}, config=dict(rope_theta=500.0, head_dim=12)),
    "llama_llama3": dict(type="llama", old_rope=LLAMA3, config=dict(rope_theta=500.0, tie_word_embeddings=True, head_dim=12), shards="20KB"),
    "llama_yarn": dict(type="llama", config=dict(rope_parameters=dict(YARN, rope_theta=1000.0), head_dim=16)),
    "llama_bias_f16": dict(type="llama", config=dict(attention_bias=True, mlp_bias=True), dtype=torch.float16),
    "mistral": dict(type="mistral", config=dict(sliding_window=24, num_key_value_heads=3)),
    "qwen2": dict(type="qwen2", config=dict(use_sliding_window=True, sliding_window=20, max_window_layers=2, num_hidden_layers=4, num_attention_heads=4, hidden_size=32)),
    "qwen3": dict(type="qwen3", config=dict(head_dim=20, attention_bias=True, use_sliding_window=True, sliding_window=17,
                                            layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "qwen3_yarn": dict(type="qwen3", config=dict(head_dim=16, tie_word_embeddings=True, rope_parameters={
        "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3,
        "truncate": False})),
}


def randomise(model):
    """Biases and norms as a trained model would have them: neither zero nor one."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)


def make(case, spec):
    folder = HERE / case
    shutil.rmtree(folder, ignore_errors=True)
    settings = {**BASE, **spec.get("config", {})}
    if "old_rope" in spec:
        settings["rope_parameters"] = {**spec["old_rope"], "rope_theta": settings.pop("rope_theta")}
        settings["rope_parameters"].setdefault("rope_type", settings["rope_parameters"].get("type"))
    config = transformers.AutoConfig.for_model(spec["type"], **settings)
    config._attn_implementation = "eager"
    torch.manual_seed(sorted(CASES).index(case) + 1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.to(spec.get("dtype", torch.bfloat16)).save_pretrained(folder / "checkpoint", **({"max_shard_size": spec["shards"]} if "shards" in spec else {}))
    (folder / "checkpoint/generation_config.json").unlink(missing_ok=True)
    if "old_rope" in spec:
        path = folder / "checkpoint/config.json"
        written = json.loads(path.read_text())
        written["rope_theta"] = written.pop("rope_parameters")["rope_theta"]
        written["rope_scaling"] = spec["old_rope"]
        written["torch_dtype"] = written.pop("dtype")
        path.write_text(json.dumps(written, indent=2) + "\n")

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    arrays, sequences = {}, []
    for name, length in LENGTHS.items():
        tokens = torch.randint(3, settings["vocab_size"], (1, length), generator=generator)
        with torch.no_grad():
            arrays[f"{name}.logits"] = model(tokens, use_cache=False).logits[0, -KEPT:].contiguous()
            grown = tokens
            for _ in range(GREEDY):
                grown = torch.cat([grown, model(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        sequences.append({"name": name, "tokens": tokens[0].tolist(), "greedy_tokens": grown[0, length:].tolist()})
    save_file(arrays, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps({"transformers": transformers.__version__, "sequences": sequences}) + "\n")
    print(f"{case}: {sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) / 1024:.0f} KiB")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case, CASES[case])
