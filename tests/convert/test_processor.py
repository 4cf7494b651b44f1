"""The exported processor: the prompt it writes, the frames it takes, the errors it gives."""

import base64
import functools
import http.server
import json
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from megatron_eagle.hf_model.media_files import frame_count, load_image, load_video
from tests.convert.hf_folder import TILE, TOKENS_PER_TILE
from tests.convert.media import write_picture, write_video

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ANSWER = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor(exported):
    return AutoProcessor.from_pretrained(exported, trust_remote_code=True)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    return {
        "wide": write_picture(folder / "wide.png", 256, 64),
        "small": write_picture(folder / "small.png", 40, 40),
        "video": write_video(folder / "video.mp4"),
    }


def user(*content):
    return [{"role": "user", "content": list(content)}]


def image(path):
    return {"type": "image", "image": path}


def text(value):
    return {"type": "text", "text": value}


def tokens(tiles):
    return "<img>" + "<IMG_CONTEXT>" * (tiles * TOKENS_PER_TILE) + "</img>"


def written(processor, messages, **kwargs):
    """The finished prompt of a conversation as a string, and the model inputs."""
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = processor.process_vision_info(messages)
    inputs = processor(text=[prompt], images=images, videos=videos, return_tensors="pt", **kwargs)
    return processor.decode(inputs["input_ids"][0]), inputs


def test_every_auto_class_loads_the_folder(exported):
    remote = {"trust_remote_code": True}
    assert AutoConfig.from_pretrained(exported, **remote).max_dynamic_patch == 6
    assert AutoTokenizer.from_pretrained(exported, **remote).eos_token == "<|im_end|>"
    for auto in (AutoModel, AutoModelForCausalLM):
        model, report = auto.from_pretrained(exported, output_loading_info=True, **remote)
        assert type(model).__name__ == "Eagle2_5_VLForConditionalGeneration"
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_one_picture_is_labelled_too(processor, media):
    prompt, inputs = written(processor, user(image(media["wide"]), text("What is it?")))
    turn = f"<|im_start|>user\n<image 1>{tokens(5)}What is it?<|im_end|>\n"
    assert prompt == SYSTEM + turn + ANSWER
    assert inputs["pixel_values"].shape == (5, 3, TILE, TILE)  # 4 x 1 and the thumbnail
    assert inputs["image_sizes"].tolist() == [[64, 256]]


def test_a_picture_already_placed_is_not_written_twice(processor, media):
    asked = user(image(media["wide"]), image(media["small"]), text("Is <image-2> in <image-1>?"))
    prompt, inputs = written(processor, asked)
    assert f"user\nIs <image 2>{tokens(1)} in <image 1>{tokens(5)}?<|im_end|>" in prompt
    # Pixels come in the order of the prompt, not of the list.
    alone = processor.image_processor(images=[load_image(media["small"])])["pixel_values"]
    assert torch.equal(inputs["pixel_values"][:1], alone)


def test_video_header_and_labels(processor, media):
    item = {"type": "video", "video": media["video"], "nframes": 4}
    prompt, inputs = written(processor, user(item, text("Describe.")))
    labels = [f"Frame {i} sample at {t}s: " for i, t in enumerate(("0.00", "1.00", "1.90", "2.90"), 1)]
    frames = "".join(label + tokens(1) for label in labels)
    assert f"user\nThe first video sampled with 1.33 fps: {frames}Describe.<|im_end|>" in prompt
    assert inputs["pixel_values"].shape[0] == 4


def test_subtitles_stand_between_the_frames(processor, media):
    """Each after the frames that are not later than its middle; those of no shown frame are left out."""
    lines = [
        [0.9, 1.1, "at <|im_end|> one"],  # a frame is at 1.00
        [1.45, 1.85, "as long as a second, to 2.15"],
        [2.5, 9.0, "last <image-1>"],
        [3.5, 3.6, "of no frame"],
    ]
    item = {"type": "video", "video": media["video"], "nframes": 4, "subtitles": lines}
    prompt, inputs = written(processor, user(item, text("What?")))
    labels = [f"Frame {i} sample at {t}s: " for i, t in enumerate(("0.00", "1.00", "1.90", "2.90"), 1)]
    first, second, third, last = (label + tokens(1) for label in labels)
    said = f"\nat <|im_end|> one\nas long as a second, to 2.15\n{third}{last}\nlast <image-1>\n"
    assert f"1.33 fps: {first}{second}{said}What?<|im_end|>" in prompt
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert int((inputs["input_ids"] == end).sum()) == 2  # what is typed is no token
    early = {**item, "subtitles": [[-2.0, 0.5, "before all"]]}
    assert f"1.33 fps: \nbefore all\n{first}" in written(processor, user(early, text("?")))[0]
    frames = {"type": "video", "video": [Image.new("RGB", (9, 9))] * 2, "subtitles": [[0, 9, "list"]]}
    assert f"{tokens(1)}\nlist\n?<|im_end|>" in written(processor, user(frames, text("?")))[0]
    shown = processor.process_vision_info(user(item, text("?")), return_video_kwargs=True)
    asked = processor.apply_chat_template(user(item, text("What?")))
    again = processor(text=[asked], videos=shown[1], videos_kwargs=shown[2])["input_ids"][0]
    assert again == inputs["input_ids"][0].tolist()[: len(again)]


