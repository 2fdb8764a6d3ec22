#!/usr/bin/env python3
"""Times memserve-convert on a checkpoint with one large bf16 table, beside a plain copy of the same file in the same run:

clients/python/tests/bench.py FOLDER [GIB]      FOLDER: where there is room for three times as much; GIB: default 1
"""

import json
import math
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import time

from support import GOLDEN, SRC, np

WIDTH = 1024


def make(folder, gib):
    """One memory layer with a table of random bf16 rows, otherwise as small as can be."""
    from memserve.convert import shapes

    config = json.loads((GOLDEN / "A/checkpoint/config.json").read_text())
    config.update(dim=WIDTH, n_layers=1, n_heads=8, n_kv_heads=8)
    config["productkey_args"].update(layers="0", mem_n_keys=math.isqrt(int(gib * 2**30) // (2 * WIDTH)), mem_k_dim=32)
    wanted, _, _ = shapes.expected(config, "bench")
    header, at = {}, 0
    for name, shape in wanted.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    block = (np.random.default_rng(1).standard_normal(1 << 22, dtype=np.float32).view("<u4") >> 16).astype("<u2").tobytes()
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at > 0:
            file.write(block[: min(at, len(block))])
            at -= len(block)
        file.flush()
        os.fsync(file.fileno())
    (folder / "config.json").write_text(json.dumps(config))


def copy(source, target):
    with open(source, "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, 8 << 20)
        write.flush()
        os.fsync(write.fileno())


def main():
    folder, gib = pathlib.Path(sys.argv[1]) / "memserve-convert-bench", float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    shutil.rmtree(folder, True)
    make(folder / "source", gib)
    size = (folder / "source/model.safetensors").stat().st_size / 2**20
    began = time.monotonic()
    copy(folder / "source/model.safetensors", folder / "copy")
    copied = time.monotonic() - began
    print(f"plain copy with fsync       {size / copied:7.0f} MiB/s of the source")
    (folder / "copy").unlink()
    for kind in ("keep", "f32", "int8", "int4"):
        program = ("import re, sys; from memserve.convert import cli; code = cli.main(sys.argv[1:]); "
                   "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)")  # fmt: skip
        before, began = os.times(), time.monotonic()
        done = subprocess.run([sys.executable, "-c", program, folder / "source", folder / kind, f"--table_dtype={kind}"],
                              env=dict(os.environ, PYTHONPATH=str(SRC)), capture_output=True, text=True, check=True)  # fmt: skip
        wall, after = time.monotonic() - began, os.times()
        processor = after.children_user + after.children_system - before.children_user - before.children_system
        off = re.search(r"error of ([\d.]+ %)", done.stderr)
        print(
            f"--table_dtype={kind:5}        {size / wall:7.0f} MiB/s of the source, {size / processor:5.0f} a second of one core, "
            f"peak memory {int(done.stdout) / 1024:.0f} MiB" + (f", rows {off[1]} off" if off else "")
        )
        shutil.rmtree(folder / kind)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
