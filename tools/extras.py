"""Prints the requirements of pyproject.toml's extras, for pip: `python tools/extras.py train dev`."""

import re
import sys
from pathlib import Path

text = Path(__file__).parent.parent.joinpath("pyproject.toml").read_text()
section = text.split("[project.optional-dependencies]", 1)[1].split("\n[", 1)[0]
for extra in sys.argv[1:]:
    listed = re.search(rf"^{extra} = \[(.*?)\]", section, re.S | re.M)
    if listed is None:
        sys.exit(f"pyproject.toml has no extra {extra!r}")
    for requirement in re.findall(r'"([^"]+)"', listed[1]):
        name, _, marker = requirement.partition(";")  # markers: only python_version < 'x.y' occurs
        below = re.search(r"python_version\s*<\s*'(\d+)\.(\d+)'", marker)
        if below is None or sys.version_info[:2] < (int(below[1]), int(below[2])):
            print(name.strip())
