"""Requests made up from the OpenAPI document: whatever it allows is answered as it says."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from m2d.serving.app import create_app
from m2d.serving.jobs import Jobs
from m2d.serving.settings import ServeConfig, ServingLimits
from tests.serving.conftest import Serve

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def url(service: Any, config: ServeConfig, serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service whose orders are small and whose jobs never come to their work: the requests are many."""

    async def wait_for_ever(*_: object) -> None:
        await asyncio.Event().wait()

    limits = ServingLimits(images=2, steps=3, upload_bytes=2**20, job_images=50)
    own = type(service)(replace(config, directory=str(tmp_path_factory.mktemp("made_up")), limits=limits))
    own.jobs = Jobs(own.config.jobs_folder, wait_for_ever, limits=limits)
    yield serve(create_app(own, own.config), jobs=own.jobs)[0]
    own.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_makes_the_service_fail_or_answer_as_it_does_not_say(url, mode) -> None:
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for operation in document.get_all_operations():

        @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(base_url=url, checks=CHECKS)

        with suppress(Unsatisfiable):  # where nothing may be sent, nothing wrong can be
            check()
