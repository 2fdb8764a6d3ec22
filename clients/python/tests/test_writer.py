"""The folder that is written: quantised rows, shards, going on after an interruption, and what is refused."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import unittest

from support import GOLDEN, SRC, Case, np, read_safetensors, requires_numpy, run, widen, write_safetensors

TABLE = "layers.1.feed_forward.values"


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(pathlib.Path(folder).iterdir())}


@requires_numpy
class QuantisedTest(Case):
    def _rows(self, levels, codes, scales):
        """What the form promises, row by row, in float64."""
        golden = widen(*read_safetensors(GOLDEN / "A/checkpoint")[TABLE + ".weight"])
        self.assertEqual(scales.shape, (len(golden),))
        for row, code, scale in zip(golden, codes, scales):
            self.assertEqual(scale, np.float32(np.abs(row).max()) / np.float32(levels))
            expected = np.rint(row / scale) if scale else np.zeros_like(row)
            np.testing.assert_array_equal(code, expected)
            self.assertLessEqual(np.abs(code * scale - row).max(), scale * 0.5001)

    def test_int8_rows_have_a_symmetric_scale_each(self):
        found = read_safetensors(self.convert(GOLDEN / "A/original", "--table_dtype=int8"))
        dtype, codes = found[TABLE + ".weight"]
        self.assertEqual((dtype, found[TABLE + ".scale"][0], codes.shape), ("I8", "F32", (1024, 64)))
        self._rows(127, codes.astype("f4"), found[TABLE + ".scale"][1])
        self.assertEqual(found["norm.weight"][0], "F32")

    def test_int4_rows_put_the_even_column_in_the_low_nibble(self):
        found = read_safetensors(self.convert(GOLDEN / "A/original", "--table_dtype=int4"))
        dtype, packed = found[TABLE + ".weight"]
        self.assertEqual((dtype, packed.shape), ("U8", (1024, 32)))
        codes = np.empty((1024, 64), "f4")
        codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
        self._rows(7, codes - 8, found[TABLE + ".scale"][1])

    def test_peer_tables_are_quantised_both(self):
        found = read_safetensors(self.convert(GOLDEN / "D/original", "--table_dtype=int4"))
        for name in ("values_u", "values_v"):
            self.assertEqual(found[f"layers.1.feed_forward.{name}.weight"][0], "U8")
            self.assertEqual(found[f"layers.1.feed_forward.{name}.scale"][1].shape, (18 * 18,))

    def test_prints_how_far_rows_are_off(self):
        self.convert(GOLDEN / "A/original", "--table_dtype=int4")
        found = read_safetensors(self.folder / "out")
        golden = widen(*read_safetensors(GOLDEN / "A/checkpoint")[TABLE + ".weight"]).astype("f8")
        packed = found[TABLE + ".weight"][1]
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(1024, 64).astype("f8") - 8
        lost = codes * found[TABLE + ".scale"][1][:, None] - golden
        error = self.report.errors[TABLE + ".weight"]
        self.assertAlmostEqual(error.relative_rms, (lost**2).sum() ** 0.5 / (golden**2).sum() ** 0.5, places=5)
        self.assertAlmostEqual(error.largest, np.abs(lost).max(), places=5)

    def _quantise(self, rows, kind):
        from memserve.convert import quantize

        codes, scales, _ = quantize.rows(np.asarray(rows, "f4"), "F32", kind, "test", 0)
        return codes, scales, quantize.dequantize(codes, scales, len(rows[0]))

    def test_rows_of_zeros_odd_widths_and_tiny_values(self):
        for kind in ("int8", "int4"):
            codes, scales, back = self._quantise([[0, 0, 0], [1, -2, 3], [1e-44, 0, -1e-45], [3e38, -1e38, 0]], kind)
            self.assertEqual(scales[0], 0)
            np.testing.assert_array_equal(back[0], 0)
            self.assertTrue(np.isfinite(back).all())
            np.testing.assert_allclose(back[1], [1, -2, 3], atol=3 / (14 if kind == "int4" else 254) * 1.01)
        self.assertEqual(codes.shape, (4, 2))
        self.assertEqual(int(codes[1, 1] >> 4), 8)  # the nibble that no column has

    def test_ties_go_to_the_even_code(self):
        codes, scales, _ = self._quantise([[7, 0.5, 1.5, 2.5, -0.5, -1.5]], "int4")
        self.assertEqual(scales[0], 1)
        values = np.stack([codes & 15, codes >> 4], -1).reshape(-1).astype(int) - 8
        self.assertEqual(values.tolist(), [7, 0, 2, 2, 0, -2])

    def test_refuses_rows_that_are_not_finite(self):
        source = self.folder / "source"
        shutil.copytree(GOLDEN / "B/checkpoint", source)
        tensors = dict(read_safetensors(source))
        name = "layers.2.feed_forward.values.weight"
        table = tensors[name][1].copy()
        table[321, 7] = 0x7F80
        tensors[name] = ("BF16", table)
        write_safetensors(source / "model.safetensors", tensors)
        self.fails(f"'{name}': row 321 has a value that is NaN or infinite; int8 cannot hold it", source, "--table_dtype=int8")
        self.convert(source, name="kept")
        self.assertEqual(self.report.nonfinite, {name: 1})

    def test_refuses_what_f16_cannot_hold(self):
        source = self.folder / "source"
        shutil.copytree(GOLDEN / "E/checkpoint", source)
        tensors = dict(read_safetensors(source))
        tensors["norm.weight"] = ("F32", np.full(56, 1e6, "f4"))
        write_safetensors(source / "model.safetensors", tensors)
        self.fails("'norm.weight' has values beyond the range of F16", source, "--dtype=f16")

    def test_quantised_tables_can_be_read_again(self):
        self.convert(GOLDEN / "A/original", "--table_dtype=int4", name="q")
        kept = read_safetensors(self.convert(self.folder / "q", name="kept"))
        first = read_safetensors(self.folder / "q")
        self.assertEqual({n: (d, a.tobytes()) for n, (d, a) in kept.items()}, {n: (d, a.tobytes()) for n, (d, a) in first.items()})
        wide = read_safetensors(self.convert(self.folder / "q", "--table_dtype=f32", name="wide"))
        self.assertNotIn(TABLE + ".scale", wide)
        packed, scale = first[TABLE + ".weight"][1], first[TABLE + ".scale"][1]
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(1024, 64).astype("f4") - 8
        np.testing.assert_array_equal(wide[TABLE + ".weight"][1], codes * scale[:, None])


@requires_numpy
class FolderTest(Case):
    def test_shards_hold_what_one_file_holds(self):
        one = read_safetensors(self.convert(GOLDEN / "A/original", "--table_dtype=int8", name="one"))
        out = self.convert(GOLDEN / "A/original", "--table_dtype=int8", "--max_shard_bytes=100k", name="many")
        many = read_safetensors(out)
        self.assertEqual({n: (d, a.tobytes()) for n, (d, a) in many.items()}, {n: (d, a.tobytes()) for n, (d, a) in one.items()})
        index = json.loads((out / "model.safetensors.index.json").read_text())
        self.assertEqual(set(index["weight_map"]), set(one))
        self.assertGreater(len(set(index["weight_map"].values())), 5)
        for name, shard in index["weight_map"].items():
            self.assertIn(name, read_safetensors(out / shard))
        again = read_safetensors(self.convert(out, name="again"))  # and the reader takes the index
        self.assertEqual(set(again), set(one))

    def test_tensors_are_aligned_to_their_elements(self):
        out = self.convert(GOLDEN / "B/original", "--table_dtype=int4")
        blob = (out / "model.safetensors").read_bytes()
        size = int.from_bytes(blob[:8], "little")
        self.assertEqual((8 + size) % 64, 0)
        for name, entry in json.loads(blob[8 : 8 + size]).items():
            if name != "__metadata__":
                self.assertEqual(entry["data_offsets"][0] % {"F32": 4, "BF16": 2}.get(entry["dtype"], 1), 0, name)

    def test_says_where_it_comes_from(self):
        provenance = json.loads((self.convert(GOLDEN / "F/original") / "memserve_conversion.json").read_text())
        sources = {entry["file"]: entry for entry in provenance["sources"]}
        self.assertEqual(set(sources), {"consolidated.pth", "params.json", "tokenizer.model"})
        for name, entry in sources.items():
            data = (GOLDEN / "F/original" / name).read_bytes()
            self.assertEqual((entry["bytes"], entry["sha256"]), (len(data), hashlib.sha256(data).hexdigest()))

    def test_refuses_a_folder_that_holds_something_else(self):
        (self.folder / "out").mkdir()
        (self.folder / "out/thesis.txt").write_text("precious")
        self.fails(r"out holds something else \(thesis.txt\)", GOLDEN / "E/original")
        self.assertEqual((self.folder / "out/thesis.txt").read_text(), "precious")

    def test_refuses_a_folder_with_another_conversion(self):
        self.convert(GOLDEN / "E/original")
        before = digests(self.folder / "out")
        self.convert(GOLDEN / "E/original")  # the same again is fine, and checks it
        self.fails("holds another conversion", GOLDEN / "E/original", "--dtype=bf16")
        self.fails("holds another conversion", GOLDEN / "B/original")
        self.assertEqual(digests(self.folder / "out"), before)

    def test_notices_a_finished_shard_that_changed(self):
        out = self.convert(GOLDEN / "E/original")
        blob = bytearray((out / "model.safetensors").read_bytes())
        blob[-1] ^= 1
        (out / "model.safetensors").write_bytes(blob)
        self.fails("model.safetensors is not what was written there", GOLDEN / "E/original")

    def test_refuses_its_own_source(self):
        source = self.folder / "out"
        shutil.copytree(GOLDEN / "E/checkpoint", source)
        self.fails("is the source itself", source)

    def test_refuses_two_writers_at_once(self):
        import fcntl

        (self.folder / "out").mkdir()
        with open(self.folder / "out/.memserve_convert.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.fails("another memserve-convert is writing this folder", GOLDEN / "E/original")

    def test_asks_for_the_space_before_it_writes(self):
        from unittest import mock

        with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)):
            self.fails("out needs .*KiB|MiB; 1000 B are free there", GOLDEN / "E/original")

    def test_a_fault_of_the_disk_is_noticed(self):
        from unittest import mock

        from memserve.convert import writer

        real = writer._pwrite

        def faulty(fd, data, offset, path):
            data = bytearray(data)
            if len(data) > 10_000:
                data[5000] ^= 4
            real(fd, data, offset, path)

        with mock.patch.object(writer, "_pwrite", faulty):
            self.fails("read back differ from what was written", GOLDEN / "E/original")
        self.assertFalse((self.folder / "out/config.json").exists())

    def test_a_source_that_changes_is_noticed(self):
        from unittest import mock

        from memserve.convert import writer

        source = self.folder / "source"
        shutil.copytree(GOLDEN / "E/original", source)
        real = writer.Writer._write_shard

        def meddle(writer_, shard, state):
            real(writer_, shard, state)
            with open(source / "consolidated.pth", "ab") as file:
                file.write(b"x")

        with mock.patch.object(writer.Writer, "_write_shard", meddle):
            self.fails("consolidated.pth changed while it was read", source)
        self.assertFalse((self.folder / "out/config.json").exists())


@requires_numpy
class InterruptionTest(Case):
    FLAGS = ("--max_shard_bytes=60k", "--table_dtype=int4", "--threads=2")

    def _start(self, out):
        # Slow enough that there is a middle: every row range waits a little.
        slow = ("import sys, time; from memserve.convert import cli, writer; real = writer._pwrite\n"
                "def wait(*a): time.sleep(0.005); real(*a)\n"
                "writer._pwrite = wait; sys.exit(cli.main(sys.argv[1:]))")  # fmt: skip
        return subprocess.Popen([sys.executable, "-c", slow, str(GOLDEN / "A/original"), str(out), *self.FLAGS],
                                env=dict(os.environ, PYTHONPATH=str(SRC)), stderr=subprocess.PIPE, text=True)  # fmt: skip

    def _interrupt(self, kill):
        expected = digests(self.convert(GOLDEN / "A/original", *self.FLAGS, name="whole"))
        for shards in (0, 1, 4):
            out = self.folder / f"killed{shards}"
            process = self._start(out)
            deadline = time.monotonic() + 60
            while len(list(out.glob("*.safetensors"))) < shards or not list(out.glob("model*.part")):
                self.assertLess(time.monotonic(), deadline)
                self.assertIsNone(process.poll(), "it ended before it was interrupted")
                time.sleep(0.001)
            process.send_signal(kill)
            code, errors = process.wait(), process.stderr.read()
            process.stderr.close()
            self.assertFalse((out / "config.json").exists())
            finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
            again = run(GOLDEN / "A/original", out, *self.FLAGS)
            self.assertEqual(again.returncode, 0, again.stderr)
            state = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
            # What was finished is kept, and said so; one shard may have been renamed before it was noted.
            self.assertGreaterEqual(again.stderr.count("finished before, checked"), max(0, len(finished) - 1))
            self.assertGreaterEqual(sum(state[name] == at for name, at in finished.items()), max(0, len(finished) - 1))
            self.assertEqual(digests(out), expected)
            yield code, errors

    def test_killed_in_the_middle_it_goes_on_and_writes_the_same_bytes(self):
        for code, _ in self._interrupt(signal.SIGKILL):
            self.assertEqual(code, -signal.SIGKILL)

    def test_ctrl_c_ends_it_in_one_line(self):
        for code, errors in self._interrupt(signal.SIGINT):
            self.assertEqual(code, 130)
            self.assertNotIn("Traceback", errors)
            self.assertIn("interrupted; the same command goes on from here", errors)


@requires_numpy
class CommandTest(Case):
    def test_prints_lines_and_ends_with_0(self):
        done = run(GOLDEN / "A/original", self.folder / "out", "--table_dtype=int8")
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        self.assertIn("read back and equal", done.stderr)
        self.assertRegex(done.stderr, r"layers.1.feed_forward.values.weight: rows restored with a relative RMS error of 0\.\d+ %")
        self.assertNotIn("\r", done.stderr)

    def test_errors_are_one_line_and_1(self):
        for source in (self.folder / "nothing", self.folder):
            done = run(source, self.folder / "out")
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1))
            self.assertTrue(done.stderr.startswith("memserve-convert: "), done.stderr)
        self.assertEqual(run("--dtype=f64", "a", "b").returncode, 2)

    def test_needs_no_more_memory_than_a_few_chunks(self):
        """A table of 256 MiB is converted within 150 MiB, of which numpy and Python take about 30."""
        n_keys, dim = 512, 256
        config = json.loads((GOLDEN / "B/checkpoint/config.json").read_text())
        config["productkey_args"].update(layers="0", mem_n_keys=n_keys, mem_v_dim=dim)
        config.update(n_layers=1)
        from memserve.convert import shapes

        wanted, _, _ = shapes.expected(config, "test")
        source = self.folder / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        tensors = {name: ("F32", np.ones(shape, "f4")) for name, shape in wanted.items()}
        write_safetensors(source / "model.safetensors", tensors)
        measured = subprocess.run(
            [sys.executable, "-c", "import re, sys; from memserve.convert import cli; code = cli.main(sys.argv[1:]);"
             "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)",
             str(source), str(self.folder / "out"), "--table_dtype=int4"],
            env=dict(os.environ, PYTHONPATH=str(SRC)), capture_output=True, text=True)  # fmt: skip
        self.assertEqual(measured.returncode, 0, measured.stderr)
        self.assertLess(int(measured.stdout) / 1024, 150)


if __name__ == "__main__":
    unittest.main()
