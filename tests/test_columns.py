"""Tables, by hand."""

from __future__ import annotations

from moe_gguf.runtime.columns import columns


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [["name", "bytes", "remark"], ["trunk", "9", ""], ["experts", "1200", "all of them"]]
    assert columns(rows, "<><") == [
        "name     bytes  remark",
        "trunk        9",
        "experts   1200  all of them",
    ]


def test_the_last_alignment_holds_for_all_further_columns() -> None:
    assert columns([["a", "1", "20"], ["b", "30", "4"]], "<>") == ["a   1  20", "b  30   4"]


def test_a_shorter_row_runs_on_over_the_columns_it_lacks() -> None:
    rows = [["row", "tok/s", "hits"], ["lru", "5", "9"], ["stock-mmap", "killed (out of memory)"]]
    assert columns(rows, "<>") == [
        "row         tok/s  hits",
        "lru             5     9",
        "stock-mmap  killed (out of memory)",
    ]


def test_no_rows_are_no_lines() -> None:
    assert columns([], "<") == []
