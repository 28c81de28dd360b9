"""A teacher's folder from somebody else runs nothing: whichever door opens it, its code and pickles stay closed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diptych.apps.enhance import _counted
from diptych.errors import UserError
from diptych.evaluate.methods import common
from diptych.evaluate.methods.baselines import Stock
from diptych.judges.vision import check, open_vision
from diptych.llm.local import LocalModel
from diptych.stages import paint
from diptych.student.pipeline import DiptychPipeline
from diptych.student.weights.sources import open_part
from diptych.train import prepare
from diptych.utils.opening import check_pipeline, refuse_code


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-has-run"


@pytest.fixture
def hostile(teacher: Path, tmp_path: Path) -> Path:
    """A whole teacher, to be spoiled."""
    return shutil.copytree(teacher, tmp_path / "somebody-elses")


def code(path: Path, marker: Path, name: str) -> None:
    text = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    text += f"from diffusers import FluxPipeline, FluxTransformer2DModel as {name}\nEvilPipeline = FluxPipeline\n"
    path.write_text(text)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Payload:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def own_component(folder: Path, marker: Path) -> None:
    code(folder / "transformer" / "evil.py", marker, "Evil")
    change(folder / "model_index.json", transformer=["evil", "Evil"])


def script_of_a_known_name(folder: Path, marker: Path) -> None:
    code(folder / "transformer" / "diffusers.py", marker, "FluxTransformer2DModel")


def own_pipeline(folder: Path, marker: Path) -> None:
    code(folder / "evil.py", marker, "Evil")
    change(folder / "model_index.json", _class_name=["evil", "EvilPipeline"])


def pickled(folder: Path, marker: Path, part: str = "vae") -> None:
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    name = "diffusion_pytorch_model.bin" if part in ("vae", "transformer") else "pytorch_model.bin"
    (folder / part / name).write_bytes(pickle.dumps(Payload(marker)))


def pickled_text(folder: Path, marker: Path) -> None:
    pickled(folder, marker, "text_encoder_2")


def pickled_shards(folder: Path, marker: Path) -> None:
    pickled(folder, marker, "transformer")
    (folder / "transformer" / "a.safetensors").write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"x_embedder.weight": "diffusion_pytorch_model.bin"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def shards_elsewhere(folder: Path, marker: Path) -> None:
    index = {"metadata": {}, "weight_map": {"x_embedder.weight": "../../elsewhere.safetensors"}}
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def mapped(folder: Path, marker: Path) -> None:
    code(folder / "modeling.py", marker, "Evil")
    change(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "modeling.Evil"})
    change(folder / "model_index.json", text_encoder=["transformers", "AutoModel"])


def mapped_tokenizer(folder: Path, marker: Path) -> None:
    change(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil--code.Evil", None]})
    change(folder / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])


def other_library(folder: Path, marker: Path) -> None:
    change(folder / "model_index.json", transformer=["subprocess", "Popen"])


def dotted_library(folder: Path, marker: Path) -> None:
    change(folder / "model_index.json", transformer=["flux.pipeline_flux", "FluxPipeline"])


def nested_pipeline(folder: Path, marker: Path) -> None:
    own_pipeline(folder / "transformer" / "..", marker)
    for name in ("model_index.json", "evil.py"):
        shutil.move(folder / name, folder / "transformer" / name)
    change(folder / "transformer" / "model_index.json", _class_name=["evil", "EvilPipeline"])
    outer = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "DiffusionPipeline"]}
    (folder / "model_index.json").write_text(json.dumps(outer))
    (folder / "transformer" / "evil.py").unlink()


def redirected(folder: Path, marker: Path) -> None:
    where = {"base_model_name_or_path": "/somewhere/else", "peft_type": "LORA"}
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps(where))


def kernel(folder: Path, marker: Path) -> None:
    change(folder / "text_encoder" / "config.json", attn_implementation="somebody/kernel:function")


def not_a_class(folder: Path, marker: Path) -> None:
    change(folder / "model_index.json", _class_name="logging")


def no_index(folder: Path, marker: Path) -> None:
    (folder / "model_index.json").unlink()


def deep(folder: Path, marker: Path) -> None:
    (folder / "text_encoder" / "config.json").write_text('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")


TRICKS: tuple[Callable[[Path, Path], None], ...] = (
    own_component,
    script_of_a_known_name,
    own_pipeline,
    pickled,
    pickled_text,
    pickled_shards,
    shards_elsewhere,
    mapped,
    mapped_tokenizer,
    other_library,
    dotted_library,
    nested_pipeline,
    redirected,
    kernel,
    not_a_class,
    no_index,
    deep,
)


def doors(recipe: Any, folder: Path, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """All that opens a pipeline's folder."""
    of = recipe.model_copy(update={"teacher": str(folder), "device": "cpu"})
    settings = of.evaluate.pipeline.model_copy(update={"model": str(folder)})
    of = of.model_copy(update={"evaluate": of.evaluate.model_copy(update={"pipeline": settings})})
    context: Any = SimpleNamespace(recipe=of)
    return {
        "paint": lambda: paint.open_teacher(folder, torch.float32),
        "baselines": lambda: common.teacher_of(of),
        "pipeline": lambda: Stock(context)._open(),
        "distill": lambda: prepare.start(of, torch.device("cpu")),
        "student": lambda: DiptychPipeline.from_pretrained(folder),
    }


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.__name__)
def test_no_door_opens_a_folder_that_brings_code_or_pickles(
    trick: Callable[[Path, Path], None], hostile: Path, marker: Path, recipe: Any, tmp_path: Path
) -> None:
    trick(hostile, marker)
    for name, door in doors(recipe, hostile, tmp_path).items():
        with pytest.raises(UserError) as refused:
            door()
        assert str(hostile) in str(refused.value), name
        assert not marker.exists(), name


