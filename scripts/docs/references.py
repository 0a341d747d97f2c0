"""Generates the parts of the documentation that come from the code.

python scripts/docs/references.py            write the pages of docs/reference/ and the schemas of docs/schemas/
python scripts/docs/references.py --check    list the files that are out of date, and exit with 1 if there are any
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import configuration  # noqa: E402
import schemas  # noqa: E402

NOTE = "<!-- Made by scripts/docs/references.py from the code: do not edit. -->\n\n"


def main() -> int:
    """Write or check the files. Returns the exit code."""
    docs = ROOT / "docs"
    wanted = {
        docs / "reference/configuration.md": NOTE + configuration.page(),
        docs / "reference/command-line.md": NOTE + command_line.page(),
        **{docs / "schemas" / f"{name}.json": text for name, text in schemas.texts().items()},
    }
    existing = {path for folder in ("reference", "schemas") for path in (docs / folder).glob("*") if path.is_file()}
    stale = [path for path, text in wanted.items() if path not in existing or path.read_text() != text]
    stale += sorted(existing - set(wanted))
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run .venv/bin/python scripts/docs/references.py")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        if path in wanted:
            path.write_text(wanted[path])
        else:
            path.unlink()
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
