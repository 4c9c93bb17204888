"""Known holes in what is installed, asked of the package index (`make audit`).

Exit code 1: one was found. An index that has no advisories, or cannot be reached, is no reason to
fail: then it says how many packages were not checked.
"""

from __future__ import annotations

import json
import subprocess
import sys

TIMEOUT_S = 120


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--format=json"]
    command += ["--progress-spinner=off", "--timeout=5"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        found = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return _unchecked(f"no answer within {TIMEOUT_S} s")
    except (ValueError, KeyError):
        lines = done.stderr.strip().splitlines() or ["no output"]
        return _unchecked(lines[-1])
    skipped = [package for package in found if "skip_reason" in package]
    holes = [(package, hole) for package in found for hole in package.get("vulns", ())]
    for package, hole in holes:
        fixed = ", ".join(hole["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {hole['id']}, fixed in {fixed}")
    print(f"{len(found) - len(skipped)} packages checked, {len(holes)} known holes")
    if skipped:
        _unchecked(f"the index has no advisories for {len(skipped)} packages")
    return bool(holes)


def _unchecked(why: str) -> int:
    print(f"not checked: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
