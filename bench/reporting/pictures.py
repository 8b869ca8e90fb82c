"""README's pictures, as SVG: the idea, and the time of a training step at each patch.

One file serves light and dark pages: nothing lies behind the drawing, text on the page is a grey that is legible on
both, and all other text is dark on tiles of its own. A page that follows the reader's system, and not the site that
shows it, would be wrong on PyPI, which is always light.
"""

from __future__ import annotations

from collections.abc import Sequence

GREY = "#7a828c"  # contrast 3.9 on white, 4.9 on GitHub's dark ground
INK = "#1b1f24"  # on tiles only
TILES = ("#8ecae6", "#ffd166", "#a7d877", "#f4a6b8")  # one for each patch
OURS, OTHER = "#d1495b", "#9aa5b1"
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONOSPACE = "ui-monospace, 'SF Mono', Menlo, Consolas, monospace"

PANEL_HEIGHT, PANEL_TOP, BAR, GAP = 170, 62, 30, 28

Bars = Sequence[tuple[int, float | None, float | None]]  # patch, the official code's milliseconds, ours


def _text(x: float, y: float, words: str, **style: str | int) -> str:
    """Return one line of text, centred at ``x`` where nothing else is said."""
    attributes = {"fill": GREY, "font_size": 14, "text_anchor": "middle"} | style
    written = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}" {written}>{words}</text>'


def _code(x: float, y: float, words: str, **style: str | int) -> str:
    """Return a line of text that is code."""
    return _text(x, y, words, font_family=MONOSPACE, **({"font_size": 13} | style))


def _tile(x: float, y: float, width: float, height: float, colour: str, words: str = "") -> str:
    """Return a filled rectangle, with text in its middle."""
    box = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{colour}" stroke="{GREY}"/>'
    return box + (_text(x + width / 2, y + height / 2 + 5, words, fill=INK) if words else "")


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return an arrow, which ends at the second point."""
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{GREY}" stroke-width="1.5" marker-end="url(#head)"/>'


def _dashes(x: float, y: float, width: float) -> str:
    """Return a dashed line from left to right."""
    return f'<path d="M{x:g} {y:.1f}h{width:g}" stroke="{GREY}" stroke-width="2" stroke-dasharray="4 3"/>'


def _document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """Return a whole SVG file; the title is what a screen reader says."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>'
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{title}" font-family="{FONT}">'
    )
    return "\n".join([opening, f"<title>{title}</title>", head, *parts, "</svg>"]) + "\n"


def idea_picture() -> str:
    """Return the idea: a grid of tokens, its patches, their means, and a row that is scored against the next patch."""
    cell, top = 34, 62
    parts = [_text(16 + 2 * cell, 24, "a grid of tokens"), _code(16 + 2 * cell, 44, "[B, 4, 4]")]
    for token in range(16):
        row, column = divmod(token, 4)
        colour = TILES[row // 2 * 2 + column // 2]
        parts.append(_tile(16 + column * cell, top + 12 + row * cell, cell - 3, cell - 3, colour, str(token)))

    # Every line of what follows is one patch.
    line, left = 44, 242
    middles = [top - 9 + line * patch + line / 2 for patch in range(4)]
    parts += [_arrow(160, 141, 234, 141), _code(197, 262, "group_tokens")]
    parts += [_text(left + 62, 24, "patches of K = 4"), _code(left + 62, 44, "[B, P, K]")]
    for patch, middle in enumerate(middles):
        first = patch // 2 * 8 + patch % 2 * 2
        for place, token in enumerate((first, first + 1, first + 4, first + 5)):
            parts.append(_tile(left + 31 * place, middle - 15, 29, 30, TILES[patch], str(token)))

    parts += [_text(452, 24, "one input each"), _code(452, 44, "[B, P, D]")]
    parts.append(_code(452, 262, "group_mean"))
    for patch, middle in enumerate(middles[:3]):
        parts += [_arrow(left + 128, middle, 412, middle), _tile(416, middle - 12, 72, 24, TILES[patch], "mean")]
    parts.append(_text(452, middles[3] + 5, "(nothing after it)", font_size=12))

    parts.append(
        f'<rect x="528" y="{top - 6}" width="104" height="136" rx="10" fill="none" stroke="{GREY}" stroke-width="1.5"/>'
    )
    parts += [_text(580, 116, "your"), _text(580, 136, "transformer"), _text(580, 164, "P rows", font_size=12)]
    parts.append(_text(580, 182, "instead of P·K", font_size=12))

    parts += [_text(770, 24, "each row is scored against"), _text(770, 44, "all 4 tokens of the next patch")]
    for patch, middle in enumerate(middles[:3]):
        parts += [_arrow(490, middle, 522, middle), _arrow(636, middle, 664, middle)]
        parts.append(_tile(668, middle - 12, 40, 24, TILES[patch], "row"))
        parts.append(_arrow(712, middle, 744, middle))
        first = (patch + 1) // 2 * 8 + (patch + 1) % 2 * 2
        for place, token in enumerate((first, first + 1, first + 4, first + 5)):
            parts.append(_tile(750 + 31 * place, middle - 15, 29, 30, TILES[patch + 1], str(token)))
    parts.append(_code(770, 262, "linear_patch_cross_entropy"))
    parts.append(_text(770, 236, "one softmax a row; no logits are repeated", font_size=12))
    title = "16 tokens in 4 patches; each enters as the mean of its embeddings and predicts the 4 tokens of the next"
    return _document(890, 280, title, parts)


def step_picture(panels: Sequence[tuple[str, Bars]]) -> str:
    """Return bars of a step's milliseconds at each patch, the official code's beside ours, a panel for each model."""
    parts = [
        _tile(16, 14, 16, 14, OTHER),
        _text(40, 26, "official NPP code, compiled", text_anchor="start"),
        _tile(256, 14, 16, 14, OURS),
        _text(280, 26, "npp_kernels, reference trainer", text_anchor="start"),
        _dashes(520, 21, 22),
        _text(550, 26, "our patch 1, divided by K", text_anchor="start"),
    ]
    floor, x = PANEL_TOP + PANEL_HEIGHT, 16
    for name, bars in panels:
        measured = [figure for _, *pair in bars for figure in pair if figure is not None]
        if not measured:
            continue
        scale = (PANEL_HEIGHT - 22) / max(measured)
        plain = next((ours for patch, _, ours in bars if patch == 1), None)
        start = x
        for patch, official, ours in bars:
            for offset, figure, colour in ((0, official, OTHER), (BAR + 2, ours, OURS)):
                if figure is None:
                    continue
                height = max(figure * scale, 1)
                parts.append(_tile(x + offset, floor - height, BAR, height, colour))
                shown = f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"
                parts.append(_text(x + offset + BAR / 2, floor - height - 6, shown, font_size=12))
            if plain is not None and patch > 1:
                y = floor - plain / patch**2 * scale
                parts.append(_dashes(x + BAR, y, BAR + 8))
            parts.append(_text(x + BAR + 1, floor + 18, f"patch {patch}", font_size=12))
            x += 2 * BAR + GAP
        parts.append(f'<path d="M{start - 4} {floor}H{x - GAP + 8}" stroke="{GREY}"/>')
        parts.append(_text((start + x - GAP) / 2, floor + 42, f"{name}: ms a step"))
        x += GAP
    return _document(max(x - GAP, 740), floor + 56, "Milliseconds of a training step at each patch", parts)
