"""Converted checkpoints behind the server: 64 greedy tokens through gRPC are those of the original implementation.

MEMSERVE and MEMSERVE_CLIENT name the programs; without them build/server/memserve and build/clients/memserve-client are taken, and
the tests are skipped where those are not built."""

import json
import os
import pathlib
import subprocess
import time
import unittest

from support import GOLDEN, ROOT, Case, TorchTensor, requires_numpy, write_torch
from test_families import TOKENS, PeerModel, SparseMemoryModel

SERVER = pathlib.Path(os.environ.get("MEMSERVE", ROOT / "build/server/memserve"))
CLIENT = pathlib.Path(os.environ.get("MEMSERVE_CLIENT", ROOT / "build/clients/memserve-client"))


@requires_numpy
@unittest.skipUnless(SERVER.exists() and CLIENT.exists(), "the server and the client are not built")
class EndToEndTest(Case):
    def _serve(self, checkpoint):
        port = self.folder / f"{checkpoint.name}.port"
        log = open(self.folder / f"{checkpoint.name}.log", "w+")
        self.addCleanup(log.close)
        server = subprocess.Popen([SERVER, f"--checkpoint={checkpoint}", "--grpc_address=127.0.0.1:0", f"--port_file={port}",
                                   "--weight_dtype=f32", "--threads=1"], stdout=log, stderr=log)  # fmt: skip
        self.addCleanup(lambda: (server.terminate(), server.wait(30)))
        deadline = time.monotonic() + 60
        while not (port.exists() and port.read_text().strip()):
            if server.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                self.fail(f"the server did not start:\n{log.read()}")
            time.sleep(0.02)
        return f"127.0.0.1:{port.read_text().strip()}"

    def _greedy(self, address, tokens):
        done = subprocess.run([CLIENT, f"--address={address}", "complete", "--token_ids", ",".join(map(str, tokens)), "--json",
                               "--max_tokens=64", "--temperature=0", "--ignore_eos=on", "--timeout_seconds=60"],
                              capture_output=True, text=True)  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr)
        ids = []

        def collect(node):
            if isinstance(node, dict):
                for key, value in node.items():
                    if key in ("token_ids", "tokenIds"):
                        ids.extend(int(token) for token in value)
                    elif key not in ("prompt", "prompt_token_ids"):
                        collect(value)
            elif isinstance(node, list):
                for value in node:
                    collect(value)

        for line in done.stdout.splitlines():
            collect(json.loads(line))
        return ids

    def _check(self, case, *flags):
        checkpoint = self.convert(GOLDEN / case / "original", *flags, name=case)
        address = self._serve(checkpoint)
        compared = 0
        for sequence in json.loads((GOLDEN / case / "expected.json").read_text())["sequences"]:
            if sequence.get("greedy_tokens"):
                self.assertEqual(self._greedy(address, sequence["tokens"]), sequence["greedy_tokens"], f"{case} {sequence['name']}")
                compared += 1
        self.assertGreaterEqual(compared, 3)

    def test_greedy_tokens_equal_those_of_the_original_implementation(self):
        for case in "ABDEFH":
            self._check(case)

    def _follows(self, model, checkpoint):
        """The server's greedy tokens against those of the family's own arithmetic in float64."""
        tokens = list(TOKENS)
        for _ in range(24):
            tokens.append(int(model.logits(tokens)[-1].argmax()))
        self.assertEqual(self._greedy(self._serve(checkpoint), TOKENS)[:24], tokens[len(TOKENS) :])

    def test_sparse_memory_lm_with_four_bit_rows(self):
        model = SparseMemoryModel()
        packed, scales = model.quantise()
        source = self.folder / "source"
        source.mkdir()
        names = [f"layers.{layer}.ffn.values.weight" for layer in (0, 2)]
        write_torch(source / "rest.pt", {**model.state(False), "table_keys": names, "table_shape": [36, 24]})
        packed.tofile(source / "values_q4.bin")
        scales.tofile(source / "scales_q4.bin")
        self._follows(model, self.convert(source))

    def test_peer_layers_in_a_llama(self):
        model = PeerModel()
        for side in ("up", "down"):  # so that the experts decide what comes next
            model.w[f"model.layers.1.mlp.weight_{side}_embed.weight"] *= 4
        source = self.folder / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(model.config))
        write_torch(source / "pytorch_model.bin", {name: TorchTensor(array) for name, array in model.w.items()})
        self._follows(model, self.convert(source))

    def test_shards_serve_as_one_file_does(self):
        self._check("A", "--max_shard_bytes=200k")


if __name__ == "__main__":
    unittest.main()
