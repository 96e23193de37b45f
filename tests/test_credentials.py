import ssl
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.credentials import Certificates, main, make_certificates, public_half
from smi_fed.checks import SettingError

HOSTS = ["superlink.example.org", "192.0.2.10", "2001:db8::10", "localhost"]


def certificates(directory, *more):
    assert main(["superlink", str(directory), *(word for host in HOSTS for word in ("--host", host)), *more]) == 0
    return Certificates.at(directory)


def modes(directory):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


def connected(server, host, authority):
    """A handshake in memory: whether somebody who trusts the authority accepts the server as `host`."""
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=authority)
    theirs.load_cert_chain(server.certificate, server.key)
    ours.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [ours.wrap_bio(back, there, server_hostname=host), theirs.wrap_bio(there, back, server_side=True)]
    for end in ends * 2:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError:
            return False
    return ends[0].version() == "TLSv1.3"


def test_a_superlink_is_known_by_its_names_and_by_no_other(tmp_path):
    files = certificates(tmp_path / "made", "--days", "30")
    assert modes(tmp_path) == {"made": 0o700}
    assert modes(tmp_path / "made") == {
        "ca.crt": 0o644,
        "ca.key": 0o600,
        "superlink.crt": 0o644,
        "superlink.key": 0o600,
    }
    own = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "superlink.example.org"]
    addresses = [str(each) for each in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["127.0.0.1", "::1", "192.0.2.10", "2001:db8::10"]
    assert isinstance(own.public_key().curve, ec.SECP384R1)
    assert (own.not_valid_after_utc - own.not_valid_before_utc).days == 30
    assert all(connected(files, host, files.authority) for host in (*HOSTS, "127.0.0.1"))
    assert not connected(files, "example.org", files.authority)
    assert not connected(files, "192.0.2.11", files.authority)


def test_a_certificate_is_made_anew_under_the_authority_that_nodes_have(tmp_path):
    first = certificates(tmp_path / "made")
    authority, before = first.authority.read_bytes(), first.certificate.read_bytes()
    again = certificates(tmp_path / "made")
    assert again.authority.read_bytes() == authority
    assert again.certificate.read_bytes() != before
    assert connected(again, HOSTS[0], first.authority)
    other = certificates(tmp_path / "other")
    assert not connected(again, HOSTS[0], other.authority)


def test_a_node_has_a_key_that_flower_takes_and_keeps_it(tmp_path, capsys):
    assert main(["node", str(tmp_path / "made")]) == 0
    path = tmp_path / "made" / "node.key"
    assert modes(path.parent) == {"node.key": 0o600, "node.key.pub": 0o644}
    key = serialization.load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key.curve, ec.SECP384R1)
    assert serialization.load_ssh_public_key(public_half(path).read_bytes()) == key.public_key()
    before = path.read_bytes()
    assert main(["node", str(tmp_path / "made")]) == 2
    assert "File exists" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("host", ["https://superlink", "superlink:8443", "300.1.1.1", "a b", "", "a-.org"])
def test_what_is_no_host_is_refused(tmp_path, host):
    with pytest.raises(SettingError, match=f"^--host: got {host!r}, allowed: a DNS name or an IP address"):
        make_certificates(tmp_path / "made", [host])
    assert not (tmp_path / "made").exists()
