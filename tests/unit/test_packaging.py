"""What is installed is what stands in the repository, and no more than it needs."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDERS = ("daemon", "engine_adapter", "estimators", "lab")

# Put together here, so that this file does not name them itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.~-])/(?:home|root|Users|work)/" + r"[\w.]"),
    "a registry's host": re.compile(
        r"py" + r"pi\.org|python" + r"hosted\.org|pytorch" + r"\.org/whl|registry\.npm" + r"js"
    ),
}


def git_files(repository: Path) -> list[Path]:
    """Files that are tracked, or would be with the next commit; no links, no folders."""
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout: no list of the files that belong to the repository")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    paths = [repository / name for name in listed if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def requirements(project: dict[str, Any]) -> list[Requirement]:
    """All direct dependencies, of the base install and of every extra."""
    extras = project["project"]["optional-dependencies"].values()
    lines = [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]
    return [one for one in map(Requirement, lines) if one.name != "smartspec"]


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a clean copy, as a release would be."""
    tree = tmp_path_factory.mktemp("tree")
    for path in git_files(repository):
        copy = tree / path.relative_to(repository)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    built = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check",
         "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", built, tree],
        check=True,
    )  # fmt: skip
    (found,) = built.glob("smartspec-*.whl")
    return found


@pytest.fixture(scope="module")
def base_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment that holds the wheel and the base dependencies only.

    The dependencies are linked in from the environment that runs the tests: no network, no wait.
    """
    environment = tmp_path_factory.mktemp("base") / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    for name in ("msgspec", "numpy", "pyzmq"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return python


def modules_of_the_base_install(repository: Path) -> list[str]:
    files = sorted((repository / "engine_adapter").glob("*.py"))
    return [f"smartspec.engine_adapter.{file.stem}" for file in files if file.stem != "__init__"]


def test_packages_equal_folders_when_listed(repository: Path, project: dict[str, Any]) -> None:
    folders = {
        "smartspec." + ".".join(file.parent.relative_to(repository).parts)
        for top in FOLDERS
        for file in (repository / top).rglob("*.py")
    }
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_namespace_has_no_init_when_links_are_followed(repository: Path) -> None:
    namespace = repository / ".links" / "smartspec"
    assert sorted(link.name for link in namespace.iterdir()) == sorted(FOLDERS)
    for link in namespace.iterdir():
        assert not link.readlink().is_absolute()
        assert link.resolve() == repository / link.name


def test_wheel_holds_every_file_when_built(repository: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"smartspec/{path.relative_to(repository)}"
        for path in git_files(repository)
        if path.relative_to(repository).parts[0] in FOLDERS
    }
    assert expected - names == set()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"smartspec"}
    assert "smartspec/__init__.py" not in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_adapter_imports_when_only_base_dependencies_are_installed(
    repository: Path, base_install: Path
) -> None:
    modules = modules_of_the_base_install(repository)
    assert {"smartspec.engine_adapter.link", "smartspec.engine_adapter.messages"} <= set(modules)
    run = subprocess.run(
        [base_install, "-I", "-W", "error", "-c", f"import {', '.join(modules)}"],
        cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_base_install_is_bare_when_the_learning_side_is_imported(base_install: Path) -> None:
    """The environment of the test above is really empty: river is not to be had in it."""
    run = subprocess.run(
        [base_install, "-I", "-c", "import river"],
        cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "ModuleNotFoundError" in run.stderr


def test_command_names_the_extra_when_only_the_base_is_installed(base_install: Path) -> None:
    run = subprocess.run(
        [base_install, "-I", "-c", "from smartspec.daemon.command import main; main()"],
        cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        "smartspec: the package typer is not installed: pip install 'smartspec[daemon]'\n"
    )


def test_version_equals_the_project_file_when_asked(project: dict[str, Any]) -> None:
    assert importlib.metadata.version("smartspec") == project["project"]["version"]


def test_constraints_pin_every_dependency_when_on_cpu(
    repository: Path, requirements: list[Requirement]
) -> None:
    lines = (repository / "constraints-cpu.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"not an exact version: {pin}"
        assert pin.url is None
    pinned = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    assert pinned["torch"] == "2.13.0"
    for wanted in requirements:
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), str(wanted)


def test_dependencies_are_justified_when_declared(
    repository: Path, requirements: list[Requirement]
) -> None:
    text = (repository / "docs" / "dependencies.md").read_text()
    justified = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    assert {one.name for one in requirements} == justified


def test_files_name_no_machine_or_registry_when_listed(repository: Path) -> None:
    found = []
    for path in git_files(repository):
        text = path.read_bytes().decode("utf-8", errors="replace")
        for what, pattern in FORBIDDEN.items():
            found += [
                f"{path.relative_to(repository)}:{number}: {what}: {match.group()}"
                for number, line in enumerate(text.splitlines(), start=1)
                for match in [pattern.search(line)]
                if match
            ]
    assert found == []


@pytest.mark.parametrize("top", FOLDERS)
def test_types_are_published_when_installed(repository: Path, top: str) -> None:
    assert (repository / top / "py.typed").is_file()
