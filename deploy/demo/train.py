"""Trains the demo checkpoint and the dense/memory pair on the CPU.

  train.py main                     the demo model, then its export to deploy/demo/checkpoint
  train.py main_dense               its dense twin: same trunk, same documents (for the model card only)
  train.py pair --seeds 1,2,3       dense and memory twins on more facts than the dense one can hold
  train.py measure_pair --seeds 1,2,3     exports and evaluates the pair's finished runs, for pair_report.py
  train.py export --run NAME --to DIR     the newest snapshot of a run as a checkpoint folder
  train.py check                    the C++ helper against plain torch

A run continues from its newest snapshot in --work_dir; delete the run's folder there to start again. `evaluate.py` measures exports.
"""
import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional as F

import data
import product_key_memory
from export import export_checkpoint
from model import ModelConfig, Transformer

HERE = os.path.dirname(os.path.abspath(__file__))
SNAPSHOT_EVERY_S = 150
PASSES_PER_CHUNK = 4


@dataclass
class Run:
    name: str
    facts: str  # "main" or "pair"
    model: ModelConfig
    tokens: int
    tokens_per_step: int
    trunk_lr: float
    value_lr: float
    seed: int
    weight_decay: float = 0.05
    warmup: float = 0.04
    final_lr: float = 0.02


def make_run(name, tokens=None):
    """The settings of a run by its name: main, main_dense, pair_dense_1, pair_memory_1, …"""
    kind, _, seed = name.rpartition("_") if name[-1].isdigit() else (name, "", "1")
    if kind in ("main", "main_dense"):
        model = ModelConfig(dim=64, n_layers=4, n_heads=4, ffn_dim=192, vocab_size=4096, mem_n_keys=160,
                            memory_layers=(1, 2, 3) if kind == "main" else ())
        return Run(name, "main", model, tokens or 12_000_000, 2048, 4e-3, 2e-2, int(seed))
    if kind in ("pair_dense", "pair_memory"):
        model = ModelConfig(dim=24, n_layers=4, n_heads=4, ffn_dim=192, vocab_size=1024, mem_n_keys=128, mem_k_dim=16,
                            memory_layers=(1, 2, 3) if kind == "pair_memory" else ())
        return Run(name, "pair", model, tokens or 27_000_000, 3072, 6e-3, 3e-2, int(seed), warmup=0.05)
    raise SystemExit(f"unknown run {name}")


def learning_rate(progress, run):
    """Cosine from 1 to final_lr after a linear warm-up."""
    if progress < run.warmup:
        return progress / run.warmup
    return run.final_lr + (1 - run.final_lr) * 0.5 * (1 + math.cos(math.pi * (progress - run.warmup) / (1 - run.warmup)))


