#!/usr/bin/env python3
"""Measures the server under load and prints the section "Under load" of BENCHMARKS.md, with the goals of each figure.

    tests/bench/serving_bench.py [--build build] [--checkpoint deploy/demo/checkpoint] [--seconds 8] [--short]

On the demo checkpoint and on a larger one of random weights (made in --cache_dir if it is not there): closed loop with 1 to 64 streams,
open loop at 0.5 to 3 times the capacity found, a long prompt beside running streams, and what the steps of a batch of 16 are made of.
About five minutes; --short: one. The client runs on the same machine, and its share of it is shown. Standard library only.
"""
import argparse
import json
import pathlib
import subprocess
import tempfile

import report
import synthetic_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]


def client(args, server, *flags):
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [f"{args.build}/clients/memserve-client", f"--address={server.address}", "load_test", f"--json_file={file.name}", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: {done.stderr}{done.stdout}\n{server.log()}")
        return json.load(file)


def cells(percentiles, *keys):
    return "–" if percentiles is None else " / ".join(f"{percentiles[key]:.1f}" for key in keys)


def passed(holds):
    return "holds" if holds else "**missed**"


def load_section(args, name, server):
    points = client(args, server, f"--concurrency={args.concurrency}", f"--load_factors={args.load_factors}", f"--seconds={args.seconds}",
                    f"--prompt_tokens={args.prompt_tokens}", f"--output_tokens={args.output_tokens}")["points"]
    print(f"### {name}\n")
    print("| load | done | refused | failed | requests/s | output tokens/s | goodput | TTFT ms p50 / p95 / p99 | gap ms p50 / p95 / p99 / max "
          "| refusal ms p50 / p99 / max | retry after ms p50 | client's cores |\n|---|---|---|---|---|---|---|---|---|---|---|---|")
    for point in points:
        load = f"{point['concurrency']} streams" if point["mode"] == "closed" else f"{point['load_factor']:g} × capacity"
        print(f"| {load} | {point['done']} | {point['refused']} | {point['failed'] + point['expired']} | {point['requests_per_second']:.1f} "
              f"| {point['output_tokens_per_second']:.0f} | {point['goodput_tokens_per_second']:.0f} | {cells(point['ttft_ms'], 'p50', 'p95', 'p99')} "
              f"| {cells(point['gap_ms'], 'p50', 'p95', 'p99', 'max')} | {cells(point['refusal_ms'], 'p50', 'p99', 'max')} "
              f"| {cells(point['retry_after_ms'], 'p50')} | {point['client_cores']:.2f} |")
    open_points = [point for point in points if point["mode"] == "open"]
    peak = max(point["goodput_tokens_per_second"] for point in open_points)
    most = open_points[-1]
    kept = most["goodput_tokens_per_second"] / peak
    print(f"\n- At {most['load_factor']:g} × capacity the goodput is **{100 * kept:.0f} %** of its peak in the open loop (goal: 90 %): {passed(kept >= 0.9)}.")
    refusal = most["refusal_ms"]
    print("- Nothing was refused." if refusal is None else
          f"- What is refused there is refused within **{refusal['p99']:.1f} ms** (p99; largest {refusal['max']:.1f} ms; goal: 50 ms): {passed(refusal['p99'] <= 50)}.")


def long_prompt_line(args, server, tokens):
    runs = [client(args, server, f"--long_prompt_tokens={tokens}", "--streams=8", "--prompt_tokens=32", f"--seed={seed}")["points"][0]
            for seed in range(1, args.rounds + 1)]
    ratios = sorted(run["ratio"] for run in runs)
    median = ratios[len(ratios) // 2]
    run = runs[0]
    print(f"- A prompt of {tokens} tokens beside 8 running streams, {args.rounds} times: their largest gap is **{median:.2f}** times their median step "
          f"({ratios[0]:.2f} … {ratios[-1]:.2f}; in the first: step {run['step_ms']:.2f} ms, largest gap {run['gap_during_ms']['max']:.2f} ms, p99 "
          f"{run['gap_during_ms']['p99']:.2f} ms, first token after {run['long_prompt_ttft_ms']:.0f} ms; without the prompt the largest gap was "
          f"{run['gap_before_ms']['max']:.2f} ms; goal: 3): {passed(median <= 3)}.")


def profile_section(args, checkpoints):
    print("\n### What a step is made of, 16 streams\n")
    print("| checkpoint | step µs, median (p99) | schedule | forward | sample | collect and hand over | all but forward |\n|---|---|---|---|---|---|---|")
    for name, checkpoint in checkpoints:
        row = report.run_json(f"{args.build}/tests/bench/memserve-bench", "model", f"--checkpoint={checkpoint}", "--batch=16", "--prompt=32",
                              "--decode=128", "--repeat=5", "--json")[0]
        shares = [row[f"{phase}_share"] for phase in ("schedule", "forward", "sample", "hand_over")]
        rest = 1 - shares[1]
        print(f"| {name} | {row['step_median_seconds'] * 1e6:.0f} ({row['step_p99_seconds'] * 1e6:.0f}) | "
              + " | ".join(f"{100 * share:.2f} %" for share in shares) + f" | **{100 * rest:.2f} %** |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default=str(ROOT / "build"))
    parser.add_argument("--checkpoint", default=str(ROOT / "deploy/demo/checkpoint"))
    parser.add_argument("--cache_dir", type=pathlib.Path, default=pathlib.Path.home() / ".cache/memserve-bench")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32,64")
    parser.add_argument("--load_factors", default="0.5,1,1.5,2,3")
    parser.add_argument("--seconds", type=float, default=8, help="of arrivals in a point")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--output_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="a quick look: fewer and shorter points")
    args = parser.parse_args()
    if args.short:
        args.concurrency, args.load_factors, args.seconds, args.rounds = "1,16,64", "1,3", 3, 1
    large = args.cache_dir / "serving"
    synthetic_checkpoint.make_checkpoint(large, synthetic_checkpoint.serving_config())
    limits = ["--max_waiting=64", "--max_waiting_tokens=16384"]
    print("## Under load\n")
    print(f"Machine: {report.machine()}, client and server on it. Prompts of about {args.prompt_tokens} random tokens, about {args.output_tokens} tokens drawn for each, "
          f"{args.seconds:g} s a point, {' '.join(limits)} (`tests/bench/serving_bench.py`). Goodput counts output tokens of requests that finished; "
          "a gap is the time between two messages of a stream.\n")
    with report.Server(args.build, args.checkpoint, *limits) as server:
        load_section(args, "Demo checkpoint", server)
    with report.Server(args.build, large, *limits) as server:
        print()
        load_section(args, "Random weights: 8 layers of 512, two Memory+ layers over 2^18 rows of 512, bf16", server)
        long_prompt_line(args, server, 4000)
    profile_section(args, [("demo", args.checkpoint), ("random weights", large)])


if __name__ == "__main__":
    main()
