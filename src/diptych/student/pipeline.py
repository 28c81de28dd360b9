"""The pipeline classes of students: `DiptychPipeline` for FLUX.1, and one for each stock pipeline of other families.

pipe = DiptychPipeline.from_pretrained(folder)            # a FLUX.1 student
pipe = pipeline_class("Flux2KleinPipeline")(**components)   # of any family
"""

from __future__ import annotations

import inspect
import os
from functools import cache, wraps
from pathlib import Path
from typing import Any, Self

import diffusers
from diffusers import FluxControlPipeline

from diptych.errors import UserError
from diptych.student.families import families, family_of
from diptych.student.families.base import Family
from diptych.student.families.flux1 import FLUX1
from diptych.student.reference_pipeline import MAX_TEXT_TOKENS, DiptychOutput, ReferencePipeline
from diptych.student.settings import OWN_CLASS
from diptych.student.weights.lora_file import RELEASED_LORA
from diptych.utils import models
from diptych.utils.opening import INDEX, check_pipeline, class_of

__all__ = ["MAX_TEXT_TOKENS", "DiptychOutput", "DiptychPipeline", "ReferencePipeline", "as_student", "pipeline_class"]


class DiptychPipeline(ReferencePipeline, FluxControlPipeline):
    """The stock FLUX-Control pipeline with a reference image, of stock components and weights; see `__call__`. Without
    text encoders, pass prompts as embeddings."""

    transformer: Any
    family: Family = FLUX1
    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]  # noqa: RUF012 (diffusers' name)
    _lora_loadable_modules = ["transformer", "text_encoder", "text_encoder_2"]  # noqa: RUF012 (diffusers: not T5)
    text_parts = tuple(_optional_components)

    def __init__(
        self, scheduler, vae, transformer, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,  # pyright: ignore[reportArgumentType]
            tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
            text_encoder_2=text_encoder_2,  # pyright: ignore[reportArgumentType]
            tokenizer_2=tokenizer_2,  # pyright: ignore[reportArgumentType]
            transformer=transformer,
        )
        self.begin()

    @property
    def stock(self) -> str:
        return self.settings.pipeline_class

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: object) -> Self:
        """Opens a pipeline, with diffusers' arguments. A complete folder has its settings and needs no other argument.

        UserError for a folder with code or pickles; with a LoRA beside its weights, which diffusers would not load; of
        another family; or with a config that names more layers than its weights have.
        """
        folder = Path(pretrained_model_name_or_path)
        models.check_folder(folder)
        if folder.is_dir():
            check_pipeline(folder, "student", OWN_CLASS)
            name = class_of(folder)
            if any(name in family.pipelines for family in families().values() if family is not FLUX1):
                raise UserError(
                    "model_mismatch",
                    f"{folder / INDEX} names a {name}, and DiptychPipeline is for FLUX.1. Open the folder with "
                    "Student.load or diptych.student.load.",
                )
        lora = folder / RELEASED_LORA
        if lora.is_file():
            raise UserError(
                "lora_unsupported",
                f"DiptychPipeline.from_pretrained does not load {lora}, which belongs to this student. Open the folder "
                "with Student.load, or fuse the LoRA: diptych convert FOLDER OUT --to folded --fuse",
            )
        pipe: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if lora.parent.is_dir():
            pipe.loaded_from = (lora.parent,)
        return pipe


def as_student(stock: Any, transformer: Any) -> Any:
    """A student's pipeline with the components of a stock pipeline, and with this transformer. UserError for a
    transformer that is not a student's."""
    cls = pipeline_class(type(stock).__name__)
    given = {**stock.config, **stock.components, "transformer": transformer}
    return cls(**{name: given[name] for name in inspect.signature(cls.__init__).parameters if name in given})


@cache
def pipeline_class(stock: str) -> Any:
    """The class of students that are run like the stock text-to-image class of this name. UsageError for a class
    without a family."""
    family = family_of(stock)
    if family is FLUX1:
        return DiptychPipeline
    parent: Any = getattr(diffusers, stock)

    @wraps(parent.__init__)  # diffusers reads the names of components from the signature
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        parent.__init__(self, *args, **kwargs)
        self.begin()

    return type(f"Reference{stock}", (ReferencePipeline, parent), {"family": family, "stock": stock, "__init__": init})
