"""Sections of a page that a command writes: what stands between two markers is made of results, and never typed.

The markers of a section are ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``, each on a line of its own.
README, ``docs/accuracy.md`` and ``docs/training.md`` have such sections; tests hold them to the committed results.
"""

from __future__ import annotations


def fill_section(text: str, name: str, content: str) -> str:
    r"""Return the text with a section's content between its markers; the rest stays as it is.

    >>> fill_section("before\n<!-- results:a -->\nold\n<!-- /results:a -->\nafter", "a", "new").splitlines()
    ['before', '<!-- results:a -->', 'new', '<!-- /results:a -->', 'after']

    Raises:
        ValueError: the text has not both markers.
    """
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise ValueError(f"results:{name}: expected the markers {start} and {end}")
    return f"{before}{start}\n{content}\n{end}{after}"
