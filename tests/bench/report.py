#!/usr/bin/env python3
"""Measures what BENCHMARKS.md shows and prints it as Markdown.

    tests/bench/report.py [--build build] [--checkpoint deploy/demo/checkpoint] [--rounds 9]

Needs a release build. Every ratio is between things measured in turn in this one run. Standard library only.
"""
import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import tempfile
import time

PROMPT = "Q: What is the capital of Peru?\nA:"


def run_json(*command):
    """The JSON objects that a command prints, one a line."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def spread(values, scale=1.0, digits=2):
    values = [v * scale for v in values]
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


class Server:
    """A memserve on a free loopback port, from `with` to the end of its block."""

    def __init__(self, build, checkpoint, *flags):
        self.folder = tempfile.TemporaryDirectory()
        self.port_file = os.path.join(self.folder.name, "port")
        self.log_file = open(os.path.join(self.folder.name, "log"), "w+")
        self.command = [f"{build}/server/memserve", f"--checkpoint={checkpoint}", "--grpc_address=127.0.0.1:0",
                        f"--port_file={self.port_file}", *flags]

    def __enter__(self):
        begin = time.monotonic()
        self.process = subprocess.Popen(self.command, stderr=self.log_file)
        while not os.path.exists(self.port_file):
            if self.process.poll() is not None or time.monotonic() - begin > 60:
                raise SystemExit(f"the server did not start:\n{self.log()}")
            time.sleep(0.002)
        self.ready_seconds = time.monotonic() - begin
        self.address = f"127.0.0.1:{open(self.port_file).read().strip()}"
        return self

    def __exit__(self, *unused):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log_file.close()
        self.folder.cleanup()

    def log(self):
        return open(self.log_file.name).read()


def machine():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release().split('-')[0]}"


def start_section(args):
    ready, peaks = [], []
    for _ in range(args.rounds):
        with Server(args.build, args.checkpoint) as server:
            ready.append(server.ready_seconds)
            log = server.log()
    memory = re.search(r"resident memory.*", log).group(0)
    plan = re.search(r"plan: .*", log).group(0)
    print("## Start on the demo checkpoint\n")
    print(f"Process start to ready, {args.rounds} starts: **{spread(ready, 1, 3)} s** (median, least and most).\n")
    print(f"    {plan}\n    {memory}\n")


def stream_section(args):
    tokens = 200
    alone, inside, outside, calls = [], [], [], []
    with Server(args.build, args.checkpoint) as server:
        for _ in range(args.rounds):
            bench = run_json(f"{args.build}/tests/bench/memserve-bench", "model", f"--checkpoint={args.checkpoint}", "--prompt=14",
                             f"--decode={tokens}", "--repeat=15", "--json")[0]
            alone.append(bench["token_seconds"] * 1e6)
            client = run_json(f"{args.build}/clients/memserve-client", f"--address={server.address}", "--json", "repeat", "--count=15",
                              f"--max_tokens={tokens}", PROMPT)[0]
            outside.append(client["client_us_per_token"]["median"])
            inside.append(client["engine_us_per_token"]["median"])
            calls.append(client["call_us"]["median"])
    print("## One stream through gRPC\n")
    print("Microseconds a token of the demo model after the first, at a gRPC client on the same machine and by the engine's clock in the same streams "
          f"(`memserve-client repeat`), and of an engine alone without server or client (`memserve-bench model`), in turn, {args.rounds} rounds of 15 streams "
          f"of {tokens} tokens. Beside it what a call costs once, the engine's time left out (a stream of one token).\n")
    print("| at the client | engine, same streams | ratio | engine alone | ratio | once a call |\n|---|---|---|---|---|---|")
    ratio = [spread([o / i for o, i in zip(outside, of)], 1, 3) for of in (inside, alone)]
    print(f"| {spread(outside, 1, 1)} | {spread(inside, 1, 1)} | **{ratio[0]}** | {spread(alone, 1, 1)} | {ratio[1]} | {spread(calls, 1, 0)} |\n")


def operation_section(args, name, what, *flags):
    print(f"## {what}\n")
    print("| threads | batch | µs | GB/s | GFLOP/s | share of the limit |\n|---|---|---|---|---|---|")
    for threads in (1, 2):
        for row in run_json(f"{args.build}/tests/bench/memserve-bench", name, "--batch=1,8,64", f"--threads={threads}", "--json", *flags):
            median = row["median_seconds"]
            print(f"| {threads} | {row['batch']} | {median * 1e6:.1f} ({row['min_seconds'] * 1e6:.1f} … {row['max_seconds'] * 1e6:.1f}) "
                  f"| {row['bytes'] / median / 1e9:.1f} | {row['flops'] / median / 1e9:.1f} | {row['share_of_limit']:.2f} |")
    print()


def table_size_section(args):
    print("## Cost against table size\n")
    print("The same memory layer (4 heads, half keys 256 wide, knn 32, bfloat16 rows of 1,024) over tables of different size, batch 8, microseconds a token "
          "(`memserve-bench table_size`). Search grows as √rows; the gather is flat from 2^18 rows on, below that rows are still in caches.\n")
    print("| rows | n_keys | search | gather |\n|---|---|---|---|")
    for row in run_json(f"{args.build}/tests/bench/memserve-bench", "table_size", "--batch=8", "--json"):
        print(f"| {row['rows']:,} | {row['n_keys']} | {row['search_seconds'] * 1e6 / 8:.1f} | {row['gather_seconds'] * 1e6 / 8:.1f} |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build")
    parser.add_argument("--checkpoint", default="deploy/demo/checkpoint")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"Machine: {machine()}. Median (least … most).\n")
    start_section(args)
    stream_section(args)
    operation_section(args, "search", "Product-key search: 4 heads, 2 × 1,024 half keys of 256, knn 32, bfloat16, keys cold")
    operation_section(args, "gather", "EmbeddingBag: bags of 128 rows of 2^20 × 1,024, bfloat16, rows cold")
    operation_section(args, "gather", "EmbeddingBag: the same in float32", "--format=f32", "--rows=524288")
    table_size_section(args)


if __name__ == "__main__":
    main()
