"""Language models as the rest of the package sees them: a body that gives hidden states and a head that reads them.

Logits of a whole sequence are never made here. `states` runs the body alone and hands out the hidden states that
predict generated tokens; what is to be known of them is computed by the signals pass. That the head found in a
checkpoint (with its bias, scale and soft cap) is the module's own is measured at load, not believed. Weights are read
from safetensors only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opd_lab.chunk import Head, States
from opd_lab.settings import ModelSettings
from opd_lab.types import Rollouts, Signal, Source

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
    floor_nats: float | None = None  # of the log-probs
    one_end: tuple[int, ...] = ()  # ids that are one end of a response; the first is the one that is written

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def shape(self) -> tuple[int, int]:
        """Depth and width."""
        config: Any = self.module.config.get_text_config()
        return config.num_hidden_layers, config.hidden_size

    @property
    def body(self) -> torch.nn.Module:
        """Everything but the LM head."""
        return self.module.base_model

    @property
    def head(self) -> Head:
        linear: Any = self.module.get_output_embeddings()
        bias_V = getattr(linear, "bias", None)
        cut = slice(self.vocabulary)
        bias_V = None if bias_V is None else bias_V[cut]
        return Head(linear.weight[cut], bias_V, self.scale, self.softcap, self.one_end, self.floor_nats)

    @property
    def pad_id(self) -> int:
        """What fills the columns that nobody reads."""
        pad: Any = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def states(self, rollouts: Rollouts, layers: frozenset[Signal] = frozenset()) -> States:
        """The hidden states that predict the generated tokens, in row-major order of `mask_BT`; and those of chosen
        blocks, under the ownerless `hidden` signals given.

        Columns that are padding in every rollout given are left out of the forward pass. The caller decides on gradient
        (`torch.no_grad`) and dropout (`evaluating`).
        """
        columns = rollouts.attention_BL.any(0).nonzero()[:, 0]
        reading = any(dict(signal.args)["align"] == "token" for signal in layers)
        first, last = int(columns[0]), int(columns[-1]) + reading  # the last token predicts nothing
        attention_BL = rollouts.attention_BL[:, first:last]
        out = self.body(
            input_ids=rollouts.ids_BL[:, first:last],
            attention_mask=attention_BL,
            position_ids=positions(attention_BL),
            use_cache=False,
            output_hidden_states=bool(layers),
        )

        def rows(state_BLH: Tensor, align: str) -> Tensor:
            begin = rollouts.prompt_columns - first - (align == "predict")
            window_BTH = state_BLH[:, begin : begin + rollouts.mask_BT.shape[1]]
            return window_BTH[rollouts.mask_BT[:, : window_BTH.shape[1]]]

        chosen = {}
        for signal in layers:
            wanted = dict(signal.args)
            blocks = [rows(out.hidden_states[block], str(wanted["align"])) for block in wanted["layers"]]
            chosen[signal] = torch.stack(blocks, 1)
        return States(rows(out.last_hidden_state, "predict"), self.head, chosen)

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The responses as text, without the stop token and other special tokens."""
        keep_BT = rollouts.source_BT != Source.PADDING
        rows = [ids_T[keep_T].tolist() for ids_T, keep_T in zip(rollouts.response_BT, keep_BT, strict=True)]
        stopped = rollouts.stopped_B.tolist()
        rows = [ids[:-1] if stop and ids else ids for ids, stop in zip(rows, stopped, strict=True)]
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]

    @property
    def end_id(self) -> int:
        """The id that is written where a response ends."""
        own: Any = self.tokenizer.eos_token_id
        return own if own in self.stop_ids else min(self.stop_ids)

    def response(self, text: str) -> list[int]:
        """A text as a whole response: its tokens, as they follow the prompt, and the end."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def shortened(self, text: str, tokens: int) -> str:
        """The beginning of a text that the tokenizer makes so many tokens of."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= tokens else str(self.tokenizer.decode(ids[:tokens], skip_special_tokens=True))

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
    source, trust = _source(settings.path, name), settings.trust_remote_code
    dtype = getattr(torch, settings.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=trust, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(
            f"model.{name}.path = {settings.path} cannot be loaded: {error} It must hold config.json, a tokenizer and "
            "weights as *.safetensors; other weight files are not read, convert them with save_pretrained"
        ) from error
    module, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model.{name}.path = {settings.path} lacks weights of {type(module).__name__}, which would be random: "
            f"{', '.join(missing[:3])} ...; choose a complete checkpoint of a causal language model"
        )
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
    """A folder that `load` and transformers can read. Where several ids end a response, it says so: the student was
    taught no preference among ids that were one end."""
    if len(ends := set(lm.one_end) | lm.stop_ids) > 1 and lm.module.generation_config:
        lm.module.generation_config.eos_token_id = sorted(ends)
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
    scale, divisor, multiplier = (
        getattr(config, n, 1.0) for n in ("logit_scale", "logits_scaling", "lm_head_multiplier")
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    if lm.vocabulary:
        ids_BL = torch.arange(min(8, lm.vocabulary), device=lm.device)[None]
        with evaluating(lm.module):
            hidden_NH = lm.body(input_ids=ids_BL, use_cache=False).last_hidden_state[0]
            logits_NV = lm.module(input_ids=ids_BL, use_cache=False).logits[0].float()
        tolerance = (1e-4 if hidden_NH.dtype == torch.float32 else 2e-2) * float(logits_NV.abs().max()) + 1e-6
        for factor in (1.0, scale, 1 / divisor, divisor, multiplier):
            candidate = replace(lm, scale=float(factor), softcap=softcap)
            ours_NV = candidate.head.logits(hidden_NH)
            if ours_NV.shape == logits_NV.shape and float((ours_NV - logits_NV).abs().max()) <= tolerance:
                return candidate
    raise ValueError(
        f"model.{lm.name}: the LM head of {type(lm.module).__name__} ({lm.path}) is not supported: its logits are not "
        "softcap(scale * (W h + bias)) of the last hidden state with the scale and soft cap that its config names; "
        "choose another model, or teach `opd_lab.models` this head"
    )
