"""The command's own parser, without a command line."""

import argparse

import pytest

from lowrank import compare


@pytest.fixture(scope="session")
def parse():
    def parse(*argv) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        compare.add_arguments(parser)
        return parser.parse_args([str(a) for a in argv])

    return parse
