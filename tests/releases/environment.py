"""Other releases of the dependencies than those of constraints.txt, each in an environment of its own:

    python -m tests.releases.environment newest   # what `pip install .` takes today, in .venv-newest
    python -m tests.releases.environment oldest   # the lowest that pyproject.toml allows, in .venv-oldest

specgen is installed there as a user installs it, and the tests read that one. torch alone is that of constraints.txt:
another one would bring gigabytes of CUDA along. What is tested, and which warnings fail it, `CHECKS` and
`tests.releases.warned` say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
EXTRAS = "gguf,lora,server,torchao"
TESTERS = ("openai", "pytest", "pytest-asyncio", "pytest-xdist")
PLUGINS = sorted(str(path.parent) for path in ROOT.glob("plugins/*/pyproject.toml"))
CHECKS = (
    "tests/releases/checks.py",
    "tests/docs/test_docs.py::test_the_python_of_the_readme_runs",
    "tests/docs/test_docs.py::test_the_plugin_shown_drafts_what_it_promises",
    "tests/docs/test_docs.py::test_the_curl_of_the_readme_is_answered",
    "tests/exactness/test_dropin_random.py",
    "tests/model/test_cache_keyword.py",
    "tests/model/test_runner.py",
    "tests/exactness/test_lora.py",
    "plugins/specgen-grammar/tests/test_grammars.py",
)
# What CI has no time for: these use no more of the dependencies than those do.
LONGER = (
    "tests/docs/test_docs.py::test_the_python_of_the_docs_runs",
    "tests/docs/test_docs.py::test_the_example_runs",
    "plugins/specgen-eagle/tests/test_eagle.py",
)
# As pytest's `filterwarnings`: what our own lines are told. The rest is judged by `tests.releases.warned`.
WARNINGS = ("error:::specgen",)


def pinned() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def lowest() -> dict[str, str]:
    """Each lower bound of specgen's and its plugins' pyproject.toml."""
    return {
        canonicalize_name(requirement.name): bound.version
        for folder in (ROOT, *PLUGINS)
        for requirement in _requirements(Path(folder) / "pyproject.toml")
        for bound in requirement.specifier
        if bound.operator == ">="
    }


def _requirements(path: Path) -> Iterator[Requirement]:
    project = tomllib.loads(path.read_text())["project"]
    yield from map(Requirement, project.get("dependencies", ()))
    for extra in project.get("optional-dependencies", {}).values():
        yield from map(Requirement, extra)


class Environment:
    """A virtual environment of this checkout; made at the first `install`, brought up to date by each.

    constraints: the versions that pip may take no others than.
    """

    def __init__(self, name: str, constraints: Mapping[str, str]) -> None:
        self.folder = ROOT / f".venv-{name}"
        self.python = self.folder / "bin" / "python"
        self._constraints = constraints

    def install(self) -> str | None:
        """Install specgen, its plugins and what tests them; why that cannot be, or `None`.

        torch comes first and alone, before another package's range can ask for a newer one.
        """
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        listed = self.folder / "constraints.txt"
        listed.write_text("".join(f"{name}=={version}\n" for name, version in self._constraints.items()))
        wanted = [f"{ROOT}[{EXTRAS}]", *PLUGINS, *TESTERS]
        for what in (["torch"], ["--upgrade", "--upgrade-strategy", "eager", *wanted]):
            done = self._pip("install", "-c", str(listed), *what)
            if done.returncode:
                return done.stderr.strip() or done.stdout.strip()
        # Behind the installed packages, so that `specgen` is the installed one and `tests` are the checkout's.
        for packages in self.folder.glob("lib/python*/site-packages"):
            (packages / "specgen-tests.pth").write_text(f"{ROOT}\n")
        return None

    def offline(self) -> bool:
        """Whether pip reaches no registry."""
        probe = [
            "install",
            "--dry-run",
            "--ignore-installed",
            "--no-deps",
            "--retries",
            "1",
            "--timeout",
            "15",
            "pluggy",
        ]
        return self._pip(*probe, python=sys.executable).returncode != 0

    def versions(self) -> dict[str, str]:
        """What is installed, specgen and its plugins left out."""
        listed = json.loads(self._pip("list", "--format", "json").stdout)
        found = {canonicalize_name(item["name"]): item["version"].partition("+")[0] for item in listed}
        return {name: version for name, version in sorted(found.items()) if not name.startswith("specgen")}

    def test(self, checks: Sequence[str]) -> tuple[int, str]:
        """Run checks, printing as they go; pytest's exit status and all that was printed."""
        settings = ["-o", "pythonpath=", "-o", "filterwarnings=" + "\n".join(WARNINGS)]
        options = [*settings, "-p", "tests.releases.warned", "-q", "--tb=short", "-rfE", "-m", "not slow"]
        workers = [
            "--numprocesses",
            "auto",
            "--maxprocesses",
            "4",
            "--dist",
            "loadfile",
            "--durations=5",
            "--no-loadscope-reorder",
        ]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        running = subprocess.Popen(
            [str(self.python), "-P", "-m", "pytest", *options, *workers, *checks],
            cwd=ROOT,
            env={**clean, "PYTHONSAFEPATH": "1", "OMP_WAIT_POLICY": "passive"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        printed = []
        for line in running.stdout or ():
            sys.stdout.write(line)
            printed.append(line)
        return running.wait(), "".join(printed)

    def _pip(self, *arguments: str, python: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [python or str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def blame(printed: str, others: Mapping[str, str]) -> str:
    """One line on what likely broke and how it showed.

    others: what differs from constraints.txt, each package with both versions. Those that the tracebacks and warnings
    speak of most come first.
    """
    failures = printed.rpartition("short test summary info")[0].partition("= FAILURES =")[2] or printed

    def mentions(name: str) -> int:
        return len(re.findall(rf"\b{name.replace('-', '[-_]')}\b", failures, flags=re.IGNORECASE))

    suspects = sorted(others, key=mentions, reverse=True)
    likely = f"likely {suspects[0]}" if suspects and mentions(suspects[0]) else "none of the packages is named"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, flags=re.MULTILINE) or ["pytest itself"]
    more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
    unlike = ", ".join(f"{name} {others[name]}" for name in suspects) or "nothing"
    return f"{likely}; differing from constraints.txt: {unlike}; failed: {', '.join(failed[:5])}{more}"


def main() -> int:
    """Make the environment, print what is in it, run the checks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("newest", "oldest"))
    parser.add_argument("--required", action="store_true", help="fail, rather than skip, where no registry is reached")
    options = parser.parse_args()
    which, tested = options.which, pinned()
    environment = Environment(which, {**(lowest() if which == "oldest" else {}), "torch": tested["torch"]})
    if environment.offline():
        sys.stdout.write(f"{'FAILED' if options.required else 'SKIPPED'}: {which} releases: pip reaches no registry\n")
        return int(options.required)
    if reason := environment.install():
        sys.stdout.write(f"{reason}\nFAILED: {which} releases: cannot be installed: {reason.splitlines()[-1]}\n")
        return 1
    versions = environment.versions()
    others = {
        name: f"{v} ({tested[name]} in constraints.txt)" for name, v in versions.items() if tested.get(name, v) != v
    }
    for name, version in versions.items():
        sys.stdout.write(f"  {name} {others.get(name, version)}\n")
    status, printed = environment.test(CHECKS if which == "newest" else (*CHECKS, *LONGER))
    if status:
        sys.stdout.write(f"FAILED: {which} releases: {blame(printed, others)}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
