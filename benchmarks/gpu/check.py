"""Do the tests that need a GPU pass here? Run by ``python -m benchmarks.gpu check``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import common
from simclr.system import usable_cores


def main() -> int:
    """Run the tests; return their exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="after which the tests are broken off")
    parser.add_argument("--quick", action="store_true", help="a few tests only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        tests = ["tests/test_gpu.py", "-k", "losses_and_gradients"] if options.quick else ["-m", "gpu", "tests"]
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        words += [f"--junitxml={report}", *tests]
        if importlib.util.find_spec("xdist") is not None and not options.quick:
            words += ["-n", str(min(8, usable_cores())), "--dist", "load"]  # they mostly wait for processes to start
        # Here a part of the suite is run, in which what is required of the whole may be missing
        env = {name: value for name, value in os.environ.items() if not name.startswith("REQUIRE_")}
        with subprocess.Popen(words, cwd=common.ROOT, env=env) as process:
            try:
                status = process.wait(60 * options.minutes)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # pytest then writes its report
                status = process.wait(20)
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    summary = ["tests: " + ", ".join(f"{value} {name}" for name, value in counts.items())]
    for case in suite.iter("testcase"):
        for failure in (*case.iter("failure"), *case.iter("error")):
            summary.append(f"failed: {case.get('classname')}::{case.get('name')}: {failure.get('message', '')[:300]}")
    common.write_result(options.output, {"summary": summary, "tests": counts})
    print(*summary, sep="\n")
    return int(bool(status))


if __name__ == "__main__":
    sys.exit(main())
