"""The commands of documents, checked without being run: each program's options against those it has.

A command that cannot be checked fails: `CHECKS` names every program that a document may use.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml
from dask.utils import parse_bytes, parse_timedelta
from distributed.cli import dask_scheduler, dask_worker

from tomocpt_stream.__main__ import main
from tomocpt_stream.cluster import THREADS

if TYPE_CHECKING:
    import argparse

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
_PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = _PYPROJECT["project"]
TOOL: dict[str, Any] = _PYPROJECT["tool"]
IMAGE = f"tomocpt-stream:{PROJECT['version']}"

Words = list[str]
Options = Mapping[str, int]
"""The options of a program, each with the number of words that follow it."""


def takes(words: str, flags: str = "") -> Options:
    """Return options: those of `words` take a value each, `flags` take none."""
    return dict.fromkeys(words.split(), 1) | dict.fromkeys(flags.split(), 0)


SBATCH = takes(
    "--job-name --nodes --ntasks-per-node --gpus-per-task --cpus-per-task --mem-per-cpu --mem --time "
    "--output --partition --account --dependency --wrap",
    "--parsable",
)
SRUN = takes("--cpus-per-task --kill-on-bad-exit --ntasks-per-node --gpus-per-node --output")
# Of `dask cuda worker`, dask-cuda 26.10.
DASK_CUDA = takes(
    "--scheduler-file --nthreads --memory-limit --device-memory-limit --local-directory --interface "
    "--name --death-timeout --tls-ca-file --tls-cert --tls-key",
    "--no-dashboard",
)
DOCKER: dict[str, Options] = {
    "build": takes("-f -t --build-arg"),
    "run": takes("--gpus --user -v --network --entrypoint", "--rm"),
    "push": takes(""),
    "save": takes("-o"),
}
APPTAINER = takes("--bind --pwd", "--nv")
KUBECTL: dict[str, Options] = {
    "apply": takes("-f"),
    "delete": takes("-f"),
    "wait": takes("--for --timeout"),
    "rollout": takes("--timeout"),
    "logs": takes("", "--follow"),
    "exec": takes("", "-i"),
    "scale": takes("--replicas"),
    "port-forward": takes(""),
}
HELM = takes("--repo -n", "--create-namespace --generate-name")


def text(place: str, name: str = "README.md") -> str:
    """Return a file of a place of `deploy/`."""
    return (DEPLOY / place / name).read_text()


def run(words: list[Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, with its output kept; any exit code will do."""
    return subprocess.run(
        words, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def fenced(text: str, language: str) -> list[str]:
    """Return the blocks of a language in a Markdown text."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, flags=re.MULTILINE | re.DOTALL)
    return [block for _, block in found]


def commands(block: str) -> list[str]:
    """Return the commands of a shell block, continued lines joined, documents of `<<` left out."""
    plain = re.sub(r"( -)? <<'(\w+)'\n.*?^\2$", r"\1", block, flags=re.MULTILINE | re.DOTALL)
    lines = (line.strip() for line in plain.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def here_documents(block: str) -> list[str]:
    """Return the documents that a shell block feeds to its commands."""
    return [text for _, text in re.findall(r"<<'(\w+)'\n(.*?)^\1$", block, flags=re.MULTILINE | re.DOTALL)]


def names_imported(source: str) -> list[tuple[str, str]]:
    """Return the module and the name of each import from the package."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tomocpt_stream")
        for alias in node.names
    ]


