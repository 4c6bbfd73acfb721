"""Draw the pictures of the concept pages: python docs/drawings.py writes docs/images/*.svg.

Each has its own background and both palettes, so that it can be read on a light and on a dark page. They are
480 wide, so that their letters are still 11 pixels high on a telephone.
"""

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
WIDTH = 480
STYLE = """
  .ground { fill: #fbfbf9; stroke: #d5d5d0 }
  .box { fill: #ffffff; stroke: #53575e }
  .one { fill: #d6e6f5 } .two { fill: #f8dfc4 } .three { fill: #d5ecd5 }
  .sum { fill: #e7dcf3; stroke: #6b4fa0 }
  .frame, .line { fill: none; stroke: #53575e; stroke-width: 1.5 }
  .dashed { stroke-dasharray: 5 4 }
  .head { fill: #53575e }
  text { fill: #1d2025; font: 15px system-ui, sans-serif }
  .small { font-size: 13px } .strong { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #1a1c1f; stroke: #3b3f45 }
    .box { fill: #24272b; stroke: #a9adb5 }
    .one { fill: #23425f } .two { fill: #5c3d18 } .three { fill: #244a28 }
    .sum { fill: #43315f; stroke: #b9a2e3 }
    .frame, .line { stroke: #a9adb5 }
    .head { fill: #a9adb5 }
    text { fill: #eceef1 }
  }
"""


