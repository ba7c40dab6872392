"""Keys: who gets in, and how many images a key may have."""

import hmac
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI
from starlette.testclient import TestClient

from m2d.errors import ConfigError
from m2d.serving.access import Access, Caller, keys_command
from m2d.serving.problems import Problem, install
from m2d.serving.settings import KeysConfig, ServeConfig
from tests.serving.conftest import new_key

MIDNIGHT = 1_700_006_400.0  # 2023-11-15 00:00 UTC


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def add(file: Path) -> Callable[..., str]:
    return partial(new_key, file)


class Clock:
    def __init__(self) -> None:
        self.time = MIDNIGHT + 3600.0

    def __call__(self) -> float:
        return self.time


def access_to(file: Path | None, clock: Clock | None = None) -> Access:
    directory = str(file.parent / "serving") if file else "./serving"
    config = ServeConfig(checkpoint=["x"], directory=directory, keys=str(file) if file else None)
    return Access(config, clock or Clock())


def client_of(file: Path | None) -> TestClient:
    app = FastAPI()
    install(app, ServeConfig(checkpoint=["x"], keys=str(file) if file else None))

    @app.get("/who")
    async def who(caller: Annotated[Caller, Depends(access_to(file))]) -> list[str | bool]:
        return [caller.name, caller.is_operator]

    return TestClient(app, base_url="http://localhost")


def who(client: TestClient, key: str) -> object:
    answer = client.get("/who", headers={"Authorization": f"Bearer {key}"})
    return answer.json() if answer.status_code == 200 else answer.status_code


def test_a_key_tells_who_calls(file, add) -> None:
    ann, bob = add("ann"), add("bob", operator=True)
    client = client_of(file)
    assert [who(client, ann), who(client, bob)] == [["ann", False], ["bob", True]]


def test_a_missing_key_and_a_wrong_one_are_answered_alike(file, add) -> None:
    key = add("ann")
    client = client_of(file)
    answers = [
        client.get("/who", headers=headers)
        for headers in ({}, {"Authorization": f"Bearer {key}x"}, {"Authorization": f"Basic {key}"})
    ]
    assert {(answer.status_code, answer.headers["WWW-Authenticate"]) for answer in answers} == {(401, "Bearer")}
    assert len({answer.json()["detail"] for answer in answers}) == 1


def test_without_a_file_of_keys_everybody_is_the_operator() -> None:
    assert who(client_of(None), "whatever") == ["local", True]


def test_a_key_counts_from_its_adding_to_its_removal_without_a_restart(file, add, capsys) -> None:
    add("ann")
    client = client_of(file)
    bob = add("bob")
    before = who(client, bob)
    keys_command(KeysConfig(words=["remove", "bob"], keys=str(file)))
    assert (before, who(client, bob)) == (["bob", False], 401)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text('{"ann": {"salt"')])
def test_when_the_file_is_spoilt_its_last_keys_still_count_and_the_log_says_so_once(file, add, spoil, caplog) -> None:
    key = add("ann")
    client = client_of(file)
    spoil(file)
    with caplog.at_level(logging.ERROR):
        assert [who(client, key) for _ in range(3)] == [["ann", False]] * 3
    assert len(caplog.messages) == 1


def test_every_key_is_compared_in_constant_time_whichever_is_right(file, add, monkeypatch) -> None:
    keys = [add(name) for name in ("ann", "bob", "cem")]
    client = client_of(file)
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *two: compared.append(two) or compare(*two))
    for key in [*keys, "m2d_wrong"]:
        compared.clear()
        who(client, key)
        assert len(compared) == 3


def test_the_file_is_its_owners_alone_and_holds_no_key(file, add) -> None:
    key = add("ann")
    assert file.stat().st_mode & 0o777 == 0o600
    assert key.startswith("m2d_")
    assert len(key) == 47  # 32 bytes in base64
    assert key[4:] not in file.read_text()


def test_two_keys_of_one_secret_would_not_show_it(file, add) -> None:
    add("ann"), add("bob")
    first, second = json.loads(file.read_text()).values()
    assert first["salt"] != second["salt"]


@pytest.mark.parametrize(
    "words",
    [["add", "ann"], ["add", "a b"], ["add", "../x"], ["add", ""], ["add"], ["remove", "bob"], ["list", "x"], []],
)
def test_what_the_command_cannot_do_is_refused_in_one_line_and_changes_nothing(file, add, words) -> None:
    add("ann")
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"^[^\n]+$"):
        keys_command(KeysConfig(words=words, keys=str(file)))
    assert file.read_bytes() == before


