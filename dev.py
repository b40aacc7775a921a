"""One script for whoever works on skembed: it sets up `.venv` and runs a command in it.

Needs Python 3.10 or newer and nothing else: standard library only.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

OLDEST = (3, 10)
if sys.version_info < OLDEST:  # before anything that an older Python would stumble over
    sys.exit(
        "dev.py needs Python {}.{} or newer; this is Python {}.{} ({}).\n"
        "Next step: run it with a newer one, for example `python3.12 dev.py test`.".format(
            *OLDEST, *sys.version_info[:2], sys.executable
        )
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
MARKER = VENV / "skembed-dev.json"
CACHE = VENV / "cache"

USAGE = """\
usage: python3 dev.py COMMAND [ARGUMENTS]

  demo [ARGS]        the main job: embed the documentation of numpy, scipy and scikit-learn,
                     compare classifiers on it, draw a map
  test [ARGS]        the tests; arguments go to pytest (`test -k cache -x`)
  lint               ruff check, ruff format --check, mypy
  docs [ARGS]        the documentation site; arguments go to sphinx (-D plot_gallery=0 is quick)
  ci                 test, lint, and the documentation site without running its gallery
  bench [NAME ARGS]  run benchmarks/NAME.py; without a name, list them
  bench all [ARGS]   run all that fit this machine, one after the other (--gpu: those of a GPU too)

Each command first brings the project's own environment, .venv, up to date: one pip call when it
is new or pyproject.toml, constraints.txt or Python changed, none otherwise. Commands run in the
project folder, from wherever they are called. Packages and pip's downloads go into .venv (unless
PIP_CACHE_DIR names another place); to start afresh, delete that folder.

Environment variables:
  SKEMBED_PIP_ARGS   more arguments for `pip install`. On Linux without a GPU, an index of CPU
                     builds saves several GB: SKEMBED_PIP_ARGS="--extra-index-url URL"
"""


class StepError(Exception):
    """A step failed; the message says which and what to do next."""


def say(text: str) -> None:
    """Print a line now, before whatever the child processes print."""
    print(f"dev.py: {text}", flush=True)


def child_environment() -> dict[str, str]:
    """Return the environment of every child process, its caches kept inside `.venv`."""
    env = dict(os.environ)
    env.pop("PYTHONHOME", None)  # would send the environment's Python to another library
    env.setdefault("PIP_CACHE_DIR", str(CACHE / "pip"))
    env.setdefault("MPLCONFIGDIR", str(CACHE / "matplotlib"))
    return env


def run(*command: str | Path) -> int:
    """Run a command in the project folder and return its exit status."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=child_environment(), check=False).returncode


# The environment


