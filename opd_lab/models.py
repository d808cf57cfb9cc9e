"""Language models as the rest of the package sees them: a body that gives hidden states and a head that reads them.

Logits of a whole sequence are never made here. `states` runs the body alone and hands out the hidden states that
predict generated tokens; what is to be known of them is computed by the signals pass. That the head found in a
checkpoint (with its bias, scale and soft cap) is the module's own is measured at load, not believed. Weights are read
from safetensors only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opd_lab.settings import ModelSettings
from opd_lab.signals import Head, States
from opd_lab.types import Rollouts, Source

ZOO = Path(__file__).parent / "zoo"
LAB = "lab:"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class LM:
    """A causal language model and its tokenizer."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # student | teacher | reference
    path: str
    stop_ids: frozenset[int]  # token ids that end a response
    vocabulary: int  # ids in use; logits beyond them are padding and never computed
    scale: float = 1.0  # of the logits
    softcap: float | None = None  # of the logits

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def body(self) -> torch.nn.Module:
        """Everything but the LM head."""
        return self.module.base_model

    @property
    def head(self) -> Head:
        linear: Any = self.module.get_output_embeddings()
        bias_V = getattr(linear, "bias", None)
        cut = slice(self.vocabulary)
        return Head(linear.weight[cut], None if bias_V is None else bias_V[cut], self.scale, self.softcap)

    @property
    def pad_id(self) -> int:
        """What fills the columns that nobody reads."""
        pad: Any = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def states(self, rollouts: Rollouts) -> States:
        """The hidden states that predict the generated tokens, in row-major order of `mask_BT`.

        Columns that are padding in every rollout given are left out of the forward pass. The caller decides on gradient
        (`torch.no_grad`) and dropout (`evaluating`).
        """
        mask_BT = rollouts.mask_BT
        columns = rollouts.attention_BL.any(0).nonzero()[:, 0]
        first, last = int(columns[0]), int(columns[-1])  # the last token predicts nothing
        attention_BL = rollouts.attention_BL[:, first:last]
        hidden_BLH = self.body(
            input_ids=rollouts.ids_BL[:, first:last],
            attention_mask=attention_BL,
            position_ids=positions(attention_BL),
            use_cache=False,
        ).last_hidden_state
        predicting_BT = mask_BT[:, : last - rollouts.prompt_columns + 1]
        return States(hidden_BLH[:, rollouts.prompt_columns - 1 - first :][predicting_BT], self.head)

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The responses as text, without the stop token and other special tokens."""
        keep_BT = rollouts.source_BT != Source.PADDING
        rows = [ids_T[keep_T].tolist() for ids_T, keep_T in zip(rollouts.response_BT, keep_BT, strict=True)]
        stopped = rollouts.stopped_B.tolist()
        rows = [ids[:-1] if stop and ids else ids for ids, stop in zip(rows, stopped, strict=True)]
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]

    def digest(self) -> str:
        """sha256 of the weights: names, types, shapes and bytes."""
        sha = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def freeze(self) -> LM:
        """No gradient, no dropout, from now on."""
        self.module.requires_grad_(False).eval()
        return self


def positions(attention_BL: Tensor) -> Tensor:
    """Position of every token among the real ones of its row, so that padding on the left changes nothing."""
    return (attention_BL.long().cumsum(1) - 1).clamp_min(0)


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside, and as it was afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def load(settings: ModelSettings, *, device: str, name: str) -> LM:
    """The model at `settings.path`: `lab:student`, a local folder, or an id of the Hugging Face hub."""
    if settings.dtype not in DTYPES:
        raise ValueError(f"model.{name}.dtype must be one of {', '.join(DTYPES)}, got {settings.dtype}")
    source = _source(settings.path, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
        module: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
        )
    except OSError as error:
        raise ValueError(
            f"model.{name}.path = {settings.path} cannot be loaded: {error} It must hold config.json, a tokenizer and "
            "weights as *.safetensors; other weight files are not read, convert them with save_pretrained"
        ) from error
    return wrap(module.to(resolve(device)), tokenizer, name=name, path=settings.path)


def wrap(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, path: str) -> LM:
    """A module and a tokenizer as an `LM`; refused if its head cannot be read."""
    eos: Any = module.generation_config.eos_token_id if module.generation_config else None
    stops: list[Any] = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    linear: Any = module.get_output_embeddings()
    weight = getattr(linear, "weight", None)
    width = len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else 0
    ids = tokenizer_size(tokenizer)
    if 0 < width < ids:
        raise ValueError(
            f"model.{name}: the tokenizer of {path} has {ids} ids, but the LM head has only {width} rows; "
            "resize the embeddings or choose the tokenizer that belongs to the model"
        )
    lm = LM(module, tokenizer, name, path, frozenset(int(i) for i in stops if i is not None), width)
    return _with_measured_head(lm)


def resolve(device: str) -> torch.device:
    """`auto` is the first CUDA device if there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def save(lm: LM, folder: Path) -> None:
    """A folder that `load` and transformers can read."""
    lm.module.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def _source(path: str, name: str) -> str:
    if path.startswith(LAB):
        folder = ZOO / path.removeprefix(LAB)
        if not folder.is_dir():
            have = ", ".join(sorted(LAB + p.name for p in ZOO.glob("*") if p.is_dir())) or "none"
            raise ValueError(f"model.{name}.path = {path} is no model of the lab; allowed: {have}")
        return str(folder)
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(
            f"model.{name}.path = {path} is not a folder here ({local.absolute()}); allowed: lab:NAME, a folder with "
            "config.json, tokenizer and *.safetensors, or the id of a model on the hub (owner/name)"
        )
    return path


