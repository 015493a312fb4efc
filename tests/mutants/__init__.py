"""Small faults planted one by one; the tests must catch them. ``PYTHONPATH=tests python -m mutants`` plants them."""
