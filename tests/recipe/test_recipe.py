"""Recipes are validated: each wrong key or value gets one line that names it and what to write instead."""

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
from raising import raises


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


def test_the_documented_recipes_ship() -> None:
    assert {"pocket", "demo", "flux-subject"} <= set(recipes.names())


def test_set_overrides_the_file_with_yaml_values() -> None:
    recipe = load("pocket", ["distill.learning_rate=1e-4", "evaluate.seeds=[0, 1]", "paint.panel_size=32", "seed=7"])
    assert recipe.distill.learning_rate == 1e-4
    assert recipe.evaluate.seeds == [0, 1]
    assert (recipe.paint.panel_size, recipe.seed) == (32, 7)
    assert load("pocket", ["curate.thresholds={same: 0.25}"]).curate.thresholds.near_copy == 0.045
    assert load("pocket", ["write.count=1", "write.count=2"]).write.count == 2
    assert load("pocket", ["task=a=b"]).task == "a=b"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("distil: {steps: 1}", ["distil", "'distill'?"]),
        ("distill: {stpes: 1}", ["distill.stpes", "'steps'?"]),
        ("curate: {thresholds: {sam: 1}}", ["curate.thresholds.sam", "'seam'?"]),
        ("learning_rate: 1", ["learning_rate", "'distill.learning_rate'?"]),
        ("steps: 1", ["steps", "'paint.steps' or 'distill.steps' or 'evaluate.steps'?"]),
        ("paint: {zzzz: 1}", ["paint.zzzz", "steps, guidance"]),
        ("write: {count: many}", ["write.count", "whole number", '"many"']),
        ("write: {count: 1.5}", ["write.count", "whole number", "1.5"]),
        ("write: {count: 0}", ["write.count", "greater than or equal to 1", "not 0"]),
        ("write: {count: yes}", ["write.count", "yes/no"]),
        ("distill: {compile: 3}", ["distill.compile", "yes or no", "not 3"]),
        ("paint: {true_guidance: 0.5}", ["paint.true_guidance", "greater than or equal to 1", "0.5"]),
        ("write: 3", ["write", "`key: value`", "not 3"]),
        ("paint: {dtype: fp16}", ["paint.dtype", "'auto', 'float32', 'bfloat16' or 'float16'", '"fp16"']),
        ("distill: {betas: [1]}", ["distill.betas", "too few"]),
        ("distill: {lora_targets: {a: 1}}", ["distill.lora_targets", "list or text"]),
        ("distill: {learning_rate: .nan}", ["distill.learning_rate", "finite"]),
        ("evaluate: {methods: [studnt]}", ["evaluate.methods", "'student', "]),
        ("device: gpu", ["device", "(auto|cpu|"]),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_what_is_allowed(tmp_path: Path, text: str, facts: list[str]) -> None:
    path = write(tmp_path, f"name: x\n{text}\n")
    with raises("recipe_invalid", f"{path}: {facts[0]}: ", *facts[1:], kind=UsageError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    key, _, value = text.partition(":")
    with raises("recipe_invalid", f"--set {facts[0]}: ", *facts[1:]):
        load(write(tmp_path, "name: x\n"), [f"{key}={value.strip()}"])


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("{text_dropout: 0.9, both_dropout: 0.9}", ["reference_dropout + text_dropout + both_dropout", "1"]),
        ("{left_weight: 0, right_weight: 0}", ["left_weight", "right_weight", "0"]),
        ("{betas: [1, 0.9]}", ["betas", "below 1"]),
    ],
)
def test_keys_that_contradict_each_other_are_named(tmp_path: Path, text: str, facts: list[str]) -> None:
    path = write(tmp_path, f"name: x\ndistill: {text}\n")
    with raises("recipe_conflict", f"{path}: distill: ", *facts):
        load(path)
    with raises("recipe_conflict", "--set distill: ", *facts):
        load(write(tmp_path, "name: x\n"), [f"distill={text}"])


def test_each_mistake_gets_its_own_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nwrite: {cuont: 1}\npaint: {steps: 0}\n")
    with raises("recipe_invalid") as caught:
        load(path, ["seed=-1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any(line.startswith("--set seed: ") for line in lines)
    assert sum(line.startswith(str(path)) for line in lines) == 2


@pytest.mark.parametrize(
    ("text", "code", "facts"),
    [
        ("task: subject", "recipe_invalid", ["name: missing"]),
        ("- a\n- b", "recipe_invalid", ["`key: value`"]),
        ("", "recipe_invalid", ["`key: value`"]),
        ("name: x\nwrite: {count: 1", "yaml_invalid", ["line"]),
        ("name: x\nteacher: 'a\nseed: 1", "yaml_invalid", ["quote that opens in line 2"]),
        ("name: x\nseed: 1\nseed: 2", "yaml_invalid", ["line 3", "'seed'"]),
        ("name: x\nwrite: {count: 1, count: 2}", "yaml_invalid", ["'count'"]),
        ("name: a/b", "recipe_invalid", ["name: "]),
        ("name: !!python/object/apply:os.system [ls]", "yaml_invalid", []),
    ],
)
def test_a_file_that_is_not_a_recipe_is_an_error(tmp_path: Path, text: str, code: str, facts: list[str]) -> None:
    path = write(tmp_path, text)
    with raises(code, path, *facts, kind=UsageError):
        load(path)


def test_binary_files_and_missing_ones_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load(path)
    with raises("path_not_found", "pockt", "'pocket'", kind=UsageError):
        load("pockt")
    with raises("path_not_found", tmp_path / "nothing.yaml"):
        load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("text", ["x", "=1", ".a=1", "a..b=1", "distill.steps=[1"])
def test_a_malformed_set_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="--set ") as caught:
        load("pocket", [text])
    assert caught.value.code == ("yaml_invalid" if "[" in text else "option_invalid")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3)))
def test_any_value_gives_a_recipe_or_a_usage_error(value: object) -> None:
    for key in ("seed", "write", "distill.betas", "evaluate.methods", "curate.thresholds.same"):
        try:
            assert isinstance(load("pocket", [f"{key}={yaml.safe_dump(value)}"]), Recipe)
        except UsageError as error:
            assert "\n" not in str(error)


def test_a_fingerprint_covers_the_keys_it_is_given() -> None:
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
            if not field.description and section is not Recipe:
                names.append(name)
        return names

    assert undocumented(Recipe) == []


def test_nearest_hints_only_at_what_is_near() -> None:
    assert nearest("stpes", ["steps", "rank"]) == "; did you mean 'steps'?"
    assert nearest("STEPS", ["steps"]) == "; did you mean 'steps'?"
    assert nearest("xyz", ["steps"]) == ""
    assert (UserError.exit_code, UsageError.exit_code) == (1, 2)
