"""The servers' API key: who gives it, who makes it, who can read it, and where it never is. SECURITY.md promises this."""

import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import dump_settings, load_settings
from megatron_rl.config.settings import Settings
from megatron_rl.rollout import server as server_module
from megatron_rl.rollout.keys import api_key, made_key, read_key, served_key
from megatron_rl.rollout.own_servers import own_servers
from megatron_rl.rollout.server import ServerOptions, server_command

OPEN = "servers.host=0.0.0.0"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Of a run in a folder of its own."""
    base = ["policy.init=/models/base", "device.kind=cpu", f"run.directory={tmp_path / 'run'}"]
    return lambda *overrides: load_settings(None, [*base, *overrides])


def test_servers_beyond_this_machine_get_a_key(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """One for all of them and for all ranks, the same at the next start."""
    several = own_servers(settings(OPEN, "servers.count=3"))
    (key,) = {options.api_key for options in several}
    assert key == api_key(settings(OPEN)) and len(str(key)) > 40
    path = tmp_path / "run/servers/api_key"
    assert (path.read_text().strip(), mode(path), mode(path.parent), mode(tmp_path / "run")) == (key, 0o600, 0o700, 0o700)
    assert [each.name for each in path.parent.iterdir()] == ["api_key"]


@pytest.mark.parametrize(
    "overrides",
    [[], ["servers.host=localhost"], ["servers.host=::1"], ["servers.urls=[http://a:1]"], [OPEN, "servers.urls=[http://a:1]"]],
)
def test_where_nobody_else_can_reach_there_is_none(settings: Callable[..., Settings], overrides: list[str]) -> None:
    assert api_key(settings(*overrides)) is None
    assert {options.api_key for options in own_servers(settings(*overrides))} <= {None}
    assert not settings().run.directory.exists()


def test_a_key_that_is_given_is_taken(settings: Callable[..., Settings], tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("secret-1\n")
    given = settings(f"servers.api_key_file={path}", OPEN)
    assert own_servers(given)[0].api_key == api_key(given) == served_key(given, tmp_path / "urls") == "secret-1"
    assert not given.run.directory.exists()
    for text in ("", "two words", "\x07"):
        path.write_text(text)
        with pytest.raises(SettingsError, match="holds no key"):
            api_key(given)
    path.unlink()
    with pytest.raises(SettingsError, match="cannot be read"):
        api_key(given)


def test_a_run_finds_the_key_beside_the_urls(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """What `megatron-rl serve` has made there; several machines that share the file share the key."""
    urls = tmp_path / "shared/urls"
    key = served_key(settings(OPEN), urls)
    assert served_key(settings(OPEN), urls) == key == api_key(settings(f"servers.urls_file={urls}"))
    assert mode(tmp_path / "shared/urls.key") == 0o600
    assert served_key(settings(), urls) is None
    assert api_key(settings(f"servers.urls_file={tmp_path / 'others'}")) is None


def test_a_key_of_somebody_else_beside_the_urls_is_named(settings: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "urls.key").mkdir()  # as unreadable as a file can be to root
    message = r"the key beside servers\.urls_file = \S*/urls\.key: it cannot be read: .*Run as the user whose servers these are"
    with pytest.raises(SettingsError, match=message):
        api_key(settings(f"servers.urls_file={tmp_path / 'urls'}"))


def test_of_many_who_make_a_key_all_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "keys/key"
    with ThreadPoolExecutor(16) as threads:
        (key,) = set(threads.map(lambda _: made_key(path), range(64)))
    assert key == read_key(path) != made_key(tmp_path / "other")
    assert [each.name for each in path.parent.iterdir()] == ["key"]


def test_a_dry_run_makes_no_key(tmp_path: Path) -> None:
    words = ["serve", "org/name", "device.kind=cpu", OPEN, f"run.directory={tmp_path / 'run'}", "--dry-run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "--host=0.0.0.0" in result.output and "api" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_in_no_settings_and_on_no_command_line(settings: Callable[..., Settings]) -> None:
    run = settings(OPEN)
    (options,) = own_servers(run)
    secret = server_module._write_key(options) if options.log.parent.is_dir() else None
    assert options.api_key is not None and secret is not None and mode(secret) == 0o600
    for text in (dump_settings(run), repr(options), " ".join(server_command(options, 1, secret)), str(run)):
        assert options.api_key not in text


def test_the_key_is_starred_out_of_the_log(tmp_path: Path) -> None:
    """SGLang writes all of its arguments there. What stands around the key stays, and what the server adds meanwhile."""
    log = tmp_path / "log"
    key = "it's-a\\key"
    line = f"server_args=ServerArgs(model_path='m', api_key={key!r}, host='0.0.0.0')\n"
    with open(log, "w") as file:
        file.write(line * 2)
        file.flush()
        server_module._blank(log, repr(key).encode())
        file.write("ready\n")
    starred = line.replace(repr(key), "*" * len(repr(key)))
    assert log.read_text() == starred * 2 + "ready\n"


def test_open_servers_without_a_key_cannot_even_be_described(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="API key"):
        ServerOptions("m", tmp_path / "log", host="node7")
