"""Load an export with whatever transformers this interpreter has, ask it, and write down what came out.

ask_export.py H PICTURE VIDEO OUT.safetensors
"""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor


def main() -> None:
    folder, picture, video, output = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.tokenizer.padding_side = "left"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    media = [{"type": "image", "image": picture}, {"type": "video", "video": video, "nframes": 6}]
    conversations = [
        [{"role": "user", "content": [item, {"type": "text", "text": "What is it?"}]}] for item in media
    ]
    texts = [
        processor.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations
    ]
    images, videos, kwargs = processor.process_vision_info(conversations, return_video_kwargs=True)
    inputs = processor(
        text=texts, images=images, videos=videos, return_tensors="pt", padding=True, videos_kwargs=kwargs
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(logits, again(**inputs).logits)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    results = {**inputs, "logits": logits, "generated": generated}
    save_file({k: v.contiguous() for k, v in results.items()}, output)


if __name__ == "__main__":
    main()
