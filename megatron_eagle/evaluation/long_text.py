"""A check of long texts: questions about a made-up harbour book of as many tokens as are asked for.

Three kinds of questions, each at five depths of the book:

needle   a number that stands in one sentence which does not belong there, among four more such sentences
entry    the number that one of hundreds of entries of the same form gives for a ship
chain    the port of a ship that is known only from another entry, elsewhere in the book

Nobody has read the book in training, and its numbers cannot be guessed. The same seed makes the same book.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_eagle.errors import UserError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Tokens beside the book: the question, the chat's frame, the reply.
_ROOM = 256
_SHORTEST = 2048
_FIRST = (
    "Amber Ancient Arctic Autumn Blessed Bold Brave Bright Bronze Calm Careful Cheerful Clever Cold "
    "Copper Crimson Daring Dark Distant Early Eastern Eager Faithful Fearless Gentle Gilded Golden Grey "
    "Happy Hardy Hidden Honest Humble Idle Iron Ivory Jolly Keen Late Lonely Loyal Lucky Merry Mighty "
    "Noble Northern Old Pale Patient Proud Quick Quiet Red Royal Rustic Sacred Silent Silver Southern "
    "Steady Swift Tall Western Wild"
)
_SECOND = (
    "Albatross Anchor Arrow Badger Beacon Bell Bison Bride Candle Castle Cedar Comet Condor Crane Crown "
    "Daisy Dolphin Dove Eagle Falcon Fiddler Fox Gannet Garden Giant Gull Harp Heron Hunter Island "
    "Jackdaw Juniper Kestrel Lantern Lark Lily Magpie Maiden Marten Meadow Miller Minstrel Otter "
    "Pelican Petrel Pilgrim Plover Poplar Raven Robin Rose Salmon Shepherd Sparrow Spirit Star Stork "
    "Swallow Thistle Traveller Violet Walrus Willow Wren"
)
_PORTS = (
    "Aalden Barmouth Caldry Dorvik Elmshaven Farsund Gelton Harwick Istrand Jarlsby Kelmouth Lowick "
    "Marsay Norholm Ostwick Pelworth Quarne Rossby Selmouth Torvay Ulmstead Varhaven Wexford Yarnby"
)
_GOODS = "barley bricks cheese clay coal copper cotton flax glass herring honey lead oats oil paper rope salt"
_COLOURS = "black blue brown green white"
_WEATHER = (
    "The wind stood in the west all day.",
    "Fog lay on the water until noon.",
    "It rained, and the quay was slippery.",
    "The tide was late and the pilot waited.",
    "The sea was calm and the night clear.",
    "Two of the cranes were out of use.",
    "The customs officer found nothing to note.",
    "Some sacks were wet and were dried on deck.",
)


@dataclass(frozen=True)
class _Entry:
    ship: str
    port: str
    tons: int
    goods: str
    next_ship: str
    weather: str

    def text(self, number: int) -> str:
        return (
            f"Entry {number}. The {self.ship} came into {self.port} with {self.tons} tons of {self.goods}. "
            f"{self.weather} Her cargo went on in the {self.next_ship}.\n"
        )


def long_text_records(
    lengths: Sequence[int], count: Callable[[str], int], repeats: int = 1, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Records of `evaluation.benchmarks`: 15 for each length and repeat, about one book.

    Args:
        lengths: tokens of prompt and reply together, at most.
        count: tokens of a text.

    Raises:
        UserError: a length is too short for a book, or needs more ships than have names.
    """
    for length in lengths:
        if length < _SHORTEST:
            raise UserError(f"{length:,} tokens: a book needs {_SHORTEST:,} at least")
        for repeat in range(repeats):
            yield from _book(length, count, random.Random(f"{seed} {length} {repeat}"), f"{length}:{repeat}")


def _book(
    length: int, count: Callable[[str], int], draw: random.Random, name: str
) -> Iterator[dict[str, Any]]:
    needles = {
        colour: f"By the way, the number of the {colour} key is {number}.\n"
        for colour, number in zip(_COLOURS.split(), draw.sample(range(100_000, 999_999), 5), strict=True)
    }
    budget = length - _ROOM - sum(map(count, needles.values()))
    entries = _entries(budget, count, draw)
    pages = [entry.text(number) for number, entry in enumerate(entries, start=1)]
    places = [round(depth * (len(entries) - 1)) for depth in DEPTHS]
    colours = draw.sample(sorted(needles), len(DEPTHS))
    for place, colour in sorted(zip(places, colours, strict=True), reverse=True):
        # The deepest needle is the book's last sentence, the first one its first.
        pages.insert(place + (place == len(entries) - 1), needles[colour])
    by_ship = {entry.ship: entry for entry in entries}
    for depth, place, colour in zip(DEPTHS, places, colours, strict=True):
        entry = entries[place]
        number = needles[colour].rstrip(".\n").split()[-1]
        for kind, question, answer in (
            ("needle", f"What is the number of the {colour} key?", number),
            ("entry", f"How many tons did the {entry.ship} bring?", str(entry.tons)),
            (
                "chain",
                f"The cargo of the {entry.ship} went on in another ship. Into which port had that one come?",
                by_ship[entry.next_ship].port,
            ),
        ):
            yield {
                "id": f"{name}:{kind}:{depth:g}",
                "context": f"The harbour book:\n\n{''.join(pages)}",
                "question": question,
                "metric": "contains",
                "answer": [answer],
                "category": f"{kind}, {length:,} tokens",
            }


def _entries(budget: int, count: Callable[[str], int], draw: random.Random) -> list[_Entry]:
    """As many as fit, in a book whose cargoes go on in ships of the book, to another port."""
    names = [f"{first} {second}" for first in _FIRST.split() for second in _SECOND.split()]
    draw.shuffle(names)
    ports, goods = _PORTS.split(), _GOODS.split()
    tons = draw.sample(range(10_000, 99_999), len(names))
    made: list[_Entry] = []
    left = budget
    for name, weight in zip(names, tons, strict=True):
        # Its own name stands for that of the next ship, which is known when all are there.
        made.append(_Entry(name, draw.choice(ports), weight, draw.choice(goods), name, draw.choice(_WEATHER)))
        left -= count(made[-1].text(len(made)))
        if left < 0:
            break
    else:
        raise UserError(f"a book has {len(names):,} ships at most; ask for fewer tokens")
    while True:
        made = made[: -max(1, len(made) // 200)]
        entries = [_going_on(entry, made, draw) for entry in made]
        if count("".join(entry.text(number) for number, entry in enumerate(entries, start=1))) <= budget:
            return entries


def _going_on(entry: _Entry, made: Sequence[_Entry], draw: random.Random) -> _Entry:
    other = draw.choice(
        [other for other in draw.sample(made, min(24, len(made))) if other.port != entry.port]
    )
    return replace(entry, next_ship=other.ship)
