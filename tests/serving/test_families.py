"""vLLM with the plugin serves every language model as transformers computes it: Qwen3, YaRN, experts."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_eagle.certify.certifying import CertifySettings, certify
from megatron_eagle.certify.exported import TransformersModel, token_logprobs
from megatron_eagle.certify.made_samples import BEYOND
from megatron_eagle.hf_model.prompt import NO_THOUGHTS
from megatron_eagle.inference.generate import ExportedModel, Request, Sampling
from megatron_eagle.inference.server_client import ServedModel
from tests.convert.media import write_picture, write_video
from tests.convert.small_eagles import ROUNDED_REACH, SMALL_EAGLES, write_other, write_small_eagle
from tests.serving.server import ENVIRONMENT, ask, reply, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ENVIRONMENT / ".complete").exists(), reason="no vLLM: make test-serving"),
]
SHORT = Sampling(max_new_tokens=40)
LOGPROBS = CertifySettings.logprobs


@dataclass(frozen=True)
class Running:
    name: str
    hf: Path
    url: str

    @property
    def thinks(self) -> bool:
        return "qwen3" in self.name


@pytest.fixture(scope="module", params=SMALL_EAGLES)
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    hf = write_small_eagle(request.param, folder)
    with running(hf, folder / "server.log", length=SMALL_EAGLES[request.param].length) as url:
        yield Running(request.param, hf, url)


def test_its_certificate_is_green(served):
    """From training's loader over Megatron and transformers to the server, with media; YaRN to its reach."""
    checkpoint = served.hf.parent / "checkpoint"
    found = certify(CertifySettings(served.hf, checkpoint, served.url))
    assert found.green, [(result.name, result.first) for result in found.results if result.first]
    compared = {
        result.name: result.tokens
        for result in found.results
        if "vllm: prompt_logprobs" in result.apart and not result.first
    }
    far = SMALL_EAGLES[served.name].length > BEYOND
    assert len(compared) == 6 + far and (max(compared.values()) > BEYOND) == far


def test_prompts_and_answers_have_the_exports_ids(served, tmp_path):
    model, client = ExportedModel(served.hf), ServedModel(served.url)
    picture, video = write_picture(tmp_path / "p.png", 200, 130), write_video(tmp_path / "v.mp4")
    for request in (
        Request("What is it?"),
        Request("What is it?", (picture,)),
        Request("Describe the clip, please!", (picture,), ({"video": video, "nframes": 6},)),
        Request("Sure?", (picture,), turns=(("What is it?", "<think>\nA cup.\n</think>\n\nA cat."),)),
    ):
        inputs = model._inputs(request, SHORT)
        found = reply(served.url, client.body(request, SHORT))
        ids = inputs["input_ids"][0].tolist()
        answer = model.generate(inputs, SHORT.max_new_tokens)[0].tolist()
        assert found["prompt_token_ids"] == ids
        assert found["choices"][0]["token_ids"] == answer and len(set(answer)) > 3
        assert model.processor.decode(ids).endswith(NO_THOUGHTS) == served.thinks


def test_thoughts_are_asked_for(served):
    message = [{"role": "user", "content": "What is it?"}]
    processor = ExportedModel(served.hf).processor
    lengths = set()
    for thinking in (True, False):
        ids, _ = ask(served.url, {"messages": message, "chat_template_kwargs": {"enable_thinking": thinking}})
        text = processor.apply_chat_template(message, add_generation_prompt=True, enable_thinking=thinking)
        assert ids == processor(text=[text])["input_ids"][0]
        lengths.add(len(ids))
    assert len(lengths) == 1 + served.thinks


def test_another_model_is_noticed(served, tmp_path):
    """Norms of heads, YaRN, its attention factor and the normalised weights of experts count."""
    text = "A cat, a rocket, a cup of coffee. " * 30
    body = {"messages": [{"role": "user", "content": text}], "prompt_logprobs": 0}
    found = reply(served.url, body)
    ids, rows = found["prompt_token_ids"], found["prompt_logprobs"]
    theirs = torch.tensor([row[str(token)]["logprob"] for token, row in zip(ids[1:], rows[1:], strict=True)])
    other = write_other(served.name, served.hf, tmp_path / "other")
    right, wrong = (
        float((token_logprobs(TransformersModel(folder).logits(ids, None), ids) - theirs).abs().max())
        for folder in (served.hf, other)
    )
    assert right < LOGPROBS and wrong > 10 * LOGPROBS


def test_prompts_that_yarn_does_not_reach_are_refused(tmp_path):
    hf = write_small_eagle("qwen2 with YaRN and an attention factor", tmp_path)
    assert (
        json.loads((hf / "config.json").read_text())["text_config"]["max_position_embeddings"]
        == ROUNDED_REACH
    )
    with pytest.raises(AssertionError), running(hf, tmp_path / "log", length=ROUNDED_REACH + 1):
        pass
    said = f"--max-model-len {ROUNDED_REACH + 1}: the model's YaRN reaches {ROUNDED_REACH} tokens"
    assert said in (tmp_path / "log").read_text()
