#!/usr/bin/env python3
"""Reads the #include lines of all rooms and reports every arrow that points the wrong way.

  tests/include_direction_test.py [--root DIR]     checks the tree; prints FILE:LINE: what is wrong, exits 1 if anything is
  tests/include_direction_test.py --self_test      plants violations in a scratch tree and proves that each is reported
"""

import argparse
import pathlib
import posixpath
import re
import sys
import tempfile

# Whom a room may include besides itself. The engine is reached by its headers alone, so the server never sees kernels.
ARROWS = {
    "proto": set(),
    "server": {"proto", "engine"},
    "engine": {"kernels"},
    "kernels": set(),
    "clients": {"proto"},
    "tests": {"proto", "server", "engine", "kernels", "clients"},
}

# Libraries that belong to some folders: what an include of one looks like, who may have it (tests always may).
LIBRARIES = [
    ("gRPC", re.compile(r"^(grpc|grpcpp|grpc\+\+)/|\.grpc\.pb\.h$"), ("server/", "clients/")),
    ("CUDA", re.compile(r"^(.*/)?(cuda|cublas|curand|cudnn|cusparse|cusolver|cufft|nvml|nvrtc|nvtx|nccl|device_launch|"
                        r"cooperative_groups|mma\.h|sm_\d)[^/]*$|^(cuda|cub|thrust|cutlass)/"), ("kernels/cuda/",)),
]  # fmt: skip

SOURCES = {".h", ".hpp", ".inc", ".c", ".cc", ".cpp", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include(?:_next)?\s*(?:"([^"]+)"|<([^>]+)>)')


def room_of(root, file, included):
    """The room that an include of `file` (both relative to root) leads to, or None if it is no file of ours."""
    included = posixpath.normpath(included)
    first = included.split("/")[0]
    if first in ARROWS:
        return first
    if included.startswith("memserve/v1/"):  # generated from proto/memserve/v1
        return "proto"
    beside = posixpath.normpath(posixpath.join(posixpath.dirname(file), included))
    first = beside.split("/")[0]
    if first in ARROWS and (root / beside).is_file():
        return first
    return None


def violations(root):
    """Yields (file, line number, what is wrong)."""
    files = sorted(path for room in ARROWS for path in (root / room).rglob("*") if path.suffix in SOURCES)
    for path in files:
        file = path.relative_to(root).as_posix()
        room = file.split("/")[0]
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            included = match[1] or match[2]
            target = room_of(root, file, included)
            if target is not None and target != room and target not in ARROWS[room]:
                may = ", ".join(sorted(ARROWS[room])) or "no other room"
                yield file, number, f'{room} includes "{included}" of {target}; it may include {may}'
            if room == "tests":
                continue
            for library, pattern, allowed in LIBRARIES:
                named = included if target in (None, "proto") else ""
                if pattern.search(named) and not file.startswith(allowed):
                    yield file, number, f'"{included}" is {library}, which is for {", ".join(allowed)} alone'


def check(root):
    found = list(violations(root))
    for file, number, what in found:
        print(f"{file}:{number}: {what}")
    files = sum(1 for room in ARROWS for path in (root / room).rglob("*") if path.suffix in SOURCES)
    print(f"{files} files read, {len(found)} includes point the wrong way")
    if files == 0:
        print(f"{root} has no rooms")
        return 1
    return 1 if found else 0


# file, include line, whether it must be reported
PLANTED = [
    ("server/a.cc", '#include "engine/engine.h"', False),
    ("server/a.cc", '#include "memserve/v1/inference.grpc.pb.h"', False),
    ("server/a.cc", "#include <grpcpp/grpcpp.h>", False),
    ("server/a.cc", '#include "kernels/tensor.h"', True),
    ("server/a.cc", '#include "../kernels/tensor.h"', True),
    ("server/a.cc", '#include "clients/client.h"', True),
    ("server/a.cc", '#include "tests/support/fake.h"', True),
    ("server/a.cc", '// #include "kernels/tensor.h"', False),
    ("engine/a.cc", '#include "kernels/tensor.h"', False),
    ("engine/a.cc", '#include "engine/model/config.h"', False),
    ("engine/a.cc", '#include "absl/status/status.h"', False),
    ("engine/a.cc", '#include "server/options.h"', True),
    ("engine/a.cc", '#include "proto/convert.h"', True),
    ("engine/a.cc", '#include "memserve/v1/inference.pb.h"', True),
    ("engine/a.cc", '  #  include <grpcpp/grpcpp.h>', True),
    ("engine/a.cc", "#include <cuda_runtime.h>", True),
    ("engine/model/a.cc", '#include "../../server/options.h"', True),
    ("engine/a.cc", '#include "tests/support/fake.h"', True),
    ("kernels/a.h", '#include "kernels/cuda/launch.h"', False),
    ("kernels/a.h", '#include "engine/engine.h"', True),
    ("kernels/cpu/a.cc", "#include <cuda_bf16.h>", True),
    ("kernels/cpu/a.cc", "#include <cublas_v2.h>", True),
    ("kernels/cpu/a.cc", '#include "nccl.h"', True),
    ("kernels/cpu/a.cc", '#include "hwy/highway.h"', False),
    ("kernels/cuda/a.cu", "#include <cuda_runtime.h>", False),
    ("kernels/cuda/a.cu", "#include <nccl.h>", False),
    ("kernels/cuda/a.cu", "#include <grpc/grpc.h>", True),
    ("clients/a.cc", '#include "memserve/v1/inference.grpc.pb.h"', False),
    ("clients/a.cc", '#include "engine/request.h"', True),
    ("clients/a.cc", '#include "kernels/tensor.h"', True),
    ("proto/a.h", '#include "engine/request.h"', True),
    ("tests/engine/a_test.cc", '#include "kernels/tensor.h"', False),
    ("tests/engine/a_test.cc", '#include "tests/support/fake.h"', False),
    ("tests/simt/a_test.cc", '#include "kernels/cuda/launch.h"', False),
]


def self_test():
    wrong = 0
    for file, line, expected in PLANTED:
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for path in ("kernels/tensor.h", "server/options.h", file):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text("#pragma once\n")
            (root / file).write_text(f"#pragma once\n{line}\n")
            found = list(violations(root))
        reported = [(name, number) for name, number, _ in found] == [(file, 2)]
        if reported != expected or (found and not expected):
            wrong += 1
            print(f"{file}: {line}: {'must' if expected else 'must not'} be reported; got {found}")
    print(f"{len(PLANTED)} includes planted, {wrong} judged wrongly")
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    parser.add_argument("--self_test", action="store_true")
    arguments = parser.parse_args()
    sys.exit(self_test() if arguments.self_test else check(arguments.root))


if __name__ == "__main__":
    main()
