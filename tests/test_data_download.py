"""Named sets from a server on this machine: archives, whole sets, and the table of sources."""

import hashlib
import io
import re
import tarfile
import zipfile

import numpy as np
import pytest

from crdnd.data import _download as download_module
from crdnd.data import load_info
from crdnd.data._download import get, is_whole, unpack
from crdnd.data._sources import SOURCES, UNPACKED, Source
from crdnd.errors import InputError
from web import Server

CONTENT = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8).tobytes()


def source(server, name, data, *bases, folder=None):
    """A file on the server, at each of these bases; where the server has it alone at the last one, the others fail."""
    server.files[f"{bases[-1]}/{name}"] = data
    urls = tuple(f"{server.root}{base}/{name}" for base in bases)
    return Source(name, urls, len(data), hashlib.md5(data, usedforsecurity=False).hexdigest(), folder)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = Server()
    yield found
    found.close()


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
def cifar10(server, tmp_path, monkeypatch):
    """CIFAR-10 with 20 training and 4 test images, on the server."""
    files = load_info("cifar10").files
    monkeypatch.setitem(files.counts, "train", 20)
    monkeypatch.setitem(files.counts, "test", 4)
    x = np.random.default_rng(0).integers(0, 256, (24, 3073), dtype=np.uint8)
    x[:, 0] = np.arange(24) % 10
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    entries = [(f"cifar-10-batches-bin/{name}", x[4 * i : 4 * i + 4].tobytes()) for i, name in enumerate(names)]
    packed = tar(tmp_path / "made.tgz", *entries).read_bytes()
    archive = source(server, "cifar-10-binary.tar.gz", packed, "/gone", "/there", folder="cifar-10-batches-bin")
    monkeypatch.setitem(SOURCES, "cifar10", ((archive,),))
    return files


def test_getting_a_set_loads_it_once(cifar10, server, tmp_path):
    root = tmp_path / "new" / "data"
    assert get(cifar10, root) == root / "cifar-10-batches-bin"
    assert len(cifar10.load(data_dir=root).train) == 18
    asked = len(server.asked)
    assert get(cifar10, root) == root / "cifar-10-batches-bin"
    assert len(server.asked) == asked


def test_the_growth_of_each_file_is_told_with_its_name_and_size(server, tmp_path, monkeypatch):
    files = load_info("mnist").files
    monkeypatch.setitem(SOURCES, "mnist", (tuple(source(server, name, CONTENT, "/m") for name in ("a.gz", "b.gz")),))
    told = []
    with pytest.raises(InputError, match="data mnist"):  # these are no images
        get(files, tmp_path, lambda *step: told.append(step))
    size = len(CONTENT)
    assert [step for step in told if step[1] == size] == [("a.gz", size, size), ("b.gz", size, size)]
    assert {step[2] for step in told} == {size}
    assert [done for name, done, _ in told if name == "a.gz"] == [1 << 18, size]
    found = SOURCES["mnist"][0][0]
    assert is_whole(found, tmp_path / "mnist")
    (tmp_path / "mnist" / "a.gz").write_bytes(CONTENT[::-1])
    assert not is_whole(found, tmp_path / "mnist")


def test_getting_a_set_mends_what_is_damaged_without_the_network(cifar10, server, tmp_path):
    folder = get(cifar10, tmp_path)
    (folder / "data_batch_2.bin").write_bytes(b"cut")
    (folder / "data_batch_3.bin").unlink()
    asked = len(server.asked)
    get(cifar10, tmp_path)
    cifar10.load(data_dir=tmp_path)
    assert len(server.asked) == asked, "the archive was there"


def test_an_archive_that_was_copied_is_unpacked_without_the_network(cifar10, server, tmp_path):
    for place in (tmp_path / "a", tmp_path / "b" / "cifar10"):
        place.mkdir(parents=True)
        (place / "cifar-10-binary.tar.gz").write_bytes(server.files["/there/cifar-10-binary.tar.gz"])
    for name in "ab":
        get(cifar10, tmp_path / name)
        cifar10.load(data_dir=tmp_path / name)
    assert not server.asked


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
        for found in (found for way in ways for found in way):
            assert re.fullmatch(r"[0-9a-f]{32}", found.md5)
            assert found.size > 1000
            assert found.urls
            assert all(url.endswith("/" + found.file) and url.startswith("http") for url in found.urls)
    checksums = [found.md5 for ways in SOURCES.values() for way in ways for found in way]
    assert len(set(checksums)) == len(checksums)
