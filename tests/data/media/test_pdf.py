"""Pages of PDF files: drawn at the size of their grid, the same bits everywhere, given up if not all fit."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from megatron_eagle.data.media.documents import draw_page, page_sizes, pixel_size
from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.media.source import PageRef, page_ref
from megatron_eagle.data.preparation.preprocess import preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.preparation.reuse import is_current
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import select_grid
from megatron_eagle.hf_model.image_processing_eagle2_5_vl import Eagle2_5_VLImageProcessor
from megatron_eagle.problems import Problem
from tests.data.helpers import (
    call_tool,
    conversation,
    frame_number,
    make_image,
    make_pdf,
    make_store,
    read_media,
    write_pdf,
)
from tests.paths import MEDIA, need_media

LIMIT = 10**8
SIZE = (448, 896)


def drawn(path, number, size=SIZE):
    return np.asarray(draw_page(PageRef(str(path), number, *size), max_pixels=LIMIT))


def digest(path, number):
    return hashlib.sha256(drawn(path, number).tobytes()).hexdigest()


def test_names_of_pages():
    page = PageRef("/a b/?page=1&size=1x1/ü.pdf", 2, 448, 896)
    assert str(page) == "pdf:///a b/?page=1&size=1x1/ü.pdf?page=3&size=448x896"
    assert page_ref(str(page)) == page
    assert page_ref("/a.pdf") is None


def test_pages_of_a_store(tmp_path, tokenizer_dir):
    """Labels, order, grids, what is drawn, the preview page, and a file that is replaced."""
    make_pdf(tmp_path / "report.pdf", 5)
    make_pdf(tmp_path / "wide.pdf", 1, size=(900, 300))
    make_image(tmp_path / "photo.png", (30, 30))
    record = conversation(
        "<document> and <image> and <document>?",
        "Pages.",
        document=["report.pdf", "wide.pdf"],
        image="photo.png",
    )
    path = make_store(tmp_path, tokenizer_dir, [record], (2000,), sampling={"max_tiles": 6})
    sample = SampleStore(path)[0]
    names = [f"{tmp_path}/report.pdf?page={k}&size=56x84" for k in range(1, 6)]
    assert [image.path.removeprefix("pdf://") for image in sample.images[1:]] == [
        *names,
        f"{tmp_path}/wide.pdf?page=1&size=84x28",
    ]
    assert [(d.first_image, d.pages, d.n_pages) for d in sample.documents] == [
        (1, (0, 1, 2, 3, 4), 5),
        (6, (0,), 1),
    ]
    text = load_tokenizer(tokenizer_dir).decode(sample.ids.tolist())
    assert [label in text for label in ("<image 2>", "<image 7>", "<image 8>")] == [True, True, False]
    tiles = read_media(SampleStore(path), 0)
    assert [len(t) for t in tiles] == [7] * 5 + [1, 4]
    for number, page in enumerate(tiles[:5]):
        whole = torch.cat([torch.cat(list(page[i : i + 2]), 2) for i in (0, 2, 4)], 1)
        assert frame_number((whole.permute(1, 2, 0).numpy() + 1) * 127.5) == number
    shown = call_tool("preview_data", "show", path, "--html", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert shown.returncode == 0 and html.count("<svg") == 2 * 6 + 1
    assert "Document 1, page 5 of 5" in html and "6 of 6 pages, all that were wanted" in html
    assert f"{tmp_path}/report.pdf: drawn at 56 x 84 pixels in 2 x 3 tiles and a thumbnail" in html
    assert is_current(path, SampleStore(path).manifest.input_key)
    make_pdf(tmp_path / "report.pdf", 6)
    assert not is_current(path, SampleStore(path).manifest.input_key)
    with pytest.raises(Problem, match=r"media changed since preprocessing: pdf://.*report.pdf\?page=1&"):
        read_media(SampleStore(path), 0)


def test_pages_that_do_not_fit_are_given_up(tmp_path, tokenizer_dir):
    make_pdf(tmp_path / "long.pdf", 40)
    record = conversation("<document> What is this?", "x", document="long.pdf")
    path = make_store(tmp_path, tokenizer_dir, [record], (40, 200, 2000), sampling={"max_tiles": 1})
    short, long = (SampleStore(path, length) for length in (200, 2000))
    assert long[0].documents[0].pages == tuple(range(40))
    pages = short[0].documents[0].pages
    assert (pages[0], pages[-1], len(set(pages))) == (0, 39, len(pages))
    assert [page_ref(image.path).number for image in short[0].images] == list(pages)
    assert short[0].n_text - long[0].n_text < 0 and short[0].n_supervised == long[0].n_supervised
    counts = short.manifest.counts["200"]
    assert (counts["pages_kept"], counts["pages_wanted"]) == (len(pages), 40)
    tokenizer = load_tokenizer(tokenizer_dir)
    for store in (short, long):
        assert tokenizer.decode(store[0].ids.tolist()).endswith(
            " What is this?<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
        )
    # Not even one page fits: the ledger says so, and only for that length.
    (line,) = (path / "dropped.jsonl").read_text().splitlines()
    assert '"kind": "too long", "length": 40' in line


@pytest.mark.parametrize("shape", [(595, 842), (842, 595), (612, 792), (400, 400), (1920, 1080), (100, 3000)])
@pytest.mark.parametrize("max_tiles", [1, 4, 6, 12, 24, 27, 36, 48])
def test_the_grid_of_a_page(shape, max_tiles):
    """It uses the tiles that it may have, and a picture of that very size would get the same grid."""
    size = pixel_size(*shape, max_tiles * 448**2)
    assert abs(size[0] / size[1] - shape[0] / shape[1]) < 0.01 * shape[0] / shape[1]
    columns, rows = select_grid(*size, tile_size=448, max_tiles=max_tiles, drawn=True)
    assert columns * rows >= 0.5 * max_tiles
    if shape != (400, 400) or max_tiles < 27:  # only large squares would be cut otherwise
        assert (columns, rows) == select_grid(*size, tile_size=448, max_tiles=max_tiles)
    drawn_at = (columns * 448, rows * 448)
    assert select_grid(*drawn_at, tile_size=448, max_tiles=max_tiles) == (columns, rows)


def test_few_pixels_allow_few_tiles(tmp_path, tokenizer_dir):
    make_pdf(tmp_path / "a.pdf")
    record = conversation("<document>", "x", document="a.pdf")
    path = make_store(tmp_path, tokenizer_dir, [record], max_pixels=4 * 28 * 28)
    image = SampleStore(path)[0].images[0]
    assert image.columns * image.rows <= 4
    assert read_media(SampleStore(path), 0)[0].shape[0] == image.n_tiles


def test_what_is_drawn(tmp_path):
    path = make_pdf(tmp_path / "a.pdf", 3)
    page = drawn(path, 2)
    assert page.shape == (896, 448, 3)
    assert frame_number(page) == 2
    assert set(np.unique(page[:, :50])) == {0} and set(np.unique(page[:, 60:110])) == {255}
    with pytest.raises(Problem, match="unreadable document: .*a.pdf has 3 pages, no page 4"):
        drawn(path, 3)
    with pytest.raises(Problem, match="image too large: .*a.pdf at 448x896 pixels, limit 1000"):
        draw_page(PageRef(str(path), 0, 448, 896), max_pixels=1000)


@need_media
def test_real_pages_are_sharp():
    path = MEDIA / "pdf" / "tracemonkey_14p.pdf"
    assert page_sizes(str(path)) == [(612.0, 792.0)] * 14
    page = drawn(path, 0, (1344, 1792)).astype(np.int16)
    small = draw_page(PageRef(str(path), 0, 448, 597), max_pixels=LIMIT).resize((1344, 1792))
    edges = [np.abs(np.diff(np.asarray(p, np.int16), axis=1)).mean() for p in (page, small)]
    assert edges[0] > 1.5 * edges[1]


@need_media
def test_the_exported_processor_sees_the_same_pixels(tmp_path, tokenizer_dir):
    for name in ("tracemonkey_14p", "imagenet_cifar_lp"):
        (tmp_path / f"{name}.pdf").symlink_to(MEDIA / "pdf" / f"{name}.pdf")
    records = [
        conversation("<document>", "x", document=f"{name}.pdf")
        for name in ("tracemonkey_14p", "imagenet_cifar_lp")
    ]
    store = SampleStore(make_store(tmp_path, tokenizer_dir, records, (700, 260)), 700)
    hf = Eagle2_5_VLImageProcessor(size={"height": 28, "width": 28}, max_dynamic_tiles=12, use_thumbnail=True)
    for row in range(2):
        pages = [load_image(image.path) for image in store[row].images]
        expected = hf(images=pages, return_tensors="pt")["pixel_values"]
        tiles = torch.cat(read_media(store, row))
        assert tiles.shape == expected.shape
        assert torch.equal(tiles, expected)


def test_the_same_bits_everywhere(tmp_path):
    """Twice, in many threads at once, in processes forked meanwhile, and in one started anew."""
    path = MEDIA / "pdf" / "tracemonkey_14p.pdf"
    path = path if path.is_file() else make_pdf(tmp_path / "a.pdf", 14)
    pages = list(range(8))
    expected = [digest(path, number) for number in pages]
    with ThreadPoolExecutor(8) as threads:
        busy = threads.map(lambda number: digest(path, number), pages * 3)
        child = os.fork()
        if child == 0:
            os._exit(0 if digest(path, 3) == expected[3] else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert list(busy) == expected * 3
    program = (
        "import hashlib, sys; from megatron_eagle.data.media.images import load_image; "
        "print(hashlib.sha256(load_image(sys.argv[1]).tobytes()).hexdigest())"
    )
    page = str(PageRef(str(path), 1, *SIZE))
    done = subprocess.run([sys.executable, "-c", program, page], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected[1]]


def test_old_stores_are_refused_and_replaced(tmp_path, tokenizer_dir):
    path = make_store(tmp_path, tokenizer_dir, [conversation("Hi", "Ho")])
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 3', '"format_version": 2'))
    with pytest.raises(UserError, match="has store format 2, not 3; run preprocess_data again"):
        SampleStore(path)
    settings = PreprocessSettings(str(tokenizer_dir), (256,))
    assert preprocess(tmp_path / "recipe.json", path, settings).format_version == 3
    assert len(SampleStore(path)) == 1


@pytest.mark.parametrize("appearance", ["/AP<</N 7 0 R>>", ""])
def test_filled_form_fields_are_drawn(tmp_path, appearance):
    font = "/DR<</Font<</Helv 5 0 R>>>>/DA(/Helv 24 Tf 0 g)"
    text, box = "BT /Helv 24 Tf 5 10 Td (4711) Tj ET", "/Rect[50 400 450 460]"
    objects = [
        f"<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]{font}/NeedAppearances true>>>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 6 0 R/Annots[4 0 R]>>",
        f"<</Type/Annot/Subtype/Widget/FT/Tx/T(t)/V(4711){box}/DA(/Helv 24 Tf 0 g)/F 4{appearance}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        "<</Length 0>>stream\n\nendstream",
        "<</Type/XObject/Subtype/Form/BBox[0 0 400 60]/Resources<</Font<</Helv 5 0 R>>>>"
        f"/Length {len(text)}>>stream\n{text}\nendstream",
    ]
    path = write_pdf(tmp_path / "form.pdf", [one.encode() for one in objects])
    drawn = np.asarray(draw_page(PageRef(str(path), 0, 600, 800), max_pixels=10**6))
    dark = (drawn < 128).any(-1)
    assert dark[340:400, 50:450].sum() > 100  # the number, and nothing else: no highlight of the field
    assert dark.sum() == dark[340:400, 50:450].sum()
    assert (drawn[345, 440] == 255).all()
