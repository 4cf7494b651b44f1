"""Answers to a file of requests: every answer is kept at once, a run that was killed goes on."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.files import AppendedFile, split_lines, to_line, write_lines
from megatron_eagle.inference.generate import Answers, Request, Sampling, first_line
from megatron_eagle.inference.resume import resume


def answer_file(
    model: Answers,
    source: Path,
    output: Path,
    sampling: Sampling,
    name: str,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> int:
    """Answer every line of a JSONL file, each a `Request` as JSON.

    Until all are answered they are kept in `output`.partial, whose first line says which model (`name`),
    requests and sampling made them; a later call goes on there, or refuses if one of the three differs.

    Args:
        output: gets the same objects with "answer" added.

    Returns:
        How many they are.

    Raises:
        UserError: a file or a line is wrong; the line is named, answers before it are kept.
        OSError: an answer cannot be written; those before it are kept.
    """
    requests = list(read_requests(source))
    partial = output.with_name(output.name + ".partial")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    done = resume(partial, {"model": name, "requests": digest, "sampling": asdict(sampling)})
    with AppendedFile(partial) as file:
        for where, record, request in progress(requests[len(done) :]):
            try:
                answer = model.answer(request, sampling)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            done.append({**record, "answer": answer})
            file.write(to_line(done[-1]))
    write_lines(output, done)
    partial.unlink()
    return len(done)


def read_requests(source: Path) -> Iterator[tuple[str, Mapping[str, Any], Request]]:
    """(place, record, request) of every line of a batch file.

    Raises:
        UserError: a line is no request; file and line are named.
    """
    try:
        lines = split_lines(source.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {first_line(error)}") from None
    for number, line in enumerate(lines, 1):
        where = f"{source}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            problem = "is empty" if not line.strip() else f"is not valid JSON: {error}"
            raise UserError(f"{where} {problem}; every line must be a request") from None
        yield where, record, Request.from_record(record, where)
