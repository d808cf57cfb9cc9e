"""The student that a run leaves, as a model that MLflow knows: its folder as transformers saved it, and a file MLmodel.

`mlflow.transformers.save_model` would load the model again, take seconds, and look for a card on a hub; its file is all
that is needed. `mlflow.transformers.load_model("models:/ID")` and transformers itself load what is logged.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from opd_lab.tracking.mlflow import Store

TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json")


def log_model(store: Store, run_id: str, student: Path, megabytes: float, step: int) -> None:
    """Log a student's folder once, if there is one and it is no larger than this: what the run had made by a step."""
    from mlflow.entities import LoggedModelOutput

    size = sum(path.stat().st_size for path in student.rglob("*") if path.is_file())
    wanted = f"source_run_id = '{run_id}'"
    if not 0 < size <= 1e6 * megabytes or store.client.search_logged_models([store.experiment_id], wanted):
        return
    made: Any = store.client.create_logged_model(store.experiment_id, "student", run_id, model_type="student")
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), student, made.model_id, run_id)
        store.client.log_model_artifacts(made.model_id, scratch)
    store.client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step)])
    store.client.finalize_logged_model(made.model_id, "READY")


def write(folder: Path, student: Path, model_id: str, run_id: str) -> None:
    """The student in the shape of MLflow's transformers flavor."""
    from mlflow.models import Model

    shutil.copytree(student, folder / "model")
    tokenizer = folder / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for path in {path for pattern in TOKENIZER for path in student.glob(pattern)}:
        shutil.copy(path, tokenizer)
    needed = [f"torch=={torch.__version__}", f"transformers=={transformers.__version__}"]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n")
    config = transformers.AutoConfig.from_pretrained(student)
    model = Model(run_id=run_id, model_id=model_id)
    model.add_flavor(
        "transformers",
        transformers_version=transformers.__version__,
        code=None,
        task="text-generation",
        instance_type="TextGenerationPipeline",
        source_model_name="student",
        pipeline_model_type=(config.architectures or ["AutoModelForCausalLM"])[0],
        torch_dtype=str(config.dtype or torch.float32),
        model_binary="model",
        components=["tokenizer"],
        tokenizer_type="AutoTokenizer",
    )
    model.add_flavor(
        "python_function",
        loader_module="mlflow.transformers",
        python_version=platform.python_version(),
        env={"virtualenv": "requirements.txt"},
    )
    model.save(str(folder / "MLmodel"))
