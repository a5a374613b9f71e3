"""The rules of the house that no linter knows: locks, packages, the direction of imports, sizes, what the text may
name."""

from __future__ import annotations

import ast
import functools
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
LOCKS = ("requirements.lock", "requirements-cuda.lock")
ONLY_CUDA = {"triton", "flash-attn-4", "quack-kernels", "apache-tvm-ffi", "torch-c-dlpack-ext", "einops"}
MADE = {
    "__pycache__",
    "out",
    "build",
    "dist",
}  # folders that are no part of the project's text, beside those with a dot

PIN = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+) \\\n(?P<hashes>(?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
    re.MULTILINE,
)


def project_files() -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in MADE and not name.endswith(".egg-info") and (name[0] != "." or name == ".ci")
        ]
        yield from (Path(folder) / name for name in names)


def python_files() -> list[Path]:
    return sorted(path for path in project_files() if path.suffix == ".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pins(lock: str) -> dict[str, tuple[str, set[str]]]:
    """name -> (version, hashes) of every pin that has at least one hash."""
    text = (ROOT / lock).read_text()
    return {
        match["name"]: (match["version"], set(re.findall("[0-9a-f]{64}", match["hashes"])))
        for match in PIN.finditer(text)
    }


# --- locks


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_pins_with_hashes_and_nothing_else(lock: str) -> None:
    rest = PIN.sub("", (ROOT / lock).read_text())
    assert [line for line in rest.splitlines() if line.strip() and not line.lstrip().startswith("#")] == []
    assert "://" not in rest


def test_the_locks_agree_and_differ_by_what_only_cuda_needs() -> None:
    cpu, cuda = (pins(lock) for lock in LOCKS)
    assert {name: version for name, (version, _) in cpu.items()} == {
        name: cuda[name][0] for name in cuda if name in cpu
    }
    assert all(name.startswith(("nvidia-", "cuda-")) or name in ONLY_CUDA for name in cuda.keys() - cpu.keys())
    assert all(cpu[name] == cuda[name] for name in cpu if name != "torch")


def test_torch_in_the_cpu_lock_is_the_cpu_builds_of_the_makefile() -> None:
    version, hashes = pins("requirements.lock")["torch"]
    block = re.search(r"TORCH_CPU_HASHES := \\\n((?: +[0-9a-f]{64}(?: \\)?\n)+)", MAKEFILE)
    assert block and hashes == set(block[1].replace("\\", "").split())
    assert re.search(r"^TORCH_VERSION := (\S+)$", MAKEFILE, re.MULTILINE)[1] == version
    pythons = re.search(r"^PYTHONS := (.+)$", MAKEFILE, re.MULTILINE)[1].split()
    assert len(hashes) == 3 * len(pythons), "two builds for Linux and one for macOS, for each Python"
    assert len(hashes & pins("requirements-cuda.lock")["torch"][1]) == len(pythons), "only the macOS builds are in both"


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_satisfies_the_project(lock: str) -> None:
    project, locked = PYPROJECT["project"], pins(lock)
    extras = project["optional-dependencies"]
    asked = [
        *project["dependencies"],
        *extras["dev"],
        *(extras["attention"] if lock == "requirements-cuda.lock" else []),
    ]
    asked = [Requirement(line) for line in asked]
    missed = [str(want) for want in asked if Version(locked[canonicalize_name(want.name)][0]) not in want.specifier]
    assert missed == [], "run `make lock`"


# --- packages


def test_the_package_list_is_what_is_on_disk() -> None:
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in python_files()
        if path.name == "__init__.py"
    }
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_sky_is_not_importable_code() -> None:
    assert [relative(path) for path in python_files() if path.is_relative_to(ROOT / "sky")] == []


def test_every_file_of_a_package_is_installed_with_it() -> None:
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for package, globs in data.items()
        for glob in globs
        for path in (ROOT / package.replace(".", "/")).glob(glob)
    }
    there = {
        path for path in project_files() if path.relative_to(ROOT).parts[0] in ("job", "model") and path.suffix != ".py"
    }
    assert sorted(map(relative, there - packaged)) == []


