"""Tables of paths and labels: what is read, and which line is to blame for what is not."""

from __future__ import annotations

import os
import sys

import pytest
from image_files import encoded, noise, write

from nearkin.data.dataset import load_dataset
from nearkin.data.sources.resolve import resolve
from nearkin.errors import DataError


@pytest.fixture
def root(tmp_path):
    for name in "abcdef":
        write(tmp_path / "images" / f"{name}.png", encoded(noise(ord(name)), "PNG"))
    return tmp_path


def table(root, text: str | bytes, name: str = "table.csv") -> str:
    write(root / name, text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)
    return str(root / name)


def rows(path: str) -> list[tuple[str, str, str]]:
    return [
        (split, part.images.name(row), part.classes[place])
        for split, part in resolve(path).parts.items()
        for row, place in enumerate(part.labels)
    ]


def refused(path: str) -> str:
    with pytest.raises(DataError) as caught:
        resolve(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PLAIN = "path,label\nimages/b.png,dog\nimages/a.png,cat\n"
TWO = [("train", "images/b.png", "dog"), ("train", "images/a.png", "cat")]


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        "\ufeff" + PLAIN,
        PLAIN.rstrip(),
        PLAIN.replace("\n", "\n\n"),
        'Path, Label\n"images/b.png","dog"\nimages/a.png,cat\n',
        "path, label\nimages/b.png, dog\nimages/a.png,cat \n",
        "label,path\ndog,images/b.png\ncat,images/a.png\n",
    ],
)
def test_the_order_of_the_table_is_kept(root, text):
    assert rows(table(root, text)) == TWO


def test_tabs_and_splits(root):
    text = "path\tlabel\tsplit\n" + "".join(
        f"images/{name}.png\tx,{name}\t{split}\n"
        for name, split in zip(
            "abcdef", ["train", "TRAIN", "val", "valid", "validation", "test"], strict=True
        )
    )
    splits = [split for split, _, _ in rows(table(root, text, "t.tsv"))]
    assert splits == ["train", "train", "val", "val", "val", "test"]
    assert rows(table(root, text, "t.tsv"))[0] == ("train", "images/a.png", "x,a")


def test_images_are_found_beside_the_table(root, monkeypatch):
    monkeypatch.chdir(root)
    dataset = load_dataset(str(table(root, PLAIN)), val_split=0, seed=0)
    assert dataset.classes == ("cat", "dog")
    assert dataset.splits["train"].labels.tolist() == [1, 0]
    assert dataset.splits["train"].images.read(0).shape == (3, 8, 8)
    assert load_dataset("table.csv", val_split=0, seed=0).fingerprint == dataset.fingerprint


def test_a_table_in_a_linked_folder_names_files_beside_the_target(root, tmp_path):
    table(root, "path,label\n../images/a.png,cat\n", "deep/table.csv")
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "far" / "away" / "link").symlink_to(root / "deep")
    assert rows(str(tmp_path / "far" / "away" / "link" / "table.csv")) == [
        ("train", "../images/a.png", "cat")
    ]


def test_labels_are_text_and_names_may_be_any_bytes(root):
    strange = b'images/\xff\xfe\n,".png'
    write(root / os.fsdecode(strange), encoded(noise(0), "PNG"))
    text = b'path,label\n"' + strange.replace(b'"', b'""') + b'",007\nimages/a.png,7\n'
    found = rows(table(root, text))
    assert [label for _, _, label in found] == ["007", "7"]
    assert found[0][1].encode("utf-8", "surrogateescape") == strange


def test_labels_in_another_encoding_are_refused(root):
    text = "path,label\nimages/a.png,cat\nimages/b.png,café\n"
    message = refused(table(root, text.encode("cp1252")))
    assert "line 3: the label caf\\udce9 is not in UTF-8; save the table as UTF-8" in message
    assert rows(table(root, text))[1][2] == "café"


def test_a_folder_of_any_bytes_is_a_label(root):
    """As in a table that the doctor writes."""
    for name in (b"caf\xe9", b"cat "):
        write(root / os.fsdecode(name) / "a.png", encoded(noise(1), "PNG"))
        (found,) = rows(table(root, b"path,label\n%b/a.png,%b\n" % (name, name)))
        assert os.fsencode(found[2]) == name


def test_other_columns_are_ignored_and_noted(root):
    text = "path,label,author\nimages/a.png,cat,me\nimages/b.png,dog,you\n"
    assert any(
        "columns ignored in the table: author" in note for note in resolve(table(root, text)).notes
    )


