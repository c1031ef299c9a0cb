"""A picture as a file of its own."""

from xml.etree import ElementTree

from nearkin.report.page import standalone
from nearkin.report.svg import Interval, forest


def test_a_picture_of_its_own_is_well_formed_and_has_its_colours():
    row = Interval("a<b", 1.0, 0.5, 1.5, "+1.0", 1)
    text = standalone(forest([row], title="t", description="d", label="l", band=0.5))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = root.find("{http://www.w3.org/2000/svg}style")
    assert "--s1:" in style.text
