"""Which files are meant: braces, folders that `datasets` saved, and what is not there."""

import json

import datasets
import pytest

from align.common.errors import DataError
from align.sources.places import expand_braces, find_files
from align.sources.plan import Source
from tests.support.captioned_pictures import all_rows, codes, picture

BRACES = {
    "{00000..00002}.tar": ["00000.tar", "00001.tar", "00002.tar"],
    "{8..11}": ["8", "9", "10", "11"],
    "{08..11}": ["08", "09", "10", "11"],
    "{0..6..3}-{a,b}": ["0-a", "0-b", "3-a", "3-b", "6-a", "6-b"],
    "{2..0}": ["2", "1", "0"],
    "{0..10..5}": ["0", "5", "10"],
    "x{a,{0..1}}": ["xa", "x0", "xa", "x1"],
    "{one}": ["{one}"],
    "{}": ["{}"],
    "{a..c}": ["{a..c}"],
    "no": ["no"],
}


@pytest.mark.parametrize("pattern", BRACES)
def test_braces_stand_for_what_a_shell_makes_of_them(pattern):
    assert expand_braces(pattern) == BRACES[pattern]


def test_braces_are_found_with_stars_and_a_missing_file_is_named(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:05d}.tar").touch()
    files = [str(tmp_path / f"{number:05d}.tar") for number in range(12)]
    assert find_files(f"{tmp_path}/{{00000..00011}}.tar", "auto") == find_files(f"{tmp_path}/*.tar", "auto") == ("webdataset", files)
    assert find_files(f"{tmp_path}/{{0000,0001}}*.tar", "auto")[1] == files
    with pytest.raises(DataError, match="2 of 14 files of .* are missing, for example .*00012.tar; get them, or give another range"):
        find_files(f"{tmp_path}/{{00000..00013}}.tar", "auto")
    with pytest.raises(DataError, match="matches no file"):
        find_files(f"{tmp_path}/{{20..21}}.tar", "auto")
    with pytest.raises(DataError, match="more than 100000 files"):
        find_files(f"{tmp_path}/{{0..9999}}{{0..9999}}.tar", "auto")
    (tmp_path / "{0..1}.tar").touch()
    assert find_files(f"{tmp_path}/{{0..1}}.tar", "auto")[1] == [f"{tmp_path}/{{0..1}}.tar"], "a file of that very name comes first"


def saved(folder, count=5, **options):
    rows = {"image": [{"bytes": picture(number), "path": None} for number in range(count)], "caption": [f"c{n}" for n in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).shuffle(seed=0).save_to_disk(folder, **options)


def test_a_data_set_that_datasets_saved_is_read_as_it_is(tmp_path):
    saved(tmp_path / "d", num_shards=2)
    (tmp_path / "d" / "cache-1.arrow").write_bytes(b"of a map that somebody ran")
    rows = all_rows(Source(str(tmp_path / "d")))
    assert codes(rows) == [None] * 5 and sorted(row.fields["caption"] for row in rows) == [f"c{n}" for n in range(5)]
    assert all(row.image == picture(int(row.fields["caption"][1:])) for row in rows)
    assert [row.key for row in rows] == [row.key for row in all_rows(Source(f"{tmp_path}/d/data-*.arrow"))]


def test_a_dictionary_of_data_sets_and_a_selection_are_told_what_to_give(tmp_path):
    saved(tmp_path / "dd" / "train")
    (tmp_path / "dd" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds several data sets \(train, test\); give one of them: .*dd/train"):
        find_files(str(tmp_path / "dd"), "auto")
    state = tmp_path / "dd" / "train" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_indices_files": ["x"]}))
    with pytest.raises(DataError, match="is a selection of rows; write them out: python -c"):
        find_files(str(tmp_path / "dd" / "train"), "auto")
    state.write_text("{")
    with pytest.raises(DataError, match="state.json cannot be read"):
        find_files(str(tmp_path / "dd" / "train"), "arrow")
    (tmp_path / "dd" / "train" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1 cut")
    with pytest.raises(DataError, match="cannot be read as arrow"):
        all_rows(Source(f"{tmp_path}/dd/train/*.arrow"))
