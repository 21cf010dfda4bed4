"""What every test needs: the shared suite's asserts explain themselves, and servers log errors only."""

import logging

import pytest
import structlog

pytest.register_assert_rewrite("tests.engine_suite")
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
