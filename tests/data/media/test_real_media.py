"""Real photographs, videos and page scans go through lint, preprocessing, packing and preview."""

import json

from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.store.reader import SampleStore
from tests.data.helpers import call_tool, conversation, every_tile, write_jsonl
from tests.paths import MEDIA, need_media

CLIP = {"video": "video/energon_sync_test.mp4", "start": 10, "end": 40}
LINES = [
    (conversation("<image>\nDescribe this.", "A cat.", image="photo/chelsea.png"), None),
    (conversation("<image> or <image>?", "Both.", image=["photo/waterview.jpg", "photo/kodim03.png"]), None),
    (conversation("<image>", "A tall screen.", image="photo/screen_mobile_tall.jpg"), None),
    (conversation("<video>\nWhat happens?", "A bunny.", video="video/skv_bigbuckbunny.mp4"), None),
    (conversation("<video> then <image>?", "Coffee.", video=CLIP, image="photo/coffee.png"), None),
    (conversation("<video>", "Turned.", video="video/decord_rot90.mov"), None),
    (conversation("<video>", "AV1.", video="video/tc_av1.mkv"), None),
    (
        conversation("<document>", "Four pages.", document=[f"doc/{n}" for n in ("page.png", "ocr3.jpg")]),
        None,
    ),
    (conversation("<document>", "A paper.", document="pdf/tracemonkey_14p.pdf"), None),
    (conversation("<document>", "A plot.", document="pdf/imagenet_cifar_lp.pdf"), None),
    (conversation("<document>", "x", document="pdf/none.pdf"), "missing media"),
    (conversation("<video>", "x", video="video/decord_corrupted.mp4"), "undecodable frame"),
    (conversation("Hello", "Hi"), None),
]


@need_media
def test_as_a_new_user_would(tmp_path, tokenizer_dir):
    write_jsonl(tmp_path / "real.jsonl", [record for record, _ in LINES])
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"real": {"annotation": "real.jsonl", "root": str(MEDIA)}}))
    lint = call_tool("preview_data", "lint", recipe)
    assert lint.returncode == 1
    assert lint.stdout.splitlines()[-1].startswith("13 lines, 1 with a problem")

    store = tmp_path / "store"
    made = call_tool(
        "preprocess_data",
        "run",
        "--recipe",
        recipe,
        "--tokenizer",
        tokenizer_dir,
        "--output",
        store,
        "--max-tokens",
        4096,
        8192,
        "--workers",
        2,
        "--report",
        tmp_path / "report.png",
    )
    assert made.returncode == 0, made.stderr
    ledger = {entry["line"]: entry["kind"] for entry in map(json.loads, (store / "dropped.jsonl").open())}
    assert ledger == {line: kind for line, (_, kind) in enumerate(LINES, 1) if kind}
    short, long = (SampleStore(store, length) for length in (4096, 8192))
    for row in range(len(short)):
        assert short[row].n_tokens <= 4096
        assert short[row].n_tiles <= long[row].n_tiles
    assert any(short[row].n_frames < long[row].n_frames for row in range(len(short)))

    packed = call_tool("pack_data", "--data", store, "--length", 8192)
    assert packed.returncode == 0, packed.stderr
    assert call_tool("preview_data", "mix", store).returncode == 0
    page = tmp_path / "page.html"
    assert call_tool("preview_data", "show", store, "--html", page).returncode == 0
    assert "problem" not in page.read_text().split("</style>")[1]
    loader = PackLoader(
        DataConfig(str(store), 8192),
        global_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        plan=every_tile,
    )
    for pack in range(loader.packs_per_epoch):
        batch = loader.step(pack).microbatches[0]
        assert batch.pixel_values.shape == (batch.n_tiles, 3, 448, 448)
    loader.close()
