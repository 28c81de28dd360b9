"""True guidance, as the release samples: which forwards a step needs, and how their velocities are combined.

    v = v(0,"") + i·(v(ref,"") − v(0,"")) + t·(v(ref,text) − v(ref,""))

It is a weighted sum with weights 1 − i, i − t and t, so a forward whose weight is 0 need not run: none of "null" where
i = 1, none of "reference" where i = t (a third of the work, at equal scales), none of "cond" where t = 0.

"null" is told of no reference, but on the canvas that all forwards share it sees one: the left panel, which shows the
reference as soon as the noise lets it. What guidance should strengthen is then in both terms of the first difference.
`NullPanel` gives "null" a left panel of its own, in which no reference ever was.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diptych.errors import UsageError
from diptych.student.canvas import Canvas, right_tokens

if TYPE_CHECKING:
    from diptych.student.references import References

FROM = 2  # step index at which the release switches true guidance on
# Condition (of reference tokens, `References`), text embeddings, pooled text embeddings.
Branch = tuple["torch.Tensor | References", torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Guidance:
    """Scales i (`image`) and t (`text`), and the steps that are guided: from index `first` up to the share `until`.

    Guiding an interval of the steps only: Kynkäänniemi et al. 2024 (arXiv 2404.07724).
    """

    image: float = 1.0
    text: float = 1.0
    first: int = FROM
    until: float = 1.0

    @property
    def on(self) -> bool:
        return self.image > 1 or self.text > 1

    def at(self, step: int, steps: int) -> bool:
        """Whether this step, counted from 0, is guided."""
        return self.on and self.first <= step < round(self.until * steps)

    @property
    def needed(self) -> tuple[str, ...]:
        """The forwards of a guided step: those of "cond" (ref, text), "reference" (ref, "") and "null" (0, "") that
        have a weight."""
        weights = {"cond": self.text, "reference": self.image - self.text, "null": 1 - self.image}
        return tuple(name for name, weight in weights.items() if weight)

    def combine(self, v: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The formula on the velocities of `needed`."""
        # Where a weight is 0 its velocity cancels, whatever it is: a neighbour takes its place.
        null = v["null"] if "null" in v else v["reference"] if "reference" in v else v["cond"]
        reference = v.get("reference", null)
        text = v.get("cond", reference)
        if self.image == 1:
            return reference + self.text * (text - reference)
        return null + self.image * (reference - null) + self.text * (text - reference)


