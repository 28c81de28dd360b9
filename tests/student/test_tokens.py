"""References as clean tokens: positions, batches, guidance, cached keys and values, and stock FLUX.1 Kontext."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.errors import UsageError, UserError
from diptych.student import attention
from diptych.student.canvas import Canvas, kept_size
from diptych.student.pipeline import DiptychPipeline
from diptych.student.references import References, TokenStyle, token_ids
from diptych.student.runtime import speed
from diptych.student.runtime.applied import apply_speed, remove_speed
from diptych.student.settings import Settings, register
from raising import raises
from student.conftest import LENGTH, PANEL

STYLES = [TokenStyle(p, a) for p in ("frame", "left") for a in ("joint", "self")]
GUIDED = {"image_guidance_scale": 2.0, "text_guidance_scale": 1.5}
LATENT: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "fit": "keep"}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def opened(teacher: Path, style: TokenStyle = STYLES[0]) -> DiptychPipeline:
    """The teacher as a student that takes tokens."""
    from diffusers import FluxPipeline

    stock = FluxPipeline.from_pretrained(teacher)
    settings = Settings(conditioning="tokens", positions=style.positions, reference_attention=style.attention)  # pyright: ignore
    register(stock.transformer, settings)
    absent = ("image_encoder", "feature_extractor")
    pipe = DiptychPipeline(**{name: part for name, part in stock.components.items() if name not in absent})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=STYLES, ids=lambda style: f"{style.positions}-{style.attention}")
def student(request: Any, teacher: Path) -> DiptychPipeline:
    return opened(teacher, request.param)


@pytest.fixture(scope="module")
def kontext_like(teacher: Path) -> DiptychPipeline:
    """With FLUX.1 Kontext's positions and attention."""
    return opened(teacher)


def drawn(pipe: Any, prompt: Any, reference: Any, seed: Any, **options: Any) -> torch.Tensor:
    return pipe(prompt, reference=reference, generator=seed, **{**LATENT, **options}).images


# Positions -----------------------------------------------------------------------------------------------------------


def test_a_frame_of_each_reference_is_numbered_from_one() -> None:
    target, references = token_ids((2, 3), ((1, 2), (2, 1)), "frame")
    assert target.tolist() == [[0, r, c] for r in range(2) for c in range(3)]
    assert references.tolist() == [[1, 0, 0], [1, 0, 1], [2, 0, 0], [2, 1, 0]]


def test_left_of_the_target_references_stand_side_by_side() -> None:
    target, references = token_ids((2, 2), ((2, 2), (1, 1)), "left")
    assert references.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 2]]
    assert target.tolist() == [[0, 0, 3], [0, 0, 4], [0, 1, 3], [0, 1, 4]]
    both = torch.cat(token_ids((2, 2), ((2, 2),), "left"))
    grid = token_ids((2, 4), (), "left")[0]  # the teacher's own grid of two panels
    assert sorted(both.tolist()) == sorted(grid.tolist())


# What is generated ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guidance", [{}, GUIDED, {**GUIDED, "batched_guidance": True}], ids=["plain", "guided", "batched"]
)
def test_a_mixed_batch_is_what_single_calls_draw(student: Any, guidance: Any) -> None:
    a, b = picture(PANEL, PANEL), picture(PANEL, 2 * PANEL, 1)
    references = [a, None, [a, b], [b, a], a, b]
    prompts = ["a cat", "a dog on the beach", "a red cat", "a red cat", "the moon", "snow"]
    batch = drawn(student, prompts, references, list(range(6)), **guidance)
    for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        alone = drawn(student, prompt, [reference], row, **guidance)
        torch.testing.assert_close(alone[0], batch[row], rtol=0, atol=2e-6)
    assert (batch[2] - batch[3]).abs().max() > 1e-4  # the order of references is their positions


def test_every_reference_has_an_influence(student: Any) -> None:
    a, b, c = (picture(PANEL, PANEL, seed) for seed in range(3))
    of = [drawn(student, "a cat", [row], 0) for row in (None, [a], [b], [a, b], [a, c])]
    for i, one in enumerate(of):
        for other in of[i + 1 :]:
            assert (one - other).abs().max() > 1e-4


