"""Print the runtime dependencies of a pyproject.toml, one a line: what the image installs."""

import sys
from pathlib import Path

import tomllib

for requirement in tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]["dependencies"]:
    print(requirement)
