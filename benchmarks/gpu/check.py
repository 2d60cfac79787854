"""Is this machine ready, and do the tests that need a GPU pass here? Run by ``python -m benchmarks.gpu check``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import common


def main() -> int:
    """Run the doctor and the tests; return 0 if both found nothing wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a few tests only")
    options = parser.parse_args()
    doctor = subprocess.run(
        [sys.executable, "-m", "simclr.run.doctor", "--data", str(options.data)], cwd=common.ROOT, check=False
    ).returncode
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        tests = ["tests/test_gpu.py", "-k", "losses"] if options.quick else ["-m", "gpu", "tests"]
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        # Here a part of the suite is run, in which what is required of the whole may be missing
        env = {name: value for name, value in os.environ.items() if not name.startswith("REQUIRE_")}
        status = subprocess.run(words, cwd=common.ROOT, env=env, check=False).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    line = f"doctor: status {doctor}; tests: " + ", ".join(f"{value} {name}" for name, value in counts.items())
    common.write_result(options.output, {"summary": [line], "doctor_status": doctor, "tests": counts})
    print(line)
    return int(bool(doctor or status))


if __name__ == "__main__":
    sys.exit(main())
