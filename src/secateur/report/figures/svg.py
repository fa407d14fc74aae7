"""Adapt matplotlib's SVG files for use inside an HTML page."""

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
    """Adapt ``document``, an SVG file of matplotlib, for use inside HTML.

    Ids get the prefix ``name`` to be unique in the page. Size and font are removed: the page's style sheet sets them.
    ``title`` and ``description`` become the accessible name.
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
    """Remove metadata, title and style sheet; the style sheet's ``*`` rule would apply to the whole page."""
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
