"""The tables of ``qat2int8 bench``, as it prints them, for the documents."""

from __future__ import annotations

import argparse
import subprocess
import sys

import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--style", default="layer-inputs")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    words = ["bench", "--markdown", "--style", options.style, "--rounds", str(options.rounds)]
    done = subprocess.run(
        [sys.executable, "-m", "qat2int8", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout)
    if done.returncode:
        raise SystemExit(done.returncode)
    if options.write:
        report.write(report.DOCS / "benchmarks.md", "bench", done.stdout.strip())


if __name__ == "__main__":
    main()
