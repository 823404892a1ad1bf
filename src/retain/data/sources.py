"""Read source text and training rows from a data set, a file, or the model itself.

Rows are dictionaries; docs/data.md says what they may hold, and where they may come from.
"""

from __future__ import annotations

from retain.data.contents import Row
from retain.data.encoding import encode
from retain.data.labels import UNLABELLED
from retain.data.readers import read_rows

__all__ = ["UNLABELLED", "Row", "encode", "read_rows"]
