"""Which Pythons the project admits, the locks serve, and `make` takes. The real Makefile and locks; the interpreters
are stand-ins."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
ADMITTED = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
PYTHONS = [version for version in (f"3.{minor}" for minor in range(8, 30)) if version in ADMITTED]
LOCKS = ("requirements.lock", "requirements-cuda.lock")
GONE = {
    # with 3.12
    *("asynchat", "asyncore", "distutils", "imp", "smtpd"),
    # with 3.13
    *("aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "lib2to3", "mailcap", "msilib", "nis", "nntplib"),
    *("ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib"),
}
"""modules of the standard library that 3.11 has and a later Python of the project has not"""


@pytest.mark.parametrize("lock", LOCKS)
def test_the_project_admits_what_make_lock_has_resolved_for(lock: str) -> None:
    assert re.findall(r"^# Python: (.+)$", (ROOT / lock).read_text(), re.MULTILINE) == [" ".join(PYTHONS)]
    assert re.search(r"^PYTHONS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split() == PYTHONS


def test_nothing_is_imported_that_only_the_oldest_python_has() -> None:
    found = {}
    for path in [path for folder in ("job", "model", "docker", "tests") for path in (ROOT / folder).rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        if gone := {name.partition(".")[0] for name in names} & GONE:
            found[path.relative_to(ROOT).as_posix()] = gone
    assert found == {}


class Tree:
    """A folder with the Makefile and the locks, and a search path that begins with stand-ins for every Python that
    `make` asks."""

    def __init__(self, root: Path, pythons: dict[str, str]) -> None:
        """`pythons`: name -> the version that it says; all other names are broken."""
        self.root, self.bin = root, root / "bin"
        self.bin.mkdir()
        for name in ("Makefile", "pyproject.toml", *LOCKS):
            shutil.copy(ROOT / name, root)
        for name in ("python", "python3", *(f"python{version}" for version in PYTHONS), *pythons):
            self.write(self.bin / name, pythons.get(name))

    @staticmethod
    def write(path: Path, version: str | None) -> None:
        path.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 1\n")
        path.chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--no-print-directory", ".venv/project-installed", "TORCH=cpu", *arguments]
        variables = {"PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin"}
        return subprocess.run(command, cwd=self.root, env=variables, capture_output=True, text=True, check=False)

    def taken(self, *arguments: str) -> str | None:
        """The Python that would make .venv, or None where it would stay as it is."""
        match = re.search(r"^(\S+) -m venv \.venv$", self.make("--dry-run", *arguments).stdout, re.MULTILINE)
        return match and match[1]


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3.11": "3.11"}, "python3.11"),
        ({"python3.11": "3.11", "python3.13": "3.13", "python3": "3.11"}, "python3.13"),
        ({"python3.12": "3.12", "python3.14": "3.14", "python3": "3.14"}, "python3.12"),
        ({"python3": "3.14", "python": "3.13"}, "python"),
    ],
)
def test_the_newest_that_works_and_that_the_lock_serves_is_taken(
    tmp_path: Path, pythons: dict[str, str], taken: str
) -> None:
    assert Tree(tmp_path, pythons).taken() == taken


def test_which_pythons_are_served_is_read_from_the_lock(tmp_path: Path) -> None:
    tree = Tree(tmp_path, {"python3.12": "3.12", "python3.13": "3.13"})
    lock = tmp_path / "requirements.lock"
    lock.write_text(re.sub("^# Python: .+$", "# Python: 3.11 3.12", lock.read_text(), flags=re.MULTILINE))
    assert tree.taken() == "python3.12" and tree.taken("TORCH=cuda") == "python3.13"


@pytest.mark.parametrize(
    ("arguments", "said"), [((), "none is on the path"), (("PYTHON=python3.14",), "python3.14 is none")]
)
def test_a_python_without_hashes_is_refused_before_anything_is_removed(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    tree = Tree(tmp_path, {"python3": "3.14", "python3.14": "3.14"})
    (tmp_path / ".venv").mkdir()
    ended = tree.make(*arguments)
    assert ended.returncode == 2 and (tmp_path / ".venv").exists()
    assert f"make: one of Python {' '.join(PYTHONS)} is needed, with venv" in ended.stderr and said in ended.stderr


def test_another_python_that_is_named_makes_the_environment_anew_and_a_newer_one_that_appears_does_not(
    tmp_path: Path,
) -> None:
    tree = Tree(tmp_path, {"python3.11": "3.11", "python3.12": "3.12"})
    marker = re.search(r"touch (\.venv/made-from-\d+)", tree.make("--dry-run").stdout)[1]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    tree.write(tmp_path / ".venv/bin/python", "3.11")
    for name in (marker, ".venv/project-installed"):
        (tmp_path / name).touch()
    assert tree.taken() is None and tree.taken("PYTHON=python3.11") is None
    assert tree.taken("PYTHON=python3.12") == "python3.12"
