#!/usr/bin/env bash
# Compares the installed packages with known vulnerabilities: scripts/audit.sh
#
# Status 0: none is known; 1: some are, or some packages are unknown to the service; 3: the service, on the network, knows
# nothing of any package or is not reached, so that nothing was compared.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh

stage "audit: pip-audit"
# In an environment of its own, so that the audit's packages are not audited.
[ -x .cache/audit/bin/pip-audit ] || { python3 -m venv .cache/audit && quietly .cache/audit/bin/python -m pip install pip-audit; }
# Local versions such as 2.14.1+cu130 are looked up without what follows +.
"${VENV:-.venv}/bin/python" -m pip freeze --exclude-editable | sed -nE 's/^([A-Za-z0-9_.-]+==[^+ ]+).*/\1/p' > .cache/audit/packages.txt
rm -f .cache/audit/found.json
.cache/audit/bin/pip-audit --no-deps --disable-pip --progress-spinner off --timeout 10 --format json \
    --output .cache/audit/found.json --requirement .cache/audit/packages.txt > .cache/audit/log.txt 2>&1 || true
exec .cache/audit/bin/python - << 'PYTHON'
import json, pathlib, sys

folder = pathlib.Path(".cache/audit")
try:
    packages = json.loads((folder / "found.json").read_text())["dependencies"]
except (OSError, ValueError):
    packages = []
looked_up = [package for package in packages if "skip_reason" not in package]
if not looked_up:
    print((folder / "log.txt").read_text()[-500:])
    print("NOT AUDITED: the service for known vulnerabilities was not reached, or knows none of the packages")
    sys.exit(3)
for package in packages:
    for vulnerability in package.get("vulns", []):
        print(f"{package['name']} {package['version']}: {vulnerability['id']}, mended in {vulnerability['fix_versions']}")
    if "skip_reason" in package:
        print(package["skip_reason"])
bad = len(packages) - sum("vulns" in package and not package["vulns"] for package in packages)
print(f"{len(looked_up)} packages looked up, {bad} with known vulnerabilities or unknown")
sys.exit(bad > 0)
PYTHON
