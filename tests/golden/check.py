#!/usr/bin/env python3
"""Evaluates the converted checkpoints with a second, independent implementation in float64 and compares.

  tests/golden/check.py [CASE …]        needs numpy

Shows that the conversion lost nothing. It is also the whole model on one page, for whoever wants to read it.
"""

import json
import math
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent


def read_safetensors(path):
    blob = path.read_bytes()
    header_bytes = int.from_bytes(blob[:8], "little")
    tensors = {}
    header = json.loads(blob[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        data = blob[begin:end]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, {"F32": "<f4", "I32": "<i4"}[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


class Model:
    def __init__(self, checkpoint):
        self.config = json.loads((checkpoint / "config.json").read_text())
        self.weights = {k: v.astype("f8") for k, v in read_safetensors(checkpoint / "model.safetensors").items()}
        self.memory = self.config["productkey_args"]
        listed = self.memory["layers"] if self.memory["is_enabled"] else ""
        self.memory_layers = [int(layer) for layer in listed.split(",") if layer]

    def linear(self, name, x):
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def norm(self, name, x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["norm_eps"]) * self.weights[name + ".weight"]

    def frequencies(self, head_dim):
        """Angle per position of each pair, and what cos and sin are multiplied with."""
        theta, scaling = self.config["rope_theta"], self.config.get("rope_scaling") or {}
        frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        kind = scaling.get("rope_type", "default")
        if kind == "linear":
            return frequency / scaling["factor"], 1.0
        if kind == "yarn":
            ends = [head_dim * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
                    for turns in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1))]
            begin, end = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), head_dim - 1)
            ramp = np.clip((np.arange(head_dim // 2) - begin) / max(end - begin, 0.001), 0, 1)
            return frequency * (1 - ramp) + frequency / scaling["factor"] * ramp, 0.1 * math.log(scaling["factor"]) + 1
        assert kind == "default", kind
        return frequency, 1.0

    def rotate(self, x):  # [T, heads, head_dim]
        frequency, magnitude = self.frequencies(x.shape[-1])
        angle = (np.arange(len(x))[:, None] * frequency)[:, None, :]
        cos, sin = magnitude * np.cos(angle), magnitude * np.sin(angle)
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = even * cos - odd * sin, even * sin + odd * cos
        return np.stack(pairs, -1).reshape(x.shape)

    def attention(self, name, x):
        num_tokens, n_heads = len(x), self.config["n_heads"]
        n_kv_heads = self.config["n_kv_heads"] or n_heads
        q = self.linear(name + ".wq", x).reshape(num_tokens, n_heads, -1)
        k = self.linear(name + ".wk", x).reshape(num_tokens, n_kv_heads, -1)
        if self.config.get("qk_norm"):
            q, k = self.norm(name + ".q_norm", q), self.norm(name + ".k_norm", k)
        q, k = self.rotate(q), self.rotate(k)
        v = self.linear(name + ".wv", x).reshape(num_tokens, n_kv_heads, -1)
        k, v = (np.repeat(a, n_heads // n_kv_heads, axis=1) for a in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
        scores += np.triu(np.full((num_tokens, num_tokens), -np.inf), 1)
        return self.linear(name + ".wo", np.einsum("hts,shd->thd", softmax(scores), v).reshape(num_tokens, -1))

    def query_norm(self, name, query):  # [T, mem_heads, 2, half_dim]
        kind = self.memory.get("query_norm")
        if not kind:
            return query
        x = query if self.memory.get("query_norm_over") == "half" else query.reshape(*query.shape[:2], -1)
        eps, bias = self.memory.get("query_norm_eps", 1e-5), self.weights.get(name + ".bias", 0)
        if kind == "layer_norm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.weights[name + ".weight"]
        return (x + bias if kind == "layer_norm" else x).reshape(query.shape)

    def table(self, name, layer):
        owner = self.memory_layers[0] if self.memory["mem_share_values"] else layer
        return self.weights[f"layers.{owner}.feed_forward.{name}.weight"]

    def memory_layer(self, name, layer, x):
        heads, n_keys, knn = (self.memory[key] for key in ("mem_heads", "mem_n_keys", "mem_knn"))
        num_tokens = len(x)
        query = self.linear(name + ".query_proj.query_mlps.0", x).reshape(num_tokens, heads, 2, -1)
        query = self.query_norm(name + ".query_norm", query)
        half_keys = self.weights[name + ".keys"].reshape(heads, 2, n_keys, -1)
        half_score = np.einsum("thsd,hsid->thsi", query, half_keys)
        score = (half_score[:, :, 0, :, None] + half_score[:, :, 1, None, :]).reshape(num_tokens, heads, -1)
        rows = np.argsort(-score, axis=-1, kind="stable")[..., :knn]  # [T, H, knn]
        weight = softmax(np.take_along_axis(score, rows, -1))
        if self.memory["peer_variant"]:
            u, v = self.table("values_u", layer)[rows], self.table("values_v", layer)[rows]
            out = np.einsum("thk,thkd->td", gelu(np.einsum("thkd,td->thk", u, x)) * weight, v)
        else:
            out = np.einsum("thk,thkd->td", weight, self.table("values", layer)[rows])
            if self.memory["swilu_projection"]:
                out = out * silu(self.linear(name + ".swilu_projection", x))
            if self.memory["swilu_projection"] or self.memory["mem_v_dim"] > 0:
                out = self.linear(name + ".value_proj", out)
        if self.memory["mem_gated"]:
            out = out / (1 + np.exp(-self.linear(name + ".gating", x)))
        return out, rows

    def logits(self, tokens):
        """[T, V], and per memory layer the rows it read: [T, mem_heads, mem_knn]."""
        x = self.weights["tok_embeddings.weight"][tokens]
        all_rows = {}
        for layer in range(self.config["n_layers"]):
            name = f"layers.{layer}."
            x = x + self.attention(name + "attention", self.norm(name + "attention_norm", x))
            y = self.norm(name + "ffn_norm", x)
            name += "feed_forward"
            if layer in self.memory_layers:
                out, all_rows[layer] = self.memory_layer(name, layer, y)
            else:
                out = self.linear(name + ".w2", silu(self.linear(name + ".w1", y)) * self.linear(name + ".w3", y))
            x = x + out
        return self.linear("tok_embeddings" if self.config["weight_tying"] else "output", self.norm("norm", x)), all_rows


def check(case):
    model = Model(HERE / case / "checkpoint")
    expected = json.loads((HERE / case / "expected.json").read_text())
    arrays = read_safetensors(HERE / case / "expected.safetensors")
    worst, greedy_ok, rows_ok = 0.0, True, True
    for sequence in expected["sequences"]:
        tokens, greedy = sequence["tokens"], sequence.get("greedy_tokens", [])
        logits, all_rows = model.logits(tokens + greedy)
        if f"{sequence['name']}.logits" in arrays:
            reference = arrays[f"{sequence['name']}.logits"]
            worst = max(worst, np.abs(logits[: len(reference)] - reference).max())
        for layer, rows in all_rows.items():
            reference = arrays.get(f"{sequence['name']}.layer{layer}.memory.indices")
            if reference is not None:
                rows_ok &= np.array_equal(np.sort(rows[: len(reference)], -1), np.sort(reference, -1))
        greedy_ok &= logits[len(tokens) - 1 : -1].argmax(-1).tolist() == greedy if greedy else True
    ok = worst < 1e-4 and greedy_ok and rows_ok
    print(f"{case}: {len(expected['sequences'])} sequences, largest difference of a logit {worst:.1e}, "
          f"rows {'equal' if rows_ok else 'DIFFER'}, greedy tokens {'equal' if greedy_ok else 'DIFFER'}")
    return ok


if __name__ == "__main__":
    cases = sys.argv[1:] or sorted(path.parent.parent.name for path in HERE.glob("*/checkpoint/config.json"))
    sys.exit(0 if all([check(case) for case in cases]) else 1)
