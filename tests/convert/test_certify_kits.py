"""What evaluation kits make of pictures, with stand-ins for the two functions of theirs that are called."""

import base64
import io
import shutil
import ssl
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_eagle.certify import kits
from megatron_eagle.certify.certifying import CertifySettings, certify
from megatron_eagle.certify.report import report


def encoded(image, kind):
    stream = io.BytesIO()
    image.convert("RGB").save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def jpeg(image):
    """As VLMEvalKit's, which Pillow stops at some modes."""
    if image.height > 4 * image.width:  # one of the odd pictures
        raise OSError("cannot write mode I;16 as JPEG")
    return encoded(image, "JPEG")


class ChatMessages:
    """As lmms-eval's: pictures as PNG."""

    def __init__(self, messages):
        self.messages = messages

    def to_openai_messages(self):
        def part(one):
            url = {"url": f"data:image/png;base64,{encoded(one['url'], 'PNG')}"} if "url" in one else None
            return one if url is None else {"type": "image_url", "image_url": url}

        return [{"role": m["role"], "content": [part(one) for one in m["content"]]} for m in self.messages]


@pytest.fixture
def installed(monkeypatch):
    """Both kits."""
    said = {
        "vlmeval.smp": {"encode_image_to_base64": jpeg},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
    }
    for name, members in said.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        package = ModuleType(name.partition(".")[0])
        package.__spec__ = SimpleNamespace()
        monkeypatch.setitem(sys.modules, package.__name__, package)
        monkeypatch.setitem(sys.modules, name, module)


def test_a_kit_that_writes_jpeg_is_named_and_nothing_red(exported, installed, tmp_path):
    assert kits.installed_kits() == ["vlmeval", "lmms_eval"]
    found = certify(CertifySettings(shutil.copytree(exported, tmp_path / "hf")))
    pages = next(result for result in found.results if result.name == "made: page")
    assert str(pages.differences["vlmeval"]) == "pixels (picture 1: tiles of other values)"
    assert pages.hashes["lmms_eval"] == pages.hashes["processor"]
    assert found.green and "made: page: the messages of vlmeval differ at pixels" in report(found)
    asked = {result.name for result in found.results if "lmms_eval" in result.hashes}
    assert asked == {"made: typed tokens", "made: odd pictures", "made: page"}
    odd = next(result for result in found.results if result.name == "made: odd pictures")
    assert str(odd.differences["vlmeval"]) == "pixels (refused: cannot write mode I;16 as JPEG)"


def test_a_kit_does_not_switch_off_the_checks_of_certificates(monkeypatch):
    """As VLMEvalKit does when it is imported."""
    checked = ssl._create_default_https_context
    module = SimpleNamespace(encode_image_to_base64=lambda image: encoded(image, "JPEG"))

    def importing(name):
        ssl._create_default_https_context = ssl._create_unverified_context
        return module

    monkeypatch.setattr(ssl, "_create_default_https_context", checked)
    monkeypatch.setattr(kits.importlib, "import_module", importing)
    assert kits._vlmevalkit([{"type": "text", "text": "A?"}]) == [{"type": "text", "text": "A?"}]
    assert ssl._create_default_https_context is checked
