from fuzz_readers import fuzz


def test_thirty_seconds_of_damaged_files_give_only_this_projects_errors() -> None:
    assert fuzz(30) == []
