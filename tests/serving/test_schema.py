"""The OpenAPI document, held against the running service by schemathesis: no 500, and every answer as documented."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from m2d.serving.app import create_app
from m2d.serving.jobs import Jobs
from m2d.serving.settings import ServeConfig, ServingLimits
from tests.serving.conftest import LocalService, Serve


@pytest.fixture(scope="module")
def schema(config: ServeConfig, tmp_path_factory: pytest.TempPathFactory, serve: Serve) -> Iterator[Any]:
    """Of a service whose answers cost little."""
    limits = ServingLimits(images=2, steps=2, job_images=3, jobs=1)
    small = replace(config, limits=limits, directory=str(tmp_path_factory.mktemp("schema")))

    async def at_work(*_: object) -> None:
        """A job that takes longer than the test: images are what others test."""
        await asyncio.Event().wait()

    with closing(LocalService(small)) as service:
        service.jobs = Jobs(small.jobs_folder, at_work, limits=limits)
        url = serve(create_app(service, small), service.jobs)
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_whatever_is_sent_is_answered_as_documented(schema: Any, mode: GenerationMode) -> None:
    for operation in (found.ok() for found in schema.get_all_operations()):
        if mode == GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # it takes nothing that could be wrong

        @settings(
            max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def answer(case: schemathesis.Case) -> None:
            told = case.call(timeout=60)
            if told.status_code != 504:  # of a deadline that it asked for
                case.validate_response(told, checks=CHECKS)

        answer()