HEADER = "path,label,split\n"
WRONG = {
    "no header": ("images/a.png,cat\n", "line 1", "header"),
    "empty file": ("", "line 1", "header"),
    "no label column": ("path,class\nimages/a.png,cat\n", "line 1", "header"),
    "a column twice": ("path,label,label\nimages/a.png,cat,cat\n", "line 1", "twice"),
    "a field too many": (
        "path,label\nimages/a.png,cat\nimages/b.png,do,g\n",
        "line 3",
        "3 fields instead of 2",
    ),
    "a field too few": ("path,label\n\nimages/b.png\n", "line 3", "1 field instead of 2"),
    "an empty label": ("path,label\nimages/a.png, \n", "line 2", "the label is empty"),
    "an empty path": ("path,label\n,cat\n", "line 2", "the path is empty"),
    "an unknown split": (HEADER + "images/a.png,cat,all\n", "line 2", "'all' is none of"),
    "an empty split": (HEADER + "images/a.png,cat,\n", "line 2", "none of"),
    "a missing file": (
        "path,label\nimages/a.png,cat\nimages/z.png,cat\n",
        "line 3",
        "images/z.png does not exist",
    ),
    "NUL": ("path,label\nimages/a\0.png,cat\n", "line 2", "does not exist"),
    "a file twice": (
        "path,label\nimages/a.png,cat\nimages/b.png,cat\nimages/./a.png,cat\n",
        "line 2 and line 4",
        "named twice",
    ),
    "two labels": (
        "path,label\nimages/a.png,cat\nimages/a.png,dog\n",
        "line 2 and line 3",
        "labelled both cat and dog",
    ),
    "twice in two splits": (
        HEADER + "images/a.png,cat,train\nimages/a.png,cat,test\n",
        "line 2 and line 3",
        "twice",
    ),
    "a file twice, once from the root": (
        "path,label\nimages/a.png,cat\nROOT/images/a.png,cat\n",
        "line 2 and line 3",
        "named twice",
    ),
    "a space before a quote": (
        'path,label\nimages/a.png, "cat"\n',
        "line 2",
        "a space before a quotation mark",
    ),
    "the same in the header": (
        '"path", "label"\n"images/a.png", "cat"\n',
        "line 1",
        "space before a quotation mark",
    ),
    "semicolons": ("path;label\nimages/a.png;cat\n", "line 1", "semicolons"),
    "an open quote": ('path,label\nimages/a.png,"cat\n', "line 2", "not valid CSV"),
    "an endless line": ("path,label\nimages/a.png,cat\n" + "x" * 2**21, "line 3", "longer than"),
    "a long field": ("path,label\nimages/a.png," + "x" * 200_000, "line 2", "field larger"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_line_to_blame_is_named(root, case, monkeypatch):
    text, where, what = WRONG[case]
    monkeypatch.chdir(root)  # a table that is named by a relative path
    table(root, text.replace("ROOT", str(root)))
    message = refused("table.csv")
    assert where in message
    assert what in message
    assert "table.csv" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_refused_with_what_to_do(root, encoding):
    assert "save it as UTF-8" in refused(table(root, PLAIN.encode(encoding)))


def test_a_table_without_rows(root):
    assert "names no images" in refused(table(root, "path,label\n"))


def test_quoted_line_breaks_do_not_shift_the_line_numbers(root):
    text = 'path,label\nimages/a.png,"two\nlines"\nimages/z.png,cat\n'
    assert "line 4" in refused(table(root, text))


def parquet(root, **columns) -> str:
    import pyarrow
    from pyarrow import parquet as files

    path = root / "table.parquet"
    files.write_table(pyarrow.table(columns), path)
    return str(path)


def test_parquet(root):
    path = parquet(
        root, label=[3, 12], path=["images/b.png", "images/a.png"], split=["test", "train"]
    )
    assert rows(path) == [("train", "images/a.png", "12"), ("test", "images/b.png", "3")]


def test_parquet_as_pandas_writes_it(root):
    """Numbers are floating-point where some are missing; names are as a person typed them."""
    columns = {"Label": [3.0, 12.0], " Path": ["images/b.png", "images/a.png"], "Author": [1, 2]}
    path = parquet(root, **columns)
    assert rows(path) == [("train", "images/b.png", "3"), ("train", "images/a.png", "12")]
    assert "columns ignored in the table: author" in resolve(path).notes


@pytest.mark.parametrize(
    ("columns", "where", "what"),
    [
        ({"path": ["images/a.png"], "class": ["cat"]}, "schema", "header"),
        ({"path": ["images/a.png", None], "label": ["cat", "dog"]}, "row 2", "the path is empty"),
        ({"path": ["images/a.png"], "label": [0.5]}, "row 1", "float"),
        ({"path": ["images/a.png"], "label": [float("nan")]}, "row 1", "float"),
        ({"path": ["images/a.png"], "Path": ["x"], "label": [1]}, "schema", "twice"),
        ({"path": ["images/z.png"], "label": ["cat"]}, "row 1", "does not exist"),
        ({"path": ["images/a.png"] * 2, "label": ["cat"] * 2}, "row 1 and row 2", "twice"),
    ],
)
def test_parquet_rows_to_blame(root, columns, where, what):
    message = refused(parquet(root, **columns))
    assert where in message
    assert what in message


def test_a_parquet_file_with_text_that_is_not_utf_8(root):
    import pyarrow
    from pyarrow import parquet as files

    path = root / "odd.parquet"
    broken = pyarrow.array([b"\xff.png", b"b.png"]).view(pyarrow.string())
    labels = pyarrow.array(["a", "b"])
    files.write_table(pyarrow.table({"path": broken, "label": labels}), path)
    assert "cannot be read" in refused(str(path))


def test_a_damaged_parquet_file(root):
    assert "cannot be read" in refused(table(root, b"PAR1 rubbish PAR1", "t.parquet"))


def test_without_pyarrow_the_remedy_is_named(root, monkeypatch):
    path = parquet(root, path=["images/a.png"], label=["cat"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "uv sync --extra parquet" in refused(path)
