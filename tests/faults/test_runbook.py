"""docs/runbook.md against the code: every fault is there, its messages are in the source, its tests exist."""

import ast
import pathlib
import re

import pytest
from tiny_run import REPOSITORY

RUNBOOK = REPOSITORY / "docs" / "runbook.md"
FAULTS = range(1, 45)


def sections() -> dict[str, str]:
    """Title to text, of all sections."""
    parts = re.split(r"^### (.+)$", RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        title: re.split(r"^## ", text, flags=re.MULTILINE)[0] for title, text in zip(*[iter(parts)] * 2, strict=True)
    }


def comment(text: str) -> str:
    """What says which tests show a section."""
    found = re.findall(r"<!-- (.*?) -->", text, flags=re.DOTALL)
    assert len(found) == 1, "one comment per section"
    return found[0].strip()


def source_strings() -> list[str]:
    """Every text in the package, with … for what is filled in."""
    found = []
    for file in (REPOSITORY / "gpt2_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_fault_is_there_once() -> None:
    numbers = [int(number) for title in sections() for number in re.findall(r"^(\d+)\. ", title)]
    assert numbers == list(FAULTS)


@pytest.mark.parametrize("title", sections())
def test_a_section_says_what_one_sees_why_and_what_to_do(title: str) -> None:
    lines = sections()[title].split("\n")
    assert [line.split("**")[1] for line in lines if line.startswith("**")] == ["You see", "Cause", "Do"]


def test_nothing_is_left_to_do() -> None:
    left = [title for title, text in sections().items() if "TODO" in text]
    assert not left


@pytest.mark.parametrize("title", sections())
def test_its_tests_exist(title: str) -> None:
    said = comment(sections()[title])
    if said == "TODO":
        return  # told by the test above
    if said.startswith("untested: "):
        assert len(said) > 30, "a reason"
        return
    for test in said.split(","):
        file, _, name = test.strip().partition("::")
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions and name.startswith("test_"), test


def test_its_messages_are_those_of_the_source() -> None:
    strings = source_strings()
    checked, wrong = 0, []
    for title, text in sections().items():
        (seen,) = re.findall(r"^\*\*You see\*\* (.*?)^\*\*Cause", text, flags=re.MULTILINE | re.DOTALL)
        for message in re.findall(r"`([^`]+)`", seen):
            pieces = [piece for piece in " ".join(message.split()).split("…") if piece]
            pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
            checked += 1
            if len("".join(pieces)) < 15 or not any(pattern.search(string) for string in strings):
                wrong.append((title, message))
    assert not wrong
    assert checked > 25


def test_it_is_linked_and_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", RUNBOOK.read_text(encoding="utf-8")):
        assert (RUNBOOK.parent / target).exists(), target
    assert "docs/runbook.md" in pathlib.Path(REPOSITORY, "README.md").read_text(encoding="utf-8")
