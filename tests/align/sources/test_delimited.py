"""CSV and TSV: quotes cost no row silently, and what spans several lines is counted and named."""

import subprocess
import sys

import pytest

from align.common.errors import DataError
from align.common.reject_codes import Reject
from align.sources.plan import Source, plan
from tests.support.captioned_pictures import all_rows, codes

ROWS = [(f"img/{number:03d}.jpg", f"a picture, number {number}") for number in range(20)]


def tsv(rows, end="\n"):
    return end.join("\t".join(row) for row in [("image", "caption"), *rows]) + end


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_in_a_tsv_are_text(tmp_path, end):
    rows = [*ROWS[:3], ("img/3.jpg", '"Best a white square'), *ROWS[4:9], ("img/9.jpg", 'a screen of 15"'), ("img/10.jpg", '"said"')]
    (tmp_path / "a.tsv").write_bytes(tsv(rows, end).encode())
    for step in (1, 4, 100):
        found = all_rows(Source(str(tmp_path)), step, images=False)
        assert codes(found) == [None] * 11 and [row.fields["caption"] for row in found] == [row[1] for row in rows]
    assert plan(Source(str(tmp_path)), 4).notes[0].endswith("so they are part of the text")


def csv(first, last, order=(0, 1)):
    """A quote is left open in the first of some rows and a later one ends with a quote."""
    lines = [",".join(("image", "caption")[n] for n in order)]
    for image, caption in [("img/a.jpg", first), *((row[0], "x") for row in ROWS[:3]), ("img/b.jpg", last), ("img/c.jpg", "end")]:
        lines.append(",".join((image, caption)[n] for n in order))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["image first", "caption first"])
def test_an_open_quote_in_a_csv_costs_one_row_even_if_a_later_quote_closes_it(tmp_path, order):
    (tmp_path / "a.csv").write_text(csv('"Best a white', 'of 15"', order))
    found = all_rows(Source(str(tmp_path)), images=False)
    assert codes(found) == ["row_syntax", *[None] * 5] and "left open" in found[0].reject.detail
    assert found[4].fields["caption"] == 'of 15"'


def test_an_open_quote_closed_in_the_next_row_costs_one_row(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\nimg/0.jpg,"Best a white\nimg/1.jpg,of 15"\nimg/2.jpg,x\n')
    assert codes(all_rows(Source(str(tmp_path)), images=False)) == ["row_syntax", None, None]


def test_quoted_cells_over_several_lines_are_read_counted_and_named(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\na.jpg,one\nb.jpg,"two\nlines, even three\n"\nc.jpg,"x\ny"\n')
    found = all_rows(Source(str(tmp_path)), images=False)
    assert [row.fields["caption"] for row in found] == ["one", "two\nlines, even three\n", "x\ny"]
    assert plan(Source(str(tmp_path)), 10).notes == (
        f"{tmp_path}/a.csv: 2 rows have a quoted cell over several lines, the first in lines 3 to 5",
    )


@pytest.mark.parametrize(
    ("name", "mark", "fitting"),
    [
        ("a.csv", ";", "semicolons would give 2 columns: python -c"), ("a.csv", "\t", "tabs would give 2 columns: name the file .*a.tsv"),
        ("a.csv", "|", "vertical bars would give 2"), ("a.tsv", ",", "commas would give 2 columns: name the file .*a.csv"),
        ("a.csv", "| ", "vertical bars would give 2"), ("a.tsv", ";", "semicolons would give 2"),
    ],
)  # fmt: skip
def test_another_delimiter_is_named(tmp_path, name, mark, fitting):
    (tmp_path / name).write_text(f"image{mark}caption\na.jpg{mark}x\n")
    with pytest.raises(DataError, match=f"its header is one column.*{fitting}"):
        plan(Source(str(tmp_path)), 10)


def test_the_line_that_converts_a_file_with_another_delimiter_makes_one_that_can_be_read(tmp_path):
    (tmp_path / "a.csv").write_text("image| number| caption\na.jpg| 0| one, two\n")
    with pytest.raises(DataError) as refused:
        plan(Source(str(tmp_path / "a.csv")), 10)
    command = "python -c" + str(refused.value).partition("python -c")[2]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert [row.fields["caption"] for row in all_rows(Source(str(tmp_path / "a-commas.csv")), images=False)] == ["one, two"]


def test_another_delimiter_is_named_where_the_header_has_some_of_ours(tmp_path):
    (tmp_path / "a.csv").write_text("image;caption, long;size, in px;x;y\na.jpg;b;c\n")
    with pytest.raises(DataError, match="no column 'caption'.*semicolons would give 5 columns"):
        plan(Source(str(tmp_path)), 10, ["caption"])


def test_a_file_without_a_header_is_told_from_one_with_other_columns(tmp_path):
    (tmp_path / "a.tsv").write_text("1000.jpg\tA child\n1001.jpg\tA dog\n")
    with pytest.raises(DataError, match="no column 'caption'.*'1000.jpg' looks like a cell: the first line has to be the column names"):
        plan(Source(str(tmp_path)), 10, ["caption"])


LISTS = {
    "JSON": ('["a dog", "caf\\u00e9"]', ["a dog", "café"]),
    "pandas": ("['a dog', \"it's\"]", ["a dog", "it's"]),
    "pandas with nothing in one": ("['a dog', None, nan]", ["a dog", None, None]),
    "numpy": ("['a dog'\n 'a cat']", ["a dog", "a cat"]),
    "escapes": (r"['it\'s', 'a\d']", ["it's", r"a\d"]),
    "empty": ("[]", []),
    "words in brackets": ("[music] a dog [barks]", "[music] a dog [barks]"),
    "a word in brackets": ("[unknown]", "[unknown]"),
}


@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_cell_that_spells_a_list_of_texts_is_that_list(tmp_path, name, case):
    cell, expected = LISTS[case]
    cell = cell.replace("\n", " ") if name == "a.tsv" else '"' + cell.replace('"', '""') + '"'
    mark = "\t" if name == "a.tsv" else ","
    (tmp_path / name).write_text(f"image{mark}caption\na.jpg{mark}{cell}\n")
    (row,) = all_rows(Source(str(tmp_path)), images=False)
    assert row.cell("caption") == expected


@pytest.mark.parametrize("cell", ["['tis the]", "[['a']]", "[{'raw': 'a dog'}]", "['a', ..., 'b']", "[" * 90_000 + "]"])
def test_a_cell_that_begins_like_a_list_and_is_none_is_rejected_where_it_is_used(tmp_path, cell):
    (tmp_path / "a.csv").write_text(f'image,caption\na.jpg,"{cell}"\n')
    (row,) = all_rows(Source(str(tmp_path)), images=False)
    assert row.reject is None
    with pytest.raises(Reject, match="row_syntax: no list of texts.*write it as JSON"):
        row.cell("caption")
