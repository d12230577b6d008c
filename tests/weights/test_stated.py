import pytest

from flexivit_jax import errors, weights


@pytest.mark.parametrize(
  ("record", "size", "side"),
  [({}, None, 240), ({"image_size": [48, 48]}, None, 48), ({"image_size": [48, 48]}, 96, 96)],
)
def test_weights_that_state_nothing_get_squashed_images(record, size, side):
  assert weights.preparation(record, size) == f"decode|resize({side})|value_range(-1, 1)"


def test_a_run_prepares_its_images_as_its_evaluation_did_and_at_no_other_size():
  record = {"pp": "decode|resize(24)|value_range(-1, 1)", "source": {"file": "run"}}
  assert weights.preparation(record) == record["pp"]
  with pytest.raises(errors.UserError, match="--image_size=48: run says"):
    weights.preparation(record, 48)


def test_each_note_is_printed_once_and_to_stderr(capsys):
  weights.print_notes({"notes": ["One.", "Two.", "One."]})
  assert capsys.readouterr() == ("", "note: One.\nnote: Two.\n")
  weights.print_notes({})
