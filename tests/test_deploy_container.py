"""The container recipe: the Dockerfile is carried out in a folder, without an engine or a network."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.command_lines import PROJECT, ROOT, commands, text

if TYPE_CHECKING:
    from collections.abc import Callable


def sent() -> set[str]:
    """Return what the engine gets to see of the checkout: all is left out but what is named."""
    everything, *named, caches = commands(text("container", "Dockerfile.dockerignore"))
    assert everything == "*"
    assert caches == "**/__pycache__"
    assert all(name.startswith("!") for name in named)
    return {name.removeprefix("!") for name in named}


def installed(folder: Path) -> Path:
    """Return a folder with all that the tests run with, but for this package: what pip would fetch."""
    folder.mkdir()
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if "tomocpt_stream" not in item.name and item.suffix != ".pth":
            (folder / item.name).symlink_to(item)
    return folder


class Image:
    """What the instructions of the Dockerfile make of a folder."""

    def __init__(self, root: Path) -> None:
        programs = root / "usr" / "bin"
        programs.mkdir(parents=True)
        (programs / "python3").symlink_to(Path(sys.executable).resolve())
        self.root, self.place = root, root
        self.arguments: dict[str, str] = {}
        self.user = "root"
        self.words: dict[str, list[str]] = {}
        self.copied: set[str] = set()
        self.environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "PYTHONPATH": str(installed(root / "fetched")),
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
        }
        steps: dict[str, Callable[[str], object]] = {
            "ARG": self.arg,
            "FROM": self.base,
            "ENV": self.env,
            "WORKDIR": self.workdir,
            "COPY": self.copy,
            "RUN": self.run,
            "USER": self.become,
        }
        for line in commands(text("container", "Dockerfile")):
            name, rest = line.split(maxsplit=1)
            if name in ("ENTRYPOINT", "CMD"):
                self.words[name] = json.loads(rest)
            else:
                steps[name](rest)

    def inside(self, value: str) -> str:
        """Return a text with the image's folders as they are here."""
        return re.sub(r"(^|:)/", rf"\1{self.root}/", value)

    def arg(self, rest: str) -> None:
        name, _, self.arguments[name] = rest.partition("=")

    def base(self, rest: str) -> None:
        assert rest == "${BASE}"
        assert re.fullmatch(r"python:3\.1[1-9]-slim", self.arguments["BASE"])

    def env(self, rest: str) -> None:
        before = dict(self.environment)
        for word in shlex.split(rest):
            name, _, value = word.partition("=")
            filled = re.sub(r"\$(\w+)", lambda found: before[found[1]], self.inside(value))
            self.environment[name] = filled

    def workdir(self, rest: str) -> None:
        self.place = Path(self.inside(rest))
        self.place.mkdir(parents=True, exist_ok=True)

    def copy(self, rest: str) -> None:
        *sources, target = rest.split()
        assert not Path(target).is_absolute()
        for source in sources:
            assert source in sent(), f"{source} is not sent to the engine"
            if (ROOT / source).is_dir():
                # Other tests write caches meanwhile, which are not sent either.
                caches = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, self.place / target, ignore=caches)
            else:
                shutil.copy(ROOT / source, self.place / target)
            self.copied.add(source)

    def run(self, rest: str) -> str:
        Path(self.environment.get("HOME", self.root)).mkdir(exist_ok=True)
        shell = ["sh", "-c", rest]
        done = subprocess.run(
            shell, cwd=self.place, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def become(self, rest: str) -> None:
        self.user = rest


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"))


def test_the_image_runs_the_command_as_an_ordinary_user(image: Image) -> None:
    assert image.words == {"ENTRYPOINT": ["tomocpt-stream"], "CMD": ["--help"]}
    shown = image.run(shlex.join(image.words["ENTRYPOINT"] + image.words["CMD"]))
    assert "pick" in shown
    assert image.place == image.root / "data"
    user, group = image.user.split(":")
    assert int(user) > 0
    assert int(group) > 0
    # a user without a home, as `docker run --user` makes one, must have a place to write
    assert image.environment["HOME"] == str(image.root / "tmp")


def test_the_image_has_the_package_itself_with_its_picker(image: Image) -> None:
    place = image.root / "opt" / "tomocpt-stream"
    assert image.run("command -v tomocpt-stream").strip() == str(place / "bin" / "tomocpt-stream")
    assert image.run("tomocpt-stream --version").strip().endswith(PROJECT["version"])
    where = Path(image.run("python -c 'import tomocpt_stream; print(tomocpt_stream.__file__)'").strip())
    assert where.is_relative_to(place)
    assert (where.parent / "weights" / "base.safetensors").stat().st_size > 1e6


def test_the_image_is_built_from_all_that_is_sent(image: Image) -> None:
    assert image.copied == sent()


def test_the_tested_versions_are_installed() -> None:
    steps = [word for line in commands(text("container", "Dockerfile")) for word in line.split("&&")]
    installs = [step for step in steps if "pip install" in step]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in step for step in installs)


def test_another_place_for_torch_reaches_pip(image: Image) -> None:
    assert image.arguments["PIP_EXTRA_INDEX_URL"] == ""
