"""A corpus is read as it stands, and a bad line is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from attnbias.errors import AttnbiasError
from attnbias.observe import corpus


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_jsonl(tmp_path: Path) -> None:
    text = (
        '\ufeff{"text": "One é."}\n\n{"id": "b", "text": "Two\\nlines.", "more": 1}\r\n'
        '{"id": 7, "text": "Three."}'
    )
    found = corpus.read(written(tmp_path / "c.jsonl", text))
    assert [(d.index, d.id, d.text, d.line) for d in found] == [
        (0, "1", "One é.", 1),
        (1, "b", "Two\nlines.", 3),
        (2, "7", "Three.", 4),
    ]
    assert found[2].text == "Three."
    assert found.digest == hashlib.sha256(text.encode()).hexdigest()
    assert found.name == "c.jsonl"


def test_plain_text(tmp_path: Path) -> None:
    text = "\n\nFirst line,\nsecond line.\n\n \nAnother.\r\n\r\nLast."
    found = corpus.read(written(tmp_path / "c.txt", text))
    assert [(d.id, d.text) for d in found] == [
        ("3", "First line,\nsecond line."),
        ("7", "Another."),
        ("9", "Last."),
    ]


def test_texts_in_memory_are_those_of_a_file(tmp_path: Path) -> None:
    texts = ["One.", "Two é\n\n."]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    read, made = corpus.read(written(tmp_path / "c.jsonl", lines)), corpus.of(texts)
    assert [d.text for d in made] == texts
    assert read.digest == made.digest
    assert list(read) == list(made)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "a"}\n{"text": 3}\n', 'line 2: write a JSON object with a text, {"text"'),
        ('{"text": "a"}\n\n["a"]\n', "line 3: write a JSON object"),
        ('{"text": "a"}\n{"id": "x"}\n', "line 2: write a JSON object"),
        ('{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON"),
        ("plain words\n", "line 1 is not JSON"),
        ('{"text": " \\n"}\n', "line 1: the text holds no word"),
        ('{"id": 1.5, "text": "a"}\n', '"id" is a word or a whole number, got 1.5'),
        ('{"id": "", "text": "a"}\n', '"id" is a word or a whole number'),
        ('{"id": "x", "text": "a"}\n{"text": "b"}\n{"id": "x", "text": "c"}\n',
         "line 3: the id 'x' is that of line 1 too"),
        ('{"text": "a"}\n{"id": 1, "text": "c"}\n', "line 2: the id '1' is that of line 1 too"),
        ('{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8 text"),
        ("", "holds no document"),
        ("\n \n", "holds no document"),
    ],
)  # fmt: skip
def test_a_bad_line_is_one_sentence(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(AttnbiasError) as error:
        corpus.read(written(tmp_path / "c.jsonl", text))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AttnbiasError, match=r"'c\.csv': give a \.jsonl file"):
        corpus.read(tmp_path / "c.csv")
    with pytest.raises(AttnbiasError, match="cannot be read: No such file"):
        corpus.read(tmp_path / "c.jsonl")
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(AttnbiasError, match="cannot be read"):
        corpus.read(tmp_path / "d.txt")
    with pytest.raises(AttnbiasError, match=r"line 2 is not UTF-8"):
        corpus.read(written(tmp_path / "e.txt", b"a\n\xff\n"))


def test_texts_in_memory_are_checked() -> None:
    with pytest.raises(AttnbiasError, match=r"write of\(\[text\]\)"):
        corpus.of("a text")
    with pytest.raises(AttnbiasError, match="text 1 is of type int"):
        corpus.of(["a", 2])  # type: ignore[list-item]
    with pytest.raises(AttnbiasError, match="holds no document"):
        corpus.of([])
