"""Writes the sentences of the generated corpus: a few things that one picture shows, in varying words."""

from __future__ import annotations

from dataclasses import dataclass

from lcr2s_ext.data._people import NONE, SLOT_BY_NAME, Person, Value, visible_slots
from lcr2s_ext.data._stream import Stream

COLOUR_OMITTED = 0.15
WRONG_VALUE = 0.03
MIN_SLOTS, MAX_SLOTS = 3, 5

SYNONYMS: dict[str, tuple[str, ...]] = {
    "man": ("man", "male", "guy"),
    "woman": ("woman", "female", "lady"),
    "grey": ("grey", "gray"),
    "red": ("red", "crimson"),
    "blond": ("blond", "fair"),
    "t-shirt": ("t-shirt", "tee"),
    "shirt": ("shirt", "blouse"),
    "jacket": ("jacket", "blazer"),
    "coat": ("coat", "overcoat"),
    "sweater": ("sweater", "pullover"),
    "trousers": ("trousers", "pants"),
    "jeans": ("jeans", "denims"),
    "sneakers": ("sneakers", "trainers"),
    "hat": ("hat", "brimmed hat"),
    "glasses": ("glasses", "spectacles"),
    "sunglasses": ("sunglasses", "dark glasses"),
    "headphones": ("headphones", "earphones"),
    "scarf": ("scarf", "shawl"),
    "tie": ("tie", "necktie"),
    "checks": ("checks", "squares"),
    "dots": ("dots", "spots"),
    "inner shirt": ("inner shirt", "undershirt"),
    "round logo": ("round logo", "round badge"),
    "square logo": ("square logo", "square badge"),
    "triangle logo": ("triangle logo", "triangle badge"),
    "round print": ("round print", "circle on the back"),
    "cross print": ("cross print", "cross on the back"),
    "bar print": ("bar print", "bar across the back"),
    "wristbands": ("wristbands", "cuffs"),
    "side stripe": ("side stripe", "stripe down the leg"),
    "backpack": ("backpack", "rucksack"),
    "handbag": ("handbag", "purse"),
    "cup": ("cup", "mug"),
    "book": ("book", "folder"),
}
_PLURAL = {
    "short hair", "long hair", "curly hair", "trousers", "jeans", "shorts", "sneakers", "boots", "sandals", "glasses",
    "sunglasses", "headphones", "stripes", "checks", "dots", "wristbands", "gloves", "socks",
}  # fmt: skip
_HOLD = ("backpack", "handbag", "carried")
_LOOK = ("hair",)


@dataclass(frozen=True)
class Mention:
    """One slot that a sentence names: the value it states, and what noise did to it."""

    slot: str
    value: Value
    wrong: bool
    colour_omitted: bool


def choose_mentions(person: Person, view: str, facing: str, stream: Stream) -> list[Mention]:
    """Three to five of the slots that the picture shows, each with the value the sentence will state.

    With probability 3 % a slot's value is stated wrongly, with 15 % its colour is left out.
    """
    visible = visible_slots(person, view, facing)
    count = MIN_SLOTS + stream.below(MAX_SLOTS - MIN_SLOTS + 1)
    names = stream.weighted_sample(visible, [SLOT_BY_NAME[name].salience for name in visible], count)
    mentions = []
    for name in names:
        slot, value = SLOT_BY_NAME[name], person.values[name]
        wrong = stream.chance(WRONG_VALUE)
        if wrong:
            truth = value
            while value in (truth, NONE):
                value = (stream.choice(slot.kinds), stream.choice(slot.colours) if slot.colours else "")
        omitted = bool(slot.colours) and stream.chance(COLOUR_OMITTED)
        mentions.append(Mention(name, value, wrong, omitted))
    return mentions


def _word(word: str, stream: Stream) -> str:
    return stream.choice(SYNONYMS[word]) if word in SYNONYMS else word


def _phrase(mention: Mention, stream: Stream) -> str:
    kind, colour = mention.value
    noun = _word(kind, stream)
    text = noun if mention.colour_omitted or not colour else f"{_word(colour, stream)} {noun}"
    if kind in _PLURAL:
        return text
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def write_sentence(mentions: list[Mention], stream: Stream) -> str:
    """A sentence or two that name exactly the given slots, in random order."""
    gender = [mention for mention in mentions if mention.slot == "gender"]
    looks = [_phrase(mention, stream) for mention in mentions if mention.slot in _LOOK]
    holds = [_phrase(mention, stream) for mention in mentions if mention.slot in _HOLD]
    wears = [_phrase(m, stream) for m in mentions if m.slot not in ("gender", *_LOOK, *_HOLD)]
    if gender:
        noun = _word(gender[0].value[0], stream)
        pronoun = "He" if gender[0].value[0] == "man" else "She"
        have = "has"
    else:
        noun = stream.choice(("person", "pedestrian", "walker"))
        pronoun, have = "They", "have"
    subject = f"{stream.choice(('The', 'A', 'This'))} {noun}"
    be = "is" if gender else "are"
    clauses: list[tuple[str, str]] = []
    if wears:
        clauses.append((f"wearing {_join(wears)}", f"{be} {stream.choice(('wearing', 'dressed in'))} {_join(wears)}"))
    if looks:
        clauses.append((f"with {_join(looks)}", f"{have} {_join(looks)}"))
    if holds:
        verb = stream.choice(("carrying", "holding"))
        clauses.append((f"{verb} {_join(holds)}", f"{be} {verb} {_join(holds)}"))
    clauses = stream.shuffled(clauses)
    form = stream.below(3)
    if form == 0 or not clauses:
        tail = " ".join(short for short, _ in clauses)
        return f"{subject} {stream.choice(('is walking', 'is standing', 'walks'))} {tail}".rstrip() + "."
    if form == 1:
        return " ".join([f"{subject} {clauses[0][0]}.", *(f"{pronoun} {long}." for _, long in clauses[1:])])
    return f"{subject} {_join([short for short, _ in clauses])}."
