"""The page of docs says what the cases say."""

from tests.distributed import table


def test_the_page_is_the_cases():
    assert table.PAGE.read_text() == table.page(), "run python -m tests.distributed.table"


def test_there_are_forty_cells_that_work():
    always = {case.name for case in table.compared() if table.is_always_run(case)}
    assert len(always) >= 40
