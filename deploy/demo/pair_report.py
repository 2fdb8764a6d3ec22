"""Fills the tables of PAIR.md from the logs of the pair's runs and from evaluate.py's figures.

  pair_report.py --work_dir DIR       reads DIR/pair_{dense,memory}_SEED/{log.jsonl,evaluation.json}
"""
import argparse
import glob
import json
import os
import re

from evaluate import HERE, write_into_card
from train import make_run

KINDS = ["trained statements", "trained questions", "held-out questions"]
PROBES = {"statement": "trained statements", "held-out question": "held-out questions"}


def seeds_finished(work_dir):
    found = [set(re.findall(rf"pair_{twin}_(\d+)/evaluation.json", "\n".join(glob.glob(f"{work_dir}/pair_*/evaluation.json")))) for twin in ("dense", "memory")]
    return sorted(found[0] & found[1], key=int)


def shares(work_dir, twin, seed):
    measured = json.load(open(f"{work_dir}/pair_{twin}_{seed}/evaluation.json"))
    result = {kind: 100 * measured["memory on"][kind][0] for kind in KINDS}
    result["off"] = {kind: 100 * measured.get("memory off", measured["memory on"])[kind][0] for kind in KINDS}
    return result


def log_of(work_dir, twin, seed):
    """tokens in millions → entry; a resumed run may have logged a point twice, the later one counts."""
    return {entry["tokens"] // 1_000_000: entry for entry in map(json.loads, open(f"{work_dir}/pair_{twin}_{seed}/log.jsonl"))}


def mean_and_spread(values):
    mean = sum(values) / len(values)
    return f"{mean:.1f}" + (f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else "")


def result_table(work_dir, seeds):
    lines = ["| exact match, % | " + " | ".join(f"seed {seed}: dense → memory" for seed in seeds) + " | mean dense → memory | ratio of the means | ratios by seed |",
             "|---|" + "---|" * (len(seeds) + 3)]
    for kind in KINDS:
        dense = [shares(work_dir, "dense", seed)[kind] for seed in seeds]
        memory = [shares(work_dir, "memory", seed)[kind] for seed in seeds]
        cells = [f"{d:.1f} → {m:.1f}" for d, m in zip(dense, memory)]
        ratios = ", ".join(f"{m / d:.2f}" for d, m in zip(dense, memory))
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {sum(dense) / len(dense):.1f} → {sum(memory) / len(memory):.1f} | {sum(memory) / sum(dense):.2f} | {ratios} |")
    off = [shares(work_dir, "memory", seed)["off"] for seed in seeds]
    lines.append("| memory switched off: " + ", ".join(KINDS) + " | " + " | ".join(" / ".join(f"{o[kind]:.1f}" for kind in KINDS) for o in off) + " | | | |")
    return "\n".join(lines)


def curve_table(work_dir, seeds):
    logs = {twin: [log_of(work_dir, twin, seed) for seed in seeds] for twin in ("dense", "memory")}
    points = sorted(set.intersection(*(set(log) for twin in logs.values() for log in twin)))
    lines = ["| million tokens | loss dense / memory | " + " | ".join(f"{name}, dense → memory, %" for name in PROBES.values()) + " |", "|---|---|---|---|"]
    for point in points:
        loss = [sum(log[point]["loss"] for log in logs[twin]) / len(seeds) for twin in ("dense", "memory")]
        cells = [" → ".join(mean_and_spread([log[point][probe] for log in logs[twin]]) for twin in ("dense", "memory")) for probe in PROBES]
        lines.append(f"| {point} | {loss[0]:.2f} / {loss[1]:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_table(work_dir, seeds):
    lines = ["| | dense | memory |", "|---|---|---|"]
    runs = [make_run(f"pair_{twin}_1") for twin in ("dense", "memory")]
    last = [[max(log_of(work_dir, twin, seed).items())[1] for seed in seeds] for twin in ("dense", "memory")]
    flops = [run.model.flops_per_token() for run in runs]
    lines.append(f"| forward FLOPs a token, output head included | {flops[0]:,} | {flops[1]:,} (+{100 * (flops[1] / flops[0] - 1):.1f} %) |")
    lines.append("| tokens | " + " | ".join(f"{entries[0]['tokens']:,}" for entries in last) + " |")
    lines.append("| processor seconds of training, mean | " + " | ".join(f"{sum(e['cpu_seconds'] for e in entries) / len(entries):,.0f}" for entries in last) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default=os.path.expanduser("~/.cache/memserve-demo"))
    args = parser.parse_args()
    seeds = seeds_finished(args.work_dir)
    text = "\n\n".join([f"Seeds measured: {', '.join(seeds)}.", result_table(args.work_dir, seeds), cost_table(args.work_dir, seeds),
                        "Curves, on fixed samples of 1,200 prompts during training (mean over seeds, lowest and highest in brackets):", curve_table(args.work_dir, seeds)])
    write_into_card(os.path.join(HERE, "PAIR.md"), text)
    print(text)


if __name__ == "__main__":
    main()