def probe_environment() -> str | None:
    """Return the version of the environment's Python, or None where it or its pip is unusable."""
    code = "import sys, pip; print(sys.version.replace(chr(10), ' '))"
    try:
        result = subprocess.run(
            [str(PYTHON), "-c", code],
            cwd=ROOT,
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no such file, or a link to a Python that is gone
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def ensure_environment() -> str:
    """Create `.venv` where it is missing or broken; return the version of its Python."""
    version = probe_environment()
    if version is None:
        # Also mends what an interrupted creation left: venv writes over it and deletes nothing.
        say(f"creating .venv with Python {sys.version.split()[0]} ({sys.executable})")
        if run(sys.executable, "-m", "venv", VENV) != 0:
            raise StepError(
                "could not create the environment (`python -m venv`).\n"
                "Next step: install Python's venv module (Debian and Ubuntu: "
                "`sudo apt install python3-venv`), then run the same command again."
            )
        version = probe_environment()
        if version is None:
            raise StepError(
                "the Python in .venv does not start, or has no pip.\n"
                "Next step: delete the folder .venv and run the same command again."
            )
    else:
        say(f"using .venv (Python {version.split()[0]})")
    numbers = tuple(int(part) for part in version.split()[0].split(".")[:2])
    if numbers < OLDEST:
        raise StepError(
            f"the Python in .venv is {version.split()[0]}; skembed needs "
            f"{OLDEST[0]}.{OLDEST[1]} or newer.\n"
            "Next step: delete the folder .venv and run the same command again."
        )
    return version


def fingerprint(python_version: str) -> str:
    """Return a hash of all that decides which packages belong in `.venv`."""
    digest = hashlib.sha256(python_version.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    digest.update(str(ROOT).encode())  # an editable install points at this very folder
    return digest.hexdigest()


def read_marker() -> dict:
    """Return what the last complete installation wrote, or {} where there was none."""
    try:
        marker = json.loads(MARKER.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def ensure_packages(extras: set[str], python_version: str) -> None:
    """Install skembed, editable, with its extras, unless the marker says they are there."""
    wanted = fingerprint(python_version)
    marker = read_marker()
    present = set(marker.get("extras", []))
    if marker.get("fingerprint") == wanted and extras <= present:
        say("packages are up to date; pip is not called")
        return
    # Extras of earlier commands stay, or two commands in turn would call pip each time.
    names = ",".join(sorted(extras | present))
    say(f"installing skembed[{names}] into .venv; the first time takes minutes")
    MARKER.unlink(missing_ok=True)  # an installation cut short must not look complete
    status = run(
        *(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"),
        *("--constraint", ROOT / "constraints.txt", "--editable", f".[{names}]"),
        *shlex.split(os.environ.get("SKEMBED_PIP_ARGS", "")),
    )
    if status != 0:
        raise StepError(
            f"pip could not install the packages (its exit status was {status}, its reason is "
            "above).\n"
            "Next step: check the network and the free disk space, then run the same command "
            "again; it goes on from what is there. For another package index or a proxy, set "
            "SKEMBED_PIP_ARGS (see `python3 dev.py --help`). If it keeps failing, delete the "
            "folder .venv first."
        )
    partial = MARKER.with_suffix(".part")
    partial.write_text(
        json.dumps({"fingerprint": wanted, "extras": sorted(extras | present)}), encoding="utf-8"
    )
    partial.replace(MARKER)  # last, and whole or not at all


def set_up(*extras: str) -> None:
    """Bring `.venv` up to date with these extras."""
    ensure_packages(set(extras), ensure_environment())


def step(title: str, *arguments: str | Path) -> int:
    """Run the environment's Python with these arguments; say how it ended; return its status."""
    say(title)
    start = time.monotonic()
    status = run(PYTHON, *arguments)
    if status < 0:  # ended by a signal: the shells' number for it
        status = 128 - status
    ending = "passed" if status == 0 else f"failed with exit status {status}"
    say(f"{title}: {ending} after {time.monotonic() - start:.0f} s")
    return status


# The commands


def run_demo(arguments: list[str]) -> int:
    """Run the main job."""
    script = ROOT / "examples" / "docstrings_demo.py"
    if not script.is_file():
        raise StepError(f"{script} is missing.\nNext step: restore it (`git checkout examples`).")
    set_up("plot")
    return step("examples/docstrings_demo.py", script, *arguments)


def run_test(arguments: list[str]) -> int:
    """Run the tests."""
    set_up("ann", "interactive", "mteb", "plot", "test", "train")
    return step("pytest", "-m", "pytest", *arguments)


def run_lint(arguments: list[str]) -> int:
    """Check style and types, all of it even where the first check fails."""
    refuse(arguments, "lint")
    set_up("lint")
    statuses = [
        step("ruff check", "-m", "ruff", "check", "."),
        step("ruff format --check", "-m", "ruff", "format", "--check", "."),
        step("mypy", "-m", "mypy"),
    ]
    return max(statuses)


def run_docs(arguments: list[str]) -> int:
    """Build the documentation site, warnings being errors."""
    set_up("docs", "plot", "train")
    sphinx = ("-m", "sphinx", "-W", "-b", "html")
    return step("sphinx", *sphinx, *arguments, "docs", "docs/_build/html")


def run_ci(arguments: list[str]) -> int:
    """Run the tests, style and types, and the site's pages, all even where the first fails."""
    refuse(arguments, "ci")
    return max(run_test([]), run_lint([]), run_docs(["-D", "plot_gallery=0"]))


def run_bench(arguments: list[str]) -> int:
    """Run one benchmark, all of them, or list them."""
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    names = [name for name in names if name != "fill_results"]
    listing = ", ".join(names) or "none yet"
    if not arguments:
        say(f"benchmarks: {listing}; `bench all` runs them one after the other")
        return 0
    name, *rest = arguments
    if name not in names:
        raise StepError(f"there is no benchmark {name!r}; there are: {listing}.")
    set_up("bench", "plot", "train")
    return step(f"benchmarks/{name}.py", ROOT / "benchmarks" / f"{name}.py", *rest)


def refuse(arguments: list[str], command: str) -> None:
    """Stop where a command that takes no arguments got some."""
    if arguments:
        raise StepError(f"`{command}` takes no arguments; got {shlex.join(arguments)}.")


COMMANDS = {
    "demo": run_demo,
    "test": run_test,
    "lint": run_lint,
    "docs": run_docs,
    "ci": run_ci,
    "bench": run_bench,
}


def main(arguments: list[str]) -> int:
    """Run the command named first; return the exit status of the script."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"dev.py: there is no command {name!r}.\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](rest)
    except StepError as error:
        print(f"dev.py: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\ndev.py: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
