"""Writes checkpoints of given shape with random weights, for benchmarks: only the shapes count, but all values are finite and of a
size that a model's are. Standard library only."""

import json
import random
import sys

CHUNK = 64 << 20
WIDTHS = {"BF16": 2, "F32": 4}


def serving_config():
    """Large enough that arithmetic, not the engine, decides what a step takes; small enough for a test machine."""
    return {"model_type": "memory_llama", "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 512, "max_seqlen": 8192,
            "ffn_dim": 1536, "weight_tying": True, "tokenizer": "bytes",
            "productkey_args": {"is_enabled": True, "layers": "2,5", "mem_n_keys": 512, "mem_heads": 4, "mem_knn": 32,
                                "mem_k_dim": 256, "mem_v_dim": 512}}


def tensors_of(config, table_dtype):
    """Names, types and shapes, in file order. Memory layers are Memory+ and share the first one's table."""
    dim, ffn, vocab = config["dim"], config["ffn_dim"], config["vocab_size"]
    memory = config["productkey_args"]
    memory_layers = [int(layer) for layer in memory["layers"].split(",")]
    query, rows = memory["mem_heads"] * memory["mem_k_dim"], memory["mem_n_keys"] ** 2
    kv = dim // config["n_heads"] * config.get("n_kv_heads", config["n_heads"])
    yield "tok_embeddings.weight", "BF16", [vocab, dim]
    yield "norm.weight", "BF16", [dim]
    for layer in range(config["n_layers"]):
        prefix = f"layers.{layer}."
        yield prefix + "attention_norm.weight", "BF16", [dim]
        yield prefix + "ffn_norm.weight", "BF16", [dim]
        for part, out in (("wq", dim), ("wk", kv), ("wv", kv), ("wo", dim)):
            yield f"{prefix}attention.{part}.weight", "BF16", [out, dim]
        prefix += "feed_forward."
        if layer not in memory_layers:
            yield prefix + "w1.weight", "BF16", [ffn, dim]
            yield prefix + "w3.weight", "BF16", [ffn, dim]
            yield prefix + "w2.weight", "BF16", [dim, ffn]
            continue
        yield prefix + "query_proj.query_mlps.0.weight", "BF16", [query, dim]
        yield prefix + "query_proj.query_mlps.0.bias", "BF16", [query]
        yield prefix + "keys", "BF16", [2 * memory["mem_heads"] * memory["mem_n_keys"], memory["mem_k_dim"] // 2]
        yield prefix + "swilu_projection.weight", "BF16", [memory["mem_v_dim"], dim]
        yield prefix + "swilu_projection.bias", "BF16", [memory["mem_v_dim"]]
        yield prefix + "value_proj.weight", "BF16", [dim, memory["mem_v_dim"]]
        yield prefix + "value_proj.bias", "BF16", [dim]
        if layer == memory_layers[0]:
            yield prefix + "values.weight", table_dtype, [rows, memory["mem_v_dim"]]


def random_block(width):
    """Random signs and mantissas under the exponents of 2^-5 and 2^-4, in bf16 and f32 alike."""
    block = bytearray(random.Random(1).randbytes(CHUNK))
    block[width - 1 :: width] = bytes(block[width - 1 :: width]).translate(bytes(0x3D | (byte & 0x80) for byte in range(256)))
    return block


def make_checkpoint(folder, config, table_dtype="BF16"):
    """Writes it if it is not there. Returns the path of its tensors."""
    header, end = {}, 0
    for name, dtype, shape in tensors_of(config, table_dtype):
        count = WIDTHS[dtype]
        for extent in shape:
            count *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    blob = json.dumps(header).encode()
    blob += b" " * (-len(blob) % 8)
    path = folder / "model.safetensors"
    if path.exists() and path.stat().st_size == 8 + len(blob) + end and (folder / "config.json").read_text() == json.dumps(config):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    print(f"making {path}, {end / 2**30:.2f} GiB", file=sys.stderr)
    blocks = {dtype: random_block(width) for dtype, width in WIDTHS.items() if dtype in ("BF16", table_dtype)}
    one = {"BF16": b"\x80\x3f", "F32": b"\x00\x00\x80\x3f"}
    with open(path, "wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        for index, (name, tensor) in enumerate(header.items()):
            left = tensor["data_offsets"][1] - tensor["data_offsets"][0]
            if name.endswith("norm.weight"):
                file.write(one[tensor["dtype"]] * (left // WIDTHS[tensor["dtype"]]))
                continue
            at = index * 4096  # equal tensors in several layers would be a special case
            while left > 0:
                file.write(blocks[tensor["dtype"]][at : at + min(left, CHUNK - at)])
                left -= min(left, CHUNK - at)
                at = 0
    (folder / "config.json").write_text(json.dumps(config))
    return path


if __name__ == "__main__":
    import pathlib

    if len(sys.argv) != 2:
        raise SystemExit("synthetic_checkpoint.py FOLDER: writes the checkpoint that serving_bench.py serves there")
    print(make_checkpoint(pathlib.Path(sys.argv[1]), serving_config()))
