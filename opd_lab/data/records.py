"""Files of problems in, chat messages and answers out, through the field mapping of the data config.

JSON lines, a JSON list or parquet. A field is a dotted path (`reward_model.ground_truth`). Errors name the record.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_lab.settings import DataSettings

EXTENSIONS = (".jsonl", ".json", ".parquet")


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file."""
    if path.suffix not in EXTENSIONS:
        raise ValueError(f"data files end in {', '.join(EXTENSIONS)}, got {path}; convert it to one of these")
    if not path.is_file():
        raise ValueError(f"the data file {path} does not exist (seen from {Path.cwd()}); set data.path to your copy")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        records = parquet.read_table(path).to_pylist()
    elif path.suffix == ".json":
        records = _parse(path.read_text(encoding="utf-8"), f"{path}")
    else:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [_parse(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} must hold records (objects with named fields), one per line or in one list")
    if not records:
        raise ValueError(f"{path} holds no records; data.path must name a file with at least one prompt")
    return records


def messages_of(prompt: str | Mapping[str, Any], settings: DataSettings, where: str) -> tuple[dict[str, str], ...]:
    """The chat of a record, with the system prompt before it and the instruction after the question."""
    value = prompt if isinstance(prompt, str) else _field(prompt, settings.prompt_field, "prompt_field", where)
    chat = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not _is_chat(chat):
        raise ValueError(
            f"data.prompt_field={settings.prompt_field} must hold a text or chat messages with role and content, the "
            f"last one the user's, got {str(value)[:80]!r} in {where}; name another field"
        )
    chat = [{"role": message["role"], "content": message["content"]} for message in chat]
    question = chat[-1]["content"].rstrip()
    if not question:
        raise ValueError(f"the prompt of {where} is empty; remove the record or name another data.prompt_field")
    if settings.instruction is not None and not question.endswith(settings.instruction):
        chat[-1]["content"] = f"{question}\n{settings.instruction}"
    if settings.system_prompt is not None:
        if chat[0]["role"] == "system":
            raise ValueError(f"{where} already has a system message; set data.system_prompt to null to use it")
        chat.insert(0, {"role": "system", "content": settings.system_prompt})
    return tuple(chat)


def answer_of(record: Mapping[str, Any], settings: DataSettings, where: str) -> str | None:
    """The true answer of a record; None where the data are not graded."""
    if settings.answer_field is None:
        return None
    value = _field(record, settings.answer_field, "answer_field", where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"data.answer_field={settings.answer_field} must hold a text or a number, "
            f"got {str(value)[:80]!r} in {where}; name another field"
        )
    if settings.answer_pattern is None:
        return str(value).strip()
    match = re.search(settings.answer_pattern, str(value))
    if match is None or not match.groups() or match[1] is None:
        raise ValueError(
            f"data.answer_pattern={settings.answer_pattern!r} finds no first group in {str(value)[-80:]!r}, the answer "
            f"of {where}; correct the pattern, or set it to null where the field is the answer itself"
        )
    return match[1].strip()


def solution_of(record: Mapping[str, Any], settings: DataSettings, where: str) -> str | None:
    """The worked solution of a record, without the spaces around it; None where the data config names none."""
    if settings.solution_field is None:
        return None
    value = _field(record, settings.solution_field, "solution_field", where)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"data.solution_field={settings.solution_field} must hold a text, got {str(value)[:80]!r} in {where}; name "
            "another field, or set it to null where no method trains on solutions"
        )
    return value.strip()


def _field(record: Mapping[str, Any], path: str, setting: str, where: str) -> Any:
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(_paths(record))
            raise ValueError(f"data.{setting}={path} names no field of {where}; it has {there}: choose one of them")
        value = value[part]
    return value


def _paths(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)
        and all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in value)
        and value[-1]["role"] == "user"
    )


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error}); a .jsonl file holds one object per line") from None
