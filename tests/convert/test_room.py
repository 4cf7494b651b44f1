"""What a prompt has room for: limits of frames and tiles are lowered, as far as need be and no further."""

import pytest
from transformers import AutoProcessor

from megatron_eagle.hf_model.grids import tile_limits
from megatron_eagle.hf_model.room import DEFAULT_ANSWER, prompt_room
from tests.convert.media import write_picture, write_video

USER = {"role": "user"}


@pytest.fixture(scope="module")
def processor(exported):
    return AutoProcessor.from_pretrained(exported, trust_remote_code=True)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    return {
        "picture": write_picture(folder / "p.png", 512, 320),
        "video": write_video(folder / "v.mp4", frames=60),
        "short": write_video(folder / "s.mp4", frames=10),
    }


class Prompt:
    """A question on pictures and videos, and how long it becomes."""

    def __init__(self, processor, images=(), videos=(), **settings):
        self.processor, self.images, self.settings = processor, list(images), settings
        self.videos = [{"type": "video", "fps": 10, **video} for video in videos]
        self.text = processor.apply_chat_template(self.messages(self.videos), add_generation_prompt=True)

    def messages(self, videos):
        pictures = [{"type": "image", "image": image} for image in self.images]
        return [{**USER, "content": [*pictures, *videos, {"type": "text", "text": "What is shown?"}]}]

    def fit(self, length, answer=0):
        return self.processor.fit(self.text, self.images, self.videos, length, answer, **self.settings)

    def length(self, videos, tiling, frame_tiles=None):
        """Tokens of the prompt, by the processor's call."""
        images, shown = self.processor.process_vision_info(self.messages(videos))
        frames = {} if frame_tiles is None else {"max_dynamic_tiles": frame_tiles}
        inputs = self.processor(
            text=[self.text], images=images, videos=shown, images_kwargs=tiling, videos_kwargs=frames
        )
        return len(inputs["input_ids"][0])

    def fitted_length(self, length):
        found = self.fit(length)
        return self.length(found.videos, found.tiling, found.frame_tiles), found


def test_what_fits_stays(processor, media):
    prompt = Prompt(processor, [media["picture"]], [{"video": media["video"], "max_frames": 16}])
    whole = prompt.length(prompt.videos, {})
    for length in (100_000, whole):
        found = prompt.fit(length)
        assert found.videos == prompt.videos and found.tiling == {} and not found.lowered
        assert found.tokens in (None, whole)
    assert prompt.fit(whole).tokens == whole and prompt.fit(whole - 1).lowered


def test_a_character_may_be_several_tokens(processor, media):
    prompt = Prompt(processor, [], [{"video": media["video"], "max_frames": 8}])
    prompt.text = prompt.text.replace("What is shown?", "\U00010380" * 400)
    whole = prompt.length(prompt.videos, {})
    assert whole > len(prompt.text)
    assert prompt.fit(whole - 1).lowered and not prompt.fit(whole).lowered


@pytest.mark.parametrize("frame_tiles", [None, 3])
def test_as_many_frames_as_fit(processor, media, frame_tiles):
    """Two more of them would not fit; a shorter video keeps all of its own."""
    videos = [{"video": media["video"], "max_frames": 40}, {"video": media["short"], "max_frames": 256}]
    prompt = Prompt(processor, [], videos, frame_tiles=frame_tiles)
    whole = prompt.length(prompt.videos, {}, frame_tiles)
    for share in (0.9, 0.6, 0.4):
        limit = int(share * whole)
        tokens, found = prompt.fitted_length(limit)
        assert found.lowered and found.tokens == tokens <= limit
        most = found.videos[0]["max_frames"]
        longer = [{**video, "max_frames": most + 2} for video in prompt.videos]
        assert 4 <= most < 40 and prompt.length(longer, {}, frame_tiles) > limit
    few = prompt.fit(10)
    assert [video["max_frames"] for video in few.videos] == [4, 4] and few.tokens > 10


