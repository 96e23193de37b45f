"""Hostile variants of good things; every choice is one of the generator's."""

import json
import math
from random import Random

INTS = (0, 1, -1, 2, 3, 127, 255, 2**31 - 1, 2**31, -(2**31), 2**53, 2**53 + 1, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, -0.0, 0.5, 1.5, -1.0, 1e-30, 5e-324, 1e30, 3.5e38, 1e308, -1e308, math.nan, math.inf, -math.inf)
TEXTS = (
    "", " ", "x", "\0", "a\nb\r\n", "\x1b[31mred\x1b[0m", "\u202egnp.exe", "\u2066\u2069", "\u200b\u200d\ufeff",
    "\u3164", "\u115f\u1160", "a\u0301\u0300\u0302", "\U0001f469\u200d\U0001f52c", "\U000e0041",
    "../../etc/passwd", "/", "..",
    "con", "<script>alert(1)</script>", "\" onload=\"x", "{{7*7}}", "{% raw %}", "$x_{", "$\\frac{$", "[red]bold[/red]",
    "%s%n%x", "=cmd|' /C calc'!A0", "node 11", "ensemble", "St Mary", "None", "pretrained", "hf-hub:x/y",
    "local-dir:/tmp",
    "\u05d0\u05d1", "\u6f22\u5b57", "\ufdfa", "\uffff", "\U0010ffff",
)  # fmt: skip
SURROGATES = ("\ud800", "a\udfffb")
"""Half characters: JSON can name them, protobuf cannot."""


def number(rng: Random):
    return rng.choice(INTS) if rng.random() < 0.5 else rng.choice(FLOATS)


def text(rng: Random, surrogates: bool = False) -> str:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(TEXTS + SURROGATES * surrogates)
    if kind < 0.9:
        return "".join(chr(letter(rng, surrogates)) for _ in range(rng.randrange(1, 12)))
    return rng.choice(TEXTS[1:]) * rng.choice((10, 100, 1000, 10_000))


def letter(rng: Random, surrogates: bool) -> int:
    code = rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)))
    return code if surrogates or not 0xD800 <= code < 0xE000 else 0x41


def scrambled(rng: Random, data: bytes) -> bytes:
    """Bytes with one to three of them changed, cut out, put in, moved or repeated."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at, length = rng.randrange(len(found) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = rng.choice((rng.randbytes(length), b"\xff" * length, found[:length]))
        elif kind == 4:
            del found[at:]
        else:
            found[at : at + length] = rng.randbytes(length)
    return bytes(found)


def nested(rng: Random):
    """A list or an object in itself, shallow or deeper than any reader goes."""
    inner, kind = rng.choice((1, "x", [])), rng.random() < 0.5
    for _ in range(rng.choice((2, 5, 50))):
        inner = [inner] if kind else {"x": inner}
    return inner


def plain(rng: Random):
    """Any value of JSON."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return text(rng, surrogates=True)
    if kind == 2:
        return nested(rng)
    if kind == 3:
        return [number(rng) for _ in range(rng.choice((0, 1, 2, 3, 4, 5, 300)))]
    if kind == 4:
        return {text(rng, surrogates=True)[:50]: number(rng) for _ in range(rng.randrange(3))}
    return number(rng)


def tree(rng: Random, value, known=()):
    """A value of JSON with one place in it changed, added, taken away or moved.

    `known` has keys that mean something there.
    """
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return plain(rng)
    if isinstance(value, list):
        found = list(value)
        at = rng.randrange(len(found))
        change = rng.randrange(4)
        if change == 0:
            found[at] = tree(rng, found[at], known)
        elif change == 1:
            del found[at]
        elif change == 2:
            found.insert(at, plain(rng))
        else:
            found *= rng.choice((2, 100))
        return found
    found, key = dict(value), rng.choice(list(value))
    change = rng.randrange(6)
    if change < 3:
        found[key] = tree(rng, found[key], known)
    elif change == 3:
        del found[key]
    elif change == 4:
        found[rng.choice(known) if known else text(rng, surrogates=True)] = plain(rng)
    else:
        found[text(rng, surrogates=True)] = found.pop(key)
    return found


def as_json(rng: Random, value) -> str:
    """The text of a value, rarely with what only a text can say: repeated keys, other numbers, endless brackets."""
    found = json.dumps(value)
    kind = rng.random()
    if kind < 0.03:
        return rng.choice(("[", '{"x":', "-", "1" * 10)) * rng.choice((100, 450, 900, 990, 1000, 1500, 5000))
    if kind < 0.05:
        return "[" * (deep := rng.randrange(900, 1000)) + "]" * deep
    if kind < 0.08 and found.endswith("}"):
        return f'{found[:-1]}, "num_classes": {rng.choice(("1e400", "1" * 4000, "-0", "NaN", "1" * 9000, "null"))}}}'
    if kind < 0.12:
        return scrambled(rng, found.encode()).decode(errors="replace")
    return found