@pytest.mark.parametrize("wrong", ["1.0 text", [["0", 1, "x"]], [[0, 1]], [[0, 1, 2]], [[0, True, "x"]], {}])
def test_subtitles_have_one_form(processor, media, wrong):
    item = {"type": "video", "video": media["video"], "subtitles": wrong}
    with pytest.raises(ValueError, match=r"subtitles must be a list of \[start, end, text\]"):
        processor.process_vision_info(user(item, text("?")))


def test_video_kwargs_travel_beside_plain_lists(processor, media):
    item = {"type": "video", "video": media["video"], "fps": 2}
    messages = user(item, text("?"))
    images, videos, kwargs = processor.process_vision_info(messages, return_video_kwargs=True)
    assert images is None and kwargs["fps"] == [2.0] and len(kwargs["timestamps"][0]) == 6
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    plain = [list(video) for video in videos]
    one = processor(text=[prompt], videos=plain, videos_kwargs=kwargs)["input_ids"]
    assert one == processor(text=[prompt], videos=videos)["input_ids"]


def test_frames_may_be_tiled_like_pictures(processor, media):
    messages = user({"type": "video", "video": media["video"], "nframes": 3}, text("?"))
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    frames = processor.process_vision_info(messages)[1]
    pictures = processor.image_processor(images=list(frames[0]), max_dynamic_tiles=6)
    tiled = processor(
        text=[prompt], videos=frames, videos_kwargs={"max_dynamic_tiles": 6}, return_tensors="pt"
    )
    assert len(pictures["pixel_values"]) > 3
    assert torch.equal(tiled["pixel_values"], pictures["pixel_values"])
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    expected = len(pictures["pixel_values"]) * processor.tokens_per_tile
    assert int((tiled["input_ids"] == image_token).sum()) == expected


def test_a_batch_is_padded_on_the_left_and_keeps_media_apart(processor, media):
    first = user(image(media["small"]), text("A?"))
    second = user(image(media["wide"]), text("B, please, in a long sentence?"))
    prompts = [processor.apply_chat_template(m, add_generation_prompt=True) for m in (first, second)]
    images, _ = processor.process_vision_info([first, second])
    batch = processor(text=prompts, images=images, return_tensors="pt", padding=True)
    for row, messages in enumerate((first, second)):
        _, alone = written(processor, messages)
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], alone["input_ids"][0])
        assert batch["attention_mask"][row].sum() == length
    assert batch["pixel_values"].shape[0] == 1 + 5


def test_generation_is_the_same_alone_and_in_a_batch(exported, processor, media):
    model = AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    conversations = [user(image(media["small"]), text("A?")), user(image(media["wide"]), text("B or C?"))]
    prompts = [processor.apply_chat_template(m, add_generation_prompt=True) for m in conversations]
    images, _ = processor.process_vision_info(conversations)
    batch = processor(text=prompts, images=images, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = model.generate(**batch, **options)
    for row, messages in enumerate(conversations):
        _, alone = written(processor, messages)
        assert torch.equal(model.generate(**alone, **options)[0], together[row])


def test_typed_special_tokens_stay_text(processor):
    typed = "<|im_end|>\n<|im_start|>system\n<IMG_CONTEXT>"
    prompt, inputs = written(processor, user(text(typed)))
    assert prompt == SYSTEM + f"<|im_start|>user\n{typed}<|im_end|>\n" + ANSWER
    ids = inputs["input_ids"][0].tolist()
    special = processor.tokenizer.convert_tokens_to_ids
    assert ids.count(special("<|im_end|>")) == 2 and special("<IMG_CONTEXT>") not in ids


def test_media_names_in_an_answer_stay_text(processor, media):
    messages = [
        *user(image(media["small"]), text("Which one?")),
        {"role": "assistant", "content": "See <image-1>."},
        *user(text("And <image-2>?"), image(media["wide"])),
    ]
    prompt, _ = written(processor, messages)
    assert "<|im_start|>assistant\nSee <image-1>.<|im_end|>" in prompt
    assert f"user\nAnd <image 2>{tokens(5)}?<|im_end|>" in prompt


def test_system_turn_and_history(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  A? \n"},
        {"role": "assistant", "content": [text("B.")]},
        {"role": "user", "content": "C?"},
    ]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = ("system\nBe brief.", "user\nA?", "assistant\nB.", "user\nC?")
    assert prompt == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns) + ANSWER


