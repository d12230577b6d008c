"""Pictures of boxes: where lines are, that labels leave each other alone, sizes."""

import numpy as np
import pytest

from flexivit_jax.data import box_pictures
from flexivit_jax.data.box_pictures import Drawn
from flexivit_jax.data.class_colours import colour

GREY = np.full((400, 500, 3), 90, np.uint8)


def pixels(*boxes):
  """The picture of boxes, as large as the image."""
  return np.asarray(box_pictures.draw(GREY, boxes, shortest=1))


def test_a_line_in_the_colour_of_the_class_is_just_inside_the_box():
  got = pixels(Drawn((100, 50, 300, 250), 3))
  assert got.shape == GREY.shape
  for y, x in ((51, 200), (248, 200), (150, 101), (150, 298)):
    np.testing.assert_array_equal(got[y, x], colour(3))
  for y, x in ((49, 200), (250, 200), (150, 99), (150, 300), (150, 200)):
    np.testing.assert_array_equal(got[y, x], 90)


def test_labels_of_boxes_in_one_place_do_not_hide_each_other():
  font = box_pictures._font(14)
  same = [np.array([100.0, 100, 200, 200])] * 8
  places = box_pictures._labels(same, [f"class {k}" for k in range(8)], font, (500, 400), 2)
  for k, place in enumerate(places):
    assert box_pictures._covered(place, places[:k]) == 0
    assert min(place) >= 0 and place[2] < 500 and place[3] < 400


def test_what_is_most_important_is_on_top():
  got = pixels(Drawn((100, 50, 300, 250), 0), Drawn((100, 50, 300, 350), 1))
  np.testing.assert_array_equal(got[51, 200], colour(0))


@pytest.mark.parametrize(("hw", "size"), [((90, 180), (1280, 640)), ((1000, 4096), (2048, 500))])
def test_small_images_are_enlarged_and_large_ones_made_smaller(hw, size):
  image = np.zeros((*hw, 1), np.uint8)
  box = Drawn((0, 0, hw[1], hw[0]), 0, "all")
  assert box_pictures.draw(image, [box]).size == size
  assert box_pictures.draw(image, [], shortest=1, longest=100).size[0] == 100


def test_boxes_without_extent_and_beyond_the_edge_are_drawn():
  pixels(Drawn((500, 400, 500, 400), 2, "a point"), Drawn((-5, -5, 600, 1), 1, "x" * 100))