def test_subtitles_take_room_too(processor, media):
    """With those of the frames that are left; without a look at the media it is known only that all fit."""
    said = [[t / 4, t / 4 + 0.2, "words that are said here " * 3] for t in range(24)]
    video = {"video": media["video"], "max_frames": 40}
    plain, prompt = (Prompt(processor, [], [video | more]) for more in ({}, {"subtitles": said}))
    whole = prompt.length(prompt.videos, {})
    assert whole > plain.length(plain.videos, {}) + 24 * 15
    assert prompt.fit(whole).tokens == whole and not prompt.fit(whole).lowered
    tokens, found = prompt.fitted_length(whole // 2)
    assert found.lowered and found.tokens == tokens <= whole // 2
    assert found.videos[0]["max_frames"] < plain.fit(whole // 2).videos[0]["max_frames"]
    assert found.videos[0]["subtitles"] == said


def test_time_goes_before_space(processor, media):
    """As training does: frames with pictures of one tile, then the largest limit of tiles."""
    videos, asked = [{"video": media["video"], "max_frames": 20}], {"max_dynamic_tiles": 24}
    prompt = Prompt(processor, [media["picture"]], videos, tiling=asked)
    single, several, whole = (prompt.length(prompt.videos, {"max_dynamic_tiles": t}) for t in (1, 6, 24))
    assert single < several < whole
    for limit, frames in ((several, 20), (single, 20), (single - 1, 18)):
        tokens, found = prompt.fitted_length(limit)
        tiles = found.tiling["max_dynamic_tiles"]
        assert found.tokens == tokens <= limit and found.videos[0]["max_frames"] == frames
        assert tiles == {several: 6, single: 1}.get(limit, tiles)
        more = next(t for t in reversed(tile_limits(24)) if t > tiles)
        assert prompt.length(found.videos, {"max_dynamic_tiles": more}) > limit


def test_demands_are_not_lowered(processor, media):
    for demand in ({"nframes": 20}, {"min_frames": 20, "max_frames": 30}):
        prompt = Prompt(processor, [], [{"fps": None, "video": media["video"], **demand}])
        (video,) = prompt.fit(100).videos
        assert prompt.length([video], {}) == prompt.length([{**prompt.videos[0], "max_frames": 20}], {})
    frames = [media["picture"]] * 6  # a list of pictures is shown as it is
    prompt = Prompt(processor, [], [{"video": frames}])
    assert prompt.fit(100).videos == prompt.videos
    assert prompt.fit(100).tokens == prompt.length(prompt.videos, {})
    prompt = Prompt(
        processor, [media["picture"]], tiling={"min_dynamic_tiles": 4, "max_dynamic_tiles": 10**9}
    )
    assert prompt.fit(20).tiling == {"min_dynamic_tiles": 4, "max_dynamic_tiles": 4}


def test_a_limit_that_no_prompt_holds_is_a_limit(processor, media):
    """A picture gets its grid of as many tiles as a prompt holds; no grid of 10**9 is looked for."""
    settings = {"tiling": {"max_dynamic_tiles": 10**9}, "frame_tiles": 10**9}
    prompt = Prompt(
        processor, [media["picture"]], [{"video": media["short"], "max_frames": 10**9}], **settings
    )
    tokens, found = prompt.fitted_length(4000)
    held = 4000 // processor.tokens_per_tile
    assert found.tiling == {"max_dynamic_tiles": held} and found.frame_tiles == held
    assert found.tokens == tokens <= 4000


def test_the_answer_keeps_room(processor, media):
    assert prompt_room(8192) == 8192 - DEFAULT_ANSWER and prompt_room(8192, 64) == 8128
    assert prompt_room(1000, 900) == 750  # no more than a quarter
    prompt = Prompt(processor, [], [{"video": media["video"], "max_frames": 40}])
    assert prompt.fit(600, answer=100).tokens <= 500 < prompt.fit(600, answer=0).tokens <= 600


def test_a_video_that_says_nothing_gets_the_processors_own_limit(exported, media):
    processor = AutoProcessor.from_pretrained(exported, trust_remote_code=True, max_frames=8)
    message = [{**USER, "content": [{"type": "video", "video": media["video"], "fps": 10}]}]
    assert len(processor.process_vision_info(message)[1][0]) == 8
    message[0]["content"][0]["max_frames"] = 12
    assert len(processor.process_vision_info(message)[1][0]) == 12
