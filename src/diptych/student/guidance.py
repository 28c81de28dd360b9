"""True guidance, as the release samples: the forward passes of a step, and the combination of their velocities.

    v = v(0,"") + i·(v(ref,"") − v(0,"")) + t·(v(ref,text) − v(ref,""))

It is a weighted sum with weights 1 − i, i − t and t, so a forward pass with weight 0 is skipped: "null" if i = 1,
"reference" if i = t (a third of the work, at equal scales), "cond" if t = 0.

The null pass gets no reference condition, but it still sees the reference on the shared canvas: the left panel shows
the reference once the noise is low enough. Both terms of the first difference then contain what guidance should
strengthen. `NullPanel` gives the null pass a separate left panel, which never shows the reference.

Guidance with large scales makes images too saturated. Two corrections are off by default and can be combined:

- Rescaling (Lin et al. 2023, arXiv 2305.08891, equations 15 and 16): v is scaled towards the standard deviation of the
  prediction with reference and prompt.
- Normalized guidance (APG, Sadat et al. 2024, arXiv 2410.02416, without momentum): the part of each difference that is
  parallel to the prediction, and mostly saturates, is reduced, and the difference's size is limited. It works on
  denoised predictions x_t − σ·v.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from diptych.errors import UsageError
from diptych.student.canvas import Canvas, right_tokens
from diptych.student.families.base import has_mask, join

if TYPE_CHECKING:
    from diptych.student.references import References

FROM = 2  # step index at which the release switches true guidance on
# Condition (of reference tokens, `References`) and the tensors of the text (`Text.tensors`).
Branch = tuple["torch.Tensor | References", *tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Guidance:
    """Scales i (`image`) and t (`text`), and the guided steps: from index `first` up to the share `until`.

    Guidance in an interval of the steps: Kynkäänniemi et al. 2024 (arXiv 2404.07724).

    Attributes:
        rescale: share φ of the rescaled prediction. 0 is off.
        parallel: share η of the parallel part that remains. 1 is off.
        norm: limit of the root mean square of a difference of denoised predictions. 0 is off. It is the limit r of
            the paper, which is for the norm, divided by the root of the number of values.
    """

    image: float = 1.0
    text: float = 1.0
    first: int = FROM
    until: float = 1.0
    rescale: float = 0.0
    parallel: float = 1.0
    norm: float = 0.0

    def rows(self, references: Sequence[Any], times: int) -> list[Guidance]:
        """The guidance of each of N images for every reference. i has no meaning for a row without a reference."""
        bare = replace(self, image=1.0)
        return [bare if each is None else self for each in references for _ in range(times)]

    @property
    def on(self) -> bool:
        return self.image > 1 or self.text > 1

    def at(self, step: int, steps: int) -> bool:
        """Whether this step, counted from 0, is guided."""
        return self.on and self.first <= step < round(self.until * steps)

    @property
    def needed(self) -> tuple[str, ...]:
        """The forward passes of a guided step: those of "cond" (ref, text), "reference" (ref, "") and "null" (0, "")
        whose weight is not 0."""
        weights = {"cond": self.text, "reference": self.image - self.text, "null": 1 - self.image}
        return tuple(name for name, weight in weights.items() if weight)

    def combine(self, v: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The formula on the velocities of `needed`."""
        # A velocity with weight 0 cancels, so any other one can replace it.
        null = v["null"] if "null" in v else v["reference"] if "reference" in v else v["cond"]
        reference = v.get("reference", null)
        text = v.get("cond", reference)
        if self.image == 1:
            return reference + self.text * (text - reference)
        return null + self.image * (reference - null) + self.text * (text - reference)

    def corrected(self, v: Mapping[str, torch.Tensor], x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The formula with rescaling and normalized guidance, if they are on. x_t is (B, tokens, C), and σ its noise
        level."""
        positive = v["cond"] if "cond" in v else v["reference"] if "reference" in v else v["null"]
        if self.parallel == 1 and not self.norm:
            guided = self.combine(v)
        else:
            toward = positive.float(), x_t.float(), sigma.to(x_t.device, torch.float32)
            guided = toward[0]
            for difference, scale in self._differences(v):
                guided = guided + (scale - 1) * self._normalized(difference.float(), *toward)
            guided = guided.to(x_t.dtype)
        if not self.rescale:
            return guided
        ratio = positive.std(dim=(1, 2), keepdim=True) / guided.std(dim=(1, 2), keepdim=True)
        return self.rescale * (ratio * guided) + (1 - self.rescale) * guided

    def _differences(self, v: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, float]]:
        """The differences of the formula whose scale is not 1, with their scales."""
        names = [name for name in ("null", "reference", "cond") if name in v]
        scales = {"null": self.image, "reference": self.text}  # equal where "reference" cancels
        return [(v[b] - v[a], scales[a]) for a, b in pairwise(names)]

    def _normalized(
        self, difference: torch.Tensor, positive: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """A difference of velocities (B, tokens, C), normalized as APG does with denoised predictions."""
        change, denoised = -sigma * difference, x_t - sigma * positive
        if self.norm:
            size = change.square().mean(dim=(1, 2), keepdim=True).sqrt()
            change = change * (self.norm / size.clamp(min=1e-12)).clamp(max=1)
        along = denoised / denoised.square().sum(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        parallel = (change * along).sum(dim=(1, 2), keepdim=True) * along
        return (change - (1 - self.parallel) * parallel) / -sigma


class NullPanel:
    """The separate left panel of the null pass. It starts as noise at the first guided step and then follows the null
    pass's velocity.

    The null pass sees the generated right panel, so its left panel comes to match it, like the panels of a grid. The
    shared left panel is not guided: there, the null pass's velocity is replaced.
    """

    def __init__(self, noise: torch.Tensor, canvas: Canvas, sigmas: torch.Tensor) -> None:
        """`noise` (B, tokens, C) is the canvas's initial noise, `sigmas` (steps + 1,) are the noise levels."""
        self._right = right_tokens(canvas).to(noise.device).view(1, -1, 1)
        self._noise, self._sigmas = noise, sigmas
        self._left: torch.Tensor | None = None

    def see(self, x_t: torch.Tensor, step: int) -> torch.Tensor:
        """The null pass's canvas at this step: x_t's right panel beside the separate left one."""
        if self._left is None:
            self._left = self._sigmas[step].to(x_t) * self._noise.to(x_t)
        return torch.where(self._right, x_t, self._left)

    def moved(self, v: Mapping[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """Takes an Euler step of the left panel, and returns the velocities to combine."""
        assert self._left is not None
        self._left = self._left + (self._sigmas[step + 1] - self._sigmas[step]).to(self._left) * v["null"]
        beside = v["reference"] if "reference" in v else v["cond"]
        return {**v, "null": torch.where(self._right, v["null"], beside)}


class Alike:
    """The rows of a batch with equal guidance. Each group is sampled as a separate batch, so that an image does not
    depend on what else is generated with it."""

    def __init__(self, rows: torch.Tensor | slice, guide: Guidance, mark: str = "") -> None:
        """`rows` index the batch. `mark` separates the groups' forward passes in step caches."""
        self.rows, self.guide, self._mark = rows, guide, mark
        self._null: NullPanel | None = None

    def give_null_a_panel(self, noise: torch.Tensor, canvas: Canvas, sigmas: torch.Tensor) -> None:
        """Gives the null pass, if there is one, a separate left panel. `noise` is that of the whole batch."""
        if "null" in self.guide.needed:
            self._null = NullPanel(noise[self.rows], canvas, sigmas)

    def velocity(
        self,
        run: Callable[..., torch.Tensor],
        x_t: torch.Tensor,
        branches: Mapping[str, Branch],
        step: int,
        steps: int,
        batched: bool,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """v of these rows at this step, guided if the step is. x_t (B, tokens, C) and `branches` are those of the whole
        batch, `sigma` is the step's noise level; for the other arguments, see `velocities`."""

        def marked(name: str, *inputs: torch.Tensor) -> torch.Tensor:
            return run(name + self._mark, *inputs)

        x = x_t[self.rows]
        guided = self.guide.at(step, steps)
        needed = {
            name: tuple(part[self.rows] for part in branches[name])
            for name in (self.guide.needed if guided else ("cond",))
        }
        if not guided:
            return marked("cond", x, *needed["cond"])  # pyright: ignore[reportArgumentType]
        seen = dict.fromkeys(needed, x)
        if self._null is not None:
            seen["null"] = self._null.see(x, step)
        v = velocities(marked, needed, seen, batched)  # pyright: ignore[reportArgumentType]
        return self.guide.corrected(v if self._null is None else self._null.moved(v, step), x, sigma)


def alike(guides: Sequence[Guidance], layouts: Sequence[Hashable] | None = None) -> list[Alike]:
    """The rows of a batch in groups of equal guidance and, for reference tokens, equal `layouts` of references."""
    rows: dict[tuple[Guidance, Hashable], list[int]] = {}
    for row, (guide, layout) in enumerate(zip(guides, layouts or [None] * len(guides), strict=True)):
        rows.setdefault((guide if guide.on else Guidance(), layout), []).append(row)
    if len(rows) == 1:
        return [Alike(slice(None), next(iter(rows))[0])]
    return [Alike(torch.tensor(equal), guide, f" {n}") for n, ((guide, _), equal) in enumerate(rows.items())]


def velocity(groups: Sequence[Alike], run: Callable[..., torch.Tensor], x_t: torch.Tensor, *given: Any) -> torch.Tensor:
    """v of a whole batch (B, tokens, C) at x_t, from its groups. The arguments are those of `Alike.velocity`."""
    parts = [group.velocity(run, x_t, *given) for group in groups]
    if len(parts) == 1:
        return parts[0]
    v = torch.empty_like(x_t, dtype=parts[0].dtype)
    for group, part in zip(groups, parts, strict=True):
        v[group.rows] = part
    return v


def velocities(
    velocity: Callable[..., torch.Tensor], branches: Mapping[str, Branch], x: Mapping[str, torch.Tensor], batched: bool
) -> dict[str, torch.Tensor]:
    """v of each branch at its x (B, tokens, C), from one forward pass of all, if `batched`, or one after another.

    `velocity(name, x, condition, *text)` runs the transformer; `name` separates the branches in step caches. Branches
    with and without reference tokens have sequences of different lengths, so they are never one batch. UsageError for
    a batch of branches whose texts have different lengths, unless they have masks.
    """
    texts = [tuple(text) for _, *text in branches.values()]
    if batched and len({text[0].shape[1] for text in texts}) > 1 and not has_mask(texts[0]):
        raise UsageError(
            "option_conflict",
            "Batched guidance needs prompt and negative prompt embeddings of one length. Set batched_guidance=False.",
        )
    batches: dict[Any, list[str]] = {}
    for name, (condition, *_) in branches.items():
        batches.setdefault(getattr(condition, "layout", None) if batched else name, []).append(name)
    v: dict[str, torch.Tensor] = {}
    for names in batches.values():
        if len(names) == 1:
            v[names[0]] = velocity(names[0], x[names[0]], *branches[names[0]])
            continue
        conditions: list[Any] = [branches[name][0] for name in names]
        first = conditions[0]
        condition = torch.cat(conditions) if torch.is_tensor(first) else first.doubled(len(names))
        text = join([branches[name][1:] for name in names])
        made = velocity("guided", torch.cat([x[name] for name in names]), condition, *text)
        v |= dict(zip(names, made.chunk(len(names)), strict=True))
    return v
