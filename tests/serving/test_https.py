"""The endpoint over HTTPS, on a real Serve."""

import subprocess
from pathlib import Path

import httpx
import pytest
from certificates import Certificates, certificates

from app.config import AskConfig, ServeConfig, validate
from app.errors import UserError
from app.serving.ask import ask
from app.serving.launch import check_folders, serve_application, stop_application


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


def config(tls: Certificates, **values) -> ServeConfig:
    return validate(ServeConfig, {"tls": {"certificate": tls.certificate, "key": tls.key}} | values)


@pytest.mark.ray
def test_an_endpoint_with_a_certificate_speaks_https_alone(ray_cluster, tls, model_dir, free_port):
    generator = {"model": str(model_dir), "precision": "fp32", "threads": 1}
    url = serve_application(config(tls, port=free_port, generator=generator))
    try:
        assert url == f"https://127.0.0.1:{free_port}"
        asked = AskConfig(question="What do alpacas eat?", url=url, max_tokens=3, ca_file=tls.authority)
        assert ask(asked)["usage"]["completion_tokens"] == 3
        with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
            ask(asked.model_copy(update={"ca_file": None}))
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{free_port}/healthz", timeout=10, trust_env=False)
    finally:
        stop_application()


def test_a_certificate_that_cannot_be_used_is_told_before_anything_starts(tls, tmp_path: Path):
    check_folders(config(tls))
    other = certificates(tmp_path)
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", other.key, "-aes256", "-passout", "pass:word", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    for key in (other.key, str(locked), str(tmp_path / "none.pem")):
        with pytest.raises(UserError, match=r"tls\.certificate=.* and tls\.key=.* cannot be used"):
            check_folders(config(Certificates(tls.authority, tls.certificate, key)))


def test_an_authority_that_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="ca_file=.* cannot be used"):
        ask(AskConfig(question="?", url="https://127.0.0.1:9", ca_file=str(tmp_path / "none.pem")))
