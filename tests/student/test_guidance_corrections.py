"""Corrections of guidance against saturation: rescaling and normalized guidance, against formulas in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diptych import Student
from diptych.cli.options import sampling_option
from diptych.errors import UsageError
from diptych.student.guidance import Guidance
from diptych.student.sampling import CORRECTIONS, check_options
from raising import raises

SIGMA = torch.tensor(0.6)
GUIDED: Any = {"image_guidance_scale": 2.5, "text_guidance_scale": 1.5, "num_inference_steps": 4, "guidance_from": 0}
OFF: Any = {"guidance_rescale": 0.0, "guidance_parallel": 1.0, "guidance_norm": 0.0}
SCALES = [(2.5, 1.5), (3.0, 3.0), (1.0, 4.0), (3.0, 0.0), (0.5, 2.0)]


def predictions(guide: Guidance) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Velocities (2, 6, 4) of the passes that the guidance needs, and x_t."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(2, 6, 4, generator=generator) for name in ("cond", "reference", "null", "x")}
    return {name: made[name] for name in guide.needed}, made["x"]


@pytest.mark.parametrize(("i", "t"), SCALES)
def test_off_is_the_plain_formula_bit_for_bit(i: float, t: float) -> None:
    guide = Guidance(i, t)
    v, x = predictions(guide)
    assert torch.equal(guide.corrected(v, x, SIGMA), guide.combine(v))


@pytest.mark.parametrize(("i", "t"), SCALES)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaling_is_equations_15_and_16(i: float, t: float, share: float) -> None:
    guide = Guidance(i, t, rescale=share)
    v, x = predictions(guide)
    got = guide.corrected(v, x, SIGMA).numpy()
    guided = guide.combine(v).numpy()
    positive = v["cond" if t else "reference"].numpy()
    for row in range(2):
        rescaled = guided[row] * positive[row].std() / guided[row].std()
        np.testing.assert_allclose(got[row], share * rescaled + (1 - share) * guided[row], rtol=1e-4, atol=1e-6)
        if share == 1:
            assert got[row].std() == pytest.approx(positive[row].std(), rel=1e-4)


def apg(v: dict[str, torch.Tensor], x: torch.Tensor, i: float, t: float, parallel: float, norm: float) -> np.ndarray:
    """Normalized guidance of both differences as the paper's algorithm 1 has it, on denoised predictions."""
    clean = {name: (x - SIGMA * each).double().numpy() for name, each in v.items()}
    null = clean["null"] if "null" in clean else clean["reference"]  # its difference has no weight then
    text = clean["cond"] if "cond" in clean else clean["reference"]
    both = (
        [(clean["reference"] - null, i), (text - clean["reference"], t)] if "reference" in clean else [(text - null, i)]
    )
    total = text.copy()
    for change, scale in both:
        for row in range(len(change)):
            d, at = change[row], text[row]
            if norm:
                d = d * min(1.0, norm * np.sqrt(d.size) / max(np.linalg.norm(d), 1e-12))
            unit = at / np.linalg.norm(at)
            along = (d * unit).sum() * unit
            total[row] += (scale - 1) * (d - along + parallel * along)
    return (x.double().numpy() - total) / SIGMA.double().numpy()


@pytest.mark.parametrize(("i", "t"), SCALES)
@pytest.mark.parametrize(("parallel", "norm"), [(0.0, 0.0), (0.4, 0.2), (1.0, 0.3), (1.0, 100.0)])
def test_normalized_guidance_is_the_paper_s(i: float, t: float, parallel: float, norm: float) -> None:
    guide = Guidance(i, t, parallel=parallel, norm=norm)
    v, x = predictions(guide)
    got = guide.corrected(v, x, SIGMA)
    np.testing.assert_allclose(got.numpy(), apg(v, x, i, t, parallel, norm), rtol=1e-3, atol=1e-5)
    if norm == 100:  # the limit is not reached
        torch.testing.assert_close(got, guide.combine(v), rtol=1e-4, atol=1e-5)


def test_a_whole_call_with_the_corrections_off_is_as_without_them(pipe: Any, pictures: Any) -> None:
    def latents(**given: Any) -> torch.Tensor:
        return pipe("a red cat", reference=pictures[0], generator=0, output_type="latent", **GUIDED, **given).images

    plain = latents()
    assert torch.equal(plain, latents(**OFF))
    for name, value in (("guidance_rescale", 0.7), ("guidance_parallel", 0.0), ("guidance_norm", 0.01)):
        assert not torch.allclose(plain, latents(**{name: value}), atol=1e-3), name


def test_an_image_is_the_same_in_a_batch(pipe: Any, pictures: Any) -> None:
    given = {**GUIDED, "output_type": "latent", "guidance_rescale": 0.5, "guidance_parallel": 0.2, "guidance_norm": 0.1}
    references = [pictures[0], None, pictures[1]]
    together = pipe(["a red cat"] * 3, reference=references, generator=[0, 1, 2], **given).images
    for row, reference in enumerate(references):
        alone = pipe("a red cat", reference=reference, generator=row, **given).images
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_strong_guidance_saturates_less_with_either() -> None:
    from PIL import Image

    from diptych.utils.paths import packaged

    student = Student.load("pocket", device="cpu")
    references = [Image.open(path) for path in sorted(packaged("examples/references").glob("*.png"))[:3]]

    def saturation(**given: float) -> tuple[float, float]:
        """The mean saturation, and the share of values that are black or full."""
        strong: Any = {"steps": 6, "image_guidance": 5.0, "text_guidance": 8.0, **given}
        images = student.generate(references, "a cat on the beach", seed=1, **strong)
        assert all(image.info[name] == value for name, value in given.items() for image in images)
        pixels = np.stack([np.asarray(image) for image in images])
        colors = np.stack([np.asarray(image.convert("HSV"))[..., 1] for image in images])
        return float(colors.mean()), float(((pixels < 3) | (pixels > 252)).mean())

    plain = saturation()
    for given, most in (({"guidance_rescale": 1.0}, 0.95), ({"guidance_parallel": 0.0, "guidance_norm": 0.1}, 0.97)):
        mean, clipped = saturation(**given)
        assert mean < most * plain[0] and clipped < 0.8 * plain[1], given


def test_every_way_in_has_the_options_and_the_same_limits() -> None:
    from diptych.apps.batch.requests import check_row
    from diptych.serve.request_models import ImageRequest

    row: dict[str, Any] = {"reference": "cat.png", "prompt": "a cat"}
    for name, bad in zip(CORRECTIONS, (1.5, -0.1, -1), strict=True):
        assert sampling_option(name).min == 0
        check_row(row | {name: 0.5}, "")
        assert ImageRequest.model_validate({"prompt": "a cat", name: 0.5}).options()[name] == 0.5
        with raises("option_invalid", name, kind=UsageError):
            check_options({name: bad})
        with pytest.raises(ValueError, match=name):
            ImageRequest.model_validate({"prompt": "a cat", name: bad})
