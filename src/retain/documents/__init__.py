"""YAML and JSON that others may have written, read within bounds.

All that is read here is plain data (mappings, lists, texts, finite numbers, true, false, null), of
a bounded size and depth. Anything else is an `Unreadable` with one line that says why, and where:

- only regular files are read: no device, pipe or folder;
- YAML is YAML 1.2's core schema (``true`` and ``false`` alone are truth values, so ``on`` and
  ``no`` are words), without tags, and an alias counts as often as it is used;
- a key that is there twice is refused, not overwritten;
- a whole number has 64 bits at most, and any other number is finite.

JSON of ours may be **sealed**: its key ``digest`` is a digest of all the others, so that what a
disk or a hand has changed is not taken for what was written. Earlier versions wrote none.
"""

from __future__ import annotations

from retain.documents.bounds import LARGE, SMALL, Unreadable
from retain.documents.json_text import parse_json
from retain.documents.reading import read_json, read_mapping, read_text, sealed
from retain.documents.yaml_text import parse_yaml

__all__ = [
    "LARGE",
    "SMALL",
    "Unreadable",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_mapping",
    "read_text",
    "sealed",
]
