import pytest
@pytest.mark.xdist_group("g")
@pytest.mark.parametrize("x", range(4))
def test_x(x): pass
@pytest.mark.parametrize("x", [pytest.param(i, marks=pytest.mark.xdist_group("h")) for i in range(4)])
def test_y(x): pass
