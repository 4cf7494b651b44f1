"""Stores of this machine, for the tests of remote media."""

import datetime
import ipaddress
import os

import botocore.session
import pytest

from megatron_eagle.data.media.remote import files
from tests.data.media.remote.servers import Proxy, Web

os.environ.setdefault("MOTO_S3_CUSTOM_ENDPOINTS", "")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """No credentials, proxies or endpoints but those of a test; and little patience."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "HF_", "STORAGE_EMULATOR")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(files, "_FIRST_WAIT", 0.01)


@pytest.fixture(scope="session")
def moto():
    """The address of an S3 server with the bucket `media`, and a client of it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    session = botocore.session.get_session()
    session.set_credentials("id", "secret")
    client = session.create_client("s3", endpoint_url=address, region_name="us-east-1")
    client.create_bucket(Bucket="media")
    yield address, client
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    """A client of an S3 server with the bucket `media`, which others reach through a proxy: both."""
    address, client = moto
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with Proxy(behind=address).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield client, proxy
    for item in client.list_objects_v2(Bucket="media").get("Contents", ()):
        client.delete_object(Bucket="media", Key=item["Key"])


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Files of a certificate for this machine, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "certificate.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return str(folder / "certificate.pem"), str(folder / "key.pem")


@pytest.fixture
def web(certificate, monkeypatch):
    """A web server that speaks TLS."""
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    with Web(files_of_certificate=certificate).running() as server:
        yield server
