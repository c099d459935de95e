"""The documents name what there is: every setting, kind and command, none besides, and their commands can be given."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvd_fast import cli
from mvd_fast.config.checks import KNOWN_DEEPSPEED_KEYS, OWNED_DEEPSPEED_KEYS
from mvd_fast.config.kinds import DATASETS, TARGETS, TASKS, available_kinds, kind_module
from mvd_fast.config.load import list_recipes, load_config
from mvd_fast.config.reference import reference, setting_names
from mvd_fast.config.reference import sections as reference_sections
from mvd_fast.tools.plan.dry_run import task_without_memory
from mvd_fast.training import trainer

ROOT = Path(__file__).parents[1]
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
WRITTEN = "\n".join(text for page, text in TEXTS.items() if ROOT / page != SETTINGS_PAGE)  # by hand


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


# ---- settings ----


def test_the_page_of_settings_is_the_schemas() -> None:
    assert SETTINGS_PAGE.read_text(encoding="utf-8") == reference(), "mvd-fast config keys > docs/settings.md"


def test_every_setting_stands_there_with_its_meaning() -> None:
    rows = re.findall(
        r"^\| `([\w.\[\]]+)` \| .* \| (\S.*) \|$", SETTINGS_PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert list(dict.fromkeys(key for key, _ in rows)) == setting_names()
    assert len(setting_names()) > 90


def settings_named() -> Iterator[tuple[str, str]]:
    """(page, dotted key) of what looks like one in code; `targets.*.precision` stands for all entries."""
    sections = "|".join({re.split(r"[.\[]", name)[0] for name in setting_names() if "." in name} | {"deepspeed"})
    files = r"(?!\w*\.(?:md|py|json|jsonl|txt|safetensors|pth|csv)\b)"
    pattern = re.compile(rf"(?<![\w./*-]){files}({sections})((?:\.(?:\w+|\*))+)(?![\w/(])")
    for page, text in TEXTS.items():
        for code in [*code_spans(text), *blocks(text, "bash")]:
            yield from ((page, section + rest) for section, rest in pattern.findall(code))


def test_every_setting_that_is_named_exists() -> None:
    names = [name.replace("[]", ".entry") for name in setting_names()]
    sections = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    known = {
        *names,
        *sections,
        *(f"{s.key}.kind" for section in reference_sections() for s in section.settings if s.choices),
    }
    found = list(settings_named())
    wrong = []
    for page, key in found:
        first, _, rest = key.partition(".")
        if first == "deepspeed":
            fine = rest.split(".")[0] in KNOWN_DEEPSPEED_KEYS | OWNED_DEEPSPEED_KEYS.keys()
        else:
            entry = re.sub(r"^targets\.[^.]+", "targets.entry", key)  # by its name, kind or number
            fine = any(re.fullmatch(entry.replace(".", r"\.").replace("*", r"\w+"), name) for name in known)
        wrong += [] if fine else [f"{page}: {key}"]
    assert not wrong
    assert len({key for _, key in found}) > 60


# ---- kinds ----


@pytest.mark.parametrize("package", [TASKS, TARGETS, DATASETS])
def test_every_kind_is_described(package: str) -> None:
    spans = {word for span in code_spans(WRITTEN) for word in re.findall(r"\w+", span)}
    assert not set(available_kinds(package)) - spans


def table_after(page: str, heading: str) -> list[list[list[str]]]:
    """Code in the cells of the table whose first column is headed so."""
    table = TEXTS[page].split(f"| {heading} |")[1].split("\n\n")[0]
    return [[code_spans(cell) for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_of_data_kinds_has_them_all() -> None:
    assert sorted(row[0][0] for row in table_after("docs/data.md", "`data.kind`")) == list(available_kinds(DATASETS))


def test_the_table_of_tasks_says_which_data_they_take() -> None:
    rows = {row[0][0]: set(row[3]) for row in table_after("docs/training.md", "`task`")}
    datasets = {kind: kind_module(DATASETS, kind).Config.gives for kind in available_kinds(DATASETS)}
    needs = {task: kind_module(TASKS, task).Config.needs for task in available_kinds(TASKS)}
    assert rows == {task: {kind for kind, gives in datasets.items() if need <= gives} for task, need in needs.items()}


def test_every_kind_that_is_named_exists() -> None:
    named = re.findall(r"(?<![\w.])(task|targets\.\w+\.kind|data\.kind)[=:] ?`?\"?(\w+)", WRITTEN)
    named = [
        (part, kind) for part, kind in named if kind != "mine" and (part != "task" or kind in available_kinds(TASKS))
    ]
    assert named  # `mine` is the name of a file that a reader writes
    packages = {"task": TASKS, "data.kind": DATASETS}
    for part, kind in named:
        assert kind in available_kinds(packages.get(part, TARGETS)), f"{part}={kind}"


# ---- commands ----


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_stands_in_the_documents(name: str) -> None:
    assert re.search(rf"mvd-fast {name}\b", WRITTEN)


def test_every_command_that_is_named_exists() -> None:
    groups = {name.split()[0] for name in cli.COMMANDS}
    for page, text in TEXTS.items():
        for code in [*code_spans(text), *blocks(text, "bash")]:
            for first, second in re.findall(r"(?<![\w/.-])mvd-fast ([a-z-]+)(?: ([a-z]+))?", code):
                assert first in groups, f"{page}: mvd-fast {first}"
                pair = f"{first} {second}"
                assert first in cli.COMMANDS or not second or pair in cli.COMMANDS, f"{page}: mvd-fast {pair}"


SCRIPTS = {
    "mvd-fast": [],
    "mvd_fast.cli": [],
    "mvd_fast/train.py": ["train"],
    "mvd_fast.train": ["train"],
    "mvd_fast/finetune.py": ["finetune"],
}


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, arguments of `mvd-fast`) of every line of a shell block that starts one of ours, but not `[options]`."""
    for page, text in TEXTS.items():
        for line in "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            place = next((i for i, word in enumerate(words) if word in SCRIPTS), None)
            if place is not None and "[" not in line and "..." not in line:
                yield page, [*SCRIPTS[words[place]], *words[place + 1 :]]


