import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.data.chunks import read_rows
from app.data.sources import SourceFile, as_json, fetch, file_hash, find_files, identity
from app.errors import UserError

ROWS = [{"instruction": 'a, "b"\nc', "input": "", "output": "é 🙂"}, {"instruction": "d", "input": "e", "output": "f"}]


def read(source: str, spool: Path) -> list:
    files = [fetch(file, spool / str(n)) for n, file in enumerate(find_files((source,)))]
    return [row for n, file in enumerate(files) for row in read_rows(as_json(file, spool / str(n)))]


def write_csv(path: Path, delimiter: str = ",") -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ROWS[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The same rows in every kind of file."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "array.json").write_text(json.dumps(ROWS))
    (folder / "lines.jsonl").write_text(lines)
    (folder / "lines.anything").write_text(lines)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "packed.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "table.parquet")
    write_csv(folder / "table.csv")
    write_csv(folder / "table.tsv", "\t")
    (folder / "packed.csv.gz").write_bytes(gzip.compress((folder / "table.csv").read_bytes()))
    return folder


def test_every_kind_of_file_gives_the_same_rows(files: Path, tmp_path: Path) -> None:
    for number, file in enumerate(sorted(files.iterdir())):
        assert read(str(file), tmp_path / str(number)) == ROWS, file.name


def test_chats_in_parquet_keep_their_structure(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    assert read(str(tmp_path / "chat.parquet"), tmp_path / "spool") == rows


def test_json_is_read_where_it_lies(files: Path, tmp_path: Path) -> None:
    (file,) = find_files((str(files / "array.json"),))
    assert as_json(fetch(file, tmp_path / "s"), tmp_path / "s") == files / "array.json"
    assert not (tmp_path / "s").exists()


def test_a_glob_gives_its_files_by_name_and_sources_stand_in_their_order(files: Path) -> None:
    found = find_files((str(files / "table.*"), str(files / "array.json")))
    assert [file.path.name for file in found] == ["table.csv", "table.parquet", "table.tsv", "array.json"]


def test_what_names_nothing_is_told(files: Path, tmp_path: Path) -> None:
    for source, part in [
        (str(tmp_path / "absent.json"), "no such file"),
        (str(files), r"is a folder; name the files in it, for example '.*\*\.jsonl'"),
        (str(tmp_path / "*.json"), "matches no file"),
        (f"file://{tmp_path}/absent.json", "no such file"),
        ("ftp9://host/x", "ftp9:// is not read; s3://, gs:// and file:// are"),
    ]:
        with pytest.raises(UserError, match=part):
            find_files((source,))
    with pytest.raises(UserError, match="twice"):
        find_files((str(files / "array.json"), str(files / "*.json")))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.parquet", b"PAR1 and nothing else", "is damaged"),
        ("a.parquet", b"text", "is damaged"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 1000, mtime=0)[:-20], "is damaged"),
        ("a.csv", "instruction,output\na,caf\xe9\n".encode("latin-1"), "not UTF-8"),
        ("a.csv", b'instruction,output\n"a,b\n', "is damaged"),
        ("a.bin", b"\x00\x01", "is of no known kind"),
    ],
)
def test_a_damaged_file_is_told(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=part) as caught:
        read(str(tmp_path / name), tmp_path / "spool")
    assert name in str(caught.value)


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    with pytest.raises(UserError, match="is empty"):
        identity(SourceFile("a.json", tmp_path / "a.json"))


def test_a_remote_file_is_copied_and_changes_its_identity_with_its_content(files: Path, tmp_path: Path) -> None:
    uri = f"file://{files}/lines.jsonl"
    (file,) = find_files((uri,))
    assert (file.name, file.remote) == (uri, uri)
    before = identity(file)
    assert file_hash(fetch(file, tmp_path / "spool")) == file_hash(SourceFile("", files / "lines.jsonl"))
    os.utime(files / "lines.jsonl", (1, 1))
    assert identity(file) != before
    assert read(f"file://{files}/*.jsonl", tmp_path / "other") == ROWS