def make_optimizer(model, run):
    table = model.value_table()
    matrices = [p for p in model.parameters() if p is not table and p.dim() > 1]
    vectors = [p for p in model.parameters() if p is not table and p.dim() == 1]
    groups = [dict(params=matrices, lr=run.trunk_lr, weight_decay=run.weight_decay), dict(params=vectors, lr=run.trunk_lr, weight_decay=0.0)]
    if table is not None:
        table.grad = torch.zeros_like(table)  # the lookup adds to it
        groups.append(dict(params=[table], lr=run.value_lr, weight_decay=0.0))
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def right_flags(model, pairs, memory_on=True, tokens_per_step=4096):
    """For each (prompt ids, answer ids): whether greedy decoding gives exactly the answer and then ends. One forward pass tells."""
    order = sorted(range(len(pairs)), key=lambda n: len(pairs[n][0]) + len(pairs[n][1]))
    right = [False] * len(pairs)
    model.eval()
    start = 0
    with torch.no_grad():
        while start < len(order):
            longest = len(pairs[order[start]][0]) + len(pairs[order[start]][1]) + 6
            batch = order[start:start + max(1, tokens_per_step // longest)]
            batch = [n for n in batch if len(pairs[n][0]) + len(pairs[n][1]) + 2 <= longest]
            tokens = torch.full((len(batch), longest), data.EOS)
            rows = [[data.BOS] + pairs[n][0] + pairs[n][1] + [data.EOS] for n in batch]
            for row, ids in enumerate(rows):
                tokens[row, :len(ids)] = torch.tensor(ids)
            best = model(tokens, torch.arange(tokens.numel()), torch.full((len(batch),), memory_on)).argmax(-1).view(tokens.shape)
            for row, n in enumerate(batch):
                first = 1 + len(pairs[n][0])
                last = first + len(pairs[n][1]) + 1
                right[n] = bool((best[row, first - 1:last - 1] == tokens[row, first:last]).all())
            start += len(batch)
    model.train()
    return right


def progress_probe(fact_set, count=1200):
    """Fixed samples of trained statements, trained questions and held-out questions."""
    rng = random.Random(5)
    asked = rng.sample(fact_set.asked, min(count, len(fact_set.asked)))
    held_out = rng.sample(fact_set.held_out, min(count, len(fact_set.held_out)))
    return {"statement": [rng.choice(f.statements) for f in asked], "question": [rng.choice(f.questions["qa"]) for f in asked],
            "held-out statement": [rng.choice(f.statements) for f in held_out], "held-out question": [rng.choice(f.questions["qa"]) for f in held_out]}


def save_atomically(write, path):
    write(path + ".partial")
    os.replace(path + ".partial", path)


class Trainer:
    """The state of one run: model, optimiser, place in the data. Snapshots make it resumable."""

    def __init__(self, run, work_dir):
        self.run = run
        self.folder = os.path.join(work_dir, run.name)
        os.makedirs(self.folder, exist_ok=True)
        tokenizer_path = os.path.join(work_dir, run.facts + "-tokenizer.model")
        self.fact_set = data.demo_fact_set(tokenizer_path) if run.facts == "main" else data.pair_fact_set(tokenizer_path)
        torch.manual_seed(run.seed)
        self.model = Transformer(run.model, product_key_memory.load_helper(work_dir))
        self.optimizer = make_optimizer(self.model, run)
        self.tokens_seen, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.chunk, self.batch, self.steps = 0, 0, 0
        self.counters = ("tokens_seen", "seconds", "cpu_seconds", "chunk", "batch", "steps")
        self.snapshot = os.path.join(self.folder, "snapshot.pt")
        if os.path.exists(self.snapshot):
            self.load()

    def load(self):
        state = torch.load(self.snapshot, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self.counters:
            setattr(self, name, state[name])

    def save(self):
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), **{name: getattr(self, name) for name in self.counters})
        save_atomically(lambda path: torch.save(state, path), self.snapshot)

    def batches(self):
        """Endless, from where the snapshot left off."""
        while True:
            batches = self.fact_set.chunk_of_batches(self.run.seed, self.chunk, PASSES_PER_CHUNK, self.run.tokens_per_step)
            for n, batch in enumerate(batches):
                if n >= self.batch:
                    self.batch = n + 1
                    yield batch
            self.chunk, self.batch = self.chunk + 1, 0

    def step(self, tokens, memory_on, wanted, targets):
        rate = learning_rate(self.tokens_seen / self.run.tokens, self.run)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        loss = F.cross_entropy(self.model(tokens, wanted, None if memory_on.all() else memory_on), targets)
        loss.backward()
        table = self.model.value_table()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p is not table], 1.0, foreach=True)
        self.optimizer.step()
        for parameter in self.model.parameters():
            if parameter is table:
                parameter.grad.zero_()
            else:
                parameter.grad = None
        self.tokens_seen += tokens.numel()
        self.steps += 1
        return loss.item()

    def log(self, **entry):
        line = json.dumps(dict(run=self.run.name, steps=self.steps, tokens=self.tokens_seen, seconds=round(self.seconds), cpu_seconds=round(self.cpu_seconds), **entry))
        print(line, flush=True)
        with open(os.path.join(self.folder, "log.jsonl"), "a") as file:
            file.write(line + "\n")

    def train(self, probe_every=1_000_000):
        probe = progress_probe(self.fact_set)
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
        last_save, clock, cpu_clock, losses = time.time(), time.time(), time.process_time(), []
        for batch in self.batches():
            if self.tokens_seen >= self.run.tokens:
                break
            before = self.tokens_seen // probe_every
            losses.append(self.step(*batch))
            self.seconds += time.time() - clock
            self.cpu_seconds += time.process_time() - cpu_clock
            if self.tokens_seen // probe_every > before or self.tokens_seen >= self.run.tokens:
                scores = {name: round(100 * sum(flags) / len(flags), 1) for name, flags in ((n, right_flags(self.model, p)) for n, p in probe.items())}
                if self.run.model.memory_layers:
                    off = right_flags(self.model, probe["question"], memory_on=False)
                    scores["question, memory off"] = round(100 * sum(off) / len(off), 1)
                self.log(loss=round(sum(losses) / len(losses), 4), **scores)
                losses = []
            if stop or time.time() - last_save > SNAPSHOT_EVERY_S:
                self.save()
                last_save = time.time()
            if stop:
                raise SystemExit(f"{self.run.name}: stopped after {self.tokens_seen} tokens; the same command goes on")
            clock, cpu_clock = time.time(), time.process_time()
        self.save()

    def export(self, folder):
        export_checkpoint(self.model, self.fact_set.tokenizer, folder)


def measure_pair(run, work_dir):
    """Exports a finished run of the pair into its work folder and evaluates the export there."""
    trainer = Trainer(run, work_dir)
    assert trainer.tokens_seen >= run.tokens, f"{run.name} is not finished"
    folder = os.path.join(trainer.folder, "checkpoint")
    trainer.export(folder)
    figures = os.path.join(trainer.folder, "evaluation.json")
    subprocess.run([sys.executable, os.path.join(HERE, "evaluate.py"), "--checkpoint", folder, "--pair", "--json", figures], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["main", "main_dense", "pair", "measure_pair", "export", "check"])
    parser.add_argument("--work_dir", default=os.path.expanduser("~/.cache/memserve-demo"), help="snapshots, logs and the compiled helper")
    parser.add_argument("--seeds", default="1,2,3", help="seeds of the pair")
    parser.add_argument("--models", default="dense,memory", help="which twins of the pair")
    parser.add_argument("--tokens", type=int, help="training tokens, if not the run's own number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", help="export: name of the run")
    parser.add_argument("--to", help="export: folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.makedirs(args.work_dir, exist_ok=True)

    if args.command == "check":
        helper = product_key_memory.load_helper(args.work_dir)
        print("no helper" if helper is None else f"largest relative difference {product_key_memory.check_helper(helper):.1e}")
    elif args.command == "export":
        Trainer(make_run(args.run), args.work_dir).export(args.to)
    elif args.command == "pair":
        for seed in args.seeds.split(","):
            for twin in args.models.split(","):
                Trainer(make_run(f"pair_{twin}_{seed}", args.tokens), args.work_dir).train()
    elif args.command == "measure_pair":
        for seed in args.seeds.split(","):
            for twin in args.models.split(","):
                measure_pair(make_run(f"pair_{twin}_{seed}", args.tokens), args.work_dir)
    else:
        trainer = Trainer(make_run(args.command, args.tokens), args.work_dir)
        trainer.train()
        if args.command == "main":
            trainer.export(os.path.join(HERE, "checkpoint"))


if __name__ == "__main__":
    main()