class NullPanel:
    """The left panel of "null": it begins as noise at the first guided step and follows null's own velocity from there.

    The right panel is the one that is drawn, so what "null" draws on the left comes to fit it, as the panels of a grid
    fit each other, and tells it nothing more. The left panel that all see is not guided away from what null has on the
    left: there null's velocity is replaced.
    """

    def __init__(self, noise: torch.Tensor, canvas: Canvas, sigmas: torch.Tensor) -> None:
        """`noise` (B, tokens, C) is what the canvas began as, `sigmas` (steps + 1,) the noise levels."""
        self._right = right_tokens(canvas).to(noise.device).view(1, -1, 1)
        self._noise, self._sigmas = noise, sigmas
        self._own: torch.Tensor | None = None

    def see(self, x_t: torch.Tensor, step: int) -> torch.Tensor:
        """The canvas that "null" is shown at this step: x_t's right panel beside its own left one."""
        if self._own is None:
            self._own = self._sigmas[step].to(x_t) * self._noise.to(x_t)
        return torch.where(self._right, x_t, self._own)

    def moved(self, v: Mapping[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """Takes an Euler step on the left, and gives the velocities as they are to be combined."""
        assert self._own is not None
        self._own = self._own + (self._sigmas[step + 1] - self._sigmas[step]).to(self._own) * v["null"]
        beside = v["reference"] if "reference" in v else v["cond"]
        return {**v, "null": torch.where(self._right, v["null"], beside)}


class Alike:
    """The rows of a batch that are guided alike. Each group is sampled as a batch of its own, so an image does not
    depend on what else is drawn with it."""

    def __init__(self, rows: torch.Tensor | slice, guide: Guidance, mark: str = "") -> None:
        """`rows` index the batch; `mark` tells the groups' forwards apart in step caches."""
        self.rows, self.guide, self._mark = rows, guide, mark
        self._null: NullPanel | None = None

    def give_null_a_panel(self, noise: torch.Tensor, canvas: Canvas, sigmas: torch.Tensor) -> None:
        """A left panel of its own for the null pass, if there is one; `noise` is the whole batch's."""
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
    ) -> torch.Tensor:
        """v of these rows at this step, guided if the step is; x_t (B, tokens, C) and `branches` are the whole
        batch's, the rest as in `velocities`."""

        def marked(name: str, *inputs: torch.Tensor) -> torch.Tensor:
            return run(name + self._mark, *inputs)

        x = x_t[self.rows]
        guided = self.guide.at(step, steps)
        needed = {
            name: tuple(part[self.rows] for part in branches[name])
            for name in (self.guide.needed if guided else ("cond",))
        }
        if not guided:
            return marked("cond", x, *needed["cond"])
        seen = dict.fromkeys(needed, x)
        if self._null is not None:
            seen["null"] = self._null.see(x, step)
        v = velocities(marked, needed, seen, batched)  # pyright: ignore[reportArgumentType]
        return self.guide.combine(v if self._null is None else self._null.moved(v, step))


def alike(guides: Sequence[Guidance], layouts: Sequence[Hashable] | None = None) -> list[Alike]:
    """The rows of a batch in groups that are guided alike, given the guidance of each, and, for reference tokens, the
    layout of its references."""
    rows: dict[tuple[Guidance, Hashable], list[int]] = {}
    for row, (guide, layout) in enumerate(zip(guides, layouts or [None] * len(guides), strict=True)):
        rows.setdefault((guide if guide.on else Guidance(), layout), []).append(row)
    if len(rows) == 1:
        return [Alike(slice(None), next(iter(rows))[0])]
    return [Alike(torch.tensor(own), guide, f" {n}") for n, ((guide, _), own) in enumerate(rows.items())]


def velocity(groups: Sequence[Alike], run: Callable[..., torch.Tensor], x_t: torch.Tensor, *given: Any) -> torch.Tensor:
    """v of a whole batch (B, tokens, C) at x_t, from its groups; arguments as in `Alike.velocity`."""
    made = [group.velocity(run, x_t, *given) for group in groups]
    if len(made) == 1:
        return made[0]
    v = torch.empty_like(x_t, dtype=made[0].dtype)
    for group, part in zip(groups, made, strict=True):
        v[group.rows] = part
    return v


def velocities(
    velocity: Callable[..., torch.Tensor], branches: Mapping[str, Branch], x: Mapping[str, torch.Tensor], batched: bool
) -> dict[str, torch.Tensor]:
    """v of each branch at its x (B, tokens, C), from one forward of all, if `batched`, or one after another.

    `velocity(name, x, condition, text, pooled)` runs the transformer; `name` tells step caches the branches apart.
    Branches with reference tokens and those without have sequences of different lengths, and are never one batch.
    UsageError if branches of unequally long texts are to be batched.
    """
    if batched and len({text.shape[1] for _, text, _ in branches.values()}) > 1:
        raise UsageError("batched guidance needs prompt and negative prompt embeddings of the same length")
    batches: dict[Any, list[str]] = {}
    for name, (condition, _, _) in branches.items():
        batches.setdefault(getattr(condition, "layout", None) if batched else name, []).append(name)
    v: dict[str, torch.Tensor] = {}
    for names in batches.values():
        if len(names) == 1:
            v[names[0]] = velocity(names[0], x[names[0]], *branches[names[0]])
            continue
        conditions, *texts = zip(*(branches[name] for name in names), strict=True)
        first = conditions[0]
        condition = torch.cat(conditions) if torch.is_tensor(first) else first.doubled(len(names))
        made = velocity("guided", torch.cat([x[name] for name in names]), condition, *map(torch.cat, texts))
        v |= dict(zip(names, made.chunk(len(names)), strict=True))
    return v
