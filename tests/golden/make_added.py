#!/usr/bin/env python3
"""Makes the checkpoints in tests/golden/added: random weights in the native format with what was added to it, and what check.py computes.

  tests/golden/make_added.py        needs numpy
"""

import json
import pathlib

import numpy as np

import check

HERE = pathlib.Path(__file__).parent / "added"
LENGTHS = {"short": 7, "long": 90}
KEPT, GREEDY = 20, 16

BASE = dict(model_type="memory_llama", dim=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=20, vocab_size=64, max_seqlen=128,
            norm_eps=1e-5, weight_tying=False, qk_norm=True, attention_bias=True, tokenizer="none")
MEMORY = dict(is_enabled=True, layers="1", mem_n_keys=12, mem_heads=2, mem_knn=4, mem_k_dim=12, mem_v_dim=16, mem_share_values=True,
              swilu_projection=True, mem_gated=False, peer_variant=False)
CASES = {
    "layer_norm": dict(BASE, rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 4.0},
                       productkey_args=dict(MEMORY, query_norm="layer_norm", query_norm_eps=1e-3)),
    "rms_norm": dict(BASE, rope_theta=1000.0,
                     rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0},
                     productkey_args=dict(MEMORY, query_norm="rms_norm", query_norm_over="half", mem_gated=True)),
}


def shapes(c):
    m, dim, heads, kv = c["productkey_args"], c["dim"], c["n_heads"] * c["head_dim"], c["n_kv_heads"] * c["head_dim"]
    query, half = m["mem_heads"] * m["mem_k_dim"], m["mem_k_dim"] // 2
    yield from {"tok_embeddings.weight": [c["vocab_size"], dim], "output.weight": [c["vocab_size"], dim], "norm.weight": [dim]}.items()
    for layer in range(c["n_layers"]):
        parts = {"attention_norm.weight": [dim], "ffn_norm.weight": [dim], "attention.wq.weight": [heads, dim], "attention.wq.bias": [heads],
                 "attention.wk.weight": [kv, dim], "attention.wk.bias": [kv], "attention.wv.weight": [kv, dim], "attention.wv.bias": [kv],
                 "attention.wo.weight": [dim, heads], "attention.q_norm.weight": [c["head_dim"]], "attention.k_norm.weight": [c["head_dim"]]}
        if str(layer) not in m["layers"].split(","):
            parts |= {f"feed_forward.{w}.weight": [c["ffn_dim"], dim] for w in ("w1", "w3")} | {"feed_forward.w2.weight": [dim, c["ffn_dim"]]}
        else:
            width = half if m.get("query_norm_over") == "half" else m["mem_k_dim"]
            parts |= {"feed_forward.query_proj.query_mlps.0.weight": [query, dim], "feed_forward.query_proj.query_mlps.0.bias": [query],
                      "feed_forward.query_norm.weight": [width], "feed_forward.keys": [2 * m["mem_heads"] * m["mem_n_keys"], half],
                      "feed_forward.values.weight": [m["mem_n_keys"] ** 2, m["mem_v_dim"]],
                      "feed_forward.swilu_projection.weight": [m["mem_v_dim"], dim], "feed_forward.swilu_projection.bias": [m["mem_v_dim"]],
                      "feed_forward.value_proj.weight": [dim, m["mem_v_dim"]], "feed_forward.value_proj.bias": [dim]}
            if m["query_norm"] == "layer_norm":
                parts["feed_forward.query_norm.bias"] = [width]
            if m["mem_gated"]:
                parts |= {"feed_forward.gating.weight": [1, dim], "feed_forward.gating.bias": [1]}
        for part, shape in parts.items():
            yield f"layers.{layer}.{part}", shape


def write_safetensors(path, arrays):
    header, end = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    blob = json.dumps(header).encode()
    blob += b" " * (-len(blob) % 8)
    path.write_bytes(len(blob).to_bytes(8, "little") + blob + b"".join(array.tobytes() for array in arrays.values()))


def make(case, config):
    random = np.random.default_rng(sorted(CASES).index(case))
    folder = HERE / case
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, shape in shapes(config):
        mean = 1 if name.endswith("norm.weight") else 0
        weights[name] = random.normal(mean, 0.3, shape).astype("<f4")
    (folder / "checkpoint/config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_safetensors(folder / "checkpoint/model.safetensors", weights)
    model, arrays, sequences = check.Model(folder / "checkpoint"), {}, []
    for name, length in LENGTHS.items():
        tokens = random.integers(0, config["vocab_size"], length).tolist()
        arrays[f"{name}.logits"] = model.logits(tokens)[0][-KEPT:].astype("<f4")
        grown = list(tokens)
        for _ in range(GREEDY):
            grown.append(int(model.logits(grown)[0][-1].argmax()))
        sequences.append({"name": name, "tokens": tokens, "greedy_tokens": grown[length:]})
    write_safetensors(folder / "expected.safetensors", arrays)
    (folder / "expected.json").write_text(json.dumps({"sequences": sequences}) + "\n")
    print(f"{case}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1024:.0f} KiB")


if __name__ == "__main__":
    for case, config in CASES.items():
        make(case, config)
