"""Certificates of an authority of the test's own."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    authority: str
    certificate: str
    """Of 127.0.0.1 and localhost."""
    key: str


def certificates(folder: Path) -> Certificates:
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1", "localhost")
    names = [str(folder / name) for name in ("authority.pem", "certificate.pem", "key.pem")]
    authority.cert_pem.write_to_path(names[0])
    for blob in made.cert_chain_pems:
        blob.write_to_path(names[1], append=True)
    made.private_key_pem.write_to_path(names[2])
    return Certificates(*names)
