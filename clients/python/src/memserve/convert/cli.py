"""memserve-convert SOURCE DEST: writes a checkpoint that memserve serves from one in another form."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import List, Optional

from memserve import __version__
from memserve.convert import detect, writer
from memserve.convert.errors import ConvertError
from memserve.convert.families import native
from memserve.convert.progress import Progress, size_text

DESCRIPTION = """\
Writes the checkpoint SOURCE as a folder DEST that memserve serves. SOURCE may be

  a folder of the original memory-layer implementation (params.json with consolidated.pth or .metadata and *.distcp)
  a Hugging Face folder (llama, mistral, qwen2, qwen3; safetensors or pytorch_model*.bin)
  a .gguf file (llama, qwen2, qwen3; needs the gguf package for quantised ones)
  a folder or file of sparse-memory-lm (rest.pt with values_q4.bin, or model.pt)
  a folder with PEER-pytorch layers
  a folder that memserve serves already, to change its types

An interrupted conversion goes on when the same command is given again.
"""


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*(|[kKmMgG](?:i?[bB])?)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write for example 4GiB")
    unit = match.group(2)[:1].lower()
    value = int(match.group(1)) << {"": 0, "k": 10, "m": 20, "g": 30}[unit]
    if value < 1:
        raise argparse.ArgumentTypeError("a shard needs at least one byte")
    return value


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="memserve-convert", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("source", type=Path, metavar="SOURCE")
    result.add_argument("dest", type=Path, metavar="DEST", help="a new or empty folder, or one to go on with")
    result.add_argument(
        "--dtype",
        choices=("keep", "f32", "bf16", "f16"),
        default="keep",
        help="type of the weights; keep (default): as they are, quantised GGUF blocks as f32",
    )
    result.add_argument(
        "--table_dtype",
        choices=("keep", "f32", "bf16", "int8", "int4"),
        default="keep",
        help="type of the value tables; int8 and int4 with a scale for each row",
    )
    result.add_argument(
        "--max_shard_bytes",
        type=_bytes,
        default=4 << 30,
        metavar="SIZE",
        help="a new file is begun beyond this (default 4GiB); a larger tensor has a file of its own",
    )
    result.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.model, tokenizer.json, or a folder with them, instead of the source's own",
    )
    result.add_argument("--threads", type=int, default=0, metavar="N", help="default: one for each core, at most 4")
    result.add_argument("--quiet", action="store_true", help="print errors only")
    result.add_argument("--version", action="version", version=f"memserve-convert {__version__}")
    return result


def convert(source: Path, dest: Path, options: writer.Options, tokenizer: Optional[Path] = None) -> writer.Report:
    began = time.monotonic()
    model = detect.open_model(source, tokenizer)
    if options.table_dtype != "keep":
        native.widen(model)
    if dest.resolve() == model.source.folder.resolve():
        raise ConvertError(f"{dest} is the source itself; give another folder")
    outputs = writer.plan(model, options)
    total = sum(output.source.nbytes for output in outputs)
    progress = Progress(total, quiet=options.quiet)
    progress.line(f"{source}: {model.family}, {len(model.tensors)} tensors, {size_text(total)}")
    for note in model.notes:
        progress.line(f"note: {note}")
    report = writer.Writer(model, dest, options, progress).write()
    for name, error in report.errors.items():
        progress.line(
            f"{name}: rows restored with a relative RMS error of {100 * error.relative_rms:.3f} %, "
            f"at most {error.largest:.3g} off (largest value {error.reach:.3g})"
        )
    for index, (name, count) in enumerate(report.nonfinite.items()):
        if index == 5:
            progress.line(f"warning: {len(report.nonfinite) - 5} more tensors have values that are NaN or infinite")
            break
        progress.line(f"warning: {name} has {count} values that are NaN or infinite")
    seconds = time.monotonic() - began
    written = sum(tensor.nbytes for output in outputs for tensor in output.group)
    progress.line(f"{dest}: {size_text(written)} in {seconds:.1f} s ({size_text(total / max(seconds, 1e-6))}/s of the source)")
    return report


def main(argv: Optional[List[str]] = None) -> int:
    arguments = parser().parse_args(argv)
    options = writer.Options(arguments.dtype, arguments.table_dtype, arguments.max_shard_bytes, arguments.threads, arguments.quiet)
    try:
        convert(arguments.source, arguments.dest, options, arguments.tokenizer)
    except ConvertError as error:
        print(f"memserve-convert: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"memserve-convert: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except MemoryError:
        print("memserve-convert: there is not enough memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmemserve-convert: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
