"""Random damage to every form of source: an error in one line, or a conversion; never a traceback, and never without an end."""

import json
import os
import pathlib
import random
import shutil
import time
import unittest
from unittest import mock

from support import GOLDEN, HERE, Case, TorchTensor, requires_numpy, write_gguf, write_torch
from test_families import (PeerModel, SparseMemoryModel, as_llama_cpp, gguf_fields, hugging_face)  # fmt: skip

ROUNDS = int(os.environ.get("MEMSERVE_MUTATIONS", "60"))  # of each form


@requires_numpy
class MutationTest(Case):
    def setUp(self):
        super().setUp()
        patch = mock.patch("os.fsync")  # thousands of folders that nobody will miss
        patch.start()
        self.addCleanup(patch.stop)

    def _damage(self, source, seed):
        """A copy of `source` (a file or a folder) with something broken in one of its files. Returns the copy and what was done."""
        chance = random.Random(seed)
        copy = self.folder / f"source{seed}"
        if source.is_dir():
            shutil.copytree(source, copy)
            target = chance.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        else:
            copy.mkdir()
            copy = target = pathlib.Path(shutil.copyfile(source, copy / source.name))
        blob = bytearray(target.read_bytes())
        way = chance.choice(("flip", "flip", "flip", "head", "tail", "cut", "insert", "zeros", "swap"))
        if not blob:
            way = "insert"
        place = lambda: chance.randrange(len(blob))  # noqa: E731
        if way == "flip":
            for _ in range(chance.choice((1, 3, 50))):
                blob[place()] ^= 1 << chance.randrange(8)
        elif way == "head":  # where headers are
            for _ in range(3):
                blob[chance.randrange(min(len(blob), 2000))] = chance.randrange(256)
        elif way == "tail":  # where a zip's directory is
            for _ in range(3):
                blob[-1 - chance.randrange(min(len(blob), 2000))] = chance.randrange(256)
        elif way == "cut":
            del blob[place() :]
        elif way == "insert":
            at = chance.randrange(len(blob) + 1)
            blob[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 20)))
        elif way == "zeros":
            at = place()
            end = min(len(blob), at + chance.randrange(1, 64))
            blob[at:end] = bytes(end - at)
        else:
            one, other = place(), place()
            blob[one : one + 8], blob[other : other + 8] = blob[other : other + 8], blob[one : one + 8]
        target.write_bytes(blob)
        return copy, f"{way} in {target.name}, seed {seed}"

    def _survives(self, source, *flags):
        from memserve.convert import ConvertError

        began, refused = time.monotonic(), 0
        for seed in range(ROUNDS):
            copy, what = self._damage(source, seed)
            out = f"out{seed}"
            try:
                self.convert(copy, "--threads=1", *flags, name=out)
            except ConvertError as error:
                refused += 1
                self.assertNotIn("\n", str(error), what)
                self.assertLess(len(str(error)), 1100, what)
                self.assertFalse((self.folder / out / "config.json").exists(), what)
            except Exception as error:
                raise AssertionError(f"{what}: {error!r}") from error
            shutil.rmtree(copy.parent if copy.is_file() else copy)
            shutil.rmtree(self.folder / out, True)
        self.assertGreater(refused, 0)  # the damage does reach what matters
        self.assertLess(time.monotonic() - began, 5 + ROUNDS)

    def test_original(self):
        self._survives(GOLDEN / "F/original")

    def test_distributed(self):
        self._survives(HERE / "data/distcp")

    def test_the_pickles_themselves(self):
        """Damage inside data.pkl and .metadata only, where the machine reads them."""
        from memserve.convert import ConvertError
        from memserve.convert.readers import pickle_data

        metadata = (HERE / "data/distcp/.metadata").read_bytes()
        chance = random.Random(5)
        for _ in range(10 * ROUNDS):
            blob = bytearray(metadata[: chance.choice((len(metadata), 3000))])
            for _ in range(chance.choice((1, 2, 10))):
                blob[chance.randrange(len(blob))] = chance.randrange(256)
            try:
                pickle_data.load(bytes(blob), "test")
            except ConvertError:
                pass

    def test_safetensors(self):
        self._survives(GOLDEN / "B/checkpoint", "--table_dtype=int4")

    def test_hugging_face_bin(self):
        config, tensors = hugging_face()
        source = self.folder / "bin"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        write_torch(source / "pytorch_model.bin", {name: TorchTensor(array) for name, array in tensors.items()})
        self._survives(source)

    def test_gguf(self):
        config, tensors = hugging_face()
        tokens = ["<unk>", "<s>", "</s>"] + [chr(97 + i) for i in range(20)]
        for kind, extra in (("gpt2", {"tokenizer.ggml.merges": ["a b"]}), ("llama", {"tokenizer.ggml.scores": [0.5] * 23})):
            fields = {**gguf_fields(config, "llama"), "tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens,
                      "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 20, "tokenizer.ggml.bos_token_id": 1, **extra}  # fmt: skip
            stored = {name: (0, array.shape, array.tobytes()) for name, array in as_llama_cpp(config, tensors).items()}
            write_gguf(self.folder / "model.gguf", fields, stored)
            self._survives(self.folder / "model.gguf")

    def test_sparse_memory_lm(self):
        model = SparseMemoryModel()
        packed, scales = model.quantise()
        source = self.folder / "sparse"
        source.mkdir()
        names = [f"layers.{layer}.ffn.values.weight" for layer in (0, 2)]
        write_torch(source / "rest.pt", {**model.state(False), "table_keys": names, "table_shape": [36, 24]})
        packed.tofile(source / "values_q4.bin")
        scales.tofile(source / "scales_q4.bin")
        self._survives(source)

    def test_peer(self):
        model = PeerModel()
        source = self.folder / "peer"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(model.config))
        write_torch(source / "pytorch_model.bin", {name: TorchTensor(array) for name, array in model.w.items()})
        self._survives(source)


if __name__ == "__main__":
    unittest.main()