def box(
    x: float, y: float, width: float, height: float, *lines: str, kind: str = "", small: bool = False
) -> str:
    """A rectangle with lines of text in its middle."""
    size = 17 if small else 19
    first = y + height / 2 + 5 - size * (len(lines) - 1) / 2
    texts = (
        text(x + width / 2, first + size * number, line, "small" if small else "")
        for number, line in enumerate(lines)
    )
    rectangle = f'<rect class="box {kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>'
    return rectangle + "".join(texts)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def frame(x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="frame dashed" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'


def line(*points: tuple[float, float], kind: str = "", head: bool = False) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    end = ' marker-end="url(#head)"' if head else ""
    return f'<polyline class="line {kind}" points="{path}"{end}/>'


def drawing(height: float, title: str, *parts: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
        ' orient="auto"><path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>\n'
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def a_round() -> str:
    """Three parties with uneven steps, then one exchange."""
    parts = []
    for number, (kind, steps) in enumerate((("one", 6), ("two", 4), ("three", 5))):
        y = 62 + 50 * number
        parts.append(text(14, y + 20, f"party {number}", anchor="start"))
        parts += [box(78 + 28 * step, y, 25, 30, kind=kind) for step in range(steps)]
        parts.append(line((78 + 28 * steps, y + 15), (256, y + 15), kind="dashed"))
        parts += [box(365 + 28 * step, y, 25, 30, kind=kind) for step in range(3)]
        parts.append(line((449, y + 15), (468, y + 15), head=True))
    parts += [
        text(162, 34, "local steps"),
        text(301, 34, "one exchange"),
        text(412, 34, "next round"),
        box(
            258,
            52,
            86,
            150,
            "sum over",
            "the parties",
            "result:",
            "same bits",
            "at all",
            kind="sum",
            small=True,
        ),
        line((344, 127), (362, 127), head=True),
        text(14, 230, "Early parties wait (dashed). Validation and checkpoint", "small", "start"),
        text(14, 248, "follow the exchange, so they see the shared result.", "small", "start"),
    ]
    return drawing(264, "A round: local steps at each party, then one exchange", *parts)


def parties() -> str:
    """One launch, and separate jobs."""
    parts = [text(16, 30, "One launch: if one fails, all stop", "strong", "start"), frame(14, 42, 452, 124)]
    kinds = ("one", "two", "three")
    for number, kind in enumerate(kinds):
        x = 30 + 148 * number
        parts.append(box(x, 58, 124, 72, f"party {number}", "Trainer", "its own data", kind=kind))
    parts += [
        line((154, 94), (178, 94)),
        line((302, 94), (326, 94)),
        line((92, 130), (92, 144), (388, 144), (388, 130)),
        text(240, 160, "in memory or over Gloo", "small"),
        text(16, 200, "Separate jobs: if one fails, the others continue", "strong", "start"),
        box(160, 216, 160, 46, "rendezvous", "sees no parameter", kind="", small=True),
    ]
    for number, (kind, name) in enumerate(zip(kinds, ("clinic-a", "clinic-b", "clinic-c"), strict=True)):
        x = 30 + 148 * number
        parts.append(frame(x - 9, 304, 142, 100))
        parts.append(box(x, 314, 124, 56, name, "its own data", kind=kind))
        parts.append(text(x + 62, 394, "a host of its own", "small"))
        parts.append(line((x + 62, 314), (240, 262), kind="dashed"))
    parts += [
        line((154, 342), (178, 342)),
        line((302, 342), (326, 342)),
        line((92, 404), (92, 420), (388, 420), (388, 404)),
        text(240, 437, "sums over direct connections, optional TLS", "small"),
    ]
    return drawing(450, "Parties of one launch, and parties as separate jobs", *parts)


def who_sees_what() -> str:
    """What an update passes on its way out of a party."""
    rows = [
        ("records, local steps", "one", "stays in the party"),
        ("the update", "one", "parameters minus anchor"),
        ("clip, add noise", "three", "privacy=..., optional"),
        ("compress, or mask", "three", "exchange=..., optional"),
    ]
    parts = [frame(12, 14, 456, 228), text(456, 36, "inside the party", "small", "end")]
    for number, (words, kind, remark) in enumerate(rows):
        y = 46 + 48 * number
        parts.append(box(26, y, 208, 34, words, kind=kind))
        parts.append(text(250, y + 22, remark, "small", "start"))
        if number + 1 < len(rows):
            parts.append(line((130, y + 34), (130, y + 47), head=True))
    parts += [
        line((130, 224), (130, 262), head=True),
        box(26, 264, 208, 44, "sum over the parties", kind="sum"),
        text(250, 270, "plain: parties see summands", "small", "start"),
        text(250, 288, "secure aggregation: only", "small", "start"),
        text(250, 306, "the sum is revealed", "small", "start"),
        line((130, 308), (130, 334), head=True),
        box(26, 336, 208, 44, "global parameters", kind="sum"),
        text(250, 354, "all parties see them; noise", "small", "start"),
        text(250, 372, "bounds what they reveal", "small", "start"),
    ]
    return drawing(396, "What an update passes on its way out of a party, and who sees it", *parts)


def decision() -> str:
    """How separate jobs commit a round."""
    steps = [
        ("join", "each: present, with this state"),
        ("quorum", "once: who takes part"),
        ("exchange", "the members sum, into buffers"),
        ("vote", "each: stored, with this digest"),
        ("commit", "once: commit or abort"),
    ]
    parts = []
    for number, (name, words) in enumerate(steps):
        y = 20 + 52 * number
        kind = "sum" if name in ("quorum", "commit") else "one"
        parts.append(box(96, y, 104, 34, name, kind=kind))
        parts.append(text(214, y + 22, words, "small", "start"))
        if number:
            parts.append(line((148, y - 18), (148, y - 2), head=True))
    parts += [
        line((148, 262), (148, 288), head=True),
        box(96, 290, 104, 34, "write", kind="three"),
        text(214, 312, "only now a parameter changes", "small", "start"),
        line((96, 245), (40, 245), (40, 37), (93, 37), kind="dashed", head=True),
        f'<g transform="rotate(-90 28 140)">{text(28, 140, "abort: retry with those left", "small")}</g>',
    ]
    return drawing(340, "How separate jobs commit a round", *parts)


DRAWINGS = {"round": a_round, "parties": parties, "who_sees_what": who_sees_what, "decision": decision}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")
