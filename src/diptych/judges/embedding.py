"""Embeddings: a judge of identity (any transformers vision model that embeds images of one subject close together), and
CLIP, which also embeds texts.

    judge = EmbeddingJudge.load("facebook/dinov2-base")
    judge.similarity(judge.embed(references), judge.embed(targets))      # cosines, 1 = the same

The embedding is the first of these that the model has: the projected image embedding (CLIP, SigLIP), the pooled output,
the class token, the mean of the patch tokens or of the feature map. A pooling layer that is missing from the files
(DINO's checkpoints) would be random and is not used.
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
    """Embeds images. On one machine, the same images in the same order give identical bits."""

    vision: Vision
    pooled: bool  # whether the files have the model's pooling layer
    class_token: bool

    @classmethod
    def load(cls, name: str = "pocket", role: str = "curator", device: str = "cpu") -> EmbeddingJudge:
        """Loads `pocket`, a folder, or a hub name as `curator` or `scorer`. UserError if weights are missing."""
        vision = open_vision(name, role, "AutoModel", device)
        random_pooler = {key for key in vision.missing if "pooler." in f"{key}."}
        # The text encoder of a dual encoder is not needed here and may be missing.
        text = {key for key in vision.missing if key.startswith(("text_model.", "text_projection", "logit_"))}
        refuse_missing(sorted(vision.missing - random_pooler - text), name)
        class_token = any(key.endswith(("cls_token", "class_embedding")) for key, _ in vision.model.named_parameters())
        return cls(vision, pooled=not random_pooler, class_token=class_token)

    @staticmethod
    def check(name: str, role: str) -> None:
        """UserError if `load` would fail. Reads no weights."""
        check(name, role, "AutoModel")

    @property
    def fingerprint(self) -> str:
        """sha256 of the model's files."""
        return self.vision.fingerprint

    def embed(self, images: Sequence[Image]) -> np.ndarray:
        """Images of any size to float32 [N, D] with norm 1, in order, computed in batches of 32."""
        import torch

        if not images:
            raise ValueError("no images to embed")
        rows = [self._embed(pixels) for pixels in self.vision.batches(images)]
        return torch.nn.functional.normalize(torch.cat(rows).float(), dim=1).cpu().numpy()

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) to embeddings (B, D)."""
        model: Any = self.vision.model
        if hasattr(model, "get_image_features"):
            features = model.get_image_features(pixel_values=pixels)
            return getattr(features, "pooler_output", features)
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
        """Cosine similarity (N,) of the rows of two arrays of embeddings [N, D]."""
        return (a * b).sum(1)


@dataclass(frozen=True)
class Clip:
    """CLIP, or any dual encoder of transformers, which embeds images and texts in one space.

    clip = Clip.load("openai/clip-vit-base-patch32")
    (clip.images(images) * clip.texts(prompts)).sum(1)      # CLIP-T
    """

    vision: Vision
    tokenizer: Any

    @classmethod
    def load(cls, name: str, device: str = "cpu") -> Clip:
        """Loads a folder or a hub name. UserError if weights are missing, or the model does not embed texts."""
        from transformers import AutoTokenizer

        vision = open_vision(name, "scorer", "AutoModel", device)
        if not hasattr(vision.model, "get_text_features"):
            raise UserError(
                "judge_invalid",
                f"'{name}' does not embed texts. CLIP-T needs a dual encoder such as openai/clip-vit-base-patch32.",
            )
        refuse_missing(sorted(vision.missing), name)
        try:
            folder = models.resolve(name, "scorer")  # checked by `open_vision`
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"The tokenizer of '{name}' cannot be opened ({describe(error, 200)})."
            raise UserError("judge_invalid", message) from error
        return cls(vision, tokenizer)

    def images(self, images: Sequence[Image]) -> np.ndarray:
        """Images to float32 [N, D] with norm 1, in batches of 32."""
        return _normalized([self.vision.model.get_image_features(pixel_values=p) for p in self.vision.batches(images)])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to float32 [N, D] with norm 1, truncated to the text encoder's length."""
        import torch

        length = getattr(self.vision.model.config, "text_config", self.vision.model.config).max_position_embeddings
        features = []
        with torch.no_grad():
            for text in texts:  # one at a time, because some models read padding
                tokens = self.tokenizer([text], truncation=True, max_length=length, return_tensors="pt")
                inputs = {key: tokens[key].to(self.vision.device) for key in ("input_ids", "attention_mask")}
                features.append(self.vision.model.get_text_features(**inputs))
        return _normalized(features)


def _normalized(features: Sequence[Any]) -> np.ndarray:
    import torch

    tensors = [getattr(each, "pooler_output", each) for each in features]
    return torch.nn.functional.normalize(torch.cat(tensors).float(), dim=1).cpu().numpy()