@torch.no_grad()
def _with_measured_head(lm: LM) -> LM:
    """The scale of the logits has several names and directions among architectures: take the one that is right."""
    config: Any = lm.module.config.get_text_config()
    multiply = [getattr(config, n, None) for n in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    scales = [1.0, *(float(s) for s in multiply if s), *(1 / s for s in multiply[1:2] if s)]
    softcap = getattr(config, "final_logit_softcapping", None)
    ids_BL = torch.arange(min(8, lm.vocabulary), device=lm.device)[None]
    if ids_BL.numel():
        with evaluating(lm.module):
            hidden_NH = lm.body(input_ids=ids_BL, use_cache=False).last_hidden_state[0]
            logits_NV = lm.module(input_ids=ids_BL, use_cache=False).logits[0].float()
        tolerance = (1e-4 if hidden_NH.dtype == torch.float32 else 2e-2) * (1.0 + float(logits_NV.abs().max()))
        for scale in scales:
            candidate = replace(lm, scale=scale, softcap=softcap)
            ours_NV = candidate.head.logits(hidden_NH)
            if ours_NV.shape == logits_NV.shape and float((ours_NV - logits_NV).abs().max()) <= tolerance:
                return candidate
    raise ValueError(
        f"model.{lm.name}: the LM head of {type(lm.module).__name__} ({lm.path}) is not supported: its logits are not "
        "softcap(scale * (W h + bias)) of the last hidden state with the scale and soft cap that its config names; "
        "choose another model, or teach `opd_lab.models` this head"
    )


def match(student: LM, teacher: LM, stop_ids: list[int] | None) -> tuple[LM, LM, list[str]]:
    """Both models over the same ids, stopping at the same ids, and notes of what that took."""
    _same_tokenizer(student, teacher)
    notes = []
    templates = [str(lm.tokenizer.chat_template or "") for lm in (student, teacher)]
    if templates[0] != templates[1]:
        was = [hashlib.sha256(text.encode()).hexdigest()[:8] if text else "none" for text in templates]
        notes.append(
            f"chat templates differ (student {was[0]}, teacher {was[1]}): both models read the student's prompts"
        )
    if student.vocabulary != teacher.vocabulary:
        shared = tokenizer_size(student.tokenizer)
        notes.append(
            f"logits have {student.vocabulary} columns (student) and {teacher.vocabulary} (teacher): "
            f"both are cut to the {shared} ids of the shared tokenizer, the rest is padding"
        )
        student, teacher = replace(student, vocabulary=shared), replace(teacher, vocabulary=shared)
    if stop_ids is not None:
        if not stop_ids or min(stop_ids) < 0 or max(stop_ids) >= student.vocabulary:
            raise ValueError(f"model.stop_ids must name ids below {student.vocabulary}, at least one, got {stop_ids}")
        student, teacher = (replace(lm, stop_ids=frozenset(stop_ids)) for lm in (student, teacher))
    elif student.stop_ids != teacher.stop_ids or not student.stop_ids:
        shown = {lm.name: _spelled(lm, lm.stop_ids) for lm in (student, teacher)}
        raise ValueError(
            f"student and teacher must end a response at the same ids, at least one, got {shown}; the teacher would be "
            "asked about an end it does not know. Set model.stop_ids to the ids that end a response"
        )
    return student, teacher, notes


def _same_tokenizer(student: LM, teacher: LM) -> None:
    ours, theirs = (lm.tokenizer.get_vocab() for lm in (student, teacher))
    ours, theirs = ({i: token for token, i in vocab.items()} for vocab in (ours, theirs))
    differ = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if differ:
        first = "; ".join(f"id {i}: {ours.get(i)!r} and {theirs.get(i)!r}" for i in differ[:3])
        raise ValueError(
            f"student and teacher must share one tokenizer, got {len(differ)} ids that differ ({first}); "
            "choose two models of one family, or a method that asks the teacher for text alone"
        )
    roles = {getattr(lm.tokenizer, f"{role}_token_id") for lm in (student, teacher) for role in ("eos", "pad")}
    special = set(student.tokenizer.all_special_ids) ^ set(teacher.tokenizer.all_special_ids)
    if special - roles:  # which special token ends or pads is another question
        raise ValueError(
            f"student and teacher must agree on special tokens, got these only in one: "
            f"{_spelled(student, special - roles)}; make the tokenizer files equal"
        )


def _spelled(lm: LM, ids: Iterable[int]) -> str:
    return ", ".join(f"{i} = {lm.tokenizer.convert_ids_to_tokens(i)}" for i in sorted(ids)) or "none"
