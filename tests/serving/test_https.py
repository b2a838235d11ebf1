"""Certificates before an endpoint starts, and where it is asked; test_pacos_serve.py has one that runs."""

import subprocess
from pathlib import Path

import pytest
from certificates import Certificates, certificates

from app.config import AskConfig, ServeConfig, validate
from app.errors import UserError
from app.serving.ask import ask
from app.serving.launch import check_folders


def config(tls: Certificates) -> ServeConfig:
    return validate(ServeConfig, {"tls": {"certificate": tls.certificate, "key": tls.key}})


def test_a_certificate_that_cannot_be_used_is_told_before_anything_starts(tmp_path_factory, tmp_path: Path):
    tls, other = certificates(tmp_path_factory.mktemp("certificates")), certificates(tmp_path)
    check_folders(config(tls))
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", other.key, "-aes256", "-passout", "pass:word", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    for key in (other.key, str(locked), str(tmp_path / "none.pem")):
        with pytest.raises(UserError, match=r"tls\.certificate=.* and tls\.key=.* cannot be used"):
            check_folders(config(Certificates(tls.authority, tls.certificate, key)))


def test_an_authority_that_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="ca_file=.* cannot be used"):
        ask(AskConfig(question="?", url="https://127.0.0.1:9", ca_file=str(tmp_path / "none.pem")))
