"""What a store row holds, as plain data to look at or to compare."""

from typing import Any

from megatron_eagle.data.loading.loss_weights import answer_weights
from megatron_eagle.data.store.reader import ImagePlan, Rows
from megatron_eagle.errors import UserError


def check_row(store: Rows, row: int) -> int:
    """`row`, if the store has it.

    Raises:
        UserError: it has no such row.
    """
    if not 0 <= row < len(store):
        raise UserError(f"{store.path} has rows 0 to {len(store) - 1} at length {store.length}, no row {row}")
    return row


def _image(image: ImagePlan) -> dict[str, Any]:
    return {
        "path": image.path,
        "grid": [image.columns, image.rows],
        "thumbnail": image.n_tiles > 1,
        "n_tiles": image.n_tiles,
    }


def describe_row(store: Rows, row: int) -> dict[str, Any]:
    """One row: source, token counts, media with their grids or frames, ids, loss weights 1 / sqrt(n).

    `loss_weights[i]` belongs to token i itself: 0 where it is not part of an answer.

    Raises:
        UserError: a row that does not exist.
    """
    sample = store[check_row(store, row)]
    n_pictures = len(sample.images) - sum(len(document.pages) for document in sample.documents)
    images = [_image(image) for image in sample.images]
    return {
        "source": {"file": sample.file, "line": sample.line},
        "n_tokens": sample.n_tokens,
        "n_text": sample.n_text,
        "n_visual": sample.n_visual,
        "n_supervised": sample.n_supervised,
        "images": images[:n_pictures],
        "documents": [
            {
                "n_pages": document.n_pages,
                "pages": list(document.pages),
                "images": images[document.first_image : document.first_image + len(document.pages)],
            }
            for document in sample.documents
        ],
        "videos": [
            {"path": video.path, "frames": list(video.frames), "times": video.times}
            for video in sample.videos
        ],
        "input_ids": sample.ids.tolist(),
        "loss_weights": answer_weights(sample.answer_lengths, "square", False)[sample.answers].tolist(),
    }