def keywords(source: str, function: str) -> set[str | None]:
    """Return the keyword arguments that calls of a function, or a method of that name, are made with."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", None)) == function]
    return {keyword.arg for call in named for keyword in call.keywords}


def check(line: str) -> None:
    """Fail where a line names an option, a file or a name that does not exist."""
    if inner := re.fullmatch(r"\w+=\$\((.*)\)", line):
        line = inner[1]
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    words: Words = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;"):
            if words:
                check_words(words)
            words = []
        else:
            words.append(word)


def check_words(words: Words) -> None:
    """Fail where a command cannot be right."""
    assert words[0] in CHECKS, f"nothing is known of {words[0]}"
    CHECKS[words[0]](words[1:])


def split(words: Words, known: Options) -> tuple[dict[str, str], Words]:
    """Return the options before the first other word, and the words from there on."""
    given: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        name, equals, value = rest.pop(0).partition("=")
        assert name in known, f"{name} is not one of {sorted(known)}"
        assert known[name] or not equals, f"{name} takes no value"
        if known[name] and not equals:
            assert rest, f"{name} without its value"
            value = rest.pop(0)
        assert value or not known[name], f"{name} without its value"
        given[name] = value
    return given, rest


def spread(words: Words, known: Options) -> tuple[dict[str, str], Words]:
    """Return the options and the other words, in any order."""
    given: dict[str, str] = {}
    plain: Words = []
    rest = list(words)
    while rest:
        some, rest = split(rest, known)
        given |= some
        plain += rest[:1]
        rest = rest[1:]
    return given, plain


def tomocpt_stream(words: Words) -> None:
    """Parse the words with the command that they call."""
    if words == ["--version"]:
        return
    assert words[0] in main.commands
    main.commands[words[0]].make_context(words[0], list(words[1:]))


def dask(words: Words) -> None:
    """Parse the words with dask's own commands; those of dask-cuda with its documented options."""
    if words[:2] == ["cuda", "worker"]:
        assert spread(words[2:], DASK_CUDA)[1] == []
        return
    command = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[words[0]]
    context = command.make_context(words[0], list(words[1:]))
    # These commands hand what they do not know to preloaded modules, so that a wrong option passes as one.
    strays = [*context.params["preload_argv"], context.params.get("scheduler") or ""]
    assert not [word for word in strays if word.startswith("-")], strays
    assert not context.params["preload_argv"]
    if words[0] == "worker":
        assert context.params["nthreads"] == THREADS
        # dask's default is the share of the memory that two threads are of all cores
        assert context.params["memory_limit"] != "auto"
        parse_bytes(context.params["memory_limit"])
        parse_timedelta(context.params["lifetime"])
        parse_timedelta(context.params["lifetime_stagger"])


def load_script(path: Path) -> ModuleType:
    """Load a script as a module; dask_jobqueue need not be there."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    absent = "dask_jobqueue" not in sys.modules
    sys.modules.setdefault("dask_jobqueue", stand_in("dask_jobqueue", SLURMCluster=object))
    try:
        spec.loader.exec_module(module)
    finally:
        if absent:
            del sys.modules["dask_jobqueue"]
    return module


def stand_in(name: str, **names: object) -> ModuleType:
    """Return a module with a few names."""
    module = ModuleType(name)
    vars(module).update(names)
    return module


def python(words: Words) -> None:
    """Parse the words with the script's parser; what it leaves must be words of `tomocpt-stream pick`."""
    if words[0] == "-m":
        assert words[1] == "venv"
        return
    parser: argparse.ArgumentParser = load_script(ROOT / words[0]).arguments()
    _, rest = parser.parse_known_args(words[1:])
    if rest:
        tomocpt_stream(["pick", *rest])


def pip(words: Words) -> None:
    """Only this project is installed, with extras that it has."""
    assert words[0] == "install"
    for requirement in words[1:]:
        found = re.fullmatch(r"\.(?:\[(\w+)\])?", requirement)
        assert found, requirement
        assert found[1] is None or found[1] in PROJECT["optional-dependencies"]


def sbatch(words: Words) -> None:
    """The options are SLURM's; what follows the script goes to the pick command."""
    given, rest = split(words, SBATCH)
    if "--wrap" in given:
        assert not rest
        check(given["--wrap"])
        return
    assert '\ntomocpt-stream pick --scheduler "$scheduler_file"' in (ROOT / rest[0]).read_text()
    tomocpt_stream(["pick", *rest[1:]])


