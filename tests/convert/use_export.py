"""What people do with an export in transformers, in the newest and in 4.51 alike.

Each check takes the export's folder and a folder with a picture `p.png`. As a program it makes them all:
use_export.py H FOLDER
"""

import base64
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoModel, AutoProcessor

NEW = int(transformers.__version__.split(".")[0]) >= 5
AUTO_CLASSES = ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"]
AUTO_CLASSES += ["AutoModelForMultimodalLM"] if NEW else ["AutoModelForVision2Seq"]


def load_processor(folder, **settings):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True, **settings)


def load_model(folder, name="AutoModel"):
    return getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()


def question(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def ask(processor, *parts, **options):
    options = {"return_dict": True, "return_tensors": "pt", "add_generation_prompt": True, **options}
    return processor.apply_chat_template(question(*parts), tokenize=True, **options)


def check_settings_of_the_processor(folder, files):
    assert load_processor(folder).tokenizer.padding_side == "left"
    assert load_processor(folder, padding_side="right").tokenizer.padding_side == "right"
    few = load_processor(folder, max_dynamic_tiles=2, use_thumbnail=False)
    assert few.image_processor.max_dynamic_tiles == 2
    picture = Image.new("RGB", (640, 64))
    counts = [len(ask(p, {"image": picture})["pixel_values"]) for p in (few, load_processor(folder))]
    assert counts == [2, 7]
    one = ask(load_processor(folder), {"image": picture}, processor_kwargs={"max_dynamic_tiles": 1})
    assert len(one["pixel_values"]) == 1


def check_auto_classes(folder, files):
    inputs = ask(load_processor(folder), {"image": str(files / "p.png")})
    with torch.no_grad():
        expected, *others = (load_model(folder, name)(**inputs).logits for name in AUTO_CLASSES)
    assert all(torch.equal(expected, logits) for logits in others)


def check_pipeline(folder, files):
    processor, model = load_processor(folder), load_model(folder)
    pipeline = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    media = {"type": "image", "url": str(files / "p.png")}
    options = {"max_new_tokens": 5, "do_sample": False}
    found = pipeline(text=question(media), return_full_text=False, generate_kwargs=options)
    ids = model.generate(**ask(processor, media), **options)
    assert found[0]["generated_text"] == processor.decode(ids[0], skip_special_tokens=True)


def check_keys_without_value(folder, files):
    """As `datasets`, TRL and Arrow fill a column's parts with one another's keys."""
    processor, picture = load_processor(folder), Image.open(files / "p.png")
    expected = ask(processor, {"type": "image", "image": picture})
    nothing = dict.fromkeys(("text", "image", "image_url", "video", "video_url", "fps", "url"))
    parts = [
        {**nothing, "type": "image", "image": picture},
        {**nothing, "type": "text", "text": "What is it?"},
    ]
    for content in (parts, [{**part, "type": None} for part in parts]):
        conversation = [{"role": "user", "content": content, "tool_calls": None}]
        found = processor.apply_chat_template(
            conversation, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
        # The template by itself, as servers use it.
        raw = processor.tokenizer.apply_chat_template(
            conversation, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
        )
        assert raw == processor.apply_chat_template(conversation, add_generation_prompt=True)
    silent = [*question(), {"role": "assistant", "content": None}]
    assert processor.apply_chat_template(silent).endswith("<|im_start|>assistant\n<|im_end|>\n")


def check_where_pictures_come_from(folder, files):
    processor, path = load_processor(folder), files / "p.png"
    expected = ask(processor, {"type": "image", "image": str(path)})
    code = base64.b64encode(path.read_bytes()).decode()
    for part in (
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "path": str(path)},
        {"type": "image", "base64": code},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{code}"}},
        {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}},
    ):
        found = ask(processor, part)
        for name in ("input_ids", "pixel_values"):
            assert torch.equal(found[name], expected[name]), part


def check_assisted_generation(folder, files):
    """The other model only guesses: greedy answers stay what they are."""
    processor, model = load_processor(folder), load_model(folder)
    inputs = ask(processor, {"image": str(files / "p.png")})
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1}
    alone = model.generate(**inputs, **options)
    other = load_model(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.03)  # it guesses right now and then
    for assistant in (other, other.language_model):
        found = model.generate(**inputs, **options, assistant_model=assistant)
        assert torch.equal(found, alone)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), alone)


def check_an_assistant_sees_the_pictures(folder, files):
    processor, model = load_processor(folder), load_model(folder)
    seen = []
    other = load_model(folder)
    other.mlp1.register_forward_hook(lambda *_: seen.append(1))
    inputs = ask(processor, {"image": str(files / "p.png")})
    model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1, assistant_model=other)
    assert len(seen) == 1  # with the prompt, and not again


def check_image_features(folder, files):
    model = load_model(folder)
    pixels = ask(load_processor(folder), {"image": str(files / "p.png")})["pixel_values"]
    found = model.get_image_features(pixel_values=pixels)
    assert torch.equal(found.pooler_output if NEW else found, model.extract_feature(pixels))


def check_weights_on_disk(folder, files):
    """accelerate brings a layer when it is needed; until then the model has no device."""
    inputs = ask(load_processor(folder), {"image": str(files / "p.png")})
    places = {"vision_model": "disk", "mlp1": "cpu", "language_model": "disk"}
    if not NEW:  # its generation takes the embedding's device for all
        del places["language_model"]
        here = {f"language_model.{name}": "cpu" for name in ("model.embed_tokens", "model.norm", "lm_head")}
        places |= {**here, "language_model.model.rotary_emb": "cpu", "language_model.model.layers": "disk"}
    with tempfile.TemporaryDirectory() as room:
        away = AutoModel.from_pretrained(
            folder, trust_remote_code=True, device_map=places, offload_folder=room
        ).eval()
        assert away.device.type == "meta"
        options = {"max_new_tokens": 5, "do_sample": False}
        expected = load_model(folder).generate(**inputs, **options)
        assert torch.equal(away.generate(**inputs, **options), expected)


class _Vision(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.extract_feature(pixel_values)


class _Language(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds, position_ids):
        return self.model(inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False).logits


def check_torch_export(folder, files):
    """Both halves, with as many tiles and tokens as one likes."""
    model = load_model(folder)
    side, width = model.config.force_image_size, model.config.text_config.hidden_size
    n, s = torch.export.Dim("tiles", min=2, max=64), torch.export.Dim("tokens", min=2, max=4096)
    vision, tiles = _Vision(model), torch.randn(3, 3, side, side)
    exported = torch.export.export(vision, (tiles,), dynamic_shapes=({0: n},), strict=False).module()
    language, embeddings = _Language(model), torch.randn(1, 9, width)
    shapes = {"inputs_embeds": {1: s}, "position_ids": {1: s}}
    places = torch.arange(9)[None]
    written = torch.export.export(
        language, (embeddings, places), dynamic_shapes=shapes, strict=False
    ).module()
    with torch.no_grad():
        for count in (2, 5):
            tiles = torch.randn(count, 3, side, side)
            torch.testing.assert_close(exported(tiles), vision(tiles))
        for count in (4, 33):
            pair = torch.randn(1, count, width), torch.arange(count)[None]
            torch.testing.assert_close(written(*pair), language(*pair))


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    for name, check in CHECKS.items():
        check(sys.argv[1], Path(sys.argv[2]))
        print(name)
