"""Pages and images that the build of the documentation site generates.

References: recipes (from the pydantic models), commands (from the command line), and error codes (from `errors.yaml`).
Images come from the built-in pocket models; a page includes one with a comment, `<!-- picture: NAME -->`.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pictures  # beside this file: MkDocs finds it while it loads the hook
import typer
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def outside(page: str) -> re.Pattern[str]:
    """Links of a page (its path in `docs`) to files of the repository outside `docs`. The site includes these files."""
    return re.compile(r"\]\(" + re.escape("../" * (page.count("/") + 1)) + r"([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages and images."""
    for name, content in (("recipes", recipe_reference()), ("cli", cli_reference()), ("errors", error_reference())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
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
    """Inserts images where a page includes them; the docstring of an image's function is its caption."""
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
            lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {_cell(field.description or '')} |")
        lines.append("")
    return "\n".join(lines)


def cli_reference() -> str:
    """Every command with its options and examples, in the order and the groups of `diptych --help`, as Markdown."""
    from typer.main import get_command

    from diptych.cli.app import app

    lines = [
        "# Commands",
        "",
        "`diptych COMMAND --help` prints the same text. Results go to stdout, progress and errors",
    ]
    lines += [
        "to stderr. Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. [Error codes](errors.md) are stable."
    ]
    panel = None
    for name, command in get_command(app).commands.items():
        if command.rich_help_panel != panel:
            panel = command.rich_help_panel
            lines += ["", f"## {panel}"]
        inner = getattr(command, "commands", {"": command})
        for title, one in ((f"diptych {name} {sub}".strip(), one) for sub, one in inner.items()):
            lines += ["", f"### {title}", "", inspect.cleandoc(one.help), "", "```text", one.epilog, "```"]
            for section, options in one.panels(typer.Context(one, info_name=title)).items():
                if section != "Other":
                    lines += ["", f"| {section} | |", "|---|---|"]
                    lines += [f"| `{option}` | {_cell(meaning)} |" for option, meaning in options]
    return "\n".join(lines) + "\n"


def error_reference() -> str:
    """Every error code with meaning and remedy, in the groups of `errors.yaml`, as Markdown."""
    from diptych import errors

    lines = ["# Error codes", "", "Every error has a stable code; its wording may change. The command line prints"]
    lines += ['`error[CODE]: message`, or with `--json` an object `{"error": {"code", "message"}}`. The server sends']
    lines += ["the code in the body of the response (`error.code`). In Python, `UserError.code` has it."]
    for line in errors.TABLE.read_text("utf8").splitlines()[1:]:
        if line.startswith("# "):
            lines += ["", f"## {line[2:]}", "", "| code | meaning | what to do |", "|---|---|---|"]
        elif line:
            code = line.partition(":")[0]
            entry = errors.codes()[code]
            lines.append(f"| `{code}` | {_cell(entry['meaning'])} | {_cell(entry['remedy'])} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


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
