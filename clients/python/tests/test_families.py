"""sparse-memory-lm, PEER-pytorch, Hugging Face folders and GGUF. Each model is evaluated in float64 as its own implementation defines
it, from the tensors before the conversion, and again from what was written, by the model of tests/golden/check.py."""

import json
import math
import struct
import sys
import unittest

from support import (GOLDEN, Case, TorchTensor, np, read_safetensors, requires_numpy, widen, write_gguf, write_safetensors,
                     write_torch)  # fmt: skip

sys.path.insert(0, str(GOLDEN))
if np is not None:
    import check


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate_halves(x, theta):  # [T, heads, head_dim]
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q, k, v):  # [T, heads, head_dim]; fewer heads of k and v are shared
    k, v = (np.repeat(each, q.shape[1] // k.shape[1], axis=1) for each in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    scores += np.triu(np.full((len(q), len(q)), -np.inf), 1)
    return np.einsum("hts,shd->thd", softmax(scores), v).reshape(len(q), -1)


def product_keys(query, keys, knn):
    """query [T, heads, 2, half], keys [heads, 2, n, half] -> rows [T, heads, knn], scores."""
    half = np.einsum("thsd,hsnd->thsn", query, keys)
    sums = (half[:, :, 0, :, None] + half[:, :, 1, None, :]).reshape(*query.shape[:2], -1)
    rows = np.argsort(-sums, -1, kind="stable")[..., :knn]
    return rows, np.take_along_axis(sums, rows, -1)


TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


class SparseMemoryModel:
    """The family's model, small, with random numbers."""

    def __init__(self, score_scale=True, swilu=True, v_dim=-1):
        self.rng = np.random.default_rng(11)
        self.config = {"vocab_size": 32, "d_model": 24, "n_layers": 3, "n_heads": 3, "ffn_hidden": 40, "max_seq_len": 64,
                       "rope_theta": 1000.0, "norm_eps": 1e-5, "mem_layers": [0, 2], "mem_n_keys": 6, "mem_heads": 2, "mem_knn": 4,
                       "mem_k_dim": 8, "mem_v_dim": v_dim, "mem_query_norm": "batchnorm", "mem_swilu": swilu,
                       "mem_score_scale": "learned" if score_scale else "none", "mem_share_values": True}  # fmt: skip
        c, d = self.config, 24
        self.v = v_dim if v_dim > 0 else d
        w = {"tok_emb.weight": (32, d), "norm.weight": (d,)}
        for layer in range(3):
            p = f"layers.{layer}."
            w.update({p + "attn_norm.weight": (d,), p + "ffn_norm.weight": (d,), p + "attn.wqkv.weight": (3 * d, d),
                      p + "attn.wo.weight": (d, d)})  # fmt: skip
            if layer not in c["mem_layers"]:
                w.update({p + "ffn.w13.weight": (80, d), p + "ffn.w2.weight": (d, 40)})
                continue
            w.update({p + "ffn.keys": (2, 2, 6, 4), p + "ffn.query_proj.weight": (16, d), p + "ffn.query_proj.bias": (16,),
                      p + "ffn.query_norm.weight": (16,), p + "ffn.query_norm.bias": (16,), p + "ffn.query_norm.running_mean": (16,),
                      p + "ffn.query_norm.running_var": (16,)})  # fmt: skip
            if score_scale:
                w[p + "ffn.log_score_scale"] = (2,)
            if swilu:
                w.update({p + "ffn.swilu_proj.weight": (self.v, d), p + "ffn.swilu_proj.bias": (self.v,),
                          p + "ffn.value_proj.weight": (d, self.v), p + "ffn.value_proj.bias": (d,)})  # fmt: skip
        self.w = {name: (self.rng.standard_normal(shape) * 0.5).astype("f4") for name, shape in w.items()}
        for name in self.w:
            if name.endswith("running_var"):
                self.w[name] = np.abs(self.w[name]) + np.float32(0.1)
        self.table = self.rng.standard_normal((36, self.v)).astype("f4")

    def logits(self, tokens):
        w, c = {name: array.astype("f8") for name, array in self.w.items()}, self.config
        x = w["tok_emb.weight"][tokens]
        for layer in range(3):
            p = f"layers.{layer}."
            y = rms_norm(x, w[p + "attn_norm.weight"], 1e-5)
            q, k, v = (y @ w[p + "attn.wqkv.weight"].T).reshape(len(x), 3, 3, 8).transpose(1, 0, 2, 3)
            theta = c["rope_theta"]
            x = x + attend(rotate_halves(q, theta), rotate_halves(k, theta), v) @ w[p + "attn.wo.weight"].T
            y = rms_norm(x, w[p + "ffn_norm.weight"], 1e-5)
            p += "ffn."
            if layer not in c["mem_layers"]:
                a, b = np.split(y @ w[p + "w13.weight"].T, 2, -1)
                x = x + (silu(a) * b) @ w[p + "w2.weight"].T
                continue
            query = y @ w[p + "query_proj.weight"].T + w[p + "query_proj.bias"]
            spread = np.sqrt(w[p + "query_norm.running_var"] + 1e-5)
            query = (query - w[p + "query_norm.running_mean"]) / spread * w[p + "query_norm.weight"] + w[p + "query_norm.bias"]
            rows, scores = product_keys(query.reshape(len(x), 2, 2, 4), w[p + "keys"], c["mem_knn"])
            if p + "log_score_scale" in w:
                scores = scores * np.exp(w[p + "log_score_scale"])[:, None]
            out = np.einsum("thk,thkd->td", softmax(scores), self.table.astype("f8")[rows])
            if c["mem_swilu"]:
                gate = silu(y @ w[p + "swilu_proj.weight"].T + w[p + "swilu_proj.bias"])
                out = (out * gate) @ w[p + "value_proj.weight"].T + w[p + "value_proj.bias"]
            x = x + out
        return rms_norm(x, w["norm.weight"], 1e-5) @ w["tok_emb.weight"].T

    def quantise(self):
        """The family's 4 bits: d = the value of largest magnitude / -8 in float16, codes round(x / d) + 8 in 0 … 15; columns of the
        first half of a row in the low nibbles, of the second half in the high ones."""
        extreme = np.take_along_axis(self.table, np.abs(self.table).argmax(1)[:, None], 1)[:, 0]
        scales = (extreme / -8).astype("f2")
        codes = np.clip(np.rint(self.table / scales.astype("f4")[:, None]), -8, 7) + 8
        codes = codes.astype("u1")
        half = self.v // 2
        self.table = (codes.astype("f4") - 8) * scales.astype("f4")[:, None]
        return codes[:, :half] | codes[:, half:] << 4, scales

    def state(self, with_table):
        state = {name: TorchTensor(array) for name, array in self.w.items()}
        state["lm_head.weight"] = state["tok_emb.weight"]
        for layer in (0, 2):
            state[f"layers.{layer}.ffn.query_norm.num_batches_tracked"] = TorchTensor(np.zeros((), "i8"))
            if with_table:
                state[f"layers.{layer}.ffn.values.weight"] = TorchTensor(self.table, key="table")
        return {"model_config": self.config, "state_dict": state}


@requires_numpy
class SparseMemoryTest(Case):
    def _compare(self, model, out):
        (self.folder / "wide").mkdir(exist_ok=True)
        wide = self.convert(out, "--table_dtype=f32", name="wide/" + out.name)
        logits, _ = check.Model(wide).logits(TOKENS)
        np.testing.assert_allclose(logits, model.logits(TOKENS), atol=1e-4)

    def test_a_checkpoint_computes_the_same(self):
        for index, options in enumerate(({}, {"score_scale": False}, {"swilu": False}, {"v_dim": 14})):
            model = SparseMemoryModel(**options)
            write_torch(self.folder / f"model{index}.pt", model.state(True))
            self._compare(model, self.convert(self.folder / f"model{index}.pt", name=f"out{index}"))

    def _offloaded(self, model):
        source = self.folder / "source"
        source.mkdir(exist_ok=True)
        state = model.state(False)
        names = [f"layers.{layer}.ffn.values.weight" for layer in (0, 2)]
        write_torch(source / "rest.pt", {**state, "table_keys": names, "table_shape": [36, model.v]})
        return source

    def test_four_bit_files_compute_the_same(self):
        model = SparseMemoryModel()
        packed, scales = model.quantise()
        source = self._offloaded(model)
        packed.tofile(source / "values_q4.bin")
        scales.tofile(source / "scales_q4.bin")
        out = self.convert(source)
        found = read_safetensors(out)
        self.assertEqual(found["layers.0.feed_forward.values.weight"][0], "U8")
        self.assertTrue((found["layers.0.feed_forward.values.scale"][1] < 0).any())  # their scales have the extreme's sign
        self._compare(model, out)

    def test_bf16_files_compute_the_same(self):
        model = SparseMemoryModel()
        bits = (model.table.view("u4") >> 16).astype("u2")
        model.table = widen("BF16", bits)
        source = self._offloaded(model)
        bits.tofile(source / "values_bf16.bin")
        self._compare(model, self.convert(source))

    def test_names_what_is_wrong(self):
        model = SparseMemoryModel()
        packed, scales = model.quantise()
        source = self._offloaded(model)
        self.fails("neither values_q4.bin nor values_bf16.bin", source)
        packed[:-1].tofile(source / "values_q4.bin")
        scales.tofile(source / "scales_q4.bin")
        self.fails(r"values_q4.bin has 420 bytes; U8 \[36, 12\] needs 432", source)
        model.config["mem_query_norm"] = "power"
        self.fails("mem_query_norm is 'power'; known are batchnorm and none", self._offloaded(model))

    def test_takes_a_tokenizer_from_elsewhere(self):
        model = SparseMemoryModel()
        write_torch(self.folder / "model.pt", model.state(True))
        (self.folder / "gpt2.json").write_text('{"model": {"type": "BPE"}}')
        out = self.convert(self.folder / "model.pt", f"--tokenizer={self.folder / 'gpt2.json'}")
        self.assertEqual(json.loads((out / "config.json").read_text())["tokenizer"], "bpe")
        self.assertTrue((out / "tokenizer.json").exists())


class PeerModel:
    """A Llama whose layer 1 is a PEER of PEER-pytorch."""

    def __init__(self, pre_norm=False):
        rng = np.random.default_rng(12)
        d, self.heads, self.half, self.n = 16, 3, 5, 4
        self.config = {"model_type": "llama", "hidden_size": d, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "intermediate_size": 24, "rms_norm_eps": 1e-6, "rope_theta": 500.0,
                       "max_position_embeddings": 64, "vocab_size": 32, "tie_word_embeddings": False,
                       "peer_config": {"heads": 3, "num_experts": 16, "num_experts_per_head": 3, "dim_key": 5,
                                       "product_key_topk": 4, "softmax_on_scores": True, "pre_rmsnorm": pre_norm}}  # fmt: skip
        shapes = {"model.embed_tokens.weight": (32, d), "model.norm.weight": (d,), "lm_head.weight": (32, d)}
        for layer in range(2):
            p = f"model.layers.{layer}."
            shapes.update({p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,),
                           p + "self_attn.q_proj.weight": (d, d), p + "self_attn.k_proj.weight": (8, d),
                           p + "self_attn.v_proj.weight": (8, d), p + "self_attn.o_proj.weight": (d, d)})  # fmt: skip
        shapes.update({"model.layers.0.mlp.gate_proj.weight": (24, d), "model.layers.0.mlp.up_proj.weight": (24, d),
                       "model.layers.0.mlp.down_proj.weight": (d, 24), "model.layers.1.mlp.weight_down_embed.weight": (16, d),
                       "model.layers.1.mlp.weight_up_embed.weight": (16, d), "model.layers.1.mlp.to_queries.0.weight": (30, d),
                       "model.layers.1.mlp.keys": (3, 4, 2, 5)})  # fmt: skip
        self.w = {name: (rng.standard_normal(shape) * 0.5).astype("f4") for name, shape in shapes.items()}
        if pre_norm:
            self.w["model.layers.1.mlp.norm.gamma"] = (rng.standard_normal(d) * 0.5).astype("f4")
            self.w["model.layers.1.post_attention_layernorm.weight"][:] = 0.5

    def logits(self, tokens):
        w = {name: array.astype("f8") for name, array in self.w.items()}
        x = w["model.embed_tokens.weight"][tokens]
        for layer in range(2):
            p = f"model.layers.{layer}."
            y = rms_norm(x, w[p + "input_layernorm.weight"], 1e-6)
            q, k, v = ((y @ w[f"{p}self_attn.{name}_proj.weight"].T).reshape(len(x), -1, 4) for name in "qkv")
            x = x + attend(rotate_halves(q, 500.0), rotate_halves(k, 500.0), v) @ w[p + "self_attn.o_proj.weight"].T
            y = rms_norm(x, w[p + "post_attention_layernorm.weight"], 1e-6)
            if layer == 0:
                gated = silu(y @ w[p + "mlp.gate_proj.weight"].T) * (y @ w[p + "mlp.up_proj.weight"].T)
                x = x + gated @ w[p + "mlp.down_proj.weight"].T
                continue
            p += "mlp."
            if p + "norm.gamma" in w:
                y = y / np.linalg.norm(y, axis=-1, keepdims=True) * 4 * (w[p + "norm.gamma"] + 1)
            query = (y @ w[p + "to_queries.0.weight"].T).reshape(len(x), 2, self.heads, self.half).transpose(0, 2, 1, 3)
            rows, scores = product_keys(query, w[p + "keys"].transpose(0, 2, 1, 3), 3)
            down = np.einsum("td,thkd->thk", y, w[p + "weight_down_embed.weight"][rows])
            x = x + np.einsum("thk,thkd->td", gelu(down) * softmax(scores), w[p + "weight_up_embed.weight"][rows])
        return rms_norm(x, w["model.norm.weight"], 1e-6) @ w["lm_head.weight"].T


@requires_numpy
class PeerTest(Case):
    def _source(self, model, edit=None):
        source = self.folder / "source"
        source.mkdir(exist_ok=True)
        if edit:
            edit(model)
        (source / "config.json").write_text(json.dumps(model.config))
        write_torch(source / "pytorch_model.bin", {name: TorchTensor(array) for name, array in model.w.items()})
        return source

    def test_computes_the_same(self):
        for pre_norm in (False, True):
            model = PeerModel(pre_norm)
            out = self.convert(self._source(model), name=f"out{pre_norm}")
            logits, rows = check.Model(out).logits(TOKENS)
            self.assertEqual(list(rows), [1])
            np.testing.assert_allclose(logits, model.logits(TOKENS), atol=2e-4)

    def test_takes_rotary_settings_in_both_spellings(self):
        model = PeerModel()
        model.config.pop("rope_theta")
        model.config["rope_parameters"] = {"rope_theta": 700.0, "rope_type": "linear", "factor": 2.0}
        config = json.loads((self.convert(self._source(model)) / "config.json").read_text())
        self.assertEqual((config["rope_theta"], config["rope_scaling"]), (700.0, {"rope_type": "linear", "factor": 2.0}))

    def test_refuses_what_has_no_counterpart(self):
        def peer(**values):
            return lambda model: model.config["peer_config"].update(values)

        self.fails("softmax_on_scores is not true", self._source(PeerModel(), peer(softmax_on_scores=False)))
        self.fails(
            "softmax_on_scores is not true", self._source(PeerModel(), lambda m: m.config["peer_config"].pop("softmax_on_scores"))
        )
        self.fails("separate_embed_per_head is set", self._source(PeerModel(), peer(separate_embed_per_head=True)))
        self.fails("activation is 'relu'", self._source(PeerModel(), peer(activation="relu")))
        self.fails("product_key_topk is smaller than num_experts_per_head, 3", self._source(PeerModel(), peer(product_key_topk=2)))
        self.fails(r"keys' is missing or not \[5, num_keys, 2, dim_key\]", self._source(PeerModel(), peer(heads=5)))

        def uneven(model):
            model.w["model.layers.1.post_attention_layernorm.weight"][3] = 2

        self.fails("is a second norm after", self._source(PeerModel(True), uneven))


def hugging_face(model_type="llama", tied=False, bias=False, head_dim=6):
    rng = np.random.default_rng(13)
    config = {"model_type": model_type, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": head_dim, "intermediate_size": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "max_position_embeddings": 128, "vocab_size": 40, "tie_word_embeddings": tied, "torch_dtype": "float32"}  # fmt: skip
    if bias:
        config["attention_bias"] = True
    sys.path.insert(0, "")
    from memserve.convert.families import huggingface

    shapes = huggingface.expected(config, "test")
    if tied:
        shapes.pop("lm_head.weight")
    return config, {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


@requires_numpy
class HuggingFaceTest(Case):
    def _write(self, config, files):
        source = self.folder / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        for name, write in files.items():
            write(source / name)
        return source

    def test_copies_tensors_and_files(self):
        for model_type in ("llama", "mistral", "qwen2", "qwen3"):
            config, tensors = hugging_face(model_type)
            source = self._write(config, {
                "model.safetensors": lambda p: write_safetensors(p, {n: ("F32", a) for n, a in tensors.items()}),
                "tokenizer.json": lambda p: p.write_text("{}"), "chat_template.jinja": lambda p: p.write_text("{{ messages }}"),
                "generation_config.json": lambda p: p.write_text('{"eos_token_id": 2}')})  # fmt: skip
            out = self.convert(source, name=model_type)
            self.assertEqual(json.loads((out / "config.json").read_text()), config)
            found = read_safetensors(out)
            self.assertEqual(set(found), set(tensors))
            for name, (dtype, array) in found.items():
                np.testing.assert_array_equal(array, tensors[name])
            for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
                self.assertEqual((out / name).read_bytes(), (source / name).read_bytes())
            __import__("shutil").rmtree(source)

    def test_reads_bin_files_with_an_index(self):
        config, tensors = hugging_face(tied=True)
        names = sorted(tensors)
        state = {name: TorchTensor(array) for name, array in tensors.items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = TorchTensor(np.zeros(3, "f4"))
        parts = {"pytorch_model-1.bin": list(state)[: len(names) // 2], "pytorch_model-2.bin": list(state)[len(names) // 2 :]}
        index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
        source = self._write(config, {
            **{part: lambda p, held=held: write_torch(p, {name: state[name] for name in held}) for part, held in parts.items()},
            "pytorch_model.bin.index.json": lambda p: p.write_text(json.dumps(index))})  # fmt: skip
        found = read_safetensors(self.convert(source, "--dtype=f16"))
        self.assertEqual(set(found), set(tensors))  # the tied output once, no buffers
        self.assertEqual({dtype for dtype, _ in found.values()}, {"F16"})
        self.assertEqual(json.loads((self.folder / "out/config.json").read_text())["torch_dtype"], "float16")

    def test_names_what_is_not_supported(self):
        config, tensors = hugging_face()
        weights = {"model.safetensors": lambda p: write_safetensors(p, {n: ("F32", a) for n, a in tensors.items()})}
        for change, pattern in (
            ({"model_type": "gemma"}, "model_type is 'gemma'; known are llama, mistral, qwen2, qwen3"),
            ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
            ({"intermediate_size": 33}, r"'model.layers.0.mlp.gate_proj.weight' has the shape \[32, 16\]; .* asks for \[33, 16\]"),
            ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing"),
        ):
            source = self._write({**config, **change}, weights)
            self.fails(pattern, source)
            __import__("shutil").rmtree(source)


GGUF_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
              "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
              "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip


def as_llama_cpp(config, tensors):
    """Names and order of rows as llama.cpp's own converter writes them."""
    result = {}
    for name, array in tensors.items():
        outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                 "lm_head.weight": "output.weight"}  # fmt: skip
        if name in outer:
            result[outer[name]] = array
            continue
        parts = name.split(".")
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(parts[-2])
        if heads and config["model_type"] in ("llama", "mistral"):
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        result[f"blk.{parts[2]}.{GGUF_NAMES[parts[-2]]}.{parts[-1]}"] = array
    return result


def gguf_fields(config, architecture):
    a = architecture
    return {"general.architecture": a, f"{a}.embedding_length": config["hidden_size"], f"{a}.block_count": config["num_hidden_layers"],
            f"{a}.attention.head_count": config["num_attention_heads"], f"{a}.attention.head_count_kv": config["num_key_value_heads"],
            f"{a}.attention.key_length": config["head_dim"], f"{a}.attention.value_length": config["head_dim"],
            f"{a}.feed_forward_length": config["intermediate_size"], f"{a}.context_length": config["max_position_embeddings"],
            f"{a}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"], f"{a}.rope.freq_base": config["rope_theta"]}  # fmt: skip


@requires_numpy
class GgufTest(Case):
    def _file(self, config, tensors, extra=None, architecture=None, kind=0):
        path = self.folder / "model.gguf"
        fields = {**gguf_fields(config, architecture or config["model_type"]), **(extra or {})}
        write_gguf(path, fields, {name: (kind, array.shape, array.astype({0: "f4", 1: "f2"}[kind]).tobytes())
                                  for name, array in as_llama_cpp(config, tensors).items()})  # fmt: skip
        return path

    def test_gives_the_hugging_face_tensors_back(self):
        for model_type, tied, bias in (
            ("llama", False, False),
            ("llama", True, True),
            ("qwen2", True, False),
            ("qwen3", False, False),
        ):
            config, tensors = hugging_face(model_type, tied, bias)
            # llama.cpp has no bias on the output of Llama's attention; Hugging Face's attention_bias wants one
            stored = {name: array for name, array in tensors.items() if not (name.endswith("o_proj.bias"))}
            out = self.convert(self._file(config, stored), name=f"{model_type}{tied}")
            found = read_safetensors(out)
            self.assertEqual(set(found), set(tensors))
            for name, (dtype, array) in found.items():
                expected = tensors[name] if name in stored else np.zeros_like(tensors[name])
                np.testing.assert_array_equal(array, expected, name)
            written = json.loads((out / "config.json").read_text())
            self.assertEqual({key: written[key] for key in config if key != "torch_dtype"},
                             {key: value for key, value in config.items() if key != "torch_dtype"})  # fmt: skip
            self.assertIsNone(written["rope_scaling"])

    def test_a_sliding_window_makes_it_a_mistral(self):
        config, tensors = hugging_face("mistral")
        out = self.convert(self._file(config, tensors, {"llama.attention.sliding_window": 32}, "llama"))
        written = json.loads((out / "config.json").read_text())
        self.assertEqual((written["model_type"], written["sliding_window"]), ("mistral", 32))

    def test_finds_the_parameters_of_rope_scaling(self):
        config, tensors = hugging_face(head_dim=16)
        linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
        out = self.convert(self._file(config, tensors, linear), name="linear")
        self.assertEqual(json.loads((out / "config.json").read_text())["rope_scaling"], {"rope_type": "linear", "factor": 4.0})
        yarn = {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 8.0,
            "llama.rope.scaling.original_context_length": 64,
        }
        out = self.convert(self._file(config, tensors, yarn), name="yarn")
        self.assertEqual(json.loads((out / "config.json").read_text())["rope_scaling"],
                         {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64})  # fmt: skip
        # Llama 3's factors, frequency by frequency as its definition gives them.
        factors = []
        for i in range(8):
            wavelength = 2 * math.pi * 10000.0 ** (2 * i / 16)
            if wavelength < 8192 / 4:
                factors.append(1.0)
            elif wavelength > 8192 / 1:
                factors.append(32.0)
            else:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                factors.append(1 / ((1 - smooth) / 32 + smooth))
        self.assertGreater(len(set(factors)), 2)
        path = self.folder / "model.gguf"
        stored = {name: (0, array.shape, array.tobytes()) for name, array in as_llama_cpp(config, tensors).items()}
        stored["rope_freqs.weight"] = (0, (8,), np.array(factors, "f4").tobytes())
        write_gguf(path, gguf_fields(config, "llama"), stored)
        out = self.convert(path, name="llama3")
        self.assertEqual(json.loads((out / "config.json").read_text())["rope_scaling"],
                         {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192})  # fmt: skip
        stored["rope_freqs.weight"] = (0, (8,), np.arange(1, 9, dtype="f4").tobytes())
        write_gguf(path, gguf_fields(config, "llama"), stored)
        self.fails("factors that are not Llama 3's", path, name="odd")

    def test_keeps_f16_and_says_so(self):
        config, tensors = hugging_face()
        out = self.convert(self._file(config, tensors, kind=1))
        self.assertEqual({dtype for dtype, _ in read_safetensors(out).values()}, {"F16"})
        self.assertEqual(json.loads((out / "config.json").read_text())["torch_dtype"], "float16")

    def test_widens_quantised_blocks(self):
        try:
            from gguf import GGMLQuantizationType, quants
        except ImportError:
            config, tensors = hugging_face()
            stored = {"token_embd.weight": (8, (40, 32), bytes(40 * 34))}
            write_gguf(self.folder / "q.gguf", {**gguf_fields(config, "llama"), "llama.embedding_length": 32}, stored)
            self.skipTest("the gguf package is not installed")
        config, tensors = hugging_face()
        config.update(hidden_size=256, intermediate_size=256, num_attention_heads=4, head_dim=64)
        from memserve.convert.families import huggingface

        rng = np.random.default_rng(14)
        shapes = huggingface.expected(config, "test")
        tensors = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
        kinds = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
        for kind, number in kinds.items():
            stored, expected = {}, {}
            for name, array in as_llama_cpp(config, tensors).items():
                if array.ndim == 1:
                    stored[name] = (0, array.shape, array.tobytes())
                    expected[name] = array
                    continue
                quant = GGMLQuantizationType[kind]
                if kind.endswith("K"):  # the package reads these, but does not write them: any bytes will do, with sane scales
                    size = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[kind]
                    blocks = rng.integers(0, 256, (array.shape[0], array.shape[1] // 256, size), "u1")
                    scale = np.array([0.01], "<f2").view("u1")
                    for at in (208,) if kind == "Q6_K" else (0, 2):
                        blocks[..., at : at + 2] = scale
                    packed = blocks.reshape(array.shape[0], -1)
                else:
                    packed = quants.quantize(array, quant)
                stored[name] = (number, array.shape, packed.tobytes())
                expected[name] = quants.dequantize(packed, quant)
            write_gguf(self.folder / "model.gguf", gguf_fields(config, "llama"), stored)
            found = read_safetensors(self.convert(self.folder / "model.gguf", name=kind))
            back = as_llama_cpp(config, {name: array for name, (_, array) in found.items()})
            for name, array in expected.items():
                np.testing.assert_array_equal(back[name], array, f"{kind} {name}")

    def test_says_how_to_get_the_gguf_package(self):
        from unittest import mock

        config, tensors = hugging_face()
        path = self._file(config, tensors)
        stored = {name: (0, array.shape, array.tobytes()) for name, array in as_llama_cpp(config, tensors).items()}
        stored["blk.0.ffn_down.weight"] = (8, (16, 32), bytes(16 * 34))
        write_gguf(path, gguf_fields(config, "llama"), stored)
        with mock.patch.dict(sys.modules, {"gguf": None}):
            self.fails("has Q8_0 blocks; widening them needs the gguf package: pip install gguf", path)

    def _with_tokenizer(self, fields):
        config, tensors = hugging_face()
        return self.convert(self._file(config, tensors, fields), name="out" + str(len(list(self.folder.iterdir()))))

    def test_writes_byte_level_bpe_as_tokenizer_json(self):
        tokens = ["<|start|>", "<|end|>", "a", "b", "c", "Ġ", "ab", "abc", "<tool>", "[PAD9]"]
        fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
                  "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1, 4, 5], "tokenizer.ggml.merges": ["a b", "ab c"],
                  "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 8,
                  "tokenizer.chat_template": "{{ messages[0].content }}"}  # fmt: skip
        patterns = {
            "smollm": ["Digits", "ByteLevel"],
            "llama-bpe": ["Split", "ByteLevel"],
            "qwen2": ["Split", "ByteLevel"],
            "gpt-2": None,
        }
        for pre, steps in patterns.items():
            out = self._with_tokenizer({**fields, "tokenizer.ggml.pre": pre})
            document = json.loads((out / "tokenizer.json").read_text())
            self.assertEqual(document["model"]["vocab"], {token: i for i, token in enumerate(tokens[:9])})
            self.assertEqual(document["model"]["merges"], ["a b", "ab c"])
            self.assertEqual([(t["id"], t["special"]) for t in document["added_tokens"]], [(0, True), (1, True), (8, False)])
            found = document["pre_tokenizer"]
            self.assertEqual([step["type"] for step in found["pretokenizers"]] if steps else found["type"], steps or "ByteLevel")
            self.assertEqual(document["model"]["ignore_merges"], pre == "llama-bpe")
            self.assertEqual(document["post_processor"]["type"], "Sequence" if pre == "llama-bpe" else "ByteLevel")
            self.assertEqual((out / "chat_template.jinja").read_text(), "{{ messages[0].content }}")
            generation = json.loads((out / "generation_config.json").read_text())
            self.assertEqual(generation, {"bos_token_id": 0, "eos_token_id": [1, 8]})
            try:
                import tokenizers
            except ImportError:
                continue
            tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
            expected = [0] if pre == "llama-bpe" else []
            self.assertEqual(tokenizer.encode("abc ab<|end|>").ids, expected + [7, 5, 6, 1])
        config, tensors = hugging_face()
        self.fails("tokenizer.ggml.pre is 'odd'; known are", self._file(config, tensors, {**fields, "tokenizer.ggml.pre": "odd"}))

    def test_writes_sentencepiece_models(self):
        given = (GOLDEN / "F/original/tokenizer.model").read_bytes()
        pieces = proto_pieces(given)
        self.assertEqual(len(pieces), 300)
        config, tensors = hugging_face()
        config["vocab_size"] = 300
        tensors["model.embed_tokens.weight"] = np.ones((300, 16), "f4")
        tensors["lm_head.weight"] = np.ones((300, 16), "f4")
        fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
                  "tokenizer.ggml.scores": [score for _, score, _ in pieces],
                  "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
                  "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}  # fmt: skip
        out = self.convert(self._file(config, tensors, fields))
        written = (out / "tokenizer.model").read_bytes()
        self.assertEqual(proto_pieces(written), pieces)
        from memserve.convert import tokenizers as kinds

        self.assertEqual(kinds.kind_of_model(written), "sentencepiece")
        try:
            import sentencepiece
        except ImportError:
            self.skipTest("the sentencepiece package is not installed")
        ours, theirs = (sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in (written, given))
        for text in ("The keeper of the harbour", " two  spaces ", "naïve café, 東京 🙂", "a\nb\tc", "Rope 12, sail 340", ""):
            self.assertEqual(ours.encode(text), theirs.encode(text), text)
            self.assertEqual(ours.decode(ours.encode(text)), theirs.decode(theirs.encode(text)))
        self.assertEqual((ours.bos_id(), ours.eos_id(), ours.unk_id()), (1, 2, 0))


def proto_pieces(data):
    """(piece, score, type) of a SentencePiece model, by its wire form."""

    def fields(data):
        at = 0

        def varint():
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value

        while at < len(data):
            tag = varint()
            if tag & 7 == 0:
                yield tag >> 3, varint()
            elif tag & 7 == 5:
                at += 4
                yield tag >> 3, data[at - 4 : at]
            else:
                size = varint()
                at += size
                yield tag >> 3, data[at - size : at]

    pieces = []
    for field, value in fields(data):
        if field == 1:
            piece = dict(fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, 1)))
    return pieces


if __name__ == "__main__":
    unittest.main()
