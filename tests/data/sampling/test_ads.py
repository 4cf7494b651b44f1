"""Automatic Degradation Sampling: the worked examples of the specification, and its properties."""

from fractions import Fraction
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.data.sampling.ads import (
    ImageDemand,
    SamplingSettings,
    VideoDemand,
    plan_media,
    wanted_frames,
)
from megatron_eagle.hf_model.grids import select_grid, tile_count, tile_limits
from megatron_eagle.problems import Problem

SETTINGS = SamplingSettings()


def counter(text, seconds=()):
    """Qwen's splitting: frame k costs 262 + digits(k) tokens, a picture 3 more than its tiles.

    A video's header with its line end costs 18 tokens and one per digit of its whole seconds.
    """

    def count(tiles, frames, documents=()):
        labels = sum(_frames(len(video)) for video in frames)
        headers = sum(18 + len(str(s)) for s in seconds)
        pages = sum(256 * t + 8 for pages in documents for t in pages)
        return text + headers + labels + sum(256 * t + 3 for t in tiles) + pages

    return count


@cache
def _frames(n):
    return sum(262 + len(str(k)) for k in range(1, n + 1))


def video(seconds, fps=30):
    available = seconds * fps
    wanted = wanted_frames(available, Fraction(seconds), SETTINGS)
    return VideoDemand(0, available - 1, wanted, SETTINGS.min_frames)


def test_one_long_video():
    count = counter(200, [600])
    plan = plan_media([], [video(600)], count, 32768, SETTINGS)
    assert len(plan.frames[0]) == 123
    assert plan.n_tokens == 32708
    assert count([], [range(124)]) == 32973


def test_two_videos_share_by_what_they_want():
    plan = plan_media([], [video(120), video(30)], counter(100, [120, 30]), 32768, SETTINGS)
    assert [len(frames) for frames in plan.frames] == [98, 25]


def test_tiles_come_after_frames():
    count = counter(150, [20])
    plan = plan_media([ImageDemand(1920, 1080, 12)], [video(20)], count, 12288, SETTINGS)
    assert len(plan.frames[0]) == 40
    assert count([1], plan.frames) == 10980
    assert plan.grids == ((2, 2),)
    assert plan.n_tokens == 12004
    assert plan.tiles_wanted == 9


def test_wanted_frames_keeps_its_limits():
    assert wanted_frames(1000, Fraction(600), SETTINGS) == 512
    assert wanted_frames(5, Fraction(600), SETTINGS) == 5
    assert wanted_frames(100, Fraction(1), SETTINGS) == 8
    assert wanted_frames(100, Fraction(10), SamplingSettings(fps=1.1)) == 11
    with pytest.raises(ValueError, match="positive"):
        SamplingSettings(fps=0)


def test_frames_are_spread_with_both_ends():
    assert VideoDemand(10, 19, 4, 4).frames(4) == (10, 13, 16, 19)
    assert VideoDemand(7, 7, 1, 1).frames(1) == (7,)


def test_what_cannot_fit_is_refused():
    with pytest.raises(Problem, match="too long: needs at least 2304 tokens, the limit is 2303"):
        plan_media([], [video(600)], counter(200), 2303, SETTINGS)
    assert plan_media([], [video(600)], counter(200), 2304, SETTINGS).n_tokens == 2304


PAGE = ImageDemand(1240, 1754, 12)  # A4 at 150 dpi: 3 x 4 tiles and the thumbnail


def test_a_document_gives_up_pages_before_anything_else():
    count = counter(100, [20])
    pages = [PAGE] * 30
    # 30 pages of 264 tokens do not fit beside the 8 frames that the video must have.
    plan = plan_media([], [video(20)], count, 5000, SETTINGS, [pages])
    assert len(plan.frames[0]) == 8
    assert plan.pages[0] == tuple(round(29 * i / 9) for i in range(10))
    assert plan.n_tokens == count([], plan.frames, [[1] * 10]) == 4864 <= 5000 < 4864 + 264
    assert plan.page_grids == (((1, 1),) * 10,)
    assert plan.tiles_wanted == 30 * 13
    # They all fit: frames come next, then tiles for all pictures alike.
    plan = plan_media([ImageDemand(1920, 1080, 12)], [video(20)], count, 22_000, SETTINGS, [pages])
    assert (len(plan.pages[0]), len(plan.frames[0]), plan.tile_limit) == (30, 40, 1)
    plan = plan_media([ImageDemand(1920, 1080, 12)], [video(20)], count, 40_000, SETTINGS, [pages])
    assert plan.tile_limit == 2
    assert plan.grids == ((2, 1),)
    assert set(plan.page_grids[0]) == {(1, 2)}
    with pytest.raises(Problem, match="too long: needs at least 627 tokens, the limit is 626"):
        plan_media([], [], counter(99), 626, SETTINGS, [[PAGE], [PAGE] * 2])
    one_each = plan_media([], [], counter(99), 627, SETTINGS, [[PAGE], [PAGE] * 2])
    assert one_each.pages == ((0,), (0,))


