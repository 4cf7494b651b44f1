"""`convert certify` with vLLM itself: green for the demo's export, red where it or its server was changed."""

import base64
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from megatron_eagle.certify.certifying import CertifySettings, certify
from megatron_eagle.certify.served import CertifiedServer
from megatron_eagle.commands import convert
from megatron_eagle.errors import UserError
from tests.serving.server import ENVIRONMENT, ask, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ENVIRONMENT / ".complete").exists(), reason="no vLLM: make test-serving"),
]
LONG = 33_000  # tokens that a server takes: positions beyond 32,768 are asked for


@pytest.fixture(scope="module")
def url(demo):
    with running(demo / "hf", demo / "certified.log", length=LONG) as running_url:
        yield running_url


def firsts(found):
    return {result.name: str(result.first).partition(" (")[0] for result in found.results}


def test_the_demo_is_green(url, demo, capsys):
    options = ("--hf", demo / "hf", "--checkpoint", demo / "checkpoint", "--endpoint", url)
    assert convert.main(["certify", *map(str, options)]) == 0, capsys.readouterr().out
    assert "GREEN" in capsys.readouterr().out
    content = json.loads((demo / "hf" / "certificate.json").read_text())
    assert content["versions"]["vllm"].startswith("0.32.0")
    samples = {sample["name"]: sample for sample in content["samples"]}
    far = samples["made: long text"]
    assert far["positions"][1] >= 32_768 and far["apart"]["vllm: prompt_logprobs"] < 1e-3
    asked = [one for one in samples.values() if "from position" not in one["name"]]
    assert len(asked) == 7
    for one in asked:
        assert (
            one["hashes"]["vllm"] == one["hashes"]["training"]
            and one["apart"]["vllm: prompt_logprobs"] < 1e-3
        )


def test_the_demos_own_store_is_green(url, demo):
    found = certify(CertifySettings(demo / "hf", demo / "checkpoint", url, demo / "data", 12))
    assert found.green, firsts(found)
    asked = [result for result in found.results if "vllm: prompt_logprobs" in result.apart]
    assert len(asked) >= 10


def test_what_was_seen_is_told_once_and_to_who_asked(url, demo):
    picture = next((demo / "media").glob("*.png"))
    number = "0123456789abcdef" * 2
    part = {"url": f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"}
    message = {"role": "user", "content": [{"type": "image_url", "image_url": part}]}
    ask(url, {"messages": [message]})
    for wrong in ("f" * 32, number):
        assert _status(f"{url}/v1/export/seen/{wrong}") == 404
    ask(url, {"messages": [message], "mm_processor_kwargs": {"seen": number}})
    assert _status(f"{url}/v1/export/seen/{number}") == 200
    assert _status(f"{url}/v1/export/seen/{number}") == 404
    with pytest.raises(RuntimeError, match="400: .*seen must be 32 hexadecimal digits"):
        ask(url, {"messages": [message], "mm_processor_kwargs": {"seen": "1"}})


def _status(url):
    try:
        with urllib.request.urlopen(url) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_another_export_is_refused(url, demo, tmp_path):
    other = shutil.copytree(demo / "hf", tmp_path / "hf")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"serves another export than .*: chat_template.jinja differ"):
        CertifiedServer(url, other)


def test_a_server_with_settings_of_its_own_is_red_at_its_grids(demo):
    settings = '{"min_dynamic_tiles": 4}'
    with running(demo / "hf", demo / "tiles.log", "--mm-processor-kwargs", settings) as url:
        found = certify(CertifySettings(demo / "hf", demo / "checkpoint", url))
    assert not found.green and firsts(found)["made: video"] == "None"
    assert firsts(found)["made: odd pictures"] == "vllm: grids"


def test_another_normalisation_is_red_at_pixels(demo, tmp_path):
    export = Path(shutil.copytree(demo / "hf", tmp_path / "hf"))
    path = export / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.485, 0.456, 0.406]}))
    with running(export, tmp_path / "log") as url:
        found = certify(CertifySettings(export, demo / "checkpoint", url))
    assert not found.green
    assert firsts(found)["made: odd pictures"] == "processor: pixels"
    assert firsts(found)["made: typed tokens"] == "None"
    # The server agrees with the processor: both read the changed file.
    assert all("vllm" not in result.differences for result in found.results)


def test_stock_vllm_is_refused(demo):
    with running(demo / "hf", demo / "refused.log", "--stock") as url, pytest.raises(UserError) as error:
        CertifiedServer(url, demo / "hf")
    assert "no vLLM with an export's plugin" in str(error.value) and "without --stock" in str(error.value)
