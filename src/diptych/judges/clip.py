"""CLIP, or any dual encoder of transformers: embeddings of pictures and of texts in one space.

clip = Clip.load("openai/clip-vit-base-patch32")
(clip.images(pictures) * clip.texts(prompts)).sum(1)      # CLIP-T
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.errors import UserError
from diptych.judges.vision import Vision, open_vision, refuse_missing
from diptych.utils import models

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Clip:
    """A dual encoder, its image processor and its tokenizer."""

    vision: Vision
    tokenizer: Any

    @classmethod
    def load(cls, name: str, device: str = "cpu") -> Clip:
        """Opens a folder or a hub name. UserError if it is not whole, or embeds no texts."""
        from transformers import AutoTokenizer

        vision = open_vision(name, "scorer", "AutoModel", device)
        if not hasattr(vision.model, "get_text_features"):
            raise UserError(
                f"'{name}' embeds no texts; CLIP-T needs a dual encoder such as openai/clip-vit-base-patch32"
            )
        refuse_missing(sorted(vision.missing), name)
        try:
            folder = models.resolve(name, "scorer")  # `open_vision` has looked at it
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"the tokenizer of '{name}' cannot be opened ({line})") from error
        return cls(vision, tokenizer)

    def images(self, pictures: Sequence[Image]) -> np.ndarray:
        """Pictures as float32 [N, D] of length 1, in batches of 32."""
        return _rows([self.vision.model.get_image_features(pixel_values=p) for p in self.vision.batches(pictures)])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts as float32 [N, D] of length 1; what is longer than the text encoder's length is cut off."""
        import torch

        length = getattr(self.vision.model.config, "text_config", self.vision.model.config).max_position_embeddings
        found = []
        with torch.no_grad():
            for text in texts:  # one by one: no padding, so no model can read it
                tokens = self.tokenizer([text], truncation=True, max_length=length, return_tensors="pt")
                wanted = {key: tokens[key].to(self.vision.device) for key in ("input_ids", "attention_mask")}
                found.append(self.vision.model.get_text_features(**wanted))
        return _rows(found)


def _rows(found: Sequence[Any]) -> np.ndarray:
    import torch

    tensors = [getattr(each, "pooler_output", each) for each in found]
    return torch.nn.functional.normalize(torch.cat(tensors).float(), dim=1).cpu().numpy()