def test_the_payloads_do_make_the_marker_where_they_are_opened(hostile: Path, marker: Path) -> None:
    pickled(hostile, marker)
    pickle.loads((hostile / "vae" / "diffusion_pytorch_model.bin").read_bytes())
    assert marker.exists()


def test_an_honest_folder_opens_at_every_door_and_pickles_beside_safetensors_stay_closed(
    hostile: Path, marker: Path, recipe: Any, tmp_path: Path
) -> None:
    (hostile / "vae" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    (hostile / "README.py").write_text("never read")
    for name, door in doors(recipe, hostile, tmp_path).items():
        if name not in ("pipeline", "student"):  # a FluxPipeline has no reference input
            assert door().vae is not None
    assert not marker.exists()
    index = check_pipeline(hostile)
    settings = index | {"sample_sigmas": [1.0, 0.5], "image_encoder": [None, None], "is_distilled": False}
    (hostile / "model_index.json").write_text(json.dumps(settings))
    assert check_pipeline(hostile) == settings


def test_components_of_diffusers_own_pipelines_are_known(hostile: Path) -> None:
    index = check_pipeline(hostile)
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (hostile / "model_index.json").write_text(json.dumps(index | {"safety_checker": checker}))
    check_pipeline(hostile)


def test_judges_writers_and_tokenizers_run_no_code_either(hostile: Path, judge: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(judge, tmp_path / "judge")
    change(folder / "config.json", nested={"auto_map": {"AutoModel": "code.Evil"}})
    change(hostile / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Evil", None]})
    for door in (
        lambda: open_vision(str(folder), "curator", "AutoModel", "cpu"),
        lambda: check(str(folder), "curator", "AutoModel"),
        lambda: LocalModel.load(str(folder)),
        lambda: LocalModel.check(str(folder)),
        lambda: _counted(hostile / "tokenizer"),
        lambda: open_part("tokenizer", hostile / "tokenizer", torch.float32),
        lambda: refuse_code(folder),
    ):
        with pytest.raises(UserError, match="auto_map"):
            door()
