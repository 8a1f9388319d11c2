"""Rated sentences: which sentences are kept, and that they are read as SST-2."""

import io
import tarfile
from pathlib import Path

import pytest

from benchmarks import sentiment
from gem_ds.data.tasks import load_task


def archive(name: str, content: bytes) -> bytes:
    """A .tar.gz of one file in a folder, beside an empty one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for path, data in (("package/README", b""), (f"package/{name}", content)):
            info = tarfile.TarInfo(path)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_clear_sentences_are_kept_once_and_held_out_ones_are_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sentiment, "NUM_HELD_OUT", 2)
    rows = [(0.5, "Good."), (-0.5, "Bad. "), (0.49, "So so."), (-0.49, "Hm."), (3.0, "good.")]
    rows += [(2.2, 'A "great" film\u2028indeed'), (-4.0, "Awful."), (1.0, "Fine.")]
    lines = "".join(f"{i}\t{rating}\t{text}\r\n" for i, (rating, text) in enumerate(rows, start=1))
    data = archive(sentiment.SENTENCES["products"], lines.encode())
    sdist = tmp_path / "sdist.tar.gz"
    sdist.write_bytes(archive("hutto_ICWSM_2014.tar.gz", data))
    folders = tmp_path / "one" / "data", tmp_path / "two"
    for folder in folders:
        sentiment.main([str(folder), "--of", "products", "--sdist", str(sdist)])
    tasks = [load_task("sst2", data_dir=str(folder)) for folder in folders]
    assert tasks[0] == tasks[1]
    train, test = tasks[0].train, tasks[0].test
    assert (len(train), len(test)) == (3, 2)
    said = {example.prompt.partition("\nQuestion")[0]: example.target for example in train + test}
    assert said == {
        "Good.": " positive",
        "Bad.": " negative",
        'A "great" film\u2028indeed': " positive",
        "Awful.": " negative",
        "Fine.": " positive",
    }
    with pytest.raises(ValueError, match="exists: choose another folder"):
        sentiment.main([str(Path(folders[0])), "--sdist", str(sdist)])
