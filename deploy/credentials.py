"""Trial certificates and node keys for a federation over several machines.

    python -m deploy.credentials superlink DIRECTORY --host superlink.example.org --host 192.0.2.10
    python -m deploy.credentials node DIRECTORY

The first makes an authority and a certificate of the SuperLink that it signed; where the
authority is already there, its key signs a certificate anew. The second makes the key of one
node, on that node: the private half stays there.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from smi_fed.checks import SettingError, require

CURVE = ec.SECP384R1()
"""P-384: of the NIST curves that Flower takes for node keys the one that it makes itself."""

LOCAL = ("localhost", "127.0.0.1", "::1")
"""In every certificate: the ServerApp's process reaches its SuperLink over loopback."""

AUTHORITY_DAYS = 3650
EARLIER = timedelta(minutes=5)
"""How long before now a certificate is valid, for clocks that are late."""


@dataclass(frozen=True)
class Certificates:
    """Files by which a SuperLink is known.

    Attributes:
        authority: certificate of who signed; all that nodes and `flwr` need.
        authority_key: signs further certificates; nobody needs it to run.
        certificate, key: the SuperLink's own.
    """

    authority: Path
    authority_key: Path
    certificate: Path
    key: Path

    @classmethod
    def at(cls, directory: Path) -> Certificates:
        """Where they stand in a directory, whether they are there or not."""
        return cls(*(directory / name for name in ("ca.crt", "ca.key", "superlink.crt", "superlink.key")))


def make_certificates(directory: Path, hosts: Sequence[str], days: int = 365) -> Certificates:
    """A certificate of a SuperLink, signed by the authority in the directory, which is made if it is not there.

    Args:
        directory: is made for its owner alone.
        hosts: names and addresses at which nodes and `flwr` reach the SuperLink; those of loopback are added.
        days: how long the SuperLink's certificate is valid.

    Raises:
        SettingError: a host that is neither a DNS name nor an IP address, or days below 1.
        OSError: the directory cannot be written.
    """
    names = [general_name(host) for host in dict.fromkeys([*LOCAL, *hosts])]
    require(days >= 1, "--days", days, "at least 1")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = Certificates.at(directory)
    if not files.authority_key.exists():
        own = ec.generate_private_key(CURVE)
        write_private(files.authority_key, pem(own))
        write_public(files.authority, signed(own, None, "smi-fed trial authority", AUTHORITY_DAYS))
    authority = serialization.load_pem_private_key(files.authority_key.read_bytes(), None)
    issuer = x509.load_pem_x509_certificate(files.authority.read_bytes())
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(CURVE)
    files.key.unlink(missing_ok=True)
    write_private(files.key, pem(key))
    write_public(files.certificate, signed(key, (issuer, authority), "smi-fed SuperLink", days, names))
    return files


def make_node_key(directory: Path) -> Path:
    """A node's private key, `node.key`, in OpenSSH's format; beside it `node.key.pub` for `flwr supernode register`.

    Args:
        directory: is made for its owner alone.

    Raises:
        FileExistsError: there is one; another would lock the node out.
        OSError: the directory cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, key = directory / "node.key", ec.generate_private_key(CURVE)
    write_private(path, pem(key, serialization.PrivateFormat.OpenSSH))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_public(public_half(path), public + b"\n")
    return path


def public_half(key: Path) -> Path:
    """Where the public half of a node's key stands."""
    return key.with_name(f"{key.name}.pub")


def general_name(host: str) -> x509.GeneralName:
    """A host as a certificate names it.

    Raises:
        SettingError: neither a DNS name nor an IP address.
    """
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        good = re.fullmatch(rf"{label}(\.{label})*", host) and not re.fullmatch(r"[\d.]+", host)
        require(bool(good), "--host", host, "a DNS name or an IP address, without a scheme or port")
        return x509.DNSName(host)


def signed(
    key: ec.EllipticCurvePrivateKey,
    by: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
    name: str,
    days: int,
    names: Sequence[x509.GeneralName] = (),
) -> bytes:
    """A certificate in PEM, with all that OpenSSL's strict mode asks for.

    Args:
        key: whose public half is certified.
        by: who signs, certificate and key; None is the key itself, as an authority.
        name: common name.
        names: alternative names, of a server.
    """
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    public, signer = key.public_key(), by[1] if by else key
    own = x509.SubjectKeyIdentifier.from_public_key(public)
    theirs = x509.SubjectKeyIdentifier.from_public_key(signer.public_key())
    builder = (
        x509.CertificateBuilder(by[0].subject if by else subject, subject, public, x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None if by else 0), critical=True)
        .add_extension(usage(signs=by is None), critical=True)
        .add_extension(own, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(theirs), critical=False)
    )
    if by:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def usage(signs: bool) -> x509.KeyUsage:
    """What a key is for: signing certificates, or signing what is said in a connection."""
    names = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    rest = dict.fromkeys([*names, "decipher_only"], False)
    return x509.KeyUsage(digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, **rest)


def pem(
    key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8
) -> bytes:
    """A private key in PEM, without a password: services start without somebody to ask."""
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write_private(path: Path, data: bytes) -> None:
    """A file that only its owner can read, from its first byte on.

    Raises:
        FileExistsError: it is there.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def write_public(path: Path, data: bytes) -> None:
    """A file that everybody may read, whatever the umask."""
    path.write_bytes(data)
    path.chmod(0o644)


def main(arguments: list[str] | None = None) -> int:
    """Make what is asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("superlink", help="an authority and a SuperLink's certificate")
    node = commands.add_parser("node", help="a node's key")
    for each in (server, node):
        each.add_argument("directory", type=Path, help="where files are written")
    server.add_argument("--host", action="append", required=True, help="a name or address of the SuperLink; repeatable")
    server.add_argument("--days", type=int, default=365, help="how long the certificate is valid")
    options = parser.parse_args(arguments)
    try:
        if options.command == "node":
            key = make_node_key(options.directory)
            print(f"private, stays here: {key}\nto register: {public_half(key)}")
        else:
            files = make_certificates(options.directory, options.host, options.days)
            print(f"for every node and for flwr: {files.authority}")
            print(f"for the SuperLink: {files.certificate}, {files.key}")
            print(f"signs further certificates, keep it elsewhere: {files.authority_key}")
    except (SettingError, OSError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
