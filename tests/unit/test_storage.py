"""Files by path and by URL: whole or not there, exact ranges, errors that say what to do."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from uvit_dist import storage
from uvit_dist.config import StorageConfig
from uvit_dist.errors import DataError, MissingInputError, OutputError, UnavailableError


@pytest.fixture(params=["path", "file URL", "memory URL"])
def base(request, tmp_path):
    return {"path": str(tmp_path), "file URL": f"file://{tmp_path}", "memory URL": f"memory://{tmp_path.name}"}[
        request.param
    ]


def test_what_is_written_is_read(base):
    path = storage.join(base, "a.bin")
    assert not storage.exists(path)
    storage.write_bytes(path, b"0123456789")
    assert storage.exists(path)
    assert storage.size(path) == 10
    assert storage.read_bytes(path) == b"0123456789"
    assert storage.read_range(path, 3, 4) == b"3456"
    assert storage.sizes_in(base) == {"a.bin": 10}
    assert storage.parent(path) == base


def test_a_range_beyond_the_end_is_an_error_not_a_short_read(base):
    path = storage.join(base, "a.bin")
    storage.write_bytes(path, b"0123456789")
    with pytest.raises(DataError, match=r"a\.bin: ends at byte 10 where 12 are expected: the file is truncated"):
        storage.read_range(path, 8, 4)


def test_missing_files_are_named(base):
    path = storage.join(base, "none.bin")
    for call in (storage.read_bytes, storage.size, lambda p: storage.read_range(p, 0, 1)):
        with pytest.raises(MissingInputError, match=r"none\.bin: no such file"):
            call(path)
    assert storage.sizes_in(storage.join(base, "nowhere")) == {}


def test_of_several_who_create_a_file_one_does(base, tmp_path):
    path = storage.join(base, "below", "claim")
    (tmp_path / "below").mkdir()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: storage.create(path, b"%d" % number), range(8)))
    assert made.count(True) == 1
    assert storage.read_bytes(path) == b"%d" % made.index(True)
    assert storage.tree(base) == {"below/claim": 1}
    storage.remove(path)
    assert storage.create(path, b"again")


def test_a_tree_is_all_files_below_in_order(base, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("b.txt", "a/x.txt", "a/b/y.txt"):
        storage.write_bytes(storage.join(base, *name.split("/")), name.encode())
    assert list(storage.tree(base).items()) == [("a/b/y.txt", 9), ("a/x.txt", 7), ("b.txt", 5)]
    assert storage.tree(storage.join(base, "nowhere")) == {}


def write_half(path):
    with storage.atomic_write(path) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_what_was_there(base):
    path = storage.join(base, "a.bin")
    storage.write_bytes(path, b"before")
    with pytest.raises(OutputError, match=r"a\.bin: cannot be written \(No space left"):
        write_half(path)
    assert storage.read_bytes(path) == b"before"
    assert storage.sizes_in(base) == {"a.bin": 6}


def test_a_directory_that_cannot_be_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another directory or mend its permissions"):
        storage.make_directory(str(tmp_path / "file" / "run"))


def test_weights_are_local_or_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_DIST_CACHE", str(tmp_path / "cache"))
    data = b"weights" * 1000
    digest = hashlib.sha256(data).hexdigest()
    path, url = tmp_path / "net.pth", f"memory://{tmp_path.name}/net.pth"
    path.write_bytes(data)
    storage.write_bytes(url, data)

    assert storage.local_weights(str(path), None, "text.encoder", "get it") == str(path)
    assert storage.local_weights(str(path), digest.upper(), "text.encoder", "get it") == str(path)
    assert storage.local_weights(str(tmp_path), None, "text.encoder", "get it") == str(tmp_path)
    with pytest.raises(DataError, match="a folder has no hash; give its file of weights"):
        storage.local_weights(str(tmp_path), digest, "text.encoder", "get it")
    with pytest.raises(MissingInputError, match=r"text\.encoder .*none\.pth: no such file or folder; get it"):
        storage.local_weights(str(tmp_path / "none.pth"), None, "text.encoder", "get it")
    storage.write_bytes(f"{url}?download=true", data)
    asked = storage.local_weights(f"{url}?download=true", digest, "text.encoder", "get it")
    assert Path(asked).name == "net.pth", "what is asked of a server is no part of the name"
    kept = storage.local_weights(url, digest, "text.encoder", "get it")
    assert Path(kept).name == "net.pth"
    assert Path(kept).read_bytes() == data
    storage.write_bytes(url, b"replaced")
    assert storage.local_weights(url, digest, "text.encoder", "get it") == kept, "fetched once"

    wrong = "0" * 64
    with pytest.raises(DataError, match=rf"text\.encoder .*net\.pth: its sha256 is {digest}, text"):
        storage.local_weights(str(path), wrong, "text.encoder", "get it")
    with pytest.raises(DataError, match=r"a URL needs the file's hash; set text\.encoder_sha256"):
        storage.local_weights(url, None, "text.encoder", "get it")
    with pytest.raises(DataError, match=r"its sha256 is"):
        storage.local_weights(url, wrong, "text.encoder", "get it")
    assert not list((tmp_path / "cache" / wrong[:16]).iterdir()), "what is wrong is not kept"
    with pytest.raises(MissingInputError, match=r"none\.pth: cannot be fetched .* give its local path"):
        storage.local_weights(f"memory://{tmp_path.name}/none.pth", digest, "text.encoder", "get it")
    with pytest.raises(MissingInputError, match="cannot be fetched"):
        storage.local_weights("nonsense://x/none.pth", digest, "text.encoder", "get it")


@pytest.mark.parametrize("url", [False, True])
def test_a_file_is_uploaded_as_it_is(base, tmp_path, url):
    (tmp_path / "local").write_bytes(b"0123456789" * 1000)
    target = storage.join(base, "below", "a.bin") if url else str(tmp_path / "below" / "a.bin")
    (tmp_path / "below").mkdir()
    storage.upload(str(tmp_path / "local"), target)
    assert storage.read_bytes(target) == (tmp_path / "local").read_bytes()
    assert storage.sizes_in(storage.parent(target)) == {"a.bin": 10_000}
    assert b"".join(storage.stream(target, 10_000, first=9_995)) == b"56789"
    with pytest.raises(MissingInputError, match="none: no such file"):
        storage.upload(str(tmp_path / "none"), target)


def test_an_upload_that_never_comes_through_whole_ends(tmp_path, monkeypatch):
    class Loses:
        tries = 0

        def put_file(self, local, key, callback, **_):
            self.tries += 1
            callback.relative_update(10)

        def size(self, key):
            return 9

    server = Loses()
    monkeypatch.setattr(storage.remote, "filesystem", lambda path: (server, path))
    (tmp_path / "local").write_bytes(b"0123456789")
    storage.configure(StorageConfig(retry_s=0.5))
    try:
        with pytest.raises(UnavailableError, match=r"nothing came for 0\.5 seconds .* 9 of 10 bytes arrived"):
            storage.upload(str(tmp_path / "local"), "s3://bucket/a.bin")
    finally:
        storage.configure(StorageConfig())
    assert server.tries > 1


def test_a_file_that_goes_while_a_directory_is_listed_hides_no_other(tmp_path):
    """Leases come and go under the listings of other workers; an empty listing would have all work done again."""
    for number in range(50):
        (tmp_path / f"stays-{number}").write_bytes(b"x")
    end = threading.Event()

    def come_and_go():
        while not end.is_set():
            for number in range(20):
                (tmp_path / f"lease-{number}").write_bytes(b"")
            for number in range(20):
                (tmp_path / f"lease-{number}").unlink()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(500):
            listed = storage.sizes_in(str(tmp_path))
            assert len([name for name in listed if name.startswith("stays-")]) == 50
    finally:
        end.set()
        thread.join()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/key", "s3://bucket/key"),
        ("what is it? see https://a.b/c", "what is it? see https://a.b/c"),
        ("https://a.b/c?sig=1&x=2: gone", "https://a.b/c?…"),
        ('{"a": "https://a.b/c?sig=1", "b": 2}', '{"a": "https://a.b/c?…", "b": 2}'),
        ("(https://me:word@a.b/c)", "(https://…@a.b/c)"),
        ("me@a.b", "me@a.b"),
    ],
)
def test_secrets_of_urls_are_left_out(text, shown):
    assert storage.without_secrets(text).startswith(shown)
    assert "sig" not in storage.without_secrets(text)
