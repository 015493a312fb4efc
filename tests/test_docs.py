"""The README's Python runs, and its loops are what the functions beside them compute."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_of_the_readme():
    use, write_loop, read_loop, layer, model = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    torch.manual_seed(0)
    names = {"ridge": 1.0, "noise_var": 1.0, "n": 1}
    exec(use, names)
    exec(write_loop, names)
    torch.testing.assert_close(names["mean"], names["written"].state.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(names["cov"], names["written"].state.cov, rtol=1e-4, atol=1e-4)

    names["queries"] = names["patterns"]
    exec(read_loop, names)
    recalled = names["fastkm"].read(names["mean"], names["patterns"], 1.0).values
    torch.testing.assert_close(names["queries"], recalled, rtol=1e-4, atol=1e-4)

    names |= {"codes": names["patterns"], "cues": names["patterns"]}
    exec(layer, names)
    assert names["memory"].prior_mean.grad.abs().sum() > 0

    exec(model, names)
    assert names["model"].memory.prior_mean.grad.abs().sum() > 0