def test_without_a_reference_the_teacher_draws(teacher: Path, student: Any) -> None:
    from diffusers import FluxPipeline

    stock: Any = FluxPipeline.from_pretrained(teacher)
    stock.set_progress_bar_config(disable=True)
    noise = student.noise([5], student.canvas(PANEL, 2 * PANEL))
    size = {"height": PANEL, "width": 2 * PANEL, "num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    theirs = stock("a cat", max_sequence_length=LENGTH, **size).images
    torch.testing.assert_close(student("a cat", **size).images, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(PANEL, PANEL), (2 * PANEL, PANEL), (PANEL, 3 * PANEL)])
@pytest.mark.parametrize("target", [(PANEL, PANEL), (PANEL, 2 * PANEL), (3 * PANEL, PANEL)])
def test_stock_kontext_draws_the_same(kontext_like: Any, shape: tuple[int, int], target: tuple[int, int]) -> None:
    from diffusers import FluxKontextPipeline

    parts = {name: getattr(kontext_like, name) for name in kontext_like.components}
    stock: Any = FluxKontextPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    height, width = target
    noise = kontext_like.noise([3], kontext_like.canvas(height, width))
    given = {"height": height, "width": width, "num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    image = picture(*shape)
    kontext = {"max_area": height * width, "_auto_resize": False, "max_sequence_length": LENGTH}
    theirs = stock(image=image, prompt="a cat", **kontext, **given).images
    from diptych.student.canvas import to_pixels

    ours = kontext_like("a cat", reference=to_pixels(image), **given).images  # as many pixels as the image has
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_null_pass_has_no_reference_tokens(student: Any) -> None:
    lengths: dict[str, set[int]] = {}
    forward, context = student.transformer.forward, student.transformer.cache_context
    names: list[str] = []

    def named(name: str) -> Any:
        names.append(name)
        return context(name)

    def counted(*args: Any, **given: Any) -> Any:
        if given["encoder_hidden_states"].shape[1]:
            keys = given["joint_attention_kwargs"] or {}
            extra = 4 if "references" in keys else 0
            lengths.setdefault(names[-1], set()).add(given["hidden_states"].shape[1] + extra)
        return forward(*args, **given)

    student.transformer.forward, student.transformer.cache_context = counted, named
    try:
        drawn(student, "a cat", picture(PANEL, PANEL), 0, **GUIDED)
    finally:
        del student.transformer.forward, student.transformer.cache_context
    assert lengths == {"cond": {8}, "reference": {8}, "null": {4}}


# Keys and values, cached ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["frame", "left"])
def test_cached_keys_give_what_computing_them_in_every_step_gives(
    teacher: Path, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = opened(teacher, TokenStyle(positions, "self"))
    row = [[picture(PANEL, PANEL), picture(2 * PANEL, PANEL, 1)]]
    cached = drawn(pipe, "a red cat", row, 0, **GUIDED)
    passes = []
    beside = References.beside

    def again(self: References, x: torch.Tensor) -> Any:
        if self.layout:
            self._keys = None
            self.capture(pipe.transformer, pipe.canvas(), None)
            passes.append(self._keys)
        return beside(self, x)

    monkeypatch.setattr(References, "beside", again)
    assert torch.equal(drawn(pipe, "a red cat", row, 0, **GUIDED), cached)
    assert len(passes) == 4 + 2  # of the four steps, two are guided


def test_keys_depend_on_the_reference_alone(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = opened(teacher, TokenStyle("frame", "self"))
    seen: list[Any] = []
    capture = attention.capture

    def kept(*args: Any) -> Any:
        seen.append(capture(*args))
        return seen[-1]

    monkeypatch.setattr(attention, "capture", kept)
    a, b = picture(PANEL, PANEL), picture(PANEL, PANEL, 1)
    for prompt, seed, reference in (("a cat", 0, a), ("the moon in snow", 9, a), ("a cat", 0, b)):
        drawn(pipe, prompt, reference, seed, guidance_scale=float(seed))
    assert len(seen) == 3  # one pass for an image, not one for a step
    first, other, changed = ([tensor for layer in keys._of for tensor in keys.of(layer)] for keys in seen)
    assert len(first) == 2 * 2  # of two blocks
    assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, changed, strict=True))


def test_one_reference_of_many_images_goes_through_once(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = opened(teacher, TokenStyle("frame", "self"))
    rows: list[int] = []
    capture = attention.capture
    monkeypatch.setattr(attention, "capture", lambda *given: (rows.append(len(given[1])), capture(*given))[1])
    a, b = picture(PANEL, PANEL), picture(PANEL, PANEL, 1)
    drawn(pipe, ["a cat", "a dog", "snow"], [a, b, a], [0, 1, 2], num_images_per_prompt=1)
    assert rows == [2]


# Speed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "cache=first_block", "cache=magnitude", "cache=skip"])
def test_speed_settings_that_skip_nothing_change_nothing(student: Any, name: str) -> None:
    a, b = picture(PANEL, PANEL), picture(PANEL, 2 * PANEL, 1)
    call = (["a cat", "a dog", "snow", "moon"], [a, b, None, [a, b]], [0, 1, 2, 3])
    plain = drawn(student, *call, **GUIDED)
    switches = [] if name == "exact" else [name, "cache_threshold=0", "cache_warmup=4"]
    apply_speed(student, speed.parse("exact", switches))
    try:
        torch.testing.assert_close(drawn(student, *call, **GUIDED), plain, rtol=0, atol=5e-6)
        if student.runtime.step_cache is not None:  # the pass over the references is no step
            # Steps 0 and 1 are not guided; then three rows have three forwards, the one without a reference two.
            assert student.runtime.step_cache.computed == 2 * 4 + 2 * (3 * 3 + 2)
    finally:
        remove_speed(student)


def test_a_step_cache_follows_the_target_and_narrows_the_keys(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = opened(teacher, TokenStyle("frame", "self"))
    narrowed: list[int] = []
    rows = attention.Keys.rows
    monkeypatch.setattr(attention.Keys, "rows", lambda keys, index: (narrowed.append(len(index)), rows(keys, index))[1])
    call = (["a cat", "a dog", "moon"], [picture(PANEL, PANEL, seed) for seed in range(3)], [0, 1, 2])
    apply_speed(pipe, speed.parse("exact", ["cache=first_block", "cache_threshold=0.3", "cache_warmup=1"]))
    together = drawn(pipe, *call, num_inference_steps=24)
    cache = pipe.runtime.step_cache
    assert cache is not None and cache.skipped > 0 and cache.computed > 0
    assert {1, 2} & set(narrowed), "there was a step in which only some rows ran"
    for row in range(3):
        alone = drawn(pipe, call[0][row], [call[1][row]], row, num_inference_steps=24)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=2e-5)


def test_detached_modulation_gives_the_same(teacher: Path) -> None:
    from diptych.student.runtime.modulation import Modulation

    pipe = opened(teacher, TokenStyle("left", "self"))
    plain = drawn(pipe, "a cat", picture(PANEL, PANEL), 0, **GUIDED)
    modulation = Modulation(pipe.transformer).detach()
    torch.testing.assert_close(drawn(pipe, "a cat", picture(PANEL, PANEL), 0, **GUIDED), plain, rtol=0, atol=5e-6)
    modulation.attach()


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(50, 50), (300, 100), (100, 300), (7, 900), (900, 7), (33, 47)])
def test_a_kept_reference_is_neither_swapped_nor_squeezed(height: int, width: int) -> None:
    canvas = Canvas(64, 64, 4, 1)
    h, w = kept_size(picture(height, width), canvas)
    assert h % 8 == 0 == w % 8 and h * w <= 64 * 64
    assert (h >= w) == (height >= width) or abs(height - width) < 20
    if max(height, width) < 4 * min(height, width):
        assert abs(np.log(h / w) - np.log(height / width)) < 0.35  # to whole tokens


