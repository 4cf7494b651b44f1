"""PDF files: the sizes of their pages, and pictures of single pages, drawn by pdfium.

A page has no pixels of its own.  `hf_model.grids` chooses the grid of tiles for its shape as if it had the
pixels of all tiles that it may have (`pixel_size`), and the page is drawn once, at exactly the size of that
grid, never larger.  The same page at the same size is the same bits, in any process of one machine; fonts
that a file does not bring along are the machine's own.
"""

import math
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager

import pypdfium2
from PIL import Image
from pypdfium2 import raw as pdfium

from megatron_eagle.data.media import hints
from megatron_eagle.data.media.source import PageRef, file_metadata, open_bytes, open_media
from megatron_eagle.problems import Problem

MAX_PAGES = 10_000  # a pack of 128K tokens shows 512; more is an archive, not a document
_EDGE = 1024  # bytes at the start and at the end of a file in which a reader looks for its two marks
# pdfium may be used by one thread at a time.  A fork waits for a page that is being drawn, since the child
# would inherit a half-done state and a lock that nobody gives back.
_PDFIUM = threading.Lock()
os.register_at_fork(before=_PDFIUM.acquire, after_in_parent=_PDFIUM.release, after_in_child=_PDFIUM.release)


def page_sizes(path: str) -> list[tuple[float, float]]:
    """Width and height of every page as it is shown, in points (1/72 inch).

    Raises:
        Problem: a file that is missing, empty, no PDF, cut off or damaged, that needs a password, or that has
            no page or more than `MAX_PAGES`.
    """
    with _document(path) as document:
        n_pages = len(document)
        if not 1 <= n_pages <= MAX_PAGES:
            kind = "too many pages" if n_pages else "unreadable document"
            raise Problem(kind, f"{path} has {n_pages} pages, the limit is {MAX_PAGES}")
        sizes = []
        for number in range(n_pages):
            with _naming(path, number):
                sizes.append(document.get_page_size(number))
    if not all(0 < side < math.inf for size in sizes for side in size):
        raise Problem("unreadable document", f"{path} has a page without an area")
    return sizes


def pixel_size(width: float, height: float, max_pixels: int) -> tuple[int, int]:
    """The size of a page of this shape that has `max_pixels` pixels, for `grids` to choose the grid by."""
    scale = math.sqrt(max_pixels / (width * height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def check_pages(path: str, numbers: Collection[int], *, max_pixels: int) -> None:
    """Whether pages (numbers from 0) can be drawn, without drawing them.

    Raises:
        Problem: as `draw_page`.
    """
    if numbers:
        with _document(path) as document:
            for number in numbers:
                _open_page(document, path, number, max_pixels).close()


def draw_page(page: PageRef, *, max_pixels: int) -> Image.Image:
    """The page as an RGB picture of `page.width` x `page.height` pixels, stretched to that, on white.

    Raises:
        Problem: a file or page that cannot be read, and where the page, or a picture on it, has more than
            `max_pixels` pixels.
    """
    if page.width * page.height > max_pixels:
        raise Problem(
            "image too large", f"{page.file} at {page.width}x{page.height} pixels, limit {max_pixels}"
        )
    with (
        _document(page.file) as document,
        closing(_open_page(document, page.file, page.number, max_pixels)) as opened,
        closing(_blank(page.width, page.height)) as bitmap,
    ):
        flags = pdfium.FPDF_ANNOT | pdfium.FPDF_REVERSE_BYTE_ORDER
        pdfium.FPDF_RenderPageBitmap(bitmap, opened, 0, 0, page.width, page.height, 0, flags)
        if document.formenv:  # what is filled in
            pdfium.FPDF_SetFormFieldHighlightAlpha(document.formenv, 0)
            pdfium.FPDF_FFLDraw(document.formenv, bitmap, opened, 0, 0, page.width, page.height, 0, flags)
        return Image.frombytes("RGB", (page.width, page.height), bytes(bitmap.buffer))


@contextmanager
def _document(path: str) -> Iterator[pypdfium2.PdfDocument]:
    """The open file; nobody else uses pdfium meanwhile."""
    _check_whole(path)
    media = open_media(path)
    with _PDFIUM:
        try:
            with closing(pypdfium2.PdfDocument(media)) as document:
                document.init_forms()  # before any page is opened
                yield document
        except pypdfium2.PdfiumError as error:
            if error.err_code == pdfium.FPDF_ERR_PASSWORD:
                raise Problem("encrypted document", f"{path} needs a password") from None
            raise Problem("unreadable document", f"{path}: {error}") from None


def _check_whole(path: str) -> None:
    """Pdfium mends a file that was cut off, without a word and without the pages that are gone."""
    size = file_metadata(path).size
    if size == 0:
        raise Problem("empty file", path)
    try:
        with open_bytes(path) as file:
            head = file.read(_EDGE)
            file.seek(max(0, size - _EDGE))
            tail = file.read()
    except OSError as error:
        raise Problem("unreadable document", f"{path}: {error.strerror}") from None
    if b"%PDF-" not in head:
        raise Problem("unreadable document", f"{path} is no PDF file{hints.of_content(head)}")
    if b"%%EOF" not in tail:
        raise Problem("truncated document", f"{path} lacks the mark at its end")


@contextmanager
def _naming(path: str, number: int) -> Iterator[None]:
    """Says which page a failure is about."""
    try:
        yield
    except pypdfium2.PdfiumError as error:
        raise Problem("unreadable document", f"page {number + 1} of {path}: {error}") from None


def _open_page(document: pypdfium2.PdfDocument, path: str, number: int, max_pixels: int) -> pypdfium2.PdfPage:
    if number >= len(document):
        raise Problem("unreadable document", f"{path} has {len(document)} pages, no page {number + 1}")
    with _naming(path, number):
        page = document[number]
    for picture in page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE]):
        width, height = picture.get_px_size()
        if width * height > max_pixels:  # is decoded whole, however small it is drawn
            where = f"a picture on page {number + 1} of {path}"
            raise Problem("image too large", f"{where} has {width}x{height} pixels, limit {max_pixels}")
    return page


def _blank(width: int, height: int) -> pypdfium2.PdfBitmap:
    bitmap = pypdfium2.PdfBitmap.new_native(width, height, pdfium.FPDFBitmap_BGR, rev_byteorder=True)
    bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
    return bitmap
