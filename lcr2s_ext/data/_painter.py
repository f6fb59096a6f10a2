"""Draws one person of the generated corpus as a small picture: 128 x 64 pixels, then reduced to the stored size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lcr2s_ext.data._people import Person
from lcr2s_ext.data._stream import Stream

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

HEIGHT, WIDTH = 128, 64
NUM_CAMERAS = 5

Rgb = tuple[int, int, int]


def _shade(colour: Rgb, factor: float) -> Rgb:
    return (
        max(0, min(255, int(colour[0] * factor))),
        max(0, min(255, int(colour[1] * factor))),
        max(0, min(255, int(colour[2] * factor))),
    )


class _Pen:
    """Draws in body coordinates (x 0..64 with the body's middle at 32, y 0..128), placed and scaled in the picture."""

    def __init__(self, draw: ImageDraw.ImageDraw, shift_x: float, shift_y: float, scale: float, mirror: bool) -> None:
        self.draw, self.shift_x, self.shift_y, self.scale = draw, shift_x, shift_y, scale
        self.sign = -1.0 if mirror else 1.0

    def x(self, value: float) -> float:
        return 32 + self.shift_x + self.sign * self.scale * (value - 32)

    def y(self, value: float) -> float:
        return 64 + self.shift_y + self.scale * (value - 64)

    def _corners(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        a, b = self.x(left), self.x(right)
        return min(a, b), self.y(top), max(a, b), self.y(bottom)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Rgb) -> None:
        self.draw.rectangle(self._corners(left, top, right, bottom), fill=fill)

    def oval(self, left: float, top: float, right: float, bottom: float, fill: Rgb) -> None:
        self.draw.ellipse(self._corners(left, top, right, bottom), fill=fill)

    def shape(self, points: Sequence[tuple[float, float]], fill: Rgb) -> None:
        self.draw.polygon([(self.x(px), self.y(py)) for px, py in points], fill=fill)

    def line(self, points: Sequence[tuple[float, float]], fill: Rgb, width: int) -> None:
        self.draw.line([(self.x(px), self.y(py)) for px, py in points], fill=fill, width=width)

    def arc(self, left: float, top: float, right: float, bottom: float, fill: Rgb, width: int) -> None:
        self.draw.arc(self._corners(left, top, right, bottom), 180, 360, fill=fill, width=width)


def _background(draw: ImageDraw.ImageDraw, camera: int, scene: Stream) -> None:
    wall = (128 + 10 * camera, 132 + 9 * ((camera * 2) % 5), 130 + 10 * ((camera * 3) % 5))
    ground = (96 + 10 * ((camera * 3) % 5), 98 + 9 * ((camera * 2) % 5), 92 + 9 * camera)
    wall, ground = _shade(wall, scene.between(0.75, 1.2)), _shade(ground, scene.between(0.75, 1.2))
    horizon = scene.between(60, 100)
    draw.rectangle((0, 0, WIDTH, horizon), fill=wall)
    draw.rectangle((0, horizon, WIDTH, HEIGHT), fill=ground)
    for _ in range(scene.below(4)):
        left, top = scene.between(-10, 60), scene.between(-10, horizon)
        colour = _shade(wall, scene.between(0.5, 1.4))
        draw.rectangle((left, top, left + scene.between(3, 22), top + scene.between(8, 60)), fill=colour)
    for _ in range(scene.below(3)):
        offset = scene.between(horizon, HEIGHT)
        draw.line(
            (0, offset, WIDTH, offset + scene.between(-12, 12)),
            fill=_shade(ground, scene.between(0.7, 1.3)),
            width=2,
        )


def _legs(pen: _Pen, person: Person, view: str, swing: float, skin: Rgb) -> None:
    values, shades = person.values, person.shades
    lower, shoes = values["lower"][0], values["shoes"][0]
    cloth, leather = shades["lower"], shades["shoes"]
    if view == "side":
        feet = ((32 - swing, 0.82), (32 + swing, 1.0))
        hips, thickness = (32.0, 32.0), 9.0
    else:
        feet = ((26 - 0.15 * swing, 1.0), (38 + 0.15 * swing, 0.94))
        hips, thickness = (26.5, 37.5), 10.0
    for (foot, light), hip in zip(feet, hips, strict=True):

        def at(height: float, hip: float = hip, foot: float = foot) -> float:
            return hip + (foot - hip) * (height - 64) / 52

        def limb(top: float, bottom: float, half: float, fill: Rgb, at=at) -> None:  # type: ignore[no-untyped-def]
            upper, end = at(top), at(bottom)
            pen.shape(
                (
                    (upper - half, top),
                    (upper + half, top),
                    (end + half * 0.9, bottom),
                    (end - half * 0.9, bottom),
                ),
                fill,
            )

        half = thickness / 2
        covered = {"shorts": 88.0, "skirt": 86.0}.get(lower, 117.0)
        limb(62, 118, half * 0.8, _shade(skin, light))
        if person.has("socks") and covered < 117 and shoes != "boots":
            limb(99, 118, half * 0.86, _shade(shades["socks"], light))
        limb(62, covered, half, _shade(cloth, light))
        if lower == "jeans":
            seam = _shade((190, 160, 90), light)
            pen.line(((at(64), 64), (at(115), 115)), seam, 1)
            pen.box(at(113) - half, 112, at(113) + half, 116, _shade(cloth, 1.5 * light + 0.1))
        if view == "side" and person.has("stripe") and lower != "skirt":
            pen.line(((at(66), 66), (at(covered), covered - 1)), shades["stripe"], 3)
        end = at(117)
        toe = 5.0 if view == "side" else 1.0
        if shoes == "boots":
            limb(101, 118, half * 1.1, _shade(leather, light))
            pen.box(end - half, 114, end + half + toe, 121, _shade(leather, light))
        elif shoes == "sandals":
            pen.box(end - half, 116, end + half + toe, 121, _shade(skin, light))
            pen.box(end - half, 119, end + half + toe, 121.5, _shade(leather, light))
            pen.box(end - 1, 115, end + 1.5, 120, _shade(leather, light))
        else:
            pen.oval(end - half - 0.5, 113.5, end + half + toe + 0.5, 123, _shade(leather, light))
            pen.box(end - half, 120.5, end + half + toe, 122, (225, 225, 225))
    if lower == "skirt":
        if view == "side":
            pen.shape(((26, 62), (38, 62), (41, 88), (23, 88)), cloth)
        else:
            pen.shape(((21, 62), (43, 62), (46, 88), (18, 88)), cloth)


def _pattern(pen: _Pen, kind: str, colour: Rgb, left: float, right: float, bottom: float) -> None:
    if kind in ("stripes", "checks"):
        for height in range(32, int(bottom) - 1, 7):
            pen.box(left, height, right, height + 2.2, colour)
    if kind == "checks":
        for x in range(int(left) + 2, int(right) - 1, 6):
            pen.box(x, 29, x + 1.6, bottom, colour)
    if kind == "dots":
        for row, height in enumerate(range(32, int(bottom) - 2, 6)):
            for x in range(int(left) + 1 + 3 * (row % 2), int(right) - 2, 6):
                pen.oval(x, height, x + 3, height + 3, colour)


def _arm(
    pen: _Pen, person: Person, shoulder: float, hand: float, light: float, skin: Rgb, thickness: float = 6.0
) -> None:
    def at(height: float) -> float:
        return shoulder + (hand - shoulder) * (height - 29) / 37

    def part(top: float, bottom: float, fill: Rgb, half: float = thickness / 2) -> None:
        a, b = at(top), at(bottom)
        pen.shape(((a - half, top), (a + half, top), (b + half * 0.9, bottom), (b - half * 0.9, bottom)), fill)

    part(29, 66, _shade(skin, light))
    short = person.values["top"][0] == "t-shirt"
    part(29, 42 if short else 62, _shade(person.shades["top"], light * 0.92))
    if person.has("wristbands"):
        part(55, 61, _shade(person.shades["wristbands"], light), thickness / 2 + 0.8)
    if person.has("gloves"):
        pen.oval(at(66) - 3.6, 61, at(66) + 3.6, 70, _shade(person.shades["gloves"], light))
    else:
        pen.oval(at(66) - 2.6, 62, at(66) + 2.6, 69, _shade(skin, light))


def _torso(pen: _Pen, person: Person, view: str, swing: float, skin: Rgb) -> None:
    values, shades = person.values, person.shades
    top = values["top"][0]
    colour = shades["top"]
    bottom = 84.0 if top == "coat" else 66.0
    woman = values["gender"][0] == "woman"
    if view == "side":
        left, right = (25.0, 40.0) if woman else (24.0, 40.5)
    else:
        left, right = (20.5, 43.5) if woman else (18.5, 45.5)
    if view != "side":
        _arm(pen, person, left - 1, left - 4 - 0.2 * swing, 0.95, skin)
        _arm(pen, person, right + 1, right + 4 + 0.2 * swing, 0.95, skin)
    waist = 1.8 if woman else 0.0
    pen.shape(
        ((left, 28), (right, 28), (right - waist, 50), (right, bottom), (left, bottom), (left + waist, 50)),
        colour,
    )
    if person.has("pattern"):
        _pattern(pen, values["pattern"][0], shades["pattern"], left + waist, right - waist, bottom)
    if top == "coat":
        pen.line(((32, 66), (32, bottom)), _shade(colour, 0.6), 1)
    if top == "sweater":
        pen.box(left, 63, right, 67, _shade(colour, 0.7))
        pen.box(27, 26, 37, 30, _shade(colour, 0.7))
    if view == "front":
        if top in ("jacket", "coat"):
            pen.shape(((27, 28), (37, 28), (35.5, min(bottom, 66)), (28.5, min(bottom, 66))), shades["inner"])
        elif top == "shirt":
            pen.line(((32, 28), (32, bottom)), _shade(colour, 0.55), 1)
            pen.shape(((28, 27), (36, 27), (32, 33)), _shade(colour, 1.35))
        if person.has("logo"):
            mark, middle = shades["logo"], 39.8 if top in ("jacket", "coat") else 37.5
            kind = values["logo"][0]
            if kind == "round logo":
                pen.oval(middle - 3.6, 37, middle + 3.6, 45, mark)
            elif kind == "square logo":
                pen.box(middle - 3.4, 37.5, middle + 3.4, 44.5, mark)
            else:
                pen.shape(((middle, 36.5), (middle + 4, 45), (middle - 4, 45)), mark)
    if view == "back" and person.has("print") and not person.has("backpack"):
        mark, kind = shades["print"], values["print"][0]
        if kind == "round print":
            pen.oval(25, 35, 39, 51, mark)
        elif kind == "cross print":
            pen.box(29.5, 34, 34.5, 53, mark)
            pen.box(24, 40.5, 40, 46, mark)
        else:
            pen.box(22, 38, 42, 47, mark)
    if view != "back" and person.has("belt") and top != "coat":
        pen.box(left, 63, right, 67.5, shades["belt"])
    if view == "side":
        _arm(pen, person, 32, 32 + 0.8 * swing, 1.0, skin, 7.0)


def _head(pen: _Pen, person: Person, view: str, skin: Rgb) -> None:
    values, shades = person.values, person.shades
    style, hair = values["hair"][0], shades["hair"]
    if style == "long hair":
        if view == "side":
            pen.box(22.5, 13, 30, 38, hair)
        else:
            pen.box(23, 12, 41, 37, hair)
    elif style == "ponytail" and view == "side":
        pen.shape(((25, 13), (17, 18), (18, 32), (22, 31), (24, 20)), hair)
    pen.box(29, 23, 35.5, 29, _shade(skin, 0.86))
    pen.oval(25, 8, 39, 26, skin)
    if style == "curly hair":
        for x, y in ((23, 9), (27, 5), (32, 4.5), (36, 9), (22.5, 14), (36.5, 14)):
            if view != "side" or x < 34:
                pen.oval(x, y, x + 6.5, y + 7.5, hair)
        pen.oval(25, 7, 39, 14, hair)
        if view == "back":
            pen.oval(23.5, 8, 40.5, 25, hair)
    elif view == "back":
        pen.oval(24.5, 6.5, 39.5, 25, hair)
        if style == "long hair":
            pen.box(24, 16, 40, 38, hair)
        elif style == "ponytail":
            pen.shape(((30, 16), (34, 16), (35.5, 40), (28.5, 40)), hair)
    elif view == "side":
        pen.shape(((25, 20), (24, 12), (28, 7), (35, 6.5), (39, 10), (38, 12), (31, 13), (30, 21)), hair)
    else:
        pen.shape(
            ((25, 17), (25, 10), (29, 6.5), (35, 6.5), (39, 10), (39, 17), (37.5, 13), (32, 11), (26.5, 13)),
            hair,
        )
    if person.has("headwear"):
        kind, colour = values["headwear"][0], shades["headwear"]
        pen.shape(((24.5, 12.5), (25, 7), (29, 3.5), (35, 3.5), (39, 7), (39.5, 12.5)), colour)
        if kind == "cap":
            if view == "side":
                pen.box(37, 10.5, 45.5, 12.8, _shade(colour, 0.75))
            elif view == "front":
                pen.oval(25, 10, 39, 14.5, _shade(colour, 0.75))
        elif kind == "beanie":
            pen.oval(29.5, 0, 34.5, 5, _shade(colour, 1.2))
            pen.box(24.3, 10, 39.7, 13.4, _shade(colour, 0.75))
        else:
            pen.box(20, 10.6, 44, 13, _shade(colour, 0.8))
    if person.has("headphones"):
        colour = shades["headphones"]
        pen.arc(23, 4, 41, 26, colour, 2)
        if view == "side":
            pen.oval(28.5, 12.5, 34.5, 20.5, colour)
        else:
            pen.oval(22, 12.5, 26.5, 20.5, colour)
            pen.oval(37.5, 12.5, 42, 20.5, colour)
    if view == "front":
        dark = (18, 18, 20)
        if values["glasses"][0] == "sunglasses":
            pen.box(26, 14.5, 31, 18.8, dark)
            pen.box(33, 14.5, 38, 18.8, dark)
            pen.line(((26, 15), (38, 15)), dark, 1)
        elif values["glasses"][0] == "glasses":
            pen.line(((26, 15), (31, 15), (31, 19), (26, 19), (26, 15)), dark, 1)
            pen.line(((33, 15), (38, 15), (38, 19), (33, 19), (33, 15)), dark, 1)
            pen.line(((31, 16), (33, 16)), dark, 1)
        else:
            pen.box(28, 15.5, 29.6, 17, dark)
            pen.box(34.4, 15.5, 36, 17, dark)
        pen.line(((30, 22), (34, 22)), _shade(skin, 0.6), 1)
        if values["scarf"][0] == "scarf":
            pen.oval(25.5, 24.5, 38.5, 31.5, shades["scarf"])
            pen.box(33, 29, 37, 43, shades["scarf"])
        elif values["scarf"][0] == "tie":
            pen.shape(((30.6, 28), (33.4, 28), (34.6, 46), (32, 49), (29.4, 46)), shades["scarf"])
    elif view == "side":
        pen.box(36, 15.5, 37.4, 17, (18, 18, 20))


def _belongings(pen: _Pen, person: Person, view: str, facing: str, swing: float) -> None:
    values, shades = person.values, person.shades
    if person.has("backpack"):
        colour = shades["backpack"]
        if view == "back":
            pen.oval(21.5, 29, 42.5, 40, colour)
            pen.box(21.5, 34, 42.5, 58, colour)
            pen.box(24.5, 46, 39.5, 56, _shade(colour, 0.7))
        elif view == "side":
            pen.oval(14, 30, 27, 42, colour)
            pen.box(14, 36, 26, 58, colour)
            pen.box(27, 29, 29.5, 46, _shade(colour, 0.8))
        else:
            pen.box(22, 28, 24.6, 48, colour)
            pen.box(39.4, 28, 42, 48, colour)
    # The person's right hand is on the viewer's left from the front, on the viewer's right from behind.
    on_left = (person.bag_hand == "right") == (view == "front")
    if person.has("handbag") and (view != "side" or facing == person.bag_hand):
        kind, colour = values["handbag"][0], shades["handbag"]
        hand = 32 + 0.8 * swing if view == "side" else (14.0 if on_left else 50.0)
        if kind == "handbag":
            pen.line(((hand - 4, 76), (hand, 67), (hand + 4, 76)), _shade(colour, 0.7), 2)
            pen.box(hand - 7, 75, hand + 7, 88, colour)
        elif kind == "shoulder bag":
            if view == "side":
                pen.line(((32, 28), (32, 62)), _shade(colour, 0.75), 3)
                pen.box(24, 58, 41, 72, colour)
            else:
                pen.line(((44 if on_left else 20, 28), (18 if on_left else 46, 62)), _shade(colour, 0.75), 3)
                low = 11 if on_left else 39
                pen.box(low, 58, low + 14, 72, colour)
        else:
            pen.line(((hand, 67), (hand, 90)), (70, 70, 74), 2)
            pen.box(hand - 8, 90, hand + 7, 117, colour)
            pen.box(hand - 8, 102, hand + 7, 104, _shade(colour, 0.6))
    other = "left" if person.bag_hand == "right" else "right"
    if person.has("carried") and view != "back" and (view != "side" or facing == other):
        kind, colour = values["carried"][0], shades["carried"]
        hand = 32 + 0.8 * swing if view == "side" else (50.0 if on_left else 14.0)
        if kind == "umbrella":
            pen.shape(((hand - 3.5, 62), (hand + 3.5, 62), (hand + 0.8, 104), (hand - 0.8, 104)), colour)
        elif kind == "cup":
            pen.shape(((hand - 4, 55), (hand + 4, 55), (hand + 3, 66), (hand - 3, 66)), colour)
            pen.box(hand - 4.4, 53.5, hand + 4.4, 56, (240, 240, 240))
        else:
            pen.box(hand - 6, 56, hand + 6, 70, colour)
            pen.box(hand - 6, 56, hand - 4, 70, (240, 240, 230))


def _occluder(draw: ImageDraw.ImageDraw, scene: Stream) -> None:
    grey = scene.between(40, 170)
    colour = (int(grey), int(grey * scene.between(0.8, 1.1)), int(grey * scene.between(0.7, 1.1)))
    kind = scene.below(3)
    if kind == 0:
        left = scene.between(0, WIDTH - 8)
        draw.rectangle((left, 0, left + scene.between(4, 9), HEIGHT), fill=colour)
    elif kind == 1:
        draw.rectangle((0, HEIGHT - scene.between(10, 34), WIDTH, HEIGHT), fill=colour)
    else:
        left, top = scene.between(-8, 50), scene.between(30, 110)
        draw.ellipse((left, top, left + scene.between(14, 26), top + scene.between(14, 30)), fill=colour)


def render(person: Person, view: str, facing: str, camera: int, scene: Stream, size: tuple[int, int]) -> Image.Image:
    """One picture of a person.

    Args:
        person: The identity.
        view: "front", "back" or "side".
        facing: For "side", which of the person's sides is seen, "left" or "right".
        camera: Number of the camera, which sets background and colour cast.
        scene: Draws of this picture: position, pose, light, occluder, blur and noise.
        size: Height and width of the picture returned, in pixels.

    Returns:
        An RGB image of the given size.
    """
    from PIL import Image, ImageDraw, ImageFilter

    image = Image.new("RGB", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(image)
    _background(draw, camera, scene)
    scale = scene.between(0.90, 1.04)
    # Drawn looking to the viewer's right, which shows the person's right side.
    mirror = view == "side" and facing == "left"
    pen = _Pen(draw, scene.between(-5, 5), scene.between(-3, 3), scale, mirror)
    swing = scene.between(2, 9) * (1 if scene.chance(0.5) else -1)
    skin = _shade(person.skin, scene.between(0.92, 1.06))
    _legs(pen, person, view, swing, skin)
    _torso(pen, person, view, swing, skin)
    _head(pen, person, view, skin)
    _belongings(pen, person, view, facing, swing)
    if scene.chance(0.25):
        _occluder(draw, scene)
    height, width = size
    if (height, width) != (HEIGHT, WIDTH):
        smaller = height <= HEIGHT and width <= WIDTH
        image = image.resize((width, height), Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR)
    if scene.chance(0.4):
        image = image.filter(ImageFilter.GaussianBlur(scene.between(0.3, 0.9) * height / 64))
    gain = scene.between(0.75, 1.15)
    cast = [gain * (1 + 0.05 * math.sin(1.3 * camera + 2.1 * c) + scene.between(-0.04, 0.04)) for c in range(3)]
    deviation = scene.between(2.0, 8.0)
    offset = scene.between(-8, 14)
    pixels = np.asarray(image, dtype=np.float32) * np.asarray(cast, dtype=np.float32)
    # A sum of uniform bytes is near enough to a normal deviate, costs little and is the same in every numpy.
    raw = np.frombuffer(scene.generator.bytes(4 * pixels.size), dtype=np.uint8).reshape(4, *pixels.shape)
    noise = (raw.sum(axis=0, dtype=np.float32) - 510.0) * np.float32(deviation / 147.8)
    return Image.fromarray(np.clip(pixels + noise + np.float32(offset), 0, 255).astype(np.uint8))
