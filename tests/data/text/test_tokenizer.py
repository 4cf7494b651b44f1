"""Sentencepiece behind the same interface: special tokens by name, text that spells them stays text."""

import pytest

from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.sample import ImageRef, Sample, Turn
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.text.template import Template
from megatron_eagle.data.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from megatron_eagle.errors import UserError
from tests.data.helpers import SPECIAL, conversation, make_image, make_sentencepiece, make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def sentencepiece(folder):
    return load_tokenizer(folder)


def test_it_is_found_beside_no_json(sentencepiece, folder, tokenizer_dir, tmp_path):
    assert isinstance(sentencepiece, SentencePieceTokenizer)
    assert sentencepiece.vocab_size == 401  # the added token's id + 1
    assert sentencepiece.token_id("</interval>") == 400
    for name in SPECIAL:
        assert sentencepiece.decode([sentencepiece.token_id(name)]) == name
    with pytest.raises(UserError, match='tokenizer.model has no token "<video>"; add it'):
        sentencepiece.token_id("<video>")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    without_added = load_tokenizer(tmp_path)
    assert without_added.fingerprint != sentencepiece.fingerprint
    assert without_added.vocab_size < 401
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    assert not isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


@pytest.mark.parametrize(
    "text", ["A cat.\n\n  and é 猫", "say <img> and <|im_end|>\n", "<box></interval>x", ""]
)
def test_text_stays_text(sentencepiece, text):
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids) == text
    assert not {sentencepiece.token_id(name) for name in SPECIAL} & set(ids)
    assert sentencepiece.count(text) == sentencepiece.count(text) == len(ids)


def test_answers_begin_where_they_begin(sentencepiece):
    sample = Sample(
        (Turn("user", (ImageRef(0), "é what?")), Turn("assistant", ("Ünï <img> cat.",))), images=("a",)
    )
    template = Template(sentencepiece, "train", 2)
    encoded = template.encode(sample, [3], [])
    assert len(encoded.ids) == template.count(sample, [3], [])
    assert (encoded.ids == template.image_token_id).sum() == 6
    assert sentencepiece.decode(encoded.ids[encoded.answers == 1].tolist()) == "Ünï <img> cat.<|im_end|>"
    assert list(encoded.ids).count(sentencepiece.token_id("<|im_start|>")) == 3


def test_a_store_is_made_with_it(tmp_path, folder):
    make_image(tmp_path / "a.png", (112, 56))
    path = make_store(tmp_path, folder, [conversation("<image>What?", "A cat.", image="a.png")], (300,))
    store = SampleStore(path)
    assert store.manifest.vocab_size == 401
    assert (path / "tokenizer" / "tokenizer.model").is_file()
    assert store.manifest.fingerprint
    assert write_packs(path, 300, 0).n_packs == 1
    assert load_tokenizer(path / "tokenizer").decode(store[0].ids.tolist()).count("A cat.<|im_end|>") == 1
