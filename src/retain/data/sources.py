"""Read source text and training rows from a data set, a file, or Python, and tokenise them.

Rows are dictionaries; docs/data.md says what they may hold.
"""

from __future__ import annotations

from retain.data.encoding import encode
from retain.data.labels import UNLABELLED
from retain.data.readers import Row, read_rows

__all__ = ["UNLABELLED", "Row", "encode", "read_rows"]
