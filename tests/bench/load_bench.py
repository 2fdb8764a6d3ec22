#!/usr/bin/env python3
"""Times how long the server takes from its start until it serves, beside Python's safetensors reading the same file.

  tests/bench/load_bench.py [--cache_dir DIR] [--rows LOG2] [--dim N] [--runs N] [--memserve PATH] [--python PATH] [--flag=…]

Makes a checkpoint with one value table (by default 2^20 rows of 2048 in bf16: 4 GiB) in the cache folder if it is not there, reads it
once so that it is in the page cache, and then takes turns: as much memory touched twice (what the machine itself needs), the server, from fork to the line that says it is ready (with its phases and
VmHWM against VmRSS from /proc), and safetensors.numpy/torch.load_file in a fresh process (the load alone, its imports not counted).
bf16 needs torch; without it --table_dtype f32 compares with numpy. Medians of the runs; ratio = safetensors / server.
"""

import argparse
import pathlib
import re
import statistics
import subprocess
import sys
import time

import synthetic_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]

PYTHON_LOAD = """
import sys, time
path, framework = sys.argv[1:]
if framework == "torch":
    import torch
    from safetensors.torch import load_file
else:
    from safetensors.numpy import load_file
begin = time.perf_counter()
tensors = load_file(path)
loaded = time.perf_counter()
# load_file may only map the file: one pass over every page shows what is left to do.
total = 0
for tensor in tensors.values():
    flat = tensor.reshape(-1)
    total += float(flat[:: 4096 // flat.dtype.itemsize].sum())
print(loaded - begin, time.perf_counter() - begin)
"""


def make_checkpoint(folder, args):
    config = {"model_type": "memory_llama", "dim": 512, "n_layers": 2, "n_heads": 8, "vocab_size": 4096, "max_seqlen": 1024,
              "ffn_dim": 1024, "weight_tying": True, "tokenizer": "none",
              "productkey_args": {"is_enabled": True, "layers": "1", "mem_n_keys": 1 << (args.rows // 2), "mem_heads": 4, "mem_knn": 32,
                                  "mem_k_dim": 256, "mem_v_dim": args.dim}}
    return synthetic_checkpoint.make_checkpoint(folder, config, args.table_dtype.upper())


def read_once(path):
    begin = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begin


def resident(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return {key: int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024 for key in ("VmHWM", "VmRSS")}


def back_memory(size):
    """In a process of its own, so that all of it is free again: on a virtual machine the first touch of memory may wait for the host."""
    code = ("import mmap; size = %d; m = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
            "m.madvise(mmap.MADV_HUGEPAGE)\nfor at in range(0, size, 1 << 21): m[at] = 1" % size)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def run_server(args, folder):
    begin = time.perf_counter()
    server = subprocess.Popen([args.memserve, f"--checkpoint={folder}", "--grpc_address=127.0.0.1:0", "--max_batch_tokens=64", *args.flags],
                              stderr=subprocess.PIPE, text=True)
    phases = []
    try:
        for line in server.stderr:
            if "start:" in line or "resident memory" in line or "loaded:" in line:
                phases.append(line.split("] ", 2)[-1].strip())
            if "ready:" in line:
                return time.perf_counter() - begin, resident(server.pid), phases
        raise SystemExit(f"the server ended: exit status {server.wait()}")
    finally:
        server.terminate()
        server.wait()


def run_safetensors(args, path):
    framework = "torch" if args.table_dtype == "bf16" else "numpy"
    found = subprocess.run([args.python, "-c", PYTHON_LOAD, str(path), framework], stdout=subprocess.PIPE, text=True, check=True).stdout
    return [float(word) for word in found.split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=pathlib.Path, default=pathlib.Path.home() / ".cache/memserve-bench")
    parser.add_argument("--rows", type=int, default=20, help="of the table, as a power of two; even")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--table_dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memserve", default=str(ROOT / "build/server/memserve"))
    parser.add_argument("--python", default=sys.executable, help="one that has safetensors, and torch for bf16")
    parser.add_argument("flags", nargs="*", help="further flags of the server, after --")
    args = parser.parse_args()
    folder = args.cache_dir / f"load-{args.table_dtype}-2^{args.rows}x{args.dim}"
    path = make_checkpoint(folder, args)
    read_once(path)
    size = path.stat().st_size
    serves, loads, touches, peak = [], [], [], []
    for run in range(args.runs):
        first, cold = back_memory(size), read_once(path)  # the kernel may have let go of pages since the last run
        print(f"touching as much memory: {first:.2f} s, again: {back_memory(size):.2f} s; reading the file: {cold:.2f} s, again: {read_once(path):.2f} s")
        seconds, memory, phases = run_server(args, folder)
        serves.append(seconds)
        peak.append(memory["VmHWM"] / memory["VmRSS"])
        print(f"run {run + 1}: serves after {seconds:.2f} s; VmHWM {memory['VmHWM'] / 2**20:.0f} MiB, VmRSS {memory['VmRSS'] / 2**20:.0f} MiB")
        for phase in phases:
            print(f"    {phase}")
        loaded, touched = run_safetensors(args, path)
        loads.append(loaded)
        touches.append(touched)
        print(f"    safetensors: load_file {loaded:.2f} s, with a pass over its pages {touched:.2f} s")
    server, python = statistics.median(serves), statistics.median(touches)
    print(f"{size / 2**30:.2f} GiB: server {server:.2f} s ({size / server / 2**30:.2f} GiB/s), safetensors {statistics.median(loads):.2f} s, "
          f"with its pages {python:.2f} s; ratio {python / server:.2f}; peak / resident {max(peak):.3f}")


if __name__ == "__main__":
    main()
