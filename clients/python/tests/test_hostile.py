"""Files from outside that lie, and what is said about them: one line, and nothing is run."""

import json
import os
import pickle
import pickletools
import shutil
import struct
import unittest
import zipfile

from support import (GOLDEN, HERE, HOSTILE, Call, Case, Global, TorchTensor, np, requires_numpy, write_gguf, write_safetensors,
                     write_torch)  # fmt: skip

PARAMS = {"model": {"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 4, "max_seqlen": 8}}


class Hostile:
    """What a checkpoint with a bad intent would do."""

    def __reduce__(self):
        return os.system, ("touch memserve-convert-was-hacked",)


@requires_numpy
class HostilePickleTest(Case):
    def setUp(self):
        super().setUp()
        self.before = os.getcwd()
        os.chdir(self.folder)
        self.addCleanup(os.chdir, self.before)
        self.source = self.folder / "source"
        self.source.mkdir()
        (self.source / "params.json").write_text(json.dumps(PARAMS))

    def _refused(self, data, pattern):
        write_torch(self.source / "consolidated.pth", None, pickled=data)
        self.fails(pattern, self.source)
        self.assertFalse(os.path.exists("memserve-convert-was-hacked"))

    def test_the_pickle_is_hostile_indeed(self):
        pickle.loads(HOSTILE)
        self.assertTrue(os.path.exists("memserve-convert-was-hacked"))

    def test_runs_nothing_of_a_pth(self):
        self._refused(HOSTILE, "data.pkl: it names posix.system")

    def test_runs_nothing_in_any_protocol(self):
        for protocol in (2, 3, 4, 5):
            self._refused(pickle.dumps({"model": Hostile()}, protocol), "it names posix.system")

    def test_runs_nothing_behind_a_state_or_a_new(self):
        call = "X\x04\x00\x00\x00true".encode("latin-1")
        self._refused(b"\x80\x02cbuiltins\neval\n" + call + b"\x85R.", "it names builtins.eval")
        self._refused(b"\x80\x02cbuiltins\ngetattr\n" + call + b"\x85\x81.", "it names builtins.getattr")
        self._refused(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "sets the state of a plain value")
        self._refused(b"\x80\x02(cos\nsystem\n" + call + b"o.", "it names os.system")  # OBJ
        self._refused(b"\x80\x02(" + call + b"ios\nsystem\n.", "which no description of tensors needs")  # INST

    def test_runs_nothing_through_a_listed_function(self):
        hidden = Call(Global("torch._tensor", "_rebuild_from_type_v2"), Global("collections", "OrderedDict"), None, (), None)
        write_torch(self.source / "consolidated.pth", {"model": hidden})
        self.fails("a tensor is made in an unknown way", self.source)

    def test_runs_nothing_of_distributed_metadata(self):
        os.remove(self.source / "params.json")
        shutil.rmtree(self.source)
        shutil.copytree(HERE / "data/distcp", self.source)
        (self.source / ".metadata").write_bytes(HOSTILE)
        self.fails("metadata: it names posix.system", self.source)
        self.assertFalse(os.path.exists("memserve-convert-was-hacked"))

    def test_runs_nothing_of_a_distributed_chunk(self):
        shutil.rmtree(self.source)
        shutil.copytree(HERE / "data/distcp", self.source)
        for path in self.source.glob("*.distcp"):
            blob = path.read_bytes()
            found = blob.count(b"ctorch._utils\n_rebuild_tensor_v2\n")
            self.assertGreater(found, 0)
            path.write_bytes(blob.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cposix\nsystem\n" + b"N" * 19))
        self.fails("it names posix.system", self.source)
        self.assertFalse(os.path.exists("memserve-convert-was-hacked"))

    def test_runs_nothing_of_a_bin_or_a_pt(self):
        for name, other in (("pytorch_model.bin", {"config.json": '{"model_type": "llama", "hidden_size": 8, "vocab_size": 4, '
                             '"num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}'}), ("rest.pt", {})):  # fmt: skip
            shutil.rmtree(self.source)
            self.source.mkdir()
            for file, text in other.items():
                (self.source / file).write_text(text)
            write_torch(self.source / name, None, pickled=HOSTILE)
            self.fails("data.pkl: it names posix.system", self.source)
            self.assertFalse(os.path.exists("memserve-convert-was-hacked"))

    def test_is_bounded(self):
        self._refused(b"\x80\x02\x8b\xff\xff\xff\x7f" + b"x" * 100, "an integer of 2147483647 bytes")
        self._refused(b"\x80\x02]r\xff\xff\xff\xffj\xff\xff\xff\xfe.", "refers to a value")  # a memo that would be 32 GiB
        self._refused(b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "in the middle of a value")
        deep = b"\x80\x02)" + b"\x85" * 200_000  # a tuple that cannot be hashed without recursion
        self._refused(deep + b".", "'model' is not a dictionary")
        self._refused(b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", "a key that is not a plain value")

    def test_refuses_what_is_no_pickle(self):
        for data in (
            b"",
            b".",
            b"\x80\x09N.",
            b"\x80\x02(((",
            b"\x80\x02R.",
            b"\x80\x02a.",
            b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
            b"I1",
        ):
            self._refused(data, "data.pkl")

    def test_reads_what_pickletools_can_read(self):
        """The machine agrees with Python's own unpickler on plain values, in all protocols."""
        from memserve.convert.readers import pickle_data

        values = [None, True, False, 0, -1, 255, 65535, 1 << 31, -(1 << 40), 1 << 200, 1.5, "text", "é" * 300, b"bytes" * 80, [], [1, [2]],
                  (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": {"b": (1, 2)}}, {1, 2}, frozenset((3,)), [("x", 1)] * 3]  # fmt: skip
        for protocol in (2, 3, 4, 5):
            for value in values:
                if isinstance(value, bytes) and protocol == 2:
                    continue  # through _codecs.encode
                data = pickle.dumps(value, protocol)
                self.assertEqual(pickle_data.load(data, "test"), value, pickletools.dis)


@requires_numpy
class HostileArchiveTest(Case):
    def setUp(self):
        super().setUp()
        self.source = self.folder / "source"
        shutil.copytree(GOLDEN / "B/original", self.source)
        self.path = self.source / "consolidated.pth"

    def test_names_the_old_form(self):
        self.path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
        self.fails("consolidated.pth: is in torch's form from before 1.6", self.source)

    def test_refuses_compressed_entries(self):
        write_torch(self.path, {"model": {"norm.weight": TorchTensor(np.zeros(1 << 20, "f4"))}}, compression=zipfile.ZIP_DEFLATED)
        self.fails("is compressed; torch.save does not do that", self.source)

    def test_names_a_cut_off_archive(self):
        self.path.write_bytes(self.path.read_bytes()[:-1000])
        self.fails("without its directory; it is probably cut off", self.source)

    def _edit_directory(self, name, edit):
        """edit(bytearray, place of the entry's record)."""
        blob = bytearray(self.path.read_bytes())
        at = blob.rfind(b"PK\x01\x02", 0, blob.rfind(name))
        edit(blob, at)
        self.path.write_bytes(blob)

    def test_refuses_overlapping_entries(self):
        write_torch(self.path, {"model": {f"t{i}": TorchTensor(np.zeros(64, "f4")) for i in range(3)}})
        blob = self.path.read_bytes()
        first = struct.unpack("<I", blob[blob.rfind(b"PK\x01\x02", 0, blob.rfind(b"archive/data/0")) + 42 :][:4])
        self._edit_directory(b"archive/data/1", lambda b, at: b.__setitem__(slice(at + 42, at + 46), struct.pack("<I", *first)))
        self.fails("overlap at byte", self.source)

    def test_refuses_entries_beyond_the_file(self):
        self._edit_directory(b"/data/0", lambda b, at: b.__setitem__(slice(at + 20, at + 28), b"\xff\xff\xff\x0f" * 2))
        self.fails("should end at byte", self.source)

    def test_refuses_views_beyond_their_storage(self):
        write_torch(self.path, {"model": {"norm.weight": TorchTensor(np.zeros(47, "f4"), shape=(48,), stride=(1,))}})
        self.fails("'norm.weight' needs element 47 of storage '0', which has 47", self.source)

    def test_refuses_expanded_views(self):
        write_torch(self.path, {"model": {"norm.weight": TorchTensor(np.zeros(1, "f4"), shape=(1 << 40,), stride=(0,))}})
        self.fails(r"1099511627776 elements over only 1 stored ones", self.source)

    def test_refuses_absurd_shapes(self):
        for shape in ((-1,), (1 << 60,), (2,) * 9, (1 << 40, 1 << 40)):
            write_torch(
                self.path, {"model": {"norm.weight": TorchTensor(np.zeros(4, "f4"), shape=shape, stride=(1,) * len(shape))}}
            )
            self.fails("'norm.weight' has", self.source)

    def test_counts_values_that_are_not_finite(self):
        blob = bytearray(self.path.read_bytes())
        from support import read_safetensors

        norm = read_safetensors(GOLDEN / "B/checkpoint")["norm.weight"][1].tobytes()
        at = bytes(blob).find(norm)
        blob[at : at + 4] = struct.pack("<f", float("nan"))
        self.path.write_bytes(blob)
        self.convert(self.source)
        self.assertEqual(self.report.nonfinite, {"norm.weight": 1})


@requires_numpy
class HostileFolderTest(Case):
    def _distributed(self):
        source = self.folder / "source"
        shutil.copytree(HERE / "data/distcp", source)
        return source

    def test_refuses_names_that_lead_out(self):
        for name in ("../x_0.distcp", "/etc/hosts____"[:12]):
            source = self._distributed()
            blob = (source / ".metadata").read_bytes()
            self.assertIn(b"__0_0.distcp", blob)
            (source / ".metadata").write_bytes(blob.replace(b"__0_0.distcp", name.encode().ljust(12)[:12]))
            self.fails("leads out of the folder|No such file", source)
            shutil.rmtree(source)

    def test_refuses_links_that_lead_out(self):
        source = self._distributed()
        (source / "__0_0.distcp").rename(self.folder / "elsewhere")
        (source / "__0_0.distcp").symlink_to(self.folder / "elsewhere")
        self.fails("is a link to .*elsewhere, which lies outside", source)

    def test_follows_the_links_of_the_hub_cache(self):
        revision, blobs = self.folder / "models/snapshots/abc", self.folder / "models/blobs"
        revision.mkdir(parents=True)
        blobs.mkdir()
        for index, path in enumerate(sorted((GOLDEN / "E/checkpoint").iterdir())):
            name = f"{index}" * 40
            shutil.copyfile(path, blobs / name)
            (revision / path.name).symlink_to(f"../../blobs/{name}")
        self.convert(revision)

    def test_refuses_an_index_that_leads_out(self):
        source = self.folder / "source"
        source.mkdir()
        shutil.copyfile(GOLDEN / "E/checkpoint/config.json", source / "config.json")
        (source / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"norm.weight": "../../secret.safetensors"}})
        )
        self.fails("'../../secret.safetensors' leads out of the folder", source)

    def _safetensors(self, edit=None, raw=None):
        source = self.folder / "source"
        shutil.rmtree(source, True)
        shutil.copytree(GOLDEN / "E/checkpoint", source)
        path = source / "model.safetensors"
        if raw is not None:
            path.write_bytes(raw)
        else:
            write_safetensors(path, {"a": ("F32", np.zeros(4, "f4")), "b": ("F32", np.zeros(4, "f4"))}, edit)
        return source

    def test_refuses_headers_that_lie(self):
        edits = {
            r"'b' lies at bytes 16 to 64; the data has 32": lambda h: h["b"].update(data_offsets=[16, 64]),
            r"'a' and 'b' overlap at byte 8": lambda h: h["b"].update(data_offsets=[8, 24]),
            r"'b' has 16 bytes; F32 \[5\] needs 20": lambda h: h["b"].update(shape=[5]),
            r"'b' has the type F13": lambda h: h["b"].update(dtype="F13"),
            r"'b' has the shape \[-1\]": lambda h: h["b"].update(shape=[-1]),
            r"'b' has no data_offsets": lambda h: h["b"].update(data_offsets="all"),
            r"'b' has no shape": lambda h: h.update(b=3),
        }
        for pattern, edit in edits.items():
            self.fails(pattern, self._safetensors(edit))
        self.fails("a safetensors file begins with 8", self._safetensors(raw=b"123"))
        self.fails("the header claims", self._safetensors(raw=struct.pack("<Q", 1 << 62) + b"{}"))
        self.fails("is not JSON", self._safetensors(raw=struct.pack("<Q", 2) + b"{]"))
        twice = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        self.fails("'a' appears twice", self._safetensors(raw=struct.pack("<Q", len(twice)) + twice))
        deep = b"[" * 100_000
        self.fails("nested too deeply|is not JSON", self._safetensors(raw=struct.pack("<Q", len(deep)) + deep))

    def test_refuses_configurations_that_lie(self):
        source = self.folder / "source"
        for key, value in (
            ("dim", -1),
            ("dim", "64"),
            ("n_layers", 1 << 40),
            ("n_layers", 4097),
            ("vocab_size", None),
            ("dim", 1e300),
        ):
            shutil.rmtree(source, True)
            shutil.copytree(GOLDEN / "E/checkpoint", source)
            config = json.loads((source / "config.json").read_text())
            config[key] = value
            (source / "config.json").write_text(json.dumps(config))
            self.fails(key, source)
        (source / "config.json").write_text("{" * 10)
        self.fails("config.json is not JSON", source)

    def test_refuses_gguf_headers_that_lie(self):
        path = self.folder / "model.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 1))
        self.fails("claims 1125899906842624 tensors", path)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62) + b"k" * 20)
        self.fails("a key is a string of", path)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 60))
        self.fails("is an array of", path)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 99, 0, 0))
        self.fails("the GGUF version 99", path)
        write_gguf(path, {"general.architecture": "llama"}, {"t": (12, (2, 100), b"")})
        self.fails("'t' has rows of 100; Q4_K needs a multiple of 256", path)
        write_gguf(path, {"general.architecture": "llama"}, {"t": (0, (1 << 20, 1 << 20), b"")})
        self.fails("'t' ends at byte", path)
        write_gguf(path, {"general.architecture": "llama"}, {"t": (77, (2,), b"")})
        self.fails("'t' has the ggml type 77", path)


if __name__ == "__main__":
    unittest.main()
