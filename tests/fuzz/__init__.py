"""Random problems of every size and scale, on which a float32 kernel is held to the literal float32 loop's own error.

``make fuzz SECONDS=60``, or ``PYTHONPATH=tests python -m fuzz --problems 1000 --seed 1``.

* **Problems** (:mod:`fuzz.problems`): update_posterior, write, read, solve_addressing; K, C and T from 1, scales from
  1e-4 to 1e4, σ² and λ from 1e-6 to 1e4, rows and patterns that nearly repeat, masks, every option.
* **Truth** (:mod:`fuzz.truth`): float64, from singular values and a root of the covariance. A Gram matrix in float64
  does not hold the hardest of these problems.
* **Yardstick** (:mod:`fuzz.judge`): a problem is four memories that differ by a few roundings of their entries. For
  every tensor of the result, and for the gradient by every input, the error is ``‖x − truth‖ / ‖truth‖`` over the
  tensor of one memory. Each of the four may be at most 4 (own + 2 eps) wrong, where own is the largest error of the
  literal float32 loop on the four. Where the loop refuses all four, own is how far the four truths lie apart, or what
  makes the bound 1e-4. The truth is computed twice, with the rows in another order, and own is at least the difference.
  For a gradient, 2 eps and 1e-4 are of the largest ``‖x‖ ‖to_x‖`` of any input.
* **Outcomes**: a result is good, missed, or not finite; or the memory is refused, and the public function names it.
"""
