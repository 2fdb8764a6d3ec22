"""Measures an exported checkpoint by greedy decoding: exact match per kind of prompt, memory on and off.

The forward pass below is written from the published description and shares no code with training: it reads config.json and
model.safetensors, widens bfloat16 to float32, and computes every position anew at every step.

  evaluate.py --checkpoint checkpoint                   the demo model: all kinds of prompts
  evaluate.py --checkpoint checkpoint --ask "Q: What is the capital of Peru?\nA:"
  evaluate.py --checkpoint pair/memory --pair           a twin of the pair
  evaluate.py --checkpoint checkpoint --card            … and writes the table into checkpoint/README.md
"""
import argparse
import json
import os
import struct

import numpy as np
import sentencepiece
import torch
from torch.nn import functional as F

import make_data
from export import write_sums

HERE = os.path.dirname(os.path.abspath(__file__))
MAX_NEW_TOKENS = 16


def read_safetensors(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        body = file.read()
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            bits = np.frombuffer(body[begin:end], dtype="<u2").astype(np.uint32) << 16  # bfloat16 is the upper half of a float32
            tensors[name] = torch.from_numpy(bits.view(np.float32).reshape(entry["shape"]).copy())
    return tensors


class PlainModel:
    def __init__(self, folder):
        self.config = json.load(open(os.path.join(folder, "config.json")))
        self.tensors = read_safetensors(os.path.join(folder, "model.safetensors"))
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "tokenizer.model"))
        args = self.config["productkey_args"]
        self.memory_layers = [int(layer) for layer in args["layers"].split(",")] if args["is_enabled"] else []

    def shuffle_rows(self):
        """A control: every row of the value table in another place."""
        name = f"layers.{self.memory_layers[0]}.feed_forward.values.weight"
        order = torch.randperm(len(self.tensors[name]), generator=torch.Generator().manual_seed(1))
        self.tensors[name] = self.tensors[name][order]
        return self

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["norm_eps"]) * self.tensors[name]

    def rope(self, x):
        """x [batch, time, heads, head_dim], pairs (2i, 2i+1)."""
        head_dim = x.shape[-1]
        angle = torch.arange(x.shape[1])[:, None] * self.config["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        turned = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def attention(self, x, prefix):
        batch, time, _ = x.shape
        q, k, v = (F.linear(x, self.tensors[f"{prefix}w{n}.weight"]).view(batch, time, -1, self.config["head_dim"]) for n in "qkv")
        scores = torch.einsum("bthd,bshd->bhts", self.rope(q), self.rope(k)) * self.config["head_dim"] ** -0.5
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), float("-inf"))
        return F.linear(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2), self.tensors[prefix + "wo.weight"])

    def feed_forward(self, x, prefix):
        return F.linear(F.silu(F.linear(x, self.tensors[prefix + "w1.weight"])) * F.linear(x, self.tensors[prefix + "w3.weight"]),
                        self.tensors[prefix + "w2.weight"])

    def memory(self, x, prefix):
        args, t = self.config["productkey_args"], self.tensors
        n_keys, mem_heads, knn = args["mem_n_keys"], args["mem_heads"], args["mem_knn"]
        query = F.linear(x, t[prefix + "query_proj.query_mlps.0.weight"], t[prefix + "query_proj.query_mlps.0.bias"])
        half_scores = torch.einsum("bthsd,hsid->bthsi", query.view(*x.shape[:2], mem_heads, 2, -1), t[prefix + "keys"].view(mem_heads, 2, n_keys, -1))
        best, index = half_scores.topk(knn)
        score, chosen = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2).topk(knn)
        rows = index[..., 0, :].gather(-1, chosen // knn) * n_keys + index[..., 1, :].gather(-1, chosen % knn)
        table = t[f"layers.{self.memory_layers[0]}.feed_forward.values.weight"]
        pooled = torch.einsum("bthk,bthkv->btv", score.softmax(-1), table[rows])
        gate = F.silu(F.linear(x, t[prefix + "swilu_projection.weight"], t[prefix + "swilu_projection.bias"]))
        return F.linear(pooled * gate, t[prefix + "value_proj.weight"], t[prefix + "value_proj.bias"])

    def last_logits(self, tokens, memory_on):
        """Logits after the last token. With the memory off its layers add nothing to the residual stream."""
        x = self.tensors["tok_embeddings.weight"][tokens]
        for layer in range(self.config["n_layers"]):
            prefix = f"layers.{layer}."
            x = x + self.attention(self.norm(x, prefix + "attention_norm.weight"), prefix + "attention.")
            y = self.norm(x, prefix + "ffn_norm.weight")
            if layer not in self.memory_layers:
                x = x + self.feed_forward(y, prefix + "feed_forward.")
            elif memory_on:
                x = x + self.memory(y, prefix + "feed_forward.")
        return F.linear(self.norm(x[:, -1], "norm.weight"), self.tensors["output.weight"])

    def complete(self, prompts, memory_on=True, batch_tokens=8192):
        """The greedy completion of each prompt, until the end-of-text token or MAX_NEW_TOKENS."""
        encoded = [[self.tokenizer.bos_id()] + self.tokenizer.encode(prompt) for prompt in prompts]
        completions = [[] for _ in prompts]
        by_length = {}
        for n, ids in enumerate(encoded):
            by_length.setdefault(len(ids), []).append(n)
        for length, members in by_length.items():
            size = max(1, batch_tokens // length)
            for start in range(0, len(members), size):
                self.complete_batch(members[start:start + size], encoded, completions, memory_on)
        return [self.tokenizer.decode(ids) for ids in completions]

    def complete_batch(self, running, encoded, completions, memory_on):
        for _ in range(MAX_NEW_TOKENS):
            tokens = torch.tensor([encoded[n] + completions[n] for n in running])
            best = self.last_logits(tokens, memory_on).argmax(-1).tolist()
            for n, token in zip(running, best):
                if token != self.tokenizer.eos_id():
                    completions[n].append(token)
            running = [n for n, token in zip(running, best) if token != self.tokenizer.eos_id()]
            if not running:
                return


def is_right(question, completion):
    return completion.strip() in question["answers"]


def measure(model, sets, memory_on):
    """name → (share right, relation → (right, all))."""
    result = {}
    for name, questions in sets.items():
        completions = model.complete([q["prompt"] for q in questions], memory_on)
        relations = {}
        for question, completion in zip(questions, completions):
            right, count = relations.get(question["relation"], (0, 0))
            relations[question["relation"]] = (right + is_right(question, completion), count + 1)
        result[name] = (sum(r for r, _ in relations.values()) / len(questions), relations)
    return result


def as_table(columns):
    """columns: title → result of measure()."""
    lines = ["| exact match | prompts | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    first = next(iter(columns.values()))
    for name in first:
        number = sum(count for _, count in first[name][1].values())
        lines.append(f"| {name} | {number:,} | " + " | ".join(f"{100 * result[name][0]:.1f} %" for result in columns.values()) + " |")
    return "\n".join(lines)


def relation_table(on, trained_name, held_out_name):
    lines = ["| relation | trained statements | held-out questions |", "|---|---|---|"]
    for relation, (right, count) in sorted(on[held_out_name][1].items()):
        trained_right, trained_count = on[trained_name][1].get(relation, (0, 0))
        trained = f"{100 * trained_right / trained_count:.1f} % of {trained_count:,}" if trained_count else "–"
        lines.append(f"| {relation} | {trained} | {100 * right / count:.1f} % of {count} |")
    return "\n".join(lines)


def write_into_card(path, text):
    begin, end = "<!-- evaluation: written by evaluate.py -->", "<!-- end of evaluation -->"
    card = open(path).read()
    before, rest = card.split(begin)
    after = rest.split(end)[1]
    with open(path, "w") as file:
        file.write(f"{before}{begin}\n{text}\n{end}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder with config.json, model.safetensors, tokenizer.model")
    parser.add_argument("--twin", help="folder of the dense twin, measured beside it")
    parser.add_argument("--pair", action="store_true", help="ask the pair's facts, not the demo's")
    parser.add_argument("--sample", type=int, default=0, help="at most so many prompts of a kind; 0: all")
    parser.add_argument("--control_sample", type=int, default=600, help="about so many prompts of a kind with the memory off or its rows shuffled")
    parser.add_argument("--ask", help="complete this prompt and stop (\\n for a line break)")
    parser.add_argument("--card", action="store_true", help="write the tables into the checkpoint's README.md and renew its SHA256SUMS")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.checkpoint = args.checkpoint.rstrip("/")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model = PlainModel(args.checkpoint)
    if args.ask:
        prompt = args.ask.replace("\\n", "\n")
        print("memory on: ", model.complete([prompt])[0])
        print("memory off:", model.complete([prompt], memory_on=False)[0])
        return
    sets = make_data.pair_questions(args.sample) if args.pair else make_data.demo_questions(args.sample)
    few = {name: questions[::max(1, len(questions) // args.control_sample)] for name, questions in sets.items()}
    columns = {"memory on": measure(model, sets, True)}
    if model.memory_layers:
        columns["memory off"] = measure(model, few, False)
        columns["rows shuffled"] = measure(PlainModel(args.checkpoint).shuffle_rows(), few, True)
    if args.twin:
        columns["dense twin"] = measure(PlainModel(args.twin), sets, True)
    text = as_table(columns)
    if not args.pair:
        text += "\n\n" + relation_table(columns["memory on"], "trained statements", "held-out questions, Q/A")
    print(text)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(columns, file, indent=1)
    if args.card:
        write_into_card(os.path.join(args.checkpoint, "README.md"), text)
        write_sums(args.checkpoint)


if __name__ == "__main__":
    main()