def test_the_list_tells_names_and_limits_only(file, add, capsys) -> None:
    key = add("ann", operator=True, images_per_day=50)
    keys_command(KeysConfig(words=["list"], keys=str(file)))
    line = capsys.readouterr().out
    entry = json.loads(file.read_text())["ann"]
    assert line.startswith("ann  operator  since 20")
    assert line.endswith("  50 images a day\n")
    assert not any(secret in line for secret in (key, entry["salt"], entry["hash"]))


@pytest.mark.parametrize("content", [None, "", "[]", '{"ann": 1}', '{"ann": {"key": "m2d_x"}}'])
def test_a_service_does_not_start_with_a_file_of_keys_that_is_none(file, content) -> None:
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"^keys: [^\n]+$"):
        access_to(file)


def refused(access: Access, caller: Caller, images: int) -> tuple[int, str, int]:
    with pytest.raises(Problem) as caught:
        access.spend(caller, images)
    problem = caught.value
    assert problem.headers
    return problem.status_code, problem.headers["Retry-After"], problem.more["limit"]


def test_a_key_has_its_images_of_a_minute_at_once_and_then_one_by_one(file, add) -> None:
    add("ann", images_per_minute=30)
    clock, ann = Clock(), Caller("ann", False)
    access = access_to(file, clock)
    access.spend(ann, 20)
    access.spend(ann, 10)
    assert refused(access, ann, 1) == (429, "2", 30)  # one every two seconds
    clock.time += 2
    access.spend(ann, 1)
    assert refused(access, ann, 5) == (429, "10", 30)


def test_more_than_a_minute_holds_is_possible_and_is_waited_for_afterwards(file, add) -> None:
    add("ann", images_per_minute=60)
    clock, ann = Clock(), Caller("ann", False)
    access = access_to(file, clock)
    access.spend(ann, 100)
    assert refused(access, ann, 1) == (429, "41", 60)  # 40 are owed, and the one


def test_keys_do_not_use_up_each_others_images(file, add) -> None:
    add("ann", images_per_minute=1), add("bob", images_per_minute=1)
    access = access_to(file)
    access.spend(Caller("ann", False), 1)
    access.spend(Caller("bob", False), 1)
    assert refused(access, Caller("ann", False), 1)[0] == 429


def test_the_quota_of_a_day_outlives_a_restart_and_ends_at_midnight_in_utc(file, add) -> None:
    add("ann", images_per_day=10)
    clock, ann = Clock(), Caller("ann", False)
    access_to(file, clock).spend(ann, 8)
    access = access_to(file, clock)
    assert refused(access, ann, 3) == (429, str(23 * 3600), 10)
    access.spend(ann, 2)
    clock.time += 23 * 3600
    access.spend(ann, 10)


def test_a_disk_that_takes_no_count_stops_no_images_and_no_counting(file, add, caplog) -> None:
    add("ann", images_per_day=10)
    (file.parent / "serving").write_text("a file where the service's directory should be")
    access = access_to(file)
    access.spend(Caller("ann", False), 10)
    assert refused(access, Caller("ann", False), 1)[2] == 10
    assert "usage.json cannot be written" in caplog.text


def test_images_that_were_not_made_are_given_back(file, add) -> None:
    add("ann", images_per_minute=10, images_per_day=10)
    ann = Caller("ann", False)
    access = access_to(file)
    access.spend(ann, 10)
    access.refund(ann, 4)
    assert ann.images == 6
    assert refused(access, ann, 5)[0] == 429
    access.spend(ann, 4)


def test_a_jobs_images_count_for_the_day_and_not_for_the_minute(file, add) -> None:
    add("ann", images_per_minute=1, images_per_day=100)
    ann = Caller("ann", False)
    access = access_to(file)
    access.spend(ann, 90, at_once=False)
    access.spend(ann, 1)
    with pytest.raises(Problem, match="9 are left"):
        access.spend(ann, 10, at_once=False)


def test_a_clock_set_back_takes_nothing(file, add) -> None:
    add("ann", images_per_minute=10)
    clock, ann = Clock(), Caller("ann", False)
    access = access_to(file, clock)
    access.spend(ann, 5)
    clock.time -= 1000
    access.spend(ann, 5)


def test_a_key_removed_while_its_request_runs_gets_nothing_more_and_nothing_fails(file, add) -> None:
    add("ann")
    access = access_to(file)
    ann = Caller("ann", False)
    access.spend(ann, 3)
    keys_command(KeysConfig(words=["remove", "ann"], keys=str(file)))
    access._read_again()
    access.refund(ann, 3)
    with pytest.raises(Problem, match="API key"):
        access.spend(ann, 1)
