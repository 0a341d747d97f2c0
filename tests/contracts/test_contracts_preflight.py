"""What stops a check of preflight is told in the words that fit it."""

import pytest

from contracts.errors import TransientError, UserError
from contracts.preflight import findings_of


@pytest.mark.parametrize(
    "error", [TransientError("preflight was ended by signal 9"), UserError("no such model. Fix it.")]
)
def test_what_is_no_defect_is_one_message(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def check():  # type: ignore[no-untyped-def]
        raise error
        yield

    (finding,) = findings_of(check)
    assert (finding.level, finding.found) == ("error", str(error))
    assert capsys.readouterr().err == ""


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def check():  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("of ours")
        yield

    (finding,) = findings_of(check)
    assert "this check itself failed: ZeroDivisionError: of ours" in finding.found
    assert "Traceback" in capsys.readouterr().err
