"""Print the lowest versions of the dependencies that the project claims to work with, as pip requirements."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def lowest(requirement: str) -> str:
    """``name==1.2`` for ``name>=1.2,<2``."""
    name, separator, rest = requirement.partition(">=")
    if not separator:
        raise ValueError(f"'{requirement}' has no lower bound")
    return f"{name}=={rest.split(',')[0]}"


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    sys.stdout.writelines(f"{lowest(requirement)}\n" for requirement in project["dependencies"])
