"""The `crossrep serve` command."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import click

from crossrep import kafka
from crossrep.cli import bootstrap_option, cli
from crossrep.errors import CrossrepError
from crossrep.extras import extra

TOKEN = "CROSSREP_SERVE_TOKEN"


@cli.command()
@click.argument("space")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than this machine need a token.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free; the log says which.")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Folder of its own.  [default: CROSSREP_HOME/serve/SPACE]")
@click.option("--memory-mb", default=1024, show_default=True, type=click.IntRange(1), help="For keys in use; the others are on the disk.")
@click.option("--rocksdb-mb", default=64, show_default=True, type=click.IntRange(1), help="RocksDB's write buffers.")
@click.option(
    "--min-free-mb", default=256, show_default=True, type=click.IntRange(0), help="Least free space on the disk; with less, it waits."
)
@click.option(
    "--max-keys", default=1000, show_default=True, type=click.IntRange(1, 100_000), help="Keys of a batch; more are refused: 413."
)
@click.option("--max-waiting", default=256, show_default=True, type=click.IntRange(1), help="Requests waiting; more are refused: 503.")
@click.option("--max-lag", type=click.FloatRange(0), help="Not ready when further behind, in seconds.  [default: however far]")
@click.option("--client-timeout", default=10.0, show_default=True, help="Seconds a client may take to send a request or to take an answer.")
@click.option("--drain", default=10.0, show_default=True, help="Seconds that requests have to end after SIGTERM.")
@click.option("--token-file", type=click.Path(path_type=Path), help=f"Bearer tokens, one a line. Or one in the environment: {TOKEN}.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain, PEM: answers HTTPS.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="The certificate's key, PEM.")
@click.option("--insecure", is_flag=True, help="Let other machines in without a token.")
@click.option("--worker", "workers", metavar="URL", multiple=True, help="Address of a fold worker's /metrics, for the page; repeatable.")
@click.option("-v", "--verbose", is_flag=True, help="Log everything.")
@bootstrap_option
def serve(
    space: str,
    host: str,
    port: int,
    data: Path | None,
    memory_mb: int,
    rocksdb_mb: int,
    min_free_mb: int,
    max_keys: int,
    max_waiting: int,
    max_lag: float | None,
    client_timeout: float,
    drain: float,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    insecure: bool,
    workers: tuple[str, ...],
    verbose: bool,
    bootstrap: str | None,
) -> None:
    """Answer look-ups over HTTP, from a replica of a space's representations: crossrep serve kuairand-v1.

    \b
      curl localhost:8080/v1/user/17                                 one key
      curl localhost:8080/v1/user/batch -d '{"ids": ["17", "18"]}'   many
      curl localhost:8080/v1/item/5/nearest?column=cr                the nearest
      curl localhost:8080/openapi.json                               all there is
      http://localhost:8080/                                         the page: the flow as it is now, and its keys

    It follows the topics, keeps everything in RocksDB under --data, and keys in use in memory. A restart goes on from the disk. Run as
    many as you like behind a balancer, each with its own --data: none knows of the others. /ready is 200 once it has caught up.
    SIGTERM lets requests end, and stops. docs/serve.md says more.

    SPACE may be an alias, such as current: what is promoted is then loaded beside what is served, and takes its place in one step. That
    takes twice the memory and disk for so long (docs/spaces.md).
    """
    with extra("serve"):
        from serve import server
        from serve.options import Limits, Options

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    for name in ("serve", "state", "crossrep"):
        logging.getLogger(name).setLevel(logging.INFO)
    if verbose:
        logging.getLogger().setLevel(logging.INFO)
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if wrong := [url for url in workers if not url.startswith(("http://", "https://"))]:
        raise click.UsageError(f"--worker {wrong[0]}: write an address such as http://fold-0:8001")
    options = Options(
        folder=data or kafka.home() / "serve" / space,
        host=host,
        port=port,
        memory_mb=memory_mb,
        rocksdb_mb=rocksdb_mb,
        min_free_mb=min_free_mb,
        limits=Limits(keys=max_keys, waiting=max_waiting, max_lag=math.inf if max_lag is None else max_lag),
        client_timeout=client_timeout,
        drain=drain,
        tokens=tuple(tokens(token_file)),
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
        workers=workers,
    )
    address = kafka.bootstrap_servers(bootstrap)
    server.run(space, address, options)


def tokens(file: Path | None) -> list[bytes]:
    """The tokens that are valid: of the file, or else of the environment. Raises CrossrepError."""
    if file is None:
        found = [os.environ[TOKEN].strip().encode()] if TOKEN in os.environ else []
        where = TOKEN
    else:
        try:
            found = [line.strip() for line in file.read_bytes().splitlines() if line.strip()]
        except OSError as error:
            raise CrossrepError(f"--token-file {file}: {error.strerror}") from None
        where = f"--token-file {file}"
        if not found:
            raise CrossrepError(f"{where} holds no token. Make one: openssl rand -hex 32 > {file}")
    if any(len(token) < 16 for token in found):
        raise CrossrepError(f"{where}: a token has fewer than 16 bytes. Make one: openssl rand -hex 32")
    return found
