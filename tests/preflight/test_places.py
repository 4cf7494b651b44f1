"""What a run reads and writes, worked out before it starts, and looked at on a node."""

from pathlib import Path

import pytest

from megatron_eagle.checkpoint import checkpoint_folder
from megatron_eagle.files import nearest_folder
from megatron_eagle.preflight.folders import see_others, write_own
from megatron_eagle.preflight.meeting import Process
from megatron_eagle.preflight.node import Report, look_at_node
from megatron_eagle.preflight.places import places_of, why_no_space
from megatron_eagle.training.stages import load_stages
from megatron_eagle.training.train import train
from tests.training.picture_run import PACKS, write_picture_run


def look(reads: dict[str, int], media: dict[str, int]) -> list[str]:
    record = look_at_node(Process("n1"), reads, media, []).to_record()
    return Report.of_record(record).problems


def test_a_run(tmp_path):
    """Its files; its room, which is that of the checkpoint that it then writes; that checkpoint's files."""
    file = write_picture_run(tmp_path)
    (config,) = load_stages(file)
    places = places_of(str(file), [config], [str(tmp_path / "ranks")])
    store = Path(config.data.path)
    names = {str(Path(name).relative_to(store)) for name in places.reads if Path(name).is_relative_to(store)}
    assert {"manifest.json", "64/packs.arrow", "64/tokens.bin", "64/samples.arrow"} <= names
    assert str(file) in places.reads
    assert places.media == {
        str(tmp_path / f"{k}.png"): (tmp_path / f"{k}.png").stat().st_size for k in range(PACKS)
    }
    run = str(tmp_path / "run")
    assert places.writes == [str(tmp_path / "ranks"), run, f"{run}/logs"]
    assert look(places.reads, places.media) == []

    assert why_no_space(config, 10**12) is None
    size = next(size for size in range(0, 10**8, 10_000) if why_no_space(config, size) is None)
    train(config)
    folder = checkpoint_folder(run)
    written = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    assert size == pytest.approx(written, rel=0.1), "each tensor has a head of a kilobyte"
    (config,) = load_stages(file)
    assert why_no_space(config, 0) is None, "it has ended"
    again = places_of(str(file), [config])
    assert {str(file) for file in folder.iterdir()} <= again.reads.keys()

    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"other")
    (store / "64" / "packs.arrow").unlink()
    (store / "64" / "tokens.bin").write_bytes(b"")
    said = "\n".join(look(places.reads, places.media))
    for words in (
        "packs.arrow cannot be read: No such file",
        "tokens.bin has 0 bytes here",
        "0.png",
        "1.png has 5 b",
    ):
        assert words in said, said
    many = look({str(tmp_path / f"absent{k}"): 1 for k in range(9)}, {})
    assert len(many) == 4 and many[-1] == "6 other files likewise"


def test_where_a_folder_would_be_made(tmp_path):
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path == nearest_folder(tmp_path)


def test_what_others_have_written(tmp_path):
    for node in ("n1", "n2"):
        write_own(str(tmp_path), "token", node)
    (tmp_path / ".preflight-token-n3").write_text("tok")  # not yet all of it
    assert see_others(str(tmp_path), "token", ["n1", "n2", "n3", "n4"], seconds=0.1) == {"n1", "n2"}