def docker(words: Words) -> None:
    """Build from files that are there; run commands of the image."""
    given, rest = split(words[1:], DOCKER[words[0]])
    if words[0] == "build":
        assert rest == ["."]
        assert given["-t"].endswith(IMAGE)
        name = given.get("--build-arg", "").partition("=")[0]
        assert re.search(rf"^ARG {name}\b", (ROOT / given["-f"]).read_text(), flags=re.MULTILINE) or not name
    elif words[0] == "run":
        assert rest[0] == IMAGE
        check_words([given.get("--entrypoint", "tomocpt-stream"), *rest[1:]])
    else:
        assert spread(rest, DOCKER[words[0]])[1][0].endswith(IMAGE)


def apptainer(words: Words) -> None:
    """Run commands of the image."""
    if words[0] == "build":
        assert [Path(word).suffix for word in words[1:]] == [".sif", ".tar"]
        return
    _, rest = split(words[1:], APPTAINER)
    assert rest[0].endswith(".sif")
    check_words([*({"run": ["tomocpt-stream"], "exec": []}[words[0]]), *rest[1:]])


def resources() -> set[str]:
    """Return the kind/name of what the manifests make, and of what the operator makes of a cluster."""
    made = {"daskworkergroup/{}-default", "deployment/{}-scheduler", "service/{}-scheduler"}
    found = set()
    for path in (ROOT / "deploy" / "kubernetes").glob("*.yaml"):
        for item in yaml.safe_load_all(path.read_text()):
            kind, name = item["kind"].lower(), item["metadata"]["name"]
            found.add(f"{kind}/{name}")
            if kind == "daskcluster":
                found |= {one.format(name) for one in made}
    return found


def kubectl(words: Words) -> None:
    """Files are there, resources are made, commands in a pod are right."""
    verb, rest = words[0], words[1:]
    inner = rest[rest.index("--") + 1 :] if "--" in rest else []
    files = [rest[place + 1] for place, word in enumerate(rest) if word == "-f"]
    _, plain = spread(rest[: len(rest) - len(inner) - bool(inner)], KUBECTL[verb])
    if inner:
        check_words(inner)
    assert all(name == "-" or (ROOT / name).is_file() for name in files)
    named = plain[1:] if verb == "rollout" else plain[:1]
    assert files or named
    assert set(named) <= resources()


def sed(words: Words) -> None:
    """What is replaced is in the file."""
    pattern = words[0].split("|")[1]
    assert pattern in (ROOT / words[1]).read_text()


def helm(words: Words) -> None:
    """The operator's chart is installed."""
    assert words[0] == "install"
    assert spread(words[1:], HELM)[1] == ["dask-kubernetes-operator"]


def tar(words: Words) -> None:
    """Packed to, or unpacked from, the standard streams."""
    assert words[0] in ("c", "x")
    assert (len(words) > 1) == (words[0] == "c")


def export(words: Words) -> None:
    """A setting of dask is one that it has, with a value of its kind."""
    name, _, value = words[0].partition("=")
    if name.startswith("DASK_"):
        assert name == "DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION"
        parse_timedelta(value)


def trivial(words: Words) -> None:
    """A command of the shell itself with one word."""
    assert len(words) == 1


CHECKS: dict[str, Callable[[Words], None]] = {
    "tomocpt-stream": tomocpt_stream,
    "dask": dask,
    "python": python,
    "python3.11": python,
    "pip": pip,
    "sbatch": sbatch,
    "srun": lambda words: check_words(split(words, SRUN)[1]),
    "docker": docker,
    "apptainer": apptainer,
    "kubectl": kubectl,
    "sed": sed,
    "helm": helm,
    "tar": tar,
    "source": trivial,
    "export": export,
}
