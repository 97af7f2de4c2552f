"""Files that appear whole, and JSON read with one clear line for whatever is wrong with it."""

import pytest

from errors import UserError
from files import check_place, full_disk_is_said, read_json, read_json_lines, write_text, written_beside


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"a": 1,\n "b": }', "line 2: not valid JSON"),
        (b"9" * 5000, "line 1: not valid JSON"),
        (b"[" * 100_000, "line 1: not valid JSON (nested too deeply)"),
        (b"[\xff]", "line 1: not UTF-8"),
        (b'{"score": NaN}', "NaN is no JSON number"),
        (b"", "line 1: not valid JSON"),
    ],
    ids=["syntax", "digits", "brackets", "encoding", "nan", "empty"],
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
    assert read_json_lines(path, "") == [(1, {"a": "x\u2028y"}), (3, [2])]
    path.write_text('{"a": 1}\n\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl line 3: not valid JSON"):
        read_json_lines(path, "mend it")


def test_of_files_written_together_none_changes_when_one_fails(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    write_text(first, "before")
    with pytest.raises(OSError), written_beside(first, second) as (one, _):
        one.write_text("after")  # the second is never written
    assert first.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_place_that_cannot_be_written_is_named_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    check_place(tmp_path / "new" / "folder", "--out")
    for place, told in (("file/x", "file is no folder"), ("link", "link is a link to nowhere")):
        with pytest.raises(UserError, match=f"--out: nothing can be written in .*{told}"):
            check_place(tmp_path / place, "--out")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere, except on a disk mounted read-only
    with pytest.raises(UserError, match="is read-only"):
        check_place(tmp_path / "new", "--out")


def test_a_full_disk_is_told_from_other_failures_to_save(tmp_path):
    full = full_disk_is_said(tmp_path / "file" / "x", "run it again")
    with pytest.raises(UserError, match=r"GB are free there\. Free some space and run it again"), full:
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="mend this, or choose another place") as error, full_disk_is_said(tmp_path):
        raise NotADirectoryError(20, "Not a directory")
    assert "space" not in str(error.value)
    with pytest.raises(ZeroDivisionError), full_disk_is_said(tmp_path):
        raise ZeroDivisionError
