"""Media that are files."""

from pathlib import Path

from megatron_eagle.data.media.addresses.base import FileMetadata, content_fingerprint, file_status
from megatron_eagle.problems import Problem


class Files:
    """See `AddressKind`; the address is the file's path."""

    def metadata(self, path: str) -> FileMetadata:
        """Size and time of change of the file."""
        status = file_status(path)
        return FileMetadata(path, status.st_size, status.st_mtime_ns)

    def fingerprint(self, path: str) -> int:
        """See `content_fingerprint`."""
        size = file_status(path).st_size
        try:
            with open(path, "rb") as file:
                return content_fingerprint(file, size)
        except OSError as error:
            raise Problem("missing media", f"{path}: {error.strerror}") from None

    def open(self, path: str) -> Path:
        """The file itself."""
        if file_status(path).st_size == 0:
            raise Problem("empty file", path)
        return Path(path)
