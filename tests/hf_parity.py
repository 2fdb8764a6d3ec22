#!/usr/bin/env python3
"""Compares the server with transformers on Hugging Face folders: log-probabilities of prompts and greedy tokens.

  tests/hf_parity.py FOLDER…  [--prompts 20] [--tokens 128] [--memserve PATH]

Needs torch, transformers and grpcio with grpcio-tools (exit status 77 and a word where they are missing, so that ctest skips). Starts the
server on each folder with float32 weights and activations, and transformers on the CPU in float32 with eager attention. Prompts are texts
where the folder has a tokenizer that transformers reads, else random token ids. For each prompt: the log-probability of every token of it
(Score) must be within 2e-4, and the greedy tokens must be equal; where they part, the two logits that were confused are shown, and a
difference below 1e-3 between them is a tie that rounding decides.
"""

import argparse
import importlib
import pathlib
import random
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXTS = [
    "The capital of France is", "Once upon a time, in a small village by the sea,", "def fibonacci(n):\n    ", "Water boils at",
    "The three primary colours are", "In 1969, the first humans", "Dear Sir or Madam,\n\nI am writing to", "The derivative of x^2 is",
    "My favourite recipe for bread starts with", "Q: What is the largest planet?\nA:", "Photosynthesis is the process by which",
    "She opened the door and saw", "The stock market fell today after", "import numpy as np\n\ndef softmax(x):\n", "Le chat est assis sur",
    "A list of European countries: France, Germany,", "The meaning of life, according to", "To be or not to be, that is",
    "Once the rain had stopped, the children", "Machine learning models are trained by",
]
LOGPROB_TOLERANCE = 2e-4
TIE = 1e-3


def need(*modules):
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"skipped: {error}", file=sys.stderr)
            sys.exit(77)


def stubs(folder):
    """The generated gRPC modules of our proto."""
    from grpc_tools import protoc
    import grpc_tools
    include = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    protos = [str(path) for path in (ROOT / "proto").rglob("*.proto")]
    if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", f"--python_out={folder}", f"--grpc_python_out={folder}", *protos]):
        sys.exit("hf_parity: protoc failed")
    sys.path.insert(0, str(folder))
    return importlib.import_module("memserve.v1.inference_pb2"), importlib.import_module("memserve.v1.inference_pb2_grpc")


class Server:
    def __init__(self, program, folder):
        self.process = subprocess.Popen([program, f"--checkpoint={folder}", "--grpc_address=127.0.0.1:0", "--weight_dtype=f32",
                                         "--activation_dtype=f32", "--kv_dtype=f32"], stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if "ready:" in line:
                self.port = int(line.rsplit("port ", 1)[1])
                return
        sys.exit(f"hf_parity: the server ended with {self.process.wait()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.stderr.read()
        self.process.wait()


def prompts_of(folder, model, count):
    import transformers
    if any((pathlib.Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return [tokenizer(TEXTS[i % len(TEXTS)] + " " * (i // len(TEXTS)))["input_ids"] for i in range(count)]
    numbers = random.Random(5)
    return [[numbers.randrange(model.config.vocab_size) for _ in range(numbers.randrange(5, 60))] for _ in range(count)]


def check(folder, args, pb2, pb2_grpc):
    import grpc
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    worst, equal, ties, failures = 0.0, 0, 0, []
    with Server(args.memserve, folder) as server:
        stub = pb2_grpc.InferenceStub(grpc.insecure_channel(f"127.0.0.1:{server.port}"))
        for number, tokens in enumerate(prompts_of(folder, model, args.prompts)):
            request = pb2.GenerateRequest()
            request.tokens.ids.extend(tokens)
            request.sampling.temperature = 0
            request.stop.max_tokens = args.tokens
            request.stop.ignore_eos = True
            ours = [token for message in stub.Generate(request) for token in message.delta.token_ids]
            with torch.no_grad():
                logits = model(torch.tensor([tokens + ours])).logits[0].float()
            theirs = logits[len(tokens) - 1 : -1].argmax(-1).tolist()
            parted = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
            if parted is None and len(ours) == args.tokens:
                equal += 1
            elif parted is None:
                failures.append(f"prompt {number}: {len(ours)} tokens instead of {args.tokens}")
            else:
                row = logits[len(tokens) - 1 + parted]
                gap = float(row[theirs[parted]] - row[ours[parted]])
                ties += gap < TIE
                if gap >= TIE:
                    failures.append(f"prompt {number}: token {parted} is {ours[parted]}, not {theirs[parted]}, whose logit is {gap:.2g} higher")
            if len(tokens) < 2:
                continue
            score = pb2.ScoreRequest()
            score.tokens.ids.extend(tokens[:1])
            score.continuations.add().tokens.ids.extend(tokens[1:])
            found = stub.Score(score).scores[0].token_logprobs
            expected = torch.log_softmax(logits[: len(tokens) - 1].double(), -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
            worst = max(worst, *(abs(a - b) for a, b in zip(found, expected)))
    if worst > LOGPROB_TOLERANCE:
        failures.append(f"log-probabilities differ by up to {worst:.2g}")
    print(f"{folder}: {args.prompts} prompts, {equal} with {args.tokens} equal greedy tokens, {ties} parted at a tie; "
          f"largest difference of a log-probability {worst:.1e}")
    for failure in failures:
        print(f"  {failure}")
    return not failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--memserve", default=str(ROOT / "build/server/memserve"))
    args = parser.parse_args()
    need("torch", "transformers", "grpc", "grpc_tools")
    with tempfile.TemporaryDirectory() as folder:
        modules = stubs(folder)
        sys.exit(0 if all([check(path, args, *modules) for path in args.folders]) else 1)


if __name__ == "__main__":
    main()
