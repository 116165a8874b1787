import hashlib
import io
import re
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from crdnd.data import _download as download_module
from crdnd.data import load_info
from crdnd.data._download import download, get, unpack
from crdnd.data._sources import SOURCES, UNPACKED, Source
from crdnd.errors import InputError, RunError

CONTENT = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8).tobytes()


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Host:
    """A server on this machine whose paths say how it behaves; it writes down what it was asked."""

    def __init__(self):
        self.files = {}
        self.asked = []
        self.cut_after = 100_000
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                _, how, name = self.path.split("/", 2)
                wanted = self.headers.get("Range")
                host.asked.append((how, wanted))
                data = host.files[name]
                if how == "gone":
                    self.send_error(404)
                    return
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and how != "noranges" else 0
                if how == "full" and start:
                    self.send_error(416)
                    return
                if how == "page":
                    data, start = b"<!DOCTYPE html><html>too many users</html>", 0
                if how == "other":
                    data = data[::-1]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                if how not in ("unsized", "endless", "page"):
                    self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                body = data[start:] * (2 if how == "endless" else 1)
                self.wfile.write(body[: host.cut_after] if how == "cut" else body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, how, name):
        return f"http://127.0.0.1:{self.server.server_port}/{how}/{name}"

    def source(self, name, data, *hows, folder=None):
        self.files[name] = data
        return Source(name, tuple(self.url(how, name) for how in hows), len(data), md5(data), folder)


@pytest.fixture
def host():
    found = Host()
    yield found
    found.server.shutdown()
    found.server.server_close()


def dead_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/file.bin"


def test_a_file_is_loaded_and_its_growth_told(host, tmp_path):
    told = []
    file = download(host.source("file.bin", CONTENT, "plain"), tmp_path, lambda *step: told.append(step))
    assert file.read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]
    assert told[-1] == ("file.bin", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_whole_file_is_not_loaded_again(host, tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    download(host.source("file.bin", CONTENT, "plain"), tmp_path)
    assert not host.asked


def test_a_damaged_file_is_replaced(host, tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT[::-1])
    assert download(host.source("file.bin", CONTENT, "plain"), tmp_path).read_bytes() == CONTENT


def test_an_unfinished_download_goes_on_where_it_was(host, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1234])
    assert download(host.source("file.bin", CONTENT, "plain"), tmp_path).read_bytes() == CONTENT
    assert host.asked == [("plain", "bytes=1234-")]


def test_a_connection_that_breaks_is_taken_up_again(host, tmp_path):
    assert download(host.source("file.bin", CONTENT, "cut"), tmp_path).read_bytes() == CONTENT
    assert host.asked == [("cut", None), *(("cut", f"bytes={n}00000-") for n in (1, 2, 3))]


def test_a_server_without_ranges_starts_over(host, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"of another try")
    assert download(host.source("file.bin", CONTENT, "noranges"), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("how", ["plain", "full"])
def test_a_part_of_another_file_is_noticed_and_loaded_anew(how, host, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"of another file")
    assert download(host.source("file.bin", CONTENT, how), tmp_path).read_bytes() == CONTENT
    assert host.asked == [(how, "bytes=15-"), (how, None)]


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 9])
def test_a_part_that_is_too_long_or_wrong_is_loaded_anew(size, host, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(bytes(size))
    assert download(host.source("file.bin", CONTENT, "plain"), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("bad", ["gone", "page", "other", "endless", "dead"])
def test_a_source_that_fails_is_followed_by_the_next(bad, host, tmp_path):
    source = host.source("file.bin", CONTENT, "gone" if bad == "dead" else bad, "unsized")
    if bad == "dead":
        source = Source(source.file, (dead_address(), *source.urls[1:]), source.size, source.md5)
    assert download(source, tmp_path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_the_next_source_goes_on_with_what_the_first_one_gave(host, tmp_path):
    first = host.source("file.bin", CONTENT, "cut", "plain")
    host.cut_after = 0
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:777])
    assert download(first, tmp_path).read_bytes() == CONTENT
    assert host.asked == [("cut", "bytes=777-"), ("plain", "bytes=777-")]


def test_a_web_page_costs_nothing_of_what_was_loaded(host, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:777])
    assert download(host.source("file.bin", CONTENT, "page", "plain"), tmp_path).read_bytes() == CONTENT
    assert host.asked == [("page", "bytes=777-"), ("plain", "bytes=777-")]


def test_a_folder_that_cannot_be_written_is_not_taken_for_a_bad_source(host, tmp_path):
    (tmp_path / "file.bin.part").mkdir()
    with pytest.raises(InputError, match=r"file\.bin\.part: cannot be written"):
        download(host.source("file.bin", CONTENT, "plain", "unsized"), tmp_path)
    assert len(host.asked) == 1


def test_no_source_is_one_line_with_what_each_one_said(host, tmp_path):
    source = host.source("file.bin", CONTENT, "gone", "other", "page")
    said = r"file\.bin: no source gave the whole file \(.*gone.*HTTP 404.*other.*another checksum.*page.*a web page"
    with pytest.raises(RunError, match=said) as error:
        download(source, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "file.bin").exists()


def test_what_came_is_kept_when_all_sources_fail(host, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "PIECE", 1000)
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:50])
    with pytest.raises(RunError, match="What came is kept"):
        download(host.source("file.bin", CONTENT, "gone"), tmp_path)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:50]


def test_a_full_disk_is_not_taken_for_a_bad_source(host, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_module, "_opened", lambda *_: Full())
    with pytest.raises(RunError, match="the disk is full"):
        download(host.source("file.bin", CONTENT, "plain", "noranges"), tmp_path)
    assert len(host.asked) == 1


