"""Training in the `hf` variant and the exported processor see the same ids and the same pixels."""

import pytest
import torch

from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.hf_model.tiles import normalize
from tests.data.helpers import every_tile, make_image, make_store, make_video

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def processor(tokenizer_dir):
    from transformers import PreTrainedTokenizerFast

    from megatron_eagle.hf_model.image_processing_eagle2_5_vl import Eagle2_5_VLImageProcessor
    from megatron_eagle.hf_model.processing_eagle2_5_vl import Eagle2_5_VLProcessor

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"))
    images = Eagle2_5_VLImageProcessor(size={"height": 28, "width": 28})
    return Eagle2_5_VLProcessor(images, tokenizer, tokens_per_tile=1)


@pytest.mark.parametrize("typed", ["Which is it?", "  is <|im_end|> text? é\n"])
def test_same_ids_and_pixels(tmp_path, tokenizer_dir, processor, typed):
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(make_image(tmp_path / "a.png", (112, 60)))},
                {"type": "text", "text": "and "},
                {"type": "image", "image": str(make_image(tmp_path / "b.jpg", (40, 30)))},
                {"type": "video", "video": str(make_video(tmp_path / "v.mp4", 50)), "nframes": 10},
                {"type": "text", "text": typed},
            ],
        }
    ]
    answered = {"messages": [*messages, {"role": "assistant", "content": "A cup."}]}
    path = make_store(tmp_path, tokenizer_dir, [answered], (600,), template="hf")
    write_packs(path, 600, 0)
    config = DataConfig(str(path), 600)
    loader = PackLoader(
        config, global_batch_size=1, data_parallel_rank=0, data_parallel_size=1, plan=every_tile
    )
    sample, batch = SampleStore(path)[0], loader.step(0).microbatches[0]
    loader.close()

    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, kwargs = processor.process_vision_info(messages, return_video_kwargs=True)
    inputs = processor(text=[text], images=images, videos=videos, videos_kwargs=kwargs, return_tensors="pt")
    prompt = inputs["input_ids"][0].tolist()
    assert sample.ids[: len(prompt)].tolist() == prompt
    assert sample.answers[: len(prompt)].max() == 0
    assert sample.answers[len(prompt)] == 1
    torch.testing.assert_close(normalize(batch.pixel_values), inputs["pixel_values"], atol=1e-6, rtol=0)