@pytest.fixture
def s3(files: Path, monkeypatch: pytest.MonkeyPatch):
    """A server that speaks S3, with `files` in the bucket `data`; yields the query that a URI needs."""
    moto = pytest.importorskip("moto.server", reason="moto, which serves S3, is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    httpx.put(f"http://{host}:{port}/data")
    for file in files.iterdir():
        httpx.put(f"http://{host}:{port}/data/in/{file.name}", content=file.read_bytes()).raise_for_status()
    query = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    yield query
    server.stop()


def test_an_object_store_is_read_by_key_and_by_glob(s3: str, tmp_path: Path) -> None:
    assert read(f"s3://data/in/packed.json.gz{s3}", tmp_path / "1") == ROWS
    assert read(f"s3://data/in/table.*{s3}", tmp_path / "2") == ROWS * 3
    with pytest.raises(UserError, match="no such file"):
        find_files((f"s3://data/in/absent.json{s3}",))
    with_key = f"s3://someone:the-secret@data/in/packed.json.gz{s3}"
    (file,) = find_files((with_key,))
    assert (file.name, file.remote) == ("s3://data/in/packed.json.gz", with_key)
    assert read(with_key, tmp_path / "3") == ROWS


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as serves one dataset."""

    files: dict[str, bytes] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/someone/recipes/"):
            entries = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()]
            return self._send(json.dumps(entries).encode(), "application/json")
        if path == "/api/datasets/someone/recipes":
            siblings = [{"rfilename": name} for name in self.files]
            body = {"id": "someone/recipes", "sha": "1" * 40, "siblings": siblings}
            return self._send(json.dumps(body).encode(), "application/json")
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name in self.files:
            return self._send(self.files[name], "application/octet-stream")
        self.send_error(404)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        for key, value in {
            "Content-Type": kind, "Content-Length": str(len(body)), "ETag": '"x"', "X-Repo-Commit": "1" * 40
        }.items():  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_a_dataset_of_the_hub_gives_its_training_files(files: Path, tmp_path: Path) -> None:
    Hub.files = {
        "README.md": b"#",
        "recipes.py": b"raise SystemExit('code of a dataset ran')",
        "data/train-00000.parquet": (files / "table.parquet").read_bytes(),
        "data/test-00000.parquet": b"not wanted",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys\n"
        "from app.data.sources import find_files\n"
        "from app.errors import UserError\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        for file in find_files((name,)): print(file.name, file.path)\n"
        "    except UserError as error: print(error)\n"
    )
    # read when huggingface_hub is imported, hence a process of its own
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    names = ["someone/recipes", "hf://someone/recipes", "someone/absent"]
    result = subprocess.run(
        [sys.executable, "-c", code, *names], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    server.shutdown()
    one, other, absent = result.stdout.splitlines()
    name, path = one.split(" ", 1)
    assert one == other and name == "someone/recipes/data/train-00000.parquet"
    assert pq.read_table(path).to_pylist() == ROWS
    assert "'someone/absent': no such file, and the Hugging Face hub delivered no dataset of that name" in absent


def test_a_parquet_file_with_a_damaged_page_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows = [{"instruction": f"question {number}", "output": f"answer {number}"} for number in range(2000)]
    pq.write_table(pa.Table.from_pylist(rows), file, compression="none", use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56  # the first page's header
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        as_json(SourceFile(str(file), file), tmp_path / "spool")


def test_a_gzip_bomb_is_given_up_before_it_fills_the_disk(tmp_path: Path) -> None:
    bomb, spool = tmp_path / "a.jsonl.gz", tmp_path / "spool"
    bomb.write_bytes(gzip.compress(b" " * 200_000_000))
    with pytest.raises(UserError, match="more than 200 times larger"):
        as_json(SourceFile(str(bomb), bomb), spool)
    written = sum(file.stat().st_size for file in spool.rglob("*") if file.is_file())
    assert written <= 201 * bomb.stat().st_size + 2**20


def test_gzip_in_gzip_grows_no_further_than_gzip_may(tmp_path: Path) -> None:
    inner = gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 2_000_000, 9)
    bomb = tmp_path / "a.jsonl.gz.gz"
    bomb.write_bytes(gzip.compress(inner))
    assert 201 * bomb.stat().st_size + 2**20 < 70_000_000
    with pytest.raises(UserError, match="more than 200 times larger"):
        as_json(SourceFile(str(bomb), bomb), tmp_path / "spool")
    twice = tmp_path / "b.jsonl.gz"
    twice.write_bytes(gzip.compress(gzip.compress(b'{"instruction": "a", "output": "b"}\n')))
    assert as_json(SourceFile(str(twice), twice), tmp_path / "other").read_bytes().startswith(b'{"instruction"')
