"""From matplotlib's SVG file to an SVG that can live inside a page, beside others, and be read aloud."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

__all__ = ["inline"]

_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_UNWANTED = {f"{{{_SVG}}}{tag}" for tag in ("metadata", "style", "title")}
_FONT = re.compile(r"font-family:[^;]*;?\s*")
_NUMBER = re.compile(r"(\d+\.\d{2})\d+")


def inline(document: str, name: str, title: str, description: str) -> str:
    """Return ``document`` (as matplotlib writes it) for use inside HTML.

    Its ids are prefixed with ``name``, so that they stay unique in the page; its size and its font are left to the
    page's style sheet; ``title`` and ``description`` become its accessible name.
    """
    root = ET.fromstring(document)
    _strip(root)
    for element in root.iter():
        _adapt(element, name)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for index, (tag, text) in enumerate((("title", title), ("desc", description))):
        child = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        child.text = text
        root.insert(index, child)
    ET.register_namespace("", _SVG)
    return ET.tostring(root, encoding="unicode")


def _strip(root: ET.Element) -> None:
    """Drop the metadata, the title (ours is better placed) and the style sheet, whose ``*`` would reach the page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in _UNWANTED:
                parent.remove(child)


def _adapt(element: ET.Element, name: str) -> None:
    element.text = element.text if element.text and element.text.strip() else None
    element.tail = None
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == _HREF:
            del element.attrib[key]
            element.set("href", f"#{name}-{value[1:]}")
        elif key == "style":
            element.set(key, _FONT.sub("", value))
        elif key == "d":
            element.set(key, _NUMBER.sub(r"\1", " ".join(value.split())))
        elif value.startswith("url(#"):
            element.set(key, f"url(#{name}-{value[5:]}")
