"""An S3 server on this machine, for run folders in a bucket."""

import os

import fsspec
import pytest
from moto.server import ThreadedMotoServer

# As a user of such a server sets them; nothing is asked of any other.
_SETTINGS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def bucket():
    """The URL of a bucket on a server of this test run."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = _SETTINGS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()
