"""Downloads from a server on this machine that can be told to misbehave."""

import hashlib
import io
import socket
import threading
from pathlib import Path

import pytest

from crdnd import download as module
from crdnd.download import cache_folder, download
from crdnd.errors import InputError, RunError
from web import Server

CONTENT = bytes(range(256)) * 40
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "WAITS", (0.0, 0.0))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = Server(CONTENT)
    yield found
    found.close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "below" / "file.bin"


def nothing_but(target, *names):
    return {path.name for path in target.parent.iterdir() if not path.name.startswith(".")} == set(names)


def test_a_file_arrives_whole_and_is_asked_for_once(server, target):
    seen = []
    assert download(server.url, target, sha256=SHA, size=len(CONTENT), progress=lambda *at: seen.append(at)) == target
    assert target.read_bytes() == CONTENT
    assert nothing_but(target, "file.bin")
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    download(server.url, target, sha256=SHA.upper())
    assert server.asked == [None]


def test_an_md5_will_do_where_there_is_nothing_better(server, target):
    download(server.url, target, md5=hashlib.md5(CONTENT).hexdigest())  # noqa: S324
    assert target.read_bytes() == CONTENT
    with pytest.raises(InputError, match="needs a sha256 or md5"):
        download(server.url, target)


def test_a_cut_download_goes_on_behind_what_came(server, target):
    server.cuts = [1000, 500]
    download(server.url, target, sha256=SHA)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-", "bytes=1500-"]


def test_a_part_of_an_earlier_call_is_gone_on_with(server, target):
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes(CONTENT[:77])
    download(server.url, target, sha256=SHA)
    assert target.read_bytes() == CONTENT
    assert server.asked == ["bytes=77-"]


@pytest.mark.parametrize("part", [b"of another file", CONTENT + b"too long", CONTENT])
def test_a_part_that_does_not_fit_costs_time_and_no_more(server, target, part):
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes(part)
    download(server.url, target, sha256=SHA)
    assert target.read_bytes() == CONTENT
    assert nothing_but(target, "file.bin")


def test_a_server_without_ranges_sends_it_all_again(server, target):
    server.ranges, server.cuts = False, [1000]
    download(server.url, target, sha256=SHA)
    assert target.read_bytes() == CONTENT


def test_a_damaged_file_is_replaced(server, target):
    target.parent.mkdir()
    target.write_bytes(CONTENT[:-1])
    download(server.url, target, sha256=SHA)
    assert target.read_bytes() == CONTENT


def test_another_file_than_the_checksum_says_is_refused_and_not_kept(server, target):
    with pytest.raises(InputError, match=f"another file .its sha256 is {SHA}, not {'0' * 64}") as error:
        download(server.url, target, sha256="0" * 64)
    assert "\n" not in str(error.value)
    assert nothing_but(target)
    assert len(server.asked) == 1


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_another_size_is_refused_before_it_is_loaded(server, target, size):
    with pytest.raises(InputError, match=f"{len(CONTENT)} bytes, not {size}"):
        download(server.url, target, sha256=SHA, size=size)
    assert nothing_but(target)


def test_a_file_whose_length_the_server_does_not_say_is_read_to_its_end_and_no_further_than_its_size(server, target):
    server.sized = False
    download(server.url, target, sha256=SHA)
    assert target.read_bytes() == CONTENT
    server.content = CONTENT * 2
    target.unlink()
    with pytest.raises(InputError, match=f"another file .more than {len(CONTENT)} bytes"):
        download(server.url, target, sha256=SHA, size=len(CONTENT))
    assert nothing_but(target)


@pytest.mark.parametrize(
    ("kind", "content"),
    [("text/html; charset=utf-8", CONTENT), (None, b"\n<!DOCTYPE html><html>too many"), (None, b"<HTML>")],
)
def test_a_web_page_is_said_to_be_one_and_costs_nothing_of_what_was_loaded(server, target, kind, content):
    server.kind, server.content, server.ranges = kind, content, False
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes(CONTENT[:77])
    with pytest.raises(InputError, match="sends a web page instead of the file") as error:
        download(server.url, target, sha256=SHA)
    assert "\n" not in str(error.value)
    assert target.with_name("file.bin.part").read_bytes() == CONTENT[:77]


