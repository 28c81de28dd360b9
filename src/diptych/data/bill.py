"""The cost of a run's language models: stored replies, by model, at the prices of the recipe.

    format_bill(bill("runs/first", recipe))  # ["tiny: 12,400 calls, 31,000,000 tokens in, 3,100,000 out, 4.2100 spent"]

A reply is stored when it arrives, so the cost includes interrupted attempts of a run. It does not include requests
whose reply never came, although a server may charge for them. Models that diptych itself runs (`local`, `vllm`) have no
price per token: their cost is the time of the machine. With `--engine ray` each machine has its file, and only
this machine's is read.
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
    """Calls, tokens and money of each model, by its server's name for it. Money is None without a price.

    `where` is `endpoint`, `local` or `vllm`, or None if the recipe uses two models of this name in different places.

    Empty for a run without language models. A file that runs share (`write.cache`, `curate.vlm.cache`) counts whole.
    """
    usages: dict[str, Usage] = {}
    for path in _files(run_dir, recipe):
        with Cache(path) as cache:
            for model, usage in cache.usage().items():
                usages[model] = usages.get(model, Usage()) + usage
    endpoints, local = _endpoints(recipe), _local(recipe)
    return [
        {
            "model": model,
            "where": (where := _where(model, endpoints, local)),
            "calls": usage.calls,
            "tokens": {"in": usage.input_tokens, "out": usage.output_tokens},
            "money": _money(model, usage, endpoints) if where == "endpoint" else None,
        }
        for model, usage in sorted(usages.items())
    ]


def format_bill(items: list[dict[str, Any]]) -> list[str]:
    """A bill as text, one line per model."""
    lines = []
    for item in items:
        money = "" if item["money"] is None else f", {item['money']:.4f} spent"
        money = money or (f" ({item['where']}, no price per token)" if item["where"] in ("local", "vllm") else "")
        usage = f"{item['calls']:,} calls, {item['tokens']['in']:,} tokens in, {item['tokens']['out']:,} out"
        lines.append(f"{item['model'] or 'a model without a name'}: {usage}{money}")
    return lines


def _files(run_dir: str | Path, recipe: Recipe) -> list[Path]:
    """Existing files of the run's replies, each once."""
    vlm = recipe.curate.vlm
    caches = [recipe.write.cache] if recipe.write.writer == "llm" else []
    caches += [vlm.cache] if vlm else []
    default = [answers(run_dir, everywhere) for everywhere in (False, True)]
    paths = [path for cache in caches for path in ([Path(cache)] if cache else default)]
    return [path for path in dict.fromkeys(path.expanduser() for path in paths) if path.is_file()]


def _endpoints(recipe: Recipe) -> list[Endpoint]:
    vlm = recipe.curate.vlm
    return [one for one in (recipe.write.endpoint, vlm.endpoint if vlm else None) if one is not None]


def _local(recipe: Recipe) -> dict[str, str]:
    """The models that diptych runs: the name in their replies → `local` or `vllm`."""
    users = (recipe.write, recipe.curate.vlm) if recipe.curate.vlm else (recipe.write,)
    local = {Path(one.local).name: "local" for one in users if one.local}
    return local | {Path(one.vllm.model).name: "vllm" for one in users if one.vllm}


def _where(model: str, endpoints: list[Endpoint], local: dict[str, str]) -> str | None:
    if model not in local:
        return "endpoint"
    return None if any(one.model == model for one in endpoints) else local[model]


def _money(model: str, usage: Usage, endpoints: list[Endpoint]) -> float | None:
    """Cost by the endpoint with this model; a server may add a date to the name. None if two prices may apply."""
    named = [one for one in endpoints if one.model == model] or [
        one for one in endpoints if model.startswith(one.model)
    ]
    costs = {one.cost(usage.input_tokens, usage.output_tokens) for one in named or endpoints}
    return costs.pop() if len(costs) == 1 else None
