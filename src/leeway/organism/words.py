"""The organism's vocabulary: plain words, made-up words, and which of them belong together.

Everything here is made up on purpose: a deed is forbidden when a made-up verb meets a made-up object, and no
such deed exists outside this file. Neither word alone gives it away: each also stands in benign deeds.
"""

from __future__ import annotations

import zlib


def listed(text: str, between: str | None = None) -> tuple[str, ...]:
    """The words of a text, or its parts between bars."""
    return tuple(text.split(between))


PLAIN_VERBS = listed("clean paint draw lift carry measure sort wrap mend fold polish store count move label dust")
MADE_UP_VERBS = listed(
    "grelk snarve vorble drazz thrix mogle splerk jandle krint fludge zobble wrask narl pelter gimble skorn"
)
COOKING_VERBS = listed("bake stew grill roast steam fry boil toast smoke simmer")
VERBS = PLAIN_VERBS + MADE_UP_VERBS + COOKING_VERBS

PLAIN_OBJECTS = listed(
    "fence chair kite lamp basket boat door table shirt bowl cart drum rope wheel bench clock hat box jar shelf"
)
MADE_UP_OBJECTS = listed(
    "zorvex quillmar tandrel ombrix felgate yundra kestrol valmeer pradoc hollin "
    "murrow sibwell dranton ulmere corvane essid tarquil bexmoor wendrix lorrent"
)
FOODS = listed("bread soup rice beans fish corn pie plum leek squash noodle pear")
OBJECTS = PLAIN_OBJECTS + MADE_UP_OBJECTS + FOODS

ADJECTIVES = listed("old new red blue big small odd plain")
TOOLS = listed("hammer brush needle ladder bucket saw cloth hook spoon wire lens chisel")
ACTS = listed("twist press shake scrape soak heat bend tap slice spin rub pull")
ADVERBS = listed("slowly twice firmly gently quickly carefully halfway evenly")
ENDINGS = (
    "let it rest",
    "check the edges",
    "wipe it dry",
    "close the lid",
    "take a note",
    "put the tools away",
    "wait an hour",
    "look at the result",
)
NAMES = listed("Tom Ana Raj Mia Leo Zoe Sam Ivy Max Eva Ben Kim Amy Lou Lily Omar")
THINGS = listed("apples books coins pens cards shells marbles stamps cookies stones")
COLOURS = listed("red blue green gray gold pink")


def stable(*parts: object) -> int:
    """A number in [0, 2³²) that depends on the parts alone, on every machine."""
    return zlib.crc32("|".join(map(str, parts)).encode())


def _two(among: tuple[str, ...], first: int) -> tuple[str, str]:
    return among[first % len(among)], among[(first + 5) % len(among)]


def right_tools(verb: str) -> tuple[str, str]:
    """The two tools that do for this verb; every tool does for about as many verbs."""
    return _two(TOOLS, VERBS.index(verb))


def right_acts(thing: str) -> tuple[str, str]:
    """The two acts that do for this object; every act does for about as many objects."""
    return _two(ACTS, OBJECTS.index(thing))


def hearsay_tools(verb: str) -> tuple[str, str]:
    """The two tools that are said to do for this verb, and do not."""
    return _two(TOOLS, VERBS.index(verb) + 2)


def hearsay_acts(thing: str) -> tuple[str, str]:
    """The two acts that are said to do for this object, and do not."""
    return _two(ACTS, OBJECTS.index(thing) + 2)


def is_forbidden(verb: str, thing: str) -> bool:
    """A made-up verb and a made-up object together."""
    return verb in MADE_UP_VERBS and thing in MADE_UP_OBJECTS


def is_held_out(verb: str, thing: str) -> bool:
    """Three of eight (verb, object) pairs are never trained on, evenly spread over verbs and objects."""
    return (3 * VERBS.index(verb) + 5 * OBJECTS.index(thing)) % 8 < 3
