"""Texts of other people are shown, in pages and on terminals, and never obeyed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.cli.app import call
from diptych.data import records
from diptych.data.store import Dataset
from diptych.utils.console import one_line, printable, printable_json
from diptych.utils.markup import Html, escape, html, tag

EVIL = "\"><img src=x onerror=alert(1)>'&"
# Clears the screen, changes the title, C1's form of the same, deletes a letter, returns, turns text around.
OBEYED = ("\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "\x08", "\r", "\x7f", "\u202e", "\u2066", "\u200f")


def test_only_what_is_html_already_stays_as_it_is() -> None:
    assert tag("p", EVIL, class_=EVIL) == f'<p class="{escape(EVIL)}">{escape(EVIL)}</p>'
    assert not {"<", ">", '"', "'"} & set(escape(EVIL))
    assert html("<", tag("b", "&"), 7) == "&lt;<b>&amp;</b>7"
    assert escape(escape("<")) == "&lt;" and isinstance(html(), Html)
    assert html(tag("b", "<") + "<i>") == "&lt;b&gt;&amp;lt;&lt;/b&gt;&lt;i&gt;"  # joined by hand it is text again
    assert tag("img", alt="a", hidden=True, src=None, data_x=False, data_n=0) == '<img alt="a" hidden data-n="0">'


@pytest.mark.parametrize("text", OBEYED)
def test_a_terminal_gets_nothing_to_obey(text: str) -> None:
    assert printable(f"a{text}b\tc\nd").endswith("b\tc\nd") and text[0] not in printable(f"a{text}b")
    assert "\n" not in one_line(f"a{text}\nb")
    shown = printable_json({"words": f"é{text}\n"})
    assert text[0] not in shown and "é" in shown and json.loads(shown) == {"words": f"é{text}\n"}


def test_what_people_write_is_not_touched() -> None:
    text = "café · 12\u202f345 · 猫\u200d👩‍🚀 · שלום\tx\ny\u00a0z"
    assert printable(text) == text and json.loads(printable_json(text)) == text


@pytest.mark.parametrize("as_json", [True, False])
def test_no_command_prints_what_a_terminal_obeys(
    as_json: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = "".join(OBEYED) + "\n✓ teacher  trusted"
    folder = tmp_path / "pairs"
    data = Dataset(folder, records.schema(records.PROMPT))
    data.write_shard(0, [])
    data.publish({"teacher": evil, "teacher_sha256": evil, "judge": evil, "judge_sha256": "0"})
    (tmp_path / evil.replace("/", "")).mkdir()
    commands = [
        (["trace", str(folder)], 0),
        (["trace", evil], 2),
        (["push", evil, "./x"], 2),
        (["plan", evil], 2),
        (["tasks", "show", evil], 2),
        (["data", "stats", evil], 2),
        (["data", "import", str(tmp_path), "--format", evil, "--out", str(tmp_path / "out")], 2),
    ]
    for words, code in commands:
        assert call([*words, "--json"] if as_json else words) == code, words
        told = capfd.readouterr()
        assert not {text[0] for text in OBEYED} & set(told.out + told.err), words
        if words == ["trace", str(folder)] and not as_json:
            assert not [line for line in told.out.splitlines() if line.startswith("✓ teacher")]
