"""Error codes: every error has one, and the table that the pages are made from lists exactly those."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import diptych
from diptych.cli.app import call
from diptych.errors import UsageError, codes

SOURCE = Path(diptych.__file__).parent
CLASSES = {"UserError", "UsageError", "NobodyAnswers", "Refused"}


def raised() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in CLASSES:
                    yield f"{path.relative_to(SOURCE)}:{node.lineno}", node


def literals(node: ast.expr) -> list[str]:
    """The codes an argument may be: a literal, or each branch of a choice between literals."""
    if isinstance(node, ast.IfExp):
        return literals(node.body) + literals(node.orelse)
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def test_every_error_has_a_code_from_the_table():
    unknown = [
        f"{at}: {code}"
        for at, node in raised()
        if len(node.args) > 1
        for code in literals(node.args[0])
        if code not in codes()
    ]
    assert not unknown


def test_every_code_has_a_meaning_and_a_remedy_in_full_sentences():
    for code, entry in codes().items():
        assert code.replace("_", "").isalpha() and code == code.lower(), code
        assert set(entry) == {"meaning", "remedy"}, code
        assert all(text[0].isupper() or text[0] == "`" for text in entry.values()), code
        assert all(text.endswith(".") for text in entry.values()), code


def test_an_error_keeps_its_code_between_processes():
    error = pickle.loads(pickle.dumps(UsageError("path_not_found", "Not found: x")))
    assert isinstance(error, UsageError) and (error.code, str(error), error.exit_code) == (
        "path_not_found",
        "Not found: x",
        2,
    )


def test_the_command_line_prints_the_code_and_with_json_an_object(capsys: pytest.CaptureFixture[str]):
    assert call(["tasks", "subjects"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error[task_unknown]: ") and "did you mean 'subject'" in err
    assert call(["tasks", "subjects", "--json"]) == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["code"] == "task_unknown" and f"error[task_unknown]: {error['message']}\n" == err


def test_a_command_line_that_cannot_be_parsed_has_a_code_too(capsys: pytest.CaptureFixture[str]):
    assert call(["generate", "--nonsense", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "usage"