def test_an_image_comes_back_as_it_is_shaped(kontext_like: Any) -> None:
    from diptych.student.inputs import reference_pixels

    canvas = kontext_like.canvas(PANEL, PANEL)
    tall = Image.new("RGB", (PANEL, 2 * PANEL))
    tall.paste((255, 255, 255), (0, 0, PANEL, PANEL))  # white above, black below
    pixels = reference_pixels(tall, Canvas(2 * PANEL, PANEL, 4, 1), "keep")[0]
    assert pixels.shape == (3, 2 * PANEL, PANEL) and pixels[:, 0].min() == 1 and pixels[:, -1].max() == -1
    references = kontext_like.encode_reference([pixels], canvas)
    assert references.layouts == [((4, 2),)] and references.tokens[0].shape == (8, 16)


def test_tensors_of_any_size_are_references_and_others_are_refused(kontext_like: Any) -> None:
    pixels = torch.rand(3, 3 * PANEL, 8) * 2 - 1
    assert drawn(kontext_like, "a cat", [pixels], 0).shape == (1, 4, 16)
    for wrong in (torch.rand(3, 12, 8), torch.rand(3, 3), "cat.png"):
        with pytest.raises(UsageError):
            drawn(kontext_like, "a cat", [wrong], 0)


def test_memory_is_planned_for_cached_keys(teacher: Path) -> None:
    from diptych.student.runtime import presets

    def bytes_of(style: TokenStyle) -> int:
        pipe = opened(teacher, style)
        shapes = presets.Shapes(dict(pipe.transformer.config), dict(pipe.vae.config))
        return presets.activations(shapes, (PANEL, PANEL), 1, LENGTH, 4)

    joint, alone = (bytes_of(TokenStyle("frame", name)) for name in ("joint", "self"))
    width, one = 32, 4
    assert joint == 16 * (LENGTH + 2 * one) * width * 4
    assert alone == (16 * (LENGTH + one) + 2 * 2 * one) * width * 4  # keys and values of two blocks


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_diptych_takes_one_reference_of_the_panel_s_shape(pipe: Any, pictures: Any) -> None:
    with raises("option_unsuited", "diptych conditioning", kind=UsageError):
        pipe("a cat", reference=[pictures[:2]], num_inference_steps=1)
    with raises("option_unsuited", "keep", kind=UsageError):
        pipe("a cat", reference=picture(20, 30), fit="keep", num_inference_steps=1)


