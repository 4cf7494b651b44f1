"""The six Quick Start programs of the model card run on a tiny export; a substitution table is all."""

import contextlib
import functools
import http.server
import io
import json
import shutil
import threading

import pytest
from PIL import Image

from tests.convert.media import write_picture, write_video

LOAD = """\
from transformers import AutoProcessor, AutoModel
import torch
model = AutoModel.from_pretrained("nvidia/Eagle2.5-8B", trust_remote_code=True, torch_dtype=torch.bfloat16)
processor = AutoProcessor.from_pretrained("nvidia/Eagle2.5-8B", trust_remote_code=True, use_fast=True)
processor.tokenizer.padding_side = "left"
"""
LOAD_STREAMING = """\
from transformers import AutoProcessor, AutoModel, AutoTokenizer
import torch
from transformers import TextIteratorStreamer
import threading
model = AutoModel.from_pretrained("nvidia/Eagle2.5-8B", trust_remote_code=True,
                                  attn_implementation='flash_attention_2', torch_dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained("nvidia/Eagle2.5-8B", trust_remote_code=True, use_fast=True)
processor = AutoProcessor.from_pretrained("nvidia/Eagle2.5-8B", trust_remote_code=True, use_fast=True)
processor.tokenizer.padding_side = "left"
"""
PREPARE = """
text_list = [processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)]
image_inputs, video_inputs = processor.process_vision_info(messages)
inputs = processor(text=text_list, images=image_inputs, videos=video_inputs, return_tensors="pt",
                   padding=True)
"""
PREPARE_VIDEO = """
text_list = [processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)]
image_inputs, video_inputs, video_kwargs = processor.process_vision_info(messages,
                                                                         return_video_kwargs=True)
inputs = processor(text=text_list, images=image_inputs, videos=video_inputs, return_tensors="pt",
                   padding=True, videos_kwargs=video_kwargs)
"""
PREPARE_BATCH = """
text_list = [processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
             for messages in [messages1, messages2]]
image_inputs, video_inputs = processor.process_vision_info([messages1, messages2])
inputs = processor(text=text_list, images=image_inputs, videos=video_inputs, return_tensors="pt",
                   padding=True)
"""
GENERATE = """
inputs = inputs.to("cuda")
model = model.to("cuda")
generated_ids = model.generate(**inputs, max_new_tokens=1024)
output_text = processor.batch_decode(generated_ids, skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)
print(output_text)
"""
STREAM = """
inputs = inputs.to("cuda")
model = model.to("cuda")
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
generation_kwargs = dict(**inputs, streamer=streamer, max_new_tokens=1024, do_sample=True, top_p=0.95,
                         temperature=0.8)
thread = threading.Thread(target=model.generate, kwargs=generation_kwargs)
thread.start()
for new_text in streamer:
    print(new_text, end="", flush=True)
"""
SIGN = '{"type": "image", "image": "https://www.ilankelman.org/stopsigns/australia.jpg"}'
BRIDGE = '{"type": "image", "image": "https://www.nvidia.com/content/dam/en-zz/bridge.jpg"}'
CLIP = '{"type": "video", "video": "../Eagle2-8B/space_woaudio.mp4"}'
SHORT_CLIP = '{"type": "video", "video": "../Eagle2-8B/space_woaudio.mp4", "nframes": 10}'
OTHER_CLIP = '{"type": "video", "video": "../Eagle2-8B/video_ocr.mp4", "nframes": 10}'


def ask(name: str, *items: str, text: str) -> str:
    content = [*items, f'{{"type": "text", "text": "{text}"}}']
    return f'{name} = [{{"role": "user", "content": [{", ".join(content)}]}}]\n'


# Program -> its text, how many answers it prints (None: a stream), and the tiles that the model must see.
PROGRAMS = {
    "single image": (
        LOAD + ask("messages", SIGN, text="Describe this image.") + PREPARE + GENERATE,
        1,
        5,
    ),
    "streaming": (
        LOAD_STREAMING + ask("messages", SIGN, text="Describe this image.") + PREPARE + STREAM,
        None,
        5,
    ),
    "multiple images": (
        LOAD + ask("messages", SIGN, BRIDGE, text="Describe these two images.") + PREPARE + GENERATE,
        1,
        5 + 3,
    ),
    "single video": (
        LOAD + ask("messages", CLIP, text="Describe this video.") + PREPARE_VIDEO + GENERATE,
        1,
        6,  # three seconds at 2 fps
    ),
    "multiple videos": (
        LOAD
        + ask("messages", SHORT_CLIP, OTHER_CLIP, text="Describe these two videos respectively.")
        + PREPARE_VIDEO
        + GENERATE,
        1,
        2 * 10,
    ),
    "batch": (
        LOAD
        + ask("messages1", SIGN, text="Describe this image.")
        + ask("messages2", BRIDGE, text="What is it?")
        + PREPARE_BATCH
        + GENERATE,
        2,
        5 + 3,
    ),
}


@pytest.fixture(scope="module")
def brief(exported, tmp_path_factory):
    """The export; half of the tokens end an answer, or random weights would go on for 1,024 tokens."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("brief") / "hf")
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    stop = [settings["eos_token_id"], *range(8, 340, 2)]
    path.write_text(json.dumps({**settings, "eos_token_id": stop}))
    return folder


@pytest.fixture(scope="module")
def table(brief, tmp_path_factory):
    """What is replaced in every program, and by what."""
    media = tmp_path_factory.mktemp("media")
    write_picture(media / "p.png", 256, 64)
    Image.open(media / "p.png").save(media / "australia.jpg")
    write_picture(media / "q.png", 128, 64)
    Image.open(media / "q.png").save(media / "bridge.jpg")
    video, other = write_video(media / "video.mp4"), write_video(media / "other.mp4", frames=60)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=str(media))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        yield {
            "nvidia/Eagle2.5-8B": str(brief),
            "https://www.ilankelman.org/stopsigns": here,
            "https://www.nvidia.com/content/dam/en-zz": here,
            "../Eagle2-8B/space_woaudio.mp4": video,
            "../Eagle2-8B/video_ocr.mp4": other,
            "cuda": "cpu",
            "flash_attention_2": "sdpa",
        }
        server.shutdown()


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, table):
    program, answers, tiles = PROGRAMS[name]
    for old, new in table.items():
        program = program.replace(old, new)
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(program, name, "exec"), names)
        if "thread" in names:
            names["thread"].join()
    assert names["inputs"]["pixel_values"].shape[0] == tiles
    assert names["model"].device.type == "cpu"
    if answers is None:
        assert printed.getvalue().strip()
    else:
        assert len(names["output_text"]) == answers
        assert printed.getvalue() == f"{names['output_text']}\n"
        assert any(text.strip() for text in names["output_text"])


def test_metadata_in_another_encoding_does_not_stop_a_video(tmp_path, brief):
    """A title in Latin-1, as old cameras write it."""
    from megatron_eagle.hf_model.media_files import load_video

    path = write_video(tmp_path / "v.mkv", title="Caf@")
    data = (tmp_path / "v.mkv").read_bytes()
    assert data.count(b"Caf@") == 1
    (tmp_path / "v.mkv").write_bytes(data.replace(b"Caf@", b"Caf\xe9"))
    assert len(load_video(path, nframes=4)) == 4
