"""The audit: samples with known weights, labels that survive a kill, estimates that are right where truth is known."""

from __future__ import annotations

import csv
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import judged_run
from diptych import cli
from diptych.data import audit, labels, precision, records
from diptych.data.audit_page import AuditServer, serve
from diptych.data.precision import Labelled, Stratum
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError

# Similarities 0.000 … 0.995; the same from 0.6 on, but for every tenth; below, every tenth is the same all the same.
STEPS = [(i / 200, (i >= 120) != (i % 10 == 0)) for i in range(200)]


@pytest.fixture
def known(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A run and the truth about its pairs."""
    return tmp_path / "run", judged_run.make(tmp_path / "run", STEPS, copies=6, seamless=4)


def at(threshold: float) -> tuple[float, float]:
    """True precision and recall of a threshold."""
    kept = [same for similarity, same in STEPS if similarity >= threshold]
    return sum(kept) / len(kept), sum(kept) / sum(same for _, same in STEPS)


# ---- drawing


def test_the_population_is_what_reached_the_judge_once_a_pair(known: tuple[Path, dict[str, str]]) -> None:
    sample = audit.draw(known[0], 1000, 0)
    assert sample.population == len(sample.pairs) == 200 and sample.left_out == 20
    assert {pair.id for pair in sample.pairs} == {id for id in known[1] if id.endswith("-01")}
    assert sum(band.size for band in sample.bands if band.kept) == 100
    assert all(band.drawn == band.size for band in sample.bands)


def test_a_sample_is_dense_near_the_threshold_and_its_weights_are_known(known: tuple[Path, dict[str, str]]) -> None:
    sample = audit.draw(known[0], 80, 0)
    drawn = {(band.kept, band.name): (band.size, band.drawn) for band in sample.bands}
    assert sum(count for _, count in drawn.values()) == len(sample.pairs) == 80
    for kept in (True, False):
        near, far = drawn[kept, "near"], drawn[kept, "far"]
        assert near == (25, 20) and far[0] == 50 and far[1] == 10
    for pair in sample.pairs:
        band = sample.bands[pair.stratum]
        assert band.low <= pair.similarity <= band.high and band.kept == (pair.similarity >= 0.5)
        inside = [s for s, _ in STEPS if band.low <= s <= band.high]
        assert len(inside) == band.size and pair.above == sum(s >= pair.similarity for s in inside)


def test_a_seed_draws_the_same_and_a_larger_sample_holds_the_smaller(known: tuple[Path, dict[str, str]]) -> None:
    def ids(size: int, seed: int) -> list[str]:
        return [pair.id for pair in audit.draw(known[0], size, seed).pairs]

    assert ids(40, 0) == ids(40, 0) and set(ids(40, 0)) < set(ids(90, 0)) and set(ids(40, 0)) != set(ids(40, 1))
    assert ids(40, 0) != sorted(ids(40, 0))  # the order tells nothing


def test_the_two_orders_of_a_grid_count_apart_where_the_judge_said_otherwise(known: tuple[Path, Any]) -> None:
    data = Dataset(known[0] / "candidates", records.schema(records.PAIR))
    rows = data.read_shard(0)
    rows[1] |= {"kept": False, "reason": "undecided: two yes, two no", "similarity": None}
    data.write_shard(0, rows)
    sample = audit.draw(known[0], 1000, 0)
    assert sample.population == 201 and sample.bands[-1].name == "undecided" and sample.bands[-1].size == 1
    assert rows[1]["id"] in {pair.id for pair in sample.pairs}


def test_allocation_grows_and_takes_no_more_than_there_is() -> None:
    before = [0, 0, 0]
    for size in range(1, 40):
        counts = audit.allocate(size, [3, 10, 20], [0.5, 0.25, 0.25])
        assert sum(counts) == min(size, 33) and counts[0] <= 3 and counts[1] <= 10
        assert all(new >= old for new, old in zip(counts, before, strict=True))
        before = counts


# ---- estimates


def test_with_every_pair_labelled_the_numbers_are_exact(known: tuple[Path, dict[str, str]]) -> None:
    sample = audit.draw(known[0], 1000, 0)
    found = audit.report(sample, [{"me": known[1]}], wanted=0.85)
    p, r = at(0.5)
    exact = {"value": round(p, 4), "ci95": [round(p, 4)] * 2}, {"value": round(r, 4), "ci95": [round(r, 4)] * 2}
    assert (found["threshold"]["precision"], found["threshold"]["recall"]) == exact
    least = min(s for s, _ in STEPS if at(s)[0] >= 0.85)
    better = found["wanted"]["threshold"]
    assert better["same"] == pytest.approx(least, abs=1e-6) and better["same"] <= least and least > 0.5
    assert better["precision"]["value"] == round(at(least)[0], 4)
    assert better["recall"]["value"] == round(at(least)[1], 4)
    assert better["recall"]["ci95"] == [better["recall"]["value"]] * 2


def test_a_lower_threshold_is_found_when_less_precision_will_do(known: tuple[Path, dict[str, str]]) -> None:
    found = audit.report(audit.draw(known[0], 1000, 0), [{"me": known[1]}], wanted=0.6)
    least = min(s for s, _ in STEPS if at(s)[0] >= 0.6)
    assert found["wanted"]["threshold"]["same"] == pytest.approx(least, abs=1e-6) and least < 0.5
    # The very best: from 0.955 on not one is different. Nobody's labels, nobody's threshold.
    found = audit.report(audit.draw(known[0], 1000, 0), [{"me": known[1]}], wanted=1)
    assert found["wanted"]["threshold"]["same"] == pytest.approx(0.955, abs=1e-6)
    assert audit.report(audit.draw(known[0], 1000, 0), [], wanted=0.5)["wanted"]["threshold"] is None


def test_the_intervals_hold_the_truth_and_the_estimates_are_not_skewed() -> None:
    rng = np.random.default_rng(1)
    held, points, rounds = {"precision": 0, "recall": 0}, [], 200
    sizes, drawn, rates = [300, 600, 2000, 4000], [40, 25, 30, 40], [0.8, 0.97, 0.35, 0.02]
    for _ in range(rounds):
        whole = [rng.random(n) < rate for n, rate in zip(sizes, rates, strict=True)]
        strata = [
            Stratum(i < 2, len(all_), 0.0, tuple(Labelled(0.5, bool(s), 1) for s in rng.permutation(all_)[:n]))
            for i, (all_, n) in enumerate(zip(whole, drawn, strict=True))
        ]
        found = precision.estimate(strata)
        same = [int(all_.sum()) for all_ in whole]
        truth = {"precision": sum(same[:2]) / 900, "recall": sum(same[:2]) / sum(same)}
        assert found.precision is not None and found.recall is not None
        for name, measured in (("precision", found.precision), ("recall", found.recall)):
            held[name] += measured.low <= truth[name] <= measured.high
        points.append([found.precision.value - truth["precision"], found.recall.value - truth["recall"]])
    assert all(0.9 <= n / rounds <= 0.995 for n in held.values()), held
    assert np.abs(np.mean(points, axis=0)).max() < 0.02


def test_the_weights_matter() -> None:
    few = Stratum(True, 900, 0.6, tuple(Labelled(0.7, True, 1) for _ in range(10)))
    many = Stratum(True, 100, 0.5, tuple(Labelled(0.5, False, 1) for _ in range(50)))
    found = precision.estimate([few, many]).precision
    assert found is not None and found.value == pytest.approx(0.9) and found.low < 0.9 < found.high


def test_labels_of_one_side_only_say_nothing_of_recall() -> None:
    kept = Stratum(True, 10, 0.6, (Labelled(0.7, True, 3),))
    found = precision.estimate([kept, Stratum(False, 10, 0.1)])
    assert found.precision is not None and found.recall is None
    assert precision.estimate([Stratum(True, 10, 0.6)]).precision is None


def test_kappa_is_cohens() -> None:
    # The textbook's table: both yes 20, both no 15, 5 and 10 apart.
    a = ["same"] * 25 + ["different"] * 25
    b = ["same"] * 20 + ["different"] * 5 + ["same"] * 10 + ["different"] * 15
    assert precision.kappa(a, b) == (pytest.approx(0.7), pytest.approx(0.4))
    assert precision.kappa(["same"] * 3, ["same"] * 3) == (1, None)


def test_two_labellers_are_compared_and_their_disputes_left_out(known: tuple[Path, dict[str, str]]) -> None:
    sample = audit.draw(known[0], 1000, 0)
    first, *rest = [pair.id for pair in sample.pairs]
    other = {**known[1], first: "different" if known[1][first] == "same" else "same", rest[0]: "unsure"}
    found = audit.report(sample, [{"me": known[1]}, {"me": other}])
    (agreed,) = found["agreement"]
    assert (agreed["a"], agreed["b"], agreed["pairs"]) == ("me", "me (file 2)", 200)
    assert agreed["agree"] == round(198 / 200, 4) and 0.9 < agreed["kappa"] < 1
    counts = {key: found["labels"][key] for key in ("used", "unsure", "disputed", "missing", "outside")}
    assert counts == {"used": 199, "unsure": 0, "disputed": 1, "missing": 0, "outside": 200}


# ---- labels


def test_a_cut_line_is_mended_and_a_wrong_one_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    labels.Labels(path).add("a", "same", "me")
    whole = path.read_bytes()
    for cut, kept in ((b'{"id": "b", "la', 1), (whole.replace(b'"a"', b'"b"').rstrip(b"\n"), 2)):
        path.write_bytes(whole + cut)
        assert len(labels.read(path)["me"]) == kept
        labels.Labels(path).add("c", "unsure", "me")
        assert len(labels.read(path)["me"]) == kept + 1 and path.read_bytes().endswith(b"\n")
    path.write_bytes(b"{\n" + whole)
    with pytest.raises(UsageError, match="line 1: not a label"):
        labels.read(path)
    path.write_bytes(whole.replace(b'"same"', b'"smae"'))
    with pytest.raises(UsageError, match=r"line 1: 'smae' is no label; .* did you mean 'same'"):
        labels.read(path)


def test_the_last_label_of_a_labeller_holds(tmp_path: Path) -> None:
    file = labels.Labels(tmp_path / "labels.jsonl")
    for label, who in (("same", "me"), ("different", "me"), ("same", "ben")):
        file.add("a", label, who)
    assert labels.read(file.path) == {"me": {"a": "different"}, "ben": {"a": "same"}}


# ---- the sheet


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.call(["data", "audit", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_sheet_is_written_filled_in_and_read_back(
    known: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, truth = known
    sheet = tmp_path / "sheet.csv"
    asked = (str(run), "--sample", "30", "--csv", str(sheet))
    assert command(capsys, *asked)[0] == 0
    code, _, error = command(capsys, *asked)
    assert code == 1 and "no labels yet; fill in its column label" in error
    with sheet.open(encoding="utf-8-sig", newline="") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    assert len(rows) == 30 and set(rows[0]) == set(labels.SHEET)
    stored = {row["id"]: row for row in Dataset(run / "candidates")}
    for row in rows:
        assert (tmp_path / row["reference"]).read_bytes() == stored[row["id"]]["conditioning"]["bytes"]
        assert (tmp_path / row["target"]).read_bytes() == stored[row["id"]]["image"]["bytes"]
        row["label"] = truth[row["id"]][0].upper()
    with sheet.open("w", encoding="utf-8-sig", newline="") as stream:  # as a German spreadsheet saves it
        writer = csv.DictWriter(stream, list[str](labels.SHEET), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    code, out, _ = command(capsys, *asked, "--labeller", "ana", "--json")
    assert code == 0 and json.loads(out)["labels"]["used"] == 30
    file = run / "audit" / "labels.jsonl"
    before = file.read_bytes()
    assert labels.read(file)["ana"] == {row["id"]: truth[row["id"]] for row in rows}
    assert command(capsys, *asked, "--labeller", "ana")[0] == 0 and file.read_bytes() == before
    sheet.write_text(sheet.read_text("utf-8-sig").replace(";S;", ";smae;", 1), "utf8")
    code, _, error = command(capsys, *asked)
    assert file.read_bytes() == before
    assert code == 2 and re.search(r"sheet\.csv line \d+: 'smae' is no label", error)
    assert len(error.splitlines()) == 1


def test_a_sheet_of_another_sample_is_refused(
    known: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels.write_sheet(tmp_path / "sheet.csv", [["c-999999-01", "same", "cat", "", ""]])
    code, _, error = command(capsys, str(known[0]), "--csv", str(tmp_path / "sheet.csv"))
    assert code == 2 and "is of another sample; give the --sample and --seed" in error
    assert not (known[0] / "audit").exists()


def test_a_sheet_runs_no_formula(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    labels.write_sheet(
        path, [["c-1", "", '=HYPERLINK("http://x")', "a.png", "b.png"], ["c-2", "same", "a\u2028b", "", ""]]
    )
    assert "'=HYPERLINK" in path.read_text("utf-8-sig")
    assert labels.read_sheet(path) == {"c-2": "same"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--serve", "--csv", "x.csv"], "choose one"),
        (["--labeller", " "], "--labeller is empty"),
        (["--serve", "--labels", "a", "--labels", "b"], "new labels go into one file"),
        (["--labels", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--sample", "0"], "--sample"),
        (["--precision", "1.5"], "--precision"),
    ],
)
def test_wrong_use_is_one_line(
    known: tuple[Path, Any], capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    code, _, error = command(capsys, str(known[0]), *args)
    assert code == 2 and words in error and len(error.splitlines()) == 1


def test_a_run_without_labels_or_candidates_says_what_comes_first(
    known: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = command(capsys, str(known[0]))
    assert code == 1 and "has no labels yet; first: diptych data audit" in error
    for part in (known[0] / "candidates").iterdir():
        part.unlink()
    with pytest.raises(UserError, match="no pair that a judge decided on; first: diptych curate"):
        audit.draw(known[0], 10, 0)


# ---- the page


@pytest.fixture
def server(known: tuple[Path, dict[str, str]]) -> Iterator[AuditServer]:
    file = labels.Labels(known[0] / "audit" / "labels.jsonl")
    sample = audit.draw(known[0], 12, 0)
    server = AuditServer(sample, file, "me", {sample.pairs[0].id: "unsure"})
    thread = threading.Thread(target=serve, args=(server,))
    thread.start()
    yield server
    server.shutdown()
    thread.join(60)


def ask(server: AuditServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(
        method, path, data, {**kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    )
    answer = connection.getresponse()
    read = answer.status, answer.headers, answer.read()
    connection.close()
    return read


def test_the_page_serves_the_sample_and_nothing_that_tells_the_verdict(server: AuditServer) -> None:
    status, headers, page = ask(server, "GET", "/")
    assert (
        status == 200 and headers["Content-Type"].startswith("text/html") and server.url.startswith("http://127.0.0.1:")
    )
    assert not re.search(rb"(src|href)\s*=\s*[\"']?https?:", page), "the page must need nothing else"
    state = json.loads(ask(server, "GET", "/state")[2])
    assert [set(pair) for pair in state["pairs"]] == [{"id", "subject"}] * 12
    assert [pair["id"] for pair in state["pairs"]] == [pair.id for pair in server.sample.pairs]
    assert state["said"] == {state["pairs"][0]["id"]: "unsure"} and "same individual" in state["question"]
    rows = {row["id"]: row for row in Dataset(server.sample.run / "candidates")}
    for pair in state["pairs"]:
        for side, column in (("reference", "conditioning"), ("target", "image")):
            status, headers, data = ask(server, "GET", f"/picture/{pair['id']}/{side}")
            assert (status, headers["Content-Type"]) == (200, "image/png")
            assert data == rows[pair["id"]][column]["bytes"] and headers["X-Content-Type-Options"] == "nosniff"


def test_labels_are_on_the_disk_when_the_page_hears_so(server: AuditServer) -> None:
    first, second = server.sample.pairs[1].id, server.sample.pairs[2].id
    for count, (id, label) in enumerate([(first, "same"), (second, "different"), (first, "unsure")]):
        status, _, answer = ask(server, "POST", "/label", {"id": id, "label": label})
        assert status == 200 and json.loads(answer)["done"] == (2, 3, 3)[count]
        assert labels.read(server.labels.path)["me"][id] == label
    row = json.loads(server.labels.path.read_bytes().splitlines()[0])
    assert set(row) == {"id", "label", "labeller", "time"}


def test_only_sampled_pictures_and_labels_are_taken(server: AuditServer) -> None:
    drawn = {pair.id for pair in server.sample.pairs}
    other = next(row["id"] for row in Dataset(server.sample.run / "candidates").columns("id") if row["id"] not in drawn)
    for path in (
        f"/picture/{other}/target",
        "/picture/../../recipe.yaml/target",
        "/picture/%2e%2e%2frecipe.yaml/target",
    ):
        assert ask(server, "GET", path)[0] == 404
    for path in ("/recipe.yaml", "/audit/labels.jsonl", f"/picture/{server.sample.pairs[0].id}/evidence"):
        assert ask(server, "GET", path)[0] == 404
    good = server.sample.pairs[1].id
    wrong: list[Any] = [
        {"id": other, "label": "same"},
        {"id": good, "label": "maybe"},
        {"id": [good]},
        [1],
        b"{",
        b"x" * 20_000,
    ]
    for body in wrong:
        assert ask(server, "POST", "/label", body)[0] == 400
    assert not server.labels.path.exists()


def test_other_sites_are_refused(server: AuditServer) -> None:
    body = {"id": server.sample.pairs[1].id, "label": "same"}
    assert ask(server, "GET", "/state", Host="evil.example")[0] == 403
    assert ask(server, "POST", "/label", body, Origin="https://evil.example")[0] == 403
    assert ask(server, "POST", "/label", json.dumps(body).encode(), Content_Type="text/plain")[0] == 415
    assert not server.labels.path.exists()
    assert ask(server, "POST", "/label", body, Origin=server.url.rstrip("/"))[0] == 200


def test_a_killed_session_has_every_label_and_the_next_one_reports(known: tuple[Path, dict[str, str]]) -> None:
    run, truth = known
    command = [sys.executable, "-m", "diptych", "data", "audit", str(run), "--sample", "10", "--serve"]

    def begin() -> tuple[subprocess.Popen[str], Any]:
        # A shell's background jobs ignore Ctrl-C and hand that down.
        hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear, env=dict(os.environ)
        )
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stderr.readline())
        assert found is not None
        return process, type("Port", (), {"server_port": int(found[1])})

    process, port = begin()
    pairs = json.loads(ask(port, "GET", "/state")[2])["pairs"]
    for pair in pairs[:7]:
        assert ask(port, "POST", "/label", {"id": pair["id"], "label": truth[pair["id"]]})[0] == 200
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    process, port = begin()
    state = json.loads(ask(port, "GET", "/state")[2])
    assert state["said"] == {pair["id"]: truth[pair["id"]] for pair in pairs[:7]}
    for pair in pairs[7:]:
        assert ask(port, "POST", "/label", {"id": pair["id"], "label": truth[pair["id"]]})[0] == 200
    assert ask(port, "POST", "/finish", {})[0] == 200
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "used        10" in out and "precision" in out