def test_an_empty_list_is_no_reference(kontext_like: Any) -> None:
    with raises("count_mismatch", "None", kind=UsageError):
        drawn(kontext_like, "a cat", [[]], 0)


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_saved_one_opens_everywhere(teacher: Path, tmp_path: Path) -> None:
    from diffusers import FluxKontextPipeline

    from diptych import student as students

    reference = picture(PANEL, PANEL)
    for style in STYLES:
        pipe, folder = opened(teacher, style), tmp_path / f"{style.positions}-{style.attention}"
        wanted = drawn(pipe, "a cat", reference, 0)
        students.save(pipe, folder)
        for again in (students.load(folder, device="cpu"), DiptychPipeline.from_pretrained(folder)):
            again.set_progress_bar_config(disable=True)
            assert again.settings == pipe.settings and torch.equal(drawn(again, "a cat", reference, 0), wanted)
        named = json.loads((folder / "model_index.json").read_text())["_class_name"]
        assert named == ("FluxKontextPipeline" if style == STYLES[0] else "DiptychPipeline")
    stock: Any = FluxKontextPipeline.from_pretrained(tmp_path / "frame-joint")
    stock.set_progress_bar_config(disable=True)
    noise = pipe.noise([0], pipe.canvas())
    given = {"num_inference_steps": 4, "latents": noise, "output_type": "latent", "height": PANEL, "width": PANEL}
    theirs = stock(
        reference, "a cat", max_area=PANEL**2, _auto_resize=False, max_sequence_length=LENGTH, **given
    ).images
    ours = students.load(tmp_path / "frame-joint", device="cpu")("a cat", reference=reference, **given).images
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_converting_keeps_it_or_says_why_not(teacher: Path, tmp_path: Path) -> None:
    from diptych import student as students
    from diptych.student.weights.convert import convert

    pipe = opened(teacher, TokenStyle("left", "self"))
    students.save(pipe, tmp_path / "folder")
    wanted = drawn(pipe, "a cat", picture(PANEL, PANEL), 0)
    convert(tmp_path / "folder", tmp_path / "one.safetensors", "file")
    convert(tmp_path / "one.safetensors", tmp_path / "again", "folded", base=teacher)
    for place in (tmp_path / "one.safetensors", tmp_path / "again"):
        again = students.load(place, teacher, device="cpu")
        assert again.settings == pipe.settings
        assert torch.equal(drawn(again, "a cat", picture(PANEL, PANEL), 0), wanted)
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "DiptychPipeline"
    for target, out in (("released", "released"), ("exported", "one.pt2")):
        with pytest.raises(UserError, match=target):
            convert(tmp_path / "folder", tmp_path / out, target)


def test_a_widened_transformer_that_says_tokens_is_refused(student_folder: Path, teacher: Path, tmp_path: Path) -> None:
    import shutil

    from diptych import student as students

    shutil.copytree(student_folder, tmp_path / "copy")
    path = tmp_path / "copy" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_diptych": {"conditioning": "tokens"}}))
    with raises("model_mismatch", "32 input channels", "16 output channels"):
        students.load(tmp_path / "copy", teacher, device="cpu")
