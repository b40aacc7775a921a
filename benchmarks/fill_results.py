"""Copy the main tables of benchmarks/results/*.md into README.md and docs/*.md.

A page says where a table goes with a pair of comments, each on a line of its own::

    <!-- results:encode_speed -->
    <!-- /results -->

Between them this script writes the first table of benchmarks/results/encode_speed.md and a link to
that file, which names the machine and the versions and holds all values. Where there is no such
file yet, the place stays empty. tests/test_docs.py holds pages and results together.

Run: python3 benchmarks/fill_results.py [--check]   (standard library only)
"""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(
    r"^<!-- results:(?P<name>[\w-]+) -->\n(?P<body>.*?)^<!-- /results -->$",
    flags=re.DOTALL | re.MULTILINE,
)
# Whatever looks like one of the two comments, well placed or not.
ANY_MARKER = re.compile(r"<!--\s*/?results\b")


class ResultsError(Exception):
    """A marker or a results file is not as it must be; the message says which."""


def find_pages(root: Path) -> list[Path]:
    """Return the pages that may hold results."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def read_table(path: Path) -> str:
    """Return the first table of a results file: its figures and their bars."""
    rows: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            rows.append(line.rstrip())
        elif rows:
            break
    if not rows:
        raise ResultsError(f"{path.name} holds no table (lines that start with '|').")
    return "\n".join(rows)


def render(name: str, page: Path, root: Path) -> str:
    """Return what stands between the two comments of a page; "" where there is no such result."""
    results = root / "benchmarks" / "results" / f"{name}.md"
    if not results.is_file():
        return ""
    link = Path(os.path.relpath(results, page.parent)).as_posix()
    source = f"Machine, versions and all values: [{results.stem}]({link})."
    # Empty lines around the table: without them, comments and table run together.
    return f"\n{read_table(results)}\n\n{source}\n\n"


def fill(text: str, page: Path, root: Path) -> str:
    """Return the text of a page with every place filled anew."""
    if len(ANY_MARKER.findall(text)) != 2 * len(MARKER.findall(text)) or any(
        ANY_MARKER.search(match["body"]) for match in MARKER.finditer(text)
    ):
        raise ResultsError(
            f"{page.name}: the results comments do not pair up. Each '<!-- results:NAME -->' needs "
            "one '<!-- /results -->' after it, each on a line of its own."
        )

    def replace(match: re.Match[str]) -> str:
        body = render(match["name"], page, root)
        return f"<!-- results:{match['name']} -->\n{body}<!-- /results -->"

    return MARKER.sub(replace, text)


def main(arguments: list[str] | None = None) -> int:
    """Fill all pages, or with --check only say which would change; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    options = parser.parse_args(arguments)
    stale = []
    for page in find_pages(ROOT):
        text = page.read_text(encoding="utf-8")
        try:
            filled = fill(text, page, ROOT)
        except ResultsError as error:
            print(f"fill_results.py: {error}", file=sys.stderr)
            return 1
        if filled != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not options.check:
                page.write_text(filled, encoding="utf-8")
    verb = "would change" if options.check else "changed"
    print(f"{verb}: {', '.join(stale) or 'nothing'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
