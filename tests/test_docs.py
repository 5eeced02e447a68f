"""The documentation agrees with the program: its reference, links, commands, options and examples."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from synthseg.cli import app
from synthseg.config import PretrainConfig, RunConfig, TrainConfig, generator_config, load_yaml, parse, set_by_path
from synthseg.config.finetuning import FinetuneConfig
from synthseg.labels import LabelTable, load_scheme

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "pipelines/*.md", "templates/*/*.md", "benchmarks/**/*.md", "docker/*.md")
    for page in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash", "console", "shell")
ROOT_COMMAND = typer.main.get_command(app)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def shell_lines(page: Path) -> list[str]:
    """Command lines of the shell blocks of a page, continued lines joined."""
    text = "".join(body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name in SHELL)
    return [line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)[1:]


def quoted_commands() -> list[tuple[str, str, bool]]:
    """(page, command line, whether it is complete); a command within a sentence may leave out its arguments."""
    found = []
    for page in PAGES:
        found += [(page_name(page), line, True) for line in shell_lines(page) if line.startswith("synthseg ")]
        found += [(page_name(page), line, False) for line in re.findall(r"`(synthseg [^`]+)`", prose(page))]
    return found


def find_command(arguments: list[str]) -> tuple[typer.core.TyperCommand, list[str]]:
    """The command that the first words name, and the words after them."""
    command, rest = ROOT_COMMAND, list(arguments)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command '{rest[0]}'"
        command = command.commands[rest.pop(0)]
    return command, rest


def options_of(command: typer.core.TyperCommand) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("-")} | {"--help"}


def test_the_reference_of_keys_is_up_to_date(load_script: Callable[[Path], ModuleType]) -> None:
    script = load_script(ROOT / "docs" / "make_reference.py")
    assert script.FILE.read_text(encoding="utf-8") == script.reference(), "run python docs/make_reference.py"


def slugs(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in slugs(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize(("page", "line", "complete"), quoted_commands())
def test_quoted_commands_parse(page: str, line: str, complete: bool) -> None:
    command, rest = find_command(words(line))
    if hasattr(command, "commands") or "--help" in rest:
        assert {word for word in rest if word.startswith("-")} <= options_of(command)
        return
    try:
        command.make_context(command.name, rest)
    except Exception as error:
        if complete or type(error).__name__ != "MissingParameter":
            raise


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, line) for page, line, _ in quoted_commands() if "--set" in line and "key=" not in line.lower()],
)
def test_quoted_settings_are_keys_of_a_recipe(page: str, line: str) -> None:
    command, rest = find_command(words(line))
    values = command.make_context(command.name, rest).params
    models: dict[str | None, type[RunConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    model = models.get(command.name, TrainConfig)
    if command.name == "generate":
        generator_config(values["config"], values["settings"])
    elif (ROOT / "pipelines" / f"{values['recipe']}.yaml").is_file():
        load_yaml(model, values["recipe"], values["settings"])
    else:
        record: dict[str, object] = {}
        for setting in values["settings"]:
            set_by_path(record, setting)
        parse(model, record, line)


def test_the_guide_lists_every_option_of_segment() -> None:
    text = (ROOT / "docs" / "segment.md").read_text(encoding="utf-8")
    table = text.partition("## Options")[2].partition("\n## ")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    listed = set(re.findall(r"`(-[\w-]+)`", " ".join(first_cells)))
    assert listed == options_of(find_command(["segment"])[0])


def test_the_readme_lists_the_labels_of_siam16() -> None:
    rows = re.findall(r"^\| (\d+) \| ([\w-]+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    table = load_scheme("siam16")
    assert [(int(label_id), name) for label_id, name in rows] == [(label.id, label.name) for label in table.labels]


def test_the_example_scheme_is_one() -> None:
    (text,) = blocks(ROOT / "docs" / "templates.md", "json")
    table = LabelTable.from_dict(json.loads(text))
    assert table.groups(load_scheme("siam16")).any(1).all()


def test_the_example_recipe_is_the_one_that_ships() -> None:
    (text,) = blocks(ROOT / "docs" / "training.md", "yaml")
    assert yaml.safe_load(text) == yaml.safe_load((ROOT / "pipelines" / "phantom.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_quoted_make_targets_exist(page: Path) -> None:
    lines = shell_lines(page) + re.findall(r"`(make [^`]+)`", prose(page))
    quoted = {words(line)[0] for line in lines if line.startswith("make ")}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert quoted <= set(targets)
