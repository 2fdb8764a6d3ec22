#!/usr/bin/env python3
"""Runs the converter's tests: clients/python/tests/run.py [original hostile writer families mutations end_to_end]

Ends with 77 where numpy is missing, which ctest shows as skipped."""

import os
import pathlib
import subprocess
import sys
import unittest

HERE = pathlib.Path(__file__).resolve().parent
DEBIAN = "/usr/bin/python3"  # has the package python3-numpy, whichever Python comes first in PATH


def has_numpy(python):
    return subprocess.run([python, "-c", "import numpy"], capture_output=True).returncode == 0


if __name__ == "__main__":
    if not has_numpy(sys.executable):
        if not (os.path.exists(DEBIAN) and has_numpy(DEBIAN)):
            print("skipped: numpy is not installed")
            sys.exit(77)
        os.execv(DEBIAN, [DEBIAN, *sys.argv])
    sys.path.insert(0, str(HERE))
    names = sys.argv[1:] or sorted(path.stem[len("test_") :] for path in HERE.glob("test_*.py"))
    suite = unittest.defaultTestLoader.loadTestsFromNames([f"test_{name}" for name in names])
    sys.exit(0 if unittest.TextTestRunner(verbosity=1).run(suite).wasSuccessful() else 1)
