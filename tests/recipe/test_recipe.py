"""A recipe is checked: a wrong key or value is named in one line, with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diptych import recipe as recipes
from diptych.errors import UsageError, UserError, nearest
from diptych.recipe import load
from diptych.recipe.schema import Recipe, Section


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text, "utf8")
    return path


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_that_ships_loads_and_survives_a_dump(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert load(write(tmp_path, recipe.dump())) == recipe
    assert load(name).dump() == recipe.dump()


def test_the_recipes_that_are_promised_ship() -> None:
    assert {"pocket", "demo", "flux-subject"} <= set(recipes.names())


def test_set_lays_yaml_values_over_the_file() -> None:
    recipe = load("pocket", ["distill.learning_rate=1e-4", "evaluate.seeds=[0, 1]", "paint.panel_size=32", "seed=7"])
    assert recipe.distill.learning_rate == 1e-4
    assert recipe.evaluate.seeds == [0, 1]
    assert (recipe.paint.panel_size, recipe.seed) == (32, 7)
    assert load("pocket", ["curate.thresholds={same: 0.25}"]).curate.thresholds.near_copy == 0.045
    assert load("pocket", ["write.count=1", "write.count=2"]).write.count == 2
    assert load("pocket", ["task=a=b"]).task == "a=b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distil: {steps: 1}", "distil: no such key; did you mean 'distill'?"),
        ("distill: {stpes: 1}", "distill.stpes: no such key; did you mean 'steps'?"),
        ("curate: {thresholds: {sam: 1}}", "curate.thresholds.sam: no such key; did you mean"),
        ("learning_rate: 1", "learning_rate: no such key; did you mean 'distill.learning_rate'?"),
        ("steps: 1", "steps: no such key; did you mean 'paint.steps' or 'distill.steps' or 'evaluate.steps'?"),
        ("paint: {zzzz: 1}", "paint.zzzz: no such key; keys here: steps, guidance"),
        ("write: {count: many}", 'write.count: must be a whole number, not "many"'),
        ("write: {count: 1.5}", "write.count: must be a whole number, not 1.5"),
        ("write: {count: 0}", "write.count: must be greater than or equal to 1, not 0"),
        ("write: {count: yes}", "write.count: a yes/no value makes no sense here"),
        ("distill: {compile: 3}", "distill.compile: must be yes or no, not 3"),
        ("paint: {true_guidance: 0.5}", "paint.true_guidance: must be greater than or equal to 1, not 0.5"),
        ("write: 3", "write: must be a section of `key: value` lines, not 3"),
        ("paint: {dtype: fp16}", "paint.dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', not \"fp16\""),
        ("distill: {betas: [1]}", "distill.betas: has too few values"),
        ("distill: {lora_targets: {a: 1}}", "distill.lora_targets: must be a list or text"),
        ("distill: {learning_rate: .nan}", "distill.learning_rate: must be a finite number"),
        (
            "distill: {text_dropout: 0.9, both_dropout: 0.9}",
            "distill: reference_dropout + text_dropout + both_dropout is over 1",
        ),
        ("distill: {left_weight: 0, right_weight: 0}", "distill: left_weight and right_weight are both 0"),
        ("evaluate: {methods: [studnt]}", "evaluate.methods: must be 'student', "),
        ("device: gpu", "device: must match"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, f"name: x\n{text}\n")
    with pytest.raises(UsageError) as caught:
        load(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    key = text.partition(":")[0]
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, "name: x\n"), [f"{key}={text.partition(':')[2].strip()}"])
    assert f"--set {message}" in str(caught.value)


def test_each_mistake_gets_its_own_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nwrite: {cuont: 1}\npaint: {steps: 0}\n")
    with pytest.raises(UsageError) as caught:
        load(path, ["seed=-1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any(line.startswith("--set seed: ") for line in lines)
    assert sum(line.startswith(str(path)) for line in lines) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: subject", "name: missing"),
        ("- a\n- b", "this file is not"),
        ("", "this file is not"),
        ("name: x\nwrite: {count: 1", "not valid YAML in line"),
        ("name: x\nseed: 1\nseed: 2", "line 3: the key 'seed' is there twice"),
        ("name: x\nwrite: {count: 1, count: 2}", "'count' is there twice"),
        ("name: a/b", "name: must match"),
        ("name: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        load(write(tmp_path, text))


def test_binary_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(UsageError):
        load(path)
    with pytest.raises(UsageError, match=r"no such recipe file; .*did you mean 'pocket'"):
        load("pockt")
    with pytest.raises(UsageError, match="no such recipe file"):
        load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("text", ["x", "=1", ".a=1", "a..b=1", "distill.steps=[1"])
def test_a_malformed_set_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--set "):
        load("pocket", [text])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3)))
def test_no_value_gives_anything_but_a_recipe_or_a_usage_error(value: object) -> None:
    for key in ("seed", "write", "distill.betas", "evaluate.methods", "curate.thresholds.same"):
        try:
            assert isinstance(load("pocket", [f"{key}={yaml.safe_dump(value)}"]), Recipe)
        except UsageError as error:
            assert "\n" not in str(error)


def test_a_fingerprint_covers_what_it_is_asked_for() -> None:
    one, two = load("pocket"), load("pocket", ["distill.steps=5"])
    assert one.fingerprint("write", "paint", "seed") == two.fingerprint("write", "paint", "seed")
    assert one.fingerprint("distill") != two.fingerprint("distill")
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint("curate.judge") != one.fingerprint("curate.batch_size")
    assert one.differences(two) == ["distill.steps"]


def test_a_recipe_is_not_changed_after_the_check() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("pocket").write.count = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_every_key_is_documented() -> None:
    def undocumented(section: type) -> list[str]:
        names = []
        for name, field in section.model_fields.items():  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                names += undocumented(field.annotation)
            elif not field.description:
                names.append(name)
        return names

    assert undocumented(Recipe) == []


def test_nearest_hints_only_at_what_is_near() -> None:
    assert nearest("stpes", ["steps", "rank"]) == "; did you mean 'steps'?"
    assert nearest("STEPS", ["steps"]) == "; did you mean 'steps'?"
    assert nearest("xyz", ["steps"]) == ""
    assert (UserError("x").exit_code, UsageError("x").exit_code) == (1, 2)
