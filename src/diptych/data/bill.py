"""What a run's language models cost so far: the replies that are on file, by model, at the prices of its recipe.

    lines(bill("runs/first", recipe))      # ["tiny: 12,400 calls, 31,000,000 tokens in, 3,100,000 out, 4.2100 spent"]

A reply is on file the moment it arrives, so this holds for all sittings of a run, killed ones too; what a server
charges for a request whose reply never came is in no file. With `--engine ray` each machine has a file of its own, and
this one's is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.data.places import answers
from diptych.llm.cache import Cache
from diptych.llm.endpoint import Endpoint
from diptych.llm.question import Usage
from diptych.recipe.schema import Recipe


def bill(run_dir: str | Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Calls, tokens and money of each model as its server names it; money is None where no price is known. Empty for a
    run that asks nobody. A file that other runs share (`write.cache`, `curate.vlm.cache`) counts as a whole."""
    found: dict[str, Usage] = {}
    for path in _files(run_dir, recipe):
        with Cache(path) as kept:
            for model, usage in kept.usage().items():
                found[model] = found.get(model, Usage()) + usage
    endpoints = _endpoints(recipe)
    return [
        {
            "model": model,
            "calls": usage.calls,
            "tokens": {"in": usage.input_tokens, "out": usage.output_tokens},
            "money": _money(model, usage, endpoints),
        }
        for model, usage in sorted(found.items())
    ]


def lines(found: list[dict[str, Any]]) -> list[str]:
    """A line for each model, for people."""
    told = []
    for one in found:
        money = "" if one["money"] is None else f", {one['money']:.4f} spent"
        spent = f"{one['calls']:,} calls, {one['tokens']['in']:,} tokens in, {one['tokens']['out']:,} out"
        told.append(f"{one['model'] or 'a model without a name'}: {spent}{money}")
    return told


def _files(run_dir: str | Path, recipe: Recipe) -> list[Path]:
    """Where the run's answers are, each file once."""
    vlm = recipe.curate.vlm
    asked = [recipe.write.cache] if recipe.write.writer == "llm" else []
    asked += [vlm.cache] if vlm else []
    own = [answers(run_dir, everywhere) for everywhere in (False, True)]
    wanted = [path for cache in asked for path in ([Path(cache)] if cache else own)]
    return [path for path in dict.fromkeys(path.expanduser() for path in wanted) if path.is_file()]


def _endpoints(recipe: Recipe) -> list[Endpoint]:
    vlm = recipe.curate.vlm
    return [one for one in (recipe.write.endpoint, vlm.endpoint if vlm else None) if one is not None]


def _money(model: str, usage: Usage, endpoints: list[Endpoint]) -> float | None:
    """By the endpoint whose model this is: a server may add a date to the name. None where two prices may be meant."""
    named = [one for one in endpoints if one.model == model] or [
        one for one in endpoints if model.startswith(one.model)
    ]
    costs = {one.cost(usage.input_tokens, usage.output_tokens) for one in named or endpoints}
    return costs.pop() if len(costs) == 1 else None
