"""One self-contained page that shows a pack or a sample: what the model reads, sees and is trained on.

No script and nothing from elsewhere; whatever comes from the data is escaped.
"""

from collections.abc import Sequence
from html import escape
from itertools import groupby

import numpy as np

from megatron_eagle.data.inspection.preview_media import frames, picture
from megatron_eagle.data.loading.loss_weights import answer_weights
from megatron_eagle.data.media.frame_list import frame_list_folder
from megatron_eagle.data.media.remote.files import ONLY_LOCAL, MediaAccess
from megatron_eagle.data.media.source import page_ref
from megatron_eagle.data.packing.index import Packs
from megatron_eagle.data.store.reader import ImagePlan, Rows, StoredSample
from megatron_eagle.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_eagle.hf_model.grids import select_grid, tile_count

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; border-top: 2px solid #d0d7de; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
td, th { padding: .15rem 1.2rem .15rem 0; text-align: right; font-weight: normal; }
th { color: #57606a; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; border: 1px solid #d0d7de;
  border-radius: 6px; padding: .8rem; font: 13px/1.6 ui-monospace, monospace; }
.special { color: #8250df; }
.visual { background: #ddf4ff; color: #0550ae; border-radius: 4px; padding: 0 .3em; }
.answer { border-radius: 3px; }
.note, figcaption { color: #57606a; }
.problem { color: #cf222e; }
.map { display: flex; height: 46px; border: 1px solid #57606a; border-radius: 4px; overflow: hidden; }
.map a { overflow: hidden; color: #fff; font-size: 12px; text-decoration: none; padding: 2px 0 0 3px;
  border-right: 1px solid #fff; box-sizing: border-box; white-space: nowrap; }
.text-only { background: #57606a; }
.picture-sample { background: #0969da; }
.document-sample { background: #1a7f37; }
.video-sample { background: #bf3989; }
.padding { background: repeating-linear-gradient(45deg, #fff, #fff 4px, #d0d7de 4px, #d0d7de 8px); }
.key span { display: inline-block; width: 1em; height: 1em; margin: 0 .3em 0 1em; vertical-align: -2px; }
.picture { margin: 0 .6rem .6rem 0; max-width: 100%; height: auto; vertical-align: top; }
.tile { fill: none; stroke: #ff8c00; stroke-width: 2; }
.picture text { fill: #fff; stroke: #000; stroke-width: 3; paint-order: stroke;
  font: bold 13px system-ui, sans-serif; }
.frames { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; }
figcaption { font-size: 12px; }
"""


def sample_page(store: Rows, row: int, media: MediaAccess = ONLY_LOCAL) -> str:
    """The page of one store row."""
    tokenizer = load_tokenizer(store.path / "tokenizer")
    return page(
        f"Sample {row:,} of {len(store):,}", store, sample_section(store, tokenizer, row, media=media)
    )


def pack_page(store: Rows, index: Packs, pack: int, media: MediaAccess = ONLY_LOCAL) -> str:
    """The page of one pack: its map, then its samples."""
    rows = index.rows(pack)
    tokenizer = load_tokenizer(store.path / "tokenizer")
    samples = "".join(sample_section(store, tokenizer, row, media=media) for row in rows)
    return page(f"Pack {pack:,} of {len(index):,}", store, _map(store, rows) + samples)


def page(title: str, store: Rows, body: str) -> str:
    """A page about samples of a store; `body` is HTML."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    where = f"{escape(str(store.path))}, {store.length:,} tokens, template {escape(store.manifest.template)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><h1>{escape(title)}</h1><p class="note">{where}</p>\n{body}</body></html>\n'
    )


def _map(store: Rows, rows: Sequence[int]) -> str:
    samples = [store[row] for row in rows]
    used = sum(sample.n_tokens for sample in samples)
    boxes = [
        f'<a class="{_kind(sample)}" href="#sample-{row}" title="sample {row}: {sample.n_tokens} tokens" '
        f'style="width:{100 * sample.n_tokens / store.length:.3f}%">{row}<br>{sample.n_tokens:,}</a>'
        for row, sample in zip(rows, samples, strict=True)
    ]
    empty = store.length - used
    boxes.append(
        f'<a class="padding" title="padding: {empty}" style="width:{100 * empty / store.length:.3f}%"></a>'
    )
    squares = sum(sample.n_tokens**2 for sample in samples)
    patches = store.manifest.patches_per_tile * sum(sample.n_tiles for sample in samples)
    key = "".join(
        f'<span class="{name}"></span>{text}'
        for name, text in (
            ("text-only", "text"),
            ("picture-sample", "pictures"),
            ("document-sample", "documents"),
            ("video-sample", "videos"),
            ("padding", "padding"),
        )
    )
    return (
        f"<p>{len(rows)} samples, {used:,} of {store.length:,} tokens used "
        f"({100 * used / store.length:.2f} %), {empty:,} padding. Cost: squared lengths {squares:,}, "
        f'vision patches {patches:,}.</p><div class="map">{"".join(boxes)}</div><p class="key">{key}</p>\n'
    )


def _kind(sample: StoredSample) -> str:
    if sample.videos:
        return "video-sample"
    if sample.documents:
        return "document-sample"
    return "picture-sample" if sample.images else "text-only"


def sample_section(
    store: Rows,
    tokenizer: Tokenizer,
    row: int,
    *,
    title: str | None = None,
    anchor: str | None = None,
    note: str = "",
    weighting: str = "square",
    multi_turn: bool = False,
    media: MediaAccess = ONLY_LOCAL,
) -> str:
    """All about a row under a heading.

    Args:
        anchor: what links name it by; None: sample-ROW.
        note: further words.
        weighting, multi_turn: those of a run's loss.
        media: gives those that are remote.
    """
    sample = store[row]
    head = ("tokens", "text", "visual", "supervised", "tiles", "frames")
    counts = (
        sample.n_tokens,
        sample.n_text,
        sample.n_visual,
        sample.n_supervised,
        sample.n_tiles,
        sample.n_frames,
    )
    table = "".join(f"<th>{name}</th>" for name in head), "".join(f"<td>{n:,}</td>" for n in counts)
    parts = [
        f'<h2 id="{anchor or f"sample-{row}"}">{escape(title or f"Row {row:,}")}</h2>',
        f'<p class="note">{escape(sample.file)}, line {sample.line}</p>',
        f"<p>{escape(note)}</p>" if note else "",
        f"<table><tr>{table[0]}</tr><tr>{table[1]}</tr></table>",
        "<h3>What was decided</h3>",
        "".join(f"<p>{escape(sentence)}</p>" for sentence in decision(store, sample)),
        "<h3>Text and loss weights</h3>",
        _text(store, tokenizer, sample, weighting, multi_turn),
    ]
    page_of = {
        document.first_image + i: f"Document {d}, page {number + 1} of {document.n_pages}"
        for d, document in enumerate(sample.documents, 1)
        for i, number in enumerate(document.pages)
    }
    for i, image in enumerate(sample.images):
        parts.append(f"<h3>{page_of.get(i, f'Picture {i + 1}')}</h3>")
        page = page_ref(image.path)
        file = page.file if page else image.path
        parts.append(f'<p class="note">{escape(file)}: {escape(_grid_words(store, image))}</p>')
        parts.append(picture(image, store.manifest.max_pixels, media))
    for i, video in enumerate(sample.videos, 1):
        seconds = video.duration_num / video.duration_den
        where = frame_list_folder(video.path)
        parts.append(f"<h3>Video {i}</h3>")
        parts.append(
            f'<p class="note">{escape(where)}: {len(video.frames)} frames of {seconds:.2f} s '
            f"({len(video.frames) / seconds:.2f} per second)</p>"
        )
        parts.append(frames(video, media))
    return "\n".join(parts)


def decision(store: Rows, sample: StoredSample) -> list[str]:
    """What Automatic Degradation Sampling decided, in words."""
    sentences = [
        f"The limit is {store.length:,} tokens; the sample has {sample.n_tokens:,}: "
        f"{sample.n_text:,} of text, which is never cut, and {sample.n_visual:,} visual ones."
    ]
    tiles = sample.n_tiles - sample.n_frames
    pages = sum(len(document.pages) for document in sample.documents)
    pages_wanted = sum(document.n_pages for document in sample.documents)
    for name, kept, wanted, why in (
        ("pages", pages, pages_wanted, "before anything else"),
        ("frames", sample.n_frames, sample.frames_wanted, "one more would not have fitted"),
        (
            "picture tiles",
            tiles,
            sample.tiles_wanted,
            "frames and pages come first, then all pictures alike",
        ),
    ):
        if wanted:
            lost = f"; {wanted - kept:,} given up: {why}" if kept < wanted else ", all that were wanted"
            sentences.append(f"{kept:,} of {wanted:,} {name}{lost}.")
    return sentences


def _grid_words(store: Rows, image: ImagePlan) -> str:
    page = page_ref(image.path)
    pixels = f"drawn at {page.width} x {page.height}" if page else f"{image.width} x {image.height}"
    words = f"{pixels} pixels in {image.columns} x {image.rows} tiles"
    words += " and a thumbnail" if image.n_tiles > 1 else ""
    rule = {name: store.manifest.sampling[name] for name in ("tile_size", "max_tiles", "tiling")}
    best = select_grid(image.width, image.height, **rule)
    if tile_count(best) > image.n_tiles:
        words += f"; without a limit {best[0]} x {best[1]}"
    return words


def _text(store: Rows, tokenizer: Tokenizer, sample: StoredSample, weighting: str, multi_turn: bool) -> str:
    """The text with answers coloured by the weight of their tokens, image tokens as counts."""
    weights = answer_weights(sample.answer_lengths, weighting, multi_turn)
    strongest = weights.max() or 1.0
    ids, answers = sample.ids, sample.answers
    is_image = ids == store.manifest.image_token_id
    changes = np.flatnonzero(np.diff(is_image) | np.diff(answers.astype(np.int32)).astype(bool)) + 1
    parts = []
    for start, end in zip([0, *changes.tolist()], [*changes.tolist(), len(ids)], strict=True):
        answer = int(answers[start])
        if is_image[start]:
            tiles = (end - start) // store.manifest.tokens_per_tile
            parts.append(
                f'<span class="visual">{end - start:,} image tokens, {tiles} tile{"s" * (tiles > 1)}</span>'
            )
            continue
        shown = _marked(tokenizer, ids[start:end].tolist())
        if answer:
            strength = 0.15 + 0.55 * weights[answer] / strongest
            title = (
                f"answer {answer}: {sample.answer_lengths[answer - 1]} tokens of weight {weights[answer]:.4f}"
            )
            style = f"background:rgba(46,160,67,{strength:.2f})"
            shown = f'<span class="answer" style="{style}" title="{title}">{shown}</span>'
        parts.append(shown)
    n = sample.n_supervised
    rule = {"square": f" = 1 / sqrt({n})", "sample": f" = 1 / {n}", "token": ""}[weighting]
    weight = f"Each of the {n:,} green tokens weighs {strongest:.4f}{rule}, everything else 0."
    if multi_turn:
        weight = f"The {n:,} green tokens weigh by the length of their answer, everything else 0."
    return f'<p class="note">{weight}</p><div class="text">{"".join(parts)}</div>'


def _marked(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Escaped text of ids, with special tokens marked."""
    parts = []
    for special, run in groupby(ids, tokenizer.is_special):
        text = escape(tokenizer.decode(list(run)))
        parts.append(f'<span class="special">{text}</span>' if special else text)
    return "".join(parts)
