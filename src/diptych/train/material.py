"""What a training is made from: its data sets, opened once, with their weights and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diptych.data.sources import Pairs, open_pairs
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.recipe.schema import OWN, Data

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe


@dataclass(frozen=True)
class Material:
    """The data sets to train on. `own` are the run's own pairs, if there are any."""

    own: Dataset | None
    sets: Sequence[Pairs]
    weights: Sequence[float]

    @classmethod
    def open(cls, recipe: Recipe, own: Dataset | None) -> Material:
        """Those that `distill.data` names. UserError when one cannot be read or is empty."""
        named = [data for data in recipe.distill.data or [Data(path=OWN)] if data.path != OWN or own is not None]
        sets: list[Pairs] = []
        for data in named:
            found = own if data.path == OWN else open_pairs(data.path, {**data.columns}, data.split)
            assert found is not None
            if not len(found):
                cure = "lower curate.thresholds or draw more grids (write.count)" if found is own else "give other data"
                raise UserError(f"{found.url} holds no pairs, so there is nothing to train on; {cure}")
            sets.append(found)
        return cls(own, sets, [data.weight for data in named])

    def fingerprint(self) -> str:
        """Of the run's own pairs if there is nothing else; else of all data sets and their weights."""
        prints = [each.fingerprint() for each in self.sets]
        if list(self.sets) == [self.own] and self.weights == [1.0]:
            return prints[0]
        weighed = [[*both] for both in zip(prints, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(weighed).encode()).hexdigest()
