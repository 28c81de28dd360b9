"""What the documentation site's build makes itself: the recipe reference, from the pydantic models, and its pictures,
drawn by the shipped pocket models. A page asks for one with a comment, `<!-- picture: NAME -->`."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pictures  # beside this file: MkDocs finds it while it loads the hook
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def outside(page: str) -> re.Pattern[str]:
    """Links of a page (its path in `docs`) to files of the repository outside `docs`. The site includes these files."""
    return re.compile(r"\]\(" + re.escape("../" * (page.count("/") + 1)) + r"([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages and pictures."""
    files.append(File.generated(config, "reference/recipes.md", content=recipe_reference()))
    for name, path in pictures.drawn(Path("build/pictures")).items():
        files.append(File.generated(config, f"pictures/{name}.png", abs_src_path=str(path.resolve())))
    pages = files.documentation_pages()
    for name in sorted({name for file in pages for name in outside(file.src_uri).findall(file.content_string)}):
        files.append(File.generated(config, _inside(name), content=Path(name).read_bytes()))
    return files


def _inside(name: str) -> str:
    """Where the site holds a file of the repository that is not a page."""
    return f"repository/{name}" + (".txt" if name.endswith(".md") else "")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the pictures where a page asks for them, captioned with what their function says."""
    up = "../" * page.file.src_uri.count("/")

    def picture(match: re.Match[str]) -> str:
        caption = " ".join((pictures.PICTURES[match[1]].__doc__ or "").split())
        return f"![{caption}]({up}pictures/{match[1]}.png)\n\n*{caption}*"

    markdown = outside(page.file.src_uri).sub(lambda match: f"]({up}{_inside(match[1])})", markdown)
    return re.sub(r"<!-- picture: (\w+) -->", picture, markdown)


def recipe_reference() -> str:
    """Every key of a recipe with type, default and meaning, section by section, as Markdown."""
    from diptych.recipe.schema import Recipe

    lines = ["# Recipes: every key", "", (Recipe.__doc__ or "").strip(), ""]
    for title, section in _sections("", Recipe):
        if title:
            lines += [f"## {title}", "", " ".join((section.__doc__ or "").split()), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            if _models(field.annotation) and not title:
                continue
            default = "" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _sections(title: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield title, model
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            yield from _sections(f"{title}.{name}".strip("."), inner)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type(part) for part in arguments)
    if origin in (list, tuple, dict):
        inner = ", ".join(_type(part) for part in arguments if part is not Ellipsis)
        return f"{origin.__name__} of {inner}"
    if arguments:  # Annotated
        return _type(arguments[0])
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )


def _yaml(value: Any) -> str:
    import yaml

    if isinstance(value, BaseModel):
        return "{…}"
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).replace("\n...\n", "").strip()