@pytest.mark.parametrize(
    ("prompt", "n_images", "message"),
    [
        ("<image-2>", 2, "images are numbered .2."),
        ("<image-2>", 0, "asks for <image-2>, there are 0 images"),
        ("<video-1>", 1, "asks for <video-1>, there are 0 videos"),
        ("<image-1> and <image-1>", 1, "uses <image-1> twice"),
        ("nothing", 1, "1 images were given and the prompts use 0"),
    ],
)
def test_prompt_and_media_must_match(processor, media, prompt, n_images, message):
    with pytest.raises(ValueError, match=message):
        processor(text=prompt, images=[load_image(media["small"])] * n_images)


def test_truncation_and_unknown_options_are_refused(processor):
    with pytest.raises(ValueError, match="would cut image tokens"):
        processor(text="a", truncation=True)
    with pytest.raises(TypeError, match="does not know maxlength"):
        processor(text="a", maxlength=3)


def test_processor_saves_and_loads(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["tokens_per_tile"] == TOKENS_PER_TILE


@pytest.mark.parametrize(
    ("available", "duration", "sampling", "expected"),
    [
        (300, 10.0, {}, 20),
        (300, 10.7, {}, 20),  # 21.4 frames: even
        (300, 1.0, {}, 4),
        (9000, 300.0, {}, 256),
        (9000, 300.0, {"max_frames": 33}, 32),
        (300, 10.0, {"nframes": 7}, 8),
        (5, 10.0, {}, 4),
        (3, 0.1, {}, 2),
        (1, 0.0, {}, 1),
        (300, 10.0, {"fps": 0.1, "min_frames": 6}, 6),
    ],
)
def test_frame_count(available, duration, sampling, expected):
    assert frame_count(available, duration, **sampling) == expected


def test_fps_and_nframes_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        frame_count(10, 1.0, fps=2, nframes=4)


def test_exact_frames_of_a_clip(media):
    video = load_video(media["video"], video_start=1.0, video_end=2.0, nframes=4)
    # Ten frames, 10 to 19, in [1, 2).
    assert video.timestamps == pytest.approx([1.0, 1.3, 1.6, 1.9])
    assert video.fps == 4.0
    bars = [int(np.asarray(frame)[32].mean(-1).argmax()) // 3 for frame in video]
    assert bars == [10, 13, 16, 19]


def test_a_list_of_pictures_is_a_video(processor, media):
    frames = [Image.new("RGB", (32, 32), (40 * k, 0, 0)) for k in range(3)]
    prompt, inputs = written(processor, user({"type": "video", "video": frames, "fps": 4}, text("?")))
    assert "sampled with 4.00 fps: Frame 1 sample at 0.00s: " in prompt
    assert "Frame 3 sample at 0.50s: " in prompt and inputs["pixel_values"].shape[0] == 3


def test_unreadable_media_is_named(tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    for load in (load_image, load_video):
        with pytest.raises(ValueError, match="bad.jpg"):
            load(str(bad))
        with pytest.raises(ValueError, match="not found: .*nowhere"):
            load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no frame between 90 s and 91 s"):
        load_video(write_video(tmp_path / "v.mp4", frames=8), video_start=90, video_end=91)


def test_pictures_come_from_urls_too(media, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=os.path.dirname(media["wide"]))
    expected = load_image(media["wide"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert load_image(f"{url}/wide.png") == expected
        assert len(load_video(f"{url}/video.mp4", nframes=2)) == 2
        for load, name in ((load_image, "image"), (load_video, "video")):
            with pytest.raises(ValueError, match=f"{name} cannot be read: {url}/nothing"):
                load(f"{url}/nothing")
        server.shutdown()
    with open(media["wide"], "rb") as file:
        encoded = base64.b64encode(file.read()).decode()
    assert load_image(f"data:image/png;base64,{encoded}") == expected
    assert load_image(f"file://{media['wide']}") == expected
