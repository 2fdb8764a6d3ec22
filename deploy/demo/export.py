"""Writes a trained model as a checkpoint folder: config.json, model.safetensors (bfloat16), tokenizer.model, generation_config.json, SHA256SUMS."""
import hashlib
import json
import os
import shutil
import struct

import torch

HEADER_ALIGNMENT = 64  # the tensors begin at a multiple of this


def safetensors_bytes(tensors):
    header, chunks, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in tensors.items():
        chunk = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(chunk)]}
        chunks.append(chunk)
        offset += len(chunk)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text + b"".join(chunks)


def write(folder, name, content):
    with open(os.path.join(folder, name), "wb") as file:
        file.write(content)


def write_sums(folder):
    names = sorted(name for name in os.listdir(folder) if name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(open(os.path.join(folder, name), 'rb').read()).hexdigest()}  {name}\n" for name in names]
    write(folder, "SHA256SUMS", "".join(lines).encode())


def swap_in(partial, folder):
    """Puts the finished folder in the old one's place, keeping files that only the old one has (model card, licences)."""
    old = folder + ".old"
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            if not os.path.exists(os.path.join(partial, name)):
                shutil.copy2(os.path.join(folder, name), os.path.join(partial, name))
    write_sums(partial)
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def export_checkpoint(model, tokenizer, folder):
    partial = folder.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    write(partial, "config.json", (json.dumps(model.config.as_checkpoint_config(), indent=2) + "\n").encode())
    write(partial, "model.safetensors", safetensors_bytes(model.checkpoint_tensors()))
    write(partial, "tokenizer.model", tokenizer.serialized_model_proto())
    generation = {"max_new_tokens": 32, "temperature": 0, "eos_token_id": tokenizer.eos_id(), "bos_token_id": tokenizer.bos_id()}
    write(partial, "generation_config.json", (json.dumps(generation, indent=2) + "\n").encode())
    swap_in(partial, folder.rstrip("/"))
