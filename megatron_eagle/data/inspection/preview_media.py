"""Pictures and frames of a preview: small, embedded as data, with the lines along which they are cut."""

from html import escape

from PIL import Image

from megatron_eagle.data.media.exact import upright_frames
from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.media.remote.files import MediaAccess
from megatron_eagle.data.media.thumbnails import jpeg_url
from megatron_eagle.data.store.reader import ImagePlan, VideoPlan
from megatron_eagle.problems import Problem

_PICTURE_SIZE, _FRAME_SIZE = 560, 150  # most pixels a side


def picture(plan: ImagePlan, max_pixels: int, media: MediaAccess) -> str:
    """A picture with its tile grid and, beside it, the thumbnail of the whole; or why it cannot be shown."""
    try:
        with media.local(plan.path, plan.file) as local:
            image = load_image(local, max_pixels=max_pixels)
    except Problem as problem:
        return f'<p class="problem">{escape(str(problem))}</p>'
    scale = min(1, _PICTURE_SIZE / max(plan.width, plan.height))  # a page is drawn in its grid's shape
    image = image.resize((max(1, round(plan.width * scale)), max(1, round(plan.height * scale))))
    shown = _grid(image, plan.columns, plan.rows)
    if plan.n_tiles > 1:
        side = min(160, image.height)
        shown += _grid(image.resize((side, side)), 1, 1, f"{plan.n_tiles}: thumbnail")
    return shown


def _grid(image: Image.Image, columns: int, rows: int, label: str = "") -> str:
    """An SVG of the picture, cut into columns and rows that are numbered in the order of the tiles."""
    width, height = image.size
    parts = [f'<image href="{jpeg_url(image)}" width="{width}" height="{height}"/>']
    for row in range(rows):
        for column in range(columns):
            x, y = width * column / columns, height * row / rows
            size = f'width="{width / columns:.1f}" height="{height / rows:.1f}"'
            text = label or str(row * columns + column + 1)
            parts.append(f'<rect class="tile" x="{x:.1f}" y="{y:.1f}" {size}/>')
            parts.append(f'<text x="{x + 5:.1f}" y="{y + 17:.1f}">{text}</text>')
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg class="picture" {box}>{"".join(parts)}</svg>'


def frames(plan: VideoPlan, media: MediaAccess) -> str:
    """The shown frames of a video with their numbers and times; or why they cannot be shown."""
    figures = []
    times = plan.times
    try:
        with media.local(plan.path, plan.index.file) as local:
            for i, frame in enumerate(upright_frames(local, plan.index)):
                image = Image.fromarray(frame)
                image.thumbnail((_FRAME_SIZE, _FRAME_SIZE))
                caption = f"Frame {i + 1}: {times[i]:.2f} s<br>number {plan.frames[i]:,} in the file"
                figures.append(
                    f'<figure><img src="{jpeg_url(image)}" width="{image.width}" height="{image.height}" '
                    f'alt="frame {i + 1}"><figcaption>{caption}</figcaption></figure>'
                )
    except Problem as problem:
        figures.append(f'<p class="problem">{escape(str(problem))}</p>')
    return f'<div class="frames">{"".join(figures)}</div>'
