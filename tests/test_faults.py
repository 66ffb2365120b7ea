"""The short form of `make faults`: damaged files give what was written, or one sentence."""

import pytest

from tests.support.faults import KINDS, damage_files


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")  # of Pillow and torch about damaged files
def test_damaged_files_are_noticed(name):
    outcomes = damage_files(name, 20)
    assert outcomes.keys() <= {"same", "refused", "read"}, outcomes
    assert outcomes["refused"] or name == "log"
