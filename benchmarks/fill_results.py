"""Copy the main tables of benchmarks/results/*.md into README.md and docs/*.md; list them all.

A page says where a table goes with a pair of comments, each on a line of its own::

    <!-- results:encode_speed -->
    <!-- /results -->

Between them this script writes the first table of benchmarks/results/encode_speed.md and a link to
that file, which names the machine and the versions and holds all values. Where there is no such
file yet, the place stays empty. On docs/benchmarks.md, a command ``python3 dev.py bench NAME`` gets
a place of its own once its result is there. tests/test_docs.py holds pages and results together.

benchmarks/results/README.md lists every result with its command, machine, date and missed bars.

Run: python3 benchmarks/fill_results.py [--check]   (standard library only)
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(
    r"^<!-- results:(?P<name>[\w-]+) -->\n(?P<body>.*?)^<!-- /results -->$",
    flags=re.DOTALL | re.MULTILINE,
)
# A command on the page of benchmarks with no place for its result behind it.
COMMAND = re.compile(
    r"^```sh\npython3 dev\.py bench (?P<name>[\w-]+)\n```\n(?!\n<!-- results:)", flags=re.MULTILINE
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


def add_places(text: str, root: Path) -> str:
    """Return the page of benchmarks with a place behind each command that has a result."""

    def add(match: re.Match[str]) -> str:
        name = match["name"]
        is_there = (root / "benchmarks" / "results" / f"{name}.md").is_file()
        place = f"\n<!-- results:{name} -->\n<!-- /results -->\n"
        return match[0] + (place if is_there else "")

    return COMMAND.sub(add, text)


def fill(text: str, page: Path, root: Path) -> str:
    """Return the text of a page with every place filled anew."""
    if page == root / "docs" / "benchmarks.md":
        text = add_places(text, root)
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


# The index of the results


def read_records(folder: Path) -> dict[str, dict]:
    """Return the results of a folder by name: those that have a page and its JSON."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
        if path.with_suffix(".md").is_file()
    }


def list_result(name: str, record: dict, page: Path) -> str:
    """Return a result as a row of the index."""
    machine = record.get("machine", {})
    cores = f"{machine['cores']} cores" if machine.get("cores") else ""
    places = [machine.get("processor", ""), machine.get("gpu", ""), cores]
    where = ", ".join(place for place in places if place)
    when = record.get("date", "")
    if "seconds" in record:
        when += f", {record['seconds']:,.0f} s"
    asked = [row for row in record.get("figures", []) if row["bar"].startswith("bar")]
    held = [row for row in asked if row["holds"] == "yes"]
    bars = f"{len(held)} of {len(asked)}" if asked else ""
    missed = "; ".join(f"{row['name']}: {row['value']:,g}" for row in asked if row not in held)
    title = page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    command = f"`{record['command']}`" if record.get("command") else ""
    cells = [f"[{title}]({name}.md)", command, when, where, bars, missed]
    return f"| {' | '.join(cells)} |"


def render_index(folder: Path) -> str:
    """Return the index of a folder of results; "" where it has none."""
    rows = [
        list_result(name, record, folder / f"{name}.md")
        for name, record in read_records(folder).items()
    ]
    if not rows:
        return ""
    head = [
        "# All results",
        "",
        "Written by `benchmarks/fill_results.py`. Command and seconds are those of the last call;",
        "a result that grew over several calls lists all of them.",
        "",
        "| result | command | measured | machine | bars held | missed |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


def write_index(folder: Path, *, check: bool = False) -> bool:
    """Write the index of a folder, or with `check` only look; whether it was stale."""
    path = folder / "README.md"
    index = render_index(folder)
    if not index or (path.is_file() and path.read_text(encoding="utf-8") == index):
        return False
    if not check:
        path.write_text(index, encoding="utf-8")
    return True


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
    results = ROOT / "benchmarks" / "results"
    if write_index(results, check=options.check):
        stale.append((results / "README.md").relative_to(ROOT).as_posix())
    verb = "would change" if options.check else "changed"
    print(f"{verb}: {', '.join(stale) or 'nothing'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