# --- archives ---------------------------------------------------------------------------------------------------------


def tar(path, *entries):
    with tarfile.open(path, "w:gz") as archive:
        for entry in entries:
            member, data = entry if isinstance(entry[0], tarfile.TarInfo) else (tarfile.TarInfo(entry[0]), entry[1])
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def zipped(path, *entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("pack", [tar, zipped])
def test_an_archive_is_unpacked_in_place_of_what_is_there(pack, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").write_bytes(b"old")
    archive = pack(
        tmp_path / f"a.{'zip' if pack is zipped else 'tgz'}", ("set/a", b"1"), ("set/in/b", b"22"), ("x", b"3")
    )
    unpack(archive, tmp_path, "set")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {archive.name, "set/a", "set/in/b"}
    assert (tmp_path / "set" / "in" / "b").read_bytes() == b"22"


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize("name", ["../evil", "set/../../evil", "/evil", "set\\..\\evil", "C:evil"])
def test_a_member_that_leads_elsewhere_is_refused(pack, name, tmp_path):
    archive = pack(tmp_path / f"a.{'zip' if pack is zipped else 'tgz'}", ("set/a", b"1"), (name, b"22"))
    with pytest.raises(InputError, match="has a member that leads elsewhere"):
        unpack(archive, tmp_path, "set")
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_links_are_passed_over(tmp_path):
    link = tarfile.TarInfo("set/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    unpack(tar(tmp_path / "a.tgz", ("set/a", b"1"), (link, b"")), tmp_path, "set")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["a"]


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "LARGEST", 10)
    with pytest.raises(InputError, match="unpacks to more than 10 bytes"):
        unpack(tar(tmp_path / "a.tgz", ("set/a", bytes(6)), ("set/b", bytes(6))), tmp_path, "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"<html>", lambda d: d[:-900]])
@pytest.mark.parametrize("pack", [tar, zipped])
def test_a_damaged_archive_is_refused(pack, damage, tmp_path):
    archive = pack(tmp_path / f"a.{'zip' if pack is zipped else 'tgz'}", ("set/a", CONTENT), ("set/b", CONTENT))
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(InputError, match="cannot be unpacked"):
        unpack(archive, tmp_path, "set")
    assert not (tmp_path / "set").exists()


def test_another_archive_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no folder set; it is another archive"):
        unpack(tar(tmp_path / "a.tgz", ("other/a", b"1")), tmp_path, "set")


# --- a whole set ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar10(host, tmp_path, monkeypatch):
    """CIFAR-10 with 20 training and 4 test images, on the host."""
    files = load_info("cifar10").files
    monkeypatch.setitem(files.counts, "train", 20)
    monkeypatch.setitem(files.counts, "test", 4)
    x = np.random.default_rng(0).integers(0, 256, (24, 3073), dtype=np.uint8)
    x[:, 0] = np.arange(24) % 10
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    entries = [(f"cifar-10-batches-bin/{name}", x[4 * i : 4 * i + 4].tobytes()) for i, name in enumerate(names)]
    packed = tar(tmp_path / "made.tgz", *entries).read_bytes()
    source = host.source("cifar-10-binary.tar.gz", packed, "gone", "plain", folder="cifar-10-batches-bin")
    monkeypatch.setitem(SOURCES, "cifar10", ((source,),))
    return files


def test_getting_a_set_loads_it_once(cifar10, host, tmp_path):
    root = tmp_path / "new" / "data"
    assert get(cifar10, root) == root / "cifar-10-batches-bin"
    assert len(cifar10.load(data_dir=root).train) == 18
    asked = len(host.asked)
    assert get(cifar10, root) == root / "cifar-10-batches-bin"
    assert len(host.asked) == asked


def test_getting_a_set_mends_what_is_damaged_without_the_network(cifar10, host, tmp_path):
    folder = get(cifar10, tmp_path)
    (folder / "data_batch_2.bin").write_bytes(b"cut")
    (folder / "data_batch_3.bin").unlink()
    asked = len(host.asked)
    get(cifar10, tmp_path)
    cifar10.load(data_dir=tmp_path)
    assert len(host.asked) == asked, "the archive was there"


def test_an_archive_that_was_copied_is_unpacked_without_the_network(cifar10, host, tmp_path):
    for place in (tmp_path / "a", tmp_path / "b" / "cifar10"):
        place.mkdir(parents=True)
        (place / "cifar-10-binary.tar.gz").write_bytes(host.files["cifar-10-binary.tar.gz"])
    for name in "ab":
        get(cifar10, tmp_path / name)
        cifar10.load(data_dir=tmp_path / name)
    assert not host.asked


def test_the_command_gets_a_set_and_says_its_licence(cifar10, tmp_path, capsys):
    from crdnd.cli import main

    for words, expected in ((["cifar10"], "please cite: A. Krizhevsky"), (["digits"], "nothing to get")):
        with pytest.raises(SystemExit) as stop:
            main(["data", "get", *words, "--data-dir", str(tmp_path / "d")])
        assert (stop.value.code, expected in capsys.readouterr().out) == (0, True)


def test_the_table_of_sources_is_whole():
    assert set(UNPACKED) <= set(SOURCES)
    for name, ways in SOURCES.items():
        assert load_info(name).files is not None
        for source in (source for way in ways for source in way):
            assert re.fullmatch(r"[0-9a-f]{32}", source.md5)
            assert source.size > 1000
            assert source.urls
            assert all(url.endswith("/" + source.file) and url.startswith("http") for url in source.urls)
    checksums = [source.md5 for ways in SOURCES.values() for way in ways for source in way]
    assert len(set(checksums)) == len(checksums)
