"""The exported processor and the training data path see the same ids and the same pixels."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.preparation.processor import PreprocessSettings, SampleProcessor, Task
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.sampling.probe import probe_video
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.hf_model.clips import spread
from megatron_eagle.hf_model.grids import select_grid, tile_count
from megatron_eagle.hf_model.media_files import load_image as hf_load_image
from megatron_eagle.hf_model.media_files import load_video
from megatron_eagle.hf_model.tiles import image_tiles, normalize
from megatron_eagle.inference.pages import page_pictures
from tests.convert.hf_folder import TILE
from tests.convert.media import write_picture, write_video
from tests.data.helpers import conversation, load_frames, make_pdf, make_store, read_media
from tests.paths import MEDIA, need_media

N_FRAMES = 6


@pytest.fixture(scope="module")
def hf(exported):
    return AutoProcessor.from_pretrained(exported, trust_remote_code=True)


@pytest.fixture(scope="module")
def training(source):
    sampling = SamplingSettings(
        min_frames=N_FRAMES, max_frames=N_FRAMES, max_tiles=6, tile_size=TILE
    )  # as the source's config.json
    settings = PreprocessSettings(str(source), (100_000,), sampling, patch_size=16, template="hf")
    return SampleProcessor(settings)


def training_ids(training, messages) -> list[int]:
    raw = json.dumps({"messages": messages}).encode()
    outcome = training.process(Task(raw, source=0, file="f", line=1, root="", overrides={}))
    assert not outcome.dropped
    return outcome.rows[100_000].ids.tolist()


def processor_inputs(hf, messages):
    prompt = hf.apply_chat_template(messages, tokenize=False)
    images, videos = hf.process_vision_info(messages)
    return hf(text=[prompt], images=images, videos=videos, return_tensors="pt")


def conversations(folder):
    wide = write_picture(folder / "wide.png", 300, 100)
    square = write_picture(folder / "square.png", 111, 111)
    clip = {"type": "video", "video": write_video(folder / "video.mp4"), "nframes": N_FRAMES}
    cut = {**clip, "video_start": 0.35, "video_end": 2.65}

    def picture(path):
        return {"type": "image", "image": path}

    def ask(*content):
        return [
            {
                "role": "user",
                "content": [c if isinstance(c, dict) else {"type": "text", "text": c} for c in content],
            },
            {"role": "assistant", "content": "An answer, with <image> and <|im_end|> as text."},
        ]

    yield ask("No picture at all.")
    yield ask(picture(wide), "What is it?")
    yield ask(picture(wide), " and ", picture(square), "\nWhich is wide? \n")
    yield ask(clip, "What happens?")
    yield ask("  Compare", cut, picture(square), clip, "<|im_start|>system <IMG_CONTEXT> <img>")
    yield [
        {"role": "system", "content": "Be brief."},
        *ask(picture(square), "A?"),
        *ask("And b?", picture(wide)),
    ]


def test_ids_are_equal(hf, training, tmp_path):
    for messages in conversations(tmp_path):
        ours = processor_inputs(hf, messages)["input_ids"][0].tolist()
        theirs = training_ids(training, messages)
        assert hf.decode(ours) == hf.decode(theirs)
        assert ours == theirs


def assert_same_picture(hf, path):
    image = load_image(path)
    grid = select_grid(*image.size, tile_size=TILE, max_tiles=6)
    ours = hf.image_processor(images=[hf_load_image(path)])["pixel_values"]
    assert torch.equal(ours, normalize(image_tiles(np.array(image), grid, TILE)))


@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16"])
def test_pictures_are_equal_bit_for_bit(hf, tmp_path, mode, orientation):
    assert_same_picture(hf, write_picture(tmp_path / "p.png", 190, 70, mode, orientation))


@pytest.mark.parametrize("name", ["p.jpg", "p.tiff"])
def test_other_formats_are_equal_bit_for_bit(hf, tmp_path, name):
    assert_same_picture(hf, write_picture(tmp_path / name, 190, 70, "RGB", 8))


def assert_same_video(hf, path, start=None, end=None):
    clip = {} if start is None else {"video_start": start, "video_end": end}
    facts = probe_video(VideoSource(path, *(None if t is None else Fraction(str(t)) for t in (start, end))))
    ours = load_video(path, **clip)
    frames = np.array(spread(facts.first, facts.last, len(ours)))
    assert ours.timestamps == facts.times(frames.tolist())
    assert ours.fps == float(len(ours) / facts.duration)
    theirs = load_frames(path, facts.table.index, frames, tile_size=TILE)
    assert torch.equal(hf.image_processor(videos=[ours])["pixel_values"], theirs)


def test_videos_are_equal_bit_for_bit(hf, tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=31)
    assert_same_video(hf, path)
    assert_same_video(hf, path, 0.5, 2.25)
    assert_same_video(hf, write_video(tmp_path / "one.mp4", frames=1))


@need_media
@pytest.mark.parametrize("name", ["decord_rot90.mov", "decord_unordered.mov", "lf_2.avi", "tc_av1.mkv"])
def test_odd_videos_are_equal_bit_for_bit(hf, name):
    assert_same_video(hf, str(MEDIA / "video" / name))


SIZES = {"4k": (549, 309), "tall": (190, 900)}  # in tiles as 3840 x 2160 in 448 pixels


@pytest.mark.parametrize(("name", "limit"), [("4k", 48), ("tall", 40)])
def test_large_pictures_are_equal_up_to_48_tiles(hf, source, tmp_path, name, limit):
    """Store and training, and the exported processor: the same grid, ids and pixels."""
    path = write_picture(tmp_path / "p.png", *SIZES[name])
    sampling = {"tile_size": TILE, "max_tiles": limit}
    messages = [
        {"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It."}]},
    ]
    record = conversation("<image>What?", "It.", image="p.png")
    settings = {"patch_size": 16, "template": "hf", "sampling": sampling}
    store = SampleStore(make_store(tmp_path, source, [record], (1000,), **settings))
    row, (tiles,) = store[0], read_media(store, 0)
    text = hf.apply_chat_template(messages)
    images, _ = hf.process_vision_info(messages)
    ours = hf(text=text, images=images, images_kwargs={"max_dynamic_tiles": limit}, return_tensors="pt")
    assert torch.equal(ours["pixel_values"], tiles)
    assert ours["input_ids"][0].tolist() == row.ids.tolist()
    grid = select_grid(*SIZES[name], tile_size=TILE, max_tiles=limit)
    assert len(tiles) == tile_count(grid) > 30
    other = hf.image_processor(images=images, max_dynamic_tiles=6)["pixel_values"]
    assert other.shape != tiles.shape


@pytest.mark.parametrize("shape", [(400, 400), (595, 842)])
def test_pages_are_equal_up_to_48_tiles(hf, source, tmp_path, shape):
    """A square page at its 6 x 6 tiles would be cut into 5 x 5: it is drawn otherwise."""
    make_pdf(tmp_path / "a.pdf", size=shape)
    record = conversation("<document>", "x", document="a.pdf")
    sampling = {"tile_size": TILE, "max_tiles": 48}
    store = make_store(tmp_path, source, [record], (1000,), sampling=sampling, patch_size=16)
    tiles = torch.cat(read_media(SampleStore(store), 0))
    pages = page_pictures(str(tmp_path / "a.pdf"), tile_size=TILE, max_tiles=48)
    ours = hf.image_processor(images=pages, max_dynamic_tiles=48)["pixel_values"]
    assert torch.equal(ours, tiles) and len(ours) > 24
