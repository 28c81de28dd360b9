"""The recipe's section `ray`: what a run asks of a cluster."""

from __future__ import annotations

from pydantic import Field, field_validator

from diptych.recipe.schema.base import Section


class Pool(Section):
    """The workers of one stage on a Ray cluster. Each is a process that holds the stage's models and works on one shard
    at a time."""

    workers: int | None = Field(default=None, ge=1, le=100_000)
    """How many at most. Those the cluster has no room for yet are what its autoscaler adds nodes for. null is as many
    as fit into it."""
    gpus: float | None = Field(default=None, ge=0, le=64)
    """Of a worker; 0.25 lets four share a GPU. null: as many as the stage's vLLM model is spread over; where it has
    none, one if `device` is a GPU and the stage computes on it, which `write` does not."""
    cpus: float = Field(default=1, ge=0, le=4096)
    """Of a worker. It is what Ray counts; what torch uses is `threads`."""
    memory: float | None = Field(default=None, gt=0)
    """GiB of a worker that Ray keeps free for it; null is not counted."""

    @field_validator("gpus")
    @classmethod
    def _whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("above one, a whole number of GPUs")
        return gpus


class Ray(Section):
    """What `--engine ray` asks of a cluster. No row depends on it, so a run may go on with other values."""

    write: Pool = Pool()
    paint: Pool = Pool()
    curate: Pool = Pool()
    evaluate: Pool = Pool()
    retries: int = Field(default=3, ge=0, le=100)
    """How often a shard is given to another worker when its own has died."""
    wait: float = Field(default=900, gt=0)
    """Seconds to wait for the first worker to start: nodes that are being added take minutes."""

    def pool(self, stage: str) -> Pool:
        """The pool of a stage; of `evaluate` for every method that is drawn, and for pictures that no recipe asks."""
        return getattr(self, stage) if stage in ("write", "paint", "curate") else self.evaluate
