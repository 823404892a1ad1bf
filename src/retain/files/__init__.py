"""Files and folders of results: whole or not at all, ours or refused, one writer at a time."""

from retain.files.digests import file_digest, sync
from retain.files.faults import why_unwritable, writing
from retain.files.locks import locked
from retain.files.ours import check_ours, foreign, has_schema, remove_ours
from retain.files.whole import (
    check_folder,
    clear_scratch,
    first_rank,
    recover,
    settle,
    whole_file,
    whole_folder,
    write_json,
)

__all__ = [
    "check_folder",
    "check_ours",
    "clear_scratch",
    "file_digest",
    "first_rank",
    "foreign",
    "has_schema",
    "locked",
    "recover",
    "remove_ours",
    "settle",
    "sync",
    "whole_file",
    "whole_folder",
    "why_unwritable",
    "write_json",
    "writing",
]
