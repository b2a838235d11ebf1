import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

from app.errors import UserError
from app.training.trainer import _user_mistake


@pytest.mark.parametrize("mistake", [UserError("model='x': no such folder"), FloatingPointError("the loss is nan")])
def test_a_workers_error_that_the_user_can_mend_comes_without_ray_around_it(mistake: Exception) -> None:
    failure = WorkerGroupError("a traceback", {1: UserExceptionWithTraceback(mistake, "a traceback")})
    assert str(_user_mistake(failure)) == str(mistake)


def test_any_other_error_is_not_taken_for_one() -> None:
    failure = WorkerGroupError("a traceback", {0: UserExceptionWithTraceback(KeyError("bug"), "a traceback")})
    assert _user_mistake(failure) is None