def test_a_large_picture_gives_up_tiles_step_by_step():
    """4K with up to 48 tiles: nothing between 48 and 12 would keep 29 % where 58 % fit."""
    picture, count, settings = ImageDemand(3840, 2160, 48), counter(100), SamplingSettings(max_tiles=48)

    def grid(limit):
        return plan_media([picture], [], count, limit, settings).grids[0]

    assert [grid(limit) for limit in (16_384, 11_000, 7_000, 4_000)] == [(9, 5), (7, 4), (6, 4), (4, 3)]


def test_documents_share_by_what_they_have():
    plan = plan_media([], [], counter(0), 264 * 12, SETTINGS, [[PAGE] * 30, [PAGE] * 10])
    assert [len(pages) for pages in plan.pages] == [9, 3]
    assert plan.pages[1] == (0, 4, 9)


@settings(deadline=None, max_examples=150)
@given(
    text=st.integers(0, 3000),
    images=st.lists(
        st.builds(ImageDemand, st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 50)), max_size=4
    ),
    videos=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 30)), max_size=3),
    documents=st.lists(st.integers(1, 12), max_size=2),
    limit=st.integers(256, 16384),
    most=st.sampled_from([12, 36, 48]),
)
def test_properties(text, images, videos, documents, limit, most):
    settings = SamplingSettings(max_tiles=most)
    demands = [video(*v) for v in videos]
    documents = [[PAGE] * n for n in documents]
    count = counter(text)
    single = [1] * len(images)
    fewest = [w.frames(min(w.minimum, w.wanted)) for w in demands]
    if count(single, fewest, [[1]] * len(documents)) > limit:
        with pytest.raises(Problem):
            plan_media(images, demands, count, limit, settings, documents)
        return
    plan = plan_media(images, demands, count, limit, settings, documents)
    tiles = [tile_count(grid) for grid in plan.grids]
    page_tiles = [[tile_count(grid) for grid in grids] for grids in plan.page_grids]
    assert plan.n_tokens == count(tiles, plan.frames, page_tiles) <= limit
    for pages, shown in zip(documents, plan.pages, strict=True):
        assert 1 <= len(set(shown)) == len(shown) <= len(pages)
        assert (shown[0], shown[-1]) == (0, len(pages) - 1 if len(shown) > 1 else 0)
    given_up = [i for i, pages in enumerate(documents) if len(plan.pages[i]) < len(pages)]
    if given_up:
        i = min(given_up, key=lambda i: Fraction(len(plan.pages[i]), len(documents[i])))
        more = [[1] * (len(p) + (i == j)) for j, p in enumerate(plan.pages)]
        assert count(single, fewest, more) > limit
    single_pages = [[1] * len(pages) for pages in plan.pages]
    for demand, frames in zip(demands, plan.frames, strict=True):
        assert min(demand.minimum, demand.wanted) <= len(frames) <= demand.wanted
        assert len(set(frames)) == len(frames)
        assert (frames[0], frames[-1]) == (demand.first, demand.last if len(frames) > 1 else demand.first)
    unfilled = [i for i, w in enumerate(demands) if len(plan.frames[i]) < w.wanted]
    if unfilled:
        i = min(unfilled, key=lambda i: Fraction(len(plan.frames[i]), demands[i].wanted))
        more = [range(len(f) + (i == j)) for j, f in enumerate(plan.frames)]
        assert count(single, more, single_pages) > limit
    for t in tile_limits(most):
        grids = [select_grid(m.width, m.height, tile_size=448, max_tiles=min(t, m.max_tiles)) for m in images]
        page_grids = [
            [select_grid(PAGE.width, PAGE.height, tile_size=448, max_tiles=t)] * len(pages)
            for pages in plan.pages
        ]
        costs = [[tile_count(grid) for grid in g] for g in page_grids]
        if t == plan.tile_limit:
            assert tuple(grids) == plan.grids
            break
        assert count([tile_count(grid) for grid in grids], plan.frames, costs) > limit
