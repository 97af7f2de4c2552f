"""Files that appear whole, and JSON read with one clear line for whatever is wrong with it."""

import json

import pytest

from errors import UserError
from files import (
    complete_json_lines,
    folder_beside,
    full_disk_is_said,
    read_json,
    read_json_lines,
    read_json_list,
    refuse_unusable_folder,
    write_text,
    written_beside,
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"a": 1,\n "b": }', "line 2: not valid JSON"),
        (b"9" * 5000, "line 1: not valid JSON (a number of 5,000 digits)"),
        (b"-1e999", "line 1: not valid JSON (the number -1e999 is too large)"),
        (b"[" * 100_000, "line 1: not valid JSON (nested too deeply)"),
        (b"[\xff]", "line 1: not UTF-8"),
        (b'{"score": NaN}', "NaN is no JSON number"),
        (b"", "line 1: not valid JSON"),
    ],
    ids=["syntax", "digits", "infinite", "brackets", "encoding", "nan", "empty"],
)
def test_json_that_cannot_be_read_is_one_line_with_file_line_and_cure(tmp_path, text, told):
    path = tmp_path / "scores.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        read_json(path, "run evaluate.py again")
    assert str(path) in str(error.value) and told in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("; run evaluate.py again")


def test_a_missing_json_file_or_a_folder_in_its_place_is_one_line(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match=r"cannot be read .*; do this"):
            read_json(path, "do this")


def test_json_lines_keep_their_numbers_over_blank_lines_and_unicode_line_ends(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\n\n[2]\r\n'.encode())
    assert list(read_json_lines(path, "")) == [(1, {"a": "x\u2028y"}), (3, [2])]
    path.write_text('{"a": 1}\n\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl line 3: not valid JSON"):
        list(read_json_lines(path, "mend it"))


def test_a_last_line_that_a_kill_cut_inside_a_character_is_left_out(tmp_path):
    (tmp_path / "order.jsonl").write_bytes('[1, ["a"]]\n\n[2, ["ä'.encode()[:-1])
    assert list(complete_json_lines(tmp_path / "order.jsonl")) == [[1, ["a"]]]


NASTY = [
    {"a": 'say "x" \\ [,]} ü🙂\u2028', "n": -1.5e-7},
    *({}, [1, [2]], "🙂", 12345, True, None),
    {"b": {"c": []}},
]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_list_read_in_pieces_of_any_size_holds_the_same_values(tmp_path, monkeypatch, ascii_only):
    path = tmp_path / "t.json"
    for values, indent in ((NASTY, None), (NASTY, 1), ([], None)):
        text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
        path.write_text(f"\ufeff \n{text}\n\n", encoding="utf-8")
        for size in (1, 2, 3, 5, 8, 30, 1000):
            monkeypatch.setattr("files.CHUNK_BYTES", size)
            assert list(read_json_list(path, "")) == values


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    "text",
    [
        b'[{"a": 1},\n{"a": }]',
        b'[{"a": 1},\n\n{"a": 1}\n{"a": 1}]',
        b'[{"a": 1},\n]',
        b'[{"a": "x\ny"}]',
        b'[\n{"a": 1}',
        b'[\n\n{"a": "half',
        b'[{"a": 1}]\n]',
        b'[{"a": 1},\n{"a": "\xff"}]',
        b'[{"a": "\\q"}]',
        b'[\n{"a": tru}]',
        b"",
    ],
)
def test_a_fault_in_a_list_read_in_pieces_is_told_with_the_line_it_has_in_the_file(tmp_path, monkeypatch, text, size):
    path = tmp_path / "t.json"
    path.write_bytes(text)
    monkeypatch.setattr("files.CHUNK_BYTES", size)
    with pytest.raises(UserError) as at_once:
        read_json(path, "mend it")
    with pytest.raises(UserError) as in_pieces:
        list(read_json_list(path, "mend it"))
    assert str(in_pieces.value) == str(at_once.value)


def test_of_files_written_together_none_changes_when_one_fails(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    write_text(first, "before")
    with pytest.raises(OSError), written_beside(first, second) as (one, _):
        one.write_text("after")  # the second is never written
    assert first.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_written_beside_replaces_the_old_one_whole_or_not_at_all(tmp_path):
    def write(name, fails=False):
        with folder_beside(tmp_path / "pages") as folder:
            (folder / name).write_text(name)
            assert not fails

    write("old.png")
    with pytest.raises(AssertionError):
        write("half.png", fails=True)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == ["pages/old.png"]
    write("new.png")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == ["pages/new.png"]


def test_a_place_where_no_folder_can_be_is_told_with_what_is_there(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, told in (("file", "no folder"), ("file/under/it", "file is no folder"), ("link", "a link to nothing"),
                       ("link/under", "link is a link to nothing"), ("loop", "a link to nothing")):  # fmt: skip
        with pytest.raises(UserError, match=f"--out .*{name}: .*{told}; give another place"):
            refuse_unusable_folder(tmp_path / name, "--out")
    for name in (".", "new", "new/deep"):
        refuse_unusable_folder(tmp_path / name, "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "loop"]


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("files.os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="is not writable"):
        refuse_unusable_folder(tmp_path / "new", "--out")


def test_a_full_disk_is_told_from_other_failures_to_save(tmp_path):
    full = full_disk_is_said(tmp_path / "file" / "x", "run it again")
    with pytest.raises(UserError, match=r"GB are free there\. Free some space and run it again"), full:
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="mend this, or choose another place") as error, full_disk_is_said(tmp_path):
        raise NotADirectoryError(20, "Not a directory")
    assert "space" not in str(error.value)
    with pytest.raises(ZeroDivisionError), full_disk_is_said(tmp_path):
        raise ZeroDivisionError
