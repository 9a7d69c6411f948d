"""How long the front door takes: every command's help, in fresh processes.

    python benchmarks/startup.py

Writes `benchmarks/results/startup.json`: median seconds of five runs, and of a bare interpreter.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mmforget.cli.main import COMMANDS

CALLS = [["--help"], ["list", "methods"], *([name, "--help"] for name in COMMANDS)]


def seconds(*command: str) -> float:
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken), 3)


def main() -> None:
    results = {"python -c pass": seconds(sys.executable, "-c", "pass")}
    for call in CALLS:
        results[f"mmforget {' '.join(call)}"] = seconds(sys.executable, "-m", "mmforget", *call)
    text = json.dumps(results, indent=1)
    (Path(__file__).parent / "results" / "startup.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