def test_the_next_source_is_asked_where_one_fails(server, target):
    server.states = [404]
    download([server.url, server.url], target, sha256=SHA)
    assert target.read_bytes() == CONTENT
    server.states = [404, 403]
    target.unlink()
    with pytest.raises(InputError, match=r"answers 404.*answers 403.*by hand"):
        download([server.url, server.url], target, sha256=SHA)


def dead_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/file.bin"


def test_every_source_is_asked_before_any_is_waited_for(server, target, monkeypatch):
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    server.cuts = [1000, 0]
    download([dead_address(), server.url + "?a", server.url + "?b"], target, sha256=SHA)
    assert target.read_bytes() == CONTENT
    assert list(zip(server.paths, server.asked, strict=True)) == [
        ("/file.bin?a", None), ("/file.bin?a", "bytes=1000-"), ("/file.bin?b", "bytes=1000-"),
    ]  # fmt: skip
    assert not any(slept)


def test_a_source_that_has_nothing_is_not_asked_again_and_one_that_may_have_it_is(server, target):
    server.states = [404, 503, 503, 503]
    with pytest.raises(RunError, match=r"a answers 404.*b answers 503.*the same command goes on.*by hand") as error:
        download([server.url + "?a", server.url + "?b"], target, sha256=SHA)
    assert "\n" not in str(error.value)
    assert server.paths == ["/file.bin?a"] + ["/file.bin?b"] * 3


def test_a_folder_that_cannot_be_written_is_not_taken_for_a_bad_source(server, target):
    target.with_name("file.bin.part").mkdir(parents=True)
    server.ranges = False
    with pytest.raises(InputError, match=r"file\.bin\.part: cannot be written"):
        download([server.url, server.url], target, sha256=SHA)
    assert len(server.asked) == 1


def test_a_full_disk_is_not_taken_for_a_bad_source(server, target, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_opened", lambda *_: Full())
    with pytest.raises(RunError, match="the disk is full"):
        download([server.url, server.url], target, sha256=SHA)
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again(server, target):
    server.states = [503, 429]
    download(server.url, target, sha256=SHA)
    assert target.read_bytes() == CONTENT


def test_a_server_that_stays_away_is_the_machines_failure_and_what_came_is_kept(server, target):
    server.cuts = [1000, 0, 0, 0]
    with pytest.raises(RunError, match=r"stopped after 1000 of .*goes on"):
        download(server.url, target, sha256=SHA)
    assert target.with_name("file.bin.part").read_bytes() == CONTENT[:1000]
    server.close()
    with pytest.raises(RunError, match="cannot be reached"):
        download(server.url, target, sha256=SHA)
    assert nothing_but(target, "file.bin.part")


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://example.org/x", "/etc/hosts"])
def test_only_the_web_is_read(url, target):
    with pytest.raises(InputError, match="https:// or http:// alone"):
        download(url, target, sha256=SHA)


def test_a_redirect_is_followed_on_the_web_and_not_to_a_file_of_this_machine(server, target, tmp_path):
    download(server.url.replace("file.bin", "moved=/file.bin"), target, sha256=SHA)
    assert target.read_bytes() == CONTENT
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    with pytest.raises(InputError, match="302"):
        download(server.url.replace("file.bin", f"moved=file://{secret}"), tmp_path / "stolen", sha256=SHA)
    assert not (tmp_path / "stolen").exists()


def test_two_who_want_the_same_file_get_it_from_one_request(server, target):
    threads = [threading.Thread(target=download, args=(server.url, target), kwargs={"sha256": SHA}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert len(server.asked) == 1


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CRDND_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("CRDND_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder().name == "crdnd"
    assert Path.home() in cache_folder().parents
