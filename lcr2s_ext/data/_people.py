"""Who walks through the generated corpus: attribute slots, styles, families of look-alikes, and what a view shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from lcr2s_ext.data._stream import Stream

VIEWS = ("front", "back", "side")
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (26, 26, 30),
    "white": (236, 236, 232),
    "grey": (134, 134, 138),
    "red": (196, 34, 40),
    "blue": (38, 70, 180),
    "green": (36, 130, 62),
    "yellow": (226, 200, 48),
    "brown": (122, 72, 30),
    "pink": (236, 136, 172),
}
CLOTH = tuple(COLOURS)
HAIR_COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (26, 22, 22),
    "brown": (92, 56, 30),
    "blond": (214, 178, 96),
    "grey": (158, 156, 154),
    "red": (150, 62, 28),
}
SKIN = ((240, 206, 178), (222, 178, 142), (172, 122, 86), (112, 76, 54))

# A slot's value is (kind, colour); the kind "none" means that the person has no such thing, the colour is "" where the
# slot has none.
Value = tuple[str, str]
NONE: Value = ("none", "")


@dataclass(frozen=True)
class Slot:
    """One attribute of a person: the kinds it may take, its colours, and how often it is there at all."""

    name: str
    kinds: tuple[str, ...]
    colours: tuple[str, ...] = ()
    presence: float = 1.0
    views: tuple[str, ...] = VIEWS
    salience: float = 1.0


SLOTS: tuple[Slot, ...] = (
    Slot("gender", ("man", "woman")),
    Slot("hair", ("short hair", "long hair", "ponytail", "curly hair"), tuple(HAIR_COLOURS)),
    Slot("headwear", ("cap", "beanie", "hat"), CLOTH, 0.40, salience=2.0),
    Slot("glasses", ("glasses", "sunglasses"), (), 0.35, ("front",)),
    Slot("headphones", ("headphones",), CLOTH, 0.20),
    Slot("scarf", ("scarf", "tie"), CLOTH, 0.35, ("front",)),
    Slot("top", ("t-shirt", "shirt", "jacket", "coat", "sweater"), CLOTH, salience=3.0),
    Slot("pattern", ("stripes", "checks", "dots"), CLOTH, 0.40),
    Slot("inner", ("inner shirt",), CLOTH, 1.0, ("front",)),
    Slot("logo", ("round logo", "square logo", "triangle logo"), CLOTH, 0.40, ("front",)),
    Slot("print", ("round print", "cross print", "bar print"), CLOTH, 0.50, ("back",), salience=2.0),
    Slot("wristbands", ("wristbands",), CLOTH, 0.20),
    Slot("gloves", ("gloves",), CLOTH, 0.20),
    Slot("belt", ("belt",), CLOTH, 0.35, ("front", "side")),
    Slot("lower", ("trousers", "shorts", "skirt", "jeans"), CLOTH, salience=3.0),
    Slot("stripe", ("side stripe",), CLOTH, 0.35, ("side",)),
    Slot("socks", ("socks",), CLOTH, 0.70),
    Slot("shoes", ("sneakers", "boots", "sandals"), CLOTH, salience=2.0),
    Slot("backpack", ("backpack",), CLOTH, 0.40, ("back", "side"), salience=2.0),
    Slot("handbag", ("handbag", "shoulder bag", "suitcase"), CLOTH, 0.40, salience=2.0),
    Slot("carried", ("umbrella", "cup", "book"), CLOTH, 0.40, ("front", "side")),
)
SLOT_NAMES = tuple(slot.name for slot in SLOTS)
SLOT_BY_NAME = {slot.name: slot for slot in SLOTS}
NUM_STYLES = 16
STYLE_BIAS = 0.5
FAMILY_SIZE = 3
FAMILY_DIFFERENCES = 6

_STYLES, _FAMILY, _PERSON = 1, 2, 3


@dataclass
class Person:
    """One identity: the value of every slot, and traits that no caption mentions."""

    number: int
    family: int
    style: int
    values: dict[str, Value]
    skin: tuple[int, int, int] = (0, 0, 0)
    bag_hand: str = "right"
    shades: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def has(self, slot: str) -> bool:
        """Whether the person has such a thing at all."""
        return self.values[slot][0] != "none"


def _draw_value(slot: Slot, stream: Stream) -> Value:
    if slot.presence < 1.0 and not stream.chance(slot.presence):
        return NONE
    return stream.choice(slot.kinds), stream.choice(slot.colours) if slot.colours else ""


def make_styles(seed: int) -> list[dict[str, Value]]:
    """The favourite value of every slot in each of the 16 styles."""
    return [
        {slot.name: _draw_value(slot, stream) for slot in SLOTS}
        for stream in (Stream(seed, _STYLES, style) for style in range(NUM_STYLES))
    ]


def _styled_value(slot: Slot, style: dict[str, Value], stream: Stream) -> Value:
    return style[slot.name] if stream.chance(STYLE_BIAS) else _draw_value(slot, stream)


def make_family(
    seed: int, split: int, family: int, size: int, first_number: int, styles: list[dict[str, Value]]
) -> list[Person]:
    """``size`` identities that share every slot but six; in those six any two of them differ.

    Args:
        seed: Seed of the corpus.
        split: Number of the split (its families are its own).
        family: Number of the family within the split.
        size: Members, at most three.
        first_number: Number of the first member within the split.
        styles: What :func:`make_styles` returned.
    """
    stream = Stream(seed, _FAMILY, split, family)
    style_number = stream.below(NUM_STYLES)
    style = styles[style_number]
    base = {slot.name: _styled_value(slot, style, stream) for slot in SLOTS}
    # Slots with a single possible pair of values cannot tell three people apart.
    candidates = [slot for slot in SLOTS if len(slot.kinds) * max(1, len(slot.colours)) + (slot.presence < 1) >= 3]
    differing = stream.shuffled(candidates)[:FAMILY_DIFFERENCES]
    used: dict[str, set[Value]] = {slot.name: set() for slot in differing}
    members = []
    for position in range(size):
        values = dict(base)
        for slot in differing:
            value = base[slot.name] if position == 0 else _styled_value(slot, style, stream)
            while value in used[slot.name]:
                value = _draw_value(slot, stream)
            used[slot.name].add(value)
            values[slot.name] = value
        number = first_number + position
        own = Stream(seed, _PERSON, split, number)
        person = Person(number, family, style_number, values)
        person.skin = own.choice(SKIN)
        person.bag_hand = own.choice(("left", "right"))
        for slot in SLOTS:
            if slot.colours and person.has(slot.name):
                red, green, blue = (HAIR_COLOURS if slot.name == "hair" else COLOURS)[values[slot.name][1]]
                person.shades[slot.name] = (
                    max(0, min(255, red + own.below(25) - 12)),
                    max(0, min(255, green + own.below(25) - 12)),
                    max(0, min(255, blue + own.below(25) - 12)),
                )
        members.append(person)
    return members


def visible_slots(person: Person, view: str, facing: str) -> list[str]:
    """Names of the slots that a picture of the person from this view shows (occluders left aside).

    Args:
        person: The identity.
        view: "front", "back" or "side".
        facing: For "side", which of the person's sides is seen: "left" or "right". Ignored otherwise.
    """
    top, lower, shoes = person.values["top"][0], person.values["lower"][0], person.values["shoes"][0]
    open_top = top in ("jacket", "coat")
    other_hand = "left" if person.bag_hand == "right" else "right"
    hidden = {
        "inner": not open_top,
        "print": person.has("backpack"),
        "belt": top == "coat",
        "stripe": lower == "skirt",
        "socks": lower not in ("shorts", "skirt") or shoes == "boots",
        "handbag": view == "side" and facing != person.bag_hand,
        "carried": view == "side" and facing != other_hand,
    }
    return [
        slot.name for slot in SLOTS if person.has(slot.name) and view in slot.views and not hidden.get(slot.name, False)
    ]