# --- code


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    nodes = list(ast.walk(parsed(path)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {
        name.split(".")[0] for name in plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    }


def test_the_model_knows_no_job_no_files_no_network() -> None:
    outside = {
        "job",
        "os",
        "io",
        "pathlib",
        "shutil",
        "tempfile",
        "socket",
        "ssl",
        "http",
        "urllib",
        "requests",
        "subprocess",
        "click",
        "rich",
        "boto3",
    }
    found = {
        relative(path): names
        for path in python_files()
        if path.is_relative_to(ROOT / "model") and (names := imported(path) & outside)
    }
    assert found == {}


ROOMS = (
    {"cli"},
    {"run"},
    {"train", "data", "evaluation", "inference", "report", "plan"},
    {"store", "machine"},
    {"recipe"},
    {"errors", "console", "reporter", "retry", "addresses"},
)
"""the rooms of job from the top to the bottom: each imports its own row and the rows below"""


def imports_of_modules() -> dict[str, set[str]]:
    """By module of job and model: the modules of both that it imports, at the top level and inside functions."""
    paths = {}
    for path in python_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("job", "model"):
            paths[".".join(parts).removesuffix(".__init__")] = path
    imports: dict[str, set[str]] = {}
    for module, path in paths.items():
        nodes = list(ast.walk(parsed(path)))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in (node for node in nodes if isinstance(node, ast.ImportFrom)):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in paths else node.module for name in inner}
        imports[module] = names & paths.keys() - {module}
    return imports


def test_rooms_import_downwards() -> None:
    floor = {room: number for number, row in enumerate(ROOMS) for room in row}
    rooms = {module: module.split(".")[1] for module in imports_of_modules() if module.startswith("job.")}
    upward = {
        f"{module} -> {other}"
        for module, others in imports_of_modules().items()
        for other in others
        if module in rooms and other in rooms and floor[rooms[module]] > floor[rooms[other]]
    }
    assert not upward, "turn the import round"


def test_no_module_imports_itself_through_others() -> None:
    imports = imports_of_modules()

    def reached(module: str) -> set[str]:
        found, left = set(), [module]
        while left:
            new = imports[left.pop()] - found
            found |= new
            left += new
        return found

    below = {module: reached(module) for module in imports}
    circles = {frozenset(other for other in below if other in below[m] and m in below[other]) for m in below}
    assert not circles - {frozenset()}, "cut the circle"


def test_nothing_imports_the_tests() -> None:
    assert [relative(path) for path in python_files() if "tests" in imported(path)] == []


def test_files_and_functions_are_short() -> None:
    long = {}
    for path in python_files():
        text = path.read_text()
        functions = [
            node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
        too_long = {name: lines for name, lines in lengths.items() if lines >= 60}
        if (lines := len(text.splitlines())) > 400 or too_long:
            long[relative(path)] = lines, too_long
    assert long == {}


# --- text

REGISTRIES = [
    ".".join(host)
    for host in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"), ("debian", "org"))
]


def test_no_file_names_a_package_registry() -> None:
    names = re.compile("|".join(map(re.escape, REGISTRIES)), re.IGNORECASE)
    assert [relative(path) for path in project_files() if names.search(path.read_text(errors="replace"))] == []


# --- commands


def test_ci_and_the_makefile_have_the_commands() -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.MULTILINE))
    assert targets >= {"smoke", "test", "slow", "lint", "bench", "image"}
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert set(re.search(r"set -- (.+)\nmake \"\$@\"$", ci.read_text(), re.MULTILINE)[1].split()) == {
        "lint",
        "test",
        "slow",
    }


def test_every_push_runs_what_ci_runs_here() -> None:
    """The jobs' targets are those of .ci/run, its `slow` in the parts that the Makefile makes of it."""
    here = re.search(r"set -- (.+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)[1].split()
    below = {target: [] for target in here}
    rules = re.findall(r"^(\w+):([^#\n]*)[^\n]*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    for target, needed, commands in rules:
        calls = re.findall(r"\$\(MAKE\) .*--no-print-directory (.+)", commands)
        below[target] = [word for line in [needed, *calls] for word in line.split() if word.isalpha()]

    def parts(target: str) -> set[str]:
        return set().union(*map(parts, below[target])) | ({target} - {"slow", "services"})

    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow[True].keys() == {"push", "pull_request"}, "YAML reads `on` as true"
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1]["run"] == "bash .ci/run ${{ matrix.target }}"
    assert set(job["strategy"]["matrix"]["target"]) == set().union(*map(parts, here))


@pytest.mark.parametrize("name", ["ci", "release"])
def test_actions_are_pinned_by_digest(name: str) -> None:
    uses = re.findall(r"uses: (.+)", (ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    assert uses and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action) for action in uses)
