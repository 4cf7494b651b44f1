"""What people look at: pages that show and escape everything, problems by line, the mix."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from megatron_eagle.commands.preview import main
from megatron_eagle.data.inspection.preview_html import decision, pack_page, sample_page, sample_section
from megatron_eagle.data.packing.index import read_packs, write_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.errors import UserError
from tests.data.helpers import (
    call_tool,
    conversation,
    make_image,
    make_sentencepiece,
    make_store,
    make_video,
    write_jsonl,
)

NASTY = "<script>document.title = 'run'</script> & \"<b>\" <|im_end|> é مرحبا"


@pytest.fixture(scope="module")
def path(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("pre<view> & co")
    make_image(folder / "wide.png", (112, 56))
    make_image(folder / '"onload=.png', (20, 20), seed=1)
    make_video(folder / "clip.mp4", 90)
    records = [
        conversation(f"<image>{NASTY}", f"Answer {NASTY}", image="wide.png"),
        conversation("<video>", "A clip.", video={"video": "clip.mp4", "start": 1, "end": 9}),
        conversation("<document> and <image>", "Pages.", document=["wide.png"] * 9, image='"onload=.png'),
        conversation("Hello", "Hi"),
    ]
    store = make_store(folder, tokenizer_dir, records, (170, 1000))
    for length in (170, 1000):
        write_packs(store, length, 0)
    return store


class Checker(HTMLParser):
    """Collects tags and shown text; fails on anything that could run or load something."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert tag not in ("script", "iframe", "link", "b")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith(("data:image/jpeg;base64,", "#"))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    return checker


def test_a_sample_shows_everything(path):
    store = SampleStore(path, 1000)
    pages = [parsed(sample_page(store, row)) for row in range(4)]
    assert f"Answer {NASTY}" in pages[0].text
    assert "9 image tokens, 9 tiles" in pages[0].text
    assert pages[0].tags.count("rect") == 9
    assert "112 x 56 pixels in 4 x 2 tiles and a thumbnail" in pages[0].text
    assert pages[1].tags.count("img") == 16
    assert "Frame 1: 1.00 s" in pages[1].text
    assert "Frame 16: 8.90 s" in pages[1].text
    assert "Document 1, page 9 of 9" in pages[2].text
    assert '"onload=.png' in pages[2].text
    assert "line 4" in pages[3].text
    n = store[3].n_supervised
    assert f"Each of the {n} green tokens weighs {n**-0.5:.4f} = 1 / sqrt({n})" in pages[3].text


def test_weights_of_a_run_s_own_loss(path):
    store = SampleStore(path, 1000)
    tokenizer, n = load_tokenizer(store.path / "tokenizer"), store[3].n_supervised
    for settings, words in (
        ({"weighting": "token"}, f"Each of the {n} green tokens weighs 1.0000, everything else 0."),
        ({"weighting": "sample"}, f"weighs {1 / n:.4f} = 1 / {n}, everything"),
        ({"multi_turn": True}, f"The {n} green tokens weigh by the length of their answer"),
    ):
        section = sample_section(store, tokenizer, 3, anchor="here", note="<more>", **settings)
        assert words in section and '<h2 id="here">Row 3</h2>' in section and "&lt;more&gt;" in section


def test_decisions_in_words(path):
    short, long = SampleStore(path, 170), SampleStore(path, 1000)
    assert decision(long, long[1])[1:] == ["16 of 16 frames, all that were wanted."]
    clip, pages = 0, 1  # the long question is not in this one
    frames = len(short[clip].videos[0].frames)
    assert decision(short, short[clip])[1] == (
        f"{frames} of 16 frames; {16 - frames} given up: one more would not have fitted."
    )
    words = decision(short, short[pages])
    assert words[1] == "9 of 9 pages, all that were wanted."
    assert "given up: frames and pages come first" in words[2]
    assert "without a limit 4 x 2" in sample_page(short, pages)


def test_a_pack_has_a_map(path):
    store = SampleStore(path, 1000)
    page = pack_page(store, read_packs(store), 0)
    parsed(page)
    widths = [float(width) for width in re.findall(r'style="width:([0-9.]+)%"', page)]
    assert sum(widths) == pytest.approx(100, abs=0.01)
    assert len(widths) == len(read_packs(store).rows(0)) + 1
    for name in ("text-only", "picture-sample", "document-sample", "video-sample", "padding"):
        assert f'<a class="{name}"' in page


def test_media_that_are_gone_are_named(tmp_path, tokenizer_dir):
    make_image(tmp_path / "a.png", (56, 56))
    make_video(tmp_path / "v.mp4", 30)
    records = [conversation("<image><video>", "x", image="a.png", video="v.mp4")]
    store = SampleStore(make_store(tmp_path, tokenizer_dir, records, (300,)))
    (tmp_path / "a.png").unlink()
    (tmp_path / "v.mp4").write_bytes(b"")
    page = sample_page(store, 0)
    assert f"missing media: {tmp_path}/a.png" in page
    assert page.count('class="problem"') == 2


