"""A file of results that a killed run leaves behind, and the next one goes on with."""

import json
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.files import to_line, write_whole


def resume(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The records that are there; the file afterwards ends with a whole line.

    Its first line is `head`, which says what makes the records; a line that was cut off is dropped.

    Raises:
        UserError: the file is damaged, cannot be written (it is then what it was), or was made by something
            else.
    """
    try:
        content = path.read_bytes() if path.is_file() else b""
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # the run was killed while it wrote
            lines.pop()
        records = [json.loads(line) for line in lines]
        head = json.loads(json.dumps(head))  # as it was written: tuples are lists
        if records and records[0] != head:
            changed = [k for k in head if not isinstance(records[0], dict) or records[0].get(k) != head[k]]
            raise UserError(
                f"{path}: holds another evaluation or batch ({', '.join(changed) or 'more'} differ); "
                "delete it or give another --output"
            )
        if not all(isinstance(record, dict) for record in records):
            raise ValueError
        whole = b"".join(lines) or to_line(head)
        if whole != content:
            write_whole(path, whole)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: damaged; delete it or give another --output") from None
    return records[1:]