class Parsed(BaseException):
    """Thrown out of a command once its arguments have been read."""


@pytest.mark.parametrize(
    ("page", "argv"), list(commands()), ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_commands_can_be_given_as_they_stand(page: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser: argparse.ArgumentParser, *given: list[str]) -> argparse.Namespace:
        arguments = parse(parser, *given)
        if parser.prog != cli.PROGRAM:  # else it only chose the command
            raise Parsed(arguments)
        return arguments

    def handed_on(command: list[str]) -> None:
        """pytest's, of `bench step`; its own options are tested there."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--config", default="vitb_from_vitb")
        parser.add_argument("--set", nargs="+", default=[])
        raise Parsed(parser.parse_known_args(command[4:])[0])

    monkeypatch.setattr(cli.subprocess, "call", handed_on)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed) as stop:
        cli.main(argv)
    arguments = vars(stop.value.args[0])
    config = arguments.get("config")
    if config and (config in list_recipes() or config.startswith("configs/")):
        load_config(config, arguments["set"])
    elif config:
        assert page == "docs/training.md"  # an example of a user's own file


def test_deepspeed_is_started_quietly() -> None:
    lines = [line for text in TEXTS.values() for block in blocks(text, "bash") for line in block.splitlines()]
    launched = [line for line in lines if line.startswith("deepspeed ")]
    assert len(launched) > 5 and all(line.startswith("deepspeed --quiet ") for line in launched)


def test_there_are_commands_to_be_tried() -> None:
    assert len(list(commands())) > 25


# ---- the rest ----


def test_links_lead_somewhere() -> None:
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{page}: {target}"


def test_the_phases_of_a_step_are_described() -> None:
    (row,) = re.findall(r"^\| `phase_seconds` \| (.*) \|$", TEXTS["docs/training.md"], re.MULTILINE)
    timed = set(re.findall(r'\.phase\("(\w+)"\)', Path(trainer.__file__).read_text()))
    watched = {"forward", *task_without_memory(load_config("vits_from_vitb")).frozen()}
    assert set(code_spans(row)) == timed | watched