def test_sentencepiece_pages(tmp_path):
    folder = make_sentencepiece(tmp_path / "tokenizer")
    store = SampleStore(make_store(tmp_path, folder, [conversation("Hi <img>", "Ho")], (300,)))
    assert '<span class="special">&lt;|im_start|&gt;</span>' in sample_page(store, 0)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to look at the page with")
def test_a_browser_draws_it(path, tmp_path):
    store = SampleStore(path, 1000)
    page = tmp_path / "page.html"
    page.write_text(pack_page(store, read_packs(store), 0), encoding="utf-8")
    shot = tmp_path / "shot.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path}/profile", f"--screenshot={shot}", "--window-size=1250,3000"]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int).reshape(-1, 3)

    def share(*colour):
        return (np.abs(pixels - colour).max(1) < 12).mean()

    assert share(255, 255, 255) > 0.5
    for colour in ((0x09, 0x69, 0xDA), (0x1A, 0x7F, 0x37), (0xBF, 0x39, 0x89), (0x57, 0x60, 0x6A)):
        assert share(*colour) > 1e-5, "the packing map"
    assert share(255, 0x8C, 0) > 1e-5, "tile grids"
    assert share(0xDD, 0xF4, 0xFF) > 1e-4, "image tokens"


def test_show_from_the_command_line(path, tmp_path):
    def show(*arguments):
        return call_tool("preview_data", "show", path, *arguments)

    done = show("--html", tmp_path / "a.html")
    assert (done.returncode, done.stdout) == (0, f"written to {tmp_path}/a.html\n")
    assert "<title>Pack 0 of" in (tmp_path / "a.html").read_text()
    assert show("--length", 170, "--sample", 0, "--html", tmp_path / "a.html").returncode == 0
    assert "<title>Sample 0 of 3" in (tmp_path / "a.html").read_text()
    for arguments, message in (
        ((), "show needs --json or --html OUT"),
        (("--json",), "--json shows one sample; name it with --sample I"),
        (("--json", "--sample", 0, "--pack", 0), "show takes --sample or --pack, not both"),
        (("--html", tmp_path / "x", "--pack", 99), f"{path} has packs 0 to 0 at length 1000, no 99"),
        (("--html", tmp_path / "none" / "x"), f"cannot write {tmp_path}/none/x: No such file or directory"),
    ):
        done = show(*arguments)
        assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_lint_and_mix(path, tmp_path):
    make_image(tmp_path / "a.png", (20, 20))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    good = conversation("<image>", "x", image="a.png")
    write_jsonl(
        tmp_path / "a.jsonl",
        [good, "{broken", conversation("<image>", "x", image="cut.png"), good, conversation("<video>", "x")],
    )
    write_jsonl(tmp_path / "b.jsonl", [good] * 5)
    (tmp_path / "r.json").write_text(
        json.dumps({"a": {"annotation": "a.jsonl"}, "b": {"annotation": "b.jsonl", "repeat_time": 3}})
    )
    done = call_tool("preview_data", "lint", tmp_path / "r.json")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line]
    assert [line.split(": ")[:2] for line in lines[:-1]] == [
        [f"{tmp_path}/a.jsonl:2", "broken JSON"],
        [f"{tmp_path}/a.jsonl:3", "unreadable image"],
        [f"{tmp_path}/a.jsonl:5", "placeholder mismatch"],
        [f"{tmp_path}/a.jsonl", "JSON lines, 5 records, read as LLaVA (3), ShareGPT (1)"],
        [f"{tmp_path}/b.jsonl", "JSON lines, 5 records, read as LLaVA (5)"],
    ]
    assert lines[-1].startswith("10 lines, 3 with a problem; broken JSON: 1; placeholder mismatch: 1;")
    done = call_tool("preview_data", "lint", tmp_path / "a.jsonl", "--no-media")
    assert done.stdout.splitlines()[-1].startswith("5 lines, 2 with a problem")
    assert call_tool("preview_data", "lint", tmp_path / "b.jsonl").returncode == 0

    done = call_tool("preview_data", "mix", tmp_path / "r.json")
    assert [line.split() for line in done.stdout.splitlines()[2:]] == [
        ["a", "5", "1", "5", "25.00"],
        ["b", "5", "3", "15", "75.00"],
    ]
    done = call_tool("preview_data", "mix", path)
    assert done.stdout.splitlines()[2].split()[:2] == ["data", "4"]
    store = SampleStore(path)
    histogram = [line.split() for line in done.stdout.splitlines()[5:]]
    assert sum(int(line[3]) for line in histogram) == 4
    assert sum(float(line[5]) for line in histogram) == pytest.approx(100, abs=0.05)
    assert len(histogram) == len([store.length // 2**k for k in range(8)])


def test_tiles_from_the_command_line(capsys):
    main(["tiles", "3840x2160", "100x448", "--max-tiles", "1", "48"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 3840x2160 | 2 % (1 x 1) | 100 % (9 x 5) |",
        "| 100x448 | 100 % (1 x 1) | 100 % (2 x 9) |",
    ]
    for wrong, said in ((["4K"], "4K: expected a picture's width"), (["--max-tiles", "0"], "at least 1")):
        with pytest.raises(UserError, match=said):
            main(["tiles", *wrong])
