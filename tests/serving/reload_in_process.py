"""Run in vLLM's environment:  reload_in_process.py OLD NEW fresh|reload|vllm|copy

Log probabilities, as JSON, of a prompt by the export NEW, started afresh; or by OLD with NEW's weights loaded
as the plugin's middleware does it, as vLLM alone does it, or by copies into the parameters of their names and
shapes, which leave what layers have packed as it was.
"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader import get_model_loader

LLM_OPTIONS = {
    "trust_remote_code": True,
    "tokenizer_mode": "eagle2_5",
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "worker_extension_cls": "eagle2_5_vllm.reload_worker.ReloadWorker",
    "limit_mm_per_prompt": {"image": 0, "video": 0},
}


def logprobs(engine: LLM) -> list[float]:
    prompt = {"prompt_token_ids": list(range(20, 120))}
    settings = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0, logprobs=0)
    (answer,) = engine.generate([prompt], settings, use_tqdm=False)
    found = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    return [next(iter(position.values())).logprob for position in found]


def copy_into_parameters(engine: LLM, folder: str) -> None:
    def copy(model) -> None:
        config = engine.llm_engine.vllm_config
        config.model_config.model = folder
        weights = get_model_loader(config.load_config).get_all_weights(config.model_config, model)
        parameters = dict(model.named_parameters())
        for name, tensor in weights:
            if name in parameters and parameters[name].shape == tensor.shape:
                parameters[name].data.copy_(tensor)

    engine.apply_model(copy)


def main(old: str, new: str, way: str) -> None:
    engine = LLM(new if way == "fresh" else old, **LLM_OPTIONS)
    before = logprobs(engine)
    if way == "reload":
        engine.collective_rpc("load_export", args=(new,))
    if way == "vllm":
        engine.collective_rpc("reload_weights", kwargs={"weights_path": new})
    if way == "copy":
        copy_into_parameters(engine, new)
    engine.reset_prefix_cache()
    print(json.dumps({"before": before, "after": logprobs(engine)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
