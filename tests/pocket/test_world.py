"""The pocket world: its contents, equal renders for equal arguments, and captions that never name the individual."""

from dataclasses import replace

import numpy as np
import pytest

from diptych.pocket import captions, draw, world
from diptych.pocket.render import render


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_same_arguments_give_the_same_bytes(rng):
    identity, scene = world.sample_identity(rng), world.sample_scene(rng)
    assert render(identity, scene).tobytes() == render(identity, scene).tobytes()


def test_every_kind_place_weather_pose_and_prop_changes_the_image(rng):
    identity = world.sample_identity(rng, kind="cat")
    scene = world.Scene(layout=3, prop="none")
    for name, values in {
        "place": world.PLACES,
        "pose": world.POSES,
        "prop": world.PROPS,
        "framing": world.FRAMINGS,
        "weather": world.WEATHERS,
    }.items():
        pictures = [render(identity, replace(scene, **{name: value})).tobytes() for value in values]
        assert len(set(pictures)) == len(values), name
    kinds = [render(replace(identity, kind=kind), scene).tobytes() for kind in world.KINDS]
    assert len(set(kinds)) == len(world.KINDS) >= 12


def test_relighting_moves_nothing_but_the_light(rng):
    identity, scene = world.sample_identity(rng), world.sample_scene(rng)
    other = world.relight(rng, scene)
    assert replace(other, light=scene.light) == scene
    assert draw.paint(identity, scene, 64)[0].tobytes() == draw.paint(identity, other, 64)[0].tobytes()
    assert render(identity, scene).tobytes() != render(identity, other).tobytes()


def test_another_season_leaves_the_subject_where_and_as_it_is(rng):
    identity, scene = world.sample_identity(rng), replace(world.sample_scene(rng), place="forest", weather="clear")
    for weather in world.WEATHERS[1:]:
        other = replace(scene, weather=weather)
        assert draw.paint(identity, scene, 64)[0].tobytes() == draw.paint(identity, other, 64)[0].tobytes()
        assert render(identity, scene).tobytes() != render(identity, other).tobytes()
    other = world.reseason(rng, scene)
    assert other != scene and replace(other, weather=scene.weather) == scene


def test_light_from_the_left_brightens_the_left(rng):
    identity, scene = world.sample_identity(rng, kind="blob"), replace(world.sample_scene(rng), weather="clear", x=0.5)
    lights = {"left": 180.0, "right": 0.0}
    balance = {}
    for direction, azimuth in lights.items():
        light = world.Light(direction=direction, azimuth=azimuth, elevation=30.0)
        picture = render(identity, replace(scene, light=light)).astype(float)
        balance[direction] = picture[:, : world.PANEL // 2].mean() - picture[:, world.PANEL // 2 :].mean()
    assert balance["left"] > 15 + balance["right"]


def test_seasons_are_rejected_indoors(rng):
    with pytest.raises(ValueError, match="library"):
        world.reseason(rng, replace(world.sample_scene(rng), place="library"))


def test_held_out_kinds_are_never_drawn_for_training(rng):
    assert len(world.HELD_OUT_KINDS) == 2
    assert not {world.sample_identity(rng).kind for _ in range(300)} & set(world.HELD_OUT_KINDS)
    assert not set(captions.WORDS) & set(world.HELD_OUT_KINDS)


def test_drift_changes_the_given_number_of_attribute_groups(rng):
    identity = world.sample_identity(rng)
    drifted = world.drift(rng, identity, 1)
    assert drifted.kind == identity.kind and drifted != identity
    changed = {name for name in vars(identity) if getattr(identity, name) != getattr(drifted, name)}
    assert any(changed <= set(group) for group in world.DRIFTS)


def test_captions_use_only_known_words_and_fit_the_encoders(rng):
    from diptych.pocket.pretrain import tokenizers

    _, t5 = tokenizers.make_tokenizers()
    for _ in range(200):
        left, right, kind = world.sample_scene(rng), world.sample_scene(rng), world.sample_identity(rng).kind
        prompt, panels = captions.grid(kind, left, right, rng)
        light_prompt, light_panels = captions.light_grid(kind, left, world.relight(rng, left), rng)
        for text in (prompt, light_prompt, *panels, *light_panels, captions.caption(kind, left, rng)):
            assert captions.unknown_words(text) == []
            if captions.count_words(text) <= captions.LONGEST:
                assert len(t5(text).input_ids) <= tokenizers.MAX_LENGTH
            assert t5.unk_token_id not in t5(text).input_ids


def test_panel_captions_repeat_what_the_grid_prompt_says(rng):
    for _ in range(50):
        prompt, (left, right) = captions.grid("cat", world.sample_scene(rng), world.sample_scene(rng), rng)
        for caption, side in ((left, "left"), (right, "right")):
            told = caption.split(" ", 2)[2] if len(caption.split(" ", 2)) > 2 else ""
            assert told in prompt, (side, prompt, caption)


def test_words_never_tell_identities_apart(rng):
    scene = world.sample_scene(rng)
    texts = {captions.caption("cat", scene, np.random.default_rng(3)) for _ in range(5)}
    assert len(texts) == 1
    told = " ".join(captions.WORDS)
    assert not [word for word in ("spots", "stripes", "hat", "bow", "red", "purple") if word in told.split()]


def test_unknown_words_are_named_once_in_order():
    assert captions.unknown_words("A teapot on the Beach, a shiny teapot") == ["teapot", "shiny"]
