"""Sets beside what writes and spreads them, `datasets` and Ray on two nodes; `make test-peers` has these."""

import io
import json
import tarfile
import zipfile

import pytest
from PIL import Image

from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.store.reader import SampleStore
from tests.data import published_sets
from tests.data.helpers import contents, make_video, read_media, write_jsonl
from tests.data.killed import EXECUTION, settings

pytestmark = pytest.mark.slow


def make(folder, tokenizer_dir, **entries):
    (folder / "recipe.json").write_text(json.dumps(entries))
    preprocess(folder / "recipe.json", folder / "store", settings(str(tokenizer_dir)), EXECUTION)
    return SampleStore(folder / "store")


def picture(number):
    return Image.new("RGB", published_sets.SIZE, (number * 20, 0, 255 - number * 20))


def test_what_datasets_writes(tmp_path, tokenizer_dir):
    """Parquet, a saved data set, one of several splits, a shuffled one; a video."""
    datasets = pytest.importorskip("datasets", reason="no datasets: make test-peers")
    turn = {key: datasets.Value("string") for key in ("user", "assistant")}
    features = {"images": datasets.Sequence(datasets.Image()), "texts": datasets.Sequence(turn)}
    texts = [{"user": ["What?"], "assistant": [f"Picture {k}."]} for k in range(9)]
    columns = {"images": [[picture(k)] * (k % 3) for k in range(9)], "texts": texts}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    data.shuffle(seed=0).save_to_disk(tmp_path / "shuffled")
    datasets.DatasetDict({"train": data, "test": data.select([4, 5])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    data.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    clip = make_video(tmp_path / "v.mp4", 20)
    kinds = {"video": datasets.Video(decode=False), "caption": datasets.Value("string")}
    rows = {"video": [{"path": None, "bytes": clip.read_bytes()}], "caption": ["A clip."]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(tmp_path / "v.parquet")
    store = make(
        tmp_path,
        tokenizer_dir,
        hub={"annotation": "hub"},
        saved={"annotation": "saved"},
        splits={"annotation": "splits", "split": "test"},
        shuffled={"annotation": "shuffled"},
        video={"annotation": "v.parquet"},
    )
    assert len(store) == 9 + 9 + 2 + 9 + 1
    shown = [[medium.mean((0, 2, 3)).tolist() for medium in read_media(store, row)] for row in range(30)]
    own = [round((means[0][0] + 1) * 127.5) if means else None for means in shown]
    assert own[:9] == own[9:18] == [k * 20 if k % 3 else None for k in range(9)]
    assert [len(means) for means in shown[:9]] == [k % 3 for k in range(9)]
    assert own[18:20] == [80, 100] and sorted(own[20:29], key=str) == sorted(own[:9], key=str) != own[20:29]
    assert len(store[29].videos[0].frames) == 8 and read_media(store, 29)[0].shape[0] == 8


def test_two_nodes_make_the_same_bytes(tmp_path, tokenizer_dir):
    """Of tables, of a WebDataset, and of lines whose pictures lie in a compressed archive."""
    ray = pytest.importorskip("ray", reason="no Ray: make test-peers")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    published_sets.fine_vision(tmp_path / "a", 60, 3)
    published_sets.saved(tmp_path / "b", 10)
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A colour."}]
    with tarfile.open(tmp_path / "c.tar", "w") as tar, zipfile.ZipFile(tmp_path / "d.zip", "w", 8) as packed:
        for k in range(20):
            for name, content in (
                (f"{k}.png", published_sets.picture(k)),
                (f"{k}.json", json.dumps(turns).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            packed.writestr(f"{k}.png", published_sets.picture(k))
    write_jsonl(tmp_path / "d.jsonl", [{"image": f"{k}.png", "conversations": turns} for k in range(20)])
    store = make(
        tmp_path,
        tokenizer_dir,
        a={"annotation": "a"},
        b={"annotation": "b"},
        c={"annotation": "c.tar"},
        d={"annotation": "d.jsonl", "root": "d.zip"},
    )
    assert len(store) == 60 + 10 + 20 + 20
    cluster = cluster_utils.Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        assert sum(node["Alive"] for node in ray.nodes()) == 2
        execution = Execution(None, "ray")
        preprocess(tmp_path / "recipe.json", tmp_path / "spread", settings(str(tokenizer_dir)), execution)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert contents(tmp_path / "spread") == contents(tmp_path / "store")
    assert "media/00000.tar" in contents(tmp_path / "spread")
