"""The original implementation's checkpoints: what is converted equals what the engine's tests read."""

import json
import shutil
import unittest

from support import GOLDEN, HERE, Case, TorchTensor, np, read_safetensors, requires_numpy, widen, write_torch

CASES = "ABDEFH"


@requires_numpy
class OriginalTest(Case):
    def test_gives_exactly_the_tensors_of_the_golden_checkpoints(self):
        for case in CASES:
            out = self.convert(GOLDEN / case / "original", name=case)
            found, golden = read_safetensors(out), read_safetensors(GOLDEN / case / "checkpoint")
            # A and D list their shared table under every memory layer; it is written once.
            for name in sorted(set(golden) - set(found)):
                self.assertIn(case, "AD")
                self.assertRegex(name, r"layers\.[24]\.feed_forward\.values(_u|_v)?\.weight")
            self.assertLessEqual(set(found), set(golden))
            for name, (dtype, array) in found.items():
                self.assertEqual((dtype, array.shape), (golden[name][0], golden[name][1].shape), f"{case} {name}")
                self.assertEqual(array.tobytes(), golden[name][1].tobytes(), f"{case} {name}")

    def test_gives_the_configuration_of_the_golden_checkpoints(self):
        for case in CASES:
            out = self.convert(GOLDEN / case / "original", name=case)
            config = json.loads((out / "config.json").read_text())
            golden = json.loads((GOLDEN / case / "checkpoint/config.json").read_text())
            tokenizer = {"A": "bytes", "B": "bytes", "D": "bytes", "E": "bytes", "F": "sentencepiece", "H": "tiktoken"}[case]
            self.assertEqual(config.pop("tokenizer"), tokenizer)
            golden.pop("tokenizer")
            self.assertEqual(config, golden)
            copied = out / "tokenizer.model"
            self.assertEqual(copied.exists(), case in "FH")
            if copied.exists():
                self.assertEqual(copied.read_bytes(), (GOLDEN / case / "original/tokenizer.model").read_bytes())

    def test_reads_distributed_checkpoints_as_the_consolidated_one(self):
        one = read_safetensors(self.convert(HERE / "data/distcp", name="distributed"))
        other = read_safetensors(self.convert(GOLDEN / "A/original", name="consolidated"))
        self.assertEqual(set(one), set(other))
        for name, (dtype, array) in one.items():
            self.assertEqual((dtype, array.tobytes()), (other[name][0], other[name][1].tobytes()), name)

    def test_finds_params_in_a_folder_called_consolidated(self):
        shutil.copytree(GOLDEN / "E/original", self.folder / "run/consolidated")
        self.assertIn("norm.weight", read_safetensors(self.convert(self.folder / "run")))
        self.convert(self.folder / "run/consolidated/consolidated.pth", name="file")

    def _edited(self, case, edit):
        source = self.folder / "source"
        shutil.copytree(GOLDEN / case / "original", source)
        params = json.loads((source / "params.json").read_text())
        edit(params)
        (source / "params.json").write_text(json.dumps(params))
        return source

    def test_looks_for_the_tokenizer_beside_params_json(self):
        source = self._edited("F", lambda p: p["data"]["tokenizer"].update(path="/checkpoints/of/somebody/tokenizer.model"))
        self.assertTrue((self.convert(source) / "tokenizer.model").exists())
        (source / "tokenizer.model").unlink()
        self.assertEqual(json.loads((self.convert(source, name="none") / "config.json").read_text())["tokenizer"], "none")
        out = self.convert(source, f"--tokenizer={GOLDEN / 'F/original/tokenizer.model'}", name="given")
        self.assertEqual(json.loads((out / "config.json").read_text())["tokenizer"], "sentencepiece")

    def test_names_what_does_not_fit_the_configuration(self):
        self.fails(r"'layers.0.attention.wk.weight' has the shape \[32, 64\]; .*params.json asks for \[16, 64\]",
                   self._edited("A", lambda p: p["model"].update(n_kv_heads=1)))  # fmt: skip

    def test_names_a_missing_tensor(self):
        self.fails("'layers.6.attention.wk.weight' is missing", self._edited("A", lambda p: p["model"].update(n_layers=7)))

    def test_names_a_tensor_too_many(self):
        self.fails("is not one that .*params.json asks for", self._edited("A", lambda p: p["model"].update(n_layers=5)))

    def _one_layer(self, edit, **memory):
        """A model of one memory layer, of random numbers, in the original form."""
        rng = np.random.default_rng(3)
        dim, heads, n_keys, k_dim = 16, 2, 5, 8
        shapes = {
            "tok_embeddings.weight": (20, dim), "norm.weight": (dim,), "output.weight": (20, dim),
            "layers.0.attention_norm.weight": (dim,), "layers.0.ffn_norm.weight": (dim,),
            "layers.0.attention.wq.weight": (dim, dim), "layers.0.attention.wk.weight": (dim, dim),
            "layers.0.attention.wv.weight": (dim, dim), "layers.0.attention.wo.weight": (dim, dim),
            "layers.0.feed_forward.keys": (2 * heads * n_keys, k_dim // 2),
            "layers.0.feed_forward.query_proj.query_mlps.0.weight": (heads * k_dim, dim),
            "layers.0.feed_forward.query_proj.query_mlps.0.bias": (heads * k_dim,),
            "layers.0.feed_forward.values.weight": (n_keys * n_keys, dim),
            "layers.0.feed_forward.gating.weight": (1, dim), "layers.0.feed_forward.gating.bias": (1,),
        }  # fmt: skip
        tensors = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
        edit(tensors, rng)
        arguments = {"is_enabled": True, "layers": "0", "mem_n_keys": n_keys, "mem_heads": heads, "mem_knn": 3, "mem_k_dim": k_dim,
                     "mem_v_dim": -1, "swilu_projection": False, "mem_gated": True, "peer_variant": False, **memory}  # fmt: skip
        params = {"model": {"dim": dim, "n_layers": 1, "n_heads": 4, "vocab_size": 20, "max_seqlen": 32, "productkey_args": arguments},
                  "data": {"tokenizer": {"name": "bytes", "path": None}}}  # fmt: skip
        source = self.folder / "made"
        source.mkdir()
        (source / "params.json").write_text(json.dumps(params))
        write_torch(source / "consolidated.pth", {"model": {name: TorchTensor(array) for name, array in tensors.items()}})
        return source, tensors

    def test_folds_batch_norm_of_the_queries(self):
        for name in ("query_norm", "query_proj.query_mlps.1"):
            prefix = f"layers.0.feed_forward.{name}."

            def edit(tensors, rng):
                for part in ("weight", "bias", "running_mean"):
                    tensors[prefix + part] = rng.standard_normal(16).astype("f4")
                tensors[prefix + "running_var"] = rng.uniform(0.1, 2, 16).astype("f4")
                tensors[prefix + "num_batches_tracked"] = np.zeros((), "i8")

            source, given = self._one_layer(edit)
            found = read_safetensors(self.convert(source, name=name))
            shutil.rmtree(source)
            x = np.random.default_rng(4).standard_normal(16)
            projection = "layers.0.feed_forward.query_proj.query_mlps.0."
            query = given[projection + "weight"].astype("f8") @ x + given[projection + "bias"]
            spread = np.sqrt(given[prefix + "running_var"].astype("f8") + 1e-5)
            expected = (query - given[prefix + "running_mean"]) / spread * given[prefix + "weight"] + given[prefix + "bias"]
            actual = found[projection + "weight"][1].astype("f8") @ x + found[projection + "bias"][1]
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
            self.assertFalse([left for left in found if "norm" in left and "feed_forward" in left])

    def test_folds_norms_of_the_keys(self):
        half = 4

        def edit(tensors, rng):
            tensors["layers.0.feed_forward.keys_norm.weight"] = rng.standard_normal(half).astype("f4")
            tensors["layers.0.feed_forward.keys_norm.bias"] = rng.standard_normal(half).astype("f4")

        source, given = self._one_layer(edit)
        found = read_safetensors(self.convert(source))
        keys = given["layers.0.feed_forward.keys"].astype("f8")
        centred = keys - keys.mean(1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        expected = normed * given["layers.0.feed_forward.keys_norm.weight"] + given["layers.0.feed_forward.keys_norm.bias"]
        np.testing.assert_allclose(found["layers.0.feed_forward.keys"][1], expected, rtol=1e-5, atol=1e-6)

    def test_keeps_norms_of_the_queries_for_the_server(self):
        for width, bias, over, kind in ((8, True, "head", "layer_norm"), (4, False, "half", "rms_norm")):

            def edit(tensors, rng):
                tensors["layers.0.feed_forward.query_norm.weight"] = rng.standard_normal(width).astype("f4")
                if bias:
                    tensors["layers.0.feed_forward.query_norm.bias"] = rng.standard_normal(width).astype("f4")

            source, given = self._one_layer(edit)
            out = self.convert(source, name=kind)
            shutil.rmtree(source)
            memory = json.loads((out / "config.json").read_text())["productkey_args"]
            self.assertEqual((memory["query_norm"], memory["query_norm_over"]), (kind, over))
            found = read_safetensors(out)
            for name in ("weight", "bias")[: 1 + bias]:
                key = f"layers.0.feed_forward.query_norm.{name}"
                np.testing.assert_array_equal(found[key][1], given[key])

    def test_refuses_copies_of_a_shared_table_that_differ(self):
        source = self.folder / "source"
        shutil.copytree(GOLDEN / "A/original", source)
        blob = bytearray((source / "consolidated.pth").read_bytes())
        table = read_safetensors(GOLDEN / "A/checkpoint")["layers.4.feed_forward.values.weight"][1].tobytes()
        at = bytes(blob).rfind(table[:4096])
        blob[at + 100] ^= 1
        (source / "consolidated.pth").write_bytes(blob)
        self.fails(
            "'layers.4.feed_forward.values.weight' differs from .*'layers.1.feed_forward.values.weight'.*mem_share_values", source
        )

    def test_reads_views_by_offset_and_stride(self):
        base = np.arange(24, dtype="f4")
        source, given = self._one_layer(lambda tensors, rng: None)
        dim = 16
        stored = {name: TorchTensor(array) for name, array in given.items()}
        square = np.random.default_rng(5).standard_normal((dim, dim)).astype("f4")
        stored["layers.0.attention.wo.weight"] = TorchTensor(square, shape=(dim, dim), stride=(1, dim))  # transposed
        stored["norm.weight"] = TorchTensor(base, key="base", offset=5, shape=(dim,), stride=(1,))
        write_torch(source / "consolidated.pth", {"model": stored})
        found = read_safetensors(self.convert(source))
        np.testing.assert_array_equal(found["layers.0.attention.wo.weight"][1], square.T)
        np.testing.assert_array_equal(found["norm.weight"][1], base[5 : 5 + dim])

    def test_changes_the_type_of_weights_to_the_nearest(self):
        golden = read_safetensors(GOLDEN / "A/checkpoint")
        found = read_safetensors(self.convert(GOLDEN / "A/original", "--dtype=bf16"))
        for name, (dtype, array) in found.items():
            self.assertEqual(dtype, "BF16")
            exact, near = widen(*golden[name]).astype("f8"), widen(dtype, array).astype("f8")
            self.assertTrue((np.abs(near - exact) <= np.abs(exact) * 2.0**-8).all(), name)
        wide = read_safetensors(self.convert(GOLDEN / "F/original", "--dtype=f32", "--table_dtype=f32", name="wide"))
        for name, (dtype, array) in wide.items():
            self.assertEqual(dtype, "F32")
            np.testing.assert_array_equal(array, widen(*read_safetensors(GOLDEN / "F/checkpoint")[name]))


if __name__ == "__main__":
    unittest.main()
