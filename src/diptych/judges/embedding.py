"""Embeddings: a judge of identity, which is any transformers vision model whose embeddings of the same subject lie
close together, and CLIP, which embeds texts, too.

    judge = EmbeddingJudge.load("facebook/dinov2-base")
    judge.similarity(judge.embed(references), judge.embed(targets))      # cosines, 1 = the same

An embedding is, of what the model offers, the first of: the projected image embedding (CLIP, SigLIP), the pooled
output, the class token, the mean of the patch tokens or of the feature map. A pooling layer that the files do not hold
would be random (DINO's checkpoints), so it is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.errors import UserError, describe
from diptych.judges.vision import Vision, check, open_vision, refuse_missing
from diptych.utils import models

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class EmbeddingJudge:
    """Embeds images. On one machine the same images in the same order give the same bits."""

    vision: Vision
    pooled: bool  # whether the model's own pooling is whole
    class_token: bool

    @classmethod
    def load(cls, name: str = "pocket", role: str = "curator", device: str = "cpu") -> EmbeddingJudge:
        """Opens `pocket`, a folder or a hub name, as the `curator` or the `scorer`. UserError if it is not whole."""
        vision = open_vision(name, role, "AutoModel", device)
        random_pooler = {key for key in vision.missing if "pooler." in f"{key}."}
        # A dual encoder's text tower is not needed here; it may be absent.
        text = {key for key in vision.missing if key.startswith(("text_model.", "text_projection", "logit_"))}
        refuse_missing(sorted(vision.missing - random_pooler - text), name)
        class_token = any(key.endswith(("cls_token", "class_embedding")) for key, _ in vision.model.named_parameters())
        return cls(vision, pooled=not random_pooler, class_token=class_token)

    @staticmethod
    def check(name: str, role: str) -> None:
        """UserError if `load` would find no model there. Reads no weights."""
        check(name, role, "AutoModel")

    @property
    def fingerprint(self) -> str:
        """sha256 of the model's files."""
        return self.vision.fingerprint

    def embed(self, images: Sequence[Image]) -> np.ndarray:
        """Images of any size to float32 [N, D] of length 1. Computed in batches of 32, in order."""
        import torch

        if not images:
            raise ValueError("no images to embed")
        rows = [self._embed(pixels) for pixels in self.vision.batches(images)]
        return torch.nn.functional.normalize(torch.cat(rows).float(), dim=1).cpu().numpy()

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) to embeddings (B, D)."""
        model: Any = self.vision.model
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(pixel_values=pixels)
            return getattr(found, "pooler_output", found)
        out = model(pixel_values=pixels)
        pooled = getattr(out, "pooler_output", None)
        if pooled is not None and self.pooled:
            return pooled.flatten(1)
        hidden = out.last_hidden_state
        if hidden.ndim == 4:  # a feature map (B, D, H, W)
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.class_token else hidden.mean(1)

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosines (N,) of the rows of two arrays of embeddings [N, D]."""
        return (a * b).sum(1)


@dataclass(frozen=True)
class Clip:
    """CLIP, or any dual encoder of transformers: embeddings of images and of texts in one space.

    clip = Clip.load("openai/clip-vit-base-patch32")
    (clip.images(pictures) * clip.texts(prompts)).sum(1)      # CLIP-T
    """

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
            raise UserError(f"the tokenizer of '{name}' cannot be opened ({describe(error, 200)})") from error
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
