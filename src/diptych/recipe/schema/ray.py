"""Section `ray` of a recipe: the resources that a run requests from a cluster."""

from __future__ import annotations

from pydantic import Field, field_validator

from diptych.recipe.schema.base import Section


class Pool(Section):
    """Workers of one stage on a Ray cluster. Each worker is a process that holds the stage's models and works on one
    shard at a time."""

    workers: int | None = Field(default=None, ge=1, le=100_000)
    """Maximum number of workers. Ray's autoscaler adds nodes for workers that the cluster has no room for yet. null is
    as many as fit into the cluster."""
    gpus: float | None = Field(default=None, ge=0, le=64)
    """GPUs of each worker; 0.25 lets four workers share a GPU. null is the number over which the stage's vLLM model is
    spread. Without a vLLM model it is 1 if `device` is a GPU, and 0 for `write`."""
    cpus: float = Field(default=1, ge=0, le=4096)
    """CPUs that Ray reserves for each worker. `threads` sets how many torch uses."""
    memory: float | None = Field(default=None, gt=0)
    """Memory in GiB that Ray reserves for each worker. null reserves none."""

    @field_validator("gpus")
    @classmethod
    def _whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("must be a whole number of GPUs if it is above 1")
        return gpus


class Ray(Section):
    """Resources that `--engine ray` requests from a cluster. No row depends on them, so a run may resume with other
    values."""

    write: Pool = Pool()
    """Workers of the stage `write`."""
    paint: Pool = Pool()
    """Workers of the stage `paint`."""
    curate: Pool = Pool()
    """Workers of the stage `curate`."""
    evaluate: Pool = Pool()
    """Workers of evaluation and of batch generation."""
    retries: int = Field(default=3, ge=0, le=100)
    """How often a shard is given to another worker after the one that had it died."""
    wait: float = Field(default=900, gt=0)
    """Seconds to wait for the first worker to start. Nodes that are being added to a cluster take minutes."""

    def pool(self, stage: str) -> Pool:
        """Returns the pool of a stage; that of `evaluate` for evaluation and for batches of images."""
        return getattr(self, stage) if stage in ("write", "paint", "curate") else self.evaluate
