"""Files of requests, undecoded: the export's own code reads them, vLLM only fetches them."""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from vllm import envs
from vllm.multimodal.media import MediaConnector, MediaIO

from .video_url import split_url


class UndecodedFile(MediaIO[dict[str, Any]]):
    """A file as a part of a message: `{kind: bytes, **settings}`."""

    def __init__(self, kind: str, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.kind, self.settings = kind, dict(settings or {})

    def load_bytes(self, data: bytes) -> dict[str, Any]:
        """The part."""
        return {self.kind: data, **self.settings}

    def load_base64(self, media_type: str, data: str) -> dict[str, Any]:
        """The part, of a data URL."""
        if media_type.lower() == "video/jpeg":  # vLLM's own way to send frames, without their times
            raise ValueError("send a video as a file (data:video/mp4;base64,...), not as frames")
        return self.load_bytes(base64.b64decode(data, validate=True))

    def load_file(self, filepath: Path) -> dict[str, Any]:
        """The part, of a file where the server allows files."""
        return self.load_bytes(filepath.read_bytes())


class FileConnector(MediaConnector):
    """vLLM's, with its rules of what may be fetched, for pictures and videos as files."""

    def load_from_url(self, url: str, *arguments: Any, **options: Any) -> Any:
        """vLLM's."""
        with _fetching(url):
            return super().load_from_url(url, *arguments, **options)

    async def load_from_url_async(self, url: str, *arguments: Any, **options: Any) -> Any:
        """vLLM's."""
        with _fetching(url):
            return await super().load_from_url_async(url, *arguments, **options)

    def fetch_image(self, image_url: str, **_: Any) -> Any:
        """A picture."""
        return self.load_from_url(
            image_url, UndecodedFile("image"), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
        )

    async def fetch_image_async(self, image_url: str, **_: Any) -> Any:
        """A picture."""
        return await self.load_from_url_async(
            image_url, UndecodedFile("image"), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
        )

    def fetch_video(self, video_url: str, **_: Any) -> Any:
        """A video and how to sample it."""
        url, file = self._video(video_url)
        return self.load_from_url(url, file, fetch_timeout=envs.VLLM_VIDEO_FETCH_TIMEOUT)

    async def fetch_video_async(self, video_url: str, **_: Any) -> Any:
        """A video and how to sample it."""
        url, file = self._video(video_url)
        return await self.load_from_url_async(url, file, fetch_timeout=envs.VLLM_VIDEO_FETCH_TIMEOUT)

    def _video(self, url: str) -> tuple[str, UndecodedFile]:
        url, settings = split_url(url, self.media_io_kwargs.get("video"))
        return url, UndecodedFile("video", settings)


@contextmanager
def _fetching(url: str) -> Iterator[None]:
    """What cannot be fetched is the request's fault (400), not the server's (500, as of vLLM)."""
    try:
        yield
    except (OSError, RuntimeError, aiohttp.ClientError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{url[:200]} cannot be fetched: {said}") from error
