"""Two steps of TRL's SFTTrainer on an export: use_trl.py H FOLDER

FOLDER has a picture `p.png`, and takes what is written.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer


def conversations(picture: str) -> Dataset:
    """As a data set holds them: every part has every key, with None in those of the other kind."""
    turn = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
    features = Features({"messages": List(turn), "images": List(Image())})
    ask = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": ask},
        {"role": "assistant", "content": [{"type": "text", "text": "A picture."}]},
    ]
    return Dataset.from_list([{"messages": messages, "images": [picture]}] * 4, features=features)


def train(folder: str, files: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, padding_side="right")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    settings = SFTConfig(
        str(files / "trained"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=None,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    data = conversations(str(files / "p.png"))
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=processor)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0], losses
    still = [name for name, tensor in model.named_parameters() if torch.equal(tensor, before[name])]
    assert all("head" in name for name in still), still  # the encoder's pooling head sees no text
    trainer.save_model(str(files / "trained"))
    again = AutoModelForImageTextToText.from_pretrained(files / "trained", trust_remote_code=True)
    for name, tensor in again.named_parameters():
        assert torch.equal(tensor, model.get_parameter(name)), name


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
