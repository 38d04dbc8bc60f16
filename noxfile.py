"""What a contributor and CI run: ``nox`` for all of it, ``nox -s tests`` for one."""

import os
import shutil
import socket
import tarfile
import zipfile
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PYPROJECT = nox.project.load_toml("pyproject.toml")

nox.options.sessions = [
    "lint",
    "typing",
    "tests",
    "lowest",
    "docs",
    "package",
    "demo",
]
# On CI too: whichever of the supported Pythons are there.
nox.options.error_on_missing_interpreters = False

# Twice as many processes as there are cores, as many tests wait for servers.
PARALLEL = (f"--numprocesses={2 * (os.cpu_count() or 1)}", "--dist=worksteal")

# Only the session `engines` has what these need.
ADAPTERS = ",".join(
    f"*/postlude/engines/{path.name}"
    for path in sorted(Path("src/postlude/engines").glob("[!_]*.py"))
)

# pyenv's shims refuse every version that is installed but not activated.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
os.environ["PATH"] += "".join(
    os.pathsep + str(directory) for directory in sorted(PYENV.glob("versions/3.*/bin"))
)


def group(name: str) -> tuple[str, ...]:
    """Lists the requirements of a dependency group."""
    return nox.project.dependency_groups(PYPROJECT, name)


def pin(requirement: str) -> str:
    """Turns the lower bound of a requirement into the one version allowed."""
    pinned = Requirement(requirement)
    pinned.specifier = SpecifierSet(str(pinned.specifier).replace(">=", "=="))
    return str(pinned)


def has_services() -> bool:
    """Whether the brokers are there that the engines are tested on, or have to be."""
    ports = 5432, 5672, 6379  # PostgreSQL, RabbitMQ, Redis
    try:
        for port in ports:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return "POSTLUDE_REQUIRE_SERVICES" in os.environ
    return True


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with Ruff."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types with mypy and pyright, and that every public name has one."""
    session.install(".", *group("typing"))
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "postlude", "--ignoreexternal")


@nox.session(python=nox.project.python_versions(PYPROJECT, max_version="3.15"))
def tests(session: nox.Session) -> None:
    """Run the tests on each Python that is installed; arguments go to pytest."""
    session.install(".", *group("tests"))
    pytest = ["pytest", "--ignore=tests/engines", *PARALLEL, *session.posargs]
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", *pytest)
    session.run("coverage", "combine", "--quiet")
    # A part of the tests covers a part of the code.
    part = ["--fail-under=0"] * bool(session.posargs)
    session.run("coverage", "report", f"--omit={ADAPTERS}", *part)
    if not session.posargs and has_services():
        session.notify("engines")


@nox.session
def engines(session: nox.Session) -> None:
    """Run the tests of each engine, with its brokers and its worker."""
    session.install(".", *group("engines"))
    # One process for each core, and for each engine on a broker.
    pytest = ["pytest", "tests/engines", "--numprocesses=2", "--dist=loadgroup"]
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", *pytest, *session.posargs)
    session.run("coverage", "combine", "--quiet")
    part = ["--fail-under=0"] * bool(session.posargs)
    session.run("coverage", "report", f"--include={ADAPTERS}", *part)


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the tests on the lowest versions that pyproject.toml allows."""
    requirements = [*PYPROJECT["project"]["dependencies"], *group("tests")]
    session.install(".", *map(pin, requirements))
    # Old dependencies may use what a new Python deprecates.
    command = ["python", "-m", "pytest", "-W", "default", *PARALLEL]
    command += ["--ignore=tests/engines"]
    session.run(*command, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build; warnings are errors."""
    session.install(".", *group("docs"))
    session.run("sphinx-build", "-W", "-n", "--keep-going", "docs", "docs/_build")


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and sdist, look inside, and install each on its own."""
    session.install("build[virtualenv]", "twine")
    dist = Path(session.create_tmp(), "dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist))
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))

    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    info = f"{wheel.name.split('-py3')[0]}.dist-info"
    if tops != {"postlude", "_postlude_pytest.py", info}:
        session.error(f"the wheel must hold the package alone, not {sorted(tops)!r}")
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
    if missing := {"src", "tests", "docs", "examples", "LICENSE"} - tops:
        session.error(f"the sdist lacks {sorted(missing)!r}")

    project = PYPROJECT["project"]
    expected = [project[key] for key in ("version", "license", "requires-python")]
    for artefact in wheel, sdist:
        venv = dist / artefact.suffix[1:]
        session.run("python", "-m", "virtualenv", "--quiet", str(venv))
        python = str(venv / ("Scripts" if os.name == "nt" else "bin") / "python")
        session.run(python, "-m", "pip", "install", "-q", str(artefact), external=True)
        check = [python, "-I", "-c", INSTALLED, *expected, *project["dependencies"]]
        session.run(*check, external=True)


INSTALLED = """
import sys
from importlib import metadata, resources, util
import postlude
about = metadata.metadata("postlude")
fields = [about[f] for f in ("Version", "License-Expression", "Requires-Python")]
fields += [r for r in metadata.requires("postlude") if "extra ==" not in r]
assert fields == sys.argv[1:], fields
assert resources.files(postlude).joinpath("py.typed").is_file()
[plugin] = metadata.entry_points(group="pytest11", name="postlude")
assert util.find_spec(plugin.value), plugin
"""


@nox.session
def demo(session: nox.Session) -> None:
    """Show on a real server what stock tasks lose and postlude keeps."""
    session.install(".", "uvicorn", "httpx2")
    session.run("python", "tests/demo.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what a task costs; arguments go to the benchmarks."""
    session.install(".", *group("engines"))
    session.run("python", "tests/benchmarks", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Let 20,000 requests add tasks, and look for any lost, doubled or leaked."""
    session.install(".", *group("tests"))
    session.run("python", "tests/benchmarks/soak.py", *session.posargs)
