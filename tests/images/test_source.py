import base64
import http.server
import io
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from orpo_dist.errors import BadRow
from orpo_dist.images import source as image_source
from orpo_dist.images.decode import open_image
from orpo_dist.images.source import ImageSource, fetch_all, is_url


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """images/a.png inside, secret.png outside, and links both ways."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png("blue"))
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "images" / "a.png")
    (root / "loop").symlink_to(root / "loop")
    return root


def stored(value, beside: Path, **options):
    return ImageSource(**options).stored(value, "images", str(beside / "pairs.jsonl"))


def kind(value, beside: Path, **options) -> str:
    with pytest.raises(BadRow) as caught:
        stored(value, beside, **options)
    assert caught.value.column == "images"
    return caught.value.kind


DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "value",
    [
        png(),
        [png()],
        {"bytes": png(), "path": None},
        {"bytes": png(), "path": "../a.png"},  # what datasets notes beside the bytes is a name, not a place
        [{"bytes": png(), "path": "a.png"}],
        DATA_URL,
        {"url": DATA_URL},
        {"type": "image_url", "image_url": {"url": DATA_URL}},
        {"base64": base64.b64encode(png()).decode()},
        {"image": png()},
        base64.b64encode(png()).decode(),
        [base64.b64encode(png()).decode()],
        base64.urlsafe_b64encode(png()).decode().rstrip("="),
        base64.encodebytes(png()).decode(),  # in lines
        {"bytes": base64.b64encode(png()).decode()},
        {"bytes": DATA_URL, "path": None},
        {"bytes": list(png())},
        {"type": "Buffer", "data": list(png())},
        str({"bytes": png(), "path": None}),  # as pandas writes it to CSV
        "data:image/png," + "".join(f"%{byte:02x}" for byte in png()),
    ],
)
def test_encoded_images(value, folder):
    assert stored(value, folder) == [{"bytes": png(), "path": None}]


@pytest.mark.parametrize(
    "value",
    [
        "images/a.png",
        ["images/a.png"],
        Path("images/a.png"),
        {"path": "images/a.png"},
        {"bytes": None, "path": "images/a.png"},
        "images/../images/a.png",
        "in.png",
        '["images/a.png"]',
        "['images/a.png']",
        " images/a.png ",
    ],
)
def test_paths_start_from_the_file_of_the_row(value, folder):
    assert stored(value, folder) == [{"bytes": None, "path": str(folder / "images" / "a.png")}]


def test_absolute_paths_and_file_urls_inside(folder):
    for value in (str(folder / "images" / "a.png"), f"file://{folder}/images/a.png"):
        assert stored(value, folder)[0]["path"] == str(folder / "images" / "a.png")


def test_image_folder(folder, tmp_path):
    (image,) = stored("a.png", folder, folder=str(folder / "images"))
    assert image["path"] == str(folder / "images" / "a.png")
    assert kind("../out.png", folder, folder=str(folder / "images")) == "image outside"
    assert stored("secret.png", folder, folder=str(tmp_path))[0]["path"] == str(tmp_path / "secret.png")


@pytest.mark.parametrize(
    "value",
    [
        "../secret.png",
        "images/../../secret.png",
        "out.png",
        "up/secret.png",
        "/etc/passwd",
        "file:///etc/passwd",
        {"path": "../secret.png"},
        {"bytes": None, "path": "out.png"},
        '["../secret.png"]',
        "/proc/self/environ",
        "../data-of-others/a.png",
    ],
)
def test_paths_cannot_leave_the_folder(value, folder):
    assert kind(value, folder) == "image outside"
    assert len(stored(value, folder, allow_outside=True)) == 1


def test_rows_of_no_file_start_from_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert ImageSource().stored("in.png", "images", None)[0]["path"] == str(folder / "images" / "a.png")
    with pytest.raises(BadRow, match="lies outside of"):
        ImageSource().stored("../secret.png", "images", None)


def test_the_caches_of_the_libraries_are_inside_for_rows_of_no_file(folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder.parent)
    assert ImageSource().stored(str(folder.parent / "secret.png"), "images", None)
    assert kind(str(folder.parent / "secret.png"), folder) == "image outside"


@pytest.mark.parametrize("value", [None, "", [], " ", "[]"])
def test_no_image(value, folder):
    assert stored(value, folder) == []


@pytest.mark.parametrize(
    "value, expected",
    [
        ([None], "missing image"),
        ({"bytes": None, "path": None}, "missing image"),
        (7, "wrong type"),
        ([["images/a.png"]], "wrong type"),
        ("s3://bucket/a.png", "wrong type"),
        ("data:image/png;base64", "unreadable image"),
        ("data:image/png;base64,abc", "unreadable image"),
        ("loop/a.png", "unreadable image"),
        ("a\0b.png", "unreadable image"),
        ("https://example.org/a.png", "image URL"),
        ({"type": "image_url", "image_url": {"url": "HTTP://example.org/a.png"}}, "image URL"),
    ],
)
def test_what_is_no_image(value, expected, folder):
    assert kind(value, folder) == expected


# -- addresses --


class Web(http.server.BaseHTTPRequestHandler):
    failures = 0

    def do_GET(self):
        if self.path == "/flaky.png" and Web.failures < 2:
            Web.failures += 1
            self.send_error(503)
        elif self.path in ("/a.png", "/flaky.png"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())
        elif self.path == "/to-a.png":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
        elif self.path == "/to-file.png":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif self.path == "/to-ftp.png":
            self.send_response(302)
            self.send_header("Location", "ftp://localhost/a.png")
            self.end_headers()
        elif self.path in ("/drip.png", "/flood.png"):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(200):
                    self.wfile.write(b"x" * (1 if self.path == "/drip.png" else 1 << 16))
                    time.sleep(0.02 if self.path == "/drip.png" else 0)
            except OSError:
                pass
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(image_source, "URL_TIMEOUT", 1.0)
    monkeypatch.setattr("orpo_dist.images.web.is_public", lambda address: address == "127.0.0.1")
    Web.failures = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def fetched(address: str):
    (image,) = ImageSource(allow_urls=True).stored(address, "images", None)
    assert is_url(image)
    return fetch_all([image], "images")[address]


@pytest.mark.parametrize("name", ["a.png", "to-a.png", "flaky.png"])
def test_an_address_is_fetched_where_allowed(web, name):
    assert fetched(f"{web}/{name}") == {"bytes": png(), "path": None}


@pytest.mark.parametrize("name", ["none.png", "to-file.png", "to-ftp.png", "drip.png"])
def test_what_cannot_be_fetched(web, name, monkeypatch):
    monkeypatch.setattr(image_source, "URL_ATTEMPTS", 1)
    bad = fetched(f"{web}/{name}")
    assert isinstance(bad, BadRow) and bad.kind == "missing image", bad


def test_more_bytes_than_allowed(web, monkeypatch):
    monkeypatch.setattr(image_source, "MAX_BYTES", 1 << 20)
    bad = fetched(f"{web}/flood.png")
    assert isinstance(bad, BadRow) and bad.kind == "image too large"


def test_each_address_once_and_files_not_at_all(web):
    images = [{"bytes": None, "path": f"{web}/a.png"}] * 3 + [{"bytes": png(), "path": None}]
    assert list(fetch_all(images, "images")) == [f"{web}/a.png"]
    assert fetch_all(images[3:], "images") == {}


@pytest.mark.parametrize(
    "value",
    [
        "/9j/" + "4AAQSkZJRgABAQAAAQABAAD" * 50_000,  # a JPEG that breaks off begins like an absolute path
        "not an image " * 50_000,
        {"bytes": "!" * 100_000},
        {"path": "a" * 100_000},
        "/" + "a" * 100_000,
        b"x" * 100_000,
        "data:image/png;base64" + "A" * 100_000,
        [[0, 1, 2] * 50_000, [3]],
    ],
    ids=lambda value: str(value)[:24],
)
def test_messages_are_short_and_blame_no_option(value, folder):
    with pytest.raises(BadRow) as caught:
        for image in stored(value, folder):
            open_image(image, "images")
    assert caught.value.kind in ("unreadable image", "truncated image", "wrong type")
    assert len(caught.value.reason) < 400


def test_paths_that_could_be_base64(folder):
    (folder / "abcd").mkdir()
    name = "abcd/" + "efgh" * 20
    assert stored(name, folder) == [{"bytes": None, "path": str(folder / name)}]
